# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""20,000 steps in the same memory; 1,000 shapes of data in caches that do not grow."""

import ctypes
import gc
import itertools
import statistics
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_iwae import CompiledSVI, ImportanceResampledGuide, ImportanceWeightedELBO, SampledBackward, evaluate
from tests.test_compiled import flat_guide, flat_model, recorded_only  # noqa: F401  (a fixture)
from tests.test_setups import ROWS, guide, model

STATUS = Path("/proc/self/statm")
PAGE = 4096
STEPS = 20_000


def elbo(**options):
    return ImportanceWeightedELBO(**{"num_particles": 4, **options})


def stepping(kind=SVI, **options):
    return kind(model, guide, Adam({"lr": 1e-3}), elbo(**options)).step


def resampled():
    posterior = ImportanceResampledGuide(model, guide, num_particles=3)
    return lambda x: posterior(x)


def resampled_loss():
    posterior = ImportanceResampledGuide(model, guide, num_particles=3)
    loss = Trace_ELBO(max_plate_nesting=1)
    return lambda x: loss.loss(model, posterior, x)


WAYS = {
    "plain": stepping,
    "sequential": lambda: stepping(vectorize_particles=False),
    "chunks": lambda: stepping(chunk_size=2),
    "sampled backward": lambda: stepping(gradient=SampledBackward(2)),
    "compiled": lambda: stepping(compile=True),
    "compiled steps": lambda: stepping(CompiledSVI),
    "resampled": resampled,
    "loss of the resampled": resampled_loss,
}


class Malloc(ctypes.Structure):
    """What glibc says of its heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def memory():
    """Bytes in use, Python objects that the collector knows, and blocks of small ones.

    Where glibc tells, the bytes of its heap, without what lies free in it: how much that is hangs on what ran before.
    """
    gc.collect()
    kinds = len(gc.get_objects()), sys.getallocatedblocks()
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return int(STATUS.read_text().split()[1]) * PAGE, *kinds
    tell.restype = Malloc
    found = tell()
    return found.uordblks + found.hblkhd, *kinds


@pytest.mark.nightly
@pytest.mark.skipif(not STATUS.exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_flat(way):
    """After a quarter: fewer than 200 objects and 1,000 blocks more, and less than 20 bytes for each step.

    Of six stretches the median: Python's table of names, some megabytes, is made anew in one of them at most.
    """
    step, found = WAYS[way](), []
    for i in range(STEPS):
        if i >= STEPS // 4 and i % (STEPS // 8) == 0:
            found.append(memory())
        step(ROWS)
    found.append(memory())
    sizes, objects, blocks = zip(*found, strict=True)
    assert objects[-1] - objects[0] < 200
    assert blocks[-1] - blocks[0] < 1000
    assert statistics.median(b - a for a, b in itertools.pairwise(sizes)) < 20 * STEPS / 8


def shapes(count):
    return itertools.islice(itertools.count(2), count)


def held(owner):
    """Entries of all containers that an object holds, at any depth within the package's own."""
    seen, found, waiting = set(), 0, [owner]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (dict, list, tuple, set, frozenset)):
            found += len(thing)
            waiting.extend(thing.values() if isinstance(thing, dict) else thing)
        elif type(thing).__module__.startswith("pyro_iwae"):
            waiting.append(vars(thing) if hasattr(thing, "__dict__") else ())
    return found


def training(**options):
    loss = elbo(**options)
    return loss, lambda x: loss.loss_and_grads(flat_model, flat_guide, x)


def compiled_steps():
    svi = CompiledSVI(flat_model, flat_guide, Adam({"lr": 1e-3}), elbo())
    return svi, svi.step


SHAPED = {
    "loss": training,
    "sequential": lambda: training(vectorize_particles=False),
    "chunks": lambda: training(chunk_size=2),
    "plates": lambda: training(plate_particles={"data": 2}),
    "recorded": lambda: training(compile=True),
    "compiled steps": compiled_steps,
}


@pytest.mark.usefixtures("recorded_only")
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("way", SHAPED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_caches_do_not_grow_with_shapes(way, count):
    """What is held after 1,000 shapes is what is held after some."""
    (owner, step), sizes = SHAPED[way](), []
    for rows in shapes(count):
        step(torch.randn(rows))
        sizes.append(held(owner))
    assert sizes[-1] <= 2 * max(sizes[: max(8, count // 50)])


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.nightly)])
def test_caches_of_a_posterior_do_not_grow_with_shapes(count):
    posterior, sizes = ImportanceResampledGuide(model, guide, 4), []
    for rows in shapes(count):
        posterior(torch.randn(rows))
        posterior.expectation(lambda z: z["z"], torch.randn(rows), num_batches=1)
        sizes.append(held(posterior))
    assert sizes[-1] <= 2 * max(sizes[: max(8, count // 50)])


@pytest.mark.nightly
@pytest.mark.skipif(not STATUS.exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("compiled", [False, True])
def test_functions_that_are_made_anew(compiled, monkeypatch):
    """As in a notebook: 300 models of which none is kept leave nothing with a loss that is."""
    import torch._inductor as inductor

    monkeypatch.setattr(inductor, "compile", lambda module, inputs, options=None: module)
    loss, sizes = elbo(compile=compiled), []
    for i in range(300):
        pair = [lambda x, fn=fn: fn(x) for fn in (model, guide)]
        loss.loss_and_grads(*pair, ROWS)
        del pair
        if i in (20, 299):
            gc.collect()
            sizes.append(memory()[1])
    assert sizes[1] - sizes[0] < 280 * 15  # torch keeps the source of each graph for tracebacks


@pytest.mark.nightly
def test_evaluations_one_after_the_other():
    sizes = []
    for i in range(60):
        evaluate(model, guide, ROWS, num_particles=4, num_replicates=2, progress=False)
        if i in (10, 59):
            sizes.append(memory()[1] if STATUS.exists() else len(gc.get_objects()))
    pyro.clear_param_store()
    assert sizes[1] - sizes[0] < 200
