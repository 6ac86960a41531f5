# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""SVI whose whole step, the optimiser included, is one recorded graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm import tqdm

from pyro_iwae.compiled import CompiledSteps
from pyro_iwae.elbo import ImportanceWeightedELBO
from pyro_iwae.graphless import graph_if
from pyro_iwae.options import as_count, require_callables, require_switch
from pyro_iwae.particles import Call
from pyro_iwae.step import Step
from pyro_iwae.threads import in_one_thread
from pyro_iwae.updates import OptimizerUpdate
from pyro_iwae.watching import Arguments
from pyro_iwae.weighing import Particles

__all__ = ["CompiledSVI"]

Program = Callable[..., Any]
SHOWN_EVERY = 50  # steps between two numbers in the progress bar, and two looks at what must stay as it was


class CompiledSVI:
    """``pyro.infer.SVI`` with the whole step, loss, gradient and optimiser, as one compiled graph.

    For small and middling models, where Pyro's effect handlers and the optimiser's own loop cost more than the
    arithmetic. Losses and parameters are those of ``SVI`` on the same random numbers, but for rounding; parameters are
    changed in place in the param store, the optimiser's state where ``optim`` keeps it. What a recording takes for
    granted is described at ``ImportanceWeightedELBO(compile=True)``.

    Args:
        model: the model.
        guide: the guide.
        optim: ``pyro.optim.Adam``, ``AdamW``, ``ClippedAdam`` or ``SGD``. Its numbers are frozen in the recording.
        loss: an :class:`ImportanceWeightedELBO`.

    Raises:
        TypeError: where an argument has the wrong type, or the optimiser is another.
        ValueError: where the loss runs its particles in chunks.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_iwae import CompiledSVI, ImportanceWeightedELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(16))
        >>> losses = svi.run(100, torch.tensor([1.0, 2.0]), progress=False)
        >>> losses.shape
        torch.Size([100])
    """

    def __init__(self, model: Program, guide: Program, optim: PyroOptim, loss: ImportanceWeightedELBO) -> None:
        require_callables(model, guide)
        if not isinstance(loss, ImportanceWeightedELBO):
            raise TypeError(
                f"expected loss to be an ImportanceWeightedELBO, got {loss!r}; num_particles=1 is Trace_ELBO's loss"
            )
        _require_whole(loss)
        self.model, self.guide, self._optim, self._loss = model, guide, optim, loss
        self._copy = copy.copy(loss)
        self._update = OptimizerUpdate(optim)
        self._recorded = CompiledSteps(self._uncompiled_step, self._update)

    @property
    def optim(self) -> PyroOptim:
        """The optimiser."""
        return self._optim

    @property
    def loss(self) -> ImportanceWeightedELBO:
        """The ELBO."""
        return self._loss

    @in_one_thread
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one step, and returns the loss, in nats.

        Args:
            args: passed to model and guide.
            kwargs: passed to model and guide.

        Raises:
            NotImplementedError: where the step cannot be recorded.
            RuntimeError: where recording and model have parted: something in Python has changed; in inference mode.
            ValueError: what ``ImportanceWeightedELBO`` raises; the parameters are as before then.
        """
        losses: list[float] = []
        self._advance(Call(self.model, self.guide, args, kwargs), losses, 1)
        return losses[0]

    @in_one_thread
    def run(self, num_steps: int, *args: Any, progress: bool = True, **kwargs: Any) -> Float[Tensor, " steps"]:
        """Takes many steps on the same arguments.

        Args:
            num_steps: how many.
            args: passed to model and guide. Minibatches are drawn anew at each step by subsampled plates.
            progress: whether to show a bar with the time left and the loss.
            kwargs: passed to model and guide.

        Returns:
            The losses, in nats, shape ``(num_steps,)``, on the CPU, in float64.

        Raises:
            as :meth:`step`.
        """
        num_steps = as_count("num_steps", num_steps)
        require_switch("progress", progress)
        call, losses = Call(self.model, self.guide, args, kwargs), list[float]()
        with tqdm(total=num_steps, disable=not progress, desc="CompiledSVI") as bar:
            while len(losses) < num_steps:
                self._advance(call, losses, min(SHOWN_EVERY, num_steps - len(losses)))
                if progress:
                    recent = losses[-SHOWN_EVERY:]
                    bar.set_postfix(loss=f"{sum(recent) / len(recent):.5g}", refresh=False)
                    bar.update(len(losses) - bar.n)
        return torch.tensor(losses, dtype=torch.float64)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without a step."""
        with graph_if(False):
            return self.loss.loss(self.model, self.guide, *args, **kwargs)

    def recapture(self) -> None:
        """Has the step recorded anew, after a change of what a recording takes for granted."""
        self._recorded.recapture()

    def _uncompiled_step(self, call: Call) -> tuple[Particles | None, Tensor]:
        return self._plain._step(call)

    @property
    def _plain(self) -> ImportanceWeightedELBO:
        """The loss with its options as they are now, uncompiled."""
        options = {n: v for n, v in vars(self._loss).items() if not n.startswith("_")}
        vars(self._copy).update(options, compile=False)
        return self._copy

    def _advance(self, call: Call, losses: list[float], most: int) -> None:
        """Takes at least one step and at most so many, and adds their losses."""
        _require_whole(self._loss)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "expected a step outside of torch.inference_mode(), in which no parameter can be trained; write "
                "svi.evaluate_loss(...) for the loss alone"
            )
        try:
            with torch.enable_grad():
                found = self._recorded.find(call, self._loss._frozen)
            held = found is not None and self._recorded_steps(*found, losses, most)
        finally:
            self._update.settle()
        if not held:
            losses.append(self._plain_step(call))

    def _recorded_steps(self, step: Step, arguments: Arguments, losses: list[float], most: int) -> bool:
        """Steps until the recording is to be compared with the model again; whether it held for all."""
        run = step.bound(arguments.tensors)
        with torch.no_grad():
            for _ in range(most):
                before = step.before()
                loss, broken = run().tolist()
                step.calls += 1
                if broken:
                    step.put_back(before)
                    step.broken += 1
                    return False
                step.broken = 0
                losses.append(loss)
                if step.is_due:
                    break
        return True

    def _plain_step(self, call: Call) -> float:
        """A step of model and guide themselves, which also says what is wrong where something is."""
        loss = SVI(self.model, self.guide, self.optim, self._plain).step(*call.args, **call.kwargs)
        self._update.refresh()
        return float(loss)


def _require_whole(loss: ImportanceWeightedELBO) -> None:
    """Raises where the loss runs its particles in chunks."""
    if loss.chunk_size is not None:
        raise ValueError(
            f"CompiledSVI records all particles as one graph, got a loss with chunk_size={loss.chunk_size}; write "
            "SVI(model, guide, optim, loss), or leave chunk_size out"
        )
    if loss.process_group is not None:
        raise NotImplementedError(
            "CompiledSVI records the step of one process, got a loss with process_group; write SVI(model, guide, "
            "optim, loss)"
        )
