# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""From traces whose values were cut to the cut of their log weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_iwae.cut import Cut
from pyro_iwae.particles import Run
from pyro_iwae.plates import Layout, Scale, Site
from pyro_iwae.terms import Term, inner_scale, joined, one_scale, sum_columns
from pyro_iwae.traces import Pair
from pyro_iwae.ways import Ways

__all__ = ["cuts_of"]

Tables = Sequence[Sequence[Term]]


def cuts_of(
    pairs: Sequence[Pair],
    tables: Sequence[Tables],
    layouts: Sequence[Layout],
    run: Run,
    common: Scale | None,
    shapes: Sequence[Sequence[int]],
) -> list[Cut]:
    """The cut that belongs to the log weights of each node of the plate tree.

    Args:
        pairs: the runs that were weighed.
        tables: for each node, the terms of the runs that hold its particles.
        layouts: where the columns of each node lie.
        run: how particles were run.
        common: the scale that stays outside the weights.
        shapes: of the log weights of each node, ``(*particles, *plates)``.
    """
    names = {name for pair in pairs for name in pair.cuts}

    def part(node: int, *, cut: bool) -> Tensor | None:
        rows = [list(_parts(table, names, cut=cut)) for table in tables[node]]
        return joined(rows, layouts[node], shapes[node])

    parts = [(part(i, cut=False), part(i, cut=True)) for i in range(len(layouts))]
    template = next((p for both in parts for p in both if p is not None), torch.zeros(()))
    ways = _ways(pairs, layouts, run, template)
    nodes: list[Site] = [pair.guide.nodes[name] for pair in pairs for name in pair.cuts]
    scale = one_scale([inner_scale(site, layouts[run.tree.home(site)], common) for site in nodes])
    downstream = next(_downstream(pairs, [t for node in tables for t in node]), None)
    zeros = [template.new_zeros(shape) for shape in shapes]
    return [
        Cut(ways, zero if rest is None else rest, zero if log_q is None else log_q, scale, downstream)
        for zero, (rest, log_q) in zip(zeros, parts, strict=True)
    ]


def _ways(pairs: Sequence[Pair], layouts: Sequence[Layout], run: Run, template: Tensor) -> Ways:
    sites = [(pair, name) for pair in pairs for name in pair.cuts]
    for pair, name in sites:
        pair.cuts[name].require_unwritten(name)
    nodes: list[Site] = [pair.guide.nodes[name] for pair, name in sites]
    values = [pair.cuts[name].value for pair, name in sites]
    homes, root = [run.tree.home(site) for site in nodes], layouts[0]

    def gather(slopes: Sequence[Tensor]) -> Tensor:
        """Sums over particles and over all that is not an independent plate of the root."""
        parts = []
        for site, value in zip(nodes, slopes, strict=True):
            event_dim = site["fn"].event_dim
            value = value.sum(list(range(-event_dim, 0))) if event_dim else value
            parts.append((root.element(site), root.columns(value).sum(0, keepdim=True)))
        found = sum_columns(parts, root)
        return template.new_zeros([p.size for p in root.plates]) if found is None else found.squeeze(0)

    def spread(columns: Sequence[Tensor]) -> list[Tensor]:
        """Each value's own particles, laid along it."""
        found = []
        for (pair, _), site, value, home in zip(sites, nodes, values, homes, strict=True):
            layout, rows = layouts[home], columns[home]
            if not layout.particle_dims:  # one particle
                for i in run.tree.path(home):
                    rows = rows[pair.place.get(i, 0) if len(rows) > 1 else 0]
                rows = rows.unsqueeze(0)
                found.append(layout.align(rows, site, value.unsqueeze(0)).squeeze(0))
            else:
                found.append(layout.lay(rows, site, value))
        return found

    return Ways(
        names=tuple(name for _, name in sites),
        values=tuple(values),
        leaves=tuple(pair.cuts[name].leaf for pair, name in sites),
        masks=tuple(_mask(site) for site in nodes),
        gather=gather,
        spread=spread,
    )


def _parts(
    table: Sequence[Term], names: Collection[str], *, cut: bool
) -> Iterator[tuple[tuple[int, ...] | None, Tensor | None]]:
    """Either log q of what was cut, or all else but log q of score-function sites."""
    for term in table:
        if term.role == "guide" and term.name in names:
            if cut:
                yield term.element, -term.value
        elif not cut:
            yield term.element, term.value if term.score_log_q is None else term.value + term.score_log_q


def _mask(site: Site) -> Tensor | None:
    """Where the site's log q counts, to broadcast with its value; None where it does everywhere."""
    fn = site["fn"]
    masks: list[tuple[Any, int]] = [(site["mask"], len(fn.event_shape))]
    while hasattr(fn, "base_dist"):  # torch's own distributions among them, which know no event_dim
        # Inside an Independent some events are no events yet.
        masks.append((getattr(fn, "_mask", None), len(fn.event_shape)))
        fn = fn.base_dist
    found = None
    for mask, events in masks:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=site["value"].device)
            mask = mask.reshape(mask.shape + (1,) * events)
            found = mask if found is None else found & mask
    return found


def _downstream(pairs: Sequence[Pair], tables: Tables) -> Iterator[tuple[str, str]]:
    """Cut sites, and score-function sites whose law depends on them."""
    names = [name for pair in pairs for name in pair.cuts]
    leaves = [site.leaf for pair in pairs for site in pair.cuts.values()]
    for table in tables:
        for term in table:
            if leaves and term.score is not None and term.score.requires_grad:
                slopes = torch.autograd.grad(term.score.sum(), leaves, retain_graph=True, allow_unused=True)
                for name, slope in zip(names, slopes, strict=True):
                    if slope is not None:
                        yield name, term.name
