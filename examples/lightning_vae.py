# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
With Lightning
==============

A variational autoencoder of handwritten digits as a LightningModule, over one process or several.

``ImportanceWeightedELBO(K)(model, guide)`` is a torch module that returns the loss. So it goes where Lightning wants a
loss, and Lightning does the rest: epochs, checkpoints, and data shared out over processes (each has its own digits and
all K particles of each of them; ``examples/distributed.py`` shares out the particles)::

    python examples/lightning_vae.py                                 # about two minutes on two cores
    python examples/lightning_vae.py --devices 2                     # Lightning starts the second process
    python examples/lightning_vae.py --devices 2 --resume            # goes on from the last epoch that was saved

The data are scikit-learn's 1797 digits of 8 x 8 pixels with values 0..16: Binomial(16).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from pyro_iwae import ImportanceWeightedELBO, evaluate

try:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
except ImportError as error:
    raise ImportError('this example needs Lightning; pip install "pyro-iwae[lightning]"') from error

# What Lightning warns of that is as it should be here.
warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # Lightning calls what torch has renamed
warnings.filterwarnings("ignore", ".*does not have many workers")  # 1437 digits in memory need none
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run goes on in it

BLUE, ORANGE = "#0072B2", "#D55E00"  # after Okabe & Ito
plt.rcParams.update({"savefig.dpi": 130, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False})
LEVELS, PIXELS, LATENTS = 16, 64, 20


# %%
# Model and guide
# ---------------
# As anyone would write them, but for ``size``, how many digits there are in all: the plate scales a batch's bound by
# size / len(counts). Under DDP each process does so with a batch of its own. Each one's gradient is then an unbiased
# estimate of the full data's, and so is DDP's mean over processes: nothing is to be multiplied by their number.


def mlp(*widths):
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = mlp(PIXELS, 100, 100, 2 * LATENTS)
        self.decoder = mlp(LATENTS, 100, 100, PIXELS)

    def model(self, counts, size):
        with pyro.plate("digits", size, subsample=torch.arange(len(counts))):
            z = pyro.sample("z", dist.Normal(counts.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("pixels", dist.Binomial(LEVELS, logits=self.decoder(z)).to_event(1), obs=counts)

    def guide(self, counts, size):
        with pyro.plate("digits", size, subsample=torch.arange(len(counts))):
            loc, log_scale = self.encoder(counts / LEVELS).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# %%
# What Lightning trains
# ---------------------
# The loss is a module that has the VAE's parameters. Validation calls the same, as if the batch were all there is.


class LightningVAE(lightning.LightningModule):
    def __init__(self, num_particles, size, seed):
        super().__init__()
        self.vae = VAE()
        self.elbo_module = ImportanceWeightedELBO(num_particles)(self.vae.model, self.vae.guide)
        self.size, self.seed, self.history = size, seed, {"training": [], "validation": []}

    def training_step(self, batch):
        # Lightning seeds all processes alike, and a resumed run as it was seeded at the start: noise would come twice.
        pyro.set_rng_seed(self.seed + self.global_step * self.trainer.world_size + self.global_rank)
        loss = self.elbo_module(batch, self.size)
        self.log("training", -loss / self.size, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch):
        bound = -self.elbo_module(batch, len(batch)) / len(batch)
        self.log("validation", bound, prog_bar=True, sync_dist=True, batch_size=len(batch))

    def on_train_epoch_end(self):  # comes after the epoch's validation
        for name, values in self.history.items():
            values.append(float(self.trainer.callback_metrics[name]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint):
        self.history = checkpoint["history"]


# %%
# Training, and what held-out digits say


def plot_history(history, evidence, path):
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for name, colour in (("training", BLUE), ("validation", ORANGE)):
        ax.plot(range(1, len(history[name]) + 1), history[name], color=colour, label=f"{name} digits")
    ax.axhline(evidence, color=ORANGE, linestyle=":", linewidth=1, label="validation digits, log evidence")
    ax.set_ylim(bottom=history["validation"][len(history["validation"]) // 20] - 5)  # the first would squeeze the rest
    ax.set(xlabel="epoch", ylabel="bound (nats per digit)")
    ax.legend(loc="lower right", frameon=False)
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--devices", type=int, default=1, help="how many processes share out the data")
    parser.add_argument("--epochs", type=int, help="default: 100")
    parser.add_argument("--num-particles", type=int, default=50, help="K in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint under --output")
    parser.add_argument("--output", type=Path, default=Path("lightning_vae_output"), help="folder for figure and run")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds that shows nothing but that it runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    args.epochs = args.epochs or (2 if args.smoke else 100)
    if args.quiet:
        for part in ("pytorch", "fabric"):
            logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)

    counts = torch.tensor(load_digits().data, dtype=torch.float)
    counts = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(args.seed))]
    training, validation = (counts[:128], counts[-24:]) if args.smoke else (counts[:1437], counts[1437:])

    lightning.seed_everything(args.seed, verbose=False)  # all processes begin with the same parameters
    module = LightningVAE(args.num_particles, len(training), args.seed)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        callbacks=[ModelCheckpoint(args.output, filename="run", enable_version_counter=False)],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    trainer.fit(
        module,
        DataLoader(training, batch_size=64 // args.devices, shuffle=True),  # Lightning gives each process its own rows
        DataLoader(validation, batch_size=60),
        ckpt_path=args.output / "run.ckpt" if args.resume else None,
        weights_only=True,
    )
    if trainer.is_global_zero:  # the others are done
        model, guide, history = module.vae.model, module.vae.guide, module.history
        K, count = 100 if args.smoke else 1000, len(validation)
        total = evaluate(model, guide, validation, count, num_particles=K, progress=not args.quiet).total
        print(f"\n{count} validation digits after {len(history['training'])} epochs: nats per digit")
        print(f"bound, K = {args.num_particles}: {history['validation'][-1]:.2f}")
        print(f"log evidence: {total.log_evidence / count:.2f} ± {total.std_error / count:.2f}")
        plot_history(history, total.log_evidence / count, args.output / "lightning_vae.png")
        print(f"Figure and checkpoint are in {args.output.resolve()}.")


if __name__ == "__main__":
    main()
