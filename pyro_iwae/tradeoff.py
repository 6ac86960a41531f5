# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Which K is worth its cost: what more particles give, and what they take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pyro_iwae.chunks import require_chunk_size
from pyro_iwae.cost import peak_bytes, seconds
from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.estimates import Estimate
from pyro_iwae.evaluating import evaluate
from pyro_iwae.evaluation import Evaluation
from pyro_iwae.gradient_snr import gradient_snr, kept_gradients, parameters_of
from pyro_iwae.gradients import PathGradient, Pathwise, ScoreGradient
from pyro_iwae.options import as_count, as_counts, as_number, require_callables, require_gradients, require_switch
from pyro_iwae.parts import bound_name
from pyro_iwae.state import unchanged_state
from pyro_iwae.threads import in_one_thread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Cost", "Recommendation", "Tradeoff", "tradeoff"]

KS = tuple(2**i for i in range(9))  # 1 to 256
ENOUGH = 1000  # particles, for ESS and khat to say something
ALIKE = 1.1  # times as long is as long


@dataclass(frozen=True)
class Cost:
    """What a training step takes with so many particles: loss and gradient, without the optimiser.

    Attributes:
        seconds: median over steps.
        spread: lower and upper quartile.
        bytes: the most that its tensors take at once, beside parameters and data.
        snr: signal-to-noise ratio of the guide's gradient; NaN where it has no parameters.
        snr_error: its standard error.
    """

    seconds: float
    spread: tuple[float, float]
    bytes: int
    snr: float = math.nan
    snr_error: float = math.nan


@dataclass(frozen=True)
class Recommendation:
    """How many particles to take, and why."""

    num_particles: int
    why: str

    def __str__(self) -> str:
        return f"K = {self.num_particles}: {self.why}"


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """Bound, time and memory for a ladder of K. Made by :func:`tradeoff`; ``print`` it for a report.

    Attributes:
        evaluation: bounds and log evidence, all from the same particles.
        costs: of a step, by K.
        gradient: the estimator of which the steps were.

    Example::

        >>> from pyro_iwae.exact import Gamma
        >>> gamma = Gamma(shape=1.0)
        >>> found = tradeoff(gamma.model, gamma.guide, ks=[1, 4, 16], num_replicates=400, progress=False)
        >>> found.ks, found.bounds[1].value < found.bounds[16].value
        ((1, 4, 16), tensor(True))
        >>> found.recommend(worth=0.3).num_particles  # a doubling gains 0.22 nats from 1 to 4
        1
    """

    evaluation: Evaluation
    costs: Mapping[int, Cost]
    gradient: PathGradient

    @property
    def ks(self) -> tuple[int, ...]:
        """The ladder."""
        return tuple(self.costs)

    @property
    def bounds(self) -> dict[int, Estimate]:
        """By K, in nats, summed over elements."""
        return {k: self.evaluation.total.estimate(bound_name(k)) for k in self.ks}

    @property
    def gains(self) -> dict[int, Estimate]:
        """What each further doubling of the particles gains on the way to K, in nats; on the same particles."""
        pairs = zip(self.ks, self.ks[1:], strict=False)
        return {b: self._gain(a, b, math.log2(b / a)) for a, b in pairs}

    def _gain(self, fewer: int, more: int, over: float = 1.0) -> Estimate:
        each = []
        for part in self.evaluation.parts:
            values = part.values[bound_name(more)] - part.values[bound_name(fewer)]
            each.append(Estimate.mean(values / over).summed())
        return Estimate.added(each)

    @property
    def recommended(self) -> Recommendation:
        """:meth:`recommend` with its defaults."""
        return self.recommend()

    def recommend(
        self, worth: float = 0.1, *, max_seconds: float = math.inf, max_bytes: float = math.inf
    ) -> Recommendation:
        """The fewest particles from which doubling them gains less than it is worth.

        The gain of a doubling falls about by half with each further one, so that what is left to gain then is at most
        about twice ``worth`` nats per element.

        Args:
            worth: nats per independent element that a doubling should gain.
            max_seconds: that a step may take.
            max_bytes: that a step may take.

        Raises:
            ValueError: where no K of the ladder is as cheap as that.
        """
        if not as_number("worth", worth) > 0.0:
            raise ValueError(f"expected worth > 0 nats, got {worth}")
        for name, limit in (("max_seconds", max_seconds), ("max_bytes", max_bytes)):
            if not as_number(name, limit) > 0.0:
                raise ValueError(f"expected {name} > 0, got {limit}")
        cheap = [k for k, c in self.costs.items() if c.seconds <= max_seconds and c.bytes <= max_bytes]
        if not cheap:
            least = self.costs[self.ks[0]]
            raise ValueError(
                f"expected a step of K = {self.ks[0]} within max_seconds={max_seconds:g} and max_bytes={max_bytes:g}, "
                f"got {least.seconds:.3g} s and {least.bytes} bytes; allow more, or measure with chunk_size="
            )
        gains = self.gains
        if not math.isfinite(float(self.bounds[self.ks[0]].value)):
            return Recommendation(max(cheap), self._impossible())
        wanted = worth * self._count
        worthwhile = [k for k, gain in gains.items() if not float(gain.value) < wanted]
        aim = max(worthwhile, default=self.ks[0])
        chosen = max(k for k in cheap if k <= aim or k == min(cheap))
        why = [self._cost(chosen), self._next(chosen), self._for_nothing(chosen, cheap)]
        why += [self._of_noise(chosen), self._of_trust()]
        if aim == self.ks[-1]:
            why.insert(2, self._not_enough(float(gains[aim].value) / wanted, worth))
        elif chosen < aim:
            why.insert(2, f"K = {aim} is where doublings begin to gain less than {worth:g}, but costs too much.")
        return Recommendation(chosen, " ".join(filter(None, why)))

    @property
    def _count(self) -> int:
        return self.evaluation.log_evidence.numel()

    def _nats(self, gain: Estimate) -> str:
        """Per element, where there are several."""
        value, error = (float(v) / self._count for v in (gain.value, gain.std_error))
        return f"{value:.2g} ± {error:.1g} nats" + (" per element" if self._count > 1 else "")

    def _impossible(self) -> str:
        lowest = self.ks[0]
        return (
            f"the bound of K = {lowest} is {float(self.bounds[lowest].value)} nats, so that no gain can be told: the "
            "guide draws what the model holds to be impossible. The more particles the better, or give the guide the "
            "model's support."
        )

    def _cost(self, k: int) -> str:
        lowest, mine = self.ks[0], self.costs[k]
        if k == lowest:
            return f"a step takes {1e3 * mine.seconds:.3g} ms and {_size(mine.bytes)}."
        start, least = "the ELBO" if lowest == 1 else f"K = {lowest}", self.costs[lowest]
        return (
            f"it gains {self._nats(self._gain(lowest, k))} over {start}; a step takes {1e3 * mine.seconds:.3g} ms, "
            f"{mine.seconds / least.seconds:.2g} times that of K = {lowest}, and {_size(mine.bytes)}."
        )

    def _next(self, k: int) -> str:
        further = [other for other in self.ks if other > k]
        if not further:
            return ""
        then, longer = further[0], 1e3 * (self.costs[further[0]].seconds - self.costs[k].seconds)
        gain = self._nats(self._gain(k, then))
        price = f"{longer:.2g} ms a step more" if longer > 0.0 else "no more time"
        return f"From there to K = {then} it would gain {gain} more, for {price}."

    def _for_nothing(self, k: int, cheap: Sequence[int]) -> str:
        """Small models cost the same, whatever K."""
        most = max(other for other in cheap if other == k or self.costs[other].seconds <= ALIKE * self.costs[k].seconds)
        if most <= k:
            return ""
        return f"Up to K = {most} a step is as fast within {ALIKE - 1.0:.0%}, so that you may as well take that."

    def _not_enough(self, ratio: float, worth: float) -> str:
        needed = float(f"{self.ks[-1] * ratio:.1g}")
        return (
            f"The last doubling still gained {worth:g} nats or more. Gains fall about as 1 / K, so that some "
            f"{needed:.0f} particles would be needed, or a better guide."
        )

    def _of_noise(self, k: int) -> str:
        lowest, mine = self.costs[self.ks[0]], self.costs[k]
        if not isinstance(self.gradient, Pathwise) or not mine.snr + 2.0 * mine.snr_error < lowest.snr / 2.0:
            return ""
        return (
            f"The guide's gradient is noisier there, with a signal-to-noise ratio of {mine.snr:.2g} against "
            f"{lowest.snr:.2g} at K = {self.ks[0]}: take gradient=DoublyReparameterized()."
        )

    def _of_trust(self) -> str:
        doubtful = int((~self.evaluation.trusted).sum())
        if not doubtful:
            return ""
        whose = "the weight" if self._count == 1 else f"the weight of {doubtful} of {self._count} elements"
        return f"Beware: few particles carry {whose}: log p(x) may be higher than it seems, and there be more to gain."

    def __str__(self) -> str:
        gains, has_snr = self.gains, not all(math.isnan(c.snr) for c in self.costs.values())
        head = ["K", "bound, nats", "gain per doubling", "step, ms", "memory", *["guide's SNR"] * has_snr]
        rows = [head]
        for k, cost in self.costs.items():
            gain = gains[k].text() if k in gains else ""
            bound = self.bounds[k]
            row = [str(k), bound.text(), gain]
            row += [
                f"{1e3 * cost.seconds:.3g}",
                _size(cost.bytes),
                *[f"{cost.snr:.2g} ± {cost.snr_error:.1g}"] * has_snr,
            ]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
        total = self.evaluation.total
        lines.append(f"log p(x) = {total.log_evidence:.3f} ± {total.std_error:.3f} nats")
        return "\n".join([*lines, f"Recommended: {self.recommended}"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The bound (left axis) and the time of a step (right axis) against K; the recommended K is marked.

        Args:
            ax: where to draw; None makes a figure.

        Returns:
            The axes of the bound.
        """
        import matplotlib.pyplot as plt
        from matplotlib.ticker import NullLocator, ScalarFormatter

        if ax is None:
            ax = plt.subplots(figsize=(6.0, 3.8), layout="constrained")[1]
        ks, bounds, total = list(self.ks), list(self.bounds.values()), self.evaluation.total
        blue, red = "#0072B2", "#D55E00"
        low, high = total.interval(0.95)
        ax.axhspan(low, high, color="0.85", lw=0)
        ax.axhline(total.log_evidence, color="0.4", lw=1.0, ls=":", label="log p(x), 95 % interval")
        values, errors = [float(b.value) for b in bounds], [float(b.width()) for b in bounds]
        ax.errorbar(ks, values, errors, color=blue, marker="o", ms=4, capsize=2, label="bound (left)")
        right = ax.twinx()
        costs = self.costs.values()
        spread = [[1e3 * abs(c.seconds - c.spread[i]) for c in costs] for i in (0, 1)]
        times = [1e3 * c.seconds for c in costs]
        right.errorbar(ks, times, spread, color=red, marker="s", ms=4, ls="--", label="time of a step (right)")
        chosen = self.recommended.num_particles
        ax.axvline(chosen, color="0.6", lw=1.0)
        side = "right" if ks.index(chosen) > len(ks) / 2 else "left"  # of the line
        text = f" K = {chosen} recommended "
        ax.annotate(text, (chosen, 0.02), xycoords=("data", "axes fraction"), color="0.3", ha=side)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        ax.set_xlabel("particles K")
        ax.set_ylabel("bound (nats)", color=blue)
        right.set_ylabel("time of a step (ms)", color=red)
        right.set_ylim(bottom=0.0)
        handles = [h for a in (ax, right) for h in a.get_legend_handles_labels()[0]]
        ax.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small", frameon=False
        )
        return ax


@in_one_thread
def tradeoff(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    ks: Sequence[int] = KS,
    num_replicates: int | None = None,
    num_steps: int = 20,
    gradient: PathGradient | None = None,
    score: ScoreGradient | None = None,
    plate_particles: Mapping[str, int] | str | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    vectorize_particles: bool | None = None,
    max_plate_nesting: float = math.inf,
    progress: bool = True,
    **kwargs: Any,
) -> Tradeoff:
    """Measures what more particles give and what they cost, at the present parameters, and recommends how many.

    For each K: the importance weighted bound, all from the same particles; the median time of a step (loss and
    gradient) over ``num_steps``, one step of each K in turn; the most memory that a step's tensors take; the
    signal-to-noise ratio of the guide's gradient, which for :class:`~pyro_iwae.Pathwise` gets worse with K.

    Parameters, their ``grad``, buffers and random generators (but for one draw) stay as they are. Run it on a minibatch
    of the size that you train on, after some training: at the start every guide is bad.

    Args:
        model: the model.
        guide: the guide.
        args: passed to both.
        ks: the ladder of particles, two at least; by default the powers of two up to 256.
        num_replicates: independent repeats of the largest K, for the errors of the bounds; by default 16, or what makes
            a thousand particles.
        num_steps: how many steps of each K to time, 20 at least.
        gradient: as for :class:`~pyro_iwae.ImportanceWeightedELBO`, as are the following.
        score: likewise.
        plate_particles: likewise; numbers by plate, which are the same for each of the ks.
        chunk_size: likewise.
        compile: likewise; compiling itself is not in the time.
        vectorize_particles: likewise.
        max_plate_nesting: likewise.
        progress: whether to show a bar.
        kwargs: passed to model and guide.

    Returns:
        What was measured; ``print`` it, ``plot`` it, ask it to ``recommend`` under limits of your own.

    Raises:
        RuntimeError: where gradients are turned off.
        TypeError: where an argument has the wrong type.
        ValueError: where ``ks`` are fewer than two, or as for :func:`~pyro_iwae.evaluate`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(1.0)), 1.0))
        >>> found = tradeoff(model, guide, ks=[1, 4, 16], num_replicates=400, progress=False)
        >>> found.recommended.num_particles  # -0.58, -0.13 and -0.03 nats: 0.22 a doubling up to 4, 0.05 from there
        4
    """
    require_callables(model, guide)
    require_gradients("tradeoff", "it outside of the block")
    require_switch("progress", progress)
    ks = sorted(set(as_counts("ks", ks)))
    if len(ks) < 2:
        raise ValueError(f"expected at least two different ks to compare, got {ks}")
    num_steps = as_count("num_steps", num_steps, least=20)
    if plate_particles == "auto":
        raise ValueError(
            "expected plate_particles as numbers by plate, the same for each of the ks, got 'auto', which gives plates "
            "as many particles as num_particles; write plate_particles={'data': 16}, say"
        )
    options: dict[str, Any] = {
        "plate_particles": plate_particles,
        "vectorize_particles": vectorize_particles,
        "max_plate_nesting": max_plate_nesting,
    }
    chunk_size = require_chunk_size(chunk_size)
    chunks = {k: chunk_size if chunk_size is not None and chunk_size < k else None for k in ks}
    elbos = {
        k: ImportanceWeightedELBO(k, gradient=gradient, score=score, compile=compile, chunk_size=chunks[k], **options)
        for k in ks
    }
    evaluation = evaluate(
        model,
        guide,
        *args,
        num_particles=ks[-1],
        num_replicates=max(16, -(-ENOUGH // ks[-1])) if num_replicates is None else num_replicates,
        ks=ks,
        chunk_size=chunks[ks[-1]],
        progress=progress,
        **options,
        **kwargs,
    )
    with unchanged_state(model, guide):
        device = torch.device(evaluation.parts[0].probe.device if evaluation.parts[0].probe else "cpu")
        costs = _costs(elbos, model, guide, args, kwargs, num_steps, device, progress)
    return Tradeoff(evaluation, costs, next(iter(elbos.values())).gradient)


def _costs(
    elbos: Mapping[int, ImportanceWeightedELBO],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_steps: int,
    device: torch.device,
    progress: bool,
) -> dict[int, Cost]:
    _, parameters = parameters_of(model, guide, args, kwargs)

    def step(k: int) -> Callable[[], object]:
        for p in parameters.values():
            p.grad = None  # as an optimiser leaves it
        return lambda: elbos[k].loss_and_grads(model, guide, *args, **kwargs)

    with kept_gradients(parameters):
        for k in elbos:
            step(k)()  # the first looks at the model, or compiles
        taken: dict[int, list[float]] = {k: [] for k in elbos}
        for _ in tqdm(range(num_steps), disable=not progress, desc="time"):
            for k in elbos:
                taken[k].append(seconds(step(k), device))
        memory = {k: peak_bytes(step(k), device) for k in elbos}
    costs = {}
    for k in tqdm(elbos, disable=not progress, desc="gradients"):
        snr = math.nan, math.nan
        if parameters:
            found = gradient_snr(elbos[k], model, guide, *args, num_replicates=num_steps, progress=False, **kwargs)
            snr = found.guide, found.guide_error
        low, median, high = statistics.quantiles(taken[k], n=4)
        costs[k] = Cost(median, (low, high), memory[k], *snr)
    return costs


def _size(count: int) -> str:
    """Bytes, as one reads them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
