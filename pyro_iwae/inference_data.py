# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the resampled posterior, their weights and the log likelihood of each point, for ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.unit import Unit
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_iwae.densities import log_prob_of
from pyro_iwae.guide import ImportanceResampledGuide
from pyro_iwae.handlers import EnclosingPlates
from pyro_iwae.options import as_count
from pyro_iwae.particles import Call, Run, spread_value, stacked_value, unchanged_enumeration
from pyro_iwae.plates import PARTICLES, Site, plate_scale, sample_sites
from pyro_iwae.selection import model_values
from pyro_iwae.threads import in_one_thread

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["to_inference_data"]

PER_PASS = 500  # draws that the model is run on at once


@in_one_thread
def to_inference_data(
    posterior: ImportanceResampledGuide,
    *args: Any,
    num_draws: int = 1000,
    num_chains: int = 4,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from q_EW, and what ArviZ needs beside them, as ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

    Draws are independent. They are called chains so that ``az.summary`` can show what it shows; r_hat is 1 but for
    noise, and says nothing of whether K is enough: :func:`~pyro_iwae.evaluate` does.

    - ``posterior``: the model's latents, enumerated ones included.
    - ``sample_stats``: ``lp``, log p(x, z) of the draw, and ``log_weight``, log p(x, z) - log q(z | x), for each
      independent element (an estimate where a plate has particles of its own). Left out with a warning where the
      guide's density at given latents is not known.
    - ``log_likelihood``: of each point at each observed site, given the draw, for ``az.loo``. Unscaled; of a masked
      point 0.
    - ``observed_data``: what was observed.

    Dimensions are named after their plates.

    Args:
        posterior: the resampled guide.
        args: passed to model and guide.
        num_draws: how many in all.
        num_chains: into how many chains they are dealt out.
        coords: of dimensions, by name; plates count from 0 otherwise.
        dims: names of a site's dimensions, where they are not to be those of its plates.
        kwargs: passed to model and guide.

    Returns:
        What ``az.summary``, ``az.loo`` and ArviZ's plots take.

    Raises:
        ImportError: where ArviZ is missing.
        TypeError: where ``posterior`` is no resampled guide.
        ValueError: where ``num_draws`` is no multiple of ``num_chains``, a plate is subsampled, or latents differ from
            draw to draw.

    Example::

        >>> import arviz as az, pyro, pyro.distributions as dist
        >>> from pyro_iwae import ImportanceResampledGuide
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mu", dist.Normal(x.mean(), 0.5))
        >>> x = torch.tensor([0.5, 1.0, 1.5])
        >>> found = to_inference_data(ImportanceResampledGuide(model, guide, num_particles=20), x)
        >>> dict(found.log_likelihood.sizes)
        {'chain': 4, 'draw': 250, 'rows': 3}
    """
    arviz = _arviz()
    if not isinstance(posterior, ImportanceResampledGuide):
        raise TypeError(
            "expected the posterior as ImportanceResampledGuide(model, guide, num_particles=64), got "
            f"{type(posterior).__name__}"
        )
    num_draws, num_chains = as_count("num_draws", num_draws), as_count("num_chains", num_chains)
    if num_draws % num_chains:
        raise ValueError(
            f"expected num_draws to be a multiple of num_chains={num_chains}, got {num_draws}; write "
            f"num_draws={max(num_chains, num_draws - num_draws % num_chains)}"
        )
    for option, value in (("coords", coords), ("dims", dims)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"expected {option} to be a dict by name, got {value!r}")
    found = _Found(posterior, args, kwargs, num_draws)
    groups = {
        "posterior": found.draws,
        "sample_stats": found.stats,
        "log_likelihood": found.log_likelihood,
    }
    chained = {name: {n: _chained(v, num_chains) for n, v in group.items()} for name, group in groups.items() if group}
    if found.observed:
        chained["observed_data"] = {n: _numpy(v) for n, v in found.observed.items()}
    widths = {n: v.ndim - 2 for name in groups for n, v in chained.get(name, {}).items()}
    _require_dims(dims or {}, {**widths, **{n: v.dim() for n, v in found.observed.items()}})
    places = {p: list(range(size)) for p, size in found.plates.items()}
    named: dict[str, list[str | None]] = {**found.dims, **{n: list(names) for n, names in (dims or {}).items()}}
    return _assembled(arviz, chained, {**places, **(coords or {})}, named, posterior)


class _Found:
    """What is known of draws, by site, draws in front."""

    def __init__(
        self, posterior: ImportanceResampledGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_draws: int
    ) -> None:
        self.plates: dict[str, int] = {}
        self.dims: dict[str, list[str | None]] = {}
        self.observed: dict[str, Tensor] = {}
        call = posterior._call(args, kwargs)
        with posterior._apart():
            one = posterior._weigh(call, 1)
            for _, site in sample_sites(one.pairs[0].model):
                _require_whole(site)
            _, self.sites = model_values(call, one)
            self.run = one.structure.run
        if not self.sites:
            raise ValueError("to_inference_data needs latents to draw, got a model without any")
        self.draws = posterior.sample(num_draws, *args, **kwargs)
        with posterior._apart():
            self.log_likelihood = self._pointwise(call)
        self.stats = self._weighed(posterior, call)
        for name, value in self.draws.items():
            self._name(name, self.sites[name], value.dim() - 1)

    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        count = len(next(iter(self.draws.values())))
        for start in range(0, count, PER_PASS):
            yield {n: v[start : start + PER_PASS] for n, v in self.draws.items()}

    def _pointwise(self, call: Call) -> dict[str, Tensor]:
        """Log density of each point that was observed, given the draws."""
        blocks: dict[str, list[Tensor]] = {}
        for draws in self._blocks():
            count = len(next(iter(draws.values())))
            dim, traces = _at(call, draws, self.sites, self.run)
            for name, site in sample_sites(traces[0]):
                if name in draws or not site["is_observed"] or isinstance(_innermost(site["fn"]), Unit):
                    continue  # a pyro.factor is no datum
                same = [_density_site(t.nodes[name]) for t in traces]
                value = stacked_value(same, particle_dim=dim, num_particles=count)
                blocks.setdefault(name, []).append(value)
                if name not in self.observed:
                    observed = torch.as_tensor(site["value"])
                    events = observed.shape[observed.dim() - site["fn"].event_dim :]
                    self.observed[name] = observed.expand((*value.shape[1:], *events))  # one number for all of a plate
                    self._name(name, site, value.dim() - 1)
        return {name: torch.cat(values) for name, values in blocks.items()}

    def _weighed(self, posterior: ImportanceResampledGuide, call: Call) -> dict[str, Tensor]:
        """log p(x, z) and log weight of each draw."""
        log_p, log_weights = [], []
        try:
            with posterior._apart():
                for draws in self._blocks():
                    at, joint, weigh = posterior._at(call, draws)
                    constant = sum(float(c.sum()) for c in at.weights.constant.values())
                    log_p.append(joint.reshape(len(joint), -1).sum(1) + constant)
                    log_weights.append(weigh())
        except NotImplementedError as error:
            warnings.warn(f"lp and log_weight are left out: {error}", UserWarning, stacklevel=4)
            return {}
        self.dims["log_weight"] = list(at.weights.plates)
        self.plates |= dict(zip(at.weights.plates, log_weights[0].shape[1:], strict=True))
        return {"lp": torch.cat(log_p), "log_weight": torch.cat(log_weights)}

    def _name(self, name: str, site: Site, width: int) -> None:
        """Names the dimensions of a site after its plates."""
        events = site["fn"].event_dim
        batch = width - events if name in self.draws else width
        by_dim = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized and not f.name.startswith(PARTICLES)}
        found = [by_dim.get(d) for d in range(-batch, 0)]
        self.dims[name] = [None if f is None else f.name for f in found]
        self.plates |= {f.name: f.size for f in found if f is not None}


def _at(call: Call, draws: Mapping[str, Tensor], sites: Mapping[str, Site], run: Run) -> tuple[int | None, list[Trace]]:
    """The model at given draws, enumerated latents included: one run of all, or one for each."""
    count = len(next(iter(draws.values())))
    if not run.vectorized:
        rows = [{n: v[k] for n, v in draws.items()} for k in range(count)]
        traces = [
            poutine.trace(poutine.condition(call.model, row)).get_trace(*call.args, **call.kwargs) for row in rows
        ]
        return None, traces
    dim = -run.depth - 1
    spread = {n: spread_value(v, sites[n], run) for n, v in draws.items()}
    around = EnclosingPlates([CondIndepStackFrame(f"{PARTICLES}{-dim}", dim, count, 0)])
    with unchanged_enumeration():
        model = poutine.condition(around(call.model), spread)
        return dim, [poutine.trace(model).get_trace(*call.args, **call.kwargs)]


def _density_site(site: Site) -> dict[str, Any]:
    """Its log density, as if it were a value of the site."""
    value, mask = log_prob_of(site), site["mask"]
    if mask is not None:
        value = torch.where(torch.as_tensor(mask, device=value.device), value, 0.0)
    return {"value": value, "fn": SimpleNamespace(event_dim=0), "cond_indep_stack": site["cond_indep_stack"]}


def _innermost(fn: Any) -> Any:
    while isinstance(getattr(fn, "base_dist", None), TorchDistributionMixin):
        fn = fn.base_dist
    return fn


def _require_whole(site: Site) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and plate_scale(frame) != 1.0:
            raise ValueError(
                f"to_inference_data got plate '{frame.name}' subsampled (site '{site['name']}'): draws and log "
                "likelihood would be of a part of the data. Pass all data"
            )


def _chained(value: Tensor, num_chains: int) -> Any:
    return _numpy(value.reshape(num_chains, -1, *value.shape[1:]))


def _numpy(value: Tensor) -> Any:
    value = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy does not have
    return value.detach().cpu().numpy()


def _require_dims(dims: Mapping[str, Sequence[str]], widths: Mapping[str, int]) -> None:
    """Raises where dimensions are named that are not there."""
    for name, names in dims.items():
        if name not in widths:
            raise ValueError(f"expected dims of what was drawn or observed, {sorted(widths)}, got '{name}'")
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or len(names) > widths[name] or not all(isinstance(n, str | None) for n in names):
            raise ValueError(f"expected at most {widths[name]} names in a list for dims['{name}'], got {names!r}")


def _arviz() -> ModuleType:
    try:
        with warnings.catch_warnings():  # 0.23 announces its own successor
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError("to_inference_data needs ArviZ; pip install pyro-iwae[arviz]") from error
    return arviz


def _assembled(
    arviz: Any,
    groups: Mapping[str, Mapping[str, Any]],
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str | None]],
    posterior: ImportanceResampledGuide,
) -> Any:
    attrs = {"inference_library": "pyro_iwae", "num_particles": posterior.num_particles}
    options = {"coords": dict(coords), "dims": {n: list(names) for n, names in dims.items()}}
    if arviz.__version__.startswith("0."):
        return arviz.from_dict(**groups, **options, attrs=attrs)
    return arviz.from_dict(dict(groups), **options, attrs={"/": attrs})
