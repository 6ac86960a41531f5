# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How the cost of a step grows: with particles K, with data N, and with plates.

A chain of Gaussians: a global latent; P plates side by side, in each N latents and N rows of data. K grows at N = 100
and P = 1; N grows at K = 10 and P = 1; P at K = 10 and N = 10,000. Time is that of loss and gradient, the median of
steps in turns; memory the peak of a process of its own. An exponent is the slope of log cost by log size: over the
whole range, where what a step costs at any size weighs in, and over its last two sizes. Writes ``growth.json``,
``growth.md`` and ``growth.png`` into ``benchmarks/results``; on a GPU, ``growth_cuda``.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.ticker import NullFormatter, ScalarFormatter
from pyro.infer import RenyiELBO
from support import device_name, keep, peer_arguments, provenance, spread, surroundings
from support.figures import style
from support.fresh import in_fresh_process
from support.markdown import duration, markdown, three
from support.memory import extra_memory
from support.peers import COMPILED, OURS, RENYI, LeftOut, elbo_step, make_elbo, no_compiler, timed
from support.problems import Problem
from support.turns import compare, in_turns, require_agreement
from torch import nn
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO

TREE = 'ImportanceWeightedELBO(plate_particles="auto")'
ELBOS = {
    RENYI: (RenyiELBO, {}),
    OURS: (ImportanceWeightedELBO, {}),
    COMPILED: (ImportanceWeightedELBO, {"compile": True}),
    TREE: (ImportanceWeightedELBO, {"plate_particles": "auto"}),
}
MOST_NUMBERS = 20_000_000  # in one tensor
START = {"K": 10, "N": 100, "plates": 1}
OTHERS = {  # while one grows
    "K": {"N": 100, "plates": 1},
    "N": {"K": 10, "plates": 1},
    "plates": {"K": 10, "N": 10_000},
}
MEGABYTE = 1_000_000  # peaks below it are no measure
WORDS = {"K": "particles K", "N": "rows N in a plate", "plates": "plates"}


class Chain(nn.Module):
    """The model, and a mean-field guide."""

    def __init__(self, rows, plates, device):
        super().__init__()
        numbers = torch.Generator().manual_seed(0)  # the same for all
        self.data = torch.randn(plates, rows, generator=numbers).to(device)
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(plates, rows, device=device)) for _ in range(2))
        self.top = nn.Parameter(torch.zeros(2, device=device))

    def model(self):
        mu = pyro.sample("mu", dist.Normal(self.data.new_zeros(()), 1.0))
        for i, x in enumerate(self.data):
            with pyro.plate(f"plate {i}", len(x)):
                z = pyro.sample(f"z{i}", dist.Normal(mu, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x)

    def guide(self):
        pyro.module("chain", self)
        loc, log_scale = self.top
        pyro.sample("mu", dist.Normal(loc, log_scale.exp()))
        scales = self.log_scale.exp()
        for i in range(len(self.data)):
            with pyro.plate(f"plate {i}", self.data.shape[1]):
                pyro.sample(f"z{i}", dist.Normal(self.loc[i], scales[i]))


class Growing:
    """One ELBO at one size."""

    def __init__(self, name, size, device):
        kind, options = ELBOS[name]
        chain = Chain(size["N"], size["plates"], device)
        problem = Problem(chain.model, chain.guide, (), chain)
        self.name, self.device = name, device
        self.store = {"params": {}, "constraints": {}}  # in Pyro, by name: peers would share them
        self.call = elbo_step(problem, make_elbo(kind, size["K"], **options), "gradient")

    def step(self):
        """Seconds of a step."""
        with pyro.get_param_store().scope(self.store):
            return timed(self.call, self.device)


def alone(request, options):
    peer = Growing(request["peer"], request["size"], options.device)
    peer.step()
    return {"bytes": extra_memory(peer.step, options.device)}


def measure(axis, size, options, left_out):
    torch.compiler.reset()
    peers = []
    for name in ELBOS:
        if name == TREE and size["K"] ** 2 * size["N"] > MOST_NUMBERS:  # each row has K particles in each of the K
            continue
        if name not in left_out:
            peers.append(Growing(name, size, options.device))
    label = ", ".join(f"{key} = {value:,}" for key, value in size.items())
    taken = in_turns(peers, options.repeats, 2, options.seconds, options.quiet, label)
    return [{"axis": axis, **size, "peer": name, "seconds": spread(values)} for name, values in taken.items()]


def agreement(options, left_out):
    """Losses of what computes the same: all but the plate tree, whose bound is another. Finds out what is left out."""
    losses = {}
    for name in (n for n in ELBOS if n != TREE):
        pyro.clear_param_store()
        try:
            peer = Growing(name, START, options.device)
        except LeftOut as reason:
            left_out[name] = str(reason)
            continue
        losses[name] = [peer.call() for _ in range(options.losses)]
    found = {name: compare(values, losses[RENYI]) for name, values in losses.items() if name != RENYI}
    require_agreement(found)
    return found


def add_memory(rows, options):
    """To the rows of each ELBO's two largest sizes, for a slope between them."""
    for axis in WORDS:
        chosen = []
        for name in ELBOS:
            chosen += [r for r in rows if r["axis"] == axis and r["peer"] == name][-2:]
        chosen = [r for r in chosen if not options.smoke or (axis, r["peer"]) == ("K", OURS)]
        for row in tqdm(chosen, desc=f"memory by {axis}", disable=options.quiet, leave=False):
            size = {key: row[key] for key in WORDS}
            row |= in_fresh_process(__file__, {"peer": row["peer"], "size": size}, options)


def exponents(rows):
    found = []
    for axis in WORDS:
        for name in dict.fromkeys(r["peer"] for r in rows):
            mine = [r for r in rows if r["axis"] == axis and r["peer"] == name]
            sizes, times = [r[axis] for r in mine], [r["seconds"]["median"] for r in mine]
            used = [r["bytes"] for r in mine if "bytes" in r]
            memory = slope(sizes[-2:], used) if used and min(used) > MEGABYTE else None
            row = {"axis": axis, "peer": name, "whole": slope(sizes, times), "last": slope(sizes[-2:], times[-2:])}
            found.append({**row, "memory": memory})
    return found


def slope(sizes, costs):
    """Of log cost by log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def table(result):
    lines = ["# Growth of the cost of a step", "", "Exponents: cost goes as size to this power.", ""]
    rows = []
    for r in result["exponents"]:
        reach = [row[r["axis"]] for row in result["rows"] if row["axis"] == r["axis"] and row["peer"] == r["peer"]]
        sizes = f"{reach[0]:,} to {reach[-1]:,}", f"{reach[-2]:,} to {reach[-1]:,}"
        exponents = f"{r['whole']:.2f}", f"{r['last']:.2f}", "" if r["memory"] is None else f"{r['memory']:.2f}"
        rows.append([WORDS[r["axis"]], r["peer"], sizes[0], exponents[0], sizes[1], *exponents[1:]])
    lines += markdown(["growing", "ELBO", "from, to", "time", "from, to", "time", "memory"], rows)
    agreed = "; ".join(f"{name} {row['z']:+.1f}" for name, row in result["agreement"].items())
    lines += ["", f"Mean losses against RenyiELBO's, in standard errors: {agreed}. The plate tree's bound is another."]
    for name, reason in result["left out"].items():
        lines += ["", f"Left out: {name}: {reason}."]
    for axis, word in WORDS.items():
        others = ", ".join(f"{key} = {value:,}" for key, value in OTHERS[axis].items())
        lines += ["", f"## {word[0].upper()}{word[1:]}", "", f"ms a step, median and quartiles; {others}.", ""]
        mine = [r for r in result["rows"] if r["axis"] == axis]
        names = list(dict.fromkeys(r["peer"] for r in mine))
        known = {(r[axis], r["peer"]): duration(r["seconds"]) for r in mine}
        cells = [[f"{s:,}", *(known.get((s, n), "") for n in names)] for s in sorted({r[axis] for r in mine})]
        lines += markdown([axis, *names], cells)
        used = [r for r in mine if "bytes" in r]
        cells = [[r["peer"], f"{r[axis]:,}", three(r["bytes"] / MEGABYTE)] for r in used]
        lines += ["", *markdown(["ELBO", axis, "peak memory of a step, MB"], cells)] if used else []
    return "\n".join([*lines, "", provenance(result).removesuffix(".") + f"; on {result['device']}.", ""])


def picture(result):
    figure, axes = plt.subplots(1, 3, figsize=(12.0, 4.6), layout="constrained", sharey=True)
    shown = {}
    for panel, (axis, word) in zip(axes, WORDS.items(), strict=True):
        for name in dict.fromkeys(r["peer"] for r in result["rows"]):
            mine = [r for r in result["rows"] if r["axis"] == axis and r["peer"] == name]
            times = [1e3 * r["seconds"]["median"] for r in mine]
            look = {"color": "#CC79A7", "marker": "^", "label": name} if name == TREE else style(name)
            (shown[name],) = panel.plot([r[axis] for r in mine], times, **look)
        others = ", ".join(f"{key} = {value:,}" for key, value in OTHERS[axis].items())
        panel.set(xscale="log", yscale="log", xlabel=word, title=others)
        panel.grid(alpha=0.3)
        if axis == "plates":
            panel.set_xticks(sorted({r[axis] for r in result["rows"]}))
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("time of loss and gradient (ms)")
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def main():
    parser = peer_arguments(__doc__)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--plates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3.0, help="time of each size, above which rounds end")
    parser.add_argument("--losses", type=int, default=100, help="of each, to see whether they agree")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.alone:
        print(json.dumps(alone(options.alone, options)))
        return
    if options.smoke:
        no_compiler().start()  # which takes long, and has tests of its own
        OTHERS["plates"]["N"] = 4
        options.particles, options.rows, options.plates, options.repeats = [2, 4], [2, 4], [1, 2], 2
        options.quiet = True
    ladder = {"K": options.particles, "N": options.rows, "plates": options.plates}
    sizes = [(axis, {axis: value, **OTHERS[axis]}) for axis, values in ladder.items() for value in values]
    left_out, rows = {}, []
    agreed = agreement(options, left_out)
    for axis, size in tqdm(sizes, desc="sizes", disable=options.quiet):
        rows += measure(axis, size, options, left_out)
    add_memory(rows, options)
    result = {
        "benchmark": "growth of the cost of a step with particles, rows and plates",
        **surroundings(),
        "device": device_name(options.device),
        "agreement": agreed,
        "left out": left_out,
        "rows": rows,
        "exponents": exponents(rows),
    }
    keep(result, table(result), "growth" if options.device == "cpu" else "growth_cuda", options, picture(result))


if __name__ == "__main__":
    main()
