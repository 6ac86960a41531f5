# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A module that other modules belong to without being its children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Owning"]


class Owning(torch.nn.Module):
    """Holds the modules that its model and guide are methods of: their parameters, mode, device and state are its own.

    They are not its children, since it may be a child of theirs
    (``self.posterior = ImportanceResampledGuide(self.model, self.guide)``).
    """

    def __init__(self, owners: tuple[torch.nn.Module, ...]) -> None:
        super().__init__()
        self._owners = owners
        self._visiting = False

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        with self._visit() as owners:
            for name, owner in owners.items():
                yield from owner.named_modules(memo, f"{prefix}.{name}".lstrip("."), remove_duplicate)

    def train(self, mode: bool = True) -> Owning:
        super().train(mode)
        with self._visit() as owners:
            for owner in owners.values():
                owner.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Owning:
        super()._apply(fn, recurse)
        with self._visit() as owners:
            for owner in owners.values():
                owner._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with self._visit() as owners:
            for name, owner in owners.items():
                owner.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state: Any, prefix: str, meta: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
        with self._visit() as owners:
            for name, owner in owners.items():
                start = f"{prefix}{name}."
                own = {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
                absent, unknown = owner.load_state_dict(own, strict=False)
                missing += [start + key for key in absent]
                unexpected[:] = [key for key in unexpected if not key.startswith(start)]
                unexpected += [start + key for key in unknown]

    @contextmanager
    def _visit(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The owners by name; none while they are being visited already."""
        if self._visiting:
            yield {}
            return
        self._visiting = True
        try:
            yield {f"owners.{i}": owner for i, owner in enumerate(self._owners)}
        finally:
            self._visiting = False
