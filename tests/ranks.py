# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Processes that make a gloo group, to run test functions in; kept for all tests of a session.

They come from a fork server that has imported torch and Pyro once, so that four of them start in a second.
"""

import datetime
import multiprocessing
import tempfile
import traceback
import warnings
from pathlib import Path

SIZE = 4
PAIR, OTHERS, ODD = (0, 1), (2, 3), (0, 1, 3)  # subgroups
PATIENCE = 300.0  # seconds, for whatever a test function does, on a machine that may be busy


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pyro", "pyro_iwae", "tests.noise", "tests.ranks"])
    return context


class Processes:
    """``run(fn, *args)`` calls ``fn(group, *args)`` in each process of a group, and returns what each returned."""

    def __init__(self, size=SIZE, timeout=PATIENCE / 2.0):
        self.size, context = size, _context()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            meeting = Path(self.folder.name) / "meeting"
            process = context.Process(target=_serve, args=(there, rank, size, str(meeting), timeout), daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, fn, *args, ranks=None):
        """What each process returned; raises what the first that failed has raised, as an AssertionError."""
        found = self.outcomes(fn, *args, ranks=ranks)
        for rank, (kind, value) in enumerate(found):
            assert kind == "ok", f"rank {rank}: {value}"
        return [value for _, value in found]

    def errors(self, fn, *args, ranks=None):
        """(class name, message) of what each has raised."""
        found = self.outcomes(fn, *args, ranks=ranks)
        assert [kind for kind, _ in found] == ["error"] * len(found), found
        return [value[:2] for _, value in found]

    def outcomes(self, fn, *args, ranks=None):
        ranks = tuple(range(self.size)) if ranks is None else ranks
        for rank in ranks:
            self.ends[rank].send((fn, args, ranks))
        found = []
        for rank in ranks:
            try:
                assert self.ends[rank].poll(PATIENCE), f"rank {rank} hangs"
                found.append(self.ends[rank].recv())
            except (EOFError, ConnectionResetError):
                found.append(("gone", None))
        return found

    def close(self):
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(0.5)
            process.kill()
        self.folder.cleanup()


def _serve(end, rank, size, meeting, timeout):
    import pyro
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    groups = {tuple(range(size)): dist.group.WORLD}
    for some in (PAIR, OTHERS, ODD) if size == SIZE else ():
        groups[some] = dist.new_group(some)
    while True:
        try:
            fn, args, ranks = end.recv()
        except EOFError:
            return
        pyro.clear_param_store()
        pyro.set_rng_seed(100 + rank)  # each has its own
        pyro.enable_validation(True)
        pyro.settings.set(module_local_params=False)  # another test may have wanted it
        torch.set_default_dtype(torch.float64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                end.send(("ok", fn(groups[ranks], *args)))
        except Exception as error:
            end.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
