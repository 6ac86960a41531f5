# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What to cite for an ELBO: the papers behind its bound, gradients and objective, in BibTeX."""

from __future__ import annotations

import re

from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.guide import ImportanceResampledGuide

__all__ = ["citation"]

# By arXiv number: key, authors, title, where and when.
PAPERS = {
    "1704.02916": (
        "cremer2017reinterpreting",
        "Cremer, Chris and Morris, Quaid and Duvenaud, David",
        "Reinterpreting Importance-Weighted Autoencoders",
        "International Conference on Learning Representations, Workshop Track",
        2017,
    ),
    "1509.00519": (
        "burda2016importance",
        "Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan",
        "Importance Weighted Autoencoders",
        "International Conference on Learning Representations",
        2016,
    ),
    "1703.09194": (
        "roeder2017sticking",
        "Roeder, Geoffrey and Wu, Yuhuai and Duvenaud, David",
        "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference",
        "Advances in Neural Information Processing Systems",
        2017,
    ),
    "1810.04152": (
        "tucker2019doubly",
        "Tucker, George and Lawson, Dieterich and Gu, Shixiang and Maddison, Chris J.",
        "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives",
        "International Conference on Learning Representations",
        2019,
    ),
    "2008.01998": (
        "lievin2020optimal",
        "Li{\\'e}vin, Valentin and Dittadi, Andrea and Christensen, Anders and Winther, Ole",
        "Optimal Variance Control of the Score-Function Gradient Estimator for Importance-Weighted Bounds",
        "Advances in Neural Information Processing Systems",
        2020,
    ),
    "1602.06725": (
        "mnih2016variational",
        "Mnih, Andriy and Rezende, Danilo J.",
        "Variational Inference for Monte Carlo Objectives",
        "International Conference on Machine Learning",
        2016,
    ),
    "1802.04537": (
        "rainforth2018tighter",
        "Rainforth, Tom and Kosiorek, Adam R. and Le, Tuan Anh and Maddison, Chris J. and Igl, Maximilian "
        "and Wood, Frank and Teh, Yee Whye",
        "Tighter Variational Bounds are Not Necessarily Better",
        "International Conference on Machine Learning",
        2018,
    ),
    "1602.02311": (
        "li2016renyi",
        "Li, Yingzhen and Turner, Richard E.",
        "R{\\'e}nyi Divergence Variational Inference",
        "Advances in Neural Information Processing Systems",
        2016,
    ),
    "1907.00031": (
        "masrani2019thermodynamic",
        "Masrani, Vaden and Le, Tuan Anh and Wood, Frank",
        "The Thermodynamic Variational Objective",
        "Advances in Neural Information Processing Systems",
        2019,
    ),
    "2203.04432": (
        "geffner2022variational",
        "Geffner, Tomas and Domke, Justin",
        "Variational Inference with Locally Enhanced Bounds for Hierarchical Models",
        "International Conference on Machine Learning",
        2022,
    ),
    "1806.08593": (
        "aitchison2019tensor",
        "Aitchison, Laurence",
        "Tensor {M}onte {C}arlo: Particle Methods for the {GPU} Era",
        "Advances in Neural Information Processing Systems",
        2019,
    ),
}
BASIS = ("1704.02916", "1509.00519")
LOCALLY_ENHANCED, TENSOR_MONTE_CARLO = "2203.04432", "1806.08593"


def citation(of: ImportanceWeightedELBO | ImportanceResampledGuide | None = None) -> str:
    """The papers to cite, in BibTeX.

    Args:
        of: what was used; None gives what this package is built on. The estimator for sites that are not
            reparameterised is among an ELBO's, whether or not the guide has such sites.

    Returns:
        Entries, an empty line between them.

    Raises:
        TypeError: where it is neither.

    Example::

        >>> from pyro_iwae import DoublyReparameterized, ImportanceWeightedELBO
        >>> elbo = ImportanceWeightedELBO(num_particles=64, gradient=DoublyReparameterized())
        >>> [line.split("{")[1] for line in citation(elbo).splitlines() if line.startswith("@")]
        ['cremer2017reinterpreting,', 'burda2016importance,', 'tucker2019doubly,', 'lievin2020optimal,']
    """
    if of is not None and not isinstance(of, ImportanceWeightedELBO | ImportanceResampledGuide):
        raise TypeError(
            f"expected an ImportanceWeightedELBO, an ImportanceResampledGuide or nothing, got {type(of).__name__}"
        )
    numbers = [*BASIS]
    if isinstance(of, ImportanceWeightedELBO):
        used = (of.gradient, getattr(of.gradient, "inner", None), of.score, of.objective)
        numbers += [_number(each.reference) for each in used if each is not None]
    if getattr(of, "combine", False):
        numbers.append(TENSOR_MONTE_CARLO)
    elif of is not None and of.plate_particles and of.num_particles == 1:
        numbers.append(LOCALLY_ENHANCED)
    return "\n\n".join(_entry(number) for number in dict.fromkeys(numbers))


def _number(reference: str) -> str:
    found = re.search(r"arXiv (\d{4}\.\d{5})$", reference)
    if found is None:
        raise ValueError(f"expected a reference that ends in an arXiv number, got {reference!r}")
    return found[1]


def _entry(number: str) -> str:
    key, authors, title, venue, year = PAPERS[number]
    fields = {
        "title": title,
        "author": authors,
        "booktitle": venue,
        "year": year,
        "note": f"arXiv:{number}",
    }
    return f"@inproceedings{{{key},\n" + ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items()) + "\n}"
