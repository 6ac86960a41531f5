# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Reads the files that MNIST comes in, and files of other images in the same formats."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

IMAGES, LABELS = 2051, 2049  # magic numbers of idx files


def read_mnist(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images of an npz or idx file, whichever its contents say.

    Args:
        path: an npz file with ``x_train`` and ``x_test``, as Keras' mnist.npz, or an idx file of images, gzipped or
            not, as train-images-idx3-ubyte.gz, whose last sixth is taken for the test.

    Returns:
        Two tensors (images, rows, columns) of uint8.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is damaged, truncated, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an idx or npz file of images, found no file {path}")
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        train, test = read_npz(path, raw)
    else:
        images = read_idx(path, raw)
        count = max(1, len(images) // 6)
        train, test = images[:-count], images[-count:]
    if train.shape[1] != train.shape[2]:
        raise ValueError(f"expected square images in {path}, got {tuple(train.shape[1:])}; pad or crop them")
    return train, test


def read_npz(path: Path, raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("x_train", "x_test") if name in arrays}
            names = sorted(arrays.files)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged, truncated or no npz file of arrays ({error}); fetch it again") from error
    if len(found) < 2:
        raise ValueError(f"expected arrays x_train and x_test in {path}, got {names}; name them so")
    for name, x in found.items():
        if x.ndim != 3 or x.dtype != np.uint8 or x.size == 0:
            got = f"{x.shape} of {x.dtype}"
            raise ValueError(f"expected {name} in {path} to be (images, rows, columns) of uint8, got {got}; convert it")
    sizes = {x.shape[1:] for x in found.values()}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size in {path}, got {sorted(sizes)}; resize them")
    return torch.from_numpy(found["x_train"]), torch.from_numpy(found["x_test"])


def read_idx(path: Path, raw: bytes) -> torch.Tensor:
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again") from error
    magic = int.from_bytes(raw[:4], "big")
    if magic != IMAGES:
        hint = "that is a file of labels: take the one of images" if magic == LABELS else "is it an idx or npz file?"
        raise ValueError(f"expected magic number {IMAGES} of an idx file of images in {path}, got {magic}; {hint}")
    if len(raw) < 16:
        raise ValueError(f"{path} is truncated: expected a header of 16 bytes, got {len(raw)}; fetch it again")
    count, rows, columns = struct.unpack(">3I", raw[4:16])
    expected = f"at least 2 images of at least one pixel, 16 + {count} x {rows} x {columns} bytes"
    if count < 2 or not 16 < len(raw) == 16 + count * rows * columns:
        raise ValueError(f"{path} is damaged or truncated: expected {expected}, got {len(raw)}; fetch it again")
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(count, rows, columns)
