"""Composes the config and runs the stages it names; `python launch.py --help`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from conf.schema import RunConfig

SCALING_LAWS = ("harvest", "sweep", "fit")
PIPELINE = ("plan", "harvest", "train", "evaluate", "export", "report")
STAGES = {
    "plan": "cluster.plan",
    "harvest": "cluster.harvest",
    "train": "cluster.train",
    "evaluate": "analysis.evaluate",
    "export": "analysis.export",
    "report": "analysis.report",
    "verify": "analysis.verify",
    "repair": "analysis.repair",
    "reshard": "analysis.reshard",
    "status": "analysis.status",
    "sweep": "cluster.sweep",
    "fit": "analysis.fit",
    "submit": "cluster.submit",
}
HARVEST_AND_TRAIN = "harvest and train"
"""Both at once: no stage of its own, for it is what the pipeline does."""
CONCURRENT = ("plan", HARVEST_AND_TRAIN, "evaluate", "export", "report")
WITHOUT_THE_LOCK = ("plan", "verify", "reshard", "status", "fit", "submit")
"""They change nothing in the run, which may go on meanwhile; fit writes to the sweep's folder."""
NEED_A_RUN = ("evaluate", "export", "report", "verify", "repair", "reshard", "status")
MODULES = {**STAGES, HARVEST_AND_TRAIN: "cluster.concurrent"}

ConfigStore.instance().store(name="run_schema", node=RunConfig)


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def compose_and_run(composed: DictConfig) -> None:
    """Validates, then runs one stage, or the pipeline's stages in order."""
    with _explained():
        from cluster.preemption import on_preemption, raise_interrupted
        from cluster.run_dir import open_run
        from conf.cell_names import cell_name
        from conf.validate import validate

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            composed.name = cell_name(composed.name, HydraConfig.get())
        config: RunConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
        _make_paths_absolute(config)  # first: a store that is named in two ways is one
        validate(config, ("pipeline", "scaling_laws", *STAGES))
        stages: tuple[str, ...] = (config.stage,)
        if config.stage == "pipeline":
            stages = CONCURRENT if config.cluster.mode == "concurrent" else PIPELINE
        if config.stage == "scaling_laws":
            stages = SCALING_LAWS
        with (
            on_preemption(raise_interrupted, config.checkpoint.grace_s),
            open_run(
                config, config.stage in WITHOUT_THE_LOCK, config.stage in NEED_A_RUN
            ) as run_dir,
        ):
            if config.stage == "pipeline":
                _print_config(config)
            for stage in stages:
                more = [_arguments()] if stage == "submit" else []
                import_module(MODULES[stage]).run(config, run_dir, *more)


def _arguments() -> list[str]:
    """Of this run's command line, or of this cell of a sweep."""
    hydra_config = HydraConfig.get()
    folders = [
        f"--config-dir={source.path}"
        for source in hydra_config.runtime.config_sources
        if source.provider == "command-line"
    ]
    # As they were typed: an interpolation is the job's to resolve, where it runs.
    typed = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [*folders, *cast(list[str], typed)]


def _make_paths_absolute(config: RunConfig) -> None:
    """Ranks and workers may run in another folder; a hub name is no path and stays."""
    config.store.path = _absolute(config.store.path)
    for mixed in config.store.mixture:
        mixed.path = _absolute(mixed.path)
    config.cache_dir = str(Path(config.cache_dir).expanduser().resolve())
    for part in (config.model, config.data):
        local = Path(part.path).expanduser()
        if part.path and part.package is None and local.exists():
            part.path = str(local.resolve())


def _absolute(store: str) -> str:
    if not store or "://" in store:  # an object store's address
        return store
    return str(Path(store).expanduser().resolve())


def _print_config(config: RunConfig) -> None:
    from rich import print as show

    from conf.tree import config_tree

    show(config_tree(config))


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what went wrong on purpose into one message and an exit code."""
    from cluster.preemption import EXIT_PREEMPTED
    from cluster.slurm import requeue_sweep_cell
    from conf.failure import explain

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        if code == EXIT_PREEMPTED:
            requeue_sweep_cell()
        sys.exit(code)


def main() -> None:
    """The command line."""
    # Hydra would print what it cannot compose and exit 1; this makes it raise to here instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # The packages of this checkout must be importable from any working directory, and in workers.
    root = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # What submitit, Hydra's launcher for Slurm, has its jobs warned with: a signal we listen to.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    # conf/hydra/launcher takes the place of the plugin's defaults, which Hydra finds odd.
    warnings.filterwarnings("ignore", "(?s).*is validated against ConfigStore schema")
    with _explained():
        from conf.cell_names import with_constants

        sys.argv[1:] = with_constants(sys.argv[1:])
        compose_and_run()


if __name__ == "__main__":
    main()
