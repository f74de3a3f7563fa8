"""Mutations of `sae_core`.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import Edit, Mutation, one_edit

_RANKS = "sae_core/distributed/ranks.py"
_SAVE = "sae_core/checkpoint/save.py"
_FOLDER = "sae_core/checkpoint/folder.py"
_LOAD = "sae_core/checkpoint/load.py"
_ENGINE = "sae_core/engine/deepspeed_engine.py"
_SWEEP_TESTS = "tests/fault/test_sweep_lockstep.py::"
_KILL_TESTS = "tests/fault/test_checkpoint_kills.py::"
_PREFILTER_TESTS = "tests/distributed/test_prefilter_choice.py::"
_MESH_TESTS = "tests/distributed/test_mesh_training.py::"
_UNTRUSTED_FILE_TESTS = "tests/fault/test_untrusted_files.py::"
_RESUME_ON_SAME_MESH = f"{_MESH_TESTS}test_resume_on_any_mesh[1-1-0]"
_CHECK_FOLDER = (
    "        try:\n            check_manifest(folder, hashes)\n            read_state(folder)\n"
)
_GATHER_VOTES = "    dist.all_reduce(vote, dist.ReduceOp.MAX, group)\n"
_TELL = "        _exchange(error, group)\n"
_GATHER = "    dist.all_gather_object(values, value, group=group)\n"


def _unless_broken(line: str, instead: str) -> str:
    """Return `line` in a `try` block that runs `instead` if a collective in the line breaks."""
    indent = line[: len(line) - len(line.lstrip())]
    return f"{indent}try:\n    {line}{indent}except RuntimeError:\n{indent}    {instead}\n"


MUTATIONS = (
    Mutation(
        1,
        "a checkpoint is written under its final name, and counts as valid without a manifest",
        (
            Edit(_SAVE, 'temporary = root / f"{final.name}.tmp"', "temporary = final"),
            Edit(_SAVE, "        shutil.rmtree(final)\n", "        pass\n"),
            Edit(_SAVE, ".mkdir(parents=True)\n", ".mkdir(parents=True, exist_ok=True)\n"),
            Edit(_FOLDER, _CHECK_FOLDER, "        try:\n            read_state(folder)\n"),
        ),
        (f"{_KILL_TESTS}test_a_kill_at_every_stage_of_a_save",),
    ),
    Mutation(
        2,
        "a rank that does not answer counts as a yes vote",
        (
            Edit(_RANKS, _GATHER_VOTES, _unless_broken(_GATHER_VOTES, "pass")),
            Edit(_RANKS, _TELL, _unless_broken(_TELL, "return {}")),
            Edit(_SAVE, _GATHER, _unless_broken(_GATHER, "values = [{}] * len(values)")),
        ),
        (f"{_KILL_TESTS}test_a_rank_killed_during_a_save_ends_the_others[False]",),
    ),
    one_edit(
        3,
        "a rank that fails does not tell the others",
        _RANKS,
        "        _any_failed(True, group)\n        _exchange(error, group)\n",
        "",
        f"{_KILL_TESTS}test_a_rank_that_cannot_write_fails_all_ranks",
        "tests/distributed/test_ranks.py::test_an_error_of_one_rank_is_raised_on_all",
    ),
    one_edit(
        4,
        "errors of the tensor writer are dropped",
        _SAVE,
        "    _write_tensors(temporary, own, staging)\n    if is_rank_zero():\n",
        "    try:\n        _write_tensors(temporary, own, staging)\n"
        "    except OSError:\n        pass\n"
        "    if is_rank_zero():\n",
        f"{_KILL_TESTS}test_a_rank_that_cannot_write_fails_all_ranks",
    ),
    one_edit(
        5,
        "hashes of a checkpoint's files are not compared",
        _FOLDER,
        'if hashed and hash_file(path) != entry.get("sha256"):',
        "if False:",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_damage_is_named_and_the_older_one_used",
    ),
    one_edit(
        5,
        "missing files of a checkpoint are not detected",
        _FOLDER,
        "for name in sorted(set(expected) - found)]",
        "for name in ()]",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_damage_is_named_and_the_older_one_used",
    ),
    one_edit(
        5,
        "ranks resume from the newest checkpoint without checking it",
        _LOAD,
        "        check_manifest(folder, hashes, (dist.get_rank(), dist.get_world_size()))\n",
        "",
        "tests/fault/test_damaged_resume.py::test_a_run_resumes_from_the_checkpoint_before",
    ),
    one_edit(
        7,
        "the source restarts from the beginning at a resume",
        "sae_core/training/trainer.py",
        "        self.source.seek(state.source_position)\n",
        "",
        _RESUME_ON_SAME_MESH,
    ),
    one_edit(
        7,
        "Adam's moments are not loaded",
        _LOAD,
        "    _load_tensors(folder / OPTIMIZER, loaded)\n",
        "",
        _RESUME_ON_SAME_MESH,
    ),
    one_edit(
        7,
        "Adam's step count restarts at a resume",
        _ENGINE,
        '            state["step"].fill_(float(step))\n',
        "            pass\n",
        _RESUME_ON_SAME_MESH,
    ),
    one_edit(
        7,
        "tokens_since_fired restarts from zero at a resume",
        _LOAD,
        "        engine.sae.get_buffer(name).copy_(buffer)\n",
        "        engine.sae.get_buffer(name).zero_()\n",
        _RESUME_ON_SAME_MESH,
    ),
    one_edit(
        8,
        "uneven shards lose the remaining rows",
        "sae_core/distributed/mesh.py",
        "    size = -(-n_rows // n_shards)\n",
        "    size = n_rows // n_shards\n",
        f"{_MESH_TESTS}test_resume_on_any_mesh[3-1-0]",
    ),
    one_edit(
        8,
        "moments owned by ZeRO 1 are not loaded",
        _ENGINE,
        "        safe_set_full_optimizer_state(parameter, value, moment)\n",
        "        pass\n",
        f"{_MESH_TESTS}test_resume_on_any_mesh[2-2-1]",
    ),
    one_edit(
        10,
        "each rank checks only its own loss",
        _ENGINE,
        "        dist.all_reduce(flag, op=dist.ReduceOp.MAX)\n",
        "",
        f"{_MESH_TESTS}test_an_infinite_loss_on_one_rank_stops_all_before_the_update[1-2-0-fused]",
    ),
    one_edit(
        10,
        "the update is applied despite a loss that is not finite",
        _ENGINE,
        "        self._mark_bad(flag)\n        self.engine.backward(out.loss)\n",
        "        self.engine.backward(out.loss)\n",
        f"{_MESH_TESTS}test_an_infinite_loss_on_one_rank_stops_all_before_the_update[1-2-0-fused]",
    ),
    one_edit(
        10,
        "the update is applied despite a gradient that is not finite",
        "sae_core/engine/adam.py",
        "torch.maximum(self.found_inf, (~norm.isfinite()).float(), out=self.found_inf)",
        "pass",
        f"{_MESH_TESTS}test_an_infinite_gradient_with_a_finite_loss_stops_training[0-0.3-fused]",
    ),
    one_edit(
        15,
        "pickles are loaded with arbitrary objects",
        "sae_core/peer_formats.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        f"{_UNTRUSTED_FILE_TESTS}test_a_pt_file_is_read_on_request_and_never_runs",
    ),
    one_edit(
        15,
        "a checkpoint may contain any file",
        _FOLDER,
        "    if not _PAYLOAD.fullmatch(name):\n",
        "    if False:\n",
        f"{_UNTRUSTED_FILE_TESTS}test_planted_pickles_are_never_read",
    ),
    one_edit(
        15,
        "the length of a header is not limited",
        "sae_core/checkpoint/safetensors_file.py",
        "fits = n_bytes <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES)",
        "fits = True",
        f"{_UNTRUSTED_FILE_TESTS}test_a_header_beyond_its_file_or_the_limit_is_not_read",
    ),
    one_edit(
        18,
        "damaged checkpoints count among the kept ones",
        _FOLDER,
        "        if _looks_whole(folder):\n            kept += 1",
        "        if True:\n            kept += 1",
        "tests/unit/sae_core/checkpoint/test_folder.py::test_pruning_keeps_the_newest_valid_ones",
    ),
    Mutation(
        22,
        "a run resumes from the newest checkpoint without checking it",
        (Edit(_FOLDER, _CHECK_FOLDER, "        try:\n            read_state(folder)\n"),),
        ("tests/fault/test_state_machine.py::test_a_damaged_newest_checkpoint_is_skipped",),
        timeout_s=600,
    ),
    one_edit(
        101,
        "a signal to one rank is not passed on to the others",
        "sae_core/distributed/agreement.py",
        "        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)\n",
        "        dist.broadcast(numbers[3:], 0, group=self._group)\n",
        "tests/fault/test_preemption.py::test_a_signal_to_one_rank_in_the_middle_of_a_save",
    ),
    one_edit(
        102,
        "an old checkpoint is deleted without renaming it first",
        _SAVE,
        "        os.rename(old, doomed)\n        shutil.rmtree(doomed)\n",
        "        shutil.rmtree(old)\n",
        f"{_KILL_TESTS}test_a_kill_during_pruning_leaves_no_damaged_checkpoint",
    ),
    one_edit(
        103,
        "a save writes the tensors that training keeps changing",
        "sae_core/checkpoint/host_copy.py",
        "                pieces.append(Piece(own.key, done, data))\n",
        "                pieces.append(Piece(own.key, done, flat[done : done + count]))\n",
        f"{_KILL_TESTS}test_a_save_that_training_overtakes_holds_its_own_step",
    ),
    one_edit(
        104,
        "a failed save on one rank does not end the others' training",
        "sae_core/training/lockstep.py",
        "        if agreed.save_failed:\n",
        "        if False:\n",
        f"{_KILL_TESTS}test_a_failed_save_ends_training_long_before_the_next_one",
    ),
    one_edit(
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
    one_edit(
        116,
        "an error in one cell ends the others",
        "sae_core/training/lockstep.py",
        "            self._errors[index] = error\n",
        "            raise\n",
        f"{_SWEEP_TESTS}test_cells_that_fail_or_diverge_leave_the_others_alone",
    ),
    one_edit(
        117,
        "a signal does not make the cells that train in lockstep save",
        "sae_core/training/lockstep.py",
        "trainer.save_if_due, agreed.save or agreed.stop)",
        "trainer.save_if_due, agreed.save)",
        f"{_SWEEP_TESTS}test_a_signal_saves_all_cells",
    ),
    one_edit(
        141,
        "the ranks choose a prefilter by their own times",
        "sae_core/training/prefilter.py",
        "        agree=_slowest,\n",
        "",
        f"{_PREFILTER_TESTS}test_all_ranks_take_the_same",
    ),
    one_edit(
        142,
        "a resumed run times the prefilters again",
        "sae_core/training/prefilter.py",
        "        if kept.name in names and kept.processor == processor:\n",
        "        if False:\n",
        f"{_PREFILTER_TESTS}test_a_resumed_run_keeps_the_choice",
    ),
    one_edit(
        143,
        "a resumed run keeps a prefilter that was chosen on another processor",
        "sae_core/training/prefilter.py",
        "        if kept.name in names and kept.processor == processor:\n",
        "        if kept.name in names:\n",
        f"{_PREFILTER_TESTS}test_a_choice_that_cannot_be_kept_is_made_again",
    ),
    one_edit(
        144,
        "prefilter=auto times a prefilter of the CPU on CUDA",
        "sae_core/kernels/prefilter_choice.py",
        "device_type in body.prefilter_devices and compute_dtype",
        "compute_dtype",
        "tests/unit/sae_core/kernels/test_prefilter_choice.py::test_the_device_decides",
    ),
    one_edit(
        145,
        "prefilter=auto takes the prefilter whatever the times",
        "sae_core/kernels/prefilter_choice.py",
        "    return best if enough else NO_PREFILTER\n",
        "    return list(seconds)[-1]\n",
        "tests/unit/sae_core/kernels/test_prefilter_choice.py::test_the_faster_path_is_chosen_and_used",
    ),
    one_edit(
        146,
        "a prefilter of the CPU is accepted on CUDA",
        "sae_core/kernels/prefilter_choice.py",
        '    if device != "auto" and not any(device in body.prefilter_devices for body in able):\n',
        "    if False:\n",
        "tests/unit/sae_core/kernels/test_prefilter_choice.py::test_the_device_decides",
    ),
    one_edit(
        147,
        "a rank with a small last shard leaves the exchange of times",
        "sae_core/kernels/prefilter_timing.py",
        "    largest = L if largest_shard is None else largest_shard\n",
        "    largest = L\n",
        "tests/unit/sae_core/kernels/test_prefilter_choice.py"
        "::test_the_largest_shard_decides_whether_anything_is_timed",
    ),
)
