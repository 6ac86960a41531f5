# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""K particles of which one chunk is in memory at a time: exact values, and exact gradients by two passes.

The gradient of an objective at K particles is sum_k c_k d log w_k, and each coefficient depends on all K weights. So
the first pass weighs all K without a graph and keeps their weights, a number for each particle and independent element.
The second draws the same particles again, chunk by chunk from the same state of the random generators, with a graph,
sends each chunk back with its coefficients, and lets it go. Whatever is random in model and guide (dropout) or counted
(BatchNorm) replays with it. That costs about 40 % more than one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_iwae.crossing import close, roughly_close, site_values
from pyro_iwae.graphless import without_graph
from pyro_iwae.handlers import Minibatch
from pyro_iwae.logweights import LogWeights
from pyro_iwae.options import as_count
from pyro_iwae.particles import Call, run_particles
from pyro_iwae.piecemeal import Piecemeal
from pyro_iwae.plates import latent_sites
from pyro_iwae.redrawn import Redrawn, redrawn
from pyro_iwae.replaying import Remade, require_replayed, unlike
from pyro_iwae.state import FreshParameters, unchanged_state
from pyro_iwae.structure import Structure
from pyro_iwae.totals import Totals
from pyro_iwae.traces import Recording
from pyro_iwae.verdicts import Question
from pyro_iwae.weighing import Particles, sites_at_fault, warn_of_impossible, weigh_particles

__all__ = ["Chunks", "Impossible", "chunks_of", "loss_of_part", "require_chunk_size"]

MOST_STARTS = 4  # parameters and verdicts that are made on the way are there the next time


def require_chunk_size(chunk_size: Any, *, combine: bool = False) -> int | None:
    """Checks the option.

    Raises:
        TypeError: where it is neither None nor a whole number.
        ValueError: where it is below 1.
        NotImplementedError: where particles of plates serve all particles further out.
    """
    if chunk_size is None:
        return None
    if combine:
        raise NotImplementedError(
            "combine=True weighs every combination of particles at once, which chunk_size cannot cut; write "
            "combine=False, or leave chunk_size out"
        )
    return as_count("chunk_size", chunk_size)


def chunks_of(
    call: Call,
    *,
    num_particles: int,
    chunk_size: int | None,
    minibatch: Minibatch | None = None,
    first: int = 0,
    among: int | None = None,
    **options: Any,
) -> Chunks | None:
    """How to run K particles with at most ``chunk_size`` in memory; None where they fit in together.

    Args:
        call: what to run.
        num_particles: K.
        chunk_size: how many, counted in the fullest node of the plate tree; None is all.
        minibatch: indices that are settled already, and what others are drawn from.
        first: number of the first of these particles among all.
        among: all, where these are a part of them.
        options: those of :func:`~pyro_iwae.weighing.weigh_particles`.

    Raises:
        ValueError: where the particles of a plate inside one of the root's alone are more.
    """
    if chunk_size is None or (options.get("plate_particles") is None and num_particles <= chunk_size):
        return None
    whole = num_particles if among is None else among
    minibatch = Minibatch() if minibatch is None else minibatch
    structure = Question(call, num_particles=whole, minibatch=minibatch, **options).answer()
    indices = dict(minibatch.indices)
    chunks = Chunks(call, num_particles, whole, first, chunk_size, options, structure, indices, minibatch.seed)
    return None if num_particles <= chunks.most else chunks


@dataclass(frozen=True)
class Chunks:
    """K particles, run in chunks.

    Attributes:
        call: what to run.
        num_particles: how many.
        whole: K, of which these may be a part.
        first: number of the first of these among the K.
        chunk_size: how many are run together, counted in the fullest node of the plate tree.
        options: those of :func:`~pyro_iwae.weighing.weigh_particles`.
        structure: how they will be run.
        indices: of subsampled plates, as far as they are settled; each pass draws the others, and so the same ones.
        seed: what indices are drawn from, if not from what comes.
        guide: the guide's distributions, if it has run already.
        seen: sites that made all particles of a chunk impossible.
    """

    call: Call
    num_particles: int
    whole: int
    first: int
    chunk_size: int
    options: Mapping[str, Any]
    structure: Structure
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int | None = None
    guide: Redrawn | None = None
    seen: Impossible = field(default_factory=lambda: Impossible())

    @property
    def most(self) -> int:
        """Particles of the root in one chunk."""
        tree = self.structure.run.tree
        inside = tree.most(1)
        if inside > self.chunk_size:
            fullest = max(range(len(tree.nodes)), key=lambda i: math.prod(tree.shape(i, 1)))
            raise ValueError(
                f"expected chunk_size >= {inside}, the particles of plate '{tree.nodes[fullest].plate}' inside each of "
                f"the num_particles, which stay together; got {self.chunk_size}. Write chunk_size={inside}, or lower "
                "plate_particles"
            )
        return self.chunk_size // inside

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Where each chunk starts and stops: as few as can be, of sizes as like as can be, the larger ones first."""
        count = -(-self.num_particles // self.most)
        return list(pairwise(-(-self.num_particles * i // count) for i in range(count + 1)))

    def draw(self, recording: Recording | None = None) -> Iterator[Particles]:
        """Weighs chunk after chunk, all of one minibatch."""
        minibatch, plates = self._minibatch(), None
        for start, stop in self.edges:
            particles = self._weigh(stop - start, minibatch, recording)
            found = particles.weights.plates
            if found != (plates := found if plates is None else plates):
                raise ValueError(
                    "expected model and guide to have the same independent plates in each chunk of particles, got "
                    f"{list(plates)} and {list(found)}; leave chunk_size out"
                )
            yield particles
            del particles  # before the next chunk is made

    def _weigh(self, count: int, minibatch: Minibatch, recording: Recording | None = None) -> Particles:
        return weigh_particles(
            self.call,
            num_particles=count,
            among=self.whole,
            minibatch=minibatch,
            recording=recording,
            **self.options,
        )

    def _minibatch(self) -> Minibatch:
        minibatch = Minibatch(self.seed)
        minibatch.indices.update(self.indices)
        return minibatch

    # One pass: values

    def weigh(self) -> LogWeights:
        """The weights of all K. Where a graph is recorded, each chunk's is made again when ``backward()`` needs it."""
        chunks = self.with_guide_once(cut=False)
        if torch.is_grad_enabled():
            weights = LogWeights.joined(list(chunks._remade()))
        else:
            weights = LogWeights.joined([self.seen.looked_at(particles) for particles in chunks.draw()])
        self._warn(weights)
        return weights

    def _warn(self, weights: LogWeights) -> None:
        """Warns where all K are impossible, if these are all."""
        if self.num_particles == self.whole:
            self.seen.warn_of((weights.log_weights == -math.inf).all(0), self.whole)

    def values(self) -> LogWeights:
        """The weights of all K without a graph, and nothing else that is a number for each particle."""
        weights = without_graph(self.with_guide_once(cut=False)._values)
        assert weights is not None
        return weights

    def _values(self, *, as_expected: bool = False) -> LogWeights | None:
        found = list[LogWeights]()
        for particles in self.draw():
            found.append(self.seen.looked_at(particles, children=False).mapped(Tensor.detach))
            same = particles.structure is self.structure
            del particles
            if as_expected and not same:
                return None
        weights = LogWeights.joined(found)
        self._warn(weights)
        return weights

    def _remade(self) -> Iterator[LogWeights]:
        settled = dict(self.indices)
        for start, stop in self.edges:

            def run(count: int = stop - start, known: Mapping[str, Tensor] = dict(settled)) -> LogWeights:
                minibatch = replace(self, indices=known)._minibatch()  # what the first chunk draws, it draws again
                weights = self.seen.looked_at(self._weigh(count, minibatch))
                settled.update(minibatch.indices)
                return weights

            yield Remade(run, self.call.model, self.call.guide).weights()

    # Two passes: gradients

    def loss(
        self,
        totals_of: Callable[[LogWeights], Totals],
        surrogate_of: Callable[[LogWeights, Totals], Tensor],
        *,
        recording: Recording,
        retain_graph: bool | None = None,
    ) -> tuple[Particles | None, Tensor]:
        """Minus the objective, scaled and summed, as a scalar whose ``backward()`` hands out its gradient.

        Args:
            totals_of: the objective at all K.
            surrogate_of: from a chunk's weights, and the objective at all K, to the surrogate.
            recording: what to record in the second pass.
            retain_graph: whether graphs made outside of model and guide are kept.

        Returns:
            A chunk that has put NaN into the gradient, if one has, and the loss.

        Raises:
            ValueError: where the second pass does not draw the particles of the first.
        """
        chunks, first = self.first_pass()
        totals = totals_of(first)
        piecemeal = Piecemeal(retain_graph=retain_graph)
        faulty = chunks.second_pass(piecemeal, first, totals, surrogate_of, recording)
        return faulty, piecemeal.delivered(-first.total(totals.value))

    def second_pass(
        self,
        piecemeal: Piecemeal,
        first: LogWeights,
        totals: Totals,
        surrogate_of: Callable[[LogWeights, Totals], Tensor],
        recording: Recording,
    ) -> Particles | None:
        """Draws the same particles with a graph, and sends each chunk back; one that has put NaN into the gradient."""
        faulty = None
        with pyro.validation_enabled(False):  # the first pass has checked the same values
            for (start, stop), particles in zip(self.edges, self.draw(recording), strict=True):
                weights, part = particles.weights, totals.part(self.first + start, self.first + stop)
                require_replayed(weights.log_weights, first.log_weights[start:stop])
                loss = loss_of_part(weights, totals, surrogate_of(weights, part), (stop - start) / self.whole)
                if not piecemeal.add(loss) and faulty is None:
                    faulty = particles
                del particles, weights, loss
        if self.guide is not None:
            self.guide.send_back(piecemeal)
            if faulty is not None:
                faulty.pairs[0].guide.nodes.update(self.guide.params)
        return faulty

    def first_pass(self) -> tuple[Chunks, LogWeights]:
        """All weights without a graph, and how they were drawn; all that is random or counted is put back."""
        chunks = self
        for _ in range(MOST_STARTS):
            chunks = replace(self, structure=chunks._question.answer()).with_guide_once(cut=True)
            weights = without_graph(chunks._weighed_apart)
            if weights is not None:
                return chunks, weights
        raise ValueError(unlike("got new parameters, sites or plates each time"))

    def _weighed_apart(self) -> LogWeights | None:
        """None where something was made on the way, so that a second pass would draw other numbers."""
        with FreshParameters() as fresh, unchanged_state(self.call.model, self.call.guide):
            weights = self._values(as_expected=True)
        return None if fresh.drawn else weights

    @property
    def _question(self) -> Question:
        return Question(self.call, num_particles=self.whole, minibatch=self._minibatch(), **self.options)

    def with_guide_once(self, *, cut: bool) -> Chunks:
        """With a guide that has run, where that is enough; the indices of its plates are settled then.

        Args:
            cut: whether its distributions are cut from what made them.
        """
        cache, key = self.options["cache"], self._question.key
        run = self.structure.run
        if key not in cache.redraws:  # a look, which must leave no trace
            with poutine.block(), unchanged_state(self.call.model, self.call.guide):
                cache.redraws[key] = without_graph(self._may_run_once)
        minibatch = self._minibatch()
        found = redrawn(self.call, run, minibatch) if cache.redraws[key] else None
        if found is None:
            cache.redraws[key] = False
            return self
        if {site["name"] for site in found.sites} != self.structure.batch_dims.keys():  # not those of the verdict
            return self
        found = found.cut() if cut else found
        return replace(self, call=replace(self.call, drawing=found), indices=minibatch.indices, guide=found)

    def _may_run_once(self) -> bool:
        """Whether the guide's distributions follow no draw, and the model sees draws by the guide's sites alone.

        A draw that the guide hands over otherwise (as an attribute) would be that of another run. So the model is run
        on draws that the guide has not made, and on the same with the guide beside it, and must not tell these apart.
        """
        run, minibatch = self.structure.run, self._minibatch()
        found = redrawn(self.call, run, minibatch)
        if found is None:
            return False
        drawn = replace(self.call, drawing=found)
        unseen = run_particles(drawn, num_particles=2, run=run, minibatch=minibatch)
        values = {name: site["value"] for name, site in latent_sites(unseen[0].guide)}
        beside = [
            site_values(run_particles(self.call, num_particles=2, run=run, minibatch=minibatch, values=values), None)
            for _ in range(2)
        ]
        alone = site_values(unseen, None)
        if alone.keys() != beside[0].keys():
            return False
        # A model with randomness of its own differs from run to run anyway.
        return all(roughly_close(v, alone[k]) or not close(v, beside[1][k]) for k, v in beside[0].items())


def loss_of_part(weights: LogWeights, totals: Totals, surrogate: Tensor, share: float) -> Tensor:
    """What a part of the K particles has in the loss: its share of the value, and the gradient of its surrogate."""
    constant = {name: share * value for name, value in weights.constant.items()}
    value = share * totals.value + (surrogate - surrogate.detach())
    return -replace(weights, constant=constant).total(value)


class Impossible:
    """Sites that made all particles of a chunk impossible: worth a warning once all chunks are."""

    def __init__(self) -> None:
        self.sites = set[str]()

    def looked_at(self, particles: Particles, *, children: bool = True) -> LogWeights:
        """Looks at a chunk, and returns its weights; without what is not a number for each, if that is asked for."""
        if bool((particles.weights.log_weights == -math.inf).all(0).any()):
            self.sites |= sites_at_fault(particles)
        weights = replace(particles.weights, cut=None)
        return weights if children else replace(weights, score=None, score_log_q=None, children=())

    def warn_of(self, impossible: Tensor, num_particles: int) -> None:
        """Warns of elements for which all K are."""
        warn_of_impossible(impossible, num_particles, lambda: self.sites)
