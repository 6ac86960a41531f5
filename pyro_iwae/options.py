# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Options and arguments that several public names share, and what is said where they are wrong."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_count",
    "as_counts",
    "as_number",
    "require_callables",
    "require_draws",
    "require_gradients",
    "require_log_weights",
    "require_options",
    "require_switch",
]


def as_count(name: str, value: Any, *, least: int = 1) -> int:
    """A whole number of at least so many; raises TypeError or ValueError with the option's name."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"expected {name} to be a whole number, got {value!r}; write for example {name}={max(least, 1)}"
        ) from None
    if count < least:
        raise ValueError(f"expected {name} >= {least}, got {count}")
    if count > sys.maxsize:
        raise ValueError(f"expected {name} <= {sys.maxsize}, the most that a tensor can count, got {count}")
    return count


def as_counts(name: str, values: Any) -> list[int]:
    """Whole numbers above 0; raises TypeError or ValueError with the option's name."""
    one = isinstance(values, str | bytes) or (isinstance(values, Tensor) and values.dim() == 0)
    if one or not isinstance(values, Iterable):
        raise TypeError(f"expected {name} to be several numbers of particles, as in [1, 10, 100], got {values!r}")
    return [as_count(name, value) for value in values]


def as_number(name: str, value: Any) -> float:
    """A number; raises TypeError with the option's name."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected {name} to be a number, got {value!r}") from None


def require_switch(name: str, value: Any) -> None:
    """Raises TypeError where an option is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True or False, got {value!r}")


def require_gradients(where: str, instead: str) -> None:
    """Raises where gradients are turned off, and with them all that a function is for."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"expected gradients to be on in {where}, got torch.no_grad() or inference_mode(), in which there are "
            f"none; write {instead}"
        )


def require_log_weights(log_weights: Any) -> Tensor:
    """Log weights with particles in front; half precision, which cannot count them, in single. Raises otherwise."""
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
        got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(
            f"expected log_weights to be a tensor of floating point numbers, got {got}; of LogWeights take "
            ".log_weights, of numbers torch.tensor([0.0, -1.0])"
        )
    if log_weights.dim() == 0 or len(log_weights) == 0:
        raise ValueError(
            f"expected log_weights in shape (particles, *plates), with a particle at least, got "
            f"{tuple(log_weights.shape)}"
        )
    return log_weights.float() if log_weights.dtype in (torch.float16, torch.bfloat16) else log_weights


def require_draws(name: str, draws: Any, *, stacked: bool = False) -> None:
    """Raises where an argument is no dict of tensors by the names of latents, of one draw or of several stacked."""
    if not isinstance(draws, Mapping) or not all(isinstance(v, Tensor) for v in draws.values()):
        found = {k: type(v).__name__ for k, v in draws.items()} if isinstance(draws, Mapping) else type(draws).__name__
        raise TypeError(f"expected {name} to be a dict of tensors by the names of the model's latents, got {found}")
    if not draws:
        raise ValueError(f"expected {name} to hold the model's latents, got none")
    for site, value in draws.items():
        if value.is_meta:
            raise ValueError(f"expected {name} to hold numbers, got a tensor on the meta device at site '{site}'")
        if value.is_complex():
            raise TypeError(f"expected {name} to be real numbers, got {value.dtype} at site '{site}'")
        if stacked and (value.dim() == 0 or len(value) == 0):
            raise ValueError(
                f"expected {name} with the number of draws, one at least, in front, got shape {tuple(value.shape)} at "
                f"site '{site}'"
            )
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"expected {name} to be possible values, got NaN at site '{site}'")


def require_options(vectorize_particles: Any, max_plate_nesting: Any) -> None:
    """Raises where an option that ELBO and guide share is none of those that it can be."""
    if not (vectorize_particles is None or isinstance(vectorize_particles, bool)):
        raise TypeError(f"expected vectorize_particles to be None, True or False, got {vectorize_particles!r}")
    if not (isinstance(max_plate_nesting, float) and max_plate_nesting == math.inf):
        as_count("max_plate_nesting", max_plate_nesting, least=0)


def require_callables(model: Any, guide: Any) -> None:
    """Raises TypeError where model or guide cannot be called."""
    for name, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise TypeError(f"expected {name} to be callable (a function or Module of Pyro statements), got {fn!r}")
