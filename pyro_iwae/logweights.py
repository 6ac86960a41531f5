# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The record that passes between Pyro and the mathematics: the log importance weights of K particles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["LogWeights", "Totals"]


@dataclass(frozen=True, eq=False)
class Totals:
    """What an estimator must know of *all* K particles, in nats; detached.

    The sum is kept in two parts, the largest weight and the rest, so that the sum *without* any one particle is
    exact also for the particle that carries nearly all of the weight.

    Attributes:
        largest: the largest log weight of each independent element, shape ``(*plates)``.
        rest: the log-sum-exp of all the other log weights, shape ``(*plates)``.
        count: K, the number of particles.
    """

    largest: Float[Tensor, "*plates"]
    rest: Float[Tensor, "*plates"]
    count: int

    @classmethod
    def of(cls, log_weights: Float[Tensor, "particles *plates"]) -> Totals:
        """Totals of one block of particles."""
        log_weights = log_weights.detach()
        largest, position = log_weights.max(0, keepdim=True)
        rest = log_weights.scatter(0, position, -math.inf).logsumexp(0)
        return cls(largest.squeeze(0), rest, log_weights.shape[0])

    def merge(self, other: Totals) -> Totals:
        """Totals of two blocks together; associative and commutative."""
        largest = torch.maximum(self.largest, other.largest)
        smaller = torch.minimum(self.largest, other.largest)
        rest = torch.logaddexp(torch.logaddexp(self.rest, other.rest), smaller)
        return Totals(largest, rest, self.count + other.count)

    @property
    def log_sum(self) -> Float[Tensor, "*plates"]:
        """Log-sum-exp over all particles."""
        return torch.logaddexp(self.largest, self.rest)

    @property
    def log_mean(self) -> Float[Tensor, "*plates"]:
        """Log-mean-exp over all particles, the value of the bound."""
        return self.log_sum - math.log(self.count)

    def log_mean_of_others(self, log_weights: Float[Tensor, "particles *plates"]) -> Float[Tensor, "particles *plates"]:
        """Log-mean-exp over the K - 1 other particles, for each of the given ones (which are among the K)."""
        log_weights = log_weights.detach()
        share = (log_weights - self.log_sum).clamp(max=-math.log(2.0))  # any but the largest has at most half
        others = self.log_sum + torch.log1p(-share.exp())
        others = torch.where(log_weights == self.largest, self.rest, others)
        return others - math.log(self.count - 1)


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Unnormalised log importance weights of K particles, in nats, one column per independent plate element.

    For latents z and data x a weight is w = p(x, z) / q(z | x); see "Reinterpreting Importance-Weighted
    Autoencoders" (Cremer, Morris, Duvenaud 2017, https://arxiv.org/abs/1704.02916).

    Attributes:
        log_weights: log w, shape ``(particles, *plates)``; differentiable where model and guide are.
        plates: names of the independent plates, in the order of the trailing dimensions.
        scale: what multiplies each element's bound in the loss: the plate scale N/B of subsampled independent
            plates, times a ``poutine.scale`` that wraps model and guide alike. A number, or a tensor that
            broadcasts to ``(*plates)``.
        constant: terms that no latent can change, already scaled, by the names of the independent plates
            that they lie in; added once, never weighed.
        tempered: whether a ``poutine.scale`` (annealing) acts *inside* the weights; then they are no evidence.
        score: sum of the unscaled log q of the sites without a reparameterised sampler, shape
            ``(particles, *plates)``; None where there is no such site.
        score_log_q: the part of log q, as it enters the weights, that belongs to those sites. Its gradient has
            mean zero for K = 1, where ``Trace_ELBO`` leaves it out.

    Example::

        >>> weights = LogWeights(torch.tensor([[0.0], [1.0]]), plates=("data",))
        >>> weights.bound()
        tensor([0.6201])
        >>> weights.weights.squeeze(-1)
        tensor([0.2689, 0.7311])
    """

    log_weights: Float[Tensor, "particles *plates"]
    plates: tuple[str, ...] = ()
    scale: float | Tensor = 1.0
    constant: Mapping[tuple[str, ...], Tensor] = field(default_factory=dict)
    tempered: bool = False
    score: Float[Tensor, "particles *plates"] | None = None
    score_log_q: Float[Tensor, "particles *plates"] | None = None

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weights.shape[0]

    @property
    def weights(self) -> Float[Tensor, "particles *plates"]:
        """Weights normalised over particles, shape ``(particles, *plates)``; all 0 where every one is -inf."""
        return self.share_of(self.totals())

    def share_of(self, totals: Totals) -> Float[Tensor, "particles *plates"]:
        """Each particle's share of the given totals, detached; 0 where the total itself is 0."""
        share = (self.log_weights.detach() - totals.log_sum).exp()
        return torch.where(totals.largest == -math.inf, 0.0, share)

    def totals(self) -> Totals:
        """Totals over the particles in this block."""
        return Totals.of(self.log_weights)

    def bound(self) -> Float[Tensor, "*plates"]:
        """The importance weighted bound, log (1/K) sum_k w_k, in nats, unscaled and without constants.

        Returns:
            One value per independent element, shape ``(*plates)``. Where every particle is impossible the value
            is -inf, with zero gradient.
        """
        impossible = (self.log_weights == -math.inf).all(0)
        possible = torch.where(impossible, 0.0, self.log_weights)  # keeps NaN out of the gradient
        return torch.where(impossible, -math.inf, possible.logsumexp(0) - math.log(self.num_particles))

    def total(self, per_element: Float[Tensor, "*plates"]) -> Float[Tensor, ""]:
        """Sums a value per element as the loss does: scaled, over all elements, constants added once."""
        total = (self.scale * per_element).sum()
        return sum((value.sum() for value in self.constant.values()), start=total)
