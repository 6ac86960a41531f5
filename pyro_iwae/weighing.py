# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""K particles of a model and guide, run as the verdict on these two says, and weighed: the only maker of log weights.

Loss, gradient, resampling and reports all begin here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.announcements import announce_cuts
from pyro_iwae.decisions import holds
from pyro_iwae.densities import infinity_message, nan_message, varies_along
from pyro_iwae.handlers import Minibatch
from pyro_iwae.leaves import cuts_of
from pyro_iwae.logweights import LogWeights
from pyro_iwae.memory import advice_on_memory
from pyro_iwae.particles import Call, Run, run_particles, runs_of
from pyro_iwae.plates import Layout, Scale, Site, latent_sites, own_scale, same_scale
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.subsampling import require_full_plates
from pyro_iwae.terms import Term, joined, one_scale, outer_scale, terms_of, weighed_sites
from pyro_iwae.threads import in_one_thread
from pyro_iwae.traces import Pair, Recording, require_site_shapes
from pyro_iwae.tree import CHANGING_SITES, PlateParticles, combine_problem
from pyro_iwae.verdicts import Question

__all__ = [
    "Particles",
    "constants_of",
    "impossible_sites",
    "sites_at_fault",
    "warn_of_impossible",
    "weigh",
    "weigh_particles",
]


@dataclass(frozen=True)
class Particles:
    """K weighed particles and what they came from; ``layouts`` of all nodes of the plate tree."""

    weights: LogWeights
    pairs: list[Pair]
    layouts: list[Layout]
    structure: Structure
    minibatch: Minibatch

    @property
    def layout(self) -> Layout:
        """Where the columns of the root lie."""
        return self.layouts[0]

    @property
    def common(self) -> Scale | None:
        """The scale that stays outside the weights."""
        return outer_scale(self.pairs[0], self.layout)


@in_one_thread
def weigh_particles(
    call: Call,
    *,
    num_particles: int,
    cache: StructureCache,
    vectorize: bool | None,
    max_plate_nesting: float,
    warn_of_enumeration: bool = True,
    minibatch: Minibatch | None = None,
    values: Mapping[str, Any] | None = None,
    sites: Mapping[str, Site] | None = None,
    averaged: bool = True,
    recording: Recording | None = None,
    plate_particles: PlateParticles | None = None,
    among: int | None = None,
) -> Particles:
    """Runs and weighs K particles; model and guide are inspected when they, their sites or their plates are new.

    Args:
        call: what to run.
        num_particles: K.
        cache: where the verdicts are kept.
        vectorize: True and False force; None goes by the inspection.
        max_plate_nesting: as for ``Trace_ELBO``.
        warn_of_enumeration: warn where K > 1 samples guide sites that ask for enumeration.
        minibatch: indices that are settled already.
        values: values for latents of the guide, as a run of K particles wants them.
        sites: their sites, where plates have particles of their own.
        averaged: whether the K weights are to be averaged; False where each is wanted for itself.
        recording: what to record for back-propagation; None is all, and no cut.
        plate_particles: the plates that have particles of their own.
        among: K, where these are a chunk of the K; that all of a chunk are impossible is then for the caller to say.

    Raises:
        RuntimeError: where it is running in another thread.
    """
    recording = Recording() if recording is None else recording
    minibatch = Minibatch() if minibatch is None else minibatch
    whole = num_particles if among is None else among
    question = Question(
        call,
        cache,
        whole,
        vectorize,
        max_plate_nesting,
        warn_of_enumeration=warn_of_enumeration,
        minibatch=minibatch,
        plate_particles=plate_particles,
    )
    known = question.known

    def run(structure: Structure) -> list[Pair]:
        with advice_on_memory(num_particles, structure.run.tree, chunked=among is not None):
            return run_particles(
                call,
                num_particles=num_particles,
                run=structure.run,
                minibatch=minibatch,
                values=values,
                sites=sites,
                recording=recording,
            )

    structure = question.answer()
    try:
        pairs = run(structure)
    except Exception as error:
        if known is None:
            raise
        structure = _looked_again(question, error)  # plates that were not there before collide with the particles' own
        if structure.run == known.run:
            raise
        pairs = run(structure)
    described = structure.describes(pairs[0], num_particles)
    if not described:
        before = structure.run
        found = cache.find(question.key, structure.signature_of(pairs[0], num_particles))
        structure = found if found is not None and found.settled else question.look()
        cache.store(question.key, structure)
        if structure.run != before:
            pairs = run(structure)
        described = structure.describes(pairs[0], num_particles)
    described = described and all(structure.describes(p, num_particles) for p in pairs[1:])
    for pair in pairs:
        require_apart(pair, structure.run, num_particles)
        require_site_shapes(pair, structure.run.width(num_particles))
    if recording.cut:
        announce_cuts(pairs[0], cache.said)
    layouts = _common_layouts(structure, pairs, num_particles, alike=described)
    if averaged:
        require_full_plates(pairs[0], layouts, structure.run.tree, whole)
    weights = weigh(pairs, layouts, structure.run, num_particles, cut=recording.cut, whole=among is None and averaged)
    return Particles(weights, pairs, layouts, structure, minibatch)


def _looked_again(question: Question, error: Exception) -> Structure:
    """A new verdict; where there is none to be had, the error that asked for it tells more."""
    try:
        return question.look()
    except Exception:
        raise error from None


def _common_layouts(structure: Structure, pairs: Sequence[Pair], num_particles: int, *, alike: bool) -> list[Layout]:
    """The columns that all runs have; one weight for everything where sites change from particle to particle."""
    layouts = structure.layouts(pairs[0], num_particles)
    if alike:
        return layouts
    if structure.run.vectorized and num_particles > 1:
        raise ValueError(
            "expected model and guide to have the same sites and plates in every run, got different ones in two runs "
            f"with the same arguments (latents: {sorted(n for n, _ in latent_sites(pairs[0].guide))}); if the "
            "structure follows the latents, pass vectorize_particles=False"
        )
    if structure.run.tree.grows:
        raise ValueError(CHANGING_SITES)
    return [layout.keeping(()) for layout in layouts]


def weigh(
    pairs: Sequence[Pair],
    layouts: Sequence[Layout],
    run: Run,
    num_particles: int,
    *,
    cut: bool = False,
    whole: bool = True,
) -> LogWeights:
    """Makes the log weights of K particles, from the leaves of the plate tree to its root.

    Args:
        pairs: the runs.
        layouts: where the columns of each node lie.
        run: how the particles were run.
        num_particles: K.
        cut: whether to tell apart the values that were cut.
        whole: whether these are all particles, so that it is worth a warning where all are impossible.

    Raises:
        ValueError: where a weight is NaN or +inf.
    """
    tree, common = run.tree, outer_scale(pairs[0], layouts[0])
    tables = [
        [terms_of(pair, layout, common) for pair in runs_of(pairs, run, i, num_particles)]
        for i, layout in enumerate(layouts)
    ]
    shapes = [(*tree.shape(i, num_particles), *(p.size for p in layout.plates)) for i, layout in enumerate(layouts)]
    cuts = cuts_of(pairs, tables, layouts, run, common, shapes) if cut else [None] * len(layouts)
    grown: dict[int, LogWeights] = {}
    for i in reversed(range(len(layouts))):
        node = replace(_own_weights(tables[i], layouts[i], shapes[i]), cut=cuts[i])
        if i == 0:
            sites = weighed_sites(pairs[0], layouts[0]) if common is None else []
            node = replace(
                node,
                scale=layouts[0].scale * (1.0 if common is None else common),
                constant=constants_of(tables[0]),
                tempered=any(not same_scale(own_scale(s), 1.0) for s in sites),
            )
        else:
            _require_inside(tables[i], tree.nodes[i].plate)
            parent = layouts[tree.path(i)[1]]
            node = replace(node, scale=layouts[i].scale / parent.scale)
            if tree.combined:
                node = _drawn_once(node)
        grown[i] = node.grown([grown[child] for child in tree.children(i)])
        _explain_infinite(grown[i], tables[i], warn=whole or i > 0)
    return grown[0]


def _require_inside(table: Sequence[Sequence[Term]], plate: str) -> None:
    """Raises where a site belongs to a plate's particles and lies outside: there is no place for its term."""
    for term in (t for terms in table for t in terms):
        if term.element is None and not holds((term.value == 0).all()):
            raise ValueError(
                f"{term.role} site '{term.name}' depends on latents of plate '{plate}' and lies outside it, unlike at "
                "the first look at model and guide; make what depends on what the same in every call"
            )


def _own_weights(table: Sequence[Sequence[Term]], layout: Layout, shape: Sequence[int]) -> LogWeights:
    """A node's own part in the log weights."""

    def whole(part: Callable[[Term], Tensor | None]) -> Tensor | None:
        return joined([[(t.element, part(t)) for t in terms] for terms in table], layout, shape)

    log_weights = whole(lambda t: t.value)
    scored = any(t.score is not None for terms in table for t in terms)
    return LogWeights(
        torch.zeros(shape) if log_weights is None else log_weights,  # no site at all
        plates=tuple(p.name for p in layout.plates),
        score=whole(lambda t: t.score) if scored else None,
        score_log_q=whole(lambda t: t.score_log_q) if scored else None,
        score_scale=_score_scale(table),
    )


def _drawn_once(node: LogWeights) -> LogWeights:
    """Marks particles that serve all those further out; what is alike for all of these is held, and summed, once."""

    def once(value: Tensor, outer: Callable[[int], bool]) -> Tensor:
        for dim in filter(outer, range(1, value.dim() - len(node.plates))):
            value = value.narrow(dim, 0, 1)
        return value

    log_weights = once(node.log_weights, lambda dim: node.log_weights.stride(dim) == 0)  # expanded, not computed
    score = None if node.score is None else once(node.score, lambda dim: True)
    return replace(node, shared=True, log_weights=log_weights, score=score)


def _score_scale(tables: Sequence[Sequence[Term]]) -> Scale:
    """The scale of log q of score-function sites inside the weights, if all have one; 1 if not."""
    common = one_scale([t.score_scale for table in tables for t in table if t.score is not None])
    return 1.0 if common is None else common


def require_apart(pair: Pair, run: Run, num_particles: int) -> None:
    """Raises where a site has particles of a node that it does not belong to, or a draw made once follows others."""
    tree = run.tree
    if not tree.grows or not run.is_wide(num_particles):
        return
    for role, name, site in pair.sites():
        home = tree.home(site)
        mine = {home} if role == "guide" and tree.combined else set(tree.path(home))
        for node in set(range(len(tree.nodes))) - mine:
            if not varies_along(site, run.depth_of(node)):
                continue
            if node in tree.path(home):
                raise ValueError(combine_problem(name, tree.nodes[home].plate))
            raise ValueError(
                f"{role} site '{name}' follows the particles of plate '{tree.nodes[node].plate}', and did not when "
                "model and guide were first looked at; make what depends on what the same in every call"
            )


def constants_of(tables: Sequence[Sequence[Term]]) -> dict[tuple[str, ...], Tensor]:
    """Constants by plate: scaled, averaged over particles (equal for all, but for a model's own randomness)."""
    constants: dict[tuple[str, ...], Tensor] = {}
    for table in tables:
        for term in table:
            if term.element is None:
                value = term.value.mean(0) / len(tables)
                constants[term.plates] = constants[term.plates] + value if term.plates in constants else value
    for plates, value in constants.items():
        if not holds((value < math.inf).all()):
            names = sorted({t.name for t in tables[0] if t.element is None and t.plates == plates})
            raise ValueError(f"log density is NaN or +inf at one of the sites {names}; look at the data and parameters")
    return constants


def _explain_infinite(weights: LogWeights, tables: Sequence[Sequence[Term]], *, warn: bool) -> None:
    """Raises on NaN and +inf with the site's name; warns where every particle of an element is impossible."""
    if weights.log_weights.numel() == 0:
        return
    largest = weights.log_weights.detach().amax(0)  # NaN if any is
    if holds(((largest > -math.inf) & (largest < math.inf)).all()):
        return
    terms = [t for table in tables for t in table]
    for term in terms:
        if bool(term.value.isnan().any()):
            raise ValueError(nan_message(term.role, term.name))
    for term in terms:
        if bool((term.value == math.inf).any()):
            raise ValueError(infinity_message(term.role, term.name))
    if bool(weights.log_weights.isnan().any()):
        raise ValueError("log weights are NaN although no site's log density is; look for overflow in the model")
    if warn:
        impossible = (weights.log_weights == -math.inf).all(0)
        warn_of_impossible(impossible, weights.num_particles, lambda: impossible_sites(tables))


def warn_of_impossible(impossible: Tensor, num_particles: int, sites: Callable[[], set[str]]) -> None:
    """Warns where all particles of an independent element are impossible, with the sites at fault."""
    if bool(impossible.any()):
        warnings.warn(
            f"all {num_particles} particles are impossible (log weight -inf) for {int(impossible.sum())} of "
            f"{impossible.numel()} independent elements, through site {', '.join(map(repr, sorted(sites())))}; the "
            "bound is -inf there and its gradient 0. Let the guide reach values that the model allows, or use more "
            "particles",
            stacklevel=3,
        )


def sites_at_fault(particles: Particles) -> set[str]:
    """Names of the sites with a log density of -inf at some of the particles."""
    return impossible_sites([terms_of(p, particles.layout, particles.common) for p in particles.pairs])


def impossible_sites(tables: Sequence[Sequence[Term]]) -> set[str]:
    """Names of the sites with a log density of -inf."""
    return {t.name for table in tables for t in table if bool((t.value == -math.inf).any())}
