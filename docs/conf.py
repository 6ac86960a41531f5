# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration."""

import zlib
from pathlib import Path

import pyro_iwae

HERE = Path(__file__).parent
BUILT = HERE / "_build"

project = "pyro_iwae"
author = "The pyro_iwae developers"
copyright = author
release = version = pyro_iwae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "inventories"]
nitpicky = True  # a reference that leads nowhere is an error
# jaxtyping has no inventory; a Program is any callable.
nitpick_ignore = [("py:class", name) for name in ("jaxtyping.Float", "jaxtyping.Int", "Program")]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # shapes such as "*plates" are no reStructuredText
python_maximum_signature_line_length = 88
doctest_test_doctest_blocks = ""  # pytest runs the docstrings' examples; here only the pages' own directives

html_theme = "furo"
html_title = "pyro_iwae"
pygments_style = "friendly"  # what is taken away is red, what is new green
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


# The tutorials: examples/, run as they are.


def quietly(gallery_conf, script_vars):
    """No bars and no addresses of this machine in pages; figures are shown, and kept apart from the sources."""
    return ["--quiet", "--output", str(BUILT / "figures" / Path(script_vars["src_file"]).stem)]


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"^(?!.*(digits_vae|distributed|lightning_vae)\.py)",  # shown, not run: minutes, or processes
    "within_subsection_order": "sphinx_gallery.sorting.FileNameSortKey",
    "reset_argv": quietly,
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "parallel": 2,
}
suppress_warnings = ["config.cache"]  # of that function


# Other projects' pages: their names that are used here, and where they are described. Kept in this repository, so that
# the documentation builds without a network.


def inventory(name, address):
    """From the lines of inventories/NAME.txt to a file as Sphinx reads it."""
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    packed = BUILT / "inventories" / f"{name}.inv"
    packed.parent.mkdir(parents=True, exist_ok=True)
    packed.write_bytes(header.encode() + zlib.compress((HERE / f"inventories/{name}.txt").read_bytes()))
    return address, str(packed)


intersphinx_mapping = {
    name: inventory(name, address)
    for name, address in {
        "python": "https://docs.python.org/3",
        "pyro": "https://docs.pyro.ai/en/stable",
        "torch": "https://docs.pytorch.org/docs/stable",
        "arviz": "https://python.arviz.org/en/stable",
        "matplotlib": "https://matplotlib.org/stable",
    }.items()
}
