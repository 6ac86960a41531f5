# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How often the interval of ``evaluate`` holds the log evidence, and what ``trusted`` says meanwhile.

Log weights are N(., d^2), so that the larger d, the heavier the tail of the weights: the particles that an evaluation
would need grow as exp(d^2). Each element of a plate is an evaluation of its own, with the same known evidence. Writes
``coverage.json`` and ``coverage.md`` into ``benchmarks/results``.
"""

import pyro
import torch
from support import arguments, keep, provenance, surroundings
from support.markdown import markdown
from tqdm import tqdm

from pyro_iwae import evaluate
from pyro_iwae.exact import Gaussian

LEVEL = 0.95


def measure(offset, num_particles, num_replicates, repeats):
    gaussian = Gaussian(data=torch.zeros(repeats, dtype=torch.float64), offset=offset)
    options = {"num_particles": num_particles, "num_replicates": num_replicates, "progress": False}
    result = evaluate(gaussian.model, gaussian.guide, **options)
    low, high = result.interval(LEVEL)
    covered = (low < gaussian.log_evidence) & (gaussian.log_evidence < high)
    trusted = result.trusted
    return {
        "d": offset,
        "particles": num_particles,
        "replicates": num_replicates,
        "ESS": float(result.ess.median()),
        "covered": float(covered.double().mean()),
        "trusted": float(trusted.double().mean()),
        "covered, of the trusted": float(covered[trusted].double().mean()) if bool(trusted.any()) else None,
        "trusted and missed": float((trusted & ~covered).double().mean()),
    }


def table(result):
    lines = ["# Coverage of the 95 % interval", ""]
    lines += [f"{result['settings']['repeats']:,} evaluations in each row, percent of them; {provenance(result)}", ""]

    def percent(value):
        return "" if value is None else f"{100 * value:.1f}"

    shares = ("covered", "trusted", "covered, of the trusted", "trusted and missed")
    rows = [
        [row["d"], row["particles"], row["replicates"], f"{row['ESS']:.0f}", *(percent(row[s]) for s in shares)]
        for row in result["rows"]
    ]
    return "\n".join([*lines, *markdown(["d", "K", "replicates", "median ESS", *shares], rows), ""])


def main():
    parser = arguments(__doc__)
    parser.add_argument("--offsets", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--repeats", type=int, default=4000)
    options = parser.parse_args()
    sizes = [(100, 4), (100, 16), (1000, 16)]
    if options.smoke:
        options.offsets, options.repeats, sizes = [0.5], 20, [(30, 4)]
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    cases = [(d, k, r) for d in options.offsets for k, r in sizes]
    rows = [measure(*case, options.repeats) for case in tqdm(cases, disable=options.smoke)]
    result = {
        "benchmark": "coverage of the interval of the log evidence",
        **surroundings(),
        "settings": {"repeats": options.repeats, "level": LEVEL},
        "rows": rows,
    }
    keep(result, table(result), "coverage", options)


if __name__ == "__main__":
    main()
