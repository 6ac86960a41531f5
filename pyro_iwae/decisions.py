# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Branching on numbers, in a way that a recorded step can take along.

A recording holds one way through the code. Where that way depends on numbers (is a weight NaN? do two scales agree?),
the recording computes the condition at each step anew and reports when it no longer comes out as it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["any_of", "holds", "is_recording", "recorded_decisions", "unrecorded"]

_BROKEN: ContextVar[list[Tensor] | None] = ContextVar("conditions that break a recording", default=None)


def holds(condition: Tensor) -> bool:
    """``bool(condition)``; in a recording the way that is taken, which is watched from then on."""
    broken = _BROKEN.get()
    if broken is None:
        return bool(condition)
    with unrecorded():
        value = bool(condition)
    condition = condition.detach()
    broken.append(condition.logical_not() if value else condition != 0)
    return value


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keeps what happens inside out of a recording, which takes its results as they are."""
    if not is_recording():
        yield
        return
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing  # which is slow to import

    with disable_proxy_modes_tracing():
        yield


def is_recording() -> bool:
    """Whether a step is being recorded, so that shapes must not follow numbers."""
    return _BROKEN.get() is not None


@contextmanager
def recorded_decisions() -> Iterator[list[Tensor]]:
    """Gathers what :func:`holds` is asked meanwhile: scalars, each true at a step where the recording is not valid."""
    broken: list[Tensor] = []
    token = _BROKEN.set(broken)
    try:
        yield broken
    finally:
        _BROKEN.reset(token)


def any_of(conditions: list[Tensor], like: Tensor) -> Tensor:
    """Whether one of them is true: 1 or 0, in the dtype of ``like``."""
    if not conditions:
        return torch.zeros_like(like)
    return torch.stack([c.reshape(()).to(like.device) for c in conditions]).any().to(like.dtype)
