# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Matrix products of a recorded step by oneDNN, on CPUs where that is faster than the BLAS that torch calls.

Torch calls MKL, whose kernels for AMD processors are of 256 bits; torch brings oneDNN along, whose are of 512.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["use_onednn"]

LARGE = 2.0**22  # multiplications, from which on a call from Python is no matter
LIBRARY: list[torch.library.Library] = globals().get("LIBRARY", [])  # keeps the operation, also when this is reloaded


def use_onednn(module: GraphModule) -> None:
    """Has large products of float32 matrices in a recorded graph done by oneDNN, where that is faster here."""
    for node in list(module.graph.nodes):
        if torch.backends.mkldnn.enabled and _is_product(node) and is_faster():
            bias, a, b = node.args if len(node.args) == 3 else (None, *node.args)
            with module.graph.inserting_before(node):
                product = module.graph.call_function(operation(), (a, b, bias))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)


def _is_product(node: Node) -> bool:
    """Whether it is a large product of matrices that oneDNN takes as they lie."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) or node.kwargs:
        return False
    operands: Any = node.args
    values = [operand.meta.get("val") for operand in operands]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    *bias, a, b = values
    return (
        a.numel() * b.shape[1] >= LARGE
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (*bias, a, b))
        and all(t.is_contiguous() or t.t().is_contiguous() for t in (a, b))
        and all(t.dim() == 1 and t.is_contiguous() and len(t) == b.shape[1] for t in bias)
    )


def multiply(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product of two matrices, and a vector added to each row."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return product


@cache
def is_faster() -> bool:
    """Whether torch calls MKL on a processor of which MKL uses half: an AMD one with vectors of 512 bits.

    By what the machine is, and not by a trial, so that a seeded run gives the same numbers again.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _processor() -> str:
    """Who made the processor, among other things."""
    linux = Path("/proc/cpuinfo")
    return linux.read_text() if linux.exists() else platform.processor()


@cache
def operation() -> Any:
    """``multiply`` as an operation of torch, which graphs can hold."""
    if not hasattr(torch.ops.pyro_iwae, "multiply"):
        library = torch.library.Library("pyro_iwae", "FRAGMENT")
        library.define("multiply(Tensor a, Tensor b, Tensor? bias) -> Tensor")
        library.impl("multiply", multiply, "CPU")
        library.impl("multiply", lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]), "Meta")
        LIBRARY.append(library)
    return torch.ops.pyro_iwae.multiply.default
