# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The record that passes between Pyro and the mathematics: the log importance weights of K particles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.cut import Cut
from pyro_iwae.options import require_log_weights
from pyro_iwae.totals import LogMean

__all__ = ["LogWeights"]


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Unnormalised log importance weights of K particles, in nats, one column per independent plate element.

    A node of the plate tree: where plates have particles of their own, each of the K weights holds the bounds of these
    plates' elements, and ``children`` how they came about. Without such plates there is one node.

    For latents z and data x a weight is w = p(x, z) / q(z | x); see "Reinterpreting Importance-Weighted
    Autoencoders" (Cremer, Morris, Duvenaud 2017, https://arxiv.org/abs/1704.02916).

    Attributes:
        log_weights: log w, shape ``(particles, *plates)``; differentiable where model and guide are; in single
            precision where these are in half, whose sums would be rounded, or infinite. Of a child:
            given each particle further out, ``(particles, *outer particles, *plates)``, the innermost outer first.
        plates: names of the independent plates, in the order of the trailing dimensions.
        scale: what multiplies each element's bound in the loss: the plate scale N/B of subsampled independent
            plates, times a ``poutine.scale`` that wraps model and guide alike. A number, or a tensor that
            broadcasts to ``(*plates)``. Of a child: what multiplies it in its parent's log weights, the scale of the
            plates that are not the parent's.
        constant: terms that no latent can change, already scaled, by the names of the independent plates
            that they lie in; added once, never weighed.
        tempered: whether a ``poutine.scale`` (annealing) acts *inside* the weights; then they are no evidence.
        score: sum of the unscaled log q of the sites without a reparameterised sampler, shape
            ``(particles, *plates)``; None where there is no such site.
        score_log_q: the part of log q, as it enters the weights, that belongs to those sites. Its gradient has
            mean zero for K = 1, where ``Trace_ELBO`` leaves it out.
        score_scale: the scale of ``score_log_q``, where all of it has one; 1 where not.
        cut: the guide's reparameterised values, told apart from the parameters that made them; None unless an
            estimator asked for it.
        children: nodes of the plates that have particles of their own, inside each particle of this one. Their
            ``plates`` hold those of this node.
        shared: whether the particles were drawn once for all particles further out, and not anew inside each;
            ``score`` then has shape ``(particles, 1, ..., 1, *plates)``, and ``log_weights`` size 1 along outer
            particles that do not change them.

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
    score: Float[Tensor, "particles ..."] | None = None
    score_log_q: Float[Tensor, "particles ..."] | None = None
    score_scale: float | Tensor = 1.0
    cut: Cut | None = None
    children: tuple[LogWeights, ...] = ()
    shared: bool = False

    def __post_init__(self) -> None:
        """Refuses what has no particles or plates.

        Raises:
            TypeError: where ``log_weights`` is no tensor of floating point numbers.
            ValueError: where it has not a dimension for the particles and each plate, or no particle.
        """
        found = require_log_weights(self.log_weights)
        if found.dim() < 1 + len(self.plates):
            raise ValueError(
                "expected log_weights of shape (particles, *plates) with a particle at least, and plates to name each "
                f"plate's dimension, got {tuple(found.shape)} and {self.plates}"
            )
        if found is not self.log_weights:
            object.__setattr__(self, "log_weights", found)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weights.shape[0]

    @property
    def weights(self) -> Float[Tensor, "particles *plates"]:
        """Weights normalised over particles, shape ``(particles, *plates)``; all 0 where every one is -inf."""
        return self.totals().slope(self.log_weights)

    def totals(self) -> LogMean:
        """Totals of the importance weighted bound over the particles in this block."""
        return LogMean.of(self.log_weights)

    def bound(self) -> Float[Tensor, "*plates"]:
        """The importance weighted bound, log (1/K) sum_k w_k, in nats, unscaled and without constants.

        Returns:
            One value per independent element, shape ``(*plates)``. Where every particle is impossible the value
            is -inf, with zero gradient.
        """
        largest = self.log_weights.detach().amax(0)
        impossible = largest == -math.inf
        origin = torch.where(impossible, 0.0, largest)
        total = (self.log_weights - origin).exp().sum(0)
        # torch.logsumexp has NaN for a gradient where every particle is impossible, and takes more passes.
        value = torch.where(impossible, 1.0, total).log() + origin - math.log(self.num_particles)
        return torch.where(impossible, -math.inf, value)

    @classmethod
    def joined(cls, chunks: Sequence[LogWeights], *, depth: int = 0) -> LogWeights:
        """Chunks of particles as one record; without a cut.

        Args:
            chunks: in order.
            depth: how far inside the root they are.
        """
        first, count = chunks[0], sum(c.log_weights.shape[depth] for c in chunks)

        def along(values: Sequence[Tensor | None]) -> Tensor | None:
            found = [v for v in values if v is not None]
            return torch.cat(found, depth) if found else None

        shares = [c.log_weights.shape[depth] / count for c in chunks]
        children = zip(*(c.children for c in chunks), strict=True)
        return replace(
            first,
            log_weights=torch.cat([c.log_weights for c in chunks], depth),
            constant={n: _weighed([c.constant[n] for c in chunks], shares) for n in first.constant},
            score=along([c.score for c in chunks]),
            score_log_q=along([c.score_log_q for c in chunks]),
            cut=None,
            children=tuple(cls.joined(same, depth=depth + 1) for same in children),
        )

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> LogWeights:
        """The record with other numbers for those that have a graph: weights, scores, constants, children's too."""
        return replace(
            self,
            log_weights=fn(self.log_weights),
            constant={n: fn(value) for n, value in self.constant.items()},
            score=None if self.score is None else fn(self.score),
            score_log_q=None if self.score_log_q is None else fn(self.score_log_q),
            cut=None,
            children=tuple(child.mapped(fn) for child in self.children),
        )

    def numbers(self) -> list[Tensor]:
        """What :meth:`mapped` goes through, in its order."""
        found = list[Tensor]()

        def collect(value: Tensor) -> Tensor:
            found.append(value)
            return value

        self.mapped(collect)
        return found

    def grown(self, children: Sequence[LogWeights]) -> LogWeights:
        """This node with children, whose bounds are added to its log weights."""
        log_weights = self.log_weights
        for child in children:
            log_weights = log_weights + child.summed(child.bound(), self.plates)
        return replace(self, log_weights=log_weights, children=tuple(children))

    def nodes(self) -> Iterator[LogWeights]:
        """This node, and all inside it."""
        yield self
        for child in self.children:
            yield from child.nodes()

    def summed(self, per_element: Tensor, plates: Sequence[str]) -> Tensor:
        """Sums a value per element, ``(..., *plates)``, down to the elements of some of the plates; scaled."""
        dims = [i - len(self.plates) for i, name in enumerate(self.plates) if name not in plates]
        scaled = self.scale * per_element
        return scaled.sum(dims) if dims else scaled

    def laid(self, value: Tensor, plates: Sequence[str]) -> Tensor:
        """Lays the parent's values, ``(..., *plates)`` with some of this node's plates, along this node's."""
        first = value.dim() - len(plates)
        for i, name in enumerate(self.plates):
            if name not in plates:
                value = value.unsqueeze(first + i)
        return value

    def total(self, per_element: Float[Tensor, "*plates"]) -> Float[Tensor, ""]:
        """Sums a value per element as the loss does: scaled, over all elements, constants added once."""
        total = (self.scale * per_element).sum()
        return sum((value.sum() for value in self.constant.values()), start=total)

    def drawn(self, index: Tensor) -> LogWeights:
        """Some of the particles of each independent element, ``index`` of shape ``(draws, *plates)``."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.gather(0, index)

        cut = None
        if self.cut is not None:
            cut = replace(self.cut, rest=self.cut.rest.gather(0, index), log_q=self.cut.log_q.gather(0, index))
        return replace(
            self,
            log_weights=self.log_weights.gather(0, index),
            score=take(self.score),
            score_log_q=take(self.score_log_q),
            cut=cut,
        )


def _weighed(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return sum((share * v for v, share in zip(values[1:], shares[1:], strict=True)), start=shares[0] * values[0])
