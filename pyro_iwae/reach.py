# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What each particle of the plate tree counts in the objective at its root.

Let Z be the mean of the K weights below the logarithm, with the means of all nodes inside them. It is linear in the
weight of any one particle, whatever the node: Z = A + B w. So w has a *share* B w / Z of it, and Z without the particle
is Z (1 - share). A particle's share is that of the particle further out times its own weight among its companions,
normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import LogMean

__all__ = ["Reach"]


@dataclass(frozen=True, eq=False)
class Reach:
    """One node, seen from the root; all detached, in the shape of its log weights where nothing else is said.

    Attributes:
        node: its log weights.
        slope: derivative of the objective by each of its log weights, which holds the scales of subsampled plates.
        share: of each particle. In a shared node, whose particles serve all particles further out, summed over these:
            ``(particles, 1, ..., 1, *plates)``.
        apart: the share by particle further out, also in a shared node.
        log_apart: its logarithm, for the importance weighted bound.
        log_rest: log(1 - share), right to rounding also where the share is almost 1.
        log_others: logarithm of the share that the particle's companions have.
        value: the objective at the root, ``(*plates)``.
        scale: of the node's elements in the objective.
        count: particles of this node and of those further out: each has a share of 1 / count, if all weights are equal.
    """

    node: LogWeights
    slope: Float[Tensor, "particles ..."]
    share: Float[Tensor, "particles ..."]
    apart: Float[Tensor, "particles ..."]
    log_apart: Float[Tensor, "particles ..."]
    log_rest: Float[Tensor, "particles ..."]
    log_others: Float[Tensor, "particles ..."]
    value: Float[Tensor, "..."]
    scale: float
    count: int

    @classmethod
    def of(
        cls,
        root: LogWeights,
        totals: LogMean | None = None,
        *,
        slope: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Reach:
        """The root.

        Args:
            root: its log weights.
            totals: the bound at all K particles, where these are a part of them.
            slope: derivative of the objective by each, where that is not their log-mean-exp.
            share: what stands for the share there; it may be negative.
        """
        totals = root.totals() if totals is None else totals
        log_share, log_others = totals.log_shares(root.log_weights)
        slope = log_share.exp() if slope is None else slope
        share = log_share.exp() if share is None else share
        return cls(root, slope, share, share, log_share, log_others, log_others, totals.value, 1.0, totals.count)

    def below(self) -> Iterator[Reach]:
        """The nodes inside this one, each followed by those inside it."""
        for child in self.node.children:
            reach = self._of(child)
            yield reach
            yield from reach.below()

    def _of(self, child: LogWeights) -> Reach:
        def laid(value: Tensor) -> Tensor:
            return child.laid(value, self.node.plates).unsqueeze(0)

        totals = child.totals()
        own, others = totals.log_shares(child.log_weights)
        log_apart, log_others = laid(self.log_apart) + own, laid(self.log_apart) + others
        apart = laid(self.apart) * own.exp()
        outer = list(range(1, apart.dim() - len(child.plates)))
        if child.shared:
            share, log_others = apart.sum(outer, keepdim=True), log_others.logsumexp(outer, keepdim=True)
            log_rest, count = log_others, child.num_particles
        else:
            share, log_rest = apart, torch.logaddexp(laid(self.log_rest), log_others)
            count = child.num_particles * self.count
        return Reach(
            node=child,
            slope=laid(self.slope) * child.scale * own.exp(),
            share=share,
            apart=apart,
            log_apart=log_apart,
            log_rest=log_rest,
            log_others=log_others,
            value=child.laid(self.value, self.node.plates),
            scale=self.scale * float(child.scale),
            count=count,
        )
