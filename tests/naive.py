# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The reference: particles one by one, sites one by one, elements one by one; none of the library's code.

Given the values that a guide drew, it runs a program once per particle with these values and sums
log p - log q from ``site["fn"].log_prob``, by the semantics that hold by construction of the program.
"""

import itertools
import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger


class Substitute(Messenger):
    """Sets sample sites, and the minibatches of plates, to given values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"], msg["infer"] = self.values[msg["name"]], True, {}


@dataclass
class Reference:
    """What the loss of K particles should be."""

    loss: torch.Tensor
    surrogate: torch.Tensor  # its gradient is that of the loss
    bound: torch.Tensor  # by independent element: sequential plates first, then vectorised ones from left to right
    plates: list
    log_w: torch.Tensor  # (particles, elements), with their graph
    elements: list  # by plate, where each is
    scale: float  # of the sum over elements
    constant: torch.Tensor
    has_score: bool  # whether any of the weights' sites needs a score-function gradient
    own_scales: set  # of sites, beside their plates'
    shown_constants: set  # subsampled plates around what no latent reaches


def particles_of(program, tape, num_particles):
    """Values of each particle, and the minibatch, out of what the guide drew in one wide run or K narrow ones."""
    minibatch = dict(tape[0][1])
    if len(tape) == num_particles:  # one after the other (or a single one)
        return [dict(drawn) for drawn, _ in tape], minibatch
    (drawn, _), depth = tape[0], program.depth
    event = {name: 1 if name == "joint" or is_vector(program, name) else 0 for name in drawn}
    return [
        {name: narrow(value, k, depth, event[name], wide_dims(program, name)) for name, value in drawn.items()}
        for k in range(num_particles)
    ], minibatch


def spec_of(program, name):
    """The spec of a site, by its label."""
    base = name.removeprefix("helper_").split("_")[0]
    spec = program.site.get(base)
    return program.helper(spec) if name.startswith("helper_") else spec


def is_vector(program, name):
    return name == "joint" or spec_of(program, name).event is not None


def wide_dims(program, name):
    """Dimensions of the site's own batch shape."""
    plates = () if name == "joint" else spec_of(program, name).plates
    return -min((program.plate[n].dim for n in plates if program.plate[n].dim is not None), default=0)


def narrow(value, k, depth, event, own):
    """One particle's value, shaped as without a plate of particles."""
    assert value.dim() == 1 + depth + event, "particles lie left of all plates"
    value = value[k]
    return value.reshape(value.shape[value.dim() - own - event :])


class Doubtful(Exception):
    """A gradient that may be given or refused."""


class Refused(Exception):
    """No unbiased doubly reparameterised gradient is to be had."""


def reference(program, tape, num_particles, gradient="pathwise", control="mean"):
    """Loss, gradient surrogate and bound for the values on the tape.

    ``gradient``: pathwise, sticking ("stick the landing") or double ("doubly reparameterised"); ``control`` of the
    score function: the mean of the other particles, or that moved by the constant that balances log q's own slope.
    """
    particles, minibatch = particles_of(program, tape, num_particles)
    independent = program.independent
    prefix = "guide_" if program.renamed else ""
    indices = {name: value for name, value in minibatch.items()}
    indices |= {prefix + name: value for name, value in minibatch.items()}
    order = [p for p in independent if p.dim is None]
    order += sorted((p for p in independent if p.dim is not None), key=lambda p: p.dim)
    elements = list(itertools.product(*[range(p.count) for p in order]))
    runs = [terms(program, values, indices) for values in particles]
    weighed = [t for t in runs[0] if inside(t, order) and not t.zero]
    scales = {t.own_scale for t in weighed}
    common = scales.pop() if len(scales) == 1 else None

    def scale_of(t):
        own = t.own_scale if common is None else 1.0
        inner = [p for p in program.plates if p.name in t.plates and p not in independent]
        return own * math.prod(p.size / p.count for p in inner)

    def column(run, e, chosen=lambda t: True):
        """One particle's log weight at one element."""
        place = dict(zip([p.name for p in order], e, strict=True))
        parts = [t.sign * scale_of(t) * t.at(place, t.masked) for t in run if inside(t, order) and chosen(t)]
        return sum(parts, start=torch.zeros(()))

    def score_of(run, e):
        place = dict(zip([p.name for p in order], e, strict=True))
        parts = [t.at(place, t.log_prob) for t in run if inside(t, order) and t.is_score]
        return sum(parts, start=torch.zeros(()))

    log_w = torch.stack([torch.stack([column(run, e) for e in elements]) for run in runs])  # (particles, elements)
    score = torch.stack([torch.stack([score_of(run, e) for e in elements]) for run in runs])
    bound = log_w.logsumexp(0) - math.log(num_particles)
    share = log_w.detach().softmax(0)
    if gradient == "pathwise":
        surrogate = (share * log_w).sum(0)
    else:
        leaves = [{n: leaf(v) for n, v in values.items()} for values in particles]
        deltas = [label for n in program.joint for label in labels(program, program.site[n])]
        cut = [{n: v for n, v in values.items() if n not in deltas} for values in leaves]
        at_leaves = [terms(program, values, indices) for values in cut]
        for t in itertools.chain(*at_leaves):
            t.is_cut &= particles[0].get(t.name, torch.zeros(())).requires_grad  # else no parameter lies behind it
        names = [t.name for t in at_leaves[0] if t.is_cut]
        if gradient == "double":
            tempering = {scale_of(t) for t in at_leaves[0] if t.is_cut and inside(t, order)} or {1.0}
            refuse(at_leaves, cut, names, tempering)
            path = share - tempering.pop() * (share - share**2)
        else:
            path = share

        def weights(chosen=lambda t: True):
            return torch.stack([torch.stack([column(run, e, chosen) for e in elements]) for run in at_leaves])

        surrogate = (share * weights(lambda t: not t.is_cut)).sum(0)  # leaves end here: no way through z
        ends = [values[n] for values in cut for n in names]
        slopes = derivatives((path * weights()).sum(), ends)
        ways = [values[n] for values in particles for n in names]
        through = sum(((g * z).sum() for g, z in zip(slopes, ways, strict=True)), start=torch.zeros(()))
        surrogate = surrogate + through / len(elements)  # only the sum over elements is asked for
    tempering = {scale_of(t) for t in runs[0] if t.is_score and inside(t, order)}
    balance = 0.0 if control == "mean" else (tempering.pop() if len(tempering) == 1 else 1.0)
    for k in range(num_particles if num_particles > 1 else 0):
        others = torch.cat([log_w[:k], log_w[k + 1 :]]).detach().logsumexp(0)
        without = others - math.log(num_particles - 1) + balance * math.log1p(-1.0 / num_particles)
        surrogate = surrogate + (bound.detach() - without) * score[k]
    scale = math.prod(p.size / p.count for p in order) * (1.0 if common is None else common)
    constant = torch.zeros(())
    for t in runs[0]:
        if not inside(t, order):
            plate_scale = math.prod(p.size / p.count for p in program.plates if p.name in t.plates)
            constant = constant + t.own_scale * plate_scale * t.masked.sum()
    return Reference(
        loss=-(scale * bound.sum() + constant).detach(),
        surrogate=-(scale * surrogate.sum() + constant),
        bound=bound.detach().reshape([p.count for p in order]),
        plates=[p.name for p in order],
        log_w=log_w,
        elements=[dict(zip([p.name for p in order], e, strict=True)) for e in elements],
        scale=scale,
        constant=constant,
        has_score=any(t.is_score for t in runs[0]),
        own_scales={t.own_scale for t in runs[0]},
        shown_constants={n for t in runs[0] if not inside(t, order) for n in t.plates if program.plate[n].shown},
    )


def leaf(value):
    value = value.detach().clone()
    return value.requires_grad_() if value.is_floating_point() else value


def derivatives(total, ends):
    if not ends or not total.requires_grad:
        return [torch.zeros_like(end) for end in ends]
    return torch.autograd.grad(total, ends, allow_unused=True, materialize_grads=True, retain_graph=True)


def refuse(runs, cut, names, tempering):
    """Raises where v_k^2 would be biased."""
    largest, eps = 0.0, torch.finfo(torch.get_default_dtype()).eps
    if len(tempering) > 1:
        raise Refused("sites differ in scale")
    for run, values in zip(runs, cut, strict=True):
        ends = [values[n] for n in names]
        for t in run:
            if t.is_score and t.log_prob.requires_grad and ends:
                if any(
                    g is not None
                    for g in torch.autograd.grad(t.log_prob.sum(), ends, allow_unused=True, retain_graph=True)
                ):
                    raise Refused("a score-function site depends on a reparameterised one")
        total = sum((t.sign * t.masked.sum() for t in run), start=torch.zeros(()))
        for name, slope in zip(names, derivatives(total, ends), strict=True):
            mask = next(t.mask for t in run if t.name == name and t.is_cut)
            if mask is not None:
                counted = mask.reshape(mask.shape + (1,) * (slope.dim() - mask.dim())) if mask.dim() else mask
                largest = max(largest, float(torch.where(counted, 0.0, slope).abs().max()))
    if largest > 1e4 * eps:
        raise Refused("a masked value reaches the weights")
    if largest > 0.0:
        raise Doubtful("a masked value reaches the weights, or there is rounding")


@dataclass
class Summand:
    """One site's log density, element by element of its vectorised plates."""

    log_prob: torch.Tensor
    masked: torch.Tensor
    plates: tuple
    position: dict  # in sequential plates
    dims: dict  # of vectorised plates
    sign: float
    own_scale: float
    is_score: bool
    zero: bool
    name: str
    is_cut: bool  # a guide site with a value of its own, reparameterised
    mask: torch.Tensor | None

    def at(self, place, value):
        """The sum over the part that belongs to one independent element."""
        if any(place.get(n, position) != position for n, position in self.position.items()):
            return torch.zeros(())
        for name, dim in self.dims.items():
            if name in place:
                value = value.narrow(dim, place[name], 1)
        return value.sum()


def inside(summand, order):
    return {p.name for p in order} <= set(summand.plates)


def terms(program, values, indices):
    """The summands of one particle: those of the guide, those of the model; coins of mixtures summed out."""
    with Substitute({**indices, **values}):
        guide = poutine.trace(program.guide).get_trace()
    program.tape.pop()
    values = values | {site["name"]: site["value"] for site in sampled(guide)}  # what follows from others, too
    coins = {n: None for s in program.observations if s.family == "mixture" for n in labels(program, s)}
    traces = []
    for side in (0.0, 1.0):
        fixed = {f"{name}_coin": torch.tensor(side) for name in coins}
        with Substitute({**indices, **values, **fixed}):
            traces.append(poutine.trace(program.model).get_trace())
    found = [summand(program, site, -1.0) for site in sampled(guide)]
    for site in sampled(traces[0]):
        name = site["name"]
        if name.endswith("_coin") or name == "summary":
            continue
        term = summand(program, site, 1.0)
        if name in coins:
            sides = []
            for trace in traces:
                coin, below = trace.nodes[f"{name}_coin"], trace.nodes[name]
                sides.append(unmasked_log_prob(coin) + masked_log_prob(below))
            term.masked = torch.logaddexp(*sides)
        found.append(term)
    return found


def labels(program, spec):
    counts = [range(program.plate[n].count) for n in spec.plates if program.plate[n].dim is None]
    return [spec.name + "".join(f"_{i}" for i in element) for element in itertools.product(*counts)]


def sampled(trace):
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name not in ("_INPUT", "_RETURN") and hasattr(site["fn"], "batch_shape"):
            yield site


def unmasked_log_prob(site):
    """What is summed out sums to one, masked or not."""
    return site["fn"].log_prob(site["value"]).expand(site["fn"].batch_shape)


def masked_log_prob(site):
    value = unmasked_log_prob(site)
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"])
        value = torch.where(mask, value, torch.zeros(()))
    return value


def summand(program, site, sign):
    """Reads one site of a narrow trace."""
    name = site["name"]
    spec = None if name == "joint" else spec_of(program, name)
    plates = () if spec is None else spec.plates
    sequential = [n for n in plates if program.plate[n].dim is None]
    numbers = name.removeprefix("helper_").split("_")[1:]
    own = program.scale
    if spec is not None and spec.name in program.site and not (sign < 0 and spec.name in program.joint):
        own *= spec.scale
    fn = site["fn"]
    base = fn.base_dist if hasattr(fn, "base_dist") else fn
    return Summand(
        log_prob=fn.log_prob(site["value"]).expand(fn.batch_shape),
        masked=masked_log_prob(site),
        plates=plates,
        position={n: int(i) for n, i in zip(sequential, numbers, strict=True)},
        dims={n: program.plate[n].dim for n in plates if program.plate[n].dim is not None},
        sign=sign,
        own_scale=own,
        is_score=sign < 0 and not base.has_rsample,
        zero=False,
        name=name,
        is_cut=sign < 0 and base.has_rsample and not isinstance(base, dist.Delta),
        mask=None if site["mask"] is None else torch.as_tensor(site["mask"]),
    )
