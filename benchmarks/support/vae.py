# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder as a Pyro model and guide."""

from itertools import pairwise

import pyro
import pyro.distributions as dist
from torch import nn


class VAE(nn.Module):
    """Bernoulli or binomial pixels, Gaussian latents, tanh layers."""

    def __init__(self, pixels, hidden, latents, trials=1):
        super().__init__()
        self.latents, self.trials = latents, trials
        self.encoder = nn.Sequential(*layers([pixels, *hidden]), nn.Linear(hidden[-1], 2 * latents))
        self.decoder = nn.Sequential(*layers([latents, *reversed(hidden)]), nn.Linear(hidden[0], pixels))

    def pixel(self, logits):
        if self.trials == 1:
            return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
        return dist.Binomial(self.trials, logits=logits, validate_args=False).to_event(1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latents), 1.0).to_event(1))
            pyro.sample("x", self.pixel(self.decoder(z)), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x / self.trials).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def layers(widths):
    for a, b in pairwise(widths):
        yield nn.Linear(a, b)
        yield nn.Tanh()
