# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every estimator under every law: its expectation over all noise is the exact gradient of the bound.

The expectations are exact (enumeration, or Gauss-Hermite quadrature), so that there is no tolerance beyond rounding;
one statistical test per estimator draws its own noise, end to end.
"""

import math
from functools import reduce

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.infer import Trace_ELBO
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_iwae import ImportanceWeightedELBO, exact, gradients
from pyro_iwae.logweights import LogWeights
from pyro_iwae.totals import LogMean
from tests.noise import Inject, hermite, outcomes, tiled
from tests.statistics import assert_mean, assert_same_mean

pytestmark = pytest.mark.usefixtures("double")

UNBIASED = [gradients.Pathwise(), gradients.DoublyReparameterized()]
BIASED = [gradients.StickTheLanding()]
SAMPLED = [gradients.SampledBackward(draws=d, inner=i) for i in (*UNBIASED, *BIASED) for d in (1, 2, 3)]
SCORE = [gradients.VIMCO(), gradients.OVIS()]
PAIRS = [pytest.param((g, s), id=f"{g}-{s}") for g in UNBIASED for s in SCORE]


def log_bernoulli(logit, z):
    return z * torch.as_tensor(logit) - torch.nn.functional.softplus(torch.as_tensor(logit))


def log_normal(loc, scale, z):
    return dist.Normal(loc, scale).log_prob(torch.as_tensor(z))


class Case:
    """A model and guide with scalar parameters, all noise of K particles, and log w in plain formulas.

    ``values`` (K, n) are outcomes of binary latents, ``noise`` (K, n) that of Gaussian ones, with weights ``mass``.
    """

    num_particles = 2
    tolerance = 1e-8  # of a quadrature rule, where two integrands differ and only their integrals are equal
    params: dict
    values: dict = {}
    noise: dict = {}
    mass: torch.Tensor | float = 1.0

    def latents(self, p):
        """Values by name, with their graph."""
        return self.values

    def log_q(self, p, z):
        """Log probability of the binary outcomes."""
        return torch.zeros(())

    def bound(self, p):
        """Exact L_K; autograd gives its exact gradient."""
        z = self.latents(p)
        law = self.log_q(p, z).sum(0).exp() * self.mass
        return (law * (self.log_w(p, z).logsumexp(0) - math.log(self.num_particles))).sum()

    def exact(self):
        p = {name: torch.tensor(value, requires_grad=True) for name, value in self.params.items()}
        bound = self.bound(p)
        grads = torch.autograd.grad(bound, list(p.values()), allow_unused=True)
        return bound.detach(), torch.stack([torch.zeros(()) if g is None else g for g in grads])

    def probabilities(self):
        p = {name: torch.tensor(value) for name, value in self.params.items()}
        law = self.log_q(p, self.latents(p)).sum(0).exp() * self.mass
        assert law.sum().item() == pytest.approx(1.0)
        return law

    def estimates(self, elbo):
        """Bound and gradient estimate at every outcome: shapes (n,) and (n, parameters)."""
        law = self.probabilities()
        n = len(law)
        p = {k: torch.full((n,), v, requires_grad=True) for k, v in self.params.items()}
        with Inject(self.values, self.noise):
            loss = elbo.differentiable_loss(self.model, self.guide, p, n)
        grads = torch.autograd.grad(-loss, list(p.values()), allow_unused=True)
        grads = torch.stack([torch.zeros(n) if g is None else g for g in grads], -1)
        with Inject(self.values, self.noise):
            bound = elbo.bound(self.model, self.guide, p, n)
        assert bound.shape == (n,), "outcomes must be an independent plate"
        assert -loss.item() == pytest.approx(bound.sum().item())
        return law, bound.detach(), grads


class Coin(Case):
    """exact.Bernoulli, by its own formulas."""

    params = {"logit": 0.5, "prior": 0.3}

    def __init__(self, num_particles):
        self.num_particles = num_particles
        (z,) = outcomes(num_particles, 1)
        self.values = {"z": z}

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            exact.Bernoulli(prior=p["prior"]).model()

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            exact.Bernoulli(logit=p["logit"]).guide()

    def log_q(self, p, z):
        return log_bernoulli(p["logit"], z["z"])

    def bound(self, p):
        return exact.Bernoulli(logit=p["logit"], prior=p["prior"]).bound(self.num_particles)


class Chain(Case):
    """z1 -> z2, both discrete: a coefficient of downstream terms only is biased here."""

    params = {"a": -0.4, "b": 0.3, "c": 0.8, "theta": 0.6}
    mask, scale = True, 1.0

    def __init__(self):
        self.values = dict(zip(("z1", "z2"), outcomes(2, 2), strict=True))

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            with poutine.scale(scale=self.scale):
                z1 = pyro.sample("z1", dist.Bernoulli(torch.tensor(0.3)))
                with poutine.mask(mask=torch.tensor(self.mask)):
                    z2 = pyro.sample("z2", dist.Bernoulli(logits=2.0 * z1 - p["theta"]))
            pyro.sample("x", dist.Normal(z1 + 2.0 * z2, 1.0), obs=torch.tensor(1.3))

    def guide(self, p, n):
        with pyro.plate("outcomes", n), poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=p["a"]))
            with poutine.mask(mask=torch.tensor(self.mask)):
                pyro.sample("z2", dist.Bernoulli(logits=p["b"] + p["c"] * z1))

    def parts(self, p, z):
        log_p = log_bernoulli(math.log(0.3 / 0.7), z["z1"]), log_bernoulli(2.0 * z["z1"] - p["theta"], z["z2"])
        log_q = log_bernoulli(p["a"], z["z1"]), log_bernoulli(p["b"] + p["c"] * z["z1"], z["z2"])
        return log_p, log_q, log_normal(z["z1"] + 2.0 * z["z2"], 1.0, 1.3)

    def log_q(self, p, z):
        return sum(self.parts(p, z)[1])

    def log_w(self, p, z):
        log_p, log_q, log_x = self.parts(p, z)
        return log_p[0] + log_p[1] - log_q[0] - log_q[1] + log_x


class MaskedChain(Chain):
    """z2's densities are masked, its value still matters: the score needs the unmasked log q."""

    mask = False

    def log_w(self, p, z):
        log_p, log_q, log_x = self.parts(p, z)
        return log_p[0] - log_q[0] + log_x


class TemperedChain(Chain):
    """The latents' densities are annealed inside the weight: the score needs the unscaled log q."""

    scale = 0.4

    def log_w(self, p, z):
        log_p, log_q, log_x = self.parts(p, z)
        return 0.4 * (log_p[0] + log_p[1] - log_q[0] - log_q[1]) + log_x


class AuxiliaryCoin(Chain):
    """z1 exists in the guide only."""

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z2 = pyro.sample("z2", dist.Bernoulli(logits=-p["theta"]))
            pyro.sample("x", dist.Normal(2.0 * z2, 1.0), obs=torch.tensor(1.3))

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=p["a"]), infer={"is_auxiliary": True})
            pyro.sample("z2", dist.Bernoulli(logits=p["b"] + p["c"] * z1))

    def log_w(self, p, z):
        log_x = log_bernoulli(-p["theta"], z["z2"]) + log_normal(2.0 * z["z2"], 1.0, 1.3)
        return log_x - sum(self.parts(p, z)[1])


class GlobalAndLocal(Case):
    """A global coin above two local ones: one weight holds them all."""

    params = {"a": 0.2, "b": -0.5, "c": 0.9, "theta": 0.4}

    def __init__(self):
        g, z1, z2 = outcomes(2, 3)
        self.values = {"g": g.unsqueeze(-1), "z": torch.stack([z1, z2], -1)}

    def model(self, p, n):
        p = {name: value.unsqueeze(-1) for name, value in p.items()}
        with pyro.plate("outcomes", n, dim=-2):
            g = pyro.sample("g", dist.Bernoulli(logits=p["theta"]))
            with pyro.plate("local", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=1.5 * g - 1.0))
                pyro.sample("x", dist.Normal(z + g, 1.0), obs=torch.tensor([1.4, -0.2]))

    def guide(self, p, n):
        p = {name: value.unsqueeze(-1) for name, value in p.items()}
        with pyro.plate("outcomes", n, dim=-2):
            g = pyro.sample("g", dist.Bernoulli(logits=p["a"]))
            with pyro.plate("local", 2, dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=p["b"] + p["c"] * g))

    def log_q(self, p, z):
        return log_bernoulli(p["a"], z["g"]).sum(-1) + log_bernoulli(p["b"] + p["c"] * z["g"], z["z"]).sum(-1)

    def log_w(self, p, z):
        log_p = log_bernoulli(p["theta"], z["g"]).sum(-1) + log_bernoulli(1.5 * z["g"] - 1.0, z["z"]).sum(-1)
        log_x = log_normal(z["z"] + z["g"], 1.0, torch.tensor([1.4, -0.2])).sum(-1)
        return log_p + log_x - self.log_q(p, z)


class EnumeratedModel(Coin):
    """A coin of the guide with another one, of the model, summed out inside the weight."""

    params = {"logit": 0.5, "prior": 0.3, "theta": 0.7}

    def __init__(self):
        super().__init__(2)

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z = pyro.sample("z", dist.Bernoulli(p["prior"]))
            c = pyro.sample("c", dist.Bernoulli(logits=p["theta"] - z), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2.0 * c, 1.0), obs=torch.tensor(1.5))

    def log_w(self, p, z):
        z, logit = z["z"], p["theta"] - z["z"]
        cases = [log_bernoulli(logit, torch.tensor(c)) + log_normal(z + 2.0 * c, 1.0, 1.5) for c in (0.0, 1.0)]
        log_prior = torch.where(z == 1.0, p["prior"].log(), (1.0 - p["prior"]).log())
        return log_prior + torch.logaddexp(*cases) - log_bernoulli(p["logit"], z)

    def bound(self, p):
        return Case.bound(self, p)


class Curve(Case):
    """One Gaussian latent below a curved likelihood; K = 2 is a two-dimensional Gaussian integral."""

    params = {"loc": 0.3, "log_scale": -0.2, "theta": 0.7}
    family = dist.Normal

    def __init__(self):
        eps, self.mass = hermite(2)
        self.noise = {"z": eps}

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z = pyro.sample("z", dist.Normal(p["theta"], 1.0))
            pyro.sample("x", dist.Normal(z.sin() + 0.5 * z, 1.0), obs=torch.tensor(1.1))

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            pyro.sample("z", self.family(p["loc"], p["log_scale"].exp()))

    def latents(self, p):
        return {"z": p["loc"] + p["log_scale"].exp() * self.noise["z"]}

    def log_w(self, p, z):
        z = z["z"]
        log_x = log_normal(z.sin() + 0.5 * z, 1.0, 1.1)
        return log_normal(p["theta"], 1.0, z) + log_x - log_normal(p["loc"], p["log_scale"].exp(), z)


class CurveWithoutReparameterisation(Curve):
    """The same, with a score-function gradient."""

    family = NonreparameterizedNormal


class GaussianThenCoin(Case):
    """A discrete site downstream of a reparameterised one: its score moves with the way through that."""

    params = {"loc": 0.3, "log_scale": -0.4, "b": 0.2, "c": -0.7, "theta": 0.5}

    def __init__(self):
        eps, mass = hermite(2, 48)
        (z2,) = outcomes(2, 1)
        eps, z2 = tiled(eps, z2)
        self.mass, _ = tiled(mass, torch.ones(4))
        self.noise, self.values = {"z1": eps}, {"z2": z2}

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.0), 1.0))
            z2 = pyro.sample("z2", dist.Bernoulli(logits=p["theta"] * z1))
            pyro.sample("x", dist.Normal(z1 + 1.5 * z2, 1.0), obs=torch.tensor(0.9))

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            z1 = pyro.sample("z1", dist.Normal(p["loc"], p["log_scale"].exp()))
            pyro.sample("z2", dist.Bernoulli(logits=p["b"] + p["c"] * z1))

    def latents(self, p):
        return {"z1": p["loc"] + p["log_scale"].exp() * self.noise["z1"], "z2": self.values["z2"]}

    def log_q(self, p, z):
        return log_bernoulli(p["b"] + p["c"] * z["z1"], z["z2"])

    def log_w(self, p, z):
        z1, z2 = z["z1"], z["z2"]
        log_q = log_normal(p["loc"], p["log_scale"].exp(), z1) + self.log_q(p, z)
        log_p = log_normal(torch.zeros(()), 1.0, z1) + log_bernoulli(p["theta"] * z1, z2)
        return log_p + log_normal(z1 + 1.5 * z2, 1.0, 0.9) - log_q


class CoinThenGaussian(GaussianThenCoin):
    """A reparameterised site downstream of a discrete one."""

    params = {"a": 0.3, "loc": 0.3, "c": 0.6, "log_scale": -0.4, "theta": 0.5}

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z2 = pyro.sample("z2", dist.Bernoulli(torch.tensor(0.4)))
            z1 = pyro.sample("z1", dist.Normal(p["theta"] * z2, 1.0))
            pyro.sample("x", dist.Normal(z1 + 1.5 * z2, 1.0), obs=torch.tensor(0.9))

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            z2 = pyro.sample("z2", dist.Bernoulli(logits=p["a"]))
            pyro.sample("z1", dist.Normal(p["loc"] + p["c"] * z2, p["log_scale"].exp()))

    def latents(self, p):
        z2 = self.values["z2"]
        return {"z1": p["loc"] + p["c"] * z2 + p["log_scale"].exp() * self.noise["z1"], "z2": z2}

    def log_q(self, p, z):
        return log_bernoulli(p["a"], z["z2"])

    def log_w(self, p, z):
        z1, z2 = z["z1"], z["z2"]
        log_q = log_normal(p["loc"] + p["c"] * z2, p["log_scale"].exp(), z1) + self.log_q(p, z)
        log_p = log_normal(p["theta"] * z2, 1.0, z1) + log_bernoulli(math.log(0.4 / 0.6), z2)
        return log_p + log_normal(z1 + 1.5 * z2, 1.0, 0.9) - log_q


class TemperedCurve(Curve):
    """The latent's densities are annealed inside the weight: doubly reparameterised is v - 0.4 (v - v^2) then."""

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            with poutine.scale(scale=0.4):
                z = pyro.sample("z", dist.Normal(p["theta"], 1.0))
            pyro.sample("x", dist.Normal(z.sin() + 0.5 * z, 1.0), obs=torch.tensor(1.1))

    def guide(self, p, n):
        with pyro.plate("outcomes", n), poutine.scale(scale=0.4):
            pyro.sample("z", dist.Normal(p["loc"], p["log_scale"].exp()))

    def log_w(self, p, z):
        z = z["z"]
        prior = log_normal(p["theta"], 1.0, z) - log_normal(p["loc"], p["log_scale"].exp(), z)
        return 0.4 * prior + log_normal(z.sin() + 0.5 * z, 1.0, 1.1)


class SharedParameter(Curve):
    """The guide's location is also the mean of the model's prior: both parts add up."""

    params = {"loc": 0.3, "log_scale": -0.2}

    def model(self, p, n):
        super().model({**p, "theta": 0.5 * p["loc"].sin()}, n)

    def log_w(self, p, z):
        return super().log_w({**p, "theta": 0.5 * p["loc"].sin()}, z)


class Hierarchy(Case):
    """z1 -> z2, both reparameterised: holding the arguments of q(z2 | z1) in place of its parameters is biased."""

    tolerance = 1e-6

    params = {"loc": 0.3, "log_scale": -0.3, "b": 0.4, "c": 0.5, "log_width": -0.4, "theta": 0.6}

    def __init__(self):
        eps, self.mass = hermite(4, 16)
        self.noise = {"z1": eps[:2], "z2": eps[2:]}

    def model(self, p, n):
        with pyro.plate("outcomes", n):
            z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.0), 1.0))
            z2 = pyro.sample("z2", dist.Normal(p["theta"] * z1, 1.0))
            pyro.sample("x", dist.Normal(z2 + 0.4 * z1, 1.2), obs=torch.tensor(1.1))

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            z1 = pyro.sample("z1", dist.Normal(p["loc"], p["log_scale"].exp()))
            pyro.sample("z2", dist.Normal(p["b"] + p["c"] * z1, p["log_width"].exp()))

    def latents(self, p):
        z1 = p["loc"] + p["log_scale"].exp() * self.noise["z1"]
        return {"z1": z1, "z2": p["b"] + p["c"] * z1 + p["log_width"].exp() * self.noise["z2"]}

    def log_p(self, p, z):
        log_p = log_normal(torch.zeros(()), 1.0, z["z1"]) + log_normal(p["theta"] * z["z1"], 1.0, z["z2"])
        return log_p + log_normal(z["z2"] + 0.4 * z["z1"], 1.2, 1.1)

    def log_w(self, p, z):
        log_q = log_normal(p["loc"], p["log_scale"].exp(), z["z1"])
        log_q = log_q + log_normal(p["b"] + p["c"] * z["z1"], p["log_width"].exp(), z["z2"])
        return self.log_p(p, z) - log_q


class DeltaFlow(Curve):
    """A flow written by hand: an auxiliary draw, and a Delta that bends it."""

    tolerance = 1e-6

    params = {"loc": 0.3, "log_scale": -0.2, "bend": 0.4, "theta": 0.7}

    @staticmethod
    def bent(p, u):
        return u + p["bend"] * u.tanh(), (1.0 + p["bend"] * (1.0 - u.tanh() ** 2)).log()

    def __init__(self):
        super().__init__()
        self.noise = {"u": self.noise.pop("z")}

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            u = pyro.sample("u", dist.Normal(p["loc"], p["log_scale"].exp()), infer={"is_auxiliary": True})
            z, log_slope = self.bent(p, u)
            pyro.sample("z", dist.Delta(z, log_density=-log_slope))

    def latents(self, p):
        u = p["loc"] + p["log_scale"].exp() * self.noise["u"]
        return {"u": u, "z": self.bent(p, u)[0]}

    def log_w(self, p, z):
        log_p = log_normal(p["theta"], 1.0, z["z"]) + log_normal(z["z"].sin() + 0.5 * z["z"], 1.0, 1.1)
        return log_p - log_normal(p["loc"], p["log_scale"].exp(), z["u"]) + self.bent(p, z["u"])[1]


class Bend(Transform):
    """A flow that cannot be inverted but by what it remembers."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, bend):
        super().__init__(cache_size=1)
        self.bend = bend

    def _call(self, x):
        return x + self.bend * x.tanh()

    def _inverse(self, y):
        raise KeyError("no inverse")

    def log_abs_det_jacobian(self, x, y):
        return (1.0 + self.bend * (1.0 - x.tanh() ** 2)).log()


class FlowWithoutInverse(DeltaFlow):
    """The same law, as a transformed distribution."""

    def __init__(self):
        Curve.__init__(self)

    def guide(self, p, n):
        with pyro.plate("outcomes", n):
            base = dist.Normal(p["loc"], p["log_scale"].exp())
            pyro.sample("z", dist.TransformedDistribution(base, [Bend(p["bend"])]))

    def latents(self, p):
        u = p["loc"] + p["log_scale"].exp() * self.noise["z"]
        return {"u": u, "z": self.bent(p, u)[0]}


class GlobalAndLocalGaussians(Case):
    """A global Gaussian above one local one in a plate of two: one weight holds them all."""

    params = {"loc": 0.2, "log_scale": -0.5, "c": 0.5, "theta": 0.4}
    tolerance = 1e-4

    def __init__(self):
        eps, self.mass = hermite(6, 6)
        self.noise = {"g": eps[:2].unsqueeze(-1), "z": torch.stack([eps[2:4], eps[4:]], -1)}

    def model(self, p, n):
        p = {name: value.unsqueeze(-1) for name, value in p.items()}
        with pyro.plate("outcomes", n, dim=-2):
            g = pyro.sample("g", dist.Normal(p["theta"], 1.0))
            with pyro.plate("local", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(g, 0.7))
                pyro.sample("x", dist.Normal(z, 1.5), obs=torch.tensor([0.8, -0.2]))

    def guide(self, p, n):
        p = {name: value.unsqueeze(-1) for name, value in p.items()}
        with pyro.plate("outcomes", n, dim=-2):
            g = pyro.sample("g", dist.Normal(p["loc"], p["log_scale"].exp()))
            with pyro.plate("local", 2, dim=-1):
                pyro.sample("z", dist.Normal(p["c"] * g, 0.6))

    def latents(self, p):
        g = p["loc"] + p["log_scale"].exp() * self.noise["g"]
        return {"g": g, "z": p["c"] * g + 0.6 * self.noise["z"]}

    def log_w(self, p, z):
        log_q = log_normal(p["loc"], p["log_scale"].exp(), z["g"]) + log_normal(p["c"] * z["g"], 0.6, z["z"]).sum(
            -1, True
        )
        log_p = log_normal(p["theta"], 1.0, z["g"]) + log_normal(z["g"], 0.7, z["z"]).sum(-1, True)
        return (log_p + log_normal(z["z"], 1.5, torch.tensor([0.8, -0.2])).sum(-1, True) - log_q).squeeze(-1)


CASES = {
    "coin K=2": lambda: Coin(2),
    "coin K=5": lambda: Coin(5),
    "chain": Chain,
    "masked chain": MaskedChain,
    "tempered chain": TemperedChain,
    "auxiliary site": AuxiliaryCoin,
    "global and local": GlobalAndLocal,
    "enumerated model site": EnumeratedModel,
    "curve": Curve,
    "curve without reparameterisation": CurveWithoutReparameterisation,
    "gaussian then coin": GaussianThenCoin,
    "coin then gaussian": CoinThenGaussian,
    "tempered curve": TemperedCurve,
    "shared parameter": SharedParameter,
    "hierarchy": Hierarchy,
    "flow by Delta": DeltaFlow,
    "flow without inverse": FlowWithoutInverse,
    "global and local gaussians": GlobalAndLocalGaussians,
}


def expectation(case, gradient, score):
    """Exact bound and gradient, and those that the estimator has in the mean over all noise."""
    elbo = ImportanceWeightedELBO(num_particles=case.num_particles, gradient=gradient, score=score)
    law, bound, grads = case.estimates(elbo)
    return case.exact(), ((law * bound).sum(), (law.unsqueeze(-1) * grads).sum(0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.filterwarnings("ignore:.*Jacobian")
def test_expected_gradient_is_exact(name, pair):
    """Expectation over all noise: value and gradient for every parameter of model and guide."""
    case, (gradient, score) = CASES[name](), pair
    if name == "gaussian then coin" and isinstance(gradient, gradients.DoublyReparameterized):
        with pytest.raises(ValueError, match=r"guide site 'z2' depends on 'z1'.*Pathwise"):
            expectation(case, gradient, score)
        return
    (exact_bound, exact_grads), (bound, grads) = expectation(case, gradient, score)
    assert gradient.unbiased and score.unbiased
    assert exact_grads.abs().max() > 1e-3, "a law about zeros says little"
    torch.testing.assert_close(bound, exact_bound, rtol=1e-9, atol=1e-12)
    tolerance = 1e-8 if isinstance(gradient, gradients.Pathwise) else case.tolerance
    torch.testing.assert_close(grads, exact_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["curve", "hierarchy", "gaussian then coin", "coin then gaussian", "shared parameter"])
@pytest.mark.parametrize("estimator", BIASED, ids=repr)
def test_a_declared_bias_is_there(name, estimator):
    assert not estimator.unbiased
    case = CASES[name]()
    (_, exact_grads), (_, grads) = expectation(case, estimator, gradients.OVIS())
    assert (grads - exact_grads).abs().max() > 0.05


@pytest.mark.parametrize("name", ["coin K=5", "chain", "global and local", "curve without reparameterisation"])
@pytest.mark.parametrize("estimator", BIASED, ids=repr)
def test_no_bias_without_reparameterised_sites(name, estimator):
    """For the model, and score-function sites, all path gradients are one."""
    (_, exact_grads), (_, grads) = expectation(CASES[name](), estimator, gradients.VIMCO())
    torch.testing.assert_close(grads, exact_grads, rtol=1e-8, atol=1e-10)


def test_holding_arguments_in_place_of_parameters_is_biased():
    """The trap of hierarchical guides, by hand: v_k^2 with the way of log q(z2 | z1) through z1 cut off, or not."""
    case = Hierarchy()
    p = {name: torch.full((case.mass.shape[0],), value, requires_grad=True) for name, value in case.params.items()}
    z = case.latents(p)
    held = {name: value.detach() for name, value in p.items()}
    names = ["loc", "log_scale", "b", "c", "log_width"]
    exact_grads = case.exact()[1][:5]
    square = case.log_w(p, z).detach().softmax(0) ** 2
    for mean, right in ((held["b"] + held["c"] * z["z1"], True), ((held["b"] + held["c"] * z["z1"]).detach(), False)):
        log_q = log_normal(held["loc"], held["log_scale"].exp(), z["z1"])
        log_q = log_q + log_normal(mean, held["log_width"].exp(), z["z2"])
        surrogate = (square * (case.log_p(held, z) - log_q)).sum()
        grads = torch.stack(torch.autograd.grad(surrogate, [p[n] for n in names], retain_graph=True))
        error = ((case.mass * grads).sum(-1) - exact_grads).abs().max()
        assert error < case.tolerance if right else error > 0.02


VANISHING = [*BIASED, gradients.DoublyReparameterized(), gradients.SampledBackward(draws=3)]


@pytest.mark.parametrize("path", VANISHING, ids=repr)
@pytest.mark.parametrize("num_particles", [1, 2, 7])
def test_no_guide_gradient_at_the_exact_posterior(path, num_particles):
    """For any noise, to rounding: no seed, no tolerance. The pathwise one is noise there."""
    data, scale = torch.randn(20) * 3.0, 0.5**0.5

    def model():
        with pyro.plate("data", 20):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(20), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=data)

    def guide():
        a, b, c = (torch.tensor(v, requires_grad=True) for v in (1.0 / 3.0, 0.5, 0.5))
        log_widths = torch.tensor([math.log(2.0 / 3.0) / 2.0, math.log(scale)], requires_grad=True)
        parameters.extend([a, b, c, log_widths])
        with pyro.plate("data", 20):
            z1 = pyro.sample("z1", dist.Normal(a * data, log_widths[0].exp()))
            pyro.sample("z2", dist.Normal(b * z1 + c * data, log_widths[1].exp()))

    def guide_gradient(gradient):
        parameters.clear()
        loss = ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient).differentiable_loss(model, guide)
        grads = torch.autograd.grad(loss, parameters[-4:])
        return max(g.abs().max().item() for g in grads)

    parameters = []
    assert guide_gradient(path) < 1e-12
    assert guide_gradient(gradients.Pathwise()) > 1e-3


def test_known_gradient_of_the_coin():
    """dL_5 / dlogit and the standard deviation per step with a leave-one-out control, and without any."""
    case = Coin(5)
    _, (exact_grad, _) = case.exact()
    assert exact_grad.item() == pytest.approx(0.0069682, abs=5e-8)
    law, bound, grads = case.estimates(ImportanceWeightedELBO(num_particles=5, score=gradients.VIMCO()))
    mean = (law * grads[:, 0]).sum()
    assert mean.item() == pytest.approx(0.0069682, abs=5e-8)
    deviation = (law * (grads[:, 0] - mean) ** 2).sum().sqrt()
    assert 0.215 < deviation < 0.225
    logit = torch.full((len(law),), 0.5, requires_grad=True)
    log_w = exact.Bernoulli(logit=0.5).log_joint()[case.values["z"].long()] - log_bernoulli(0.5, case.values["z"])
    coefficient = bound - log_w.softmax(0)
    (plain,) = torch.autograd.grad((coefficient * log_bernoulli(logit, case.values["z"])).sum(), logit)
    assert (law * plain).sum().item() == pytest.approx(0.0069682, abs=5e-8)
    assert 2.55 < (law * (plain - mean) ** 2).sum().sqrt() < 2.65


def test_downstream_terms_alone_are_biased():
    """What Trace_ELBO may do for one particle is wrong for more: the chain can tell."""
    case = Chain()
    p = {name: torch.full((16,), value, requires_grad=True) for name, value in case.params.items()}
    (log_p, log_q, log_x), law = case.parts(p, case.values), case.probabilities()

    def coefficient(log_w):
        others = log_w.flip(0)
        return (log_w.logsumexp(0) - math.log(2.0) - others - log_w.softmax(0)).detach()

    whole = log_p[0] + log_p[1] - log_q[0] - log_q[1] + log_x
    downstream = log_p[1] - log_q[1] + log_x
    names = ["a", "b", "c"]
    exact_grads = case.exact()[1][:3]
    for coefficients, right in (((whole, whole), True), ((whole, downstream), False)):
        surrogate = sum((coefficient(c) * q).sum() for c, q in zip(coefficients, log_q, strict=True))
        grads = torch.autograd.grad(surrogate, [p[n] for n in names], retain_graph=True)
        error = ((law * torch.stack(grads)).sum(-1) - exact_grads).abs()
        assert bool((error < 1e-9).all()) if right else bool((error[1:] > 1e-3).all())


def test_ovis_is_far_less_noisy_on_the_coin():
    """formulas: standard deviations per step 0.22 and 0.023, by enumeration."""
    deviations = []
    for score in SCORE:
        law, _, grads = Coin(5).estimates(ImportanceWeightedELBO(num_particles=5, score=score))
        mean = (law * grads[:, 0]).sum()
        deviations.append((law * (grads[:, 0] - mean) ** 2).sum().sqrt().item())
    assert deviations == pytest.approx([0.220, 0.0236], rel=0.02)


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("pair", PAIRS)
def test_mean_gradient_with_drawn_noise(num_particles, pair):
    """End to end, with the sampler's own noise."""
    gradient, score = pair
    elbo = ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient, score=score)
    case, n = Coin(num_particles), 100_000
    p = {name: torch.full((n,), value, requires_grad=True) for name, value in case.params.items()}
    grads = torch.autograd.grad(-elbo.differentiable_loss(case.model, case.guide, p, n), list(p.values()))
    assert_mean(torch.stack(grads, -1), case.exact()[1])
    assert_mean(elbo.bound(case.model, case.guide, p, n), case.exact()[0])


@pytest.mark.parametrize("name", ["gaussian then coin", "coin then gaussian", "hierarchy", "flow by Delta"])
@pytest.mark.parametrize("gradient", [*UNBIASED, gradients.SampledBackward(draws=1)], ids=repr)
@pytest.mark.parametrize("score", SCORE, ids=repr)
def test_mean_gradient_of_more_sites_with_drawn_noise(name, gradient, score):
    """Discrete and continuous sites, hierarchies, flows: z-scores against the exact gradient, K = 2."""
    if name == "gaussian then coin" and not isinstance(gradient, gradients.Pathwise):
        gradient = gradients.SampledBackward(draws=1, inner=gradients.Pathwise())
    case, n = CASES[name](), 40_000
    elbo = ImportanceWeightedELBO(num_particles=2, gradient=gradient, score=score)
    p = {name: torch.full((n,), value, requires_grad=True) for name, value in case.params.items()}
    grads = torch.autograd.grad(-elbo.differentiable_loss(case.model, case.guide, p, n), list(p.values()))
    assert_mean(torch.stack(grads, -1), case.exact()[1])


@pytest.mark.parametrize("pair", PAIRS)
def test_mean_pathwise_gradient_with_drawn_noise(pair):
    """Gaussians d apart: the exact bound and its slope in d, for any K."""
    gradient, score = pair
    offset = torch.tensor(1.0, requires_grad=True)
    bound = exact.Gaussian(data=torch.zeros(1), offset=offset).bound(10)
    (slope,) = torch.autograd.grad(bound.sum(), offset)
    n = 40_000
    offsets = torch.ones(n, requires_grad=True)
    case = exact.Gaussian(data=torch.zeros(n), offset=offsets)
    elbo = ImportanceWeightedELBO(num_particles=10, gradient=gradient, score=score)
    (grads,) = torch.autograd.grad(-elbo.differentiable_loss(case.model, case.guide), offsets)
    assert_mean(grads, slope)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_sampler_by_rejection_has_both_parts(pair):
    """Partly reparameterised: the score of the acceptance step beside the way through the accepted value."""
    n, (gradient, score) = 40_000, pair
    elbo = ImportanceWeightedELBO(num_particles=3, gradient=gradient, score=score)
    grads = []
    for family in (dist.Exponential, lambda rate: RejectionExponential(rate, torch.full((n,), 0.5))):
        rate = torch.full((n,), 1.3, requires_grad=True)

        def model():
            with pyro.plate("copies", n):
                pyro.sample("z", dist.Exponential(torch.tensor(2.0)))

        def guide(family=family, rate=rate):
            with pyro.plate("copies", n):
                pyro.sample("z", family(rate))

        grads.extend(torch.autograd.grad(elbo.differentiable_loss(model, guide), rate))
    assert_same_mean(grads[1], grads[0])


@pytest.mark.parametrize("family", [RejectionExponential, NonreparameterizedNormal])
def test_log_q_has_mean_gradient_zero_only_without_a_path(family):
    """What one particle leaves out: all of log q where only the score carries it, nothing where values do too."""
    site, values = family(torch.tensor([1.3, 0.6]), torch.tensor([0.5, 0.9])), []

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Exponential(torch.tensor(2.0)) if family is RejectionExponential else site)

    def guide():
        with pyro.plate("data", 2):
            values.append(pyro.sample("z", site))

    weights = ImportanceWeightedELBO(num_particles=3).log_weights(model, guide)
    has_path = family is RejectionExponential
    expected = torch.zeros(3, 2) if has_path else site.log_prob(values[-1].reshape(3, 2))
    torch.testing.assert_close(weights.score_log_q, expected)


@pytest.mark.parametrize("num_particles", [1, 2, 7])
def test_exact_posterior_bound_is_the_evidence(num_particles):
    """For any noise, to rounding: no seed, no tolerance."""
    case = exact.Gaussian(data=torch.randn(20) * 3.0)
    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    with Inject(noise={"z": torch.randn(num_particles, 20) * 10.0} if num_particles > 1 else {}):
        weights = elbo.log_weights(case.model, case.guide)
    torch.testing.assert_close(weights.bound(), case.log_evidence, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights.log_weights, case.log_evidence.expand(num_particles, 20))
    torch.testing.assert_close(weights.weights, torch.full((num_particles, 20), 1.0 / num_particles))


def random_weights(num_particles, elements=3, impossible=False):
    """LogWeights whose parts are leaves of one parameter vector."""
    theta = torch.randn(num_particles, elements, requires_grad=True)
    phi = torch.randn(num_particles, elements, requires_grad=True)
    values = theta + 2.0 * phi
    if impossible:
        dead = torch.zeros(num_particles, elements, dtype=torch.bool)
        dead[0], dead[:, 0] = True, True
        values = values.masked_fill(dead, -math.inf)
    return LogWeights(values, ("data",), score=phi, score_log_q=phi), (theta, phi)


@pytest.mark.parametrize("estimator", [gradients.Pathwise(), *SCORE], ids=repr)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_under_merged_totals_equal_the_whole(estimator, chunk):
    """The surrogate's gradient is a sum over particles, given the totals over all of them."""
    weights, leaves = random_weights(6)
    whole = torch.autograd.grad(
        estimator.surrogate(weights, weights.totals()).sum(), leaves, retain_graph=True, materialize_grads=True
    )
    blocks = [slice(i, i + chunk) for i in range(0, 6, chunk)]
    totals = reduce(LogMean.merge, [LogMean.of(weights.log_weights[b]) for b in blocks])
    parts = [LogWeights(weights.log_weights[b], ("data",), score=weights.score[b],
                        score_log_q=weights.score_log_q[b]) for b in blocks]  # fmt: skip
    chunked = torch.autograd.grad(
        sum(estimator.surrogate(part, totals).sum() for part in parts), leaves, materialize_grads=True
    )
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [gradients.Pathwise(), *SCORE], ids=repr)
@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_impossible_particles_leave_the_gradient_finite(estimator, num_particles):
    """The first element is all -inf and adds nothing of its own; in the others the first particle has weight 0."""
    weights, leaves = random_weights(num_particles, impossible=True)
    surrogate = estimator.surrogate(weights, weights.totals())
    grads = torch.autograd.grad(surrogate.sum(), leaves, materialize_grads=True)
    for grad in grads:
        assert bool(grad.isfinite().all())
    assert bool((grads[0][:, 0] == 0.0).all())
    if num_particles > 1:
        assert bool((grads[1][:, 0] == 0.0).all())


def test_one_particle_is_trace_elbo():
    """K = 1 is a branch of its own: with the - v_k term of K > 1 it would be wrong."""
    case = Coin(1)
    n = 1000
    grads = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(num_particles=1)):
        pyro.set_rng_seed(7)
        p = {name: torch.full((n,), value, requires_grad=True) for name, value in case.params.items()}
        loss = elbo.differentiable_loss(case.model, case.guide, p, n)
        grads.append(torch.stack(torch.autograd.grad(loss, list(p.values()))))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0.0)


def test_surrogate_of_one_particle_has_the_mean_gradient_of_the_elbo():
    """The estimator's own K = 1 branch: Lhat d log q, and the entropy term that Trace_ELBO leaves out."""
    logit = torch.full((2,), 0.5, requires_grad=True)
    z = torch.tensor([0.0, 1.0])
    log_q = log_bernoulli(logit, z)
    log_w = exact.Bernoulli().log_joint() - log_q
    weights = LogWeights(log_w.unsqueeze(0), ("z",), score=log_q.unsqueeze(0), score_log_q=log_q.unsqueeze(0))
    totals = weights.totals()
    surrogate = gradients.Pathwise().surrogate(weights, totals) + gradients.VIMCO().surrogate(weights, totals)
    (grads,) = torch.autograd.grad(surrogate.sum(), logit)
    torch.testing.assert_close(grads, log_w * (z - logit.sigmoid()), msg="the part of mean zero is left out")
    leaf = torch.tensor(0.5, requires_grad=True)
    (expected,) = torch.autograd.grad(exact.Bernoulli(logit=leaf).bound(1), leaf)
    torch.testing.assert_close((log_q.exp() * grads).sum(), expected)


def test_the_guides_signal_grows_with_the_number_of_particles():
    """Signal to noise of the guide's gradient by sqrt(K): pathwise falls, doubly reparameterised grows.

    Gaussians d apart, the gradient by d, 40,000 copies: the ratio at 16 times as many particles is 1/4 and 4, but for
    the particles that it takes for the law of large K to hold. Both have one mean, which the second knows well.
    """
    signal, noise = {}, {}
    for gradient in UNBIASED:
        for num_particles in (10, 160):
            offsets = torch.full((40_000,), 0.3, requires_grad=True)
            case = exact.Gaussian(data=torch.zeros(40_000), offset=offsets)
            elbo = ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient)
            (grads,) = torch.autograd.grad(elbo.differentiable_loss(case.model, case.guide), offsets)
            signal[num_particles] = grads.mean().item()  # of the last one, doubly reparameterised
            noise[repr(gradient), num_particles] = grads.std().item()
    falls, grows = (signal[160] / noise[repr(g), 160] / (signal[10] / noise[repr(g), 10]) for g in UNBIASED)
    assert 3.0 < grows < 5.0 and 0.2 < falls < 0.33


def test_every_estimator_is_under_every_law():
    """The registries above hold all that the package exports, and each says what it promises."""
    everyone = [*UNBIASED, *BIASED, *SAMPLED, *SCORE]
    contracts = {"Gradient", "PathGradient", "ScoreGradient", "Coefficients"}
    assert {type(e).__name__ for e in everyone} == set(gradients.__all__) - contracts
    for estimator in everyone:
        assert isinstance(estimator, gradients.Gradient)
        assert isinstance(estimator.unbiased, bool)
        assert estimator.needs and estimator.reference
        assert repr(estimator).startswith(f"{type(estimator).__name__}(")
