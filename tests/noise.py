# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Chosen noise in place of drawn noise: exact expectations over all outcomes of K particles, without a tolerance.

All joint outcomes of K particles are laid out along an independent plate "outcomes", so that one call of an ELBO
visits every one of them; weighing them by their probabilities gives the expectation of whatever came out.
"""

import math
import zlib

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_iwae.plates import PARTICLES


class Inject(Messenger):
    """Gives latents chosen values, where their batch shape is that of a run with K particles.

    ``values`` go to sites as they are; ``noise`` goes to Gaussian sites as loc + scale * noise, with their graph, and
    on through the transforms of a flow.
    """

    def __init__(self, values=None, noise=None):
        super().__init__()
        self.values, self.noise, self.used = dict(values or {}), dict(noise or {}), set()

    def _pyro_sample(self, msg):
        name = msg["name"]
        chosen = self.values.get(name, self.noise.get(name))
        if msg["done"] or msg["is_observed"] or chosen is None or msg["fn"].batch_shape != chosen.shape:
            return
        if name in self.noise:
            base = getattr(msg["fn"], "base_dist", msg["fn"])
            value = base.loc + base.scale * chosen
            for transform in getattr(msg["fn"], "transforms", ()):
                value = transform(value)
            chosen = value if msg["fn"].has_rsample else value.detach()
        msg["value"], msg["done"] = chosen, True
        self.used.add(name)

    def __exit__(self, *args):
        if args[0] is None:
            assert self.used == self.values.keys() | self.noise.keys(), f"only {self.used} were asked for"
        return super().__exit__(*args)


def outcomes(num_particles, bits):
    """All values of that many binary numbers in each of K particles, shape (bits, K, 2 ** (K * bits))."""
    count = num_particles * bits
    grid = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * count).reshape(-1, count)
    return grid.T.reshape(bits, num_particles, -1).to(torch.get_default_dtype())


def hermite(num_particles, order=128):
    """Gauss-Hermite rule for K standard normals: nodes (K, order ** K) and their weights (order ** K)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / math.sqrt(2.0 * math.pi))
    grid = torch.cartesian_prod(*[nodes] * num_particles).reshape(-1, num_particles)
    mass = torch.cartesian_prod(*[weights] * num_particles).reshape(-1, num_particles).prod(-1)
    return grid.T.contiguous(), mass


def tiled(first, second):
    """Outcomes of two independent kinds of noise, (.., n) and (.., m), side by side: (.., n * m) each."""
    n, m = first.shape[-1], second.shape[-1]
    return first.repeat_interleave(m, -1), second.repeat((1,) * (second.dim() - 1) + (n,))


class SameParticles(Messenger):
    """Gives each particle noise that goes by its number, whether it runs with all K, in a chunk, or by itself.

    For sites that are made of Gaussians, coins and categories, straight or through transforms. Runs of two particles,
    which only look at a guide, are left alone: let no chunk be of two. ``first`` is the number of the first particle,
    where ``num_particles`` are a part of them; ``looks=None`` where no look is to be expected.
    """

    def __init__(self, num_particles, first=0, looks=2):
        super().__init__()
        self.num_particles, self.first, self.looks, self.passed = num_particles, first, looks, {}

    def _pyro_sample(self, msg):
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg) or isinstance(bare(fn), dist.Delta):
            return
        dims = [f.dim for f in msg["cond_indep_stack"] if f.name.startswith(PARTICLES)]
        count = fn.batch_shape[max(dims)] if dims else 1
        if count == self.looks:
            return
        passed = self.passed.get(msg["name"], 0)
        self.passed[msg["name"]] = (passed + count) % self.num_particles
        numbers = [self.first + (passed + i) % self.num_particles for i in range(count)]
        shape = list(fn.batch_shape)
        if dims:
            del shape[max(dims)]
        rows = [self.row(msg["name"], k, (*shape, *fn.event_shape)) for k in numbers]
        noise = torch.stack(rows, len(rows[0].shape) + 1 + max(dims) - len(fn.event_shape)) if dims else rows[0]
        value = drawn(fn, noise)
        msg["value"], msg["done"] = value if fn.has_rsample else value.detach(), True

    @staticmethod
    def row(name, number, shape):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.get_default_dtype())


def bare(fn):
    """The distribution inside all that only reshapes or masks it."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def drawn(fn, noise):
    """A draw made of standard Gaussian noise."""
    fn = bare(fn)
    if hasattr(fn, "transforms"):
        value = drawn(fn.base_dist, noise)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if hasattr(fn, "scale_tril"):
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    uniform = torch.special.ndtr(noise)
    if hasattr(fn, "logits"):
        if fn.param_shape == fn.batch_shape:
            return (uniform < fn.probs).to(noise.dtype)
        return (uniform.unsqueeze(-1) > fn.probs.cumsum(-1)).sum(-1).clamp(max=fn.probs.shape[-1] - 1)
    return fn.loc + fn.scale * noise
