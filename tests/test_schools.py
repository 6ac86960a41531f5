# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Eight schools: an AutoNormal, corrected, against quadrature and Pyro's NUTS; and whether to believe it."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_median
from pyro.ops.stats import effective_sample_size

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, evaluate
from tests.statistics import assert_mean, limit

EFFECTS = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2], dtype=torch.float64)
ERRORS = torch.tensor([1.5, 1.0, 1.6, 1.1, 0.9, 1.1, 1.0, 1.8], dtype=torch.float64)


def model():
    """Not centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    with pyro.plate("schools", 8):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * noise, ERRORS), obs=EFFECTS)


def centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def trained(program, steps=600):
    pyro.set_rng_seed(1)
    guide = AutoNormal(program, init_scale=0.5)
    rate = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(program, guide, rate, ImportanceWeightedELBO(16))
    for _ in range(steps):
        svi.step()
    return guide


def moments(z):
    """Means and squares of mu, tau and the eight effects."""
    mu, tau = z["mu"].unsqueeze(-1), z["tau"].unsqueeze(-1)
    both = torch.cat([mu, tau, mu + tau * z["noise"]], -1)
    return torch.cat([both, both.square()], -1)


def exact():
    """Log evidence and posterior moments: quadrature over mu and log tau; given these all is Gaussian."""
    line, other = torch.linspace(-5, 6, 500), torch.linspace(-14, 7, 2500)
    mu, log_tau = torch.meshgrid(line, other, indexing="ij")
    mu, tau = mu.unsqueeze(-1), log_tau.exp().unsqueeze(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + dist.HalfCauchy(0.5).log_prob(tau) + tau.log()
    log_p = log_p.squeeze(-1) + dist.Normal(mu, (ERRORS**2 + tau**2).sqrt()).log_prob(EFFECTS).sum(-1)
    log_evidence = log_p.logsumexp((0, 1)) + math.log((line[1] - line[0]) * (other[1] - other[0]))
    weights = log_p.flatten().softmax(0).reshape(log_p.shape).unsqueeze(-1)
    variance = 1 / (ERRORS**-2 + tau**-2)
    theta = variance * (EFFECTS / ERRORS**2 + mu / tau**2)
    each = [mu, tau, theta, mu**2, tau**2, variance + theta**2]
    return float(log_evidence), torch.cat([(weights * part).sum((0, 1)) for part in each])


def test_corrected_moments_and_evidence_by_quadrature(double):
    guide = trained(model)
    found = evaluate(model, guide, num_particles=2000, num_replicates=100, progress=False)
    log_evidence, expected = exact()
    assert abs(found.total.log_evidence - log_evidence) < limit(100) * found.total.std_error
    assert bool(found.trusted)
    assert float(found.khat) < float(found.khat_threshold)
    assert float(found.ess) > 1000
    posterior = ImportanceResampledGuide(model, guide, num_particles=4000)
    rows = torch.stack([posterior.expectation(moments, num_batches=1) for _ in range(200)])
    known = torch.arange(20) != 11  # E[tau²] has a heavy tail, whose mean few particles tell
    assert_mean(rows[:, known], expected[known])


@pytest.mark.nightly
def test_corrected_means_and_standard_deviations_are_those_of_nuts(double):
    guide = trained(model, 2000)
    posterior = ImportanceResampledGuide(model, guide, num_particles=10_000)
    rows = torch.stack([posterior.expectation(moments, num_batches=1) for _ in range(100)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # of Pyro's jit_compile
        kernel = NUTS(
            model, max_plate_nesting=1, jit_compile=True, ignore_jit_warnings=True, init_strategy=init_to_median
        )
        mcmc = MCMC(kernel, num_samples=6000, warmup_steps=1000, disable_progbar=True)
        mcmc.run()
    draws = moments(mcmc.get_samples())
    assert len(draws) == 6000
    effective = effective_sample_size(draws.unsqueeze(0), 0, 1)
    ours, nuts = rows.mean(0), draws.mean(0)
    of_ours = rows.std(0) / math.sqrt(len(rows))
    of_nuts = draws.std(0) / effective.sqrt()
    known = torch.arange(20) != 11
    z = ((ours - nuts) / (of_ours**2 + of_nuts**2).sqrt())[known]
    assert bool((z.abs() < limit(100, len(z))).all()), z
    spread = [(m[10:] - m[:10] ** 2).sqrt() for m in (ours, nuts)]
    assert bool(((spread[0] / spread[1])[torch.arange(10) != 1] - 1.0).abs().max() < 0.1)


@pytest.mark.nightly
def test_the_funnel_is_not_believed(double):
    """A Gaussian in theta cannot follow the centred model into its funnel; the non-centred one has none."""
    believed = {}
    for program in (model, centred):
        pyro.clear_param_store()
        found = evaluate(program, trained(program, 2000), num_particles=10_000, num_replicates=16, progress=False)
        believed[program.__name__] = bool(found.trusted)
    assert believed == {"model": True, "centred": False}
