# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""evaluate(): what tells one problem from another, figures at their edges, and other kinds of model."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_iwae import Evaluation, evaluate
from pyro_iwae.diagnostics import ess, expected_distinct, tail_khat, tail_length
from pyro_iwae.exact import Gaussian
from pyro_iwae.parts import DISTINCT, UNBIASED, Drawn, Part, figures
from tests.statistics import assert_frequencies
from tests.test_evaluate import GAMMA, assert_near, assert_same, quick, row_guide, row_model

# What tells one problem from another


def closed_over(x, scale=1.0):
    """Model and guide that hold their data, and the prior's scale."""

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


def test_data_in_a_closure_are_told_apart(tmp_path):
    zeros, fours = torch.zeros(3), torch.full((3,), 4.0)
    a, again, b = (quick(*closed_over(x), num_particles=50) for x in (zeros, zeros, fours))
    assert (a + again).replicates.tolist() == [8, 8, 8]
    both = a + b  # more rows
    assert both.log_evidence.shape == (6,)
    assert torch.equal(both.log_evidence, torch.cat([a.log_evidence, b.log_evidence]))
    path = tmp_path / "kept.npz"
    quick(*closed_over(zeros), save_to=path)
    with pytest.raises(ValueError, match="other rows"):
        quick(*closed_over(fours), save_to=path)


def test_priors_in_a_closure_are_told_apart(tmp_path):
    path = tmp_path / "kept.npz"
    a, b = quick(*closed_over(torch.zeros(3)), save_to=path), quick(*closed_over(torch.zeros(3), 5.0))
    with pytest.raises(ValueError, match=r"same model, guide and data in both.*Evaluate anew"):
        a + b
    with pytest.raises(ValueError, match="same model, guide and data in both"):
        quick(*closed_over(torch.zeros(3), 5.0), save_to=path, num_replicates=5)
    assert quick(*closed_over(torch.zeros(3)), save_to=path, num_replicates=5).replicates.tolist() == [5, 5, 5]


def test_numbers_of_numpy_are_told_apart():
    def model(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, float(scale)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    a, b = (quick(model, guide, torch.zeros(2), np.float32(s)) for s in (1, 9))
    assert (a + b).log_evidence.shape == (4,)


def test_what_follows_a_latent_is_no_data():
    """Values that ``pyro.deterministic`` records differ from run to run of one problem."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2.0 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(0.5, 1.0))

    assert int((quick(model, guide) + quick(model, guide)).replicates) == 8


def test_fewer_batches_than_the_file_holds(tmp_path):
    x, path = torch.randn(9), tmp_path / "kept.npz"
    quick(row_model, row_guide, data=[x[:3], x[3:6], x[6:]], save_to=path)
    with pytest.raises(ValueError, match="all 3 batches that the file holds, got 2"):
        quick(row_model, row_guide, data=[x[:3], x[3:6]], save_to=path)


def test_rows_that_come_in_other_batches_are_warned_of():
    x = torch.randn(9)
    a = quick(row_model, row_guide, data=[x[:3], x[3:6], x[6:]])
    b = quick(row_model, row_guide, data=[x[:4], x[4:8], x[8:]])
    with pytest.warns(UserWarning, match="9 of 9 rows that one evaluation adds are in the other, too"):
        a + b
    a + quick(row_model, row_guide, data=[x[:3], x[3:6], x[6:]])  # in the same ones: no warning
    a + quick(row_model, row_guide, data=[torch.randn(4)])  # nor for other rows


def test_figures_that_both_must_have():
    x = torch.tensor([0.3, -0.4])
    a, b = quick(row_model, row_guide, x), quick(row_model, row_guide, x + 1.0, posterior_draw={"z": x / 2})
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="same plates and figures"):
            one + other
    draws = [quick(row_model, row_guide, x, posterior_draw={"z": x / 2 + shift}) for shift in (0.0, 0.3)]
    assert (draws[0] + draws[1]).log_evidence.shape == (4,)  # another draw is another simulation


def test_a_last_batch_whose_size_fits_two_plates():
    def model(x):
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    def guide(x):
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(6)
    assert quick(model, guide, data=[x[:4], x[4:]]).log_evidence.shape == (2, 6)


def test_terms_of_no_row_are_found_out_early():
    seen = []

    def model(x):
        seen.append(len(x))
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=x.sum())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="terms outside the independent plates"):
        quick(model, row_guide, data=[torch.ones(3), torch.zeros(3), torch.zeros(5)])
    assert 5 not in seen


# Weights that leave figures undefined, and large ones


def scaled(inside, outside, shown=None):
    """A Gaussian in each row, and an observation that no latent reaches; each with a scale of its own."""

    def model():
        with pyro.plate("data", 3), poutine.scale(scale=inside):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.3, 1.0, -2.0]))
        if outside is not None:
            with pyro.plate("others", 2, subsample_size=shown), poutine.scale(scale=outside):
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.7))

    def guide():
        with pyro.plate("data", 3), poutine.scale(scale=inside):
            pyro.sample("z", dist.Normal(0.1, 0.8))

    return model, guide


@pytest.mark.parametrize(
    "inside, outside", [(1.0, 0.5), (0.5, 1.0), (0.5, 0.7), (torch.tensor([0.5, 0.2, 0.9]), 1.0)], ids=repr
)
def test_a_scale_that_not_all_sites_have_is_refused(inside, outside):
    """In the total the terms that no latent reaches would count too little, or too much."""
    with pytest.raises(ValueError, match="tempered by a poutine.scale around some sites .*'y' has another than 'z'"):
        quick(*scaled(inside, outside))


def test_a_scale_by_element_around_what_lies_in_no_plate_is_refused():
    scale = torch.tensor([0.5, 0.2, 0.9])
    model, guide = scaled(1.0, None)

    def whole():
        model()
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.7))

    with pytest.raises(ValueError, match="tempered by a poutine.scale around some sites"):
        quick(poutine.scale(whole, scale=scale), poutine.scale(guide, scale=scale))


def test_a_scale_that_all_sites_have_is_taken_off():
    for scale in (0.5, 3.0):
        pyro.set_rng_seed(2)
        found = quick(*scaled(scale, scale))
        pyro.set_rng_seed(2)
        assert found.total.log_evidence == pytest.approx(quick(*scaled(1.0, 1.0)).total.log_evidence, rel=1e-5)


def test_a_scale_by_element_is_taken_off():
    found = []
    for scale in (torch.tensor([0.5, 0.2, 0.9]), 1.0):
        pyro.set_rng_seed(2)
        found.append(quick(*scaled(scale, None)).log_evidence)
    torch.testing.assert_close(*found)


def test_what_no_latent_reaches_in_a_subsampled_plate_is_refused():
    with pytest.raises(NotImplementedError, match="site 'y', which no latent reaches, where a plate is subsampled"):
        quick(*scaled(1.0, 1.0, shown=1))


def test_elements_that_are_impossible_at_times():
    def model(scale):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Uniform(torch.zeros(2), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide(scale):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.5, 0.7))

    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of impossible particles
        result = quick(model, guide, torch.tensor([1.0, 0.3]), num_particles=4, num_replicates=200)
        exact = torch.tensor([dist.Normal(0.0, 1.0).cdf(torch.tensor(s)).item() - 0.5 for s in (1.0, 0.3)])
    exact = (exact / torch.tensor([1.0, 0.3])).log().double()
    assert bool(((result.log_evidence - exact).abs() < 5.0 * result.std_error).all())
    for name, values in result.parts[0].values.items():
        assert not bool(values.isnan().any()), name  # which would say that there is no such replicate
    assert "nan" not in str(result)
    assert re.search(r"ELBO +-inf\n", str(result)) and "not defined" in str(result)


def test_two_replicates_say_what_they_cannot_tell():
    assert "needs 3 replicates" in str(quick(GAMMA.model, GAMMA.guide, num_replicates=2))
    assert "needs 3 replicates" not in str(quick(GAMMA.model, GAMMA.guide, num_replicates=3))


def test_large_log_weights_keep_their_digits():
    log_weights = 3.0 * torch.randn(1000, 2) + 1e6  # to 1/16 in float32, and as exact as that
    exact = log_weights.double() - 1e6
    expected = exact.logsumexp(0).exp() ** 2 / (2.0 * exact).logsumexp(0).exp()
    for found in (ess(log_weights), figures_of(log_weights).ess()):
        assert torch.allclose(found.double(), expected, rtol=1e-5)
    share = (exact - exact.logsumexp(0)).exp()
    distinct = (1.0 - (1.0 - share) ** 1000).sum(0)
    assert torch.allclose(expected_distinct(log_weights, 1000).double(), distinct, rtol=1e-4)
    assert torch.allclose(figures_of(log_weights).values[DISTINCT][0], distinct, rtol=1e-6)


def figures_of(log_weights):
    drawn = Drawn(log_weights, ("data",), further={UNBIASED: log_weights[0]})
    return Part.of("rows", None, 0, drawn, figures(log_weights, [1, len(log_weights)]))


def test_khat_of_a_tail_that_was_not_kept_whole():
    """All heavy weights are in one replicate, which keeps fewer than four together need: what is known counts."""
    first = torch.randn(1000, 1).double() * 3.0
    parts = [figures_of(first), *(figures_of(torch.randn(1000, 1).double() - 50.0) for _ in range(3))]
    whole = sum((replace(part, seeds=(i,)) for i, part in enumerate(parts[1:], 1)), start=parts[0])
    kept = len(parts[0].tail)
    assert tail_length(1000) < kept < tail_length(4000)
    assert torch.equal(whole.khat(), tail_khat(first.topk(kept, 0).values, [kept - 1]))


def test_the_bracket_of_many_elements_takes_little_memory():
    """Each replicate meets each other one, of some elements at a time."""
    part = figures_of(torch.randn(20, 500))
    part = sum((replace(figures_of(torch.randn(20, 500)), seeds=(i,)) for i in range(1, 60)), start=part)
    whole = part.elbo_resampled()
    sizes = []
    real = torch.logaddexp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "logaddexp", lambda a, b: sizes.append(torch.broadcast_shapes(a.shape, b.shape)) or real(a, b)
        )
        again = part.elbo_resampled()
    assert max(math.prod(size) for size in sizes) <= 2**19
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.value, other.value)
    few = replace(
        part, values={n: v[:, :3] for n, v in part.values.items()}, floor=part.floor[:3], tail=part.tail[:, :3]
    )
    for one, other in zip(few.elbo_resampled(), whole, strict=True):
        assert torch.allclose(one.value, other.value[:3])
        assert torch.allclose(one.std_error, other.std_error[:3])


def test_a_file_can_be_read_by_those_who_may_read_others(tmp_path):
    quick(GAMMA.model, GAMMA.guide).save(tmp_path / "result.npz")
    (tmp_path / "other").touch()
    assert (tmp_path / "result.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    x, path = torch.randn(4, device="cuda"), tmp_path / "kept.npz"
    result = quick(row_model, row_guide, x, num_particles=500, save_to=path)
    assert result.log_evidence.device.type == "cpu"
    assert bool(result.trusted.all()) and "ok" in str(result)
    more = quick(row_model, row_guide, x, num_particles=500, num_replicates=6, save_to=path)
    assert more.replicates.tolist() == [6] * 4
    assert (Evaluation.load(path) + quick(row_model, row_guide, x, num_particles=500)).replicates.tolist() == [10] * 4


def test_other_kinds_of_model():
    """Sequential plates, enumerated sites, masks and one particle, each by its exact evidence."""

    def sequential(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def sequential_guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.8))

    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @config_enumerate
    def mixture(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2.0 * c, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 1.5])
    normal = dist.Normal(0.0, 2**0.5).log_prob(x)
    shifted = dist.Normal(2.0, 2**0.5).log_prob(x)
    cases = [
        (sequential, sequential_guide, normal),
        (masked, row_guide, torch.where(torch.tensor([True, False, True]), normal, 0.0)),
        (mixture, row_guide, torch.logaddexp(normal, shifted) - math.log(2.0)),
    ]
    for model, guide, exact in cases:
        result = quick(model, guide, x, num_particles=40, num_replicates=40)
        assert_near(result.log_evidence, result.std_error, exact.double(), 39)
    single = quick(row_model, row_guide, x, num_particles=1, num_replicates=400)
    assert single.ks == (1,)
    assert not single.jackknife
    assert_near(single.log_evidence, single.std_error, normal.double(), 399)


def test_the_interval_of_a_total_covers_what_it_says():
    """Of 400 totals over 5 elements each, drawn together, as many as the level says."""
    covered, level = [], 0.9
    for _ in range(8):
        gaussian = Gaussian(data=torch.zeros(250, dtype=torch.float64), offset=0.5)
        result = evaluate(gaussian.model, gaussian.guide, num_particles=60, num_replicates=16, progress=False)
        (part,) = result.parts
        for some in torch.arange(250).split(5):
            few = replace(part, values={n: v[:, some] for n, v in part.values.items()}, floor=part.floor[some])
            low, high = replace(result, parts=(few,)).total.interval(level)
            covered.append(low < 5.0 * float(gaussian.log_evidence[0]) < high)
    assert_frequencies(torch.tensor([sum(covered), len(covered) - sum(covered)]), torch.tensor([level, 1.0 - level]))


def test_going_on_towards_a_target_is_an_unbroken_run(tmp_path):
    """Cut off at one number of replicates after another, among rows of which some are done."""
    x, path = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 0.1, 0.2]), tmp_path / "kept.npz"
    options = {"data": [x[:4], x[4:]], "target_ess": 300.0, "num_replicates": 2}

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.5 * x, 0.8))

    pyro.set_rng_seed(1)
    unbroken = quick(row_model, guide, max_replicates=60, **options)
    assert len(unbroken.replicates.unique()) > 1  # some rows needed more than others
    pyro.set_rng_seed(1)
    for most in (2, 5, 11, 60):
        staged = quick(row_model, guide, max_replicates=most, save_to=path, **options)
    assert_same(staged, unbroken)
