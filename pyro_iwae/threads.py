# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Two threads in Pyro at once are refused: its handlers and its param store are those of the process.

What Pyro does around our calls, ``SVI.step`` say, is not seen, so that this is no lock for two loops to rely on.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["in_one_thread"]

P = ParamSpec("P")
R = TypeVar("R")
LOCKS: dict[int, Any] = {}  # by process: one that another thread held when a process was forked stays held


def in_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function raise where it, or another one of these, is running in another thread."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        lock = LOCKS.setdefault(os.getpid(), threading.RLock())
        if not lock.acquire(blocking=False):
            raise RuntimeError(
                "expected one thread at a time to run model and guide, got two: Pyro keeps effect handlers and "
                "parameters for the whole process, so that each would see the other's sites. Use processes "
                "(multiprocessing, torchrun), or a lock of your own around svi.step and the like"
            )
        try:
            return function(*args, **kwargs)
        finally:
            lock.release()

    return alone
