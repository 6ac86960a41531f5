# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The ratios of costs that this package is asked to keep, and what ``steps`` and ``chunks`` have measured.

Reads their results from ``benchmarks/results``, or from the folder given by ``--output``; measures nothing itself.
Writes ``asked.json`` and ``asked.md`` there; with ``--device cuda``, ``asked_cuda`` from the results of the GPU.
"""

import json

from support import HERE, keep, peer_arguments, provenance, surroundings
from support.asked import CHUNKS, STEPS, cells, title
from support.markdown import markdown


def read(name, options):
    """A result that was kept; empty where there is none."""
    path = (options.output or HERE.parent / "results") / f"{name}{suffix(options)}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def suffix(options):
    return "" if options.device == "cpu" else f"_{options.device}"


def collect(options):
    steps, chunks = read("steps", options), read("chunks", options)
    rows = []
    for where, peer, other, asked in STEPS:
        same = [c for c in steps.get("cases", []) if all(c[key] == value for key, value in where.items())]
        found = [r for c in same for r in c["ratios"] if (r["peer"], r["of"]) == (peer, other)]
        rows.append({"what": title(where), "peer": peer, "of": other, "asked": asked, "found": (found or [None])[0]})
    for kind, asked in CHUNKS.items():
        found = chunks.get("asked", {}).get(kind)
        words = "K = 5,000 in chunks of 50", "K = 50 at once" if kind == "memory" else "100 steps of K = 50"
        rows.append({"what": f"VAE, {kind}", "peer": words[0], "of": words[1], "asked": asked, "found": found})
    return {"rows": rows, "from": {"steps": origin(steps), "chunks": origin(chunks)}}


def origin(result):
    return provenance(result) if result else "not measured"


def table(result):
    lines = ["# Ratios asked and measured", ""]
    lines += ["Ratios of medians; in parentheses, quartiles of the ratios within one round of turns.", ""]
    rows = [[r["what"], r["peer"], r["of"], *cells(r["found"], r["asked"])] for r in result["rows"]]
    lines += markdown(["case", "of this", "to that", "at most", "measured", ""], rows)
    for name, where in result["from"].items():
        lines += ["", f"{name}: {where}"]
    return "\n".join([*lines, ""])


def main():
    options = peer_arguments(__doc__).parse_args()
    result = {"benchmark": "ratios asked and measured", **surroundings(), **collect(options)}
    keep(result, table(result), "asked" + suffix(options), options)


if __name__ == "__main__":
    main()
