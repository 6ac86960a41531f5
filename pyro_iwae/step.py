# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""One recorded step: the graph, what it is run on, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.capture import Graph
from pyro_iwae.state import get_torch_state, set_torch_state
from pyro_iwae.watching import Parameters, Watched

__all__ = ["Result", "Step", "handed_out", "has_hooks"]

CHECKS = 10, 100  # calls that are compared with model and guide, beside the first and every thousandth
CHECK_EVERY = 1000


@dataclass(frozen=True)
class Result:
    """What a recorded step gave: the loss, and a gradient for each of its tensors (none where it updates them)."""

    loss: float
    report: Tensor
    leaves: list[Tensor]
    gradients: Sequence[Tensor]

    def accumulated(self) -> float:
        """Adds the gradients to the leaves' ``grad``, as ``backward()`` does; the loss."""
        if any(has_hooks(leaf) for leaf in self.leaves):  # which are for torch to run
            handed_out(self).backward()
            return self.loss
        for leaf, gradient in zip(self.leaves, self.gradients, strict=True):
            if leaf.grad is None:
                leaf.grad = gradient
            else:
                leaf.grad.detach_().add_(gradient)
        return self.loss


@dataclass(eq=False)
class Step:
    """One recorded step.

    Attributes:
        graph: what was recorded. It returns the loss and whether a decision broke, as one tensor, and the gradients.
        leaves: the tensors that get a gradient.
        parameters: the parameters that were asked for.
        watched: what must stay as it was.
        state: what an update changes beside the leaves, by kind.
        options: what the update's numbers were known by.
        kept: what must live as long as it does: effect handlers, which are told by their numbers.
        buffers: what a module counts, to be put back where model and guide run the step once more.
        calls: how often it has run.
        broken: how often in a row it did not hold.
    """

    graph: Graph
    leaves: list[Tensor]
    parameters: Parameters
    watched: Watched
    state: list[list[Tensor]] = field(default_factory=list)
    options: int = 0
    kept: list[Any] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    calls: int = 0
    broken: int = 0

    def __post_init__(self) -> None:
        self.own = [*self.leaves, *(t for kind in self.state for t in kind)]

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs it on these arguments."""
        with torch.no_grad():
            return self.graph(self.tensors(tensors))

    def before(self) -> tuple[Any, list[Tensor]]:
        """What is to be put back if it turns out that the recording does not hold for this step."""
        return get_torch_state(), [buffer.clone() for buffer in self.buffers]

    def put_back(self, before: tuple[Any, list[Tensor]]) -> None:
        """Puts it back, for model and guide to run the step."""
        random, buffers = before
        set_torch_state(random)
        for buffer, value in zip(self.buffers, buffers, strict=True):
            buffer.data.copy_(value)

    def bound(self, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        """What runs it on these arguments, again and again, and returns its report: with as little Python as can be."""
        return self.graph.bound(self.tensors(tensors))

    def tensors(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """What the graph is run on."""
        return [*self.own, *arguments]

    @property
    def is_due(self) -> bool:
        """Whether to compare it with model and guide before the next call."""
        return self.calls in CHECKS or (self.calls > 0 and self.calls % CHECK_EVERY == 0)


class _HandedOut(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, result: Result, loss: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*result.gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(slope * g for g in ctx.saved_tensors))


def handed_out(result: Result) -> Tensor:
    """The loss as a tensor whose ``backward()`` hands the gradients to the leaves, hooks and all."""
    loss = _HandedOut.apply(result, result.report[0].clone(), *result.leaves)
    return loss


def has_hooks(leaf: Tensor) -> bool:
    """Whether torch is to be told of this leaf's gradient."""
    return bool(leaf._backward_hooks) or bool(leaf._post_accumulate_grad_hooks)
