"""Mutations of `activation_store`.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import one_edit

_OBJECT_STORE_TESTS = "tests/integration/test_store_objects.py::"

MUTATIONS = (
    one_edit(
        4,
        "a store's file that could not be written counts as written",
        "activation_store/storage/atomic_files.py",
        "        path.unlink()\n        raise\n",
        "        pass\n",
        "tests/fault/activation_store/test_damage.py::test_a_failing_disk_leaves_a_store_that_can_be_continued",
    ),
    one_edit(
        14,
        "checksums of chunks are not compared",
        "activation_store/reading/shard_reader.py",
        "            if found != self._index.crc32c[part.chunk]:\n",
        "            if False:\n",
        "tests/fault/activation_store/test_damage.py::test_swapped_chunks_of_one_shard_are_named",
    ),
    one_edit(
        15,
        "an array of a store may have any name",
        "activation_store/format/header.py",
        'named = bool(_NAME.fullmatch(name)) and ".." not in name and name not in reserved',
        "named = True",
        "tests/unit/activation_store/format/test_format.py::test_hostile_metadata_is_refused",
    ),
    one_edit(
        20,
        "an object store's own error text is shown",
        "activation_store/storage/object_store.py",
        "                problem = _summary(error)\n",
        "                problem = str(error)\n",
        f"{_OBJECT_STORE_TESTS}test_a_server_that_does_not_answer_is_reported_soon_and_without_secrets",
    ),
    one_edit(
        21,
        "a commit whose reply was lost counts as another writer's",
        "activation_store/storage/object_store.py",
        'return self._ask("put", name, create) or self._holds(name, data)',
        'return self._ask("put", name, create)',
        f"{_OBJECT_STORE_TESTS}test_a_commit_whose_answer_is_lost_succeeds",
    ),
    one_edit(
        21,
        "requests are not retried",
        "activation_store/storage/object_store.py",
        "        for number in range(TRIES):\n",
        "        for number in range(1):\n",
        f"{_OBJECT_STORE_TESTS}test_a_link_that_fails_now_and_then",
    ),
    one_edit(
        109,
        "every process that tries to take over a lease gets it",
        "activation_store/storage/lease.py",
        "            if not self._storage.put_if_absent(_name(number), [self._bytes()]):\n"
        "                continue\n",
        "            self._storage.put(_name(number), [self._bytes()])\n",
        f"{_OBJECT_STORE_TESTS}test_a_lease_without_heartbeat_goes_to_exactly_one_taker",
    ),
    one_edit(
        110,
        "rows of documents are returned in the order of the store",
        "activation_store/reading/lookup.py",
        "found[:, np.lexsort((found[2], found[1]))]",
        "found",
        "tests/unit/activation_store/reading/test_lookup.py::test_the_rows_of_documents_are_found_in_order",
    ),
    one_edit(
        111,
        "row numbers outside the store are not rejected",
        "activation_store/reading/lookup.py",
        "outside = wanted[(wanted < 0) | (wanted >= store.n_tokens)]",
        "outside = wanted[:0]",
        "tests/unit/activation_store/reading/test_lookup.py::test_missing_rows_and_arrays_are_named",
    ),
    one_edit(
        112,
        "a chunk is read once for each row",
        "activation_store/reading/lookup.py",
        "np.flatnonzero(np.diff(first[order])) + 1)",
        "np.arange(1, len(order)))",
        "tests/unit/activation_store/reading/test_lookup.py::test_each_chunk_is_read_once",
    ),
)
