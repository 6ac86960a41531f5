# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Plates with particles of their own: the bound, by loops over all particles; and what it reduces to."""

import ast
import itertools
import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import assume, event, given, note, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO, TraceTMC_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.enum import config_enumerate
from pyro.optim import ClippedAdam

from pyro_iwae import (
    CIWAE,
    MIWAE,
    OVIS,
    PIWAE,
    VIMCO,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    Pathwise,
    Renyi,
    SampledBackward,
    StickTheLanding,
)
from tests.statistics import assert_frequencies, assert_mean, assert_same_mean, nightly
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


FEWER = settings(max_examples=max(1, settings().max_examples // 10))  # loops over particles take their time


@given(tree_programs(), st.sampled_from([None, True, False]), st.sampled_from([1, 2, 2]), st.sampled_from(list(SCORE)))
@FEWER
def test_value_and_gradient_equal_loops_over_particles(program, vectorize, num_particles, score):
    check(program, vectorize, num_particles, score, combine=False)


@given(
    tree_programs(guided=False),
    st.sampled_from([None, False]),
    st.sampled_from([1, 2, 2]),
    st.sampled_from(list(SCORE)),
)
@FEWER
def test_combinations_equal_loops_over_combinations(program, vectorize, num_particles, score):
    check(program, vectorize, num_particles, score, combine=bool(program.plate_particles))


@given(tree_programs(subsampled=True), st.sampled_from([None, False]))
@settings(max_examples=max(1, settings().max_examples // 20))  # the longest loops
def test_minibatches_equal_loops_over_particles(program, vectorize):
    check(program, vectorize, 1, "balanced", combine=False)


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
    single = num_particles == 1 and not program.plate_particles  # Pyro's own, which leaves out what is not downstream
    try:
        elbo.loss(program.model, program.guide)
    except ValueError as error:  # TraceEnum_ELBO takes one scale, also for sites that are not contracted together
        assume(not (single and "share a common poutine.scale" in str(error)))
        raise
    program.tape.clear()
    loss = torch.as_tensor(elbo.differentiable_loss(program.model, program.guide))
    reference = Reference(program, num_particles, combine)
    event(f"nodes: {len(list(reference.tree.nodes()))}")
    total, _ = reference.bound()
    assert -loss.item() == pytest.approx(total.item(), rel=1e-9, abs=1e-9)
    if loss.requires_grad and not single:
        expected = gradients(reference.surrogate(score))
        torch.testing.assert_close(gradients(-loss), expected, rtol=1e-7, atol=1e-8)


# Small models by hand


N = 6
DATA = torch.tensor([0.4, -1.1, 2.3, 0.0, 1.2, -0.3], dtype=torch.float64)


def normals(rows=None, *, local_given=True, families=(dist.Normal, dist.Normal)):
    """mu ~ N(0, 1), z_i ~ N(mu, 1), x_i ~ N(z_i, 1), and a guide that is a little off; minibatches of so many rows."""

    def plate():
        return pyro.plate("data", N, rows)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with plate() as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[rows])

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        b = pyro.param("b", torch.tensor(0.1))
        s = pyro.param("s", torch.tensor(0.7), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", families[0](a, s))
        with plate() as rows:
            pyro.sample("z", families[1](b + DATA[rows] / 2 + (0.5 * mu if local_given else 0.2), 1.1 * s))

    return model, guide


def evidence():
    return dist.MultivariateNormal(torch.zeros(N), 2 * torch.eye(N) + 1).log_prob(DATA)


def values(elbo, model, guide, draws):
    return torch.tensor([-elbo.loss(model, guide) for _ in range(draws)])


def test_no_named_plate_and_one_of_everything_are_the_plain_bound():
    model, guide = normals()
    found = []
    for options in ({}, {"plate_particles": {}}, {"plate_particles": None}):
        pyro.set_rng_seed(1)
        found.append(ImportanceWeightedELBO(5, **options).loss(model, guide))
    assert found[0] == found[1] == found[2]
    for plate_particles in (None, {"data": 1}):
        pyro.set_rng_seed(1)
        found.append(ImportanceWeightedELBO(1, plate_particles=plate_particles).loss(model, guide))
    pyro.set_rng_seed(1)
    assert found[3] == found[4] == pytest.approx(Trace_ELBO().loss(model, guide))


def test_one_particle_of_each_element_is_the_plain_bound():
    """M = 1: each of the K weights is what it is without the tree, on the same draws."""
    model, guide = normals()
    plain, tree = (ImportanceWeightedELBO(5, plate_particles=p) for p in (None, {"data": 1}))
    found = []
    for elbo in (plain, tree):
        elbo.loss(model, guide)
        pyro.set_rng_seed(1)
        found.append(elbo.log_weights(model, guide).log_weights)
    torch.testing.assert_close(found[0], found[1])


def test_auto_gives_every_plate_with_latents_the_count():
    model, guide = normals()
    weights = ImportanceWeightedELBO(3, plate_particles="auto").log_weights(model, guide)
    (child,) = weights.children
    assert child.plates == ("data",) and child.log_weights.shape == (3, 3, N)


@pytest.mark.parametrize("options", [{}, {"combine": True}], ids=["inside", "combined"])
def test_at_the_exact_posterior_there_is_no_noise(options):
    """g and z_i independent a posteriori: every weight is the evidence, whatever the particles."""

    def model():
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    loc = (DATA / 2).requires_grad_()
    scale = torch.full((N,), 0.5**0.5, requires_grad=True)

    def guide():
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, scale))

    for gradient in (StickTheLanding(), DoublyReparameterized()):
        elbo = ImportanceWeightedELBO(3, plate_particles={"data": 4}, gradient=gradient, **options)
        loss = elbo.differentiable_loss(model, guide)
        assert -loss.item() == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(DATA).sum().item())
        for grad in torch.autograd.grad(loss, [loc, scale]):
            assert grad.abs().max() < 1e-12


def chain():
    """Three levels, each tied to the next one out alone."""

    def model():
        g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 3, dim=-2):
            u = pyro.sample("u", dist.Normal(g, 1.0))
            with pyro.plate("columns", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)

    def guide():
        a, s = pyro.param("a", torch.tensor(0.3)), pyro.param("s", torch.tensor(0.9))
        pyro.sample("g", dist.Normal(a, s))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("u", dist.Normal(torch.arange(3.0).reshape(3, 1) / 2, s))
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("z", dist.Normal(torch.arange(12.0).reshape(3, 4) / 6 + a, s))

    return model, guide


def side_by_side():
    """Two plates below one latent."""

    def model():
        g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
        for name, size in (("rows", 3), ("columns", 4)):
            with pyro.plate(name, size):
                z = pyro.sample(f"z_{name}", dist.Normal(g, 1.0))
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=torch.arange(float(size)) / 2)

    def guide():
        a, s = pyro.param("a", torch.tensor(0.3)), pyro.param("s", torch.tensor(0.9))
        pyro.sample("g", dist.Normal(a, s))
        for name, size in (("rows", 3), ("columns", 4)):
            with pyro.plate(name, size):
                pyro.sample(f"z_{name}", dist.Normal(torch.arange(float(size)) / 4 + a, s))

    return model, guide


@pytest.mark.parametrize("programs", [chain, side_by_side])
def test_combinations_are_those_of_tensor_monte_carlo(programs):
    """On the same draws, value and gradient: Pyro contracts its factors by pyro.ops, the tree from leaves to root."""
    model, guide = programs()
    tree = ImportanceWeightedELBO(4, plate_particles={"rows": 4, "columns": 4}, combine=True)
    tree.loss(model, guide)
    sampled = config_enumerate(guide, default="parallel", num_samples=4, expand=False)
    found = []
    for elbo, q in ((tree, guide), (TraceTMC_ELBO(max_plate_nesting=2), sampled)):
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(model, q)
        found.append((loss.item(), gradients(loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_combinations_need_draws_that_are_made_once():
    """A guide messenger draws in the model's shapes, which has a particle of z for each of mu in one pass."""
    model, _ = normals()
    guide = AutoNormalMessenger(model)
    elbo = ImportanceWeightedELBO(3, plate_particles={"data": 4}, combine=True)
    with pytest.warns(UserWarning, match=r"one after the other, because guide site 'z' of plate 'data' is drawn anew"):
        assert math.isfinite(elbo.loss(model, guide))
    with pytest.raises(ValueError, match=r"site 'z'.*or anew for each"):
        ImportanceWeightedELBO(3, plate_particles={"data": 4}, combine=True, vectorize_particles=True).loss(
            model, guide
        )


def test_combinations_cost_no_more_than_the_largest_factor():
    """z is tied to u alone: its weights are not held for every g."""
    weights = ImportanceWeightedELBO(5, plate_particles={"rows": 6, "columns": 7}, combine=True).log_weights(*chain())
    (rows,) = weights.children
    (columns,) = rows.children
    assert rows.log_weights.shape == (6, 5, 3) and columns.log_weights.shape == (7, 6, 1, 3, 4)


# Gradients through the tree: replicates in an independent plate, with parameters of their own

REPLICATES = nightly(20_000)


def replicated(model_of, guide_of, names):
    """Model, guide and a row of parameters for each replicate."""
    params = {name: torch.full((REPLICATES,), value).requires_grad_() for name, value in names.items()}

    def inside(fn):
        def run():
            with pyro.plate("replicates", REPLICATES, dim=-1):
                fn(params)

        return run

    return inside(model_of), inside(guide_of), params


def per_replicate(elbo, model, guide, params):
    elbo.loss(model, guide)
    grads = torch.autograd.grad(-elbo.differentiable_loss(model, guide), list(params.values()))
    return torch.stack(grads, -1)


START = {"a": 0.3, "s": -0.2, "b": 0.2, "t": -0.3, "c": 0.1}


def nested_model(p):
    g = pyro.sample("g", dist.Normal(0.4, 1.0))
    with pyro.plate("rows", 2, dim=-3):
        u = pyro.sample("u", dist.Normal(g, 1.0))
        with pyro.plate("columns", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("x", dist.Normal(z + 0.3 * torch.sin(2 * z), 0.7), obs=torch.tensor([0.5, -1.0]).reshape(2, 1))
    with pyro.plate("others", 3, dim=-2):
        v = pyro.sample("v", dist.Normal(0.5 * g, 1.0))
        pyro.sample("y", dist.Normal(v, 1.0), obs=torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1))


def nested_guide(p, given=True):
    """Parameters shared between levels, each level drawn given the one around it or not."""
    g = pyro.sample("g", dist.Normal(p["a"], p["s"].exp()))
    with pyro.plate("rows", 2, dim=-3):
        u = pyro.sample("u", dist.Normal(p["b"] + 0.5 * g if given else p["b"], p["t"].exp()))
        with pyro.plate("columns", 2, dim=-2):
            loc = p["c"] + 0.1 * p["a"]
            pyro.sample("z", dist.Normal(loc + 0.5 * u + 0.2 * g if given else loc, p["t"].exp()))
    with pyro.plate("others", 3, dim=-2):
        pyro.sample("v", dist.Normal(p["c"] + 0.3 * g if given else p["c"], p["s"].exp()))


@pytest.mark.parametrize("given", [True, False], ids=["hierarchical guide", "flat guide"])
@pytest.mark.parametrize("combine", [False, True])
def test_doubly_reparameterized_through_the_tree_has_the_pathwise_mean(given, combine):
    if combine and given:
        pytest.skip("nothing can be combined")
    model, guide, params = replicated(nested_model, lambda p: nested_guide(p, given), START)
    counts = {"rows": 3, "columns": 2, "others": 4}
    found = []
    for gradient in (Pathwise(), DoublyReparameterized(), StickTheLanding()):
        elbo = ImportanceWeightedELBO(2, plate_particles=counts, combine=combine, gradient=gradient)
        found.append(per_replicate(elbo, model, guide, params))
    pathwise, double, sticking = found
    assert_same_mean(double, pathwise)
    assert bool((double.std(0) < 0.7 * pathwise.std(0)).all())
    error = (sticking.var(0) + pathwise.var(0)).div(REPLICATES).sqrt()
    assert bool(((sticking.mean(0) - pathwise.mean(0)).abs() > 6 * error).any())  # its declared bias is there


@pytest.mark.parametrize(
    ("objective", "num_particles"),
    [
        (Renyi(0.5), 4),
        (MIWAE(2), 4),
        (None, 1),  # nothing to compare at the root, but inside
        (CIWAE(1.0), 3),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in ((Renyi(-0.5), 4), (Renyi(1.0), 3), (MIWAE(3), 3), (Renyi(0.5), 1))
        ),
    ],
    ids=repr,
)
def test_doubly_reparameterized_of_objectives_at_the_root(objective, num_particles):
    model, guide, params = replicated(nested_model, nested_guide, START)
    counts = {"rows": 2, "columns": 2, "others": 3}
    pathwise, double = (
        per_replicate(
            ImportanceWeightedELBO(num_particles, plate_particles=counts, objective=objective, gradient=gradient),
            model,
            guide,
            params,
        )
        for gradient in (Pathwise(), DoublyReparameterized())
    )
    assert_same_mean(double, pathwise)


def test_doubly_reparameterized_with_a_tempered_density():
    def scaled(fn):
        return lambda p: poutine.scale(fn, scale=0.6)(p)

    def observed(p):
        scaled(nested_model)(p)
        pyro.sample("w", dist.Normal(torch.zeros(REPLICATES), 1.0), obs=torch.ones(REPLICATES))  # not tempered

    model, guide, params = replicated(observed, scaled(nested_guide), START)
    counts = {"rows": 2, "columns": 2, "others": 3}
    pathwise, double = (
        per_replicate(ImportanceWeightedELBO(2, plate_particles=counts, gradient=gradient), model, guide, params)
        for gradient in (Pathwise(), DoublyReparameterized())
    )
    assert_same_mean(double, pathwise)


def coins_model(p):
    g = pyro.sample("g", dist.Bernoulli(0.4).expand([REPLICATES]))
    with pyro.plate("data", 2, dim=-2):
        c = pyro.sample("c", dist.Bernoulli(logits=1.5 * g - 0.5))
        pyro.sample("x", dist.Normal(2 * c + g, 1.0), obs=torch.tensor([1.0, 2.5]).reshape(2, 1))


def coins_guide(p):
    g = pyro.sample("g", dist.Bernoulli(logits=p["a"]))
    with pyro.plate("data", 2, dim=-2):
        pyro.sample("c", dist.Bernoulli(logits=p["b"] + 0.7 * g))


def exact_coins(a, b, outer, inner, combine):
    """The bound's mean by enumeration of all that K outer and M inner particles of two rows can be."""
    a, b = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    data = torch.tensor([1.0, 2.5])
    total = torch.zeros(())

    def row_bound(i, g, cs):
        terms = []
        for c in cs:
            log_p = dist.Bernoulli(logits=torch.tensor(1.5 * g - 0.5)).log_prob(torch.tensor(c))
            log_p = log_p + dist.Normal(2 * c + g, 1.0).log_prob(data[i])
            terms.append(log_p - dist.Bernoulli(logits=b + 0.7 * g).log_prob(torch.tensor(c)))
        return torch.stack(terms).logsumexp(0) - math.log(inner)

    coins = (0.0, 1.0)
    for gs in itertools.product(coins, repeat=outer):
        for cs in itertools.product(coins, repeat=2 * inner * outer):
            log_q, weights = torch.zeros(()), []
            for k, g in enumerate(gs):
                weight = dist.Bernoulli(0.4).log_prob(torch.tensor(g)) - dist.Bernoulli(logits=a).log_prob(
                    torch.tensor(g)
                )
                log_q = log_q + dist.Bernoulli(logits=a).log_prob(torch.tensor(g))
                for i in range(2):
                    mine = cs[(k * 2 + i) * inner : (k * 2 + i + 1) * inner]
                    weight = weight + row_bound(i, g, mine)
                    log_q = log_q + sum(dist.Bernoulli(logits=b + 0.7 * g).log_prob(torch.tensor(c)) for c in mine)
                weights.append(weight)
            total = total + log_q.exp() * (torch.stack(weights).logsumexp(0) - math.log(outer))
    return total, torch.stack(torch.autograd.grad(total, [a, b]))


@pytest.mark.parametrize(("outer", "inner"), [(1, 2), (2, 1), (2, 2)])
def test_score_function_gradients_equal_enumeration(outer, inner):
    """A coefficient from the rows alone would be biased for more than one outer particle."""
    expected_value, expected = exact_coins(0.2, -0.4, outer, inner, combine=False)
    for score in (OVIS(), VIMCO()):
        model, guide, params = replicated(coins_model, coins_guide, {"a": 0.2, "b": -0.4})
        elbo = ImportanceWeightedELBO(outer, plate_particles={"data": inner}, score=score)
        assert_mean(per_replicate(elbo, model, guide, params), expected)
        assert_mean(elbo.bound(model, guide).detach(), expected_value)


def test_doubly_reparameterized_needs_no_score_site_below_whatever_the_root_has():
    model, guide = normals(families=(dist.Normal, NonreparameterizedNormal))
    for count in (1, 2):
        elbo = ImportanceWeightedELBO(count, plate_particles={"data": 3}, gradient=DoublyReparameterized())
        with pytest.raises(ValueError, match="guide site 'z' depends on 'mu'"):
            elbo.loss_and_grads(model, guide)


def test_what_is_not_derived_raises():
    model, guide = normals(families=(dist.Normal, NonreparameterizedNormal))
    for objective in (Renyi(0.5), MIWAE(2), CIWAE(0.5)):
        elbo = ImportanceWeightedELBO(4, plate_particles={"data": 3}, objective=objective)
        with pytest.raises(NotImplementedError, match=r"plate_particles.*objective=None"):
            elbo.loss_and_grads(model, guide)
        elbo.loss(model, guide)
    model, guide = normals()
    for options, problem in (
        ({"gradient": SampledBackward(2)}, "SampledBackward"),
        ({"gradient": DoublyReparameterized(), "objective": PIWAE(2)}, "another part for the guide"),
        ({"gradient": DoublyReparameterized(), "objective": Renyi(0.5), "combine": True}, "combine=True"),
    ):
        model, guide = normals(local_given=False)
        with pytest.raises(NotImplementedError, match=problem):
            ImportanceWeightedELBO(4, plate_particles={"data": 3}, **options).loss_and_grads(model, guide)


# Minibatches


def test_the_mean_over_minibatches_is_the_bound_of_all_rows():
    elbo = ImportanceWeightedELBO(1, plate_particles={"data": 5})
    whole, part = (values(elbo, *normals(rows), nightly(2000)) for rows in (None, 2))
    assert_same_mean(part, whole)
    whole, part = (gradients_of(elbo, *normals(rows), nightly(1000)) for rows in (None, 2))
    assert_same_mean(part, whole)
    double = ImportanceWeightedELBO(1, plate_particles={"data": 5}, gradient=DoublyReparameterized())
    assert_same_mean(gradients_of(double, *normals(2), nightly(1000)), whole)


def gradients_of(elbo, model, guide, draws):
    found = []
    for _ in range(draws):
        grads = gradients(elbo.differentiable_loss(model, guide))
        found.append(torch.stack(list(grads.values())))
    return torch.stack(found)


@pytest.mark.nightly
def test_subsampled_training_reaches_the_bound_of_all_rows():
    """Trained on minibatches of two rows, the guide is as good on all six as one trained on these."""
    elbo, found = ImportanceWeightedELBO(1, plate_particles={"data": 5}), []
    for rows in (None, 2):
        pyro.clear_param_store()
        pyro.param("a", torch.tensor(2.0))
        pyro.param("b", torch.tensor(-1.0))
        model, guide = normals(rows)
        before = values(elbo, *normals(), 200).mean()
        svi = SVI(model, guide, ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 1200)}), elbo)
        for _ in range(1200):
            svi.step()
        found.append(values(elbo, *normals(), 1000))
        assert before < found[-1].mean() - 5.0  # there was something to be learnt
    whole, part = found
    error = (whole.var() / len(whole) + part.var() / len(part)).sqrt()
    assert (whole.mean() - part.mean()).abs() < 5 * error + 0.02  # what is left of the noise of the steps
    assert part.mean() < evidence()


def nested_rows(outer=None, inner=None):
    """Plates in plates, each shown in part; data by row and column."""
    data = torch.arange(12.0).reshape(3, 4) / 4 - 1

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, outer, dim=-2) as i:
            u = pyro.sample("u", dist.Normal(g, 1.0))
            with pyro.plate("columns", 4, inner, dim=-1) as j:
                z = pyro.sample("z", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[i][:, j])

    def guide():
        g = pyro.sample("g", dist.Normal(0.2, 0.5))
        with pyro.plate("rows", 3, outer, dim=-2) as i:
            u = pyro.sample("u", dist.Normal(g, 0.8))
            with pyro.plate("columns", 4, inner, dim=-1) as j:
                pyro.sample("z", dist.Normal((u + data[i][:, j]) / 2, 0.9))

    return model, guide


@pytest.mark.parametrize("shown", [(2, None), (None, 2), (2, 2)])
def test_nested_minibatches(shown):
    outer, inner = shown
    counts = {"rows": 1 if inner else 4, "columns": 5}
    elbo = ImportanceWeightedELBO(1, plate_particles=counts)
    assert_same_mean(
        values(elbo, *nested_rows(outer, inner), nightly(2500)), values(elbo, *nested_rows(), nightly(2500))
    )


def test_particles_around_a_minibatch_raise():
    for options, problem in (
        ({"num_particles": 2, "plate_particles": {"data": 3}}, r"'data'.*num_particles=1, plate_particles={'data': 3}"),
        ({"num_particles": 2, "plate_particles": "auto"}, r"'data'.*num_particles=1, plate_particles={'data': 2}"),
        ({"num_particles": 2}, r"'data'.*num_particles=1, plate_particles={'data': K}"),
    ):
        with pytest.raises(ValueError, match=problem):
            ImportanceWeightedELBO(**options).loss(*normals(2))
    with pytest.raises(ValueError, match=r"'columns'.*plate_particles={'rows': 1, 'columns': 5}"):
        ImportanceWeightedELBO(1, plate_particles={"rows": 4, "columns": 5}).loss(*nested_rows(None, 2))


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize(
    "plate_particles",
    [None, {"rows": 3}, {"columns": 4}, {"rows": 3, "columns": 4}, "auto"],
    ids=["none", "rows", "columns", "both", "auto"],
)
@pytest.mark.parametrize("shown", [(2, None), (None, 2), (2, 2)])
def test_what_the_message_says_to_write_can_be_written(shown, plate_particles, num_particles):
    model, guide = nested_rows(*shown)
    try:
        ImportanceWeightedELBO(num_particles, plate_particles=plate_particles).loss(model, guide)
    except ValueError as error:
        (advice,) = re.findall(r"plate_particles=({.*?})", str(error))
        counts = ast.literal_eval(advice.replace("K", "3"))
        assert any(count > 1 for count in counts.values())
        assert num_particles == 1 or "num_particles=1, plate_particles" in str(error)
        ImportanceWeightedELBO(1, plate_particles=counts).loss(model, guide)


# Which plates


def crossed(observed=True, both=True):
    def plates():
        return pyro.plate("users", 2, dim=-2), pyro.plate("items", 4, dim=-1)

    def model():
        users, items = plates()
        with users:
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
        with items:
            v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 1.0))
        with users, items:
            w = pyro.sample("w", dist.Normal(u + v, 1.0)) if both else u * v
            if observed:
                pyro.sample("x", dist.Normal(w, 1.0), obs=torch.ones(2, 4))

    def guide():
        users, items = plates()
        with users:
            pyro.sample("u", dist.Normal(torch.tensor(0.1), 1.0))
        with items:
            pyro.sample("v", dist.Normal(torch.tensor(0.1), 1.0))
        if both:
            with users, items:
                pyro.sample("w", dist.Normal(torch.tensor(0.2), 1.0))

    return model, guide


@pytest.mark.parametrize("vectorize", [None, False])
def test_crossed_plates(vectorize):
    """The smaller of the two plates moves out; inside the other and both, particles of their own remain."""
    model, guide = crossed()
    elbo = ImportanceWeightedELBO(3, plate_particles={"users": 5, "items": 6}, vectorize_particles=vectorize)
    with pytest.warns(
        UserWarning, match=r"latents \['u'\] of plate 'users' are weighed jointly.*site 'w'.*'v'.*'items'"
    ):
        weights = elbo.log_weights(model, guide)
    (items,) = weights.children
    (both,) = items.children
    assert items.plates == ("items",) and items.log_weights.shape == (6, 3, 4)
    assert both.plates == ("users", "items") and both.log_weights.shape == (5, 6, 3, 2, 4)


def test_crossed_plates_without_latents_in_both():
    model, guide = crossed(both=False)
    elbo = ImportanceWeightedELBO(3, plate_particles="auto")
    with pytest.warns(UserWarning, match=r"latents \['u'\].*site 'x'"):
        weights = elbo.log_weights(model, guide)
    assert [child.plates for child in weights.children] == [("items",)]
    expected = ImportanceWeightedELBO(3, plate_particles={"items": 3}).log_weights(model, guide)
    assert [child.log_weights.shape for child in weights.children] == [c.log_weights.shape for c in expected.children]


def test_plates_that_nothing_crosses():
    """Latents in both and in each, all unobserved and independent: nothing has to move."""
    weights = ImportanceWeightedELBO(2, plate_particles="auto").log_weights(*crossed(observed=False, both=False))
    assert [child.plates for child in weights.children] == [("items",), ("users",)]


def topics(enumerated):
    """What is seen follows the plate's latent through a coin alone, which is summed out by Pyro or by hand."""
    x = torch.tensor([1.0, -1.0, 0.5])

    def model():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", 3):
            p = pyro.sample("p", dist.Beta(torch.tensor(2.0), 2.0))
            if enumerated:
                c = pyro.sample("c", dist.Bernoulli(p), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(m + 2 * c, 1.0), obs=x)
            else:
                sides = [p.log() + dist.Normal(m + 2, 1.0).log_prob(x), (-p).log1p() + dist.Normal(m, 1.0).log_prob(x)]
                pyro.factor("x", torch.logaddexp(*sides))

    def guide():
        pyro.sample("m", dist.Normal(pyro.param("a", torch.tensor(0.3)), 0.9))
        with pyro.plate("data", 3):
            pyro.sample("p", dist.Beta(pyro.param("b", torch.tensor(1.5)), 1.5))

    return model, guide


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("combine", [False, True])
def test_a_site_that_follows_a_plate_through_an_enumerated_one(vectorize, combine):
    found = []
    for enumerated in (True, False):
        pyro.clear_param_store()
        options = {"plate_particles": {"data": 5}, "vectorize_particles": vectorize, "combine": combine}
        elbo = ImportanceWeightedELBO(4, **options)
        elbo.loss(*topics(enumerated))
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(*topics(enumerated))
        found.append((loss.item(), gradients(loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("vectorize", [None, False])
def test_a_coupling_that_is_off_at_first(vectorize):
    """A site outside the plate that is tied to its latents by a number, which is 0 and then not."""
    rows = torch.tensor([1.0, -0.5, 0.3, 0.8])

    def model(strength):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=rows)
        total = z.sum(-1, keepdim=z.dim() > 1)
        pyro.sample("y", dist.Normal(mu + strength * total, 1.0), obs=torch.tensor(50.0))

    def guide(strength):
        pyro.sample("mu", dist.Normal(torch.tensor(0.1), 0.7))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(rows / 2, 0.7))

    def loss(elbo, strength):
        elbo.loss(model, guide, strength)
        pyro.set_rng_seed(3)
        return elbo.loss(model, guide, strength)

    options = {"plate_particles": {"data": 3}, "vectorize_particles": vectorize}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = ImportanceWeightedELBO(2, **options)
        assert loss(used, 0.0) > 1000.0  # y is 50 standard deviations away
        assert loss(used, 1.0) == loss(ImportanceWeightedELBO(2, **options), 1.0)


@pytest.mark.parametrize("vectorize", [None, False])
def test_a_latent_drawn_given_one_further_in(vectorize):
    """When u moves outwards, for y ties all of it, z has to go along: the guide draws u given z."""

    def model():
        with pyro.plate("g", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("r", 2, dim=-2):
                u = pyro.sample("u", dist.Normal(z, 1.0))
        total = u.sum((-1, -2), keepdim=u.dim() > 2)
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("g", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.2), 1.1))
            with pyro.plate("r", 2, dim=-2):
                pyro.sample("u", dist.Normal(0.9 * z + 0.2, 1.1))

    elbo = ImportanceWeightedELBO(1, plate_particles={"g": 3, "r": 5}, vectorize_particles=vectorize)
    weights = values(elbo, model, guide, 1500).exp()
    assert_mean(weights, dist.Normal(0.0, 13**0.5).log_prob(torch.tensor(2.0)).exp())


def test_many_plates_side_by_side():
    count = 14

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        for i in range(count):
            with pyro.plate(f"p{i}", 2):
                z = pyro.sample(f"z{i}", dist.Normal(mu, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide():
        pyro.sample("mu", dist.Normal(torch.tensor(0.1), 0.7))
        for i in range(count):
            with pyro.plate(f"p{i}", 2):
                pyro.sample(f"z{i}", dist.Normal(torch.tensor(0.0), 0.7))

    weights = ImportanceWeightedELBO(2, plate_particles="auto").log_weights(model, guide)
    assert len(weights.children) == count


def test_many_plates_whose_rows_belong_by_an_index():
    """All have to move outwards; no choice, so no search among subsets; each with the site that is at fault."""
    count = 16
    which = torch.tensor([0, 1, 1])

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        for i in range(count):
            with pyro.plate(f"p{i}", 2):
                z = pyro.sample(f"z{i}", dist.Normal(mu, 1.0))
            with pyro.plate(f"rows{i}", 3):
                pyro.sample(f"x{i}", dist.Normal(z[..., which], 1.0), obs=torch.zeros(3))

    def guide():
        pyro.sample("mu", dist.Normal(torch.tensor(0.1), 0.7))
        for i in range(count):
            with pyro.plate(f"p{i}", 2):
                pyro.sample(f"z{i}", dist.Normal(torch.tensor(0.0), 0.7))

    with pytest.warns(UserWarning) as caught:
        weights = ImportanceWeightedELBO(2, plate_particles="auto").log_weights(model, guide)
    assert weights.children == ()
    messages = [str(w.message) for w in caught]
    assert all(any(f"['z{i}'] of plate 'p{i}'" in m and f"'x{i}'" in m for m in messages) for i in range(count))


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("chance", [0.5, 0.05])
def test_sites_that_come_and_go_raise(vectorize, chance):
    def program(observed):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(chance)))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))
        if bool((b > 0).any()):
            pyro.sample("extra", dist.Normal(torch.tensor(0.0), 1.0))

    elbo = ImportanceWeightedELBO(2, plate_particles={"data": 3}, vectorize_particles=vectorize)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"the same sites and plates in every run.*leave"):
        warnings.simplefilter("ignore")
        model, guide = (lambda: program(True)), (lambda: program(False))
        for _ in range(300):
            elbo.loss(model, guide)


def test_auto_says_where_it_has_no_effect():
    model, _ = normals()
    with pytest.warns(UserWarning, match=r"'auto' has no effect.*plates \['data'\].*AutoNormal"):
        ImportanceWeightedELBO(2, plate_particles="auto").loss(model, AutoMultivariateNormal(model))


def by_index():
    county = torch.tensor([0, 0, 1, 2, 2, 2])

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("county", 3):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(a[..., county], 1.0), obs=DATA)

    def grouped():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("county", 3):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            each = dist.Normal(a[..., county], 1.0).log_prob(DATA)
            pyro.factor("y", torch.zeros_like(each[..., :3]).index_add(-1, county, each))

    def guide():
        pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("county", 3):
            pyro.sample("a", dist.Normal(torch.tensor(0.1), 1.0))

    return model, grouped, guide


def test_rows_that_belong_to_elements_by_an_index():
    """They are weighed jointly, and the message says how to write them; written so, both give the same weights."""
    model, grouped, guide = by_index()
    with pytest.warns(UserWarning, match=r"latents \['a'\].*site 'y'.*index_add"):
        weights = ImportanceWeightedELBO(3, plate_particles={"county": 4}).log_weights(model, guide)
    assert weights.children == ()
    elbo = ImportanceWeightedELBO(3, plate_particles={"county": 4})
    assert [child.plates for child in elbo.log_weights(grouped, guide).children] == [("county",)]
    found = []
    for fn in (model, grouped):
        elbo = ImportanceWeightedELBO(3)
        elbo.loss(fn, guide)
        pyro.set_rng_seed(2)
        found.append(elbo.log_weights(fn, guide).log_weights)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "kind", "problem"),
    [
        ({"plate_particles": {"rows": 3}}, ValueError, r"plates of the model, \['data'\], got 'rows'"),
        ({"plate_particles": {"data": 0}}, ValueError, r"plate_particles\['data'\] >= 1, got 0"),
        ({"plate_particles": {"data": 2.5}}, TypeError, r"plate_particles\['data'\] to be a whole number"),
        ({"plate_particles": 3}, TypeError, "dict from names of plates"),
        ({"plate_particles": "all"}, TypeError, "or 'auto', got 'all'"),
        ({"plate_particles": {1: 3}}, TypeError, "dict from names of plates"),
        ({"combine": True}, ValueError, "no plate has any"),
        ({"combine": 1, "plate_particles": {"data": 3}}, TypeError, "combine to be True or False"),
        (
            {"combine": True, "plate_particles": {"data": 3}},
            ValueError,
            r"site 'z' given latents outside",
        ),
    ],
)
def test_options_that_cannot_be(options, kind, problem):
    with pytest.raises(kind, match=problem):
        ImportanceWeightedELBO(2, **options).loss(*normals())


def test_a_guide_that_draws_outside_the_plate_raises():
    model, _ = normals()
    guide = AutoMultivariateNormal(model)
    with pytest.raises(ValueError, match=r"draw latents in plate 'data', got none, only sites \['z'\].*AutoNormal"):
        ImportanceWeightedELBO(2, plate_particles={"data": 3}).loss(model, guide)
    ImportanceWeightedELBO(2, plate_particles={"data": 3}).loss(model, AutoNormal(model))


# The posterior


@given(tree_programs(), st.sampled_from([None, False]), st.sampled_from([1, 2]))
@settings(max_examples=settings().max_examples // 10)
def test_trace_elbo_of_the_posterior_is_the_bound(program, vectorize, num_particles):
    """On the same draws: value and gradient."""
    note(program)
    pyro.clear_param_store()
    pyro.set_rng_seed(program.seed)
    options = {"plate_particles": program.plate_particles, "vectorize_particles": vectorize}
    elbo = ImportanceWeightedELBO(num_particles, **options)
    posterior = ImportanceResampledGuide(program.model, program.guide, num_particles, **options)
    elbo.loss(program.model, program.guide)
    posterior()
    found = []
    for loss in (
        lambda: elbo.differentiable_loss(program.model, program.guide),
        lambda: Trace_ELBO().differentiable_loss(program.model, posterior),
    ):
        pyro.set_rng_seed(program.seed + 1)
        found.append(torch.as_tensor(loss()))
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-8, abs=1e-8)
    single = num_particles == 1 and not program.plate_particles  # see above
    if found[0].requires_grad and not single:
        torch.testing.assert_close(gradients(found[1]), gradients(found[0]), rtol=1e-7, atol=1e-8)


def test_draws_are_those_of_the_posterior():
    """Many particles: global and local moments are exact, and every row has a particle of its own."""
    model, guide = normals()
    posterior = ImportanceResampledGuide(model, guide, 60, plate_particles={"data": 60})
    draws = posterior.sample(nightly(2000))
    variance = 1 / (1 + N / 2)
    mean = variance * DATA.sum() / 2
    assert_mean(draws["mu"], mean)
    assert_mean((draws["mu"] - mean) ** 2, variance)
    assert_mean(draws["z"], (DATA + mean) / 2)
    assert_mean((draws["z"] - (DATA + mean) / 2) ** 2, 0.5 + variance / 4)
    moments = torch.stack([posterior.expectation(lambda z: z["z"], num_batches=2) for _ in range(100)])
    assert_mean(moments, (DATA + mean) / 2)


EFFECTS = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2], dtype=torch.float64)
ERRORS = torch.tensor([1.5, 1.0, 1.6, 1.1, 0.9, 1.1, 1.0, 1.8], dtype=torch.float64)


def schools():
    """Eight schools, centred, and a guide that is wide and knows no funnel."""

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(0.5)))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)

    def guide():
        pyro.sample("mu", dist.Normal(torch.tensor(0.6), 0.5))
        pyro.sample("tau", dist.LogNormal(torch.tensor(-1.2), 1.2))
        with pyro.plate("schools", 8):
            pyro.sample("theta", dist.Normal(0.65 + 0.1 * EFFECTS, 0.7))

    return model, guide


def exact_schools():
    """Posterior moments by quadrature over mu and log tau; given these theta is Gaussian."""
    mu, log_tau = torch.meshgrid(torch.linspace(-5, 6, 500), torch.linspace(-12, 5, 1500), indexing="ij")
    tau = log_tau.exp().unsqueeze(-1)
    mu = mu.unsqueeze(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + dist.HalfCauchy(0.5).log_prob(tau) + tau.log()
    log_p = log_p.squeeze(-1) + dist.Normal(mu, (ERRORS**2 + tau**2).sqrt()).log_prob(EFFECTS).sum(-1)
    weights = (log_p - log_p.logsumexp((0, 1))).exp().unsqueeze(-1)
    variance = 1 / (ERRORS**-2 + tau**-2)
    mean = variance * (EFFECTS / ERRORS**2 + mu / tau**2)
    return {
        "mu": (weights * mu).sum((0, 1)),
        "mu²": (weights * mu**2).sum((0, 1)),
        "tau": (weights * tau).sum((0, 1)),
        "theta": (weights * mean).sum((0, 1)),
        "theta²": (weights * (variance + mean**2)).sum((0, 1)),
    }


def test_eight_schools_by_quadrature():
    model, guide = schools()
    posterior = ImportanceResampledGuide(model, guide, 400, plate_particles={"schools": 100})

    def moments(z):
        mu, tau = z["mu"].unsqueeze(-1), z["tau"].unsqueeze(-1)
        return torch.cat([mu, mu**2, tau, z["theta"], z["theta"] ** 2], -1)

    found = torch.stack([posterior.expectation(moments, num_batches=1) for _ in range(100)])
    assert_mean(found, torch.cat(list(exact_schools().values())))


COINS = torch.tensor([1.0, 2.5], dtype=torch.float64)
EVERY = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)  # g, c_1, c_2
VALUES = {"g": EVERY[:, 0], "c": EVERY[:, 1:]}


def small_coins():
    def model():
        g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("data", 2):
            c = pyro.sample("c", dist.Bernoulli(logits=1.5 * g - 0.5))
            pyro.sample("x", dist.Normal(2 * c + g, 1.0), obs=COINS)

    def guide():
        g = pyro.sample("g", dist.Bernoulli(0.6))
        with pyro.plate("data", 2):
            pyro.sample("c", dist.Bernoulli(logits=-0.4 + 0.7 * g))

    return model, guide


def density_by_enumeration(outer, inner):
    """q_EW at all eight values: over all that K = outer and M = inner particles can be, how often each is kept."""
    count = outer * (1 + 2 * inner)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)))
    g = every[:, :outer]
    c = every[:, outer:].reshape(-1, outer, 2, inner)
    given_g = g[..., None, None]
    log_q_g = dist.Bernoulli(0.6).log_prob(g)
    log_q_c = dist.Bernoulli(logits=-0.4 + 0.7 * given_g).log_prob(c)
    row = dist.Bernoulli(logits=1.5 * given_g - 0.5).log_prob(c)
    row = (row + dist.Normal(2 * c + given_g, 1.0).log_prob(COINS[:, None]) - log_q_c).exp()
    weights = (dist.Bernoulli(0.4).log_prob(g) - log_q_g).exp() * row.mean(-1).prod(-1)
    chance = (log_q_g.sum(-1) + log_q_c.sum((-1, -2, -3))).exp()
    kept, found = weights / weights.sum(-1, keepdim=True), []
    for value in EVERY:
        local = ((c == value[1:, None]) * row / row.sum(-1, keepdim=True)).sum(-1).prod(-1)
        found.append((chance * ((g == value[0]) * kept * local).sum(-1)).sum())
    return torch.stack(found)


@pytest.mark.parametrize("vectorize", [None, pytest.param(False, marks=pytest.mark.nightly)])
def test_log_density_is_that_of_the_draws(vectorize):
    posterior = ImportanceResampledGuide(*small_coins(), 2, plate_particles={"data": 3}, vectorize_particles=vectorize)
    exact = density_by_enumeration(2, 3)
    assert exact.sum().item() == pytest.approx(1.0)
    batches, repeats, count = (8, 100, nightly(4000)) if vectorize is None else (1, 100, 300)
    density = [posterior.log_density(VALUES, num_batches=batches).exp() for _ in range(repeats)]
    assert_mean(torch.stack(density), exact)
    draws = posterior.sample(count)
    number = (4 * draws["g"] + 2 * draws["c"][:, 0] + draws["c"][:, 1]).long()
    assert_frequencies(number.bincount(minlength=8), exact)


@pytest.mark.nightly
def test_the_interval_holds_the_elbo_of_the_posterior():
    model, guide = small_coins()
    posterior = ImportanceResampledGuide(model, guide, 2, plate_particles={"data": 2})
    log_q = density_by_enumeration(2, 2).log()
    rows = [poutine.condition(model, {"g": row[0], "c": row[1:]}) for row in EVERY]
    log_p = torch.stack([poutine.trace(row).get_trace().log_prob_sum() for row in rows])
    exact = (log_q.exp() * (log_p - log_q)).sum().item()
    interval = posterior.elbo_interval(num_batches=20, num_replicates=30)
    assert interval.lower - 5 * interval.lower_error < exact < interval.upper + 5 * interval.upper_error
    assert interval.upper - interval.lower < 0.05
    bound = values(ImportanceWeightedELBO(2, plate_particles={"data": 2}), model, guide, 2000)
    assert exact > bound.mean() + 5 * bound.std() / len(bound) ** 0.5  # strictly above, as it must be


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_interval_of_an_exact_posterior_is_the_evidence(num_batches):
    """Every weight is the evidence then, and both ends, to rounding: no seed, no tolerance."""
    x = torch.tensor([0.3, -1.0, 2.0])

    def model():
        g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        g = pyro.sample("g", dist.Normal(x.sum() / 5.0, 0.4**0.5))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal((g + x) / 2.0, 0.5**0.5))

    posterior = ImportanceResampledGuide(model, guide, 2, plate_particles={"data": 4})
    interval = posterior.elbo_interval(num_batches=num_batches, num_replicates=2)
    evidence = dist.MultivariateNormal(torch.zeros(3), 2.0 * torch.eye(3) + 1.0).log_prob(x)
    torch.testing.assert_close(torch.stack([interval.lower, interval.upper]), evidence.expand(2))


@pytest.mark.parametrize("joint", [False, True], ids=["by index", "joint guide"])
def test_a_posterior_whose_plates_have_no_particles_after_all(joint):
    """As many draws as the plate has elements, which could be taken for these."""
    model, _, guide = by_index()
    options = {"plate_particles": {"county": 4}}
    if joint:
        guide, options = AutoMultivariateNormal(model), {"plate_particles": "auto"}
        guide()
    found = []
    for plate_particles in (options, {}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = ImportanceResampledGuide(model, guide, 3, **plate_particles)
            posterior()
            pyro.set_rng_seed(1)
            draws = posterior.sample(3)
            density = [posterior.log_density(draws, num_batches=5).exp() for _ in range(100)]
            interval = posterior.elbo_interval(num_batches=4, num_replicates=4)
            handled = poutine.condition(posterior, {n: v[0] for n, v in draws.items()})
            poutine.trace(handled).get_trace()
        assert interval.lower.isfinite() and interval.upper.isfinite()
        found.append((draws, torch.stack(density)))
    (draws, density), (same, plain) = found
    assert all(bool((draws[n] == same[n]).all()) for n in draws)
    assert_same_mean(density, plain)


@pytest.mark.parametrize("row", [0, 5])
def test_a_replayed_posterior_keeps_its_books(row):
    """log q~ at values that a handler sets has companions of its own, whatever the posterior has drawn."""
    posterior = ImportanceResampledGuide(*small_coins(), 2, plate_particles={"data": 3})
    handled = poutine.condition(posterior, {n: v[row] for n, v in VALUES.items()})
    found = [poutine.trace(handled).get_trace().nodes["_importance_density_g"] for _ in range(nightly(400))]
    density = torch.stack([site["fn"].log_factor.exp() for site in found])
    assert_mean(density, density_by_enumeration(2, 3)[row])
