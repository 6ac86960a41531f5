# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""One draw out of K weighed particles: its values and its log density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_iwae.chunks import Chunks
from pyro_iwae.gradients import OVIS, Pathwise
from pyro_iwae.graphless import graph_if
from pyro_iwae.handlers import EnclosingPlates, Minibatch
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Call, spread_value, stacked_latents, stacked_value, unchanged_enumeration
from pyro_iwae.plates import PARTICLES, Layout, Site, latent_sites
from pyro_iwae.resampling import multinomial, streaming
from pyro_iwae.terms import joint_log_density
from pyro_iwae.traces import Unmasked
from pyro_iwae.tree import Tree
from pyro_iwae.walking import Stand, chosen, log_density, walks
from pyro_iwae.weighing import Particles

__all__ = [
    "Held",
    "Passed",
    "Selection",
    "completed",
    "difference",
    "held_of",
    "latent_values",
    "model_values",
    "pass_by",
    "select",
    "select_passing",
]


@dataclass(frozen=True)
class Selection:
    """One draw: values by site (model latents and enumerated sites), and log q~ by independent element."""

    values: dict[str, Tensor]
    sites: dict[str, Site]
    log_density: Tensor
    pathwise: Tensor | None = None  # where the guide has discrete sites, the pieces of the gradient of log q~
    score: Tensor | None = None

    def refusing(self, option: str) -> Selection:
        """The same, and an error where anything goes back through it, which names the option that it is due to."""
        values = {n: _refusing(v, option) for n, v in self.values.items()}
        return replace(self, values=values, log_density=_refusing(self.log_density, option))


def _refusing(value: Tensor, option: str) -> Tensor:
    if not value.is_floating_point():
        return value
    refusing: Tensor = _Refusal.apply(value, torch.zeros((), requires_grad=True), option)
    return refusing


class _Refusal(torch.autograd.Function):
    """A number whose graph was not kept."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, option: str) -> Tensor:
        ctx.option = option
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        raise NotImplementedError(
            f"a draw of ImportanceResampledGuide({ctx.option}=...) has no gradient: of its K particles one was kept, "
            f"and no graph. To train model and guide write ImportanceWeightedELBO(num_particles=K, {ctx.option}=...), "
            f"whose gradient it would have; to go back through a draw itself leave {ctx.option} out"
        )


def select(call: Call, particles: Particles, index: Tensor) -> Selection:
    """Takes one particle for each independent element.

    Args:
        call: what was run.
        particles: K weighed particles.
        index: the particle of each element, ``(*plates)``. Inside it one particle is drawn by weight for each element
            of a plate that has particles of its own, and so on.
    """
    weights, picked = particles.weights, _picked(particles, index)
    values, sites, log_p = _completed(call, particles, picked)
    density = difference(log_p, _differentiable_bound(weights))
    score = _score(weights)
    if score is None:
        return Selection(values, sites, density)
    return Selection(values, sites, density, difference(log_p, weights.bound()), score)


@dataclass(frozen=True)
class Passed:
    """What is kept of K particles.

    Attributes:
        selection: one draw of them; without a graph if they have passed by in chunks.
        particles: all of them, or the last chunk.
        log_sum: log-sum-exp of all K weights, ``(*plates)``.
        log_others: that of all but the first.
        refuses: whether there would be a gradient, which was not kept.
    """

    selection: Selection
    particles: Particles
    log_sum: Tensor
    log_others: Tensor
    refuses: bool = False


def select_passing(chunks: Chunks) -> Passed:
    """Takes one particle of K for each independent element, with one chunk in memory."""
    passed = pass_by(chunks)
    chunks.seen.warn_of(passed.log_sum == -math.inf, chunks.num_particles)
    return completed(chunks.call, passed, chunks.num_particles)


@dataclass(frozen=True)
class Held:
    """One of the particles that have passed by, for each independent element.

    Attributes:
        picked: the particle.
        particles: the last chunk.
        log_sum: log-sum-exp of all weights that have passed, ``(*plates)``.
        log_others: that of all but the first.
        graph: whether there would be a gradient.
    """

    picked: _Picked
    particles: Particles
    log_sum: Tensor
    log_others: Tensor
    graph: bool


def completed(call: Call, held: Held, num_particles: int) -> Passed:
    """The draw that is held, with the sites that were summed out, and its density."""
    with graph_if(False):
        values, sites, log_p = _completed(call, held.particles, held.picked)
        density = difference(log_p, held.log_sum - math.log(num_particles))
    return Passed(Selection(values, sites, density), held.particles, held.log_sum, held.log_others, held.graph)


def held_of(particles: Particles) -> Held:
    """One of particles that are all there."""
    log_weights = particles.weights.log_weights
    picked = _picked(particles, multinomial(log_weights))
    sums = log_weights.detach().logsumexp(0), log_weights.detach()[1:].logsumexp(0)
    return Held(picked.detached(), particles, *sums, log_weights.requires_grad)


def pass_by(chunks: Chunks) -> Held:
    """One of particles of which one chunk is in memory at a time."""
    held: Any = None
    graph, seen = torch.is_grad_enabled(), chunks.seen
    log_sum = log_others = torch.tensor(-math.inf)
    chunks = chunks.with_guide_once(cut=False)
    with graph_if(False):
        drawing, count = chunks.draw(), len(chunks.edges)
        for i in range(count):
            with graph_if(graph and held is None):  # one chunk tells whether there is a graph
                particles = next(drawing)
            log_weights = seen.looked_at(particles).log_weights
            if held is None:
                graph = log_weights.requires_grad
                log_sum = log_others = torch.full_like(log_weights[0], -math.inf)
            index, taken, log_sum = streaming(log_weights, log_sum)
            picked = _picked(particles, index)
            log_others = torch.logaddexp(log_others, log_weights[held is None :].logsumexp(0))
            held = picked if held is None else held.or_instead(picked, taken, particles.layout)
            if i < count - 1:
                del particles, log_weights, picked  # before the next chunk is made
    return Held(held, particles, log_sum, log_others, graph)


@dataclass(frozen=True)
class _Picked:
    """The guide's latents at the particle of each element, their sites, and log p(x, z) there."""

    values: dict[str, Tensor]
    sites: dict[str, Site]
    log_p: Tensor

    def detached(self) -> _Picked:
        """Without a graph."""
        return _Picked({n: v.detach() for n, v in self.values.items()}, self.sites, self.log_p.detach())

    def of_ranks(self, taken: Tensor, layout: Layout, add: Callable[[Tensor], Tensor]) -> _Picked:
        """Each element's particle from the process that holds it, in all of them.

        Args:
            taken: which elements this one holds, ``(*plates)``.
            layout: where these lie.
            add: sums over processes.
        """
        nothing = _Picked(
            {n: torch.zeros_like(v) for n, v in self.values.items()}, self.sites, torch.zeros_like(self.log_p)
        )
        mine = nothing.or_instead(self, taken, layout)
        values = {n: _added(v, add) for n, v in sorted(mine.values.items())}
        return _Picked({n: values[n] for n in self.values}, self.sites, add(mine.log_p))

    def or_instead(self, other: _Picked, taken: Tensor, layout: Layout) -> _Picked:
        """The other one in those elements where it is taken."""
        if not layout.plates:
            return other if bool(taken) else self
        values = {}
        for name, site in other.sites.items():
            both = torch.stack([self.values[name], other.values[name]])
            where = layout.align(taken.long().unsqueeze(0), site, both)
            values[name] = both.gather(0, where.expand(1, *both.shape[1:])).squeeze(0)
        return _Picked(values, other.sites, torch.where(taken, other.log_p, self.log_p))


def _added(value: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    return add(value.to(torch.uint8)).bool() if value.dtype == torch.bool else add(value)


def _picked(particles: Particles, index: Tensor) -> _Picked:
    stands = walks(particles.weights, index.unsqueeze(0))
    carried, sites = _carried(particles, stands)
    drawn = {n: v.squeeze(0) for n, v in carried.items()}
    return _Picked(drawn, sites, log_density(particles, stands).squeeze(0))


def _completed(call: Call, particles: Particles, picked: _Picked) -> tuple[dict[str, Tensor], dict[str, Site], Tensor]:
    """The model's latents, those that were summed out too, their sites, and log p of all."""
    drawn, sites, log_p = dict(picked.values), dict(picked.sites), picked.log_p
    if particles.structure.run.enumerated:
        trace = _draw_enumerated(call, drawn, particles.minibatch, particles.structure.run.depth)
        summed_out = dict(latent_sites(trace))
        log_p = joint_log_density(trace, particles.pairs[0].guide, Layout(particles.layout.plates)).squeeze(0)
        sites |= summed_out
        drawn |= {n: s["value"] for n, s in summed_out.items()}
    return *_of_model(drawn, sites), log_p


def latent_values(particles: Particles) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """All particles' latents, ``(particles, *site shape)``, and their sites."""
    names = [{n for n, _ in latent_sites(p.guide)} for p in particles.pairs]
    if any(found != names[0] for found in names):
        raise ValueError(
            f"expected the same latents in every particle, got {sorted(set.union(*names))} in some and "
            f"{sorted(set.intersection(*names))} in all; take draws one by one, by calling the posterior"
        )
    values = stacked_latents(
        particles.pairs,
        run=particles.structure.run,
        num_particles=particles.weights.num_particles,
        batch_dims=particles.structure.batch_dims,
    )
    return values, dict(latent_sites(particles.pairs[0].guide))


def model_values(
    call: Call, particles: Particles, index: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """The model's latents with each particle of the root, ``(particles, *site shape)``, and their sites.

    What has particles of its own inside is drawn by weight, enumerated sites too.

    Args:
        call: what was run.
        particles: K weighed particles.
        index: which of them, for each element, ``(draws, *plates)``; None is all, in order.
    """
    weights, run = particles.weights, particles.structure.run
    if index is None and run.tree.grows:
        index = torch.arange(weights.num_particles, device=weights.log_weights.device)
        index = index.reshape(-1, *(1,) * len(weights.plates)).expand(weights.log_weights.shape)
    count = weights.num_particles if index is None else len(index)
    if index is not None:
        values, sites = _of_model(*_carried(particles, walks(weights, index)))
        run = replace(run, tree=Tree())
    else:
        values, sites = _of_model(*latent_values(particles))
    if not run.enumerated:
        return values, sites
    dim = run.particle_dim(count)
    if dim is None:
        rows = [{n: v[k] for n, v in values.items()} for k in range(count)]
        traces = [_draw_enumerated(call, row, particles.minibatch, run.depth) for row in rows]
    else:
        frame = CondIndepStackFrame(f"{PARTICLES}{-dim}", dim, count, 0)
        spread = {n: spread_value(v, sites[n], run) for n, v in values.items()}
        traces = [_draw_enumerated(call, spread, particles.minibatch, -dim, (frame,))]
    for name, site in latent_sites(traces[0]):
        sites[name] = site
        same = [t.nodes[name] for t in traces]
        values[name] = stacked_value(same, particle_dim=dim, num_particles=count)
    return values, sites


def difference(log_p: Tensor, bound: Tensor) -> Tensor:
    """log q~ = log p(x, z) - Lhat; 0 where every particle is impossible, so that the draw's value is -inf, not NaN."""
    return torch.where(bound == -torch.inf, 0.0, log_p - torch.where(bound == -torch.inf, 0.0, bound))


def _carried(particles: Particles, stands: Sequence[Stand]) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """The guide's latents, ``(walks, *site shape)``, each element from the particle chosen for it."""
    tree = particles.structure.run.tree
    one = len(stands[0].place[0]) == 1
    if one and not particles.layout.plates and len(particles.pairs) > 1 and not tree.grows:
        ((index,),) = stands[0].place  # sites may differ between particles
        sites = dict(latent_sites(particles.pairs[int(index)].guide))
        return {n: s["value"].unsqueeze(0) for n, s in sites.items()}, sites
    values, sites = latent_values(particles)
    homes = {n: tree.home(site) for n, site in sites.items()}
    return {n: chosen(v, stands[homes[n]], particles.layouts[homes[n]], sites[n]) for n, v in values.items()}, sites


def _of_model(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """Without the guide's auxiliary latents."""
    names = [n for n in values if not sites[n]["infer"].get("is_auxiliary")]
    return {n: values[n] for n in names}, {n: sites[n] for n in names}


def _draw_enumerated(
    call: Call,
    latents: Mapping[str, Tensor],
    minibatch: Minibatch,
    depth: int,
    further: tuple[CondIndepStackFrame, ...] = (),
) -> Trace:
    """A model trace at these latents in which the sites that were summed out are drawn from p(c | z, x)."""
    around = EnclosingPlates(further or call.enclosing)
    unmasked = Unmasked(lambda msg: not msg["is_observed"] and msg["infer"].get("enumerate") == "parallel")

    def given_latents(*args: Any, **kwargs: Any) -> Any:  # infer_discrete hides all that is further out
        with minibatch:
            return unmasked(poutine.condition(around(call.model), dict(latents)))(*args, **kwargs)

    with unchanged_enumeration():
        drawing = infer_discrete(given_latents, first_available_dim=-depth - 1)
        trace = poutine.trace(drawing).get_trace(*call.args, **call.kwargs)
    for name, mask in unmasked.masks.items():  # the density of the draw is what an ELBO outside sees of the model
        trace.nodes[name]["mask"] = mask
    return trace


def _score(weights: LogWeights) -> Tensor | None:
    """log q of all particles' score-function sites, by element of the root; None where there are none."""
    found = None
    for node in weights.nodes():
        if node.score is not None:
            value = node.score.sum(list(range(node.score.dim() - len(node.plates))))
            value = replace(node, scale=1.0).summed(value, weights.plates)
            found = value if found is None else found + value
    return found


def _differentiable_bound(weights: LogWeights) -> Tensor:
    """Value of the bound and gradient of its estimator, whatever the guide's sites; it needs no score term outside."""
    totals = weights.totals()
    surrogate = Pathwise().surrogate(weights, totals) + OVIS().surrogate(weights, totals)
    return totals.value + (surrogate - surrogate.detach())
