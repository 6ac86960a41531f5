# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Tensors and plain facts in one file: written whole or not at all, read without running code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["read", "require_folder", "write", "write_whole"]

FACTS = "facts"
DIGEST = "digest"  # of all else: the checksums of a zip file know nothing of an array that was left out or replaced
# What numpy and zipfile raise where a byte of a header is another: no such compression, a place before the start, ...
ALTERED = (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError, OSError)


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError where a file could not be written later, because there is no folder for it."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"expected a folder for {os.fspath(path)!r}, got none; create it, or nothing could be saved later"
        ) from None


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes an npz file beside the old one and puts it in its place, so that a run that is killed leaves one whole.

    Args:
        path: of the file.
        tensors: by name.
        facts: what JSON can hold.
    """
    arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    arrays[FACTS] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    arrays[DIGEST] = _digest(arrays)
    write_whole(path, lambda file: np.savez(file, **arrays))


def _digest(arrays: Mapping[str, Any]) -> Any:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(repr((name, array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
    return np.frombuffer(found.digest(), dtype=np.uint8)


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Writes a file beside the old one and puts it in its place: there is the old one or the new one, never a part.

    Args:
        path: of the file.
        write: is called with the new file, open.
    """
    require_folder(path)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # as of a file that is just opened, where mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0o077)  # the only way to read it; strict, for what another thread writes meanwhile
    os.umask(current)
    return current


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write` wrote; checksums are compared, and nothing in the file is run.

    Args:
        path: of the file.
        kind: what ``facts["kind"]`` must be.

    Raises:
        ValueError: where the file is cut short, altered, or another kind of file.
    """
    with open(os.fspath(path), "rb") as file:  # a number would be a descriptor, of another file
        whole = io.BytesIO(file.read())  # so that what cannot be opened says so itself
    try:
        with np.load(whole, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not np.array_equal(arrays.pop(DIGEST), _digest(arrays)):
            raise ValueError("its arrays are not those that were written")
        facts = json.loads(arrays.pop(FACTS).tobytes())
        found = facts["kind"]
    except ALTERED as error:
        raise ValueError(
            f"expected a whole file written by {kind}.save, got {os.fspath(path)!r}, which is cut short, altered or "
            f"something else ({type(error).__name__}: {error})"
        ) from error
    if found != kind:
        raise ValueError(f"expected a file written by {kind}.save, got {os.fspath(path)!r}, a file of {found!r}")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, facts
