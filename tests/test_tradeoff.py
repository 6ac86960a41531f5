# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""tradeoff(): bounds and gains against known values, memory against known allocations, and what it recommends."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_iwae import DoublyReparameterized, tradeoff
from pyro_iwae.cost import peak_bytes, seconds
from pyro_iwae.exact import Gamma, Gaussian
from pyro_iwae.tradeoff import Cost
from tests.statistics import limit

CPU = torch.device("cpu")
GAMMA = Gamma(shape=torch.tensor(1.0, dtype=torch.float64))


def quick(model, guide, *args, **options):
    return tradeoff(model, guide, *args, **{"ks": [1, 2, 8], "progress": False, **options})


@pytest.fixture(scope="module")
def gamma():
    pyro.set_rng_seed(0)
    return quick(GAMMA.model, GAMMA.guide, num_replicates=1000)


def costing(found, **seconds):
    """The same, with other times, by K."""
    costs = {k: replace(c, seconds=seconds.get(f"k{k}", 1.0), spread=(1.0, 1.0)) for k, c in found.costs.items()}
    return replace(found, costs=costs)


def test_bounds_and_gains_are_known(gamma):
    wide = limit(1000, 5)
    for k, bound in gamma.bounds.items():
        assert abs(float(bound.value) - float(GAMMA.bound(k))) < wide * float(bound.std_error)
    assert list(gamma.gains) == [2, 8]
    for k, before, doublings in ((2, 1, 1), (8, 2, 2)):
        expected = float(GAMMA.bound(k) - GAMMA.bound(before)) / doublings
        gain = gamma.gains[k]
        assert abs(float(gain.value) - expected) < wide * float(gain.std_error)
    # of the same particles: L_8 is of all eight, of which L_2 is the mean over four pairs
    apart = math.hypot(float(gamma.bounds[8].std_error), float(gamma.bounds[2].std_error)) / 2.0
    assert float(gamma.gains[8].std_error) < 0.7 * apart


def test_gains_add_up_over_elements():
    gaussian = Gaussian(data=torch.zeros(5, dtype=torch.float64), offset=1.0)
    found = quick(gaussian.model, gaussian.guide, num_replicates=400)
    expected = 5 * float((gaussian.bound(8) - gaussian.bound(2))[0]) / 2
    assert abs(float(found.gains[8].value) - expected) < limit(400) * float(found.gains[8].std_error)
    assert "nats per element" in str(found)
    # 0.5, 0.34, 0.17 nats below the evidence: 0.16 for the first doubling, 0.08 for the next two, of each element
    assert found.recommend(0.12).num_particles == 2
    assert found.recommend(0.3).num_particles == 1


def test_it_recommends_where_doublings_are_worth_it(gamma):
    # 0.308 and 0.104 nats a doubling
    assert gamma.recommend(0.2).num_particles == 2
    assert gamma.recommend(0.5).num_particles == 1
    found = gamma.recommend(0.05)
    assert found.num_particles == 8
    assert "some 20 particles would be needed" in found.why
    assert "doublings begin" not in found.why
    with pytest.raises(ValueError, match="expected worth > 0"):
        gamma.recommend(0.0)


def test_limits_of_cost(gamma):
    measured = costing(gamma, k1=0.1, k2=0.2, k8=0.4)
    assert measured.recommend(0.05).num_particles == 8
    held = measured.recommend(0.05, max_seconds=0.25)
    assert held.num_particles == 2
    assert "K = 8 is where doublings begin" not in held.why  # the ladder ends there; the next line says so
    other = measured.recommend(0.2, max_seconds=0.15)
    assert other.num_particles == 1
    assert "K = 2 is where doublings begin to gain less than 0.2, but costs too much" in other.why
    with pytest.raises(ValueError, match="got 0.1 s and"):
        measured.recommend(max_seconds=0.01)
    assert "as fast within 10%" not in measured.recommend(0.2).why
    assert "Up to K = 8 a step is as fast within 10%" in costing(gamma, k1=0.1).recommend(0.2).why


def test_a_noisy_gradient_is_told_of(gamma):
    cost = {1: (4.0, 0.1), 2: (1.0, 0.1), 8: (0.5, 0.1)}
    costs = {k: replace(c, snr=cost[k][0], snr_error=cost[k][1]) for k, c in gamma.costs.items()}
    noisy = replace(gamma, costs=costs)
    assert "take gradient=DoublyReparameterized()" in noisy.recommend(0.2).why
    assert "guide's SNR" in str(noisy)
    assert "take gradient" not in replace(noisy, gradient=DoublyReparameterized()).recommend(0.2).why
    assert "guide's SNR" not in str(gamma)  # which has no parameters


def test_a_guide_outside_the_support():
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))

    def guide():
        pyro.sample("z", dist.Uniform(-1.0, 1.0))

    with pytest.warns(UserWarning, match="impossible"):
        found = quick(model, guide)
    assert found.recommended.num_particles == 8
    assert "the bound of K = 1 is -inf nats" in found.recommended.why


def test_a_far_off_guide_is_told_of():
    far = Gaussian(data=torch.zeros(2, dtype=torch.float64), offset=5.0)
    assert "Beware: few particles carry the weight of 2 of 2 elements" in str(quick(far.model, far.guide))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def test_nothing_is_left_behind():
    net = Linear()
    x = torch.randn(40, 3)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1] + torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(net.norm(net.layer(x)), 1.0).to_event(1))

    net.layer.weight.grad = torch.ones(2, 3)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    pyro.set_rng_seed(4)
    torch.randint(2**62, ())
    expected = torch.rand(2)
    pyro.set_rng_seed(4)
    with pytest.warns(UserWarning, match="BatchNorm"):
        found = quick(model, guide, x)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert torch.equal(net.layer.weight.grad, torch.ones(2, 3))
    assert net.layer.bias.grad is None
    assert all(
        c.snr > 0.0 and c.seconds > 0.0 and c.spread[0] <= c.seconds <= c.spread[1] for c in found.costs.values()
    )
    assert found.costs[1].bytes < found.costs[8].bytes


@pytest.mark.nightly
def test_compiled_steps():
    def guide():
        pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(1.0)), 1.0))

    plain, compiled = (quick(Gamma(shape=1.0).model, guide, ks=[2, 4], compile=c) for c in (False, True))
    for k in (2, 4):
        apart = math.hypot(plain.costs[k].snr_error, compiled.costs[k].snr_error)
        assert abs(plain.costs[k].snr - compiled.costs[k].snr) < 6.0 * apart


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ks": [4]}, ValueError, "at least two different ks"),
        ({"ks": [1, 0]}, ValueError, "ks"),
        ({"num_steps": 5}, ValueError, "num_steps"),
        ({"gradient": "pathwise"}, TypeError, "gradient"),
        ({"max_plate_nesting": -1}, ValueError, "max_plate_nesting"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        quick(GAMMA.model, GAMMA.guide, **options)


def test_memory_of_known_allocations():
    size = 4 * 250_000

    def step():
        first = torch.zeros(250_000)
        second = first.exp()
        del first
        third = second + 1.0
        return third.sum()

    for _ in range(2):
        assert abs(peak_bytes(step, CPU) - 2 * size) < 1000
    held = torch.zeros(1_000_000)
    assert peak_bytes(lambda: held.sum(), CPU) < 1000  # what was there already does not count
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0, CPU)


def test_memory_grows_with_particles_and_chunks_hold_it():
    gaussian = Gaussian(data=torch.zeros(1000), offset=1.0)
    plain = quick(gaussian.model, gaussian.guide, ks=[8, 64], num_replicates=2)
    chunked = quick(gaussian.model, gaussian.guide, ks=[8, 64], num_replicates=2, chunk_size=8)
    assert 6.0 < plain.costs[64].bytes / plain.costs[8].bytes < 10.0
    assert chunked.costs[64].bytes < 0.5 * plain.costs[64].bytes


def test_a_step_is_timed():
    ticks = []
    assert 0.0 < seconds(lambda: ticks.append(1), CPU) < math.inf
    assert ticks == [1]


def test_report_and_plot(gamma):
    report = str(gamma)
    assert report.splitlines()[0].split() == "K bound, nats gain per doubling step, ms memory".split()
    assert len(report.splitlines()) == 6
    assert str(gamma.recommended) in report
    ax = gamma.plot()
    (right,) = [a for a in ax.figure.axes if a is not ax]
    assert ax.get_ylabel() == "bound (nats)"
    assert right.get_ylabel() == "time of a step (ms)"
    line = next(c for c in ax.containers if c.get_label() == "bound (left)").lines[0]
    assert list(line.get_xdata()) == [1, 2, 8]
    assert line.get_ydata()[2] == float(gamma.bounds[8].value)
    times = next(iter(right.containers)).lines[0].get_ydata()
    assert list(times) == [1e3 * c.seconds for c in gamma.costs.values()]
    plt.close("all")
    _, ours = plt.subplots()
    assert gamma.plot(ax=ours) is ours
    plt.close("all")


def test_sizes_are_readable(gamma):
    costs = dict(zip(gamma.costs, (Cost(0.1, (0.1, 0.1), b) for b in (12, 3_400_000, 5_600_000_000)), strict=True))
    lines = str(replace(gamma, costs=costs)).splitlines()
    assert [line.split("  ")[-1] for line in lines[1:4]] == ["12 B", "3.4 MB", "5.6 GB"]


def test_auto_is_another_number_for_each_k():
    with pytest.raises(ValueError, match=r"the same for each of the ks, got 'auto'"):
        quick(GAMMA.model, GAMMA.guide, plate_particles="auto")
