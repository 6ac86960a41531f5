# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every example runs, says what it should and draws figures; the readers of MNIST's files refuse what is broken."""

import gzip
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def examples(monkeypatch):
    """The examples' folder as Python sees it when it runs one of them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def read_mnist(examples):
    import mnist_files

    return mnist_files.read_mnist


def run(script, *options, processes=None):
    """Runs it, started by torchrun where ``processes`` are asked for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    torchs = "ignore:Implicitly cleaning up:ResourceWarning"  # at the end of a process, before PyTorch 2.7
    environment["PYTHONWARNINGS"] = f"error,{torchs}"  # in processes that are started from there, too
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started_by = torchrun if processes else []
    command = [sys.executable, "-W", "error", "-W", torchs, *started_by, str(script), "--smoke", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def is_blank(figure):
    return np.ptp(matplotlib.image.imread(figure)[..., :3]) < 0.5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example_runs_and_draws(script, tmp_path):
    done = run(script, "--output", tmp_path / "figures of it")
    assert str(tmp_path / "figures of it") in done.stdout
    assert "it/s" in done.stderr or "s/it" in done.stderr or "%|" in done.stderr, "no progress was shown"
    figures = list((tmp_path / "figures of it").glob("*.png"))
    assert figures
    assert [f.name for f in figures if is_blank(f)] == []


@pytest.mark.parametrize(
    "name, options, processes, said",
    [
        ("distributed", (), 2, "2 processes: 1 for data x 2 for particles"),
        pytest.param(
            *("distributed", ("--data-ranks", 2), 2, "2 processes: 2 for data x 1 for particles"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            *("lightning_vae", ("--devices", 2), None, "24 validation digits after 2 epochs"), marks=pytest.mark.nightly
        ),
    ],
    ids=["particles", "data", "lightning"],
)
def test_two_processes(name, options, processes, said, tmp_path):
    """The first alone speaks, and has something to show for its training."""
    script = ROOT / f"examples/{name}.py"
    done = run(script, *options, "--quiet", "--output", tmp_path, processes=processes)
    assert done.stdout.count(said) == 1
    bound, log_evidence = numbers(done)
    assert -500.0 < bound < log_evidence < 0.0  # nats per digit; -510 in the first steps
    figures = list(tmp_path.glob("*.png"))
    assert figures and not any(map(is_blank, figures))


def numbers(done):
    """The bound and log evidence that are printed."""
    return [float(x) for x in re.findall(r"^.*(?:bound|log evidence).*: (-\d+\.\d+)", done.stdout, re.M)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name, options, length, processes",
    [("distributed", (), "--steps", 2), ("lightning_vae", ("--devices", 2), "--epochs", None)],
    ids=["distributed", "lightning"],
)
def test_resumed_run_ends_as_an_unbroken_one(name, options, length, processes, tmp_path):
    def ended(folder, steps, *further):
        script, output = ROOT / f"examples/{name}.py", tmp_path / folder
        further = (*options, *further, "--quiet", length, steps, "--output", output)
        return numbers(run(script, *further, processes=processes))

    unbroken = ended("unbroken", 4)
    assert ended("broken", 2) != unbroken
    assert ended("broken", 4, *(["--resume"] if name == "lightning_vae" else [])) == unbroken


def test_digits_table_of_binary_mnist(tmp_path):
    """The whole main job on a made npz file: the table has every row, in an order that the mathematics forces."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images[:40], x_test=images[40:], y_train=np.zeros(40))
    script = ROOT / "examples/digits_vae.py"
    options = ("--epochs", 1, "--num-particles", 5, "--seed", 3)
    done = run(script, "--data", tmp_path / "mnist.npz", "--output", tmp_path, "--quiet", *options)
    assert done.stderr == ""
    assert "20 held-out digits" in done.stdout
    table = {
        name: [
            float(x) for x in re.findall(rf"^{re.escape(name)} .*?(-\d+\.\d+) ± .*?(-\d+\.\d+) ±", done.stdout, re.M)[0]
        ]
        for name in ("ELBO", "bound, K = 5", "ELBO[q_EW], K = 5, at least", "log evidence, K = 100")
    }
    assert all(a < b for a, b in zip(table["ELBO"], table["bound, K = 5"], strict=True))
    assert all(a < b for a, b in zip(table["bound, K = 5"], table["log evidence, K = 100"], strict=True))
    better = float(re.search(r"is (-?\d+\.\d+) ± \d+\.\d+ nats per digit better", done.stdout)[1])
    assert better == pytest.approx(np.diff(table["log evidence, K = 100"]).item(), abs=0.011)
    assert {f.name for f in tmp_path.glob("*.png")} == {
        "anomalies.png",
        "bound_against_k.png",
        "missing_half.png",
        "reconstructions.png",
    }


def test_area_under_the_curve(examples):
    from digits_vae import auc_per_digit, mean_and_error

    real, odd = torch.randn(50), (torch.randn(50) + 1).round()
    real[:10] = odd[:10]  # ties
    area, error = mean_and_error(auc_per_digit(real, odd))
    assert area == pytest.approx(roc_auc_score([0] * 50 + [1] * 50, torch.cat([real, odd]).numpy()))
    resampled = []
    for _ in range(400):
        rows = torch.randint(50, (50,))
        resampled.append(roc_auc_score([0] * 50 + [1] * 50, torch.cat([real[rows], odd[rows]]).numpy()))
    assert error == pytest.approx(
        np.std(resampled), rel=0.25
    )  # the bootstrap's own error is 1/sqrt(800): seven of them


def test_bound_at_k_is_the_mean_over_blocks(examples):
    from digits_vae import bound_at

    w = torch.tensor([0.0, 1.0, 2.0, 3.0]).log().unsqueeze(1)
    assert bound_at(4, w).exp().item() == pytest.approx(1.5)
    assert bound_at(2, w).item() == pytest.approx(np.log([0.5, 2.5]).mean())
    assert bound_at(3, w).item() == pytest.approx(0.0, abs=1e-6)  # the fourth has no block


# Files

IMAGES = np.arange(7 * 3 * 3, dtype=np.uint8).reshape(7, 3, 3)


def idx(magic=2051, shape=IMAGES.shape):
    return struct.pack(">4I", magic, *shape) + IMAGES.tobytes()[: math.prod(shape)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx_file(read_mnist, tmp_path, pack):
    path = tmp_path / "train-images"
    path.write_bytes(pack(idx()))
    train, test = read_mnist(path)
    assert torch.equal(torch.cat([train, test]), torch.from_numpy(IMAGES))
    assert len(test) == 1 and train.dtype == torch.uint8


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file(read_mnist, tmp_path, save):
    save(tmp_path / "mnist.npz", x_train=IMAGES[:5], x_test=IMAGES[5:], y_train=np.zeros(5))
    train, test = read_mnist(str(tmp_path / "mnist.npz"))
    assert torch.equal(train, torch.from_numpy(IMAGES[:5]))
    assert torch.equal(test, torch.from_numpy(IMAGES[5:]))


BROKEN_IDX = {
    "labels": (idx(magic=2049), "2049; that is a file of labels"),
    "magic": (idx(magic=7), "expected magic number 2051"),
    "empty": (b"", "expected magic number 2051"),
    "header": (idx()[:12], "expected a header of 16 bytes, got 12"),
    "short": (idx()[:-1], "16 + 7 x 3 x 3 bytes, got 78"),
    "long": (idx() + b"0", "got 80"),
    "no images": (idx(shape=(0, 3, 3)), "at least 2 images"),
    "no pixels": (idx(shape=(7, 0, 3)), "of at least one pixel"),
    "oblong": (idx(shape=(7, 9, 1)), "square"),
    "short gzip": (gzip.compress(idx())[:-9], "damaged or truncated"),
    "bad gzip": (b"\x1f\x8b" + bytes(range(60)), "damaged or truncated"),
}


@pytest.mark.parametrize("raw, message", BROKEN_IDX.values(), ids=BROKEN_IDX)
def test_broken_idx_file(read_mnist, tmp_path, raw, message):
    path = tmp_path / "train-images"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_mnist(path)
    assert str(path) in str(raised.value)


BROKEN_NPZ = {
    "keys": ({"train": IMAGES, "x_test": IMAGES}, r"x_train and x_test in .*, got \['train', 'x_test'\]"),
    "floats": ({"x_train": IMAGES / 255, "x_test": IMAGES}, "x_train .* uint8, got .* float64"),
    "flat": ({"x_train": IMAGES, "x_test": IMAGES.reshape(7, 9)}, r"x_test .* \(7, 9\)"),
    "none": ({"x_train": IMAGES, "x_test": IMAGES[:0]}, r"x_test .* \(0, 3, 3\)"),
    "sizes": ({"x_train": IMAGES, "x_test": IMAGES[:, 1:, 1:]}, "of one size"),
    "objects": ({"x_train": IMAGES, "x_test": np.array([{}, None])}, "damaged, truncated or no npz file of arrays"),
}


@pytest.mark.parametrize("arrays, message", BROKEN_NPZ.values(), ids=BROKEN_NPZ)
def test_broken_npz_file(read_mnist, tmp_path, arrays, message):
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_mnist(tmp_path / "mnist.npz")


@pytest.mark.parametrize("keep", [2, 60, 500], ids=lambda n: f"{n} bytes")
def test_truncated_npz_file(read_mnist, tmp_path, keep):
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES, x_test=IMAGES)
    whole = (tmp_path / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="truncated"):
        read_mnist(tmp_path / "mnist.npz")


def test_no_file(read_mnist, tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        read_mnist(tmp_path / "mnist.npz")
