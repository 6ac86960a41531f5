# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Signal-to-noise ratios against known ones; what a user sees of them."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger
from torch import nn

from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO, StickTheLanding, gradient_snr
from pyro_iwae.gradient_snr import _Moments, _report

pytestmark = pytest.mark.usefixtures("double")


def model():
    pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))


def guide():
    loc = pyro.param("loc", torch.tensor([0.6, -0.8, 0.0, 0.0]))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), ImportanceWeightedELBO(1)], ids=["Trace_ELBO", "ours"])
def test_known_ratio(elbo):
    """The gradient is loc + noise of variance 1 in each of four coordinates: |loc| / 2, each |loc_i|."""
    found = gradient_snr(elbo, model, guide, num_replicates=2000, progress=False)
    assert found.num_replicates == 2000
    assert abs(found.guide - 0.5) < 6.0 * found.guide_error
    assert 0.002 < found.guide_error < 0.05
    (parameter,) = found.parameters
    assert (parameter.name, parameter.role, parameter.snr) == ("loc", "guide", found.guide)
    torch.testing.assert_close(parameter.coordinates[:2], torch.tensor([0.6, 0.8]), atol=0.15, rtol=0.0)
    assert math.isnan(found.model)


def test_the_noise_in_the_mean_is_taken_off():
    """A gradient of pure noise has ratio 0, not 1 / sqrt(replicates)."""

    def centred():
        loc = pyro.param("loc", torch.zeros(100))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def wide():
        pyro.sample("z", dist.Normal(torch.zeros(100), 1.0).to_event(1))

    found = gradient_snr(Trace_ELBO(), wide, centred, num_replicates=100, progress=False)
    assert found.guide < 0.06  # uncorrected 0.1
    assert found.guide < 6.0 * found.guide_error


def test_hardly_any_noise():
    """Rounding alone: no cancellation makes it look like noise."""
    found = gradient_snr(ImportanceWeightedELBO(1, gradient=StickTheLanding()), model, guide, progress=False)
    assert found.guide > 1e12


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        self.level = nn.Parameter(torch.tensor(0.1))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        pyro.param("level", self.level)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.level, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        level = pyro.param("level", self.level)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x) + level, 0.7).to_event(1))


def test_roles_and_leftovers():
    vae, x = VAE(), torch.randn(8, 3)
    vae.encoder.weight.grad = kept = torch.ones_like(vae.encoder.weight)
    values = {n: p.detach().clone() for n, p in vae.named_parameters()}
    found = gradient_snr(ImportanceWeightedELBO(4), vae.model, vae.guide, x, num_replicates=20, progress=False)
    assert {p.name: p.role for p in found.parameters} == {
        "encoder$$$weight": "guide",
        "encoder$$$bias": "guide",
        "level": "shared",
        "decoder$$$weight": "model",
        "decoder$$$bias": "model",
    }
    assert found.parameters[0].coordinates.shape in {p.shape for p in vae.parameters()}
    assert vae.encoder.weight.grad is kept and bool((kept == 1.0).all()) and vae.decoder.weight.grad is None
    assert all(bool((p == values[n]).all()) for n, p in vae.named_parameters())


def test_a_guide_that_runs_the_model_with_it():
    def hierarchical():
        theta = pyro.param("theta", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    messenger = AutoHierarchicalNormalMessenger(hierarchical)
    messenger()
    found = gradient_snr(ImportanceWeightedELBO(4), hierarchical, messenger, num_replicates=20, progress=False)
    roles = {p.name: p.role for p in found.parameters}
    assert roles.pop("theta") == "shared"  # the prior, and so the posterior, which is made from the prior
    assert set(roles.values()) == {"guide"}


def test_roles_go_by_use_not_by_who_asks():
    """Both register all networks at once, as the deep Markov model of Pyro's tutorial does."""
    vae = VAE()

    def both(x):
        pyro.module("vae", vae)
        return vae.model(x)

    def both_guide(x):
        pyro.module("vae", vae)
        return vae.guide(x)

    found = gradient_snr(
        ImportanceWeightedELBO(4), both, both_guide, torch.randn(8, 3), num_replicates=20, progress=False
    )
    roles = {p.name: p.role for p in found.parameters if p.name.startswith("vae")}
    assert roles == {
        "vae$$$encoder.weight": "guide",
        "vae$$$encoder.bias": "guide",
        "vae$$$level": "shared",
        "vae$$$decoder.weight": "model",
        "vae$$$decoder.bias": "model",
    }


def test_other_elbos_can_be_compared():
    """On the same model: doubly reparameterised is less noisy than Pyro's pathwise RenyiELBO."""
    renyi = RenyiELBO(alpha=0.0, num_particles=100, vectorize_particles=True, max_plate_nesting=0)
    ours = ImportanceWeightedELBO(100, gradient=DoublyReparameterized())
    ratios = [gradient_snr(e, model, guide, num_replicates=50, progress=False) for e in (renyi, ours)]
    assert ratios[1].guide > 2.0 * ratios[0].guide


def test_report_and_plot():
    vae, x = VAE(), torch.randn(8, 3)
    found = gradient_snr(ImportanceWeightedELBO(4), vae.model, vae.guide, x, num_replicates=20, progress=False)
    text = str(found)
    assert "20 replicates" in text and "encoder$$$weight" in text and f"{found.model:.3f}" in text
    axes = found.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == [p.name for p in found.parameters]
    bars = {round(bar.get_width(), 9) for bar in axes.patches}
    assert bars == {round(p.snr, 9) for p in found.parameters}
    other = plt.subplots()[1]
    assert found.plot(ax=other) is other
    plt.close("all")


def test_progress(capsys):
    gradient_snr(Trace_ELBO(), model, guide, num_replicates=20)
    assert "gradients: 100%" in capsys.readouterr().err
    gradient_snr(Trace_ELBO(), model, guide, num_replicates=20, progress=False)
    assert capsys.readouterr().err == ""


def test_arguments():
    with pytest.raises(ValueError, match="num_replicates >= 20, got 5"):
        gradient_snr(Trace_ELBO(), model, guide, num_replicates=5)
    with pytest.raises(TypeError, match="elbo to be an ELBO"):
        gradient_snr(model, model, guide)
    with pytest.raises(TypeError, match="guide to be callable"):
        gradient_snr(Trace_ELBO(), model, None)
    with pytest.raises(ValueError, match="with parameters"):
        gradient_snr(Trace_ELBO(), model, model)


def test_an_error_on_the_way_leaves_gradients_as_they_were():
    calls = []

    def failing():
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("enough")
        guide()

    pyro.param("loc", torch.ones(4)).grad = kept = torch.zeros(4)
    with pytest.raises(RuntimeError, match="enough"):
        gradient_snr(Trace_ELBO(), model, failing, progress=False)
    assert pyro.param("loc").grad is kept


def fed(rows):
    """What is kept of gradients of one parameter."""
    found = _Moments({"a": torch.zeros(rows.shape[1])})
    for row in rows:
        found.add({"a": SimpleNamespace(grad=row)})
    return found


def test_moments_by_hand():
    one, other = torch.randn(7, 3), 5.0 + torch.randn(4, 3)
    rows, found = torch.cat([one, other]), fed(one)
    found.merge(fed(other))
    torch.testing.assert_close(found.mean["a"], rows.mean(0))
    torch.testing.assert_close(found.variance("a"), rows.var(0))
    noise = rows.var(0).sum()
    squared = (rows.mean(0).square().sum() - noise / 11) / noise
    assert math.isclose(found.snr_squared(["a"]), float(squared), rel_tol=1e-12)


def test_the_error_is_the_spread_over_runs():
    """Of 200 runs: their spread is known to 5 %, and the mean of the errors better; 1.3 is five standard errors."""
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        groups = [fed(1.0 + 2.0 * torch.randn(10, 4)) for _ in range(20)]
        whole = fed(torch.zeros(0, 4))
        for group in groups:
            whole.merge(group)
        found.append(_report(whole, groups, {"a": "guide"}))
    spread = torch.tensor([f.guide for f in found]).std()
    error = torch.tensor([f.guide_error for f in found]).square().mean().sqrt()
    assert 1.0 / 1.3 < float(error / spread) < 1.3
