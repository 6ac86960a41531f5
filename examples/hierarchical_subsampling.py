# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Global and local latents, and minibatches
=========================================

Most models have a few global latents above a plate of local ones. One weight for all of the data is then a product
over rows: among K particles one carries nearly everything, and more of them hardly help. With ``plate_particles``
each row has particles of its own, and its plate may be subsampled. What that gains is shown for a model whose
evidence is known by quadrature; so is what cannot be done, more than one particle of the global latents on
minibatches.
"""

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from showing import BLUE, GREEN, ORANGE, Example, mean_and_error, shown

from pyro_iwae import ImportanceWeightedELBO, preflight

example = Example(__doc__)

# %%
# Overdispersed counts
# --------------------
# Each of 400 rows has a log rate of its own around a common mean ``mu``; how far they spread is a parameter of the
# model. The guide is amortised, a line in the logarithm of the count. It may follow ``mu``; what it cannot follow
# is the skewness of a small count's posterior.

num_rows = 400
counts = dist.Poisson((0.5 + 1.5 * torch.randn(num_rows)).exp()).sample()


def model(counts, rows=None):
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(counts), subsample=rows) as rows:
        z = pyro.sample("z", dist.Normal(mu, spread))
        pyro.sample("counts", dist.Poisson(z.exp()), obs=counts[rows])


def guide(counts, rows=None):
    loc, log_scale = pyro.param("global", torch.tensor([0.0, -1.0]))
    intercept, slope, of_mu, row_log_scale, narrower = pyro.param("line", torch.tensor([-0.5, 1.0, 0.0, -0.5, -0.4]))
    mu = pyro.sample("mu", dist.Normal(loc, log_scale.exp()))
    with pyro.plate("data", len(counts), subsample=rows) as rows:
        x = counts[rows].log1p()
        pyro.sample("z", dist.Normal(intercept + slope * x + of_mu * mu, (row_log_scale + narrower * x).exp()))


# %%
# With one global number, and one for each row, the log evidence is a sum over a grid of ``mu`` and, inside it, of
# ``z``.

grid_mu, grid_z = torch.linspace(-1, 2, 61).double(), torch.linspace(-10, 9, 381).double()
values, times = counts.double().unique(return_counts=True)
likelihood = dist.Poisson(grid_z.exp()).log_prob(values.unsqueeze(1)).unsqueeze(1)


def log_evidence(spread):
    prior = dist.Normal(grid_mu.unsqueeze(1), spread).log_prob(grid_z)
    rows = times.double() @ (likelihood + prior).logsumexp(-1) + num_rows * (grid_z[1] - grid_z[0]).log()
    joint = rows + dist.Normal(0.0, 1.0).log_prob(grid_mu) + (grid_mu[1] - grid_mu[0]).log()
    return joint.logsumexp(0).item()


# %%
# What cannot be done on minibatches
# ----------------------------------
# Below a global latent, more than one particle of everything raises where the plate is subsampled. The sum over a
# minibatch is multiplied by N / B; inside the logarithm of a mean over particles that factor would make no bound:
# noise between minibatches would raise the value, above the evidence even. The message says what to write, and
# :func:`~pyro_iwae.preflight` says so beforehand.

minibatches = torch.randperm(num_rows).split(40)
try:
    ImportanceWeightedELBO(num_particles=64).loss(model, guide, counts, minibatches[0])
except ValueError as error:
    print(f"ValueError: {error}\n")
print(preflight(model, guide, counts, minibatches[0]))

# %%
# Particles of each row, on minibatches
# -------------------------------------
# The swap is the loss. ``num_particles=1`` leaves the global latent one particle, each row gets 16 of its own.
# ``Trace_ELBO`` averages over 16 particles, so that its gradient is not the noisier one by number alone. Both losses
# train on the same minibatches from three seeds; the learned model is judged by its exact log evidence, next to the
# highest that any ``spread`` has. The gap between evidence and bound is kept for the next table: at the last seed's
# parameters, with n particles of everything; of the rows alone, inside one of ``mu``; and √n of both. All evaluate
# the density of every row n times.

losses = {
    "Trace_ELBO": Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
    "plate_particles": ImportanceWeightedELBO(num_particles=1, plate_particles={"data": 16}),
}
ways = {
    "one weight": lambda n: ImportanceWeightedELBO(num_particles=n),
    "rows alone": lambda n: ImportanceWeightedELBO(num_particles=1, plate_particles={"data": n}),
    "√n of both": lambda n: ImportanceWeightedELBO(round(n**0.5), plate_particles={"data": round(n**0.5)}),
}
epochs, repeats, ladder = example.size(25, 1), example.size(40, 4), example.size((1, 4, 16, 64, 256), (1, 4))


def learned(loss, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(example.seed + seed)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / (epochs * len(minibatches)))})
    svi = SVI(model, guide, optim, loss=loss)
    example.train(svi, [(counts, rows) for rows in minibatches], epochs=epochs, what=type(loss).__name__)
    return pyro.param("spread").item()


best, gaps = max(log_evidence(spread / 50) for spread in range(60, 95)), {}
print("\ntrained with             spread   nats below the highest evidence   ± standard error over three seeds")
for name, loss in losses.items():
    spreads = [learned(loss, seed) for seed in range(example.size(3, 2))]
    print(f"{name:15}    {shown(spreads)}   {shown([best - log_evidence(spread) for spread in spreads]):>31}")
    evidence = log_evidence(spreads[-1])
    for n in example.progress("gaps", ladder):
        for way, with_particles in ways.items():
            elbo = with_particles(n)
            values = torch.tensor([-elbo.loss(model, guide, counts) for _ in range(repeats)])
            gaps[name, way, n] = mean_and_error(evidence - values)

# %%
# One weight for all rows, or one for each
# ----------------------------------------

print("\nlog evidence less bound, nats ± standard error over repeats")
print("trained with         n " + "".join(f"{way:>18}" for way in ways))
for name in losses:
    for n in ladder:
        print(f"{name:15}{n:7} " + "".join("{:12.2f} ± {:.2f}".format(*gaps[name, way, n])[-18:] for way in ways))

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
for ax, name in zip(axes, losses, strict=True):
    for way, color, marker, style in zip(ways, (BLUE, ORANGE, GREEN), "os^", ("-", "--", ":"), strict=True):
        points = zip(*(gaps[name, way, n] for n in ladder), strict=True)
        ax.errorbar(ladder, *points, color=color, marker=marker, ls=style, capsize=3, label=way)
    ax.set(xscale="log", yscale="log", xlabel="evaluations of each row's density, n", title=f"trained with {name}")
    ax.set_xticks(ladder, ladder)
    ax.minorticks_off()
axes[0].set_ylabel("evidence less bound (nats)")
axes[0].legend()
example.save(fig, "gap")

# %%
# One weight gains little from each doubling of the particles, whichever loss the guide was trained with. Particles
# of each row do better at the same number of evaluations, and with a guide that was trained with them about a nat
# or less is left at 256. Such a guide is wider, as a proposal for each row should be; to one weight that is no gain.
# More than one particle of ``mu`` gains nothing clear at equal cost: its guide is nearly right, and it
# is one number against 400.

# %%
# The bound on minibatches is unbiased
# ------------------------------------
# Its mean is that of the bound on all rows. The mean over the ten minibatches of an epoch is compared, in which each
# row stands once; one minibatch alone is far noisier, as it holds the choice of rows, too.

elbo = losses["plate_particles"]
whole = torch.tensor([-elbo.loss(model, guide, counts) for _ in range(2 * repeats)])
single = torch.tensor([[-elbo.loss(model, guide, counts, rows) for rows in minibatches] for _ in range(repeats)])
parts = single.mean(1)
z = (whole.mean() - parts.mean()) / (whole.var() / len(whole) + parts.var() / len(parts)).sqrt()
print(f"\nbound on all rows              {shown(whole)} nats, ± standard error over calls")
print(f"mean of ten minibatches        {shown(parts)} nats, z of the difference {z:.1f}")
print(f"standard deviations: {whole.std():.1f} of all rows, {parts.std():.1f} of ten, {single.std():.1f} of one")

example.end()
