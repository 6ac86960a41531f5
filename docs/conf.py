# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration."""

import pyro_iwae

project = "pyro_iwae"
author = "The pyro_iwae developers"
copyright = author
release = version = pyro_iwae.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # shapes such as "*plates" are no reStructuredText
python_maximum_signature_line_length = 88
doctest_test_doctest_blocks = ""  # pytest runs the docstrings' examples; here only the pages' own directives

html_theme = "furo"
