# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A run that is broken off and goes on from its checkpoint ends with the very parameters of an unbroken one."""

import hashlib
import io
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.nn.functional import softplus

from pyro_iwae import CompiledSVI, ImportanceWeightedELBO
from pyro_iwae import checkpoint as module_under_test
from pyro_iwae.checkpoint import Checkpoint
from tests.ranks import OTHERS
from tests.test_compiled import compiling, recorded_only

__all__ = ["compiling", "recorded_only"]  # fixtures

STEPS = 6
X = torch.tensor([0.3, -1.2, 2.0, 0.7])
ROWS = torch.linspace(-1.0, 1.0, 24).reshape(8, 3)


# Runs, made anew by each call: what is saved, the model's arguments, one step


def run_of(args, step, **parts):
    return SimpleNamespace(args=args, step=step, parts=parts)


def by_svi(model, guide, optim, *args, kind=SVI, loss=None, after=lambda: None, **further):
    svi = kind(model, guide, optim, loss or ImportanceWeightedELBO(num_particles=4))

    def step(i):
        svi.step(*args)
        after()

    return run_of(args, step, model=model, guide=guide, optim=optim, **further)


def plain_model(x):
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    chol = pyro.param("chol", 0.5 * torch.eye(2), constraint=constraints.lower_cholesky)
    shift = pyro.sample("shift", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shift.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(z * weights[..., 0] + weights[..., 1], scale), obs=x)


def plain_guide(x):
    slope, spread = pyro.param("slope", torch.tensor(0.4)), pyro.param("spread", torch.tensor(-0.3))
    tril = pyro.param("tril", torch.eye(2), constraint=constraints.softplus_lower_cholesky)
    pyro.sample("shift", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, spread.exp()))


def flat_model(x):
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def flat_guide(x):
    slope, spread = pyro.param("slope", torch.tensor(0.4)), pyro.param("spread", torch.tensor(-0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, spread.exp()))


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.8), constraints.positive)
        self.bias = nn.Parameter(torch.tensor(0.1))
        self.linear = PyroModule[nn.Linear](1, 1)

    def forward(self, x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = pyro.sample("offset", dist.Normal(self.bias, 1.0))
        mean = slope * self.linear(x[:, None])[:, 0] + offset
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, self.scale), obs=x)


class VAE(nn.Module):
    """Model and guide are its methods; batch normalisation counts, dropout draws."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, spread = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(spread)).to_event(1))


def plain_functions():
    return by_svi(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.05}), X)


def auto_normal():
    model = Regression()
    return by_svi(model, AutoNormal(model), pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}), X)


def auto_low_rank():
    model = Regression()
    return by_svi(model, AutoLowRankMultivariateNormal(model, rank=1), pyro.optim.AdamW({"lr": 0.05}), X)


def registered_module():
    """Functions, and a module that only the param store and ``further`` know."""
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

    optim = pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
    return by_svi(flat_model, guide, optim, X, loss=Trace_ELBO(num_particles=2), further={"net": net})


def registered_by_name():
    """Functions and a module; of its parameters, the names in the param store are all that is known."""
    net = nn.Linear(1, 1)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

    optim = pyro.optim.Adam(lambda name: {"lr": 0.1 if "weight" in name else 0.01})
    return by_svi(flat_model, guide, optim, X)


def hidden_module():
    """A function that calls a PyroModule, whose parameters have names like any others in the param store."""
    inner = Regression()
    return by_svi(lambda x: inner(x), hidden_guide, pyro.optim.SGD({"lr": 0.05}, {"clip_value": 0.1}), X)


def hidden_guide(x):
    for name in ("slope", "offset"):
        pyro.sample(name, dist.Normal(pyro.param(name + " loc", torch.zeros(())), 0.5))


def methods_of_a_module():
    vae, optim = VAE(), pyro.optim.Adam({"lr": 0.01})
    svi = SVI(vae.model, vae.guide, optim, Trace_ELBO(num_particles=2))
    return run_of((ROWS,), lambda i: svi.step(ROWS), model=vae.model, guide=vae.guide, optim=optim)


def wrapped_methods():
    vae, optim = VAE(), pyro.optim.Adam({"lr": 0.01})
    model = poutine.scale(vae.model, scale=0.1)
    svi = SVI(model, vae.guide, optim, Trace_ELBO(num_particles=2))
    return run_of((ROWS,), lambda i: svi.step(ROWS), model=model, guide=vae.guide, optim=optim)


def lazy_module():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy = nn.LazyLinear(3)

        def forward(self, x):
            loc = self.lazy(x)
            pyro.module("lazy", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return by_svi(model, Lazy(), pyro.optim.Adam({"lr": 0.01}), ROWS)


def scheduled_before():
    """A Pyro scheduler, stepped before the optimiser in each round: it must be there before the first."""
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    svi = SVI(plain_model, plain_guide, optim, ImportanceWeightedELBO(num_particles=4))

    def step(i):
        if i:
            optim.step()
        svi.step(X)

    return run_of((X,), step, model=plain_model, guide=plain_guide, optim=optim)


def scheduled_after():
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.7})
    return by_svi(plain_model, plain_guide, optim, X, after=optim.step)


def torch_optimiser():
    model = Regression()
    elbo = ImportanceWeightedELBO(8)(model, AutoNormal(model))
    elbo(X)  # makes the guide's parameters
    optim = torch.optim.Adam(elbo.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=STEPS)

    def step(i):
        optim.zero_grad()
        elbo(X).backward()
        optim.step()
        scheduler.step()

    return run_of((X,), step, model=model, guide=elbo.guide, optim=optim, further={"scheduler": scheduler})


def compiled():
    return by_svi(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.05}), X, kind=CompiledSVI)


def compiled_module():
    model = Regression()
    return by_svi(model, AutoNormal(model), pyro.optim.ClippedAdam({"lr": 0.05}), X, kind=CompiledSVI)


def compiled_momentum():
    return by_svi(flat_model, flat_guide, pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}), X, kind=CompiledSVI)


def minibatches():
    """A subsampled plate, numpy's and Python's random numbers."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])

    guide, optim = AutoNormal(model), pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optim, ImportanceWeightedELBO(num_particles=1))
    return run_of((X,), lambda i: svi.step(X + random.gauss(0, 1) + np.random.randn()), guide=guide, optim=optim)


RUNS = [
    plain_functions,
    auto_normal,
    auto_low_rank,
    registered_module,
    registered_by_name,
    hidden_module,
    methods_of_a_module,
    wrapped_methods,
    lazy_module,
    scheduled_before,
    scheduled_after,
    torch_optimiser,
    compiled,
    compiled_module,
    compiled_momentum,
    minibatches,
]


def everything(run):
    """Parameters, buffers, and the next random numbers: by name."""
    found = {f"store {n}": p for n, p in pyro.get_param_store().named_parameters()}
    programs = {name: run.parts.get(name) for name in ("model", "guide")}
    modules = {n: poutine.unwrap(p) for n, p in programs.items()} | run.parts.get("further", {})
    for part, program in modules.items():
        module = getattr(program, "__self__", program)
        if isinstance(module, nn.Module):
            found |= {f"{part} {n}": v for n, v in module.state_dict().items()}
    drawn = {"torch": torch.rand(()), "numpy": torch.tensor(np.random.rand()), "random": torch.tensor(random.random())}
    return {n: v.detach().clone() for n, v in found.items()} | drawn


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [n for n, v in expected.items() if not torch.equal(found[n], v)]
    assert not different, f"not bitwise the same: {different}"


def begin(make, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return make()


def unbroken(make, steps=STEPS):
    run = begin(make, 1)
    for i in range(steps):
        run.step(i)
    return everything(run)


def broken_off(make, path, stop):
    run = begin(make, 1)
    for i in range(stop):
        run.step(i)
    checkpoint = Checkpoint(path, **run.parts)
    checkpoint.save(stop)
    return run, checkpoint


def resumed(make, path, steps=STEPS):
    run = begin(make, 2)
    start = Checkpoint(path, **run.parts).load(*run.args)
    for i in range(start, steps):
        run.step(i)
    return start, everything(run)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


@pytest.mark.parametrize("make", RUNS, ids=lambda make: make.__name__)
def test_a_resumed_run_ends_as_an_unbroken_one(make, path):
    stop = int(torch.randint(2, STEPS, ()))
    expected = unbroken(make)
    run, _ = broken_off(make, path, stop)
    for i in range(stop, STEPS):
        run.step(i)
    assert_same(everything(run), expected)  # saving changes nothing
    start, found = resumed(make, path)
    assert start == stop
    assert_same(found, expected)


def test_parameters_that_the_store_never_sees(path):
    with pyro.settings.context(module_local_params=True):
        test_a_resumed_run_ends_as_an_unbroken_one(torch_optimiser, path)
        assert len(pyro.get_param_store()) == 0


@pytest.mark.nightly
def test_a_compiled_run_is_resumed(compiling, path):
    run, _ = broken_off(compiled_momentum, path, 3)
    for i in range(3, STEPS):
        run.step(i)
    expected = everything(run)
    assert_same(resumed(compiled_momentum, path)[1], expected)


@pytest.mark.parametrize("make", [plain_functions, methods_of_a_module, torch_optimiser, scheduled_before, compiled])
def test_going_back_within_a_run(make, path):
    """Loading goes into the tensors that optimisers and recordings hold, and into the optimisers that are there."""
    expected = unbroken(make)
    run, checkpoint = broken_off(make, path, 3)
    for i in range(3, 5):
        run.step(i)
    before = dict(pyro.get_param_store().named_parameters())
    assert checkpoint.load(*run.args) == 3
    assert all(p is before[n] for n, p in pyro.get_param_store().named_parameters())
    for i in range(3, STEPS):
        run.step(i)
    assert_same(everything(run), expected)


def test_going_back_to_before_the_first_step(path):
    run = begin(plain_functions, 1)
    plain_guide(X), plain_model(X)
    state = torch.get_rng_state()
    checkpoint = Checkpoint(path, **run.parts)
    checkpoint.save(0)
    for i in range(3):
        run.step(i)
    first = everything(run)
    assert checkpoint.load(X) == 0
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(3):
        run.step(i)
    assert_same(everything(run), first)


def test_saved_again_and_again(path):
    """Broken off after every step."""
    expected = unbroken(auto_normal)
    broken_off(auto_normal, path, 1)
    for steps in range(2, STEPS + 1):
        run = begin(auto_normal, steps)
        checkpoint = Checkpoint(path, **run.parts)
        assert checkpoint.load(*run.args) == steps - 1
        run.step(steps - 1)
        checkpoint.save(steps)
    assert_same(everything(run), expected)


def test_without_a_file_nothing_happens(path):
    calls = []
    run = begin(auto_normal, 1)
    before = everything(run)
    pyro.set_rng_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    checkpoint = Checkpoint(path, model=lambda x: calls.append(x), guide=run.parts["guide"], optim=run.parts["optim"])
    assert checkpoint.load(X) == 0
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert calls == [] and len(pyro.get_param_store()) == 0 and not path.exists()
    assert {n for n in everything(run)} == set(before)


def test_a_load_leaves_no_trace(path):
    run, _ = broken_off(methods_of_a_module, path, 2)
    vae = run.parts["model"].__self__
    expected = {n: v.clone() for n, v in vae.state_dict().items()}
    run = begin(methods_of_a_module, 2)
    vae = run.parts["model"].__self__.eval()
    vae.decoder.train()
    with poutine.trace() as outer:
        Checkpoint(path, **run.parts).load(ROWS)
    assert not [n for n in outer.trace.nodes if n not in ("_INPUT", "_RETURN")]
    assert all(torch.equal(v, expected[n]) for n, v in vae.state_dict().items())
    assert [m.training for m in (vae, vae.encoder, vae.decoder)] == [False, False, True]
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())


def test_buffers_of_modules_that_are_not_saved_stay(path):
    """A module that a function calls unbeknown counts no batch when the function is run to make its parameters."""
    net = nn.BatchNorm1d(1)

    def guide(x):
        net(x[:, None])

    checkpoint = Checkpoint(path, guide=guide)
    checkpoint.save(1)
    checkpoint.load(X)
    assert net.num_batches_tracked == 0


def test_parameters_that_the_set_up_does_not_make(path):
    """They are made, with their constraints, so that the program gets them when it asks."""
    pyro.param("late", torch.tensor(0.25), constraint=constraints.interval(0.0, 0.5))
    expected = pyro.get_param_store()._params["late"].detach().clone()
    Checkpoint(path).save(1)
    pyro.clear_param_store()
    Checkpoint(path).load()
    found = pyro.param("late", torch.tensor(0.1), constraint=constraints.interval(0.0, 0.5))
    assert torch.equal(found.unconstrained(), expected) and found.unconstrained().requires_grad
    assert found.item() == 0.25
    assert pyro.get_param_store().param_name(found.unconstrained()) == "late"


def test_parameters_put_in_place_of_others(path):
    """What somebody has set anew is another tensor; the optimiser of the old one goes unsaved."""
    run = begin(plain_functions, 1)
    run.step(0)
    pyro.get_param_store()["slope"] = torch.tensor(2.0)
    Checkpoint(path, **run.parts).save(1)
    for i in range(1, STEPS):
        run.step(i)
    expected = everything(run)
    assert_same(resumed(plain_functions, path)[1], expected)


CONSTRAINTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "interval": constraints.interval(-1.0, 2.5),
    "interval of tensors": constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])),
    "interval of numpy": constraints.interval(np.float64(0.0), np.float32(1.0)),
    "greater than": constraints.greater_than(torch.tensor([0.5, 1.5])),
    "less than": constraints.less_than(3),
    "half open": constraints.half_open_interval(0, 2),
    "unit": constraints.unit_interval,
    "independent": constraints.independent(constraints.positive, 1),
    "independent twice": constraints.independent(constraints.independent(constraints.less_than(1.0), 1), 1),
    "simplex": constraints.simplex,
    "lower cholesky": constraints.lower_cholesky,
    "corr cholesky": constraints.corr_cholesky,
    "positive definite": constraints.positive_definite,
    "softplus positive": constraints.softplus_positive,
    "softplus lower cholesky": constraints.softplus_lower_cholesky,
    "unit lower cholesky": constraints.unit_lower_cholesky,
    "ordered": constraints.ordered_vector,
    "sphere": constraints.sphere,
    "cat": constraints.cat([constraints.positive, constraints.real], dim=-1, lengths=[1, 2]),
    "stack": constraints.stack([constraints.positive, constraints.unit_interval], dim=-1),
}


def alike(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, constraints.Constraint):
        ours, theirs = vars(a), vars(b)
        return type(a) is type(b) and ours.keys() == theirs.keys() and all(alike(v, theirs[n]) for n, v in ours.items())
    return a == b


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("known", [True, False])
def test_constraints_come_back(name, known, path):
    expected, store = CONSTRAINTS[name], pyro.get_param_store()
    value = torch.randn(3, 3, requires_grad=True)
    store.set_state({"params": {"p": value}, "constraints": {"p": expected}})
    Checkpoint(path).save(0)
    pyro.clear_param_store()
    if known:
        other = torch.zeros(3, 3, requires_grad=True)
        store.set_state({"params": {"p": other}, "constraints": {"p": expected}})
    Checkpoint(path).load()
    assert torch.equal(store._params["p"], value)
    assert alike(store._constraints["p"], expected)


def test_bounds_are_those_of_the_file(path):
    pyro.param("p", torch.tensor(1.0), constraint=constraints.greater_than(torch.tensor(0.5)))
    Checkpoint(path).save(0)
    pyro.clear_param_store()
    pyro.param("p", torch.tensor(9.0), constraint=constraints.greater_than(torch.tensor(7.0)))
    Checkpoint(path).load()
    torch.testing.assert_close(pyro.param("p"), torch.tensor(1.0))


# The file


def test_a_damaged_file_is_refused(path):
    run, checkpoint = broken_off(plain_functions, path, 2)
    whole = path.read_bytes()
    payload = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    cuts = [0, 1, 10, payload - 30, payload - 1, payload, payload + 1, len(whole) // 2, len(whole) - 1]
    places = [*range(payload), *torch.randint(payload, len(whole), (100,)).tolist(), len(whole) - 1]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in places]
    damaged += [whole + b"\n", whole[payload:], b"another file\n" * 100]
    before, state = everything(run), torch.get_rng_state()
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut short, altered or something else") as caught:
            checkpoint.load(X)
        assert str(path) in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
    after = everything(run)
    assert all(torch.equal(after[n], v) for n, v in before.items() if n.startswith("store"))
    path.write_bytes(whole)
    assert checkpoint.load(X) == 2


def sealed(payload):
    return module_under_test.HEADER + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bang",)


def test_code_in_a_file_is_not_run(path, monkeypatch):
    """Even where somebody has computed the checksum."""
    monkeypatch.chdir(path.parent)
    zipped = io.BytesIO()
    torch.save({"step": 1, "states": {}, "params": {}, "random": [Bomb()]}, zipped)
    for payload in (pickle.dumps(Bomb()), zipped.getvalue(), b"", pickle.dumps([1, 2])):
        path.write_bytes(sealed(payload))
        with pytest.raises(ValueError, match="cut short, altered or something else"):
            Checkpoint(path).load()
    assert not (path.parent / "bang").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(zipped.getvalue()), weights_only=True)
    pickle.loads(pickle.dumps(Bomb()))  # so it would have
    assert (path.parent / "bang").exists()


def test_a_constraint_is_none_but_a_constraint(path):
    for kind in ("Constraint.__init__", "torch", "_DependentProperty"):
        payload = io.BytesIO()
        entry = {"value": torch.zeros(()), "constraint": {"constraint": kind}, "device": "cpu", "module": False}
        state = {"step": 1, "states": {}, "params": {"p": entry}, "random": []}
        torch.save(state, payload)
        path.write_bytes(sealed(payload.getvalue()))
        with pytest.raises(ValueError, match="expected a constraint of pyro.distributions.constraints"):
            Checkpoint(path).load()


def test_the_file_is_of_plain_values(path):
    broken_off(scheduled_after, path, 2)
    header, digest, payload = path.read_bytes().split(b"\n", 2)
    assert header == b"pyro_iwae checkpoint 1" and digest == hashlib.sha256(payload).hexdigest().encode()
    with zipfile.ZipFile(io.BytesIO(payload)) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        named = {c.split("\n")[0] for c in file.read(name).decode("latin1").split("c") if "\n" in c}
    assert not [n for n in named if n.startswith(("numpy", "pyro"))]
    assert torch.load(io.BytesIO(payload), weights_only=True)["step"] == 2


def test_parameters_of_a_module_are_saved_once(path):
    broken_off(methods_of_a_module, path, 1)
    saved = torch.load(io.BytesIO(path.read_bytes().split(b"\n", 2)[2]), weights_only=True)
    assert saved["params"] == {}
    assert saved["states"].keys() == {"model", "optim"}  # the guide is a method of the same


class Stop(BaseException):
    pass


@pytest.mark.parametrize("place", ["fsync", "replace", "chmod"])
def test_a_save_that_is_broken_off_leaves_the_old_file(place, path, monkeypatch):
    run, checkpoint = broken_off(plain_functions, path, 2)
    whole = path.read_bytes()

    def fail(*args):
        raise Stop

    run.step(2)
    with monkeypatch.context() as patched:
        patched.setattr(os, place, fail)
        with pytest.raises(Stop):
            checkpoint.save(3)
    assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]
    checkpoint.save(3)
    assert checkpoint.load(X) == 3 and os.listdir(path.parent) == [path.name]


KILLED = """
import os, sys, pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro_iwae import ImportanceWeightedELBO
from pyro_iwae.checkpoint import Checkpoint

def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

x, guide, optim = torch.tensor([1.0, 2.0]), AutoNormal(model), pyro.optim.Adam({"lr": 0.05})
checkpoint = Checkpoint(sys.argv[1], model=model, guide=guide, optim=optim)
pyro.set_rng_seed(0)
start = checkpoint.load(x)
svi = SVI(model, guide, optim, ImportanceWeightedELBO(num_particles=4))
for step in range(start, 20):
    svi.step(x)
    checkpoint.save(step + 1)
    if step + 1 == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
print({n: p.tolist() for n, p in pyro.get_param_store().named_parameters()})
"""


def test_a_killed_process_goes_on(tmp_path, monkeypatch, capsys):
    def start(name, until):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), str(until)]
        return subprocess.run(command, capture_output=True, text=True)

    assert start("broken", 7).returncode == -signal.SIGKILL
    found = start("broken", 0)
    assert found.returncode == 0, found.stderr
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "whole"), "0"])
    exec(KILLED, {})
    assert capsys.readouterr().out == found.stdout


def test_mode_of_the_file(path):
    before = os.umask(0o027)
    try:
        Checkpoint(path).save(0)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_cuda_states(path, monkeypatch):
    """Those of the devices that are there; without a GPU, as far as it can be seen."""
    states = [torch.full((16,), i, dtype=torch.uint8) for i in range(3)]
    monkeypatch.setattr(module_under_test, "get_random_state", lambda real=module_under_test.get_random_state: (
        real()[0], (real()[1][0], states)
    ))  # fmt: skip
    Checkpoint(path).save(1)
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", seen.extend)
    Checkpoint(path).load()
    assert [s.tolist() for s in seen] == [s.tolist() for s in states[:2]]


# Errors


def test_wrong_arguments(path):
    for wrong, message in [
        ({"model": 3}, r"expected model to be callable .* got 3; write model="),
        ({"guide": "guide"}, r"expected guide to be callable .* got 'guide'; write guide="),
        ({"optim": 0.1}, r"expected optim to be a pyro.optim .* got 0.1; write for example optim="),
        ({"optim": torch.optim.Adam}, r"expected optim to be a pyro.optim .* got <class 'torch.optim"),
        ({"further": [1]}, r"expected further to map names to objects, got \[1\]; write further="),
        ({"further": {1: nn.Linear(1, 1)}}, r"expected further to map names to objects"),
        ({"further": {"rate": None}}, r"expected further\['rate'\] to be .* got None"),
        ({"further": {"rate": 0.5}}, r"expected further\['rate'\] to be .* state_dict\(\).* got 0.5; write"),
    ]:
        with pytest.raises(TypeError, match=message):
            Checkpoint(path, **wrong)
    with pytest.raises(ValueError, match="expected torch.distributed to be set up before process_group="):
        Checkpoint(path, process_group="gloo")
    with pytest.raises(TypeError, match="expected step to be a whole number, got 1.5; write"):
        Checkpoint(path).save(1.5)
    with pytest.raises(ValueError, match="expected step >= 0, got -1"):
        Checkpoint(path).save(-1)
    with pytest.raises(FileNotFoundError, match="expected a folder for .*; create it"):
        Checkpoint(path / "none" / "run.ckpt").load()
    assert os.listdir(path.parent) == []


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Mine(constraints.Constraint):
    event_dim = 0


class MyOptim(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "strange": Holder(1)}


class MyModule(nn.Module):
    def get_extra_state(self):
        return Holder(1)

    def forward(self):
        pass


@pytest.mark.parametrize("state", [Holder(1), np.float64(1.0), np.arange(3), open, lambda: 0, [{"a": Holder(1)}]])
def test_states_that_could_not_be_read_again(state, path):
    with pytest.raises(TypeError, match=r"expected the state of further\['odd'\] to be of tensors.*; write a state"):
        Checkpoint(path, further={"fine": Holder(1), "odd": Holder({"state": state})}).save(1)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("part", ["model", "guide", "optim"])
def test_the_part_that_could_not_be_read_again_is_named(part, path):
    net = MyModule() if part != "optim" else nn.Linear(1, 1)
    odd = net if part != "optim" else MyOptim(net.parameters(), lr=0.1)
    parts = {"further": {"net": net}} if part == "optim" else {}
    with pytest.raises(TypeError, match=f"expected the state of {part} to be of tensors"):
        Checkpoint(path, **{part: odd}, **parts).save(1)
    assert os.listdir(path.parent) == []


def test_states_that_can_be_read_again(path):
    sparse = torch.eye(3).to_sparse()
    state = {"sparse": sparse, "numbers": (1, 2.5, None, True, 2**80), "names": ["a"], 3: {"nested": torch.ones(2)}}
    checkpoint = Checkpoint(path, further={"odd": Holder(state)})
    checkpoint.save(1)
    checkpoint._holders["further['odd']"].state = None
    checkpoint.load()
    found = checkpoint._holders["further['odd']"].state
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
    assert found["numbers"] == state["numbers"] and found["names"] == ["a"]
    assert torch.equal(found[3]["nested"], torch.ones(2))


@pytest.mark.parametrize("constraint", [Mine(), constraints.greater_than(Holder(1)), constraints.dependent])
def test_constraints_that_could_not_be_read_again(constraint, path):
    value = torch.zeros((), requires_grad=True)
    pyro.get_param_store().set_state({"params": {"odd": value}, "constraints": {"odd": constraint}})
    with pytest.raises(TypeError, match="expected parameter 'odd' to be constrained by .*; write another constraint"):
        Checkpoint(path).save(1)
    assert os.listdir(path.parent) == []


def test_an_optimiser_of_what_is_not_saved(path):
    net = nn.Linear(2, 3)
    optim = torch.optim.Adam(net.parameters())
    for parts in ({"optim": optim}, {"further": {"adam": optim}}):
        with pytest.raises(ValueError, match=r"got one of shape \(3, 2\) that is in none.*further=\{'net': net\}"):
            Checkpoint(path, **parts).save(1)
    Checkpoint(path, optim=optim, further={"net": net}).save(1)
    run = begin(plain_functions, 1)
    run.step(0)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"make the optimiser anew after pyro.clear_param_store\(\)"):
        Checkpoint(path, **run.parts).save(1)


def test_other_parts(path):
    run, _ = broken_off(torch_optimiser, path, 1)
    with pytest.raises(ValueError, match=r"\['guide', 'model', 'optim'\], got .* 'optim'\]; pass to Checkpoint what"):
        Checkpoint(path, **{**run.parts, "further": None}).load(X)


def test_a_file_of_another_store(path):
    begin(plain_functions, 1).step(0)
    Checkpoint(path, model=plain_model).save(1)
    pyro.param("further", torch.zeros(()))
    with pytest.raises(ValueError, match=r"expected all parameters of the param store .* none for \['further'\]"):
        Checkpoint(path, model=plain_model).load(X)
    pyro.clear_param_store()
    pyro.param("weights", torch.ones(4) / 4, constraint=constraints.simplex)
    with pytest.raises(ValueError, match=r"'weights' to have shape \(4,\) .*, got \(3,\) .*; the file is of another"):
        Checkpoint(path).load()
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(0.8, dtype=torch.float64), constraint=constraints.positive)
    with pytest.raises(ValueError, match=r"'scale' to have shape \(\) \(torch.float64\), got \(\) \(torch.float32\)"):
        Checkpoint(path).load()
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(0.8), constraint=constraints.softplus_positive)
    with pytest.raises(ValueError, match="'scale' to be constrained by SoftplusPositive.* got GreaterThan in"):
        Checkpoint(path).load()
    assert pyro.param("scale").item() == pytest.approx(0.8)


def test_a_file_of_another_module(path):
    Checkpoint(path, further={"net": nn.Linear(2, 3)}).save(1)
    for net, message in [
        (nn.Linear(2, 4), r"further\['net'\]: weight\" to have shape \(4, 2\) .* got \(3, 2\)"),
        (nn.Linear(2, 3, bias=False), r"with \['bias'\] besides, which it does not have; make it as it was"),
        (nn.ParameterDict({"c": torch.ones(1)}), r"expected all parameters of further\['net'\] .* none for \['c'\]"),
    ]:
        before = {n: v.clone() for n, v in net.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            Checkpoint(path, further={"net": net}).load()
        assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_a_file_from_before_the_first_step(path):
    run = begin(auto_normal, 1)
    checkpoint = Checkpoint(path, **run.parts)
    checkpoint.save(0)
    with pytest.raises(ValueError, match="expected all parameters of guide .* or was saved before the first step"):
        checkpoint.load(X)


@pytest.mark.parametrize("make, name", [(registered_by_name, r"net\$\$\$weight"), (hidden_module, "bias")])
def test_a_module_that_is_not_registered_yet(make, name, path):
    """The module would go on with its own tensor, beside the one that was loaded."""
    expected = unbroken(make)
    broken_off(make, path, 2)
    run = begin(make, 2)
    checkpoint = Checkpoint(path, optim=run.parts["optim"])
    with pytest.raises(ValueError, match=f"module of parameter '{name}'.* Pass model and guide .*, or run them once"):
        checkpoint.load()
    run.parts["guide"](X), run.parts["model"](X)
    assert checkpoint.load() == 2
    for i in range(2, STEPS):
        run.step(i)
    assert_same(everything(run), expected)


def test_an_optimiser_that_does_not_fit(path):
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    Checkpoint(path, optim=torch.optim.SGD(net.parameters(), lr=0.1), further={"net": net}).save(1)
    optim = torch.optim.SGD([other.weight], lr=0.1)
    with pytest.raises(ValueError, match="expected a state that fits optim.*; make optim as it was made"):
        Checkpoint(path, optim=optim, further={"net": other}).load()


# Ranks


def of_rank(group, folder):
    """What one of two processes finds."""
    own, found = torch.distributed.get_rank(group), {}
    path = f"{folder}/run.ckpt" if own == 0 else f"{folder}/nowhere/run.ckpt"  # others need not see it
    net = nn.Linear(1, 1)
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    checkpoint = Checkpoint(path, optim=optim, further={"net": net}, process_group=group)
    found["missing"] = checkpoint.load()
    pyro.set_rng_seed(own)
    nn.init.constant_(net.weight, 1.0 + own)
    checkpoint.save(7)
    found["there"] = os.path.exists(f"{folder}/run.ckpt")
    found["expected"] = torch.rand(2).tolist(), random.random(), np.random.rand()
    pyro.set_rng_seed(99)
    nn.init.constant_(net.weight, 5.0)
    found["step"] = checkpoint.load()
    found["drawn"] = torch.rand(2).tolist(), random.random(), np.random.rand()
    found["weight"] = net.weight.item()
    odd = Checkpoint(path, further={"net": net, "odd": Holder(open if own == 0 else 1)}, process_group=group)
    found["unsaved"] = caught(odd.save, 8)
    if own == 0:
        with open(path, "r+b") as file:
            file.truncate(500)
    found["damaged"] = caught(checkpoint.load)
    if own == 0:
        Checkpoint(path, optim=optim, further={"net": net}).save(3)  # as of one rank alone
    found["seeds"] = []
    for _ in range(2):
        found["fewer"] = checkpoint.load()
        found["seeds"].append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    return found


def caught(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_two_ranks(processes, tmp_path):
    """The first process of the group, which is not the first of all, reads and writes."""
    zero, one = found = processes.run(of_rank, str(tmp_path), ranks=OTHERS)
    assert not (tmp_path / "nowhere").exists()
    for each in found:
        assert each["missing"] == 0 and each["step"] == 7 and each["there"]
        assert each["drawn"] == each["expected"]  # its own
        assert each["unsaved"].startswith("TypeError: rank 2: expected the state of further['odd']")
        assert each["damaged"].startswith("ValueError: rank 2: ") and "cut short, altered" in each["damaged"]
        assert each["fewer"] == 3
        assert each["seeds"][0] == each["seeds"][1]  # in a way that is defined
    assert zero["drawn"] != one["drawn"]
    assert zero["weight"] == one["weight"]
    assert zero["seeds"] != one["seeds"]


def test_ranks_that_were_not_saved():
    """Each has a stream of its own, which follows from all that rank 0's generators are at."""

    def drawn(rank, states):
        module_under_test._set_random_state(states, rank)
        return torch.rand(4).tolist(), random.random(), np.random.rand()

    saved, other = module_under_test._random_state(), module_under_test._random_state()
    random.random()
    third = module_under_test._random_state()
    streams = [drawn(rank, [saved]) for rank in range(4)]
    assert streams == [drawn(rank, [other]) for rank in range(4)]
    assert all(a[i] != b[i] for a in streams for b in streams if a is not b for i in range(3))
    assert drawn(2, [third]) != streams[2]


def test_lazy_modules_get_their_shapes_from_the_file(path):
    net = nn.Linear(2, 3)
    Checkpoint(path, further={"net": net}).save(1)
    lazy = nn.LazyLinear(3)
    Checkpoint(path, further={"net": lazy}).load()
    assert torch.equal(lazy.weight, net.weight)
