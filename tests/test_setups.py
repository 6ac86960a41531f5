# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Where users run it: threads, loaders' workers, forked processes, cells that are executed again, python -O."""

import multiprocessing
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from pyro_iwae import (
    CompiledSVI,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    evaluate,
    preflight,
)


def model(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


ROWS = torch.linspace(-1.0, 2.0, 12)


def trained(loader, *, compiled=False):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi = SVI(model, guide, Adam({"lr": 0.05}), ImportanceWeightedELBO(num_particles=5, compile=compiled))
    losses = []
    for _ in range(3):
        for (x,) in loader:
            with torch.random.fork_rng():  # a loader with workers draws a seed for them
                torch.manual_seed(len(losses))
                losses.append(svi.step(x))
    return losses


# Threads


class Meeting:
    """Two threads that are inside a model at the same time."""

    def __init__(self):
        self.inside, self.go_on = threading.Event(), threading.Event()

    @contextmanager
    def holding(self, hold, *args):
        """While another thread waits inside of something."""
        thread = threading.Thread(target=hold, args=args)
        thread.start()
        try:
            assert self.inside.wait(60)
            yield
        finally:
            self.go_on.set()
            thread.join()

    def wait(self):
        self.inside.set()
        assert self.go_on.wait(60)

    def slow_model(self, x):
        self.wait()
        model(x)

    def slow_batch(self, batch):
        self.wait()
        return batch

    def slow_mean(self, values):
        self.wait()
        return values["z"]

    def slow_back(self, x):
        """A model through which one goes back slowly."""
        meeting = self

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value.clone()

            @staticmethod
            def backward(ctx, gradient):
                meeting.wait()
                return gradient

        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(Slow.apply(z), 1.0), obs=x)


HELD = {
    "in a model": lambda m: ImportanceWeightedELBO(num_particles=2).loss(m.slow_model, guide, ROWS),
    "in a model, K = 1": lambda m: ImportanceWeightedELBO(num_particles=1).loss(m.slow_model, guide, ROWS),
    "going back": lambda m: ImportanceWeightedELBO(num_particles=2).loss_and_grads(m.slow_back, guide, ROWS),
    "in a step": lambda m: CompiledSVI(m.slow_back, guide, Adam({"lr": 0.1}), ImportanceWeightedELBO(2)).step(ROWS),
    "in a report": lambda m: preflight(m.slow_model, guide, ROWS),
    "between batches": lambda m: evaluate(
        model, guide, data=[ROWS], unpack=m.slow_batch, num_particles=2, num_replicates=2, progress=False
    ),
    "in a function": lambda m: ImportanceResampledGuide(model, guide, 2).expectation(m.slow_mean, ROWS),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("num_particles", [1, 2])
def test_wherever_the_first_thread_is(held, num_particles):
    """Also where Pyro's own ELBO runs, and where model and guide have been left."""
    meeting, loss = Meeting(), ImportanceWeightedELBO(num_particles=num_particles)
    loss.loss(model, guide, ROWS)
    with meeting.holding(HELD[held], meeting), pytest.raises(RuntimeError, match="one thread at a time"):
        loss.loss_and_grads(model, guide, ROWS)
    loss.loss_and_grads(model, guide, ROWS)


@pytest.mark.parametrize(
    "ask",
    [
        lambda fn: SVI(fn, guide, Adam({"lr": 0.1}), ImportanceWeightedELBO(num_particles=2)).step(ROWS),
        lambda fn: ImportanceResampledGuide(fn, guide, 2).sample(2, ROWS),
        lambda fn: evaluate(fn, guide, ROWS, num_particles=2, num_replicates=2, progress=False),
    ],
    ids=["step", "draws", "evaluate"],
)
def test_two_threads_at_once_are_refused(ask):
    """Pyro's handlers and store are the process's: it would be wrong without a word. One after the other is well."""
    meeting, found = Meeting(), []
    loss = ImportanceWeightedELBO(num_particles=2)
    loss.loss(model, guide, ROWS)
    with (
        meeting.holding(lambda: found.append(loss.loss(meeting.slow_model, guide, ROWS))),
        pytest.raises(RuntimeError, match=r"one thread at a time.*Use processes"),
    ):
        ask(model)
    assert len(found) == 1
    ask(model)


def test_going_back_in_a_thread_of_torchs_own():
    """As on a GPU: what a model makes again on the way back belongs to the call that goes back."""
    inner = ImportanceWeightedELBO(num_particles=4, chunk_size=2)

    class Elsewhere(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.inside = x.detach().requires_grad_()
            with torch.enable_grad(), poutine.block():
                ctx.bound = inner.bound(model, guide, ROWS).sum() + 0.0 * ctx.inside
            return ctx.bound.detach().clone()

        @staticmethod
        def backward(ctx, gradient):
            failures = []

            def back():
                try:
                    ctx.bound.backward()
                except Exception as error:
                    failures.append(error)

            thread = threading.Thread(target=back)
            thread.start()
            thread.join()
            assert not failures, failures
            return gradient

    def outer_model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", Elsewhere.apply(z))

    def outer_guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    loss = ImportanceWeightedELBO(num_particles=2, vectorize_particles=False)
    loss.loss_and_grads(outer_model, outer_guide)
    assert pyro.param("loc").unconstrained().grad is not None


def test_a_thread_of_its_own():
    """A loop that runs in one other thread, as behind a user interface."""
    losses = []
    thread = threading.Thread(target=lambda: losses.extend(trained([(ROWS,)])))
    thread.start()
    thread.join()
    assert losses == trained([(ROWS,)])


# Workers and forks


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_workers_of_a_loader():
    trained([(ROWS,)])  # used before the workers are made
    data = TensorDataset(ROWS)
    alone = trained(DataLoader(data, batch_size=4))
    assert trained(DataLoader(data, batch_size=4, num_workers=2)) == alone
    assert trained(DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True)) == alone


def _child(pipe):
    torch.manual_seed(7)
    elbo = ImportanceWeightedELBO(num_particles=5)
    pipe.send((elbo.loss_and_grads(model, guide, ROWS), pyro.param("slope").item()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("held", [False, True], ids=["", "while another thread runs a model"])
def test_fork_after_use(held):
    """The child has the parent's parameters and goes on by itself."""
    trained([(ROWS,)])
    pyro.set_rng_seed(7)
    expected = ImportanceWeightedELBO(num_particles=5).loss_and_grads(model, guide, ROWS)
    meeting = Meeting()
    other = threading.Thread(target=ImportanceWeightedELBO(2).loss, args=(meeting.slow_model, guide, ROWS))
    if held:
        pyro.param("slope")
        other.start()
        assert meeting.inside.wait(60)
    try:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child if not held else _locked_child, args=(theirs,))
        process.start()
        theirs.close()
        assert ours.poll(60), "the child waits for ever"
        loss, slope = ours.recv()
        process.join()
    finally:
        meeting.go_on.set()
        if held:
            other.join()
    assert process.exitcode == 0
    assert slope == pyro.param("slope").item()
    assert loss == expected


def _locked_child(pipe):
    """The thread that was in the model is not there any more; its handlers are, and no lock is."""
    from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    _child(pipe)


# Cells that are executed again

CELL = """
    data = pyro.plate("rows", len(x), dim=-1)  # one object for all

    def cell_model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with data:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, {noise}), obs=x)

    def cell_guide(x):
        loc = pyro.param("loc", torch.tensor({start}))
        pyro.sample("w", dist.Normal(loc, 1.0))
        with data:
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))
"""


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_cells_executed_again(compiled):
    """With other numbers, other rows, and plates declared anew; the loss object stays, and so do Pyro's parameters."""
    elbo = ImportanceWeightedELBO(num_particles=4, compile=compiled)
    kept = None
    for rows, noise, start in [(3, 1.0, 0.5), (3, 1.0, 0.7), (5, 0.5, 0.7), (3, 1.0, 0.5)]:
        names = {"pyro": pyro, "dist": dist, "torch": torch, "x": ROWS[:rows]}
        exec(textwrap.dedent(CELL).format(noise=noise, start=start), names)
        pair = names["cell_model"], names["cell_guide"]
        losses = []
        for loss in (elbo, ImportanceWeightedELBO(num_particles=4)):
            loss.loss_and_grads(*pair, ROWS[:rows])
            pyro.set_rng_seed(1)
            losses.append(loss.loss_and_grads(*pair, ROWS[:rows]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        kept = pyro.param("loc").item() if kept is None else kept
        assert pyro.param("loc").item() == kept  # as in Pyro: the store has it already


def test_a_class_defined_again():
    elbo, losses = ImportanceWeightedELBO(num_particles=4), []
    for mean in (0.0, 3.0, 0.0):

        class Model(pyro.nn.PyroModule):
            shift = mean

            def forward(self):
                with pyro.plate("rows", 3):
                    pyro.sample("z", dist.Normal(self.shift, 1.0))

        def flat():
            with pyro.plate("rows", 3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        pyro.set_rng_seed(1)
        elbo.loss(Model(), flat)
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(Model(), flat))
    assert losses[0] == losses[2] == 0.0 != losses[1]


# The interpreter's options

PROGRAM = """
    import pyro, torch
    from pyro_iwae import DoublyReparameterized, ImportanceResampledGuide, ImportanceWeightedELBO
    from tests.test_setups import ROWS, guide, model
    pyro.set_rng_seed(0)
    elbo = ImportanceWeightedELBO(num_particles=5, gradient=DoublyReparameterized(), chunk_size=2)
    print([elbo.loss_and_grads(model, guide, ROWS) for _ in range(3)])
    print(ImportanceResampledGuide(model, guide, 5).sample(2, ROWS)["z"].sum().item())
    for wrong in (dict(num_particles=0), dict(num_particles=3, chunk_size=0), dict(num_particles=2.5)):
        try:
            ImportanceWeightedELBO(**wrong)
        except Exception as error:
            print(type(error).__name__, error)
    try:
        elbo.loss(model, lambda x: None, ROWS)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""


def test_without_assertions():
    """python -O: the same numbers and the same errors."""
    found = [
        subprocess.run(
            [sys.executable, *options, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=True
        ).stdout
        for options in ([], ["-O"])  # Pyro itself cannot be imported with -OO
    ]
    assert found[0] == found[1]
    assert found[0].count("Error") == 4


STATE = """
    import sys, warnings
    import numpy, pyro, torch, random

    def state():
        return (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
            torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, pyro.settings.get(),
            len(torch.nn.modules.module._global_forward_pre_hooks), torch.distributions.Distribution._validate_args,
            list(pyro.get_param_store().keys()), warnings.filters[:], sys.path[:], repr(torch.get_default_device()),
            numpy.geterr(), torch.is_anomaly_enabled(),
        )

    before, loaded = state(), set(sys.modules)
    import pyro_iwae
    assert state() == before, "importing changed a global state"
    print(sorted({m.split(".")[0] for m in set(sys.modules) - loaded}))
"""


def test_import_is_silent_and_changes_nothing():
    """Warnings are errors; matplotlib and the optional packages are imported where they are asked for."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STATE)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    loaded = found.stdout
    assert "pyro_iwae" in loaded
    assert not any(name in loaded for name in ("matplotlib", "arviz", "lightning", "tensorboard", "sklearn", "IPython"))
