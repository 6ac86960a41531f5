# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""K particles of a model and guide, run as the verdict on these two says, and weighed: the only maker of log weights.

Loss, gradient, resampling and reports all begin here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.densities import infinity_message, nan_message
from pyro_iwae.drawn import settable
from pyro_iwae.handlers import Minibatch
from pyro_iwae.inspection import inspect
from pyro_iwae.leaves import cut_of
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Call, run_particles
from pyro_iwae.plates import Layout, Scale, Site, is_subsampled, latent_sites, own_scale, same_scale
from pyro_iwae.structure import Structure, StructureCache
from pyro_iwae.terms import Term, joined, one_scale, outer_scale, terms_of, weighed_sites
from pyro_iwae.traces import Pair, Recording, require_site_shapes

__all__ = ["Particles", "constants_of", "subsampling_problem", "weigh", "weigh_particles"]


@dataclass(frozen=True)
class Particles:
    """K weighed particles and what they came from."""

    weights: LogWeights
    pairs: list[Pair]
    layout: Layout
    structure: Structure
    minibatch: Minibatch


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
    averaged: bool = True,
    recording: Recording | None = None,
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
        averaged: whether the K weights are to be averaged; False where each is wanted for itself.
        recording: what to record for back-propagation; None is all, and no cut.
    """
    recording = Recording() if recording is None else recording
    plates = tuple((f.name, f.dim) for f in call.enclosing)
    key = cache.key(call.model, call.guide, plates, vectorize, max_plate_nesting)
    minibatch = Minibatch() if minibatch is None else minibatch

    def look() -> Structure:
        structure = inspect(call, vectorize=vectorize, max_plate_nesting=max_plate_nesting, minibatch=minibatch)
        structure = _announce(structure, num_particles, warn_of_enumeration, cache.latest(key))
        attempts = known.attempts + 1 if known is not None and known.current else 1
        structure = replace(structure, probe=None, attempts=attempts)
        cache.store(key, structure)
        return structure

    def run(structure: Structure) -> list[Pair]:
        return run_particles(
            call,
            num_particles=num_particles,
            run=structure.run,
            minibatch=minibatch,
            values=values,
            recording=recording,
        )

    known = cache.latest(key)
    if known is not None and not known.current:
        known = cache.find(key, known.signature) or known
    structure = look() if known is None or not known.settled else known
    try:
        pairs = run(structure)
    except Exception:
        if known is None:
            raise
        structure = look()  # plates that were not there before collide with the particles' own
        if structure.run == known.run:
            raise
        pairs = run(structure)
    if not structure.describes(pairs[0], num_particles):
        before = structure.run
        found = cache.find(key, structure.signature_of(pairs[0], num_particles))
        structure = found if found is not None and found.settled else look()
        cache.store(key, structure)
        if structure.run != before:
            pairs = run(structure)
    for pair in pairs:
        require_site_shapes(pair, structure.run.depth + (structure.run.particle_dim(num_particles) is not None))
    if recording.cut:
        _announce_cuts(pairs[0], cache.said)
    layout = _common_layout(structure, pairs, num_particles)
    if averaged and num_particles > 1:
        require_full_plates(pairs[0], layout)
    return Particles(weigh(pairs, layout, num_particles, cut=recording.cut), pairs, layout, structure, minibatch)


def _common_layout(structure: Structure, pairs: Sequence[Pair], num_particles: int) -> Layout:
    """The columns that all runs have; one weight for everything where sites change from particle to particle."""
    layout = structure.layout(pairs[0], num_particles)
    if all(structure.describes(p, num_particles) for p in pairs):
        return layout
    if structure.run.vectorized and num_particles > 1:
        raise ValueError(
            "expected model and guide to have the same sites and plates in every run, got different ones in two runs "
            f"with the same arguments (latents: {sorted(n for n, _ in latent_sites(pairs[0].guide))}); if the "
            "structure follows the latents, pass vectorize_particles=False"
        )
    return layout.keeping(())


def _announce(structure: Structure, num_particles: int, of_enumeration: bool, known: Structure | None) -> Structure:
    """Warns of what the verdict found, unless the last one said the same; returns it with all that was said."""
    messages = list(structure.messages)
    if structure.probe is not None:
        messages += mask_warnings(structure.probe)
        messages += enumeration_warnings(structure.probe) if of_enumeration and num_particles > 1 else []
    for message in messages:
        if known is None or message not in known.messages:
            warnings.warn(message, UserWarning, stacklevel=4)
    return replace(structure, messages=tuple(messages))


def _announce_cuts(pair: Pair, said: set[str]) -> None:
    """Warns, once, of what it costs to tell the ways through z apart, and where there is nothing to tell apart."""
    found = []
    for name, cut in pair.cuts.items():
        if cut.solved:
            site: Site = pair.guide.nodes[name]
            found.append(
                f"guide site '{name}' draws from a flow whose inverse is slow or missing: each step solves with its "
                f"Jacobian, which takes {site['fn'].event_shape.numel()} backward passes through the flow. A coupling "
                "flow has a fast inverse, gradient=Pathwise() needs none"
            )
    sites = "cut " + ", ".join(name for name, _ in latent_sites(pair.guide))
    direct = [] if sites in said else _set_directly(pair)
    said.add(sites)  # looked at once
    if direct:
        found.append(
            f"guide sites {direct} are set by their parameters directly (a Delta, or noise without parameters that a "
            "Delta bends), so that there is no draw whose log q could be treated apart: StickTheLanding and "
            "DoublyReparameterized give the pathwise gradient for these parameters"
        )
    for message in found:
        if message not in said:
            said.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)


def _set_directly(pair: Pair) -> list[str]:
    """Guide sites whose value follows from others, and from parameters that are in no draw's log q."""
    params: list[Any] = [pair.guide.nodes[name]["value"] for name in pair.guide.param_nodes]
    bare = [p.unconstrained() if hasattr(p, "unconstrained") else p for p in params]
    bare = [p for p in bare if p.requires_grad]
    handles = [cut.value.register_hook(torch.zeros_like) for cut in pair.cuts.values()]
    try:
        return [
            name
            for name, site in latent_sites(pair.guide)
            if not settable(site) and site["value"].requires_grad and bare and _depends(site["value"], bare)
        ]
    finally:
        for handle in handles:
            handle.remove()


def _depends(value: Tensor, params: Sequence[Tensor]) -> bool:
    uneven = torch.linspace(1.0, 2.0, value.numel()).to(value).reshape(value.shape)  # a simplex sums to 1 anyway
    slopes = torch.autograd.grad((uneven * value).sum(), params, retain_graph=True, allow_unused=True)
    return any(slope is not None and bool(slope.any()) for slope in slopes)


def enumeration_warnings(pair: Pair) -> list[str]:
    """Guide sites that ask for enumeration are sampled for more than one particle."""
    names = [n for n, s in latent_sites(pair.guide) if s["infer"].get("enumerate")]
    if not names:
        return []
    return [
        f"guide sites {names} ask for enumeration, which more than one particle cannot do (the exact bound has one "
        "term for each combination): they are sampled. Use num_particles=1 for TraceEnum_ELBO's exact sum, or "
        "strict_enumeration_warning=False to silence this"
    ]


def mask_warnings(pair: Pair) -> list[str]:
    """A latent that is masked in the model alone has a density in q and none in p: no weight is p / q then."""
    found = []
    for name, site in latent_sites(pair.guide):
        prior = pair.model.nodes.get(name)
        mask = None if prior is None else prior["mask"]
        if isinstance(mask, Tensor) and not bool(mask.all()) and not _same_mask(mask, site["mask"]):
            found.append(
                f"latent site '{name}' is masked in the model and not alike in the guide: where it is masked its "
                "density counts in q and not in p, and the bound can pass the evidence. Put the same poutine.mask "
                "around it in the guide; for missing data, mask the observation instead of using obs_mask: "
                "with poutine.mask(mask=known): pyro.sample(..., obs=data)"
            )
    return found


def _same_mask(mask: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and bool((mask == other).all())


def weigh(pairs: Sequence[Pair], layout: Layout, num_particles: int, *, cut: bool = False) -> LogWeights:
    """Makes the log weights of K particles from one vectorised run or K sequential ones.

    Args:
        pairs: the runs.
        layout: where the columns lie.
        num_particles: K.
        cut: whether to tell apart the values that were cut.

    Raises:
        ValueError: where a weight is NaN or +inf.
    """
    common = outer_scale(pairs[0], layout)
    tables = [terms_of(pair, layout, common) for pair in pairs]
    shape = (num_particles, *(p.size for p in layout.plates))
    log_weights = joined([[(t.element, t.value) for t in table] for table in tables], layout, shape)
    score = joined([[(t.element, t.score) for t in table] for table in tables], layout, shape)
    score_log_q = joined([[(t.element, t.score_log_q) for t in table] for table in tables], layout, shape)
    weights = LogWeights(
        torch.zeros(shape) if log_weights is None else log_weights,  # a model and guide without any site
        plates=tuple(p.name for p in layout.plates),
        scale=layout.scale * (1.0 if common is None else common),
        constant=constants_of(tables),
        tempered=common is None and any(not same_scale(own_scale(s), 1.0) for s in weighed_sites(pairs[0], layout)),
        score=score,
        score_log_q=score_log_q,
        score_scale=_score_scale(tables),
        cut=cut_of(pairs, tables, layout, common, shape) if cut else None,
    )
    if not bool(weights.log_weights.isfinite().all()):
        _explain_infinite(weights, tables)
    return weights


def _score_scale(tables: Sequence[Sequence[Term]]) -> Scale:
    """The scale of log q of score-function sites inside the weights, if all have one; 1 if not."""
    common = one_scale([t.score_scale for table in tables for t in table if t.score is not None])
    return 1.0 if common is None else common


def require_full_plates(pair: Pair, layout: Layout) -> None:
    """Raises where a subsampled plate is not independent and particles would go inside its scale."""
    problem = subsampling_problem(pair, layout)
    if problem is not None:
        raise ValueError(problem)


def subsampling_problem(pair: Pair, layout: Layout) -> str | None:
    """What is wrong, and what to write instead, for a subsampled plate below a latent; None if nothing is."""
    latents = [s for t in (pair.model, pair.guide) for _, s in latent_sites(t)]
    if not latents:
        return None
    for site in weighed_sites(pair, layout):
        for frame in layout.outer_frames(site):
            if not is_subsampled(frame):
                continue
            owns = any(f.name == frame.name for s in latents for f in s["cond_indep_stack"])
            remedy = "write num_particles=1, or give it the full data (no subsample_size)"
            if owns:
                remedy += (
                    f"; num_particles=1, plate_particles={{'{frame.name}': K}} (from version 0.2 on) will give the "
                    "latents of the plate particles of their own"
                )
            return (
                f"plate '{frame.name}' (site '{site['name']}') shows {frame.size} of its {frame.full_size} elements, "
                "and is not independent: latents outside it, or a site that mixes its elements, tie them. With more "
                f"than one particle its scale would sit inside the logarithm and the loss would be no bound; {remedy}"
            )
    return None


def constants_of(tables: Sequence[Sequence[Term]]) -> dict[tuple[str, ...], Tensor]:
    """Constants by plate: scaled, averaged over particles (equal for all, but for a model's own randomness)."""
    constants: dict[tuple[str, ...], Tensor] = {}
    for table in tables:
        for term in table:
            if term.element is None:
                value = term.value.mean(0) / len(tables)
                constants[term.plates] = constants[term.plates] + value if term.plates in constants else value
    for plates, value in constants.items():
        if not bool((value < math.inf).all()):
            names = sorted({t.name for t in tables[0] if t.element is None and t.plates == plates})
            raise ValueError(f"log density is NaN or +inf at one of the sites {names}; look at the data and parameters")
    return constants


def _explain_infinite(weights: LogWeights, tables: Sequence[Sequence[Term]]) -> None:
    """Raises on NaN and +inf with the site's name; warns where every particle of an element is impossible."""
    terms = [t for table in tables for t in table]
    for term in terms:
        if bool(term.value.isnan().any()):
            raise ValueError(nan_message(term.role, term.name))
    for term in terms:
        if bool((term.value == math.inf).any()):
            raise ValueError(infinity_message(term.role, term.name))
    if bool(weights.log_weights.isnan().any()):
        raise ValueError("log weights are NaN although no site's log density is; look for overflow in the model")
    impossible = (weights.log_weights == -math.inf).all(0)
    if bool(impossible.any()):
        names = sorted(impossible_sites(tables))
        warnings.warn(
            f"all {weights.num_particles} particles are impossible (log weight -inf) for {int(impossible.sum())} of "
            f"{impossible.numel()} independent elements, through site {', '.join(map(repr, names))}; the bound is -inf "
            "there and its gradient 0. Let the guide reach values that the model allows, or use more particles",
            stacklevel=2,
        )


def impossible_sites(tables: Sequence[Sequence[Term]]) -> set[str]:
    """Names of the sites with a log density of -inf."""
    return {t.name for table in tables for t in table if bool((t.value == -math.inf).any())}
