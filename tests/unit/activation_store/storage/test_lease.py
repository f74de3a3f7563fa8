"""Test a lease that others take and release between a process's check and its put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from activation_store.errors import StoreBusyError
from activation_store.storage import lease
from activation_store.storage.base import Parts
from activation_store.storage.lease import HARVEST_LOCK, Lease
from activation_store.storage.local import LocalStorage


class SlowTaker(LocalStorage):
    """A storage on which others act before its first conditional put."""

    def __init__(self, path: Path, others: Callable[[], None]) -> None:
        super().__init__(path)
        self._others: Callable[[], None] | None = others

    def put_if_absent(self, name: str, parts: Parts) -> bool:
        others, self._others = self._others, None
        if others is not None:
            others()
        return super().put_if_absent(name, parts)


def test_a_number_below_the_holders_does_not_take_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 5.0)
    storage, held = LocalStorage(tmp_path), []
    for folder in (HARVEST_LOCK, "_tmp"):
        storage.make_folder(folder)
    Lease(storage, "first", "run first").release()

    def others() -> None:
        # The second takes and releases the lease; the third deletes the second's file, which
        # frees the second's number.
        Lease(storage, "second", "run second").release()
        held.append(Lease(storage, "third", "run third"))

    with pytest.raises(StoreBusyError, match="is being written by run third"):
        Lease(SlowTaker(tmp_path, others), "late", "run late").release()
    held[0].check()
    held[0].release()
    assert storage.names(HARVEST_LOCK) == ["000000003.json"]
