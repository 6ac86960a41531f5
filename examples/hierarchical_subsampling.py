# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Global and local latents, and minibatches
=========================================

Most models have a few global latents above a plate of local ones. One weight for all of the data is then a product over rows:
among K particles one carries nearly everything, and more of them hardly help. With ``plate_particles`` each row has particles of
its own, and its plate may be subsampled. What that gains is shown for a model whose evidence is known by quadrature; so is what
cannot be done, more than one particle of the global latents on minibatches.
"""

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from showing import BLUE, GREEN, ORANGE, Example, mean_and_error, shown

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, preflight

example = Example(__doc__)

# %%
# Overdispersed counts
# --------------------
# Each of 100 rows has a log rate of its own around a common mean ``mu``; how far they spread is a parameter of the model. The
# guide is amortised, a line in the logarithm of the count. It may follow ``mu``; what it cannot follow is the skewness of a
# small count's posterior.

num_rows, batch = 100, 20
counts = dist.Poisson((0.5 + 1.5 * torch.randn(num_rows)).exp()).sample()


def model(counts, batch=None):
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(counts), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, spread))
        pyro.sample("counts", dist.Poisson(z.exp()), obs=counts[rows])


def guide(counts, batch=None):
    loc, log_scale = pyro.param("global", torch.tensor([0.0, -1.0]))
    intercept, slope, of_mu, row_log_scale, narrower = pyro.param("line", torch.tensor([-0.5, 1.0, 0.0, -0.5, -0.4]))
    mu = pyro.sample("mu", dist.Normal(loc, log_scale.exp()))
    with pyro.plate("data", len(counts), subsample_size=batch) as rows:
        x = counts[rows].log1p()
        pyro.sample("z", dist.Normal(intercept + slope * x + of_mu * mu, (row_log_scale + narrower * x).exp()))


# %%
# With one global number, and one for each row, the log evidence is a sum over a grid of ``mu`` and, inside it, of ``z``.

grid_mu, grid_z = torch.linspace(-4, 4, 161).double(), torch.linspace(-12, 10, 881).double()
likelihood = dist.Poisson(grid_z.exp()).log_prob(counts.double().unsqueeze(1)).unsqueeze(1)


def log_evidence(spread):
    prior = dist.Normal(grid_mu.unsqueeze(1), spread).log_prob(grid_z)
    rows = (likelihood + prior).logsumexp(-1).sum(0) + num_rows * (grid_z[1] - grid_z[0]).log()
    joint = rows + dist.Normal(0.0, 1.0).log_prob(grid_mu) + (grid_mu[1] - grid_mu[0]).log()
    return joint.logsumexp(0).item()


def train(loss, seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(example.seed + seed)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / steps)}), loss=loss)
    example.train(svi, [(counts, batch)], epochs=steps, what=type(loss).__name__)
    return pyro.param("spread").item()


# %%
# One weight for all rows
# -----------------------
# First the usual training, on minibatches with ``Trace_ELBO``. Then more particles, at these parameters: all of everything; of the
# rows alone, inside one of ``mu``; and of both. With n for each row they all evaluate the density of every row n times.

steps, repeats = example.size(400, 5), example.size(100, 4)
evidence = log_evidence(train(Trace_ELBO()))
ways = {
    "one weight": lambda n: ImportanceWeightedELBO(num_particles=n),
    "rows alone": lambda n: ImportanceWeightedELBO(num_particles=1, plate_particles={"data": n}),
    "both": lambda n: ImportanceWeightedELBO(num_particles=round(n**0.5), plate_particles={"data": round(n**0.5)}),
}
ladder = (1, 4, 16, 64, 256)


def gaps(elbo):
    return evidence + torch.tensor([elbo.loss(model, guide, counts) for _ in range(repeats)])


print("log evidence less bound, nats, ± standard error over repeats")
print("  n " + "".join(f"{way:>18}" for way in ways) + "   share of the largest of n weights")
found = {way: [] for way in ways}
for n in example.progress("particles", ladder):
    for way, elbo in ways.items():
        found[way].append(mean_and_error(gaps(elbo(n))))
    largest = [ways["one weight"](n).log_weights(model, guide, counts).weights.max() for _ in range(10)]
    print(f"{n:3} " + "".join("{:10.2f} ± {:.2f}".format(*found[way][-1]).rjust(18) for way in ways), end="")
    print(f"{shown(largest):>20}")

# %%
# One weight gains little from each doubling: with 256 particles the heaviest still has much of all the weight, and nats are missing.
# Particles of the rows alone cure that. What is left then is the noise of each row's own estimate, and the guide's error in
# ``mu``, which particles of both would correct; here ``mu`` is so well fitted that rows alone do as well or better.

fig, ax = plt.subplots(figsize=(6, 3.8))
for (way, points), color, marker, style in zip(found.items(), (BLUE, ORANGE, GREEN), "os^", ("-", "--", ":"), strict=True):
    ax.errorbar(ladder, *zip(*points, strict=True), color=color, marker=marker, ls=style, capsize=3, label=way)
ax.set(xscale="log", yscale="log", xlabel="evaluations of each row's density, n", ylabel="evidence less bound (nats)")
ax.set_xticks(ladder, ladder)
ax.minorticks_off()
ax.legend()
example.save(fig, "gap")

# %%
# Minibatches
# -----------
# With one particle of ``mu`` the sum over a minibatch's rows, times N / B, has the mean of the sum over all rows, and so has the
# bound. Both means below agree within their errors.

elbo = ways["rows alone"](16)
whole = -torch.tensor([elbo.loss(model, guide, counts) for _ in range(2 * repeats)])
parts = -torch.tensor([elbo.loss(model, guide, counts, batch) for _ in range(10 * repeats)])
z = (whole.mean() - parts.mean()) / (whole.var() / len(whole) + parts.var() / len(parts)).sqrt()
print(f"bound on all rows         {shown(whole)} nats")
print(f"bound on minibatches      {shown(parts)} nats     z of the difference {z:.1f}")

# %%
# With more than one particle of ``mu`` the factor N / B would be inside a logarithm, where its mean is of no use: noise between
# minibatches would raise the value, above the evidence even. So that raises, and says what to write. :func:`~pyro_iwae.preflight`
# says so beforehand.

try:
    ImportanceWeightedELBO(num_particles=4, plate_particles={"data": 4}).loss(model, guide, counts, batch)
except ValueError as error:
    print(f"\nValueError: {error}\n")
print(preflight(model, guide, counts, batch, num_particles=4))

# %%
# Training on minibatches
# -----------------------
# The swap is the loss. ``spread`` is learned with either, from three seeds; the model is judged by its exact log evidence, next to the
# highest that any ``spread`` has.

losses = {"Trace_ELBO": Trace_ELBO(), "plate_particles, 16": ways["rows alone"](16)}
spreads = torch.linspace(1.0, 2.2, 25).double()
best = max(map(log_evidence, spreads.tolist()))
print("\ntrained with              spread     below the highest evidence   nats, ± standard error over seeds")
for name, loss in losses.items():
    learned = [train(loss, seed) for seed in range(example.size(3, 2))]
    print(f"{name:20} {shown(learned)}     {shown([best - log_evidence(s) for s in learned], 3):>20}")

# %%
# xx

posterior = ImportanceResampledGuide(model, guide, num_particles=64, plate_particles={"data": 64})
example.end()
