# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's peers, which run in a process of their own and take their turn when asked."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from support.peers import MANY
from support.problems import SCALE, make_problem

UPDATE, SCAN, GRADIENT = "NumPyro, jitted update", "NumPyro, scanned updates", "NumPyro, jitted gradient"
STEPS = {"update": {UPDATE: 1, SCAN: MANY}, "gradient": {GRADIENT: 1}}


def is_installed(device="cpu"):
    """On a GPU, with what JAX needs there."""
    plugins = {"cpu": ["jax"], "cuda": ["jax_cuda12_plugin", "jax_cuda13_plugin"]}[device]
    return importlib.util.find_spec("numpyro") is not None and any(map(importlib.util.find_spec, plugins))


class Server:
    """The process; ``with`` ends it."""

    def __init__(self, threads, device="cpu"):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if device == "cpu" else {}
        script = Path(__file__).with_name("numpyro_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, do, **request):
        print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"NumPyro's process ended while it was asked to {do} {request}; its errors are above")
        return json.loads(answer)


class NumPyroPeer:
    """What ``peers.Peer`` does, done over there."""

    def __init__(self, name, server, sizes, *, problem, particles, work, ask="make", **_):
        self.name, self.server, self.steps = name, server, STEPS[work][name]
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder, "arrays.npz")
            np.savez(arrays, **numbers(make_problem(problem, sizes)))
            request = {"particles": particles, "work": work, "steps": self.steps, "scale": SCALE}
            self.answer = server.ask(ask, name=name, problem=problem, arrays=str(arrays), **request)

    def first(self):
        return self.answer

    def step(self):
        return self.server.ask("step", name=self.name)

    def losses(self, count):
        return self.server.ask("losses", name=self.name, count=count)


def numpyro_alone(threads, device, sizes, **case):
    """Seconds of the first step, and the bytes that compiling and a step take beyond two particles'; a process each."""
    with Server(threads, device) as server:
        first = NumPyroPeer(UPDATE, server, sizes, **case).answer
    with Server(threads, device) as server:
        return {"first": first, "bytes": NumPyroPeer(UPDATE, server, sizes, ask="memory", **case).answer}


def numbers(problem):
    """Data in order; starting values of latents, or the weights of networks, by name."""
    found = {f"arg{i}": value for i, value in enumerate(problem.args)}
    named = problem.start or dict(problem.module.named_parameters())
    found |= {f"start:{name}": value for name, value in named.items()}
    return {name: value.detach().numpy() for name, value in found.items()}
