# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The peers that run in this process: Pyro's ELBOs, this package's, and PyTorch by hand.

A peer does one of two works in each call: "gradient", a loss and its gradient; or "update", that and Adam.
"""

import time
from unittest import mock

import pyro
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO

import pyro_iwae
from pyro_iwae import ImportanceWeightedELBO
from pyro_iwae.capture import Graph
from support.by_hand import BY_HAND, bound_loss
from support.problems import make_problem

RATE = 1e-3  # Adam's


class LeftOut(Exception):
    """A peer that this installation does not have, or that does not do this work."""


def make_elbo(kind, particles, **options):
    if kind is not ImportanceWeightedELBO:
        alpha = {"alpha": 0.0} if kind is RenyiELBO else {}
        return kind(num_particles=particles, vectorize_particles=True, max_plate_nesting=1, **alpha)
    try:
        return kind(particles, **options)
    except TypeError as error:  # an option that this version does not have
        raise LeftOut(str(error)) from error


def elbo_step(problem, elbo, work):
    model, guide, args = problem.model, problem.guide, problem.args
    if work == "update":
        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), elbo)
        return lambda: svi.step(*args)
    return without_gradients(problem.module, lambda: elbo.loss_and_grads(model, guide, *args))


def without_gradients(module, call):
    def step():
        module.zero_grad(set_to_none=True)
        return call()

    return step


def elbo(kind, **elbo_options):
    def make(problem, options):
        return elbo_step(
            problem, make_elbo(kind, options["particles"], **elbo_options), options["work"]
        ), problem.module

    return make


def no_compiler():
    """As where there is no C++ compiler: recordings run as they are."""
    return mock.patch.object(Graph, "compile", lambda self, tensors: None)


def recorded(problem, options):
    """compile=True where there is no C++ compiler."""
    loss = make_elbo(ImportanceWeightedELBO, options["particles"], compile=True)
    with no_compiler():
        loss.loss_and_grads(problem.model, problem.guide, *problem.args)
    problem.module.zero_grad(set_to_none=True)
    return elbo_step(problem, loss, options["work"]), problem.module


def compiled_svi(steps):
    """CompiledSVI: one step in each call, or many."""

    def make(problem, options):
        if not hasattr(pyro_iwae, "CompiledSVI"):
            raise LeftOut("this version of pyro_iwae has no CompiledSVI")
        loss = make_elbo(ImportanceWeightedELBO, options["particles"])
        svi = pyro_iwae.CompiledSVI(problem.model, problem.guide, pyro.optim.Adam({"lr": RATE}), loss)
        if steps == 1:
            return lambda: svi.step(*problem.args), problem.module
        return lambda: svi.run(steps, *problem.args, progress=False)[0], problem.module

    return make


def by_hand(way="log_weights", compiled=False):
    def make(problem, options):
        module, args = BY_HAND[options["problem"]](problem), problem.args
        log_weights, particles = getattr(module, way), options["particles"]

        def differentiable():
            return bound_loss(log_weights(particles, *args))

        if compiled:
            differentiable = torch.compile(differentiable, dynamic=False, **compiler(options))

        def gradient():
            loss = differentiable()
            loss.backward()
            return loss

        step = without_gradients(module, gradient)
        if options["work"] == "gradient":
            return lambda: step().item(), module
        optimiser = torch.optim.Adam(module.parameters(), lr=RATE)

        def update():
            loss = step()
            optimiser.step()
            return loss.item()

        return update, module

    return make


def compiler(options):
    """How torch.compile is asked: CUDA graphs on a GPU; no compiler at all where only the code is tried."""
    if options["smoke"]:
        return {"backend": "aot_eager"}
    return {"mode": "reduce-overhead"} if options["device"] == "cuda" else {}


MANY = 100  # steps in one call, of what runs them in a loop of its own
RECORDED = "ImportanceWeightedELBO(compile=True), no compiler"
OURS, COMPILED = "ImportanceWeightedELBO", "ImportanceWeightedELBO(compile=True)"
SVI_STEP, SVI_RUN = "CompiledSVI.step", "CompiledSVI.run"
RENYI, TRACE = "RenyiELBO", "Trace_ELBO"
EAGER, DISTRIBUTIONS, BY_COMPILER = "by hand", "by hand, torch.distributions", "by hand, torch.compile"

PEERS = {
    RENYI: elbo(RenyiELBO),
    TRACE: elbo(Trace_ELBO),
    OURS: elbo(ImportanceWeightedELBO),
    COMPILED: elbo(ImportanceWeightedELBO, compile=True),
    RECORDED: recorded,
    SVI_STEP: compiled_svi(1),
    SVI_RUN: compiled_svi(MANY),
    EAGER: by_hand(),
    DISTRIBUTIONS: by_hand("from_distributions"),
    BY_COMPILER: by_hand(compiled=True),
}


class Peer:
    """One peer, with parameters of its own."""

    def __init__(self, name, make, sizes, **options):
        """``options`` are problem, particles, work, device and smoke."""
        self.name, self.device = name, options["device"]
        self.steps = MANY if name == SVI_RUN else 1
        self.store = {"params": {}, "constraints": {}}  # in Pyro, by name: peers would share them
        problem = make_problem(options["problem"], sizes, self.device)
        with pyro.get_param_store().scope(self.store):
            self.call, self.module = make(problem, options)

    def first(self):
        """Seconds of the first call, which looks at the model and compiles; parameters stay as they were."""
        return timed(lambda: self.losses(1), self.device)

    def step(self):
        """Seconds for each step of one call."""
        with pyro.get_param_store().scope(self.store):
            return timed(self.call, self.device) / self.steps

    def losses(self, count):
        """So many losses, all at the parameters as they are now."""
        here = [p.detach().clone() for p in self.module.parameters()]
        found = []
        with pyro.get_param_store().scope(self.store):
            for _ in range(count):
                found.append(float(self.call()))
                with torch.no_grad():
                    for p, value in zip(self.module.parameters(), here, strict=True):
                        p.copy_(value)
        return found


def timed(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
