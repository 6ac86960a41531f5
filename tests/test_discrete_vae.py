# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A VAE with Bernoulli latents trains on real digits, guide and all; RenyiELBO's guide does not move there."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from sklearn.datasets import load_digits
from torch import nn

from pyro_iwae import OVIS, VIMCO, ImportanceWeightedELBO
from tests.statistics import assert_mean_above

LATENTS, STEPS, PARTICLES = 16, 250, 10


class DiscreteVAE(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 40), nn.Tanh(), nn.Linear(40, 64))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((LATENTS,), 0.5)).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x / 8.0 - 1.0)).to_event(1))


def trained(elbo, digits, *, guide=True):
    """The VAE after some steps; with its guide as it began, if so wanted."""
    pyro.clear_param_store()
    vae = DiscreteVAE()
    optimiser = torch.optim.Adam((vae if guide else vae.decoder).parameters(), lr=5e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(digits), (64,))
        vae.zero_grad(set_to_none=True)
        elbo.loss_and_grads(vae.model, vae.guide, digits[rows])
        optimiser.step()
    return vae


def evidence(vae, digits):
    pyro.clear_param_store()
    with torch.no_grad():
        return ImportanceWeightedELBO(200).bound(vae.model, vae.guide, digits)


def moved(vae):
    """The largest change of any number in the guide."""
    before = DiscreteVAE().encoder.parameters()
    return max((p - q).abs().max().item() for p, q in zip(vae.encoder.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def digits():
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1437]], pixels[order[1437:]]


@pytest.mark.parametrize("score", [OVIS(), VIMCO()], ids=repr)
def test_the_guide_learns(score, digits):
    """Nats per held-out digit gained over a guide that stays as it began: more than chance explains."""
    train, test = digits
    elbo = ImportanceWeightedELBO(PARTICLES, score=score)
    full, fixed = trained(elbo, train), trained(elbo, train, guide=False)
    assert moved(full) > 0.1 and moved(fixed) == 0.0
    assert_mean_above(evidence(full, test) - evidence(fixed, test), 3.0)


def test_renyi_elbos_guide_does_not_move(digits):
    """The case that this cures: log q of a discrete site gets weight 0 there."""
    renyi = RenyiELBO(alpha=0.0, num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    assert moved(trained(renyi, digits[0])) == 0.0
