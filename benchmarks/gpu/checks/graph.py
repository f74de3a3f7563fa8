"""Part `graph`: steps as a CUDA graph give the bits of eager steps, and their time.

Where deepspeed is installed, both runs are those of the trainer's engine, with `train.cuda_graph`
on and off. Elsewhere the captured run wraps the step of `PlainTrainer` in the engine's `StepGraph`.
A step that cannot be captured continues eagerly; the row then has torch's reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.checks.resume import EngineRun, PlainRun, Run, differences
from benchmarks.gpu.part import Context, work_row
from benchmarks.harness.timing import interleaved
from benchmarks.step.ours import Variant, engine_name
from sae_core.architectures.base import SparseAutoencoder
from sae_core.config import TrainerConfig
from sae_core.engine import step_graph
from sae_core.engine.step_graph import StepGraph

VARIANT = Variant("step + clip", clip=True, auxk_rows=1 / 8, lr=1e-3)
_STEPS = 8
"""More than the eager steps before a capture."""
_ROUNDS = 10


class EagerEngineRun(EngineRun):
    """A run of the engine whose steps are launched one operation at a time."""

    def build(self, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device) -> None:
        """Create the engine."""
        config = replace(config, train=replace(config.train, cuda_graph="off"))
        super().build(sae, config, device)


class CapturedPlainRun(PlainRun):
    """A run without DeepSpeed, whose steps run as a CUDA graph."""

    def build(self, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device) -> None:
        """Create the trainer and its graph."""
        super().build(sae, config, device)
        trainer = self.trainer
        self.graph = StepGraph(trainer.run_step, trainer.optimizer.discard_gradient, device)

    def train(self, raw: torch.Tensor, step: int) -> None:
        """Run one step."""
        self.graph(raw)


class _Reason(logging.Handler):
    """Keeps the warning with which `StepGraph` gives up."""

    text: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def run(context: Context) -> str:
    """Run the same steps eagerly and captured, and compare state and time."""
    work = work_row(context, context.shapes.resumed)
    if not context.on_cuda:
        context.report("graph", work=work, skipped="needs a CUDA device")
        return "skipped: needs a CUDA device"
    with_engine = engine_name() == "deepspeed"
    kinds: tuple[Callable[..., Run], Callable[..., Run]] = (PlainRun, CapturedPlainRun)
    if with_engine:
        kinds = (EagerEngineRun, EngineRun)
    eager, captured = (kind(context, VARIANT, seed=0) for kind in kinds)
    reason = _Reason()
    logger = logging.getLogger(step_graph.__name__)
    logger.addHandler(reason)
    try:
        for one in (eager, captured):
            one.steps(0, _STEPS)
    finally:
        logger.removeHandler(reason)
    if reason.text is not None or not is_captured(captured):
        text = reason.text or "no graph was captured"
        context.report("graph", work=work, variant=VARIANT.op, captured=False, reason=text)
        return f"the step cannot be captured: {text}"
    differing = differences(eager.state(), captured.state())
    raw = torch.randn(
        context.shapes.resumed.B, context.shapes.resumed.D, device=context.setup.device
    )
    timings = interleaved(
        {"eager": lambda: eager.train(raw, 0), "graph": lambda: captured.train(raw, 0)},
        rounds=_ROUNDS,
        warmup=1,
        synchronize=context.setup.synchronize,
    )
    eager_s, graph_s = timings["eager"].median_s, timings["graph"].median_s
    context.report(
        "graph",
        work=work,
        variant=VARIANT.op,
        engine=engine_name(),
        captured=True,
        eager_s=eager_s,
        median_s=graph_s,
        differing=differing,
        passed=not differing,
    )
    bits = f"differs in {', '.join(differing)}" if differing else "equals eager bit for bit"
    return f"replay {bits}; {1e3 * graph_s:.2f} ms, eager {1e3 * eager_s:.2f} ms"


def is_captured(run: Run) -> bool:
    """Return True if a run's steps are replayed from a graph."""
    graph = run.graph if isinstance(run, CapturedPlainRun) else None
    if isinstance(run, EngineRun):
        graph = run.engine.step_graph
    return graph is not None and graph.captured
