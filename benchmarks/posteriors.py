# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors of hierarchical models: a mean-field guide, the same guide corrected by the plate tree, and NUTS.

Eight schools (Rubin 1981); a varying-intercept regression like that of radon in Minnesota's counties (85 groups,
simulated); a mixture of Gaussians whose discrete assignments the guide samples. Each guide is an ``AutoNormal``,
trained with ``Trace_ELBO``, or with ``ImportanceWeightedELBO(..., plate_particles=...)``, which makes it wider. The
latter, corrected by ``ImportanceResampledGuide(..., plate_particles=...)``, is compared with Pyro's NUTS (which sums
the assignments out): means and standard deviations of every latent. Writes ``posteriors.json``, ``posteriors.md``
and ``posteriors.png`` into ``benchmarks/results``.
"""

import math
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_median
from pyro.ops.stats import effective_sample_size
from support import arguments, keep, provenance, surroundings
from tqdm import tqdm, trange

from pyro_iwae import DoublyReparameterized, ImportanceResampledGuide, ImportanceWeightedELBO

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Schools:
    """Effects of coaching in eight schools, in units of ten points."""

    name = "eight schools"
    particles, inner = 2000, {"schools": 400}

    def model(self, centered=True):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(0.5))
        with pyro.plate("schools", 8):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:  # the same posterior, without its funnel
                noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
                theta = pyro.deterministic("theta", mu + tau * noise)
            pyro.sample("y", dist.Normal(theta, ERRORS / 10), obs=EFFECTS / 10)

    def guide(self):
        return AutoNormal(self.model, init_scale=0.5)

    def for_nuts(self):
        self.model(centered=False)

    def latents(self, draws):
        noise = draws.get("noise")
        theta = draws["theta"] if noise is None else draws["mu"][:, None] + draws["tau"][:, None] * noise
        return {"mu": draws["mu"], "tau": draws["tau"], "theta": theta}


class Radon:
    """Log radon by floor and county: few houses in most counties, which are told by an index."""

    name = "varying intercepts"
    particles, inner = 500, {"county": 64}
    counties = 85

    def __init__(self):
        sizes = 1 + dist.Poisson(dist.Gamma(0.7, 0.14).sample((self.counties,))).sample().long()
        self.county = torch.arange(self.counties).repeat_interleave(sizes)
        self.floor = dist.Bernoulli(0.2).sample(self.county.shape)
        intercepts = 1.4 + 0.3 * torch.randn(self.counties)
        self.y = intercepts[self.county] - 0.7 * self.floor + 0.75 * torch.randn(self.county.shape)

    def model(self):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("county", self.counties):
            a = pyro.sample("a", dist.Normal(mu, spread))
            houses = dist.Normal(a[..., self.county] + slope * self.floor, noise).log_prob(self.y)
            by_county = houses.new_zeros(*houses.shape[:-1], self.counties).index_add(-1, self.county, houses)
            pyro.factor("y", by_county)

    for_nuts = model

    def guide(self):
        return AutoNormal(self.model, init_scale=0.1)

    def latents(self, draws):
        return {n: draws[n] for n in ("mu", "spread", "slope", "noise", "a")}


class Mixture:
    """Two overlapping clusters; which row belongs to which is sampled by the guide."""

    name = "mixture, discrete locals"
    particles, inner = 1000, {"rows": 128}
    rows = 150

    def __init__(self):
        side = dist.Bernoulli(0.35).sample((self.rows,))
        self.x = torch.where(side > 0, 1.6, -1.4) + 0.9 * torch.randn(self.rows)

    def model(self, enumerate=None):
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        low = pyro.sample("low", dist.Normal(-1.5, 0.5))
        high = pyro.sample("high", dist.Normal(1.5, 0.5))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("rows", self.rows):
            side = pyro.sample("side", dist.Bernoulli(weight), infer={"enumerate": enumerate})
            pyro.sample("x", dist.Normal(torch.where(side > 0, high, low), scale), obs=self.x)

    def for_nuts(self):
        self.model(enumerate="parallel")

    def guide(self):
        continuous = AutoNormal(poutine.block(self.model, hide=["side"]), init_scale=0.1)
        start = (self.x > 0.25).to(self.x) * 2 - 1

        def guide():
            continuous()
            with pyro.plate("rows", self.rows):
                pyro.sample("side", dist.Bernoulli(logits=pyro.param("logits", start)))

        return guide

    def latents(self, draws):
        found = {n: draws[n] for n in ("weight", "low", "high", "scale")}
        if "side" in draws:
            return {**found, "side": draws["side"]}
        weight, low, high, scale = (draws[n][:, None] for n in ("weight", "low", "high", "scale"))
        one = weight.log() + dist.Normal(high, scale).log_prob(self.x)
        other = (-weight).log1p() + dist.Normal(low, scale).log_prob(self.x)
        return {**found, "side": (one - other).sigmoid()}  # its mean is all that is compared


LABELS = {
    "Trace_ELBO": "AutoNormal, Trace_ELBO",
    "guide": "AutoNormal, plate tree",
    "corrected": "the latter, corrected",
}
START = init_to_median(num_samples=20)  # or chains would give the two clusters other names
PROBLEMS = [Schools, Radon, Mixture]


def flat(problem, draws):
    """(draws, numbers) and the latents' names."""
    found = problem.latents(draws)
    names = [n if v.dim() == 1 else f"{n}[{i}]" for n, v in found.items() for i in range(v[0].numel())]
    return torch.cat([v.reshape(len(v), -1) for v in found.values()], 1), names


def moments(values):
    return torch.cat([values, values.square()], -1)


def mean_and_std(found, effective=None):
    """Mean and standard deviation out of first and second moments, with standard errors by the delta method."""
    first, second = found.mean(0).chunk(2)
    std = (second - first.square()).clamp(min=1e-12).sqrt()
    one, two = (found - found.mean(0)).chunk(2, -1)
    count = torch.full((2 * len(first),), float(len(found))) if effective is None else effective
    of_first, of_both = count[: len(first)].sqrt(), torch.minimum(*count.chunk(2)).sqrt()
    return {
        "mean": first,
        "mean error": one.std(0) / of_first,
        "std": std,
        "std error": ((two - 2 * first * one) / (2 * std)).std(0) / of_both,
    }


def train(problem, elbo, options):
    pyro.clear_param_store()
    guide = problem.guide()
    rate = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / options.steps)})
    svi = SVI(problem.model, guide, rate, elbo)
    for _ in trange(options.steps, desc=f"{problem.name}: training", disable=options.smoke):
        svi.step()
    return guide


def by_guide(problem, guide, options):
    with torch.no_grad():
        traces = [poutine.trace(guide).get_trace() for _ in range(options.draws)]
    names = [n for n in traces[0].stochastic_nodes if not n.endswith("_unconstrained") and n not in problem.inner]
    draws = {n: torch.stack([t.nodes[n]["value"] for t in traces]) for n in names}
    return flat(problem, draws)[0]


def corrected(problem, guide, options):
    """First and second moments under q_EW, one row for each batch of particles."""
    factor = 0.02 if options.smoke else 1.0
    inner = {n: max(2, int(m * factor)) for n, m in problem.inner.items()}
    count = max(2, int(problem.particles * factor))
    posterior = ImportanceResampledGuide(problem.model, guide, count, plate_particles=inner)
    rows = [
        posterior.expectation(lambda z: moments(flat(problem, z)[0]), num_batches=1)
        for _ in trange(options.batches, desc=f"{problem.name}: weighing", disable=options.smoke)
    ]
    elbo = ImportanceWeightedELBO(count, plate_particles=inner)
    weights = elbo.log_weights(problem.model, guide).weights
    return torch.stack(rows), (1 / weights.square().sum(0)).item()


def by_nuts(problem, options):
    """Draws of all chains, one below the other, and the effective number for each moment."""
    chains = []
    for _ in range(options.chains):
        pyro.clear_param_store()
        kernel = NUTS(
            problem.for_nuts, max_plate_nesting=1, jit_compile=True, ignore_jit_warnings=True, init_strategy=START
        )
        steps = {"num_samples": options.draws, "warmup_steps": options.draws // 2}
        mcmc = MCMC(kernel, **steps, disable_progbar=options.smoke)
        mcmc.run()
        values, names = flat(problem, mcmc.get_samples())
        chains.append(values)
    mean = torch.cat(chains).mean(0)  # a second moment about 0 would move with the mean, and mix as fast
    together = torch.stack([torch.cat([values, (values - mean).square()], -1) for values in chains])
    effective = effective_sample_size(together, 0, 1).clamp(min=4.0, max=options.chains * options.draws)
    return torch.cat(chains), names, effective


def measure(kind, options):
    pyro.set_rng_seed(1)
    problem = kind()
    seconds = {}

    def timed(name, call):
        start = time.perf_counter()
        found = call()
        seconds[name] = time.perf_counter() - start
        return found

    usual = timed("Trace_ELBO", lambda: train(problem, Trace_ELBO(8, vectorize_particles=True), options))
    found = {"Trace_ELBO": mean_and_std(moments(by_guide(problem, usual, options)))}
    few = {name: 16 for name in problem.inner}
    tree = ImportanceWeightedELBO(32, plate_particles=few, gradient=DoublyReparameterized())
    guide = timed("tree", lambda: train(problem, tree, options))
    found["guide"] = mean_and_std(moments(by_guide(problem, guide, options)))
    rows, ess = timed("correction", lambda: corrected(problem, guide, options))
    draws, names, effective = timed("NUTS", lambda: by_nuts(problem, options))
    found |= {"corrected": mean_and_std(rows), "NUTS": mean_and_std(moments(draws), effective)}
    tables = {label: {k: v.tolist() for k, v in values.items()} for label, values in found.items()}
    return {
        "model": problem.name,
        "names": names,
        "particles": problem.particles,
        "seconds": seconds,
        "ESS at the root": ess,
        **tables,
    }


def shift(result, label):
    """Distance of means from NUTS's, in its standard deviations, and ratio of standard deviations."""
    ours, nuts = result[label], result["NUTS"]
    chosen = [i for i, n in enumerate(result["names"]) if not n.startswith("side")]
    means = [abs(ours["mean"][i] - nuts["mean"][i]) / nuts["std"][i] for i in chosen]
    stds = [ours["std"][i] / nuts["std"][i] for i in chosen]
    return max(means), min(stds), max(stds)


def z_scores(result, batches):
    """Differences from NUTS over their standard errors."""
    ours, nuts = result["corrected"], result["NUTS"]
    found = []
    for i, name in enumerate(result["names"]):
        for part in ("mean",) if name.startswith("side") else ("mean", "std"):
            error = math.hypot(ours[f"{part} error"][i], nuts[f"{part} error"][i])
            if name.startswith("side"):  # as often 0 as not: what was drawn says little of how rare it is
                chance = nuts["mean"][i]
                error = math.hypot(error, math.sqrt(chance * (1 - chance) / (result["ESS at the root"] * batches)))
            found.append((ours[part][i] - nuts[part][i]) / error)
    return found


def table(results, settings):
    lines = ["# Posteriors of hierarchical models, against NUTS", ""]
    lines += [
        "Means and standard deviations of all latents, of an AutoNormal trained with Trace_ELBO, of one trained with "
        "the plate tree's bound, and of the latter corrected. `off by`: the largest distance of a mean from NUTS's, in "
        "NUTS's standard deviations; `sd`: smallest and largest ratio of a standard deviation to NUTS's. `largest z`: "
        "of all differences between corrected guide and NUTS, over their standard errors, and what the largest of so "
        "many independent ones exceeds in 1 of 20 cases. `ESS`: of the particles of the root."
    ]
    lines += ["", "| model | latents | Trace_ELBO: off by, sd | tree bound: off by, sd | corrected: off by, sd "]
    lines[-1] += "| largest z | ESS | seconds: Trace_ELBO, tree bound, correction, NUTS |"
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in results:
        parts = [shift(r, label) for label in ("Trace_ELBO", "guide", "corrected")]
        cells = [f"{mean:.2f}, {low:.2f} to {high:.2f}" for mean, low, high in parts]
        z = [abs(v) for v in z_scores(r, settings["settings"]["batches"])]
        usual = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.025 / len(z))).item()
        cells += [f"{max(z):.1f} (usual {usual:.1f})", f"{r['ESS at the root']:.0f} of {r['particles']}"]
        cells += [", ".join(f"{v:.0f}" for v in r["seconds"].values())]
        lines.append(f"| {r['model']} | {len(r['names'])} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", provenance(settings), ""])


def picture(results):
    figure, axes = plt.subplots(2, len(results), figsize=(4.2 * len(results), 7.2), layout="constrained", squeeze=False)
    for column, r in zip(axes.T, results, strict=True):
        chosen = [i for i, n in enumerate(r["names"]) if not n.startswith("side")]
        for axis, part in zip(column, ("mean", "std"), strict=True):
            nuts = np.array(r["NUTS"][part])[chosen]
            for label, marker in zip(("Trace_ELBO", "guide", "corrected"), "ovs", strict=True):
                ours = np.array(r[label][part])[chosen]
                errors = np.hypot(np.array(r[label][f"{part} error"]), np.array(r["NUTS"][f"{part} error"]))[chosen]
                axis.errorbar(nuts, ours, 2 * errors, fmt=marker, ms=4, alpha=0.7, label=LABELS[label])
            ends = [min(nuts.min(), ours.min()), max(nuts.max(), ours.max())]
            axis.plot(ends, ends, color="gray", lw=1, zorder=0)
            axis.set(xlabel=f"NUTS: {part}", ylabel=f"ours: {part}")
        column[0].set_title(r["model"])
    axes[0][0].legend()
    return figure


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.draws, options.chains, options.batches = 5, 10, 2, 4
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # of Pyro's jit_compile
    results = [measure(kind, options) for kind in tqdm(PROBLEMS, disable=True)]
    result = {
        "benchmark": "posteriors of hierarchical models against NUTS",
        **surroundings(),
        "settings": {n: getattr(options, n) for n in ("steps", "draws", "chains", "batches")},
        "results": results,
    }
    keep(result, table(results, result), "posteriors", options, picture(results))


if __name__ == "__main__":
    main()
