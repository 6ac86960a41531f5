# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What must stay as it was for a recorded step to hold: arguments of the same kind, the same parameters and modes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
from pyro_iwae.state import FreshParameters

__all__ = [
    "Arguments",
    "Parameters",
    "Watched",
    "handlers_around",
    "handlers_of",
    "require_no_handlers",
    "slots_of",
    "steady",
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


class Slot(NamedTuple):
    """A place in a module, and the parameter, buffer, other module or tensor that lies there."""

    held: Mapping[str, Any]
    name: str
    thing: Any
    kind: str
    owner: str

    @property
    def is_as_it_was(self) -> bool:
        return self.held.get(self.name) is self.thing


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
    slots: tuple[Slot, ...]
    stored: Mapping[str, Tensor]
    kinds: tuple[tuple[Tensor, tuple[Any, ...]], ...]

    @classmethod
    def of(
        cls,
        modules: Collection[torch.nn.Module],
        parameters: Parameters,
        tensors: Iterable[Tensor],
        slots: Sequence[Slot],
    ) -> Watched:
        """Looks at the modules that ran, the parameters that were asked for, and the tensors that are read."""
        store = pyro.get_param_store()._params
        stored = {n: store[n] for n in parameters.found if n in store}
        asked = (leaf for leaf, _ in parameters.found.values())
        lying = (slot.thing for slot in slots if isinstance(slot.thing, Tensor))
        read = {id(t): t for t in (*tensors, *asked, *lying)}
        return cls(
            tuple((weakref.ref(m), m.training) for m in modules),
            tuple(slots),
            stored,
            tuple((t, kind_of(t)) for t in read.values()),
        )

    def holds(self) -> bool:
        """Whether all is as it was. Numbers in tensors may be others."""
        store = pyro.get_param_store()._params
        for name, tensor in self.stored.items():
            if store.get(name) is not tensor:
                return False
        for held, name, thing, _, _ in self.slots:
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
        if not listens and not isinstance(handler, SeedMessenger | BlockMessenger | FreshParameters):
            raise NotImplementedError(
                f"compile=True runs a recording of the step, which {type(handler).__name__} around it does not reach; "
                "put the handler around model and guide, as in poutine.scale(model, scale=0.1), or write compile=False"
            )


def slots_of(modules: Iterable[torch.nn.Module]) -> list[Slot]:
    """The places in modules where a run looks things up."""
    return [
        Slot(held, name, thing, kind, type(module).__name__)
        for module in modules
        for kind, held in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("module", module._modules),
            ("tensor", vars(module)),
        )
        for name, thing in held.items()
        if kind != "tensor" or isinstance(thing, Tensor)
    ]


def steady(slots: Iterable[Slot], read: Sequence[Tensor]) -> list[Slot]:
    """Those whose contents a run has left there. What it replaces unread, such as a cache, it replaces each time.

    Raises:
        NotImplementedError: where it has replaced what it has read, or a buffer: a recording would do that once only.
    """
    kept, numbers = list[Slot](), {id(tensor) for tensor in read}
    for slot in slots:
        if slot.is_as_it_was:
            kept.append(slot)
        elif slot.kind == "buffer" or id(slot.thing) in numbers:
            raise NotImplementedError(
                f"compile=True records one run, and {slot.kind} '{slot.name}' of {slot.owner} is replaced in each; "
                f"make it a buffer that changes in place, as in self.{slot.name}.copy_(...) or "
                f"self.{slot.name}.add_(...), or write compile=False"
            )
    return kept


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
