# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The gradient of a sum whose terms do not fit into memory together: term by term, and handed out at one backward().

Each term is sent back as soon as it is there, and its graph let go. What it gives is added up apart from ``grad``, so
that a later ``backward()`` of the sum hands it out as that of any other loss: scaled by what is done with the loss, and
once, which is what hooks of parameters (clipping, gradient averaging over processes) expect.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Piecemeal", "leaves_of"]


def leaves_of(*outputs: Tensor) -> list[Tensor]:
    """The leaf tensors that a backward pass from here would reach, each once."""
    found: dict[int, Tensor] = {}
    waiting = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(waiting)
    for output in outputs:
        if output.grad_fn is None and output.requires_grad:
            found[id(output)] = output
    while waiting:
        node: Any = waiting.pop()
        if hasattr(node, "variable"):  # what adds to a leaf's grad
            found[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return list(found.values())


class Piecemeal:
    """Gradients added up by leaf, term after term.

    Args:
        retain_graph: whether to keep what a term has in common with others. Only graphs made outside are: a term's own
            goes with the term.
    """

    def __init__(self, *, retain_graph: bool | None = None) -> None:
        self.retain_graph = retain_graph
        self._leaves: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def add(self, *terms: Tensor, slopes: Sequence[Tensor] | None = None) -> bool:
        """Sends terms back, and adds up what comes to the leaves.

        Args:
            terms: scalars, or any tensors with slopes.
            slopes: what they are multiplied with; 1 by default.

        Returns:
            Whether all that came is free of NaN.

        Raises:
            ValueError: where terms share a graph, which the first has used up.
        """
        leaves = leaves_of(*terms)
        if not leaves:
            return True
        with _without_hooks(leaves):
            try:
                coming = torch.autograd.grad(terms, leaves, slopes, self.retain_graph, allow_unused=True)
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                raise ValueError(
                    "expected model and guide to compute what they need inside each run, got a tensor that was "
                    "computed outside of them and needs a gradient: with chunk_size each chunk goes back through it. "
                    "Compute it inside model or guide, detach it, or pass retain_graph=True"
                ) from error
        sound = True
        for leaf, found in zip(leaves, coming, strict=True):
            if found is not None:
                self._leaves[id(leaf)] = leaf
                known = self._gradients.get(id(leaf))
                self._gradients[id(leaf)] = found if known is None else known + found
                numbers = found.coalesce().values() if found.is_sparse else found
                sound = sound and not bool(numbers.isnan().any())
        return sound

    def take(self, leaf: Tensor) -> Tensor | None:
        """What has come to a leaf, which is then not handed out; None if nothing has."""
        self._leaves.pop(id(leaf), None)
        return self._gradients.pop(id(leaf), None)

    def each(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The leaves, and what has come to them."""
        for number, leaf in self._leaves.items():
            yield leaf, self._gradients[number]

    def put(self, leaf: Tensor, gradient: Tensor) -> None:
        """Has a leaf be handed this gradient, in the place of what has come to it."""
        self._leaves[id(leaf)], self._gradients[id(leaf)] = leaf, gradient

    def delivered(self, value: Tensor) -> Tensor:
        """The sum's value, as a tensor whose ``backward()`` hands out the gradients."""
        if not self._leaves:
            return value
        gradients = [self._gradients[number] for number in self._leaves]
        delivered: Tensor = _Delivery.apply(value, gradients, *self._leaves.values())
        return delivered


class _Delivery(torch.autograd.Function):
    """A number with gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        return None, None, *(slope.to(g.device, g.dtype) * g for g in ctx.gradients)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of leaves are for the whole gradient, which is handed out at the end."""
    kept: list[tuple[OrderedDict[int, Any], list[tuple[int, Any]]]] = []
    try:
        for leaf in leaves:
            hooks: Any = leaf._backward_hooks
            if hooks:
                kept.append((hooks, list(hooks.items())))
                hooks.clear()
        yield
    finally:
        for hooks, items in kept:
            hooks.update(items)
