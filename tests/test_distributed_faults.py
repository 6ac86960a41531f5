# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What goes wrong in one process is said by all, with its rank; one that dies or is silent leaves nobody waiting."""

import math
import os
import signal
import time
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import SVI
from torch import nn

from pyro_iwae import Checkpoint, CompiledSVI, ImportanceResampledGuide, ImportanceWeightedELBO, evaluate
from pyro_iwae.distributed import Ranks, checksum
from pyro_iwae.turns import Turn
from tests.ranks import PAIR, Processes
from tests.test_distributed import X, guide, model

PATIENCE = 4.0  # seconds, of the group in which a process dies


def on(group, rank):
    return Ranks(group).rank == rank


def step_of(group, program, draw=guide, x=X, steps=1, **options):
    svi = SVI(program, draw, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(8, process_group=group, **options))
    return [svi.step(x) for _ in range(steps)]


# What one process alone meets


class Peculiar(Exception):
    """No class of Python's own."""


def nan_in_weights(group, chunk_size):
    def faulty(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("trap", z * (math.nan if on(group, 1) else 0.0))

    pyro.enable_validation(False)
    step_of(group, faulty, chunk_size=chunk_size)


def nan_in_gradient(group, chunk_size):
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * (math.nan if on(group, 2) else 1.0)

    def faulty(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(Spoiled.apply(pyro.param("mean", torch.tensor(0.1))), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    step_of(group, faulty, chunk_size=chunk_size)


def error_in_model(group, chunk_size):
    calls = []

    def faulty(x):
        calls.append(1)
        if on(group, 2) and len(calls) > 12:
            raise Peculiar("out of order")
        model(x)

    step_of(group, faulty, steps=20, chunk_size=chunk_size)


def error_in_draw(group, chunk_size):
    posterior = ImportanceResampledGuide(model, guide, 8, process_group=group, chunk_size=chunk_size)
    posterior(X)
    if on(group, 0):
        posterior.guide = lambda x: 1 / 0
    posterior(X)


def error_in_evaluation(group, chunk_size):
    batches = iter([X, X]) if not on(group, 3) else (X if i == 0 else 1 / 0 for i in range(2))
    evaluate(model, guide, data=batches, num_particles=8, chunk_size=chunk_size, process_group=group, progress=False)


def good(group):
    return step_of(group, model)[0]


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    "fn, kind, message",
    [
        (nan_in_weights, "ValueError", "rank 1: log density is NaN at model site 'trap'"),
        (nan_in_gradient, "ValueError", "rank 2: the gradient of parameter 'mean' is NaN"),
        (error_in_model, "RuntimeError", "rank 2: Peculiar: out of order"),
        (error_in_draw, "ZeroDivisionError", "rank 0: division by zero"),
        (error_in_evaluation, "ZeroDivisionError", "rank 3: division by zero"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_all_say_what_one_has_met(processes, fn, kind, message, chunk_size):
    """And go on together afterwards."""
    for found, text in processes.errors(fn, chunk_size):
        assert found == kind and message in text
    assert len(set(processes.run(good))) == 1


# Processes that were given different things


def other_data(group):
    step_of(group, model, x=X if on(group, 0) else X.flip(0))


def other_data_within(group):
    mine = X if on(group, 0) else -X
    step_of(group, lambda _: model(mine), lambda _: guide(mine))


def other_sizes_within(group):
    mine = X if on(group, 0) else X[:2]
    step_of(group, lambda _: model(mine), lambda _: guide(mine))


def other_parameters(group):
    """The difference is too small to be seen in a particle."""
    step = 1e-5 * Ranks(group).rank

    def own(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("own_loc", torch.tensor(0.4 + step)) * x, 0.9))

    step_of(group, model, own)


def other_networks(group):
    torch.manual_seed(Ranks(group).rank)
    net = nn.Linear(1, 1)

    def own(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 0.9))

    step_of(group, model, own)


def other_options(group):
    ImportanceWeightedELBO(8 if on(group, 0) else 9, process_group=group).loss(model, guide, X)


def other_calls(group):
    elbo = ImportanceWeightedELBO(8, process_group=group)
    (elbo.bound if on(group, 0) else elbo.loss)(model, guide, X)


def same_seed_within(group):
    def reseeded(x):
        pyro.set_rng_seed(1)
        guide(x)

    step_of(group, model, reseeded)


def same_seed_in_chunks(group):
    """Five particles and four: the generators do not end at the same place."""

    def reseeded(x):
        pyro.set_rng_seed(1)
        guide(x)

    ImportanceWeightedELBO(9, process_group=group, chunk_size=3).loss_and_grads(model, reseeded, X)


class Numbers(dist.Normal):
    """Drawn from a generator of its own."""

    def rsample(self, sample_shape=()):
        generator = torch.Generator().manual_seed(3)
        return self.loc + self.scale * torch.randn(self.batch_shape, generator=generator)


def generator_of_its_own(group):
    def own(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Numbers(0.4 * x, 0.9))

    ImportanceWeightedELBO(9, process_group=group).loss(model, own, X)


def other_array(group):
    step_of(group, lambda x: model(torch.as_tensor(x)), lambda x: guide(torch.as_tensor(x)), x=on(group, 0) * X.numpy())


@dataclass
class Batch:
    rows: torch.Tensor


def other_batch(group):
    x = X if on(group, 0) else 2.0 * X
    step_of(group, lambda batch: model(batch.rows), lambda batch: guide(batch.rows), x=Batch(x))


def impossible_here(group):
    def fenced(x):
        model(x)
        pyro.factor("fence", torch.tensor(-math.inf if on(group, 0) else 0.0))

    pyro.enable_validation(False)
    step_of(group, fenced)


def made_later(group):
    """A parameter that all first ask for in the third step, and that each makes of its own numbers."""
    calls = []

    def late(x):
        model(x)
        calls.append(1)
        if len(calls) > 25:
            pyro.factor("pull", -pyro.param("late", lambda: torch.randn(())).square())

    step_of(group, late, steps=9)


def other_later(group):
    """A parameter that parts after the first steps."""
    elbo = ImportanceWeightedELBO(8, process_group=group)
    for i in range(12):
        if i == 5 and on(group, 1):
            pyro.param("a").data.add_(1e-5)
        elbo.loss_and_grads(model, guide, X)
        assert i < 9, "found in the tenth"


@pytest.mark.parametrize(
    "fn, message",
    [
        (
            other_data,
            r"the same arguments of model and guide .* got others on rank 1 than on rank 0; .* minibatch",
        ),
        (
            other_data_within,
            r"the same observed data .* let functions hold the same data",
        ),
        (other_sizes_within, r"the same plates of the same sizes .* got others on rank 1"),
        (other_parameters, r"the same values of parameter 'own_loc' .* got others on rank 1 .* set one seed in all"),
        (other_networks, r"the same model, guide and data .* Set one seed in all processes before"),
        (other_options, r"the same options .* got others on rank 1"),
        (other_calls, r"the same call .* got others on rank 1"),
        (same_seed_within, r"the same on rank 0 and rank 1, so that their particles are copies .* sets a seed"),
        (same_seed_in_chunks, r"the same on rank 0 and rank 1, so that their particles are copies"),
        (generator_of_its_own, r"the same on rank 0 and rank 1, .* draws from a generator of its own"),
        (other_array, r"the same arguments of model and guide"),
        (other_batch, r"the same arguments of model and guide"),
        (impossible_here, r"the same model, guide and data .* has log weights -inf, -"),
        (made_later, r"the same values of parameter 'late'"),
        (other_later, r"the same values of parameter 'a' .* got others on rank 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_differences_are_found(processes, fn, message):
    for kind, text in processes.errors(fn, ranks=PAIR):
        assert kind == "ValueError", text
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
    assert len(set(processes.run(good, ranks=PAIR))) == 1


def branching(group):
    """Each particle asks for one of two parameters."""

    def either():
        left = bool(pyro.sample("c", dist.Bernoulli(0.5)))
        loc = pyro.param("left", torch.tensor(1.0)) if left else pyro.param("right", torch.tensor(-1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.0))

    def draw():
        pyro.sample("c", dist.Bernoulli(0.5))

    for name, value in (("left", 1.0), ("right", -1.0)):
        pyro.param(name, torch.tensor(value))
    elbo = ImportanceWeightedELBO(2, process_group=group, vectorize_particles=False)
    svi = SVI(either, draw, pyro.optim.SGD({"lr": 0.1}), elbo)
    for _ in range(12):
        svi.step()
    return {n: p.item() for n, p in pyro.get_param_store().items()}


def test_parameters_that_some_particles_alone_ask_for(processes):
    first, second = processes.run(branching, ranks=PAIR)
    assert first == second
    assert 0.0 < first["left"] < 0.7 and -0.7 < first["right"] < 0.0


def nameless(group, values):
    """Parameters that Pyro does not know, in another order in the graphs of processes with one particle and two."""
    first, second = (torch.tensor(v, requires_grad=True) for v in values)

    def moved(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(first * x if on(group, 0) else x * first, (second * 1.0).exp()))

    elbo = ImportanceWeightedELBO(3, process_group=group)
    for _ in range(3):
        elbo.loss_and_grads(model, moved, X)
    found = first.grad.item(), second.grad.item()
    assert found[0] != found[1]
    return found


def test_parameters_without_names(processes):
    """They are told by their values, and refused where these are the same."""
    first, second = processes.run(nameless, (0.4, -0.2), ranks=PAIR)
    assert first == second
    for _, message in processes.errors(nameless, (0.4, 0.4), ranks=PAIR):
        assert "two tensors with the same values" in message and "pyro.module('name', module)" in message


def hopeless(group, kind):
    """All particles are impossible in one element."""

    def never(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("fence", torch.tensor([0.0, -math.inf, 0.0]))

    if kind == "step":
        step_of(group, never)
    elif kind == "draw":
        ImportanceResampledGuide(never, guide, 8, process_group=group)(X)
    else:
        evaluate(never, guide, X, num_particles=8, process_group=group, progress=False)


@pytest.mark.parametrize("kind", ["step", "draw", "evaluation"])
def test_impossible_elements_are_warned_of_once(processes, kind):
    """By the first process, with the site; where warnings are errors, as here, all stop."""
    for name, message in processes.errors(hopeless, kind, ranks=PAIR):
        assert name == "UserWarning", message
        assert "rank 0: all 8 particles are impossible" in message and "through site 'fence'" in message
    assert len(set(processes.run(good, ranks=PAIR))) == 1


def rounded_apart(group):
    """Parameters that other hardware has rounded in another way."""
    pyro.param("a", torch.tensor(0.4))
    pyro.param("a").data.add_(1e-12 * Ranks(group).rank)
    step_of(group, model)
    return pyro.param("a").item()


def test_what_rounding_parts_is_brought_together(processes):
    first, second = processes.run(rounded_apart, ranks=PAIR)
    assert first == second


def unsaved(group, folder):
    evaluate(
        model,
        guide,
        X,
        num_particles=8,
        process_group=group,
        progress=False,
        save_to=f"{folder}/no/run.npz",
        save_every=0,
    )


def looked_at(group):
    faulty = guide if on(group, 0) else (lambda x: 1 / 0)
    ImportanceResampledGuide(model, faulty, 8, process_group=group).sample(3, X)


def unlike_the_file(group, folder):
    Checkpoint(f"{folder}/run.ckpt", optim=None, process_group=group).save(3)
    if on(group, 1):
        pyro.param("further", torch.tensor(0.0))
    Checkpoint(f"{folder}/run.ckpt", process_group=group).load()


@pytest.mark.parametrize(
    "fn, kind, message",
    [
        (unsaved, "FileNotFoundError", "rank 0: "),
        (unlike_the_file, "ValueError", "rank 1: expected all parameters of the param store"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_fail_in_all(processes, tmp_path, fn, kind, message):
    for found, text in processes.errors(fn, str(tmp_path), ranks=PAIR):
        assert (found, message in text) == (kind, True), text
    assert len(set(processes.run(good, ranks=PAIR))) == 1


def test_a_look_fails_in_all(processes):
    for found, text in processes.errors(looked_at, ranks=PAIR):
        assert found == "ZeroDivisionError" and "rank 1: division by zero" in text
    assert len(set(processes.run(good, ranks=PAIR))) == 1


def test_when_parameters_are_compared():
    due = [n for n in range(3001) if Turn(None, 0, n).is_due]
    assert due == [1, 10, 100, 1000, 2000, 3000]


# What cannot be


def refusals(group):
    found = []
    elbo = ImportanceWeightedELBO(8, process_group=group)
    elbo.compile = True
    sparse = nn.Embedding(3, 1, sparse=True)

    def looked_up():
        pyro.module("table", sparse)
        pyro.sample("z", dist.Normal(sparse(torch.tensor([1])).sum(), 1.0))

    mesh = torch.distributed.init_device_mesh("cpu", (1, len(torch.distributed.get_process_group_ranks(group))))
    for call in (
        lambda: ImportanceWeightedELBO(1, process_group=group),
        lambda: ImportanceWeightedELBO(8, process_group=group, compile=True),
        lambda: elbo.loss(model, guide, X),
        lambda: ImportanceWeightedELBO(8, process_group=group, combine=True, plate_particles={"data": 2}),
        lambda: CompiledSVI(model, guide, pyro.optim.Adam({}), ImportanceWeightedELBO(8, process_group=group)),
        lambda: ImportanceWeightedELBO(8, process_group="gloo"),
        lambda: ImportanceWeightedELBO(8, process_group=mesh),
        lambda: ImportanceWeightedELBO(8, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER),
        lambda: evaluate(model, guide, X, num_particles=1, process_group=group),
        lambda: ImportanceWeightedELBO(8, process_group=group).loss_and_grads(looked_up, looked_up),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
            call()
        found.append(str(error.value))
    return found


def test_refusals(processes):
    messages = [
        "expected num_particles >= 4, one for each process",
        "compile=True records the step of one process",
        "compile=True records the step of one process",
        "combine=True weighs every combination",
        "CompiledSVI records the step of one process",
        "expected process_group to be a torch.distributed process group",
        "expected a mesh of one dimension, got 2",
        "expected a process group that this process is a part of",
        "expected num_particles >= 4, one for each process",
        "got a sparse one for parameter 'table$$$weight'",
    ]
    for found in processes.run(refusals):
        for text, message in zip(found, messages, strict=True):
            assert message in text


def test_without_a_group():
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group\(\) first"):
        ImportanceWeightedELBO(8, process_group=object())


def alone(group):
    """A group of one process is no group."""
    single = [torch.distributed.new_group([r]) for r in range(4)][torch.distributed.get_rank()]
    pyro.set_rng_seed(5)
    shared = step_of(single, model, steps=3)
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    return shared, step_of(None, model, steps=3)


def test_a_group_of_one(processes):
    for shared, expected in processes.run(alone):
        assert shared == expected


# Death and silence


def struck(group, fate):
    """Ends, or goes silent, while it weighs its particles at the third step."""
    seen = []

    def fated(x):
        seen.append(1)
        if on(group, 1) and len(seen) == 20:
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3.0 * PATIENCE)
        model(x)

    began = time.monotonic()
    try:
        step_of(group, fated, steps=100)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize("fate", ["killed", "silent"])
def test_a_process_that_is_gone_leaves_nobody_waiting(fate):
    processes = Processes(2, timeout=PATIENCE)
    try:
        (kind, found), other = processes.outcomes(struck, fate)
        assert kind == "ok", found
        text, seconds = found
        assert "rank 0 cannot go on: another of the 2 processes" in text and "torch.distributed says:" in text
        assert seconds < 2.0 * PATIENCE + 10.0  # what came before included
        assert other[0] == ("gone" if fate == "killed" else "ok")
    finally:
        processes.close()


# Checksums


def test_checksums_tell_rows_in_another_order():
    x = torch.randn(7, 3)
    others = [x.flip(0), x[:, :2], x.float() if x.dtype == torch.double else x.double(), x + 1e-6, -x, x > 0.0]
    assert len({checksum(x), *map(checksum, others)}) == 7
    assert checksum(x) == checksum(x.clone()) == checksum(x.T.contiguous().T)
    assert checksum({"a": [x, 1.5, "b"]}) == checksum({"a": (x.clone(), 1.5, "b")})
    assert checksum({"a": x}) != checksum({"b": x})
    assert checksum(0.1) != checksum(0.2)
    assert checksum(torch.tensor([1 + 2j])) != checksum(torch.tensor([2 + 1j]))
    assert checksum(torch.empty(0)) != checksum(torch.empty(0, 2))
    assert checksum(x.bfloat16()) == checksum(x.bfloat16())
    assert checksum(x.to_sparse()) == checksum(x)
