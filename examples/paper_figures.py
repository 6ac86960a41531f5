# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
The posterior that the bound implies
====================================

The figures of "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
https://arxiv.org/abs/1704.02916), with numbers beside them. Draw K particles from a guide q, weigh them by the model,
keep one by its weight: what is kept has a density of its own, q_EW. It is q for K = 1 and the posterior as K grows, and
its ELBO is at least the importance weighted bound L_K.
"""

import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive
from showing import BLUE, GREY, ORANGE, Example, mean_and_error, shown
from sklearn.datasets import load_digits
from torch import nn

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, exact, plots
from pyro_iwae.density import elbo_bracket

example = Example(__doc__)

# %%
# Two dimensions
# --------------
# The paper's target is the sum of eight Gaussians, each of mass one, so that the evidence is 8. The guide is one
# Gaussian around the origin. It is not trained: all that changes from picture to picture is K.

means = torch.tensor([[1, 3], [3, 0], [1, 1], [-3, -1], [-1, -3], [2, 2], [-2, -2], [0, 0.0]])
variances = torch.tensor([0.01, 0.01, 0.01, 0.01, 0.01, 1.0, 1.0, 1.0]).exp()
components = dist.Normal(means, variances.sqrt().unsqueeze(-1)).to_event(1)
target = dist.MixtureSameFamily(dist.Categorical(torch.ones(8)), components)
wide = dist.Normal(torch.zeros(2), math.exp(0.5)).to_event(1)


def model():
    pyro.sample("z", target)
    pyro.factor("mass", torch.tensor(8.0).log())


def guide():
    pyro.sample("z", wide)


# %%
# Log weights are all that is needed, a block of them for each batch of K particles. Their log-mean-exp averages to L_K,
# and ``elbo_bracket`` has bounds with the ELBO of q_EW between them. On a grid over [-8, 8]² the density of q_EW itself
# is K p(x, z) / (w(z) + S), averaged over sums S of K - 1 companions' weights. It has to integrate to 1 there, and
# KL(q_EW || p) is a sum over the grid. The ELBO of q_EW is log 8, the log evidence, less that KL.


def blocks(model, guide, K, batches):
    """Log weights of so many batches of K particles."""
    with torch.no_grad():
        found = ImportanceWeightedELBO(num_particles=K * batches).log_weights(model, guide).log_weights
    return found.reshape(K, batches)


def density_on_grid(log_weights):
    """log q_EW at each point of the grid by groups of batches of companions, and its integral by batch."""
    K, companions = len(log_weights), log_weights[1:].logsumexp(0)
    log_w = log_target - wide.log_prob(grid)
    parts = [log_target - torch.logaddexp(log_w, part.unsqueeze(1)) for part in companions.split(len(companions) // 10)]
    integrals = torch.cat([K * part.exp().sum(1) * cell for part in parts])
    return torch.stack([part.logsumexp(0) + math.log(K / len(part)) for part in parts]), integrals


def kl_on_grid(groups):
    """KL(q || p), both made to integrate to 1 on the grid, and its error by a jackknife over the groups."""
    log_p, count = log_target.log_softmax(0), len(groups)
    without = [groups[torch.arange(count) != i].logsumexp(0) for i in range(count)]
    log_q = torch.stack([groups.logsumexp(0), *without]).log_softmax(1)
    whole, *kls = (log_q.exp() * (log_q - log_p)).sum(1).tolist()
    return whole, (count - 1) ** 0.5 * torch.tensor(kls).std(unbiased=False).item()


side = torch.linspace(-8.0, 8.0, example.size(65, 33))
grid, cell = torch.cartesian_prod(side, side), (side[1] - side[0]) ** 2
log_target = target.log_prob(grid) + math.log(8)
batches, ladder, densities, found = example.size(3060, 510), (1, 2, 5, 10, 20, 50, 100), {}, {}
print("  K              L_K   ELBO[q_EW] at least        and at most   KL(q_EW || p)   integral of q_EW")
for K in example.progress("particles", ladder):
    log_weights = blocks(model, guide, K, batches)
    bound, (least, most) = log_weights.logsumexp(0) - math.log(K), elbo_bracket(log_weights.T.reshape(51, -1, K).mT)
    groups, integrals = density_on_grid(log_weights)
    densities[K], (kl, kl_error) = groups.logsumexp(0) - math.log(len(groups)), kl_on_grid(groups)
    found[K] = *mean_and_error(bound), math.log(8) - kl, kl_error
    print(f"{K:3}   {shown(bound, 3)}       {shown(least, 3)}      {shown(most, 3)}", end="")
    print(f"   {kl:.3f} ± {kl_error:.3f}      {shown(integrals, 3)}")

# %%
# The guide is one hill in the middle, where the posterior has three. With 10 particles they come out, with 100 they are
# nearly right.
# White lines hold 50, 90 and 99 % of the true posterior. (± is one standard error over batches, throughout.)

fig, axes = plt.subplots(2, 2, figsize=(8.4, 7.0), sharex=True, sharey=True)
titles = {"the guide q": 1, "q_EW, K = 10": 10, "q_EW, K = 100": 100, "the posterior": None}
for ax, (title, K) in zip(axes.flat, titles.items(), strict=True):
    log_q = densities.get(K, log_target - math.log(8)).reshape(len(side), -1).T
    outline = log_target.reshape(len(side), -1).T
    plots.density_2d(side, side, log_q, outline=outline, title=title, ax=ax)
    ax.set(xlim=(-6, 6), ylim=(-6, 6))
example.save(fig, "two_dimensions")

fig, ax = plt.subplots(figsize=(6, 3.8))
bounds, errors, elbos, elbo_errors = zip(*found.values(), strict=True)
ax.axhline(math.log(8), color=GREY, ls=":", label="log evidence, log 8")
ax.errorbar(ladder, elbos, elbo_errors, color=ORANGE, marker="s", ls="--", capsize=3, label="ELBO[q_EW], by grid")
ax.errorbar(ladder, bounds, errors, color=BLUE, marker="o", capsize=3, label="L_K")
ax.set(xscale="log", xlabel="particles K", ylabel="nats", xticks=ladder, xticklabels=ladder)
ax.minorticks_off()
ax.legend()
example.save(fig, "bounds")

# %%
# One dimension, exactly
# ----------------------
# The guide is Gamma(1, 1), the posterior Gamma(2, 1). A weight is then z itself, and L_K, the mean and the density of
# q_EW are known functions. The density integrates to 1, and its ELBO lies above L_K.

gamma, z = exact.Gamma(shape=1.0), torch.linspace(0.005, 16.0, 3200, dtype=torch.double)
posterior = dist.Gamma(2.0, 1.0)
curves = {"q": dist.Gamma(1.0, 1.0).log_prob(z)}
print("  K       L_K         estimated   ELBO[q_EW]   integral   mean of q_EW       by drawing")
for K in (2, 5, 10):
    curves[f"q_EW, K = {K}"] = log_q = gamma.resampled_log_density(z, K)
    integral, elbo = (torch.trapezoid(f, z) for f in (log_q.exp(), log_q.exp() * (posterior.log_prob(z) - log_q)))
    estimate = blocks(gamma.model, gamma.guide, K, example.size(10_000, 100)).logsumexp(0) - math.log(K)
    draws = ImportanceResampledGuide(gamma.model, gamma.guide, num_particles=K).sample(example.size(10_000, 100))["z"]
    print(f"{K:3}   {gamma.bound(K):.4f}   {shown(estimate, 4)}      {elbo:.4f}     {integral:.4f}", end="")
    print(f"         {gamma.resampled_mean(K):.4f}  {shown(draws, 4)}")
curves["posterior"] = posterior.log_prob(z)
ax = plots.density_1d(z, curves)
ax.set_xlim(0, 8)
example.save(ax.figure, "one_dimension")

# %%
# Digits
# ------
# The paper's last figure: digits reconstructed from draws of q and of q_EW, K = 50, by the same VAE. It was trained
# with the bound of 50 particles, which makes q wide on purpose: q is a proposal there, and q_EW what was trained.

levels, latents = 16, 20
digits = torch.tensor(load_digits().data, dtype=torch.float)[torch.randperm(1797)]
training, held_out = digits[: example.size(1437, 64)], digits[1437 : example.size(1797, 1449)]
encoder = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 2 * latents))
decoder = nn.Sequential(nn.Linear(latents, 100), nn.Tanh(), nn.Linear(100, 64))


def vae(counts):
    pyro.module("decoder", decoder)
    with pyro.plate("digits", len(counts)):
        z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        logits = pyro.deterministic("logits", decoder(z), event_dim=1)
        pyro.sample("pixels", dist.Binomial(levels, logits=logits).to_event(1), obs=counts)


def encode(counts):
    pyro.module("encoder", encoder)
    with pyro.plate("digits", len(counts)):
        loc, log_scale = encoder(counts / levels).chunk(2, dim=-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


svi = SVI(vae, encode, pyro.optim.Adam({"lr": 2e-3}), loss=ImportanceWeightedELBO(num_particles=50))
example.train(svi, [(part,) for part in training.split(64)], epochs=example.size(30, 2), what="VAE")
rows, fits = {"digits": held_out[:12]}, {}
for name, drawn_from in {"q": encode, "q_EW": ImportanceResampledGuide(vae, encode, num_particles=50)}.items():
    logits = Predictive(vae, guide=drawn_from, num_samples=10, parallel=True)(held_out)["logits"].squeeze()
    fits[name] = dist.Binomial(levels, logits=logits).to_event(1).log_prob(held_out).mean(0)
    print(f"log p(x | z), z from {name:4}   {shown(fits[name])} nats per digit")
    rows[f"from {name}"] = levels * logits[0, :12].sigmoid()
print(f"difference, paired by digit  {shown(fits['q_EW'] - fits['q'])}")
ax = plots.reconstructions({name: images.reshape(-1, 8, 8) for name, images in rows.items()})
example.save(ax.figure, "reconstructions")
example.end()
