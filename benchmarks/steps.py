# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Time of a step: this package against Pyro, PyTorch by hand, and NumPyro.

Three models: eight schools, a regression of 1,000 groups, a 784-200-200-50 VAE. Peers: Pyro's RenyiELBO and Trace_ELBO,
this package's ImportanceWeightedELBO, compiled or not, and CompiledSVI; the same by hand in PyTorch, with
torch.distributions, and under torch.compile; and NumPyro's RenyiELBO, jitted, in a process of its own. First, the mean
losses of all at the same parameters must agree (Trace_ELBO's with the ELBO by hand). Then each has one turn in each
round. First step and peak memory are those of a fresh process for each peer. A step is loss, gradient and Adam, if not
said otherwise. Writes ``steps.json``, ``steps.md`` and ``steps.png`` into ``benchmarks/results``; on a GPU,
``steps_cuda``.
"""

import contextlib
import json
import math
import statistics
import sys
import tempfile

import matplotlib.pyplot as plt
import torch
from support import asked, device_name, keep, peer_arguments, provenance, spread, surroundings
from support.asked import AUTOENCODER, SCHOOLS, case, cells, title
from support.by_hand import BY_HAND, elbo_loss
from support.figures import style
from support.fresh import in_fresh_process
from support.markdown import duration, markdown, three
from support.memory import extra_memory
from support.numpyro_peers import SCAN, STEPS, UPDATE, NumPyroPeer, Server, is_installed, numpyro_alone
from support.peers import (
    BY_COMPILER,
    COMPILED,
    EAGER,
    OURS,
    PEERS,
    RECORDED,
    SVI_RUN,
    SVI_STEP,
    TRACE,
    LeftOut,
    Peer,
    no_compiler,
)
from support.problems import SMALL, Sizes, make_problem
from support.turns import compare, in_turns, require_agreement
from tqdm import tqdm

LOOPS = (SVI_RUN, SCAN)  # many steps in each call: where steps are short
COMPILES = (COMPILED, SVI_STEP, BY_COMPILER)

NAMES = {
    "eight schools": "eight schools",
    "regression": "regression of 1,000 groups",
    "VAE": "784-200-200-50 VAE, batch of 20",
}
AGREE = {"eight schools": 300, "regression": 50, "VAE": 20}  # losses of each peer
CASES = [
    *(case("eight schools", k) for k in (1, 64, 500, 5000)),
    *(case("regression", k) for k in (1, 50, 500)),
    *(case("VAE", k) for k in (1, 50, 500, 5000)),
    AUTOENCODER,
]
ALONE = [SCHOOLS, case("VAE", 50), case("VAE", 5000)]
SMOKE = [case("eight schools", 3), case("regression", 3), case("VAE", 3, "gradient")]


def settings(where, options):
    """What makes a peer, of a case."""
    sizes = SMALL if options.smoke else Sizes(batch=where["batch"])
    rest = {key: where[key] for key in ("problem", "particles", "work")}
    return {"sizes": sizes, **rest, "device": options.device, "smoke": options.smoke}


def gather(where, server, options, left_out):
    """All peers that do this work here; the others with their reason go to ``left_out``."""
    peers, chosen = [], settings(where, options)
    loops = where["problem"] == "eight schools"
    for name, make in PEERS.items():
        if (name in (*LOOPS, RECORDED) and not loops) or (name == SVI_STEP and where["work"] == "gradient"):
            continue
        if options.smoke and name in (COMPILED, SVI_STEP) and where["problem"] != "eight schools":
            continue  # compiling takes long
        try:
            peers.append(Peer(name, make, **chosen))
        except LeftOut as reason:
            if name not in left_out:
                tqdm.write(f"{name} is left out: {reason}", file=sys.stderr)
            left_out[name] = str(reason)
    if server is not None:
        server.ask("forget")
        names = (name for name in STEPS[where["work"]] if loops or name not in LOOPS)
        peers += [NumPyroPeer(name, server, **chosen) for name in names]
    return peers


def agreement(where, peers, options):
    """Mean loss of each peer against that by hand."""
    count = 20 if options.smoke else AGREE[where["problem"]]
    losses = {peer.name: peer.losses(count) for peer in peers}
    found = {name: compare(values, losses[EAGER]) for name, values in losses.items() if name not in (EAGER, TRACE)}
    chosen = settings(where, options)
    problem = make_problem(where["problem"], chosen["sizes"], options.device)
    module = BY_HAND[where["problem"]](problem)
    with torch.no_grad():
        elbos = [elbo_loss(module.log_weights(where["particles"], *problem.args)).item() for _ in range(count)]
    found[TRACE] = compare(losses[TRACE], elbos)
    require_agreement(found)
    return found


def measure(where, server, options, left_out, agree):
    torch.compiler.reset()  # or, after eight sizes of one function, it would run uncompiled
    peers = gather(where, server, options, left_out)
    for peer in peers:
        peer.first()
    row = {**where, "agreement": agreement(where, peers, options)} if agree else dict(where)
    label = f"{where['problem']}, K = {where['particles']:,}"
    more = 4 if where in (SCHOOLS, AUTOENCODER) else 1  # those that are asked for
    taken = in_turns(peers, more * options.repeats, 1, more * options.seconds, options.quiet, label)
    row["rounds"] = len(taken[EAGER])
    row["seconds"] = {name: spread(values) for name, values in taken.items()}
    row["ratios"] = ratios(where, taken)
    return row


def ratios(where, taken):
    """Those asked of this case: of the medians, and the spread of those in one round."""
    rows = []
    for asked_of, peer, other, limit in asked.STEPS:
        if asked_of == where and peer in taken and other in taken:
            pairs = [a / b for a, b in zip(taken[peer], taken[other], strict=True)]
            ratio = statistics.median(taken[peer]) / statistics.median(taken[other])
            rows.append({"peer": peer, "of": other, "asked": limit, "ratio": ratio, "rounds": spread(pairs)})
    return rows


# In a fresh process


def alone(request, options):
    """Seconds of the first step, and bytes that a later one takes beyond what is held before it."""
    chosen = settings(request["case"], options)
    kind = PEERS[request["peer"]]
    start = Peer(request["peer"], kind, **chosen)
    seconds = start.first()
    start.step()
    return {"first": seconds, "bytes": extra_memory(start.step, options.device)}


def all_alone(options, left_out):
    rows = []
    cases, names = (SMOKE[:1], [OURS]) if options.smoke else (ALONE, PEERS)
    bar = tqdm(cases, desc="fresh processes", disable=options.quiet, leave=False)
    for where in bar:
        for name in names:
            if name not in left_out and name not in (*LOOPS, RECORDED):
                bar.set_postfix_str(name)
                rows.append({**where, "peer": name, **in_own_cache(where, name, options)})
        if is_installed(options.device) and not options.smoke:
            found = numpyro_alone(options.threads, **settings(where, options))
            rows.append({**where, "peer": UPDATE, **found})
    return rows


def in_own_cache(where, name, options):
    """With nothing compiled before; and, of what compiles, once more with that still there."""
    with tempfile.TemporaryDirectory() as cache:
        cache = {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = in_fresh_process(__file__, {"case": where, "peer": name}, options, **cache)
        if name in COMPILES and where["particles"] < 1000:
            again = in_fresh_process(__file__, {"case": where, "peer": name}, options, **cache)
            found["first, cached"] = again["first"]
    return found


# Reports


def exponents(result):
    """d log seconds / d log K between the two largest K, of each problem and peer."""
    rows = []
    for problem in dict.fromkeys(c["problem"] for c in result["cases"]):
        sweep = sweep_of(result, problem)
        if len(sweep) > 1:
            a, b = sweep[-2:]
            reach = math.log(b["particles"] / a["particles"])
            for name in b["seconds"]:
                rise = math.log(b["seconds"][name]["median"] / a["seconds"][name]["median"])
                rows.append({"problem": problem, "peer": name, "exponent": rise / reach})
    return rows


def sweep_of(result, problem):
    return [c for c in result["cases"] if c["problem"] == problem and c["work"] == "update"]


def table(result):
    lines = ["# Time of a step", "", "## Asked and measured", ""]
    threads = result["machine"]["threads"]
    lines += [
        "Ratio of median times; in parentheses, quartiles of the ratios within one round. One round of warm-up, after "
        f"each peer's first step. {threads} thread(s) for PyTorch, {threads} core(s) for NumPyro.",
        "",
    ]
    rows = []
    for where in result["cases"]:
        for r in where["ratios"]:
            rows.append([title(where), r["peer"], r["of"], *cells(r, r["asked"])])
    lines += markdown(["case", "peer", "of", "at most", "measured", ""], rows)
    for name, reason in result["left out"].items():
        lines += ["", f"Left out: {name}: {reason}."]
    for where in result["cases"]:
        lines += ["", f"## {title(where)}", "", f"{where['rounds']} rounds.", ""]
        base = where["seconds"][EAGER]["median"]
        rows = [
            [name, duration(s), f"{s['median'] / base:.3g}", agreed(where, name)]
            for name, s in where["seconds"].items()
        ]
        header = ["peer", "ms a step, median (quartiles)", "of by hand", "mean loss: z"]
        drop = None if "agreement" in where else -1
        lines += markdown(header[:drop], [row[:drop] for row in rows])
    lines += ["", "## Growth with K", ""]
    lines += ["Exponent of the time of a step between the two largest K.", ""]
    lines += markdown(
        ["model", "peer", "exponent"], [[r["problem"], r["peer"], f"{r['exponent']:.2f}"] for r in result["exponents"]]
    )
    lines += ["", "## First step and peak memory, each in a fresh process", ""]
    lines += [
        "In parentheses, with what an earlier process has compiled still there; else nothing is. Memory is what a "
        "later step takes; of NumPyro, what compiling takes, too.",
        "",
    ]
    rows = [
        [title(r), r["peer"], first(r), "" if r["bytes"] is None else three(r["bytes"] / 1e6)] for r in result["alone"]
    ]
    lines += markdown(["case", "peer", "first step, s", "memory of a step, MB"], rows)
    lines += ["", provenance(result).removesuffix(".") + extra(result), ""]
    return "\n".join(lines)


def first(row):
    again = f" ({three(row['first, cached'])})" if "first, cached" in row else ""
    return three(row["first"]) + again


def agreed(where, name):
    row = where.get("agreement", {}).get(name)
    return "" if row is None else f"{row['z']:+.1f}"


def extra(result):
    peers = "".join(f", {name} {version}" for name, version in result["peers"].items())
    return f"{peers}; on {result['device']}."


def picture(result):
    problems = list(dict.fromkeys(c["problem"] for c in result["cases"]))
    figure, axes = plt.subplots(1, len(problems), figsize=(4.2 * len(problems), 5.2), layout="constrained")
    shown = {}
    for axis, problem in zip(axes, problems, strict=True):
        sweep = sweep_of(result, problem) or [c for c in result["cases"] if c["problem"] == problem]
        for name in sweep[0]["seconds"]:
            counts = [c["particles"] for c in sweep]
            times = [1e3 * c["seconds"][name]["median"] for c in sweep]
            (shown[name],) = axis.plot(counts, times, **style(name))
        axis.set(xscale="log", yscale="log", title=NAMES[problem], xlabel="particles K")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time of a step (ms)")
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def main():
    parser = peer_arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="rounds of each case, at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each case, above which rounds end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.alone:
        print(json.dumps(alone(options.alone, options)))
        return
    if options.smoke:
        no_compiler().start()  # which takes long, and has tests of its own
        options.repeats, options.seconds, options.quiet = 2, 1.0, True
    left_out, rows, seen = {}, [], set()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(options.threads, options.device)) if is_installed(options.device) else None
        versions = server.ask("versions") if server else {}
        if server is None:
            left_out["NumPyro"] = "not installed here for this device; pip install '.[bench]'"
        for where in tqdm(SMOKE if options.smoke else CASES, desc="cases", disable=options.quiet):
            agree = where["particles"] > 1 and where["problem"] not in seen
            seen |= {where["problem"]} if agree else set()
            rows.append(measure(where, server, options, left_out, agree))
    result = {
        "benchmark": "time of a step of all peers, first step, peak memory",
        **surroundings(),
        "device": device_name(options.device),
        "peers": versions,
        "left out": left_out,
        "cases": rows,
        "alone": all_alone(options, left_out),
    }
    result["exponents"] = exponents(result)
    name = "steps" if options.device == "cpu" else "steps_cuda"
    keep(result, table(result), name, options, picture(result))


if __name__ == "__main__":
    main()
