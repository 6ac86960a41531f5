# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Chosen noise in place of drawn noise: exact expectations over all outcomes of K particles, without a tolerance.

All joint outcomes of K particles are laid out along an independent plate "outcomes", so that one call of an ELBO
visits every one of them; weighing them by their probabilities gives the expectation of whatever came out.
"""

import math

import numpy as np
import torch
from pyro.poutine.messenger import Messenger


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
