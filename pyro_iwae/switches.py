# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What among the arguments of a call can tie a plate's elements together that were not tied in the call before."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_iwae.decisions import unrecorded

__all__ = ["switches"]

MOST_COUNTED = 8  # a number of layers or neighbours is below it; of a counter of steps not each is new
MOST_ENTRIES = 32  # more are data
MOST_DEPTH = 4


def switches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whether numbers are 0 (a coupling that is faded in), small whole numbers, words, and which arguments are None.

    In tuples, lists, dicts and dataclasses, too. Of tensors those of no dimension, on the CPU: to read one on another
    device would wait for all that is queued there.
    """
    return tuple(_switch(v) for v in args), tuple((n, _switch(v)) for n, v in sorted(kwargs.items()))


def _switch(value: Any, depth: int = 0) -> Any:
    kind = type(value).__qualname__
    if value is None or isinstance(value, str | bytes | bool):
        return value
    if isinstance(value, enum.Enum):
        return kind, value.name
    if isinstance(value, int | np.integer):
        return max(-1, min(int(value), MOST_COUNTED))
    if isinstance(value, float | complex | np.number | np.bool_):
        return bool(value)
    if isinstance(value, Tensor):
        return kind if value.dim() or value.device.type != "cpu" else _is_on(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value) if hasattr(value, "__dict__") else {}
    elif not isinstance(value, Mapping | tuple | list):
        return kind
    if len(value) > MOST_ENTRIES or depth == MOST_DEPTH:
        return kind, len(value)
    entries = value.items() if isinstance(value, Mapping) else enumerate(value)
    return kind, tuple((str(name), _switch(entry, depth + 1)) for name, entry in entries)


def _is_on(value: Tensor) -> bool:
    with unrecorded():
        return bool(value)
