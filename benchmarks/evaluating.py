# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluating 360 digits at K = 5,000: ``evaluate`` against a loop written by hand with torch.distributions.

A 64-100-100-20 VAE on scikit-learn's digits. The loop encodes once, and for each chunk of particles draws, decodes and
weighs; of each replicate it keeps the log mean weight of each digit, nothing else. ``evaluate`` draws as many particles
in chunks as large, and finds bounds for a ladder of K, jackknife, unbiased estimate, ESS, khat and the rest besides.
Rounds in turns, so that a machine that slows down slows both; log evidences must agree. By default glibc gives memory
back to the system and asks for it again, by chance in one or the other: up to a third of the time. So times are taken
in a process that keeps its memory, and for comparison in one that does not. Peak memory is measured in
processes of their own, for two numbers of particles. Writes ``evaluating.json`` and ``evaluating.md`` into
``benchmarks/results``.
"""

import json
import math
import statistics

import pyro
import torch
from sklearn.datasets import load_digits
from support import device_name, keep, peer_arguments, provenance, spread, surroundings
from support.asked import cells
from support.fresh import in_fresh_process
from support.markdown import duration, markdown, three
from support.memory import extra_memory, high_water
from support.peers import timed
from support.turns import compare, require_agreement
from support.vae import VAE
from torch.distributions import Bernoulli, Normal
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO, evaluate

ASKED = 1.1  # times the loop's time, at most
KEEPS = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
SETTINGS = ("digits", "particles", "chunk", "replicates", "rounds", "steps")


def digits(count, device):
    images = load_digits().data[:: len(load_digits().data) // count][:count]
    return torch.as_tensor(images > 7.5, dtype=torch.float, device=device)


def trained(x, steps):
    vae = VAE(x.shape[1], [100, 100], 20).to(x.device)
    pyro.clear_param_store()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), ImportanceWeightedELBO(5))
    for _ in range(steps):
        svi.step(x)
    return vae


@torch.no_grad()
def by_hand(vae, x, particles, chunk, replicates):
    """Log mean weight of each digit and replicate."""
    found = []
    for _ in range(replicates):
        loc, log_scale = vae.encoder(x).chunk(2, -1)
        posterior, prior, parts = Normal(loc, log_scale.exp()), Normal(torch.zeros_like(loc), 1.0), []
        for start in range(0, particles, chunk):
            z = posterior.rsample((min(chunk, particles - start),))
            log_p = prior.log_prob(z).sum(-1) + Bernoulli(logits=vae.decoder(z)).log_prob(x).sum(-1)
            parts.append(log_p - posterior.log_prob(z).sum(-1))
        found.append(torch.cat(parts).logsumexp(0) - math.log(particles))
    return torch.stack(found)


def by_us(vae, x, particles, chunk, replicates):
    return evaluate(
        vae.model, vae.guide, x, num_particles=particles, num_replicates=replicates, chunk_size=chunk, progress=False
    )


def alone(request, options):
    """Times; or bytes of one evaluation beyond what is held before it."""
    vars(options).update(request.get("settings", {}))
    if request["who"] == "both":
        return measure(options)
    x = digits(options.digits, options.device)
    vae = trained(x, 2)
    call = by_us if request["who"] == "evaluate" else by_hand
    call(vae, x, 2 * options.chunk, options.chunk, 2)  # the first imports more of torch
    asked = vae, x, request["particles"], options.chunk, 2
    return {**request, "bytes": extra_memory(lambda: call(*asked), options.device), "bytes in all": high_water()}


def memory(options):
    counts = (options.particles, options.particles // 10)
    settings = {"digits": options.digits, "chunk": options.chunk}
    requests = [
        {"who": who, "particles": count, "settings": settings} for who in ("evaluate", "loop") for count in counts
    ]
    return [in_fresh_process(__file__, r, options) for r in tqdm(requests, "memory", disable=options.quiet)]


def measure(options):
    x = digits(options.digits, options.device)
    vae = trained(x, options.steps)
    asked = vae, x, options.particles, options.chunk, options.replicates
    ours, hand = [], []
    for call in (by_us, by_hand):
        call(vae, x, 2 * options.chunk, options.chunk, 2)  # the first imports more of torch
    for i in tqdm(range(options.rounds), "rounds", disable=options.quiet):
        turns = [(ours, by_us), (hand, by_hand)]
        for taken, call in turns if i % 2 else reversed(turns):
            taken.append(timed(lambda call=call: call(*asked), options.device))
    result, loop = by_us(*asked), by_hand(*asked)
    totals = result.parts[0].values["log mean"].sum(1).tolist()
    found = {"evaluate": compare(totals, loop.sum(1).tolist())}
    require_agreement(found)
    return {
        "ratio": statistics.median(ours) / statistics.median(hand),
        "rounds": spread([a / b for a, b in zip(ours, hand, strict=True)]),
        "evaluate": spread(ours),
        "loop": spread(hand),
        "agreement": found["evaluate"],
        "log evidence": [result.total.log_evidence, result.total.std_error],
        "trusted": float(result.trusted.double().mean()),
    }


def table(result):
    options, times = result["settings"], result["time"]
    lines = [
        "# Evaluating digits",
        "",
        f"{options['digits']} digits, {options['replicates']} replicates of K = {options['particles']:,} in chunks of "
        f"{options['chunk']}; 64-100-100-20 VAE; {options['rounds']} rounds.",
        "",
    ]
    rows = []
    for name, found in times.items():
        rows.append([name, cells(found, None)[1], duration(found["evaluate"]), duration(found["loop"])])
    lines += markdown(["allocator", "time, of the loop's", "evaluate, ms", "loop, ms"], rows)
    found = times["memory kept"]
    evidence, error = found["log evidence"]
    verdict = "holds" if found["ratio"] <= result["asked"] else "does not hold"
    lines += [
        "",
        f"Asked for: at most {result['asked']}, which {verdict} where memory is kept. Median and quartiles. Log "
        f"evidence of all digits {evidence:.2f} ± {error:.2f} nats; that of both differs by "
        f"{found['agreement']['z']:+.1f} standard errors; {found['trusted']:.0%} of the digits are to be trusted.",
        "",
    ]
    rows = [
        [r["who"], f"{r['particles']:,}", three(r["bytes"] / 1e6), three(r["bytes in all"] / 1e6)]
        for r in result["memory"]
    ]
    lines += markdown(["", "K", "memory, MB", "of the process, MB"], rows)
    return "\n".join([*lines, "", provenance(result).removesuffix(".") + f"; on {result['device']}.", ""])


def main():
    parser = peer_arguments(__doc__)
    parser.add_argument("--digits", type=int, default=360)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--chunk", type=int, default=100)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="of training")
    options = parser.parse_args()
    if options.smoke:
        options.digits, options.particles, options.chunk, options.replicates = 20, 200, 50, 3
        options.rounds, options.steps, options.quiet = 2, 3, True
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    if options.alone:
        print(json.dumps(alone(options.alone, options)))
        return
    settings = {name: getattr(options, name) for name in SETTINGS}
    result = {
        "benchmark": "evaluating digits against a loop by hand",
        **surroundings(),
        "device": device_name(options.device),
        "settings": settings,
        "asked": ASKED,
        "time": {
            "memory kept": in_fresh_process(__file__, {"who": "both", "settings": settings}, options, **KEEPS),
            "as it comes": measure(options),
        },
        "memory": memory(options),
    }
    name = "evaluating" if options.device == "cpu" else "evaluating_cuda"
    keep(result, table(result), name, options)


if __name__ == "__main__":
    main()
