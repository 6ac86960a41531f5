# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""K particles shared out over processes: each weighs its part, all know the objective at all K, gradients are summed.

A part is to the K what a chunk is: its particles' coefficients come from the totals over all, so that the gradients of
all parts add up to that of one process with the same K particles. What is sent does not grow with K: totals, a few
numbers for each independent element, and gradients, one number for each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyro_iwae.chunks import Chunks, chunks_of, loss_of_part
from pyro_iwae.distributed import Ranks, bits_of, checksum, in_all, number_of
from pyro_iwae.drawn import settable
from pyro_iwae.graphless import without_graph
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Call
from pyro_iwae.piecemeal import Piecemeal
from pyro_iwae.plates import sample_sites
from pyro_iwae.state import module_behind, unchanged_state
from pyro_iwae.structure import Structure
from pyro_iwae.totals import Totals
from pyro_iwae.traces import Recording
from pyro_iwae.turns import Turn
from pyro_iwae.verdicts import Question
from pyro_iwae.weighing import Particles, sites_at_fault, warn_of_impossible, weigh_particles

__all__ = ["Sharing"]

Result = TypeVar("Result")
TotalsOfPart = Callable[[Tensor, int, int], Totals]
Sites = Callable[[], set[str]]
Estimate = Callable[[Particles, Totals], tuple[LogWeights, Tensor]]


@dataclass(frozen=True)
class Sharing:
    """One call in which particles are shared out.

    Attributes:
        turn: the call.
        call: what is run.
        num_particles: K.
        chunk_size: at most so many particles in the memory of one process; None is all of its part.
        options: those of :func:`~pyro_iwae.weighing.weigh_particles`.
        buffers: of the modules that run.
    """

    turn: Turn
    call: Call
    num_particles: int
    chunk_size: int | None
    options: Mapping[str, Any]
    buffers: list[Tensor] = field(default_factory=list)

    @classmethod
    @contextmanager
    def begun(
        cls,
        ranks: Ranks,
        what: str,
        call: Call,
        num_particles: int,
        chunk_size: int | None,
        options: Mapping[str, Any],
        way: Any = None,
    ) -> Iterator[Sharing]:
        """Begins a call, known by ``what`` it is; ``way`` is what else must be the same in all processes.

        Raises:
            ValueError: where there are fewer particles than processes, or the processes were given different things.
        """
        ranks.share(num_particles)
        known = num_particles, *(options[n] for n in ("vectorize", "max_plate_nesting", "plate_particles")), way
        with Turn.begun(ranks, what, (call.args, call.kwargs), known) as turn:
            yield cls(turn, call, num_particles, chunk_size, options)

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.turn.ranks

    @property
    def part(self) -> tuple[int, int]:
        """The particles of this process, from the first to one after the last."""
        return self.ranks.share(self.num_particles)

    # This process's part

    def weigh(self, recording: Recording | None = None) -> Particles:
        """Weighs the particles of this process together."""
        start, stop = self.part
        return weigh_particles(
            self.call,
            num_particles=stop - start,
            among=self.num_particles,
            minibatch=self.turn.minibatch,
            recording=recording,
            **self.options,
        )

    def chunks(self, least: int = 1) -> Chunks | None:
        """How they are run, at least so many together, if they are more than may be in memory; None if not."""
        start, stop = self.part
        return chunks_of(
            self.call,
            num_particles=stop - start,
            chunk_size=None if self.chunk_size is None else max(least, self.chunk_size),
            minibatch=self.turn.minibatch,
            first=start,
            among=self.num_particles,
            **self.options,
        )

    def drawn(self, draw: Callable[[], Result], weights_of: Callable[[Result], LogWeights]) -> Result:
        """What this process draws with random numbers of its own, once it is seen that the others' goes with it.

        Args:
            draw: draws it.
            weights_of: the weights of what was drawn.

        Raises:
            ValueError: where a process has another model, guide or data, or draws what another has drawn.
        """

        def alone() -> tuple[Result, list[int]]:
            question = Question(
                self.call, num_particles=self.num_particles, minibatch=self.turn.minibatch, **self.options
            )
            structure = question.answer()  # with shared random numbers: the verdict, and parameters made on the way
            probe, data = self._probe() if self.turn.is_due else (0.0, 0)
            with self.turn.own():
                found = draw()
            weights = weights_of(found)
            shape = number_of(weights.plates, tuple(weights.log_weights.shape[1:]), sorted(weights.constant))
            self.buffers[:] = buffers_of(structure)
            told = [self.turn.stream, self.turn.drawn, shape, bits_of(probe), data, checksum(self.buffers)]
            return found, told

        found, rows = self.ranks.attempt(alone)
        streams, drawn, shapes, probes, data, buffers = zip(*rows, strict=True)
        self.turn.require_apart(streams, drawn)
        self.ranks.require_same(
            shapes,
            "plates of the same sizes",
            "give all the same model, guide and data. Where sites inside plates differ from particle to particle, "
            "particles cannot be shared out: leave process_group out",
        )
        self.ranks.require_same(data, "observed data", "let functions hold the same data in all")
        self.turn.require_like(probes)
        self._align(buffers)
        return found

    def _probe(self) -> tuple[float, int]:
        """Log weight of one particle that all processes draw alike, and a checksum of what the model observed."""

        def weigh() -> Particles:
            minibatch = self.turn.minibatch
            return weigh_particles(self.call, num_particles=1, averaged=False, minibatch=minibatch, **self.options)

        with poutine.block(), unchanged_state(self.call.model, self.call.guide):
            particles = without_graph(weigh)
        weights, trace = particles.weights, particles.pairs[0].model
        observed = {n: s["value"] for n, s in sample_sites(trace) if s["is_observed"] and settable(s)}
        return float(weights.total(weights.log_weights[0])), checksum(observed)

    def _align(self, sums: Sequence[int]) -> None:
        """Gives all processes the first one's buffers, where particles of their own have changed them (BatchNorm)."""
        if len(set(sums)) > 1:
            known = self.ranks.from_first([b.detach().cpu() for b in self.buffers])
            with torch.no_grad():
                for buffer, value in zip(self.buffers, known, strict=True):
                    buffer.data.copy_(value)  # .data, so that a graph that is waiting for backward() stays valid

    # All K

    def values(self) -> tuple[LogWeights, Sites]:
        """The weights of this process's particles, without a graph; and the sites at fault where all are impossible."""
        return self.drawn(self._values, lambda found: found[0])

    def _values(self) -> tuple[LogWeights, Sites]:
        chunks = self.chunks()
        if chunks is not None:
            return chunks.values(), lambda: chunks.seen.sites
        particles = without_graph(self.weigh)
        return particles.weights, partial(sites_at_fault, particles)

    def all_values(self) -> LogWeights:
        """The weights of all K, in every process."""
        weights, sites = self.values()
        rows = self.ranks.gather_rows(weights.log_weights, self.num_particles)
        self.warn((rows == -math.inf).all(0), sites)
        return replace(weights, log_weights=rows, score=None, score_log_q=None, cut=None, children=())

    def all_weights(self) -> LogWeights:
        """The same, with what is inside of them."""
        weights = self.drawn(lambda: without_graph(self._whole), lambda weights: weights)
        device = weights.log_weights.device
        parts: list[LogWeights] = self.ranks.objects(weights.mapped(lambda t: t.detach().cpu()))
        return LogWeights.joined(parts).mapped(lambda t: t.to(device))

    def _whole(self) -> LogWeights:
        chunks = self.chunks()
        return self.weigh().weights if chunks is None else chunks.weigh()

    def totals(self, weights: LogWeights, totals_of_part: TotalsOfPart, sites: Sites) -> Totals:
        """The objective at all K; warns where all are impossible.

        Args:
            weights: of this process's particles.
            totals_of_part: what these have in the objective.
            sites: names of the sites at fault, if any is.
        """
        own = totals_of_part(weights.log_weights, self.part[0], self.num_particles)
        totals = own.gathered(self.ranks.gather, self.num_particles)
        if bool((totals.value == -math.inf).any()):
            own_impossible = (weights.log_weights == -math.inf).all(0)
            self.warn(self.ranks.gather(own_impossible.to(torch.uint8)).bool().all(0), sites)
        return totals

    def warn(self, impossible: Tensor, sites: Sites) -> None:
        """Warns once, in the first process, of elements for which all K are impossible; ``-W error`` stops all."""

        def alone() -> None:
            if self.ranks.rank == 0:
                warn_of_impossible(impossible, self.num_particles, sites)

        if bool(impossible.any()):
            in_all(self.ranks, alone)

    def value(self, weights: LogWeights, totals: Totals) -> Tensor:
        """The objective, scaled and summed."""
        value = replace(weights, constant={}).total(totals.value)
        if weights.constant:  # the same for all particles, but for randomness of the model's own
            start, stop = self.part
            share = (stop - start) / self.num_particles
            constant = torch.stack([c.detach().sum() for c in weights.constant.values()]).sum()
            value = value + self.ranks.gather(share * constant).sum(0)
        return value

    # Gradients

    def loss(
        self,
        totals_of_part: TotalsOfPart,
        estimate: Estimate,
        surrogate_of: Callable[[LogWeights, Totals], Tensor],
        *,
        recording: Recording,
        whole: bool,
        retain_graph: bool | None,
    ) -> Tensor:
        """Minus the objective, as a scalar whose ``backward()`` hands out the gradient, the same in every process.

        Args:
            totals_of_part: what a part of the particles has in the objective.
            estimate: from particles and the objective at all K to the weights that are sent back, and the surrogate.
            surrogate_of: the same for a chunk of particles.
            recording: what to record.
            whole: whether this process's particles are to run together, whatever ``chunk_size`` is.
            retain_graph: whether graphs made outside of model and guide are kept.
        """
        start, stop = self.part
        piecemeal = Piecemeal(retain_graph=retain_graph)

        def draw() -> tuple[Chunks | Particles, LogWeights, Sites]:
            chunks = None if whole else self.chunks()
            if chunks is None:
                particles = self.weigh(recording)
                return particles, particles.weights, partial(sites_at_fault, particles)
            chunks, weights = chunks.first_pass()
            return chunks, weights, lambda: chunks.seen.sites

        drawn, weights, sites = self.drawn(draw, lambda found: found[1])
        totals = self.totals(weights, totals_of_part, sites)

        def send_back() -> None:
            if isinstance(drawn, Chunks):
                drawn.second_pass(piecemeal, weights, totals, surrogate_of, recording)
                return
            sent, surrogate = estimate(drawn, totals.part(start, stop))
            piecemeal.add(loss_of_part(sent, totals, surrogate, (stop - start) / self.num_particles))

        self._sent(piecemeal, send_back)
        return piecemeal.delivered(-self.value(weights, totals).detach())

    def _sent(self, piecemeal: Piecemeal, send_back: Callable[[], None]) -> None:
        """Sends this process's particles back, and puts the sum over all processes into the place of what came."""

        def alone() -> tuple[dict[str, Tensor], list[int]]:
            with self.turn.own():
                send_back()
            named = self._named([leaf for leaf, _ in piecemeal.each()])
            _refuse_faulty(piecemeal, named)
            fresh = self.turn.is_due or any(leaf not in self.ranks.compared for leaf in named.values())
            told = [self.turn.stream, number_of(_kinds(named)), fresh, checksum(named) if fresh else 0]
            return named, [*told, checksum(self.buffers)]

        named, rows = self.ranks.attempt(alone)
        streams, names, fresh, values, buffers = zip(*rows, strict=True)
        self.turn.require_apart(streams)
        if len(set(names)) > 1:
            named = self._every(named)
        if any(fresh):
            if len(set(names)) > 1 or len(set(values)) > 1:
                self._agree_on(named)
            self.ranks.compared.update(dict.fromkeys(named.values()))
        self._sum(piecemeal, named)
        self._align(buffers)

    def _named(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors that have a gradient, by what they are called in every process, in that order.

        What Pyro and modules do not know is called by its values, which are the same in every process.

        Raises:
            ValueError: where two of these have the same values, and cannot be told apart.
        """
        names = {id(p): n for n, p in self._parameters().items()}
        unknown = {id(leaf): f"without a name ({checksum(leaf)})" for leaf in leaves if id(leaf) not in names}
        if len(set(unknown.values())) < len(unknown):
            raise ValueError(
                "expected parameters that Pyro knows, got two tensors with the same values that it does not; write "
                "pyro.module('name', module) in model or guide, so that each is the same one in every process"
            )
        return dict(sorted(((names | unknown)[id(leaf)], leaf) for leaf in leaves))

    def _parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for role, program in (("model", self.call.model), ("guide", self.call.guide)):
            module = module_behind(program)
            found |= {} if module is None else dict(module.named_parameters(role))
        return found | dict(pyro.get_param_store().named_parameters())

    def _every(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With those that only other processes' particles have met."""
        every = sorted({kind for kinds in self.ranks.objects(_kinds(named)) for kind in kinds})
        known = self._parameters() | dict(named)

        def alone() -> dict[str, Tensor]:
            for name, shape, _ in every:
                if name not in known or tuple(known[name].shape) != shape:
                    raise ValueError(
                        f"expected parameter '{name}' of shape {shape}, which another process's particles have met, "
                        "to be here; ask for every parameter in every run of model and guide, and let them begin alike"
                    )
                if name not in named and name in pyro.get_param_store():
                    pyro.param(name)  # SVI steps what it has seen asked for
            return {name: known[name] for name, _, _ in every}

        return in_all(self.ranks, alone)

    def _agree_on(self, named: Mapping[str, Tensor]) -> None:
        """Raises where parameters have other values in another process; takes the first's where rounding parts them."""
        for name, leaf in named.items():
            every = self.ranks.gather(leaf.detach())
            limit = torch.finfo(leaf.dtype).eps ** 0.5 * (every[0].abs().mean() + 1e-3)
            self.ranks.require_same(
                [bool(((v - every[0]).abs() <= limit).all()) for v in every],
                f"values of parameter '{name}'",
                "set one seed in all processes before model and guide are made, or load the same checkpoint in all "
                "(particles differ all the same); then do the same with the parameters in all",
            )
            leaf.data.copy_(every[0])

    def _sum(self, piecemeal: Piecemeal, named: Mapping[str, Tensor]) -> None:
        """Sums gradients over processes, those of one dtype and device as one vector."""
        own = {id(leaf): gradient for leaf, gradient in piecemeal.each()}
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for leaf in named.values():
            kinds.setdefault((leaf.dtype, leaf.device), []).append(leaf)
        for leaves in kinds.values():
            gradients = [own.get(id(leaf), torch.zeros_like(leaf)).reshape(-1) for leaf in leaves]
            total = self.ranks.sum(torch.cat(gradients))
            for leaf, some in zip(leaves, total.split([leaf.numel() for leaf in leaves]), strict=True):
                piecemeal.put(leaf, some.view_as(leaf))


def buffers_of(structure: Structure) -> list[Tensor]:
    """The buffers of the modules that run, each once."""
    modules = [module for held, _ in structure.modes if (module := held()) is not None]
    found = {id(b): b for m in modules for _, b in m.named_buffers(recurse=False) if not is_lazy(b)}
    return list(found.values())


def _kinds(named: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named.items()]


def _refuse_faulty(piecemeal: Piecemeal, named: Mapping[str, Tensor]) -> None:
    """Raises where a gradient is NaN, which would spread to all, or sparse."""
    names = {id(leaf): name for name, leaf in named.items()}
    for leaf, gradient in piecemeal.each():
        if gradient.is_sparse:
            raise NotImplementedError(
                f"process_group sums dense gradients, got a sparse one for parameter '{names[id(leaf)]}'; write "
                "torch.nn.Embedding(sparse=False)"
            )
        if bool(gradient.isnan().any()):
            raise ValueError(
                f"the gradient of parameter '{names[id(leaf)]}' is NaN; where a site has log density -inf at some "
                "particles with a slope that is not finite, keep the guide within the model's support, or bound what "
                "the site computes (torch.where before the log, not after)"
            )
