# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws from the same particles."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from pyro_iwae.diagnostics import psis
from pyro_iwae.particles import Call
from pyro_iwae.resampling import count_distinct, several, systematic, without_replacement
from pyro_iwae.selection import model_values
from pyro_iwae.weighing import Particles

__all__ = ["Draws", "draw_pooled", "require_method"]

METHODS = {
    "multinomial": several,
    "systematic": systematic,
    "without_replacement": without_replacement,
    "psis": lambda log_weights, draws: several(psis(log_weights)[0], draws),
}
MOST = 0.5  # of the weight, above which one particle carries a draw


class Draws(dict[str, Tensor]):
    """Draws by name of the latent, ``(draws, *site shape)``.

    Attributes:
        num_distinct: how many different particles they are, for each independent element, ``(*plates)``.
    """

    def __init__(self, values: dict[str, Tensor], num_distinct: Tensor) -> None:
        super().__init__(values)
        self.num_distinct = num_distinct


def require_method(method: Any, chunk_size: int | None, *, shared: bool = False) -> None:
    """Raises where there is no such method, or no place for its particles."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"expected method to be None or one of {sorted(METHODS)}, got {method!r}")
    if chunk_size is not None:
        raise NotImplementedError(
            f"method={method!r} holds all particles at once, which chunk_size={chunk_size} does not allow; leave one "
            "of them out"
        )
    if shared:
        raise NotImplementedError(
            f"method={method!r} holds all particles in one process, got process_group beside it; leave one of them out"
        )


def draw_pooled(call: Call, particles: Particles, num_draws: int, method: str) -> Draws:
    """Draws from K particles, for each independent element by its own weights.

    Args:
        call: what was run.
        particles: K weighed particles.
        num_draws: how many.
        method: how.
    """
    weights = particles.weights
    index = METHODS[method](weights.log_weights, num_draws)
    largest = weights.weights.amax(0)
    if num_draws > 1 and bool((largest > MOST).any()):
        warnings.warn(
            f"one particle of {weights.num_particles} carries the draws of {int((largest > MOST).sum())} of "
            f"{largest.numel()} independent elements (it has {float(largest.max()):.0%} of the weight): they are "
            "hardly more than copies of it. Take more particles, train the guide further, or leave method out, so that "
            "each draw has particles of its own",
            UserWarning,
            stacklevel=3,
        )
    values, _ = model_values(call, particles, index)
    return Draws({n: v.clone() for n, v in values.items()}, count_distinct(index))
