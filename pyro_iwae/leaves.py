# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""From traces whose values were cut to the cut of their log weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.cut import Cut
from pyro_iwae.plates import Layout, Scale, Site
from pyro_iwae.terms import Term, inner_scale, joined, one_scale, sum_columns
from pyro_iwae.traces import Pair

__all__ = ["cut_of"]


def cut_of(
    pairs: Sequence[Pair], tables: Sequence[Sequence[Term]], layout: Layout, common: Scale | None, shape: Sequence[int]
) -> Cut:
    """The cut that belongs to log weights.

    Args:
        pairs: the runs that were weighed.
        tables: their terms.
        layout: where the columns lie.
        common: the scale that stays outside the weights.
        shape: of the weights, ``(particles, *plates)``.
    """
    sites = [(pair, name) for pair in pairs for name in pair.cuts]
    for pair, name in sites:
        pair.cuts[name].require_unwritten(name)
    nodes: list[Site] = [pair.guide.nodes[name] for pair, name in sites]
    rest, log_q = (
        joined([list(_parts(pair, table, cut=cut)) for pair, table in zip(pairs, tables, strict=True)], layout, shape)
        for cut in (False, True)
    )
    known = log_q if rest is None else rest
    template = torch.zeros(shape) if known is None else known

    def gather(values: Sequence[Tensor]) -> Tensor:
        """Sums over particles and over all that is not an independent plate."""
        parts = []
        for site, value in zip(nodes, values, strict=True):
            event_dim = site["fn"].event_dim
            value = value.sum(list(range(-event_dim, 0))) if event_dim else value
            parts.append((layout.element(site), layout.columns(value).sum(0, keepdim=True)))
        found = sum_columns(parts, layout)
        return template.new_zeros(shape[1:]) if found is None else found.squeeze(0)

    def spread(columns: Tensor) -> list[Tensor]:
        """Rows of the particles of each run, laid along its values."""
        rows = iter(columns.split([_particles(pair, layout) for pair in pairs]))
        found = []
        for pair in pairs:
            row = next(rows)
            for name, cut_site in pair.cuts.items():
                site, value = pair.guide.nodes[name], cut_site.value
                if layout.particle_dim is None:
                    found.append(layout.align(row, site, value.unsqueeze(0)).squeeze(0))
                else:
                    found.append(layout.align(row, site, value))
        return found

    return Cut(
        names=tuple(name for _, name in sites),
        values=tuple(pair.cuts[name].value for pair, name in sites),
        leaves=tuple(pair.cuts[name].leaf for pair, name in sites),
        masks=tuple(_mask(site) for site in nodes),
        rest=torch.zeros_like(template) if rest is None else rest,
        log_q=torch.zeros_like(template) if log_q is None else log_q,
        scale=one_scale([inner_scale(site, layout, common) for site in nodes]),
        downstream=next(_downstream(pairs, tables), None),
        gather=gather,
        spread=spread,
    )


def _parts(pair: Pair, table: Sequence[Term], *, cut: bool) -> Iterator[tuple[tuple[int, ...] | None, Tensor | None]]:
    """Either log q of what was cut, or all else but log q of score-function sites."""
    for term in table:
        if term.role == "guide" and term.name in pair.cuts:
            if cut:
                yield term.element, -term.value
        elif not cut:
            yield term.element, term.value if term.score_log_q is None else term.value + term.score_log_q


def _particles(pair: Pair, layout: Layout) -> int:
    """How many particles one run holds."""
    if layout.particle_dim is None:
        return 1
    frames = (f for _, _, s in pair.sites() for f in s["cond_indep_stack"] if f.dim == layout.particle_dim)
    return next((f.size for f in frames), 1)


def _mask(site: Site) -> Tensor | None:
    """Where the site's log q counts, to broadcast with its value; None where it does everywhere."""
    fn = site["fn"]
    masks: list[tuple[Any, int]] = [(site["mask"], len(fn.event_shape))]
    while hasattr(fn, "base_dist"):  # torch's own distributions among them, which know no event_dim
        masks.append(
            (getattr(fn, "_mask", None), len(fn.event_shape))
        )  # inside an Independent some events are no events yet
        fn = fn.base_dist
    found = None
    for mask, events in masks:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=site["value"].device)
            mask = mask.reshape(mask.shape + (1,) * events)
            found = mask if found is None else found & mask
    return found


def _downstream(pairs: Sequence[Pair], tables: Sequence[Sequence[Term]]) -> Iterator[tuple[str, str]]:
    """Cut sites, and score-function sites whose law depends on them."""
    for pair, table in zip(pairs, tables, strict=True):
        leaves = [site.leaf for site in pair.cuts.values()]
        for term in table:
            if leaves and term.score is not None and term.score.requires_grad:
                slopes = torch.autograd.grad(term.score.sum(), leaves, retain_graph=True, allow_unused=True)
                for name, slope in zip(pair.cuts, slopes, strict=True):
                    if slope is not None:
                        yield name, term.name
