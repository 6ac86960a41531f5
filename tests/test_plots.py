# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures: what is in the axes is what was found, and looks as it did when somebody last looked.

The pictures in ``tests/images`` are made anew by PYRO_IWAE_NEW_IMAGES=1; look at them before they are kept.
"""

import itertools
import math
import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.testing.compare import compare_images
from matplotlib.testing.decorators import remove_ticks_and_titles
from scipy.stats import t as student

from pyro_iwae import ImportanceWeightedELBO, evaluate, gradient_snr, plots, tradeoff
from pyro_iwae.exact import Gamma, Gaussian

IMAGES = Path(__file__).parent / "images"
DRAWN_WITH = "3.11"  # matplotlib; others draw a little otherwise


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def mixed():
    """40 elements, from the exact posterior to a guide far off."""
    pyro.set_rng_seed(0)
    offset = torch.linspace(0.0, 3.5, 40, dtype=torch.float64)
    gaussian = Gaussian(data=torch.linspace(-2.0, 2.0, 40, dtype=torch.float64), offset=offset)
    z = gaussian.data / 2.0 + math.sqrt(0.5) * torch.randn(40, dtype=torch.float64)
    options = {"num_particles": 200, "num_replicates": 4, "progress": False, "posterior_draw": {"z": z}}
    return evaluate(gaussian.model, gaussian.guide, **options)


def log_weights():
    pyro.set_rng_seed(0)
    gaussian = Gaussian(data=torch.zeros(6, dtype=torch.float64), offset=torch.linspace(0.5, 3.0, 6).double())
    return ImportanceWeightedELBO(100).log_weights(gaussian.model, gaussian.guide)


def gamma_guide():
    pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(1.0)), 1.0))


@pytest.fixture(scope="module")
def steps():
    pyro.set_rng_seed(0)
    return tradeoff(Gamma(shape=1.0).model, gamma_guide, ks=[1, 4, 16], progress=False)


def ratios(num_particles):
    elbo = ImportanceWeightedELBO(num_particles)
    return gradient_snr(elbo, Gamma(shape=1.0).model, gamma_guide, num_replicates=20, progress=False)


def plane():
    t = torch.linspace(-3.0, 3.0, 41)
    z = torch.stack(torch.meshgrid(t, t, indexing="xy"), -1)
    return t, dist.Normal(torch.tensor([1.0, 0.0]), 0.7).to_event(1).log_prob(z)


def densities():
    grid = torch.linspace(0.05, 6.0, 50)
    return grid, {"q": dist.Gamma(1.0, 1.0).log_prob(grid), "target": dist.Gamma(2.0, 1.0).log_prob(grid)}


def digits():
    image = torch.arange(30.0).reshape(2, 5, 3)
    return {"data": image, "q_EW": image.flip(0)}


def labelled(ax, label):
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return line


def points(ax, label):
    (container,) = [c for c in ax.containers if c.get_label() == label]
    return container.lines[0]


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# What is in the axes


def test_bounds(mixed):
    ax = plots.bounds(mixed)
    line = points(ax, "bound")
    assert list(line.get_xdata()) == list(mixed.ks)
    assert list(line.get_ydata()) == list(mixed.total.bounds.values())
    assert labelled(ax, "log p(x), 95 % interval").get_ydata()[0] == mixed.total.log_evidence
    low, high = mixed.total.interval(0.95)
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert math.isclose(band.y0, low, rel_tol=1e-9)
    assert math.isclose(band.y1, high, rel_tol=1e-9)
    for order in (1, 2):
        assert list(labelled(ax, f"jackknife of order {order}").get_ydata()) == [mixed.total.jackknife[order]]
    assert list(labelled(ax, "upper bound").get_ydata()) == [mixed.total.upper]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("particles K", "nats")
    each = plots.bounds(mixed, per_element=True)
    assert math.isclose(points(each, "bound").get_ydata()[0], mixed.total.elbo / 40)
    assert each.get_ylabel() == "nats per element"


@pytest.mark.parametrize("cumulative", [False, True])
def test_weights(cumulative):
    found = log_weights()
    ax = plots.weights(found, cumulative=cumulative)
    sizes = 1.0 / found.weights.square().sum(0)
    for label, column in (("least", int(sizes.argmin())), ("median", int(sizes.argsort()[2]))):
        line = labelled(ax, f"{label} ESS {float(sizes[column]):.3g}")
        expected = found.weights[:, column].sort(descending=True).values
        expected = expected.cumsum(0) if cumulative else expected
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected)
    assert len([line for line in ax.lines if len(line.get_xdata()) == 100]) == 6
    one = plots.weights(found.log_weights, element=1, cumulative=cumulative)
    assert names(one)[0] == f"ESS {float(sizes[1]):.3g}"
    assert len([line for line in one.lines if len(line.get_xdata()) == 100]) == 1


def test_khat_shows_every_element(mixed):
    ax = plots.khat(mixed)
    drawn = sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None")
    assert drawn == 40
    below = mixed.khat <= mixed.khat_threshold
    finite = below & mixed.khat.isfinite()
    line = labelled(ax, f"{int(below.sum())} below")
    assert list(line.get_xdata()) == finite.nonzero().squeeze(1).tolist()
    assert list(line.get_ydata()) == mixed.khat[finite].tolist()
    assert list(labelled(ax, f"{int((~below).sum())} above").get_ydata()) == mixed.khat[~below].tolist()
    assert int((mixed.khat == -math.inf).sum()) == 1  # the exact posterior
    assert list(labelled(ax, "1 of them -inf").get_xdata()) == [0]
    low, high = ax.get_ylim()
    assert all(low < y < high for line in ax.lines for y in line.get_ydata())
    assert ax.get_xlabel() == "element of plate data"


def test_khat_of_too_few_weights():
    gamma = Gamma(shape=1.0)
    ax = plots.khat(evaluate(gamma.model, gamma.guide, num_particles=3, num_replicates=2, progress=False))
    assert list(labelled(ax, "1 of them inf").get_xdata()) == [0]
    assert ax.get_xlabel() == "element"


def test_ess(mixed):
    ax = plots.ess(mixed)
    assert sum(bar.get_height() for bar in ax.patches) == 40
    few = int((mixed.ess < 100).sum())
    assert 0 < few < 40
    assert sum(b.get_height() for b in ax.patches if b.get_x() + b.get_width() <= 100) <= few
    assert names(ax) == [f"needed: 100 ({few} of 40 have less)", "particles: 800"]


def test_density_1d():
    grid, log_densities = densities()
    ax = plots.density_1d(grid, log_densities, xlabel="rate")
    for name, values in log_densities.items():
        torch.testing.assert_close(torch.as_tensor(labelled(ax, name).get_ydata()), values.exp())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate", "density")
    with pytest.raises(ValueError, match=r"'q' at each point of the grid, shape \(50,\), got \(3,\)"):
        plots.density_1d(grid, {"q": torch.zeros(3)})


def test_density_2d_and_what_its_lines_hold():
    t, log_density = plane()
    ax = plots.density_2d(t, t, log_density, outline=log_density, title="q", labels=("a", "b"))
    filled, lines = ax.collections
    assert math.isclose(filled.levels[-1], float(log_density.exp().max()), rel_tol=1e-6)
    # a Gaussian's contour that holds a share s has height (1 - s) of its top
    shares = 1.0 - torch.as_tensor(lines.levels) / log_density.exp().max()
    torch.testing.assert_close(shares, torch.tensor([0.99, 0.9, 0.5]), atol=0.03, rtol=0.0, check_dtype=False)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_aspect()) == ("a", "b", "q", 1.0)
    assert ax.figure.axes[1].get_ylabel() == "density"
    for bad in ({"log_density": log_density[1:]}, {"log_density": log_density, "outline": log_density[:, 1:]}):
        with pytest.raises(ValueError, match=r"in shape \(rows, columns\) = \(41, 41\)"):
            plots.density_2d(t, t, **bad)


def test_reconstructions():
    rows = digits()
    ax = plots.reconstructions(rows, vmin=0.0, vmax=30.0)
    sheet = torch.as_tensor(ax.images[0].get_array().filled(math.nan))
    assert sheet.shape == (2 * 5 + 1, 2 * 3 + 1)
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            assert torch.equal(sheet[6 * i : 6 * i + 5, 4 * j : 4 * j + 3], image.double())
    assert bool(sheet[5].isnan().all())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "q_EW"]
    assert ax.images[0].get_clim() == (0.0, 30.0)
    with pytest.raises(ValueError, match="all of one shape, got"):
        plots.reconstructions({"data": torch.zeros(2, 5, 3), "q": torch.zeros(3, 5, 3)})
    with pytest.raises(ValueError, match=r"\(images, height, width\)"):
        plots.reconstructions({"data": torch.zeros(2, 15)})


def test_snr(steps):
    found = {1: ratios(1), 4: ratios(4)}
    ax = plots.snr(found)
    assert list(points(ax, "guide").get_ydata()) == [v.guide for v in found.values()]
    assert names(ax) == ["guide"]  # the model has no parameters
    assert list(points(plots.snr(steps), "guide").get_ydata()) == [c.snr for c in steps.costs.values()]
    assert plots.snr(found[1]).get_xlabel() == "signal-to-noise ratio of the gradient"
    assert plots.tradeoff(steps).get_ylabel() == "bound (nats)"


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda: plots.bounds(3), "expected an Evaluation, .*, got int"),
        (lambda: plots.khat(None), "expected an Evaluation"),
        (lambda: plots.ess("x"), "expected an Evaluation"),
        (lambda: plots.weights([1.0]), "expected log_weights to be a tensor"),
        (lambda: plots.tradeoff(2), "expected what tradeoff"),
        (lambda: plots.snr({1: 2.0}), "expected a GradientSNR"),
        (lambda: plots.density_1d([1.0], {}), "expected a grid"),
        (lambda: plots.density_2d(torch.zeros(1), torch.zeros(1), 3.0), "and log densities as tensors"),
    ],
)
def test_what_is_no_data(draw, match):
    with pytest.raises(TypeError, match=match):
        draw()
    assert not plt.get_fignums()


# How they look

PICTURES = {
    "bounds": lambda f, ax: plots.bounds(f("mixed"), ax=ax),
    "weights": lambda f, ax: plots.weights(log_weights(), ax=ax),
    "cumulative": lambda f, ax: plots.weights(log_weights(), cumulative=True, ax=ax),
    "khat": lambda f, ax: plots.khat(f("mixed"), ax=ax),
    "ess": lambda f, ax: plots.ess(f("mixed"), ax=ax),
    "density_1d": lambda f, ax: plots.density_1d(*densities(), ax=ax),
    "density_2d": lambda f, ax: plots.density_2d(*[plane()[0]] * 2, plane()[1], outline=plane()[1], ax=ax),
    "reconstructions": lambda f, ax: plots.reconstructions(digits(), ax=ax),
}
MEASURED = {  # whose times or noise differ from run to run
    "tradeoff": lambda f, ax: plots.tradeoff(f("steps"), ax=ax),
    "snr": lambda f, ax: plots.snr(f("steps"), ax=ax),
    "parameters": lambda f, ax: plots.snr(ratios(2), ax=ax),
}


@pytest.mark.parametrize("name", [*PICTURES, *MEASURED])
def test_they_draw_where_they_are_told_and_change_nothing_else(name, request):
    before, (figure, ax) = dict(mpl.rcParams), plt.subplots()
    found = {**PICTURES, **MEASURED}[name](request.getfixturevalue, ax)
    assert found is ax
    assert plt.get_fignums() == [figure.number]
    assert dict(mpl.rcParams) == before
    assert ax.has_data()
    figure.canvas.draw()
    assert name == "reconstructions" or all([ax.get_xlabel(), ax.get_ylabel()]) or name == "parameters"


@pytest.mark.parametrize("name", PICTURES)
def test_they_look_as_they_did(name, request, tmp_path):
    if not mpl.__version__.startswith(DRAWN_WITH):
        pytest.skip(f"the pictures were drawn with matplotlib {DRAWN_WITH}")
    figure, ax = plt.subplots(figsize=(4.0, 3.0), dpi=50)
    PICTURES[name](request.getfixturevalue, ax)
    for legend in filter(None, (a.get_legend() for a in figure.axes)):
        legend.remove()  # text is as wide as the machine's fonts
    remove_ticks_and_titles(figure)
    for axes in figure.axes:
        axes.set(xlabel="", ylabel="")
    kept, drawn = IMAGES / f"{name}.png", tmp_path / f"{name}.png"
    figure.savefig(drawn, dpi=50)
    if os.environ.get("PYRO_IWAE_NEW_IMAGES"):
        IMAGES.mkdir(exist_ok=True)
        kept.write_bytes(drawn.read_bytes())
    assert compare_images(str(kept), str(drawn), tol=2.0) is None


@pytest.mark.parametrize(
    "seen",
    [
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ],
    ids=["deuteranopia", "protanopia"],  # Machado, Oliveira, Fernandes (2009)
)
def test_colours_stay_apart_for_the_colour_blind(seen):
    def linear(color):
        rgb = torch.tensor(to_rgb(color))
        return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    colors = [(torch.tensor(seen) @ linear(c)).clamp(0.0, 1.0).sqrt() for c in plots.PALETTE]
    apart = {pair: float((colors[pair[0]] - colors[pair[1]]).norm()) for pair in itertools.combinations(range(6), 2)}
    assert min(apart.values()) > 0.1, min(apart, key=apart.get)
    assert min(v for (i, j), v in apart.items() if j < 3) > 0.3  # the first three, which most pictures use
    red_and_green = [(torch.tensor(seen) @ linear(c)).clamp(0.0, 1.0).sqrt() for c in ("#d02020", "#6a7a00")]
    assert float((red_and_green[0] - red_and_green[1]).norm()) < 0.25  # where others' do not


def test_intervals_of_few_replicates_are_those_of_student():
    """Of the bounds, by replicate: 1.96 standard errors would be half of what 3 replicates need."""
    gamma = Gamma(shape=torch.tensor(1.0, dtype=torch.float64))
    result = evaluate(gamma.model, gamma.guide, num_particles=10, num_replicates=3, progress=False)
    (bars,) = plots.bounds(result).containers
    (ends,) = bars[2][0].get_segments()[:1]
    width = (ends[1][1] - ends[0][1]) / 2.0
    assert width == pytest.approx(student.ppf(0.975, 2) * result.total.bound_errors[1], rel=1e-6)
    assert result.total.bound_width(1) == pytest.approx(width, rel=1e-6)
