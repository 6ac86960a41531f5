# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Signal-to-noise ratio of the gradient as K grows, on the Gaussian of Rainforth et al. (2018).

Model z ~ N(mu, I), x | z ~ N(z, I) in 20 dimensions; guide z ~ N(A x + b, (2/3) I); parameters near their optimum, each
moved by N(0, 0.01^2). For the guide the pathwise ratio falls as K^-1/2 and the doubly reparameterised one grows as
K^1/2; for the model all grow as K^1/2. Writes ``snr.json``, ``snr.md`` and ``snr.png`` into ``benchmarks/results``.

"Tighter Variational Bounds Are Not Necessarily Better", https://arxiv.org/abs/1802.04537.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from support import arguments, keep, provenance, surroundings

from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO, Pathwise, StickTheLanding, gradient_snr

DIMENSIONS = 20
ESTIMATORS = {
    "Pathwise": Pathwise(),
    "StickTheLanding": StickTheLanding(),
    "DoublyReparameterized": DoublyReparameterized(),
}
LAWS = {
    "guide": [("DoublyReparameterized", 0.5, "$K^{1/2}$"), ("Pathwise", -0.5, "$K^{-1/2}$")],
    "model": [("DoublyReparameterized", 0.5, "$K^{1/2}$")],
}


def moved(value):
    return value + 0.01 * torch.randn_like(value)


def model(x):
    mu = pyro.param("mu")
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x):
    loc = x @ pyro.param("A").T + pyro.param("b")
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, math.sqrt(2.0 / 3.0)).to_event(1))


def measure(options):
    """For each estimator and K: ratios of guide and model with standard errors."""
    truth = torch.randn(DIMENSIONS)
    x = truth + math.sqrt(2.0) * torch.randn(options.rows, DIMENSIONS)
    pyro.param("mu", moved(x.mean(0)))  # the optimum, moved
    pyro.param("A", moved(0.5 * torch.eye(DIMENSIONS)))
    pyro.param("b", moved(0.5 * x.mean(0)))
    rows = []
    for particles in options.particles:
        found = {}
        for name, gradient in ESTIMATORS.items():
            elbo = ImportanceWeightedELBO(particles, gradient=gradient)
            found[name] = snr = gradient_snr(elbo, model, guide, x, num_replicates=options.replicates)
            row = {"estimator": name, "K": particles, "guide": snr.guide, "guide error": snr.guide_error}
            rows.append({**row, "model": snr.model, "model error": snr.model_error})
        pathwise = next(r for r in rows if r["K"] == particles and r["estimator"] == "Pathwise")
        pathwise |= with_the_mean_of(found["DoublyReparameterized"], found["Pathwise"])
    return rows


def with_the_mean_of(less_noisy, noisy):
    """The guide's ratio of one unbiased estimator, with the mean that another one measures far better."""
    count = less_noisy.num_replicates
    means, noises = ([p for p in snr.parameters if p.role == "guide"] for snr in (less_noisy, noisy))
    signal = sum((p.mean.square() - p.std**2 / count).sum().item() for p in means)
    ratio = math.sqrt(max(signal, 1e-12) / sum(p.std.square().sum().item() for p in noises))
    relative = math.hypot(less_noisy.guide_error / less_noisy.guide, (2 * count) ** -0.5)
    return {"guide": ratio, "guide error": ratio * relative}


def exponent(rows, name, part, last=None):
    """Slope of log ratio over log K by least squares, with its standard error.

    Over all K, or the ``last`` few, where there are enough particles for the law of large K.
    """
    chosen = [r for r in rows if r["estimator"] == name][-last if last else None :]
    x = np.log([r["K"] for r in chosen])
    values = np.array([max(r[part], 1e-6) for r in chosen])
    y, errors = np.log(values), np.array([r[f"{part} error"] for r in chosen]) / values
    pull = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return float((pull * y).sum()), float(np.sqrt((pull**2 * errors**2).sum()))


def table(result):
    rows, exponents = result["ratios"], result["exponents"]
    counts = sorted({r["K"] for r in rows})
    lines = [
        "# Signal-to-noise ratio of the gradient",
        "",
        f"Gaussian in {DIMENSIONS} dimensions, {result['settings']['rows']} rows, {result['settings']['replicates']} "
        "gradients each: |E g| / sqrt(tr Var g), ± standard error. Pathwise and doubly reparameterised gradients "
        "have one mean, so that the guide's pathwise ratio is taken with the mean of the other, which is known far "
        "better. Last columns: exponent of K by least squares, over all K and between the last two. In 20 dimensions "
        "one particle of ten carries most of the weight, and the law of large K begins near K = 100.",
        "",
        "| estimator | of | " + " | ".join(f"K = {k}" for k in counts) + " | exponent | last |",
        "|---|---|" + "---|" * (len(counts) + 2),
    ]
    for name in ESTIMATORS:
        for part in ("guide", "model"):
            cells = [next(r for r in rows if r["estimator"] == name and r["K"] == k) for k in counts]
            values = [f"{c[part]:.3g} ± {c[f'{part} error']:.1g}" for c in cells]
            values += [f"{slope:.2f} ± {error:.2f}" for slope, error in exponents[name][part].values()]
            lines.append(f"| `{name}` | {part} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", provenance(result), ""])


def picture(rows):
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.8), sharex=True, layout="constrained")
    for axis, part in zip(axes, ("guide", "model"), strict=True):
        for style, name in zip("osv", ESTIMATORS, strict=True):
            chosen = [r for r in rows if r["estimator"] == name]
            values, errors = ([r[key] for r in chosen] for key in (part, f"{part} error"))
            axis.errorbar([r["K"] for r in chosen], values, errors, marker=style, capsize=3, label=name)
        counts = np.array(sorted({r["K"] for r in rows}), dtype=float)
        for name, power, label in LAWS[part]:  # a little below the curve, and through its end: laws of large K
            end = 0.7 * next(r[part] for r in rows if r["estimator"] == name and r["K"] == counts[-1])
            line = end * (counts / counts[-1]) ** power
            axis.plot(counts, line, ":", color="gray", zorder=0)
            axis.annotate(label, (counts[-2], line[-2]), xytext=(-2, -17), textcoords="offset points", color="gray")
        axis.set(xscale="log", yscale="log", xlabel="particles K", title=f"{part}'s parameters")
    axes[0].set_ylabel("signal-to-noise ratio of the gradient")
    axes[1].legend(loc="upper left")
    return figure


def main():
    parser = arguments(__doc__)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--replicates", type=int, default=4000)
    options = parser.parse_args()
    if options.smoke:
        options.particles, options.rows, options.replicates = [2, 8], 4, 20
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    rows = measure(options)
    result = {
        "benchmark": "signal-to-noise ratio of the gradient, Gaussian of Rainforth et al. 2018",
        **surroundings(),
        "settings": {"dimensions": DIMENSIONS, "rows": options.rows, "replicates": options.replicates},
        "ratios": rows,
        "exponents": {
            name: {
                part: {"all": exponent(rows, name, part), "last": exponent(rows, name, part, 2)}
                for part in ("guide", "model")
            }
            for name in ESTIMATORS
        },
    }
    keep(result, table(result), "snr", options, picture(rows))


if __name__ == "__main__":
    main()
