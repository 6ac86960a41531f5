# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Cuts the reparameterised values of a guide from the parameters that made them, while it runs.

Each such value is handed on as a *leaf*, the same numbers one node further on in the graph. Model, later guide sites
and all densities see leaves only. So the derivative at a leaf is that of the densities by z alone, and what it is
multiplied with on its way back through the value is for the estimator to say.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_iwae.drawn import Drawn, settable
from pyro_iwae.edges import require_fixed_edges
from pyro_iwae.flows import density_at
from pyro_iwae.plates import Site

__all__ = ["CutSite", "CutValues"]

UNCUT = "gradient=Pathwise(), with any objective but PIWAE, which tells the guide's part apart"


@dataclass(frozen=True, eq=False)
class CutSite:
    """A value with the graph that made it, and its leaf; whether its density took solving with a flow's Jacobian."""

    value: Tensor
    leaf: Tensor
    solved: bool

    def require_unwritten(self, name: str) -> None:
        """Raises where something was written into the value: its density was taken before."""
        if self.leaf._version:
            raise ValueError(
                f"expected the value of guide site '{name}' to stay as it was drawn, got one that was changed in place "
                f"(z.mul_(2), z[0] = 0, z += 1); write a new tensor (z * 2, torch.where, z + 1), or {UNCUT}"
            )


class CutValues(Messenger):
    """Cuts the guide's values as they are drawn, and keeps the densities there.

    Args:
        leaves_out: whether the estimator leaves out what a parameter does to log q directly.
        given: sites whose values are given, which were cut when they were drawn.
    """

    def __init__(self, leaves_out: bool, given: Collection[str] = ()) -> None:
        super().__init__()
        self.leaves_out = leaves_out
        self.given = given
        self.sites: dict[str, CutSite] = {}
        self.parts: dict[str, Any] = {}

    def fill(self, trace: Trace) -> None:
        """Hands the densities over to the guide's trace."""
        for name, parts in self.parts.items():
            if name in trace.nodes:
                site: Site = trace.nodes[name]
                site["unscaled_score_parts"], site["unscaled_log_prob"] = parts, parts.log_prob

    def _pyro_post_sample(self, msg: Site) -> None:
        value = msg["value"]
        if hasattr(value, "_unquantize"):
            raise NotImplementedError(
                f"expected a draw that has a density, got a straight-through one at guide site '{msg['name']}' "
                f"({msg['fn']}), whose value is rounded and whose gradient is not. Write {UNCUT}"
            )
        if msg["name"] in self.given:
            return
        if msg["is_observed"] or site_is_subsample(msg) or not msg["fn"].has_rsample or not value.requires_grad:
            return
        if isinstance(msg["fn"], Drawn):
            raise NotImplementedError(
                f"expected a guide whose sites draw by themselves, got '{msg['name']}' of a resampled one: the choice "
                f"of a particle has no way through z. Write {UNCUT}"
            )
        if not settable(msg):
            return  # it follows from what comes before it, and adds to the weights as the model does
        leaf = value.clone()  # no view: what is written into it must not reach the value
        parts, solved = density_at(msg, leaf)
        if not is_identically_zero(parts.score_function):
            return  # drawn by rejection: partly a score-function site, and treated as one
        if self.leaves_out:
            require_fixed_edges(msg)
        self.sites[msg["name"]], self.parts[msg["name"]] = CutSite(value, leaf, solved), parts
        msg["value"] = leaf
