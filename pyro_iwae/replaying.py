# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles that are run again, from the same state of all that is random or counted, and come out the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.logweights import LogWeights
from pyro_iwae.state import get_random_state, set_random_state, unchanged_state
from pyro_iwae.threads import acting_for, this_thread

__all__ = ["Remade", "require_replayed", "unlike"]


class Remade:
    """Log weights whose graph is let go, and made again when ``backward()`` comes to it.

    Args:
        run: makes them.
        programs: the model and guide behind it.
    """

    def __init__(self, run: Callable[[], LogWeights], *programs: Callable[..., Any]) -> None:
        self.run, self.programs = run, programs
        self.random, self.thread = get_random_state(), this_thread()
        self.first: LogWeights | None = None

    def weights(self) -> LogWeights:
        """Makes them."""
        from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop  # slow to import in older versions

        with set_checkpoint_early_stop(False):  # model and guide end in good order
            numbers = iter(checkpoint(self._numbers, use_reentrant=False, preserve_rng_state=False))
        assert self.first is not None
        return self.first.mapped(lambda _: next(numbers))

    def _numbers(self) -> list[Tensor]:
        if self.first is None:
            weights = self.run()
            self.first = weights.mapped(Tensor.detach)
            return weights.numbers()
        with acting_for(self.thread), unchanged_state(*self.programs):
            set_random_state(self.random)
            weights = self.run()
        require_replayed(weights.log_weights, self.first.log_weights)
        return weights.numbers()


def require_replayed(log_weights: Tensor, first: Tensor) -> None:
    """Raises where particles are not those that were drawn at first."""
    if log_weights.shape != first.shape:
        raise ValueError(unlike(f"got weights of shape {tuple(first.shape)}, then {tuple(log_weights.shape)}"))
    same = log_weights == first
    apart = torch.where(same, 0.0, (log_weights.detach() - first).abs())
    limit = torch.finfo(first.dtype).eps ** 0.5 * (1.0 + first.abs())
    if not bool((same | (apart <= limit)).all()):
        raise ValueError(unlike(f"got log weights that differ by {apart.max().item():.3g} nats"))


def unlike(got: str) -> str:
    """What to say where a second run does not give the same."""
    return (
        f"expected model and guide to draw the same particles when they are run again, as chunk_size needs, {got}; "
        "what is random in them must come from the generators of torch, numpy or Python, and what they count must be "
        "held by buffers of modules. Otherwise leave chunk_size out"
    )
