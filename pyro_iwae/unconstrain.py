# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The auxiliary latents of Pyro's autoguides at given values of the model's latents.

Many autoguides draw an unconstrained auxiliary latent and set the model's latents from it with a Delta. To ask
for the guide's density at given values, that step is taken backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions.transforms import biject_to
from pyro.infer.autoguide import AutoContinuous, AutoGuideList, AutoNormal
from torch import Tensor

__all__ = ["auxiliary_values"]


def auxiliary_values(guide: Callable[..., Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a guide's auxiliary latents, where it is an autoguide that has some.

    Args:
        guide: the guide, after its first call.
        values: the model's latents by name, each ``(draws, *site shape)``.

    Returns:
        The auxiliary latents by name; empty for guides without. Each is ``(draws, *site shape)``; the one latent of
        a joint guide has the elements of enclosing plates, if any, in one dimension after the draws.
    """
    if isinstance(guide, AutoGuideList):
        parts = [auxiliary_values(part, values) for part in guide]
        return {name: value for part in parts for name, value in part.items()}
    if isinstance(guide, AutoNormal):
        return {
            f"{name}_unconstrained": biject_to(site["fn"].support).inv(values[name])
            for name, site in guide.prototype_trace.iter_stochastic_nodes()
            if name in values
        }
    if isinstance(guide, AutoContinuous):
        missing = [n for n, _ in guide.prototype_trace.iter_stochastic_nodes() if n not in values]
        if missing:
            raise ValueError(f"expected values for all latents of {type(guide).__name__}, got none for {missing}")
        flat: list[Tensor] = []
        for name, site in guide.prototype_trace.iter_stochastic_nodes():
            inverse = biject_to(site["fn"].support).inv
            flat.append(inverse(values[name]).reshape(len(values[name]), -1, inverse(site["value"]).numel()))
        latent = torch.cat(flat, -1)
        return {f"_{guide._pyro_name}_latent": latent.squeeze(1) if latent.shape[1] == 1 else latent}
    return {}
