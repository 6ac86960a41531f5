# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Options and arguments that several public names share, and what is said where they are wrong."""

from __future__ import annotations

import math
import operator
from typing import Any

__all__ = ["as_count", "require_callables", "require_options"]


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
    return count


def require_options(vectorize_particles: Any, max_plate_nesting: Any) -> None:
    """Raises where an option that ELBO and guide share is none of those that it can be."""
    if not (vectorize_particles is None or isinstance(vectorize_particles, bool)):
        raise TypeError(f"expected vectorize_particles to be None, True or False, got {vectorize_particles!r}")
    if max_plate_nesting != math.inf:
        as_count("max_plate_nesting", max_plate_nesting, least=0)


def require_callables(model: Any, guide: Any) -> None:
    """Raises TypeError where model or guide cannot be called."""
    for name, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise TypeError(f"expected {name} to be callable (a function or Module of Pyro statements), got {fn!r}")
