# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How training goes: bound, ESS, khat and the gradient's signal-to-noise ratio every so many steps."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO

from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.estimates import student_quantile
from pyro_iwae.evaluating import evaluate
from pyro_iwae.evaluation import LEAST_ESS, Evaluation
from pyro_iwae.gradient_snr import GradientSNR, gradient_snr, kept_gradients
from pyro_iwae.options import as_count, require_callables
from pyro_iwae.parts import bound_name
from pyro_iwae.state import unchanged_state

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Monitor", "Record"]

Program = Callable[..., Any]
OTHERS = 64  # particles, where the ELBO that trains has none of this package's
LEAST_GRADIENTS = 20  # as gradient_snr needs them
MOST_ROWS = 20  # of a printed table
FACTS = "step", "elements", "num_particles", "drawn"  # fields that a writer need not plot


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a :class:`Monitor` measured after a step: plain numbers, in nats where they are log densities.

    ``print`` it for one line; ``dataclasses.asdict`` makes a row of a table.

    Attributes:
        step: how many calls of the monitor there were, which is how many steps.
        elements: how many independent elements; bound, ELBO and log evidence are summed over them, unscaled.
        num_particles: K, of the bound.
        drawn: particles drawn for each element, all replicates together.
        bound: the importance weighted bound L_K.
        bound_error: its standard error.
        elbo: the ELBO, L_1.
        elbo_error: its standard error.
        log_evidence: log p(x), from all that was drawn.
        log_evidence_error: its standard error.
        ess: effective sample size of all that was drawn, the median over elements.
        ess_least: that of the element with the least.
        khat: Pareto's khat of all that was drawn, the median over elements.
        khat_most: that of the element with the most.
        khat_threshold: what khat should be below.
        trusted: share of the elements whose khat is below it, with an ESS of 100 at least; NaN where fewer than 100
            particles were drawn.
        snr_guide: signal-to-noise ratio of the gradient by the guide's parameters; NaN where there is none.
        snr_guide_error: its standard error.
        snr_model: by the model's parameters, likewise.
        snr_model_error: its standard error.
    """

    step: int
    elements: int
    num_particles: int
    drawn: int
    bound: float
    bound_error: float
    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    ess: float
    ess_least: float
    khat: float
    khat_most: float
    khat_threshold: float
    trusted: float
    snr_guide: float = math.nan
    snr_guide_error: float = math.nan
    snr_model: float = math.nan
    snr_model_error: float = math.nan

    def __str__(self) -> str:
        sign = "<=" if self.khat_most <= self.khat_threshold else ">"
        several = self.elements > 1
        ess = f"ESS {self.ess:.1f}" + (f", least {self.ess_least:.1f}," if several else "") + f" of {self.drawn}"
        khat = f"khat {self.khat:.2f}, most {self.khat_most:.2f}" if several else f"khat {self.khat:.2f}"
        bound, khat = (
            f"bound {self.bound:.3f} ± {self.bound_error:.3f} nats",
            f"{khat} {sign} {self.khat_threshold:.2f}",
        )
        parts = [bound, ess, khat]
        ratios = [(role, snr) for role, snr in (("guide", self.snr_guide), ("model", self.snr_model)) if snr == snr]
        if ratios:
            parts.append("SNR " + ", ".join(f"{snr:.3g} ({role})" for role, snr in ratios))
        return f"step {self.step}: " + "; ".join(parts)

    @classmethod
    def of(cls, step: int, found: Evaluation, snr: GradientSNR | None = None) -> Record:
        """From an evaluation, and the ratios if they were measured."""
        total, k = found.total, found.num_particles
        bound, elbo = total.estimate(bound_name(k)), total.estimate(bound_name(1))
        drawn = int(found.replicates.max()) * k
        ratios = {}
        if snr is not None:
            ratios = {f"snr_{n}": getattr(snr, n) for n in ("guide", "guide_error", "model", "model_error")}
        return cls(
            step=step,
            elements=found.ess.numel(),
            num_particles=k,
            drawn=drawn,
            bound=float(bound.value),
            bound_error=float(bound.std_error),
            elbo=float(elbo.value),
            elbo_error=float(elbo.std_error),
            log_evidence=total.log_evidence,
            log_evidence_error=total.std_error,
            ess=float(found.ess.median()),
            ess_least=float(found.ess.min()),
            khat=float(found.khat.median()),
            khat_most=float(found.khat.max()),
            khat_threshold=float(found.khat_threshold.min()),
            trusted=float(found.trusted.double().mean()) if drawn >= LEAST_ESS else math.nan,
            **ratios,
        )


class Monitor:
    """Watches training: every so many steps it measures bound, ESS, khat and the gradient's signal-to-noise ratio.

    Call it after each step, whatever takes the step (``SVI``, :class:`~pyro_iwae.CompiledSVI`, a torch optimiser)::

        monitor = Monitor(model, guide, elbo, every=100, writer="runs/first")
        for step in range(3000):
            svi.step(x)
            monitor(x)
        print(monitor)

    It changes nothing: parameters, their ``grad``, buffers and random generators are afterwards as they were, so that a
    seeded run ends at the same parameters with a monitor as without.

    The first call measures, so that what cannot be measured is an error at the first step and not hours later; then
    every ``every``-th does. An error of a later record is a warning: training goes on without that record.

    A record takes about as long as 30 to 50 steps, 20 of them for the gradient: choose ``every`` by that, a thousand or
    more where steps are compiled.

    Arguments need not be the step's. Records of a fixed batch, held out or not, can be compared among each other;
    records of minibatches also differ by their rows. Figures are unscaled, of the rows that model and guide got,
    whatever a subsampled plate multiplies a loss with. Modules stay in ``train`` or ``eval`` mode.

    Args:
        model: the model. Give it without a ``poutine.scale`` that anneals: tempered weights are no evidence.
        guide: the guide.
        elbo: the loss that trains, this package's or another of Pyro's. Its gradient is what the ratio is of. Particles
            are drawn by its ``num_particles``, ``plate_particles``, ``chunk_size``, ``vectorize_particles`` and
            ``max_plate_nesting``, as they are at the time; for Pyro's ELBOs 64. Whatever its ``objective``, and with
            ``combine=True`` too, the bound is the importance weighted one.
        every: steps from one record to the next.
        writer: where else to write figures: anything with ``add_scalar(tag, value, step)``, such as TensorBoard's
            ``SummaryWriter`` or Lightning's ``logger.experiment``; or a folder, for a ``SummaryWriter`` of its own,
            which needs ``pip install pyro-iwae[tensorboard]``.
        tag: what comes before the names of figures there, as in ``pyro_iwae/bound``.
        num_particles: K of the bound, where it is not to be the ELBO's. khat and ESS are of this times
            ``num_replicates`` particles, which should be a thousand or so for them to say much.
        num_replicates: independent times K particles, for the errors; at least 2.
        num_gradients: of which the ratio is found, at least 20; 0 leaves it out. Each costs what a step costs.

    Attributes:
        records: all records so far.
        step: how many calls there were; set it where training goes on from a checkpoint.

    Raises:
        TypeError: where an argument has the wrong type.
        ValueError: where a number is too small.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_iwae import ImportanceWeightedELBO, Monitor
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide, elbo, x = AutoNormal(model), ImportanceWeightedELBO(64), torch.tensor([1.0, -1.0])
        >>> svi, monitor = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo), Monitor(model, guide, elbo, every=40)
        >>> for _ in range(80):
        ...     loss, record = svi.step(x), monitor(x)
        >>> [r.step for r in monitor.records]
        [1, 40, 80]
        >>> abs(record.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()) < 0.1
        True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        elbo: ELBO,
        *,
        every: int = 100,
        writer: Any = None,
        tag: str = "pyro_iwae",
        num_particles: int | None = None,
        num_replicates: int = 16,
        num_gradients: int = LEAST_GRADIENTS,
    ) -> None:
        require_callables(model, guide)
        if not isinstance(elbo, ELBO):
            raise TypeError(
                f"expected elbo to be the loss that trains, such as ImportanceWeightedELBO(64), got {elbo!r}"
            )
        if writer is not None and not isinstance(writer, str | os.PathLike) and not hasattr(writer, "add_scalar"):
            raise TypeError(
                "expected writer to be None, a folder for TensorBoard, or an object with add_scalar(tag, value, step), "
                f"got {writer!r}"
            )
        if not isinstance(tag, str):
            raise TypeError(f"expected tag to be what the figures' names begin with, such as 'vae', got {tag!r}")
        self.model, self.guide, self.elbo = model, guide, elbo
        self.every = as_count("every", every)
        self.tag = tag
        self.num_particles = None if num_particles is None else as_count("num_particles", num_particles)
        self.num_replicates = as_count("num_replicates", num_replicates, least=2)
        self.num_gradients = as_count("num_gradients", num_gradients, least=0)
        if 0 < self.num_gradients < LEAST_GRADIENTS:
            raise ValueError(f"expected num_gradients to be 0, or {LEAST_GRADIENTS} at least, got {num_gradients}")
        self.records: list[Record] = []
        self.step = 0
        self._given = writer
        self._own: Any = None  # a writer made here
        self._copy = copy.copy(elbo) if isinstance(elbo, ImportanceWeightedELBO) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Record | None:
        """Counts a step, and measures if its turn has come.

        Args:
            args: passed to model and guide.
            kwargs: passed to model and guide.

        Returns:
            The new record at the first call and at every ``every``-th, else None.

        Raises:
            ImportError: where ``writer`` is a folder, and TensorBoard is missing.
            ValueError: at the first record, where there is no evidence or gradient to measure; later it is a warning.
        """
        self.step += 1
        if self.records and self.step % self.every:
            return None
        writer = self._writer()
        try:
            record = self._measured(args, kwargs)
        except (ValueError, NotImplementedError) as error:
            if not self.records:
                raise
            warnings.warn(f"Monitor has no record of step {self.step}: {error}", stacklevel=2)
            return None
        self.records.append(record)
        if writer is not None:
            self._write(writer, record)
        return record

    def close(self) -> None:
        """Closes the ``SummaryWriter`` that the monitor made; one that it was given stays open."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __str__(self) -> str:
        if not self.records:
            return f"no records yet; there is one after the first step, then one every {self.every} steps"
        shown = _some(self.records)
        lines = _table(shown)
        if len(shown) < len(self.records):
            lines.append(f"{len(shown)} of {len(self.records)} records")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The bound with 95 % intervals and the log evidence (left axis), and the ESS in percent (right), by step.

        Args:
            ax: where to draw; None makes a figure.

        Returns:
            The axes of the bound.

        Raises:
            ValueError: where there are no records yet.
        """
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator, ScalarFormatter

        if not self.records:
            raise ValueError("expected at least one record to plot, got none; call the monitor after each step")
        if ax is None:
            ax = plt.subplots(figsize=(6.0, 3.8), layout="constrained")[1]
        blue, red = "#0072B2", "#D55E00"
        steps = [r.step for r in self.records]
        counts = [r.drawn // r.num_particles for r in self.records]
        errors = [student_quantile(0.975, n - 1) * r.bound_error for n, r in zip(counts, self.records, strict=True)]
        ax.plot(steps, [r.log_evidence for r in self.records], color="0.4", lw=1.0, ls=":", label="log p(x) (left)")
        bounds = [r.bound for r in self.records]
        ax.errorbar(steps, bounds, errors, color=blue, marker="o", ms=3, capsize=2, label="bound, 95 % (left)")
        right = ax.twinx()
        shares = [100.0 * r.ess / r.drawn for r in self.records]
        right.plot(steps, shares, color=red, marker="s", ms=3, ls="--", label="ESS (right)")
        ax.set_zorder(right.get_zorder() + 1)  # the bound in front
        ax.patch.set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        ax.set_xlabel("step")
        ax.set_ylabel("nats", color=blue)
        right.set_ylabel("ESS (% of particles, median)", color=red)
        right.set_ylim(0.0, 105.0)
        handles = [h for a in (ax, right) for h in a.get_legend_handles_labels()[0]]
        ax.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small", frameon=False
        )
        return ax

    # Measuring

    def _measured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Record:
        before = set(pyro.get_param_store().keys())
        with torch.enable_grad(), unchanged_state(self.model, self.guide) as modules, _kept_store():
            found = self._evaluated(args, kwargs)
            _warn_of_new(before)
            snr = self._ratios(modules, args, kwargs) if self.num_gradients else None
            return Record.of(self.step, found, snr)

    def _evaluated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Evaluation:
        options: dict[str, Any] = {"num_particles": OTHERS}
        if isinstance(self.elbo, ImportanceWeightedELBO):
            names = (
                "num_particles",
                "plate_particles",
                "chunk_size",
                "vectorize_particles",
                "max_plate_nesting",
                "process_group",
            )
            options = {n: getattr(self.elbo, n) for n in names}
        if self.num_particles is not None:
            options["num_particles"] = self.num_particles
        options |= {"num_replicates": self.num_replicates, "ks": (), "progress": False}
        try:
            return evaluate(self.model, self.guide, *args, **options, **kwargs)
        except ValueError as error:
            raise ValueError(
                "Monitor found no evidence to measure. Call it with all data where the step takes a part below latents "
                "that all share, monitor(x_all), and give it the model without the scale where the step anneals, "
                f"Monitor(plain_model, guide, elbo). What evaluate said: {error}"
            ) from error

    def _ratios(
        self, modules: Mapping[torch.nn.Module, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> GradientSNR:
        """Of gradients that reach no ``grad``, not even of modules that Pyro was not told of."""
        reached = [*(p for _, p in pyro.get_param_store().named_parameters())]
        reached += [p for module in list(modules) for p in module.parameters(recurse=False)]
        named = {str(i): p for i, p in enumerate(reached)}
        with kept_gradients(named):
            for p in reached:
                p.grad = None  # what is added to a tensor that is kept would stay
            try:
                count = self.num_gradients
                return gradient_snr(
                    self._plain, self.model, self.guide, *args, num_replicates=count, progress=False, **kwargs
                )
            except ValueError as error:
                raise ValueError(f"{error}. Monitor(..., num_gradients=0) leaves the gradient out") from error

    @property
    def _plain(self) -> ELBO:
        """The loss with its options as they are now; recordings stay those of training."""
        if self._copy is None:
            return self.elbo
        options = {n: v for n, v in vars(self.elbo).items() if not n.startswith("_")}
        vars(self._copy).update(options, compile=False)
        return self._copy

    # Writing

    def _writer(self) -> Any:
        if not isinstance(self._given, str | os.PathLike):
            return self._given
        if self._own is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"Monitor(writer={os.fspath(self._given)!r}) writes for TensorBoard, which is not installed; "
                    "pip install pyro-iwae[tensorboard]"
                ) from error
            self._own = SummaryWriter(os.fspath(self._given))
        return self._own

    def _write(self, writer: Any, record: Record) -> None:
        for name, value in asdict(record).items():
            if name not in FACTS and not math.isnan(value):
                writer.add_scalar(f"{self.tag}/{name}", value, record.step)
        if writer is self._own:
            writer.flush()  # so that a run can be watched, and one that is killed leaves what it had


@contextmanager
def _kept_store() -> Iterator[None]:
    """Puts back what a loss replaces in the param store, as TraceGraph_ELBO does with its running baselines."""
    store = pyro.get_param_store()
    before = dict(store.named_parameters())
    try:
        yield
    finally:
        now = dict(store.named_parameters())
        replaced = {n: p for n, p in before.items() if now.get(n) is not p}
        if replaced:
            store.set_state({"params": replaced, "constraints": {}})


def _warn_of_new(before: set[str]) -> None:
    made = sorted(set(pyro.get_param_store().keys()) - before)
    if made:
        names = ", ".join(made[:3]) + (", ..." if made[3:] else "")
        warnings.warn(
            f"Monitor was the first to ask for parameters ({names}), which may start elsewhere now than without it; "
            "call it after the step",
            stacklevel=4,
        )


def _some(records: Sequence[Record]) -> list[Record]:
    """The first, the last, and some between, evenly."""
    if len(records) <= MOST_ROWS:
        return list(records)
    last = len(records) - 1
    return [records[round(i * last / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def _table(records: Sequence[Record]) -> list[str]:
    several = any(r.elements > 1 for r in records)
    roles = [n for n in ("guide", "model") if any(not math.isnan(getattr(r, f"snr_{n}")) for r in records)]
    rows = [["step", "bound, nats", "log p(x), nats", "ESS", *["least"] * several, "of", "khat", *["most"] * several]]
    rows[0] += [f"{role}'s SNR" for role in roles]
    for r in records:
        row = [str(r.step), f"{r.bound:.3f} ± {r.bound_error:.3f}"]
        row += [f"{r.log_evidence:.3f} ± {r.log_evidence_error:.3f}"]
        row += [f"{r.ess:.1f}", *[f"{r.ess_least:.1f}"] * several, str(r.drawn)]
        row += [f"{r.khat:.2f}", *[f"{r.khat_most:.2f}"] * several]
        row += [f"{getattr(r, f'snr_{n}'):.2g} ± {getattr(r, f'snr_{n}_error'):.1g}" for n in roles]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
