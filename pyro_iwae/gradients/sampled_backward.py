# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Sampled backward: K particles forward without a graph, back-propagation through a few of them, drawn by weight.

Formula: sum_k v_k g_k is replaced by v_h g_h + sum_{k != h} (1 - v_h) (n_k / (D - 1)) g_k, where h is the heaviest
    particle, D the number of draws, and n_k how often k comes out of D - 1 systematic draws among the others, by
    weight: E n_k = (D - 1) v_k / (1 - v_h). g_k is what the inner estimator has beside v_k.
Bias: that of the inner estimator; the draws add noise of their own.
Cost: one pass through K particles without a graph, one pass forward and back through the drawn ones, each distinct one
    once; memory about that of D particles. The guide keeps its graph for all K.
Reference: "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2016, section 3,
    https://arxiv.org/abs/1509.00519).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_iwae.decisions import is_recording
from pyro_iwae.gradients.coefficients import Coefficients
from pyro_iwae.gradients.doubly_reparameterized import DoublyReparameterized
from pyro_iwae.gradients.gradient import PathGradient
from pyro_iwae.logweights import LogWeights
from pyro_iwae.options import as_count
from pyro_iwae.totals import Totals

__all__ = ["SampledBackward"]


class SampledBackward(PathGradient):
    """Another estimator, with back-propagation through ``draws`` particles in place of all K.

    See "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2016, section 3,
    https://arxiv.org/abs/1509.00519).

    Args:
        draws: how many particles to draw for each independent element, at least 1. From 2 on the heaviest one is
            always among them.
        inner: the estimator, :class:`DoublyReparameterized` by default.

    Raises:
        TypeError: where an argument has the wrong type.
        ValueError: where ``draws`` is below 1.

    Example::

        >>> index, count = SampledBackward(draws=2).draw(torch.tensor([0.7, 0.0, 0.3]))
        >>> index, count
        (tensor([0, 2]), tensor([1., 1.]))
    """

    needs = "a model without randomness of its own (dropout)"
    reference = "Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519"

    def __init__(self, draws: int = 8, inner: PathGradient | None = None) -> None:
        inner = DoublyReparameterized() if inner is None else inner
        if not isinstance(inner, PathGradient) or isinstance(inner, SampledBackward):
            raise TypeError(
                f"expected inner to be Pathwise(), StickTheLanding() or DoublyReparameterized(), got {inner!r}"
            )
        self.draws, self.inner = as_count("draws", draws), inner

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.inner.unbiased

    @property
    def cuts(self) -> bool:  # type: ignore[override]
        return self.inner.cuts

    def coefficients(self, weights: LogWeights, totals: Totals) -> Coefficients:
        """The inner estimator's, for all K particles.

        Raises:
            ValueError: where the objective has another part for the guide, or slopes that may be negative.
        """
        coefficients = self.inner.coefficients(weights, totals)
        if totals.guide is not totals or not totals.rising:
            raise ValueError(
                "SampledBackward draws particles by the objective's slopes, which must be the same for model and guide "
                "and not negative; write gradient=DoublyReparameterized() with this objective"
            )
        return coefficients

    def surrogate(self, weights: LogWeights, totals: Totals) -> Float[Tensor, "*plates"]:
        """Draws particles among those at hand, which have a graph already, and builds the surrogate of the drawn."""
        coefficients = self.coefficients(weights, totals)
        index, count = self.draw(coefficients.model)
        return coefficients.drawn(index, count).surrogate(weights.drawn(index))

    def draw(
        self, slopes: Float[Tensor, "particles *plates"]
    ) -> tuple[Int[Tensor, "draws *plates"], Float[Tensor, "draws *plates"]]:
        """Draws particles by their slopes (the weights, normalised), each distinct one once.

        Returns:
            Which particles, and for how many each stands. The sum over draws of ``count * g[index]`` has the mean
            sum_k g_k for any g that is 0 where the slope is.
        """
        if slopes.shape[0] <= self.draws:
            index = torch.arange(slopes.shape[0], device=slopes.device)
            index = index.reshape([-1] + [1] * (slopes.dim() - 1)).expand(slopes.shape)
            return index, torch.ones_like(slopes)
        if self.draws == 1:
            return _systematic(slopes, 1)
        heaviest = slopes.argmax(0, keepdim=True)  # max(0) waits for ever in a forked process
        index, count = _systematic(slopes.scatter(0, heaviest, 0.0), self.draws - 1)
        index = torch.where(count > 0.0, index, heaviest)  # an empty place must not hold an impossible particle
        return torch.cat([heaviest, index]), torch.cat([(slopes.gather(0, heaviest) > 0.0).to(slopes.dtype), count])

    def __repr__(self) -> str:
        return f"SampledBackward(draws={self.draws}, inner={self.inner!r})"


def _systematic(masses: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Systematic draws by mass: distinct indices, and (total mass / draws) n_k / mass_k for each; 0 in empty places."""
    edges = masses.movedim(0, -1).cumsum(-1).contiguous()
    total = edges[..., -1:]
    step = torch.arange(draws, dtype=masses.dtype, device=masses.device)
    points = (step + torch.rand_like(total)) * (total / draws)
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # never beyond the last mass
    index = torch.searchsorted(edges, points, right=True).clamp(max=masses.shape[0] - 1).movedim(-1, 0)
    mass = masses.gather(0, index)
    times = (index.unsqueeze(0) == index.unsqueeze(1)).sum(1).to(masses.dtype)
    count = torch.where(mass > 0.0, times * total.movedim(-1, 0) / (draws * mass), 0.0)
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[1:] = index[1:] == index[:-1]
    order = repeated.to(torch.uint8).argsort(dim=0, stable=True)  # what is drawn again comes last
    most = draws if is_recording() else int((~repeated).sum(0).max())
    count = count.masked_fill(repeated, 0.0)
    return index.gather(0, order)[:most], count.gather(0, order)[:most]
