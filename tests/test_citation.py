# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What to cite: each estimator and objective has its paper, and an ELBO names those that it uses."""

import re

import pytest

import pyro_iwae
from pyro_iwae import (
    MIWAE,
    TVO,
    VIMCO,
    DoublyReparameterized,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    SampledBackward,
    StickTheLanding,
    citation,
)
from pyro_iwae.gradients import PathGradient, ScoreGradient
from pyro_iwae.objectives import Objective

BASIS = ["cremer2017reinterpreting", "burda2016importance"]
KINDS = (PathGradient, ScoreGradient, Objective)
USED = [c for c in map(vars(pyro_iwae).get, pyro_iwae.__all__) if isinstance(c, type) and issubclass(c, KINDS)]


def keys(text):
    return re.findall(r"^@inproceedings\{(\w+),$", text, re.M)


@pytest.mark.parametrize(
    "of, further",
    [
        (None, []),
        (ImportanceWeightedELBO(8), ["lievin2020optimal"]),
        (ImportanceWeightedELBO(8, gradient=DoublyReparameterized()), ["tucker2019doubly", "lievin2020optimal"]),
        (
            ImportanceWeightedELBO(8, gradient=StickTheLanding(), score=VIMCO()),
            ["roeder2017sticking", "mnih2016variational"],
        ),
        (
            ImportanceWeightedELBO(8, gradient=SampledBackward(2, inner=DoublyReparameterized())),
            ["tucker2019doubly", "lievin2020optimal"],
        ),
        (ImportanceWeightedELBO(8, objective=MIWAE(2)), ["lievin2020optimal", "rainforth2018tighter"]),
        (ImportanceWeightedELBO(8, objective=TVO((0.0, 0.5))), ["lievin2020optimal", "masrani2019thermodynamic"]),
        (ImportanceWeightedELBO(1, plate_particles={"data": 4}), ["lievin2020optimal", "geffner2022variational"]),
        (ImportanceWeightedELBO(4, plate_particles={"data": 4}), ["lievin2020optimal"]),
        (
            ImportanceWeightedELBO(4, plate_particles={"data": 4}, combine=True),
            ["lievin2020optimal", "aitchison2019tensor"],
        ),
        (ImportanceResampledGuide(lambda: None, lambda: None, num_particles=8), []),
    ],
)
def test_names_what_is_used(of, further):
    assert keys(citation(of)) == BASIS + further


@pytest.mark.parametrize("kind", USED, ids=lambda c: c.__name__)
def test_every_reference_has_an_entry(kind):
    number = kind.reference.split()[-1]
    name = re.split(r"[,& ]", kind.reference)[0]
    key, authors, _, _, year = pyro_iwae.citation.__globals__["PAPERS"][number]
    assert str(year) in kind.reference and str(year) in key
    assert authors.replace("{\\'e}", "é").startswith(name)


def test_entries_are_whole():
    for entry in citation(ImportanceWeightedELBO(8, gradient=DoublyReparameterized())).split("\n\n"):
        assert entry.count("{") == entry.count("}")
        assert all(f"  {field} = {{" in entry for field in ("title", "author", "booktitle", "year", "note"))


def test_of_something_else():
    with pytest.raises(TypeError, match="expected an ImportanceWeightedELBO.*got str"):
        citation("elbo")
