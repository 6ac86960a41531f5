# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""CompiledSVI takes the steps of SVI, on the same random numbers, with the optimiser in the recording."""

import copy
import inspect
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim.clipped_adam import ClippedAdam
from torch.distributions import constraints

from pyro_iwae import CompiledSVI, ImportanceWeightedELBO, StickTheLanding
from pyro_iwae import step as step_module
from tests.test_compiled import X, compiling, flat_guide, flat_model, parameters, recorded_only, walled_model

__all__ = ["compiling", "recorded_only"]  # fixtures


def per_parameter(name):
    return {"lr": 0.1 if "spread" in name else 0.01}


OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.02}),
    "Adam, decaying weights": lambda: pyro.optim.Adam({"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "Adam, amsgrad": lambda: pyro.optim.Adam({"lr": 0.02, "amsgrad": True, "eps": 1e-3}),
    "Adam, uphill": lambda: pyro.optim.Adam({"lr": 0.001, "maximize": True}),
    "Adam, by parameter": lambda: pyro.optim.Adam(per_parameter),
    "Adam, clipped norm": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 0.3}),
    "Adam, clipped value": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_value": 0.3}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
    "ClippedAdam, centred": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "centered_variance": True, "eps": 1e-2}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.01}),
    "SGD, momentum": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, nesterov": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "nesterov": True}),
}

if "centered_variance" not in inspect.signature(ClippedAdam).parameters:  # since Pyro 1.9.1
    del OPTIMISERS["ClippedAdam, centred"]


def state_of(optim):
    """Numbers that the optimiser keeps, by parameter."""
    return {
        name: [float(torch.as_tensor(v).sum()) for _, v in sorted(state["state"].get(0, {}).items()) if v is not None]
        + [state["param_groups"][0]["lr"]]
        for name, state in optim.get_state().items()
    }


def train(kind, make, steps, *, model=flat_model, guide=flat_guide, elbo=None, seed=5):
    pyro.clear_param_store()
    optim = make()
    svi = kind(model, guide, optim, elbo or ImportanceWeightedELBO(num_particles=4))
    svi.evaluate_loss(X)  # makes the parameters
    pyro.set_rng_seed(seed)
    losses = [svi.step(X + 0.1 * i) for i in range(steps)]
    return svi, losses, {n: p.detach().clone() for n, p in parameters().items()}, state_of(optim)


def assert_alike(found, expected):
    _, losses, params, state = found
    _, expected_losses, expected_params, expected_state = expected
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert params.keys() == expected_params.keys()
    for name, value in expected_params.items():
        torch.testing.assert_close(params[name], value, rtol=1e-4, atol=1e-5)
    assert state.keys() == expected_state.keys()
    for name, values in expected_state.items():
        assert state[name] == pytest.approx(values, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_steps_are_those_of_svi(optimiser):
    make = OPTIMISERS[optimiser]
    found = train(CompiledSVI, make, 12)
    assert_alike(found, train(SVI, make, 12))
    (step,) = found[0]._recorded.cache.recorded.values()
    assert step.calls == 12


@pytest.mark.parametrize("optimiser", ["Adam", "ClippedAdam", "SGD, momentum"])
def test_compiled_steps_are_those_of_svi(optimiser, compiling):
    test_steps_are_those_of_svi(optimiser)


@pytest.mark.parametrize("optimiser", ["Adam", "ClippedAdam", "SGD", "SGD, momentum"])
def test_training_is_handed_over(optimiser):
    """From SVI to CompiledSVI and back: the optimiser's state goes along, through a saved state, too."""
    expected = train(SVI, OPTIMISERS[optimiser], 9)
    pyro.clear_param_store()
    optim = OPTIMISERS[optimiser]()
    elbo = ImportanceWeightedELBO(num_particles=4)
    SVI(flat_model, flat_guide, optim, elbo).evaluate_loss(X)
    pyro.set_rng_seed(5)
    losses, turn = [], 0
    for kind in (SVI, CompiledSVI, SVI):
        svi = kind(flat_model, flat_guide, optim, elbo)
        for _ in range(3):
            losses.append(svi.step(X + 0.1 * turn))
            turn += 1
        state, optim = optim.get_state(), OPTIMISERS[optimiser]()
        optim.set_state(state)
    assert losses == pytest.approx(expected[1], rel=1e-4)
    for name, p in parameters().items():
        torch.testing.assert_close(p.detach(), expected[2][name], rtol=1e-4, atol=1e-5)


def test_run_is_many_steps(compiling, capsys):
    def fresh():
        pyro.clear_param_store()
        svi = CompiledSVI(flat_model, flat_guide, pyro.optim.Adam({"lr": 0.02}), ImportanceWeightedELBO(4))
        svi.evaluate_loss(X)
        pyro.set_rng_seed(5)
        return svi

    svi = fresh()
    losses = svi.run(120, X, progress=False)
    found = {n: p.detach().clone() for n, p in parameters().items()}
    assert capsys.readouterr().err == ""
    assert losses.shape == (120,) and losses.dtype == torch.float64
    svi = fresh()
    assert [svi.step(X) for _ in range(120)] == losses.tolist()
    for name, p in parameters().items():
        assert torch.equal(p, found[name])
    svi.run(60, X)
    assert "loss=" in capsys.readouterr().err
    (state,) = {s["state"][0]["step"].item() for s in svi.optim.get_state().values()}
    assert state == 180


def test_run_is_compared_with_the_model(monkeypatch):
    monkeypatch.setattr(step_module, "CHECKS", (3,))
    weight = [1.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, weight[0]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = CompiledSVI(model, flat_guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(4))
    svi.run(2, X, progress=False)
    weight[0] = 1.01
    before = {n: p.detach().clone() for n, p in parameters().items()}
    with pytest.raises(RuntimeError, match=r"recapture\(\)"):
        svi.run(5, X, progress=False)
    assert any(not torch.equal(p, before[n]) for n, p in parameters().items()), "one step was taken"
    svi.recapture()
    svi.run(5, X, progress=False)


def test_a_comparison_leaves_no_trace(monkeypatch):
    runs = []
    for checks in ((), (2, 3, 5)):
        monkeypatch.setattr(step_module, "CHECKS", checks)
        runs.append(train(CompiledSVI, OPTIMISERS["Adam"], 8))
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][2].items():
        assert torch.equal(value, runs[1][2][name])


def test_minibatches_are_drawn_anew():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(0.5 * x[index], 0.7**0.5))

    x = torch.tensor([0.0, 100.0, 200.0, 300.0])
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 1e-9}), ImportanceWeightedELBO(4))
    losses = svi.run(100, x, progress=False)
    assert len({round(v, -2) for v in losses.tolist()}) > 4


def test_parameters_without_a_message_stay():
    weight = torch.nn.Parameter(torch.tensor(0.5))  # nobody has told Pyro

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(weight, 1.0)), 1.0), obs=x)

    svi = CompiledSVI(model, flat_guide, pyro.optim.Adam({"lr": 0.1}), ImportanceWeightedELBO(4))
    svi.run(3, X, progress=False)
    assert weight.item() == 0.5
    assert pyro.param("slope").item() != pytest.approx(0.4)


def test_faults_leave_the_parameters_alone():
    make = OPTIMISERS["Adam"]
    svi, *_ = train(CompiledSVI, make, 3)
    before, state = {n: p.detach().clone() for n, p in parameters().items()}, state_of(svi.optim)
    bad = torch.tensor([0.1, math.nan, 0.2, 0.3])
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN at"):
        svi.step(bad)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN at"):
        svi.run(3, bad, progress=False)
    for name, p in parameters().items():
        assert torch.equal(p.detach(), before[name])
    assert state_of(svi.optim) == state
    svi.step(X)


def test_steps_that_the_recording_does_not_hold_for_are_taken_by_the_model():
    """Where all particles of an element are impossible, the step is that of SVI, warning and all, and it goes on."""
    walls = [-1.0, -1.0, 100.0, -1.0, 100.0, -1.0, -1.0]
    results = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        optim = OPTIMISERS["Adam"]()
        svi = kind(walled_model, flat_guide, optim, ImportanceWeightedELBO(8))
        svi.evaluate_loss(-X.abs() - 1.0)
        pyro.set_rng_seed(5)
        losses = []
        for wall in walls:
            x = -X.abs() - 1.0
            x[0] = wall
            if wall > 0.0:
                with pytest.warns(UserWarning, match="particles are impossible"):
                    losses.append(svi.step(x))
            else:
                losses.append(svi.step(x))
        results.append((svi, losses, {n: p.detach().clone() for n, p in parameters().items()}, state_of(optim)))
    assert results[1][1].count(math.inf) == 2
    assert_alike(results[1], results[0])


def test_new_numbers_of_the_optimiser_are_recorded_anew():
    svi, *_ = train(CompiledSVI, OPTIMISERS["SGD"], 2)
    before = pyro.param("slope").item()
    for state in svi.optim.optim_objs.values():
        state.param_groups[0]["lr"] = 0.0
    svi.step(X)
    assert pyro.param("slope").item() == before


@pytest.mark.nightly
def test_eight_schools_ends_where_svi_ends(compiling):
    """Mean loss and parameters after training, autoguide and all."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    results = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        svi = kind(model, guide, OPTIMISERS["Adam"](), ImportanceWeightedELBO(16, gradient=StickTheLanding()))
        svi.evaluate_loss(sigma, y)
        pyro.set_rng_seed(1)
        losses = [svi.step(sigma, y) for _ in range(100)]
        results.append((losses, guide.median(sigma, y)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-3, atol=1e-3)


def test_wrong_arguments_are_refused():
    elbo = ImportanceWeightedELBO(4)
    with pytest.raises(TypeError, match=r"expected optim.*got RMSprop.*compile=True"):
        CompiledSVI(flat_model, flat_guide, pyro.optim.RMSprop({"lr": 0.1}), elbo)
    with pytest.raises(TypeError, match="compile=True"):
        CompiledSVI(flat_model, flat_guide, torch.optim.Adam([torch.zeros(1)]), elbo)
    with pytest.raises(TypeError, match="expected loss"):
        CompiledSVI(flat_model, flat_guide, OPTIMISERS["Adam"](), Trace_ELBO())
    with pytest.raises(TypeError, match="callable"):
        CompiledSVI(None, flat_guide, OPTIMISERS["Adam"](), elbo)
    with pytest.raises(ValueError, match="chunk_size=2"):
        CompiledSVI(flat_model, flat_guide, OPTIMISERS["Adam"](), ImportanceWeightedELBO(4, chunk_size=2))
    with pytest.raises(ValueError, match="chunk_size=2"):
        ImportanceWeightedELBO(4, chunk_size=2, compile=True)
    svi = CompiledSVI(flat_model, flat_guide, OPTIMISERS["Adam"](), elbo)
    with pytest.raises(ValueError, match="num_steps"):
        svi.run(0, X)
    pyro.param("unused", torch.tensor(1.0), constraint=constraints.positive)
    assert svi.evaluate_loss(X) > 0.0


def shared_training(kinds, optimiser):
    """Steps of several objects in turn, on one optimiser."""
    pyro.clear_param_store()
    optim, elbo = OPTIMISERS[optimiser](), ImportanceWeightedELBO(num_particles=4)
    elbo.loss(flat_model, flat_guide, X)
    svis = [kind(flat_model, flat_guide, optim, elbo) for kind in kinds]
    pyro.set_rng_seed(5)
    losses = [svis[i % len(svis)].step(X) for i in range(9)]
    return svis, losses, {n: p.detach().clone() for n, p in parameters().items()}, state_of(optim)


@pytest.mark.parametrize("optimiser", ["Adam", "ClippedAdam", "SGD, momentum"])
@pytest.mark.parametrize("kinds", [(CompiledSVI, CompiledSVI), (CompiledSVI, SVI), (SVI, CompiledSVI, CompiledSVI)])
def test_an_optimiser_is_shared(kinds, optimiser):
    assert_alike(shared_training(kinds, optimiser), shared_training((SVI,), optimiser))


@pytest.mark.parametrize("way", ["loaded", "cleared"])
def test_an_optimiser_whose_state_is_replaced_is_seen(way):
    results = []
    for kind in (SVI, CompiledSVI):
        svi, *_ = train(kind, OPTIMISERS["Adam"], 4)
        for p, optimizer in list(svi.optim.optim_objs.items()):
            if way == "loaded":
                state = optimizer.state_dict()
                state["state"][0]["exp_avg"] = torch.full_like(p.detach(), 0.5)
                optimizer.load_state_dict(state)
            else:
                del svi.optim.optim_objs[p]
        losses = [svi.step(X) for _ in range(3)]
        results.append((svi, losses, {n: p.detach().clone() for n, p in parameters().items()}, state_of(svi.optim)))
    assert_alike(results[1], results[0])


def test_options_of_the_loss_are_those_of_now():
    elbo = ImportanceWeightedELBO(num_particles=1)
    svi = CompiledSVI(flat_model, flat_guide, pyro.optim.SGD({"lr": 1e-9}), elbo)
    wide = svi.run(30, X, progress=False).std()
    elbo.num_particles = 500
    assert svi.run(30, X, progress=False).std() < 0.3 * wide
    with pytest.raises(AttributeError):
        svi.loss = elbo


def test_what_cannot_be_in_the_graph_is_refused():
    elbo = ImportanceWeightedELBO(4)
    schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1})
    with pytest.raises(TypeError, match="scheduler"):
        CompiledSVI(flat_model, flat_guide, schedule, elbo)
    elbo.loss(flat_model, flat_guide, X)
    handle = pyro.param("slope").unconstrained().register_hook(lambda g: g)
    with pytest.raises(NotImplementedError, match="gradient hook"):
        CompiledSVI(flat_model, flat_guide, OPTIMISERS["Adam"](), elbo).step(X)
    handle.remove()


@pytest.mark.parametrize("change", [("SGD", "momentum", 0.9), ("Adam", "amsgrad", True)])
def test_numbers_that_have_the_optimiser_keep_more(change):
    """A momentum that begins, a maximum that is kept from now on."""
    name, option, value = change
    results = {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        optim = getattr(pyro.optim, name)({"lr": 0.01})
        svi = kind(flat_model, flat_guide, optim, ImportanceWeightedELBO(num_particles=4))
        svi.evaluate_loss(X)
        pyro.set_rng_seed(3)
        losses = [svi.step(X) for _ in range(3)]
        for optimizer in optim.optim_objs.values():
            optimizer.param_groups[0][option] = value
            for state in optimizer.state.values():
                if option == "amsgrad":  # torch makes it before the first step alone
                    state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        losses += [svi.step(X) for _ in range(4)]
        results[kind] = losses, {n: p.detach().clone() for n, p in parameters().items()}
    assert results[CompiledSVI][0] == pytest.approx(results[SVI][0], rel=1e-4)
    for found, expected in zip(results[CompiledSVI][1].values(), results[SVI][1].values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_copies_have_options_of_their_own():
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CompiledSVI(flat_model, flat_guide, optim, ImportanceWeightedELBO(num_particles=2))
    for copied in (copy.deepcopy(svi), pickle.loads(pickle.dumps(svi))):
        copied.loss.num_particles = 7
        pyro.set_rng_seed(3)
        expected = ImportanceWeightedELBO(num_particles=7).loss(flat_model, flat_guide, X)
        pyro.set_rng_seed(3)
        assert copied.step(X) == pytest.approx(expected, rel=1e-5)
    assert svi.loss.num_particles == 2


def test_chunks_are_refused_when_they_are_asked_for_later():
    svi = CompiledSVI(flat_model, flat_guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(num_particles=4))
    svi.loss.chunk_size = 2
    with pytest.raises(ValueError, match="chunk_size=2"):
        svi.step(X)
