"""The typed schema of a run's config, composed of one dataclass per group of settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from activation_store.config import StoreConfig
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.eval import EvalConfig
from conf.schema.fit import FitConfig
from conf.schema.logging import LoggingConfig
from conf.schema.model import ModelConfig
from conf.schema.plan import PlanConfig
from conf.schema.reshard import ReshardConfig
from conf.schema.submit import SubmitConfig
from conf.schema.sweep import SweepConfig
from sae_core.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TrainerConfig,
)


@dataclass
class RunConfig:
    """The config of a run, composed by `launch.py` and saved as `config.yaml` in the run folder."""

    name: str = "demo"
    """Name of the run and of its folder in `runs_dir`."""
    stage: str = "pipeline"
    """Stage to run: pipeline (plan to report, in order) or the name of a single stage."""
    seed: int = 0
    """Seed of the initial dictionary. If `store.order_seed` is null, also the seed of the row
    order."""
    runs_dir: str = "runs"
    """Folder that contains all runs."""
    cache_dir: str = "~/.cache/latent-foundry"
    """Folder that keeps converted models and tokenised text between runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    sae: SAEConfig = field(default_factory=TopKConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    reshard: ReshardConfig = field(default_factory=ReshardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def order_seed(self) -> int:
        """Seed of the order in which rows are trained on."""
        return self.seed if self.store.order_seed is None else self.store.order_seed

    @property
    def trainer(self) -> TrainerConfig:
        """The parts of the config that the trainer uses."""
        return TrainerConfig(self.sae, self.optim, self.train, self.parallel, self.checkpoint)
