# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""All that is random or counted in a model and guide, put back after a run that should leave no trace."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = [
    "FreshParameters",
    "get_random_state",
    "get_torch_state",
    "module_behind",
    "modules_behind",
    "moved_slightly",
    "seeded",
    "seeded_apart",
    "set_random_state",
    "set_torch_state",
    "unchanged_state",
]


def get_torch_state() -> tuple[Tensor, list[Tensor] | None]:
    """The state of torch's random generators, those of CUDA devices included."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def set_torch_state(state: tuple[Tensor, list[Tensor] | None]) -> None:
    """Puts torch's random generators back."""
    host, cuda = state
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def get_random_state() -> tuple[Any, Any]:
    """The state of all random generators: torch's, Python's and numpy's."""
    return get_rng_state(), get_torch_state()


def set_random_state(state: tuple[Any, Any]) -> None:
    """Puts random generators back."""
    every, torchs = state
    set_rng_state(every)
    set_torch_state(torchs)


def seeded(*path: Any) -> int:
    """Sets all random generators to a place that no other path leads to; returns what tells it from others."""
    seed = int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:7], "big")
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # without the note, stack trace and all, that torch keeps for generators that are not there as yet
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return seed


@cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


@contextmanager
def seeded_apart(*path: Any) -> Iterator[None]:
    """All random generators at such a place, and back where they were afterwards."""
    random = get_random_state()
    try:
        seeded(*path)
        yield
    finally:
        set_random_state(random)


def modules_behind(*programs: Callable[..., Any]) -> list[torch.nn.Module]:
    """The modules that models and guides are methods of, each once: vae, of vae.model and vae.guide."""
    found = {m: None for m in map(module_behind, programs) if m is not None and m not in programs}
    return list(found)


def module_behind(program: Callable[..., Any]) -> torch.nn.Module | None:
    """The module that a model or guide is, or that it is a method of; effect handlers around it are looked through."""
    inner: Any = poutine.unwrap(program)
    owner = getattr(inner, "__self__", inner)
    return owner if isinstance(owner, torch.nn.Module) else None


class FreshParameters(Messenger):
    """Notices when a parameter that is asked for the first time takes its value at random."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False
        self.before: Tensor | None = None

    def _pyro_param(self, msg: Any) -> None:
        self.before = None if msg["name"] in pyro.get_param_store() else torch.get_rng_state()

    def _pyro_post_param(self, msg: Any) -> None:
        self.drawn |= self.before is not None and not torch.equal(self.before, torch.get_rng_state())


@contextmanager
def moved_slightly(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Moves parameters by a hundredth of their size, up or down, and puts them back."""
    kept = [p.detach().clone() for p in parameters]
    try:
        for parameter, value in zip(parameters, kept, strict=True):
            size = value.square().mean().sqrt().clamp(min=0.1)  # some start at 0
            parameter.data += 0.01 * size * torch.randn_like(value).sign()
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)  # .data, so that a graph that is waiting for backward() stays valid


@contextmanager
def unchanged_state(*programs: Callable[..., Any]) -> Iterator[dict[torch.nn.Module, Any]]:
    """Puts random generators and module buffers back.

    Args:
        programs: models and guides; the buffers of modules that they are methods of are looked after too.
            Random generators stay where they are if a parameter was drawn on the way.

    Yields:
        The modules of the programs and those that were called.
    """
    random, fresh = get_random_state(), FreshParameters()
    seen: dict[torch.nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def remember(module: torch.nn.Module, inputs: Any = None) -> None:
        if module not in seen:
            held = module.named_buffers(recurse=False)
            seen[module] = {n: (b, b.clone()) for n, b in held if not is_lazy(b)}  # a lazy one has no value yet

    for owner in filter(None, map(module_behind, programs)):
        for module in owner.modules():
            remember(module)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        with fresh:
            yield seen
    finally:
        hook.remove()
        if not fresh.drawn:  # else the next draws would repeat the parameters' own random numbers
            set_random_state(random)
        with torch.no_grad():
            for module, buffers in seen.items():
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer
                    if not bool(((buffer == value) | (buffer.isnan() & value.isnan())).all()):
                        buffer.data.copy_(value)  # .data, so that a waiting graph stays valid
