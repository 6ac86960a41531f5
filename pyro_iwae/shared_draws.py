# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""One draw out of K particles that are shared out over processes: the same draw in all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from pyro_iwae.distributed import Ranks, in_all, number_of
from pyro_iwae.logweights import LogWeights
from pyro_iwae.resampling import multinomial
from pyro_iwae.selection import Held, Passed, completed, held_of, pass_by
from pyro_iwae.sharing import Sharing
from pyro_iwae.weighing import sites_at_fault

__all__ = ["select_shared"]


def select_shared(sharing: Sharing) -> Passed:
    """Takes one particle of all K for each independent element.

    Each process holds one of its own, by weight; one of these is taken, by sums of weights, and its values are sent.

    Raises:
        NotImplementedError: where latents differ from particle to particle.
    """
    ranks = sharing.ranks
    held: Held = sharing.drawn(lambda: _held(sharing), _sums)
    _require_alike(ranks, held)
    others = held.log_others if ranks.rank == 0 else held.log_sum
    sums = ranks.gather(torch.stack([held.log_sum, others]))
    log_sum, log_others = sums[:, 0].logsumexp(0), sums[:, 1].logsumexp(0)
    taken = ranks.from_first(multinomial(sums[:, 0]).cpu()).to(log_sum.device) == ranks.rank  # others may round apart
    sharing.warn(log_sum == -math.inf, partial(sites_at_fault, held.particles))
    picked = held.picked.of_ranks(taken, held.particles.layout, ranks.sum)
    found = replace(held, picked=picked, log_sum=log_sum, log_others=log_others)
    return in_all(ranks, lambda: completed(sharing.call, found, sharing.num_particles))


def _held(sharing: Sharing) -> Held:
    chunks = sharing.chunks()
    return held_of(sharing.weigh()) if chunks is None else pass_by(chunks)


def _sums(held: Held) -> LogWeights:
    return LogWeights(held.log_sum.unsqueeze(0), held.particles.weights.plates)


def _require_alike(ranks: Ranks, held: Held) -> None:
    kinds = [(n, tuple(v.shape), str(v.dtype)) for n, v in sorted(held.picked.values.items())]
    if len({row[0] for row in ranks.numbers(number_of(kinds))}) > 1:
        raise NotImplementedError(
            "process_group sends the values of one particle to all, which needs the same latents in all particles, got "
            f"{sorted(held.picked.values)} and others; draw without process_group"
        )
