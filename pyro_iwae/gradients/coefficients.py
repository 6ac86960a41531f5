# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""An estimator in numbers: what multiplies the ways by which a parameter reaches each log weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.cut import Cut
from pyro_iwae.logweights import LogWeights
from pyro_iwae.reach import Reach

__all__ = ["Coefficients"]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """For each particle of the root and independent element, detached, shape ``(particles, *plates)``.

    Attributes:
        model: of log p and all else that depends on a parameter directly, z held.
        path: of log w through the guide's reparameterised values z.
        log_q: of -log q of these sites by their parameters directly, z held; None leaves it out.
        score: of -log q of score-function sites.
        ratio: ``path`` over ``model``, of all K particles, where that is never large; saves a pass through the model.
        converted: whether ``path`` stands in for what ``log_q`` leaves out, so that nothing may be missing there.
        share: what ``path`` over ``model`` is where log q enters the weights with scale 1; None where ``path`` has no
            such form.
    """

    model: Float[Tensor, "particles *plates"]
    path: Float[Tensor, "particles *plates"]
    log_q: Float[Tensor, "particles *plates"] | None
    score: Float[Tensor, "particles *plates"]
    ratio: Float[Tensor, "all *plates"] | None = None
    converted: bool = False
    share: Float[Tensor, "all *plates"] | None = None

    def surrogate(self, weights: LogWeights) -> Float[Tensor, "*plates"]:
        """Adds up each part with its coefficient; particles of weight 0 are left out."""
        if self.path is self.model and self.log_q is self.model and self.score is self.model:
            return _part(weights, self.model, weights.log_weights).sum(0)
        if weights.cut is None:
            raise ValueError(
                "expected log weights with a cut at the guide's values, got none; let the ELBO make them: "
                "ImportanceWeightedELBO(gradient=...)"
            )
        return self._in_tree(weights, weights.cut) if weights.children else self._alone(weights, weights.cut)

    def _alone(self, weights: LogWeights, cut: Cut) -> Float[Tensor, "*plates"]:
        part = partial(_part, weights)
        surrogate, along = part(self.model, cut.rest), torch.zeros_like(cut.rest)
        on_the_way_back = self.ratio is not None and cut.ways.is_flat
        if self.path is not self.model and not on_the_way_back:
            along = along + part(self.path - self.model, cut.rest)
        if self.log_q is None:
            along = along - part(self.path, cut.log_q)
        else:
            surrogate = surrogate - part(self.log_q, cut.log_q)
            if self.path is not self.log_q:
                along = along - part(self.path - self.log_q, cut.log_q)
        if weights.score_log_q is not None:
            surrogate = surrogate - part(self.score, weights.score_log_q)
            if self.path is not self.score:
                along = along - part(self.path - self.score, weights.score_log_q)
        through = cut.ways.through(along.sum(), refuse_masked=self.converted)
        if on_the_way_back and self.ratio is not None:
            cut.ways.multiply_on_the_way_back([self.ratio])
        return surrogate.sum(0) + through

    def _in_tree(self, weights: LogWeights, cut: Cut) -> Float[Tensor, "*plates"]:
        """Sums over all nodes, each particle's part with the objective's slope by its log weight.

        What comes back to a value goes on to its parameters with the share of that value's own particle.
        """
        if self.log_q is not None or (self.path is not self.model and self.share is None):
            raise NotImplementedError(
                "plate_particles has no such gradient for an objective with another part for the guide, or with slopes "
                "that may be negative; write objective=None"
            )
        root = Reach.of(weights, slope=self.model, share=self.share)
        surrogate = weights.log_weights.new_zeros(weights.log_weights.shape[1:])
        further = weights.log_weights.new_zeros(())
        nodes = [root, *root.below()]
        for reach in nodes:
            node = reach.node
            if node.cut is None:
                raise ValueError("expected every node of the plate tree to be cut, or none")
            value = _part(node, reach.slope, node.cut.rest)
            if node.score_log_q is not None:
                value = value - _part(node, reach.slope, node.score_log_q)
            value = value.sum(list(range(value.dim() - len(node.plates))))
            surrogate = surrogate + replace(node, scale=1.0).summed(value, weights.plates)
            further = further - _part(node, reach.slope, node.cut.log_q).sum()
        if not self.converted:
            return surrogate + cut.ways.through(further)
        scale = 1.0 if cut.scale is None else cut.scale
        factors = [(1.0 - scale) + scale * reach.share for reach in nodes]
        if not cut.ways.is_flat:
            return surrogate + cut.ways.multiplied(surrogate.sum(), further, factors)
        through = cut.ways.through(further, factors, refuse_masked=True)
        cut.ways.multiply_on_the_way_back(factors)
        return surrogate + through

    def drawn(self, index: Tensor, count: Float[Tensor, "draws *plates"]) -> Coefficients:
        """Coefficients of drawn particles, each standing for ``count`` of them.

        Args:
            index: which particles, ``(draws, *plates)``.
            count: for how many each stands.
        """

        taken: dict[int, Tensor] = {}

        def take(coefficient: Tensor) -> Tensor:
            if id(coefficient) not in taken:  # coefficients that are one and the same stay so
                taken[id(coefficient)] = coefficient.gather(0, index) * count
            return taken[id(coefficient)]

        log_q = None if self.log_q is None else take(self.log_q)
        return Coefficients(take(self.model), take(self.path), log_q, take(self.score), self.ratio, self.converted)


def _part(weights: LogWeights, coefficient: Tensor, value: Tensor) -> Tensor:
    possible = weights.log_weights != -math.inf  # 0 * -inf is NaN
    return coefficient * torch.where(possible, value, 0.0)
