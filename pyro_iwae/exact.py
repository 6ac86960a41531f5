# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Small models with a known posterior and evidence, for tests and documentation.

Each is a frozen record of numbers or tensors with a ``model`` and a ``guide`` to run, as its first line says,
and what is known of them: evidence and expected bound L_K. All is differentiable in tensors that are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Bernoulli", "Gamma", "Gaussian", "HierarchicalGaussian"]


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Model z ~ Gamma(a + 1, 1), guide z ~ Gamma(a, 1), no data: a weight is z / a and the log evidence is 0.

    Example::

        >>> Gamma(shape=1.0).bound(5), Gamma(shape=1.0).resampled_mean(5)
        (tensor(-0.1033), tensor(1.6667))
    """

    shape: float | Tensor = 1.0

    def model(self) -> None:
        pyro.sample("z", dist.Gamma(self.shape + 1.0, 1.0))

    def guide(self) -> None:
        pyro.sample("z", dist.Gamma(self.shape, 1.0))

    def bound(self, num_particles: int) -> Tensor:
        """L_K = digamma(K a) - log(K a): the mean of K weights is Gamma(K a, 1) / (K a)."""
        total = num_particles * torch.as_tensor(self.shape)
        return total.digamma() - total.log()

    def variance(self, num_particles: int) -> Tensor:
        """Variance of the log-mean-exp of K weights, trigamma(K a)."""
        return torch.polygamma(1, num_particles * torch.as_tensor(self.shape))

    def resampled_mean(self, num_particles: int) -> Tensor:
        """Mean of q_EW, K a (a + 1) / (K a + 1)."""
        a = torch.as_tensor(self.shape)
        return num_particles * a * (a + 1.0) / (num_particles * a + 1.0)

    def resampled_log_density(self, z: Tensor, num_particles: int) -> Tensor:
        """Log density of q_EW at z > 0 for K > 1: K a z^a E_n(z) / Gamma(a + 1), with n = (K - 1) a.

        E_n(z) = exp(-z) times the integral of exp(-z (e^s - 1) - (n - 1) s) over s > 0, taken by the double
        exponential rule.
        """
        a, n = torch.as_tensor(self.shape).to(z), (num_particles - 1) * torch.as_tensor(self.shape).to(z)
        y = torch.linspace(-5.0, 5.0, 401, dtype=z.dtype, device=z.device)
        s = (y - (-y).exp()).exp()
        terms = -z.unsqueeze(-1) * s.expm1() - (n - 1.0) * s + s.log() + (-y).exp().log1p()
        log_integral = terms.logsumexp(-1) + (y[1] - y[0]).log() - z
        return math.log(num_particles) + a.log() + a * z.log() - (a + 1.0).lgamma() + log_integral


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Model z ~ Bernoulli(prior), x ~ Normal(3 z, 1); guide z ~ Bernoulli(sigmoid(logit)).

    What is known is found by enumeration.

    Example::

        >>> Bernoulli().bound(2), Bernoulli().log_joint().logsumexp(0)
        (tensor(-2.2051), tensor(-2.2038))
    """

    prior: float | Tensor = 0.3
    logit: float | Tensor = 0.5
    data: float | Tensor = 2.0

    def model(self) -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.as_tensor(self.prior)))
        pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.as_tensor(self.data))

    def guide(self) -> None:
        pyro.sample("z", dist.Bernoulli(logits=torch.as_tensor(self.logit)))

    def log_joint(self) -> Tensor:
        """log p(x, z) for z = 0 and z = 1; its log-sum-exp is the log evidence, its softmax the posterior."""
        data, prior = torch.as_tensor(self.data), dist.Bernoulli(torch.as_tensor(self.prior))
        z = torch.arange(2).to(data)
        return prior.log_prob(z) + dist.Normal(3.0 * z, 1.0).log_prob(data)

    def _by_count(self, num_particles: int) -> tuple[Tensor, Tensor, Tensor]:
        """For 0..K ones among K: probability, log of the mean weight, share of the ones in the weights."""
        log_joint, logit = self.log_joint(), torch.as_tensor(self.logit)
        ones = torch.arange(num_particles + 1).to(log_joint)
        log_w = log_joint - dist.Bernoulli(logits=logit).log_prob(torch.arange(2).to(log_joint))
        parts = torch.stack([(num_particles - ones).log() + log_w[0], ones.log() + log_w[1]])
        law = dist.Binomial(num_particles, logits=logit).log_prob(ones).exp()
        return law, parts.logsumexp(0) - math.log(num_particles), parts.softmax(0)[1]

    def bound(self, num_particles: int) -> Tensor:
        """L_K."""
        law, log_mean, _ = self._by_count(num_particles)
        return (law * log_mean).sum()

    def resampled(self, num_particles: int) -> Tensor:
        """q_EW(z = 1)."""
        law, _, share = self._by_count(num_particles)
        return (law * share).sum()


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Model z ~ N(0, 1), x ~ N(z, 1) in plate "data"; guide N(x / 2, 1 / 2), the posterior, moved.

    It is moved by ``offset`` = d of its standard deviations, so that a log weight is N(log p - d^2 / 2, d^2).

    Example::

        >>> gaussian = Gaussian(data=torch.zeros(1).double(), offset=1.0)
        >>> round((gaussian.bound(10) - gaussian.log_evidence).item(), 4)
        -0.0737
    """

    data: Tensor
    offset: float | Tensor = 0.0

    def model(self) -> None:
        with pyro.plate("data", len(self.data)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.data), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.data)

    def guide(self) -> None:
        with pyro.plate("data", len(self.data)):
            pyro.sample("z", dist.Normal(self.data / 2.0 + self.offset * math.sqrt(0.5), math.sqrt(0.5)))

    @property
    def log_evidence(self) -> Tensor:
        """log p(x) of each element."""
        return dist.Normal(torch.zeros_like(self.data), math.sqrt(2.0)).log_prob(self.data)

    def bound(self, num_particles: int) -> Tensor:
        """L_K of each element, by the trapezoidal rule; use float64.

        E log M = integral over u of exp(-e^u) - E exp(-M e^u); for the mean M of K weights the latter is the
        Laplace transform of one weight, at e^u / K, to the power K.
        """
        d = torch.as_tensor(self.offset).to(self.data)
        u = torch.arange(-500, 501).to(self.data) / 10.0
        e = torch.arange(-180, 181).to(self.data) / 20.0
        mass = dist.Normal(torch.zeros_like(e), 1.0).log_prob(e).exp() / 20.0
        weight_times_t = (u.unsqueeze(-1) - math.log(num_particles) + d * e - d**2 / 2.0).exp()
        laplace = ((-weight_times_t).exp() * mass).sum(-1)
        return self.log_evidence + ((-u.exp()).exp() - laplace**num_particles).sum() / 10.0


@dataclass(frozen=True, kw_only=True)
class HierarchicalGaussian:
    """mu ~ N(0, 1), z_i ~ N(mu, 1), x_i ~ N(z_i, 1): the global latent ties all elements together.

    The guide is the best mean-field Gaussian, with standard deviations ``spread`` times as wide.

    Example::

        >>> round(HierarchicalGaussian(data=torch.zeros(2)).log_evidence.item(), 3)
        -2.878
    """

    data: Tensor
    spread: float | Tensor = 1.0

    def model(self) -> None:
        mu = pyro.sample("mu", dist.Normal(self.data.new_zeros(()), 1.0))
        with pyro.plate("data", len(self.data)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.data)

    def guide(self) -> None:
        n = len(self.data)
        mean = self.data.sum() / (n + 2)
        pyro.sample("mu", dist.Normal(mean, self.spread / math.sqrt(1 + n)))
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal((mean + self.data) / 2.0, self.spread * math.sqrt(0.5)))

    @property
    def log_evidence(self) -> Tensor:
        """log N(x; 0, 2 I + 1 1')."""
        n = len(self.data)
        covariance = 2.0 * torch.eye(n).to(self.data) + 1.0
        return dist.MultivariateNormal(self.data.new_zeros(n), covariance).log_prob(self.data)

    @property
    def elbo(self) -> Tensor:
        """L_1; the posterior's precision is 1 + n at mu, 2 at each z_i, its determinant 2^n (1 + n / 2)."""
        n, spread = len(self.data), torch.as_tensor(self.spread).to(self.data)
        too_wide = (1 + n) * ((spread**2 - 1.0) / 2.0 - spread.log())
        return self.log_evidence - too_wide - 0.5 * math.log((1 + n) / (1 + n / 2))
