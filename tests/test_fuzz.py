# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Random models, guides and options: value, gradient, draws and evaluation equal naive sums over particles.

500 cases in ``make test``, 20,000 in ``make nightly``. (Plates whose particles are their own: ``test_plate_tree``.)
"""

import functools
import math
import operator
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import pyro
import pytest
import torch
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule

from pyro_iwae import (
    MIWAE,
    OVIS,
    PIWAE,
    VIMCO,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    Pathwise,
    StickTheLanding,
    evaluate,
)
from tests.naive import Doubtful, Refused, labels, particles_of, reference
from tests.programs import programs
from tests.statistics import NIGHTLY
from tests.test_objectives import FORMULAS, log_mean

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
VECTORIZE = st.sampled_from([None, True, False])
PRECISION = st.sampled_from([torch.float64, torch.float64, torch.float32])


def cases(count):
    """So many in ``make test``, forty times as many in ``make nightly``."""
    return settings(max_examples=40 * count if NIGHTLY else count)


@contextmanager
def fresh(program, dtype):
    """A case of its own, in this precision."""
    note(program)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "particles are run one after the other")
            warnings.filterwarnings("ignore", "Found plate statements in guide but not model")  # of another name
            yield
    finally:
        torch.set_default_dtype(before)


# Ways of handing over one and the same program


class Module(PyroModule):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        assert args == ("rows",) and kwargs == {"option": None}
        return self.fn()


def taking(fn, *args, **kwargs):
    return fn()


DISGUISES = {
    "plain": lambda fn: lambda *args, **kwargs: fn(),
    "partial": lambda fn: functools.partial(taking, fn),
    "module": Module,
    "scale": lambda fn: poutine.scale(DISGUISES["plain"](fn), scale=1.0),
    "infer config": lambda fn: poutine.infer_config(DISGUISES["plain"](fn), lambda site: {}),
    "block": lambda fn: poutine.block(DISGUISES["plain"](fn), hide=["nothing of this name"]),
    "mask": lambda fn: poutine.mask(DISGUISES["plain"](fn), mask=True),
}
AROUND = {
    "nothing": nullcontext,
    "block": poutine.block,
    "unvalidated": functools.partial(pyro.validation_enabled, False),
    "anomalies": torch.autograd.detect_anomaly,
}


@contextmanager
def around(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with AROUND[name]():
            yield


# Value and gradient

SCORE = {"mean": VIMCO(), "balanced": OVIS()}
PATH = {"pathwise": Pathwise(), "sticking": StickTheLanding(), "double": DoublyReparameterized()}


OBJECTIVES = {
    "bound": (lambda k: None, log_mean),
    "groups": (MIWAE, lambda x: x.mean(0)),
    "partial": (PIWAE, log_mean),
    **{
        name: (lambda k, name=name: FORMULAS[name][0], FORMULAS[name][1])
        for name in ("Renyi(0.5)", "CIWAE(0.3)", "TVO(0, .2, .6)")
    },
}


def gradients(loss):
    """By unconstrained parameter."""
    params = dict(sorted(pyro.get_param_store().named_parameters()))
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


def close(a, b):
    tolerance = TOLERANCE[torch.get_default_dtype()]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@given(
    programs(smallest=1),
    st.sampled_from([2, 3, 5]),
    VECTORIZE,
    st.sampled_from(list(PATH)),
    st.sampled_from(list(SCORE)),
    st.sampled_from(["bound", "bound", *OBJECTIVES]),
    st.sampled_from(list(DISGUISES)),
    st.sampled_from(list(AROUND)),
    PRECISION,
)
@cases(250)
def test_value_and_gradient(program, num_particles, vectorize, path, score, objective, disguise, outside, dtype):
    made, formula = OBJECTIVES[objective]
    pair = [DISGUISES[disguise](fn) for fn in (program.model, program.guide)]
    elbo = ImportanceWeightedELBO(
        num_particles=num_particles,
        vectorize_particles=vectorize,
        gradient=PATH[path],
        score=SCORE[score],
        objective=made(num_particles),
    )

    def ask(method):
        with around(outside):
            return method(*pair, "rows", option=None)

    with fresh(program, dtype):
        if program.is_biased_for_particles:
            event("refused: subsampled plate that is not independent")
            with pytest.raises(ValueError, match=r"subsample|shows 2 of its 3 elements"):
                ask(elbo.loss)
            return
        event(f"independent plates: {len(program.independent)} of {len(program.plates)}")
        ask(elbo.loss)
        runs = num_particles if vectorize is False else 1  # the last ones; coins may need a second look before
        refusal = loss = None
        try:
            pyro.set_rng_seed(program.seed + 1)
            loss = ask(elbo.differentiable_loss)
        except ValueError as error:
            assert path == "double" and "DoublyReparameterized needs" in str(error)
            refusal = error
        pyro.set_rng_seed(program.seed + 1)  # the same particles again, on a tape that no estimator has touched
        weights = ask(elbo.log_weights)
        try:
            expected = reference(program, program.tape[-runs:], num_particles, path, score)
        except Doubtful as reason:
            event(f"either way: {reason}")
            return
        except Refused as reason:
            event(f"refused: {reason}")
            # a bound in groups of one particle each, as the guide's of "partial", has no weight to square, and
            # where one particle has all of the weight the square is the weight
            even = weights.weights * (1.0 - weights.weights)
            alone = "masked" in str(reason) and float(even.max()) < 1e4 * torch.finfo(dtype).eps
            assert refusal is not None or alone or objective in ("groups", "partial")
            return
        assert refusal is None, refusal
        event(f"{path}, {score}, {objective}")
        assert list(weights.plates) == expected.plates
        close(weights.bound().detach(), expected.bound)
        value = expected.scale * formula(expected.log_w).sum() + expected.constant
        close(loss.detach(), -value.detach())
        if objective == "bound":
            wanted = expected.surrogate
        elif path == "pathwise" and objective != "partial" and not expected.has_score:
            wanted = -value
        else:
            return
        wanted = gradients(wanted)
        for name, gradient in gradients(loss).items():
            close(gradient, wanted[name])


@given(programs(matched=True))
@cases(100)
def test_one_particle_equals_pyro(program):
    enumerates = any(s.family == "mixture" for s in program.observations)

    def second_step(elbo):
        pyro.set_rng_seed(program.seed + 1)
        elbo.loss(program.model, program.guide)
        pyro.set_rng_seed(program.seed + 2)
        loss = elbo.differentiable_loss(program.model, program.guide)
        return loss, gradients(loss)

    with fresh(program, torch.float64):
        try:
            pyros, pyro_gradients = second_step(TraceEnum_ELBO() if enumerates else Trace_ELBO())
        except AttributeError as error:
            # Pyro's Dice, where non-reparameterised sites meet enumerated ones in some plates
            assert enumerates and "_pyro_backward" in str(error)
            with pytest.raises(AttributeError, match="_pyro_backward"):
                second_step(ImportanceWeightedELBO(num_particles=1))
            return
        ours, our_gradients = second_step(ImportanceWeightedELBO(num_particles=1))
        close(ours.detach(), pyros.detach())
        for name, gradient in our_gradients.items():
            close(gradient, pyro_gradients[name])


# Draws


def at(program, spec, values, place):
    """The latent's values at one independent element, by its labels."""
    sequential = [n for n in spec.plates if program.plate[n].dim is None]
    found = []
    for label in labels(program, spec):
        numbers = dict(zip(sequential, map(int, label.split("_")[1:]), strict=True))
        if any(place.get(n, i) != i for n, i in numbers.items()):
            continue
        value = values[label]
        for name in spec.plates:
            if name in place and program.plate[name].dim is not None:
                value = value.narrow(program.plate[name].dim - spec.event_dim, place[name], 1)
        found.append(value.flatten())
    return torch.cat(found)


@given(programs(smallest=1), st.sampled_from([2, 3, 5]), VECTORIZE, PRECISION)
@cases(100)
def test_draws(program, num_particles, vectorize, dtype):
    """Each element of a draw is that of one particle; its loss is the bound, its expectation a weighted sum."""
    posterior = ImportanceResampledGuide(
        program.model, program.guide, num_particles=num_particles, vectorize_particles=vectorize
    )
    runs = num_particles if vectorize is False else 1
    with fresh(program, dtype):
        if program.is_biased_for_particles:
            with pytest.raises(ValueError, match=r"subsample|shows 2 of its 3 elements"):
                posterior()
            return
        posterior()
        with poutine.trace() as tracer:
            posterior()
        found = reference(program, program.tape[-runs:], num_particles)
        particles, _ = particles_of(program, program.tape[-runs:], num_particles)
        drawn = {name: site["value"] for name, site in tracer.trace.nodes.items()}
        for column, place in enumerate(found.elements):
            fits = torch.tensor(True).repeat(num_particles)
            for spec in program.latents:
                for k, values in enumerate(particles):
                    fits[k] &= torch.equal(at(program, spec, drawn, place), at(program, spec, values, place))
            assert bool((fits & (found.log_w[:, column] > -math.inf)).any())
        loss = Trace_ELBO(max_plate_nesting=3).loss(program.model, posterior)
        again = reference(program, program.tape[-runs:], num_particles)
        close(torch.tensor(loss), again.loss)
        for spec in program.latents[:1]:
            name = labels(program, spec)[-1]
            mean = posterior.expectation(operator.itemgetter(name), num_batches=1)
            found = reference(program, program.tape[-runs:], num_particles)
            particles, _ = particles_of(program, program.tape[-runs:], num_particles)
            shares = found.log_w.detach().softmax(0)
            here = replace(spec, plates=tuple(n for n in spec.plates if program.plate[n].dim is not None))
            numbers = dict(zip([n for n in spec.plates if n not in here.plates], name.split("_")[1:], strict=True))
            for column, place in enumerate(found.elements):
                if any(int(numbers.get(n, i)) != i for n, i in place.items()):
                    continue  # of another label
                values = [at(program, here, {here.name: values[name]}, place).to(shares) for values in particles]
                by_hand = sum(share * value for share, value in zip(shares[:, column], values, strict=True))
                close(at(program, here, {here.name: mean}, place), by_hand)


# Evaluation


@given(programs(smallest=1), st.sampled_from([2, 4]), st.sampled_from([2, 3]), VECTORIZE, PRECISION)
@cases(50)
def test_evaluation(program, num_particles, num_replicates, vectorize, dtype):
    """Bounds, evidence and ESS of each element are those of its log weights, by hand."""
    runs = num_particles if vectorize is False else 1

    def ask():
        return evaluate(
            program.model,
            program.guide,
            num_particles=num_particles,
            num_replicates=num_replicates,
            vectorize_particles=vectorize,
            progress=False,
        )

    with fresh(program, dtype), patch("pyro_iwae.batches.draw_level", lambda: 0):  # the multilevel estimate draws none
        if program.is_biased_for_particles:
            with pytest.raises((ValueError, NotImplementedError), match=r"subsample|shows 2 of its 3|tempered"):
                ask()
            return
        refusal = None
        try:
            result = ask()
        except (ValueError, NotImplementedError) as error:
            refusal = error
        if refusal is not None:  # on its first look
            found = [reference(program, program.tape[-1:], 1)]
        else:
            first = len(program.tape) - runs * num_replicates
            tapes = [program.tape[first + runs * r :][:runs] for r in range(num_replicates)]
            found = [reference(program, tape, num_particles) for tape in tapes]
        if len(found[0].own_scales) > 1:
            assert isinstance(refusal, ValueError) and "tempered by a poutine.scale" in str(refusal)
            return
        if found[0].shown_constants:
            assert isinstance(refusal, NotImplementedError) and "where a plate is subsampled" in str(refusal)
            return
        assert refusal is None, refusal
        log_w = torch.stack([f.log_w.detach().double() for f in found])  # (replicates, particles, elements)
        plates, shape = found[0].plates, found[0].bound.shape
        assert list(result.plates) == plates
        close(result.elbo, log_w.mean((0, 1)).reshape(shape))
        close(result.bounds[num_particles], torch.stack([log_mean(x) for x in log_w]).mean(0).reshape(shape))
        whole = log_mean(log_w.flatten(0, 1))
        without = [log_mean(torch.cat([*log_w[:r], *log_w[r + 1 :]])) for r in range(num_replicates)]
        jackknife = num_replicates * whole - (num_replicates - 1) * torch.stack(without).mean(0)
        close(result.log_evidence, jackknife.reshape(shape))
        shares = log_w.flatten(0, 1).softmax(0)
        close(result.ess, (1.0 / shares.square().sum(0)).reshape(shape))
        constant = found[0].constant.detach() / found[0].own_scales.pop()
        close(torch.tensor(result.total.log_evidence), jackknife.sum() + constant)
