# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The weight of a given draw where plates have particles of their own: among companions drawn anew at each level."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from pyro_iwae.drawn import settable
from pyro_iwae.given import shaped_draws
from pyro_iwae.handlers import Minibatch
from pyro_iwae.particles import Call
from pyro_iwae.plates import latent_sites
from pyro_iwae.selection import latent_values
from pyro_iwae.weighing import Particles

__all__ = ["weigh_among"]


def weigh_among(
    call: Call, draws: Mapping[str, Tensor], weigh: Callable[..., Particles], minibatch: Minibatch
) -> Float[Tensor, "draws *plates"]:
    """The root's log weight of each draw, in which its own values are the first of the particles of every plate.

    What lies further out is set first; the companions further in are drawn given it, and so on.

    Args:
        call: what to run.
        draws: the model's latents by name, each ``(draws, *site shape)``.
        weigh: ``weigh_particles`` with its options filled in, to be told how many, which values and minibatch.
        minibatch: indices that are settled already.
    """
    count = next(iter(draws.values())).shape[0]
    first = weigh(call, 1, minibatch=minibatch)
    tree = first.structure.run.tree
    sites = {n: s for n, s in latent_sites(first.pairs[0].guide) if settable(s)}
    depths = {n: len(tree.path(tree.home(s))) - 1 for n, s in sites.items()}
    wanted = shaped_draws(call, draws, first, sites)
    values = {n: wanted[n] for n, depth in depths.items() if depth == 0}
    for level in range(1, max(depths.values(), default=0) + 1):
        at = weigh(call, count, values=values, sites=sites, minibatch=minibatch, averaged=False)
        found, _ = latent_values(at)
        for name in (n for n, depth in depths.items() if depth == level):
            values[name] = found[name].clone()
            values[name][(0,) * level] = wanted[name]
    at = weigh(call, count, values=values, sites=sites, minibatch=minibatch, averaged=False)
    return at.weights.log_weights
