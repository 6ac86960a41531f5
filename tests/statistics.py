# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Statistical assertions whose tolerance follows from a stated false-alarm rate, never from a hand-picked number."""

import math
import os

import torch
from scipy.stats import binomtest
from scipy.stats import t as student

FALSE_ALARM = 1e-6  # probability that one such assertion fails by chance, whatever the seed
MIN_DRAWS = 100  # below that a mean's own law is not to be relied on so far out in its tails
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def nightly(count):
    """How many of so many draws this run takes: all of them if it is the nightly one, a quarter if not.

    Tolerances follow from standard errors, so that the rate of false alarms is the same; the nightly run sees biases
    half as large.
    """
    return count if NIGHTLY else max(MIN_DRAWS, count // 4)


def limit(draws, count=1, false_alarm=FALSE_ALARM):
    """What the largest of ``count`` |t| statistics exceeds with probability ``false_alarm`` at most."""
    return float(student.ppf(1 - false_alarm / (2 * count), draws - 1))


def assert_mean(draws, expected):
    """The mean of independent draws, shape (n, ...), is the expected one.

    Fails by chance with probability FALSE_ALARM. Coordinates that never vary must equal what is expected.
    """
    assert len(draws) >= MIN_DRAWS, f"{len(draws)} draws are too few, {MIN_DRAWS} needed"
    draws = draws.detach().double()
    expected = torch.as_tensor(expected).detach().double().expand(draws.shape[1:])
    error, std_error = draws.mean(0) - expected, draws.std(0) / math.sqrt(len(draws))
    bound = limit(len(draws), error.numel()) * std_error + 1e-6 * (1.0 + expected.abs())  # rounding of float32
    worst = (error.abs() / bound).max().item()
    assert worst < 1.0, f"{worst:.2f} times the limit: got {draws.mean(0)}, expected {expected}, error {std_error}"


def assert_same_mean(draws, others):
    """Two independent sets of draws, each (n, ...), have one mean. Fails by chance with probability FALSE_ALARM."""
    assert min(len(draws), len(others)) >= MIN_DRAWS
    draws, others = draws.detach().double(), others.detach().double()
    error = draws.mean(0) - others.mean(0)
    std_error = (draws.var(0) / len(draws) + others.var(0) / len(others)).sqrt()
    fewest = min(len(draws), len(others))
    bound = limit(fewest, error.numel()) * std_error + 1e-6 * (1.0 + others.mean(0).abs())
    worst = (error.abs() / bound).max().item()
    assert worst < 1.0, f"{worst:.2f} times the limit: got {draws.mean(0)} and {others.mean(0)}, error {std_error}"


def assert_frequencies(counts, probabilities):
    """Counts of independent draws are those of these probabilities, also where they are few.

    Fails by chance with probability FALSE_ALARM.
    """
    total = int(counts.sum())
    for count, probability in zip(counts.tolist(), probabilities.tolist(), strict=True):
        chance = binomtest(count, total, probability).pvalue
        assert chance > FALSE_ALARM / len(counts), f"{count} of {total} where {total * probability:.1f} are expected"


def assert_mean_below(draws, ceiling):
    """The mean of draws is below the ceiling by more than chance explains (shown at FALSE_ALARM)."""
    assert len(draws) >= MIN_DRAWS
    draws = draws.detach().double()
    upper = draws.mean(0) + limit(len(draws)) * draws.std(0) / math.sqrt(len(draws))
    assert bool((upper < ceiling).all()), f"mean is {draws.mean(0)}, at most {upper}, not below {ceiling}"


def assert_mean_above(draws, floor):
    """The mean of draws is above the floor by more than chance explains (shown at FALSE_ALARM)."""
    assert_mean_below(-draws, -torch.as_tensor(floor))
