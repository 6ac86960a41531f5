# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The posterior that the importance weighted bound implies, as a Pyro guide: draw K, weigh, keep one by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.autoguide import AutoGuide, AutoMessenger
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.messenger import block_messengers
from torch import Tensor

from pyro_iwae.density import elbo_bracket, log_density
from pyro_iwae.elbo import as_count, require_callables
from pyro_iwae.emission import Boundary, Emission, Selection
from pyro_iwae.expectation import weighted_mean
from pyro_iwae.gradients import VIMCO, Pathwise
from pyro_iwae.inspection import unchanged_state
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import (
    EnclosingPlates,
    Minibatch,
    enclosing_frames,
    run_particles,
    select,
    settable,
    spread_value,
    stacked_latents,
    stacked_value,
    unchanged_enumeration,
)
from pyro_iwae.plates import Layout, Site, latent_sites
from pyro_iwae.resampling import multinomial
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.terms import joint_log_density, model_log_density
from pyro_iwae.traces import Pair
from pyro_iwae.unconstrain import auxiliary_values
from pyro_iwae.weighing import Particles, weigh_particles

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


class ImportanceResampledGuide(torch.nn.Module):
    """q_EW: draw K particles from the guide, weigh them by the model, keep one by its weight.

    A guide like any other, for ``Predictive``, effect handlers and other ELBOs, and closer to the posterior than
    the guide that it is made of: K = 1 is that guide, K to infinity the posterior. Each independent element makes its
    own choice, each draw has its own K particles. Under ``Trace_ELBO`` the value of a draw is the log-mean-exp of its
    weights and its gradient that of the importance weighted bound.

    See "Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017,
    https://arxiv.org/abs/1704.02916).

    Args:
        model: the model that the guide was trained for.
        guide: the guide.
        num_particles: how many particles, K.
        vectorize_particles: as for :class:`ImportanceWeightedELBO`.
        max_plate_nesting: likewise.

    Raises:
        TypeError: where an argument has the wrong type.
        ValueError: where ``num_particles`` is below 1.

    Example::

        >>> import pyro.distributions as dist
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
        vectorize_particles: bool | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__()
        require_callables(model, guide)
        self.model = model
        self.guide = guide
        self.num_particles = as_count("num_particles", num_particles)
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = max_plate_nesting
        self._structures = StructureCache()
        self._is_set_up = False

    # As a guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Emits one draw as sample sites, and its log density as a factor; returns the values by name."""
        enclosing = enclosing_frames()
        with self._inside():
            self._set_up(args, kwargs, enclosing)
            particles = self._particles(args, kwargs, enclosing, self.num_particles)
            _require_enclosing(particles.layout, enclosing)
            index = multinomial(particles.weights.log_weights)
            selection = self._select(particles, index, args, kwargs, enclosing)
        emit = Emission(particles, selection, enclosing)
        with particles.minibatch:
            emitted = emit.values()
        if any(not _same(emitted[n], v) for n, v in selection.values.items()):  # replayed, conditioned, ...
            with self._inside():
                selection = self._density_at(emitted, particles, args, kwargs, enclosing)
        with particles.minibatch:
            emit.density(selection.log_density)
            if particles.structure.run.vectorized:  # else no plate can go around it
                emit.plates()
        return emitted

    def _set_up(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], enclosing: Sequence[CondIndepStackFrame]
    ) -> None:
        """Lets an autoguide take its shape from the model itself, not from the plates around its first call."""
        if enclosing and isinstance(poutine.unwrap(self.guide), AutoGuide | AutoMessenger) and not self._is_set_up:
            with unchanged_state(), poutine.block():
                self.guide(*args, **kwargs)
        self._is_set_up = True

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Where the inner run happens: handlers outside do not reach it, but for parameters and minibatches."""
        with block_messengers(lambda m: isinstance(m, LiftMessenger)), Boundary():
            yield

    def _particles(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
        num_particles: int,
        *,
        values: Mapping[str, Tensor] | None = None,
        minibatch: Minibatch | None = None,
    ) -> Particles:
        return weigh_particles(
            self.model,
            self.guide,
            args,
            kwargs,
            num_particles=num_particles,
            cache=self._structures,
            vectorize=self.vectorize_particles,
            max_plate_nesting=self.max_plate_nesting,
            enclosing=enclosing,
            values=values,
            minibatch=minibatch,
        )

    def _select(
        self,
        particles: Particles,
        index: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
    ) -> Selection:
        one_each = not particles.layout.plates and len(particles.pairs) > 1  # sites may differ between particles
        sites = dict(latent_sites(particles.pairs[int(index) if one_each else 0].guide))
        chosen = {n: v.squeeze(0) for n, v in _select_latents(particles, index).items()}
        log_p = torch.cat([model_log_density(p, particles.layout) for p in particles.pairs])
        log_p = log_p.expand(particles.weights.log_weights.shape).gather(0, index.unsqueeze(0)).squeeze(0)
        if particles.structure.run.enumerated:
            depth, minibatch = particles.structure.run.depth, particles.minibatch
            trace = self._draw_enumerated(chosen, minibatch, depth, args, kwargs, enclosing)
            drawn = dict(latent_sites(trace))
            layout = Layout(particles.layout.plates, None)
            log_p = joint_log_density(trace, particles.pairs[0].guide, layout).squeeze(0)
            sites |= drawn
            chosen |= {n: s["value"] for n, s in drawn.items()}
        weights = particles.weights
        values, sites = _of_model(chosen, sites)
        density = _difference(log_p, _differentiable_bound(weights))
        if weights.score is None:
            return Selection(values, sites, density)
        return Selection(values, sites, density, _difference(log_p, weights.bound()), weights.score.sum(0))

    def _draw_enumerated(
        self,
        chosen: Mapping[str, Tensor],
        minibatch: Minibatch,
        depth: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
    ) -> Trace:
        """A model trace at these latents in which the sites that were summed out are drawn from p(c | z, x)."""

        def given_latents(*args: Any, **kwargs: Any) -> Any:  # infer_discrete hides all that is further out
            with minibatch:
                return poutine.condition(EnclosingPlates(enclosing)(self.model), dict(chosen))(*args, **kwargs)

        with unchanged_enumeration():
            drawing = infer_discrete(given_latents, first_available_dim=-depth - 1)
            return poutine.trace(drawing).get_trace(*args, **kwargs)

    def _all_values(
        self, particles: Particles, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Site]]:
        """The model's latents in all particles, ``(particles, *site shape)``; enumerated ones drawn for each."""
        values, sites = _of_model(*_latents(particles))
        run, count = particles.structure.run, particles.weights.num_particles
        if not run.enumerated:
            return values, sites
        dim = run.particle_dim(count)
        if dim is None:
            rows = [{n: v[k] for n, v in values.items()} for k in range(count)]
            traces = [self._draw_enumerated(row, particles.minibatch, run.depth, args, kwargs, ()) for row in rows]
        else:
            frame = CondIndepStackFrame(f"_importance_particles_{-dim}", dim, count, 0)
            spread = {n: spread_value(v, sites[n], run) for n, v in values.items()}
            traces = [self._draw_enumerated(spread, particles.minibatch, -dim, args, kwargs, (frame,))]
        for name, site in latent_sites(traces[0]):
            sites[name] = site
            same = [t.nodes[name] for t in traces]
            values[name] = stacked_value(same, particle_dim=dim, num_particles=count)
        return values, sites

    def _density_at(
        self,
        values: Mapping[str, Tensor],
        particles: Particles,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
    ) -> Selection:
        """log q~ at values that a handler chose, its companions K - 1 of the particles, whichever was selected."""
        stacked = {n: v.unsqueeze(0) for n, v in values.items()}
        at, log_p = self._weigh_at(stacked, args, kwargs, enclosing, particles.minibatch)
        log_weights = torch.cat([at.weights.log_weights, particles.weights.log_weights[1:]])
        bound = log_weights.logsumexp(0) - math.log(self.num_particles)
        return Selection(dict(values), {}, _difference(log_p.squeeze(0), bound))

    def _weigh_at(
        self,
        draws: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
        minibatch: Minibatch | None = None,
    ) -> tuple[Particles, Tensor]:
        """Weights and log p(x, z), or log p(x, z, c), at given draws, each ``(draws, *site shape)``."""
        count = next(iter(draws.values())).shape[0]
        first = self._particles(args, kwargs, enclosing, 1, minibatch=minibatch)
        sites = {n: s for n, s in latent_sites(first.pairs[0].guide) if settable(s)}
        known = {**draws, **auxiliary_values(self.guide, draws)}
        missing = sorted(sites.keys() - known.keys())
        if missing:
            raise NotImplementedError(
                f"expected values for every latent of the guide, got none for {missing}; {type(self.guide).__name__} "
                "draws these beside the model's latents, so that its density at given latents is not known"
            )
        values = {n: _as_run(known[n], s, first.structure, enclosing, count) for n, s in sites.items()}
        try:
            at = self._particles(args, kwargs, enclosing, count, values=values, minibatch=minibatch)
        except (KeyError, NotImplementedError) as error:  # a flow without an inverse
            raise NotImplementedError(
                "expected a guide that can be asked for its density at given latents, got "
                f"{type(self.guide).__name__}, whose flow has no inverse; use one that has (AutoIAFNormal), or "
                "expectation() and sample()"
            ) from error
        _require_reached(draws, at)
        summed_out = {n: v for n, v in draws.items() if n not in dict(latent_sites(at.pairs[0].guide))}
        pairs = self._at_enumerated(summed_out, values, at, args, kwargs, enclosing) if summed_out else at.pairs
        log_p = torch.cat([model_log_density(p, at.layout) for p in pairs]).expand(at.weights.log_weights.shape)
        return at, log_p

    def _at_enumerated(
        self,
        given: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        at: Particles,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        enclosing: Sequence[CondIndepStackFrame],
    ) -> list[Pair]:
        """The runs at given draws once more, with given values for the sites that are otherwise summed out."""
        count, run = at.weights.num_particles, at.structure.run
        sites = at.pairs[0].model.nodes
        unknown = sorted(given.keys() - sites.keys())
        if unknown:
            raise ValueError(f"expected draws of the model's latents, got {unknown}, which the model does not have")
        together = run.vectorized and count > 1
        rows = [slice(None)] if together else [slice(k, k + 1) for k in range(count)]
        pairs = []
        for row in rows:
            fixed = {n: spread_value(v, sites[n], run) if together else v[row.start] for n, v in given.items()}
            pairs += run_particles(
                poutine.condition(self.model, fixed),
                self.guide,
                args,
                kwargs,
                num_particles=count if together else 1,
                run=run,
                minibatch=at.minibatch,
                enclosing=enclosing,
                values={n: v[row] for n, v in values.items()},
            )
        return pairs

    # Away from Pyro's handlers

    def sample(self, num_draws: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Independent draws from q_EW, each with K particles of its own.

        Args:
            num_draws: how many.
            args: passed to model and guide.
            kwargs: passed to model and guide.

        Returns:
            By name of the model's latent (enumerated ones included), ``(num_draws, *site shape)``, without a graph.
        """
        num_draws = as_count("num_draws", num_draws)
        with torch.no_grad(), poutine.block():
            structure = self._particles(args, kwargs, (), 1).structure
            if not structure.run.vectorized:
                draws = [self(*args, **kwargs) for _ in range(num_draws)]
                return {n: torch.stack([d[n] for d in draws]) for n in draws[0]}
            per_pass = max(1, NUMBERS_PER_PASS // (self.num_particles * max(1, structure.numbers)))
            blocks = []
            for start in range(0, num_draws, per_pass):
                size = min(per_pass, num_draws - start)
                depth = structure.run.depth
                with pyro.plate("_importance_draws", size, dim=-depth - 1):
                    block = self(*args, **kwargs)
                blocks.append({n: _strip(v, n, structure) for n, v in block.items()})
        return {n: torch.cat([b[n] for b in blocks]) for n in blocks[0]}

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
        total: Tensor | float = 0.0
        with torch.no_grad(), poutine.block():
            for _ in range(as_count("num_batches", num_batches)):
                particles = self._particles(args, kwargs, (), self.num_particles)
                values, sites = self._all_values(particles, args, kwargs)
                total = total + weighted_mean(fn, values, sites, particles.weights, particles.layout)
        return torch.as_tensor(total / num_batches)

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
        with torch.no_grad(), poutine.block():
            at, log_p = self._weigh_at(dict(draws), args, kwargs, ())
            _refuse_tempered(at.weights, "log_density")
            sums = torch.stack(
                [self._companions(args, kwargs, at.minibatch)[1:].logsumexp(0) for _ in range(num_batches)]
            )
            return log_density(log_p, at.weights.log_weights, sums, num_particles=self.num_particles)

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
        with torch.no_grad(), poutine.block():
            bounds = torch.stack([self._bracket(args, kwargs, num_batches) for _ in range(num_replicates)])
        mean, error = bounds.mean(0), bounds.std(0) / math.sqrt(num_replicates)
        return ElboInterval(mean[0], mean[1], error[0], error[1])

    def _bracket(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_batches: int) -> Tensor:
        """(lower, upper) from M + 1 batches: each gives a draw, and fresh companions for the draws of the others."""
        first = self._particles(args, kwargs, (), self.num_particles)
        _refuse_tempered(first.weights, "elbo_interval")
        rest = [self._companions(args, kwargs, first.minibatch) for _ in range(num_batches)]
        return elbo_bracket(torch.stack([first.weights.log_weights, *rest]))

    def _companions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], minibatch: Minibatch) -> Tensor:
        return self._particles(args, kwargs, (), self.num_particles, minibatch=minibatch).weights.log_weights


def _select_latents(particles: Particles, index: Tensor) -> dict[str, Tensor]:
    """The chosen particle's latents, one draw in front."""
    if not particles.layout.plates and len(particles.pairs) > 1:  # sequential: shapes may differ between particles
        trace = particles.pairs[int(index)].guide
        return {n: s["value"].unsqueeze(0) for n, s in latent_sites(trace)}
    values, sites = _latents(particles)
    return select(values, index.unsqueeze(0), sites, particles.layout)


def _latents(particles: Particles) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """All particles' latents, stacked, and their sites."""
    values = stacked_latents(
        particles.pairs,
        run=particles.structure.run,
        num_particles=particles.weights.num_particles,
        batch_dims=particles.structure.batch_dims,
    )
    return values, dict(latent_sites(particles.pairs[0].guide))


def _of_model(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """Without the guide's auxiliary latents."""
    names = [n for n in values if not sites[n]["infer"].get("is_auxiliary")]
    return {n: values[n] for n in names}, {n: sites[n] for n in names}


def _differentiable_bound(weights: LogWeights) -> Tensor:
    """Value of the bound and gradient of its estimator, whatever the guide's sites; it needs no score term outside."""
    totals = weights.totals()
    surrogate = Pathwise().surrogate(weights, totals) + VIMCO().surrogate(weights, totals)
    return totals.log_mean + (surrogate - surrogate.detach())


def _difference(log_p: Tensor, bound: Tensor) -> Tensor:
    """log q~ = log p(x, z) - Lhat; 0 where every particle is impossible, so that the draw's value is -inf, not NaN."""
    return torch.where(bound == -math.inf, 0.0, log_p - torch.where(bound == -math.inf, 0.0, bound))


def _require_enclosing(layout: Layout, enclosing: Sequence[CondIndepStackFrame]) -> None:
    for frame in enclosing:
        if frame.size > 1 and frame.dim not in layout.dims:
            raise ValueError(
                f"expected model and guide to treat the elements of plate '{frame.name}' (dim={frame.dim}) apart"
                ", got sites that mix them: draws would not be "
                "independent. Count dimensions from the right "
                "(dim=-1), or draw one by one: Predictive(..., parallel=False), vectorize_particles=False"
            )


def _refuse_tempered(weights: LogWeights, method: str) -> None:
    if weights.tempered:
        raise ValueError(
            f"{method} got weights tempered by a poutine.scale around some sites of model or guide; they are no "
            "densities. Take the scale away, or put it around model and guide alike"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool((a == b).all()))


def _as_run(
    value: Tensor, site: Site, structure: Structure, enclosing: Sequence[CondIndepStackFrame], count: int
) -> Tensor:
    """Values at given draws, ``(draws, *site shape)``, as a run of that many particles wants them."""
    event_shape = site["fn"].event_shape
    batch_dims = structure.batch_dims.get(site["name"], len(site["fn"].batch_shape))
    if value.dim() - 1 - len(event_shape) != batch_dims:  # a joint guide's one latent
        sizes = {f.dim: f.size for f in enclosing}
        value = value.reshape(count, *(sizes.get(d, 1) for d in range(-batch_dims, 0)), *event_shape)
    return spread_value(value, site, structure.run) if count > 1 else value


def _require_reached(draws: Mapping[str, Tensor], at: Particles) -> None:
    """Raises where the guide cannot draw what it was asked about: a point estimate elsewhere."""
    values, _ = _latents(at)
    for name, value in draws.items():
        if name in values and not torch.allclose(values[name].to(value), value, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"expected values that the guide can draw, got others at site '{name}', which the guide sets to a "
                "value of its own (a Delta): its density there is 0"
            )


def _strip(value: Tensor, name: str, structure: Structure) -> Tensor:
    """A value drawn in a plate of draws, as ``(draws, *site shape)``."""
    extra = structure.run.depth - structure.batch_dims.get(name, structure.run.depth)
    return value.reshape(value.shape[:1] + value.shape[1 + extra :])
