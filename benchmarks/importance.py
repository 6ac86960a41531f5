# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of ImportanceResampledGuide against Pyro's own importance sampling, on the eight schools.

A draw with K particles costs K weighted traces. ``pyro.infer.Importance`` makes them one by one; here all particles of
all draws share a few passes. Both are timed in one process, in turns, and Importance's time is extrapolated from fewer
traces. Writes ``importance.json`` and ``importance.md`` into ``benchmarks/results``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Importance, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from support import arguments, keep, provenance, seconds, spread, surroundings

from pyro_iwae import ImportanceResampledGuide

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # Rubin (1981)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effects):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effects", dist.Normal(theta, ERRORS), obs=effects)


def trained_guide(steps):
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(steps):
        svi.step(EFFECTS)
    return guide


def measure(num_draws, num_particles, num_traces, repeats, steps):
    """Seconds per repeat: the draws, and as many traces extrapolated from ``num_traces``."""
    guide = trained_guide(steps)
    posterior = ImportanceResampledGuide(model, guide, num_particles)
    factor = num_draws * num_particles / num_traces
    with torch.no_grad():
        first = seconds(lambda: posterior.sample(num_draws, EFFECTS))
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(seconds(lambda: posterior.sample(num_draws, EFFECTS)))
            sampler = Importance(model, guide, num_samples=num_traces)
            theirs.append(factor * seconds(lambda: sampler.run(EFFECTS)))  # noqa: B023
    return first, ours, theirs


def report(options):
    first, ours, theirs = measure(
        options.draws, options.particles, options.traces, options.repeats, options.training_steps
    )
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "benchmark": "ImportanceResampledGuide.sample against pyro.infer.Importance, eight schools, AutoNormal",
        **surroundings(),
        "settings": {
            "draws": options.draws,
            "particles": options.particles,
            "timed traces": options.traces,
            "repeats": options.repeats,
        },
        "seconds": {"first sample": first, "sample": spread(ours), "Importance, extrapolated": spread(theirs)},
        "ratio": spread(ratios),
    }


def table(result):
    settings = result["settings"]
    draws, particles = settings["draws"], settings["particles"]
    sample, importance, ratio = (
        result["seconds"]["sample"],
        result["seconds"]["Importance, extrapolated"],
        result["ratio"],
    )

    def cells(values, form):
        return " | ".join(format(values[name], form) for name in ("median", "lower quartile", "upper quartile"))

    return "\n".join(
        [
            "# Draws against weighted traces",
            "",
            f"Eight schools, AutoNormal: {draws:,} draws with K = {particles}, and as many weighted traces",
            f"({draws * particles:,}) of `pyro.infer.Importance`, extrapolated from {settings['timed traces']:,}.",
            f"{settings['repeats']} repeats, in turns.",
            "",
            "| seconds | median | lower quartile | upper quartile |",
            "|---|---|---|---|",
            f"| `ImportanceResampledGuide.sample` | {cells(sample, '.4f')} |",
            f"| `pyro.infer.Importance` | {cells(importance, '.1f')} |",
            f"| ratio | {cells(ratio, ',.0f')} |",
            "",
            f"The first call, which also looks at the model, takes {result['seconds']['first sample']:.3f} s.",
            provenance(result),
            "",
        ]
    )


def main():
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--traces", type=int, default=1000, help="traces of Importance that are timed")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--training-steps", type=int, default=1000)
    options = parser.parse_args()
    if options.smoke:
        options.draws, options.particles, options.traces, options.repeats, options.training_steps = 20, 5, 20, 2, 5
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    result = report(options)
    keep(result, table(result), "importance", options)


if __name__ == "__main__":
    main()
