# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of what was found: data in, ``ax`` in, ``ax`` out. Nothing about matplotlib is changed.

Each function draws into ``ax``, or makes a figure where it is None. It returns the axes, whose ``figure`` can be saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_iwae.diagnostics import ess as effective_sample_size
from pyro_iwae.evaluation import LEAST_ESS, Evaluation
from pyro_iwae.gradient_snr import GradientSNR
from pyro_iwae.logweights import LogWeights
from pyro_iwae.options import as_count, require_log_weights
from pyro_iwae.tradeoff import Tradeoff

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PALETTE",
    "bounds",
    "density_1d",
    "density_2d",
    "ess",
    "khat",
    "reconstructions",
    "snr",
    "tradeoff",
    "weights",
]

# After Okabe and Ito: they stay apart for the colour-blind, and line styles and markers differ, too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
BLUE, RED, GREEN = PALETTE[:3]
GREY = "0.4"


def bounds(evaluation: Evaluation, *, per_element: bool = False, ax: Axes | None = None) -> Axes:
    """The bound against K with 95 % intervals, and the log evidence with its own; what else was found beside them.

    Args:
        evaluation: from :func:`~pyro_iwae.evaluate`.
        per_element: whether to divide by the number of independent elements.
        ax: where to draw.

    Returns:
        The axes.
    """
    _require(evaluation, Evaluation, "an Evaluation, which evaluate(...) returns")
    ax = _axes(ax)
    total, last = evaluation.total, evaluation.num_particles
    share = 1.0 / evaluation.log_evidence.numel() if per_element else 1.0
    ks = list(evaluation.ks)
    low, high = total.interval(0.95)
    ax.axhspan(low * share, high * share, color="0.88", lw=0)
    ax.axhline(total.log_evidence * share, color=GREY, lw=1.0, ls=":", label="log p(x), 95 % interval")
    values, errors = [total.bounds[k] * share for k in ks], [total.bound_width(k) * share for k in ks]
    ax.errorbar(ks, values, errors, color=BLUE, marker="o", ms=4, capsize=2, label="bound")
    for (order, value), marker, color in zip(total.jackknife.items(), "sD", (RED, PALETTE[3]), strict=False):
        place = last * 1.12**order  # beside the bound of as many particles
        ax.plot([place], [value * share], color=color, marker=marker, ms=5, ls="", label=f"jackknife of order {order}")
    if total.upper is not None:
        ax.plot([last], [total.upper * share], color=GREEN, marker="v", ms=6, ls="", label="upper bound")
    _log_ticks(ax, ks)
    ax.set_xlabel("particles K")
    ax.set_ylabel("nats per element" if per_element else "nats")
    _plain_numbers(ax)
    ax.legend(fontsize="small", loc="lower right")
    return ax


def weights(
    log_weights: LogWeights | Tensor, *, cumulative: bool = False, element: int | None = None, ax: Axes | None = None
) -> Axes:
    """Normalised weights, largest first, or the share of the largest so many; a line for each independent element.

    Args:
        log_weights: ``elbo.log_weights(...)``, or a tensor ``(particles, *plates)`` in nats.
        cumulative: whether to draw the share of all weight that the largest have together.
        element: which element to draw, counted over all plates; by default all, the median and worst by ESS in colour.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        TypeError: where these are no log weights.
        ValueError: where one of them is NaN or +inf, or there is no such element.
    """
    found = require_log_weights(log_weights.log_weights if isinstance(log_weights, LogWeights) else log_weights)
    columns = found.detach().double().cpu().reshape(len(found), -1)
    if not bool((columns < math.inf).all()):  # NaN is not, either
        raise ValueError("expected log_weights below infinity, got NaN or +inf among them")
    if element is not None:
        element = as_count("element", element, least=0)
        if element >= columns.shape[1]:
            raise ValueError(f"expected element below {columns.shape[1]}, the number of elements, got {element}")
        columns = columns[:, element : element + 1]
    ax, sizes = _axes(ax), effective_sample_size(columns)
    shares = columns.softmax(0).nan_to_num(nan=0.0)  # of an element of which every particle is impossible
    ordered = shares.sort(0, descending=True).values
    shown = ordered.cumsum(0) if cumulative else ordered
    places = torch.arange(1, len(found) + 1)
    order = sizes.argsort()
    worst, median = int(order[0]), int(order[(len(order) - 1) // 2])
    for i in range(shown.shape[1]):
        if i not in (worst, median):
            ax.plot(places, shown[:, i], color="0.8", lw=0.6, zorder=1)
    told = {worst: (RED, "--", "least "), median: (BLUE, "-", "median ")}  # of one element, its own
    for i, (color, style, which) in told.items():
        which = "" if shown.shape[1] == 1 else which
        ax.plot(places, shown[:, i], color=color, ls=style, lw=1.6, label=f"{which}ESS {float(sizes[i]):.3g}", zorder=3)
    ax.set_xscale("log")
    if cumulative:
        ax.set_ylim(0.0, 1.02)
        ax.set_xlabel("particles, largest weights first")
        ax.set_ylabel("share of all weight")
    else:
        ax.axhline(1.0 / len(found), color=GREY, lw=1.0, ls=":", label="all alike, 1 / K")
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(float(shown[-1].min()), 1e-8 / len(found)), top=1.5)
        ax.set_xlabel("rank of the weight")
        ax.set_ylabel("normalised weight")
    ax.legend(fontsize="small")
    return ax


def khat(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Pareto's khat of each element, and the threshold above which its figures are not to be trusted.

    What is infinite is drawn as an arrow at the edge: inf where there is no tail to tell by, -inf where the weights
    are all alike.

    Args:
        evaluation: from :func:`~pyro_iwae.evaluate`.
        ax: where to draw.

    Returns:
        The axes.
    """
    _require(evaluation, Evaluation, "an Evaluation, which evaluate(...) returns")
    ax = _axes(ax)
    values = evaluation.khat.detach().double().cpu().flatten()
    limits = evaluation.khat_threshold.flatten()
    limit = float(limits.min())
    finite = values[values.isfinite()]
    low = min(0.0, float(finite.min())) if len(finite) else 0.0
    high = max(limit, float(finite.max())) if len(finite) else limit
    margin = 0.08 * (high - low) + 0.02
    bottom, top = low - 2 * margin, high + 2 * margin
    size = max(2.0, min(5.0, 300.0 / len(values)))
    good = values <= limits
    for kept, color, marker, name in ((good, BLUE, "o", "below"), (~good, RED, "x", "above")):
        finite_ones, places = values.isfinite() & kept, torch.arange(len(values))
        label = f"{int(kept.sum())} {name}"
        ax.plot(places[finite_ones], values[finite_ones], color=color, marker=marker, ms=size, ls="", label=label)
        for infinite, edge, arrow in ((math.inf, top - margin, "^"), (-math.inf, bottom + margin, "v")):
            some = (values == infinite) & kept
            if bool(some.any()):
                there = [edge] * int(some.sum())
                label = f"{int(some.sum())} of them {infinite}"
                ax.plot(places[some], there, color=color, marker=arrow, ms=size + 2, ls="", label=label)
    ax.axhline(limit, color=GREY, lw=1.0, ls="--", label=f"threshold {limit:.2f}")
    ax.set_ylim(bottom, top)
    ax.set_xlim(-0.5 - 0.01 * len(values), len(values) - 0.5 + 0.01 * len(values))
    _whole_ticks(ax)
    ax.set_xlabel("element" + (f" of plate {', '.join(evaluation.plates)}" if evaluation.plates else ""))
    ax.set_ylabel("Pareto's khat")
    ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return ax


def ess(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Histogram of the elements' effective sample sizes, and what is needed to trust them.

    Args:
        evaluation: from :func:`~pyro_iwae.evaluate`.
        ax: where to draw.

    Returns:
        The axes.
    """
    _require(evaluation, Evaluation, "an Evaluation, which evaluate(...) returns")
    ax = _axes(ax)
    values = evaluation.ess.detach().double().cpu().flatten().clamp(min=1.0)
    drawn = float((evaluation.replicates * evaluation.num_particles).max())
    edges = torch.logspace(0.0, math.log10(max(drawn, 10.0)) + 1e-6, 41).tolist()
    ax.hist(values.tolist(), bins=edges, color=BLUE, edgecolor="white", lw=0.4)
    below = int((values < LEAST_ESS).sum())
    label = f"needed: {LEAST_ESS:g} ({below} of {len(values)} have less)"
    ax.axvline(LEAST_ESS, color=RED, ls="--", lw=1.2, label=label)
    ax.axvline(drawn, color=GREY, ls=":", lw=1.2, label=f"particles: {drawn:,.0f}")
    ax.set_xscale("log")
    _whole_ticks(ax, "y")
    ax.set_xlabel("effective sample size")
    ax.set_ylabel("elements")
    ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


def density_1d(grid: Tensor, log_densities: Mapping[str, Tensor], *, xlabel: str = "z", ax: Axes | None = None) -> Axes:
    """Densities over a line: the guide, the posterior that the bound implies, the target.

    Args:
        grid: where, shape ``(points,)``.
        log_densities: log densities there, in nats, by name; ``posterior.log_density({"z": grid}, ...)`` is q_EW's.
        xlabel: what the line is.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: where shapes do not match.

    Example::

        >>> from pyro_iwae import ImportanceResampledGuide
        >>> from pyro_iwae.exact import Gamma
        >>> import pyro.distributions as dist, matplotlib.pyplot as plt
        >>> gamma, grid = Gamma(shape=1.0), torch.linspace(0.1, 6.0, 60)
        >>> posterior = ImportanceResampledGuide(gamma.model, gamma.guide, num_particles=5)
        >>> ax = density_1d(grid, {
        ...     "q": dist.Gamma(1.0, 1.0).log_prob(grid),
        ...     "q_EW, K = 5": posterior.log_density({"z": grid}, num_batches=100),
        ...     "target": dist.Gamma(2.0, 1.0).log_prob(grid),
        ... })
        >>> plt.close(ax.figure)
    """
    _require(grid, Tensor, "a grid as a tensor (points,)")
    _require_tensors("log_densities", log_densities)
    ax = _axes(ax)
    for i, (name, values) in enumerate(log_densities.items()):
        if values.shape != grid.shape:
            raise ValueError(
                f"expected log densities of '{name}' at each point of the grid, shape {tuple(grid.shape)}, got "
                f"{tuple(values.shape)}"
            )
        color, style = PALETTE[i % len(PALETTE)], STYLES[i % len(STYLES)]
        ax.plot(_array(grid), _array(values.exp()), color=color, ls=style, label=name)
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("density")
    ax.legend(fontsize="small")
    return ax


def density_2d(
    x: Tensor,
    y: Tensor,
    log_density: Tensor,
    *,
    outline: Tensor | None = None,
    title: str = "",
    labels: tuple[str, str] = ("z[0]", "z[1]"),
    ax: Axes | None = None,
) -> Axes:
    """A density over a plane, filled; another one's contours over it, to compare.

    Args:
        x: places along the first axis, shape ``(columns,)``.
        y: along the second, shape ``(rows,)``.
        log_density: in nats, shape ``(rows, columns)``.
        outline: another log density there, as lines that hold half, 90 % and 99 % of it inside.
        title: above the axes.
        labels: of both axes.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: where shapes do not match.
    """
    planes = {"log_density": log_density} if outline is None else {"log_density": log_density, "outline": outline}
    _require_tensors("x, y and log densities", {"x": x, "y": y, **planes})
    for name, values in planes.items():
        if values.shape != (len(y), len(x)):
            raise ValueError(
                f"expected {name} in shape (rows, columns) = ({len(y)}, {len(x)}), got {tuple(values.shape)}"
            )
        if not -math.inf < float(values.max()) < math.inf:  # NaN is not, either
            raise ValueError(f"expected {name} with a finite number at its largest, got {float(values.max())}")
    ax = _axes(ax, figsize=(4.6, 3.8))
    density = log_density.detach().double().cpu().exp()
    top = float(density.max())
    filled = ax.contourf(
        _array(x), _array(y), _array(density), levels=[top * i / 12 for i in range(13)], cmap="cividis"
    )
    ax.figure.colorbar(filled, ax=ax, label="density", format="%.2g")
    if outline is not None:
        other = outline.detach().double().cpu().exp()
        levels = sorted({_level(other, share) for share in (0.5, 0.9, 0.99)})
        ax.contour(_array(x), _array(y), _array(other), levels=levels, colors="white", linewidths=1.0)
    ax.set_aspect("equal")
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.set_title(title)
    return ax


def reconstructions(rows: Mapping[str, Tensor], *, ax: Axes | None = None, **options: Any) -> Axes:
    """Images in rows, one row for each name: data, and what was made of draws from q and from q_EW.

    Args:
        rows: by name, images of one size in shape ``(images, height, width)``, as many in each row.
        ax: where to draw.
        options: passed to ``ax.imshow``, as ``vmin``, ``vmax`` and ``cmap``.

    Returns:
        The axes.

    Raises:
        ValueError: where rows differ in shape.
    """
    _require_tensors("rows", rows)
    shapes = {tuple(v.shape) for v in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            "expected each row as a tensor (images, height, width), all of one shape, got "
            f"{ {n: tuple(v.shape) for n, v in rows.items()} }"
        )
    count, height, width = next(iter(shapes))
    images = torch.stack([v.detach().double().cpu() for v in rows.values()])
    gap = max(1, round(0.08 * max(height, width)))
    padded = torch.nn.functional.pad(images, (0, gap, 0, gap), value=math.nan)
    sheet = padded.permute(0, 2, 1, 3).reshape(len(rows) * (height + gap), count * (width + gap))[:-gap, :-gap]
    if ax is None:
        inch = 6.0 / count
        ax = _axes(None, figsize=(7.2, 0.2 + inch * len(rows) * (height + gap) / (width + gap)))
    ax.imshow(sheet.numpy(), **{"cmap": "gray_r", "interpolation": "nearest", **options})
    ax.set_yticks([i * (height + gap) + height / 2 - 0.5 for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def tradeoff(found: Tradeoff, *, ax: Axes | None = None) -> Axes:
    """:meth:`pyro_iwae.Tradeoff.plot`."""
    _require(found, Tradeoff, "what tradeoff(...) returns")
    return found.plot(ax=ax)


def snr(found: GradientSNR | Mapping[int, GradientSNR] | Tradeoff, *, ax: Axes | None = None) -> Axes:
    """Signal-to-noise ratios of gradients: by parameter, or of guide and model against K.

    Args:
        found: what :func:`~pyro_iwae.gradient_snr` returns; or these by K; or what :func:`~pyro_iwae.tradeoff` returns.
        ax: where to draw.

    Returns:
        The axes.
    """
    if isinstance(found, GradientSNR):
        return found.plot(ax=ax)
    if isinstance(found, Tradeoff):
        ratios = {"guide": {k: (c.snr, c.snr_error) for k, c in found.costs.items()}}
    elif isinstance(found, Mapping) and found and all(isinstance(v, GradientSNR) for v in found.values()):
        ratios = {
            "guide": {k: (v.guide, v.guide_error) for k, v in found.items()},
            "model": {k: (v.model, v.model_error) for k, v in found.items()},
        }
    else:
        raise TypeError(f"expected a GradientSNR, a dict of them by K, or a Tradeoff, got {type(found).__name__}")
    ax, ks = _axes(ax), sorted(next(iter(ratios.values())))
    for (role, by_k), color, marker in zip(ratios.items(), PALETTE, "os", strict=False):
        if all(math.isnan(by_k[k][0]) for k in ks):
            continue  # it has no parameters
        values, errors = zip(*(by_k[k] for k in ks), strict=True)
        ax.errorbar(ks, values, errors, color=color, marker=marker, ms=4, capsize=2, label=role)
    _log_ticks(ax, ks)
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.3)  # ratios differ by orders of magnitude, and can be 0
    ax.set_ylim(bottom=0.0)
    ax.grid(axis="y", alpha=0.3)
    ax.set_xlabel("particles K")
    ax.set_ylabel("signal-to-noise ratio of the gradient")
    ax.legend(fontsize="small")
    return ax


# Inside


def _require(value: Any, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"expected {wanted}, got {type(value).__name__}")


def _require_tensors(name: str, values: Any) -> None:
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        got = {n: type(v).__name__ for n, v in values.items()} if isinstance(values, Mapping) else type(values).__name__
        raise TypeError(f"expected {name} as tensors by name, got {got}")


def _axes(ax: Axes | None, figsize: tuple[float, float] = (6.0, 3.8)) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def _array(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


def _level(density: Tensor, share: float) -> float:
    """The height above which so much of the density lies."""
    ordered = density.flatten().sort(descending=True).values
    inside = ordered.cumsum(0) < share * ordered.sum()
    return float(ordered[min(int(inside.sum()), len(ordered) - 1)])


def _log_ticks(ax: Axes, ks: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    shown = ks if len(ks) <= 10 else [k for k in ks if str(k).strip("0") == "1" or k == ks[-1]]
    ax.set_xticks(shown, [f"{k:,}" for k in shown])
    ax.xaxis.set_minor_locator(NullLocator())


def _whole_ticks(ax: Axes, axis: str = "x") -> None:
    from matplotlib.ticker import MaxNLocator

    (ax.xaxis if axis == "x" else ax.yaxis).set_major_locator(MaxNLocator(integer=True))


def _plain_numbers(ax: Axes) -> None:
    from matplotlib.ticker import ScalarFormatter

    ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
