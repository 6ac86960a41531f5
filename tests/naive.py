# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The reference: particles one by one, sites one by one, elements one by one; none of the library's code.

Given the values that a guide drew, it runs a program once per particle with these values and sums
log p - log q from ``site["fn"].log_prob``, by the semantics that hold by construction of the program.
"""

import itertools
import math
from dataclasses import dataclass

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
    return name == "joint" or spec_of(program, name).family == "vector"


def wide_dims(program, name):
    """Dimensions of the site's own batch shape."""
    plates = () if name == "joint" else spec_of(program, name).plates
    return -min((program.plate[n].dim for n in plates if program.plate[n].dim is not None), default=0)


def narrow(value, k, depth, event, own):
    """One particle's value, shaped as without a plate of particles."""
    assert value.dim() == 1 + depth + event, "particles lie left of all plates"
    value = value[k]
    return value.reshape(value.shape[value.dim() - own - event :])


def reference(program, tape, num_particles):
    """Loss, gradient surrogate and bound for the values on the tape."""
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
    per_element, surrogates = [], []
    for e in elements:
        place = dict(zip([p.name for p in order], e, strict=True))
        log_w, score = [], []
        for run in runs:
            total, total_score = torch.zeros(()), torch.zeros(())
            for t in run:
                if inside(t, order):
                    scale = t.own_scale if common is None else 1.0
                    scale *= math.prod(
                        p.size / p.count for p in program.plates if p.name in t.plates and p not in independent
                    )
                    total = total + t.sign * scale * t.at(place, t.masked)
                    if t.is_score:
                        total_score = total_score + t.at(place, t.log_prob)
            log_w.append(total)
            score.append(total_score)
        log_w = torch.stack(log_w)
        bound = log_w.logsumexp(0) - math.log(num_particles)
        share = (log_w - log_w.logsumexp(0)).exp().detach()
        surrogate = (share * log_w).sum()
        for k in range(num_particles):
            if num_particles > 1:
                others = torch.cat([log_w[:k], log_w[k + 1 :]]).detach()
                control = others.logsumexp(0) - math.log(num_particles - 1)
                surrogate = surrogate + (bound.detach() - control) * score[k]
        per_element.append(bound)
        surrogates.append(surrogate)
    scale = math.prod(p.size / p.count for p in order) * (1.0 if common is None else common)
    constant = torch.zeros(())
    for t in runs[0]:
        if not inside(t, order):
            plate_scale = math.prod(p.size / p.count for p in program.plates if p.name in t.plates)
            constant = constant + t.own_scale * plate_scale * t.masked.sum()
    bound = torch.stack(per_element).reshape([p.count for p in order])
    return Reference(
        loss=-(scale * sum(per_element) + constant).detach(),
        surrogate=-(scale * sum(surrogates) + constant),
        bound=bound.detach(),
        plates=[p.name for p in order],
    )


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
    )
