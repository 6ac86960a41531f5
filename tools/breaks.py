# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Breaks the library on purpose, in one place at a time, and sees whether the tests notice.

    python tools/breaks.py [NUMBER ...]

Each break is made in a copy of what is committed, and tried on the test files that are named with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Break:
    """One line, and what stands in its place."""

    file: str
    right: str
    wrong: str
    tests: str  # names of test files

    def caught(self, copy: Path) -> bool:
        """Whether the tests fail with it."""
        path = copy / "pyro_iwae" / self.file
        text = path.read_text()
        if text.count(self.right) != 1:
            raise ValueError(f"expected {self.right!r} once in {self.file}, got it {text.count(self.right)} times")
        path.write_text(text.replace(self.right, self.wrong))
        files = [f"tests/test_{name}.py" for name in self.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", *files]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HYPOTHESIS_PROFILE": "unshrunk"}
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, check=False, env=environment, text=True)
            if done.returncode != 0 and " failed" not in done.stdout:
                raise RuntimeError(f"the tests of {self.wrong!r} did not run:\n{done.stdout}{done.stderr}")
            return done.returncode != 0
        finally:
            path.write_text(text)


BREAKS = [
    Break(
        "totals.py",
        "(self.largest + (self.log_excess - math.log(self.count))) / self.power",
        "(self.largest + self.log_excess) / self.power",
        "logweights objectives",
    ),
    Break(
        "totals.py",
        "return share * ((1.0 - scale) + scale * share)",
        "return share * ((1.0 - scale) + scale * share.sqrt())",
        "objectives gradients",
    ),
    Break(
        "totals.py",
        "rest = torch.logaddexp(torch.logaddexp(*rests), smaller - origin)",
        "rest = torch.logaddexp(*rests)",
        "logweights numerics chunks",
    ),
    Break(
        "totals.py",
        "exact = (one - others) / self.power - balance * one",
        "exact = (one + others) / self.power - balance * one",
        "objectives numerics gradients",
    ),
    Break(
        "totals.py",
        "exact = (one - others) / self.power - balance * one",
        "exact = (one - others) / self.power",
        "objectives numerics gradients",
    ),
    Break(
        "totals.py",
        "log_mean = others - math.log(self.count - 1)",
        "log_mean = others - math.log(self.count)",
        "objectives numerics gradients",
    ),
    Break(
        "totals.py",
        "return (self.total - log_weights.detach()) / (self.count - 1)",
        "return self.total / self.count",
        "objectives",
    ),
    Break(
        "totals.py",
        "others = torch.where((terms == self.largest) & self.largest.isfinite(), self.rest - self.log_excess, others)",
        "others = others",
        "numerics logweights",
    ),
    Break(
        "totals.py",
        "ties = is_largest.sum(0, dtype=terms.dtype) - 1.0",
        "ties = is_largest.sum(0, dtype=terms.dtype) * 0.0",
        "numerics logweights",
    ),
    Break(
        "logweights.py",
        "value = torch.where(impossible, 1.0, total).log() + origin - math.log(self.num_particles)",
        "value = torch.where(impossible, 1.0, total).log() + origin",
        "logweights elbo",
    ),
    Break(
        "logweights.py",
        "total = (self.scale * per_element).sum()",
        "total = per_element.sum()",
        "logweights plates elbo",
    ),
    Break(
        "logweights.py",
        "return sum((value.sum() for value in self.constant.values()), start=total)",
        "return total",
        "logweights elbo plates",
    ),
    Break(
        "terms.py",
        'return Term(role, name, value if role == "model" else -value, None,',
        "return Term(role, name, value, None,",
        "fuzz elbo",
    ),
    Break(
        "terms.py",
        'value = layout.columns(-scale_and_mask(parts.log_prob, scale, site["mask"]))',
        "value = layout.columns(-scale_and_mask(parts.log_prob, scale, None))",
        "masks fuzz",
    ),
    Break(
        "terms.py",
        "return own * math.prod(plate_scale(f) for f in layout.outer_frames(site))",
        "return own",
        "elbo fuzz plates",
    ),
    Break(
        "terms.py",
        "layout.columns(parts.score_function), -value - entropy, scale)",
        "layout.columns(parts.score_function), -value, scale)",
        "gradients elbo fuzz",
    ),
    Break(
        "weighing.py",
        "scale=layouts[0].scale * (1.0 if common is None else common),",
        "scale=layouts[0].scale,",
        "fuzz plates elbo",
    ),
    Break(
        "weighing.py",
        "scale=layouts[0].scale * (1.0 if common is None else common),",
        "scale=1.0 if common is None else common,",
        "fuzz plates elbo",
    ),
    Break(
        "weighing.py",
        "node = replace(node, scale=layouts[i].scale / parent.scale)",
        "node = replace(node, scale=layouts[i].scale)",
        "plate_tree",
    ),
    Break(
        "weighing.py",
        "tempered=any(not same_scale(own_scale(s), 1.0) for s in sites),",
        "tempered=False,",
        "plates evaluate guide",
    ),
    Break(
        "gradients/gradient.py",
        "surrogate = surrogate + (objective.slope(weights.log_weights) * weights.score_log_q).sum(0)",
        "pass",
        "gradients elbo fuzz",
    ),
    Break(
        "gradients/gradient.py",
        "log_left = torch.logaddexp(log_left, reach.log_others - math.log(node.num_particles - 1))",
        "pass",
        "plate_tree",
    ),
    Break(
        "gradients/gradient.py",
        "advantage = advantage + (1.0 - node.score_scale) * math.log1p(-1.0 / reach.count)",
        "advantage = advantage + math.log1p(-1.0 / reach.count)",
        "plate_tree",
    ),
    Break(
        "gradients/coefficients.py",
        "along = along - part(self.path, cut.log_q)",
        "along = along + part(self.path, cut.log_q)",
        "gradients cut fuzz",
    ),
    Break(
        "gradients/coefficients.py",
        "further = further - _part(node, reach.slope, node.cut.log_q).sum()",
        "further = further + _part(node, reach.slope, node.cut.log_q).sum()",
        "plate_tree",
    ),
    Break(
        "gradients/coefficients.py",
        "factors = [(1.0 - scale) + scale * reach.share for reach in nodes]",
        "factors = [reach.slope for reach in nodes]",
        "plate_tree",
    ),
    Break(
        "gradients/sampled_backward.py",
        "count = torch.where(mass > 0.0, times * total.movedim(-1, 0) / (draws * mass), 0.0)",
        "count = torch.where(mass > 0.0, times * total.movedim(-1, 0) / draws, 0.0)",
        "sampled_backward",
    ),
    Break(
        "gradients/ovis.py",
        "balances = True",
        "balances = False",
        "gradients objectives fuzz",
    ),
    Break(
        "gradients/stick_the_landing.py",
        "log_q=None, score=guide",
        "log_q=model, score=guide",
        "gradients cut",
    ),
    Break(
        "resampling.py",
        "return (log_weights - exponential.log()).argmax(0)",
        "return (log_weights + exponential.log()).argmax(0)",
        "resampling",
    ),
    Break(
        "resampling.py",
        "return multinomial(log_weights), torch.rand_like(share) < share, total",
        "return multinomial(log_weights), torch.rand_like(share) < 0.5, total",
        "resampling chunks_guide",
    ),
    Break(
        "resampling.py",
        "return index.gather(0, torch.rand(draws, *shape, device=device).argsort(0))",
        "return index",
        "resampling",
    ),
    Break(
        "density.py",
        "return log_p + math.log(num_particles / companions.shape[0]) + inverse.logsumexp(1)",
        "return log_p + math.log(1.0 / companions.shape[0]) + inverse.logsumexp(1)",
        "guide_density",
    ),
    Break(
        "density.py",
        "lower = math.log((num_batches + 1) / num_particles) - torch.logaddexp(-with_own, fresh)",
        "lower = math.log(num_batches / num_particles) - torch.logaddexp(-with_own, fresh)",
        "plate_tree guide_density",
    ),
    Break(
        "density.py",
        "upper = ((batches - 1.0) / num_particles).log() - inverse",
        "upper = (batches / num_particles).log() - inverse",
        "brackets evaluate",
    ),
    Break(
        "diagnostics.py",
        "relative.exp().sum(0) ** 2 / (2.0 * relative).exp().sum(0)",
        "relative.exp().sum(0) / (2.0 * relative).exp().sum(0)",
        "diagnostics",
    ),
    Break(
        "diagnostics.py",
        "return min(1.0 - 1.0 / math.log10(count), 0.7)",
        "return min(1.0 - 1.0 / math.log(count), 0.7)",
        "diagnostics",
    ),
    Break(
        "diagnostics.py",
        "return -torch.expm1(draws * torch.log1p(-share.clamp(max=1.0))).sum(0)",
        "return -torch.expm1(-draws * share).sum(0)",
        "diagnostics",
    ),
    Break(
        "evidence.py",
        "found[1] = totals.value - (count - 1) * (without_one",
        "found[1] = totals.value - count * (without_one",
        "evidence",
    ),
    Break(
        "evidence.py",
        "return torch.where(whole == -math.inf, 0.0, whole - (first + second) / 2.0)",
        "return torch.where(whole == -math.inf, 0.0, whole - first)",
        "evidence numerics",
    ),
    Break(
        "estimates.py",
        "apart / (count * (count - 1.0)).sqrt()",
        "apart / count",
        "estimates evaluate",
    ),
    Break(
        "estimates.py",
        "corrected = count * whole - (count - 1.0)",
        "corrected = whole + 0.0 * (count - 1.0)",
        "estimates evaluate",
    ),
    Break(
        "estimates.py",
        "student_quantile(0.5 + level / 2.0, int(n) - 1)",
        "student_quantile(0.5 + level / 2.0, int(n))",
        "estimates evaluate",
    ),
    Break(
        "objectives/ciwae.py",
        "return self.beta * elbo + (1.0 - self.beta) * bound",
        "return (1.0 - self.beta) * elbo + self.beta * bound",
        "objectives",
    ),
    Break(
        "objectives/tvo.py",
        "pull = 1.0 + self.beta * (log_weights - self.origin - self.mean)",
        "pull = 1.0 + (log_weights - self.origin - self.mean)",
        "objectives numerics",
    ),
    Break(
        "objectives/miwae.py",
        "return self._own(log_weights).slope(log_weights) / self.groups",
        "return self._own(log_weights).slope(log_weights)",
        "objectives",
    ),
    Break(
        "crossing.py",
        "return torch.where(moved.to(value.device), value.roll(-1, 0) if others is None else others, value)",
        "return value",
        "plates vectorization",
    ),
    Break(
        "subsampling.py",
        "if any(counts[node] > 1 for node in around):",
        "if False:",
        "plates errors",
    ),
    Break(
        "expectation.py",
        "part = part + (way.align(share) * way.value.unsqueeze(0)).squeeze(0)",
        "part = part + way.value",
        "expectation chunks_guide",
    ),
    Break(
        "reach.py",
        "apart = laid(self.apart) * own.exp()",
        "apart = own.exp()",
        "plate_tree",
    ),
    Break(
        "selection.py",
        "density = difference(log_p, held.log_sum - math.log(num_particles))",
        "density = difference(log_p, held.log_sum)",
        "guide guide_density chunks_guide",
    ),
    Break(
        "plates.py",
        "return float(frame.full_size) / float(frame.size)",
        "return float(frame.size) / float(frame.full_size)",
        "plates fuzz",
    ),
    Break(
        "updates.py",
        "value = value * (1.0 - lr * decay)",
        "value = value * (1.0 - decay)",
        "compiled_svi",
    ),
    Break(
        "ways.py",
        "        if refuse_masked:\n",
        "        if False:\n",
        "cut masks",
    ),
    Break(
        "gradient_snr.py",
        "error / (2.0 * ratio)",
        "error / ratio",
        "gradient_snr",
    ),
    Break(
        "gradient_snr.py",
        "self.squares[name] / (self.count - 1)",
        "self.squares[name] / self.count",
        "gradient_snr",
    ),
    Break(
        "parts.py",
        "return found[:length], floor",
        "return found[:length], torch.full_like(floor, -math.inf)",
        "evaluate_edges",
    ),
    Break(
        "switches.py",
        "return max(-1, min(int(value), MOST_COUNTED))",
        "return bool(value)",
        "switches",
    ),
    Break(
        "evaluating.py",
        "cache.doubt()",
        "pass",
        "switches",
    ),
    Break(
        "compiled.py",
        "arguments.kind, tied, options",
        "arguments.kind, options",
        "switches",
    ),
    Break(
        "expectation.py",
        "torch.where(weights == 0.0, 0.0, weights * values)",
        "weights * values",
        "expectation",
    ),
    Break(
        "density.py",
        "torch.where(log_p == -math.inf, -math.inf, found)",
        "found",
        "guide_density",
    ),
    Break(
        "diagnostics.py",
        "torch.where(impossible, 0.0, found)",
        "found.nan_to_num(nan=0.0)",
        "diagnostics",
    ),
]


def main() -> None:
    chosen = [int(n) for n in sys.argv[1:]] or list(range(len(BREAKS)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
        missed, bar = [], tqdm(chosen, unit="break")
        for number in bar:
            if not BREAKS[number].caught(copy):
                missed.append(number)
            bar.set_postfix_str(f"missed {missed}")
    for number in missed:
        print(f"{number}: {BREAKS[number].file}: {BREAKS[number].wrong}")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")


if __name__ == "__main__":
    main()
