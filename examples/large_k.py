# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
A thousand particles do not fit into memory
===========================================

A training step keeps what all K particles computed until it goes back through them, so memory grows with K. Two
options break that tie. ``chunk_size`` holds a few particles at once, and gives exactly the gradient of all K, in more
time. :class:`~pyro_iwae.SampledBackward` goes back through a few particles that are drawn by weight: unbiased, in
less time, with more noise. Evaluation keeps no graph, and takes twenty thousand particles in chunks.
"""

import time
import weakref
from collections import Counter

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from showing import BLUE, GREY, ORANGE, PINK, Example, mean_and_error
from sklearn.datasets import load_digits
from torch import nn

from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO, SampledBackward, evaluate

example = Example(__doc__)

# %%
# A model
# -------
# A variational autoencoder of digits, trained for a while with few particles, in double precision, so that rounding
# can be told from other differences.

levels, latents, hidden = 16, 4, 200
digits = torch.tensor(load_digits().data, dtype=torch.float)[torch.randperm(1797)]
training, batch, few = digits[: example.size(1400, 128)], digits[1400:1432], digits[1432:1442]
encoder = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))
decoder = nn.Sequential(
    nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 64)
)


def model(counts):
    pyro.module("decoder", decoder)
    with pyro.plate("digits", len(counts)):
        z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        pyro.sample("pixels", dist.Binomial(levels, logits=decoder(z)).to_event(1), obs=counts)


def guide(counts):
    pyro.module("encoder", encoder)
    with pyro.plate("digits", len(counts)):
        loc, log_scale = encoder(counts / levels).chunk(2, dim=-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), loss=ImportanceWeightedELBO(num_particles=5))
example.train(svi, [(part,) for part in training.split(64)], epochs=example.size(20, 1), what="VAE")

# %%
# Three ways through a step
# -------------------------
# What autograd keeps for the way back can be counted as it is kept and let go: the same on any machine.


class Held:
    """A tensor that is kept for the way back."""

    live, bytes, peak = Counter(), 0, 0

    def __init__(self, tensor):
        self.tensor = tensor
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        Held.bytes += 0 if Held.live[place] else size
        Held.live[place] += 1
        Held.peak = max(Held.peak, Held.bytes)
        weakref.finalize(self, Held.release, place, size)

    @staticmethod
    def release(place, size):
        Held.live[place] -= 1
        Held.bytes -= 0 if Held.live[place] else size


def step(elbo, seed):
    """Gradient of every parameter, one after the other; megabytes kept at most; seconds."""
    pyro.set_rng_seed(seed)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    Held.live.clear()
    Held.bytes = Held.peak = 0
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        elbo.loss_and_grads(model, guide, batch)
    seconds = time.perf_counter() - start
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return gradient, Held.peak / 1e6, seconds


ladder, repeats = example.size((50, 200, 500), (10, 20)), example.size(4, 2)
ways = {
    "all at once": {"gradient": DoublyReparameterized()},
    "chunk_size=25": {"gradient": DoublyReparameterized(), "chunk_size": 25},
    "SampledBackward(8)": {"gradient": SampledBackward(draws=8)},
}
kept = {}
print("   K   way                  megabytes kept   seconds (one machine)   noise of the gradient, relative")
for K in ladder:
    reference = ImportanceWeightedELBO(num_particles=K, gradient=DoublyReparameterized())
    signal = torch.stack([step(reference, 1000 + seed)[0] for seed in range(2 * repeats)]).mean(0)
    for way, options in ways.items():
        elbo = ImportanceWeightedELBO(num_particles=K, **options)
        elbo.loss(model, guide, batch)  # the first call looks model and guide over
        steps = [step(elbo, seed) for seed in range(repeats)]
        noise, error = mean_and_error([((g - signal).norm() / signal.norm()).item() for g, *_ in steps])
        kept[way, K] = max(megabytes for _, megabytes, _ in steps)
        seconds = torch.tensor([s for *_, s in steps]).median()
        print(f"{K:4}   {way:20} {kept[way, K]:14.1f} {seconds:23.3f}   {noise:20.2f} ± {error:.2f}")

# %%
# The estimator is the same in all three, doubly reparameterised. In chunks its noise is that of all at once, for it is
# the gradient of K particles: on the same particles the two agree but for rounding, which the tests of the library hold
# them to. What is kept does not grow with K, beside one number for each particle and digit. Sampled backward is
# unbiased, here hardly noisier, and takes less time at the larger K; networks smaller than this one gain nothing by it.
# It keeps the guide's values of all K, which grow, but are little beside what the decoder computes from them.

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
for way, colour, marker, line in zip(ways, (GREY, BLUE, ORANGE), "xos", ("-", "-", "--"), strict=True):
    left.plot(ladder, [kept[way, K] for K in ladder], color=colour, marker=marker, ls=line, label=way)
left.set(xscale="log", yscale="log", xlabel="particles K", ylabel="kept for the way back (MB)")
left.set_xticks(ladder, ladder)
left.set_yticks(ticks := (1, 2, 5, 10, 20, 50), ticks)
left.minorticks_off()
left.legend()

# %%
# What a large K brings
# ---------------------
# Ten digits that the model has not seen, with up to 20,000 particles in chunks. Once K is large, the bias of the bound,
# log p(x) - L_K, is Var[w / p(x)] / 2K: ten times the particles, a tenth of the bias. Before that it falls more slowly,
# as here: a few digits have weights with tails so heavy that the variance is not to be had from these particles, and
# the last column keeps growing. Then a better guide is worth more than particles.

K, ks = example.size((20_000, (1, 10, 100, 1000, 10_000)), (200, (1, 10, 100)))
chunk = example.size(1000, 50)
options = {"num_particles": K, "num_replicates": 4, "ks": (*ks, K), "chunk_size": chunk}
found = evaluate(model, guide, few, progress=not example.quiet, **options)
print(f"\nlog p(x) = {found.total.log_evidence:.2f} ± {found.total.std_error:.2f} nats", end=", ")
print(f"{int(found.trusted.sum())} of {len(few)} digits trusted, khat {found.khat.median():.2f} in the median")
print("     K   log p(x) - L_K, nats per digit   times K")
gaps = [mean_and_error(found.log_evidence - found.bounds[k]) for k in ks]
for k, (gap, error) in zip(ks, gaps, strict=True):
    print(f"{k:6}   {gap:21.3f} ± {error:.3f}   {gap * k:10.1f}")
means, errors = zip(*gaps, strict=True)
right.errorbar(ks, means, errors, color=PINK, marker="o", capsize=3, label="log evidence less bound")
right.plot(ks, [means[0] / k for k in ks], color=GREY, ls=":", label="as 1 / K")
right.set(xscale="log", yscale="log", xlabel="particles K", ylabel="nats per digit", ylim=(means[-1] / 3, 3 * means[0]))
right.legend()
example.save(fig, "large_k")
example.end()
