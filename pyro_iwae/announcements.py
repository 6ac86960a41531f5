# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What is worth a warning when a model and guide are new: said once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_iwae.densities import is_discrete
from pyro_iwae.drawn import innermost, settable
from pyro_iwae.plates import Site, latent_sites
from pyro_iwae.structure import Structure
from pyro_iwae.traces import Pair

__all__ = ["announce", "announce_cuts"]


def announce(structure: Structure, num_particles: int, of_enumeration: bool, known: Structure | None) -> Structure:
    """Warns of what the verdict found, unless the last one said the same; returns it with all that was said."""
    messages = list(structure.messages)
    if structure.probe is not None:
        messages += mask_warnings(structure.probe)
        messages += kind_warnings(structure.probe)
        messages += enumeration_warnings(structure.probe) if of_enumeration and num_particles > 1 else []
    for message in messages:
        if known is None or message not in known.messages:
            warnings.warn(message, UserWarning, stacklevel=4)
    return replace(structure, messages=tuple(messages))


def announce_cuts(pair: Pair, said: set[str]) -> None:
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


def kind_warnings(pair: Pair) -> list[str]:
    """A latent that is discrete in the model and drawn from a density in the guide: their quotient is no weight."""
    found = []
    for name, site in latent_sites(pair.guide):
        prior = pair.model.nodes.get(name)
        if prior is None or isinstance(innermost(site["fn"]), Delta):
            continue
        if is_discrete(prior["fn"]) and site["fn"].has_rsample:
            found.append(
                f"latent site '{name}' is discrete in the model ({type(prior['fn']).__name__}) and drawn from a "
                f"density in the guide ({type(site['fn']).__name__}): log p is a probability's, log q a density's, and "
                "the bound bounds nothing. Draw it from a discrete distribution in the guide (it gets a "
                "score-function gradient), sum it out (infer={'enumerate': 'parallel'} in the model), or make it "
                "continuous in the model"
            )
    return found


def _same_mask(mask: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and bool((mask == other).all())
