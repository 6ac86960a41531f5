# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The ways from a guide's parameters through its reparameterised values, and what goes back along them.

Each value z is handed on as a *leaf*, the same numbers one node further on, where later sites are drawn and densities
evaluated. So what comes back to a leaf can be changed before it goes on through z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.decisions import holds

__all__ = ["Ways"]


@dataclass(frozen=True, eq=False)
class Ways:
    """All values that were cut in the runs of K particles, in the order in which they were drawn.

    Attributes:
        names: the guide sites, one for each value (a site counts once for each run).
        values: their values z, with the graph that leads to the guide's parameters.
        leaves: the same numbers one node further on.
        masks: where each site's log q counts, to broadcast with its value; None where it does everywhere.
        gather: takes a tensor for each value, of its shape, and sums them up by independent element, ``(*plates)``.
        spread: takes, for each node of the plate tree, a number for each particle and element, and lays them along
            the values.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    gather: Callable[[Sequence[Tensor]], Tensor]
    spread: Callable[[Sequence[Tensor]], list[Tensor]]
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

    def multiply_on_the_way_back(self, factors: Sequence[Tensor]) -> None:
        """Multiplies all that will come back to the leaves before it goes on through z; once, for flat ways only.

        What ``through`` gave before is not touched: it goes to the values, not to the leaves.

        Args:
            factors: for each node, for each particle and element.
        """
        if self._multiplied:
            raise RuntimeError("these log weights have a surrogate already; let the ELBO draw new ones")
        self._multiplied.append(True)
        for leaf, factor in zip(self.leaves, self.spread(factors), strict=True):
            leaf.register_hook(partial(_in_dtype_of, factor))

    def partial(self, total: Tensor) -> list[Tensor]:
        """Derivatives of a scalar by each leaf, every other leaf and every parameter held; detached."""
        with self._stopped():
            return _slopes(total, self.leaves)

    def through(
        self, total: Tensor, factors: Sequence[Tensor] | None = None, *, refuse_masked: bool = False
    ) -> Float[Tensor, "*plates"]:
        """A surrogate, by element, whose gradient is that of ``total`` along the ways through z alone.

        Args:
            total: a scalar.
            factors: for each node, for each particle and element, what to multiply flat ways with.
            refuse_masked: whether to raise where a value whose log q is masked reaches ``total`` nevertheless.
        """
        slopes = self.partial(total)
        if refuse_masked:
            self.require_unmasked(slopes)
        if factors is not None:
            slopes = [f * s for f, s in zip(self.spread(factors), slopes, strict=True)]
        return self._sent(slopes)

    def multiplied(self, coming: Tensor, further: Tensor, factors: Sequence[Tensor]) -> Float[Tensor, "*plates"]:
        """A surrogate for both totals along the ways, with a factor of its own for each value; less what comes anyway.

        A parameter that makes z reaches a total through z and through all that is drawn given z. The whole of that is
        multiplied by z's factor, and by no later one's.

        Args:
            coming: a scalar, of which the derivatives come back to the leaves by other parts of the surrogate.
            further: a scalar of which they do not.
            factors: for each node, for each particle and element.
        """
        own = self.partial(coming)
        slopes = [a + b for a, b in zip(own, self.partial(further), strict=True)]
        self.require_unmasked(slopes)
        already, whole = self._whole(own), self._whole(slopes)
        missing = [f * w - a for f, w, a in zip(self.spread(factors), whole, already, strict=True)]
        # What is sent to a value goes on to the earlier ones that it was drawn given.
        passed = self._passed(missing)
        return self._sent([m - p for m, p in zip(missing, passed, strict=True)])

    def require_unmasked(self, slopes: Sequence[Tensor]) -> None:
        """Raises where a value whose log q is masked has a slope nevertheless."""
        for name, slope, mask, value in zip(self.names, slopes, self.masks, self.values, strict=True):
            if mask is None:
                continue
            # All there is where all that depends on it is masked, too: of numbers of size 1 that cancel, and in nats.
            rounding = 8.0 * torch.finfo(slope.dtype).eps
            none = slope.abs() * value.detach().abs().clamp(min=1.0) <= rounding
            if not holds((mask | none).all()):
                raise ValueError(
                    f"DoublyReparameterized needs the log q of every value that reaches the weights; guide site "
                    f"'{name}' is masked there and reaches them nevertheless. Mask in the model what depends on it, "
                    "or write gradient=Pathwise()"
                )

    def _sent(self, slopes: Sequence[Tensor]) -> Tensor:
        return self.gather([g * z for g, z in zip(slopes, self.values, strict=True)])

    def _whole(self, own: Sequence[Tensor]) -> list[Tensor]:
        """From derivatives by each leaf, the others held, to those with all that is drawn given it following."""
        found = list(own)
        with self._stopped() as passing:
            for i in reversed(range(len(found))):  # a value is drawn given earlier ones only
                found[:i] = [a + b for a, b in zip(found[:i], self._step(i, found[i], passing), strict=True)]
        return found

    def _passed(self, sent: Sequence[Tensor]) -> list[Tensor]:
        """What is passed on to each leaf, in one step, of what is sent to the values."""
        found = [torch.zeros_like(leaf) for leaf in self.leaves]
        with self._stopped() as passing:
            for i in reversed(range(len(sent))):
                found[:i] = [a + b for a, b in zip(found[:i], self._step(i, sent[i], passing), strict=True)]
        return found

    def _step(self, i: int, slope: Tensor, passing: set[int]) -> list[Tensor]:
        """From one value to the leaves before it."""
        if i == 0:
            return []
        passing.add(i)
        found = _slopes((slope * self.values[i]).sum(), self.leaves[:i])
        passing.remove(i)
        return found

    @contextmanager
    def _stopped(self) -> Iterator[set[int]]:
        """Stops at the values what would run back through them, but for those in the set that it gives."""
        passing: set[int] = set()

        def stop(i: int) -> Callable[[Tensor], Tensor]:
            return lambda slope: slope if i in passing else torch.zeros_like(slope)

        handles = [value.register_hook(stop(i)) for i, value in enumerate(self.values)]
        try:
            yield passing
        finally:
            for handle in handles:
                handle.remove()


def _in_dtype_of(factor: Tensor, slope: Tensor) -> Tensor:
    """Their product; data may be of another precision than the value, and the weights with it."""
    return (factor * slope).to(slope.dtype)


def _slopes(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not leaves or not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
