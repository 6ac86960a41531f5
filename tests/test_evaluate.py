# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""evaluate() against known values; merged, kept, killed, and told to go on until it is good enough."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_iwae import Evaluation, evaluate
from pyro_iwae.exact import Gamma, Gaussian, HierarchicalGaussian
from tests.statistics import assert_mean, limit, nightly

GAMMA = Gamma(shape=torch.tensor(1.0, dtype=torch.float64))
GAUSSIAN = Gaussian(data=torch.linspace(-2.0, 2.0, 6, dtype=torch.float64), offset=0.8)
FIGURES = ("log_evidence", "std_error", "unbiased", "ess", "khat", "distinct", "replicates")


def quick(model, guide, *args, **options):
    return evaluate(model, guide, *args, **{"num_particles": 20, "num_replicates": 4, "progress": False, **options})


def row_model(x, offset=0.8):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def row_guide(x, offset=0.8):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + offset * math.sqrt(0.5), math.sqrt(0.5)))


def assert_same(a, b):
    for name in FIGURES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert str(a) == str(b)


def assert_near(value, error, expected, freedom):
    """By Student's t, over so many replicates less one."""
    wide = limit(freedom + 1, value.numel()) * error + 1e-9
    assert bool(((value - expected).abs() < wide).all()), f"{value} +- {error}, expected {expected}"


def test_gamma_every_figure():
    count = nightly(4000)
    result = evaluate(GAMMA.model, GAMMA.guide, num_particles=10, num_replicates=count, ks=[1, 2, 5], progress=False)
    assert result.ks == (1, 2, 5, 10)
    for k, value in result.bounds.items():
        assert_near(value, result.bound_errors[k], GAMMA.bound(k), count - 1)
        variance = GAMMA.variance(k) / (10 // k)
        assert_near(
            result.bound_errors[k] ** 2 * count, 2.5 / count**0.5 * variance, variance, count - 1
        )  # kurtosis < 7
    assert_near(result.jackknife[1], result.jackknife_errors[1], 10 * GAMMA.bound(10) - 9 * GAMMA.bound(9), count - 1)
    assert_near(result.unbiased, result.unbiased_error, 0.0, count - 1)
    assert_near(result.log_evidence, result.std_error, 0.0, count - 1)
    lower, upper = result.elbo_resampled
    assert float(lower) <= float(upper) + 1e-9
    assert abs(float(lower) + 0.008907) < 0.4 / count**0.5  # ELBO[q_EW] for K = 10
    assert abs(float(result.ess) / (5.0 * count) - 1.0) < 6.4 / count**0.5  # E[w]^2 / E[w^2] = 1/2
    assert float(result.khat) < 0.3
    assert bool(result.trusted)


def test_gaussian_elements():
    result = evaluate(GAUSSIAN.model, GAUSSIAN.guide, num_particles=50, num_replicates=400, progress=False)
    assert result.plates == ("data",)
    assert_near(result.log_evidence, result.std_error, GAUSSIAN.log_evidence, 399)
    assert_near(result.bounds[10], result.bound_errors[10], GAUSSIAN.bound(10), 399)
    assert_near(result.elbo, result.bound_errors[1], GAUSSIAN.log_evidence - 0.32, 399)
    total = result.total
    assert math.isclose(total.log_evidence, float(result.log_evidence.sum()), rel_tol=1e-12)
    # elements are independent here
    assert math.isclose(total.std_error, float(result.std_error.square().sum().sqrt()), rel_tol=0.2)
    low, high = total.interval(0.9)
    assert low < total.log_evidence < high


def test_the_interval_covers_what_it_says():
    """Of 1,000 repeats of 16 replicates, as many as the level says, within binomial error."""
    count, level = 1000, 0.9
    gaussian = Gaussian(data=torch.zeros(count, dtype=torch.float64), offset=0.5)
    result = evaluate(gaussian.model, gaussian.guide, num_particles=100, num_replicates=16, progress=False)
    low, high = result.interval(level)
    covered = ((low < gaussian.log_evidence) & (gaussian.log_evidence < high)).double()
    assert_mean(covered, level)
    assert bool(result.trusted.all())


def test_a_far_off_guide_is_not_trusted():
    far = Gaussian(data=torch.zeros(3, dtype=torch.float64), offset=6.0)
    result = evaluate(far.model, far.guide, num_particles=500, num_replicates=8, progress=False)
    assert not bool(result.trusted.any())
    assert bool((result.khat > result.khat_threshold).all())
    assert bool((result.ess < 30).all())
    report = str(result)
    assert "NOT TO BE TRUSTED: 3 of 3 elements" in report
    assert "doubt the other" not in report  # there is none
    alone = evaluate(lambda: far.model(), lambda: far.guide(), num_particles=50, num_replicates=2, progress=False)
    assert "NOT TO BE TRUSTED" in str(alone)
    assert "NOT TO BE TRUSTED" not in str(quick(GAMMA.model, GAMMA.guide, num_particles=1000))


def test_a_point_estimate_is_no_evidence():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("c", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Delta(pyro.param("z_loc", torch.tensor(0.5))))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("c", dist.Delta(torch.tensor(1.0)))

    with pytest.raises(ValueError, match=r"sets \['z'\] to a point .*poutine.condition\(model, \{'z': value\}\)"):
        quick(model, guide)
    both = AutoDelta(poutine.block(model, hide=["c"]))
    with pytest.raises(ValueError, match=r"sets \['s', 'z'\] to a point"):
        quick(poutine.condition(model, {"c": torch.tensor(1.0)}), both)
    # as the message says: the evidence given the point
    given = poutine.condition(model, {"z": torch.tensor(0.5)})
    found = quick(given, poutine.block(guide, hide=["z"]))
    at = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)) + dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0))
    assert abs(found.total.log_evidence - (float(at) - math.log(2.0))) < 1e-5
    # an autoguide bends noise with a Delta, which is no point
    normal = AutoNormal(poutine.block(model, hide=["c"]))
    quick(poutine.condition(model, {"c": torch.tensor(1.0)}), normal)


def test_too_few_particles_to_tell():
    assert "TOO FEW TO TELL: from 8 particles" in str(
        quick(GAMMA.model, GAMMA.guide, num_particles=4, num_replicates=2)
    )


def test_among_many_doubtful_elements_none_is_to_be_trusted():
    """Those that pass are those that missed their heavy weights: the interval holds the truth in few of them."""
    heavy = Gaussian(data=torch.zeros(400, dtype=torch.float64), offset=2.0)
    result = evaluate(heavy.model, heavy.guide, num_particles=100, num_replicates=16, progress=False)
    low, high = result.interval(0.95)
    covered, trusted = (low < heavy.log_evidence) & (heavy.log_evidence < high), result.trusted
    assert 0.1 < float(trusted.double().mean()) < 0.4
    assert float(covered[trusted].double().mean()) < 0.85
    assert f"doubt the other {int(trusted.sum())}, too" in str(result)
    fine = Gaussian(data=torch.zeros(400, dtype=torch.float64), offset=0.5)
    assert "doubt" not in str(evaluate(fine.model, fine.guide, num_particles=100, num_replicates=4, progress=False))


def test_seeded_runs_repeat_and_others_differ():
    pyro.set_rng_seed(3)
    first, second = (quick(GAUSSIAN.model, GAUSSIAN.guide) for _ in range(2))
    pyro.set_rng_seed(3)
    again = quick(GAUSSIAN.model, GAUSSIAN.guide)
    assert_same(first, again)
    assert not torch.equal(first.log_evidence, second.log_evidence)


def test_random_generators_move_by_one_draw():
    pyro.set_rng_seed(5)
    torch.randint(2**62, ())
    expected = torch.rand(3)
    pyro.set_rng_seed(5)
    quick(GAMMA.model, GAMMA.guide)
    assert torch.equal(torch.rand(3), expected)


def test_more_particles_add_up():
    a, b, c = (quick(GAUSSIAN.model, GAUSSIAN.guide) for _ in range(3))
    assert_same((a + b) + c, a + (b + c))
    together = a + b
    assert bool((together.replicates == 8).all())
    log_means = torch.cat([r.parts[0].values["log mean"] for r in (a, b)])
    assert torch.allclose(together.log_evidence, (log_means.logsumexp(0) - math.log(8)), atol=0.05)
    for part in (b, c):
        with pytest.raises(ValueError, match="count them twice"):
            _ = together + c + part
    with pytest.raises(ValueError, match=r"num_particles: 20 and 10"):
        _ = a + quick(GAUSSIAN.model, GAUSSIAN.guide, num_particles=10)
    with pytest.raises(ValueError, match="model_and_guide"):
        _ = a + quick(GAMMA.model, GAMMA.guide)


def test_more_rows_add_up():
    x = torch.randn(5)
    a, b = quick(row_model, row_guide, x[:2]), quick(row_model, row_guide, x[2:])
    both = a + b
    assert torch.equal(both.log_evidence, torch.cat([a.log_evidence, b.log_evidence]))
    assert math.isclose(both.total.log_evidence, a.total.log_evidence + b.total.log_evidence, rel_tol=1e-9)
    assert math.isclose(both.total.std_error, math.hypot(a.total.std_error, b.total.std_error), rel_tol=1e-9)
    hierarchy = [HierarchicalGaussian(data=torch.randn(3)) for _ in range(2)]
    shared = [quick(h.model, h.guide) for h in hierarchy]
    assert shared[0].log_evidence.shape == ()


def test_rows_that_share_latents_do_not_add_up():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    a, b = quick(model, guide, torch.zeros(2)), quick(model, guide, torch.ones(2))
    with pytest.raises(ValueError, match="no plate is independent"):
        _ = a + b
    loader = DataLoader(TensorDataset(torch.zeros(4)), batch_size=2)
    with pytest.raises(ValueError, match="rows that share latents"):
        quick(model, guide, data=loader)


def test_data_stream_in_batches():
    x = torch.randn(10, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    result = evaluate(row_model, row_guide, data=loader, num_particles=50, num_replicates=100, progress=False)
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert [len(p.floor) for p in result.parts] == [4, 4, 2]
    assert_near(result.log_evidence, result.std_error, truth, 99)
    named = DataLoader([{"x": v} for v in x], batch_size=5)
    assert quick(row_model, row_guide, data=named).log_evidence.shape == (10,)
    pairs = DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=5)
    assert quick(row_model, row_guide, data=pairs, unpack=lambda batch: batch[0]).log_evidence.shape == (10,)


def test_data_that_are_no_batches():
    with pytest.raises(TypeError, match=r"DataLoader\(TensorDataset"):
        quick(row_model, row_guide, data=torch.zeros(4))
    with pytest.raises(ValueError, match="at least one batch"):
        quick(row_model, row_guide, data=[])
    with pytest.raises(ValueError, match="rows in front"):
        quick(row_model, row_guide, data=[(torch.zeros(4), torch.zeros(3))])
    with pytest.raises(ValueError, match="row_plate to be one of"):
        quick(row_model, row_guide, data=[torch.zeros(4)], row_plate="rows")


def test_saved_and_loaded(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(5)), batch_size=2)
    result = quick(row_model, row_guide, data=loader)
    result.save(tmp_path / "result.npz")
    found = Evaluation.load(tmp_path / "result.npz")
    assert_same(found, result)
    assert found.facts == result.facts
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize("damage", ["cut", "altered", "other", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "result.npz"
    quick(GAMMA.model, GAMMA.guide).save(path)
    data = path.read_bytes()
    middle = data.index(b'"kind"') + 3  # of what a checksum covers
    changed = {
        "cut": data[:middle],
        "altered": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "other": b"something else",
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"cut short, altered or\s+something else"):
        Evaluation.load(path)


SCRIPT = """
    import sys, time
    import pyro, torch
    from torch.utils.data import DataLoader, TensorDataset
    from pyro_iwae import evaluate
    from tests.test_evaluate import row_guide, row_model

    def slow_model(x):
        time.sleep(float(sys.argv[2]))
        row_model(x)

    pyro.set_rng_seed(0)
    data = DataLoader(TensorDataset(torch.linspace(-1.0, 1.0, 6)), batch_size=2)
    result = evaluate(slow_model, row_guide, data=data, num_particles=20, num_replicates=5, progress=False,
                      save_to=sys.argv[1], save_every=0.0)
    print(result)
"""


def test_a_killed_run_goes_on(tmp_path):
    """Killed twice at some moment, it ends with what an unbroken run has: no particle lost, none counted twice."""

    def start(path, pause):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path), str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole, broken = tmp_path / "whole.npz", tmp_path / "broken.npz"
    expected = start(whole, 0).communicate()[0]
    for replicates in (3, 8):
        process = start(broken, 0.05)
        while not broken.exists() or drawn(broken) < replicates:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert drawn(broken) < 15
    found = start(broken, 0).communicate()[0]
    assert found == expected
    a, b = Evaluation.load(whole), Evaluation.load(broken)
    assert_same(a, b)
    assert [p.seeds for p in a.parts] == [p.seeds for p in b.parts]
    assert len({s for p in b.parts for s in p.seeds}) == 15


def drawn(path):
    return sum(len(p.seeds) for p in Evaluation.load(path).parts)


def test_a_run_that_goes_on_otherwise_is_refused(tmp_path):
    path = tmp_path / "result.npz"
    x = torch.randn(4)
    first = quick(row_model, row_guide, data=[x[:2], x[2:]], save_to=path)
    assert_same(quick(row_model, row_guide, data=[x[:2], x[2:]], save_to=path), first)  # nothing is left to do
    more = quick(row_model, row_guide, data=[x[:2], x[2:]], save_to=path, num_replicates=6)
    assert bool((more.replicates == 6).all())
    assert more.parts[0].seeds[:4] == first.parts[0].seeds
    with pytest.raises(ValueError, match=r"num_particles: 20, now 30"):
        quick(row_model, row_guide, data=[x[:2], x[2:]], save_to=path, num_particles=30)
    with pytest.raises(ValueError, match="batch 0 of the data to be what it was"):
        quick(row_model, row_guide, data=[x[2:], x[:2]], save_to=path)
    with pytest.raises(ValueError, match="parameters that the evaluation was begun with"):
        quick(row_model, lambda x: row_guide(x + pyro.param("shift", torch.tensor(0.0))), data=[x[:2]], save_to=path)


@pytest.mark.parametrize("target", [{"target_ess": 500.0}, {"target_std_error": 0.05}])
def test_rows_that_are_good_enough_cost_no_more(target):
    """Rows of different difficulty; the model tells how many it was asked for."""
    shift, asked = torch.tensor([0.0, 0.3, 1.0, 1.5], dtype=torch.float64), []

    def model(x, shift):
        asked.append(len(x))
        row_model(x)

    def guide(x, shift):
        row_guide(x, offset=shift)

    data = [(torch.zeros(4, dtype=torch.float64), shift)]
    result = quick(model, guide, data=data, num_particles=50, max_replicates=200, **target)
    counts = result.replicates
    assert not bool(result.short.any())
    assert bool((counts.diff() >= 0).all())
    assert int(counts[0]) < int(counts[-1])
    if "target_ess" in target:
        assert bool((result.ess >= 500).all())
        assert bool((result.ess[counts > 4] < 500 + 100).all())  # they stopped as soon as they had it
    else:
        assert bool((result.std_error <= 0.05).all())
    assert asked[-1] == 1  # the last row alone
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(data[0][0])
    assert bool(((result.log_evidence - truth).abs() < 0.5).all())
    capped = quick(model, guide, data=data, num_particles=50, max_replicates=5, **target)
    assert bool(capped.short[-1])
    assert "have not reached" in str(capped)
    assert int(capped.replicates.max()) == 5


def test_without_rows_all_are_drawn():
    result = quick(GAUSSIAN.model, GAUSSIAN.guide, target_ess=300.0)
    assert bool((result.ess >= 300).all())
    assert bool((result.replicates == result.replicates[0]).all())
    assert int(result.replicates[0]) > 4


def test_upper_bound_from_an_exact_draw():
    """On average over simulated data it lies above the evidence, and the bound below."""
    z = torch.randn(4000, dtype=torch.float64)
    x = z + torch.randn_like(z)
    result = quick(row_model, row_guide, x, num_particles=5, posterior_draw={"z": z})
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    above = result.upper - truth
    assert float(above.mean()) > limit(4000) * float(above.std()) / math.sqrt(4000)
    assert float((result.bounds[5] - truth).mean()) < 0.0
    # log-mean-exp with one weight from the posterior: E over both is that under the tilted law
    weights = torch.randn(5, 100_000, dtype=torch.float64) * 0.8 - 0.32
    weights[0] += 0.64
    expected = weights.logsumexp(0) - math.log(5)
    gap = float(above.mean()) - float(expected.mean())
    assert abs(gap) < limit(4000) * math.hypot(float(above.std()) / math.sqrt(4000), float(expected.std()) / 300)
    assert quick(row_model, row_guide, x).upper is None


def test_plate_particles():
    hierarchy = HierarchicalGaussian(data=torch.linspace(-1.0, 1.0, 8, dtype=torch.float64), spread=1.2)
    result = quick(hierarchy.model, hierarchy.guide, plate_particles={"data": 20}, num_replicates=200)
    assert_near(result.log_evidence, result.std_error, hierarchy.log_evidence, 199)
    assert result.elbo_resampled is None
    assert "ELBO of q_EW" not in str(result)


def test_chunks_give_the_same_figures():
    pyro.set_rng_seed(1)
    whole = evaluate(GAUSSIAN.model, GAUSSIAN.guide, num_particles=64, num_replicates=300, progress=False)
    chunks = evaluate(
        GAUSSIAN.model, GAUSSIAN.guide, num_particles=64, num_replicates=300, chunk_size=10, progress=False
    )
    error = (whole.std_error.square() + chunks.std_error.square()).sqrt()
    assert_near(whole.log_evidence - chunks.log_evidence, error, 0.0, 299)


def test_terms_that_no_latent_reaches():
    x = torch.randn(3, dtype=torch.float64)

    def model():
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=torch.tensor(2.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    result = quick(model, guide)
    each = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(x)
    assert torch.allclose(result.log_evidence, each)  # the guide is the posterior
    assert math.isclose(result.constant, float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))), rel_tol=1e-6)
    assert math.isclose(result.total.log_evidence, float(each.sum()) + result.constant, rel_tol=1e-6)


def test_scales():
    x = torch.zeros(3)
    alike = quick(poutine.scale(row_model, 0.1), poutine.scale(row_guide, 0.1), x)
    assert torch.allclose(alike.log_evidence, quick(row_model, row_guide, x).log_evidence, atol=1.0)
    with pytest.raises(ValueError, match="tempered"):
        quick(poutine.scale(row_model, 0.1), row_guide, x)


def test_subsampled_plates():
    x = torch.randn(6, dtype=torch.float64)

    def model(indices):
        with pyro.plate("data", 6, subsample=indices, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(indices):
        with pyro.plate("data", 6, subsample=indices, dim=-1) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, math.sqrt(0.5)))

    indices = torch.tensor([1, 4])
    result = quick(model, guide, indices)
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x[indices])
    assert torch.allclose(result.log_evidence, truth)
    assert math.isclose(result.total.log_evidence, float(truth.sum()), rel_tol=1e-6)  # of these rows, unscaled


def test_bad_options():
    for options, problem in (
        ({"num_replicates": 1}, "num_replicates >= 2"),
        ({"ks": [1, 30]}, "ks up to num_particles=20"),
        ({"target_ess": -1.0}, "target_ess > 0"),
        ({"data": [torch.zeros(2)], "posterior_draw": {}}, "posterior_draw"),
    ):
        with pytest.raises(ValueError, match=problem):
            quick(GAMMA.model, GAMMA.guide, **options)


def test_reports():
    result = quick(row_model, row_guide, torch.randn(4), num_particles=1000)
    text = str(result)
    assert text.startswith("log p(x) = -")
    assert "4 elements of plate 'data'; 4 replicates of K = 1000 particles" in text
    for name in ("ELBO", "bound, K = 500", "jackknife of order 2", "unbiased (multilevel)", "khat", "ESS"):
        assert name in text
    assert max(map(len, text.splitlines())) < 120
    assert result._repr_html_().startswith("<pre>log p(x) = -")
    worst = result.worst(2)
    assert len(worst) == 2
    assert worst[0][1] >= worst[1][1]
    assert float(result.khat[worst[0][0]]) == worst[0][1]
