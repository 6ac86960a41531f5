# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What a step costs: seconds, and memory at its worst moment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_bytes", "seconds"]


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """How long a step takes, with all that it has a device do."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that tensors made by a step take at once: what has to be free beside what is held already.

    On a CPU allocations are counted as torch makes them, whatever the process may have reserved; on a CUDA device the
    allocator's own count is read.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    with _hushed(), profile(profile_memory=True) as profiler:
        step()
    found: Any = profiler.kineto_results
    events = sorted((e for e in found.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _hushed() -> Iterator[None]:
    """Some builds of torch write to stderr, past Python, when they profile; a step has run before, and said its own."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
