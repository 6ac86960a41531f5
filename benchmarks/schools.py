# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Eight schools: an AutoNormal, the same guide corrected by resampling, and NUTS; khat says which to believe.

The model is written twice: centred, with a funnel that no Gaussian follows, and non-centred. An ``AutoNormal`` of
each is trained with ``Trace_ELBO`` and with ``ImportanceWeightedELBO``. Means and standard deviations of all ten
latents, of the guide and under q_EW (``ImportanceResampledGuide.expectation``), are compared with Pyro's NUTS;
``evaluate`` gives ESS and Pareto's khat. Writes ``schools.json`` and ``schools.md`` into ``benchmarks/results``.
"""

import math
import warnings

import pyro
import torch
from posteriors import Schools, by_guide, by_nuts, flat, mean_and_std, moments, shift, train
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from support import arguments, keep, provenance, surroundings
from tqdm import trange

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, evaluate


class Centred(Schools):
    name = "centred"


class NonCentred(Schools):
    name = "non-centred"

    def model(self, centered=False):
        super().model(centered)

    def guide(self):
        return AutoNormal(self.model, init_scale=0.5)


def corrected(problem, guide, options):
    """First and second moments under q_EW, one row for each batch of particles."""
    posterior = ImportanceResampledGuide(problem.model, guide, options.particles)
    return torch.stack(
        [
            posterior.expectation(lambda z: moments(flat(problem, z)[0]), num_batches=1)
            for _ in trange(options.batches, desc=f"{problem.name}: weighing", disable=options.smoke)
        ]
    )


def largest_z(ours, nuts):
    """Of all differences over their standard errors."""
    return max(
        abs(a - b) / math.hypot(c, d)
        for part in ("mean", "std")
        for a, b, c, d in zip(ours[part], nuts[part], ours[f"{part} error"], nuts[f"{part} error"], strict=True)
    )


def measure(kind, label, elbo, nuts, options):
    pyro.set_rng_seed(1)
    problem = kind()
    guide = train(problem, elbo, options)
    by_itself = mean_and_std(moments(by_guide(problem, guide, options)))
    by_weight = mean_and_std(corrected(problem, guide, options))
    found = evaluate(
        problem.model,
        guide,
        num_particles=options.particles,
        num_replicates=options.batches,
        progress=not options.smoke,
    )
    return {
        "model": problem.name,
        "trained with": label,
        "names": nuts["names"],
        "log evidence": [found.total.log_evidence, found.total.std_error],
        "drawn": options.particles * options.batches,
        "ESS": found.ess.item(),
        "khat": found.khat.item(),
        "khat threshold": found.khat_threshold.item(),
        "trusted": bool(found.trusted),
        **{n: {k: v.tolist() for k, v in m.items()} for n, m in (("guide", by_itself), ("corrected", by_weight))},
        "NUTS": nuts["moments"],
    }


def table(results, settings):
    lines = ["# Eight schools: an AutoNormal corrected, against NUTS", ""]
    lines += [
        "Means and standard deviations of all ten latents. `off by`: the largest distance of a mean from NUTS's, in "
        "NUTS's standard deviations; `sd`: smallest and largest ratio of a standard deviation to NUTS's. `largest z`: "
        "of all differences between corrected guide and NUTS, over their standard errors; the largest of so many "
        "independent ones exceeds 3.0 in 1 of 20 cases. `believed`: what `evaluate(...).trusted` says."
    ]
    lines += [
        "",
        "| model | trained with | guide: off by, sd | corrected: off by, sd | largest z | log p(x) | ESS | khat ",
    ]
    lines[-1] += "| believed |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        cells = [f"{m:.2f}, {low:.2f} to {high:.2f}" for m, low, high in (shift(r, n) for n in ("guide", "corrected"))]
        evidence, error = r["log evidence"]
        cells += [f"{largest_z(r['corrected'], r['NUTS']):.1f}", f"{evidence:.3f} ± {error:.3f}"]
        cells += [f"{r['ESS']:.0f} of {r['drawn']}", f"{r['khat']:.2f} (most {r['khat threshold']:.2f})"]
        lines.append(
            f"| {r['model']} | {r['trained with']} | {' | '.join(cells)} | {'yes' if r['trusted'] else 'no'} |"
        )
    return "\n".join([*lines, "", provenance(settings), ""])


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.draws, options.chains, options.particles, options.batches = 5, 10, 2, 100, 4
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # of Pyro's jit_compile
    pyro.set_rng_seed(0)
    draws, names, effective = by_nuts(Schools(), options)
    exact = mean_and_std(moments(draws), effective)
    nuts = {"names": names, "moments": {k: v.tolist() for k, v in exact.items()}}
    ways = [
        ("Trace_ELBO", Trace_ELBO(8, vectorize_particles=True)),
        ("ImportanceWeightedELBO, K = 16", ImportanceWeightedELBO(16)),
    ]
    results = [measure(kind, *way, nuts, options) for kind in (Centred, NonCentred) for way in ways]
    chosen = ("steps", "draws", "chains", "particles", "batches")
    result = {
        "benchmark": "eight schools, corrected, against NUTS",
        **surroundings(),
        "settings": {n: getattr(options, n) for n in chosen},
        "results": results,
    }
    keep(result, table(results, result), "schools", options)


if __name__ == "__main__":
    main()
