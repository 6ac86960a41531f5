# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The reparameterised values of K particles, cut from the parameters that made them.

All densities are evaluated at leaves, which are the guide's values z themselves. So the ways by which a parameter
reaches a log weight can be told apart: through a density directly, or through z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Cut"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What an estimator needs beside the log weights to treat the ways through z by themselves.

    Attributes:
        names: the guide sites that were cut, one for each value (a site counts once for each run).
        values: their values z, with the graph that leads to the guide's parameters.
        leaves: the same numbers one node further on, where densities were evaluated and later sites were conditioned.
        masks: where each site's log q counts, to broadcast with its value; None where it does everywhere.
        rest: the part of the log weights that is neither ``log_q`` nor that of score-function sites,
            ``(particles, *plates)``: log p, and what the guide adds without drawing (a flow written by hand).
        log_q: log q of the cut sites as it enters the weights, ``(particles, *plates)``.
        scale: the one scale that multiplies ``log_q`` inside the weights; None where sites differ in it.
        downstream: a cut site and a score-function site whose law depends on it, if there are such.
        gather: takes a tensor for each value, of its shape, and sums them up by independent element, ``(*plates)``.
        spread: takes a number for each particle and element, and lays them along each value.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    rest: Float[Tensor, "particles *plates"]
    log_q: Float[Tensor, "particles *plates"]
    scale: float | Tensor | None
    downstream: tuple[str, str] | None
    gather: Callable[[Sequence[Tensor]], Tensor]
    spread: Callable[[Tensor], list[Tensor]]
    _multiplied: list[bool] = field(default_factory=list)

    @property
    def is_flat(self) -> bool:
        """Whether no value was drawn given another, nor is masked: only densities see leaves then."""
        if any(mask is not None for mask in self.masks):
            return False
        if not self.leaves:
            return True
        total = torch.stack([value.sum() for value in self.values]).sum()
        return all(g is None for g in torch.autograd.grad(total, self.leaves, retain_graph=True, allow_unused=True))

    def multiply_on_the_way_back(self, ratio: Float[Tensor, "particles *plates"]) -> None:
        """Multiplies all that will come back to the leaves before it goes on through z; once, for flat cuts only.

        What ``through`` gave before is not touched: it goes to the values, not to the leaves.
        """
        if self._multiplied:
            raise RuntimeError("these log weights have a surrogate already; let the ELBO draw new ones")
        self._multiplied.append(True)
        for leaf, factor in zip(self.leaves, self.spread(ratio), strict=True):
            leaf.register_hook(factor.mul)

    def partial(self, total: Tensor) -> list[Tensor]:
        """Derivatives of a scalar by each leaf, every other leaf and every parameter held; detached."""
        if not self.leaves or not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        # A later site is drawn with the earlier leaves: what would run back through its draw stops at its value.
        handles = [value.register_hook(torch.zeros_like) for value in self.values]
        try:
            found = torch.autograd.grad(
                total, self.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        finally:
            for handle in handles:
                handle.remove()
        return list(found)

    def through(self, total: Tensor, *, refuse_masked: bool = False) -> Float[Tensor, "*plates"]:
        """A surrogate, by element, whose gradient is that of ``total`` along the ways through z alone.

        Args:
            total: a scalar.
            refuse_masked: whether to raise where a value whose log q is masked reaches ``total`` nevertheless.
        """
        slopes = self.partial(total)
        if refuse_masked:
            largest = max((float(slope.abs().max()) for slope in slopes if slope.numel()), default=0.0)
            for name, slope, mask in zip(self.names, slopes, self.masks, strict=True):
                self._require_unreached(name, slope, mask, 1e2 * torch.finfo(slope.dtype).eps * largest)
        return self.gather([g * z for g, z in zip(slopes, self.values, strict=True)])

    def _require_unreached(self, name: str, slope: Tensor, mask: Tensor | None, rounding: float) -> None:
        if mask is not None and bool((torch.where(mask, 0.0, slope).abs() > rounding).any()):
            raise ValueError(
                f"DoublyReparameterized needs the log q of every value that reaches the weights; guide site "
                f"'{name}' is masked there and reaches them nevertheless. Mask in the model what depends on it, "
                "or write gradient=Pathwise()"
            )
