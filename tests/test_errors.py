# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Bad input gets an error that says what was expected, what came, and what to do; nothing is left behind."""

import contextlib
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.util import get_rng_state

from pyro_iwae import VIMCO, ImportanceResampledGuide, ImportanceWeightedELBO, Pathwise

K = [1, 3]
DATA = torch.tensor([0.5, -1.0, 2.0])


def normal(name, loc=0.0, obs=None, **options):
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), 1.0), obs=obs, **options)


def model(x=DATA):
    theta = pyro.param("theta", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = normal("z", theta)
        normal("x", z, obs=x)


def guide(x=DATA):
    phi = pyro.param("phi", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        normal("z", phi + x / 2.0)


@contextlib.contextmanager
def raises_cleanly(elbo, kind, match):
    """The error comes; store, generators and handlers are sane; the next good call of the same object works."""
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    elbo.loss_and_grads(model, guide)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(kind, match=match) as caught:
        yield
    assert not isinstance(caught.value, AssertionError)
    assert _PYRO_STACK == [] and not [d for d in _DIM_ALLOCATOR._stack if d is not None]
    store = pyro.get_param_store()
    assert store.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(store[name], value) and bool(store[name].isfinite().all())
    pyro.set_rng_seed(4)
    first, state = elbo.loss_and_grads(model, guide), get_rng_state()["torch"]
    fresh = ImportanceWeightedELBO(num_particles=elbo.num_particles, vectorize_particles=elbo.vectorize_particles)
    fresh.loss(model, guide)
    pyro.set_rng_seed(4)
    assert first == fresh.loss_and_grads(model, guide), "the error left something behind"
    assert torch.equal(state, get_rng_state()["torch"])


def methods(elbo):
    return elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss, elbo.bound, elbo.log_weights


# Options


@pytest.mark.parametrize(
    "value, kind",
    [
        (0, ValueError),
        (-1, ValueError),
        (2.5, TypeError),
        (True, TypeError),
        ("3", TypeError),
        (None, TypeError),
        (3.0, TypeError),
    ],
)
def test_num_particles(value, kind, unchecked):
    """Less than one, or not a whole number; also when it is set later."""
    with pytest.raises(kind, match=r"expected num_particles .*got (?s:.*)"):
        ImportanceWeightedELBO(num_particles=value)
    elbo = ImportanceWeightedELBO(num_particles=2)
    if value is True:
        return  # 1 by another name
    with raises_cleanly(elbo, kind, "expected num_particles"):
        elbo.num_particles = value
        try:
            elbo.loss(model, guide)
        finally:
            elbo.num_particles = 2


def test_whole_numbers_of_other_kinds(unchecked):
    for value in (torch.tensor(4), __import__("numpy").int64(4)):
        elbo = ImportanceWeightedELBO(num_particles=value)
        assert elbo.num_particles == 4 and elbo.log_weights(model, guide).num_particles == 4


@pytest.mark.parametrize(
    "name, value",
    [
        ("vectorize_particles", "yes"),
        ("vectorize_particles", 2),
        ("gradient", "pathwise"),
        ("gradient", Pathwise),
        ("score", VIMCO),
    ],
)
def test_options_of_the_wrong_type(name, value, unchecked):
    with pytest.raises(TypeError, match=f"expected {name} to be"):
        ImportanceWeightedELBO(**{name: value})


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
@pytest.mark.parametrize("kind", [ImportanceWeightedELBO, lambda **o: ImportanceResampledGuide(model, guide, **o)])
def test_vectorize_particles(kind, value, unchecked):
    with pytest.raises(TypeError, match="vectorize_particles to be None, True or False"):
        kind(vectorize_particles=value)


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError), ("two", TypeError)])
@pytest.mark.parametrize("kind", [ImportanceWeightedELBO, lambda **o: ImportanceResampledGuide(model, guide, **o)])
def test_max_plate_nesting(kind, value, error, unchecked):
    with pytest.raises(error, match="max_plate_nesting"):
        kind(max_plate_nesting=value)


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("bad", [None, 3, "model", DATA])
def test_not_callable(num_particles, bad, unchecked):
    elbo = ImportanceWeightedELBO(num_particles)
    for method in methods(elbo):
        with raises_cleanly(elbo, TypeError, "expected model to be callable"):
            method(bad, guide)
        with raises_cleanly(elbo, TypeError, "expected guide to be callable"):
            method(model, bad)


def test_max_plate_nesting_too_small():
    elbo = ImportanceWeightedELBO(num_particles=3, max_plate_nesting=0)
    with pytest.raises(ValueError, match=r"max_plate_nesting=0.*plate 'data' at dim=-1"):
        elbo.loss(model, guide)


def test_max_plate_nesting_larger_than_needed():
    assert ImportanceWeightedELBO(num_particles=3, max_plate_nesting=4).bound(model, guide).shape == (3,)


# Model and guide do not fit


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_latent_in_the_guide_only(num_particles, vectorize):
    def wrong():
        guide()
        normal("extra")

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    for method in methods(elbo):
        with raises_cleanly(elbo, ValueError, "'extra' of the guide is absent (in|from) the model(.|\n)*is_auxiliary"):
            method(model, wrong)


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_latent_in_the_model_only(num_particles, vectorize):
    def wrong():
        model()
        normal("extra")

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    for method in methods(elbo):
        with raises_cleanly(elbo, ValueError, "'extra' of the model is absent from the guide"):
            method(wrong, guide)


@pytest.mark.parametrize("num_particles", K)
def test_latent_of_the_guide_observed_in_the_model(num_particles):
    def wrong():
        with pyro.plate("data", 3):
            normal("z", obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles)
    with raises_cleanly(elbo, ValueError, "'z' of the guide is observed in the model"):
        elbo.loss(wrong, guide)


@pytest.mark.parametrize("num_particles", K)
def test_sequential_enumeration_in_the_model(num_particles):
    def wrong():
        pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "sequential"})

    elbo = ImportanceWeightedELBO(num_particles)
    with raises_cleanly(elbo, NotImplementedError, "'c' asks for sequential enumeration"):
        elbo.loss(wrong, lambda: None)


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, False])
def test_shapes_that_do_not_fit(num_particles, vectorize):
    """Between model and guide, and between a site and its plate."""

    def narrow_guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))

    def event_guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def outside():
        with pyro.plate("data", 3):
            z = normal("z")
        normal("x", z, obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    with raises_cleanly(elbo, ValueError, "data|z"):
        elbo.loss(model, narrow_guide)
    with raises_cleanly(elbo, ValueError, "z"):
        elbo.loss(model, event_guide)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with raises_cleanly(elbo, ValueError, "x"):
            elbo.loss(outside, guide)


def test_one_name_for_two_sites():
    def wrong():
        model()
        with pyro.plate("again", 3):
            normal("z")

    for num_particles in K:
        elbo = ImportanceWeightedELBO(num_particles)
        with raises_cleanly(elbo, RuntimeError, "'z'"):
            elbo.loss(wrong, guide)


@pytest.mark.parametrize("num_particles", K)
def test_a_site_that_has_a_plate_s_name(num_particles):
    def wrong():
        with pyro.plate("data", 3):
            normal("data", obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles)
    with raises_cleanly(elbo, (ValueError, RuntimeError), "data"):
        elbo.loss(wrong, lambda: None)


# Numbers


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, True, False])
@pytest.mark.parametrize("validate", [True, False])
def test_nan_in_the_data(num_particles, vectorize, validate):
    """With and without Pyro's own validation; the message names the site."""
    data = torch.tensor([0.5, math.nan, 1.0])

    def unseen_guide(x):
        guide()

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    with pyro.validation_enabled(validate):
        for method in methods(elbo):
            with raises_cleanly(elbo, ValueError, "site 'x'"):
                method(model, unseen_guide, data)


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_nan_in_the_guide(num_particles, vectorize):
    def wrong():
        with pyro.plate("data", 3):
            normal("z", torch.tensor([0.0, math.nan, 0.0]))

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    with pyro.validation_enabled(False):
        with raises_cleanly(elbo, ValueError, "site 'z'"):
            elbo.loss_and_grads(model, wrong)


@pytest.mark.parametrize("num_particles", K)
def test_nan_born_in_a_log_density(num_particles):
    """Of a distribution of the user's own."""

    class Broken(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value).sqrt()

        def expand(self, shape, _instance=None):
            return super().expand(shape, self._get_checked_instance(Broken, _instance))

    def wrong():
        with pyro.plate("data", 3):
            z = normal("z")
            pyro.sample("x", Broken(z, 1.0), obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles)
    for method in methods(elbo):
        with raises_cleanly(elbo, ValueError, "NaN at model site 'x'"):
            method(wrong, guide)


@pytest.mark.parametrize("num_particles", K)
@pytest.mark.parametrize("vectorize", [None, True, False])
def test_plus_infinity(num_particles, vectorize):
    """A factor of +inf in the model; a guide that never draws what it drew."""

    def infinite():
        model()
        with pyro.plate("more", 3):
            pyro.factor("boost", torch.tensor([0.0, math.inf, 0.0]))

    def impossible_guide():
        guide()
        with pyro.plate("more", 3):
            pyro.factor("never", torch.tensor([0.0, -math.inf, 0.0]), has_rsample=True)

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    for method in methods(elbo):
        with raises_cleanly(elbo, ValueError, r"inf at .*'boost'"):
            method(infinite, guide)
        with raises_cleanly(elbo, ValueError, r"inf at .*'never'"):
            method(model, impossible_guide)


def impossible_model(x=DATA):
    """The support leaves no room for the second element."""
    theta = pyro.param("theta", torch.tensor(0.3))
    with pyro.plate("data", 3):
        z = normal("z", theta)
        pyro.factor("gate", torch.where(torch.tensor([False, True, False]), -math.inf, 0.0 * z))


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("vectorize", [True, False])
def test_all_particles_impossible(num_particles, vectorize):
    """The bound is -inf, its gradient 0, the warning names the site; other elements train on."""
    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=vectorize)
    for method in (elbo.loss, elbo.loss_and_grads, lambda m, g: elbo.differentiable_loss(m, g).item()):
        with pytest.warns(UserWarning, match=r"all \d particles are impossible .* 1 of 3 .*'gate'"):
            assert method(impossible_model, guide) == math.inf
    assert bool(pyro.param("theta").unconstrained().grad.isfinite())
    assert pyro.param("phi").unconstrained().grad != 0.0
    with pytest.warns(UserWarning, match="'gate'"):
        bound = elbo.bound(impossible_model, guide)
    assert bound[1] == -math.inf and bool(bound[[0, 2]].isfinite().all())
    assert math.isfinite(elbo.loss(model, guide))


def test_a_single_particle_that_is_impossible():
    """The loss is infinite, as Trace_ELBO's, and the site has a name."""
    with pytest.warns(UserWarning, match="the particle is impossible .* through site 'x'"):
        assert ImportanceWeightedELBO(num_particles=1).loss(impossible_one, normal_guide) == math.inf


def impossible_one():
    normal("z")
    pyro.factor("x", torch.tensor(-math.inf))


def normal_guide():
    normal("z")


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("validate", [True, False])
def test_missing_values_come_with_advice(num_particles, validate):
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"site 'x'(?s:.*)For missing values put"):
        ImportanceWeightedELBO(num_particles=num_particles).loss(model, lambda x: guide(), DATA * math.nan)


def test_all_particles_impossible_for_everything():
    """No element is left: all gradients are exactly 0."""

    def nothing():
        model()
        with pyro.plate("gates", 3):
            pyro.factor("gate", torch.full((3,), -math.inf))

    def reachable():
        theta = pyro.param("theta", torch.tensor(0.3))
        with pyro.plate("data", 3):
            z = normal("z", theta)
            pyro.factor("gate", torch.where(z > -1e9, -math.inf, 0.0))

    elbo = ImportanceWeightedELBO(num_particles=4)
    with pytest.warns(UserWarning, match="'gate'"):
        assert elbo.loss_and_grads(reachable, guide) == math.inf
    for name in ("theta", "phi"):
        assert pyro.param(name).unconstrained().grad == 0.0
    with pytest.warns(UserWarning, match="-inf"):
        assert elbo.loss(nothing, guide) == math.inf


def test_some_particles_impossible_is_silent():
    """They are legal: weight 0, and nothing of theirs in the gradient."""

    def half():
        theta = pyro.param("theta", torch.tensor(0.3))
        with pyro.plate("data", 500):
            z = normal("z", theta)
            pyro.factor("gate", torch.where(z > 0.0, 0.0, -math.inf))

    def half_guide():
        with pyro.plate("data", 500):
            normal("z", pyro.param("phi", torch.tensor(0.5)))

    elbo = ImportanceWeightedELBO(num_particles=30)
    assert math.isfinite(elbo.loss_and_grads(half, half_guide))
    weights = elbo.log_weights(half, half_guide)
    assert 0.1 < (weights.log_weights == -math.inf).double().mean() < 0.6
    assert bool(pyro.param("phi").unconstrained().grad.isfinite())


def test_a_slope_that_is_not_finite_at_an_impossible_particle():
    """0 times the slope of -inf is NaN: refused by the parameter's and the site's name, and not left in any grad."""

    def steep():
        theta = pyro.param("theta", torch.tensor(1.0))
        with pyro.plate("data", 50):
            z = normal("z")
            pyro.factor("gate", (theta * (z > 0.0)).log())

    def steep_guide():
        with pyro.plate("data", 50):
            normal("z", pyro.param("phi", torch.tensor(0.5)))

    elbo = ImportanceWeightedELBO(num_particles=30)
    with pytest.raises(ValueError, match=r"gradient of parameter 'theta' is NaN.*'gate'"):
        elbo.loss_and_grads(steep, steep_guide)
    elbo.loss_and_grads(model, guide)
    for name in ("theta", "phi"):
        assert bool(pyro.param(name).unconstrained().grad.isfinite()), "the next step would still be NaN"


def test_a_support_outside_which_the_density_is_nan():
    """Uniform(0, a) at values beyond a: -inf, or an error with the site's name, but no silent NaN."""

    def bounded():
        with pyro.plate("data", 20):
            z = normal("z")
            pyro.sample("x", dist.Uniform(z - 1.0, z + 1.0), obs=torch.zeros(20))

    def wide_guide():
        with pyro.plate("data", 20):
            normal("z", pyro.param("phi", torch.tensor(0.2)))

    elbo = ImportanceWeightedELBO(num_particles=40)
    with pyro.validation_enabled(False):
        assert math.isfinite(elbo.loss_and_grads(bounded, wide_guide))
        assert bool(pyro.param("phi").unconstrained().grad.isfinite())


# Models that change


def test_a_structure_that_changes_between_runs():
    """Vectorised, the two runs of one step must agree; sequential particles may differ."""
    calls = []

    def changing():
        calls.append(1)
        with pyro.plate("data", 3):
            z = normal("z")
            normal("x" if len(calls) % 2 else "y", z, obs=DATA)

    elbo = ImportanceWeightedELBO(num_particles=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(4):
            try:
                assert math.isfinite(elbo.loss(changing, guide))
            except ValueError as error:
                assert "same sites and plates" in str(error)
    assert math.isfinite(elbo.loss(model, guide))
    sequential = ImportanceWeightedELBO(num_particles=3, vectorize_particles=False)
    assert all(math.isfinite(sequential.loss(changing, guide)) for _ in range(4))


def test_a_latent_that_comes_and_goes():
    """Sites that follow a latent's value: one after the other, with one weight for everything."""

    def branching():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5)))
        loc = normal("b") if a == 1.0 else torch.tensor(0.0)
        normal("x", loc, obs=torch.tensor(0.7))

    def branching_guide():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5)))
        if a == 1.0:
            normal("b", 0.3)

    elbo = ImportanceWeightedELBO(num_particles=4, vectorize_particles=False)
    for _ in range(20):
        weights = elbo.log_weights(branching, branching_guide)
        assert weights.plates == () and bool(weights.log_weights.isfinite().all())
    asking = ImportanceWeightedELBO(num_particles=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(20):
            assert math.isfinite(asking.loss(branching, branching_guide))


@pytest.mark.parametrize("num_particles", K)
def test_an_error_of_the_model_s_own_comes_through(num_particles):
    """Unchanged, and from the model's own frame."""

    def broken():
        model()
        raise KeyError("mine")

    elbo = ImportanceWeightedELBO(num_particles)
    for method in methods(elbo):
        with raises_cleanly(elbo, KeyError, "mine"):
            method(broken, guide)


def test_an_error_that_comes_only_later():
    """On data that the model cannot take, after many good steps."""
    elbo = ImportanceWeightedELBO(num_particles=3)
    with raises_cleanly(elbo, ValueError, "x"):
        elbo.loss(model, guide, DATA)
        elbo.loss(model, guide, torch.tensor([1.0, math.nan]))
