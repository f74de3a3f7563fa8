"""The typed shape of a run's config; each part is a dataclass beside the code it configures."""

from __future__ import annotations

from dataclasses import dataclass, field

from activation_store.config import StoreConfig
from analysis.config import EvalConfig, FitConfig, ReshardConfig
from cluster.config import ClusterConfig, DataConfig, LoggingConfig, ModelConfig
from cluster.planning.config import PlanConfig
from cluster.submit_config import SubmitConfig
from cluster.sweep_config import SweepConfig
from sae_core.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    SAEConfig,
    TrainConfig,
    TrainerConfig,
)


@dataclass
class RunConfig:
    """One run: what `launch.py` composes and every stage and rank reads back from `config.yaml`."""

    name: str = "demo"
    """The run's folder under `runs_dir`."""
    stage: str = "pipeline"
    seed: int = 0
    runs_dir: str = "runs"
    cache_dir: str = "~/.cache/latent-foundry"
    """Where models that need conversion and tokenised text are kept between runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
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
        """What fixes the order in which rows are trained on."""
        return self.seed if self.store.order_seed is None else self.store.order_seed

    @property
    def trainer(self) -> TrainerConfig:
        """The parts that the trainer takes."""
        return TrainerConfig(self.sae, self.optim, self.train, self.parallel, self.checkpoint)
