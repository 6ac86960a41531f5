# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The log density at a site, as it stands in a trace; an error names the site."""

from __future__ import annotations

from typing import Any

import torch
from pyro import distributions as dist
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from torch import Tensor

from pyro_iwae.plates import Site

__all__ = ["infinity_message", "is_discrete", "log_prob_of", "nan_message", "score_parts_of", "spread", "varies_along"]

# Their densities take values with more dimensions in front, and work something out of the parameters alone.
BROADCASTING = frozenset(
    {
        dist.Beta,
        dist.Cauchy,
        dist.Dirichlet,
        dist.Exponential,
        dist.Gamma,
        dist.Laplace,
        dist.MultivariateNormal,
        dist.Normal,
        dist.StudentT,
    }
)
NARROW = "_pyro_iwae_narrow"  # an expanded distribution's attribute: what it was before


MISSING_VALUES = "For missing values put any valid number in their place, and mask that with poutine.mask"


def is_discrete(fn: Any) -> bool:
    """Whether it gives probabilities and not densities; one that does not say is taken to give densities."""
    try:
        return bool(getattr(fn.support, "is_discrete", False))
    except (AttributeError, NotImplementedError):
        return False


def spread(msg: Site) -> None:
    """Gives a site's distribution the dimensions of its plates, and remembers what it was without them.

    The logarithm of a scale, say, is the same for all particles: a density is worked out of the distribution as it
    was before it got their dimension, wherever that is known to give the same.
    """
    before = msg["fn"]
    BroadcastMessenger._pyro_sample(msg)
    base = before.base_dist if type(before) is dist.Independent else before
    if msg["fn"] is not before and type(base) in BROADCASTING:
        setattr(msg["fn"], NARROW, _narrow(before))


def _narrow(fn: Any) -> Any:
    return getattr(fn, NARROW, fn)


def _wide(log_prob: Tensor, fn: Any) -> Tensor:
    """With the dimensions that the distribution has now, which are not filled."""
    if log_prob.shape == getattr(fn, "batch_shape", None) or not hasattr(fn, NARROW):
        return log_prob
    return log_prob.expand(torch.broadcast_shapes(log_prob.shape, fn.batch_shape))


def log_prob_of(site: Site) -> Tensor:
    """Unscaled, unmasked log density at the site; an error names the site."""
    if "unscaled_log_prob" not in site:
        try:
            log_prob = _narrow(site["fn"]).log_prob(site["value"], *site["args"], **site["kwargs"])
            site["unscaled_log_prob"] = _wide(log_prob, site["fn"])
        except ValueError as error:
            raise ValueError(no_density_message(site, error)) from error
    return site["unscaled_log_prob"]


def varies_along(site: Site, dim: int) -> bool:
    """Whether the log density at the site differs along a dimension."""
    shape = log_prob_of(site).shape
    return len(shape) >= -dim and shape[dim] > 1


def no_density_message(site: Site, error: Exception) -> str:
    """What to say of a value that its distribution does not take."""
    missing = isinstance(site["value"], Tensor) and bool(site["value"].isnan().any())
    return f"no log density at site '{site['name']}': {error}" + (f"; {MISSING_VALUES}" if missing else "")


def nan_message(role: str, name: str) -> str:
    """What to say of a density that is not a number."""
    return f"log density is NaN at {role} site '{name}'; look at its parameters and its data. {MISSING_VALUES}"


def infinity_message(role: str, name: str) -> str:
    """What to say of a density that makes a weight infinite."""
    sign = "+inf" if role == "model" else "-inf at its own draw"
    return f"log density is {sign} at {role} site '{name}'; a weight cannot be infinite"


def score_parts_of(site: Site) -> Any:
    """Pyro's ScoreParts of a guide site, unscaled; an error names the site."""
    if "unscaled_score_parts" not in site:
        try:
            parts = _narrow(site["fn"]).score_parts(site["value"], *site["args"], **site["kwargs"])
            parts = type(parts)(*(_wide(p, site["fn"]) if isinstance(p, Tensor) else p for p in parts))
        except ValueError as error:
            raise ValueError(no_density_message(site, error)) from error
        site["unscaled_score_parts"], site["unscaled_log_prob"] = parts, parts.log_prob
    return site["unscaled_score_parts"]
