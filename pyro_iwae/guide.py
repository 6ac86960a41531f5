# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The posterior that the importance weighted bound implies, as a Pyro guide: draw K, weigh, keep one by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.messenger import block_messengers
from torch import Tensor

from pyro_iwae.chunks import Chunks, chunks_of, require_chunk_size
from pyro_iwae.companions import weigh_among
from pyro_iwae.density import drawn_bracket, elbo_bracket, log_density
from pyro_iwae.distributed import Grouped, in_all
from pyro_iwae.emission import Boundary, Emission
from pyro_iwae.expectation import WeightedMean
from pyro_iwae.given import weigh_at
from pyro_iwae.graphless import graph_if
from pyro_iwae.handlers import Minibatch, ParticlePlate, enclosing_frames
from pyro_iwae.logweights import LogWeights
from pyro_iwae.memory import require_room
from pyro_iwae.options import as_count, require_callables, require_draws, require_options
from pyro_iwae.owning import Owning
from pyro_iwae.particles import Call
from pyro_iwae.plates import Layout, latent_sites
from pyro_iwae.pooled import draw_pooled, require_method
from pyro_iwae.resampling import multinomial
from pyro_iwae.selection import Passed, Selection, difference, model_values, select, select_passing
from pyro_iwae.shared_draws import select_shared
from pyro_iwae.sharing import Sharing
from pyro_iwae.state import modules_behind, unchanged_state
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.threads import in_one_thread
from pyro_iwae.tree import PlateParticles
from pyro_iwae.verdicts import Question
from pyro_iwae.weighing import Particles, weigh_particles

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["ElboInterval", "ImportanceResampledGuide"]

NUMBERS_PER_PASS = 20_000_000  # about what sample() holds at once: draws x particles x numbers in one trace


@dataclass(frozen=True)
class ElboInterval:
    """Lower and upper bound on ELBO[q_EW], in nats, unscaled; unpacks as ``lower, upper``.

    Attributes:
        lower: shape ``(*independent plates)``.
        upper: likewise.
        lower_error: standard error of ``lower`` over the replicates.
        upper_error: standard error of ``upper``.
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.lower, self.upper))


class ImportanceResampledGuide(Grouped, Owning):
    """q_EW: draw K particles from the guide, weigh them by the model, keep one by its weight.

    A guide like any other, for ``Predictive``, effect handlers and other ELBOs, and closer to the posterior than
    the guide that it is made of: K = 1 is that guide, K to infinity the posterior. Each independent element makes its
    own choice, each draw has its own K particles. Under ``Trace_ELBO`` the value of a draw is the log-mean-exp of its
    weights and its gradient that of the importance weighted bound.

    It weighs its particles by the data, so it must be called with them. For predictions at other inputs draw first:
    ``Predictive(model, posterior_samples=posterior.sample(1000, x, y))(x_new)``.

    See "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
    https://arxiv.org/abs/1704.02916).

    Args:
        model: the model that the guide was trained for.
        guide: the guide.
        num_particles: how many particles, K.
        plate_particles: further particles of the latents of some plates, as for :class:`ImportanceWeightedELBO`: what
            lies outside these plates is drawn first, then each of their elements given that, by weights of its own.
        chunk_size: at most so many particles of each draw in memory at once; None is all. Particles pass by, and one is
            held: draws then have no gradient, and going back through one raises ``NotImplementedError``.
        vectorize_particles: as for :class:`ImportanceWeightedELBO`.
        max_plate_nesting: likewise.
        process_group: the processes over which the particles of each draw are shared out, as for
            :class:`ImportanceWeightedELBO`. All make the same calls and get the same draws, which have no gradient.

    Raises:
        TypeError: where an argument has the wrong type.
        ValueError: where ``num_particles`` or ``chunk_size`` is below 1, or there are fewer particles than processes.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Predictive
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> posterior = ImportanceResampledGuide(model, guide, num_particles=16)
        >>> draws = Predictive(model, guide=posterior, num_samples=100, parallel=True)(torch.tensor(1.0))
        >>> draws["z"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        num_particles: int = 64,
        *,
        plate_particles: Mapping[str, int] | str | None = None,
        chunk_size: int | None = None,
        vectorize_particles: bool | None = None,
        max_plate_nesting: float = math.inf,
        process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        require_callables(model, guide)
        require_options(vectorize_particles, max_plate_nesting)
        super().__init__(tuple(modules_behind(model, guide)))
        self.model = model
        self.guide = guide
        self.num_particles = as_count("num_particles", num_particles)
        PlateParticles.of(plate_particles, num_particles=self.num_particles)
        self.plate_particles = plate_particles
        self.chunk_size = require_chunk_size(chunk_size)
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = max_plate_nesting
        self.process_group = process_group
        if self._ranks is not None:
            self._ranks.share(self.num_particles)  # is there one for each?
        self._structures = StructureCache()
        self._is_set_up = False

    # As a guide

    @in_one_thread
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Emits one draw as sample sites, and its log density as a factor; returns the values by name."""
        call = self._call(args, kwargs, enclosing_frames())
        with self._together(call, "a draw") as sharing:
            return self._emitted(call, sharing)

    def _emitted(self, call: Call, sharing: Sharing | None) -> dict[str, Tensor]:
        with self._inside():
            in_all(self._ranks, lambda: self._set_up(call))
            passed = self._select(call, sharing)
            particles, selection = passed.particles, passed.selection
            _require_enclosing(particles.layout, call.enclosing)
        option = "chunk_size" if sharing is None else "process_group"
        selection = selection.refusing(option) if passed.refuses else selection
        emit = Emission(particles, selection, call.enclosing)
        with particles.minibatch:
            emitted = emit.values()
        if emit.replaced:
            with self._inside(), graph_if(torch.is_grad_enabled() and not passed.refuses):
                selection = self._density_at(call, emitted, particles, passed.log_others)
            selection = selection.refusing(option) if passed.refuses else selection
        with particles.minibatch:
            emit.density(selection.log_density)
            if particles.structure.run.vectorized:  # else no plate can go around it
                emit.plates()
        return emitted

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], enclosing: tuple[CondIndepStackFrame, ...] = ()
    ) -> Call:
        return Call(self.model, self.guide, args, kwargs, enclosing)

    def _set_up(self, call: Call) -> None:
        """Lets an autoguide take its shape from the model itself, not from the plates around its first call."""
        if call.enclosing and isinstance(poutine.unwrap(self.guide), AutoGuide | AutoMessenger) and not self._is_set_up:
            with poutine.block(), unchanged_state(call.guide):
                self.guide(*call.args, **call.kwargs)
        self._is_set_up = True

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Where the inner run happens: handlers outside do not reach it, but for parameters and minibatches."""
        with block_messengers(lambda m: isinstance(m, LiftMessenger)), Boundary():
            yield

    @contextmanager
    def _together(self, call: Call, what: str) -> Iterator[Sharing | None]:
        """A call that all processes make, if particles are shared out over several."""
        if self._ranks is None:
            yield None
            return
        way = [(f.name, f.dim, f.size) for f in call.enclosing], self.chunk_size
        options = self._options(True)
        with Sharing.begun(self._ranks, what, call, self.num_particles, self.chunk_size, options, way) as sharing:
            yield sharing

    def _select(self, call: Call, sharing: Sharing | None) -> Passed:
        if sharing is not None:
            return select_shared(sharing)
        chunks = self._chunks(call)
        if chunks is not None:
            return select_passing(chunks)
        particles = self._weigh(call)
        log_weights = particles.weights.log_weights
        selection = select(call, particles, multinomial(log_weights))
        return Passed(selection, particles, log_weights.logsumexp(0), log_weights[1:].logsumexp(0))

    def _weigh(
        self,
        call: Call,
        num_particles: int | None = None,
        *,
        in_plates: bool = True,
        **options: Any,
    ) -> Particles:
        count = self.num_particles if num_particles is None else num_particles
        return weigh_particles(call, num_particles=count, **self._options(in_plates), **options)

    def _chunks(self, call: Call, minibatch: Minibatch | None = None, *, least: int = 1) -> Chunks | None:
        """How K particles are run if they are more than may be in memory; None if not."""
        size = None if self.chunk_size is None else max(least, self.chunk_size)
        options = self._options(True)
        return chunks_of(call, num_particles=self.num_particles, chunk_size=size, minibatch=minibatch, **options)

    def _options(self, in_plates: bool) -> dict[str, Any]:
        return {
            "cache": self._structures,
            "vectorize": self.vectorize_particles,
            "max_plate_nesting": self.max_plate_nesting,
            "plate_particles": self._wanted if in_plates else None,
        }

    @property
    def _wanted(self) -> PlateParticles | None:
        return PlateParticles.of(self.plate_particles, num_particles=self.num_particles)

    def _at(
        self, call: Call, draws: Mapping[str, Tensor], minibatch: Minibatch | None = None, *, masked: bool = False
    ) -> tuple[Particles, Tensor, Callable[[], Tensor]]:
        """Particles at given draws, log p(x, z) there, and their log weights, with fresh companions in plates."""
        at, log_p = weigh_at(call, draws, partial(self._weigh, in_plates=False), minibatch, masked=masked)
        grown = self._wanted is not None and self._weigh(call, 1, minibatch=at.minibatch).structure.run.tree.grows
        if not grown:  # all in one node, be it that no plate can have particles of its own
            return at, log_p, lambda: at.weights.log_weights
        return at, log_p, lambda: weigh_among(call, draws, self._weigh, at.minibatch)

    def _density_at(
        self, call: Call, values: Mapping[str, Tensor], particles: Particles, log_others: Tensor
    ) -> Selection:
        """log q~ at values that a handler chose, its companions K - 1 of the particles, whichever was selected."""
        stacked = {n: v.unsqueeze(0) for n, v in values.items()}
        _, log_p, weigh = self._at(call, stacked, particles.minibatch, masked=True)
        bound = torch.logaddexp(weigh().squeeze(0), log_others) - math.log(self.num_particles)
        return Selection(dict(values), {}, difference(log_p.squeeze(0), bound))

    # Away from Pyro's handlers

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Without a graph, on one minibatch, and out of reach of the handlers outside, but for parameters."""
        hidden = poutine.block(hide_fn=lambda msg: msg["type"] != "param")
        with graph_if(False), block_messengers(lambda m: isinstance(m, LiftMessenger)), hidden, Minibatch():
            yield

    @in_one_thread
    def sample(self, num_draws: int, *args: Any, method: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draws from q_EW: independent ones, each with K particles of its own, or many from the same K.

        All draws are of one minibatch where a plate is subsampled; say ``pyro.plate(..., subsample=indices)`` to
        know which. The same holds for the methods below.

        Args:
            num_draws: how many.
            args: passed to model and guide.
            method: None gives each draw K particles of its own. Others draw all from one batch of K, which costs K
                particles in all, with K far above ``num_draws``: "multinomial", each by weight; "systematic", likewise
                with the least noise; "without_replacement", different ones, which together are flatter than the
                weights; "psis", each by Pareto smoothed weights.
            kwargs: passed to model and guide.

        Returns:
            By name of the model's latent (enumerated ones included), ``(num_draws, *site shape)``, without a graph.
            With a method they are :class:`~pyro_iwae.pooled.Draws`, whose ``num_distinct`` tells how many differ.

        Raises:
            ValueError: where the latents differ from draw to draw, or there is no such method.
            RuntimeError: where so many draws do not fit in memory.
            NotImplementedError: where a method meets ``chunk_size`` or ``process_group``.

        Warns:
            UserWarning: with a method, where one particle has more than half of an element's weight.
        """
        num_draws = as_count("num_draws", num_draws)
        if method is not None:
            require_method(method, self.chunk_size, shared=self._ranks is not None)
            call = self._call(args, kwargs)
            with self._apart():
                return draw_pooled(call, self._weigh(call), num_draws, method)
        call = self._call(args, kwargs)
        with self._apart(), self._together(call, "sample"):
            first = in_all(self._ranks, lambda: self._weigh(call, 1, averaged=False))
            structure, pair = first.structure, first.pairs[0]
            if not [*latent_sites(pair.model), *latent_sites(pair.guide)]:
                return {}
            if not structure.run.vectorized:
                return _stacked([self(*args, **kwargs) for _ in range(num_draws)])
            most = structure.run.tree.most(self.num_particles)
            most = most if self.chunk_size is None else min(most, self.chunk_size)
            per_pass = max(1, NUMBERS_PER_PASS // (most * max(1, structure.numbers)))
            plate = partial(ParticlePlate, "_importance_draws", dim=-structure.run.depth - 1)
            if min(per_pass, num_draws) > 2:
                self._look_at_draws(call, plate(2))
            blocks: list[dict[str, Tensor]] = []
            for start in range(0, num_draws, per_pass):
                with plate(min(per_pass, num_draws - start)):
                    block = {n: _strip(v, n, structure) for n, v in self(*args, **kwargs).items()}
                if not blocks:
                    require_room(num_draws, block)
                blocks.append(block)
        return {n: torch.cat([b[n] for b in blocks]) for n in blocks[0]}

    def _look_at_draws(self, call: Call, two: ParticlePlate) -> None:
        """Has the verdict on draws in a plate taken on two of them: it holds for any number, and takes many runs."""
        options = {**self._options(True), "minibatch": Minibatch()}
        with two:
            inside = replace(call, enclosing=enclosing_frames())
            with self._inside():
                in_all(self._ranks, Question(inside, num_particles=self.num_particles, **options).answer)

    @in_one_thread
    def expectation(
        self, fn: Callable[[dict[str, Tensor]], Tensor], *args: Any, num_batches: int = 32, **kwargs: Any
    ) -> Tensor:
        """E[fn(z)] under q_EW by weighting: sum_k v_k fn(z_k), without the noise of resampling.

        Args:
            fn: takes what :meth:`sample` returns for K draws, a dict of ``(K, *site shape)`` (enumerated sites
                drawn for each), and returns ``(K, *shape)``. With independent plates each element is weighed by
                itself, so fn must keep their dimensions apart.
            args: passed to model and guide.
            num_batches: batches of K particles to average over.
            kwargs: passed to model and guide.

        Returns:
            Shape ``(*shape)``, without a graph.

        Raises:
            ValueError: where fn loses the particles' dimension, or mixes elements of independent plates.
        """
        if not callable(fn):
            raise TypeError(f"expected fn to be a function of the draws, as in lambda z: z['theta'], got {fn!r}")
        call, num_batches = self._call(args, kwargs), as_count("num_batches", num_batches)
        total: Tensor | float = 0.0
        with self._apart(), self._together(call, "expectation") as sharing:
            for _ in range(num_batches):
                total = total + (self._mean(fn, call) if sharing is None else self._shared_mean(fn, call, sharing))
        return torch.as_tensor(total / num_batches)

    def _mean(self, fn: Callable[[dict[str, Tensor]], Tensor], call: Call) -> Tensor:
        """The mean over one batch of particles."""
        chunks = self._chunks(call, least=2)  # of one fn would not tell its dimensions
        return _weighed(fn, call, chunks, lambda: self._weigh(call))[0].value

    def _shared_mean(self, fn: Callable[[dict[str, Tensor]], Tensor], call: Call, sharing: Sharing) -> Tensor:
        """The same over particles of which each process has a part."""
        if self.num_particles < 2 * sharing.ranks.size:
            raise ValueError(
                f"expected num_particles >= {2 * sharing.ranks.size}, two for each process of the group (of one, fn "
                f"would not tell its dimensions), got {self.num_particles}; take more particles"
            )

        def draw() -> tuple[WeightedMean, LogWeights]:
            return _weighed(fn, call, sharing.chunks(least=2), sharing.weigh)

        mean, _ = sharing.drawn(draw, lambda found: found[1])
        return mean.gathered(sharing.ranks.gather, self.num_particles)

    @in_one_thread
    def log_density(
        self, draws: Mapping[str, Tensor], *args: Any, num_batches: int = 32, **kwargs: Any
    ) -> Float[Tensor, "draws *plates"]:
        """Estimate of log q_EW at given draws; unbiased for the density itself.

        log p(x, z) + log K - log M + logsumexp_m( -log(w(z) + S_m) ), with S_m the sum of K - 1 fresh weights.

        Args:
            draws: by name of the model's latents, ``(draws, *site shape)``, as :meth:`sample` returns them.
            args: passed to model and guide.
            num_batches: M, batches of companions, shared by the draws.
            kwargs: passed to model and guide.

        Returns:
            In nats, shape ``(draws, *independent plates)``.

        Raises:
            ValueError: where the weights are tempered.
            NotImplementedError: where the guide's density at given values is not known.
        """
        num_batches = as_count("num_batches", num_batches)
        require_draws("draws", draws, stacked=True)
        call = self._call(args, kwargs)
        with self._apart(), self._together(call, "log_density") as sharing:
            at, log_p, weigh = self._at(call, dict(draws), None if sharing is None else sharing.turn.minibatch)
            _refuse_tempered(at.weights, "log_density")
            batches = (self._companions(call, at.minibatch, sharing).log_weights for _ in range(num_batches))
            sums = torch.stack([batch[1:].logsumexp(0) for batch in batches])
            log_weights = torch.stack([weigh() for _ in range(num_batches)], 1)
            return log_density(log_p, log_weights, sums, num_particles=self.num_particles)

    @in_one_thread
    def elbo_interval(self, *args: Any, num_batches: int = 32, num_replicates: int = 16, **kwargs: Any) -> ElboInterval:
        """Lower and upper bound on ELBO[q_EW], which is never below the importance weighted bound.

        For a draw with weight w and its companions' sum S_0, and the sums S_1..S_M of fresh companions, the lower
        bound is the mean of -log( K/(M+1) sum_{m=0..M} 1/(w + S_m) ), the upper one that without m = 0. (M = 0 gives
        the importance weighted bound itself.) The upper one bounds ELBO[q_EW], not the evidence.

        Args:
            args: passed to model and guide.
            num_batches: M; the interval closes as it grows.
            num_replicates: independent repeats, for the standard errors.
            kwargs: passed to model and guide.

        Returns:
            Both bounds with standard errors, per independent element, in nats, unscaled.

        Raises:
            ValueError: where the weights are tempered.
        """
        num_batches = as_count("num_batches", num_batches)
        num_replicates = as_count("num_replicates", num_replicates, least=2)
        call = self._call(args, kwargs)
        with self._apart(), self._together(call, "elbo_interval") as sharing:
            bounds = torch.stack([self._bracket(call, num_batches, sharing) for _ in range(num_replicates)])
        mean, error = bounds.mean(0), bounds.std(0) / math.sqrt(num_replicates)
        return ElboInterval(mean[0], mean[1], error[0], error[1])

    def _bracket(self, call: Call, num_batches: int, sharing: Sharing | None) -> Tensor:
        """(lower, upper) from M + 1 batches: each gives a draw, and fresh companions for the draws of the others."""
        if self._wanted is None:
            minibatch = Minibatch()
            batches = [self._companions(call, minibatch, sharing) for _ in range(num_batches + 1)]
            _refuse_tempered(batches[0], "elbo_interval")
            return elbo_bracket(torch.stack([batch.log_weights for batch in batches]))
        passed = self._select(call, sharing)
        first, values = passed.particles, passed.selection.values
        _refuse_tempered(first.weights, "elbo_interval")
        others = (self._companions(call, first.minibatch, sharing).log_weights[1:] for _ in range(num_batches))
        rest = [log_weights.logsumexp(0) for log_weights in others]
        _, _, weigh = self._at(call, {n: v.unsqueeze(0) for n, v in values.items()}, first.minibatch)
        fresh = torch.stack([torch.logaddexp(weigh().squeeze(0), log_sum) for log_sum in rest])
        return drawn_bracket(passed.log_sum, fresh, num_particles=self.num_particles)

    def _companions(self, call: Call, minibatch: Minibatch, sharing: Sharing | None) -> LogWeights:
        """The weights of K fresh particles."""
        if sharing is not None:
            return sharing.all_values()
        chunks = self._chunks(call, minibatch)
        if chunks is None:
            return self._weigh(call, minibatch=minibatch).weights
        return chunks.values()


def _weighed(
    fn: Callable[[dict[str, Tensor]], Tensor], call: Call, chunks: Chunks | None, weigh: Callable[[], Particles]
) -> tuple[WeightedMean, LogWeights]:
    """The mean of fn over particles, together or in chunks; and weights, those of the last chunk."""
    mean = WeightedMean(fn)
    for particles in [weigh()] if chunks is None else chunks.with_guide_once(cut=False).draw():
        mean.add(*model_values(call, particles), particles.weights, particles.layout)
        weights = particles.weights
        del particles
    return mean, weights


def _stacked(draws: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    for draw in draws:
        if {n: v.shape for n, v in draw.items()} != {n: v.shape for n, v in draws[0].items()}:
            raise ValueError(
                f"expected the same latents of the same shapes in every draw, got {sorted(draws[0])} and "
                f"{sorted(draw)}; call the posterior itself for one draw at a time, a dict by name"
            )
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]}


def _require_enclosing(layout: Layout, enclosing: Sequence[CondIndepStackFrame]) -> None:
    for frame in enclosing:
        if frame.size > 1 and frame.dim not in layout.dims:
            raise ValueError(
                f"expected model and guide to treat the elements of plate '{frame.name}' (dim={frame.dim}) apart"
                ", got sites that mix them: draws would not be independent. Count dimensions from the right (dim=-1), "
                "or draw one by one: Predictive(..., parallel=False), vectorize_particles=False"
            )


def _refuse_tempered(weights: LogWeights, method: str) -> None:
    if weights.tempered:
        raise ValueError(
            f"{method} got weights tempered by a poutine.scale around some sites of model or guide; they are no "
            "densities. Take the scale away, or put it around model and guide alike"
        )


def _strip(value: Tensor, name: str, structure: Structure) -> Tensor:
    """A value drawn in a plate of draws, as ``(draws, *site shape)``."""
    extra = structure.run.depth - structure.batch_dims.get(name, structure.run.depth)
    return value.reshape(value.shape[:1] + value.shape[1 + extra :])
