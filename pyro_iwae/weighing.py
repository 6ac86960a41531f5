# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""K particles of a model and guide, run as the verdict on these two says, and weighed.

Loss, gradient, resampling and reports all begin here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_iwae.inspection import Structure, StructureCache, inspect
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Minibatch, run_particles
from pyro_iwae.plates import Layout, latent_sites
from pyro_iwae.traces import Pair, weigh

__all__ = ["Particles", "weigh_particles"]


@dataclass(frozen=True)
class Particles:
    """K weighed particles and what they came from."""

    weights: LogWeights
    pairs: list[Pair]
    layout: Layout
    structure: Structure
    minibatch: Minibatch


def weigh_particles(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int,
    cache: StructureCache,
    vectorize: bool | None,
    max_plate_nesting: float,
    warn_of_enumeration: bool = True,
    enclosing: Sequence[CondIndepStackFrame] = (),
    minibatch: Minibatch | None = None,
    values: Mapping[str, Any] | None = None,
) -> Particles:
    """Runs and weighs K particles; model and guide are inspected when they, their sites or their plates are new.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_particles: K.
        cache: where the verdicts are kept.
        vectorize: True and False force; None goes by the inspection.
        max_plate_nesting: as for ``Trace_ELBO``.
        warn_of_enumeration: warn where K > 1 samples guide sites that ask for enumeration.
        enclosing: plates, entered further out, to run in.
        minibatch: indices that are settled already.
        values: values for latents of the guide, as a run of K particles wants them.
    """
    modes = tuple(getattr(fn, "training", None) for fn in (model, guide))  # BatchNorm mixes elements in training
    key = cache.key(model, guide, modes, tuple((f.name, f.dim) for f in enclosing), vectorize, max_plate_nesting)
    minibatch = Minibatch() if minibatch is None else minibatch

    def look() -> Structure:
        structure = inspect(
            model, guide, args, kwargs, vectorize=vectorize, max_plate_nesting=max_plate_nesting, enclosing=enclosing
        )
        _announce(structure, num_particles, warn_of_enumeration, cache.latest(key))
        attempts = 1 if known is None else known.attempts + 1
        structure = replace(structure, probe=None, attempts=attempts)
        cache.store(key, structure)
        return structure

    def run(structure: Structure) -> list[Pair]:
        return run_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=num_particles,
            run=structure.run,
            minibatch=minibatch,
            enclosing=enclosing,
            values=values,
        )

    known = cache.latest(key)
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
        structure = cache.find(key, structure.signature_of(pairs[0], num_particles)) or look()
        cache.store(key, structure)
        if structure.run != before:
            pairs = run(structure)
    layout = _common_layout(structure, pairs, num_particles)
    return Particles(weigh(pairs, layout, num_particles), pairs, layout, structure, minibatch)


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


def _announce(structure: Structure, num_particles: int, of_enumeration: bool, known: Structure | None) -> None:
    """Warns of what the verdict found, unless the last one said the same."""
    messages = list(structure.messages)
    if of_enumeration and num_particles > 1 and structure.probe is not None:
        names = [n for n, s in latent_sites(structure.probe.guide) if s["infer"].get("enumerate")]
        if names:
            messages.append(
                f"guide sites {names} ask for enumeration, which more than one particle cannot do (the exact bound has "
                "one term for each combination): they are sampled. Use num_particles=1 for TraceEnum_ELBO's exact sum, "
                "or strict_enumeration_warning=False to silence this"
            )
    for message in messages:
        if known is None or message not in known.messages:
            warnings.warn(message, UserWarning, stacklevel=4)
