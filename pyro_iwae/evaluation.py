# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What an evaluation found: evidence and bounds with error bars, and whether to trust them."""

from __future__ import annotations

import html
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_iwae.archive import read, write
from pyro_iwae.diagnostics import khat_threshold
from pyro_iwae.distributed import Ranks
from pyro_iwae.estimates import Estimate
from pyro_iwae.options import as_count
from pyro_iwae.parts import DISTINCT, UNBIASED, UPPER, Part, Probe, bound_name, jackknife_name

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["Evaluation", "Total", "require_constant"]

LEAST_ESS = 100.0  # below it a t interval over replicates is not to be relied on
MANY = 0.1  # of the elements; if so many are doubtful, doubt the others
KIND = "Evaluation"
KEPT = ("key", "plates", "rows", "num_particles", "seeds", "constant", "digests")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Log evidence and bounds on it, in nats, for each independent element, with what tells whether to trust them.

    Made by :func:`~pyro_iwae.evaluate`. ``print`` it for a report. ``a + b`` puts together more particles for the
    same data, or more rows. Figures are unscaled: of the rows that were evaluated, whatever a subsampled plate
    would multiply them with.

    Attributes:
        parts: what was kept, for rows that were drawn together.
        facts: how it was drawn: ``num_particles``, ``ks``, and what tells model and guide from others.
        seed: of the run that made it, which a run that goes on goes on with.
        targets: what was asked for of each element, ``ess`` or ``std_error``.

    Example::

        >>> from pyro_iwae import evaluate
        >>> from pyro_iwae.exact import Gaussian
        >>> gaussian = Gaussian(data=torch.tensor([0.0, 1.0, -2.0]), offset=0.5)
        >>> result = evaluate(gaussian.model, gaussian.guide, num_particles=500, progress=False)
        >>> result.log_evidence.shape, result.plates, bool(result.trusted.all())
        (torch.Size([3]), ('data',), True)
        >>> low, high = result.interval(0.999)
        >>> bool(((low < gaussian.log_evidence) & (gaussian.log_evidence < high)).all())
        True
    """

    parts: tuple[Part, ...]
    facts: Mapping[str, Any]
    seed: int = 0
    targets: Mapping[str, float] = field(default_factory=dict)

    # For each element

    @property
    def num_particles(self) -> int:
        """K, of each replicate."""
        return int(self.facts["num_particles"])

    @property
    def ks(self) -> tuple[int, ...]:
        """The ladder of particles."""
        return tuple(self.facts["ks"])

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the independent plates, in the order of the figures' dimensions."""
        return self.parts[0].plates

    @property
    def log_evidence(self) -> Tensor:
        """log p(x) from all particles of all replicates, the leading bias taken off; shape ``(*plates)``."""
        return self._of("log evidence").value

    @property
    def std_error(self) -> Tensor:
        """Standard error of ``log_evidence``."""
        return self._of("log evidence").std_error

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's t interval for the log evidence, over replicates; lower and upper end.

        Measured, a 95 % interval holds the truth in 93 to 95 % of evaluations where ESS is some 200 at least and
        ``trusted`` says so, in 90 % at an ESS of 75, in 76 % at 14 (``docs/evaluation``). Where the guide misses a
        part of the posterior that no particle has found, nothing computed from these particles can tell.
        """
        return self._of("log evidence").interval(level)

    @property
    def elbo(self) -> Tensor:
        """The ELBO, L_1."""
        return self.bounds[1]

    @property
    def bounds(self) -> dict[int, Tensor]:
        """The importance weighted bound L_K for a ladder of K, all from the same particles."""
        return {k: self._of(bound_name(k)).value for k in self.ks}

    @property
    def bound_errors(self) -> dict[int, Tensor]:
        """Standard errors of ``bounds``."""
        return {k: self._of(bound_name(k)).std_error for k in self.ks}

    @property
    def jackknife(self) -> dict[int, Tensor]:
        """Of K particles, by order; of less bias than the bound, and no bound."""
        return {m: self._of(jackknife_name(m)).value for m in self._orders}

    @property
    def jackknife_errors(self) -> dict[int, Tensor]:
        """Standard errors of ``jackknife``."""
        return {m: self._of(jackknife_name(m)).std_error for m in self._orders}

    @property
    def unbiased(self) -> Tensor:
        """Multilevel estimate of the log evidence, with no bias at all and the most noise."""
        return self._of(UNBIASED).value

    @property
    def unbiased_error(self) -> Tensor:
        """Standard error of ``unbiased``."""
        return self._of(UNBIASED).std_error

    @property
    def elbo_resampled(self) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bound on ELBO[q_EW]; None where plates have particles of their own."""
        if not self._has_bracket:
            return None
        return self._of("elbo_resampled lower").value, self._of("elbo_resampled upper").value

    @property
    def upper(self) -> Tensor | None:
        """Upper bound on the log evidence, on average over simulated data, where an exact posterior draw was given."""
        return self._of(UPPER).value if UPPER in self._names else None

    @property
    def ess(self) -> Tensor:
        """Effective sample size of all particles of all replicates together."""
        return self._joined([p.ess() for p in self.parts])

    @cached_property
    def khat(self) -> Tensor:
        """Pareto's khat of all particles of all replicates together."""
        return self._joined([p.khat() for p in self.parts])

    @property
    def khat_threshold(self) -> Tensor:
        """Above which khat says not to trust the element's figures."""
        counts = self.replicates * self.num_particles
        found = torch.full(counts.shape, math.nan, dtype=torch.float64)
        for count in counts.unique().tolist():
            found[counts == count] = khat_threshold(count)
        return found

    @property
    def distinct(self) -> Tensor:
        """How many different particles are to be expected among K draws by weight from one batch of K."""
        return self._of(DISTINCT).value

    @property
    def replicates(self) -> Tensor:
        """Replicates of each element."""
        return self._joined([p.replicates for p in self.parts])

    @property
    def trusted(self) -> Tensor:
        """Whether khat is below its threshold, and ESS is 100 at least.

        Both are found from the same particles as the figures: an element whose heavy weights no particle has met looks
        fine. So do not pick the trusted ones out of many that are doubtful.
        """
        return (self.khat <= self.khat_threshold) & (self.ess >= LEAST_ESS)

    def worst(self, count: int = 5) -> list[tuple[tuple[int, ...], float, float]]:
        """The elements whose figures are to be trusted least: index, khat and ESS, by khat and then ESS."""
        count = as_count("count", count)
        khat, ess = self.khat.flatten().tolist(), self.ess.flatten().tolist()
        order = sorted(range(len(khat)), key=lambda i: (-khat[i], ess[i]))[:count]
        shape = self.khat.shape
        return [(tuple(int(i) for i in torch.unravel_index(torch.tensor(n), shape)), khat[n], ess[n]) for n in order]

    @property
    def short(self) -> Tensor:
        """Elements that miss a target that was asked for, ``(*plates)``."""
        return self._joined([p.short(self.targets) for p in self.parts])

    # In total

    @property
    def total(self) -> Total:
        """The same figures for all elements together, terms that no latent can change included."""
        return Total(self)

    @property
    def constant(self) -> float:
        """Terms that no latent can change, in the total and in no element."""
        return require_constant([p.constant for p in self.parts])

    # Put together, kept

    def __add__(self, other: Evaluation) -> Evaluation:
        """More particles for the same data, more rows of data, or both; associative.

        Raises:
            ValueError: where both hold the same particles, or were drawn otherwise (another K, ladder, model or guide).
        """
        if not isinstance(other, Evaluation):
            return NotImplemented
        differing = sorted(n for n in {*self.facts, *other.facts} if self.facts.get(n) != other.facts.get(n))
        if differing:
            got = "; ".join(f"{n}: {self.facts.get(n)!r} and {other.facts.get(n)!r}" for n in differing)
            raise ValueError(
                f"expected two evaluations of one model and guide, drawn alike, got different ones ({got})"
            )
        ours, theirs = self.parts[0], other.parts[0]
        if (ours.plates, ours.rows) != (theirs.plates, theirs.rows) or ours.values.keys() != theirs.values.keys():
            raise ValueError(
                f"expected two evaluations with the same plates and figures, got plates {list(ours.plates)} and "
                f"{list(theirs.plates)}, and {sorted(ours.values.keys() ^ theirs.values.keys())} in one of them alone; "
                "evaluate both alike"
            )
        _warn_of_rows_in_both(self.parts, other.parts)
        parts = {p.key: p for p in self.parts}
        for part in other.parts:
            parts[part.key] = parts[part.key] + part if part.key in parts else part
        found = tuple(parts.values())
        if len(found) > 1 and not found[0].plates:
            raise ValueError(
                "expected the same data in both evaluations, as no plate is independent: the evidence of all rows is "
                "not the sum of theirs. Evaluate all data at once"
            )
        return replace(self, parts=found)

    def gathered(self, process_group: ProcessGroup | DeviceMesh) -> Evaluation:
        """The evaluations of all processes of a group added up, in all of them, in their order.

        For data that are shared out: each process evaluates rows of its own, every row in one process alone::

            rows = torch.arange(len(x)).tensor_split(dist.get_world_size())[dist.get_rank()]
            own = evaluate(model, guide, data=DataLoader(TensorDataset(x[rows]), batch_size=256))
            whole = own.gathered(dist.group.WORLD)

        Args:
            process_group: of ``torch.distributed``; each process must have evaluated one row at least. A sampler that
                repeats rows, so that each process has as many (``DistributedSampler``), would have these counted
                twice, which is warned of.

        Raises:
            ValueError: as ``+`` does.
        """
        ranks = Ranks.of(process_group)
        if ranks is None:
            return self
        parts: list[Evaluation] = ranks.objects(self)
        if ranks.rank == 0:  # once is enough
            _warn_of_repeated_rows(parts)
        return reduce(add, parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file (npz), which takes the place of an older one only when it is whole."""
        tensors: dict[str, Tensor] = {}
        facts: list[dict[str, Any]] = []
        for i, part in enumerate(self.parts):
            tensors |= {f"{i} {name}": value for name, value in part.values.items()}
            tensors |= {f"{i} tail": part.tail, f"{i} floor": part.floor}
            facts.append({n: getattr(part, n) for n in KEPT})
            if part.probe is not None:
                tensors[f"{i} probe"] = part.probe.log_weights
                facts[-1] |= {"device": part.probe.device, "version": part.probe.version}
        write(
            path,
            tensors,
            {
                "kind": KIND,
                "parts": facts,
                "evaluation": dict(self.facts),
                "seed": self.seed,
                "targets": dict(self.targets),
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Reads what :meth:`save` wrote; runs nothing in it.

        Raises:
            ValueError: where the file is cut short, altered or something else.
        """
        tensors, facts = read(path, kind=KIND)
        parts = []
        for i, known in enumerate(facts["parts"]):
            mine = {n.split(" ", 1)[1]: v for n, v in tensors.items() if n.split(" ", 1)[0] == str(i)}
            tail, floor = mine.pop("tail"), mine.pop("floor")
            known |= {n: tuple(known[n]) for n in ("plates", "seeds", "digests")}
            probe = None
            if "probe" in mine:
                probe = Probe(mine.pop("probe"), known.pop("device"), known.pop("version"))
            parts.append(Part(values=mine, tail=tail, floor=floor, probe=probe, **known))
        return cls(tuple(parts), facts["evaluation"], facts["seed"], facts["targets"])

    # Inside

    @property
    def _names(self) -> set[str]:
        return set(self.parts[0].values)

    @property
    def _orders(self) -> list[int]:
        return [m for m in (1, 2) if jackknife_name(m) in self._names]

    @property
    def _has_bracket(self) -> bool:
        return not self.facts["plate_particles"]

    @cached_property
    def _estimates(self) -> dict[str, list[Estimate]]:
        return {}

    def _each(self, name: str) -> list[Estimate]:
        """A figure of each part."""
        if name not in self._estimates:
            if name == "log evidence":
                self._estimates[name] = [p.log_evidence() for p in self.parts]
            elif name.startswith("elbo_resampled"):
                pairs = [p.elbo_resampled() for p in self.parts]
                self._estimates["elbo_resampled lower"] = [lower for lower, _ in pairs]
                self._estimates["elbo_resampled upper"] = [upper for _, upper in pairs]
            else:
                self._estimates[name] = [p.mean(name) for p in self.parts]
        return self._estimates[name]

    def _of(self, name: str) -> Estimate:
        each, rows = self._each(name), self.parts[0].rows
        return each[0] if len(each) == 1 else Estimate.joined(each, rows or 0)

    def _joined(self, values: list[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat(values, self.parts[0].rows or 0)

    # As a report

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> list[str]:
        total, count = self.total, self.log_evidence.numel()
        low, high = total.interval(0.95)
        where = f"{count} elements of plate {', '.join(map(repr, self.plates))}" if self.plates else "all data together"
        reps = self.replicates
        drawn = f"{int(reps.min())}" if bool((reps == reps.max()).all()) else f"{int(reps.min())} to {int(reps.max())}"
        lines = [
            f"log p(x) = {total.log_evidence:.3f} ± {total.std_error:.3f} nats, 95% interval {low:.3f} to {high:.3f}",
            f"  {where}; {drawn} replicates of K = {self.num_particles} particles",
        ]
        if count > 1:
            lines[1] += f"; {total.log_evidence / count:.4f} ± {total.std_error / count:.4f} nats per element"
        rows = [("ELBO", total.estimate(bound_name(1)))]
        rows += [(f"bound, K = {k}", total.estimate(bound_name(k))) for k in self.ks if k > 1]
        rows += [
            (f"jackknife of order {m}, K = {self.num_particles}", total.estimate(jackknife_name(m)))
            for m in self._orders
        ]
        rows.append(("unbiased (multilevel)", total.estimate(UNBIASED)))
        if self._has_bracket:
            rows.append(("ELBO of q_EW, at least", total.estimate("elbo_resampled lower")))
            rows.append(("ELBO of q_EW, at most", total.estimate("elbo_resampled upper")))
        if UPPER in self._names:
            rows.append(("upper bound on log p(x)", total.estimate(UPPER)))
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {e.text(12)}" for name, e in rows]
        if self._has_bracket and int(reps.min()) < 3:
            lines.append("  the error of the ELBO of q_EW needs 3 replicates at least")
        return lines + self._verdict()

    def _verdict(self) -> list[str]:
        """ESS, khat, and in words what they say of the figures above."""
        ess, khat, limit = self.ess.flatten(), self.khat.flatten(), self.khat_threshold.flatten()
        drawn = int((self.replicates * self.num_particles).max())
        of_all = f"of {drawn} particles; {float(self.distinct.min()):.1f} distinct among {self.num_particles} draws"
        if len(ess) == 1:
            sign = "<=" if float(khat) <= float(limit) else ">"
            lines = [f"  ESS {float(ess):.1f} {of_all}; khat {float(khat):.2f} {sign} {float(limit):.2f}"]
        else:
            lines = [
                f"  ESS {float(ess.median()):.1f} in the median, {float(ess.min()):.1f} at least, {of_all} at least",
                f"  khat {float(khat.median()):.2f} in the median, {float(khat.max()):.2f} at most, to be below "
                f"{float(limit.min()):.2f}",
            ]
        if bool(self.short.any()):
            asked = " and ".join(f"{n} {v:g}" for n, v in self.targets.items())
            lines.append(f"  {int(self.short.sum())} of {len(ess)} elements have not reached {asked}: draw more")
        doubtful = int((~self.trusted).sum())
        if not doubtful:
            return [*lines, "  ok: the weights are well behaved; a mode that no particle has found would not show"]
        if drawn < LEAST_ESS:
            lines.append(f"  TOO FEW TO TELL: from {drawn} particles no ESS of {LEAST_ESS:g} can come; draw more")
            return lines
        if len(ess) == 1:
            lines.append(
                "  NOT TO BE TRUSTED: few particles carry the weight, and the interval does not hold its level; train "
                "the guide further, or draw many more particles"
            )
            return lines
        worst = ", ".join(
            f"{i[0] if len(i) == 1 else i} (khat {k:.2f}, ESS {e:.1f})" for i, k, e in self.worst(min(5, doubtful))
        )
        lines.append(f"  NOT TO BE TRUSTED: {doubtful} of {len(ess)} elements, and so the total; worst are {worst}")
        if MANY * len(ess) < doubtful < len(ess):
            lines.append(
                f"  doubt the other {len(ess) - doubtful}, too: where many are doubtful, those look best whose heavy "
                "weights no particle has found. Draw more for all, or train the guide further"
            )
        return lines


def require_constant(found: Sequence[float]) -> float:
    """What all rows have in common, or raises where it is not the same."""
    if any(not math.isclose(c, found[0], rel_tol=1e-4, abs_tol=1e-4) for c in found):
        raise ValueError(
            "expected the terms outside the independent plates that no latent reaches to be the same for all rows, "
            f"got {sorted(set(found))[:5]}; put what belongs to a row into its plate"
        )
    return found[0]


def _warn_of_rows_in_both(mine: Sequence[Part], others: Sequence[Part]) -> None:
    """Rows that both hold in other batches would be two elements each."""
    shared = {p.key for p in mine} & {p.key for p in others}
    known = {d for p in mine for d in p.digests if p.key not in shared}
    further = [d for p in others for d in p.digests if p.key not in shared]
    twice = sum(d in known for d in further)
    if twice > len(further) / 2:
        warnings.warn(
            f"{twice} of {len(further)} rows that one evaluation adds are in the other, too, in other batches: they "
            "count as further data. If they are the same, evaluate both with batches alike (shuffle=False, the same "
            "batch_size), so that their particles are put together",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_repeated_rows(evaluations: Sequence[Evaluation]) -> None:
    """Rows that several processes hold."""
    held = Counter(row for e in evaluations for row in {d for p in e.parts for d in p.digests})
    twice = sum(count > 1 for count in held.values())
    if twice:
        warnings.warn(
            f"{twice} of {len(held)} rows are in several processes, and count as often: has a sampler repeated them, "
            "so that each process has as many (DistributedSampler)? Give each process rows of its own: "
            "Subset(dataset, range(rank, len(dataset), num_processes))",
            UserWarning,
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class Total:
    """Figures of an :class:`Evaluation` summed over elements, as numbers; errors by the sums of each replicate."""

    evaluation: Evaluation

    def estimate(self, name: str) -> Estimate:
        """A figure, with its error."""
        found = Estimate.added([e.summed() for e in self.evaluation._each(name)])
        constant = 0.0 if name == DISTINCT else self.evaluation.constant
        return replace(found, value=found.value + constant)

    @property
    def log_evidence(self) -> float:
        """log p(x) of all rows that were evaluated."""
        return float(self.estimate("log evidence").value)

    @property
    def std_error(self) -> float:
        """Standard error of ``log_evidence``."""
        return float(self.estimate("log evidence").std_error)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval for the log evidence; lower and upper end."""
        low, high = self.estimate("log evidence").interval(level)
        return float(low), float(high)

    @property
    def elbo(self) -> float:
        """The ELBO."""
        return self.bounds[1]

    @property
    def bounds(self) -> dict[int, float]:
        """The importance weighted bound for a ladder of K."""
        return {k: float(self.estimate(bound_name(k)).value) for k in self.evaluation.ks}

    @property
    def bound_errors(self) -> dict[int, float]:
        """Standard errors of ``bounds``."""
        return {k: float(self.estimate(bound_name(k)).std_error) for k in self.evaluation.ks}

    def bound_width(self, k: int, level: float = 0.95) -> float:
        """Half the width of Student's t interval for the bound with k particles."""
        return float(self.estimate(bound_name(k)).width(level))

    @property
    def jackknife(self) -> dict[int, float]:
        """By order."""
        return {m: float(self.estimate(jackknife_name(m)).value) for m in self.evaluation._orders}

    @property
    def unbiased(self) -> float:
        """Multilevel estimate of the log evidence."""
        return float(self.estimate(UNBIASED).value)

    @property
    def elbo_resampled(self) -> tuple[float, float] | None:
        """Lower and upper bound on ELBO[q_EW]; None where plates have particles of their own."""
        if not self.evaluation._has_bracket:
            return None
        lower, upper = (self.estimate(f"elbo_resampled {side}") for side in ("lower", "upper"))
        return float(lower.value), float(upper.value)

    @property
    def upper(self) -> float | None:
        """Upper bound on the log evidence, on average over simulated data."""
        return float(self.estimate(UPPER).value) if UPPER in self.evaluation._names else None
