# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""All that a run goes on from, in one file: model, guide, optimiser, param store, random generators, step."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.optim.optim import _get_state_dict, _load_state_dict
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.nn.parameter import is_lazy

from pyro_iwae.archive import require_folder, write_whole
from pyro_iwae.constraint_codes import decoded, encoded
from pyro_iwae.distributed import Ranks, by_first, in_all
from pyro_iwae.graphless import graph_if
from pyro_iwae.options import as_count
from pyro_iwae.state import get_random_state, module_behind, set_random_state, unchanged_state

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["Checkpoint"]

Program = Callable[..., Any]
T = TypeVar("T")
HEADER = b"pyro_iwae checkpoint 1\n"
LONGEST_LINE = 100
STORE = "the param store"


class Checkpoint:
    """Saves and loads all that a run goes on from, so that it ends as one that was never interrupted.

    That is: parameters and buffers of model and guide, Pyro's param store, the optimiser, the random generators of
    torch (CUDA's too), numpy and Python, and how many steps were taken. The file is written whole or not at all, and
    nothing in it is run when it is read. Under ``torchrun --max-restarts``, a script goes on by itself::

        checkpoint = Checkpoint("run.ckpt", model=model, guide=guide, optim=optim)
        start = checkpoint.load(x)  # 0 where there is no file yet
        for step in range(start, 1000):
            svi.step(x)
            if (step + 1) % 100 == 0:
                checkpoint.save(step + 1)

    Parameters are loaded in place: optimisers, param store and modules go on holding the tensors that they held. What
    belongs to Python (counters, annealed numbers, the place in a data loader) follows from the step, or goes into
    ``further``.

    Args:
        path: of the file.
        model: the model, a callable or module.
        guide: the guide, likewise.
        optim: an optimiser of ``pyro.optim``, or anything with ``state_dict()`` and ``load_state_dict(state)``.
        further: by name, what else has these two methods: schedulers, scalers, and modules that model and guide only
            call. Of a module that a function registers with ``pyro.module``, the param store has the parameters, but
            not the buffers (of batch normalisation, say); here it has both.
        process_group: of ``torch.distributed``. Its rank 0 alone reads and writes the file, with its own parameters
            and the random generators of all ranks; :meth:`save` and :meth:`load` are called on all ranks. Where a run
            goes on with more ranks than it was saved with, those that are new get random numbers of their own.

    Raises:
        TypeError: where an argument has the wrong type.

    Example::

        >>> import pathlib, tempfile
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_iwae import Checkpoint, ImportanceWeightedELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def run(path, until, x=torch.tensor([1.0, 2.0])):
        ...     pyro.clear_param_store()
        ...     guide, optim = AutoNormal(model), pyro.optim.Adam({"lr": 0.01})
        ...     checkpoint = Checkpoint(path, model=model, guide=guide, optim=optim)
        ...     start = checkpoint.load(x)
        ...     svi = SVI(model, guide, optim, ImportanceWeightedELBO(num_particles=4))
        ...     for step in range(start, until):
        ...         svi.step(x)
        ...     checkpoint.save(until)
        ...     return start, guide.median()["z"].item()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "run.ckpt")
        ...     starts = [run(path, until)[0] for until in (2, 5)]
        ...     start, resumed = run(path, 5)
        >>> starts, start
        ([0, 2], 5)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Program | None = None,
        guide: Program | None = None,
        optim: Any = None,
        further: Mapping[str, Any] | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        self.path = Path(path)
        programs = {"model": model, "guide": guide}
        held = {**({} if optim is None else {"optim": optim}), **_further(further)}
        _require_programs(programs)
        _require_stateful(held)
        self._programs = [program for program in (guide, model) if program is not None]
        self._modules: dict[str, torch.nn.Module] = {}
        self._holders: dict[str, Any] = {}
        for part, program in programs.items():
            self._add(part, None if program is None else module_behind(program))
        for part, holder in held.items():
            self._add(part, _ByName(part, holder, self._names) if isinstance(holder, PyroOptim) else holder)
        self._ranks = Ranks.of(process_group)

    def save(self, step: int) -> None:
        """Writes the file, in place of the one that is there.

        Args:
            step: how many steps have been taken; what :meth:`load` will return.

        Raises:
            TypeError: where a state has something in it that cannot be read again without running code, or a
                parameter a constraint of your own.
            ValueError: where the optimiser trains what would not be in the file, or ``step`` is negative.
        """
        step = as_count("step", step, least=0)
        random = [_random_state()] if self._ranks is None else self._ranks.objects(_random_state())
        by_first(self._ranks, lambda: self._write(step, random))

    def load(self, *args: Any, **kwargs: Any) -> int:
        """Puts everything back as it was saved, if there is a file; changes and runs nothing if not.

        Guide and model are run once, without a trace, so that the parameters that they make exist.

        Args:
            args: what model and guide are called with.
            kwargs: likewise.

        Returns:
            The step that the file was saved at; 0 where there is none.

        Raises:
            ValueError: where the file is cut short, altered, something else, or of another model.
            FileNotFoundError: where there is not even the folder that it would be in.
        """
        payload = by_first(self._ranks, self._read)
        if payload is None:
            return 0
        return in_all(self._ranks, lambda: self._restored(payload, args, kwargs))

    def _restored(self, payload: bytes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        saved = self._unpacked(payload)
        self._require_parts(saved["states"].keys())
        with unchanged_state(*self._programs), poutine.block(), graph_if(False):
            for program in self._programs:
                program(*args, **kwargs)
        for part, module in self._modules.items():
            self._require_same(part, module.state_dict(), saved["states"][part])
        self._require_store(saved["params"])
        for part, module in self._modules.items():
            module.load_state_dict(saved["states"][part])
        _fill_store(saved["params"])
        for part in self._holders:
            self._load_holder(part, saved["states"][part])
        _set_random_state(saved["random"], 0 if self._ranks is None else self._ranks.rank)
        step: int = saved["step"]
        return step

    # What belongs to it

    def _add(self, part: str, holder: Any) -> None:
        """Takes a part in, but no module twice: model and guide may be methods of one."""
        if isinstance(holder, torch.nn.Module):
            if not any(holder is module for module in self._modules.values()):
                self._modules[part] = holder
        elif holder is not None:
            self._holders[part] = holder

    def _names(self) -> dict[Tensor, str]:
        """What every parameter is known by; a module's name first, as it is there before the param store's."""
        names = {parameter: name for name, parameter in pyro.get_param_store().named_parameters()}
        for part, module in self._modules.items():
            names.update({parameter: f"{part}: {name}" for name, parameter in module.named_parameters()})
        return names

    def _own_entries(self) -> dict[str, Tensor]:
        """The entries of the param store that are no parameters of a module."""
        owned = {id(p) for module in self._modules.values() for p in module.parameters()}
        return {n: p for n, p in pyro.get_param_store().named_parameters() if id(p) not in owned}

    # Writing

    def _write(self, step: int, random: Sequence[Any]) -> None:
        names = self._names()
        for part, holder in self._holders.items():
            if isinstance(holder, torch.optim.Optimizer):
                _require_names(part, [p for group in holder.param_groups for p in group["params"]], names)
        states = {part: holder.state_dict() for part, holder in {**self._modules, **self._holders}.items()}
        kept = pyro.get_param_store()._constraints
        params = {name: _entry(name, value, kept[name]) for name, value in self._own_entries().items()}
        try:
            packed = _packed({"step": step, "states": states, "params": params, "random": random})
        except Exception:
            _blame({**states, STORE: params})
            raise
        payload = packed.getbuffer()
        digest = hashlib.sha256(payload).hexdigest().encode() + b"\n"
        write_whole(self.path, lambda file: file.writelines((HEADER, digest, payload)))

    # Reading

    def _read(self) -> bytes | None:
        """What the file holds, once its checksum is right; None where there is no file.

        A save that was killed leaves what it had written beside it; that goes, as nobody writes while a run begins.
        """
        for left in self.path.parent.glob(f"{glob.escape(self.path.name)}.????????.part"):
            left.unlink(missing_ok=True)
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            require_folder(self.path)
            return None
        with file:
            if file.readline(LONGEST_LINE) != HEADER:
                raise self._damaged("it does not begin as one")
            digest, payload = file.readline(LONGEST_LINE), file.read()
        if digest != hashlib.sha256(payload).hexdigest().encode() + b"\n":
            raise self._damaged("its checksum is another")
        return payload

    def _unpacked(self, payload: bytes) -> dict[str, Any]:
        try:
            saved = _loaded(io.BytesIO(payload))
        except Exception as error:  # whatever the bytes make of torch's reader
            raise self._damaged(_reason(error)) from error
        if not isinstance(saved, dict) or saved.keys() != {"step", "states", "params", "random"}:
            raise self._damaged("it holds something else")
        return saved

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"expected a whole file written by Checkpoint.save, got {str(self.path)!r}, which is cut short, altered or "
            f"something else ({why}); remove it to begin anew"
        )

    def _require_parts(self, found: Collection[str]) -> None:
        own = {**self._modules, **self._holders}.keys()
        if own != found:
            raise ValueError(
                f"expected a file with the states of {sorted(own)}, got {str(self.path)!r} with those of "
                f"{sorted(found)}; pass to Checkpoint what was passed to the one that saved it"
            )

    def _require_same(self, part: str, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Raises where a module has other parameters or buffers than the file."""
        self._require_held(part, own.keys() - found.keys())
        if found.keys() - own.keys():
            raise ValueError(
                f"expected a file of this {part}, got {str(self.path)!r} with {sorted(found.keys() - own.keys())} "
                "besides, which it does not have; make it as it was made for the file"
            )
        for name, value in own.items():
            if isinstance(value, Tensor) and not is_lazy(value):  # torch gives a lazy one its shape from the file
                self._require_shape(f"{part}: {name}", value, found[name])

    def _require_store(self, found: Mapping[str, Any]) -> None:
        """Raises where the param store holds others than the file, or is to hold a module's that it has not met."""
        store = pyro.get_param_store()
        self._require_held(STORE, self._own_entries().keys() - found.keys())
        for name, entry in found.items():
            if name in store:
                self._require_shape(name, store._params[name], entry["value"])
                kind, kept = type(decoded(entry["constraint"], "cpu")), store._constraints[name]
                if kind is not type(kept):
                    raise ValueError(
                        f"expected parameter {name!r} to be constrained by {kept}, got {kind.__name__[1:]} in "
                        f"{str(self.path)!r}; the file is of another model"
                    )
            elif entry["module"]:
                raise ValueError(
                    f"expected the module of parameter {name!r} in the param store, got a store without it: what is "
                    "loaded would part from the module. Pass model and guide to Checkpoint and their arguments to "
                    "load(), or run them once before, so that the module registers it"
                )

    def _require_held(self, part: str, lacking: Collection[str]) -> None:
        if lacking:
            raise ValueError(
                f"expected all parameters of {part} in {str(self.path)!r}, got none for {sorted(lacking)}: the file is "
                "of another model, or was saved before the first step; pass another path"
            )

    def _require_shape(self, name: str, own: Tensor, found: Tensor) -> None:
        if (own.shape, own.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"expected parameter {name!r} to have shape {tuple(own.shape)} ({own.dtype}), got "
                f"{tuple(found.shape)} ({found.dtype}) in {str(self.path)!r}; the file is of another model"
            )

    def _load_holder(self, part: str, state: Any) -> None:
        try:
            self._holders[part].load_state_dict(state)
        except Exception as error:  # of any kind, as the holder may be of any
            raise ValueError(
                f"expected a state that fits {part}, got one in {str(self.path)!r} that does not "
                f"({_reason(error)}); make {part} as it was made for the file"
            ) from error


class _ByName:
    """A Pyro optimiser with the methods of torch's: what it keeps for each parameter, by the parameter's name.

    Pyro's own ``set_state`` waits for a parameter's first step, and never reaches one that had it; and a scheduler
    that is stepped before would miss it.
    """

    def __init__(self, part: str, optim: PyroOptim, names: Callable[[], dict[Tensor, str]]) -> None:
        self.part = part
        self.optim: Any = optim  # Pyro's types say str where it takes tensors
        self.names = names

    def state_dict(self) -> dict[str, Any]:
        names, store = self.names(), pyro.get_param_store()
        replaced = {p for p in self.optim.optim_objs if p not in names and store.param_name(p) is not None}
        held = {p: o for p, o in self.optim.optim_objs.items() if p not in replaced}
        _require_names(self.part, held, names)
        return {names[parameter]: _get_state_dict(optimizer) for parameter, optimizer in held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = {name: parameter for parameter, name in self.names().items()}
        held = {parameters[name]: kept for name, kept in state.items()}
        for parameter in [p for p in self.optim.optim_objs if p not in held]:  # it had had no step
            del self.optim.optim_objs[parameter]
        for parameter, kept in held.items():
            if parameter not in self.optim.optim_objs:
                self.optim.optim_objs[parameter] = self.optim._get_optim(parameter)
                self.optim.grad_clip[parameter] = self.optim._get_grad_clip(parameter)
            _load_state_dict(self.optim.optim_objs[parameter], kept)


# Arguments


def _further(further: Mapping[str, Any] | None) -> dict[str, Any]:
    if further is None:
        return {}
    if not isinstance(further, Mapping) or not all(isinstance(name, str) for name in further):
        raise TypeError(f"expected further to map names to objects, got {further!r}; write further={{'scheduler': s}}")
    return {f"further[{name!r}]": holder for name, holder in further.items()}


def _require_programs(programs: Mapping[str, Any]) -> None:
    for name, program in programs.items():
        if program is not None and not callable(program):
            raise TypeError(
                f"expected {name} to be callable (a function or Module of Pyro statements), got {program!r}; write "
                f"{name}=what SVI gets as its {name}"
            )


def _require_stateful(held: Mapping[str, Any]) -> None:
    for part, holder in held.items():
        methods = [getattr(holder, name, None) for name in ("state_dict", "load_state_dict")]
        if not isinstance(holder, PyroOptim) and (isinstance(holder, type) or not all(map(callable, methods))):
            raise TypeError(
                f"expected {part} to be a pyro.optim optimiser or to have state_dict() and load_state_dict(), got "
                f"{holder!r}; write for example optim=pyro.optim.Adam({{'lr': 0.001}}), further={{'net': net}}"
            )


def _require_names(part: str, parameters: Collection[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raises where an optimiser trains what would not be in the file."""
    for parameter in parameters:
        if parameter not in names:
            raise ValueError(
                f"expected {part} to train parameters of model, guide or the param store, got one of shape "
                f"{tuple(parameter.shape)} that is in none of them and would not be saved; pass the module that has "
                "it, as further={'net': net}, or make the optimiser anew after pyro.clear_param_store()"
            )


# Contents


def _packed(content: Any) -> io.BytesIO:
    """As it will be in the file, read once to see that it can be."""
    packed = io.BytesIO()
    torch.save(content, packed)
    packed.seek(0)
    _loaded(packed)
    return packed


def _loaded(file: io.BytesIO) -> Any:
    """What is in the file, nothing of which is run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")  # it says that this takes time
        return torch.load(file, map_location="cpu", weights_only=True)


def _blame(contents: Mapping[str, Any]) -> None:
    """Raises for the part that cannot be read again."""
    for part, content in contents.items():
        try:
            _packed(content)
        except Exception as error:
            raise TypeError(
                f"expected the state of {part} to be of tensors, numbers and strings, in lists, tuples and dicts, got "
                f"something else ({_reason(error)}); write a state_dict() that leaves it out"
            ) from error


def _reason(error: Exception) -> str:
    """What is wrong, in one sentence: torch wraps it in a page of advice."""
    inner = error.__context__ if error.__suppress_context__ and error.__cause__ is None else None
    return f"{type(error).__name__}: {inner or error}".split(". ")[0]


def _entry(name: str, value: Tensor, constraint: Constraint) -> dict[str, Any]:
    """A parameter of the param store; a Parameter is one that a module has registered, and holds itself."""
    return {
        "value": value.detach(),
        "constraint": encoded(constraint, name),
        "device": value.device.type,
        "module": isinstance(value, torch.nn.Parameter),
    }


def _fill_store(entries: Mapping[str, Any]) -> None:
    """Copies values into the param store's tensors, and makes those that it lacks."""
    store = pyro.get_param_store()
    for name, entry in entries.items():
        if name in store:
            parameter = store._params[name]
            with torch.no_grad():
                parameter.copy_(entry["value"])
        else:
            device = "cuda" if entry["device"] == "cuda" and torch.cuda.is_available() else "cpu"
            parameter = entry["value"].to(device).requires_grad_()
        constraint = decoded(entry["constraint"], parameter.device.type)
        store.set_state({"params": {name: parameter}, "constraints": {name: constraint}})


def _random_state() -> dict[str, Any]:
    every, (host, cuda) = get_random_state()
    kind, keys, *rest = every["numpy"]
    keys = torch.from_numpy(keys.astype(np.int64))
    return {"torch": host, "cuda": cuda, "numpy": (kind, keys, *rest), "random": every["random"]}


def _set_random_state(states: Sequence[Any], rank: int) -> None:
    """Puts a rank's random generators back; one that was not there is seeded by rank 0's."""
    if rank >= len(states):
        first = states[0]
        kind, keys, *rest = first["numpy"]
        tensors = [first["torch"], *(first["cuda"] or []), keys]
        told = rank, [t.tolist() for t in tensors], kind, rest, first["random"]
        digest = hashlib.sha256(repr(told).encode()).digest()
        pyro.set_rng_seed(int.from_bytes(digest[:4], "big"))
        return
    state = states[rank]
    kind, keys, *rest = state["numpy"]
    numpys = (kind, keys.numpy().astype(np.uint32), *rest)
    cuda = (state["cuda"] or [])[: torch.cuda.device_count()]  # there may be fewer than there were
    set_random_state(({"torch": state["torch"], "random": state["random"], "numpy": numpys}, (state["torch"], cuda)))
