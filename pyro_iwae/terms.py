# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The part of each site in the log weights, summed down to one column for each independent element."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_iwae.densities import log_prob_of, score_parts_of
from pyro_iwae.drawn import DrawnDensity
from pyro_iwae.plates import Layout, Scale, Site, frame_size, own_scale, plate_scale, same_scale, sample_sites
from pyro_iwae.traces import Pair

__all__ = [
    "Term",
    "inner_scale",
    "joined",
    "joint_log_density",
    "model_log_density",
    "one_scale",
    "outer_scale",
    "sum_columns",
    "terms_of",
    "weighed_sites",
]


@dataclass(frozen=True)
class Term:
    """One site's part in the log weights (or, for enumerated sites, that of all that are contracted together).

    ``value`` is signed as in log w. For a term inside every independent plate it has shape
    ``(particles, *vectorised plates)`` and ``element`` tells the element of each sequential plate. For a constant
    ``element`` is None, ``plates`` names the independent plates that it does lie in, and ``value`` carries
    its scale.
    """

    role: str
    name: str
    value: Tensor
    element: tuple[int, ...] | None
    plates: tuple[str, ...] = ()
    score: Tensor | None = None
    score_log_q: Tensor | None = None
    score_scale: Scale = 0.0  # of that part of score_log_q which has the score's own gradient

    @property
    def key(self) -> tuple[str, str]:
        return self.role, self.name


def model_log_density(pairs: Sequence[Pair], layout: Layout, common: Scale | None, shape: Sequence[int]) -> Tensor:
    """log p(x, z) of each particle and independent element, as it enters the weights, in their shape."""
    tables = [[(t.element, t.value) for t in terms_of(pair, layout, common) if t.role == "model"] for pair in pairs]
    log_p = joined(tables, layout, shape)
    return torch.zeros(shape) if log_p is None else log_p


def joint_log_density(trace: Trace, guide_trace: Trace, layout: Layout) -> Tensor:
    """log p(x, z, c) of a model trace in which enumerated sites have values, ``(1, *plates)``."""
    trace = prune_subsample_sites(trace)
    common = outer_scale(Pair(trace, guide_trace), layout)
    terms = [_term("model", n, s, layout, common) for n, s in sample_sites(trace)]
    log_p = sum_columns([(t.element, t.value) for t in terms], layout)
    return torch.zeros((1,) * (1 + len(layout.plates))) if log_p is None else log_p


def outer_scale(pair: Pair, layout: Layout) -> Scale | None:
    """The ``poutine.scale`` that wraps every weighed site alike and so multiplies the loss; None if there is none."""
    scales = [own_scale(s) for s in weighed_sites(pair, layout)]
    if not scales or not all(same_scale(scales[0], s) for s in scales[1:]):
        return None
    common = scales[0]
    if isinstance(common, Tensor) and common.dim() > 0:
        kept = {d for d in range(-common.dim(), 0) if common.shape[d] > 1}
        if layout.sequential or not kept <= set(layout.dims):
            return None  # it varies within one weight
        common = layout.columns(common)[0]
    return common


def weighed_sites(pair: Pair, layout: Layout) -> list[Site]:
    """The sites that enter the weights, those in plates with particles of their own too."""
    return [s for _, _, s in pair.sites() if layout.element(s) is not None and not is_zero(s)]


def is_zero(site: Site) -> bool:
    """Whether the site adds nothing, whatever its scale: a ``deterministic``, or all of it masked."""
    return bool(site["infer"].get("_deterministic")) or site["mask"] is False


def terms_of(pair: Pair, layout: Layout, common: Scale | None) -> list[Term]:
    """The log density of every site, signed and summed down to the columns of the layout.

    Args:
        pair: the traces.
        layout: where the columns lie.
        common: the scale that stays outside the weights, from :func:`outer_scale`.
    """
    enumerated = enumerated_dims(pair)
    terms = [
        _term(role, name, site, layout, common)
        for role, name, site in pair.sites()
        if layout.holds(site) and not (role == "model" and name in enumerated)
    ]
    factors = {n: f for n, f in enumerated.items() if layout.holds(pair.model.nodes[n])}
    return terms + _contracted_terms(pair, layout, common, factors) if factors else terms


def inner_scale(site: Site, layout: Layout, common: Scale | None) -> Scale:
    """The scale that stays inside the weight: annealing, and plates that are not independent (K = 1 only)."""
    own = own_scale(site) if common is None else 1.0
    return own * math.prod(plate_scale(f) for f in layout.outer_frames(site))


def one_scale(scales: Sequence[Scale]) -> Scale | None:
    """What all sites have in common; None where they differ, or one varies within its site."""
    if not scales:
        return 1.0
    first = scales[0]
    if not all(same_scale(first, s) for s in scales) or (isinstance(first, Tensor) and first.dim() > 0):
        return None
    return first


def _term(role: str, name: str, site: Site, layout: Layout, common: Scale | None) -> Term:
    element = layout.element(site)
    if element is None:
        plates = layout.plates_of(site)
        value = scale_and_mask(log_prob_of(site), scale=site["scale"], mask=site["mask"])
        value = layout.columns(value, tuple(p.dim for p in plates if p.dim is not None))
        return Term(role, name, value if role == "model" else -value, None, tuple(p.name for p in plates))
    scale = inner_scale(site, layout, common)
    if role == "model":
        return Term(role, name, layout.columns(scale_and_mask(log_prob_of(site), scale, site["mask"])), element)
    fn = site["fn"]
    if isinstance(fn, DrawnDensity):
        value = layout.columns(-scale_and_mask(fn.pathwise, scale, site["mask"]))
        return Term(role, name, value, element, (), layout.columns(fn.score), torch.zeros_like(value))
    parts = score_parts_of(site)
    value = layout.columns(-scale_and_mask(parts.log_prob, scale, site["mask"]))
    if is_identically_zero(parts.score_function):
        return Term(role, name, value, element)
    entropy = scale_and_mask(parts.entropy_term, scale, site["mask"])
    entropy = 0.0 if is_identically_zero(entropy) else layout.columns(entropy)
    scale = scale if is_identically_zero(parts.entropy_term) else 0.0
    return Term(role, name, value, element, (), layout.columns(parts.score_function), -value - entropy, scale)


def sum_columns(parts: Sequence[tuple[tuple[int, ...] | None, Tensor]], layout: Layout) -> Tensor | None:
    """Adds up what belongs to each element, to ``(particles, *plates)``; None where there is nothing to add.

    Args:
        parts: element of the sequential plates, and values ``(particles, *vectorised plates)``; constants, whose
            element is None, are left out.
        layout: the layout.
    """
    sums: dict[tuple[int, ...], Tensor] = {}
    for element, value in parts:
        if element is not None:
            sums[element] = sums[element] + value if element in sums else value
    sizes = [p.size for p in layout.sequential]
    if not sums or not sizes:
        return sums.get(())
    zero = torch.zeros_like(next(iter(sums.values())))
    grid = torch.broadcast_tensors(*[sums.get(e, zero) for e in _elements(sizes)])
    first = max(1, len(layout.particle_dims))
    stacked = torch.stack(grid, first)  # (*particles, all sequential elements, *vectorised plates)
    return stacked.reshape([*stacked.shape[:first], *sizes, *stacked.shape[first + 1 :]])


def joined(
    tables: Sequence[Sequence[tuple[tuple[int, ...] | None, Tensor | None]]], layout: Layout, shape: Sequence[int]
) -> Tensor | None:
    """The columns of all runs, one below the other, in the shape of the log weights; None where there are none."""
    blocks = [sum_columns([(e, v) for e, v in table if v is not None], layout) for table in tables]
    known = [b for b in blocks if b is not None]
    if not known:
        return None
    filled = [torch.zeros_like(known[0]) if b is None else b for b in blocks]
    if layout.particle_dims:
        return filled[0].expand(shape)
    rows = torch.cat(filled)
    return rows.reshape(*shape[: len(shape) - len(layout.plates)], *rows.shape[1:]).expand(shape)


def _elements(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in sizes)))


# Enumerated sites


def enumerated_dims(pair: Pair) -> dict[str, Any]:
    """Packed log densities of the model sites that are enumerated or depend on an enumerated one, by name."""
    drawn = pair.guide.nodes
    sites = [s for name, s in sample_sites(pair.model) if name not in drawn]
    enum_sites = [s for s in sites if s["infer"].get("_enumerate_dim") is not None]
    if not enum_sites:
        return {}
    _symbolize(pair.model)
    symbols = {s["infer"]["_enumerate_symbol"] for s in enum_sites}
    names = {s["name"] for s in enum_sites}
    found = {}
    for name, site in sample_sites(pair.model):
        mask = None if name in names else site["mask"]  # masked or not, a site that is summed out sums to one
        masked = scale_and_mask(log_prob_of(site), mask=mask)
        value = packed.pack(masked, site["infer"]["_dim_to_symbol"])
        if name in names or not symbols.isdisjoint(value._pyro_dims):
            found[name] = value
    return found


def _symbolize(trace: Trace) -> None:
    """Names all dimensions; plates whose elements belong together, whatever their names, share a symbol."""
    trace.symbolize_dims()
    first: dict[tuple[int, int, float], str] = {}
    shared = {}
    for _, site in sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                key = frame.dim, frame_size(frame, site), plate_scale(frame)
                shared[frame.name] = first.setdefault(key, trace.plate_to_symbol[frame.name])
    trace.symbolize_dims(shared)


def enumerated_groups(pair: Pair, factors: Mapping[str, Any] | None = None) -> list[set[str]]:
    """The names of the sites that are contracted together, because they share enumerated variables.

    Args:
        pair: the traces.
        factors: what :func:`enumerated_dims` found, or some of it.
    """
    factors = enumerated_dims(pair) if factors is None else factors
    symbols = {
        s["infer"]["_enumerate_symbol"] for _, s in sample_sites(pair.model) if "_enumerate_symbol" in s["infer"]
    }
    groups: list[tuple[set[str], set[str]]] = []
    for name, factor in factors.items():
        names, shared = {name}, symbols & set(factor._pyro_dims)
        apart = []
        for other, theirs in groups:
            if shared & theirs:
                names, shared = names | other, shared | theirs
            else:
                apart.append((other, theirs))
        groups = [*apart, (names, shared)]
    return [names for names, _ in groups]


def _contracted_terms(pair: Pair, layout: Layout, common: Scale | None, factors: Mapping[str, Any]) -> list[Term]:
    """Sums the enumerated sites out: one term for each element of the sequential plates."""
    nodes: Mapping[str, Site] = pair.model.nodes
    plate_symbols = pair.model.plate_to_symbol
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    outside = [name for name in factors if layout.element(nodes[name]) is None]
    if outside:
        raise ValueError(
            f"site '{outside[0]}' lies outside the independent plates but depends on an enumerated site inside "
            f"({', '.join(p.name for p in layout.plates)}); move it into them, or sample that site in the guide"
        )
    together = enumerated_groups(pair, factors)
    for name in factors:
        number = next(i for i, names in enumerate(together) if name in names)
        groups.setdefault((number, layout.element(nodes[name]) or ()), []).append(name)
    kept = {*layout.dims, *layout.particle_dims}
    enum_symbols = {
        s["infer"]["_enumerate_symbol"] for n, s in sample_sites(pair.model) if "_enumerate_symbol" in s["infer"]
    }
    terms = []
    for (_, element), names in groups.items():
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        frames = {f for n in names for f in nodes[n]["cond_indep_stack"] if f.vectorized}
        for n in names:
            ordinal = frozenset(plate_symbols[f.name] for f in nodes[n]["cond_indep_stack"] if f.vectorized)
            tree.setdefault(ordinal, []).append(factors[n])
        sizes = {plate_symbols[f.name]: f.size for f in frames}
        target = frozenset.intersection(*tree) & {plate_symbols[f.name] for f in frames if f.dim in kept}
        sum_dims = {d for n in names for d in factors[n]._pyro_dims} & enum_symbols
        contracted = contract_to_tensor(tree, sum_dims, target, ring=LogRing(dim_to_size=sizes))
        value = packed.unpack(contracted, pair.model.symbol_to_dim)
        scale = _common_inner_scale([nodes[n] for n in names], layout, common)
        label = ", ".join(n for n in names if nodes[n]["infer"].get("_enumerate_dim") is not None)
        terms.append(Term("model", label or names[0], layout.columns(value * scale), element))
    return terms


def _common_inner_scale(sites: Sequence[Site], layout: Layout, common: Scale | None) -> Scale:
    """The one scale of all sites that are contracted together; it stays outside their sum."""
    scales = [inner_scale(s, layout, common) for s in sites]
    for site, scale in zip(sites, scales, strict=True):
        if not same_scale(scale, scales[0]):
            raise ValueError(
                f"expected one scale for all sites that share an enumerated variable, got {scales[0]} at "
                f"'{sites[0]['name']}' and {scale} at '{site['name']}'; an enumerated site above a subsampled plate "
                "has no unbiased estimate: use the full data, or put both under the same poutine.scale"
            )
    if isinstance(scales[0], Tensor) and scales[0].dim() > 0:
        raise ValueError(f"expected a scalar poutine.scale at enumerated site '{sites[0]['name']}'")
    return scales[0]
