# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Two threads in Pyro at once are refused: its handlers and its param store are those of the process.

What Pyro does around our calls, ``SVI.step`` say, is not seen, so that this is no lock for two loops to rely on.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

__all__ = ["acting_for", "in_one_thread", "this_thread"]

P = ParamSpec("P")
R = TypeVar("R")


class _Turn:
    """Which thread is inside, and in how many calls."""

    def __init__(self) -> None:
        self.mutex, self.thread, self.depth = threading.Lock(), 0, 0

    def begin(self, thread: int) -> None:
        with self.mutex:
            if self.depth and self.thread != thread:
                raise RuntimeError(
                    "expected one thread at a time to run model and guide, got two: Pyro keeps effect handlers and "
                    "parameters for the whole process, so that each would see the other's sites. Use processes "
                    "(multiprocessing, torchrun), or a lock of your own around svi.step and the like"
                )
            self.thread, self.depth = thread, self.depth + 1

    def end(self) -> None:
        with self.mutex:
            self.depth -= 1


TURNS: dict[int, _Turn] = {}  # by process: a turn that another thread had when a process was forked never ends
ACTING = threading.local()


def this_thread() -> int:
    """The thread that is running, or that this one acts for."""
    return getattr(ACTING, "thread", None) or threading.get_ident()


@contextmanager
def acting_for(thread: int) -> Iterator[None]:
    """Has the thread that is running count as another: PyTorch goes back in threads of its own on a GPU."""
    before, ACTING.thread = getattr(ACTING, "thread", None), thread
    try:
        yield
    finally:
        ACTING.thread = before


def in_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function raise where it, or another one of these, is running in another thread."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        turn = TURNS.setdefault(os.getpid(), _Turn())
        turn.begin(this_thread())
        try:
            return function(*args, **kwargs)
        finally:
            turn.end()

    return alone
