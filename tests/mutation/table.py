"""The protections that `tests.mutation` removes, and the tests that must fail without them.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from dataclasses import dataclass

FAULTS = {
    1: "all ranks are killed during a save, at each stage",
    2: "one rank is killed during a save",
    3: "the writer of a checkpoint raises an error",
    4: "the disk is full",
    5: "files of a checkpoint are truncated, flipped, swapped, missing or stale",
    6: "SIGTERM or SIGUSR1 arrives",
    7: "a killed and resumed run differs from an uninterrupted one",
    8: "a run resumes on another number of ranks, with uneven n_latents",
    9: "a run is resumed with another config",
    10: "NaN appears on one rank",
    11: "a rank hangs",
    12: "two drivers start the same run",
    13: "a harvest worker is killed while it writes a shard",
    14: "a chunk is missing or damaged",
    15: "a pickle, header, path or metadata is malicious",
    16: "a name contains <script>",
    17: "a Ray worker, a rank or the driver is killed",
    18: "retention deletes the last valid checkpoint",
    19: "wandb or the network is down",
    20: "secrets get into config, logs or images",
    21: "the object store drops connections or loses replies",
    22: "save, kill, corrupt, prune, resume and reshard happen in any order",
}


@dataclass(frozen=True)
class Edit:
    """A text that must occur exactly once in a file, and its replacement."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """The removal of one protection."""

    fault: int
    """Number in `FAULTS`; from 101 on: a number for `--only` that is not in that table."""
    what: str
    """The faulty behaviour without the protection."""
    edits: tuple[Edit, ...]
    """Edits that remove it."""
    tests: tuple[str, ...]
    """Ids of the tests of which at least one must fail."""
    timeout_s: float = 150.0
    """Time limit of each test; a test that takes longer counts as failed."""


def _one(fault: int, what: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(fault, what, (Edit(file, old, new),), tests)


_SAVE, _FOLDER = "sae_core/checkpoint/save.py", "sae_core/checkpoint/folder.py"
_LOAD, _ENGINE = "sae_core/checkpoint/load.py", "sae_core/engine/deepspeed_engine.py"
_SWEEP = "tests/fault/test_sweep_lockstep.py::"
_KILLS = "tests/fault/test_checkpoint_kills.py::"
_MESH = "tests/distributed/test_mesh_training.py::"
_OBJECTS = "tests/integration/test_store_objects.py::"
_POISON = "tests/fault/test_untrusted_files.py::"
_SAME_MESH = f"{_MESH}test_resume_on_any_mesh[1-1-0]"
_NO_CHECK = (
    "        try:\n            check_manifest(folder, hashes)\n            read_state(folder)\n"
)
_VOTE = "        dist.all_gather_object(votes, outcome, group=self._group)\n"
_YES = (
    f"        try:\n    {_VOTE}"
    '        except RuntimeError:\n            votes = [({}, "")] * len(votes)\n'
)

MUTATIONS = (
    Mutation(
        1,
        "a checkpoint is written under its final name, and counts as valid without a manifest",
        (
            Edit(_SAVE, 'temporary = root / f"{final.name}.tmp"', "temporary = final"),
            Edit(_SAVE, "        shutil.rmtree(final)\n", "        pass\n"),
            Edit(_SAVE, ".mkdir(parents=True)\n", ".mkdir(parents=True, exist_ok=True)\n"),
            Edit(_FOLDER, _NO_CHECK, "        try:\n            read_state(folder)\n"),
        ),
        (f"{_KILLS}test_a_kill_at_every_stage_of_a_save",),
    ),
    _one(
        2,
        "a rank that does not answer counts as a yes vote",
        _SAVE,
        _VOTE,
        _YES,
        f"{_KILLS}test_a_rank_killed_during_a_save_ends_the_others[False]",
    ),
    _one(
        3,
        "a save succeeds unless all ranks fail",
        _SAVE,
        "        if bad:\n",
        "        if len(bad) == len(votes):\n",
        f"{_KILLS}test_a_rank_that_cannot_write_fails_all_ranks",
    ),
    _one(
        4,
        "errors of the tensor writer are dropped",
        _SAVE,
        "return {rank: failure for rank, (failure, _) in error.failures.items()}",
        "return {}",
        f"{_KILLS}test_a_rank_that_cannot_write_fails_all_ranks",
    ),
    _one(
        4,
        "a store's file that could not be written counts as written",
        "activation_store/storage/atomic_files.py",
        "        path.unlink()\n        raise\n",
        "        pass\n",
        "tests/fault/test_store_damage.py::test_a_failing_disk_leaves_a_store_that_can_be_continued",
    ),
    _one(
        5,
        "hashes of a checkpoint's files are not compared",
        _FOLDER,
        'if hashed and hash_file(path) != entry.get("sha256"):',
        "if False:",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_damage_is_named_and_the_older_one_used",
    ),
    _one(
        5,
        "missing files of a checkpoint are not detected",
        _FOLDER,
        "for name in sorted(set(expected) - found)]",
        "for name in ()]",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_damage_is_named_and_the_older_one_used",
    ),
    _one(
        5,
        "ranks resume from the newest checkpoint without checking it",
        _LOAD,
        "        check_manifest(folder, hashes, (dist.get_rank(), dist.get_world_size()))\n",
        "",
        "tests/fault/test_damaged_resume.py::test_a_run_resumes_from_the_checkpoint_before",
    ),
    _one(
        6,
        "ranks ignore signals",
        "cluster/rank.py",
        "return signalled.is_set() or (request is not None and bool(request.made))",
        "return False",
        "tests/fault/test_preemption.py::test_a_signal_to_one_rank_in_the_middle_of_a_save",
    ),
    _one(
        7,
        "the source restarts from the beginning at a resume",
        "sae_core/training/trainer.py",
        "        self.source.seek(state.source_position)\n",
        "",
        _SAME_MESH,
    ),
    _one(
        7,
        "Adam's moments are not loaded",
        _LOAD,
        "    _load_tensors(folder / OPTIMIZER, loaded)\n",
        "",
        _SAME_MESH,
    ),
    _one(
        7,
        "Adam's step count restarts at a resume",
        _ENGINE,
        '            state["step"].fill_(float(step))\n',
        "            pass\n",
        _SAME_MESH,
    ),
    _one(
        7,
        "tokens_since_fired restarts from zero at a resume",
        _LOAD,
        '            buffer.copy_(local_part(weights[f"{engine.name}.{name}"]))\n',
        "            buffer.zero_()\n",
        _SAME_MESH,
    ),
    _one(
        8,
        "uneven shards lose the remaining rows",
        "sae_core/distributed/mesh.py",
        "    size = -(-n_rows // n_shards)\n",
        "    size = n_rows // n_shards\n",
        f"{_MESH}test_resume_on_any_mesh[3-1-0]",
    ),
    _one(
        8,
        "moments owned by ZeRO 1 are not loaded",
        _ENGINE,
        "        safe_set_full_optimizer_state(parameter, value, moment)\n",
        "        pass\n",
        f"{_MESH}test_resume_on_any_mesh[2-2-1]",
    ),
    _one(
        9,
        "a changed config is accepted",
        "cluster/run_folder/opening.py",
        "        if changes:\n",
        "        if False:\n",
        "tests/unit/conf/test_launch.py::test_a_changed_config_is_refused_with_a_diff",
    ),
    _one(
        10,
        "each rank checks only its own loss",
        _ENGINE,
        "        dist.all_reduce(flag, op=dist.ReduceOp.MAX)\n",
        "",
        f"{_MESH}test_an_infinite_loss_on_one_rank_stops_all_before_the_update[1-2-0-fused]",
    ),
    _one(
        10,
        "the update is applied despite a loss that is not finite",
        _ENGINE,
        "        self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, flag)\n"
        "        self.engine.backward(out.loss)\n",
        "        self.engine.backward(out.loss)\n",
        f"{_MESH}test_an_infinite_loss_on_one_rank_stops_all_before_the_update[1-2-0-fused]",
    ),
    _one(
        10,
        "the update is applied despite a gradient that is not finite",
        "sae_core/engine/adam.py",
        "self.found_inf = torch.maximum(self.found_inf, (~norm.isfinite()).float())",
        "pass",
        f"{_MESH}test_an_infinite_gradient_with_a_finite_loss_stops_training[0-0.3-fused]",
    ),
    _one(
        11,
        "a rank that makes no progress is not ended",
        "cluster/training/watchdog.py",
        "                self._end(limit_s)\n",
        "                pass\n",
        "tests/unit/cluster/training/test_watchdog.py::test_a_hang_is_reported_with_its_stack[progress_nowhere]",
    ),
    _one(
        11,
        "a process whose interpreter is stuck is not ended",
        "cluster/training/watchdog.py",
        "                faulthandler.dump_traceback_later(late_s, exit=True, file=_STDERR)\n",
        "                pass\n",
        "tests/unit/cluster/training/test_watchdog.py::test_a_hang_is_reported_with_its_stack[hold_the_interpreter]",
    ),
    _one(
        12,
        "drivers take no lock",
        "cluster/run_folder/lock.py",
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "        except BlockingIOError as error:\n            lock.seek(0)\n",
        "            pass\n        except BlockingIOError as error:\n            lock.seek(0)\n",
        "tests/unit/cluster/run_folder/test_lock.py::test_a_second_driver_is_refused_and_a_dead_ones_lock_is_free",
    ),
    _one(
        12,
        "training groups take no lock",
        "cluster/run_folder/lock.py",
        "                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        "tests/unit/cluster/run_folder/test_lock.py::test_a_second_group_of_ranks_is_refused",
    ),
    _one(
        13,
        "a harvest worker that dies is not restarted",
        "cluster/harvest/worker_pool.py",
        "max_restarts=-1, max_task_retries=-1",
        "max_restarts=0, max_task_retries=0",
        "tests/integration/test_harvest.py::test_a_killed_worker_loses_and_repeats_nothing",
    ),
    _one(
        14,
        "checksums of chunks are not compared",
        "activation_store/reading/shard_reader.py",
        "            if found != self._index.crc32c[part.chunk]:\n",
        "            if False:\n",
        "tests/fault/test_store_damage.py::test_swapped_chunks_of_one_shard_are_named",
    ),
    _one(
        15,
        "pickles are loaded with arbitrary objects",
        "sae_core/peer_formats.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        f"{_POISON}test_a_pt_file_is_read_on_request_and_never_runs",
    ),
    _one(
        15,
        "a checkpoint may contain any file",
        _FOLDER,
        "    if not _PAYLOAD.fullmatch(name):\n",
        "    if False:\n",
        f"{_POISON}test_planted_pickles_are_never_read",
    ),
    _one(
        15,
        "the length of a header is not limited",
        "sae_core/checkpoint/safetensors_file.py",
        "fits = n_bytes <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES)",
        "fits = True",
        f"{_POISON}test_a_header_beyond_its_file_or_the_limit_is_not_read",
    ),
    _one(
        15,
        "an array of a store may have any name",
        "activation_store/format/header.py",
        'named = bool(_NAME.fullmatch(name)) and ".." not in name and name not in reserved',
        "named = True",
        "tests/unit/activation_store/test_format.py::test_hostile_metadata_is_refused",
    ),
    _one(
        16,
        "the report's template does not escape text",
        "analysis/pages/run_page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/unit/analysis/test_run_page.py::test_names_are_escaped_everywhere",
    ),
    _one(
        16,
        "names in pictures are not escaped",
        "analysis/pages/svg.py",
        'tip = f"<title>{escape(name)}:',
        'tip = f"<title>{name}:',
        "tests/unit/analysis/test_run_page.py::test_names_are_escaped_everywhere",
    ),
    _one(
        17,
        "a rank that dies ends the run",
        "cluster/training/supervisor.py",
        '        return "a trainer rank died"\n',
        "        raise RuntimeError(str(deaths[0]))\n",
        "tests/fault/test_concurrent.py::test_killed[rank]",
    ),
    _one(
        17,
        "a harvest worker that dies ends the run",
        "cluster/harvest/worker_pool.py",
        "max_restarts=-1, max_task_retries=-1",
        "max_restarts=0, max_task_retries=0",
        "tests/fault/test_concurrent.py::test_killed[worker]",
    ),
    _one(
        18,
        "damaged checkpoints count among the kept ones",
        _FOLDER,
        "        if _looks_whole(folder):\n            kept += 1",
        "        if True:\n            kept += 1",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_pruning_keeps_the_newest_valid_ones",
    ),
    _one(
        19,
        "training ends if wandb fails to start",
        "cluster/training/metric_sinks.py",
        "        )\n    except Exception as error:",
        "        )\n    except ZeroDivisionError as error:",
        "tests/fault/test_wandb_down.py::test_an_unreachable_wandb_does_not_change_a_run",
    ),
    _one(
        19,
        "training ends if wandb fails later",
        "cluster/training/metric_sinks.py",
        "            action(self._wandb)\n        except Exception as error:",
        "            action(self._wandb)\n        except ZeroDivisionError as error:",
        "tests/unit/cluster/training/test_metric_sinks.py::test_a_broken_wandb_is_dropped",
    ),
    _one(
        20,
        "addresses with a password are accepted in the config",
        "conf/checks.py",
        "if isinstance(text, str) and _CREDENTIALS.search(text):",
        "if False:",
        f"{_POISON}test_an_address_with_a_password_is_refused_without_repeating_it",
    ),
    _one(
        20,
        "an object store's own error text is shown",
        "activation_store/storage/object_store.py",
        "                problem = _summary(error)\n",
        "                problem = str(error)\n",
        f"{_OBJECTS}test_a_server_that_does_not_answer_is_reported_soon_and_without_secrets",
    ),
    _one(
        20,
        "Ray's token gets into the images",
        ".dockerignore",
        "docker/ray_token\n",
        "",
        "tests/unit/test_docker.py::test_dockerignore_excludes_runs_and_secrets",
    ),
    _one(
        21,
        "a commit whose reply was lost counts as another writer's",
        "activation_store/storage/object_store.py",
        'return self._ask("put", name, create) or self._holds(name, data)',
        'return self._ask("put", name, create)',
        f"{_OBJECTS}test_a_commit_whose_answer_is_lost_succeeds",
    ),
    _one(
        21,
        "requests are not retried",
        "activation_store/storage/object_store.py",
        "        for number in range(TRIES):\n",
        "        for number in range(1):\n",
        f"{_OBJECTS}test_a_link_that_fails_now_and_then",
    ),
    Mutation(
        22,
        "a run resumes from the newest checkpoint without checking it",
        (Edit(_FOLDER, _NO_CHECK, "        try:\n            read_state(folder)\n"),),
        ("tests/fault/test_state_machine.py",),
        timeout_s=600,
    ),
)

EXTRA = (
    _one(
        101,
        "a signal to one rank is not passed on to the others",
        "sae_core/distributed/agreement.py",
        "        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)\n",
        "        dist.broadcast(said[3:], 0, group=self._group)\n",
        "tests/fault/test_preemption.py::test_a_signal_to_one_rank_in_the_middle_of_a_save",
    ),
    _one(
        102,
        "an old checkpoint is deleted without renaming it first",
        _SAVE,
        "        os.rename(old, doomed)\n        shutil.rmtree(doomed)\n",
        "        shutil.rmtree(old)\n",
        f"{_KILLS}test_a_kill_during_pruning_leaves_no_damaged_checkpoint",
    ),
    _one(
        103,
        "a save writes the tensors that training keeps changing",
        "sae_core/checkpoint/host_copy.py",
        '        if not self._keep and tensor.device.type == "cpu":\n',
        '        if tensor.device.type == "cpu":\n',
        f"{_KILLS}test_a_save_that_training_overtakes_holds_its_own_step",
    ),
    _one(
        104,
        "a failed save on one rank does not end the others' training",
        "sae_core/training/lockstep.py",
        "        if agreed.failed:\n",
        "        if False:\n",
        f"{_KILLS}test_a_failed_save_ends_training_long_before_the_next_one",
    ),
    _one(
        105,
        "a driver ignores signals during a harvest",
        "launch.py",
        "            on_preemption(raise_interrupted, config.checkpoint.grace_s),\n",
        "",
        "tests/fault/test_preemption.py::test_a_signal_while_it_harvests",
    ),
    _one(
        106,
        "frozen ranks are waited for",
        "cluster/training/supervisor.py",
        "        if frozen := heartbeats.frozen():\n",
        "        if frozen := list[int]():\n",
        "tests/fault/test_training_kills.py::test_ranks_that_hang",
    ),
    _one(
        107,
        "a trainer that waits for rows counts as hung",
        "cluster/training/store_source.py",
        "return self._store.refreshes if self._waiting else 0",
        "return 0",
        "tests/unit/cluster/training/test_watchdog.py::test_only_a_trainer_that_waits_for_rows_is_excused",
    ),
    _one(
        108,
        "a frozen harvest worker is waited for",
        "cluster/harvest/worker_pool.py",
        "                if patience.lost():\n",
        "                if False:\n",
        "tests/integration/test_harvest.py::test_a_frozen_worker_does_not_block_the_harvest",
    ),
    _one(
        109,
        "every process that tries to take over a lease gets it",
        "activation_store/storage/lease.py",
        "            if not self._storage.put_if_absent(_name(number), [self._bytes()]):\n"
        "                continue\n",
        "            self._storage.put(_name(number), [self._bytes()])\n",
        f"{_OBJECTS}test_a_lease_without_heartbeat_goes_to_exactly_one_taker",
    ),
    _one(
        110,
        "rows of documents are returned in the order of the store",
        "activation_store/reading/lookup.py",
        "found[:, np.lexsort((found[2], found[1]))]",
        "found",
        "tests/unit/activation_store/test_lookup.py::test_the_rows_of_documents_are_found_in_order",
    ),
    _one(
        111,
        "row numbers outside the store are not rejected",
        "activation_store/reading/lookup.py",
        "outside = wanted[(wanted < 0) | (wanted >= store.n_tokens)]",
        "outside = wanted[:0]",
        "tests/unit/activation_store/test_lookup.py::test_missing_rows_and_arrays_are_named",
    ),
    _one(
        112,
        "a chunk is read once for each row",
        "activation_store/reading/lookup.py",
        "np.flatnonzero(np.diff(first[order])) + 1)",
        "np.arange(1, len(order)))",
        "tests/unit/activation_store/test_lookup.py::test_each_chunk_is_read_once",
    ),
    _one(
        113,
        "the scale of a row without a float8 part has no floor",
        "sae_core/kernels/triton/prefilter_float8.py",
        "torch.maximum(low.abs().amax(1) / LARGEST, values.abs().amax(1) * SMALLEST)",
        "low.abs().amax(1) / LARGEST",
        "tests/unit/sae_core/kernels/test_prefilter.py::test_rows_without_a_float8_part_do_not_overflow",
    ),
    Mutation(
        114,
        "the scale of a row without a float8 part has no floor in the Triton kernel",
        (
            Edit(
                "sae_core/kernels/triton/quantise.py",
                "tl.maximum(largest, tl.max(tl.abs(tile), 1) * _SMALLEST)",
                "largest",
            ),
        ),
        ("tests/unit/sae_core/kernels/test_triton_interpreter.py",),
        timeout_s=400,
    ),
    _one(
        115,
        "the seeds of a sweep change the order of its stream",
        "cluster/training/group.py",
        "config.train.timeout_s), config.store.order_seed\n",
        "config.train.timeout_s), None\n",
        f"{_SWEEP}test_lockstep_training_gives_the_same_bits_from_one_read",
    ),
    _one(
        116,
        "an error in one cell ends the others",
        "sae_core/training/lockstep.py",
        "            self._errors[index] = error\n",
        "            raise\n",
        f"{_SWEEP}test_cells_that_fail_or_diverge_leave_the_others_alone",
    ),
    _one(
        117,
        "a signal does not make the cells that train in lockstep save",
        "sae_core/training/lockstep.py",
        "trainer.save_if_due, agreed.save or agreed.stop)",
        "trainer.save_if_due, agreed.save)",
        f"{_SWEEP}test_a_signal_saves_all_cells",
    ),
)
