# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Plates with particles of their own: the bound, by loops over all particles; and what it reduces to."""

import pyro
import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st

from pyro_iwae import OVIS, VIMCO, ImportanceWeightedELBO
from tests.trees import Reference, tree_programs

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*have no particles of their own"),
]


def leaves():
    return dict(sorted(pyro.get_param_store().named_parameters()))


def gradients(loss):
    params = leaves()
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


SCORE = {"mean": VIMCO(), "balanced": OVIS()}


@given(tree_programs(), st.sampled_from([None, True, False]), st.sampled_from([1, 2, 2]), st.sampled_from(list(SCORE)))
def test_value_and_gradient_equal_loops_over_particles(program, vectorize, num_particles, score):
    check(program, vectorize, num_particles, score, combine=False)


@given(
    tree_programs(guided=False),
    st.sampled_from([None, False]),
    st.sampled_from([1, 2, 2]),
    st.sampled_from(list(SCORE)),
)
def test_combinations_equal_loops_over_combinations(program, vectorize, num_particles, score):
    check(program, vectorize, num_particles, score, combine=bool(program.plate_particles))


def check(program, vectorize, num_particles, score, combine):
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    elbo = ImportanceWeightedELBO(
        num_particles=num_particles,
        vectorize_particles=vectorize,
        plate_particles=program.plate_particles,
        combine=combine,
        score=SCORE[score],
    )
    elbo.loss(program.model, program.guide)
    program.tape.clear()
    loss = elbo.differentiable_loss(program.model, program.guide)
    reference = Reference(program, num_particles, combine)
    event(f"nodes: {len(list(reference.tree.nodes()))}")
    total, _ = reference.bound()
    assert -loss.item() == pytest.approx(total.item(), rel=1e-9, abs=1e-9)
    if loss.requires_grad:
        expected = gradients(reference.surrogate(score))
        torch.testing.assert_close(gradients(-loss), expected, rtol=1e-7, atol=1e-8)
