"""Load the language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.language_model.cache import built_once, digest
from cluster.language_model.errors import ModelError
from cluster.language_model.files import ModelFiles, locate_model
from cluster.language_model.hookpoint_kinds import resolve
from conf.schema.model import ModelConfig

if TYPE_CHECKING:
    from torch import nn


def load_tokenizer(cfg: ModelConfig, cache_dir: Path) -> Any:
    """Load the model's tokenizer without reading weights.

    A GGUF model's tokenizer is stored inside the weight file, from which it is extracted once into
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
    """Return a hash of everything that determines how text is turned into tokens."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])


def prepared_folder(cfg: ModelConfig, cache_dir: Path) -> Path:
    """Return a folder from which transformers can load the model.

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
        cache_dir: Folder in which converted models are kept. They load in under a second the next
            time.
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
    """Hide transformers' progress bars and warnings during the block. Errors are still raised."""
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


def hookpoint_width(cfg: ModelConfig, hookpoint: str, cache_dir: Path) -> int:
    """Return the width D of a hookpoint's rows, using only the model's configuration.

    Raises:
        ModelError: If the model is not found, or its configuration lacks the size.
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """
    parsed, kind = resolve(hookpoint)
    try:
        return kind.width(parsed, model_config(cfg, cache_dir))
    except AttributeError as error:
        raise ModelError(
            f"model.path={cfg.path!r}: expected a config with the width of {hookpoint!r}: {error}"
        ) from error
