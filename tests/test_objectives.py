# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives in place of the bound: value, derivatives, limits, order; each with every gradient, exactly."""

import math
from functools import reduce
from itertools import pairwise, product

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch.distributions import constraints

from pyro_iwae import (
    CIWAE,
    MIWAE,
    OVIS,
    PIWAE,
    TVO,
    VIMCO,
    DoublyReparameterized,
    ImportanceWeightedELBO,
    Pathwise,
    Renyi,
    StickTheLanding,
    exact,
    objectives,
)
from pyro_iwae.objectives import Objective
from pyro_iwae.totals import LogMean, Mean
from tests.noise import Inject
from tests.statistics import assert_mean
from tests.test_gradients import Chain, CoinThenGaussian, Curve, Hierarchy

pytestmark = pytest.mark.usefixtures("double")
K = 6


def log_mean(x, dim=0):
    return x.logsumexp(dim) - math.log(x.shape[dim])


# By its own formula, differentiable: (K, plates) -> (plates)
FORMULAS = {
    "Renyi(0)": (Renyi(0.0), log_mean),
    "Renyi(0.5)": (Renyi(0.5), lambda x: log_mean(0.5 * x) / 0.5),
    "Renyi(1)": (Renyi(1.0), lambda x: x.mean(0)),
    "Renyi(2)": (Renyi(2.0), lambda x: -log_mean(-x)),
    "Renyi(-1)": (Renyi(-1.0), lambda x: log_mean(2.0 * x) / 2.0),
    "MIWAE(1)": (MIWAE(1), log_mean),
    "MIWAE(2)": (MIWAE(2), lambda x: (log_mean(x[:3]) + log_mean(x[3:])) / 2.0),
    "MIWAE(3)": (MIWAE(3), lambda x: (log_mean(x[:2]) + log_mean(x[2:4]) + log_mean(x[4:])) / 3.0),
    "MIWAE(6)": (MIWAE(6), lambda x: x.mean(0)),
    "CIWAE(0)": (CIWAE(0.0), log_mean),
    "CIWAE(0.3)": (CIWAE(0.3), lambda x: 0.3 * x.mean(0) + 0.7 * log_mean(x)),
    "CIWAE(1)": (CIWAE(1.0), lambda x: x.mean(0)),
    "TVO(0)": (TVO((0.0,)), lambda x: x.mean(0)),
    "TVO(0, .2, .6)": (
        TVO((0.0, 0.2, 0.6)),
        lambda x: 0.2 * x.mean(0) + 0.4 * ((0.2 * x).softmax(0) * x).sum(0) + 0.4 * ((0.6 * x).softmax(0) * x).sum(0),
    ),
}
EACH = pytest.mark.parametrize("name", FORMULAS)


def derivatives(formula, x):
    """Slopes, and the diagonal of the second derivative, by autograd."""
    slopes = torch.autograd.functional.jacobian(lambda y: formula(y).sum(), x)
    hessian = torch.autograd.functional.hessian(lambda y: formula(y).sum(), x)
    return slopes, torch.stack([torch.stack([hessian[k, e, k, e] for e in range(x.shape[1])]) for k in range(len(x))])


@EACH
def test_value_and_derivatives(name):
    objective, formula = FORMULAS[name]
    x = 2.0 * torch.randn(K, 4)
    totals = objective.totals(x)
    slopes, bends = derivatives(formula, x)
    torch.testing.assert_close(totals.value, formula(x))
    torch.testing.assert_close(totals.slope(x), slopes)
    for scale in (1.0, 0.4):
        torch.testing.assert_close(totals.double_slope(x, scale), slopes - scale * bends)
    if totals.rising:
        assert bool((totals.slope(x) >= 0.0).all())
        torch.testing.assert_close(totals.slope(x).sum(0), torch.ones(4))


@EACH
@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_what_is_taken_off_does_not_depend_on_the_particle(name, balance):
    """value - advantage_k, the control, is the same whatever w_k is."""
    objective, _ = FORMULAS[name]
    x = torch.randn(K, 4)
    totals = objective.totals(x)
    control = totals.value - totals.advantage(x, balance=balance)
    if isinstance(objective, MIWAE):  # only the own group's part of the value can depend on it at all
        control = -totals.advantage(x, balance=balance) + parts_of_groups(x, objective.groups)
    for k in range(K):
        moved = x.clone()
        moved[k] += torch.randn(4)
        other = objective.totals(moved)
        again = other.value - other.advantage(moved, balance=balance)
        if isinstance(objective, MIWAE):
            again = -other.advantage(moved, balance=balance) + parts_of_groups(moved, objective.groups)
        torch.testing.assert_close(again[k], control[k])


def parts_of_groups(x, groups):
    each = log_mean(x.reshape(groups, -1, *x.shape[1:]), 1) / groups
    return each.repeat_interleave(len(x) // groups, 0)


@pytest.mark.parametrize("name", ["Renyi(0)", "Renyi(0.5)", "Renyi(2)"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_totals_of_blocks_merge(name, size):
    objective, _ = FORMULAS[name]
    x = 3.0 * torch.randn(K, 4)
    whole = objective.totals(x)
    merged = reduce(lambda a, b: a.merge(b), [objective.totals(block) for block in x.split(size)])
    assert merged.count == K
    torch.testing.assert_close(merged.value, whole.value)
    torch.testing.assert_close(merged.slope(x), whole.slope(x))
    torch.testing.assert_close(merged.advantage(x), whole.advantage(x))


def test_groups_are_told_by_position():
    with pytest.raises(ValueError, match="expected particles 0 to 4, got 2"):
        MIWAE(2).totals(torch.randn(4, 2)).slope(torch.randn(2, 2))


@EACH
@pytest.mark.parametrize("pattern", ["first", "all but one", "all"])
def test_impossible_particles(name, pattern):
    """-inf weights: value as the formula has it, slopes finite, 0 where the particle is impossible."""
    objective, formula = FORMULAS[name]
    x = torch.randn(K, 2)
    dead = {"first": [0], "all but one": [0, 1, 2, 4, 5], "all": list(range(K))}[pattern]
    x[dead, 0] = -math.inf
    totals = objective.totals(x)
    if name != "TVO(0, .2, .6)":
        torch.testing.assert_close(totals.value, formula(x))
    assert not bool(totals.value.isnan().any()) and bool(totals.value[1].isfinite())
    for value in (
        totals.slope(x),
        totals.double_slope(x),
        totals.advantage(x, balance=1.0),
        totals.advantage(x),
    ):
        assert bool(value.isfinite().all())
    assert bool((totals.slope(x)[dead, 0] == 0.0).all())
    torch.testing.assert_close(totals.slope(x)[:, 1], derivatives(formula, x[:, 1:])[0][:, 0])


# Order and limits

columns = st.lists(st.floats(-30.0, 30.0), min_size=K, max_size=K)


@given(columns)
def test_order(column):
    """For any weights: Renyi falls with alpha, CIWAE with beta, MIWAE with M (by division), TVO rises as it refines."""
    x = torch.tensor(column, dtype=torch.float64)

    def values(*chosen):
        return [objective.totals(x).value.item() for objective in chosen]

    def falls(values):
        return all(a >= b - 1e-9 for a, b in pairwise(values))

    assert falls(values(*[Renyi(a) for a in (-5.0, -1.0, 0.0, 0.3, 0.9, 1.0, 1.1, 2.0, 7.0)]))
    assert falls(values(*[CIWAE(b) for b in (0.0, 0.2, 0.7, 1.0)]))
    assert falls(values(MIWAE(1), MIWAE(2), MIWAE(6))) and falls(values(MIWAE(1), MIWAE(3), MIWAE(6)))
    refined = [(0.0,), (0.0, 0.5), (0.0, 0.25, 0.5, 0.75), tuple(i / 64 for i in range(64))]
    assert falls(list(reversed([*values(*[TVO(b) for b in refined]), *values(Renyi(0.0))])))


def test_limits():
    x = torch.randn(K, 3)
    bound, elbo = LogMean.of(x).value, Mean.of(x).value
    for objective in (MIWAE(1), CIWAE(0.0), Renyi(0.0), PIWAE(1), PIWAE(3)):
        torch.testing.assert_close(objective.totals(x).value, bound)
    for objective in (MIWAE(K), CIWAE(1.0), Renyi(1.0), TVO((0.0,))):
        torch.testing.assert_close(objective.totals(x).value, elbo)
    torch.testing.assert_close(Renyi(0.998).totals(x).value, elbo, atol=5e-3, rtol=0.0)
    torch.testing.assert_close(Renyi(-200.0).totals(x).value, x.amax(0), atol=0.02, rtol=0.0)
    torch.testing.assert_close(Renyi(200.0).totals(x).value, x.amin(0), atol=0.02, rtol=0.0)
    fine = TVO([i / 2000 for i in range(2000)])
    torch.testing.assert_close(fine.totals(x).value, bound, atol=2e-3, rtol=0.0)
    torch.testing.assert_close(PIWAE(3).totals(x).guide.slope(x), MIWAE(3).totals(x).slope(x))
    assert PIWAE(1).totals(x).guide.value.equal(MIWAE(1).totals(x).value)


def test_groups_are_bounds_of_fewer_particles():
    """MIWAE(M) of K particles has the mean of the bound of K / M: the axes are not swapped."""
    case = exact.Gaussian(data=torch.zeros(40_000), offset=1.0)
    elbo = ImportanceWeightedELBO(12, objective=MIWAE(3))
    values = elbo.bound(case.model, case.guide)
    assert_mean(values, case.bound(4)[0])
    assert abs(case.bound(4)[0] - case.bound(3)[0]) > 0.01
    plain = ImportanceWeightedELBO(4).bound(case.model, case.guide)
    assert values.std() < 0.7 * plain.std()


# Gradients: expectation over all noise equals the derivative of the expected objective

SETTINGS = [Renyi(0.5), Renyi(1.0), Renyi(2.0), CIWAE(0.3), CIWAE(1.0), MIWAE(1), MIWAE(2), TVO((0.0, 0.3, 0.7))]


class Objected:
    """A case of test_gradients with another objective."""

    def __init__(self, case, objective):
        self.case, self.objective = case, objective

    def expected(self):
        """Exact mean of the objective and its gradient, by autograd through the formula."""
        p = {name: torch.tensor(value, requires_grad=True) for name, value in self.case.params.items()}
        z = self.case.latents(p)
        law = self.case.log_q(p, z).sum(0).exp() * self.case.mass
        value = (law * self.formula(self.case.log_w(p, z))).sum()
        grads = torch.autograd.grad(value, list(p.values()), allow_unused=True)
        return value.detach(), torch.stack([torch.zeros(()) if g is None else g for g in grads])

    def formula(self, x):
        objective = self.objective
        if isinstance(objective, Renyi):
            return (
                x.mean(0) if objective.alpha == 1.0 else log_mean((1.0 - objective.alpha) * x) / (1.0 - objective.alpha)
            )
        if isinstance(objective, CIWAE):
            return objective.beta * x.mean(0) + (1.0 - objective.beta) * log_mean(x)
        if isinstance(objective, MIWAE):
            return log_mean(x.reshape(objective.groups, -1, *x.shape[1:]), 1).mean(0)
        ends = [*objective.betas, 1.0]
        parts = [(b - a) * ((a * x).softmax(0) * x).sum(0) for a, b in pairwise(ends)]
        return sum(parts)


@pytest.mark.parametrize("objective", SETTINGS, ids=repr)
@pytest.mark.parametrize(
    "case, score", [*product([Chain, CoinThenGaussian], [VIMCO(), OVIS(), None]), (Curve, None), (Hierarchy, None)]
)
@pytest.mark.parametrize("gradient", [Pathwise(), DoublyReparameterized()], ids=repr)
def test_expected_gradient_is_exact(objective, case, gradient, score):
    case = case()
    elbo = ImportanceWeightedELBO(2, objective=objective, gradient=gradient, score=score)
    law, bound, grads = case.estimates(elbo)
    value, exact_grads = Objected(case, objective).expected()
    torch.testing.assert_close((law * bound).sum(), value, rtol=1e-9, atol=1e-12)
    tolerance = 1e-9 if isinstance(gradient, Pathwise) else max(case.tolerance, 1e-6)
    torch.testing.assert_close((law.unsqueeze(-1) * grads).sum(0), exact_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", [Pathwise(), StickTheLanding(), DoublyReparameterized()], ids=repr)
@pytest.mark.parametrize("score", [VIMCO(), OVIS()], ids=repr)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_partial_importance_weighting_takes_each_part_from_its_own_objective(gradient, score, groups):
    """PIWAE: the model's gradient is that of the bound, the guide's that of MIWAE, on the same particles."""
    n = 50
    noise, coins = torch.randn(4, n), torch.randint(0, 2, (4, n)).double()

    def gradients(objective):
        p = {name: torch.full((n,), value, requires_grad=True) for name, value in CoinThenGaussian.params.items()}
        elbo = ImportanceWeightedELBO(4, objective=objective, gradient=gradient, score=score)
        case = CoinThenGaussian()
        with Inject({"z2": coins}, {"z1": noise}):
            loss = elbo.differentiable_loss(case.model, case.guide, p, n)
        return dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True)), loss

    parted, loss = gradients(PIWAE(groups))
    of_bound, bound = gradients(None)
    of_groups, _ = gradients(MIWAE(groups))
    assert loss.item() == pytest.approx(bound.item())
    for name, value in parted.items():
        expected = (of_bound if name == "theta" else of_groups)[name]
        torch.testing.assert_close(value, expected)
        if groups > 1:
            other = (of_groups if name == "theta" else of_bound)[name]
            assert (value - other).abs().max() > 1e-3


def test_partial_importance_weighting_of_shared_parameters_adds_both_parts():
    n = 50
    noise = torch.randn(4, n)

    def gradients(objective, shared):
        p = {name: torch.full((n,), value, requires_grad=True) for name, value in Curve.params.items()}
        case = Curve()
        model_p = {**p, "theta": p["loc"] if shared else p["theta"]}
        with Inject(noise={"z": noise}):
            elbo = ImportanceWeightedELBO(4, objective=objective)
            loss = elbo.differentiable_loss(lambda: case.model(model_p, n), lambda: case.guide(p, n))
        return {k: g for k, g in zip(p, torch.autograd.grad(loss, list(p.values()), allow_unused=True), strict=True)}

    case = {**Curve.params, "theta": Curve.params["loc"]}
    before, Curve.params = Curve.params, case
    try:
        apart, together = gradients(PIWAE(2), False), gradients(PIWAE(2), True)
    finally:
        Curve.params = before
    torch.testing.assert_close(together["loc"], apart["loc"] + apart["theta"])


# With RenyiELBO, where that is right


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 2.0, -1.0])
def test_agrees_with_pyros_renyi(alpha):
    """One reparameterised latent in the data plate, full data, one and the same noise."""
    data = torch.randn(20)

    def model():
        theta = pyro.param("theta", torch.tensor(0.6))
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z.sin(), 1.0), obs=data)

    def guide():
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", 20):
            pyro.sample("z", dist.Normal(loc + 0.3 * data, 0.8))

    ours = ImportanceWeightedELBO(7, objective=Renyi(alpha))
    ours.loss(model, guide)
    pyros = RenyiELBO(alpha=alpha, num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    found = []
    for elbo in (ours, pyros):
        params = [pyro.param("theta"), pyro.param("loc")]
        for p in params:
            p.grad = None
        pyro.set_rng_seed(3)
        found.append((elbo.loss_and_grads(model, guide), *(p.grad.item() for p in params)))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("objective", [Renyi(0.5), MIWAE(1), PIWAE(1), CIWAE(0.4), TVO((0.0, 0.5))], ids=repr)
def test_one_particle_is_the_elbo(objective):
    logit = torch.tensor(0.4, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.2))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    found = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(1, objective=objective)):
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(model, guide)
        found.append((loss.item(), torch.autograd.grad(loss, logit)[0].item()))
    assert found[0] == pytest.approx(found[1])


def test_loss_bound_and_scales():
    """The loss is minus the scaled sum of the objective over elements; bound() has the pathwise gradient."""
    case = exact.Gaussian(data=torch.randn(5), offset=torch.tensor(0.7, requires_grad=True))
    for objective in (Renyi(0.5), MIWAE(2), PIWAE(2), CIWAE(0.3), TVO((0.0, 0.5))):
        elbo = ImportanceWeightedELBO(4, objective=objective)
        elbo.loss(case.model, case.guide)
        found = []
        for run in (elbo.bound, elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
            pyro.set_rng_seed(1)
            found.append(run(case.model, case.guide))
        assert found[0].shape == (5,)
        total = found[0].sum()
        assert [-total.item()] * 3 == pytest.approx([found[1], found[2].item(), found[3]])
        (slope,) = torch.autograd.grad(total, case.offset)
        (loss_slope,) = torch.autograd.grad(found[2], case.offset)
        if not isinstance(objective, PIWAE):
            assert slope.item() == pytest.approx(-loss_slope.item())


def test_training_with_each():
    """A conjugate model: every objective finds the posterior mean."""
    data = torch.tensor([0.5, -1.0, 2.0])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.full((3,), 0.5), constraint=constraints.positive)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, scale))

    for objective in (Renyi(0.5), MIWAE(2), PIWAE(2), CIWAE(0.5), TVO((0.0, 0.5))):
        pyro.clear_param_store()
        elbo = ImportanceWeightedELBO(8, objective=objective, gradient=StickTheLanding())
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        for _ in range(150):
            svi.step()
        torch.testing.assert_close(pyro.param("loc").detach(), data / 2.0, atol=0.1, rtol=0.0)


# Arguments


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Renyi(math.inf), ValueError, "0.001 away from it and within a million"),
        (lambda: Renyi(math.nan), ValueError, "0.001 away from it and within a million"),
        (lambda: Renyi(1.0001), ValueError, "0.001 away"),
        (lambda: MIWAE(0), ValueError, "groups >= 1"),
        (lambda: MIWAE(2.5), TypeError, "whole number"),
        (lambda: PIWAE(True), TypeError, "whole number"),
        (lambda: CIWAE(1.5), ValueError, "beta between 0"),
        (lambda: CIWAE(math.nan), ValueError, "beta between 0"),
        (lambda: TVO(()), ValueError, "rise from 0"),
        (lambda: TVO((0.1, 0.5)), ValueError, "rise from 0"),
        (lambda: TVO((0.0, 0.5, 0.5)), ValueError, "rise from 0"),
        (lambda: TVO((0.0, 1.0)), ValueError, "rise from 0"),
        (lambda: ImportanceWeightedELBO(5, objective=MIWAE(2)), ValueError, "multiple of the 2 groups, got 5"),
        (lambda: ImportanceWeightedELBO(1, objective=PIWAE(2)), ValueError, "multiple of the 2 groups, got 1"),
        (lambda: ImportanceWeightedELBO(5, objective="renyi"), TypeError, "objective to be"),
        (lambda: ImportanceWeightedELBO(5, objective=Renyi), TypeError, "objective to be"),
    ],
)
def test_arguments(make, error, message, unchecked):
    with pytest.raises(error, match=message):
        make()


def test_every_objective_is_tested():
    tested = {type(objective).__name__ for objective, _ in FORMULAS.values()} | {"PIWAE"}
    assert tested == set(objectives.__all__) - {"Objective"}
    for name in tested:
        assert getattr(objectives, name).reference


@pytest.mark.parametrize("objective", [CIWAE(1.0), Renyi(1.0), TVO((0.0,)), MIWAE(4)], ids=repr)
def test_the_elbo_in_every_disguise_needs_nothing_of_score_sites_or_scales(objective):
    """What log q itself gives has mean zero under one weight 1 / K each, whatever depends on z."""
    logit = torch.tensor(0.3, requires_grad=True)

    def model():
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(logits=z))

    def guide():
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(logit, torch.tensor(1.0)))
        y = pyro.sample("y", dist.Normal(z, torch.tensor(1.0)), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Bernoulli(logits=y))

    found = []
    for gradient in (DoublyReparameterized(), StickTheLanding()):
        pyro.set_rng_seed(3)
        elbo = ImportanceWeightedELBO(4, objective=objective, gradient=gradient)
        found.append(torch.autograd.grad(elbo.differentiable_loss(model, guide), logit)[0])
    torch.testing.assert_close(found[0], found[1])


def test_an_objective_of_ones_own_may_read_numbers():
    """It is asked about K before any particle is drawn, and needs to say nothing of it."""

    class Largest(Objective):
        reference = "nobody"

        def totals(self, log_weights):
            assert bool((log_weights < 1e9).all())
            return LogMean.of(log_weights)

    loss = ImportanceWeightedELBO(3, objective=Largest()).loss(lambda: None, lambda: None)
    assert loss == pytest.approx(0.0, abs=1e-6)
