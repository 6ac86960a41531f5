# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a guide and of the model replayed on it, and the log density at each of their sites."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_iwae.cutting import CutSite, CutValues
from pyro_iwae.densities import infinity_message, log_prob_of, nan_message, score_parts_of
from pyro_iwae.graphless import graph_if
from pyro_iwae.plates import PARTICLES, Site, latent_sites, sample_sites

__all__ = ["Pair", "Recording", "fill_densities", "run_pair"]


@dataclass(frozen=True)
class Pair:
    """One run of the guide and of the model replayed on it; the values that were cut, if that was asked for.

    ``place`` tells the particle of each node of the plate tree, where particles are run one by one.
    """

    model: Trace
    guide: Trace
    cuts: Mapping[str, CutSite] = field(default_factory=dict)
    place: Mapping[int, int] = field(default_factory=dict)

    def sites(self) -> tuple[tuple[str, str, Site], ...]:
        """(role, name, site) for all sample sites of both."""
        return self._sites

    @cached_property  # a pair's traces neither gain nor lose sites, and a step goes through them ten times
    def _sites(self) -> tuple[tuple[str, str, Site], ...]:
        traces = (("model", self.model), ("guide", self.guide))
        return tuple((role, name, site) for role, trace in traces for name, site in sample_sites(trace))


@dataclass(frozen=True)
class Recording:
    """What of a run is recorded for back-propagation.

    Attributes:
        cut: whether the guide's reparameterised values are cut from the parameters that made them.
        leaves_out: whether the estimator leaves out what a parameter does to log q directly, which then must have the
            mean that it relies on.
        model: whether the model is run with a graph, if the guide is.
        block: at most so many particles in one vectorised run of the model; None is all of them.
    """

    cut: bool = False
    leaves_out: bool = False
    model: bool = True
    block: int | None = None


class SetValues(Messenger):
    """Gives sites their values and leaves all else as it is (``poutine.replay`` would copy ``infer`` along)."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class Unmasked(Messenger):
    """Takes the masks off some sites, and remembers them.

    A masked site that is summed out still sums to one, as in ``TraceEnum_ELBO``: so it is drawn from p(c | z, x)
    as if there were no mask.
    """

    def __init__(self, wanted: Callable[[Site], bool]) -> None:
        super().__init__()
        self.wanted = wanted
        self.masks: dict[str, Any] = {}

    def _process_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and self.wanted(msg):
            self.masks[msg["name"]] = msg["mask"]
            msg["mask"] = None


def run_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    around_guide: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    values: Mapping[str, Tensor] | None = None,
    enumerate_from: int | None = None,
    matched: bool = True,
    recording: Recording | None = None,
    replay: Callable[[Trace], Trace] | None = None,
) -> Pair:
    """Runs the guide, then the model replayed on it.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        around: wraps model and guide, as the plate of particles does.
        around_guide: wraps the guide, if that is another way.
        values: values that latents of the guide are given in place of a draw.
        enumerate_from: the first free dimension for enumerated model sites; None where there are none.
        matched: whether to raise where the latents of model and guide are not the same.
        recording: what to record for back-propagation; None is all, and no cut.
        replay: runs the model on a guide's trace; None runs it as a whole.
    """
    recording = Recording() if recording is None else recording
    given: Any = SetValues(values) if values else nullcontext()
    cutting = CutValues(recording.leaves_out, values or ()) if recording.cut else nullcontext(None)
    around_guide = around if around_guide is None else around_guide
    of_model = nullcontext if recording.model else partial(graph_if, False)
    messenger: Any = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):  # runs model and guide together
        _require_apart(messenger, enumerate_from, recording)
        with given, cutting as cuts:
            around_guide(guide)(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()
    else:
        with given, cutting as cuts:
            guide_trace = poutine.trace(around_guide(guide)).get_trace(*args, **kwargs)
        with of_model():
            if replay is None:
                replayed = poutine.replay(enumerating(around(model), enumerate_from), trace=guide_trace)
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
            else:
                model_trace = replay(guide_trace)
    pair = Pair(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), cuts.sites if cuts else {})
    if cuts is not None:
        cuts.fill(pair.guide)
    if matched:
        require_match(pair)
        for role, _, site in pair.sites():  # now, while a flow without an inverse still knows what it drew
            if role == "guide":
                score_parts_of(site)
            else:
                with of_model():
                    log_prob_of(site)
    if not recording.model:
        lighten(pair.model)
    return pair


def lighten(trace: Trace) -> None:
    """Lets go of what a trace without a graph need not keep once its densities are known: decoded images, say."""
    for name, node in trace.nodes.items():
        site: Site = node
        if site["type"] in ("args", "return"):
            site["value"] = None
        elif site["type"] == "sample" and "unscaled_log_prob" in site:
            site["value"], site["fn"] = None, stand_in(site["fn"].batch_shape, site["fn"].event_shape)
            site["args"], site["kwargs"] = (), {}
            trace.nodes[name] = site


def stand_in(batch_shape: Sequence[int], event_shape: Sequence[int]) -> Delta:
    """A distribution that has these shapes and no numbers."""
    return Delta(torch.zeros(()).expand((*batch_shape, *event_shape)), event_dim=len(event_shape))


def run_given(
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    enumerate_from: int | None = None,
) -> Trace:
    """Runs the model with latents that are given."""
    with SetValues(values):
        trace = poutine.trace(enumerating(model, enumerate_from)).get_trace(*args, **kwargs)
    return prune_subsample_sites(trace)


def enumerating(model: Callable[..., Any], enumerate_from: int | None) -> Callable[..., Any]:
    """The model with its enumerated sites laid out from a dimension on."""
    return model if enumerate_from is None else EnumMessenger(enumerate_from)(model)


def _require_apart(messenger: GuideMessenger, enumerate_from: int | None, recording: Recording) -> None:
    """Raises where model and guide would have to be run apart."""
    if enumerate_from is not None:
        raise NotImplementedError(
            f"expected a guide without enumerated model sites, got {type(messenger).__name__}, which runs model "
            "and guide together; hide those sites from it with poutine.block, or write the guide as a function"
        )
    if not recording.model:
        raise NotImplementedError(
            f"SampledBackward needs a model that can be run without its guide, got {type(messenger).__name__}, which "
            "runs both together; write gradient=DoublyReparameterized(), or the guide as a function"
        )


def require_match(pair: Pair) -> None:
    """Raises where the latents of model and guide are not the same."""
    drawn = dict(latent_sites(pair.guide))
    wanted = dict(latent_sites(pair.model))
    for name in drawn.keys() - wanted.keys():
        if drawn[name]["infer"].get("is_auxiliary"):
            continue
        state = "observed in" if name in pair.model.nodes else "absent from"
        raise ValueError(
            f"latent site '{name}' of the guide is {state} the model; remove it from the guide, or mark it "
            "infer={'is_auxiliary': True} if only the guide needs it"
        )
    for name in wanted.keys() - drawn.keys():
        infer = wanted[name]["infer"]
        if infer.get("enumerate") == "sequential":
            raise NotImplementedError(
                f"model site '{name}' asks for sequential enumeration, which exists in guides only; "
                "write infer={'enumerate': 'parallel'}, or sample it in the guide"
            )
        if infer.get("enumerate") != "parallel":
            raise ValueError(
                f"latent site '{name}' of the model is absent from the guide; sample it in the guide, observe it (was "
                "the model called without its data? Weights need them; to predict, draw with them first: Predictive("
                "model, posterior_samples=posterior.sample(1000, x, y))(x_new)), or, if it is discrete, mark it "
                "infer={'enumerate': 'parallel'} to have it summed out"
            )
    summed_out = [wanted[name]["infer"].get("_enumerate_dim") for name in wanted.keys() - drawn.keys()]
    if is_validation_enabled() and None not in summed_out:  # Pyro would miss sites that are not enumerated yet
        # Particles of a plate need not have the same shape in both: the guide may draw them once for all further out.
        frames = [f for _, _, s in pair.sites() for f in s["cond_indep_stack"] if f.vectorized]
        dims = [f.dim for f in frames if not f.name.startswith(PARTICLES)]
        check_model_guide_match(pair.model, pair.guide, -min(dims, default=0))


def fill_densities(pair: Pair) -> None:
    """Computes what ``Trace_ELBO`` reads off its traces, and raises where a density is NaN."""
    for role, name, site in pair.sites():
        if role == "guide":
            parts = score_parts_of(site)
            site["score_parts"] = parts.scale_and_mask(site["scale"], site["mask"])
            site["log_prob"] = site["score_parts"].log_prob
        else:
            site["log_prob"] = scale_and_mask(log_prob_of(site), site["scale"], site["mask"])
        total = site["log_prob_sum"] = site["log_prob"].sum()
        if bool(total.isnan()):
            raise ValueError(nan_message(role, name))
        if bool(total == (math.inf if role == "model" else -math.inf)):
            raise ValueError(infinity_message(role, name))
        if bool(total == -math.inf):
            warnings.warn(
                f"the particle is impossible (log weight -inf), through site '{name}'; the loss is infinite. Let the "
                "guide reach values that the model allows",
                stacklevel=2,
            )


def require_site_shapes(pair: Pair, max_plate_nesting: Any) -> None:
    """Raises where a log density has a dimension that no plate accounts for, as Pyro's own ELBOs do."""
    if is_validation_enabled():
        for role, _, site in pair.sites():
            log_prob = log_prob_of(site) if role == "model" else score_parts_of(site).log_prob
            check_site_shape({**site, "log_prob": _for_all_particles(log_prob, site)}, max_plate_nesting)


def _for_all_particles(log_prob: Tensor, site: Site) -> Tensor:
    """The log density with all dimensions of particles, also where it is the same for all."""
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.name.startswith(PARTICLES)}
    if all(log_prob.dim() >= -dim and log_prob.shape[dim] == size for dim, size in sizes.items()):
        return log_prob
    width = max([log_prob.dim(), *(-dim for dim in sizes)])
    log_prob = log_prob.reshape((1,) * (width - log_prob.dim()) + log_prob.shape)
    return log_prob.expand([sizes.get(d, n) if n == 1 else n for d, n in enumerate(log_prob.shape, -width)])
