# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""evaluate(): draws particles for all rows, replicate by replicate, each from a seed of its own, and keeps figures."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.messenger import block_messengers
from torch import Tensor
from tqdm import tqdm

from pyro_iwae.archive import require_folder
from pyro_iwae.batches import Source, fingerprint
from pyro_iwae.chunks import require_chunk_size
from pyro_iwae.distributed import Ranks, by_first, in_all
from pyro_iwae.evaluation import Evaluation, require_constant
from pyro_iwae.graphless import graph_if
from pyro_iwae.options import (
    as_count,
    as_counts,
    as_number,
    require_callables,
    require_draws,
    require_options,
    require_switch,
)
from pyro_iwae.particles import Call
from pyro_iwae.parts import Part, figures
from pyro_iwae.state import get_random_state, seeded, set_random_state, unchanged_state
from pyro_iwae.structure import StructureCache
from pyro_iwae.threads import in_one_thread
from pyro_iwae.tree import PlateParticles
from pyro_iwae.turns import Turn

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = ["evaluate"]

Program = Callable[..., Any]
MOST = 20  # times num_replicates, where max_replicates is not given
REDRAWN_EVERY = 0.5  # seconds, of the figure beside the bar


@in_one_thread
def evaluate(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1000,
    num_replicates: int = 16,
    ks: Sequence[int] | None = None,
    data: Iterable[Any] | None = None,
    unpack: Callable[[Any], Any] | None = None,
    row_plate: str | None = None,
    plate_particles: Mapping[str, int] | str | None = None,
    chunk_size: int | None = None,
    target_ess: float | None = None,
    target_std_error: float | None = None,
    max_replicates: int | None = None,
    posterior_draw: Mapping[str, Tensor] | None = None,
    save_to: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    process_group: ProcessGroup | DeviceMesh | None = None,
    vectorize_particles: bool | None = None,
    max_plate_nesting: float = math.inf,
    progress: bool = True,
    **kwargs: Any,
) -> Evaluation:
    """Estimates the log evidence of a model, and judges the guide, with error bars; for each independent element.

    Draws ``num_replicates`` times ``num_particles`` particles from the guide and weighs them by the model. All
    figures come from the same particles: the ELBO, bounds for a ladder of K, the jackknife, an unbiased estimate, the
    log evidence from all of them together with standard error and interval, a two-sided bound on the ELBO of q_EW,
    ESS and Pareto's khat. Parameters, buffers and ``grad`` stay as they are; torch's random generator moves on by
    one draw.

    Args:
        model: the model.
        guide: the guide.
        args: passed to both, after what ``data`` gives.
        num_particles: K of each replicate.
        num_replicates: how many independent times, at least 2.
        ks: for which K the bound is reported, 1 and ``num_particles`` always; by default 1, 2, 5, 10, 20 and so on.
        data: batches of rows (a ``DataLoader``), one after the other, where they are too many for one call. A batch
            that is a tuple is passed as positional arguments, a dict as keyword arguments. In the same order each
            time: ``shuffle=False``.
        unpack: makes these arguments from a batch, as in ``lambda batch: batch[0].to(device)``.
        row_plate: the plate that holds the rows of ``data``, where several could.
        plate_particles: as for :class:`~pyro_iwae.ImportanceWeightedELBO`; plates keep their numbers along ``ks``.
        chunk_size: at most so many particles in memory at once; beside them only their log weights.
        target_ess: goes on drawing until each element has such an effective sample size, from all that was drawn.
            Rows of ``data`` that have it are drawn no more; without ``data`` all are drawn until the last has it.
        target_std_error: likewise, until each element's log evidence has at most such a standard error, in nats.
        max_replicates: goes on up to so many, ``num_replicates`` at least; by default 20 times that. ``short`` tells
            what is missing. It needs a target.
        posterior_draw: a draw of all latents from the exact posterior, by name, which simulated data come with; for
            an upper bound on the log evidence.
        save_to: a file. What is drawn is saved there every ``save_every`` seconds and at the end; where the file is
            there already, the run goes on from it, and gives what an unbroken one would have given.
        save_every: seconds; 0 saves each replicate.
        process_group: the processes over which the particles of each replicate are shared out, as for
            :class:`~pyro_iwae.ImportanceWeightedELBO`. All are given the same rows and get the same result; the first
            one reads and writes the file. To share out rows, see :meth:`Evaluation.gathered`.
        vectorize_particles: as for :class:`~pyro_iwae.ImportanceWeightedELBO`.
        max_plate_nesting: likewise.
        progress: whether to show a bar.
        kwargs: passed to model and guide.

    Returns:
        What was found; ``print`` it.

    Raises:
        TypeError: where an argument has the wrong type.
        ValueError: where the weights are no evidence (a ``poutine.scale``, a subsampled plate below shared latents, a
            guide that is a point estimate), ``data`` comes as rows of no independent plate, or the file to go on from
            was made otherwise.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Gamma(1.0, 1.0))
        >>> _ = pyro.set_rng_seed(0)
        >>> result = evaluate(model, guide, num_particles=1000, progress=False)
        >>> abs(result.total.log_evidence) < 0.05  # the evidence is 1
        True
    """
    require_callables(model, guide)
    require_options(vectorize_particles, max_plate_nesting)
    num_particles = as_count("num_particles", num_particles)
    num_replicates = as_count("num_replicates", num_replicates, least=2)
    targets = _targets(target_ess, target_std_error)
    most = _most(max_replicates, num_replicates, targets)
    require_chunk_size(chunk_size)
    require_switch("progress", progress)
    if posterior_draw is not None:
        require_draws("posterior_draw", posterior_draw)
    if not as_number("save_every", save_every) >= 0.0:
        raise ValueError(f"expected save_every >= 0 seconds, got {save_every}")
    if unpack is not None and not callable(unpack):
        raise TypeError(f"expected unpack to be a function of a batch, as in lambda batch: batch[0], got {unpack!r}")
    if data is None and (unpack is not None or row_plate is not None):
        raise ValueError("expected data= for unpack and row_plate, which say what to make of its batches, got none")
    if data is not None and posterior_draw is not None:
        raise ValueError(
            "expected posterior_draw for data that come as arguments; evaluate batches one by one, and add the results"
        )
    wanted = PlateParticles.of(plate_particles, num_particles=num_particles)
    if wanted is not None and posterior_draw is not None:
        raise NotImplementedError("posterior_draw does not go with plate_particles yet; leave one of them out")
    cache = StructureCache()
    options = {
        "cache": cache,
        "vectorize": vectorize_particles,
        "max_plate_nesting": max_plate_nesting,
        "plate_particles": wanted,
    }
    facts = {
        "num_particles": num_particles,
        "ks": _ladder(ks, num_particles),
        "plate_particles": None if wanted is None else repr(plate_particles),
    }
    total = num_replicates * (len(data) if hasattr(data, "__len__") else 1)  # type: ignore[arg-type]
    ranks = Ranks.of(process_group)
    if ranks is not None:
        ranks.share(num_particles)  # is there one for each?
    elif save_to is not None:  # of several processes the first alone saves, and looks when the others listen
        require_folder(save_to)
    way = facts, num_replicates, most, targets, save_to is None
    begun = _begun(ranks, (args, kwargs), way)
    with _put_back_unless_looked(cache), begun as (seed, turn), _apart(), unchanged_state(model, guide):
        first = ranks is None or ranks.rank == 0
        with tqdm(total=total, disable=not (progress and first), desc="evaluate") as bar:
            kept = Evaluation((), facts, seed, targets)
            run = _Run(kept, num_replicates, most, save_to, save_every, bar, ranks)
            run.go_on()
            batches = _batches(data, unpack, args, kwargs)
            for position, rows in enumerate(batches if ranks is None else ranks.each(batches)):

                def source(rows: _Rows) -> Source:
                    cache.doubt()
                    call = Call(model, guide, rows.args, rows.kwargs)
                    return Source.of(call, num_particles, chunk_size, options, posterior_draw, turn)

                run.draw(rows, source, position, row_plate)
            return run.finished()


@contextmanager
def _put_back_unless_looked(cache: StructureCache) -> Iterator[None]:
    """Puts random generators back where the call is refused before it has looked at model and guide."""
    before = get_random_state()
    try:
        yield
    except BaseException:
        if cache.newest is None:
            set_random_state(before)
        raise


@contextmanager
def _begun(ranks: Ranks | None, arguments: Any, way: Any) -> Iterator[tuple[int, Turn | None]]:
    """The run's seed, drawn before random generators are looked after, so that the next run has another one."""
    if ranks is None:
        yield int(torch.randint(2**62, ())), None
        return
    with Turn.begun(ranks, "evaluate", arguments, way) as turn:
        yield turn.seed, turn


@dataclass(frozen=True)
class _Rows:
    """Arguments of model and guide; ``count`` rows of a data set, if they are."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Any = None
    count: int | None = None
    further: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Rows:
        tensors = _tensors(batch)
        sizes = {len(t) for t in tensors if t.dim()}
        if len(sizes) != 1:
            raise ValueError(
                "expected each batch of data as a tensor, or a tuple or dict of tensors, rows in front, got a "
                f"{type(batch).__name__} with sizes {sorted(sizes)} in front; say what to make of it: unpack=lambda "
                "batch: ..."
            )
        if isinstance(batch, Mapping) and not all(isinstance(name, str) for name in batch):
            raise TypeError(
                f"expected a batch of data that is a dict to have the names of arguments, got {list(batch)}; say what "
                "to make of it: unpack=lambda batch: ..."
            )
        if isinstance(batch, Mapping):
            return cls(args, {**kwargs, **batch}, batch, sizes.pop(), args, kwargs)
        positional = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return cls(positional + args, kwargs, batch, sizes.pop(), args, kwargs)

    @property
    def digests(self) -> tuple[str, ...]:
        """What tells each row from others."""
        if self.count is None:
            return ()
        tensors = [t.detach().cpu() for t in _tensors(self.batch) if t.dim()]
        return tuple(fingerprint([t[i] for t in tensors])[:16] for i in range(self.count))

    def some(self, index: Tensor) -> _Rows:
        """These rows alone."""
        return _Rows.of(_indexed(self.batch, index), self.further, self.named)


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return [v for v in values if isinstance(v, Tensor)]


def _indexed(batch: Any, index: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {n: _indexed(v, index) for n, v in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_indexed(v, index) for v in batch)
    return batch


def _batches(
    data: Iterable[Any] | None, unpack: Callable[[Any], Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[_Rows]:
    if data is None:
        yield _Rows(args, kwargs)
        return
    if isinstance(data, Tensor | str) or not isinstance(data, Iterable):
        raise TypeError(
            f"expected data to give batches of rows, got {type(data).__name__}; write "
            "data=DataLoader(TensorDataset(x), batch_size=256), or pass x as an argument of model and guide"
        )
    for batch in data:
        yield _Rows.of(batch if unpack is None else unpack(batch), args, kwargs)


def _ladder(ks: Sequence[int] | None, num_particles: int) -> list[int]:
    if ks is None:
        tens = (10**i for i in range(len(str(num_particles))))
        ks = [d * ten for ten in tens for d in (1, 2, 5) if 2 * d * ten <= num_particles]
    found = as_counts("ks", ks)
    if max(found, default=1) > num_particles:
        raise ValueError(f"expected ks up to num_particles={num_particles}, got {max(found)}")
    return sorted({1, *found, num_particles})


def _most(max_replicates: int | None, num_replicates: int, targets: Mapping[str, float]) -> int:
    if max_replicates is None:
        return MOST * num_replicates
    if not targets:
        raise ValueError("expected target_ess or target_std_error beside max_replicates, got none; see num_replicates")
    return as_count("max_replicates", max_replicates, least=num_replicates)


def _targets(ess: float | None, std_error: float | None) -> dict[str, float]:
    given = (("ess", ess), ("std_error", std_error))
    found = {n: as_number(f"target_{n}", v) for n, v in given if v is not None}
    for name, value in found.items():
        if not value > 0.0:
            raise ValueError(f"expected target_{name} > 0, got {value}")
    return found


@contextmanager
def _apart() -> Iterator[None]:
    """Without a graph, and out of reach of the handlers outside, but for parameters."""
    hidden = poutine.block(hide_fn=lambda msg: msg["type"] != "param")
    with graph_if(False), block_messengers(lambda m: isinstance(m, LiftMessenger)), hidden:
        yield


class _Run:
    """A run of evaluate(): what it has, and when to keep it."""

    def __init__(
        self,
        kept: Evaluation,
        num_replicates: int,
        most: int,
        path: str | os.PathLike[str] | None,
        save_every: float,
        bar: Any,
        ranks: Ranks | None = None,
    ) -> None:
        self.kept = kept
        self.parts: dict[str, Part] = {}
        self.num_replicates, self.most = num_replicates, most
        self.path, self.save_every, self.bar = path, save_every, bar
        self.saved = self.shown = time.monotonic()
        self.resumed = False
        self.given: set[str] = set()  # keys of the data that this run was given
        self.row_plate: str | None = None
        self.ranks = ranks

    def go_on(self) -> None:
        """Takes up what an earlier run has saved."""
        found = by_first(self.ranks, self._saved)
        if found is None:
            return
        differing = [n for n, v in self.kept.facts.items() if found.facts.get(n) != v]
        if differing:
            got = "; ".join(f"{n}: {found.facts.get(n)!r}, now {self.kept.facts[n]!r}" for n in differing)
            raise ValueError(
                f"expected the file {os.fspath(self.path or '')!r} to hold a run made like this one, got another "
                f"({got}); take another file, or the same options"
            )
        self.kept = replace(found, targets=self.kept.targets)
        self.parts = {p.key: p for p in found.parts}
        self.resumed = True

    def _saved(self) -> Evaluation | None:
        if self.path is None:
            return None
        require_folder(self.path)
        return Evaluation.load(self.path) if os.path.exists(self.path) else None

    def draw(self, rows: _Rows, source_of: Callable[[_Rows], Source], position: int, row_plate: str | None) -> None:
        """All replicates of some rows."""
        seeded(self.kept.seed, position)
        source = source_of(rows)
        key = f"{position} {source.key}"
        self._require_same(source, key, position)
        self.given.add(key)
        dim = None
        if rows.count is not None:
            plates = source.first.weights.plates
            known = self.row_plate if self.row_plate in plates else None  # of a batch whose size fitted one alone
            dim = _row_dim(source, rows.count, row_plate or known)
            self.row_plate = plates[dim]
        part = self.parts.get(key)
        if part is not None:
            part.require_like(source.probe)
        done = 0 if part is None else len(part.seeds)
        self.bar.update(min(done, self.num_replicates))
        while done < self.num_replicates:
            more = self._replicate(source, key, dim, done)
            part = self._with(key, part, more if part is not None else replace(more, digests=rows.digests))
            done += 1
        while part is not None and done < self.most:
            short = self._of_first(part.short(self.kept.targets))
            if not bool(short.any()):
                break
            part = self._with(key, part, self._further(part, short, rows, source, source_of, dim, done))
            done += 1

    def _of_first(self, found: Tensor) -> Tensor:
        """What the first process finds, where others may round in another way."""
        if self.ranks is None or not self.kept.targets:
            return found
        decided: Tensor = self.ranks.from_first(found)
        return decided

    def _replicate(self, source: Source, key: str, dim: int | None, done: int) -> Part:
        seed = seeded(self.kept.seed, key, done)
        drawn = source.draw()
        found = _figures(self.ranks, drawn.log_weights, self.kept.ks)
        return Part.of(key, dim, seed, drawn, found)

    def _further(
        self,
        part: Part,
        short: Tensor,
        rows: _Rows,
        source: Source,
        source_of: Callable[[_Rows], Source],
        dim: int | None,
        done: int,
    ) -> Part:
        """One more replicate, of the rows that have not reached their target alone, where rows are known."""
        if dim is None:
            return self._replicate(source, part.key, dim, done)
        index = short.movedim(dim, 0).reshape(len(short.movedim(dim, 0)), -1).any(1).nonzero().squeeze(1)
        if len(index) == part.shape[dim]:
            return self._replicate(source, part.key, dim, done)
        seeded(self.kept.seed, part.key, done, "rows")
        few = self._replicate(source_of(rows.some(index)), part.key, dim, done)
        if few.plates != part.plates or few.shape[dim] != len(index):
            raise ValueError(
                f"expected model and guide to take {len(index)} of {part.shape[dim]} rows of a batch like all of them, "
                f"got plates {list(few.plates)} of sizes {tuple(few.shape)}; leave target_ess and target_std_error out"
            )
        return few.spread(index, part.shape, dim)

    def _with(self, key: str, part: Part | None, more: Part) -> Part:
        part = more if part is None else part + more
        self.parts[key] = part
        if len(part.seeds) == 1:
            require_constant([next(iter(self.parts.values())).constant, part.constant])
        self.bar.update()
        if not self.bar.disable and time.monotonic() - self.shown > REDRAWN_EVERY:
            self.shown = time.monotonic()
            mean = float(part.log_evidence().value.mean())
            self.bar.set_postfix_str(f"log p(x) {mean:.4g} per element", refresh=False)
        self._save(self.save_every)
        return part

    def _save(self, least: float = 0.0) -> None:
        """Saves what there is, if that was so many seconds ago; the first process does, and all hear of an error."""

        def alone() -> None:
            first = self.ranks is None or self.ranks.rank == 0
            if self.path is not None and first and time.monotonic() - self.saved >= least:
                self._result().save(self.path)
                self.saved = time.monotonic()

        if self.path is not None:
            in_all(self.ranks, alone)

    def _result(self) -> Evaluation:
        return replace(self.kept, parts=tuple(self.parts.values()))

    def finished(self) -> Evaluation:
        """What there is, kept."""
        if not self.parts:
            raise ValueError("expected data to give at least one batch, got none; is an iterator used up?")
        others = self.parts.keys() - self.given
        if others:
            raise ValueError(
                f"expected data to give all {len(self.parts)} batches that the file holds, got {len(self.given)} of "
                "them; give all of the data, or take another file for save_to"
            )
        self._save()
        return self._result()

    def _require_same(self, source: Source, key: str, position: int) -> None:
        """Raises where what was drawn so far is of another model, guide or data."""
        facts = {**self.kept.facts, "model_and_guide": source.parameters}
        if self.kept.facts.get("model_and_guide", facts["model_and_guide"]) != facts["model_and_guide"]:
            raise ValueError(
                "expected model and guide with the parameters that the evaluation was begun with, got others; take "
                "another file for save_to, or load the parameters of that time"
            )
        self.kept = replace(self.kept, facts=facts)
        others = [k for k in self.parts if k.startswith(f"{position} ") and k != key]
        if others and self.resumed:
            raise ValueError(
                f"expected batch {position} of the data to be what it was when the evaluation was begun, got other "
                "rows; give them in the same order each time (shuffle=False), or take another file for save_to"
            )


def _figures(ranks: Ranks | None, log_weights: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """What is kept of a replicate; of a part of the elements in each process, where several have all the weights."""
    shape = log_weights.shape[1:]
    count = shape.numel()
    if ranks is None or count < ranks.size:
        return figures(log_weights, ks)
    columns, (start, stop) = log_weights.reshape(-1, count), ranks.share(count)
    found = in_all(ranks, lambda: figures(columns[:, start:stop], ks))
    every = ranks.gather_rows(torch.stack(list(found.values()), 1), count)
    return {name: every[:, i].reshape(shape) for i, name in enumerate(found)}


def _row_dim(source: Source, count: int, row_plate: str | None) -> int:
    """Which dimension of the elements holds the rows."""
    weights = source.first.weights
    plates, sizes = weights.plates, weights.log_weights.shape[1:]
    if row_plate is not None:
        if row_plate not in plates:
            raise ValueError(
                f"expected row_plate to be one of the independent plates {list(plates)}, got {row_plate!r}"
            )
        plates_of_rows = [plates.index(row_plate)]
    else:
        plates_of_rows = [i for i, size in enumerate(sizes) if size == count]
    if not plates_of_rows or sizes[plates_of_rows[0]] != count:
        raise ValueError(
            f"expected the {count} rows of a batch of data to lie in an independent plate, got plates {list(plates)} "
            f"of sizes {tuple(sizes)}: rows that share latents have no evidence of their own. Pass all as arguments"
        )
    if len(plates_of_rows) > 1:
        raise ValueError(
            f"expected one independent plate of {count} elements, the rows of a batch, got {list(plates)}; say "
            f"row_plate={plates[0]!r}, or which"
        )
    return plates_of_rows[0]
