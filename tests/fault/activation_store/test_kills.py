"""Test that killing writers and readers at any moment loses, repeats and reorders nothing."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreWriter, open_store, verify_store
from activation_store.storage import atomic_files
from tests.support.store_cases import expected, tree, write_store
from tests.support.store_processes import (
    ARRAYS,
    DIGEST_BYTES,
    LAYOUT,
    N_ITEMS,
    ROWS,
    STREAM,
    next_digest,
    open_stream,
    read_batches,
    small_segments,
    write_items,
)

SEED = 0
WRITERS, READERS = 2, 2
WRITER_KILLS, READER_KILLS = 36, 20
STEPS_PER_LIFE = 4  # items or batches per life; then a victim waits to be killed
CALL_S = 0.01  # about the duration of a write
N_BATCHES = 3 * sum(ROWS) // (2 * STREAM["batch_rows"])  # half of the second epoch


class Victim:
    """A process that is killed and restarted, and the file in which it reports its progress."""

    def __init__(
        self, start: Callable[[int | None], ForkServerProcess], progress_file: Path
    ) -> None:
        self._start = start
        self._progress_file = progress_file
        self._progress_file.touch()
        self.begin(STEPS_PER_LIFE)

    def begin(self, most: int | None) -> None:
        self._before = self._progress_file.stat().st_size
        self.process = self._start(most)

    def kill(self, rng: random.Random, step: int) -> None:
        """Kill it at a random moment of a random call, or while it waits for rows."""
        wanted = self._before + step * rng.randrange(STEPS_PER_LIFE)
        patience = time.monotonic() + 0.4
        while self._progress_file.stat().st_size < wanted and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 2 * CALL_S))
        assert self.process.exitcode is None, "the process ended before it was killed"
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def finish(self) -> None:
        self.process.join(200)
        assert self.process.exitcode == 0


@pytest.fixture
def processes() -> Iterator[list[ForkServerProcess]]:
    """Collect the processes that a test starts, and kill them when it ends."""
    started: list[ForkServerProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join()


@pytest.mark.slow
def test_killed_writers_and_readers_lose_and_repeat_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[ForkServerProcess]
) -> None:
    path, rng = tmp_path / "s", random.Random(SEED)
    print(f"seed {SEED}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.support.store_processes"])

    def starter(work: Callable[..., None], *fixed: object) -> Callable[..., ForkServerProcess]:
        def start(most: int | None) -> ForkServerProcess:
            processes.append(context.Process(target=work, args=(*fixed, most)))
            processes[-1].start()
            return processes[-1]

        return start

    begun = [tmp_path / f"begun-{number}" for number in range(WRITERS)]
    seen = [tmp_path / f"seen-{number}" for number in range(READERS)]
    writers = [Victim(starter(write_items, path, file), file) for file in begun]
    readers = [Victim(starter(read_batches, path, file, N_BATCHES), file) for file in seen]

    victims = ["writer"] * WRITER_KILLS + ["reader"] * READER_KILLS
    rng.shuffle(victims)
    with small_segments():
        for kind in victims:
            victim = rng.choice(writers if kind == "writer" else readers)
            victim.kill(rng, 1 if kind == "writer" else DIGEST_BYTES)
            if (path / "zarr.json").exists():
                store = open_store(path)  # readable at any moment
                store.read("a", 0, store.n_tokens)
            victim.begin(STEPS_PER_LIFE)
        committed = len(StoreWriter(path).committed_items())
        assert 0 < committed < N_ITEMS, "all kills came before or after the work"
        print(f"{len(victims)} kills while {committed} of {N_ITEMS} items were written")
        for victim in (*writers, *readers):  # let each run to its end
            victim.process.kill()
            victim.process.join()
            victim.begin(None)
        for writer in writers:
            writer.finish()
        assert StoreWriter(path).finalise().n_items == N_ITEMS
        for reader in readers:
            reader.finish()
        assert verify_store(path) == []
        store = open_store(path)
        for name, rows in expected(ROWS, ARRAYS).items():
            np.testing.assert_array_equal(store.read(name, 0, store.n_tokens), rows)

        # The same files as from an undisturbed writer, except for _log (attempts) and _tmp.
        monkeypatch.setattr(atomic_files, "fsync_folder", lambda folder: None)
        write_store(tmp_path / "calm", ROWS, arrays=ARRAYS, **LAYOUT)
        calm, found = tree(tmp_path / "calm"), tree(path)
        assert {name for name in found if not name.startswith("_tmp/")} == set(calm)
        assert all(found[name] == data for name, data in calm.items() if "_log" not in name)

        # Readers that resumed where they were killed saw the same batches as an undisturbed one.
        stream = open_stream(tmp_path / "calm")
        order = b"".join(next_digest(stream) for _ in range(N_BATCHES))
        stream.close()
        assert [file.read_bytes() == order for file in seen] == [True] * READERS
