# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The effect handlers under which particles run: their plate, the plates around it, one minibatch for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import apply_stack
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_iwae.decisions import is_recording, unrecorded
from pyro_iwae.densities import spread
from pyro_iwae.plates import PARTICLES, Site, plate_scale
from pyro_iwae.state import seeded_apart

__all__ = ["ENCLOSING", "EnclosingPlates", "Minibatch", "ParticlePlate", "enclosing_frames", "particle_plates"]

Program = Callable[..., Any]
Around = Callable[[Program], Program]


class Minibatch(Messenger):
    """Draws the indices of each subsampled plate once, for all particles, for model and guide alike.

    Args:
        seed: what they are drawn from, the same wherever it is the same; None draws them as model and guide would.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg):
            return
        if msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]
            msg["done"] = msg["stop"] = True  # handlers outside see each plate's indices once
        elif msg["value"] is not None or msg["done"]:  # pyro.plate(subsample=...)
            return
        elif is_recording() and _shows_all(msg["fn"]):
            with unrecorded():  # indices of all elements are numbers to loop over
                msg["value"], msg["done"] = msg["fn"].sample(), True
        elif self.seed is not None:
            with seeded_apart(self.seed, "indices", msg["name"]):
                msg["value"], msg["done"] = msg["fn"].sample(), True

    def _pyro_post_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            self.indices[msg["name"]] = msg["value"]


def _shows_all(indices: Any) -> bool:
    return indices.subsample_size is None or indices.subsample_size >= indices.size


class EnclosingPlates(Messenger):
    """Puts sites into plates that were entered further out, behind a boundary that hides them."""

    def __init__(self, frames: Sequence[CondIndepStackFrame]) -> None:
        super().__init__()
        self.frames = tuple(frames)

    def _process_message(self, msg: Site) -> None:
        if self.frames and (msg["type"] == ENCLOSING or (msg["type"] == "sample" and not site_is_subsample(msg))):
            msg["cond_indep_stack"] = self.frames + msg["cond_indep_stack"]
            for frame in self.frames:
                msg["scale"] = msg["scale"] * plate_scale(frame)
            spread(msg)


class ParticlePlate(IndepMessenger):
    """A plate that never subsamples and so, unlike ``pyro.plate``, sends no message about its indices.

    Nor does it leave its mark on the indices of other plates, which all particles share.

    Args:
        name: its name.
        size: particles.
        dim: their dimension.
        holds: the sites that have these particles.
        spreads: whether sites get a density for each particle also where nothing tells these apart.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        dim: int,
        holds: Callable[[Site], bool] = lambda site: True,
        spreads: bool = True,
    ) -> None:
        super().__init__(name, size, dim=dim)
        self.holds, self.spreads = holds, spreads

    def _process_message(self, msg: Site) -> None:
        if not site_is_subsample(msg) and (msg["type"] != "sample" or self.holds(msg)):
            super()._process_message(msg)
            if self.spreads and not _is_spread(msg):
                spread(msg)


def _is_spread(msg: Site) -> bool:
    """Whether the site's distribution has all dimensions of its plates, so that expanding it would only copy it."""
    shape = getattr(msg["fn"], "batch_shape", ())
    frames = [f for f in msg["cond_indep_stack"] if f.dim is not None and f.size != -1]
    return all(len(shape) >= -f.dim and shape[f.dim] == f.size for f in frames)


ENCLOSING = "pyro_iwae_enclosing"  # a message that nobody handles: only plates leave their mark on it


def enclosing_frames() -> tuple[CondIndepStackFrame, ...]:
    """The vectorised plates that a sample statement would find itself in, here and now."""
    msg: Any = {
        "type": ENCLOSING,
        "name": ENCLOSING,
        "fn": lambda: None,
        "is_observed": False,
        "args": (),
        "kwargs": {},
        "value": None,
        "infer": {},
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": False,
        "stop": False,
        "continuation": None,
    }
    apply_stack(msg)
    return tuple(f for f in msg["cond_indep_stack"] if f.vectorized)


def particle_plates(
    plates: Sequence[tuple[int, int, Callable[[Site], bool]]], outside: EnclosingPlates, *, spreads: bool = True
) -> Around:
    """What puts a program into the plates around it: the enclosing ones, and the particles' where they run together.

    Args:
        plates: size, dimension, and the sites that have these particles.
        outside: the enclosing ones.
        spreads: as for :class:`ParticlePlate`.
    """

    def around(fn: Program) -> Program:
        for size, dim, holds in plates:
            fn = ParticlePlate(f"{PARTICLES}{-dim}", size, dim=dim, holds=holds, spreads=spreads)(fn)
        return outside(fn) if outside.frames else fn

    return around
