# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Signal-to-noise ratio of gradient estimates, by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from tqdm import tqdm

from pyro_iwae.densities import log_prob_of
from pyro_iwae.options import as_count, require_callables, require_gradients, require_switch
from pyro_iwae.plates import latent_sites, sample_sites
from pyro_iwae.state import unchanged_state
from pyro_iwae.threads import in_one_thread
from pyro_iwae.traces import run_given, run_pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GradientSNR", "ParameterSNR", "gradient_snr", "kept_gradients", "parameters_of"]

GROUPS = 10  # of replicates, for the standard errors


@dataclass(frozen=True)
class ParameterSNR:
    """The gradient of one parameter, as the optimiser sees it (unconstrained).

    Attributes:
        name: the parameter's name.
        role: model, guide, or shared, by what the parameter is used for.
        snr: length of the mean gradient over the root of its total variance, ``|E g| / sqrt(tr Var g)``.
        std_error: standard error of ``snr`` over groups of replicates.
        mean: mean gradient over the replicates, in the parameter's shape.
        std: standard deviation of each coordinate, likewise.
    """

    name: str
    role: str
    snr: float
    std_error: float
    mean: Tensor
    std: Tensor

    @property
    def coordinates(self) -> Tensor:
        """|mean| / std of each coordinate; below 1 / sqrt(replicates) it is the noise of the mean alone."""
        return self.mean.abs() / self.std


@dataclass(frozen=True)
class GradientSNR:
    """Signal-to-noise ratios of one gradient estimate, of all the guide's and the model's parameters and of each.

    ``print`` it for a report.

    Attributes:
        guide: of the gradient by all of the guide's parameters; NaN where it has none.
        model: likewise, by all of the model's.
        guide_error: standard error of ``guide``.
        model_error: standard error of ``model``.
        parameters: each parameter.
        num_replicates: how many gradients were taken.
    """

    guide: float
    model: float
    guide_error: float
    model_error: float
    parameters: tuple[ParameterSNR, ...]
    num_replicates: int

    def __str__(self) -> str:
        rows = [("guide", "", self.guide, self.guide_error), ("model", "", self.model, self.model_error)]
        rows += [(p.role, p.name, p.snr, p.std_error) for p in self.parameters]
        width = max(len(name) for _, name, _, _ in rows)
        lines = [f"{role:<6} {name:<{width}}  {snr:8.3f} ± {error:.3f}" for role, name, snr, error in rows]
        return "\n".join([f"signal-to-noise ratio of the gradient, {self.num_replicates} replicates", *lines])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars by parameter, with standard errors; the guide's and the model's in two colours.

        Args:
            ax: where to draw; None makes a figure.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(6.0, 1.0 + 0.3 * len(self.parameters)), layout="constrained")[1]
        colors = {"guide": "C0", "model": "C1", "shared": "C2"}
        for role, color in colors.items():
            rows = [(i, p) for i, p in enumerate(self.parameters) if p.role == role]
            if rows:
                places, found = [i for i, _ in rows], [p for _, p in rows]
                errors = [p.std_error for p in found]
                ax.barh(places, [p.snr for p in found], xerr=errors, color=color, label=role, error_kw={"lw": 1.0})
        ax.set_yticks(range(len(self.parameters)), [p.name for p in self.parameters])
        ax.invert_yaxis()
        ax.set_xscale("symlog", linthresh=0.1, linscale=0.3)  # ratios differ by orders of magnitude, and can be 0
        ax.set_xlim(left=0.0)
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel("signal-to-noise ratio of the gradient")
        ax.legend()
        return ax


@in_one_thread
def gradient_snr(
    elbo: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_replicates: int = 200,
    progress: bool = True,
    **kwargs: Any,
) -> GradientSNR:
    """Measures the signal-to-noise ratio of an ELBO's gradient estimate at the present parameters.

    For each parameter, and for all of the guide's and of the model's, ``|E g| / sqrt(tr Var g)`` over
    independent replicates, with the noise in the mean taken off. See "Tighter Variational Bounds Are Not
    Necessarily Better" (Rainforth et al. 2018, https://arxiv.org/abs/1802.04537).

    Parameters and their ``grad`` stay as they are; random generators move on.

    Args:
        elbo: any of Pyro's ELBOs, this package's or another.
        model: the model.
        guide: the guide.
        args: passed to both.
        num_replicates: how many gradients to take, at least 20; rounded up to a multiple of 10.
        progress: whether to show a bar.
        kwargs: passed to both.

    Returns:
        The ratios.

    Raises:
        RuntimeError: where gradients are turned off.
        TypeError: where an argument has the wrong type.
        ValueError: where there are no parameters, or too few replicates.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        >>> elbo = ImportanceWeightedELBO(num_particles=100, gradient=DoublyReparameterized())
        >>> gradient_snr(elbo, model, guide, progress=False).guide > 1.0
        True
    """
    if not isinstance(elbo, ELBO):
        raise TypeError(f"expected elbo to be an ELBO such as ImportanceWeightedELBO(64), got {elbo!r}")
    require_callables(model, guide)
    require_gradients("gradient_snr", "it outside of the block")
    require_switch("progress", progress)
    per_group = -(-as_count("num_replicates", num_replicates, least=2 * GROUPS) // GROUPS)
    roles, params = parameters_of(model, guide, args, kwargs)
    if not params:
        raise ValueError("expected a model or guide with parameters (pyro.param, pyro.module, PyroModule), got none")
    measured: Any = elbo
    groups, whole = [], _Moments(params)
    with kept_gradients(params), tqdm(total=GROUPS * per_group, disable=not progress, desc="gradients") as bar:
        for _ in range(GROUPS):
            group = _Moments(params)
            for _ in range(per_group):
                for p in params.values():
                    p.grad = None
                measured.loss_and_grads(model, guide, *args, **kwargs)
                group.add(params)
                bar.update()
            groups.append(group)
            whole.merge(group)
            bar.set_postfix(guide=f"{whole.snr(_names(roles, 'guide')):.3g}")
    return _report(whole, groups, roles)


@contextmanager
def kept_gradients(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the ``grad`` of parameters back."""
    before = {name: p.grad for name, p in params.items()}
    try:
        yield
    finally:
        for name, p in params.items():
            p.grad = before[name]


def parameters_of(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Role and unconstrained tensor of each parameter that model or guide asks for, by name.

    The role goes by use, not by who asks: programs often register one module with all networks in both.
    """
    with poutine.block(), unchanged_state(model, guide), torch.enable_grad():
        pair = run_pair(model, guide, args, kwargs, matched=False)
        drawn = dict(latent_sites(pair.guide))
        alone = run_given(model, {n: s["value"].detach() for n, s in drawn.items()}, args, kwargs)
        used = {
            "guide": [t for s in drawn.values() for t in (log_prob_of(s), s["value"])],
            "model": [log_prob_of(s) for _, s in sample_sites(alone)],
        }
    params: dict[str, Tensor] = {}
    asked: dict[str, str] = {}
    for role, trace in (("guide", pair.guide), ("model", pair.model)):
        for name in trace.param_nodes:
            site: Any = trace.nodes[name]
            value = site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
            if value.requires_grad:
                params[name], asked[name] = value, role
    reached = {role: _reached(outputs, params) for role, outputs in used.items()}
    roles = {}
    for name in params:
        found = [role for role in reached if name in reached[role]]
        roles[name] = asked[name] if not found else found[0] if len(found) == 1 else "shared"
    return roles, params


def _reached(outputs: Sequence[Tensor], params: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that any of the outputs depends on."""
    outputs = [o for o in outputs if o.requires_grad]
    if not outputs or not params:
        return set()
    total = torch.stack([o.sum() for o in outputs]).sum()
    slopes = torch.autograd.grad(total, list(params.values()), retain_graph=True, allow_unused=True)
    return {name for name, slope in zip(params, slopes, strict=True) if slope is not None}


class _Moments:
    """Means of gradients, and sums of squared deviations from them (Welford's way, which does not cancel)."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.count = 0
        self.mean = {n: torch.zeros_like(p.detach()) for n, p in params.items()}
        self.squares = {n: torch.zeros_like(p.detach()) for n, p in params.items()}

    def add(self, params: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, p in params.items():
            gradient = torch.zeros_like(self.mean[name]) if p.grad is None else p.grad
            before = gradient - self.mean[name]
            self.mean[name] += before / self.count
            self.squares[name] += before * (gradient - self.mean[name])

    def merge(self, other: _Moments) -> None:
        count = self.count + other.count
        for name, mean in other.mean.items():
            apart = mean - self.mean[name]
            self.mean[name] += apart * other.count / count
            self.squares[name] += other.squares[name] + apart**2 * self.count * other.count / count
        self.count = count

    def variance(self, name: str) -> Tensor:
        return self.squares[name] / (self.count - 1)

    def snr_squared(self, names: Sequence[str]) -> float:
        """|E g|^2 / tr Var g; the squared mean is freed of its own noise, and so may come out below 0."""
        noise = sum(self.variance(n).sum().item() for n in names)
        signal = sum(self.mean[n].square().sum().item() for n in names) - noise / self.count
        if noise == 0.0:
            return math.nan if signal == 0.0 else math.inf
        return signal / noise

    def snr(self, names: Sequence[str]) -> float:
        squared = self.snr_squared(names)
        return math.sqrt(max(squared, 0.0)) if not math.isnan(squared) else math.nan


def _names(roles: Mapping[str, str], role: str) -> list[str]:
    """The parameters of the model or guide; shared ones are of both."""
    return [name for name, found in roles.items() if found in (role, "shared")]


def _report(whole: _Moments, groups: Sequence[_Moments], roles: Mapping[str, str]) -> GradientSNR:
    def measured(names: Sequence[str]) -> tuple[float, float]:
        """The ratio, and its standard error: that of its square over groups, by the slope of the root."""
        ratio = whole.snr(names)
        squares = torch.tensor([g.snr_squared(names) for g in groups], dtype=torch.float64)
        error = squares.std().item() / math.sqrt(len(groups))
        return ratio, error / (2.0 * ratio) if ratio > math.sqrt(error) else math.sqrt(error)

    each = []
    for name in whole.mean:
        ratio, error = measured([name])
        each.append(ParameterSNR(name, roles[name], ratio, error, whole.mean[name], whole.variance(name).sqrt()))
    (guide, guide_error), (model, model_error) = (
        measured([n for n in _names(roles, role) if n in whole.mean]) for role in ("guide", "model")
    )
    each.sort(key=lambda p: p.role)
    return GradientSNR(guide, model, guide_error, model_error, tuple(each), whole.count)
