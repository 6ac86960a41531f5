# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Matrix products by oneDNN are the products, and take the place of those that they suit."""

import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_iwae import ImportanceWeightedELBO, products
from pyro_iwae.capture import capture

has_onednn = torch.backends.mkldnn.is_available() and torch.get_default_device().type == "cpu"
pytestmark = pytest.mark.skipif(not has_onednn, reason="needs a CPU, and a build of torch with oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """Does not time anything: oneDNN counts as faster, and products of 8 numbers as large."""
    monkeypatch.setattr(products, "is_faster", lambda: True)
    monkeypatch.setattr(products, "LARGE", 8)


def matrices(rows, inner, columns, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)


def turned(matrix):
    """The same, with columns next to each other in memory."""
    return matrix.t().contiguous().t()


def same(matrix):
    return matrix


PRODUCTS = {
    "a @ b": lambda a, b, v: a @ b,
    "a @ b + v": lambda a, b, v: torch.addmm(v, a, b),
    "linear": lambda a, b, v: torch.nn.functional.linear(a, b.t(), v),
    "linear over a batch": lambda a, b, v: torch.nn.functional.linear(a.reshape(2, -1, a.shape[1]), b.t(), v).flatten(
        0, 1
    ),
}


@pytest.mark.parametrize("of_a", [same, turned])
@pytest.mark.parametrize("of_b", [same, turned])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_by_onednn_are_the_products(product, of_a, of_b):
    a, b = matrices(6, 50, 33)
    a, b, v = of_a(a), of_b(b), torch.linspace(-1, 1, 33)
    graph = capture(lambda: [PRODUCTS[product](a, b, v)], [a, b, v])
    assert products.operation() in [n.target for n in graph.module.graph.nodes]
    exact = a.double() @ b.double() + (0.0 if product == "a @ b" else v.double())
    for _ in range(2):
        torch.testing.assert_close(graph([a, b, v])[0].double(), exact, rtol=1e-5, atol=1e-5)
        graph.compile([a, b, v])
        assert graph.compiled is not None


LEFT = {
    "small": lambda a, b: a[:1, :1] @ b[:1],
    "float64": lambda a, b: a.double() @ b.double(),
    "bfloat16": lambda a, b: a.bfloat16() @ b.bfloat16(),
    "a stride of its own": lambda a, b: a[:, ::2] @ b[::2],
    "expanded": lambda a, b: a[:1].expand(6, -1) @ b,
    "a matrix added": lambda a, b: torch.addmm(torch.ones(6, 7), a, b),
    "scaled": lambda a, b: torch.addmm(torch.ones(7), a, b, alpha=2.0),
    "a batch": lambda a, b: torch.bmm(a[None], b[None]),
    "a number added": lambda a, b: torch.addmm(torch.ones(1), a, b),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_suit_is_left_alone(case):
    a, b = matrices(6, 4, 7)
    graph = capture(lambda: [LEFT[case](a, b)], [a, b])
    assert "pyro_iwae" not in str(graph.module.graph)
    torch.testing.assert_close(graph([a, b])[0], LEFT[case](a, b))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # the switch is set together with that of GPUs
@pytest.mark.parametrize("switch", ["slower", "disabled"])
def test_torchs_own_product_stays(switch, monkeypatch):
    a, b = matrices(6, 4, 7)
    if switch == "slower":
        monkeypatch.setattr(products, "is_faster", lambda: False)
    with torch.backends.mkldnn.flags(enabled=switch != "disabled"):
        graph = capture(lambda: [a @ b], [a, b])
    assert "pyro_iwae" not in str(graph.module.graph)


def test_factors_need_not_be_arguments(monkeypatch):
    """They may come from closures, modules and draws."""
    data, net = torch.randn(6, 4), torch.nn.Linear(4, 7)
    net.register_buffer("shift", torch.randn(4, 4))

    def model():
        pyro.module("net", net)
        logits = net(data @ net.shift) + torch.empty(6, 4).normal_() @ net.weight.t()
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + logits.sum(-1), 1.0), obs=data[:, 0])

    def guide():
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(6)), 1.0))

    losses = {}
    for recorded in (False, True):
        pyro.clear_param_store()
        elbo = ImportanceWeightedELBO(num_particles=3, compile=recorded)
        elbo.loss_and_grads(model, guide)
        pyro.set_rng_seed(1)
        losses[recorded] = [elbo.loss_and_grads(model, guide) for _ in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    (step,) = elbo._recorded.cache.recorded.values()
    assert str(step.graph.module.graph).count("pyro_iwae.multiply") >= 3


MACHINES = {
    "AMD": ("vendor_id : AuthenticAMD", "AVX512", True, True, True),
    "Intel": ("vendor_id : GenuineIntel", "AVX512", True, True, False),
    "older": ("vendor_id : AuthenticAMD", "AVX2", True, True, False),
    "no MKL": ("vendor_id : AuthenticAMD", "AVX512", False, True, False),
    "no oneDNN": ("vendor_id : AuthenticAMD", "AVX512", True, False, False),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_which_machines_it_is_faster_on(machine, monkeypatch):
    monkeypatch.undo()
    processor, capability, mkl, mkldnn, expected = MACHINES[machine]
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert products.is_faster.__wrapped__() == expected


def test_a_recording_outlives_a_reload():
    a, b = matrices(6, 4, 7)
    graph = capture(lambda: [a @ b], [a, b])
    importlib.reload(products)
    torch.testing.assert_close(graph([a, b])[0], a @ b)
