# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A function of tensors recorded as one graph of tensor operations, and compiled.

All that Python does on the way (effect handlers, checks, the model's own code) happens once, when the graph is
recorded. Random numbers are operations of the graph: they come from torch's generator, in the same order.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from pyro_iwae.decisions import unrecorded
from pyro_iwae.products import use_onednn
from pyro_iwae.replay import Replay

__all__ = ["Graph", "capture"]

Run = Callable[..., Sequence[Tensor]]
LARGE = 4000  # operations, in a graph that takes minutes to compile: a vectorised step has some hundreds
UNSEEN = Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__  # readers that torch does not dispatch
# Random numbers come from torch's own generator, in the order of the program: seeded runs are those of eager runs.
OPTIONS = {"fallback_random": True, "reorder_for_peak_memory": False, "reorder_for_locality": False}
# On a CPU, what calls the kernels is compiled too, memory is taken in one piece, and shapes are not checked once more
# (``watching`` does). Calls by way of Python are refused, as they would be slower.
BY_CPP = OPTIONS | {"cpp_wrapper": True, "memory_planning": True, "size_asserts": False}


@dataclass
class Graph:
    """A recorded function.

    Attributes:
        module: the graph.
        inputs: the tensors it was recorded with, then those that it found elsewhere (in closures and modules), which
            are inputs too: it reads them anew at each call.
        compiled: runs it; the graph itself where it could not be compiled.
    """

    module: GraphModule
    inputs: list[Tensor]
    compiled: Run | None = None

    @classmethod
    def empty(cls) -> Graph:
        """A graph that does nothing."""
        return cls(GraphModule({}, torch.fx.Graph()), [])

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs the graph on as many tensors as it was recorded with, in place of these."""
        return self._run(*self._all(tensors))

    def bound(self, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        """What runs the graph on these tensors and returns the first output."""
        run, inputs = self._run, self._all(tensors)
        return run.bound(inputs) if isinstance(run, Replay) else lambda: run(*inputs)[0]

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compiles the graph; where that fails (no C++ compiler, say), it warns and leaves the graph as it is."""
        inputs: list[Any] = self._all(tensors)
        if (size := len(self.module.graph.nodes)) > LARGE:
            warnings.warn(
                f"the step is a graph of {size} operations, which takes minutes to compile. Let particles run in one "
                "pass (model and guide broadcast over a plate on the left of their own) and plates be vectorised, take "
                "fewer particles, or write compile=False",
                UserWarning,
                stacklevel=2,
            )
        on_cpu = all(t.device.type == "cpu" for t in inputs)
        try:
            self.compiled = self._compiled(inputs, BY_CPP if on_cpu else OPTIONS)
        except Exception as error:  # whatever the compiler and its tools raise
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            warnings.warn(
                f"the step was recorded and not compiled, because of {type(error).__name__}: {reason}. It runs as a "
                "graph of single operations, which is right and slower. Is there a C++ compiler (g++ or "
                "clang++), and is torch installed under a path without spaces?",
                UserWarning,
                stacklevel=2,
            )

    def _compiled(self, inputs: list[Any], options: dict[str, Any]) -> Run:
        import torch._inductor as inductor

        with torch.no_grad(), warnings.catch_warnings(), _refusing_slow_calls():
            warnings.simplefilter("ignore")  # of the compiler's own doings
            try:
                compiled: Run = inductor.compile(self.module, inputs, options=options)
            except Exception:
                if options is OPTIONS:
                    raise
                return self._compiled(inputs, OPTIONS)  # an operation that only Python calls
        return compiled

    def launch_together(self, tensors: Sequence[Tensor], copied: slice) -> bool:
        """Has a GPU launch all kernels as one, where all is on one GPU; whether it does.

        Args:
            tensors: what it will be run on.
            copied: which of them may be others at another call.
        """
        inputs = self._all(tensors)
        if not Replay.suits(inputs):
            return False
        try:
            with torch.no_grad():
                self.compiled = Replay(self._run, inputs, copied)
        except RuntimeError:  # an operation that waits for the host, which no CUDA graph can hold
            return False
        return True

    @property
    def _run(self) -> Run:
        return self.module if self.compiled is None else self.compiled

    def _all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors, *self.inputs[len(tensors) :]]


class _SlowCalls(logging.Filter):
    """Notices where compiled code would call an operation by way of Python, slower than Python would itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "missing a c-shim" in record.getMessage():
            raise NotImplementedError(record.getMessage())
        return True


@contextmanager
def _refusing_slow_calls() -> Iterator[None]:
    """Stops the compiler there; all that it says of it goes to a logger."""
    logger, slow = logging.getLogger("torch._inductor.ir"), _SlowCalls()
    logger.addFilter(slow)
    try:
        yield
    finally:
        logger.removeFilter(slow)


def capture(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Records a function that reads tensors.

    It is run once, for real. Put random generators and buffers back afterwards.

    Args:
        function: what to record; it returns tensors.
        inputs: tensors that may be others when the graph is run. They are told by identity.

    Raises:
        NotImplementedError: where the function's course depends on numbers in tensors, naming the line.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with pyro.validation_enabled(False), _Reading():
            module = make_fx(lambda *_: list(function()))(*inputs)
    except (RuntimeError, _ReadError) as error:
        if not isinstance(error, _ReadError) and "get value out of a tracing tensor" not in str(error):
            raise
        raise NotImplementedError(
            f"compile=True records one step, whose course may not depend on numbers in tensors; {_place(error)} "
            "reads one (if, while, float(), int(), .item(), .tolist(), .numpy(), validate_args=True). Write "
            "torch.where, masks or enumeration instead, pass what is no parameter as a Python number, or write "
            "compile=False"
        ) from error
    found = _lift(module)
    _draw_normals(module)
    use_onednn(module)
    _own_outputs(module)
    # The recording's shapes are those of fake tensors, each of a mode of its own, which the compiler would not take.
    for node in module.graph.nodes:
        node.meta.pop("val", None)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Graph(module, [*inputs, *found])


def _draw_normals(module: GraphModule) -> None:
    """Draws standard normals as ``randn`` does, the same numbers, and not into what is copied first."""
    empty, normal = torch.ops.aten.empty.memory_format, torch.ops.aten.normal_.default
    for node in module.graph.nodes:
        place: Any = node.args[0] if node.target is normal else None
        if place is None or node.args[1:] not in ((), (0,), (0, 1)) or node.kwargs or place.target is not empty:
            continue
        if next(iter(place.users)) is not node or "memory_format" in place.kwargs:
            continue
        with module.graph.inserting_before(node):
            drawn = module.graph.call_function(torch.ops.aten.randn.default, place.args, place.kwargs)
        drawn.meta = dict(place.meta)
        node.replace_all_uses_with(drawn)
        place.replace_all_uses_with(drawn, delete_user_cb=lambda user, node=node: user is not node)
        module.graph.erase_node(node)
        module.graph.erase_node(place)


def _own_outputs(module: GraphModule) -> None:
    """Gives each output a storage of its own: a gradient may be a view of the data, or of another gradient."""
    output: Any = next(n for n in module.graph.nodes if n.op == "output")
    taken, owned = set[Any](), []
    for node in output.args[0]:
        origin = node
        while origin.op == "call_function" and _is_view(origin.target):
            origin = origin.args[0]
        if origin.op != "call_function" or origin is not node or origin in taken:
            with module.graph.inserting_before(output):
                node = module.graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
        taken.add(origin)
        owned.append(node)
    output.args = (owned,)


def _is_view(target: Any) -> bool:
    returns: Any = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return bool(returns) and returns[0].alias_info is not None


def _lift(module: GraphModule) -> list[Tensor]:
    """Turns tensors that the graph holds into inputs; numbers that are written out in the program stay."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    after, found = placeholders[-1] if placeholders else None, dict[int, tuple[Tensor, Any]]()
    fresh = torch.ops.aten.lift_fresh_copy.default
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        if all(user.target is fresh for user in node.users):
            continue
        tensor = getattr(module, str(node.target))
        if not isinstance(tensor, Tensor):
            raise _own_state(type(tensor).__name__)
        if id(tensor) not in found:
            place = module.graph.inserting_after(after) if after else module.graph.inserting_before()
            with place:
                after = module.graph.placeholder(f"found_{len(found)}")
            after.meta["val"] = tensor
            found[id(tensor)] = tensor, after
        node.replace_all_uses_with(found[id(tensor)][1])
        module.graph.erase_node(node)
    return [tensor for tensor, _ in found.values()]


def _own_state(kind: str) -> NotImplementedError:
    return NotImplementedError(
        f"compile=True records operations on tensors; the step computes with a {kind} of its own, which would not go "
        "on from step to step. Use torch's global generator, draw fixed numbers outside of model and guide, or write "
        "compile=False"
    )


class _ReadError(Exception):
    """Numbers of a tensor were taken out of torch."""


class _Reading(TorchFunctionMode):
    """Refuses what takes numbers out of a recorded tensor unseen; lets a loop go over a tensor that is not recorded.

    Such are the indices of a plate, whose numbers name sites.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise _own_state("Generator")
        if func in (*UNSEEN, Tensor.unbind):
            from torch.fx.experimental.proxy_tensor import get_proxy_mode

            mode = get_proxy_mode()
            recorded = mode is not None and args[0] in mode.tracer.tensor_tracker
            if func is not Tensor.unbind and recorded:
                raise _ReadError(func.__name__)
            if func is Tensor.unbind and not recorded and not args[0].requires_grad:
                with unrecorded():
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


def _place(error: BaseException) -> str:
    """The innermost line that is the user's."""
    roots = [Path(m.__file__).parent for m in (torch, pyro) if m.__file__] + [Path(__file__).parent]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(root) for root in roots)]
    own = [f for f in own if Path(f.filename).name != "contextlib.py"]
    if not own:
        return "something in it"
    return f"'{(own[-1].line or '').strip()}' ({Path(own[-1].filename).name}, line {own[-1].lineno})"
