# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""One call that all processes of a group make together: random numbers that they share, and some of each one's own.

All of them come from the first process's generator, which moves on by one draw in each call. So it does not matter how
the processes were seeded: particles differ, and whatever must be the same is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_iwae.densities import is_discrete
from pyro_iwae.distributed import Ranks, checksum, described, float_of, number_of
from pyro_iwae.drawn import settable
from pyro_iwae.handlers import Minibatch
from pyro_iwae.plates import Site
from pyro_iwae.state import get_random_state, seeded, seeded_apart, set_random_state

__all__ = ["Turn"]

CHECKS = 1, 10, 100  # calls in which parameters are compared, beside every thousandth
CHECK_EVERY = 1000
FIRST, ENOUGH = 8, 2  # numbers: one alone may agree by chance, in float32 once in some millions of steps
APART = 1e-4  # of a log density, by which other hardware may round it


class FirstNumbers(Messenger):
    """Keeps the first few numbers that are drawn for continuous latents."""

    def __init__(self, found: list[float]) -> None:
        super().__init__()
        self.found = found

    def _pyro_post_sample(self, msg: Site) -> None:
        missing = FIRST - len(self.found)
        if missing > 0 and not msg["is_observed"] and not site_is_subsample(msg) and settable(msg):
            value = msg["value"]
            if isinstance(value, Tensor) and value.is_floating_point() and not is_discrete(msg["fn"]):
                self.found += value.detach().reshape(-1)[:missing].tolist()


@dataclass
class Turn:
    """One call.

    Attributes:
        ranks: the processes.
        seed: of the call, the same in all.
        number: of the call; 0 where it is a part of another.
        indices: of subsampled plates, as far as they are settled.
        first: the first numbers that this process has drawn for continuous latents.
    """

    ranks: Ranks
    seed: int
    number: int = 0
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    first: list[float] = field(default_factory=list, repr=False)
    _own: Any = field(default=None, repr=False)

    @classmethod
    @contextmanager
    def begun(cls, ranks: Ranks, what: str, arguments: Any, options: Any) -> Iterator[Turn]:
        """Begins a call; inside, random numbers are those that all share.

        Args:
            ranks: the processes.
            what: which call.
            arguments: of model and guide.
            options: what else must be the same, and can be told by how it prints.

        Raises:
            ValueError: where another process makes another call, or has other arguments.
        """
        seed, way = int(torch.randint(2**62, ())), described(options)
        _, rows = ranks.attempt(lambda: (None, [seed, number_of(what), number_of(way), checksum(arguments)]))
        seeds, calls, ways, data = zip(*rows, strict=True)
        ranks.require_same(calls, "call", f"all must make the calls that share particles in one order (here {what})")
        ranks.require_same(ways, "options", f"here they are {way}")
        ranks.require_same(
            data,
            "arguments of model and guide",
            "each is to weigh particles for the same data: give all the same minibatch (the same seed for what "
            "shuffles). To share out data, too, take a mesh of data x particles, and wrap "
            "ImportanceWeightedELBO(process_group=mesh['particles'])(model, guide) into "
            "DistributedDataParallel(process_group=mesh['data'].get_group())",
        )
        ranks.calls += 1
        with seeded_apart(seeds[0]):
            yield cls(ranks, seeds[0], ranks.calls)

    @property
    def is_due(self) -> bool:
        """Whether this call compares what hardly ever differs."""
        return self.number in CHECKS or (self.number > 0 and self.number % CHECK_EVERY == 0)

    @property
    def minibatch(self) -> Minibatch:
        """Draws the same indices in every process."""
        minibatch = Minibatch(self.seed)
        minibatch.indices.update(self.indices)
        return minibatch

    def inner(self, indices: Mapping[str, Tensor]) -> Turn:
        """A part of the call, with random numbers of its own; drawn from those that all share."""
        return Turn(self.ranks, int(torch.randint(2**62, ())), indices=indices)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Random numbers of this process's own, which go on where they stopped."""
        shared = get_random_state()
        if self._own is None:
            seeded(self.seed, "process", self.ranks.rank)
        else:
            set_random_state(self._own)
        try:
            with FirstNumbers(self.first):
                yield
        finally:
            self._own = get_random_state()
            set_random_state(shared)

    @property
    def stream(self) -> int:
        """Where this process's own random numbers have come to: in no two processes to the same place."""
        host, cuda = self._own[1]
        return number_of(host.numpy().tobytes(), *(c.numpy().tobytes() for c in cuda or ()))

    @property
    def drawn(self) -> int:
        """The first numbers that were drawn for continuous latents; 0 where there are too few to tell copies."""
        return number_of(*self.first) if len(self.first) >= ENOUGH else 0

    def require_apart(self, streams: Sequence[int], drawn: Sequence[int] = ()) -> None:
        """Raises where two processes have drawn the same particles, by ``stream`` and ``drawn`` of each."""
        self._require_different(streams)
        self._require_different([number or -1 - rank for rank, number in enumerate(drawn)])

    def _require_different(self, numbers: Sequence[int]) -> None:
        first: dict[int, int] = {}
        for rank, stream in enumerate(numbers):
            if stream in first:
                raise ValueError(
                    f"expected other random numbers in each process, got the same on {self.ranks.name(first[stream])} "
                    f"and {self.ranks.name(rank)}, so that their particles are copies of each other: model or guide "
                    "sets a seed, or draws from a generator of its own. Set seeds before training, not inside of them"
                )
            first[stream] = rank

    def require_like(self, probes: Sequence[int]) -> None:
        """Raises where one particle, which all processes draw alike, has another log weight in some; bits of these."""
        values = [float_of(bits) for bits in probes]
        first = values[0]
        like = [v == first or 0.0 < APART * (1.0 + abs(first)) - abs(v - first) < math.inf for v in values]
        self.ranks.require_same(
            like,
            "model, guide and data",
            f"one particle, drawn from the same seed, has log weights {', '.join(f'{v:.6g}' for v in values)}. Set one "
            "seed in all processes before model and guide are made, so that their parameters begin alike (particles "
            "differ all the same), and let functions hold the same data",
        )
