# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Indices drawn by weight, at once or while particles pass by."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["count_distinct", "multinomial", "several", "streaming", "systematic", "without_replacement"]


def multinomial(log_weights: Float[Tensor, "particles *plates"]) -> Int[Tensor, "*plates"]:
    """Draws one particle for each independent element, k with probability w_k / sum_j w_j.

    By the Gumbel-max trick, which needs no normalisation, and never takes a particle of weight 0 (unless all are).

    Args:
        log_weights: unnormalised log weights in nats, shape ``(particles, *plates)``.

    Returns:
        Indices, shape ``(*plates)``.

    Example::

        >>> multinomial(torch.tensor([-torch.inf, 0.0]))
        tensor(1)
    """
    log_weights = log_weights.detach()
    exponential = torch.empty_like(log_weights).exponential_()
    return (log_weights - exponential.log()).argmax(0)


def streaming(
    log_weights: Float[Tensor, "particles *plates"], log_sum: Float[Tensor, "*plates"]
) -> tuple[Int[Tensor, "*plates"], Bool[Tensor, "*plates"], Float[Tensor, "*plates"]]:
    """Draws one particle for each independent element among particles that pass by in chunks, which are not kept.

    After each chunk the particle that is held is k with probability w_k / sum_j w_j, over all that have passed.

    Args:
        log_weights: of a chunk, unnormalised, in nats, shape ``(particles, *plates)``.
        log_sum: log-sum-exp of all that have passed before, shape ``(*plates)``; -inf before the first chunk.

    Returns:
        The chunk's own draw, whether it takes the place of the particle that is held, and the new log-sum-exp; each of
        shape ``(*plates)``.

    Example::

        >>> streaming(torch.tensor([-torch.inf, 0.0]), torch.tensor(-torch.inf))
        (tensor(1), tensor(True), tensor(0.))
    """
    own = log_weights.detach().logsumexp(0)
    total = torch.logaddexp(log_sum, own)
    share = torch.where(total == -torch.inf, 0.0, (own - total).exp())
    return multinomial(log_weights), torch.rand_like(share) < share, total


def several(log_weights: Float[Tensor, "particles *plates"], draws: int) -> Int[Tensor, "draws *plates"]:
    """Independent draws from the same particles, each k with probability w_k / sum_j w_j.

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.
        draws: how many.

    Returns:
        Indices, shape ``(draws, *plates)``; particles at random where all are impossible.

    Example::

        >>> several(torch.tensor([-torch.inf, 0.0]), 3)
        tensor([1, 1, 1])
    """
    return _inverted(log_weights, torch.rand(draws, *log_weights.shape[1:], device=log_weights.device))


def systematic(log_weights: Float[Tensor, "particles *plates"], draws: int) -> Int[Tensor, "draws *plates"]:
    """Draws at even distances along the cumulated weights: each particle as often as expected, to less than one.

    In random order, and in one of its own for each element, so that elements stay independent of each other. Each
    draw alone is k with probability w_k / sum_j w_j.

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.
        draws: how many.

    Returns:
        Indices, shape ``(draws, *plates)``.

    Example::

        >>> systematic(torch.zeros(3), 3).sort().values
        tensor([0, 1, 2])
    """
    shape, device = log_weights.shape[1:], log_weights.device
    place = torch.arange(draws, device=device).reshape(-1, *(1,) * len(shape))
    index = _inverted(log_weights, (place + torch.rand(shape, device=device)) / draws)
    return index.gather(0, torch.rand(draws, *shape, device=device).argsort(0))


def without_replacement(log_weights: Float[Tensor, "particles *plates"], draws: int) -> Int[Tensor, "draws *plates"]:
    """Different particles, the next one always by weight among those that are left (the largest of Gumbel keys).

    The first alone is a draw by weight; all of them together are flatter than the weights. See "Stochastic Beams and
    Where to Find Them" (Kool, van Hoof, Welling 2019, https://arxiv.org/abs/1903.06059).

    Args:
        log_weights: unnormalised, in nats, shape ``(particles, *plates)``.
        draws: how many, at most the number of particles that are possible in each element.

    Returns:
        Indices, shape ``(draws, *plates)``, in the order in which they were drawn.

    Raises:
        ValueError: where an element has fewer possible particles.

    Example::

        >>> without_replacement(torch.tensor([0.0, -torch.inf, 0.0]), 2).sort().values
        tensor([0, 2])
    """
    possible = (log_weights.detach() > -torch.inf).sum(0)
    if int(possible.min()) < draws:
        raise ValueError(
            f"expected at most {int(possible.min())} draws without replacement, as many as particles are possible, "
            f"got {draws}; take more particles, or draw with replacement"
        )
    exponential = torch.empty_like(log_weights.detach()).exponential_()
    return (log_weights.detach() - exponential.log()).topk(draws, 0).indices


def count_distinct(index: Int[Tensor, "draws *plates"]) -> Int[Tensor, "*plates"]:
    """How many different particles there are among draws.

    Example::

        >>> count_distinct(torch.tensor([4, 1, 4]))
        tensor(2)
    """
    ordered = index.sort(0).values
    return 1 + (ordered.diff(dim=0) != 0).sum(0)


def _inverted(log_weights: Tensor, places: Tensor) -> Tensor:
    """The particles whose parts of the cumulated weights hold these places in [0, 1), in float64."""
    exact = log_weights.detach().double()
    largest = exact.amax(0)
    weights = torch.where(largest == -torch.inf, 1.0, (exact - largest).exp())
    cumulated = weights.cumsum(0)
    cumulated = (cumulated / cumulated[-1]).movedim(0, -1).contiguous()
    index = torch.searchsorted(cumulated, places.double().movedim(0, -1).contiguous(), right=True)
    return index.clamp(max=len(log_weights) - 1).movedim(-1, 0)
