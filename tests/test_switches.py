# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A tie between a plate's elements that an argument turns on, after the first look found none."""

import enum
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, evaluate, structure
from pyro_iwae.switches import switches
from tests.statistics import limit
from tests.test_compiled import recorded_only  # noqa: F401  (a fixture)

ROWS = torch.tensor([4.0, -4.0, 4.0])
ONES = torch.ones(3, 3)
PRECISION = torch.eye(3) + 3.0 * ONES  # of z where each x is the sum of all z plus noise
MEAN = torch.linalg.solve(PRECISION, ONES @ ROWS)
EVIDENCE = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + ONES @ ONES).log_prob(ROWS).item()


class Kind(enum.Enum):
    ALONE = 1
    TIED = 2


@dataclass
class Settings:
    tied: bool


def tied(x, matrix):
    with pyro.plate("nodes", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal((matrix @ z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


def guide(x, _):
    with pyro.plate("nodes", 3):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.5))


def by(is_on):
    """A model whose elements are tied where an argument says so."""
    return lambda x, argument: tied(x, ONES if is_on(argument) else torch.eye(3))


SWITCHES = {
    "none": (lambda v: v is not None, None, torch.ones(3)),
    "word": (lambda v: v == "sum", "none", "sum"),
    "bytes": (lambda v: v == b"s", b"n", b"s"),
    "flag": (lambda v: v, False, True),
    "layers": (lambda v: v > 1, 1, 2),
    "numpy's number": (lambda v: v > 1, np.int64(1), np.int64(2)),
    "coupling": (lambda v: v > 0.0, 0.0, 0.3),
    "numpy's coupling": (lambda v: v > 0.0, np.float32(0.0), np.float32(0.3)),
    "numpy's flag": (lambda v: v, np.bool_(False), np.bool_(True)),
    "tensor": (lambda v: v > 0.0, torch.tensor(0.0), torch.tensor(0.3)),
    "tensor's flag": (lambda v: v, torch.tensor(False), torch.tensor(True)),
    "enum": (lambda v: v is Kind.TIED, Kind.ALONE, Kind.TIED),
    "dict": (lambda v: v["net"]["tied"], {"net": {"tied": False}}, {"net": {"tied": True}}),
    "list": (lambda v: v[1], [3, False], [3, True]),
    "dataclass": (lambda v: v.tied, Settings(False), Settings(True)),
    "longer": (lambda v: len(v) > 1, (ONES,), (ONES, ONES)),
    "another kind": (lambda v: isinstance(v, tuple), [ONES], (ONES,)),
}


@pytest.mark.parametrize(
    "options", [{}, {"vectorize_particles": False}, {"chunk_size": 4}], ids=["", "sequential", "chunk"]
)
@pytest.mark.parametrize("is_on, off, on", SWITCHES.values(), ids=SWITCHES)
def test_what_turns_a_tie_on(is_on, off, on, options):
    model, found = by(is_on), []
    for before in ([off], []):
        elbo = ImportanceWeightedELBO(8, **options)
        for argument in (*before, on):
            pyro.set_rng_seed(0)
            weights = elbo.log_weights(model, guide, ROWS, argument).log_weights
        found.append(weights)
    assert found[0].shape == (8,)  # one weight for all, and not for each
    assert torch.equal(*found)


@pytest.mark.usefixtures("recorded_only")
def test_a_recorded_step_sees_it():
    elbo = ImportanceWeightedELBO(8, compile=True)

    def switched(x, strength):  # without a branch, which a recording could not follow
        tied(x, torch.eye(3) + strength * (ONES - torch.eye(3)))

    def trained(x, strength):
        with pyro.plate("nodes", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.5))

    found = []
    for before in ([torch.tensor(0.0)], []):
        for strength in (*before, torch.tensor(1.0)):
            elbo.loss_and_grads(switched, trained, ROWS, strength)
            pyro.set_rng_seed(0)
            loss = elbo.loss_and_grads(switched, trained, ROWS, strength)
        found.append(loss)
        elbo = ImportanceWeightedELBO(8, compile=False)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_each_batch_of_an_evaluation_is_looked_at():
    """Its matrix is data: the identity in the first batch."""
    pyro.set_rng_seed(0)
    options = {"num_particles": 2000, "num_replicates": 16, "progress": False}
    assert evaluate(tied, guide, data=[(ROWS, torch.eye(3))], **options).plates == ("nodes",)
    with pytest.raises(ValueError, match="rows that share latents have no evidence of their own"):
        evaluate(tied, guide, data=[(ROWS, torch.eye(3)), (ROWS, ONES)], **options)
    whole = evaluate(tied, guide, ROWS, ONES, **options).total
    assert abs(whole.log_evidence - EVIDENCE) < limit(16) * whole.std_error


def test_draws_and_expectations_see_it():
    posterior = ImportanceResampledGuide(by(lambda v: v == "sum"), guide, num_particles=2000)
    pyro.set_rng_seed(0)
    posterior.expectation(lambda z: z["z"], ROWS, "none")
    batches = torch.stack([posterior.expectation(lambda z: z["z"], ROWS, "sum", num_batches=4) for _ in range(20)])
    assert bool(((batches.mean(0) - MEAN).abs() < limit(20, count=3) * batches.std(0) / 20**0.5).all())


def test_what_is_no_switch():
    """Data, counters, numbers that are annealed and objects of your own: the verdict stays."""
    same = [
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(1), torch.ones(1)),
        (9, 10**12),
        (-3, -1),
        (0.1, 0.2),
        (list(range(40)), list(range(1, 41))),
        (SimpleNamespace(a=1), SimpleNamespace(a=2)),
        (torch.tensor(0.0, device="meta"), torch.tensor(1.0, device="meta")),
    ]
    for one, other in same:
        assert switches((one,), {"a": one}) == switches((other,), {"a": other})
    assert len({switches((), {"a": v}) for v in (None, 0, 1, 2, 7, 8, 9)}) == 6
    nested: list = []
    nested.append(nested)
    hash(switches((nested,), {}))  # ends


def test_verdicts_do_not_pile_up(monkeypatch):
    """Words that are never the same twice."""
    monkeypatch.setattr(structure, "MOST_KEYS", 16)
    model, elbo = by(lambda v: False), ImportanceWeightedELBO(2, vectorize_particles=True)
    for i in range(40):
        elbo.loss(model, guide, ROWS, str(i))
    assert 0 < len(elbo._structures._latest) <= 16
    assert len(elbo._structures._verdicts) <= 16
