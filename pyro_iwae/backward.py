# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The model once more, with a graph, at the particles that were drawn for back-propagation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_iwae.decisions import holds
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Call, run_model, spread_value
from pyro_iwae.selection import latent_values
from pyro_iwae.terms import model_log_density, outer_scale, terms_of
from pyro_iwae.traces import Pair
from pyro_iwae.weighing import Particles, constants_of

__all__ = ["weigh_drawn"]


def weigh_drawn(call: Call, particles: Particles, index: Tensor, count: Tensor) -> LogWeights:
    """The weights of drawn particles, with the graph of a model that was run without one for all K.

    Args:
        call: what was run.
        particles: K weighed particles, of which the guide has a graph.
        index: the particles drawn for each independent element, ``(draws, *plates)``.
        count: for how many each stands; 0 in empty places.

    Raises:
        ValueError: where the model does not give the same again.
    """
    layout, run = particles.layout, particles.structure.run
    values, sites = latent_values(particles)
    taken = {}
    for name, value in values.items():
        where = layout.align(index, sites[name], value)
        chosen = value.gather(0, where.expand(-1, *value.shape[1:]))
        taken[name] = spread_value(chosen, sites[name], run)
    traces = run_model(call, taken, num_particles=index.shape[0], run=run, minibatch=particles.minibatch)
    guide = particles.pairs[0].guide
    pairs = [Pair(trace, guide) for trace in traces]
    log_p = model_log_density(pairs, layout, particles.common, index.shape)
    with torch.no_grad():
        shape = particles.weights.log_weights.shape
        first = model_log_density(particles.pairs, layout, particles.common, shape).gather(0, index)
    gap = torch.where(count > 0.0, log_p - first, 0.0)  # of value 0, and with the graph of the model
    _require_repeatable(gap, first)
    weights = particles.weights.drawn(index)
    cut = None if weights.cut is None else replace(weights.cut, rest=weights.cut.rest + gap)
    tables = [[t for t in terms_of(pair, layout, outer_scale(pair, layout)) if t.role == "model"] for pair in pairs]
    return replace(weights, log_weights=weights.log_weights + gap, cut=cut, constant=constants_of(tables))


def _require_repeatable(gap: Tensor, first: Tensor) -> None:
    """Raises where log p of a particle is not what it was without a graph."""
    limit = torch.finfo(gap.dtype).eps ** 0.5 * (1.0 + first.abs().nan_to_num(posinf=0.0, neginf=0.0))
    if not holds((gap.detach().abs() <= limit).all()):
        raise ValueError(
            "SampledBackward needs a model that gives the same log density when it is run again at the same latents, "
            f"got a difference of {gap.abs().max().item():.3g} nats; a model with randomness of its own (dropout) or "
            "BatchNorm in training mode cannot be run twice. Put it into eval mode, or write "
            "gradient=DoublyReparameterized()"
        )
