# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Recorded steps: made when a pair is new, run in place of model and guide, and compared with these now and then.

A recorded step reads parameters, data and random numbers anew, and takes all else as it was: Python's numbers,
branches, the structure of model and guide. What it branched on that hangs on tensors it watches itself (``decisions``);
where that comes out differently, model and guide run the step.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy
import torch
from pyro import poutine
from torch import Tensor

from pyro_iwae.capture import Graph, capture
from pyro_iwae.decisions import any_of, holds, recorded_decisions
from pyro_iwae.particles import Call
from pyro_iwae.state import unchanged_state
from pyro_iwae.step import Result, Step, has_hooks
from pyro_iwae.structure import StructureCache
from pyro_iwae.switches import switches
from pyro_iwae.watching import (
    Arguments,
    Parameters,
    Watched,
    handlers_around,
    handlers_of,
    require_no_handlers,
    slots_of,
    steady,
)
from pyro_iwae.weighing import Particles

__all__ = ["CompiledSteps", "Update"]

MOST_RECORDINGS = 16  # of one model and guide; each takes seconds
MOST_PROBES = 5  # a look at the pair that saw nothing, by chance, is repeated
MOST_BROKEN = 3  # steps in a row for which a recording did not hold, before there is a new one

OneStep = Callable[[Call], tuple[Particles | None, Tensor]]


class Update(Protocol):
    """What happens to the parameters at the end of a step, in place, as a part of the recording."""

    def prepare(self, leaves: Sequence[Tensor], parameters: Parameters) -> list[list[Tensor]]:
        """The tensors that it changes beside the parameters, by kind."""

    def options(self, leaves: Sequence[Tensor]) -> int:
        """A number that changes with the numbers that a recording freezes."""

    def apply(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor], held: Tensor) -> None:
        """Changes all, but not where ``held`` is true."""


class CompiledSteps:
    """The recorded steps of one ELBO.

    Args:
        one_step: runs model and guide: particles, and the loss with its graph.
        update: what happens at the end of a step; None leaves gradients to the caller.
    """

    def __init__(self, one_step: OneStep, update: Update | None = None) -> None:
        self.one_step, self.update = one_step, update
        self.cache = StructureCache()

    def recapture(self) -> None:
        """Forgets all recordings."""
        self.cache = StructureCache()

    def step(self, call: Call, options: tuple[Any, ...]) -> Result | None:
        """Runs one step; None where model and guide are to run it, on the random numbers that come now.

        Args:
            call: model, guide and arguments.
            options: what else a recording depends on.

        Raises:
            NotImplementedError: where the step cannot be recorded.
            TypeError: where an argument is neither a tensor nor a plain value.
            RuntimeError: where the recording and model and guide have parted.
        """
        found = self.find(call, options)
        return None if found is None else self.run(*found)

    def find(self, call: Call, options: tuple[Any, ...]) -> tuple[Step, Arguments] | None:
        """The recording of a step, made if there is none that holds; None where there is to be none."""
        require_no_handlers()
        arguments = Arguments.of(call.args, call.kwargs)
        pair = self.cache.key(call.model, call.guide)
        around = handlers_around(call.model), handlers_around(call.guide)
        tied = switches(tuple(arguments.tensors), {})  # what is no tensor is in the kind
        key = (*pair, *around, arguments.kind, tied, options, *_surroundings())
        step = self.cache.recorded.get(key)
        if step is None or not self._is_valid(step):
            step = self._record(call, arguments, pair)
            self.cache.recorded.pop(key, None)
            if step is None:
                return None
            self.cache.recorded[key] = step
        elif step.is_due and not self._agrees_twice(step, call, arguments):
            raise RuntimeError(PARTED)
        return step, arguments

    def run(self, step: Step, arguments: Arguments) -> Result | None:
        """Runs a recording."""
        before = step.before()
        report, *gradients = step.run(arguments.tensors)
        loss, broken = report.tolist()
        step.calls += 1
        if broken:
            step.put_back(before)
            step.broken += 1
            return None
        step.broken = 0
        step.parameters.announce()
        return Result(loss, report, step.leaves, gradients)

    def _is_valid(self, step: Step) -> bool:
        same = self.update is None or self.update.options(step.leaves) == step.options
        return same and step.broken < MOST_BROKEN and step.watched.holds()

    def _record(self, call: Call, arguments: Arguments, pair: tuple[Any, ...]) -> Step | None:
        """Makes a recording; None where there are too many, or this is no step to learn from."""
        made = self.cache.made.get(pair, 0)
        if made >= MOST_RECORDINGS:
            _warn_once(self.cache.said, TOO_MANY.format(made))
            return None
        args, kwargs, fresh = arguments.aliases()
        call = replace(call, args=args, kwargs=kwargs)
        with unchanged_state(call.model, call.guide) as modules:
            parameters, loss = self._probe(call)
        if not bool(loss.isfinite()):
            return None
        leaves = _leaves(loss)
        if self.update is not None and any(has_hooks(leaf) for leaf in leaves):
            raise NotImplementedError(HOOKS)
        state = [] if self.update is None else self.update.prepare(leaves, parameters)
        options = 0 if self.update is None else self.update.options(leaves)
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        inputs = [*leaves, *(t for kind in state for t in kind), *fresh, *buffers]
        kept = [*handlers_of(call.model), *handlers_of(call.guide)]
        slots = slots_of(modules)
        watched = Watched.of(modules, parameters, leaves, slots)
        step = Step(Graph.empty(), leaves, parameters, watched, state, options, kept, buffers)
        with self._unchanged(step, call), poutine.block():
            step.graph = capture(lambda: self._pass(call, leaves), inputs)
            slots = steady(slots, step.graph.inputs)
        step.watched = Watched.of(modules, parameters, [*leaves, *step.graph.inputs[len(inputs) :]], slots)
        self.cache.made[pair] = made + 1
        if not self._agrees_twice(step, call, arguments):
            raise RuntimeError(PARTED)
        self._compile(step, call, arguments, fresh)
        return step

    def _compile(self, step: Step, call: Call, arguments: Arguments, fresh: Sequence[Tensor]) -> None:
        """Makes the recording fast, where that gives the same numbers."""
        tensors = step.tensors(fresh)
        with self._unchanged(step, call):
            step.graph.compile(tensors)
        if step.graph.compiled is not None and not self._agrees_twice(step, call, arguments):
            step.graph.compiled = None
            warnings.warn(MISCOMPILED, UserWarning, stacklevel=5)
        compiled = step.graph.compiled
        with self._unchanged(step, call):
            together = step.graph.launch_together(tensors, slice(len(tensors) - len(fresh), len(tensors)))
        if together and not self._agrees_twice(step, call, arguments):
            step.graph.compiled = compiled

    def _probe(self, call: Call) -> tuple[Parameters, Tensor]:
        """Runs model and guide, until what there is to know of them is settled."""
        for _ in range(MOST_PROBES):
            parameters = Parameters()
            with poutine.block(), parameters, torch.enable_grad():
                particles, loss = self.one_step(call)
            if particles is None or particles.structure.settled:
                break
        return parameters, loss

    def _pass(self, call: Call, leaves: Sequence[Tensor]) -> list[Tensor]:
        """What is recorded: a step of model and guide, its gradients, and what is to be done with these."""
        with recorded_decisions() as broken:
            particles, loss = self.one_step(call)
            if {id(leaf) for leaf in _leaves(loss)} != {id(leaf) for leaf in leaves}:
                raise RuntimeError(PARTED)
            gradients = _gradients(loss, leaves)
            _watch_nan(particles, gradients)
            loss = loss.detach()
            fault = any_of(broken, loss)
        if self.update is not None:
            with torch.no_grad():
                self.update.apply(leaves, gradients, fault != 0.0)
            gradients = []
        return [torch.stack([loss, fault]), *gradients]

    # Recording against model and guide, from the same random numbers

    def _agrees_twice(self, step: Step, call: Call, arguments: Arguments) -> bool:
        """Whether they agree, be it only on the second noise: rounding may turn over a discrete draw, but not often."""
        return any(self._agrees(step, call, arguments, further) for further in (1, 2))  # not the noise of the recording

    def _agrees(self, step: Step, call: Call, arguments: Arguments, further: int) -> bool:
        device = next(iter(step.leaves), torch.empty(0)).device

        def outcome(run: Callable[[], Sequence[Tensor]]) -> list[list[Tensor]]:
            with self._unchanged(step, call), poutine.block():
                torch.rand(further, device=device)
                random.random(), numpy.random.random()  # which no recording reads
                report, *gradients = run()
                kinds = [gradients] if self.update is None else [step.leaves, *step.state]
                return [[report], *([t.detach().clone() for t in kind] for kind in kinds)]

        expected = outcome(lambda: self._pass(call, step.leaves))
        return _same(expected, outcome(lambda: step.run(arguments.tensors)))

    @contextmanager
    def _unchanged(self, step: Step, call: Call) -> Iterator[None]:
        """Puts back whatever a step changes."""
        changing = [] if self.update is None else step.own
        kept = [t.detach().clone() for t in changing]
        with unchanged_state(call.model, call.guide):
            try:
                yield
            finally:
                for tensor, value in zip(changing, kept, strict=True):
                    tensor.data.copy_(value)


def _same(expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two steps gave the same but for rounding: the loss, then each kind of tensors as one vector."""
    ((one,), *some), ((other,), *others) = expected, found
    dtypes = {t.dtype for kind in expected for t in kind if t.dtype.is_floating_point}
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5  # the coarsest on the way
    if not bool((one - other).abs()[0] <= 0.3 * tolerance * (1.0 + one[0].abs())):
        return bool(one[1] != 0.0) and bool(other[1] != 0.0)  # it did not hold, and says so
    for kind, same in zip(some, others, strict=True):
        gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(kind, same, strict=True)) ** 0.5
        size = sum(float(a.double().square().sum()) for a in kind) ** 0.5
        if not gap <= 3.0 * tolerance * size + 1e-30:
            return False
    return True


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass would give a gradient, in the order in which it meets them."""
    found: dict[int, Tensor] = {}
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [after for after, _ in node.next_functions]
    return list(found.values())


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, without the leaves' hooks: these run where the gradients are handed out."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    try:
        for leaf in leaves:
            leaf._backward_hooks = None
        return list(torch.autograd.grad(loss, leaves)) if leaves else []
    finally:
        for leaf, held in zip(leaves, hooks, strict=True):
            leaf._backward_hooks = held


def _watch_nan(particles: Particles | None, gradients: Sequence[Tensor]) -> None:
    """Leaves it to model and guide to say where a particle of weight 0 has put NaN into a gradient."""
    if gradients and particles is not None:
        impossible = (particles.weights.log_weights.detach() == -torch.inf).any()
        total = torch.stack([g.sum().to(gradients[0]) for g in gradients]).sum()
        holds(torch.logical_not(impossible & total.isnan()))


def _surroundings() -> tuple[Any, ...]:
    """What torch does differently from place to place: a recording keeps it."""
    cast = tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    return torch.get_default_dtype(), cast


def _warn_once(said: set[str], message: str) -> None:
    if message not in said:
        said.add(message)
        warnings.warn(message, UserWarning, stacklevel=5)


PARTED = (
    "the recorded step and a step of model and guide gave different losses or gradients from the same random numbers: "
    "what they read in Python has changed since the recording, or is random itself (a number that is annealed, an "
    "attribute, random or numpy.random). Pass what changes as a tensor among the arguments, call recapture() after a "
    "change, or write compile=False"
)
HOOKS = (
    "a parameter has a gradient hook, which a recording that holds the optimiser cannot run; write SVI(model, guide, "
    "optim, ImportanceWeightedELBO(compile=True)), or remove it"
)
TOO_MANY = (
    "model and guide were recorded {} times, for new shapes, numbers or effect handlers, and are not "
    "recorded any more: steps that are new run uncompiled. Pass what changes as tensors of one shape, wrap model and "
    "guide in poutine.scale or poutine.mask once and not at each step, or write compile=False"
)
MISCOMPILED = (
    "the compiled step and the recording that it was compiled from gave different numbers, so that the recording is "
    "run as a graph of single operations, which is right and slower"
)
