# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The weights at latents that are given instead of drawn, and log p(x, z) there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from pyro import poutine
from torch import Tensor

from pyro_iwae.drawn import settable
from pyro_iwae.handlers import Minibatch
from pyro_iwae.particles import Call, run_particles, spread_value
from pyro_iwae.plates import Site, latent_sites
from pyro_iwae.selection import latent_values
from pyro_iwae.terms import model_log_density
from pyro_iwae.traces import Pair, Unmasked
from pyro_iwae.unconstrain import auxiliary_values
from pyro_iwae.weighing import Particles

__all__ = ["shaped_draws", "weigh_at"]


def weigh_at(
    call: Call,
    draws: Mapping[str, Tensor],
    weigh: Callable[..., Particles],
    minibatch: Minibatch | None = None,
    *,
    masked: bool = False,
) -> tuple[Particles, Tensor]:
    """Weights and log p(x, z), or log p(x, z, c), at given draws.

    Args:
        call: what to run.
        draws: the model's latents by name, each ``(draws, *site shape)``.
        weigh: ``weigh_particles`` with its options filled in, to be told how many, which values and minibatch.
        minibatch: indices that are settled already.
        masked: whether masked enumerated sites are left out of log p, as an ELBO outside leaves them out.

    Returns:
        The particles, one for each draw, and log p, ``(draws, *plates)``.

    Raises:
        ValueError: where the guide cannot draw these values, or the model has no such latents.
        NotImplementedError: where the guide's density at given values is not known.
    """
    guide, count = call.guide, next(iter(draws.values())).shape[0]
    first = weigh(call, 1, minibatch=minibatch)
    if not masked:  # what a handler has set is as wide as the plates around it
        _require_shapes(draws, first)
    sites = {n: s for n, s in latent_sites(first.pairs[0].guide) if settable(s)}
    shaped, run = shaped_draws(call, draws, first, sites), first.structure.run
    values = {n: spread_value(v, sites[n], run) if count > 1 else v for n, v in shaped.items()}
    try:
        at = weigh(call, count, values=values, minibatch=minibatch, averaged=False)
    except (KeyError, NotImplementedError) as error:  # a flow without an inverse
        raise NotImplementedError(
            "expected a guide that can be asked for its density at given latents, got "
            f"{type(guide).__name__}, whose flow has no inverse; use one that has (AutoIAFNormal), or "
            "expectation() and sample()"
        ) from error
    _require_reached(draws, at)
    summed_out = {n: v for n, v in draws.items() if n not in dict(latent_sites(at.pairs[0].guide))}
    pairs = _at_enumerated(call, summed_out, values, at, masked) if summed_out else at.pairs
    return at, model_log_density(pairs, at.layout, at.common, at.weights.log_weights.shape)


def _at_enumerated(
    call: Call, given: Mapping[str, Tensor], values: Mapping[str, Tensor], at: Particles, masked: bool
) -> list[Pair]:
    """The runs at given draws once more, with given values for the sites that are otherwise summed out."""
    count, run = at.weights.num_particles, at.structure.run
    sites = at.pairs[0].model.nodes
    unknown = sorted(given.keys() - sites.keys())
    if unknown:
        raise ValueError(f"expected draws of the model's latents, got {unknown}, which the model does not have")
    together = run.vectorized and count > 1
    rows = [slice(None)] if together else [slice(k, k + 1) for k in range(count)]
    unmasked = Unmasked(lambda msg: msg["name"] in given and not masked)
    pairs = []
    for row in rows:
        fixed = {n: spread_value(v, sites[n], run) if together else v[row.start] for n, v in given.items()}
        pairs += run_particles(
            replace(call, model=unmasked(poutine.condition(call.model, fixed))),
            num_particles=count if together else 1,
            run=run,
            minibatch=at.minibatch,
            values={n: v[row] for n, v in values.items()},
        )
    return pairs


def _require_shapes(draws: Mapping[str, Tensor], first: Particles) -> None:
    """Raises where draws are not in the shape of ``ImportanceResampledGuide.sample``."""
    values, _ = latent_values(first)
    count = len(next(iter(draws.values())))
    for name in sorted(draws.keys() & values.keys()):
        expected, found = (count, *values[name].shape[1:]), tuple(draws[name].shape)
        if found != expected:
            raise ValueError(
                f"expected draws of site '{name}' in shape {expected}, the number of draws in front, got {found}; give "
                "them as sample() returns them"
            )


def _require_reached(draws: Mapping[str, Tensor], at: Particles) -> None:
    """Raises where the guide cannot draw what it was asked about: a point estimate elsewhere."""
    values, _ = latent_values(at)
    for name, value in draws.items():
        if name in values and not torch.allclose(values[name].to(value), value, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"expected values that the guide can draw, got others at site '{name}', which the guide sets to a "
                "value of its own (a Delta): its density there is 0"
            )


def shaped_draws(
    call: Call, draws: Mapping[str, Tensor], first: Particles, sites: Mapping[str, Site]
) -> dict[str, Tensor]:
    """Values for latents of the guide at given draws, each ``(draws, *site shape)``.

    Raises:
        NotImplementedError: where a latent of the model is missing, or the guide draws others beside these.
    """
    known = {**draws, **auxiliary_values(call.guide, draws)}
    missing = sorted(sites.keys() - known.keys())
    forgotten = [n for n in missing if n in first.pairs[0].model.nodes]
    if forgotten:
        raise NotImplementedError(
            f"expected draws of every latent of the model, got none for {forgotten}: the density of the others alone "
            "is not known"
        )
    if missing:
        raise NotImplementedError(
            f"expected values for every latent of the guide, got none for {missing}; {type(call.guide).__name__} "
            "draws these beside the model's latents, so that its density at given latents is not known"
        )
    return {name: _shaped(known[name], site, first, call) for name, site in sites.items()}


def _shaped(value: Tensor, site: Site, first: Particles, call: Call) -> Tensor:
    structure, event_shape = first.structure, site["fn"].event_shape
    batch_dims = structure.batch_dims.get(site["name"], len(site["fn"].batch_shape))
    if value.dim() - 1 - len(event_shape) != batch_dims:  # a joint guide's one latent
        sizes = {f.dim: f.size for f in call.enclosing}
        value = value.reshape(len(value), *(sizes.get(d, 1) for d in range(-batch_dims, 0)), *event_shape)
    return value
