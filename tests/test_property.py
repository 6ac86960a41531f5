# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Random models and guides: value and gradient equal a naive sum, site by site, over particles run one by one."""

import pyro
import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_iwae import OVIS, VIMCO, DoublyReparameterized, ImportanceWeightedELBO, Pathwise, StickTheLanding
from tests.naive import Refused, reference
from tests.programs import programs

pytestmark = pytest.mark.usefixtures("double")


def leaves():
    """Unconstrained parameters, by name."""
    return dict(sorted(pyro.get_param_store().named_parameters()))


def gradients(loss):
    params = leaves()
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


SCORE = {"mean": VIMCO(), "balanced": OVIS()}
PATH = {"pathwise": Pathwise(), "sticking": StickTheLanding(), "double": DoublyReparameterized()}


@given(
    programs(),
    st.sampled_from([2, 3]),
    st.sampled_from([None, True, False]),
    st.sampled_from(list(PATH)),
    st.sampled_from(list(SCORE)),
)
def test_value_and_gradient_equal_the_naive_reference(program, num_particles, vectorize, path, score):
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    elbo = ImportanceWeightedELBO(
        num_particles=num_particles, vectorize_particles=vectorize, gradient=PATH[path], score=SCORE[score]
    )
    if program.is_biased_for_particles:
        event("refused: subsampled plate that is not independent")
        with pytest.raises(ValueError, match=r"subsample|shows 2 of its 3 elements"):
            elbo.loss(program.model, program.guide)
        return
    event(f"independent plates: {len(program.independent)} of {len(program.plates)}")
    elbo.loss(program.model, program.guide)
    runs = num_particles if vectorize is False else 1  # the last ones; coins may need a second look before
    refusal = loss = None
    try:
        pyro.set_rng_seed(program.seed + 1)
        loss = elbo.differentiable_loss(program.model, program.guide)
    except ValueError as error:
        assert path == "double" and "DoublyReparameterized needs" in str(error)
        refusal = error
    pyro.set_rng_seed(program.seed + 1)  # the same particles again, on a tape that no estimator has touched
    elbo.log_weights(program.model, program.guide)
    tape = program.tape[-runs:]
    try:
        expected = reference(program, tape, num_particles, path, score)
    except Refused as reason:
        event(f"refused: {reason}")
        assert refusal is not None
        return
    assert refusal is None, refusal
    event(f"{path}, {score}")
    close(loss.detach(), expected.loss)
    expected_gradients = gradients(expected.surrogate)
    for name, gradient in gradients(loss).items():
        close(gradient, expected_gradients[name])
    weights = elbo.log_weights(program.model, program.guide)
    expected = reference(program, program.tape[-runs:], num_particles)
    assert list(weights.plates) == expected.plates
    close(weights.bound().detach(), expected.bound)


@given(programs(matched=True))
def test_one_particle_equals_pyro(program):
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    enumerates = any(s.family == "mixture" for s in program.observations)

    def second_step(elbo):
        pyro.set_rng_seed(program.seed + 1)
        elbo.loss(program.model, program.guide)
        pyro.set_rng_seed(program.seed + 2)
        loss = elbo.differentiable_loss(program.model, program.guide)
        return loss, gradients(loss)

    try:
        pyros, pyro_gradients = second_step(TraceEnum_ELBO() if enumerates else Trace_ELBO())
    except AttributeError as error:  # Pyro's Dice, where non-reparameterised sites meet enumerated ones in some plates
        assert enumerates and "_pyro_backward" in str(error)
        with pytest.raises(AttributeError, match="_pyro_backward"):
            second_step(ImportanceWeightedELBO(num_particles=1))
        return
    ours, our_gradients = second_step(ImportanceWeightedELBO(num_particles=1))
    close(ours.detach(), pyros.detach())
    for name, gradient in our_gradients.items():
        close(gradient, pyro_gradients[name])
