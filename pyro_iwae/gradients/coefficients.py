# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""An estimator in numbers: what multiplies the ways by which a parameter reaches each log weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.logweights import LogWeights

__all__ = ["Coefficients"]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """For each particle and independent element, detached, shape ``(particles, *plates)``.

    Attributes:
        model: of log p and all else that depends on a parameter directly, z held.
        path: of log w through the guide's reparameterised values z.
        log_q: of -log q of these sites by their parameters directly, z held; None leaves it out.
        score: of -log q of score-function sites.
        ratio: ``path`` over ``model``, of all K particles, where that is never large; saves a pass through the model.
        converted: whether ``path`` stands in for what ``log_q`` leaves out, so that nothing may be missing there.
    """

    model: Float[Tensor, "particles *plates"]
    path: Float[Tensor, "particles *plates"]
    log_q: Float[Tensor, "particles *plates"] | None
    score: Float[Tensor, "particles *plates"]
    ratio: Float[Tensor, "all *plates"] | None = None
    converted: bool = False

    def surrogate(self, weights: LogWeights) -> Float[Tensor, "*plates"]:
        """Adds up each part with its coefficient; particles of weight 0 are left out."""
        possible = weights.log_weights != -math.inf  # 0 * -inf is NaN

        def part(coefficient: Tensor, value: Tensor) -> Tensor:
            return coefficient * torch.where(possible, value, 0.0)

        if self.path is self.model and self.log_q is self.model and self.score is self.model:
            return part(self.model, weights.log_weights).sum(0)
        cut = weights.cut
        if cut is None:
            raise ValueError(
                "expected log weights with a cut at the guide's values, got none; let the ELBO make them: "
                "ImportanceWeightedELBO(gradient=...)"
            )
        surrogate, along = part(self.model, cut.rest), torch.zeros_like(cut.rest)
        on_the_way_back = self.ratio is not None and cut.is_flat
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
        through = cut.through(along.sum(), refuse_masked=self.converted)
        if on_the_way_back and self.ratio is not None:
            cut.multiply_on_the_way_back(self.ratio)
        return surrogate.sum(0) + through

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
