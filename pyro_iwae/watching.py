# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What must stay as it was for a recorded step to hold: arguments of the same kind, the same parameters and modes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped, effectful
from pyro.poutine.seed_messenger import SeedMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.utils import _pytree as pytree

from pyro_iwae.plates import Site

__all__ = [
    "Arguments",
    "Parameters",
    "Watched",
    "handlers_around",
    "handlers_of",
    "require_no_handlers",
    "require_same_buffers",
]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call, taken apart.

    Attributes:
        tensors: those that are tensors, in order.
        others: all of them, with None in the places of tensors.
        tree: how they lie in lists, tuples and dicts.
        kind: what must be the same for a recording to hold: shapes, dtypes, devices, and what is no tensor.
    """

    tensors: list[Tensor]
    others: list[Any]
    tree: Any
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Takes them apart.

        Raises:
            TypeError: where one is neither a tensor nor a plain value, whose contents could change unseen.
        """
        if not kwargs and all(type(arg) is Tensor for arg in args):  # the common case, and the quick one
            return cls(list(args), [None] * len(args), None, (None, tuple(map(_kind, args)), _shared(args)))
        leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = tuple(_kind(leaf) for leaf in leaves)
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(tensors, others, tree, (repr(tree), kind, _shared(tensors)))

    def aliases(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """Other tensors with the same numbers, and the arguments with these: closures may hold the same tensors."""
        same: dict[int, Tensor] = {}
        fresh = [same.setdefault(id(t), t.detach()) for t in self.tensors]
        rest = iter(fresh)
        found = [next(rest) if kind[0] is Tensor else o for o, kind in zip(self.others, self.kind[1], strict=True)]
        args, kwargs = (tuple(found), {}) if self.tree is None else pytree.tree_unflatten(found, self.tree)
        return args, kwargs, fresh


def _shared(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of them are one and the same: model(x, x) is not model(x, y)."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise TypeError(
                "compile=True gives gradients to parameters, not to arguments; got an argument that requires a "
                "gradient. Pass it detached, make it a pyro.param or a Parameter of a module, or write compile=False"
            )
        stride = leaf.stride() if leaf.layout is torch.strided else leaf.layout
        return Tensor, leaf.shape, stride, leaf.dtype, leaf.device
    if not isinstance(leaf, PLAIN):
        raise TypeError(
            "compile=True needs arguments that are tensors, plain values, or lists, tuples and dicts of these, so that "
            f"it sees when one changes; got {type(leaf).__name__}. Pass its tensors, or write compile=False"
        )
    return type(leaf), leaf


class Parameters(Messenger):
    """The parameters that a run asks for: name, unconstrained tensor, constraint."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Tensor, Any]] = {}

    def _pyro_post_param(self, msg: Site) -> None:
        value, store = msg["value"], pyro.get_param_store()
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        given = msg["kwargs"].get("constraint", constraints.real)
        self.found[msg["name"]] = leaf, store._constraints.get(msg["name"], given)

    def announce(self) -> None:
        """Sends the messages that the run would have sent, so that SVI learns which parameters there are."""
        if not am_i_wrapped():
            return
        with torch.no_grad():
            for name, (leaf, constraint) in self.found.items():
                value: Any = leaf if constraint is constraints.real else transform_to(constraint)(leaf)
                value.unconstrained = weakref.ref(leaf)

                def given(*_: Any, value: Any = value, **__: Any) -> Tensor:
                    return value

                effectful(given, type="param")(name, name=name)


@dataclass(frozen=True)
class Watched:
    """What a recording has taken for granted.

    Attributes:
        modes: modules, held weakly, and whether each is in training.
        slots: where modules keep parameters, buffers, other modules and tensors, and what lay there.
        stored: parameters of the param store, by name.
        kinds: tensors, and what each was: its shape, dtype and device, and whether it wants a gradient.
    """

    modes: tuple[tuple[Any, bool], ...]
    slots: tuple[tuple[Mapping[str, Any], str, Any], ...]
    stored: Mapping[str, Tensor]
    kinds: tuple[tuple[Tensor, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, modules: Collection[torch.nn.Module], parameters: Parameters, tensors: Iterable[Tensor]) -> Watched:
        """Looks at the modules that ran, the parameters that were asked for, and the tensors that are read."""
        slots = tuple(
            (held, name, tensor)
            for module in modules
            for held in (module._parameters, module._buffers, module._modules, vars(module))
            for name, tensor in held.items()
            if held is not vars(module) or isinstance(tensor, Tensor)
        )
        store = pyro.get_param_store()._params
        stored = {n: store[n] for n in parameters.found if n in store}
        asked = (leaf for leaf, _ in parameters.found.values())
        read = {id(t): t for t in (*tensors, *asked, *(t for _, _, t in slots if isinstance(t, Tensor)))}
        return cls(
            tuple((weakref.ref(m), m.training) for m in modules),
            slots,
            stored,
            tuple((t, kind_of(t)) for t in read.values()),
        )

    def without_caches(self, earlier: Watched) -> Watched:
        """Without the slots whose contents the run that was recorded has itself replaced: it does so each time."""
        before = {(id(held), name): thing for held, name, thing in earlier.slots}
        return replace(self, slots=tuple(s for s in self.slots if before.get((id(s[0]), s[1])) is s[2]))

    def holds(self) -> bool:
        """Whether all is as it was. Numbers in tensors may be others."""
        store = pyro.get_param_store()._params
        for name, tensor in self.stored.items():
            if store.get(name) is not tensor:
                return False
        for held, name, thing in self.slots:
            if held.get(name) is not thing:
                return False
        for tensor, kind in self.kinds:
            if kind_of(tensor) != kind:
                return False
        for module, mode in self.modes:
            alive = module()
            if alive is not None and alive.training is not mode:
                return False
        return True


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """All that a recording takes for granted of a tensor that it reads."""
    stride = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.requires_grad, tensor.shape, stride, tensor.dtype, tensor.device


def require_no_handlers() -> None:
    """Raises where an effect handler is active that the recording was not made under."""
    for handler in _PYRO_STACK:
        listens = isinstance(handler, TraceMessenger) and handler.param_only
        if not listens and not isinstance(handler, SeedMessenger | BlockMessenger):
            raise NotImplementedError(
                f"compile=True runs a recording of the step, which {type(handler).__name__} around it does not reach; "
                "put the handler around model and guide, as in poutine.scale(model, scale=0.1), or write compile=False"
            )


def require_same_buffers(before: Mapping[torch.nn.Module, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Raises where a run has put another tensor in the place of a buffer, which a recording would do only once."""
    for module, buffers in before.items():
        for name, (buffer, _) in buffers.items():
            if module._buffers.get(name) is not buffer:
                raise NotImplementedError(
                    f"compile=True needs buffers that are changed in place; buffer '{name}' of {type(module).__name__} "
                    f"is replaced in each run. Write self.{name}.copy_(...) or self.{name}.add_(...), or compile=False"
                )


def handlers_around(program: Callable[..., Any]) -> tuple[Any, ...]:
    """The effect handlers around a program, and the numbers in them, which a recording freezes.

    A handler is told by its number, so that it must be kept as long as the recording is.
    """
    found: list[Any] = []
    for handler in handlers_of(program):
        numbers = [v for v in vars(handler).values() if isinstance(v, bool | int | float)]
        tensors = [id(v) for v in vars(handler).values() if isinstance(v, Tensor)]
        found.append((id(handler), *numbers, *tensors))
    return tuple(found)


def handlers_of(program: Callable[..., Any]) -> list[Messenger]:
    """The effect handlers around a program, the outermost first."""
    found: list[Messenger] = []
    while isinstance(program, partial):
        if len(program.args) >= 2 and isinstance(program.args[0], Messenger):
            handler, program = program.args[:2]
            found.append(handler)
        else:
            program = program.func
    return found
