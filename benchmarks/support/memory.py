# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The most memory that a process has held."""

import contextlib
from pathlib import Path

import torch


def high_water():
    """The most memory that this process has held, in bytes (Linux; the usual ``getrusage`` inherits its parent's)."""
    return status("VmHWM")


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def extra_memory(call, device="cpu"):
    """Bytes held at the worst moment of the call, beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):  # not allowed everywhere: then the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # the high water mark falls to what is held now
    before = status("VmRSS")
    call()
    return high_water() - before
