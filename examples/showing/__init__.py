# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What the examples share: their options, a loop over training steps, the look of figures, numbers with errors."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from tqdm import tqdm

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#777777"


class Example:
    """Options of a script, from its command line; seeds Pyro and sets how figures look."""

    def __init__(self, doc):
        name = Path(sys.argv[0]).stem
        parser = argparse.ArgumentParser(description=doc.strip().split("\n")[0])
        parser.add_argument("--smoke", action="store_true", help="a run of seconds that shows nothing but that it runs")
        parser.add_argument("--quiet", action="store_true", help="no progress bars")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--output", type=Path, default=Path(f"{name}_output"), help="folder for the figures")
        parser.parse_args(namespace=self)
        self.output.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        plt.rcParams.update({"savefig.dpi": 130, "figure.dpi": 100, "figure.constrained_layout.use": True})
        plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
        pyro.clear_param_store()
        pyro.set_rng_seed(self.seed)

    def size(self, full, smoke):
        """The first, or the second in a smoke run."""
        return smoke if self.smoke else full

    def progress(self, what, steps):
        """A bar over ``steps``."""
        return tqdm(steps, desc=what, disable=self.quiet)

    def train(self, svi, batches, *, epochs, what):
        """One step for each tuple of arguments in ``batches``, in a new order in each epoch; losses of the epochs."""
        losses, batches = [], list(batches)
        for _ in (bar := self.progress(what, range(epochs))):
            losses.append(sum(svi.step(*batch) for batch in random.sample(batches, len(batches))))
            bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
        return losses

    def save(self, fig, name):
        """Into the folder for figures."""
        fig.savefig(self.output / f"{name}.png")

    def end(self):
        """Where the figures are."""
        if not self.quiet:
            print(f"\nFigures are in {self.output.resolve()} ({time.monotonic() - self.start:.0f} seconds in all).")


def mean_and_error(values):
    """Mean over the first dimension and its standard error, as numbers."""
    values = torch.as_tensor(values, dtype=torch.double)
    return values.mean(0).item(), (values.std(0) / len(values) ** 0.5).item()


def shown(values, digits=2):
    """Mean ± standard error, as text."""
    return "{:.{d}f} ± {:.{d}f}".format(*mean_and_error(values), d=digits)
