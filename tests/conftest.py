# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What every test starts from, and what it must leave behind."""

import hashlib
import os

import jaxtyping
import pyro
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

SEED = os.environ.get("PYRO_IWAE_TEST_SEED", "0")  # another value makes every random stream another one

if "PYRO_IWAE_TEST_DEVICE" in os.environ:  # "cuda", say
    torch.set_default_device(os.environ["PYRO_IWAE_TEST_DEVICE"])

settings.register_profile(
    "default",
    deadline=None,
    max_examples=200,
    derandomize=SEED == "0",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "nightly", settings.get_profile("default"), max_examples=2000, derandomize=False, print_blob=True
)
settings.register_profile(  # where it is enough to know that something fails
    "unshrunk", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def host_state():
    """Global switches that neither the library nor a test may leave changed."""
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "forward hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
        **pyro.settings.get(),
    }


@pytest.fixture(autouse=True)
def fresh_host(request):
    """A random stream of the test's own and an empty param store; afterwards, a host as it was found."""
    digest = hashlib.sha256(f"{request.node.nodeid} {SEED}".encode()).digest()
    pyro.set_rng_seed(int.from_bytes(digest[:4], "big"))
    pyro.clear_param_store()
    before = host_state()
    yield
    handlers, plates = list(_PYRO_STACK), [name for name in _DIM_ALLOCATOR._stack if name is not None]
    _PYRO_STACK.clear()  # so that one failure is one failure
    _DIM_ALLOCATOR._stack.clear()
    pyro.clear_param_store()
    after = host_state()
    assert handlers == [], f"handlers left on Pyro's stack: {handlers}"
    assert plates == [], f"plate dimensions left allocated: {plates}"
    assert after == before, "global switches were left changed"


@pytest.fixture
def double():
    """Runs the test in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def unchecked():
    """Without the type checks that only a test run has: what users see of a wrong type, or of a random stream."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def processes():
    """Four processes that make a group, to run functions in."""
    from tests.ranks import Processes

    found = Processes()
    yield found
    found.close()
