# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""All that is random or counted in a model and guide, put back after a run that should leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["get_random_state", "module_behind", "set_random_state", "unchanged_state"]


def get_random_state() -> tuple[Any, Any]:
    """The state of all random generators, those of CUDA devices included."""
    return get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def set_random_state(state: tuple[Any, Any]) -> None:
    """Puts random generators back."""
    host, cuda = state
    set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def module_behind(program: Callable[..., Any]) -> torch.nn.Module | None:
    """The module that a model or guide is, or that it is a method of; effect handlers around it are looked through."""
    inner: Any = poutine.unwrap(program)
    owner = getattr(inner, "__self__", inner)
    return owner if isinstance(owner, torch.nn.Module) else None


@contextmanager
def unchanged_state(*programs: Callable[..., Any]) -> Iterator[dict[torch.nn.Module, Any]]:
    """Puts random generators and module buffers back.

    Args:
        programs: models and guides; the buffers of modules that they are methods of are looked after too.

    Yields:
        The modules of the programs and those that were called.
    """
    random = get_random_state()
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
        yield seen
    finally:
        hook.remove()
        set_random_state(random)
        with torch.no_grad():
            for module, buffers in seen.items():
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer.copy_(value)
