# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A model or guide that breaks off, at any depth and in any of its runs, leaves everything as it was."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

from pyro_iwae import (
    CompiledSVI,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    Monitor,
    SampledBackward,
    evaluate,
    gradient_snr,
    preflight,
    to_inference_data,
    tradeoff,
)
from tests.conftest import host_state

X = torch.tensor([0.5, -1.0])


class Broken(Exception):
    pass


class Pair:
    """Model and guide with places to break off at: outside of plates, in nested ones, in a handler, in a loop."""

    def __init__(self, error=None, at=None):
        self.error, self.at, self.count = error, at, 0

    def tick(self):
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error

    def model(self, x=X):
        self.tick()
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", 2, dim=-1), pyro.poutine.scale(scale=1.0):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            self.tick()
            with pyro.plate("inner", 3, dim=-2), pyro.poutine.mask(mask=torch.tensor(True)):
                y = pyro.sample("y", dist.Normal(z, 1.0))
                self.tick()
            pyro.sample("x", dist.Normal(y.sum(-2, keepdim=True) + z, 1.0), obs=x)
        for i in pyro.plate("loop", 2):
            self.tick()
            pyro.sample(f"u_{i}", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))

    def guide(self, x=X):
        loc = pyro.param("loc", torch.zeros(2))
        self.tick()
        with pyro.plate("rows", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(loc + 0.1 * x, 1.0))
            self.tick()
            with pyro.plate("inner", 3, dim=-2):
                self.tick()
                pyro.sample("y", dist.Normal(z, 1.0))
        self.tick()


def elbo(**options):
    return ImportanceWeightedELBO(**{"num_particles": 4, **options})


def stepping(kind=SVI, **options):
    return lambda p: kind(p.model, p.guide, Adam({"lr": 0.0}), elbo(**options)).step()


def posterior(p, **options):
    return ImportanceResampledGuide(p.model, p.guide, **{"num_particles": 4, **options})


def monitored(p):
    loss = elbo()
    Monitor(p.model, p.guide, loss, every=1)()


QUIET = {"progress": False}
WAYS = {
    "loss": lambda p: elbo().loss(p.model, p.guide),
    "a second loss": lambda p: [loss.loss(p.model, p.guide) for loss in [elbo()] for _ in range(2)],
    "step": stepping(),
    "sequential": stepping(vectorize_particles=False),
    "chunks": stepping(chunk_size=2),
    "sequential chunks": stepping(chunk_size=2, vectorize_particles=False),
    "tree": stepping(plate_particles={"rows": 2}),
    "doubly reparameterised": stepping(gradient=DoublyReparameterized()),
    "sampled backward": stepping(gradient=SampledBackward(2)),
    "sampled backward, chunks": stepping(gradient=SampledBackward(2), chunk_size=2),
    "compiled": lambda p: elbo(compile=True).differentiable_loss(p.model, p.guide),
    "draw": lambda p: posterior(p)(),
    "draw by chunks": lambda p: posterior(p, chunk_size=2)(),
    "draws": lambda p: posterior(p).sample(3),
    "expectation": lambda p: posterior(p).expectation(lambda z: z["z"], num_batches=2),
    "density": lambda p: posterior(p).log_density({"z": torch.zeros(1, 2), "y": torch.zeros(1, 3, 2)}, num_batches=2),
    "loss of the draw": lambda p: pyro.infer.Trace_ELBO(max_plate_nesting=2).loss(p.model, posterior(p)),
    "evaluate": lambda p: evaluate(p.model, p.guide, num_particles=4, num_replicates=2, **QUIET),
    "tradeoff": lambda p: tradeoff(p.model, p.guide, ks=[1, 2], **QUIET),
    "signal": lambda p: gradient_snr(elbo(), p.model, p.guide, num_replicates=20, **QUIET),
    "preflight": lambda p: preflight(p.model, p.guide),
    "monitor": monitored,
    "inference data": lambda p: to_inference_data(posterior(p), num_draws=4),
    "compiled steps": stepping(CompiledSVI),
}
SLOW = {"compiled", "compiled steps", "tradeoff"}


def state():
    store = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    return store, host_state(), len(_PYRO_STACK), [d for d in _DIM_ALLOCATOR._stack if d is not None]


def prepared():
    """The parameters, by a run that is not broken."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    pair = Pair()
    elbo(num_particles=1).loss(pair.model, pair.guide)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [Broken("here"), KeyboardInterrupt("here")], ids=["error", "interrupt"])
@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.nightly if w in SLOW else ()) for w in WAYS])
def test_breaking_off(way, error):
    """At up to 16 of the moments that it could; an interrupt at any comes through, an error may be tried otherwise."""
    prepared()
    whole = Pair()
    WAYS[way](whole)
    before = state()
    end = min(whole.count, 1000)  # what is timed is run many times
    places = sorted({*range(0, min(end, 3)), *range(0, end, max(1, end // 12)), end - 1})
    broken = 0
    for at in places:
        pair = Pair(error, at)
        try:
            WAYS[way](pair)
        except type(error) as caught:
            assert "here" in str(caught)
            broken += 1
        else:
            swallowed = isinstance(error, KeyboardInterrupt) and pair.count > at
            assert not swallowed, f"an interrupt at {at} of {whole.count} was swallowed"
        after = state()
        assert after[1:] == before[1:]
        assert after[0].keys() == before[0].keys()
        assert all(torch.equal(after[0][n], before[0][n]) for n in before[0])
    assert broken > len(places) / 8  # preflight reports most


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}, {"chunk_size": 2}], ids=repr)
def test_the_same_object_goes_on(options):
    """Interrupted at many moments of its first two calls, it then gives what one gives that never was."""
    prepared()
    whole, loss = Pair(), elbo(**options)
    for _ in range(2):
        loss.loss(whole.model, whole.guide)
    count = whole.count
    pyro.set_rng_seed(3)
    expected = loss.loss(whole.model, whole.guide)
    for at in range(0, count, 7):
        pair, again = Pair(KeyboardInterrupt(), at), elbo(**options)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(2):
                again.loss(pair.model, pair.guide)
        again.loss(pair.model, pair.guide)
        pyro.set_rng_seed(3)
        assert again.loss(pair.model, pair.guide) == expected
