# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Modules import only modules above them."""

import ast
from pathlib import Path

import pytest

import pyro_iwae

ROOT = Path(pyro_iwae.__file__).parent
ORDER = [
    {
        "archive",
        "constraint_codes",
        "cost",
        "decisions",
        "distributed",
        "exact",
        "graphless",
        "options",
        "owning",
        "piecemeal",
        "products",
        "replay",
        "threads",
        "totals",
        "versions",
    },
    {"capture", "switches", "ways"},
    {"cut"},
    {"logweights"},
    {"diagnostics", "estimates", "evidence", "objectives", "reach", "resampling"},
    {"gradients"},
    {"density", "plates", "state"},
    {"checkpoint", "parts"},
    {"densities", "drawn", "replaying", "tree", "watching"},
    {"flows", "memory", "step", "updates"},
    {"edges"},
    {"cutting"},
    {"handlers", "traces"},
    {"blocks", "terms", "turns"},
    {"particles"},
    {"crossing", "leaves", "redrawn", "structure", "subsampling"},
    {"announcements", "trial"},
    {"branching"},
    {"inspection"},
    {"verdicts"},
    {"weighing"},
    {"chunks", "compiled", "expectation", "unconstrain", "walking"},
    {"selection", "sharing"},
    {"backward", "emission", "given", "pooled", "shared_draws"},
    {"batches", "companions", "elbo", "evaluation", "gradient_snr"},
    {"evaluating"},
    {"compiled_svi", "guide", "monitor", "tradeoff"},
    {"preflight"},
    {"citation", "inference_data", "plots"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_upwards(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    assert own in LEVEL, f"give {own} a place in ORDER"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path.name}"
        for name in filter(None, names):
            if name.split(".")[0] == "pyro_iwae":
                assert "." in name, f"{path.name} imports from the package's own __init__"
                other = name.split(".")[1]
                assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_exact_imports_no_other_module():
    assert "from pyro_iwae" not in (ROOT / "exact.py").read_text()


def test_the_mathematics_knows_no_pyro():
    names = [
        "decisions.py",
        "replay.py",
        "products.py",
        "ways.py",
        "piecemeal.py",
        "cut.py",
        "reach.py",
        "totals.py",
        "logweights.py",
        "resampling.py",
        "density.py",
        "estimates.py",
        "evidence.py",
        "parts.py",
    ]
    folders = [*(ROOT / "gradients").glob("*.py"), *(ROOT / "objectives").glob("*.py")]
    for path in [*(ROOT / name for name in names), *folders]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] == "pyro"], path.name
