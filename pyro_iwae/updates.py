# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The optimiser as tensor operations, so that it can be a part of a recorded step.

The state stays where Pyro's optimiser keeps it, in ``optim.optim_objs``: it saves, loads, and goes on under plain
``SVI``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_iwae.watching import Parameters

__all__ = ["OptimizerUpdate"]

Write = Callable[[Tensor, Tensor], None]
SUPPORTED = "pyro.optim.Adam, AdamW, ClippedAdam or SGD"


@dataclass(eq=False)
class Slot:
    """One parameter: its optimiser, the clipping of its gradient, its state as tensors, the updates so far."""

    parameter: Tensor
    optimizer: torch.optim.Optimizer
    clip: dict[str, float]
    state: dict[str, Tensor]
    count: Tensor
    first_lr: float  # before any decay, so that the rate follows from the count
    settled: dict[str, Any]  # the optimiser's numbers as they are recorded
    in_python: bool  # whether the optimiser counts its updates, or knows its first, by Python's values

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    @property
    def kept(self) -> dict[str, Any]:
        """The optimiser's own record."""
        return self.optimizer.state[self.parameter]

    @property
    def has_parted(self) -> bool:
        """Whether others have changed the optimiser's record: SVI, another CompiledSVI, a state that was loaded."""
        kept, count = self.kept, self.count
        held = kept.get("step", count)
        if held is not count and (isinstance(held, Tensor) or held != int(count)):
            return True
        for name, tensor in self.state.items():
            other = kept.get(name)
            if other is not tensor and other is not None:
                return True
        return False

    def refresh(self) -> None:
        """Takes over that record."""
        for name, tensor in self.state.items():
            held = self.kept.get(name)
            if held is not None and held is not tensor:
                tensor.copy_(held)
                self.kept[name] = tensor
        self.count.fill_(_count(self.kept))
        if isinstance(self.kept.get("step"), Tensor):
            self.kept["step"] = self.count
        self.settled["lr"] = self.group["lr"]  # a decayed rate is no other
        self.first_lr = _first_lr(self.group, int(self.count))


class OptimizerUpdate:
    """Applies a Pyro optimiser within a recording.

    Args:
        optim: Adam, AdamW, ClippedAdam or SGD of ``pyro.optim``.

    Raises:
        TypeError: where it is another.
    """

    def __init__(self, optim: PyroOptim) -> None:
        if not isinstance(optim, PyroOptim):
            raise TypeError(f"expected optim to be {SUPPORTED}, got {optim!r}; torch's optimisers go with compile=True")
        constructor: Any = optim.pt_optim_constructor
        if isinstance(optim, PyroLRScheduler):
            raise TypeError(
                f"expected optim to be {SUPPORTED} with a constant rate, got a scheduler; write SVI(model, guide, "
                "optim, ImportanceWeightedELBO(compile=True))"
            )
        rule = RULES.get(constructor)
        if rule is None:
            name = getattr(constructor, "__name__", repr(constructor))
            raise TypeError(
                f"expected optim to be {SUPPORTED}, got {name}; write SVI(model, guide, optim, "
                "ImportanceWeightedELBO(compile=True)), which leaves the update to the optimiser itself"
            )
        self.optim: Any = optim  # Pyro's types say str where it takes tensors
        self.rule = rule
        self.slots: dict[Tensor, Slot] = {}
        self.version = 0

    def options(self, leaves: Sequence[Tensor]) -> int:
        """A number that is another once the numbers of an optimiser are: a new rate asks for a new recording."""
        for leaf in leaves:
            slot = self.slots.get(leaf)
            if slot is None:
                continue
            if self.optim.optim_objs.get(leaf) is not slot.optimizer or slot.group != slot.settled:
                del self.slots[leaf]  # somebody has replaced or changed it, and it may keep more than it did
                self.version += 1
            elif slot.has_parted:
                slot.refresh()
        return self.version

    def prepare(self, leaves: Sequence[Tensor], parameters: Parameters) -> list[list[Tensor]]:
        """The tensors that an update changes beside the parameters, by kind."""
        asked = {leaf for leaf, _ in parameters.found.values()}
        slots = [self._slot(leaf) for leaf in leaves if leaf in asked]
        kinds = dict.fromkeys(name for slot in slots for name in slot.state)
        return [[slot.count for slot in slots], *([s.state[k] for s in slots if k in s.state] for k in kinds)]

    def apply(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor], held: Tensor) -> None:
        """Updates all that have an optimiser, but not where ``held`` is true."""

        def write(tensor: Tensor, value: Tensor) -> None:
            tensor.copy_(torch.where(held, tensor, value))

        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf in self.slots:
                slot = self.slots[leaf]
                self.rule(slot, _clipped(gradient, **slot.clip), slot.count + 1, write)
                write(slot.count, slot.count + 1)

    def settle(self) -> None:
        """Tells the optimiser how often it has been applied, and its rate, where it keeps these in Python."""
        for slot in (slot for slot in self.slots.values() if slot.in_python):
            if "momentum_buffer" in slot.state:  # the first step is one of its own
                slot.kept["momentum_buffer"] = slot.state["momentum_buffer"] if int(slot.count) else None
            if isinstance(slot.kept.get("step"), int):
                slot.kept["step"] = int(slot.count)
                slot.group["lr"] = slot.settled["lr"] = slot.first_lr * slot.group["lrd"] ** int(slot.count)

    def refresh(self) -> None:
        """Learns from the optimiser how often it has been applied, and its rate."""
        for slot in self.slots.values():
            slot.refresh()

    def _slot(self, parameter: Tensor) -> Slot:
        if parameter not in self.slots:
            optimizer = self._optimizer(parameter)
            group, kept = optimizer.param_groups[0], optimizer.state[parameter]
            precise = torch.float32 if parameter.device.type == "mps" else torch.float64
            count = torch.full((), float(_count(kept)), dtype=precise, device=parameter.device)
            for name, make in _states(self.optim.pt_optim_constructor, group).items():
                if kept.get(name) is None:
                    kept[name] = make(parameter)
            state = {n: v for n, v in kept.items() if isinstance(v, Tensor) and n != "step"}
            if isinstance(kept.get("step"), Tensor):
                kept["step"] = count
            clip = dict(self.optim._get_grad_clip_args(parameter))
            first = _first_lr(group, int(count))
            in_python = "momentum_buffer" in state or isinstance(kept.get("step"), int)
            self.slots[parameter] = Slot(parameter, optimizer, clip, state, count, first, dict(group), in_python)
        return self.slots[parameter]

    def _optimizer(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The parameter's own, made as Pyro makes it."""
        objects = self.optim.optim_objs
        if parameter not in objects:
            objects[parameter] = self.optim._get_optim(parameter)
            self.optim.grad_clip[parameter] = self.optim._get_grad_clip(parameter)
            name = pyro.get_param_store().param_name(parameter)
            state = self.optim._state_waiting_to_be_consumed.pop(name, None)
            if state is not None:
                objects[parameter].load_state_dict(state)
        return objects[parameter]


def _count(kept: dict[str, Any]) -> int:
    return int(kept["step"]) if "step" in kept else int(kept.get("momentum_buffer") is not None)


def _first_lr(group: dict[str, Any], count: int) -> float:
    return float(group["lr"]) / float(group.get("lrd", 1.0)) ** count


def _clipped(gradient: Tensor, clip_norm: float | None = None, clip_value: float | None = None) -> Tensor:
    """As ``torch.nn.utils`` clips a single tensor."""
    if clip_norm is not None:
        gradient = gradient * (clip_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
    if clip_value is not None:
        gradient = gradient.clamp(-clip_value, clip_value)
    return gradient


def _states(constructor: Any, group: dict[str, Any]) -> dict[str, Callable[[Tensor], Any]]:
    """What an optimiser keeps for a parameter, as it is before the first step."""

    def zeros(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)

    if constructor is torch.optim.SGD:
        return {"momentum_buffer": zeros} if group["momentum"] else {}
    moments = {"exp_avg": zeros, "exp_avg_sq": zeros}
    if constructor is ClippedAdam:
        return {"step": lambda _: 0, **moments}
    if group["amsgrad"]:
        moments["max_exp_avg_sq"] = zeros
    return {"step": lambda _: torch.tensor(0.0), **moments}


def _adam(slot: Slot, gradient: Tensor, count: Tensor, write: Write) -> None:
    """``torch.optim.Adam`` and ``AdamW``."""
    group, p = slot.group, slot.parameter
    (beta1, beta2), lr, decay = group["betas"], slot.first_lr, group["weight_decay"]
    gradient, value = -gradient if group["maximize"] else gradient, p.detach()
    # Before torch 2.7 the class alone says so.
    decoupled = isinstance(slot.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    if decay and decoupled:
        value = value * (1.0 - lr * decay)
    elif decay:
        gradient = gradient + decay * value
    mean = torch.lerp(slot.state["exp_avg"], gradient, 1.0 - beta1)
    square = beta2 * slot.state["exp_avg_sq"] + (1.0 - beta2) * gradient * gradient
    largest = square
    if group["amsgrad"]:
        largest = torch.maximum(slot.state["max_exp_avg_sq"], square)
        write(slot.state["max_exp_avg_sq"], largest)
    size, root = lr / (1.0 - beta1**count), (1.0 - beta2**count).sqrt()
    write(p, value - size.to(p.dtype) * mean / (largest.sqrt() / root.to(p.dtype) + group["eps"]))
    write(slot.state["exp_avg"], mean)
    write(slot.state["exp_avg_sq"], square)


def _clipped_adam(slot: Slot, gradient: Tensor, count: Tensor, write: Write) -> None:
    """``pyro.optim.ClippedAdam``."""
    group, p = slot.group, slot.parameter
    (beta1, beta2), value = group["betas"], p.detach()
    gradient = gradient.clamp(-group["clip_norm"], group["clip_norm"])
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * value
    mean = beta1 * slot.state["exp_avg"] + (1.0 - beta1) * gradient
    spread = gradient - mean if group.get("centered_variance") else gradient  # since Pyro 1.9.1
    square = beta2 * slot.state["exp_avg_sq"] + (1.0 - beta2) * spread * spread
    size = slot.first_lr * group["lrd"] ** count * (1.0 - beta2**count).sqrt() / (1.0 - beta1**count)
    write(p, value - size.to(p.dtype) * mean / (square.sqrt() + group["eps"]))
    write(slot.state["exp_avg"], mean)
    write(slot.state["exp_avg_sq"], square)


def _sgd(slot: Slot, gradient: Tensor, count: Tensor, write: Write) -> None:
    """``torch.optim.SGD``."""
    group, p = slot.group, slot.parameter
    gradient, value = -gradient if group["maximize"] else gradient, p.detach()
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * value
    if group["momentum"]:
        buffer = slot.state["momentum_buffer"]
        moved = group["momentum"] * buffer + (1.0 - group["dampening"]) * gradient
        moved = torch.where(count == 1.0, gradient, moved)
        write(buffer, moved)
        gradient = gradient + group["momentum"] * moved if group["nesterov"] else moved
    write(p, value - slot.first_lr * gradient)


RULES = {torch.optim.Adam: _adam, torch.optim.AdamW: _adam, ClippedAdam: _clipped_adam, torch.optim.SGD: _sgd}
