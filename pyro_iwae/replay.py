# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The kernels of a compiled graph launched as one, on a GPU: a CUDA graph, whose random numbers go on as ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replay"]

Run = Callable[..., Sequence[Tensor]]
WARM_UP = 3  # runs before the capture, which may choose algorithms and take memory


class Replay:
    """Runs a function of tensors by replaying its kernels.

    Args:
        run: the function.
        tensors: its inputs, all on one GPU. They are read, and changed, where they lie.
        copied: which of them may lie elsewhere at another call; they are copied in.
    """

    def __init__(self, run: Run, tensors: Sequence[Tensor], copied: slice) -> None:
        self.run, self.copied = run, copied
        self.inputs = list(tensors)
        self.inputs[copied] = [t.clone() for t in self.inputs[copied]]
        self.places = [t.data_ptr() for t in self.inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = list(run(*self.inputs))

    @staticmethod
    def suits(tensors: Sequence[Tensor]) -> bool:
        """Whether all lie on one GPU."""
        return bool(tensors) and all(t.is_cuda and t.device == tensors[0].device for t in tensors)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Runs it; the outputs are the caller's own."""
        if not self._reads(tensors):
            return list(self.run(*tensors))  # a parameter has moved, by `.data =`
        self.graph.replay()
        return [output.clone() for output in self.outputs]

    def bound(self, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        """What runs it on these tensors and returns the first output, which the next run overwrites."""
        if not self._reads(tensors):
            return lambda: self.run(*tensors)[0]

        def replay() -> Tensor:
            self.graph.replay()
            return self.outputs[0]

        return replay

    def _reads(self, tensors: Sequence[Tensor]) -> bool:
        """Copies in what may be copied; whether the rest lies where it lay."""
        places = [t.data_ptr() for t in tensors]
        found = [*places[: self.copied.start], *places[self.copied.stop :]]
        if found != [*self.places[: self.copied.start], *self.places[self.copied.stop :]]:
            return False
        for held, tensor in zip(self.inputs[self.copied], tensors[self.copied], strict=True):
            held.copy_(tensor)
        return True
