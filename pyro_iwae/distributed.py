# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What the processes of a group tell each other, over ``torch.distributed``: numbers, tensors, sums, and errors.

Each of these is an exchange in which all take part, in the same order. So whatever one process does alone is wrapped
(``Ranks.attempt``): if it raises there, the others hear of it in the next exchange, and raise too.
"""

from __future__ import annotations

import builtins
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["Grouped", "Ranks", "bits_of", "by_first", "checksum", "described", "float_of", "in_all", "number_of"]

Result = TypeVar("Result")
WIDTH = 8  # numbers in what attempt() tells
TOGETHER = 2**20
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # an odd number whose multiples look random in 64 bits
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks:
    """The processes of a group, seen from one of them.

    Args:
        group: a ``torch.distributed`` process group, or a ``DeviceMesh`` of one dimension.

    Attributes:
        rank: number of this process in the group.
        size: how many there are.
        calls: how many calls they have begun together.
        compared: parameters whose values were seen to be the same in all.

    Raises:
        TypeError: where it is something else.
        ValueError: where this process is no part of it, or there is none as yet.
    """

    def __init__(self, group: Any) -> None:
        self.group = _as_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.calls = 0
        self.compared: Any = WeakIdKeyDictionary()
        if self.rank < 0:
            raise ValueError(
                "expected a process group that this process is a part of, got one of others; make an object with "
                "process_group= in the processes of that group alone"
            )

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """None where there is nobody to share with."""
        found = None if group is None else cls(group)
        return None if found is None or found.size == 1 else found

    def share(self, count: int) -> tuple[int, int]:
        """Which of so many particles are this process's: from the first to one after the last.

        Raises:
            ValueError: where there is not one for each.
        """
        if count < self.size:
            raise ValueError(
                f"expected num_particles >= {self.size}, one for each process of the group that they are shared out "
                f"over, got {count}; take more particles, or a smaller group. Data are shared out by "
                "DistributedDataParallel, without process_group"
            )
        return self._edges(count)[self.rank]

    def _edges(self, count: int) -> list[tuple[int, int]]:
        """Where the share of each process starts and stops: as like as can be, the larger ones first."""
        return list(pairwise(-(-count * i // self.size) for i in range(self.size + 1)))

    def name(self, rank: int) -> str:
        """What a process of the group is called in messages: by its number among all."""
        return f"rank {dist.get_global_rank(self.group, rank)}"

    # Exchanges

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be sent."""
        return torch.device("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        """What each process has, of one shape and dtype, along a new first dimension."""
        own = value.detach().to(self.device).contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(found, own, group=self.group)
        return torch.stack(found).to(value.device)

    def gather_rows(self, value: Tensor, count: int) -> Tensor:
        """The rows of all processes, ``(count, ...)``, of which each has its share."""
        most = -(-count // self.size)
        padded = value.new_zeros((most, *value.shape[1:]))
        padded[: len(value)] = value.detach()
        parts = zip(self.gather(padded), self._edges(count), strict=True)
        return torch.cat([rows[: stop - start] for rows, (start, stop) in parts])

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        total = value.detach().to(self.device, copy=True).contiguous()
        with self._talking():
            dist.all_reduce(total, group=self.group)
        return total.to(value.device)

    def numbers(self, *own: int) -> list[list[int]]:
        """Whole numbers of 64 bits, by process."""
        found: list[list[int]] = self.gather(torch.tensor(own, dtype=torch.int64)).tolist()
        return found

    def objects(self, own: Any) -> list[Any]:
        """Whatever can be pickled, by process."""
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, own, group=self.group)
        return found

    def from_first(self, own: Any) -> Any:
        """What the first process has."""
        found = [own]
        with self._talking():
            dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
        return found[0]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(
                f"{self.name(self.rank)} cannot go on: another of the {self.size} processes that share the work has "
                "ended, has raised an error elsewhere, or was silent for longer than the group's time limit (timeout= "
                f"of init_process_group or new_group); see what it printed. torch.distributed says: {reason}"
            ) from error

    # Together, or not at all

    def attempt(self, fn: Callable[[], tuple[Result, Sequence[int]]]) -> tuple[Result, list[list[int]]]:
        """Runs what this process does alone; an error in any process is raised in all, with its rank.

        Args:
            fn: what to run; returns what is wanted, and at most seven whole numbers that the others are told.

        Returns:
            What is wanted, and the numbers of each process.

        Raises:
            what any of them has raised, if it is one of Python's own errors; else RuntimeError.
        """
        try:
            result, own = fn()
        except Exception as error:
            self.numbers(*[1] * WIDTH)
            raise self._error(error) from error
        rows = self.numbers(0, *own, *[0] * (WIDTH - 1 - len(own)))
        if any(row[0] for row in rows):
            raise self._error(None)
        return result, [row[1 : 1 + len(own)] for row in rows]

    def each(self, items: Iterator[Result]) -> Iterator[Result]:
        """Goes through items in step with the others.

        Raises:
            ValueError: where they have fewer or more of them.
        """
        while True:
            item, rows = self.attempt(lambda: ((found := next(items, None)), [found is None]))
            self.require_same([row[0] for row in rows], "number of batches of data", "give all of them all the data")
            if item is None:
                return
            yield item

    def _error(self, own: Exception | None) -> Exception:
        """The first error among the processes, as this one raises it."""
        said = self.objects(None if own is None else (type(own).__name__, str(own)))
        rank, (kind, message) = next((r, s) for r, s in enumerate(said) if s is not None)
        cls = getattr(builtins, kind, None)
        try:
            if isinstance(cls, type) and issubclass(cls, Exception):
                return cls(f"{self.name(rank)}: {message}")
        except TypeError:  # one that wants more than a message
            pass
        return RuntimeError(f"{self.name(rank)}: {kind}: {message}")

    def require_same(self, values: Sequence[Any], what: str, remedy: str) -> None:
        """Raises in all processes where they differ.

        Args:
            values: of each process.
            what: they tell of.
            remedy: what to do about it.
        """
        apart = [self.name(r) for r, value in enumerate(values) if value != values[0]]
        if apart:
            raise ValueError(
                f"expected the same {what} in all processes that share particles, got others on {', '.join(apart)} "
                f"than on {self.name(0)}; {remedy}"
            )


class Grouped:
    """What particles are shared out by: the option ``process_group``, which can be set anew."""

    _group: ProcessGroup | DeviceMesh | None
    _ranks: Ranks | None

    @property
    def process_group(self) -> ProcessGroup | DeviceMesh | None:
        """The processes that share the particles."""
        return self._group

    @process_group.setter
    def process_group(self, group: ProcessGroup | DeviceMesh | None) -> None:
        self._group, self._ranks = group, Ranks.of(group)
        if self._ranks is not None:
            self._require_shareable()

    def _require_shareable(self) -> None:
        """Raises where other options do not go with it."""


def in_all(ranks: Ranks | None, fn: Callable[[], Result]) -> Result:
    """Runs something in each process, or in the only one; an error in any is raised in all."""
    return fn() if ranks is None else ranks.attempt(lambda: (fn(), []))[0]


def by_first(ranks: Ranks | None, fn: Callable[[], Result]) -> Result:
    """Runs something in the first process, or in the only one: all get the result, or raise the error."""
    if ranks is None:
        return fn()
    found = in_all(ranks, lambda: fn() if ranks.rank == 0 else None)
    result: Result = ranks.from_first(found)
    return result


def checksum(*values: Any) -> int:
    """A number that tells tensors, arrays and plain values from others, nested in lists, mappings and objects.

    Rows in another order have another one. Tensors are read where they lie, once. Of what can be called, and of what
    holds nothing that Python shows, the type alone counts.
    """
    found, scalars = list[str](), list[Tensor]()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(f"{value.dtype} {tuple(value.shape)}")
            scalars.append(_sum_of_bits(value))
        elif isinstance(value, Mapping):
            found.append(f"mapping of {len(value)}")
            for name, inner in value.items():
                found.append(str(name))
                visit(inner)
        elif isinstance(value, list | tuple):
            found.append(f"sequence of {len(value)}")
            for inner in value:
                visit(inner)
        elif value is None or isinstance(value, str | int | float | complex):
            found.append(repr(value))
        elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
            visit(torch.as_tensor(value))
        else:
            found.append(type(value).__qualname__)
            if not callable(value) and id(value) not in seen:
                seen.add(id(value))  # an object may hold itself
                visit(getattr(value, "__dict__", {}))

    seen = set[int]()
    visit(values)
    by_device: dict[torch.device, list[Tensor]] = {}
    for scalar in scalars:
        by_device.setdefault(scalar.device, []).append(scalar)
    read = {device: iter(torch.stack(some).tolist()) for device, some in by_device.items()}  # one transfer for each
    return number_of(*found, *(next(read[scalar.device]) for scalar in scalars))


def described(value: Any) -> str:
    """How an option prints; where it does not say what it holds, by that."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(described, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {described(v)}' for k, v in value.items())}}}"
    if type(value).__repr__ is object.__repr__:  # an address, which no other process has
        return f"{type(value).__qualname__}({checksum(vars(value))})"
    return repr(value)


def number_of(*values: Any) -> int:
    """A number of 62 bits that tells plain values from others, the same in every process."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def bits_of(value: float) -> int:
    """A number's 64 bits as a whole number, to be told with others."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def float_of(bits: int) -> float:
    """The opposite."""
    value: float = struct.unpack("d", struct.pack("q", bits))[0]
    return value


def _sum_of_bits(value: Tensor) -> Tensor:
    """Sum of all elements' bits as whole numbers, each times a multiple of its own; exact, in whatever order.

    Of a million elements at a time, as it takes some times their memory.
    """
    value = value.detach().resolve_conj().resolve_neg()
    if value.layout != torch.strided:
        value = value.to_dense()
    value = torch.view_as_real(value) if value.is_complex() else value
    flat = value.contiguous().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), TOGETHER):
        mixed = flat[start : start + TOGETHER].view(WHOLE[flat.element_size()]).to(torch.int64) * MULTIPLIER
        places = torch.arange(start + 1, start + 1 + len(mixed), device=flat.device)
        total += ((mixed ^ (mixed >> 32)) * (places * MULTIPLIER | 1)).sum()
    return total


def _as_group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "expected torch.distributed to be set up before process_group= is given; call "
            "torch.distributed.init_process_group() first, in a script that torchrun starts"
        )
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"expected a mesh of one dimension, got {group.ndim}; say which one holds the particles, as in "
                f"mesh[{(group.mesh_dim_names or ('particles',))[-1]!r}]"
            )
        return group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(
        f"expected process_group to be a torch.distributed process group or a mesh of one dimension, got {group!r}; "
        "write process_group=torch.distributed.group.WORLD for all processes"
    )
