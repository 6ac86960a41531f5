# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What all benchmarks share: where they ran, and where their results are kept."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import pyro
import torch

from pyro_iwae import __version__

HERE = Path(__file__).resolve().parent


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values):
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower quartile": low, "upper quartile": high}


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    """The commit of this checkout, marked where files differ from it; None outside a checkout."""
    try:
        ask = {"cwd": HERE, "capture_output": True, "text": True, "check": True}
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "../../pyro_iwae"], **ask).stdout.strip()
        return name + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def surroundings():
    """When, where and with what a result was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_iwae": __version__,
        },
    }


def provenance(result):
    """The same, as one line."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s); {result['date']}; commit "
        f"{result['commit']}; Python {versions['python']}, torch {versions['torch']}, Pyro {versions['pyro']}."
    )


def arguments(description):
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds-long run that writes nothing unless told where")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def peer_arguments(description):
    """The parser of a benchmark whose peers run on a GPU, too, and in fresh processes."""
    parser = arguments(description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--alone", type=json.loads, help="used by itself: measure one thing in a fresh process")
    return parser


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def keep(result, text, name, options, figure=None):
    """Prints the text; writes result, text and figure, but for a smoke run that was not told where."""
    print(text)
    folder = options.output or (None if options.smoke else HERE.parent / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / f"{name}.md").write_text(text)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=150)
