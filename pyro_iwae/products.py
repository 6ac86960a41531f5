# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Matrix products of a recorded step by oneDNN, on CPUs where that is faster than the BLAS that torch calls.

Torch calls MKL, whose kernels leave half of an AMD processor's speed unused; torch brings oneDNN along, whose do not.
"""

from __future__ import annotations

import timeit
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["use_onednn"]

LARGE = 2.0**22  # multiplications, from which on a call from Python is no matter
TRIED = 384  # rows and columns of the matrices on which both are timed
FASTER = 0.75  # of the time: what is not clear should not change from run to run
LIBRARY: list[torch.library.Library] = []  # keeps the operation registered


def use_onednn(module: GraphModule) -> None:
    """Has large products of float32 matrices in a recorded graph done by oneDNN, where that is faster here."""
    for node in list(module.graph.nodes):
        if torch.backends.mkldnn.enabled and _is_product(node) and is_faster():
            bias, a, b = node.args if len(node.args) == 3 else (None, *node.args)
            with module.graph.inserting_before(node):
                product = module.graph.call_function(operation(), (a, b, bias))
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)


def _is_product(node: Node) -> bool:
    """Whether it is a large product of matrices that oneDNN takes as they lie."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) or node.kwargs:
        return False
    operands: Any = node.args
    *bias, a, b = (operand.meta["val"] for operand in operands)
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
    """Whether oneDNN is there and clearly faster than what torch calls, measured once in a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    a = torch.ones(TRIED, TRIED)
    ours, torchs = (
        min(timeit.repeat(run, number=1, repeat=7)) for run in (lambda: multiply(a, a, None), lambda: a @ a)
    )
    return ours < FASTER * torchs


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
