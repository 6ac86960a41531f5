# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO that takes the place of ``Trace_ELBO`` and optimises the importance weighted bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import torch_item, zero_grads
from pyro.poutine import Trace
from torch import Tensor

from pyro_iwae.backward import weigh_drawn
from pyro_iwae.chunks import Chunks, chunks_of, require_chunk_size
from pyro_iwae.compiled import CompiledSteps
from pyro_iwae.distributed import Grouped
from pyro_iwae.gradients import OVIS, Coefficients, PathGradient, Pathwise, SampledBackward, ScoreGradient
from pyro_iwae.logweights import LogWeights
from pyro_iwae.memory import advice_on_memory
from pyro_iwae.objectives import Objective
from pyro_iwae.options import as_count, require_callables, require_gradients, require_options, require_switch
from pyro_iwae.particles import Call
from pyro_iwae.plates import latent_sites, nesting
from pyro_iwae.sharing import Sharing
from pyro_iwae.state import get_random_state, modules_behind, set_random_state
from pyro_iwae.step import handed_out
from pyro_iwae.structure import StructureCache
from pyro_iwae.threads import in_one_thread
from pyro_iwae.totals import LogMean, Totals
from pyro_iwae.traces import Recording, fill_densities, require_site_shapes, run_pair
from pyro_iwae.tree import PlateParticles, Tree
from pyro_iwae.weighing import Particles, sites_at_fault, weigh_particles

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["ImportanceWeightedELBO"]

Program = Callable[..., Any]
PARTICLES_PER_PASS = 16  # without a graph; few enough to stay in a CPU's cache, which is what pays there


def _require_kind(name: str, value: Any, kind: type, example: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"expected {name} to be {example}, got {value!r}")


class ImportanceWeightedELBO(Grouped, ELBO):
    r"""The importance weighted bound log (1/K) sum_k p(x, z_k) / q(z_k | x), maximised over model and guide.

    It takes the place of :class:`~pyro.infer.Trace_ELBO` in any Pyro model and guide::

        svi = SVI(model, guide, optim, loss=ImportanceWeightedELBO(num_particles=64))

    The bound is never looser in expectation than the ELBO and tightens as K grows. Each element of an *independent
    plate* (one that contains every latent) gets its own log-mean-exp; ``preflight`` tells which plates are. With
    one particle it is ``Trace_ELBO`` (``TraceEnum_ELBO`` where sites are enumerated), value and gradient.

    See "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2016, https://arxiv.org/abs/1509.00519)
    and "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
    https://arxiv.org/abs/1704.02916).

    Args:
        num_particles: K, a whole number of at least 1.
        max_plate_nesting: as for ``Trace_ELBO``; by default found for each model and guide.
        max_iarange_nesting: Pyro's deprecated name for it.
        vectorize_particles: None runs all particles in one pass where a check on the first call finds that they
            come out as in sequential runs, and otherwise warns once and runs them one after the other. True and
            False force.
        strict_enumeration_warning: warn when a guide site that asks for enumeration is sampled, as it is for K > 1
            (the exact expectation would have C^K terms).
        ignore_jit_warnings: accepted as by every ELBO; nothing here goes through ``torch.jit``, so it does nothing.
        jit_options: likewise accepted, and does nothing.
        retain_graph: passed to ``backward`` by :meth:`loss_and_grads`.
        tail_adaptive_beta: accepted as by every ELBO; of use to ``TraceTailAdaptive_ELBO`` only.
        plate_particles: further particles of the latents of some plates, inside each of the ``num_particles``, by the
            plate's name, as in ``{"data": 64}``: each element of such a plate gets a log-mean-exp of its own inside
            the weight. ``"auto"`` gives every plate that owns latents ``num_particles`` of them. With
            ``num_particles=1`` such plates may be subsampled.
        combine: whether the particles of a plate are drawn once, and serve all particles further out: K x M
            combinations from K + M draws. The guide must draw them independently of what is further out.
        objective: what to optimise in place of the importance weighted bound: :class:`Renyi`, :class:`MIWAE`,
            :class:`PIWAE`, :class:`CIWAE`, :class:`TVO`.
        gradient: estimator for the model and for reparameterised guide sites: :class:`Pathwise` (the default),
            :class:`StickTheLanding`, :class:`DoublyReparameterized`, :class:`SampledBackward`.
        process_group: the processes over which the particles are shared out: a group of ``torch.distributed``, or a
            ``DeviceMesh`` of one dimension. Each weighs its part and gets the loss of all K and, after ``backward()``,
            the gradient of all K, as one process would with the same particles. All make the same calls with the same
            data; random numbers differ by themselves. See ``docs/distributed``.
        chunk_size: at most so many particles in memory at once; None is all. Value and gradient are those of all K on
            the same particles, in about 40 % more time. Where plates have particles of their own, those are
            counted that lie inside one chunk of the ``num_particles``, which must be one at least.
            The guide runs once where its
            distributions depend on no draw, else once for each chunk. Under :class:`SampledBackward` the model runs in
            such chunks, and the guide's values are held for all K.
        score: estimator for the other guide sites, :class:`OVIS` or :class:`VIMCO`; None is :class:`OVIS`, which
            measures better (for a coin, 9 times less noise with 5 particles and 200 times with 100).
        compile: records loss and gradient once as a graph of tensor operations, compiles it (where there is a C++
            compiler) and runs that from then on, with fresh random numbers at each step. For models of static
            structure. A recording reads parameters and the tensors among the arguments anew; Python's numbers are
            frozen as they were. It is made anew where arguments have another shape, dtype or device, where those
            that are no tensors differ, and where model, guide or their parameters are other objects. Every thousandth
            step is compared with a step of model and guide.

    Raises:
        TypeError: where an option has the wrong type.
        ValueError: where ``num_particles`` or ``chunk_size`` is below 1, or there are fewer particles than processes.
        NotImplementedError: where ``chunk_size`` or ``process_group`` meets ``combine=True``, whose inner particles
            serve all outer ones, or ``process_group`` meets ``compile=True``.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([1.0, -1.0])
        >>> bound = ImportanceWeightedELBO(num_particles=4).bound(model, guide, x)  # the guide is the posterior:
        >>> torch.allclose(bound, dist.Normal(0.0, 2**0.5).log_prob(x))  # the bound is the evidence
        True
        >>> elbo = ImportanceWeightedELBO(num_particles=1000, chunk_size=50)  # the memory of fifty
        >>> abs(elbo.loss(model, guide, x) + bound.sum().item()) < 1e-4
        True
    """

    def __init__(
        self,
        num_particles: int = 10,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: float | None = None,
        vectorize_particles: bool | None = None,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: Mapping[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        plate_particles: Mapping[str, int] | str | None = None,
        combine: bool = False,
        objective: Objective | None = None,
        gradient: PathGradient | None = None,
        score: ScoreGradient | None = None,
        compile: bool = False,
        chunk_size: int | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__(
            num_particles=as_count("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=False,  # Pyro's base class would count the particles' plate into max_plate_nesting
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        require_options(vectorize_particles, self.max_plate_nesting)
        _require_kind("objective", objective, Objective, "an objective such as Renyi(0.5) or MIWAE(8)")
        _require_kind("gradient", gradient, PathGradient, "an estimator such as Pathwise() or DoublyReparameterized()")
        _require_kind("score", score, ScoreGradient, "an estimator such as OVIS() or VIMCO()")
        require_switch("compile", compile)
        require_switch("strict_enumeration_warning", strict_enumeration_warning)
        if retain_graph is not None:
            require_switch("retain_graph", retain_graph)
        PlateParticles.of(plate_particles, num_particles=1, combine=combine)
        self.vectorize_particles = vectorize_particles
        self.plate_particles = plate_particles
        self.combine = combine
        self.objective = objective
        self.gradient = Pathwise() if gradient is None else gradient
        self.score = OVIS() if score is None else score
        self.compile = compile
        if compile and chunk_size is not None:
            raise ValueError(
                f"compile=True records all {num_particles} particles as one graph, got chunk_size={chunk_size} "
                "beside it; write compile=False, or gradient=SampledBackward() alone, whose memory is small"
            )
        self.chunk_size = require_chunk_size(chunk_size, combine=combine)
        self.process_group = process_group
        if isinstance(gradient, SampledBackward) and chunk_size is not None and gradient.draws > chunk_size:
            raise ValueError(
                f"expected chunk_size >= {gradient.draws}, the particles that {gradient!r} goes back through together, "
                f"got {chunk_size}; lower draws"
            )
        self._structures = StructureCache()
        self._recorded = CompiledSteps(self._step)
        if self._ranks is not None:
            self._ranks.share(self.num_particles)  # is there one for each?
        if objective is not None:
            objective.require_count(self.num_particles)

    def __call__(self, model: Any, guide: Any) -> ELBOModule:
        """The loss of a model and guide as a module, called with their arguments, for torch's optimisers and DDP.

        It has the parameters of the modules that model and guide are, or are methods of.
        """
        require_callables(model, guide)
        module = ELBOModule(model, guide, self)
        behind = modules_behind(model, guide)
        if behind:
            module.behind = torch.nn.ModuleList(behind)
        return module

    @in_one_thread
    def log_weights(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> LogWeights:
        """Draws K particles and weighs them.

        Args:
            model: the model.
            guide: the guide.
            args: passed to both.
            kwargs: passed to both.

        Returns:
            The log weights, shape ``(K, *independent plates)``, in nats, with what belongs to them. Under
            ``chunk_size`` their graph is made again, chunk by chunk, when ``backward()`` goes through it. Under
            ``process_group`` they are those of all processes, and have no graph.

        Raises:
            TypeError: where model or guide is not callable.
            ValueError: where latents do not match, a weight is NaN or +inf, or a subsampled plate that is not
                independent meets K > 1. The message names the site and plate and says what to write instead.
        """
        call = Call(model, guide, args, kwargs)
        if self._ranks is not None:
            with self._shared(call, "log_weights") as sharing:
                return sharing.all_weights()
        chunks = self._chunks(call)
        return self._draw(call).weights if chunks is None else chunks.weigh()

    @in_one_thread
    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The bound (or the other objective) for each independent plate element, in nats.

        Unscaled, and without the terms that no latent reaches (``log_weights(...).constant``); ``-loss`` is the
        scaled sum of all.

        Returns:
            Shape ``(*independent plates)``, a scalar where no plate is independent; under ``process_group`` without a
            graph.
        """
        if self._ranks is not None:
            with self._shared(Call(model, guide, args, kwargs), "bound") as sharing:
                return self._shared_totals(sharing)[1].value
        weights = self.log_weights(model, guide, *args, **kwargs)
        if self.objective is None:
            return weights.bound()
        totals = self.objective.totals(weights.log_weights)
        slope = totals.slope(weights.log_weights)
        surrogate = Coefficients(slope, slope, slope, slope).surrogate(weights)
        return totals.value + (surrogate - surrogate.detach())

    @in_one_thread
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, scaled and summed over elements, in nats."""
        if self._ranks is not None:
            return -torch_item(self._shared_value(Call(model, guide, args, kwargs)))
        if self._is_single:  # any objective is the ELBO then, whatever its gradient
            return float(self._single("loss", model, guide, args, kwargs))
        weights = self._values(Call(model, guide, args, kwargs))
        return -torch_item(weights.total(self._totals(weights).value))

    @in_one_thread
    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor whose ``backward()`` gives the gradient estimate."""
        call = Call(model, guide, args, kwargs)
        if self.compile and self._ranks is None and torch.is_grad_enabled():
            result = self._recorded.step(call, self._frozen)
            if result is not None:
                return handed_out(result)
        if self._is_pyros:
            return self._single("differentiable_loss", model, guide, args, kwargs)
        return self._step(call)[1]

    @in_one_thread
    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats; adds the gradient estimate to the ``grad`` of every parameter.

        Raises:
            RuntimeError: where gradients are turned off, as in ``torch.no_grad()``.
            ValueError: also where a parameter's gradient comes out as NaN because a site's log density is -inf.
        """
        require_gradients(
            "loss_and_grads (and so in SVI.step)", "loss(...) or svi.evaluate_loss(...) for the value alone"
        )
        call = Call(model, guide, args, kwargs)
        if self.compile and self._ranks is None:
            result = self._recorded.step(call, self._frozen)
            if result is not None:
                return result.accumulated()
        if self._is_pyros:
            return float(self._single("loss_and_grads", model, guide, args, kwargs))
        particles, loss = self._step(call)
        if loss.requires_grad:
            tree = Tree() if particles is None else particles.structure.run.tree
            with advice_on_memory(self.num_particles, tree, chunked=particles is None):
                loss.backward(retain_graph=self.retain_graph)
            if particles is not None:
                _refuse_nan_gradients(particles)
        return torch_item(loss)

    def _draw(self, call: Call, recording: Recording | None = None) -> Particles:
        require_callables(call.model, call.guide)
        count = as_count("num_particles", self.num_particles)
        return weigh_particles(call, num_particles=count, recording=recording, **self._options())

    def _values(self, call: Call) -> LogWeights:
        """Weights whose gradients nobody wants."""
        chunks = self._chunks(call)
        return self._draw(call).weights if chunks is None else chunks.values()

    def _chunks(self, call: Call) -> Chunks | None:
        """How the particles are run if they are more than may be in memory; None if not."""
        require_callables(call.model, call.guide)
        count, size = as_count("num_particles", self.num_particles), self.chunk_size
        return chunks_of(call, num_particles=count, chunk_size=size, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "cache": self._structures,
            "vectorize": self.vectorize_particles,
            "max_plate_nesting": self.max_plate_nesting,
            "warn_of_enumeration": self.strict_enumeration_warning,
            "plate_particles": self._wanted,
        }

    @property
    def _wanted(self) -> PlateParticles | None:
        """The plates that have particles of their own; None where there is one of each in all."""
        count = as_count("num_particles", self.num_particles)
        wanted = PlateParticles.of(self.plate_particles, num_particles=count, combine=self.combine)
        return None if wanted is None or (count == 1 and wanted.most == 1) else wanted

    @property
    def _is_single(self) -> bool:
        """Whether there is one particle of everything, so that every objective is the ELBO."""
        return self._ranks is None and self.num_particles == 1 and self._wanted is None

    def _totals(self, weights: LogWeights) -> Totals:
        return weights.totals() if self.objective is None else self.objective.totals(weights.log_weights)

    def __copy__(self) -> ImportanceWeightedELBO:
        """A copy whose options are its own, and so its verdicts and recordings."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied._structures = StructureCache()
        copied._recorded = CompiledSteps(copied._step)
        return copied

    def recapture(self) -> None:
        """Has steps recorded anew (``compile=True``): after a change of what a recording takes for granted."""
        self._recorded.recapture()

    @property
    def _frozen(self) -> tuple[Any, ...]:
        """What a recording depends on beside model, guide and arguments."""
        plates = repr(self.plate_particles)
        own = (self.num_particles, plates, self.combine, self.vectorize_particles, self.max_plate_nesting)
        return (*own, self.objective, self.gradient, self.score)

    def _step(self, call: Call) -> tuple[Particles | None, Tensor]:
        """The loss, value of the objective and gradient of the surrogates; and the particles, if all were there."""
        if self._ranks is not None:
            return None, self._shared_loss(call)
        if not torch.is_grad_enabled():
            weights = self._values(call)
            return None, -weights.total(self._totals(weights).value)
        gradient, recording = self._estimator(self.num_particles)
        chunks = None if isinstance(gradient, SampledBackward) else self._chunks(call)
        if chunks is not None:
            return chunks.loss(
                self._totals,
                partial(self._surrogate, gradient),
                recording=recording,
                retain_graph=self.retain_graph,
            )
        particles = self._draw(call, recording)
        totals = self._totals(particles.weights)
        if self.num_particles == 1:
            _require_sampled(particles)
        weights, surrogate = self._estimate(gradient, call, particles, totals)
        return particles, -weights.total(totals.value + (surrogate - surrogate.detach()))

    def _estimator(self, together: int) -> tuple[PathGradient, Recording]:
        """The estimator, and what it needs recorded of so many particles that run together."""
        gradient = self.gradient
        if isinstance(gradient, SampledBackward) and together <= gradient.draws:
            gradient = gradient.inner
        separates = self.objective is not None and self.objective.separates
        recording = Recording(cut=gradient.cuts or separates, leaves_out=gradient.cuts)
        if not isinstance(gradient, SampledBackward):
            return gradient, recording
        if self._wanted is not None:
            raise NotImplementedError(
                "SampledBackward draws among particles of the root, and has no gradient where plates have particles of "
                f"their own; write gradient={gradient.inner!r} with plate_particles={self.plate_particles!r}"
            )
        block = min(max(PARTICLES_PER_PASS, 2 * gradient.draws), self.chunk_size or together)
        return gradient, replace(recording, model=False, block=block)

    def _surrogate(self, gradient: PathGradient, weights: LogWeights, totals: Totals) -> Tensor:
        return gradient.surrogate(weights, totals) + self.score.surrogate(weights, totals)

    def _estimate(
        self, gradient: PathGradient, call: Call, particles: Particles, totals: Totals
    ) -> tuple[LogWeights, Tensor]:
        """The weights of the particles that are sent back, and the surrogate."""
        if not isinstance(gradient, SampledBackward):
            return particles.weights, self._surrogate(gradient, particles.weights, totals)
        coefficients = gradient.coefficients(particles.weights, totals)
        index, count = gradient.draw(coefficients.model)
        weights = weigh_drawn(call, particles, index, count)
        surrogate = coefficients.drawn(index, count).surrogate(weights)
        return weights, surrogate + self.score.surrogate(particles.weights, totals)

    # Particles shared out over processes

    def _shared(self, call: Call, what: str) -> AbstractContextManager[Sharing]:
        assert self._ranks is not None
        require_callables(call.model, call.guide)
        count = as_count("num_particles", self.num_particles)
        self._require_shareable()
        way = self.objective, self.gradient, self.score
        return Sharing.begun(self._ranks, what, call, count, self.chunk_size, self._options(), way)

    def _require_shareable(self) -> None:
        if self.compile:
            raise NotImplementedError(
                "compile=True records the step of one process, got process_group beside it; write compile=False"
            )
        if self.combine:
            raise NotImplementedError(
                "combine=True weighs every combination of particles at once, of which each process would have a part "
                "alone; write combine=False, or leave process_group out"
            )

    def _shared_totals(self, sharing: Sharing) -> tuple[LogWeights, Totals]:
        """The weights of this process's particles, and the objective at all K."""
        weights, sites = sharing.values()
        return weights, sharing.totals(weights, self._totals_of_part, sites)

    def _shared_value(self, call: Call) -> Tensor:
        """The objective, scaled and summed, without a graph."""
        with self._shared(call, "loss") as sharing:
            return sharing.value(*self._shared_totals(sharing))

    def _shared_loss(self, call: Call) -> Tensor:
        if not torch.is_grad_enabled():
            return -self._shared_value(call)
        with self._shared(call, "a step") as sharing:
            start, stop = sharing.part
            gradient, recording = self._estimator(stop - start)
            return sharing.loss(
                self._totals_of_part,
                partial(self._estimate, gradient, call),
                partial(self._surrogate, gradient),
                recording=recording,
                whole=isinstance(gradient, SampledBackward),
                retain_graph=self.retain_graph,
            )

    def _totals_of_part(self, log_weights: Tensor, start: int, count: int) -> Totals:
        if self.objective is None:
            return LogMean.of(log_weights)
        return self.objective.totals_of_part(log_weights, start, count)

    # One particle: Pyro's own estimators, on traces that are checked here.

    @property
    def _is_pyros(self) -> bool:
        """Whether there is one particle, whose objective is the ELBO, and its gradient the ordinary one."""
        inner = self.gradient.inner if isinstance(self.gradient, SampledBackward) else self.gradient
        return self._is_single and (isinstance(inner, Pathwise) or not torch.is_grad_enabled())

    def _single(self, method: str, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        require_callables(model, guide)
        key = self._structures.key(model, guide)
        depth = self._structures.enumerated.get(key)
        if depth is None:
            random = get_random_state()
            try:
                single = _SingleParticle(retain_graph=self.retain_graph)
                return getattr(single, method)(model, guide, *args, **kwargs)
            except _EnumerationAsked as asked:
                set_random_state(random)
                depth = self._structures.enumerated[key] = asked.depth
        exact = TraceEnum_ELBO(
            max_plate_nesting=depth if self.max_plate_nesting == math.inf else self.max_plate_nesting,
            retain_graph=self.retain_graph,
            strict_enumeration_warning=False,
        )
        return getattr(exact, method)(model, guide, *args, **kwargs)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """One particle's traces (abstract in Pyro's base class)."""
        return _SingleParticle()._get_trace(model, guide, args, kwargs)


def _require_sampled(particles: Particles) -> None:
    """Raises where one particle would sample a guide site that asks for enumeration, which ``Pathwise`` sums out."""
    names = [n for n, s in latent_sites(particles.pairs[0].guide) if s["infer"].get("enumerate")]
    if names:
        raise NotImplementedError(
            f"expected a guide without enumerated sites, got {names}: their exact expectation comes from "
            "TraceEnum_ELBO, whose gradient is the pathwise one. Write gradient=Pathwise(), or take more than one "
            "particle to have them sampled"
        )


class _EnumerationAsked(Exception):
    """Sites of model or guide ask to be enumerated, which is for ``TraceEnum_ELBO`` to do."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.depth = depth


class _SingleParticle(Trace_ELBO):
    """``Trace_ELBO`` with this package's errors."""

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        pair = run_pair(model, guide, args, kwargs)
        if any(s["infer"].get("enumerate") for t in (pair.model, pair.guide) for _, s in latent_sites(t)):
            raise _EnumerationAsked(nesting((pair.model, pair.guide)))
        require_site_shapes(pair, math.inf)
        fill_densities(pair)
        return pair.model, pair.guide


def _refuse_nan_gradients(particles: Particles) -> None:
    """Raises where a particle of weight 0 has put NaN into a gradient: 0 times the slope of -inf."""
    if bool((particles.weights.log_weights > -math.inf).all()):
        return
    traces = [t for pair in particles.pairs for t in (pair.model, pair.guide)]
    params: dict[str, Any] = {n: t.nodes[n]["value"] for t in traces for n in t.param_nodes}
    bare = {n: p.unconstrained() for n, p in params.items()}
    faulty = sorted(n for n, p in bare.items() if p.grad is not None and bool(p.grad.isnan().any()))
    if not faulty:
        return
    zero_grads(bare.values())  # or they would poison the next step
    raise ValueError(
        f"the gradient of parameter '{faulty[0]}' is NaN: site {sorted(sites_at_fault(particles))} has log density "
        "-inf at some particles with a slope that is not finite; keep the guide within the model's support, or bound "
        "what that site computes (torch.where before the log, not after)"
    )
