# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Digits, trained with both bounds
================================

A variational autoencoder of handwritten digits, trained twice: one line changes, the loss.

The same VAE is trained with ``Trace_ELBO`` and with ``ImportanceWeightedELBO``. The importance weighted bound implies a
posterior of its own: draw K from the guide, weigh them, keep one by its weight. ``ImportanceResampledGuide`` is that
posterior as a Pyro guide. Here it reconstructs digits, fills the missing half of some and scores damaged ones, after
"Reinterpreting Importance-Weighted Autoencoders" (Cremer, Morris, Duvenaud 2017, https://arxiv.org/abs/1704.02916)::

    python examples/digits_vae.py                                      # about two minutes on two cores
    python examples/digits_vae.py --data train-images-idx3-ubyte.gz    # MNIST, also as mnist.npz; slower

The data are scikit-learn's 1797 digits of 8 x 8 pixels with values 0..16: Binomial(16). MNIST's 0..255 are made binary
once, each pixel 1 with probability value/255 (Burda, Grosse, Salakhutdinov 2016): Binomial(1), that is Bernoulli.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from mnist_files import read_mnist
from pyro.infer import SVI, Predictive, Trace_ELBO
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve
from torch import nn
from tqdm import tqdm

from pyro_iwae import ImportanceResampledGuide, ImportanceWeightedELBO, LogWeights

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"  # after Okabe & Ito
plt.rcParams.update({"savefig.dpi": 130, "savefig.bbox": "tight"})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


# %%
# Data
# ----
# Training and held-out digits as rows of counts, and the number of levels that a pixel can rise to.


def scikit_digits(seed):
    """1437 training digits, 360 held out, 16 levels."""
    counts = torch.tensor(load_digits().data, dtype=torch.float)
    counts = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))]
    return counts[:1437], counts[1437:], 16


def mnist_digits(path, seed):
    """Binary training digits, 200 held out (of more, for time), 1 level."""
    draw = torch.Generator().manual_seed(seed)
    train, test = ((x / 255).bernoulli(generator=draw).flatten(1) for x in read_mnist(path))
    return train, test[:200], 1


# %%
# Model and guide
# ---------------
# As anyone would write them in Pyro. Every latent lies in the plate "digits", so each digit gets its own log-mean-exp
# over particles. ``seen`` masks pixels that are not observed: the model drops their terms, the guide gets wider by the
# share that is missing (weights put right a guide that is too wide, not one that is too narrow).


def mlp(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )


class VAE(nn.Module):
    def __init__(self, name, pixels, levels, latents, hidden=100):
        super().__init__()
        self.name, self.levels, self.latents = name, levels, latents
        self.encoder = mlp(pixels, hidden, 2 * latents)
        self.decoder = mlp(latents, hidden, pixels)

    def model(self, counts, seen=True):
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("digits", len(counts)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.deterministic("brightness", self.levels * logits.sigmoid(), event_dim=1)
            pixels = dist.Binomial(self.levels, logits=logits).mask(seen).to_event(1)
            pyro.sample("pixels", pixels, obs=counts)

    def guide(self, counts, seen=True):
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("digits", len(counts)):
            loc, log_scale = self.encoder(counts / self.levels).chunk(2, dim=-1)
            share_seen = torch.as_tensor(seen, dtype=counts.dtype).mean()
            pyro.sample("z", dist.Normal(loc, log_scale.exp() / share_seen).to_event(1))

    def latents_in_use(self, counts):
        """Latents whose mean has a variance over digits above 0.01 (Burda et al. 2016)."""
        return int((self.encoder(counts / self.levels)[:, : self.latents].var(0) > 0.01).sum())


# %%
# Training
# --------
# ``loss`` is the only thing that differs between the two runs.


def train(loss, digits, levels, args, progress):
    pyro.set_rng_seed(args.seed)
    vae = VAE(type(loss).__name__, digits.shape[1], levels, args.latents)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    epochs = progress(range(args.epochs), desc=f"train with {vae.name}", unit="epoch")
    for _ in epochs:
        total = sum(svi.step(digits[rows]) for rows in torch.randperm(len(digits)).split(64))
        epochs.set_postfix_str(f"{-total / len(digits):.2f} nats per digit")
    return vae


# %%
# What held-out digits say
# ------------------------
# All but the interval is read off one tensor, the log weights: their mean is the ELBO, their log-mean-exp over blocks
# of K the bound, and over all of them the log evidence (strictly the bound at K = 2000; the figure shows it level out).
# Latents in use are those whose mean the encoder moves from digit to digit: the ELBO leaves many idle. The ELBO also
# learns more slowly: it is about 5 nats behind after 200 epochs and 2 to 4 after 400 (for other seeds and splits too).
# With 10 latents it is 3 to 5 nats behind; 20 were chosen after seeing that.


def log_weights(vae, digits, particles, progress):
    """Log weights: (particles, digits)."""
    elbo = ImportanceWeightedELBO(num_particles=particles)
    parts = progress(digits.split(20), desc=f"evidence, {vae.name}", unit="part", leave=False)
    return torch.cat([elbo.log_weights(vae.model, vae.guide, part).log_weights for part in parts], dim=1)


def bound_at(particles, log_weights):
    """The bound at K per digit: the mean over disjoint blocks of K particles."""
    blocks = log_weights[: len(log_weights) // particles * particles].unflatten(0, (-1, particles))
    return torch.stack([LogWeights(block, plates=("digits",)).bound() for block in blocks]).mean(0)


def mean_and_error(per_digit):
    """Mean over digits and its standard error, which holds the Monte Carlo error too: digits are independent."""
    return per_digit.mean().item(), (per_digit.std() / math.sqrt(len(per_digit))).item()


def held_out_table(vaes, weights, digits, args):
    """Prints the table and the difference in evidence."""
    K, rows = args.num_particles, {}
    for vae, w in zip(vaes, weights, strict=True):
        posterior = ImportanceResampledGuide(vae.model, vae.guide, num_particles=K)
        interval = posterior.elbo_interval(digits, num_batches=16, num_replicates=2)
        rows.setdefault("ELBO", []).append(bound_at(1, w))
        rows.setdefault(f"bound, K = {K}", []).append(bound_at(K, w))
        rows.setdefault(f"ELBO[q_EW], K = {K}, at least", []).append(interval.lower)
        rows.setdefault(f"ELBO[q_EW], K = {K}, at most", []).append(interval.upper)
        rows.setdefault(f"log evidence, K = {len(w)}", []).append(bound_at(len(w), w))
    print(f"\n{len(digits)} held-out digits: nats per digit, ± standard error over digits\n")
    print(f"{'trained with':32}" + "".join(f"{vae.name:>26}" for vae in vaes))
    for row, values in rows.items():
        print(f"{row:32}" + "".join("{:>19.2f} ± {:.2f}".format(*mean_and_error(v)) for v in values))
    in_use = "".join(f"{vae.latents_in_use(digits):>26}" for vae in vaes)
    print(f"{f'latents in use, of {vaes[0].latents}':32}{in_use}")
    gain, error = mean_and_error(values[1] - values[0])
    print(f"\n{vaes[1].name} is {gain:.2f} ± {error:.2f} nats per digit better in log evidence (paired by digit).\n")


def plot_bounds(vaes, weights, path):
    """The bound against K."""
    ladder = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if k <= len(weights[0])]
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for vae, w, colour, marker in zip(vaes, weights, (ORANGE, BLUE), "so", strict=True):
        mean, error = zip(*(mean_and_error(bound_at(k, w)) for k in ladder), strict=True)
        ax.errorbar(ladder, mean, error, color=colour, marker=marker, capsize=3, label=f"trained with {vae.name}")
        ax.axhline(mean[-1], color=colour, linestyle=":", linewidth=1)
        ax.annotate(f"log evidence {mean[-1]:.1f}", (1, mean[-1]), (0, 4), textcoords="offset points", color=colour)
    ax.set(xscale="log", xlabel="particles K", ylabel="held-out bound (nats per digit)")
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_title("Bars: ± one standard error over digits", fontsize=10)
    ax.legend(loc="lower right", frameon=False)
    fig.savefig(path)


# %%
# The posterior through ``Predictive``
# ------------------------------------
# ``ImportanceResampledGuide`` goes wherever a guide goes. Each draw has K particles of its own.


def draw_brightness(vae, guide, draws, counts, seen):
    """Expected pixel values under draws from the posterior: (draws, digits, pixels)."""
    predictive = Predictive(vae.model, guide=guide, num_samples=draws, parallel=True, return_sites=["brightness"])
    return torch.cat([predictive(part, seen)["brightness"] for part in counts.split(10)], dim=1)


def reconstruct(vae, digits, args, path):
    """Reconstructions from q and from q_EW side by side."""
    resampled = ImportanceResampledGuide(vae.model, vae.guide, num_particles=args.num_particles)
    rows = [("held-out digits", digits)]
    for name, guide in (("q", vae.guide), (f"q_EW, K = {args.num_particles}", resampled)):
        images = draw_brightness(vae, guide, 10, digits, seen=True)
        fit = dist.Binomial(vae.levels, probs=images / vae.levels).log_prob(digits).sum(-1).mean(0)
        print("log p(digit | z), z from {:14} {:7.2f} ± {:.2f} nats per digit".format(name, *mean_and_error(fit)))
        rows += [("", images[0]), (f"three draws from {name}", images[1]), ("", images[2])]
    plot_images(rows, vae.levels, path)


def fill_missing_half(vae, digits, mean_image, args, path):
    """Fills the lower half. The encoder knows only whole digits, so it is shown the mean image there."""
    side = math.isqrt(digits.shape[1])
    seen = torch.arange(side**2) < side // 2 * side
    shown = torch.where(seen, digits, mean_image.round())
    resampled = ImportanceResampledGuide(vae.model, vae.guide, num_particles=4 * args.num_particles)
    fillings, single = {"mean image": mean_image.expand_as(digits)}, {}
    for name, guide in (("q", vae.guide), (f"q_EW, K = {resampled.num_particles}", resampled)):
        images = draw_brightness(vae, guide, 50, shown, seen)
        fillings[f"mean of 50 draws from {name}"], single[f"draw from {name}"] = images.mean(0), images[0]
    print(f"\nMissing half of {len(digits)} digits: rms error per pixel (0 to {vae.levels}), ± standard error\n")
    for name, filling in fillings.items():
        square, error = mean_and_error(((filling - digits)[:, ~seen] ** 2).mean(1))
        print(f"filled by {name:38} {math.sqrt(square):.3f} ± {error / (2 * math.sqrt(square)):.3f}")
    rows = [(name, torch.where(seen, digits, filling)) for name, filling in {**fillings, **single}.items()]
    plot_images([("held-out digits", digits), *rows], vae.levels, path, hidden_from=side // 2)


# %%
# Anomalies
# ---------
# A digit is as odd as its log evidence is low. Its ELBO is lower still where the guide is bad, and the guide is bad on
# digits unlike those that it was trained on: for this job a loose bound is no disadvantage, as the last column shows.


def damaged(digits, seed):
    """Damaged copies by kind of damage."""
    draw = torch.Generator().manual_seed(seed)
    side = math.isqrt(digits.shape[1])
    images = digits.reshape(-1, side, side)
    noisy, middle = images.clone(), slice(side // 2 - side // 8, side // 2 + side // 8)
    levels = int(digits.max())
    noisy[:, middle, middle] = torch.randint(levels + 1, noisy[:, middle, middle].shape, generator=draw).float()
    kinds = {"upside down": images.flip(1), "mirrored": images.flip(2), "noise in the middle": noisy}
    return {kind: copies.flatten(1) for kind, copies in kinds.items()}


def auc_per_digit(real, odd):
    """Each digit's part in the area under the ROC curve: their mean is the area, their spread gives its standard error.

    The placement values of DeLong, DeLong & Clarke-Pearson (1988), of a digit and its damaged copy together: the two
    are not independent.
    """
    wins = (odd > real[:, None]).double() + 0.5 * (odd == real[:, None])
    return wins.mean(0) + wins.mean(1) - wins.mean()


def score_anomalies(vaes, weights, digits, args, progress, path):
    """Prints the area under the ROC curve, scored by the ELBO and by the evidence."""
    particles = min(500, args.evidence_particles)
    print(f"\nDamaged digits: area under the ROC curve, ± standard error (evidence with K = {particles})\n")
    print(f"{'trained with':20}" + "".join(f"{vae.name:>32}" for vae in vaes) + f"{'evidence':>16}")
    print(f"{'scored by':20}" + f"{'ELBO':>16}{'evidence':>16}" * len(vaes) + f"{'minus ELBO':>16}")
    scores = {}
    for kind, copies in damaged(digits, args.seed).items():
        areas = []
        for vae, real in zip(vaes, weights, strict=True):
            odd = log_weights(vae, copies, particles, progress)
            for score, k in (("ELBO", 1), ("evidence", particles)):
                scores[kind, score] = -bound_at(k, real[:particles]), -bound_at(k, odd)
                areas.append(auc_per_digit(*scores[kind, score]))
        areas.append(areas[-1] - areas[-2])
        print(f"{kind:20}" + "".join("{:>8.3f} ± {:.3f}".format(*mean_and_error(area)) for area in areas))
    plot_anomalies(scores, vaes[-1].name, path)


def plot_anomalies(scores, name, path):
    """Histogram of the evidence, and the ROC curve by both scores."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    bins = np.histogram_bin_edges(torch.cat([odd for _, odd in scores.values()]).numpy(), 60)
    colours = {"upside down": ORANGE, "mirrored": GREEN, "noise in the middle": PINK}
    for (kind, score), (real, odd) in scores.items():
        false, true, _ = roc_curve(np.repeat([0, 1], len(real)), torch.cat([real, odd]).numpy())
        line = "-" if score == "evidence" else "--"
        right.plot(false, true, line, color=colours[kind], label=f"{kind}, by {score}")
        if score == "evidence":
            left.hist(odd.numpy(), bins, histtype="step", color=colours[kind], linewidth=1.5, label=kind)
    left.hist(real.numpy(), bins, color=GREY, alpha=0.4, label="held-out digits")
    left.set(xlabel="minus log evidence (nats)", ylabel="number of digits")
    right.set(xlabel="share of held-out digits called odd", ylabel="share of damaged digits found", aspect="equal")
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=9)
    fig.suptitle(f"Scored by the VAE trained with {name}", fontsize=10)
    fig.savefig(path)


# %%
# Pictures, and the whole


def plot_images(rows, levels, path, columns=12, hidden_from=None):
    """One row of images for each (label, images)."""
    side = math.isqrt(rows[0][1].shape[1])
    fig, axes = plt.subplots(len(rows), 1, figsize=(0.7 * columns + 2, 0.75 * len(rows)))
    for ax, (label, images) in zip(axes, rows, strict=True):
        strip = nn.functional.pad(images[:columns].reshape(-1, side, side), (0, 1), value=math.nan)
        ax.imshow(strip.permute(1, 0, 2).flatten(1).numpy(), cmap="gray_r", vmin=0, vmax=levels)
        if hidden_from is not None:
            ax.axhline(hidden_from - 0.5, color=ORANGE, linewidth=1)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[], frame_on=False)
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--data", help="MNIST instead of scikit-learn's digits: an idx (gzipped or not) or npz file")
    parser.add_argument("--epochs", type=int, help="default: 200, or 5 with --data")
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--num-particles", type=int, default=50, help="K, in training and in the resampled guide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits_vae_output"), help="folder for the figures")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds that shows nothing but that it runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    args.evidence_particles = max(args.num_particles, 100 if args.smoke else 2000)
    if args.epochs is None:
        args.epochs = 2 if args.smoke else 5 if args.data else 200
    args.output.mkdir(parents=True, exist_ok=True)
    progress, start = partial(tqdm, disable=args.quiet), time.monotonic()

    training, held_out, levels = mnist_digits(args.data, args.seed) if args.data else scikit_digits(args.seed)
    if args.smoke:
        training, held_out = training[:128], held_out[:24]
    losses = Trace_ELBO(), ImportanceWeightedELBO(num_particles=args.num_particles)
    vaes = [train(loss, training, levels, args, progress) for loss in losses]
    with torch.no_grad():
        pyro.set_rng_seed(args.seed)
        weights = [log_weights(vae, held_out, args.evidence_particles, progress) for vae in vaes]
        held_out_table(vaes, weights, held_out, args)
        plot_bounds(vaes, weights, args.output / "bound_against_k.png")
        reconstruct(vaes[-1], held_out, args, args.output / "reconstructions.png")
        fill_missing_half(vaes[-1], held_out[:100], training.mean(0), args, args.output / "missing_half.png")
        score_anomalies(vaes, weights, held_out, args, progress, args.output / "anomalies.png")
    print(f"\nFigures are in {args.output.resolve()} ({time.monotonic() - start:.0f} seconds in all).")


if __name__ == "__main__":
    main()
