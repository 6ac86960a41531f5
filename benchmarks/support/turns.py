# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Peers in turns; and whether they compute the same thing."""

import math
import statistics
import time

import torch
from tqdm import tqdm

TURN = 0.02  # seconds that a turn takes at least: a short step comes in many, as in training, not cold between others
FALSE_ALARM = 1e-6  # chance that peers that agree are said not to


def in_turns(peers, repeats, warm_up, seconds, quiet=False, label=""):
    """Seconds of a step of each peer: rounds in which every peer has one turn, of which the median step counts.

    Rounds end after ``repeats``, or once they have taken ``seconds`` in all, but there are two at least.
    """
    taken = {peer.name: [] for peer in peers}
    for _ in range(warm_up):
        for peer in peers:
            peer.step()
    start = time.perf_counter()
    for done in tqdm(range(repeats), desc=label, disable=quiet, leave=False):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for peer in peers:
            taken[peer.name].append(statistics.median(turn(peer)))
    return taken


def turn(peer):
    """Seconds of the steps of one turn: one, if it is long."""
    found, start = [], time.perf_counter()
    while not found or time.perf_counter() - start < TURN:
        found.append(peer.step())
    return found


def compare(losses, reference):
    """Mean loss against the reference's, in standard errors of the difference."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (losses, reference))
    error = math.sqrt(a.var().item() / len(a) + b.var().item() / len(b))
    return {"mean": a.mean().item(), "standard error": error, "z": (a.mean() - b.mean()).item() / error}


def require_agreement(found):
    """Raises where a peer's mean loss is not that of the reference."""
    limit = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * len(found)))
    wrong = {name: row for name, row in found.items() if not abs(row["z"]) < limit}
    if wrong:
        raise ValueError(f"these peers compute something else, |z| > {limit:.1f}: {wrong}")
