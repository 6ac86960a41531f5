# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What is timed: three models in Pyro, with their guides, data and starting values.

Eight schools, with global latents and a plate of eight; a regression of many groups, an intercept and a slope for each;
a variational autoencoder. The first two have Pyro's ``AutoNormal`` as their guide, all peers at the same place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn

from support.vae import VAE

EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981)
ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
SCALE = 0.1  # of AutoNormal's normals, at the start


@dataclass(frozen=True)
class Problem:
    """A model and guide in Pyro; and the numbers from which a peer makes the same."""

    model: Callable
    guide: Callable
    args: tuple[torch.Tensor, ...]
    module: nn.Module  # owns all parameters
    start: dict[str, torch.Tensor] = field(default_factory=dict)  # by latent, constrained


@dataclass(frozen=True)
class Sizes:
    """Of the models that have one to choose."""

    groups: int = 1000
    rows: int = 5
    pixels: int = 784
    hidden: int = 200
    latents: int = 50
    batch: int = 100


SMALL = Sizes(groups=6, rows=2, pixels=16, hidden=8, latents=3, batch=4)


def schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(effects.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(effects.new_full((), 5.0)))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effects", dist.Normal(theta, errors), obs=effects)


def regression(t, y):
    mu = pyro.sample("mu", dist.Normal(t.new_zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(t.new_ones(2)).to_event(1))
    with pyro.plate("groups", len(t)):
        line = pyro.sample("line", dist.Normal(mu, tau).to_event(1))
        pyro.sample("y", dist.Normal(line[..., :1] + line[..., 1:] * t, 1.0).to_event(1), obs=y)


def make_schools(sizes, device):
    effects, errors = torch.tensor(EFFECTS, device=device), torch.tensor(ERRORS, device=device)
    start = {"mu": torch.tensor(4.0), "tau": torch.tensor(3.0), "theta": torch.full((8,), 4.0)}
    return with_autonormal(schools, (effects, errors), start, device)


def make_regression(sizes, device):
    groups, rows = sizes.groups, sizes.rows
    t = torch.randn(groups, rows)
    y = torch.randn(groups, 1) + 0.5 * torch.randn(groups, 1) * t + torch.randn(groups, rows)
    start = {"mu": torch.zeros(2), "tau": torch.full((2,), 0.7), "line": torch.zeros(groups, 2)}
    return with_autonormal(regression, (t.to(device), y.to(device)), start, device)


def with_autonormal(model, args, start, device):
    start = {name: value.to(device) for name, value in start.items()}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start), init_scale=SCALE)
    with pyro.get_param_store().scope():
        guide(*args)  # makes its parameters
    return Problem(model, guide, args, guide, start)


def make_vae(sizes, device):
    vae = VAE(sizes.pixels, [sizes.hidden, sizes.hidden], sizes.latents).to(device)
    x = torch.bernoulli(torch.full((sizes.batch, sizes.pixels), 0.3)).to(device)
    return Problem(vae.model, vae.guide, (x,), vae)


MAKERS = {"eight schools": make_schools, "regression": make_regression, "VAE": make_vae}


def make_problem(name, sizes, device="cpu"):
    """Always the same numbers, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[name](sizes, device)
