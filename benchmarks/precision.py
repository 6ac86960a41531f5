# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Loss and gradient in fewer digits: float32, TF32 and bfloat16 autocast against float64, on the same noise.

One step of the 784-200-200-50 VAE, K = 50, batches of 100, by ImportanceWeightedELBO and by hand. The noise is drawn in
float64 and rounded, so that only the arithmetic differs. Errors are relative: that of the loss, and the norm of the
gradient's error by the norm of the gradient; medians over draws of the noise. TF32 needs a GPU. Writes
``precision.json`` and ``precision.md`` into ``benchmarks/results``; on a GPU, ``precision_cuda``.
"""

import contextlib
import statistics
from unittest import mock

import pyro
import torch
from support import device_name, keep, peer_arguments, provenance, spread, surroundings
from support.by_hand import BY_HAND, bound_loss
from support.markdown import duration, markdown
from support.peers import EAGER, OURS, timed
from support.problems import SMALL, Problem, Sizes, make_problem
from tqdm import tqdm

from pyro_iwae import ImportanceWeightedELBO

PRECISIONS = ["float64", "float32", "TF32", "bfloat16 autocast"]


@contextlib.contextmanager
def noise(seed, device):
    """All normal noise is drawn in float64, and then rounded to what was asked for."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)

    with mock.patch("torch.distributions.normal._standard_normal", draw), mock.patch("support.by_hand.randn", draw):
        yield


@contextlib.contextmanager
def precision(name, device):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=name.startswith("bfloat16")):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Case:
    """One peer at one precision."""

    def __init__(self, peer, name, options):
        self.name, self.device = name, options.device
        problem = make_problem("VAE", SMALL if options.smoke else Sizes(), options.device)
        dtype = torch.float64 if name == "float64" else torch.float32
        module, args = problem.module.to(dtype), tuple(a.to(dtype) for a in problem.args)
        if peer == OURS:
            elbo = ImportanceWeightedELBO(options.particles)
            self.differentiable = lambda: elbo.differentiable_loss(problem.model, problem.guide, *args)
        else:
            module = BY_HAND["VAE"](Problem(problem.model, problem.guide, args, module))
            self.differentiable = lambda: bound_loss(module.log_weights(options.particles, *args))
        self.module = module

    def step(self):
        pyro.clear_param_store()
        self.module.zero_grad(set_to_none=True)
        with precision(self.name, self.device):
            loss = self.differentiable()
        loss.backward()
        return loss

    def values(self, seed):
        """Loss, and the gradient as one vector in float64."""
        with noise(seed, self.device):
            loss = self.step().item()
        return loss, torch.cat([p.grad.double().flatten() for p in self.module.parameters()])


def measure(peer, options):
    names = [n for n in PRECISIONS if n != "TF32" or options.device == "cuda"]
    cases = [Case(peer, name, options) for name in names]
    errors = {case.name: ([], []) for case in cases}
    for seed in tqdm(range(options.draws), desc=peer, disable=options.quiet, leave=False):
        (loss, gradient), *others = (case.values(seed) for case in cases)
        for case, (other_loss, other_gradient) in zip(cases[1:], others, strict=True):
            errors[case.name][0].append(abs(other_loss / loss - 1))
            errors[case.name][1].append(((other_gradient - gradient).norm() / gradient.norm()).item())
    taken = {case.name: [] for case in cases}
    for turn in range(options.repeats + 2):
        for case in cases:
            seconds = timed(case.step, options.device)
            taken[case.name] += [seconds] if turn >= 2 else []
    rows = []
    for name in names:
        loss, gradient = (statistics.median(found) if found else None for found in errors[name])
        rows.append(
            {"peer": peer, "precision": name, "loss": loss, "gradient": gradient, "seconds": spread(taken[name])}
        )
    return rows


def table(result):
    lines = [
        "# Precision",
        "",
        f"Relative errors against float64, medians over {result['settings']['draws']} draws of the noise.",
        "",
    ]
    rows = []
    for r in result["rows"]:
        errors = ["" if r[key] is None else f"{r[key]:.1e}" for key in ("loss", "gradient")]
        rows.append([r["peer"], r["precision"], *errors, duration(r["seconds"])])
    lines += markdown(["peer", "precision", "error of loss", "of gradient", "ms a step, median (quartiles)"], rows)
    return "\n".join([*lines, "", provenance(result).removesuffix(".") + f"; on {result['device']}.", ""])


def main():
    parser = peer_arguments(__doc__)
    parser.add_argument("--particles", type=int, default=50)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.smoke:
        options.particles, options.draws, options.repeats, options.quiet = 3, 2, 2, True
    result = {
        "benchmark": "precision of loss and gradient",
        **surroundings(),
        "device": device_name(options.device),
        "settings": {"particles": options.particles, "draws": options.draws, "repeats": options.repeats},
        "rows": [row for peer in (OURS, EAGER) for row in measure(peer, options)],
    }
    keep(result, table(result), "precision" if options.device == "cpu" else "precision_cuda", options)


if __name__ == "__main__":
    main()
