# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
How many particles should I train with?
=======================================

More particles make the bound tighter and a step longer, and what the tighter bound is worth falls with each doubling.
Three looks at one model say where to stop: :func:`~pyro_iwae.tradeoff` on a guide as it is, the signal-to-noise ratio
of the gradient, and the held-out evidence after training with several K, by steps and by time. The evidence is exact,
by quadrature. Times are of one run on whatever machine this page was built on: they show how to ask, and are no
benchmark.
"""

import time
from itertools import pairwise

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from showing import BLUE, GREEN, GREY, ORANGE, PINK, Example, mean_and_error, shown

from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO, Pathwise, gradient_snr, tradeoff

example = Example(__doc__)

# %%
# Counts of ten species
# ---------------------
# At each of 100 sites ten species were counted (simulated here), and two latent gradients of the environment
# explain what goes with what. The guide is amortised, and crude: linear in the logarithms of the counts, with one
# width for all sites.

species, latents = 10, 2


def draw_sites(num_sites, loadings):
    return dist.Poisson((torch.randn(num_sites, latents) @ loadings - 0.5).exp()).sample()


def model(counts):
    loadings = pyro.param("loadings", lambda: 0.3 * torch.randn(latents, species))
    intercepts = pyro.param("intercepts", torch.zeros(species))
    with pyro.plate("sites", len(counts)):
        z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        pyro.sample("counts", dist.Poisson((z @ loadings + intercepts).exp()).to_event(1), obs=counts)


def guide(counts):
    slopes = pyro.param("slopes", lambda: 0.1 * torch.randn(species, latents))
    offset, log_scale = pyro.param("offset", torch.zeros(latents)), pyro.param("log_scale", -torch.ones(latents))
    with pyro.plate("sites", len(counts)):
        pyro.sample("z", dist.Normal(counts.log1p() @ slopes + offset, log_scale.exp()).to_event(1))


# %%
# Two latents are few enough for a grid: the log evidence of each site is a sum over it.

side = torch.linspace(-4.5, 4.5, 81)
grid = torch.cartesian_prod(side, side)


def log_evidence(counts, loadings, intercepts):
    log_rates = grid @ loadings + intercepts
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid).sum(1) - log_rates.exp().sum(1) + counts @ log_rates.T
    return log_joint.logsumexp(1) - counts.add(1).lgamma().sum(1) + 2 * (side[1] - side[0]).log()


true_loadings = 0.8 * torch.randn(latents, species)
training, held_out = draw_sites(100, true_loadings), draw_sites(300, true_loadings)
truth = log_evidence(held_out, true_loadings, torch.tensor(-0.5))

# %%
# The swap is the loss. Every 50 steps the held-out evidence is noted, beside the time that the steps took; means over
# three trainings from other starts.


def train(loss, parts):
    paths = []
    for seed in range(example.size(3, 1)):
        pyro.clear_param_store()
        pyro.set_rng_seed(example.seed + seed)  # the same start for all losses
        optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / (parts * each))})
        svi = SVI(model, guide, optim, loss=loss)
        svi.step(training)  # the first step of all looks at the model, and is not timed
        seconds, path = 0.0, []
        for _ in range(parts):
            start = time.perf_counter()
            example.train(svi, [(training,)], epochs=each, what=f"K = {loss.num_particles}")
            seconds += time.perf_counter() - start
            learned = pyro.param("loadings").detach(), pyro.param("intercepts").detach()
            path.append((seconds, log_evidence(held_out, *learned)))
        paths.append(path)
    moments = ((torch.tensor([s for s, _ in same]).mean(), [e for _, e in same]) for same in zip(*paths, strict=True))
    return [(seconds.item(), torch.stack(evidence)) for seconds, evidence in moments]


parts, each = example.size(4, 2), example.size(50, 2)
paths = {"Trace_ELBO": train(Trace_ELBO(), parts)}

# %%
# Ask before training
# -------------------
# :func:`~pyro_iwae.tradeoff` takes the guide as it is, here after training with the ELBO. It recommends the fewest
# particles from which a doubling gains less than 0.1 nats per site. It says nothing of what training with so many
# would change.

ks = example.size([1, 2, 4, 8, 16, 32], [1, 4])
found = tradeoff(model, guide, training, ks=ks, progress=not example.quiet)
print(found)
example.save(found.plot().figure, "tradeoff")

# %%
# How noisy is the gradient?
# --------------------------
# At the same parameters, for the guide's parameters by two estimators and for the model's.

print("\nsignal-to-noise ratio of the gradient, ± standard error over 10 groups of gradients")
print("  K   guide, Pathwise   guide, DoublyReparameterized           model")
ladder, replicates = example.size((1, 4, 16, 64, 256), (1, 4)), example.size(50, 20)
ratios = {"guide, Pathwise": [], "guide, DoublyReparameterized": [], "model": []}
for K in example.progress("gradients", ladder):
    for gradient in (Pathwise(), DoublyReparameterized()):
        elbo = ImportanceWeightedELBO(num_particles=K, gradient=gradient)
        snr = gradient_snr(elbo, model, guide, training, num_replicates=replicates, progress=False)
        ratios[f"guide, {type(gradient).__name__}"].append((snr.guide, snr.guide_error))
    ratios["model"].append((snr.model, snr.model_error))
    print(f"{K:3}     " + "".join("{:.2f} ± {:.2f}        ".format(*ratio[-1]).rjust(24) for ratio in ratios.values()))

# %%
# The guide's pathwise gradient gets hardly any clearer with more particles, the doubly reparameterised one does up
# to a point, and the model's gradient does all along. (The laws 1 / √K and √K hold for large K at a guide that is
# nearly right.) So we train with the second.

fig, ax = plt.subplots(figsize=(6, 3.8))
for (name, ratio), color, marker, style in zip(
    ratios.items(), (BLUE, ORANGE, GREY), "os^", ("-", "--", ":"), strict=True
):
    ax.errorbar(ladder, *zip(*ratio, strict=True), color=color, marker=marker, ls=style, capsize=3, label=name)
ax.set(xscale="log", xlabel="particles K", ylabel="signal-to-noise ratio", xticks=ladder, xticklabels=ladder)
ax.set_ylim(bottom=0.0)
ax.minorticks_off()
ax.legend()
example.save(fig, "gradient")

# %%
# Train with several K
# --------------------
# All for 200 steps with a learning rate that falls; ``Trace_ELBO`` with three times as many steps, too, to see whether
# time would have done it. Differences are paired: of each held-out site, the mean over the three trainings less that of
# another loss from the same starts. Errors are over sites; the last column has the gains of the single trainings.

paths["the same, 3 x"] = train(Trace_ELBO(), 3 * parts)
for K in example.size((4, 16, 64), (4,)):
    loss = ImportanceWeightedELBO(num_particles=K, gradient=DoublyReparameterized())
    paths[f"K = {K}"] = train(loss, parts)
print(f"\nheld-out log evidence, nats per site (of the model that drew the sites: {shown(truth, 3)})")
print("trained with     steps       evidence    over Trace_ELBO   over the one above   seconds   single gains")
ends, above = {name: path[-1][1] for name, path in paths.items()}, None
for name, path in paths.items():
    gain, step = (shown((ends[name] - ends[other or name]).mean(0), 3) for other in ("Trace_ELBO", above))
    single = "  ".join(f"{each:.3f}" for each in (ends[name] - ends["Trace_ELBO"]).mean(1))
    evidence = shown(ends[name].mean(0), 3)
    print(f"{name:13} {each * len(path):8} {evidence:>18} {gain:>16} {step:>20} {path[-1][0]:9.1f}   {single}")
    above = name

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
looks = zip((GREY, GREY, BLUE, ORANGE, GREEN, PINK), "o.s^vD", ("-", ":", "--", "-.", "-", ":"), strict=True)
for (name, path), (color, marker, style) in zip(paths.items(), looks, strict=False):
    seconds, values = zip(*path, strict=True)
    means, steps = [value.mean().item() for value in values], [each * (i + 1) for i in range(len(path))]
    for ax, x in zip(axes, (steps, seconds), strict=True):
        ax.plot(x, means, color=color, marker=marker, ls=style, label=name)
for ax, label in zip(axes, ("steps", "seconds in steps (one run on one machine)"), strict=True):
    ax.axhline(truth.mean().item(), color="black", lw=1)
    ax.set_xlabel(label)
axes[0].set(ylabel="held-out log evidence (nats per site)", ylim=(truth.mean().item() - 1.0, None))
axes[1].legend()
example.save(fig, "training")

# %%
# The black line is the model that drew the sites. Most of what particles gain in 200 steps is speed: three times as
# many steps with ``Trace_ELBO`` have it, too, in about the same time. What larger K add to that is less, and is
# beyond the error. The rest of the way to the line 100 sites do not tell.
#
# Which one, then?
# ----------------
# The fewest particles after which the next K gains no more than two standard errors.

names = [name for name in ends if name.startswith("K")]
enough = names[-1]
for name, following in reversed(list(pairwise(names))):
    gain, error = mean_and_error((ends[following] - ends[name]).mean(0))
    enough = name if gain < 2 * error else enough
print(f"\nby the gain in training   {enough}")
print(f"by the bound beforehand   K = {found.recommended.num_particles}")

# %%
# ``tradeoff`` asks how much tighter the bound of a given guide gets, which is what counts for evaluating it.
# Training moves model and guide as well, and gains may go on for longer, if smaller ones. So take its answer as the
# least; go on while a step takes hardly longer, with :class:`~pyro_iwae.DoublyReparameterized`; and stop where the
# held-out evidence does.

example.end()
