# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Many particles in the memory of few: ``chunk_size``, on the 784-200-200-50 VAE with batches of 100.

Loss and gradient of K = 5,000 in chunks of 50, against K = 50 at once: peak memory, each in a process of its own, and
time against that of 100 such steps, half of them before and half after in each round. Then K = 500 in chunks of
several sizes, and one step of K = 100,000 on 100 digits of scikit-learn's. First, the mean loss in chunks must agree
with that at once. Writes ``chunks.json``, ``chunks.md`` and ``chunks.png`` into ``benchmarks/results``; on a GPU,
``chunks_cuda``.
"""

import json
import statistics

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from sklearn.datasets import load_digits
from support import device_name, keep, peer_arguments, provenance, spread, surroundings
from support.asked import CHUNKS, cells
from support.fresh import in_fresh_process
from support.markdown import duration, markdown, three
from support.memory import extra_memory, high_water
from support.peers import LeftOut, Peer, elbo, timed
from support.problems import SMALL, Sizes
from support.turns import compare, in_turns, require_agreement
from support.vae import VAE
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO


def make_peer(particles, chunk, options):
    """Loss and gradient of K particles, at once where ``chunk`` is None."""
    name = f"K = {particles:,}, " + ("at once" if chunk is None else f"chunks of {chunk}")
    kind = elbo(ImportanceWeightedELBO, **({} if chunk is None else {"chunk_size": chunk}))
    case = {"problem": "VAE", "particles": particles, "work": "gradient"}
    return Peer(name, kind, SMALL if options.smoke else Sizes(), device=options.device, smoke=options.smoke, **case)


def many(request, options):
    """Seconds and bytes of one step of a small VAE on 100 digits, with more particles than any memory holds at once."""
    counts = torch.tensor(load_digits().data[:100], dtype=torch.float, device=options.device)
    vae = VAE(counts.shape[1], [100, 100], 20, trials=16).to(options.device)
    args = vae.model, vae.guide, counts
    ImportanceWeightedELBO(2 * request["chunk"], chunk_size=request["chunk"]).loss_and_grads(*args)
    elbo = ImportanceWeightedELBO(request["K"], chunk_size=request["chunk"])
    seconds = timed(lambda: elbo.loss_and_grads(*args), options.device)
    return {**request, "seconds": seconds, "bytes in all": high_water()}


def alone(request, options):
    """Bytes that two steps take, the first included, beyond what is held after a step of two particles; and in all."""
    if "many" in request:
        return many(request, options)
    make_peer(2, request["chunk"] and 1, options).step()  # in chunks or not, as these: the first imports more of torch
    peer = make_peer(request["K"], request["chunk"], options)

    def twice():
        peer.step()
        peer.step()

    return {"bytes": extra_memory(twice, options.device), "bytes in all": high_water()}


def agreement(options):
    """Losses of two chunks against losses at once."""
    chunk = options.chunk
    once, chunked = make_peer(2 * chunk, None, options), make_peer(2 * chunk, chunk, options)
    found = {chunked.name: compare(chunked.losses(options.losses), once.losses(options.losses))}
    require_agreement(found)
    return found


def in_sequence(options):
    """Seconds of K particles in chunks; and of as many steps of one chunk, around it."""
    count = options.particles // options.chunk
    chunked, small = make_peer(options.particles, options.chunk, options), make_peer(options.chunk, None, options)
    for peer in (small, make_peer(2 * options.chunk, options.chunk, options)):
        peer.step()
    chunked_seconds, small_seconds = [], []
    for _ in tqdm(range(options.rounds), desc="in chunks", disable=options.quiet, leave=False):
        before = sum(small.step() for _ in range(count // 2))
        chunked_seconds.append(chunked.step())
        small_seconds.append(before + sum(small.step() for _ in range(count - count // 2)))
    return chunked_seconds, small_seconds


def asked(options):
    """The two ratios."""
    chunked_seconds, small_seconds = in_sequence(options)
    chunked = in_fresh_process(__file__, {"K": options.particles, "chunk": options.chunk}, options)
    small = in_fresh_process(__file__, {"K": options.chunk, "chunk": None}, options)
    return {
        "time": {
            "asked": CHUNKS["time"],
            "ratio": statistics.median(chunked_seconds) / statistics.median(small_seconds),
            "rounds": spread([a / b for a, b in zip(chunked_seconds, small_seconds, strict=True)]),
            "chunks": spread(chunked_seconds),
            "steps": spread(small_seconds),
        },
        "memory": {
            "asked": CHUNKS["memory"],
            "ratio": chunked["bytes"] / max(small["bytes"], 1),
            "ratio in all": chunked["bytes in all"] / small["bytes in all"],
            "chunks": chunked,
            "steps": small,
        },
    }


def by_size(options):
    """Time and memory of a step, by the size of its chunks."""
    chunks = [*options.sizes, None]
    peers = [make_peer(options.sweep, chunk, options) for chunk in chunks]
    taken = in_turns(peers, options.rounds, 1, 600.0, options.quiet, "by size")
    rows = []
    for peer, chunk in zip(peers, tqdm(chunks, desc="memory", disable=options.quiet, leave=False), strict=True):
        found = in_fresh_process(__file__, {"K": options.sweep, "chunk": chunk}, options)
        rows.append({"K": options.sweep, "chunk": chunk, "seconds": spread(taken[peer.name]), **found})
    return rows


def table(result):
    lines = ["# Particles in chunks", ""]
    if result["left out"]:
        return "\n".join([*lines, f"Left out: {result['left out']}.", "", *markdown(["", ""], []), ""])
    options, time, memory = result["settings"], result["asked"]["time"], result["asked"]["memory"]
    chunked = f"K = {options['particles']:,} in chunks of {options['chunk']}"
    lines += [f"{chunked}, against K = {options['chunk']} at once; VAE, loss and gradient.", ""]
    steps = options["particles"] // options["chunk"]
    megabytes = [three(memory[key]["bytes"] / 1e6) for key in ("chunks", "steps")]
    rows = [
        [f"time, of {steps} steps", *cells(time, time["asked"])],
        ["peak memory beyond that of two particles", *cells(memory, memory["asked"])],
        ["peak memory of the process", *cells({"ratio": memory["ratio in all"]}, None)],
    ]
    lines += markdown(["ratio", "at most", "measured", ""], rows)
    (agreed,) = result["agreement"].values()
    lines += [
        "",
        f"In ms, median and quartiles: {duration(time['chunks'])} in chunks, {duration(time['steps'])} in {steps} "
        f"steps; {options['rounds']} rounds. In MB: {' and '.join(megabytes)}. Mean losses of "
        f"K = {2 * options['chunk']} in chunks and at once differ by {agreed['z']:+.1f} standard errors.",
        "",
        f"## K = {options['sweep']:,} by size of chunk",
        "",
    ]
    rows = [
        [r["chunk"] or "at once", duration(r["seconds"]), three(r["bytes"] / 1e6), three(r["bytes in all"] / 1e6)]
        for r in result["sizes"]
    ]
    lines += markdown(["chunk", "ms a step, median (quartiles)", "memory of a step, MB", "of the process, MB"], rows)
    many = result["many"]
    lines += ["", f"One step of K = {many['K']:,} in chunks of {many['chunk']}, 64-100-100-20 VAE on 100 digits: "]
    lines[-1] += f"{many['seconds']:.3g} s, {three(many['bytes in all'] / 1e6)} MB in all."
    return "\n".join([*lines, "", provenance(result).removesuffix(".") + f"; on {result['device']}.", ""])


def picture(result):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    rows = result["sizes"]
    counts = [r["chunk"] or r["K"] for r in rows]
    left.plot(counts, [1e3 * r["seconds"]["median"] for r in rows], color="#0072B2", marker="o")
    right.plot(counts, [max(r["bytes"], 1) / 1e6 for r in rows], color="#0072B2", marker="o")
    left.set_ylabel("time of a step (ms)")
    right.set_ylabel("peak memory of a step (MB)")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="particles in a chunk (the last: all at once)")
        axis.set_xticks(counts)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"VAE, K = {rows[0]['K']:,}")
    return figure


def main():
    parser = peer_arguments(__doc__)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--chunk", type=int, default=50)
    parser.add_argument("--sweep", type=int, default=500, help="K where the size of chunks varies")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 25, 50, 100, 250])
    parser.add_argument("--many", type=int, default=100_000, help="K of one step on digits, in chunks of 100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--losses", type=int, default=20, help="of each, to see whether they agree")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.alone:
        print(json.dumps(alone(options.alone, options)))
        return
    if options.smoke:
        options.particles, options.chunk, options.sweep, options.sizes, options.quiet = 20, 5, 4, [2], True
        options.rounds, options.many = 2, 400
    names = ("particles", "chunk", "sweep", "sizes", "rounds")
    result = {
        "benchmark": "particles in chunks: time and peak memory",
        **surroundings(),
        "device": device_name(options.device),
        "settings": {name: getattr(options, name) for name in names},
        "left out": "",
    }
    try:
        result |= {"agreement": agreement(options), "asked": asked(options), "sizes": by_size(options)}
        result["many"] = in_fresh_process(__file__, {"many": True, "K": options.many, "chunk": 100}, options)
    except LeftOut as reason:
        result["left out"] = str(reason)
    name = "chunks" if options.device == "cpu" else "chunks_cuda"
    keep(result, table(result), name, options, None if result["left out"] else picture(result))


if __name__ == "__main__":
    main()
