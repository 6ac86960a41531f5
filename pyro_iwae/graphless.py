# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of model and guide without a graph, which must leave nothing behind for runs with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["graph_if", "without_graph"]

Result = TypeVar("Result")


@contextmanager
def graph_if(wanted: bool) -> Iterator[None]:
    """Records a graph, or none.

    Autocast keeps casts of weights until its block ends. An older PyTorch takes those of a run without a graph for one
    with it, too, in which these weights would not be trained.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached and wanted)
    try:
        with torch.set_grad_enabled(wanted):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def without_graph(fn: Callable[[], Result]) -> Result:
    """Runs something without a graph, to save memory; with one where model or guide takes gradients of its own."""
    try:
        with graph_if(False):
            return fn()
    except RuntimeError as error:
        if not torch.is_grad_enabled() or isinstance(error, torch.OutOfMemoryError):
            raise
        return fn()
