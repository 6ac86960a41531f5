# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles shared out over two processes of one thread each: how much faster, and what goes over the wire.

Evaluation of scikit-learn's digits under a 64-100-100-20 VAE, and training steps of it, by one process alone (the other
waits) and by both, in turns, with gloo over the loopback interface; in processes that keep the memory that they have
had (see ``evaluating.py``). Bytes are those that this interface counts (Linux), TCP's headers included, against the
formula of ``docs/distributed``. Two processes on two cores share memory and caches: other machines scale in another
way. Writes ``distributed.json`` and ``distributed.md`` into ``benchmarks/results``.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import pyro
import torch
import torch.distributed as dist
from evaluating import KEEPS, digits, trained
from support import arguments, keep, provenance, seconds, spread, surroundings
from support.markdown import duration, markdown
from support.vae import VAE
from torch import multiprocessing
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO, evaluate

ASKED = 1.7  # times as fast
SIZE = 2
HEADERS = 64  # bytes of each of the exchanges that only say that all is well
EXCHANGES = 3


def main():
    parser = arguments(__doc__)
    parser.add_argument("--digits", type=int, default=360)
    parser.add_argument("--particles", type=int, default=2000, help="of an evaluation")
    parser.add_argument("--chunk", type=int, default=100)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if options.smoke:
        options.digits, options.particles, options.chunk, options.replicates = 20, 200, 50, 2
        options.rounds, options.steps, options.quiet = 2, 3, True
    torch.set_num_threads(options.threads)
    os.environ.update(KEEPS)  # for the processes that are started: see evaluating.py
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (folder, options), nprocs=SIZE)
        measured = json.loads(Path(folder, "measured.json").read_text())
    settings = {n: getattr(options, n) for n in ("digits", "particles", "chunk", "replicates", "rounds", "steps")}
    result = {
        "benchmark": "particles shared out over two processes",
        **surroundings(),
        "settings": {**settings, "processes": SIZE},
        "asked": ASKED,
        **measured,
    }
    keep(result, table(result), "distributed", options)


def worker(rank, folder, options):
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    pyro.set_rng_seed(0)
    x = digits(options.digits, "cpu")
    vae = trained(x, options.steps)
    found = {
        "evaluation": evaluation(vae, x, options),
        "steps": [training(k, options) for k in ((16, 64) if options.smoke else (64, 512))],
        "traffic": [traffic(k, options) for k in ((4, 8) if options.smoke else (16, 64, 256))],
    }
    if rank == 0:
        Path(folder, "measured.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_turns(alone, both, rounds, name, quiet):
    """Seconds of rank 0 alone, and of both; the others wait."""
    times = {"one": [], "two": []}
    for i in tqdm(range(rounds + 1), name, disable=quiet or dist.get_rank() > 0):
        for who in ("one", "two") if i % 2 else ("two", "one"):
            dist.barrier()
            if who == "two" or dist.get_rank() == 0:
                times[who].append(seconds(both if who == "two" else alone))
            dist.barrier()
    if dist.get_rank() > 0:
        return None
    one, two = (times[who][1:] for who in ("one", "two"))  # the first imports and looks
    return {
        "speedup": statistics.median(one) / statistics.median(two),
        "rounds": spread([a / b for a, b in zip(one, two, strict=True)]),
        "one": spread(one),
        "two": spread(two),
    }


def evaluation(vae, x, options):
    asked = {
        "num_particles": options.particles,
        "num_replicates": options.replicates,
        "chunk_size": options.chunk,
        "progress": False,
    }

    def run(group):
        return evaluate(vae.model, vae.guide, x, process_group=group, **asked)

    found = in_turns(lambda: run(None), lambda: run(dist.group.WORLD), options.rounds, "evaluation", options.quiet)
    shared = run(dist.group.WORLD).total
    if found is not None:
        alone = run(None).total
        error = (alone.std_error**2 + shared.std_error**2) ** 0.5
        found["z"] = (shared.log_evidence - alone.log_evidence) / error
        if abs(found["z"]) > 8.0 and not options.smoke:  # of few replicates
            raise RuntimeError(f"log evidences differ by {found['z']:.1f} standard errors")
    return found


def stepper(particles, options, group):
    """Steps of a fresh VAE, of a batch of 64 rows."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    vae, x = VAE(64, [100, 100], 20), digits(64, "cpu")
    loss = ImportanceWeightedELBO(particles, process_group=group)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    return lambda: svi.step(x), sum(p.numel() for p in vae.parameters()), len(x)


def training(particles, options):
    steps = 2 if options.smoke else 20
    both, *_ = stepper(particles, options, dist.group.WORLD)
    for _ in range(12):  # beyond the steps that compare parameters
        both()
    alone, *_ = stepper(particles, options, None)

    def many(step):
        return lambda: [step() for _ in range(steps)]

    found = in_turns(many(alone), many(both), options.rounds, f"steps, K = {particles}", options.quiet)
    return None if found is None else {"particles": particles, "steps": steps, **found}


def traffic(particles, options):
    """Bytes on the loopback interface for each step, and by the formula."""
    steps = 5 if options.smoke else 50
    step, parameters, rows = stepper(particles, options, dist.group.WORLD)
    for _ in range(12):
        step()
    dist.barrier()
    before = loopback()
    dist.barrier()
    for _ in range(steps):
        step()
    dist.barrier()
    sent = None if before is None else (loopback() - before) / steps
    gradients, totals = 2 * (SIZE - 1) * 4 * parameters, SIZE * (SIZE - 1) * 2 * 4 * rows
    formula = gradients + totals + SIZE * (SIZE - 1) * EXCHANGES * HEADERS
    return {
        "particles": particles,
        "parameters": parameters,
        "rows": rows,
        "measured": sent,
        "formula": formula,
        "gradients": gradients,
    }


def loopback():
    """Bytes that the loopback interface has carried; None where that is not to be known."""
    counters = Path("/proc/net/dev")
    if not counters.exists():
        return None
    line = next(line for line in counters.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def table(result):
    options, found = result["settings"], result["evaluation"]
    verdict = "holds" if found["speedup"] >= result["asked"] else "does not hold"
    lines = [
        "# Particles shared out over two processes",
        "",
        f"64-100-100-20 VAE on digits. Evaluation: {options['digits']} digits, {options['replicates']} replicates of "
        f"K = {options['particles']:,} in chunks of {options['chunk']}. Steps: 64 digits. {options['rounds']} rounds "
        "in turns, median and quartiles.",
        "",
    ]
    rows = [["evaluation", *_cells(found, 1)]]
    rows += [[f"step, K = {s['particles']}", *_cells(s, s["steps"])] for s in result["steps"]]
    lines += markdown(["", "times as fast", "one process, ms", "two, ms"], rows)
    lines += [
        "",
        f"Asked of evaluation: {result['asked']} times as fast, which {verdict}. Log evidences of both agree (z = "
        f"{found['z']:+.1f}).",
        "",
        "## What goes over the wire in each step",
        "",
    ]
    rows = [
        [
            f"{t['particles']}",
            "not known" if t["measured"] is None else f"{t['measured'] / 1e3:,.1f}",
            f"{t['formula'] / 1e3:,.1f}",
            f"{t['gradients'] / t['formula']:.1%}",
        ]
        for t in result["traffic"]
    ]
    lines += markdown(["K", "measured, kB", "formula, kB", "of which gradients"], rows)
    first = result["traffic"][0]
    lines += [
        "",
        f"Of both processes together, {first['parameters']:,} parameters in float32 and {first['rows']} rows; measured "
        "with the headers of TCP.",
        "",
        provenance(result),
        "",
    ]
    return "\n".join(lines)


def _cells(found, count):
    rounds = found["rounds"]
    ratio = f"{found['speedup']:.2f} ({rounds['lower quartile']:.2f} to {rounds['upper quartile']:.2f})"
    each = ({n: v / count for n, v in found[who].items()} for who in ("one", "two"))
    return [ratio, *(duration(e) for e in each)]


if __name__ == "__main__":
    main()
