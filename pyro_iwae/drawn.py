# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions of values that are there already, and how to tell them from a site's own draw."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta, Unit
from torch import Tensor

from pyro_iwae.plates import Site

__all__ = ["Drawn", "DrawnDensity", "Emitted", "innermost", "settable"]


class Drawn(Delta):
    """A value whose density a factor beside it carries, so that its own is 0 wherever it is asked."""

    def log_prob(self, x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=x.dtype if x.is_floating_point() else None, device=x.device)
        return zero.expand(x.shape[: x.dim() - self.event_dim])


class Emitted(Drawn):
    """A draw that is put into a trace; ``taken`` stays empty where a handler sets a value, and be it the same."""

    def __init__(self, v: Tensor, *, event_dim: int) -> None:
        super().__init__(v, event_dim=event_dim)
        self.taken: list[bool] = []

    def expand(self, batch_shape: Any, _instance: Any = None) -> Emitted:
        new: Emitted = super().expand(batch_shape, self._get_checked_instance(Emitted, _instance))
        new.taken = self.taken
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 as in torch
        self.taken.append(True)
        return super().rsample(sample_shape)


class DrawnDensity(Unit):
    """The log density of a draw, as a factor without a score term, which ``Trace_ELBO`` would weigh wrongly.

    ``log_factor`` carries the surrogate gradient of discrete sites. A weight of which it is only a part needs the
    pieces instead: ``pathwise``, the same value with the pathwise gradient alone, and ``score``, the sum of log q.
    """

    has_rsample = True

    def __init__(self, log_factor: Tensor, pathwise: Tensor, score: Tensor) -> None:
        super().__init__(log_factor, has_rsample=True)
        self.pathwise, self.score = pathwise, score

    def expand(self, batch_shape: Any, _instance: Any = None) -> DrawnDensity:
        shape = torch.Size(batch_shape)
        return DrawnDensity(self.log_factor.expand(shape), self.pathwise.expand(shape), self.score.expand(shape))


def settable(site: Site) -> bool:
    """Whether a latent's value is its own: a Delta follows from what comes before it and is better left to that."""
    fn = innermost(site["fn"])
    return isinstance(fn, Drawn) or not isinstance(fn, Delta)


def innermost(fn: Any) -> Any:
    """The distribution inside masks, events and transforms."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
