# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The only maker of log weights: a model trace and a guide trace go in, ``LogWeights`` come out."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_iwae.logweights import LogWeights
from pyro_iwae.plates import (
    Layout,
    Scale,
    Site,
    is_subsampled,
    latent_sites,
    own_scale,
    plate_scale,
    same_scale,
    sample_sites,
)

__all__ = ["Pair", "Term", "model_log_density", "run_pair", "terms_of", "weigh"]


@dataclass(frozen=True)
class Pair:
    """One run of the guide and of the model replayed on it."""

    model: Trace
    guide: Trace

    def sites(self) -> Iterator[tuple[str, str, Site]]:
        """(role, name, site) for all sample sites of both."""
        for role, trace in (("model", self.model), ("guide", self.guide)):
            for name, site in sample_sites(trace):
                yield role, name, site


class SetValues(Messenger):
    """Gives sites their values and leaves all else as it is (``poutine.replay`` would copy ``infer`` along)."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def run_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    values: Mapping[str, Tensor] | None = None,
    enumerate_from: int | None = None,
    matched: bool = True,
) -> Pair:
    """Runs the guide, then the model replayed on it.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        around: wraps model and guide, as the plate of particles does.
        values: values that latents of the guide are given in place of a draw.
        enumerate_from: the first free dimension for enumerated model sites; None where there are none.
        matched: whether to raise where the latents of model and guide are not the same.
    """
    given = SetValues(values or {})
    messenger: Any = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):  # runs model and guide together
        if enumerate_from is not None:
            raise NotImplementedError(
                f"expected a guide without enumerated model sites, got {type(messenger).__name__}, which runs model "
                "and guide together; hide those sites from it with poutine.block, or write the guide as a function"
            )
        with given:
            around(guide)(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()
    else:
        with given:
            guide_trace = poutine.trace(around(guide)).get_trace(*args, **kwargs)
        replayed = around(model)
        if enumerate_from is not None:
            replayed = EnumMessenger(enumerate_from)(replayed)
        model_trace = poutine.trace(poutine.replay(replayed, trace=guide_trace)).get_trace(*args, **kwargs)
    pair = Pair(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace))
    if matched:
        require_match(pair)
    return pair


def require_match(pair: Pair) -> None:
    """Raises where the latents of model and guide are not the same."""
    drawn = dict(latent_sites(pair.guide))
    wanted = dict(latent_sites(pair.model))
    for name in drawn.keys() - wanted.keys():
        if drawn[name]["infer"].get("is_auxiliary"):
            continue
        state = "observed in" if name in pair.model.nodes else "absent from"
        raise ValueError(
            f"latent site '{name}' of the guide is {state} the model; remove it from the guide, or mark it "
            "infer={'is_auxiliary': True} if only the guide needs it"
        )
    for name in wanted.keys() - drawn.keys():
        infer = wanted[name]["infer"]
        if infer.get("enumerate") == "sequential":
            raise NotImplementedError(
                f"model site '{name}' asks for sequential enumeration, which exists in guides only; "
                "write infer={'enumerate': 'parallel'}, or sample it in the guide"
            )
        if infer.get("enumerate") != "parallel":
            raise ValueError(
                f"latent site '{name}' of the model is absent from the guide; sample it in the guide, observe it, or, "
                "if it is discrete, mark it infer={'enumerate': 'parallel'} to have it summed out"
            )
    summed_out = [wanted[name]["infer"].get("_enumerate_dim") for name in wanted.keys() - drawn.keys()]
    if is_validation_enabled() and None not in summed_out:  # Pyro would miss sites that are not enumerated yet
        dims = [f.dim for _, _, s in pair.sites() for f in s["cond_indep_stack"] if f.vectorized]
        check_model_guide_match(pair.model, pair.guide, -min(dims, default=0))


def log_prob_of(site: Site) -> Tensor:
    """Unscaled, unmasked log density at the site; an error names the site."""
    if "unscaled_log_prob" not in site:
        try:
            site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(f"no log density at site '{site['name']}': {error}") from error
    return site["unscaled_log_prob"]


def fill_densities(pair: Pair) -> None:
    """Computes what ``Trace_ELBO`` reads off its traces, and raises where a density is NaN."""
    for role, name, site in pair.sites():
        if role == "guide":
            parts = score_parts_of(site)
            site["score_parts"] = parts.scale_and_mask(site["scale"], site["mask"])
            site["log_prob"] = site["score_parts"].log_prob
        else:
            site["log_prob"] = scale_and_mask(log_prob_of(site), site["scale"], site["mask"])
        site["log_prob_sum"] = site["log_prob"].sum()
        if bool(site["log_prob_sum"].isnan()):
            raise ValueError(nan_message(role, name))


def nan_message(role: str, name: str) -> str:
    """What to say of a density that is not a number."""
    return (
        f"log density is NaN at {role} site '{name}'; look at its parameters and its data "
        "(missing values: mask them with poutine.mask or dist.mask)"
    )


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

    @property
    def key(self) -> tuple[str, str]:
        return self.role, self.name


def model_log_density(pair: Pair, layout: Layout) -> Tensor:
    """log p(x, z) of each particle and independent element, ``(particles, *plates)``, as it enters the weights."""
    terms = [
        t for t in terms_of(pair, layout, outer_scale(pair, layout)) if t.role == "model" and t.element is not None
    ]
    log_p, _, _ = _sum_columns(terms, layout)
    return torch.zeros((1,) * (1 + len(layout.plates))) if log_p is None else log_p


def joint_log_density(trace: Trace, guide_trace: Trace, layout: Layout) -> Tensor:
    """log p(x, z, c) of a model trace in which enumerated sites have values, ``(1, *plates)``."""
    trace = prune_subsample_sites(trace)
    common = outer_scale(Pair(trace, guide_trace), layout)
    terms = [_term("model", n, s, layout, common) for n, s in sample_sites(trace) if layout.element(s) is not None]
    log_p, _, _ = _sum_columns(terms, layout)
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
    """The sites that enter the weights."""
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
        if not (role == "model" and name in enumerated)
    ]
    return terms + _contracted_terms(pair, layout, common, enumerated) if enumerated else terms


def _inner_scale(site: Site, layout: Layout, common: Scale | None) -> Scale:
    """The scale that stays inside the weight: annealing, and plates that are not independent (K = 1 only)."""
    own = own_scale(site) if common is None else 1.0
    return own * math.prod(plate_scale(f) for f in layout.outer_frames(site))


def _term(role: str, name: str, site: Site, layout: Layout, common: Scale | None) -> Term:
    element = layout.element(site)
    if element is None:
        plates = layout.plates_of(site)
        value = scale_and_mask(log_prob_of(site), scale=site["scale"], mask=site["mask"])
        value = layout.columns(value, tuple(p.dim for p in plates if p.dim is not None))
        return Term(role, name, value if role == "model" else -value, None, tuple(p.name for p in plates))
    scale = _inner_scale(site, layout, common)
    if role == "model":
        return Term(role, name, layout.columns(scale_and_mask(log_prob_of(site), scale, site["mask"])), element)
    parts = score_parts_of(site)
    value = layout.columns(-scale_and_mask(parts.log_prob, scale, site["mask"]))
    if is_identically_zero(parts.score_function):
        return Term(role, name, value, element)
    entropy = scale_and_mask(parts.entropy_term, scale, site["mask"])
    entropy = 0.0 if is_identically_zero(entropy) else layout.columns(entropy)
    return Term(role, name, value, element, (), layout.columns(parts.score_function), -value - entropy)


def score_parts_of(site: Site) -> Any:
    """Pyro's ScoreParts of a guide site, unscaled; an error names the site."""
    if "unscaled_score_parts" not in site:
        try:
            parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(f"no log density at guide site '{site['name']}': {error}") from error
        site["unscaled_score_parts"], site["unscaled_log_prob"] = parts, parts.log_prob
    return site["unscaled_score_parts"]


def enumerated_dims(pair: Pair) -> dict[str, Any]:
    """Packed log densities of the model sites that are enumerated or depend on an enumerated one, by name."""
    drawn = pair.guide.nodes
    sites = [s for name, s in sample_sites(pair.model) if name not in drawn]
    enum_sites = [s for s in sites if s["infer"].get("_enumerate_dim") is not None]
    if not enum_sites:
        return {}
    pair.model.symbolize_dims()
    symbols = {s["infer"]["_enumerate_symbol"] for s in enum_sites}
    names = {s["name"] for s in enum_sites}
    found = {}
    for name, site in sample_sites(pair.model):
        masked = scale_and_mask(log_prob_of(site), mask=site["mask"])
        value = packed.pack(masked, site["infer"]["_dim_to_symbol"])
        if name in names or not symbols.isdisjoint(value._pyro_dims):
            found[name] = value
    return found


def _contracted_terms(pair: Pair, layout: Layout, common: Scale | None, factors: Mapping[str, Any]) -> list[Term]:
    """Sums the enumerated sites out: one term for each element of the sequential plates."""
    nodes, plate_symbols = pair.model.nodes, pair.model.plate_to_symbol
    groups: dict[tuple[int, ...] | None, list[str]] = {}
    for name in factors:
        groups.setdefault(layout.element(nodes[name]), []).append(name)
    if None in groups:
        raise ValueError(
            f"site '{groups[None][0]}' lies outside the independent plates but depends on an enumerated site inside "
            f"({', '.join(p.name for p in layout.plates)}); move it into them, or sample that site in the guide"
        )
    kept = set(layout.dims) | ({layout.particle_dim} if layout.particle_dim is not None else set())
    enum_symbols = {
        s["infer"]["_enumerate_symbol"] for n, s in sample_sites(pair.model) if "_enumerate_symbol" in s["infer"]
    }
    terms = []
    for element, names in groups.items():
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
    scales = [_inner_scale(s, layout, common) for s in sites]
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


def require_full_plates(pair: Pair, layout: Layout, num_particles: int) -> None:
    """Raises where a subsampled plate is not independent and particles would go inside its scale."""
    problem = subsampling_problem(pair, layout) if num_particles > 1 else None
    if problem is not None:
        raise ValueError(problem)


def subsampling_problem(pair: Pair, layout: Layout) -> str | None:
    """What is wrong, and what to write instead, for a subsampled plate below a latent; None if nothing is."""
    latents = [s for t in (pair.model, pair.guide) for _, s in latent_sites(t)]
    if not latents:
        return None
    for site in weighed_sites(pair, layout):
        for frame in layout.outer_frames(site):
            if not is_subsampled(frame):
                continue
            owns = any(f.name == frame.name for s in latents for f in s["cond_indep_stack"])
            remedy = "write num_particles=1, or give it the full data (no subsample_size)"
            if owns:
                remedy += (
                    f"; num_particles=1, plate_particles={{'{frame.name}': K}} (from version 0.2 on) will give the "
                    "latents of the plate particles of their own"
                )
            return (
                f"plate '{frame.name}' (site '{site['name']}') shows {frame.size} of its {frame.full_size} elements and is "
                "not independent: latents outside it, or a site that mixes its elements, tie them together. With more than "
                f"one particle its scale would sit inside the logarithm and the loss would be no bound; {remedy}"
            )
    return None


def weigh(pairs: Sequence[Pair], layout: Layout, num_particles: int) -> LogWeights:
    """Makes the log weights of K particles from one vectorised run or K sequential ones.

    Raises:
        ValueError: where a weight is NaN or +inf, or where a subsampled plate forbids more than one particle.
    """
    require_full_plates(pairs[0], layout, num_particles)
    common = outer_scale(pairs[0], layout)
    tables = [terms_of(pair, layout, common) for pair in pairs]
    blocks = [_sum_columns([t for t in table if t.element is not None], layout) for table in tables]
    shape = (num_particles, *(p.size for p in layout.plates))

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [p for p in parts if p is not None]
        if not known:
            return None
        filled = [torch.zeros_like(known[0]) if p is None else p for p in parts]
        return (torch.cat(filled) if len(filled) > 1 else filled[0]).expand(shape)

    log_weights, score, score_log_q = (joined([b[i] for b in blocks]) for i in range(3))
    if log_weights is None:  # a model and guide without any site
        log_weights = torch.zeros(shape)
    weights = LogWeights(
        log_weights,
        plates=tuple(p.name for p in layout.plates),
        scale=layout.scale * (1.0 if common is None else common),
        constant=_constants(tables),
        tempered=common is None and any(not same_scale(own_scale(s), 1.0) for s in weighed_sites(pairs[0], layout)),
        score=score,
        score_log_q=score_log_q,
    )
    if not bool(weights.log_weights.isfinite().all()):
        _explain_infinite(weights, tables)
    return weights


def _sum_columns(terms: Sequence[Term], layout: Layout) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Adds terms up to (particles, *plates): log weights, score and score_log_q."""

    def total(parts: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor | None:
        if not parts:
            return None
        sums: dict[tuple[int, ...], Tensor] = {}
        for element, value in parts:
            sums[element] = sums[element] + value if element in sums else value
        sizes = [p.size for p in layout.sequential]
        if not sizes:
            return sums[()]
        zero = torch.zeros_like(next(iter(sums.values())))
        grid = [sums.get(e, zero) for e in _elements(sizes)]
        grid = list(torch.broadcast_tensors(*grid))
        stacked = torch.stack(grid, 1)  # (particles, all sequential elements, *vectorised plates)
        return stacked.reshape([stacked.shape[0], *sizes, *stacked.shape[2:]])

    log_w = [(t.element, t.value) for t in terms if t.element is not None]
    score = [(t.element, t.score) for t in terms if t.element is not None and t.score is not None]
    log_q = [(t.element, t.score_log_q) for t in terms if t.element is not None and t.score_log_q is not None]
    return total(log_w), total(score), total(log_q)


def _elements(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    grid = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, len(sizes))
    return [tuple(row) for row in grid.tolist()]


def _constants(tables: Sequence[Sequence[Term]]) -> dict[tuple[str, ...], Tensor]:
    """Constants by plate: scaled, averaged over particles (equal for all, but for a model's own randomness)."""
    constants: dict[tuple[str, ...], Tensor] = {}
    for table in tables:
        for term in table:
            if term.element is None:
                value = term.value.mean(0) / len(tables)
                constants[term.plates] = constants[term.plates] + value if term.plates in constants else value
    for plates, value in constants.items():
        if not bool((value < math.inf).all()):
            names = sorted({t.name for t in tables[0] if t.element is None and t.plates == plates})
            raise ValueError(f"log density is NaN or +inf at one of the sites {names}; look at the data and parameters")
    return constants


def _explain_infinite(weights: LogWeights, tables: Sequence[Sequence[Term]]) -> None:
    """Raises on NaN and +inf with the site's name; warns where every particle of an element is impossible."""
    terms = [t for table in tables for t in table]
    for term in terms:
        if bool(term.value.isnan().any()):
            raise ValueError(nan_message(term.role, term.name))
    for term in terms:
        if bool((term.value == math.inf).any()):
            sign = "+inf" if term.role == "model" else "-inf at its own draw"
            raise ValueError(f"log density is {sign} at {term.role} site '{term.name}'; a weight cannot be infinite")
    if bool(weights.log_weights.isnan().any()):
        raise ValueError("log weights are NaN although no site's log density is; look for overflow in the model")
    impossible = (weights.log_weights == -math.inf).all(0)
    if bool(impossible.any()):
        names = sorted(impossible_sites(tables))
        warnings.warn(
            f"all {weights.num_particles} particles are impossible (log weight -inf) for {int(impossible.sum())} of "
            f"{impossible.numel()} independent elements, through site {', '.join(map(repr, names))}; the bound is -inf "
            "there and its gradient 0. Let the guide reach values that the model allows, or use more particles",
            stacklevel=2,
        )


def impossible_sites(tables: Sequence[Sequence[Term]]) -> set[str]:
    """Names of the sites with a log density of -inf."""
    return {t.name for table in tables for t in table if bool((t.value == -math.inf).any())}
