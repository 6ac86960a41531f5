# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What to write where particles, or draws, do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from pyro_iwae.tree import Tree

__all__ = ["advice_on_memory", "require_room"]

OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory: you tried to allocate",  # the same on Windows
    "CUDA out of memory",
    "CUDA error: out of memory",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)


@contextmanager
def advice_on_memory(num_particles: int, tree: Tree, *, chunked: bool = False) -> Iterator[None]:
    """Adds to the error of an allocation that fails how particles come to need less.

    Args:
        num_particles: particles of the root that are in memory together.
        tree: which plates have particles of their own.
        chunked: whether they are a chunk already.

    Raises:
        RuntimeError: of the type that was raised (``torch.OutOfMemoryError`` on a GPU), or MemoryError.
    """
    if num_particles == 1 and not tree.grows:  # nothing to make smaller
        yield
        return
    with _explained(f"{_what(num_particles, tree)}; {_instead(num_particles, tree, chunked)}"):
        yield


def require_room(num_draws: int, block: Mapping[str, Tensor]) -> None:
    """Raises at once where so many draws will not fit in memory.

    Args:
        num_draws: how many are to be made.
        block: the first of them, by name, draws in front.

    Raises:
        RuntimeError: or MemoryError, as the allocation does.
    """
    with _explained(f"{num_draws} draws do not fit in memory at once; lower num_draws, and use them up in between"):
        for value in block.values():
            value.new_empty(num_draws, *value.shape[1:])


@contextmanager
def _explained(text: str) -> Iterator[None]:
    """Puts text before the error of an allocation that fails."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(mark in str(error) for mark in OUT_OF_MEMORY)):
            raise
        kind = type(error) if isinstance(error, RuntimeError) else MemoryError
        raise kind(f"{text}\n{error}") from error


def _what(num_particles: int, tree: Tree) -> str:
    inside = f", each with those of {tree.plates}," if tree.grows else ""
    return f"{num_particles} particles{inside} do not fit in memory at once"


def _instead(num_particles: int, tree: Tree, chunked: bool) -> str:
    if tree.combined:
        return "lower num_particles or plate_particles"
    fewer = "pass a smaller chunk_size" if chunked else f"pass chunk_size= below {num_particles} (without compile)"
    return f"{fewer}, or lower {'plate_particles' if tree.grows else 'num_particles'}"
