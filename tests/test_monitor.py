# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Monitor: figures against known ones, training that does not notice it, and what it writes."""

import math
import random
import sys
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_iwae import CompiledSVI, ImportanceWeightedELBO, Monitor, Renyi, evaluate
from pyro_iwae.exact import Gamma, Gaussian, HierarchicalGaussian
from pyro_iwae.monitor import Record
from tests.statistics import limit
from tests.test_compiled import recorded_only

__all__ = ["recorded_only"]  # a fixture

GAMMA = Gamma(shape=torch.tensor(1.0, dtype=torch.float64))
X = torch.tensor([[0.3, -1.2], [2.0, 0.7], [-0.4, 1.1], [0.9, 0.2]])


def known(record, expected, replicates):
    """Figures with their errors against what they are on average."""
    for name, value in expected.items():
        error = getattr(record, f"{name}_error")
        assert 0.0 < error < 0.5
        assert abs(getattr(record, name) - float(value)) < limit(replicates, len(expected)) * error, name


def quick(model, guide, elbo, **options):
    return Monitor(model, guide, elbo, **{"num_gradients": 0, "num_replicates": 2, **options})


class Writer:
    """Keeps what it is given."""

    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append((tag, value, step))


# Figures


def test_gamma_is_known():
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(10), num_replicates=100)
    record = monitor()
    known(record, {"bound": GAMMA.bound(10), "elbo": GAMMA.bound(1), "log_evidence": 0.0}, 100)
    assert (record.step, record.elements, record.num_particles, record.drawn) == (1, 1, 10, 1000)
    # E[w]^2 / E[w^2] = 1/2, for w = z of Gamma(1); by the delta method its deviation is 0.5 sqrt(8 / 1000)
    assert abs(record.ess / 1000 - 0.5) < 5.0 * 0.5 * math.sqrt(8.0 / 1000)
    assert record.ess == record.ess_least and record.khat == record.khat_most
    assert record.khat < record.khat_threshold == pytest.approx(1.0 - 1.0 / 3.0)
    assert record.trusted == 1.0
    assert all(math.isnan(getattr(record, f"snr_{n}")) for n in ("guide", "guide_error", "model", "model_error"))


def test_sums_and_worst_over_elements():
    gaussian = Gaussian(data=torch.arange(4.0, dtype=torch.float64), offset=torch.tensor([0.2, 0.4, 1.0, 4.0]))
    elbo = ImportanceWeightedELBO(8, objective=Renyi(0.5))  # the bound is the importance weighted one all the same
    record = quick(gaussian.model, gaussian.guide, elbo, num_replicates=100)()
    each = [Gaussian(data=gaussian.data[i : i + 1], offset=float(gaussian.offset[i])) for i in range(4)]
    known(record, {"bound": sum(g.bound(8) for g in each), "elbo": sum(g.bound(1) for g in each)}, 100)
    assert record.elements == 4
    assert record.ess_least < 100 < record.ess  # exp(-16) of 1000 and exp(-1) of them, about
    assert record.khat < record.khat_threshold < record.khat_most
    assert record.trusted == 0.75


def test_figures_are_those_of_evaluate():
    gaussian = Gaussian(data=torch.arange(5.0), offset=torch.linspace(0.0, 1.0, 5))
    pyro.set_rng_seed(3)
    found = evaluate(gaussian.model, gaussian.guide, num_particles=10, num_replicates=7, progress=False)
    pyro.set_rng_seed(3)
    record = quick(gaussian.model, gaussian.guide, ImportanceWeightedELBO(10), num_replicates=7)()
    assert record.bound == pytest.approx(found.total.bounds[10]) and record.elbo == pytest.approx(found.total.elbo)
    assert record.bound_error == pytest.approx(found.total.bound_errors[10])
    assert record.elbo_error == pytest.approx(found.total.bound_errors[1])
    assert record.log_evidence == pytest.approx(found.total.log_evidence)
    assert record.log_evidence_error == pytest.approx(found.total.std_error)
    assert record.ess == float(found.ess.sort().values[2]) and record.ess_least == float(found.ess.min())
    assert record.khat == float(found.khat.sort().values[2]) and record.khat_most == float(found.khat.max())
    assert math.isnan(record.trusted)  # from 70 particles no ESS of 100 comes


def test_ratio_is_known(double):
    """The gradient by loc is loc + noise of variance 1 in each of four coordinates: |loc| / 2."""

    def model():
        level = pyro.param("level", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.factor("known", 3.0 * level)  # a gradient without noise

    def guide():
        loc = pyro.param("loc", torch.tensor([0.6, -0.8, 0.0, 0.0]))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    Trace_ELBO().loss(model, guide)
    record = quick(model, guide, ImportanceWeightedELBO(1), num_gradients=1000)()
    assert abs(record.snr_guide - 0.5) < 6.0 * record.snr_guide_error < 0.3
    assert record.snr_model == math.inf


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), RenyiELBO(alpha=0.0, num_particles=2), JitTrace_ELBO()], ids=lambda e: type(e).__name__
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")  # which is deprecated
def test_other_elbos(elbo):
    """Their particles are 64; the ratio is of their own gradient."""

    def guide():
        pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(1.5)), 1.0))

    elbo.loss_and_grads(GAMMA.model, guide)
    record = Monitor(GAMMA.model, guide, elbo, num_replicates=2)()
    assert (record.num_particles, record.drawn) == (64, 128)
    assert record.snr_guide >= 0.0
    assert Monitor(GAMMA.model, guide, elbo, num_particles=9, num_gradients=0)().num_particles == 9


def test_options_of_the_elbo_as_they_are():
    elbo = ImportanceWeightedELBO(4)
    monitor = quick(GAMMA.model, GAMMA.guide, elbo, every=1)
    assert monitor().num_particles == 4
    elbo.num_particles = 16  # as a schedule does
    assert monitor().num_particles == 16
    calls = []

    def guide():
        calls.append(None)
        GAMMA.guide()

    elbo.vectorize_particles = False
    quick(GAMMA.model, guide, elbo)()
    assert len(calls) > 2 * 16
    hierarchical = HierarchicalGaussian(data=torch.tensor([1.0, -1.0], dtype=torch.float64))
    elbo = ImportanceWeightedELBO(2, plate_particles={"data": 30}, chunk_size=30)
    record = quick(hierarchical.model, hierarchical.guide, elbo, num_replicates=50)()
    assert record.bound > float(hierarchical.elbo) + 0.02  # inner particles count
    assert abs(record.log_evidence - float(hierarchical.log_evidence)) < limit(50) * record.log_evidence_error


# When


def test_records_come_at_the_first_call_and_at_every_third():
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), every=3)
    found = [monitor() for _ in range(10)]
    assert [r.step for r in monitor.records] == [1, 3, 6, 9]
    assert [i + 1 for i, r in enumerate(found) if r is not None] == [1, 3, 6, 9]
    assert [r for r in found if r is not None] == monitor.records
    resumed = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), every=3)
    resumed.step = 100
    found = [resumed() for _ in range(4)]
    assert [r.step for r in resumed.records] == [101, 102]


# Training does not notice


class VAE(nn.Module):
    """With buffers that each pass changes, and passes that draw random numbers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 2))
        self.decoder = nn.Linear(2, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc = self.encoder(x)
        random.random(), np.random.rand()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))


def by_svi(vae, elbo):
    optim = pyro.optim.Adam({"lr": 0.05})
    return SVI(vae.model, vae.guide, optim, elbo).step, optim.get_state


def by_compiled_svi(vae, elbo):
    optim = pyro.optim.Adam({"lr": 0.05})
    return CompiledSVI(vae.model, vae.guide, optim, elbo).step, optim.get_state


def by_torch(vae, elbo):
    """Gradients add up over two steps, the way ``grad`` has to stay."""
    optim = torch.optim.Adam(vae.parameters(), lr=0.05)
    loss, counted = elbo(vae.model, vae.guide), []

    def step(x):
        loss(x).backward()
        counted.append(None)
        if len(counted) % 2 == 0:
            optim.step()
            optim.zero_grad(set_to_none=False)

    return step, optim.state_dict


def trained(way, elbo, monitored, program=VAE, folder=None):
    """All that a training run leaves."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    vae = program()
    step, state = way(vae, elbo)
    with Monitor(vae.model, vae.guide, elbo, every=2, num_replicates=2, writer=folder) as monitor:
        for i in range(7):
            step(X + 0.1 * i)
            if monitored:
                with torch.set_grad_enabled(i % 4 == 0):  # as in a loop that logs without a graph
                    monitor(X)
    assert len(monitor.records) == (4 if monitored else 0)
    assert all(r.snr_guide >= 0.0 for r in monitor.records)
    params = dict(pyro.get_param_store().named_parameters()) | dict(vae.named_parameters())
    return {
        "parameters": {n: p.detach().clone() for n, p in params.items()},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in params.items()},
        "buffers": {n: b.clone() for n, b in vae.named_buffers()},
        "optimiser": state(),
        "random": [torch.rand(3), random.random(), float(np.random.rand())],
    }


def assert_equal(found, expected, where=""):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}/{i}")
    else:
        assert found == expected, where


WAYS = {
    "SVI": (by_svi, lambda: ImportanceWeightedELBO(4)),
    "SVI, compiled loss": (by_svi, lambda: ImportanceWeightedELBO(4, compile=True)),
    "SVI, Trace_ELBO": (by_svi, Trace_ELBO),
    "CompiledSVI": (by_compiled_svi, lambda: ImportanceWeightedELBO(4)),
    "torch": (by_torch, lambda: ImportanceWeightedELBO(4)),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.filterwarnings("ignore:BatchNorm1d in training mode")  # whose buffers are to stay
def test_training_ends_where_it_would_have(name, tmp_path):
    way, make = WAYS[name]
    found, expected = trained(way, make(), True, folder=tmp_path), trained(way, make(), False)
    if way is by_torch:
        assert all(bool((g != 0.0).any()) for n, g in expected["grad"].items() if n.endswith("weight"))
    assert_equal(found, expected)


class Coins:
    """A guide whose gradient uses running baselines, which the loss keeps in the param store."""

    def model(self, x):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x[:, 0])

    def guide(self, x):
        logit = pyro.param("logit", torch.tensor(0.2))
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.5}
        pyro.sample("z", dist.Bernoulli(logits=logit), infer={"baseline": baseline})

    def named_parameters(self):
        return []

    def named_buffers(self):
        return []


def test_running_baselines_stay(tmp_path):
    found, expected = (trained(by_svi, TraceGraph_ELBO(), m, Coins) for m in (True, False))
    assert any("baseline" in n for n in expected["parameters"])
    assert_equal(found, expected)


def test_gradients_of_modules_that_pyro_was_not_told_of_stay():
    decoder = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale).to_event(1))

    elbo = ImportanceWeightedELBO(4)
    elbo.loss_and_grads(model, guide, X)
    kept = decoder.weight.grad
    value = kept.clone()
    assert Monitor(model, guide, elbo, num_replicates=2)(X).snr_guide >= 0.0
    assert decoder.weight.grad is kept and torch.equal(kept, value)


@pytest.mark.filterwarnings("ignore:BatchNorm1d in training mode")
def test_recordings_stay_those_of_training():
    vae, elbo = VAE(), ImportanceWeightedELBO(4, compile=True)
    elbo.loss_and_grads(vae.model, vae.guide, X)
    (recorded,) = elbo._recorded.cache.recorded.values()
    calls = recorded.calls
    Monitor(vae.model, vae.guide, elbo, num_replicates=2)(X)
    assert recorded.calls == calls and len(elbo._recorded.cache.recorded) == 1


@pytest.mark.filterwarnings("ignore:BatchNorm1d in training mode")
def test_called_before_the_step():
    vae = VAE()
    with pytest.warns(UserWarning, match=r"decoder\$\$\$bias.*call it after the step"):
        quick(vae.model, vae.guide, Trace_ELBO())(X)


# What cannot be measured


def minibatches(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index, 0])


def mu_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def test_no_evidence_is_an_error_at_the_first_call():
    elbo = ImportanceWeightedELBO(1)
    elbo.loss_and_grads(minibatches, mu_guide, X)
    monitor = Monitor(minibatches, mu_guide, elbo)
    with pytest.raises(ValueError, match=r"monitor\(x_all\).*'data' .*shows 2 of its 4 elements"):
        monitor(X)
    with pytest.raises(ValueError, match="shows 2 of its 4"):  # nor is the second call silent
        monitor(X)
    assert monitor.records == []


def test_annealing():
    scale = [0.1]

    def annealed(x):
        with poutine.scale(scale=scale[0]):
            plain(x)

    def plain(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    elbo = ImportanceWeightedELBO(4)
    elbo.loss_and_grads(annealed, mu_guide, X)
    with pytest.raises(ValueError, match=r"Monitor\(plain_model, guide, elbo\).*tempered by a poutine.scale"):
        Monitor(annealed, mu_guide, elbo)(X)
    assert quick(plain, mu_guide, elbo)(X).step == 1
    scale[0] = 1.0
    later = quick(annealed, mu_guide, elbo, every=1)
    later(X)
    scale[0] = 0.5
    with pytest.warns(UserWarning, match="no record of step 2.*tempered"):  # training goes on
        assert later(X) is None
    scale[0] = 1.0
    assert later(X).step == 3
    assert [r.step for r in later.records] == [1, 3]


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match=r"with parameters.*num_gradients=0\) leaves the gradient out"):
        Monitor(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2))()


def test_arguments():
    elbo = ImportanceWeightedELBO(2)
    with pytest.raises(TypeError, match="guide to be callable"):
        Monitor(GAMMA.model, None, elbo)
    with pytest.raises(TypeError, match="elbo to be the loss that trains"):
        Monitor(GAMMA.model, GAMMA.guide, elbo(GAMMA.model, GAMMA.guide))
    with pytest.raises(TypeError, match=r"an object with add_scalar\(tag, value, step\), got 3"):
        Monitor(GAMMA.model, GAMMA.guide, elbo, writer=3)
    for options, told in (
        ({"every": 0}, "every >= 1, got 0"),
        ({"num_replicates": 1}, "num_replicates >= 2, got 1"),
        ({"num_particles": 0}, "num_particles >= 1, got 0"),
        ({"num_gradients": -1}, "num_gradients >= 0, got -1"),
        ({"num_gradients": 7}, "num_gradients to be 0, or 20 at least, got 7"),
    ):
        with pytest.raises(ValueError, match=told):
            Monitor(GAMMA.model, GAMMA.guide, elbo, **options)


# What is written


def test_a_writer_gets_all_figures_but_what_is_missing():
    writer = Writer()
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), every=2, writer=writer, tag="valid")
    for _ in range(2):
        monitor()
    expected = [
        (f"valid/{n}", v, r.step)
        for r in monitor.records
        for n, v in asdict(r).items()
        if n not in ("step", "elements", "num_particles", "drawn") and v == v
    ]
    assert writer.written == expected
    assert {t for t, _, _ in expected} >= {"valid/bound", "valid/ess", "valid/khat"}
    assert not any("snr" in t or "trusted" in t for t, _, _ in expected)
    monitor.close()  # is not the monitor's to close


def test_tensorboard(tmp_path, monkeypatch):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tensorboard, flushed = pytest.importorskip("torch.utils.tensorboard"), []
    flush = tensorboard.SummaryWriter.flush
    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", lambda self: flushed.append(flush(self)))
    with quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), every=2, writer=tmp_path / "run") as monitor:
        for _ in range(4):
            monitor()
        events = reading.EventAccumulator(str(tmp_path / "run")).Reload()
        assert len(flushed) == 3  # a run that is killed leaves what it had
    found = [(e.step, e.value) for e in events.Scalars("pyro_iwae/bound")]
    assert found == [(r.step, pytest.approx(r.bound)) for r in monitor.records]
    assert [step for step, _ in found] == [1, 2, 4]


def test_no_folder_before_the_first_record(tmp_path):
    quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), writer=str(tmp_path / "run")).close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2), writer=str(tmp_path / "run"))
    with pytest.raises(ImportError, match=r"pip install pyro-iwae\[tensorboard\]"):
        monitor()


# What is shown


KNOWN = Record(
    step=1,
    elements=1,
    num_particles=64,
    drawn=1024,
    bound=-12.3456,
    bound_error=0.0123,
    elbo=-13.0,
    elbo_error=0.1,
    log_evidence=-12.3,
    log_evidence_error=0.02,
    ess=210.04,
    ess_least=12.0,
    khat=0.41,
    khat_most=0.9,
    khat_threshold=0.67,
    trusted=1.0,
)


def record(step, **figures):
    return replace(KNOWN, step=step, **figures)


def test_a_record_is_one_line():
    alone = record(3, ess_least=210.04, khat_most=0.41, snr_guide=1.234)
    assert str(alone) == "step 3: bound -12.346 ± 0.012 nats; ESS 210.0 of 1024; khat 0.41 <= 0.67; SNR 1.23 (guide)"
    several = record(40, elements=9)
    assert str(several) == (
        "step 40: bound -12.346 ± 0.012 nats; ESS 210.0, least 12.0, of 1024; khat 0.41, most 0.90 > 0.67"
    )


def test_table():
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2))
    assert "no records yet" in str(monitor)
    monitor.records = [record(1), record(100, elements=2, snr_guide=1.5, snr_guide_error=0.2)]
    head, first, second = str(monitor).splitlines()
    assert head.split("  ")[-1] == "guide's SNR" and "least" in head and "model" not in head
    assert "-12.346 ± 0.012" in first and "12.0" in first and "1.5 ± 0.2" in second
    assert len(head) == len(first) == len(second)
    monitor.records = [record(i) for i in range(1, 300)]
    lines = str(monitor).splitlines()
    assert len(lines) == 22 and lines[-1] == "20 of 299 records"
    assert [int(lines[i].split()[0]) for i in (1, -2)] == [1, 299] and "least" not in lines[0]


def test_plot():
    monitor = quick(GAMMA.model, GAMMA.guide, ImportanceWeightedELBO(2))
    with pytest.raises(ValueError, match="at least one record"):
        monitor.plot()
    monitor.records = [record(1, bound=-20.0), record(100, ess=512.0)]
    other = plt.subplots()[1]
    assert monitor.plot(ax=other) is other
    axes = monitor.plot()
    right = axes.figure.axes[1]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[-12.3, -12.3], [-20.0, -12.3456]]
    assert list(right.lines[0].get_ydata()) == [100.0 * 210.04 / 1024, 50.0]
    assert axes.get_xlabel() == "step" and "nats" in axes.get_ylabel() and "%" in right.get_ylabel()
    plt.close("all")
