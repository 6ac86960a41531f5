# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``problems`` without Pyro: log weights written by hand in PyTorch, or with torch.distributions.

Each class makes its parameters from a ``Problem``, at the same values. ``log_weights`` is what one would write for this
one model; ``from_distributions`` is the same with the distributions that Pyro's model names.
"""

import copy
import math

import torch
from torch import distributions as dist
from torch import nn, randn
from torch.nn import functional

from support.problems import SCALE

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def bound_loss(log_weights):
    """Minus the importance weighted bound, summed over what has a weight of its own."""
    return math.log(len(log_weights)) * log_weights[0].numel() - log_weights.logsumexp(0).sum()


def elbo_loss(log_weights):
    """Minus the ELBO, for Pyro's Trace_ELBO."""
    return -log_weights.mean(0).sum()


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale).square() - scale.log() - HALF_LOG_TAU


def log_half_cauchy(x, scale):
    return math.log(2 / (math.pi * scale)) - (x / scale).square().log1p()


class MeanField(nn.Module):
    """AutoNormal by hand: one normal for each number, as one vector; positive latents by their logarithm."""

    positive = ("tau",)

    def __init__(self, problem):
        super().__init__()
        unconstrained = [v.log() if n in self.positive else v for n, v in problem.start.items()]
        self.sizes = [v.numel() for v in unconstrained]
        loc = torch.cat([v.flatten() for v in unconstrained])
        self.loc = nn.Parameter(loc.clone())
        self.raw = nn.Parameter(torch.full_like(loc, math.log(math.expm1(SCALE))))

    def draw(self, particles):
        """The parts of the vector, and their log density."""
        scale = functional.softplus(self.raw)
        noise = randn(particles, len(self.loc), device=self.loc.device, dtype=self.loc.dtype)
        log_q = (-0.5 * noise.square() - scale.log() - HALF_LOG_TAU).sum(-1)
        return (self.loc + scale * noise).split(self.sizes, -1), log_q

    def draw_from_distributions(self, particles):
        guide = dist.Normal(self.loc, functional.softplus(self.raw))
        draws = guide.rsample((particles,))
        return draws.split(self.sizes, -1), guide.log_prob(draws).sum(-1)


class Schools(MeanField):
    def log_weights(self, particles, effects, errors):
        (mu, log_tau, theta), log_q = self.draw(particles)
        tau = log_tau.exp()
        one = -0.5 * (mu / 5.0).square() - math.log(5.0) - HALF_LOG_TAU + log_half_cauchy(tau, 5.0) + log_tau
        each = log_normal(theta, mu, tau) + log_normal(effects, theta, errors)
        return one.squeeze(-1) + each.sum(-1) - log_q

    def from_distributions(self, particles, effects, errors):
        (mu, log_tau, theta), log_q = self.draw_from_distributions(particles)
        tau = log_tau.exp()
        one = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(tau.new_full((), 5.0)).log_prob(tau) + log_tau
        each = dist.Normal(mu, tau).log_prob(theta) + dist.Normal(theta, errors).log_prob(effects)
        return one.squeeze(-1) + each.sum(-1) - log_q


class Regression(MeanField):
    def log_weights(self, particles, t, y):
        (mu, log_tau, line), log_q = self.draw(particles)
        tau, line = log_tau.exp(), line.unflatten(-1, (-1, 2))
        two = -0.5 * mu.square() - HALF_LOG_TAU + log_half_cauchy(tau, 1.0) + log_tau
        lines = log_normal(line, mu[:, None], tau[:, None])
        rows = -0.5 * (y - line[..., :1] - line[..., 1:] * t).square() - HALF_LOG_TAU
        return two.sum(-1) + lines.sum((-1, -2)) + rows.sum((-1, -2)) - log_q

    def from_distributions(self, particles, t, y):
        (mu, log_tau, line), log_q = self.draw_from_distributions(particles)
        tau, line = log_tau.exp(), line.unflatten(-1, (-1, 2))
        two = dist.Normal(0.0, 1.0).log_prob(mu) + dist.HalfCauchy(tau.new_ones(2)).log_prob(tau) + log_tau
        lines = dist.Normal(mu[:, None], tau[:, None]).log_prob(line)
        rows = dist.Normal(line[..., :1] + line[..., 1:] * t, 1.0).log_prob(y)
        return two.sum(-1) + lines.sum((-1, -2)) + rows.sum((-1, -2)) - log_q


class Autoencoder(nn.Module):
    """One weight for each row of the batch."""

    def __init__(self, problem):
        super().__init__()
        self.encoder, self.decoder = copy.deepcopy((problem.module.encoder, problem.module.decoder))

    def log_weights(self, particles, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = randn(particles, *loc.shape, device=x.device, dtype=loc.dtype)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        log_x = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return log_x + 0.5 * (noise.square() - z.square()).sum(-1) + log_scale.sum(-1)

    def from_distributions(self, particles, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        guide = dist.Normal(loc, log_scale.exp())
        z = guide.rsample((particles,))
        prior = dist.Normal(torch.zeros_like(loc), 1.0)
        # The checks of Bernoulli are off in Pyro's model, too.
        log_x = dist.Bernoulli(logits=self.decoder(z), validate_args=False).log_prob(x).sum(-1)
        return log_x + prior.log_prob(z).sum(-1) - guide.log_prob(z).sum(-1)


BY_HAND = {"eight schools": Schools, "regression": Regression, "VAE": Autoencoder}
