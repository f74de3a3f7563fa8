"""Our cases of the step benchmark: single kernels and whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.step.work import Call, Case, Inputs, Setup, Work
from sae_core.architectures.base import SparseAutoencoder, StepOutput
from sae_core.architectures.registry import build_sae
from sae_core.config import (
    OptimConfig,
    ParallelConfig,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TrainerConfig,
)
from sae_core.distributed.mesh import Mesh
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.engine.fused_adam import FusedRowAdam
from sae_core.engine.lr_schedule import lr_at
from sae_core.kernels import (
    AdamStep,
    Kernels,
    RowState,
    SparseGradient,
    SparseLatents,
    active_pairs,
    get_kernels,
)

DEAD_SHARE = 0.1
"""Share of latents that are dead in the cases with AuxK."""
DEAD_AFTER_TOKENS = 10_000_000
_TINY = Work(L=64, D=16, B=16, k=2)
_LR = 1e-6
"""Learning rate, small enough that the dictionary stays the same over any number of rounds."""


@dataclass(frozen=True)
class Variant:
    """Settings of a whole step; everything else is as in the default config."""

    op: str
    """Name of the row."""
    clip: bool = False
    """Clip the gradient norm."""
    auxk_rows: float = 0.0
    """Share of the batch rows that the auxiliary loss uses; 0 means no auxiliary loss."""
    moments: str = "float32"
    """Dtype of Adam's moments."""
    prefilter: str = "auto"
    """Prefilter of the encoder, as in the training config."""
    lr: float = _LR
    """Learning rate."""


VARIANTS: tuple[Variant, ...] = (
    Variant("step"),
    Variant("step + clip", clip=True),
    Variant("step + clip + auxk", clip=True, auxk_rows=1.0),
    Variant("step + clip + auxk on 1/8 rows", clip=True, auxk_rows=1 / 8),
    Variant("step, bfloat16 moments", moments="bfloat16"),
)
FLOAT8_VARIANT = Variant("step, float8 prefilter", prefilter="float8")


def our_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of system "ours": kernels, then steps."""
    variants = VARIANTS
    if inputs.setup.has_float8:
        variants = (*VARIANTS, FLOAT8_VARIANT)
    return kernel_cases(inputs) + [_step_case(inputs, variant) for variant in variants]


def kernel_cases(inputs: Inputs) -> list[Case]:
    """Return a case for each kernel by itself, applied to the results of preceding kernels.

    "encode + topk" uses the prefilter that `train.prefilter=auto` chooses. A measured row's
    `prefilter` gives its name.
    """
    pairs = _Pairs(inputs)
    on_cuda = inputs.setup.device.type == "cuda"
    cases = [_encode_case(inputs, "encode + topk")]
    if not on_cuda:
        cases.append(_encode_case(inputs, "encode + topk, no prefilter", prefilter="none"))
    else:
        if inputs.setup.has_float8:
            cases.append(_encode_case(inputs, "encode + topk, float8 prefilter", "float8"))
        cases.append(_encode_case(inputs, "encode + topk, tf32", tf32=True))
    few = 24 * inputs.work.B * inputs.work.k  # bytes of rows, latents and values, twice
    rest = partial(Case, "ours", encodes=False)
    cases.append(rest("decode + error + dots", pairs.decode, few))
    if not on_cuda:
        cases.append(rest("row gradients", pairs.row_gradients, few))
    needs = few + state_bytes(inputs, "float32")
    cases.append(rest("row update", pairs.row_update, needs, stateful=True))
    return cases


def state_bytes(inputs: Inputs, moments: str) -> int:
    """Return the bytes of both matrices, their moments and the copies that the kernels need.

    Args:
        inputs: Sizes and setup.
        moments: Dtype of the moments.
    """
    copy = 0 if inputs.setup.kernels == "stock" else inputs.setup.dtype.itemsize
    moment = getattr(torch, moments).itemsize
    return 2 * inputs.work.L * inputs.work.D * (4 + 2 * moment + copy)


def _encode_case(
    inputs: Inputs,
    op: str,
    prefilter: str = "auto",
    *,
    tf32: bool = False,
) -> Case:
    """Return the case of the encoder product and its TopK.

    Args:
        inputs: Batch and sizes.
        op: Name of the row.
        prefilter: As in the training config.
        tf32: Multiply float32 inputs in TF32, instead of inputs in the setup's dtype.
    """
    work, setup = inputs.work, inputs.setup
    notes: dict[str, Any] = {}

    def make() -> Call:
        dtype = torch.float32 if tf32 else setup.dtype
        notes["prefilter"] = name = inputs.auto_prefilter if prefilter == "auto" else prefilter
        kernels = get_kernels(setup.kernels, dtype, tf32=tf32, prefilter=name)
        W, bias = inputs.W.to(dtype), inputs.bias.float()
        return lambda: kernels.encode_topk(inputs.raw, W, bias, work.k)

    wide = 4 * work.L * work.D if tf32 else 0
    return Case("ours", op, make, 12 * work.B * work.k + wide, notes=notes)


class _Pairs:
    """Inputs of the kernels that run after the encoder, computed when a case is created."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @property
    def _kernels(self) -> Kernels:
        return get_kernels(self.inputs.setup.kernels, self.inputs.setup.dtype)

    @property
    def _active(self) -> SparseLatents:
        inputs = self.inputs
        bias = inputs.bias.float()
        kernels = self._kernels
        selected = kernels.encode_topk(inputs.raw, inputs.W, bias, inputs.work.k)
        return active_pairs(kernels, *selected)

    def decode(self) -> Call:
        inputs, kernels, active = self.inputs, self._kernels, self._active
        return lambda: kernels.decode_error(inputs.raw, active, inputs.W)

    def row_gradients(self) -> Call:
        kernels, gradient = self._kernels, self._gradient()
        return lambda: kernels.row_gradients(*gradient.terms)

    def row_update(self) -> Call:
        """Return a call that computes updated rows from the gradient's parts.

        The moments start at zero.
        """
        kernels, gradient = self._kernels, self._gradient()
        state, adam = self._state(kernels.copy_dtype), self._adam()
        return lambda: kernels.row_update(gradient, state.W_dec).apply(state, adam)

    def _gradient(self) -> SparseGradient:
        x, active = self.inputs.raw, self._active
        decoded = self._kernels.decode_error(x, active, self.inputs.W)
        weight = -2.0 / x.numel()  # derivative of the mean squared error over rows and channels
        weighed = active._replace(values=weight * active.values)
        return SparseGradient(weighed, weight * decoded.dots, x, decoded.error, len(x))

    def _state(self, copy_dtype: torch.dtype | None) -> RowState:
        inputs = self.inputs
        W_dec = torch.empty(inputs.work.L, inputs.work.D, device=inputs.setup.device)
        W_dec.copy_(inputs.W).div_(W_dec.norm(dim=1, keepdim=True))
        W_enc, b_enc = W_dec.clone(), W_dec.new_zeros(inputs.work.L)
        matrices = (W_enc, W_dec, b_enc)
        copies = None
        if copy_dtype is not None:
            copies = (W_enc.to(copy_dtype), W_dec.to(copy_dtype))
        first = (torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc))
        second = (torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc))
        return RowState(*matrices, first, second, copies, 0)

    def _adam(self) -> AdamStep:
        config, zero = OptimConfig(), torch.zeros((), device=self.inputs.setup.device)
        return AdamStep(_LR, config.beta1, config.beta2, config.eps, zero + 1, None, zero)


@cache
def engine_name() -> str:
    """Return the engine that runs a step: "deepspeed", or "none" if it is not installed."""
    try:
        import deepspeed  # noqa: F401 - whether it can be imported is the question
    except ImportError:
        return "none"
    return "deepspeed"


@cache
def load_engine(setup: Setup) -> None:
    """Run one tiny step, so that the engine's imports do not count as memory of the first row.

    Args:
        setup: Device and dtype.
    """
    make_step(Inputs(_TINY, setup), VARIANTS[0])()


def _step_case(inputs: Inputs, variant: Variant) -> Case:
    notes: dict[str, Any] = {"engine": engine_name()}

    def make() -> Call:
        automatic = variant.prefilter == "auto"
        notes["prefilter"] = inputs.auto_prefilter if automatic else variant.prefilter
        return make_step(inputs, variant)

    return Case(
        "ours",
        variant.op,
        make,
        state_bytes(inputs, variant.moments),
        stateful=True,
        prepare=partial(load_engine, inputs.setup),
        notes=notes,
    )


def make_step(inputs: Inputs, variant: Variant) -> Call:
    """Return a whole training step: forward, backward, clip, Adam, renormalise, update ages.

    Args:
        inputs: Batch and sizes.
        variant: Settings of the step.
    """
    work, setup = inputs.work, inputs.setup
    config = trainer_config(inputs, variant)
    name = inputs.auto_prefilter if variant.prefilter == "auto" else variant.prefilter
    kernels = get_kernels(setup.kernels, setup.dtype, prefilter=name)
    sae = fresh_sae(config.sae, work.D, kernels, setup.device)
    train = _trainer(sae, config, setup.device)
    ages = torch.zeros(work.L, dtype=torch.int64, device=setup.device)
    ages[: int(work.L * DEAD_SHARE)] = DEAD_AFTER_TOKENS

    def call() -> object:
        if variant.auxk_rows:
            # Dead latents that fire would become alive, and the auxiliary loss would cost less.
            sae.tokens_since_fired.copy_(ages)
        return train(inputs.raw, 0)

    return call


def trainer_config(inputs: Inputs, variant: Variant) -> TrainerConfig:
    """Return the config of a step with the sizes of `inputs`."""
    work, sae, optim = inputs.work, TopKConfig(), OptimConfig()
    config = TrainerConfig(
        TopKConfig(
            n_latents=work.L,
            k=work.k,
            auxk_coef=sae.auxk_coef if variant.auxk_rows else 0.0,
            auxk_rows=variant.auxk_rows or 1.0,
            dead_after_tokens=DEAD_AFTER_TOKENS,
        ),
        OptimConfig(
            lr=variant.lr,
            clip_norm=optim.clip_norm if variant.clip else 0.0,
            moments=variant.moments,
        ),
        TrainConfig(tokens=10**12, batch_tokens=work.B, kernels=inputs.setup.kernels),
        ParallelConfig(),
    )
    config.validate()
    return config


@cache
def one_rank_mesh(device_type: str) -> Mesh:
    """Return one mesh shared by all steps, because each new mesh creates process groups."""
    return Mesh.create(device_type, 1, 1)


def fresh_sae(
    config: SAEConfig, d_model: int, kernels: Kernels, device: torch.device
) -> SparseAutoencoder:
    """Create an SAE with random unit rows directly on the device; it may not fit host memory.

    Args:
        config: Sizes.
        d_model: Width D.
        kernels: Kernels of the step.
        device: Device of the parameters.
    """
    mesh = one_rank_mesh(device.type)
    with torch.device("meta"):
        sae = build_sae(config, d_model, mesh, kernels, seed=0)
    sae.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.zero_()
        sae.input_scale.fill_(1.0)
        sae.W_dec.normal_()
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec)
        sae.refresh_copies()
    return sae


def _trainer(
    sae: SparseAutoencoder, config: TrainerConfig, device: torch.device
) -> Callable[[torch.Tensor, int], object]:
    if engine_name() == "deepspeed":
        return SAEEngine("sae", sae, config, device).train_step
    return PlainTrainer(sae, config).train_step


class PlainTrainer:
    """A trainer that does the work of `SAEEngine.train_step` on one rank, without DeepSpeed.

    Args:
        sae: An unsharded SAE.
        config: Optimiser and batch size.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainerConfig) -> None:
        self.sae = sae
        self.batch_tokens = config.train.batch_tokens
        lr = lr_at(config.optim, config.sae.n_latents, 0, config.train.tokens)
        self.optimizer = FusedRowAdam(sae, lr, config.optim, config.optim.clip_norm)
        for group in self.optimizer.param_groups:
            # As in the engine: otherwise a step cannot be captured as a CUDA graph.
            group["capturable"] = sae.kernels.asynchronous and sae.b_dec.device.type == "cuda"

    def train_step(self, raw: torch.Tensor, _step: int) -> None:
        """Run forward, backward, clip, update and renormalise, and update ages; raw [B, D]."""
        self.run_step(raw)

    def run_step(self, raw: torch.Tensor) -> StepOutput:
        """Run `train_step`, and return the loss and metrics."""
        out: StepOutput = self.sae(raw)
        # As in the engine, a loss that is not finite makes the optimiser skip the step.
        flag = (~out.loss.detach().isfinite()).float()
        torch.maximum(self.optimizer.found_inf, flag, out=self.optimizer.found_inf)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.update_tokens_since_fired(out.fired, self.batch_tokens, self.optimizer.found_inf)
        return out
