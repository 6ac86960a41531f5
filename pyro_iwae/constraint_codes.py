# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Constraints of parameters as plain values, which can be read back without running code."""

from __future__ import annotations

from typing import Any

import numpy as np
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.distributions.constraints import Constraint

__all__ = ["decoded", "encoded"]

PLAIN = (bool, int, float, str, type(None))
CONSTRAINTS = {
    kind.__name__: kind
    for module in (torch_constraints, pyro_constraints)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Constraint) and not issubclass(kind, property)
}


def encoded(value: Any, parameter: str) -> Any:
    """A constraint, or what one is made of, as plain values.

    Args:
        value: the constraint.
        parameter: whose it is, for the message.

    Raises:
        TypeError: where it is one of the user's own.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return [encoded(each, parameter) for each in value]
    if CONSTRAINTS.get(type(value).__name__) is type(value):
        return {"constraint": type(value).__name__, **{n: encoded(v, parameter) for n, v in vars(value).items()}}
    raise TypeError(
        f"expected parameter {parameter!r} to be constrained by pyro.distributions.constraints, of numbers and "
        f"tensors, got {value!r}; write another constraint, or make it a PyroParam of a PyroModule, whose constraints "
        "are the module's own"
    )


def decoded(value: Any, device: str) -> Any:
    """The opposite; tensors go to a device.

    Raises:
        ValueError: where it names what is no constraint.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [decoded(each, device) for each in value]
    if not isinstance(value, dict):
        return value
    kind = CONSTRAINTS.get(value["constraint"])
    if kind is None:
        raise ValueError(
            f"expected a constraint of pyro.distributions.constraints, got {value['constraint']!r}, which is none of "
            "those that are installed; install the torch and Pyro that the file was written with"
        )
    constraint = kind.__new__(kind)
    vars(constraint).update({n: decoded(v, device) for n, v in value.items() if n != "constraint"})
    return constraint
