"""Command line that composes the config and runs its stages; see `python launch.py --help`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from foundation.own_packages import require_own_packages

if TYPE_CHECKING:
    from conf.schema.data import DataConfig, MixedText
    from conf.schema.model import ModelConfig
    from conf.schema.run import RunConfig

SCALING_LAWS = ("harvest", "sweep", "fit")
PIPELINE = ("plan", "harvest", "train", "evaluate", "export", "report")
STAGES = {
    "plan": "cluster.planning.stage",
    "harvest": "cluster.harvest.stage",
    "train": "cluster.training.stage",
    "evaluate": "analysis.evaluation.stage",
    "export": "analysis.export.stage",
    "report": "analysis.pages.stage",
    "verify": "cluster.upkeep.verify",
    "repair": "cluster.upkeep.repair",
    "reshard": "cluster.upkeep.reshard",
    "status": "analysis.status.stage",
    "sweep": "cluster.sweep.stage",
    "fit": "analysis.scaling_laws.stage",
    "submit": "cluster.jobs.stage",
    "hookpoints": "cluster.language_model.stage",
}
HARVEST_AND_TRAIN = "harvest and train"
"""Internal stage that harvests and trains concurrently. The pipeline uses it; users cannot."""
CONCURRENT = ("plan", HARVEST_AND_TRAIN, "evaluate", "export", "report")
STAGES_WITH_SAVED_CONFIG = (
    "train",
    "evaluate",
    "export",
    "report",
    "verify",
    "repair",
    "reshard",
    "status",
)
"""Stages that continue an existing run with its saved config, changed only by the keys that are set
on the command line. If an option of a group is chosen there, the composed config is used."""
READ_ONLY_STAGES = ("plan", "verify", "reshard", "status", "fit", "submit", "hookpoints")
"""Stages that do not change the run and may be used while the run is active.

The stage fit writes its results to the folder of the sweep.
"""
STAGES_OF_EXISTING_RUNS = ("evaluate", "export", "report", "verify", "repair", "reshard", "status")
MODULES = {**STAGES, HARVEST_AND_TRAIN: "cluster.concurrent"}


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def compose_and_run(composed: DictConfig) -> None:
    """Validate the config, then run its stage, or all stages of the pipeline in order."""
    with _report_errors():
        from cluster.preemption import on_preemption, raise_interrupted
        from cluster.run_folder.opening import open_run
        from cluster.run_folder.relocation import follow_link
        from conf.checks import validate
        from conf.effects import without_effect
        from conf.multirun import cell_name

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            composed.name = cell_name(composed.name, HydraConfig.get())
        config: RunConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
        # Do this before validation, which must recognise that two spellings of a path are one
        # store.
        _make_paths_absolute(config)
        follow_link(config)
        given = _given_keys()
        if config.stage in STAGES_WITH_SAVED_CONFIG:
            config = _continued(config, given)
        validate(config, ("pipeline", "scaling_laws", *STAGES))
        for line in without_effect(config, given):
            print(f"{config.stage}: {line}")
        stages: tuple[str, ...] = (config.stage,)
        if config.stage == "pipeline":
            stages = CONCURRENT if config.cluster.mode == "concurrent" else PIPELINE
        if config.stage == "scaling_laws":
            stages = SCALING_LAWS
        with (
            on_preemption(raise_interrupted, config.checkpoint.grace_s),
            open_run(
                config,
                config.stage in READ_ONLY_STAGES,
                config.stage in STAGES_OF_EXISTING_RUNS and not _brings_sae(config),
            ) as run_dir,
        ):
            if config.stage == "pipeline":
                _print_config(config)
            for stage in stages:
                more = [_arguments()] if stage == "submit" else []
                import_module(MODULES[stage]).run(config, run_dir, *more)


def _brings_sae(config: RunConfig) -> bool:
    """Return True if the stage evaluates an SAE that no run here has trained."""
    return config.stage == "evaluate" and config.eval.sae is not None


def _given_keys() -> set[str]:
    """Return the keys and groups that are set on the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    arguments = list(HydraConfig.get().overrides.task)
    keys = {one.key_or_group for one in OverridesParser.create().parse_overrides(arguments)}
    return {key for key in keys if not key.startswith("hydra")}


def _continued(config: RunConfig, keys: set[str]) -> RunConfig:
    """Return the saved config of the run, if there is one, with the keys that the user set."""
    from cluster.run_folder.saved_config import continued

    plain = {key for key in keys if "." in key or not hasattr(getattr(config, key, 0), "__dict__")}
    if "experiment" in keys or plain < keys or "sae.architecture" in keys:
        return config
    config, changes = continued(config, plain)
    for change in changes:
        print(f"{config.stage}: changed in this run's saved config: {change}")
    return config


def _arguments() -> list[str]:
    """Return the command-line arguments of this run, or of this cell in a sweep."""
    hydra_config = HydraConfig.get()
    folders = [
        f"--config-dir={source.path}"
        for source in hydra_config.runtime.config_sources
        if source.provider == "command-line"
    ]
    # Do not resolve interpolations here: the job resolves them on the machine where it runs.
    typed = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [*folders, *cast(list[str], typed)]


def _make_paths_absolute(config: RunConfig) -> None:
    """Make local paths absolute, because ranks and workers may run in another folder.

    Names on the Hugging Face Hub and addresses of object stores are left unchanged.
    """
    config.store.path = _absolute(config.store.path)
    for mixed in config.store.mixture:
        mixed.path = _absolute(mixed.path)
    config.cache_dir = str(Path(config.cache_dir).expanduser().resolve())
    parts: list[ModelConfig | DataConfig | MixedText] = [config.model, config.data]
    for part in (*parts, *config.data.mixture):
        local = Path(part.path).expanduser()
        if part.path and part.package is None and local.exists():
            part.path = str(local.resolve())

    config.eval.sae = config.eval.sae and _absolute(config.eval.sae)
    config.train.init_from = config.train.init_from and _absolute(config.train.init_from)


def _absolute(path: str) -> str:
    if not path or "://" in path:  # an object store's address
        return path
    return str(Path(path).expanduser().resolve())


def _print_config(config: RunConfig) -> None:
    from rich import print as show

    from conf.tree import config_tree

    show(config_tree(config))


def _print_keys(words: list[str]) -> None:
    """Print the reference of all settings, or of one group: `--keys [GROUP | --markdown]`."""
    from conf import reference

    if words == ["--markdown"]:
        print(reference.as_markdown(), end="")
    else:
        print(reference.as_text(words[0] if words else None))


@contextmanager
def _report_errors() -> Iterator[None]:
    """Print a message and exit with a code for expected errors; let other errors propagate."""
    from cluster.errors import SchedulerError
    from cluster.jobs.slurm.commands import requeue_sweep_cell
    from conf.failure import describe_error
    from foundation.errors import EXIT_PREEMPTED

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message, code = describe_error(error, sys.argv[1:])
        if message is None:
            raise
        print(message, file=sys.stderr)
        if code == EXIT_PREEMPTED:
            try:
                requeue_sweep_cell()
            except SchedulerError as refused:
                print(f"{refused}; run the same command again to resume", file=sys.stderr)
        sys.exit(code)


def main() -> None:
    """Run the command line."""
    require_own_packages()
    from cluster.openmp import waiting_variables

    # By default, Hydra prints composition errors and exits with 1. This setting makes Hydra raise
    # them instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # The packages of this checkout must be importable in any working directory and in workers.
    root = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Set these before a stage imports torch, because the driver evaluates the SAE in this process.
    os.environ.update(waiting_variables(alone=True))
    # submitit, which Hydra's Slurm launcher uses, sends this signal shortly before a job's time
    # limit. `on_preemption` handles USR1.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    # Ignore Hydra's warning that conf/hydra/launcher overrides the plugin's defaults, which is
    # intended.
    warnings.filterwarnings("ignore", "(?s).*is validated against ConfigStore schema")
    with _report_errors():
        from conf.config_store import store_schemas
        from conf.multirun import with_constant_keys
        from conf.spelling import require_no_dashes

        store_schemas()
        sys.argv[1:] = with_constant_keys(sys.argv[1:])
        if "--keys" in sys.argv:
            _print_keys([word for word in sys.argv[1:] if word != "--keys"])
            return
        require_no_dashes(sys.argv[1:])
        compose_and_run()


if __name__ == "__main__":
    main()
