# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Batches of K particles for the same rows of data, and what is worked out of each while its weights are there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_iwae.chunks import chunks_of
from pyro_iwae.densities import is_discrete
from pyro_iwae.distributed import bits_of, number_of
from pyro_iwae.drawn import settable
from pyro_iwae.evidence import bounds, correction, draw_level, level_probability
from pyro_iwae.given import weigh_at
from pyro_iwae.handlers import Minibatch
from pyro_iwae.logweights import LogWeights
from pyro_iwae.particles import Call
from pyro_iwae.parts import UNBIASED, UPPER, Drawn, Probe
from pyro_iwae.plates import Site, latent_sites, own_scale, plate_scale, same_scale
from pyro_iwae.sharing import Sharing
from pyro_iwae.state import module_behind, seeded
from pyro_iwae.terms import is_zero
from pyro_iwae.turns import Turn
from pyro_iwae.weighing import Particles, weigh_particles

__all__ = ["Source", "fingerprint"]

FINEST = 64  # K over the particles of the multilevel estimate's base: more than K are needed once in 512 batches


@dataclass(frozen=True)
class Source:
    """Draws batches of particles for the same rows.

    Attributes:
        call: what to run, on these rows.
        num_particles: K.
        chunk_size: how many in memory at once.
        options: the other options of :func:`~pyro_iwae.weighing.weigh_particles`.
        minibatch: the indices of subsampled plates, which stay what they are.
        first: one particle, to look at.
        data: what the model observed, by site, as far as no latent moves it.
        probe: of model, guide and these rows.
        posterior_draw: a draw from the exact posterior, if there is one.
        exact: its log weight, ``(*plates)``.
        turn: the call, where particles are shared out over processes.
    """

    call: Call
    num_particles: int
    chunk_size: int | None
    options: Mapping[str, Any]
    minibatch: Minibatch
    first: Particles
    data: Mapping[str, Any]
    probe: Probe
    posterior_draw: Mapping[str, Tensor] | None = None
    exact: Tensor | None = None
    turn: Turn | None = None

    @classmethod
    def of(
        cls,
        call: Call,
        num_particles: int,
        chunk_size: int | None,
        options: Mapping[str, Any],
        posterior_draw: Mapping[str, Tensor] | None = None,
        turn: Turn | None = None,
    ) -> Source:
        """Looks at model and guide; all processes at the same ones, where particles are shared out.

        Raises:
            ValueError: where the weights are no evidence.
        """
        if turn is not None:
            return cls._shared(turn, lambda: cls.of(call, num_particles, chunk_size, options, posterior_draw))
        minibatch = Minibatch()
        first = weigh_particles(call, num_particles=1, averaged=False, minibatch=minibatch, **options)
        _require_evidence(first)
        seeded("probe")
        probe = weigh_particles(call, num_particles=1, averaged=False, minibatch=minibatch, **options)
        _require_density(first, probe)
        found = cls(
            call,
            num_particles,
            chunk_size,
            options,
            minibatch,
            first,
            _data(first, probe),
            _probe(probe),
            posterior_draw,
        )
        if posterior_draw is None:
            return found
        draws = {n: v.unsqueeze(0) for n, v in posterior_draw.items()}
        weigh = partial(_weigh_alone, options=options)
        at, _ = weigh_at(call, draws, weigh, minibatch)
        return replace(found, exact=at.weights.log_weights.squeeze(0))

    @classmethod
    def _shared(cls, turn: Turn, look: Callable[[], Source]) -> Source:
        """What all processes look at, and see the same."""

        def alone() -> tuple[Source, list[int]]:
            found = look()
            return found, [number_of(found.key), number_of(found.parameters), bits_of(found.probe.total)]

        found, rows = turn.ranks.attempt(alone)
        keys, parameters, probes = zip(*rows, strict=True)
        turn.ranks.require_same(keys, "data", "each is to weigh particles for the same rows")
        turn.ranks.require_same(parameters, "model and guide", "load the same parameters in all")
        turn.require_like(probes)
        return replace(found, turn=turn)

    @property
    def key(self) -> str:
        """What tells the rows from others: arguments, and data that the model has from elsewhere."""
        return fingerprint(self.call.args, self.call.kwargs, self.minibatch.indices, self.data, self.posterior_draw)

    @property
    def parameters(self) -> str:
        """What tells model and guide, with the parameters that they have, from others."""
        pair = self.first.pairs[0]
        traces = pair.guide, pair.model
        values = {n: t.nodes[n]["value"] for t in traces for n in t.param_nodes}
        modules = [m for m in map(module_behind, (self.call.model, self.call.guide)) if m is not None]
        return fingerprint(values, [m.state_dict() for m in modules], [list(t.nodes) for t in traces])

    def draw(self) -> Drawn:
        """One batch."""
        weights = self._weigh(self.num_particles)
        log_weights, common = weights.log_weights, self.first.common
        constant = float(sum(float(c.sum()) for c in weights.constant.values()))
        further = {UNBIASED: self._unbiased(log_weights)}
        if self.exact is not None:
            whole = torch.logaddexp(self.exact, log_weights[1:].logsumexp(0))
            further[UPPER] = whole - math.log(self.num_particles)
        if weights.constant and common is not None:
            constant /= float(common)
        return Drawn(log_weights, weights.plates, constant, further, self.probe)

    def _weigh(self, count: int) -> LogWeights:
        if self.turn is not None and count >= self.turn.ranks.size:
            turn = self.turn.inner(self.minibatch.indices)
            return Sharing(turn, self.call, count, self.chunk_size, self.options).all_values()
        options = {"minibatch": self.minibatch, **self.options}
        chunks = chunks_of(self.call, num_particles=count, chunk_size=self.chunk_size, **options)
        if chunks is not None:
            return chunks.values()
        return weigh_particles(self.call, num_particles=count, **options).weights

    def _unbiased(self, log_weights: Tensor) -> Tensor:
        """The multilevel estimate; of the batch's own particles, as far as these suffice."""
        base, level = max(1, len(log_weights) // FINEST), draw_level()
        halves = self._halves(log_weights, base * 2**level)
        return bounds(log_weights, [base])[base] + correction(*halves) / level_probability(level)

    def _halves(self, block: Tensor, size: int) -> list[Tensor]:
        """Log-sum-exps of two sets of so many particles."""
        sums, missing = [torch.full_like(block[0], -math.inf)] * 2, size
        while missing:
            count = min(missing, len(block) // 2)
            if count:
                both = block[:count], block[count : 2 * count]
                sums = [torch.logaddexp(s, b.logsumexp(0)) for s, b in zip(sums, both, strict=True)]
            missing -= count
            if missing:
                block = self._weigh(min(max(2, self.num_particles), 2 * missing)).log_weights
        return sums


def _weigh_alone(call: Call, count: int, *, options: Mapping[str, Any], **further: Any) -> Particles:
    return weigh_particles(call, num_particles=count, **options, **further)


def _data(first: Particles, again: Particles) -> dict[str, Any]:
    """Observed values, but for those that follow a latent, as ``pyro.deterministic`` does."""
    found, others = first.pairs[0].model.nodes, again.pairs[0].model.nodes
    return {
        name: site["value"]
        for name, site in found.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and name in others
        and torch.equal(torch.as_tensor(site["value"]), torch.as_tensor(others[name]["value"]))
    }


def _probe(particles: Particles) -> Probe:
    log_weights = particles.weights.log_weights.squeeze(0)
    constant = sum(float(c.sum()) for c in particles.weights.constant.values())
    return Probe(log_weights.cpu().double() + constant, str(log_weights.device), str(torch.__version__))


def _require_evidence(first: Particles) -> None:
    weights = first.weights
    sites = [(name, s) for _, name, s in first.pairs[0].sites() if not is_zero(s)]
    apart = [name for name, s in sites if not same_scale(own_scale(s), own_scale(sites[0][1]))]
    uneven = isinstance(first.common, Tensor) and first.common.numel() > 1 and bool(weights.constant)
    if weights.tempered or apart or uneven:
        names = f" (site '{apart[0]}' has another than '{sites[0][0]}')" if apart else ""
        raise ValueError(
            f"evaluate got weights tempered by a poutine.scale around some sites of model or guide{names}; they are no "
            "evidence. Take the scale away, or put it around model and guide alike"
        )
    for node in weights.nodes():
        if node is not weights and bool(torch.as_tensor(node.scale != 1.0).any()):
            name = next(p for p in node.plates if p not in weights.plates)
            raise ValueError(
                f"evaluate got plate '{name}' subsampled below latents that all its elements share: a part of the data "
                "has another posterior, and no evidence for the whole. Pass all data"
            )
    for name, site in sites:
        shown_in_part = any(plate_scale(f) != 1.0 for f in site["cond_indep_stack"])
        if first.layout.element(site) is None and shown_in_part:
            raise NotImplementedError(
                f"evaluate got site '{name}', which no latent reaches, where a plate is subsampled; pass all data"
            )


def _require_density(first: Particles, again: Particles) -> None:
    """Raises where the guide sets a latent that the model draws from a density to the same point each time."""
    guide, model = first.pairs[0].guide, first.pairs[0].model
    fixed = {n: s["value"] for n, s in latent_sites(guide) if not settable(s) and _has_density(model.nodes.get(n))}
    if not fixed:
        return
    others = again.pairs[0].guide.nodes  # where an autoguide bends noise, the values differ
    points = sorted(n for n, v in fixed.items() if torch.equal(torch.as_tensor(v), torch.as_tensor(others[n]["value"])))
    if points:
        hidden = ", ".join(f"'{n}': value" for n in points)
        raise ValueError(
            f"evaluate needs a guide that draws from a density, got one that sets {points} to a point (a Delta, as "
            "AutoDelta does): weights are joint densities at that point then, and no evidence. Take AutoNormal or "
            "AutoLaplaceApproximation, or evaluate given the point: evaluate(poutine.condition(model, "
            f"{{{hidden}}}), poutine.block(guide, hide={points}), ...)"
        )


def _has_density(site: Site | None) -> bool:
    return site is not None and settable(site) and not is_discrete(site["fn"])


def fingerprint(*values: Any) -> str:
    """A digest of tensors, arrays and plain values, nested as they are; of anything else its type alone."""
    digest = hashlib.sha256()
    _digest(values, digest.update)
    return digest.hexdigest()[:32]


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray | np.generic):
        update(f"{value.dtype}{value.shape}".encode())
        update(value.tobytes() if value.dtype != object else repr(value.tolist()).encode())
    elif isinstance(value, Mapping):
        update(b"{")
        for name, inner in value.items():
            _digest(name, update)
            _digest(inner, update)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        update(f"[{len(value)}".encode())
        for inner in value:
            _digest(inner, update)
    elif value is None or isinstance(value, str | int | float | complex):
        update(repr(value).encode())
    else:
        update(type(value).__qualname__.encode())
