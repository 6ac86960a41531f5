# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators against Pyro's RenyiELBO: cost of a step, and held-out evidence after equal wall time.

Three tables. Time and peak memory of one step of a 784-200-200-50 VAE on batches of 100, for K from 8 to 5,000:
medians of steps in turns, in one process; the peak in a fresh process each. Log evidence of held-out digits after
training a VAE for the same wall time with each estimator, over several seeds, in turns of a second. Noise of the
score-function estimators on small models. Writes ``gradients.json``, ``gradients.md`` and ``gradients.png`` into
``benchmarks/results``.
"""

import functools
import math
import os
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from sklearn.datasets import load_digits
from support import arguments, keep, provenance, seconds, spread, surroundings
from support.memory import high_water
from support.vae import VAE
from tqdm import tqdm

from pyro_iwae import (
    OVIS,
    VIMCO,
    DoublyReparameterized,
    ImportanceWeightedELBO,
    Pathwise,
    SampledBackward,
    StickTheLanding,
)

GRADIENTS = {
    "Pathwise": Pathwise(),
    "StickTheLanding": StickTheLanding(),
    "DoublyReparameterized": DoublyReparameterized(),
    "SampledBackward(8)": SampledBackward(8),
    "SampledBackward(2)": SampledBackward(2),
}
ESTIMATORS = ["RenyiELBO", *GRADIENTS]


def make_elbo(name, particles):
    if name == "RenyiELBO":
        return RenyiELBO(alpha=0.0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    return ImportanceWeightedELBO(particles, gradient=GRADIENTS[name])


# Cost of a step


def large_vae(smoke):
    return VAE(784, [200, 200], 50) if not smoke else VAE(16, [8, 8], 3)


def batch(smoke):
    return torch.bernoulli(torch.full((100, 784) if not smoke else (4, 16), 0.3))


def step_times(particles, repeats, smoke):
    """Seconds of each step, in turns, after one that looks at the model."""
    pyro.clear_param_store()
    vae, x = large_vae(smoke), batch(smoke)
    elbos = {name: make_elbo(name, particles) for name in ESTIMATORS}
    taken = {name: [] for name in ESTIMATORS}
    for repeat in range(repeats + 1):
        for name, elbo in elbos.items():
            vae.zero_grad(set_to_none=True)
            duration = seconds(lambda: elbo.loss_and_grads(vae.model, vae.guide, x))  # noqa: B023
            if repeat:
                taken[name].append(duration)
    return taken


def print_peak(name, particles, smoke):
    """In a process of its own: bytes that two steps take beyond what a step of two particles does."""
    vae, x = large_vae(smoke), batch(smoke)
    make_elbo(name, 2).loss_and_grads(vae.model, vae.guide, x)
    before = high_water()
    elbo = make_elbo(name, particles)
    for _ in range(2):
        elbo.loss_and_grads(vae.model, vae.guide, x)
    print(high_water() - before)


@functools.cache
def peak(name, particles, smoke):
    command = [sys.executable, __file__, "--peak", name, str(particles), *(["--smoke"] if smoke else [])]
    # What is freed goes back at once, so that the peak is what a step needs and not what glibc keeps at hand.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def costs(options):
    rows = []
    for particles in tqdm(options.particles, desc="cost of a step"):
        repeats = max(3, min(options.repeats, 2500 // particles))
        taken = step_times(particles, repeats, options.smoke)
        full = spread(taken["Pathwise"])["median"]
        for name in ESTIMATORS:
            rows.append(
                {
                    "estimator": name,
                    "K": particles,
                    "seconds": spread(taken[name]),
                    "of pathwise": spread(taken[name])["median"] / full,
                    "peak bytes": peak("Pathwise" if options.smoke else name, particles, options.smoke),
                }
            )
    return rows


# Evidence after equal wall time


def digits(seed):
    pixels = torch.tensor(load_digits().data, dtype=torch.get_default_dtype())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return pixels[order[:1437]], pixels[order[1437:]]


class Training:
    """One estimator's training, which can be taken up again for another second."""

    def __init__(self, name, options, seed, train):
        torch.manual_seed(seed)  # all start from the same weights
        self.vae, self.train, self.steps, self.used = VAE(64, [100, 100], options.latents, 16), train, 0, 0.0
        optimiser = torch.optim.Adam(self.vae.parameters(), lr=1e-3)
        self.elbo, self.optimiser = make_elbo(name, options.train_particles), optimiser
        self.generator = torch.Generator().manual_seed(seed)
        self.step()  # looks at the model
        self.used = 0.0

    def step(self):
        start = time.perf_counter()
        rows = torch.randint(len(self.train), (64,), generator=self.generator)
        self.optimiser.zero_grad()
        self.elbo.loss_and_grads(self.vae.model, self.vae.guide, self.train[rows])
        self.optimiser.step()
        self.used += time.perf_counter() - start
        self.steps += 1

    def go_on(self, until):
        while self.used < until:
            self.step()


def evidence(vae, test, particles):
    with torch.no_grad():
        return ImportanceWeightedELBO(particles).bound(vae.model, vae.guide, test).mean().item()


def equal_time(options):
    """Held-out evidence of each estimator and seed, in nats per digit, and how many steps fitted in."""
    rows = []
    turns = max(1, round(options.seconds))
    with tqdm(total=options.seeds * turns, desc="training") as bar:
        for seed in range(options.seeds):
            train, test = digits(seed)
            runs = {}
            for name in ESTIMATORS:
                pyro.clear_param_store()
                runs[name] = Training(name, options, seed, train)
            for turn in range(turns):
                for run in runs.values():
                    pyro.clear_param_store()
                    run.go_on((turn + 1.0) * options.seconds / turns)
                bar.update()
            for name, run in runs.items():
                pyro.clear_param_store()
                found = evidence(run.vae, test, options.test_particles)
                rows.append({"estimator": name, "seed": seed, "evidence": found, "steps": run.steps})
            bar.set_postfix(best=f"{max(r['evidence'] for r in rows if r['seed'] == seed):.2f}")
    return rows


def compared(rows):
    """Mean evidence and mean difference to RenyiELBO, paired by seed, with standard errors."""
    found = {}
    by_seed = {(r["estimator"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    for name in ESTIMATORS:
        values = torch.tensor([by_seed[name, s]["evidence"] for s in seeds], dtype=torch.float64)
        gains = values - torch.tensor([by_seed["RenyiELBO", s]["evidence"] for s in seeds], dtype=torch.float64)
        root = math.sqrt(len(seeds))
        found[name] = {
            "evidence": values.mean().item(),
            "error": values.std().item() / root,
            "gain": gains.mean().item(),
            "gain error": gains.std().item() / root,
            "steps": sum(by_seed[name, s]["steps"] for s in seeds) / len(seeds),
        }
    return found


# Noise of score-function estimators


def coin(p, n, scale=1.0):
    def model():
        with pyro.plate("copies", n):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("copies", n), poutine.scale(scale=scale):
            pyro.sample("z", dist.Bernoulli(logits=p))

    return model, guide


def chain(p, n, scale=1.0):
    def model():
        with pyro.plate("copies", n):
            with poutine.scale(scale=scale):
                z1 = pyro.sample("z1", dist.Bernoulli(torch.tensor(0.3)))
                z2 = pyro.sample("z2", dist.Bernoulli(logits=2.0 * z1 - 0.6))
            pyro.sample("x", dist.Normal(z1 + 2.0 * z2, 1.0), obs=torch.tensor(1.3))

    def guide():
        with pyro.plate("copies", n), poutine.scale(scale=scale):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=p - 0.4))
            pyro.sample("z2", dist.Bernoulli(logits=p + 0.3 + 0.8 * z1))

    return model, guide


NOISE_CASES = {
    "coin": (coin, 1.0),
    "chain of two": (chain, 1.0),
    "coin, tempered": (coin, 0.4),
    "chain of two, tempered": (chain, 0.4),
}


def noise(options):
    """Standard deviation of the gradient by a guide's logit, for VIMCO and OVIS."""
    rows = []
    for name, (case, scale) in NOISE_CASES.items():
        for particles in (2, 5, 20, 100):
            row = {"case": name, "K": particles}
            for score in (VIMCO(), OVIS()):
                logit = torch.full((options.copies,), 0.5, dtype=torch.float64, requires_grad=True)
                model, guide = case(logit, options.copies, scale)
                loss = ImportanceWeightedELBO(particles, score=score).differentiable_loss(model, guide)
                row[repr(score)] = torch.autograd.grad(loss, logit)[0].std().item()
            rows.append(row)
    return rows


# Reports


def by_particles(rows, cell):
    counts = sorted({r["K"] for r in rows})
    lines = ["| estimator | " + " | ".join(f"K = {k:,}" for k in counts) + " |", "|---|" + "---|" * len(counts)]
    for name in ESTIMATORS:
        found = [next(r for r in rows if r["estimator"] == name and r["K"] == k) for k in counts]
        lines.append(f"| `{name}` | " + " | ".join(cell(r) for r in found) + " |")
    return lines


def table(result):
    settings, steps, outcome = result["settings"], result["steps"], result["compared"]
    lines = ["# Gradient estimators", "", "## Cost of a step", ""]
    lines += [
        "Milliseconds, and their share of `Pathwise`'s: 784-200-200-50 VAE, batches of 100; medians in turns.",
        "",
    ]
    lines += by_particles(steps, lambda r: f"{1e3 * r['seconds']['median']:,.0f} ({r['of pathwise']:.2f})")
    heading = "Peak memory beyond that of a step of two particles, in MB; in a fresh process, freed memory handed back."
    lines += ["", heading, ""]
    lines += by_particles(steps, lambda r: f"{r['peak bytes'] / 1e6:,.0f}")
    lines += [
        "",
        "## Held-out evidence after equal wall time",
        "",
        f"360 held-out digits, {settings['seconds']:g} s of training each, K = {settings['train particles']}, in "
        f"turns; {settings['seeds']} seeds (weights, split and batches). Log evidence "
        f"(K = {settings['test particles']:,}) in nats per digit, and gain over `RenyiELBO`, paired by seed, ± "
        "standard errors over seeds.",
        "",
        "| estimator | evidence | gain | steps |",
        "|---|---|---|---|",
    ]
    for name, found in outcome.items():
        gain = "" if name == "RenyiELBO" else f"{found['gain']:+.2f} ± {found['gain error']:.2f}"
        lines.append(f"| `{name}` | {found['evidence']:.2f} ± {found['error']:.2f} | {gain} | {found['steps']:,.0f} |")
    lines += [
        "",
        "## Noise of score-function estimators",
        "",
        "Standard deviation of the gradient by a logit of the guide.",
        "",
        "| case | K | `VIMCO` | `OVIS` | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["noise"]:
        a, b = row["VIMCO()"], row["OVIS()"]
        lines.append(f"| {row['case']} | {row['K']} | {a:.3g} | {b:.3g} | {a / b:.2f} |")
    return "\n".join([*lines, "", provenance(result), ""])


def picture(result):
    figure, axes = plt.subplots(1, 3, figsize=(12.0, 3.8), layout="constrained")
    for name, marker in zip(ESTIMATORS, "xosv^<", strict=True):
        rows = [r for r in result["steps"] if r["estimator"] == name]
        counts = [r["K"] for r in rows]
        axes[0].plot(counts, [1e3 * r["seconds"]["median"] for r in rows], marker=marker, label=name)
        axes[1].plot(counts, [max(r["peak bytes"], 1e6) / 1e6 for r in rows], marker=marker)
    axes[0].set(xscale="log", yscale="log", xlabel="particles K", ylabel="milliseconds per step")
    axes[1].set(xscale="log", yscale="log", xlabel="particles K", ylabel="peak memory, MB")
    axes[0].legend(fontsize="small")
    names = [n for n in result["compared"] if n != "RenyiELBO"]
    gains = [result["compared"][n] for n in names]
    colors = [f"C{1 + i}" for i in range(len(names))]
    axes[2].barh(names, [g["gain"] for g in gains], xerr=[g["gain error"] for g in gains], color=colors)
    axes[2].axvline(0.0, color="black", lw=0.8)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("gain in held-out evidence over RenyiELBO,\nnats per digit, equal wall time")
    return figure


def main():
    parser = arguments(__doc__)
    parser.add_argument("--peak", nargs=2, help="print the peak memory of one estimator and K, and nothing else")
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 50, 500, 5000])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of each estimator and seed")
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--train-particles", type=int, default=50)
    parser.add_argument("--test-particles", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), options.smoke)
        return
    if options.smoke:
        options.particles, options.repeats, options.seeds, options.seconds = [3], 2, 2, 0.05
        options.train_particles, options.test_particles, options.copies = 3, 5, 50
    rows = equal_time(options)
    result = {
        "benchmark": "gradient estimators: cost of a step, evidence after equal wall time, noise",
        **surroundings(),
        "settings": {
            "latents": options.latents,
            "seconds": options.seconds,
            "seeds": options.seeds,
            "train particles": options.train_particles,
            "test particles": options.test_particles,
        },
        "steps": costs(options),
        "trainings": rows,
        "compared": compared(rows),
        "noise": noise(options),
    }
    keep(result, table(result), "gradients", options, picture(result))


if __name__ == "__main__":
    main()
