# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Several processes
=================

A variational autoencoder of handwritten digits, its particles shared out over processes; goes on after a crash.

``ImportanceWeightedELBO(K, process_group=...)`` gives each process its part of the K particles, and all of them the
loss and gradient of all K. Data are shared out by torch's DistributedDataParallel, as always; both go together. What
is needed to go on is saved every so many steps, and loaded at the start if it is there::

    torchrun --nproc-per-node=2 examples/distributed.py                      # particles over two processes
    torchrun --nproc-per-node=4 examples/distributed.py --data-ranks 2       # data over two, particles over two
    torchrun --nproc-per-node=2 --max-restarts=3 examples/distributed.py     # goes on after up to three crashes
                                                 # (with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see docs/distributed)
    python examples/distributed.py                                           # one process, which has all particles

Where there is a GPU for each process, each takes one. The data are scikit-learn's 1797 digits of 8 x 8 pixels with
values 0..16: Binomial(16).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pyro_iwae import Checkpoint, ImportanceWeightedELBO, evaluate

BLUE = "#0072B2"  # after Okabe & Ito
plt.rcParams.update({"savefig.dpi": 130, "savefig.bbox": "tight"})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
LEVELS, PIXELS, LATENTS = 16, 64, 20


# %%
# Processes
# ---------
# Those that torchrun has started, in a mesh of data x particles: processes of one row share the particles of the same
# digits, processes of one column have the same part of the particles for other digits.


def begin(data_ranks):
    """The mesh, and the device of this process."""
    local_rank, local_size = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    has_gpu = torch.cuda.device_count() >= local_size
    if has_gpu:
        torch.cuda.set_device(local_rank)
    alone = {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("nccl" if has_gpu else "gloo", **alone)
    size = distributed.get_world_size()
    if size % data_ranks:
        raise SystemExit(f"expected --data-ranks to divide the {size} processes, got {data_ranks}")
    kind = "cuda" if has_gpu else "cpu"
    mesh = init_device_mesh(kind, (data_ranks, size // data_ranks), mesh_dim_names=("data", "particles"))
    return mesh, torch.device(kind, local_rank) if has_gpu else torch.device(kind)


# %%
# Model and guide
# ---------------
# As anyone would write them, but for ``size``, how many digits there are in all: the plate scales the bound of a batch
# by size / len(counts). With the data shared out, each process scales by the length of its own part, so that each one's
# gradient is an unbiased estimate of the full data's. DistributedDataParallel takes the mean of these, which is one,
# too: nothing is to be multiplied by the number of processes.


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
# Training
# --------


class History:
    """The loss at every step, with the two methods by which it gets into the checkpoint."""

    def __init__(self):
        self.losses = []

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])


def batch_of(digits, step, mesh, args):
    """The digits of this process's row. They follow from the step, so that nobody has to keep a place in the data."""
    rows = torch.randperm(len(digits), generator=torch.Generator().manual_seed(args.seed + step))[: args.batch_size]
    return digits[rows.tensor_split(mesh.size(0))[mesh.get_local_rank("data")]]


def train(digits, mesh, args):
    """Trains from where the last run has stopped; returns the VAE, and losses and seconds by step."""
    pyro.set_rng_seed(args.seed)  # the same in all processes, so that parameters begin alike
    vae = VAE().to(digits.device)
    loss = ImportanceWeightedELBO(args.num_particles, process_group=mesh["particles"])(vae.model, vae.guide)
    if mesh.size(0) > 1:
        loss = DistributedDataParallel(loss, process_group=mesh["data"].get_group())
    optim, history = torch.optim.Adam(loss.parameters(), lr=1e-3), History()
    # Processes that share particles draw other ones by themselves, those that have other digits where seeds differ.
    pyro.set_rng_seed(args.seed + mesh.get_local_rank("data"))

    world = distributed.group.WORLD
    checkpoint = Checkpoint(
        args.output / "run.ckpt",
        model=vae.model,
        guide=vae.guide,
        optim=optim,
        further={"history": history},
        process_group=world,
    )
    start = checkpoint.load(digits[:1], len(digits))
    bar = tqdm(range(start, args.steps), desc="train", unit="step", disable=args.quiet or distributed.get_rank() > 0)
    seconds = []
    for step in bar:
        begun = time.monotonic()
        optim.zero_grad()
        value = loss(batch_of(digits, step, mesh, args), len(digits))
        value.backward()
        optim.step()
        history.losses.append(value.item() / len(digits))
        seconds.append(time.monotonic() - begun)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            checkpoint.save(step + 1)
            bar.set_postfix_str(f"{-history.losses[-1]:.1f} nats per digit")
    return vae, history.losses, seconds


def plot_losses(losses, path):
    """Loss at each step, and its mean over the last fifty."""
    fig, ax = plt.subplots(figsize=(7, 4.5))
    values = torch.tensor(losses)
    ax.plot(values, color=BLUE, alpha=0.3, linewidth=1, label="batch of the first process")
    if len(values) > 50:
        ax.plot(range(25, len(values) - 24), values.unfold(0, 50, 1).mean(1), color=BLUE, label="mean of 50 steps")
    ax.set(xlabel="step", ylabel="loss (nats per digit)", ylim=(min(losses) - 5, max(losses[len(losses) // 20 :]) + 5))
    ax.legend(frameon=False)
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--data-ranks", type=int, default=1, help="over how many processes data are shared out")
    parser.add_argument("--steps", type=int, help="default: 2000")
    parser.add_argument("--save-every", type=int, help="steps from one checkpoint to the next; default: 100")
    parser.add_argument("--num-particles", type=int, default=50, help="K in training")
    parser.add_argument("--batch-size", type=int, default=64, help="digits in a step, over all processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("distributed_output"), help="folder for figure and run")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds that shows nothing but that it runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    args.steps = args.steps or (8 if args.smoke else 2000)
    args.save_every = args.save_every or (4 if args.smoke else 100)
    args.output.mkdir(parents=True, exist_ok=True)

    mesh, device = begin(args.data_ranks)
    counts = torch.tensor(load_digits().data, dtype=torch.float, device=device)
    counts = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(args.seed))]
    training, held_out = (counts[:128], counts[-24:]) if args.smoke else (counts[:1437], counts[1437:])

    vae, losses, seconds = train(training, mesh, args)
    found = evaluate(  # by all processes together, whatever the mesh
        vae.model,
        vae.guide,
        held_out,
        len(held_out),
        num_particles=100 if args.smoke else 1000,
        progress=not args.quiet,
        process_group=distributed.group.WORLD,
    )
    if distributed.get_rank() == 0:
        recent, count = torch.tensor(losses[-50:]).mean().item(), len(held_out)
        log_evidence, std_error = found.total.log_evidence / count, found.total.std_error / count
        print(f"\n{distributed.get_world_size()} processes: {mesh.size(0)} for data x {mesh.size(1)} for particles")
        if seconds:  # none where all steps had been taken before
            print(f"{len(seconds)} steps of {1000 * statistics.median(seconds):.1f} ms (median)")
        print(f"training digits, bound at K = {args.num_particles}, last steps: {-recent:.2f} nats per digit")
        print(f"{count} held-out digits, log evidence: {log_evidence:.2f} ± {std_error:.2f} nats per digit")
        plot_losses(losses, args.output / "loss.png")
        print(f"Figure and checkpoint are in {args.output.resolve()}.")


if __name__ == "__main__":
    main()
    # Threads of gloo that are still there when Python ends may abort the process (pytorch/pytorch#179291). They end
    # here, once nothing holds the group.
    gc.collect()
    distributed.destroy_process_group()
