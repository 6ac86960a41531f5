# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What is kept of the particles that an evaluation draws for some rows of data, and how more of it is put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_iwae.density import replicate_bracket
from pyro_iwae.diagnostics import expected_distinct, tail_khat, tail_length
from pyro_iwae.estimates import Estimate
from pyro_iwae.evidence import bounds, jackknives
from pyro_iwae.resampling import several
from pyro_iwae.totals import finite_origin

__all__ = [
    "DISTINCT",
    "LOG_MEAN",
    "UNBIASED",
    "UPPER",
    "Drawn",
    "Part",
    "Probe",
    "bound_name",
    "figures",
    "jackknife_name",
]

# Names of what is kept of each replicate.
LOG_MEAN = "log mean"
LARGEST = "largest"  # and what the ESS needs, relative to it: beside large log weights it would be rounded away
SHARE = "log mean share"
SQUARE = "log mean square share"
DRAWN = "drawn"  # the log weight of a particle drawn by weight
OTHERS = "others"  # log-sum-exp of all particles but one
DISTINCT = "distinct"
UPPER = "upper"
UNBIASED = "unbiased"

TOGETHER = 2**19  # weights that figures are found of at once: they stay in a processor's cache, and take little memory


def bound_name(k: int) -> str:
    """Under which the bound with k particles is kept."""
    return f"bound {k}"


def jackknife_name(order: int) -> str:
    """Under which a jackknife is kept."""
    return f"jackknife {order}"


def figures(log_weights: Float[Tensor, "particles *plates"], ks: Sequence[int]) -> dict[str, Tensor]:
    """All that is kept of one batch of K particles but for its tail, by name, each ``(*plates)`` in float64.

    Args:
        log_weights: in nats.
        ks: the ladder, up to K.
    """
    count, shape = log_weights.shape[0], log_weights.shape[1:]
    columns = log_weights.reshape(count, -1).split(max(1, TOGETHER // count), 1)
    found = [_figures(some.double().contiguous(), ks) for some in columns]
    return {name: torch.cat([f[name] for f in found]).reshape(shape) for name in found[0]}


def _figures(log_weights: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    count = log_weights.shape[0]
    found = {bound_name(k): value for k, value in bounds(log_weights, ks).items()}
    found[LOG_MEAN] = log_weights.logsumexp(0) - math.log(count)
    found[LARGEST] = log_weights.amax(0)
    relative = log_weights - finite_origin(found[LARGEST])
    found[SHARE], found[SQUARE] = ((n * relative).logsumexp(0) - math.log(count) for n in (1.0, 2.0))
    found[DRAWN] = log_weights.gather(0, several(log_weights, 1)).squeeze(0)
    found[OTHERS] = log_weights[1:].logsumexp(0)
    found[DISTINCT] = expected_distinct(log_weights, count)
    orders = [m for m in (1, 2) if count > m]
    found |= {jackknife_name(m): value for m, value in jackknives(log_weights, orders).items()}
    return {name: defined(value) for name, value in found.items()}


def defined(figure: Tensor) -> Tensor:
    """NaN says that an element has no such replicate; a figure that no weights define is infinite instead."""
    return figure.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


@dataclass(frozen=True, eq=False)
class Probe:
    """Tells a model, guide and data from others by what they do.

    Attributes:
        log_weights: of one particle, always drawn from the same seed, ``(*plates)``.
        device: where model and guide ran.
        version: of torch. On another device, or by another version, other random numbers are to be expected.
    """

    log_weights: Tensor
    device: str
    version: str

    @property
    def total(self) -> float:
        """Sum over elements."""
        return float(self.log_weights.sum())

    def is_like(self, other: Probe) -> bool:
        """Whether both may come from the same model, guide and data: up to rounding."""
        if (self.device, self.version) != (other.device, other.version):
            return True
        mine, others = self.log_weights, other.log_weights
        return mine.shape == others.shape and torch.allclose(mine, others, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One batch of K particles for all elements of a part.

    Attributes:
        log_weights: ``(particles, *plates)``, in nats.
        plates: names of the independent plates.
        constant: terms that no latent can change.
        further: figures that need more than these weights, by name, ``(*plates)``.
        probe: of the rows.
    """

    log_weights: Tensor
    plates: tuple[str, ...]
    constant: float = 0.0
    further: Mapping[str, Tensor] = field(default_factory=dict)
    probe: Probe | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Replicates for some rows of data: what was drawn for them together.

    Attributes:
        key: tells which rows these are.
        plates: names of the independent plates.
        rows: which of the plates' dimensions holds the rows of a data set; None where the data came as arguments.
        num_particles: K.
        seeds: of the replicates, each of which tells one set of particles from all others.
        values: what is kept of each replicate, by name, ``(replicates, *plates)`` in float64; NaN for elements that
            were left out of it.
        tail: the largest log weights of all replicates, ``(tail, *plates)``, in descending order.
        floor: above which ``tail`` holds all that were drawn, ``(*plates)``.
        constant: terms that no latent can change.
        probe: of model, guide and data.
        digests: of each row, where the rows of a data set are known.
    """

    key: str
    plates: tuple[str, ...]
    rows: int | None
    num_particles: int
    seeds: tuple[int, ...]
    values: Mapping[str, Tensor]
    tail: Tensor
    floor: Tensor
    constant: float
    probe: Probe | None = None
    digests: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: str, rows: int | None, seed: int, drawn: Drawn, found: Mapping[str, Tensor]) -> Part:
        """One replicate, with the figures that were found of it; what is kept of it leaves the GPU."""
        log_weights = drawn.log_weights
        further = {name: defined(value) for name, value in drawn.further.items()}
        values = {n: v.cpu().double().unsqueeze(0) for n, v in {**found, **further}.items()}
        tail, floor = (value.cpu() for value in _largest(log_weights, len(log_weights)))
        return cls(
            key=key,
            plates=drawn.plates,
            rows=rows,
            num_particles=len(log_weights),
            seeds=(seed,),
            values=values,
            tail=tail,
            floor=floor,
            constant=drawn.constant,
            probe=drawn.probe,
        )

    def spread(self, index: Tensor, shape: Sequence[int], dim: int) -> Part:
        """The same where these elements are some of more; the others have no such replicate."""

        def laid(value: Tensor, missing: float) -> Tensor:
            wide = value.new_full((*value.shape[: value.dim() - len(shape)], *shape), missing)
            return wide.index_copy(dim - len(shape), index, value)

        return replace(
            self,
            values={n: laid(v, math.nan) for n, v in self.values.items()},
            tail=laid(self.tail, -math.inf),
            floor=laid(self.floor, -math.inf),
            probe=None,  # fewer rows draw other numbers
        )

    def __add__(self, other: Part) -> Part:
        """Further replicates for the same rows; associative."""
        if self.num_particles != other.num_particles or self.values.keys() != other.values.keys():
            raise ValueError(
                f"expected the same num_particles and figures for the same data, got {self.num_particles} with "
                f"{sorted(self.values)} and {other.num_particles} with {sorted(other.values)}; evaluate both alike"
            )
        self.require_like(other.probe)
        if set(self.seeds) & set(other.seeds):
            raise ValueError(
                "expected particles drawn independently, got some that both evaluations hold; to add them would count "
                "them twice. Save each run in a file of its own, and give them different seeds"
            )
        mine, others = len(self.seeds), len(other.seeds)
        values = {n: torch.cat([v, other.values[n]]) for n, v in self.values.items()}
        tail, dropped = _largest(torch.cat([self.tail, other.tail]), self.num_particles * (mine + others))
        return replace(
            self,
            seeds=self.seeds + other.seeds,
            values=values,
            tail=tail,
            floor=torch.maximum(dropped, torch.maximum(self.floor, other.floor)),
            constant=(mine * self.constant + others * other.constant) / (mine + others),
        )

    def require_like(self, probe: Probe | None) -> None:
        """Raises where another model, guide or data are to be added."""
        if self.probe is not None and probe is not None and not self.probe.is_like(probe):
            raise ValueError(
                "expected the same model, guide and data in both, got others: one particle, drawn from the same seed, "
                "has another log weight. Does a function hold data, or something in a prior, that has changed? "
                "Evaluate anew"
            )

    @property
    def shape(self) -> torch.Size:
        """Of the elements."""
        return self.floor.shape

    @property
    def replicates(self) -> Tensor:
        """How many each element has, ``(*plates)``."""
        return (~self.values[LOG_MEAN].isnan()).sum(0)

    def log_evidence(self) -> Estimate:
        """From all particles of all replicates together, with its leading bias taken off."""
        return Estimate.log_mean(self.values[LOG_MEAN])

    def mean(self, name: str) -> Estimate:
        """The mean over replicates of what is kept under that name."""
        return Estimate.mean(self.values[name])

    def elbo_resampled(self) -> tuple[Estimate, Estimate]:
        """Lower and upper bound on ELBO[q_EW]."""
        k = self.num_particles
        values = self.values
        with_own = values[LOG_MEAN] + math.log(k)
        replicates = len(with_own)
        columns = [
            v.reshape(replicates, -1).split(max(1, TOGETHER // replicates**2), 1)
            for v in (values[DRAWN], with_own, values[OTHERS])
        ]  # each replicate meets each other one
        found = [replicate_bracket(*some, num_particles=k) for some in zip(*columns, strict=True)]
        whole = torch.cat([some for some, _ in found], -1).reshape(2, *self.shape)
        without = torch.cat([some for _, some in found], -1).reshape(2, replicates, *self.shape)
        return Estimate.leaving_out(whole[0], without[0]), Estimate.leaving_out(whole[1], without[1])

    def ess(self) -> Tensor:
        """Effective sample size of all particles together, ``(*plates)``."""
        largest, share, square = (self.values[n].nan_to_num(nan=-math.inf) for n in (LARGEST, SHARE, SQUARE))
        origin = largest - finite_origin(largest.amax(0))
        means, squares = ((n * origin + v).logsumexp(0) for n, v in ((1.0, share), (2.0, square)))
        found = self.num_particles * (2.0 * means - squares).exp()
        return torch.where(found.isnan(), 0.0, found)  # no replicate, or no particle that is possible

    def khat(self) -> Tensor:
        """Of all particles together, ``(*plates)``; of a shorter tail where some of its weights were not kept."""
        certain = (self.tail >= self.floor).sum(0).flatten().tolist()
        counts = (self.replicates * self.num_particles).flatten().tolist()
        lengths = [min(tail_length(n), c - 1) for n, c in zip(counts, certain, strict=True)]
        return tail_khat(self.tail, lengths)

    def short(self, targets: Mapping[str, float]) -> Tensor:
        """Elements that miss a target, ``ess`` at least or ``std_error`` at most, by all that was drawn."""
        found = torch.zeros(self.shape, dtype=torch.bool)
        if "ess" in targets:
            found |= ~(self.ess() >= targets["ess"])
        if "std_error" in targets:
            found |= ~(self.log_evidence().std_error <= targets["std_error"])
        return found


def _largest(log_weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As many as the tail of so many weights needs, in descending order, and the largest of the others."""
    length = tail_length(count) * 3 // 2 + 1  # what is added later has a longer tail, and takes a part of it
    found = log_weights.topk(min(length + 1, len(log_weights)), 0).values
    floor = found[length] if len(found) > length else torch.full_like(found[0], -math.inf)
    return found[:length], floor
