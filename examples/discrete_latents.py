# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
My latents are discrete: sum them out, or sample them?
======================================================

A sigmoid belief network has a few binary units above each digit. Five of them have 32 states, so that the evidence
and the posterior can be had exactly, and every way of training can be judged against them: units summed out in the
model, or sampled by a guide whose gradient is :class:`~pyro_iwae.OVIS`, :class:`~pyro_iwae.VIMCO`, that of
``Trace_ELBO``, or that of ``RenyiELBO``, which is exactly 0. Summing out takes 2^units terms; sampling goes on where
that ends.
"""

import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from showing import BLUE, GREEN, GREY, ORANGE, PINK, Example, mean_and_error, shown
from sklearn.datasets import load_digits
from torch import nn

from pyro_iwae import VIMCO, ImportanceResampledGuide, ImportanceWeightedELBO, gradient_snr

example = Example(__doc__)

# %%
# A model for both ways
# ---------------------
# Units are marked for enumeration in the model. Where the guide samples them, that mark does nothing; under the empty
# guide they are summed out.

units = 5
images = torch.tensor(load_digits().data > 7).float()[torch.randperm(1797)]
training, held_out = images[: example.size(1000, 100)], images[1000 : example.size(1200, 1010)]


class BeliefNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(units, 64)
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, units))
        nn.init.normal_(self.decoder.weight, std=0.5)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("digits", len(x)):
            logits = self.decoder.bias
            for i, weights in enumerate(self.decoder.weight.T):
                unit = pyro.sample(f"h_{i}", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
                logits = logits + unit.unsqueeze(-1) * weights
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("digits", len(x)):
            for i, logit in enumerate(self.encoder(x).unbind(-1)):
                pyro.sample(f"h_{i}", dist.Bernoulli(logits=logit))

    def log_joint(self, x):
        """log p(x, h) for every row and each of the states."""
        return -units * math.log(2) + dist.Bernoulli(logits=self.decoder(states)).to_event(1).log_prob(x.unsqueeze(1))


def nothing(x):
    """The guide where all is summed out."""


states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * units)

# %%
# Trained five times
# ------------------
# The loss is what differs, and for summing out the guide. All start alike and see the same batches. ``bound`` is the
# one for K = 10 particles of the guide that was trained, and the evidence is exact.

K, together = 10, {"vectorize_particles": True, "max_plate_nesting": 1}
losses = {
    "summed out": TraceEnum_ELBO(max_plate_nesting=1),
    "OVIS": ImportanceWeightedELBO(num_particles=K),
    "VIMCO": ImportanceWeightedELBO(num_particles=K, score=VIMCO()),
    "Trace_ELBO": Trace_ELBO(num_particles=K, **together),
    "RenyiELBO": RenyiELBO(alpha=0, num_particles=K, **together),
}
networks, evidence, gaps, ladder = {}, {}, {}, (1, 2, 5, 10, 20, 50)
print(f"{len(held_out)} held-out digits: nats per digit, ± standard error over digits\n")
print("trained with     log evidence, exact   less than summed out       bound, K = 10   exact - bound")
for name, loss in losses.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(example.seed)
    network = networks[name] = BeliefNetwork()
    guide = nothing if name == "summed out" else network.guide
    svi = SVI(network.model, guide, Adam({"lr": 0.01}), loss=loss)
    example.train(svi, [(batch,) for batch in training.split(100)], epochs=example.size(17, 1), what=name)
    with torch.no_grad():
        evidence[name] = network.log_joint(held_out).logsumexp(1)
        report = f"{name:15}{shown(evidence[name]):>21}{shown(evidence['summed out'] - evidence[name]):>23}"
        if name != "summed out":
            elbos = {k: ImportanceWeightedELBO(num_particles=k) for k in ladder}
            repeats = range(example.size(5, 1))
            bound = {
                k: torch.stack([elbo.bound(network.model, guide, held_out) for _ in repeats]).mean(0)
                for k, elbo in elbos.items()
            }
            gaps[name] = {k: mean_and_error(evidence[name] - each) for k, each in bound.items()}
            report += f"{shown(bound[K]):>20}{shown(evidence[name] - bound[K]):>16}"
    print(report)

# %%
# Sampled with OVIS or VIMCO, the network is as good as summed out, within a few hundredths of a nat. Trained with
# ``Trace_ELBO`` it is worse by about a nat. Two things may be behind that: its gradient for discrete units has no
# control of its noise, and the ELBO asks for a model that the guide can follow. ``RenyiELBO`` trains the model under
# a guide that stays as it began. The network is better than that of ``Trace_ELBO`` all the same, presumably since
# with 10 particles the bound forgives much in a guide; but that guide is far off, as the gap shows. The training is
# short, and one seed is shown: errors are over digits, and do not hold the variation from one training to the next.
#
# How noisy is the gradient?
# --------------------------
# At one and the same point, the end of training with OVIS: signal-to-noise ratio of the gradient by all of the
# guide's parameters, ± standard error over groups of replicates.

network, snr = networks["OVIS"], {}
pyro.clear_param_store()  # of the network that was trained last
scores = {
    "OVIS": lambda k: ImportanceWeightedELBO(num_particles=k),
    "VIMCO": lambda k: ImportanceWeightedELBO(num_particles=k, score=VIMCO()),
    "RenyiELBO": lambda k: RenyiELBO(alpha=0, num_particles=k, **together),
}
print("gradient of the guide     K   signal to noise")
for name, loss_of in scores.items():
    for k in (2, 10, 50):
        found = gradient_snr(
            loss_of(k),
            network.model,
            network.guide,
            training[:50],
            num_replicates=example.size(40, 20),
            progress=False,
        )
        silent = all(bool((p.mean == 0.0).all()) for p in found.parameters if p.role == "guide")
        snr[name, k] = found.guide, found.guide_error
        print(f"{name:20}{k:7}{found.guide:10.2f} ± {found.guide_error:.2f}{'   (gradient 0)' if silent else ''}")

# %%
# With OVIS the ratio rises with K. With VIMCO it does not, and from ten particles on these replicates cannot tell it
# from 0: both are unbiased, one is mostly noise. So small a network is trained well by it nevertheless. For
# ``RenyiELBO`` there is no ratio, since the gradient is exactly 0.
#
# The posterior over the units
# ----------------------------
# How likely is it that a unit is on, given a digit? Mean distance of that probability from the exact one over units,
# ± standard error over digits. :class:`~pyro_iwae.ImportanceResampledGuide` gives it as the share of 300 draws, each
# from K particles of its own, or by weighting as many batches of K (``expectation``).

digits, errors, draws = held_out[:40], {}, example.size(300, 10)
with torch.no_grad():
    exact = network.log_joint(digits).softmax(1) @ states


def on(z):
    return torch.stack([z[f"h_{i}"] for i in range(units)], -1)


print("particles   from draws of q_EW   by weights")
for k in (1, 2, 5, 10, 20):
    posterior = ImportanceResampledGuide(network.model, network.guide, num_particles=k)
    by_draws = on(posterior.sample(draws, digits)).mean(0)
    by_weights = posterior.expectation(on, digits, num_batches=draws)
    errors[k] = [(found - exact).abs().mean(1) for found in (by_draws, by_weights)]
    print(f"{k:9}{shown(errors[k][0], 4):>21}{shown(errors[k][1], 4):>18}")

# %%
# K = 1 is the guide itself, whose units know nothing of each other. Draws of q_EW come near the posterior with a few
# particles, down to the noise of 300 draws. Weighting costs the same K particles a batch and keeps all of them, not one
# each: what noise is left is smaller.

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
looks = {
    "OVIS": (BLUE, "o", "-"),
    "VIMCO": (GREEN, "^", "--"),
    "Trace_ELBO": (GREY, "D", "-."),
    "RenyiELBO": (ORANGE, "s", ":"),
}
for name, (color, marker, line) in looks.items():
    style = {"color": color, "marker": marker, "ls": line, "capsize": 3, "label": name}
    left.errorbar(ladder, *zip(*gaps[name].values(), strict=True), **style)
    if name in scores and name != "RenyiELBO":  # which has no signal and no noise
        middle.errorbar((2, 10, 50), *zip(*(snr[name, k] for k in (2, 10, 50)), strict=True), **style)
for which, (label, color, marker) in enumerate((("300 draws of q_EW", BLUE, "o"), ("300 weighted batches", PINK, "v"))):
    means = [mean_and_error(found[which]) for found in errors.values()]
    right.errorbar(list(errors), *zip(*means, strict=True), color=color, marker=marker, capsize=3, label=label)
left.set(yscale="log", ylabel="exact evidence less bound, nats per digit", title="gap, by training")
middle.set(ylabel="signal-to-noise ratio", title="gradient of the guide")
right.set(ylabel="error of the probability that a unit is on", title="posterior", ylim=(0.0, None))
for ax, ks in ((left, (1, 2, 5, 10, 20, 50)), (middle, (2, 10, 50)), (right, (1, 2, 5, 10, 20))):
    ax.set(xscale="log", xlabel="particles K", xticks=ks, xticklabels=ks)
    ax.minorticks_off()
    ax.legend()
example.save(fig, "discrete_latents")
example.end()
