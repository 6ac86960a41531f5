# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The plate tree on a hierarchical Gaussian: gap to the exact evidence, against RenyiELBO and TraceTMC_ELBO.

mu ~ N(0, 1); z_i ~ N(mu, 1); x_i ~ N(z_i, 1), i < N, so that x ~ N(0, 2 I + 1 1'); a mean-field guide that is a little
off. With k particles of mu, and k of each z_i, the tree evaluates the density of every row k^2 times; so does Pyro's
Tensor Monte Carlo with k samples of each, and RenyiELBO with K = k^2. Two looks: gap at an equal number of such
evaluations, and gap against the wall time of one gradient step. Times are medians of steps in turns, in one process.
Writes ``plate_tree.json``, ``plate_tree.md`` and ``plate_tree.png`` into ``benchmarks/results``.

"Tensor Monte Carlo" (Aitchison 2019, https://arxiv.org/abs/1806.08593).
"""

import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from pyro.infer import RenyiELBO, TraceTMC_ELBO
from pyro.infer.enum import config_enumerate
from support import arguments, keep, provenance, spread, surroundings
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO

METHODS = {
    "RenyiELBO": "one weight (RenyiELBO)",
    "TraceTMC_ELBO": "combinations (TraceTMC_ELBO)",
    "combine": "plate tree, combine=True",
    "tree": "plate tree",
}
MOST_NUMBERS = 20_000_000  # in one tensor


class Hierarchy:
    """Data, model, guide and exact evidence for N rows."""

    def __init__(self, size):
        self.size = size
        truth = torch.randn(())
        self.data = truth + math.sqrt(2.0) * torch.randn(size)
        mean = self.data.sum() / (2 + size)  # of mu given the data
        self.start = {
            "loc": mean + 0.5 * math.sqrt(2 / (size + 2)),  # half a posterior standard deviation off
            "scale": torch.tensor(math.sqrt(2 / (size + 2))),
            "locs": (self.data + mean) / 2 + 0.2,
            "scales": torch.ones(size),  # given mu it is 0.71
        }
        self.reset()

    def reset(self):
        pyro.clear_param_store()
        for name, value in self.start.items():
            pyro.param(name, value.clone())

    def model(self):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", self.size):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.data)

    def guide(self):
        pyro.sample("mu", dist.Normal(pyro.param("loc"), pyro.param("scale")))
        with pyro.plate("data", self.size):
            pyro.sample("z", dist.Normal(pyro.param("locs"), pyro.param("scales")))

    def evidence(self):
        x, n = self.data.double(), self.size
        quadratic = (x.square().sum() - x.sum() ** 2 / (n + 2)) / 2
        return (-0.5 * (quadratic + n * math.log(4 * math.pi) + math.log((n + 2) / 2))).item()

    def step(self, method, k):
        """What takes one gradient step's loss and gradients, at k x k evaluations of every row."""
        guide = self.guide
        if method == "RenyiELBO":
            elbo = RenyiELBO(alpha=0.0, num_particles=k * k, vectorize_particles=True, max_plate_nesting=1)
        elif method == "TraceTMC_ELBO":
            elbo = TraceTMC_ELBO(max_plate_nesting=1)
            guide = config_enumerate(guide, default="parallel", num_samples=k, expand=False)
        else:
            elbo = ImportanceWeightedELBO(k, plate_particles={"data": k}, combine=method == "combine")
        return lambda: elbo.loss_and_grads(self.model, guide)


def measure(size, options):
    """For each method and k: the gap with its standard error, and the time of a step."""
    pyro.set_rng_seed(size)
    problem, rows = Hierarchy(size), []
    evidence = problem.evidence()
    for k in tqdm(options.sides, desc=f"N = {size}", disable=options.smoke):
        if k * k * size > MOST_NUMBERS:
            break
        steps = {name: problem.step(name, k) for name in METHODS}
        found = {name: ([], []) for name in METHODS}
        for step in steps.values():
            step()  # the first looks at the model
        for _ in range(options.replicates):
            for name, step in steps.items():
                start = time.perf_counter()
                loss = step()
                found[name][0].append(time.perf_counter() - start)
                found[name][1].append(loss)
        for name, (times, losses) in found.items():
            gaps = evidence + torch.tensor(losses, dtype=torch.float64)
            error = gaps.std().item() / math.sqrt(len(gaps))
            row = {"method": name, "N": size, "k": k, "evaluations": k * k, "gap": gaps.mean().item(), "error": error}
            rows.append({**row, "seconds": spread(times)})
    return rows


def at_time(rows, name, when):
    """A method's gap at a wall time, between its two nearest measurements; None outside of these."""
    known = sorted((r["seconds"]["median"], max(r["gap"], 1e-6)) for r in rows if r["method"] == name)
    times, gaps = np.log(np.array(known)).T
    inside = times[0] <= math.log(when) <= times[-1]
    return math.exp(np.interp(math.log(when), times, gaps)) if inside else None


def table(result):
    lines = ["# The plate tree on a hierarchical Gaussian", ""]
    lines += [
        "Gap to the exact evidence in nats ± standard error, and median time of one gradient step in ms. k particles "
        "of the global latent and k of each local one; RenyiELBO has k² of everything, so that all evaluate the "
        "density of every row k² times."
    ]
    for size in sorted({r["N"] for r in result["rows"]}):
        rows = [r for r in result["rows"] if r["N"] == size]
        lines += ["", f"## N = {size}", ""]
        lines += ["| k | " + " | ".join(METHODS.values()) + " | share of RenyiELBO's gap | TMC at equal time |"]
        lines += ["|---|" + "---|" * (len(METHODS) + 2)]
        for k in sorted({r["k"] for r in rows}):
            by_name = {r["method"]: r for r in rows if r["k"] == k}
            cells = [
                f"{r['gap']:.3g} ± {r['error']:.1g}; {1000 * r['seconds']['median']:.1f}"
                for r in (by_name[name] for name in METHODS)
            ]
            share = by_name["tree"]["gap"] / by_name["RenyiELBO"]["gap"]
            peer = at_time(rows, "TraceTMC_ELBO", by_name["combine"]["seconds"]["median"])
            cells += [f"{share:.3f}", "" if peer is None else f"{peer:.3g}"]
            lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", provenance(result), ""])


def picture(rows):
    sizes = sorted({r["N"] for r in rows})
    figure, axes = plt.subplots(len(sizes), 2, figsize=(9.5, 3.6 * len(sizes)), squeeze=False, layout="constrained")
    for (left, right), size in zip(axes, sizes, strict=True):
        for marker, (name, label) in zip("osv^", METHODS.items(), strict=True):
            mine = [r for r in rows if r["method"] == name and r["N"] == size]
            gaps, errors = ([r[key] for r in mine] for key in ("gap", "error"))
            for axis, x in (
                (left, [r["evaluations"] for r in mine]),
                (right, [1000 * r["seconds"]["median"] for r in mine]),
            ):
                axis.errorbar(x, gaps, errors, marker=marker, capsize=2, label=label)
        left.set(xlabel="evaluations of every row's density, $k^2$", ylabel="evidence - bound (nats)")
        right.set(xlabel="time of one gradient step (ms)")
        for axis in (left, right):
            axis.set(xscale="log", yscale="log", title=f"{size} rows")
            axis.grid(alpha=0.3)
        right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        right.xaxis.set_major_formatter(ScalarFormatter())
        right.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].legend(fontsize="small")
    return figure


def main():
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--replicates", type=int, default=200)
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.sides, options.replicates = [5], [2, 3], 5
    torch.set_num_threads(options.threads)
    rows = [row for size in options.sizes for row in measure(size, options)]
    result = {
        "benchmark": "plate tree on a hierarchical Gaussian",
        **surroundings(),
        "settings": {"sizes": options.sizes, "sides": options.sides, "replicates": options.replicates},
        "rows": rows,
    }
    keep(result, table(result), "plate_tree", options, picture(rows))


if __name__ == "__main__":
    main()
