"""Mutations of `cluster`.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import one_edit

_SWEEP_TESTS = "tests/fault/test_sweep_lockstep.py::"

MUTATIONS = (
    one_edit(
        6,
        "ranks ignore signals",
        "cluster/rank.py",
        "return signalled.is_set() or bool(stop_request and stop_request.signal_name)",
        "return False",
        "tests/fault/test_preemption.py::test_a_signal_to_one_rank_in_the_middle_of_a_save",
    ),
    one_edit(
        9,
        "a changed config is accepted",
        "cluster/run_folder/opening.py",
        "        if changes:\n",
        "        if False:\n",
        "tests/unit/test_launch.py::test_a_changed_config_is_refused_with_a_diff",
    ),
    one_edit(
        11,
        "a rank that makes no progress is not ended",
        "cluster/training/watchdog.py",
        "                self._end(limit_s)\n",
        "                pass\n",
        "tests/unit/cluster/training/test_watchdog.py::test_a_hang_is_reported_with_its_stack[progress_nowhere]",
    ),
    one_edit(
        11,
        "a process whose interpreter is stuck is not ended",
        "cluster/training/watchdog.py",
        "                faulthandler.dump_traceback_later(late_s, exit=True, file=_STDERR)\n",
        "                pass\n",
        "tests/unit/cluster/training/test_watchdog.py::test_a_hang_is_reported_with_its_stack[hold_the_interpreter]",
    ),
    one_edit(
        12,
        "drivers take no lock",
        "cluster/run_folder/lock.py",
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "        except BlockingIOError as error:\n            lock.seek(0)\n",
        "            pass\n        except BlockingIOError as error:\n            lock.seek(0)\n",
        "tests/unit/cluster/run_folder/test_lock.py::test_a_second_driver_is_refused_and_a_dead_ones_lock_is_free",
    ),
    one_edit(
        12,
        "training groups take no lock",
        "cluster/run_folder/lock.py",
        "                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        "tests/unit/cluster/run_folder/test_lock.py::test_a_second_group_of_ranks_is_refused",
    ),
    one_edit(
        13,
        "a harvest worker that dies is not restarted",
        "cluster/harvest/worker_pool.py",
        "max_restarts=-1, max_task_retries=-1",
        "max_restarts=0, max_task_retries=0",
        "tests/integration/test_harvest.py::test_a_killed_worker_loses_and_repeats_nothing",
    ),
    one_edit(
        17,
        "a rank that dies ends the run",
        "cluster/training/supervisor.py",
        '        return "a trainer rank died"\n',
        "        raise RuntimeError(str(deaths[0]))\n",
        "tests/fault/test_concurrent.py::test_killed[rank]",
    ),
    one_edit(
        17,
        "a harvest worker that dies ends the run",
        "cluster/harvest/worker_pool.py",
        "max_restarts=-1, max_task_retries=-1",
        "max_restarts=0, max_task_retries=0",
        "tests/fault/test_concurrent.py::test_killed[worker]",
    ),
    one_edit(
        19,
        "training ends if wandb fails to start",
        "cluster/training/metric_sinks.py",
        "        )\n    except Exception as error:",
        "        )\n    except ZeroDivisionError as error:",
        "tests/fault/test_wandb_down.py::test_an_unreachable_wandb_does_not_change_a_run",
    ),
    one_edit(
        19,
        "training ends if wandb fails later",
        "cluster/training/metric_sinks.py",
        "            action(self._wandb)\n        except Exception as error:",
        "            action(self._wandb)\n        except ZeroDivisionError as error:",
        "tests/unit/cluster/training/test_metric_sinks.py::test_a_broken_wandb_is_dropped",
    ),
    one_edit(
        106,
        "frozen ranks are waited for",
        "cluster/training/supervisor.py",
        "        if frozen := heartbeats.frozen():\n",
        "        if frozen := list[int]():\n",
        "tests/fault/test_training_kills.py::test_ranks_that_hang",
    ),
    one_edit(
        107,
        "a trainer that waits for rows counts as hung",
        "cluster/training/store_source.py",
        "return self._store.refreshes if self._waiting else 0",
        "return 0",
        "tests/unit/cluster/training/test_watchdog.py::test_only_a_trainer_that_waits_for_rows_is_excused",
    ),
    one_edit(
        108,
        "a frozen harvest worker is waited for",
        "cluster/harvest/worker_pool.py",
        "                if stall.timed_out():\n",
        "                if False:\n",
        "tests/integration/test_harvest.py::test_a_frozen_worker_does_not_block_the_harvest",
    ),
    one_edit(
        115,
        "the seeds of a sweep change the order of its stream",
        "cluster/training/group.py",
        "order_seed=config.store.order_seed,\n",
        "order_seed=None,\n",
        f"{_SWEEP_TESTS}test_lockstep_training_gives_the_same_bits_from_one_read",
    ),
)
