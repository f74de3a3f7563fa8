"""Load the language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.language_model.cache import built_once, digest
from cluster.language_model.errors import ModelError
from cluster.language_model.files import ModelFiles, locate_model
from cluster.language_model.no_tokenizer import NoTokenizer
from cluster.language_model.quantised import dequantise_on_load, require_dequantised
from conf.schema.model import ModelConfig

if TYPE_CHECKING:
    from torch import nn


def load_tokenizer(cfg: ModelConfig, cache_dir: Path, kind: str = "text") -> Any:
    """Load the model's tokenizer without reading weights.

    If documents are ids of tokens (`data.kind=token_ids`), a model without a tokenizer gets a
    `NoTokenizer`.

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
        with reading(f"model.path: could not load a tokenizer from {folder}"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ModelError:
        if kind == "token_ids" and not any(folder.glob("token*")):
            return NoTokenizer(config_of(folder))
        raise
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.path: expected a fast tokenizer (tokenizer.json) in {folder}; save one there"
        )
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return a hash of everything that determines how text is turned into tokens."""
    if isinstance(tokenizer, NoTokenizer):
        return "no tokenizer"
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
    parts = [files.weights_sha256(cache_dir), cfg.dtype]
    key = digest(parts if cfg.kind == "causal_lm" else [*parts, cfg.kind])
    return built_once(
        cache_dir / "models" / key, lambda target: _convert_weights(files, cfg, target)
    )


def load_language_model(
    cfg: ModelConfig, cache_dir: Path, device: str = "cpu", shards: int = 1
) -> nn.Module:
    """Load the language model in `cfg.dtype`, in evaluation mode and without gradients.

    Args:
        cfg: Configuration of the model.
        cache_dir: Folder in which converted models are kept. They load in under a second the next
            time.
        device: cpu or cuda.
        shards: Number of ranks in the default process group. Each rank loads its part of the
            weights.

    Raises:
        ModelError: If the files are missing or damaged, lack tensors of the model or have tensors
            that it does not use, or if transformers lacks the architecture.
    """
    options = {}
    if shards > 1:
        from transformers.distributed import DistributedConfig

        options = {"distributed_config": DistributedConfig(tp_size=shards)}
    model = _from_folder(prepared_folder(cfg, cache_dir), cfg, **options)
    loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def load_skeleton(cfg: ModelConfig, cache_dir: Path) -> nn.Module:
    """Build the model on the meta device: its modules and shapes, without values.

    Only the headers of the weight files are read, which takes seconds for any model.

    Raises:
        ModelError: As `load_language_model`.
    """
    return _from_folder(prepared_folder(cfg, cache_dir), cfg, device_map="meta")


def _from_folder(folder: Path, cfg: ModelConfig, **options: Any) -> Any:
    """Load the model from a folder, and check that its files have all of its tensors.

    Raises:
        ModelError: If they do not, or cannot be read.
    """
    import torch

    config = config_of(folder)
    auto = auto_class(config, cfg.kind)
    with quiet_transformers(), reading(f"model.path: could not load the model in {folder}"):
        quantised = dequantise_on_load(config, folder)
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name in `info`, and refused
            **options,
        )
    require_complete(model, info, folder, cfg)
    if quantised:
        require_dequantised(model, folder, getattr(torch, cfg.dtype))
    return model


def auto_class(config: Any, kind: str) -> Any:
    """Return the transformers class that loads a model of this kind.

    Raises:
        ModelError: If the architecture has no language-model head, or is bidirectional.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if kind == "base":
        return transformers.AutoModel
    name = config.model_type
    use_base = "; set model.kind=base to harvest it, and evaluate without cross-entropy"
    masked = name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or name == "bert-generation"
    if masked and not (getattr(config, "is_decoder", False) or config.is_encoder_decoder):
        raise ModelError(
            f"model.path: {name} models are bidirectional; expected a model that predicts the "
            f"next token{use_base}"
        )
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"model.path: transformers has no {name} model that predicts the next token{use_base}"
    )


def require_complete(model: Any, info: Any, folder: Path, cfg: ModelConfig) -> None:
    """Check that the files have exactly the tensors of the model.

    Transformers fills missing tensors with random numbers, which differ between processes. Tensors
    that are tied to others, or that the architecture does not need, are not in `info`. Unexpected
    tensors outside the model, such as another head, are accepted.

    Args:
        model: The model that was loaded.
        info: What transformers reports with `output_loading_info`.
        folder: Folder with the files.
        cfg: Configuration of the model.

    Raises:
        ModelError: If tensors are missing, have another shape, or belong to parts that the model
            does not have.
    """
    missing = set(info["missing_keys"])
    if cfg.kind == "base":
        # A pooler comes after all hidden states. Models saved with another head have none.
        pooler = {key for key in missing if key.startswith("pooler.")}
        missing -= pooler if not any(h.startswith("pooler") for h in cfg.hookpoints) else set()
    children = dict(model.named_children())
    unexpected = {key for key in info["unexpected_keys"] if key.split(".")[0] in children}
    mismatched = {
        f"{key} {list(there)} instead of {list(wanted)}"
        for key, there, wanted in info["mismatched_keys"]
    }
    found = {
        "lack tensors of the model": missing,
        "have tensors of different shapes": mismatched,
        "have tensors that it does not use": unexpected,
    }
    problems = [f"{what}: {_names(keys)}" for what, keys in found.items() if keys]
    if info.get("error_msgs"):
        problems.append(one_line(" ".join(map(str, info["error_msgs"]))))
    if problems:
        raise ModelError(
            f"model.path: {folder} does not fit {type(model).__name__} as its config.json "
            f"describes it. The files {'; they '.join(problems)}. Download or save the model again"
            + (
                "; if it has no language-model head, set model.kind=base"
                if cfg.kind != "base" and missing
                else ""
            )
        )


def _names(keys: set[str]) -> str:
    """Return the first few names, and how many there are."""
    shown = ", ".join(sorted(keys)[:4])
    return shown if len(keys) <= 4 else f"{shown} and {len(keys) - 4} more"


def one_line(error: object) -> str:
    """Return an error's text as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _convert_tokenizer(files: ModelFiles, target: Path) -> None:
    from transformers import AutoTokenizer

    with quiet_transformers(), _reading_gguf(files):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf_file)
    tokenizer.save_pretrained(target)


def _convert_weights(files: ModelFiles, cfg: ModelConfig, target: Path) -> None:
    import torch
    import transformers

    # Newer releases of transformers keep GGUF weights packed, but packed weights are slow on CPUs
    # and cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    with quiet_transformers(), _reading_gguf(files):
        config = transformers.AutoConfig.from_pretrained(files.folder, gguf_file=files.gguf_file)
        model, info = auto_class(config, cfg.kind).from_pretrained(
            files.folder,
            gguf_file=files.gguf_file,
            dtype=getattr(torch, cfg.dtype),
            output_loading_info=True,
            **options,
        )
        require_complete(model, info, files.folder / str(files.gguf_file), cfg)
        model.save_pretrained(target)


@contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error while transformers reads files into a ModelError.

    Given a damaged file, the parsers may raise any exception, such as IndexError or struct.error.

    Args:
        what: Beginning of the message: what could not be read.
        remedy: End of the message.

    Raises:
        ModelError: If the block raises any error.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # files with wrong values make transformers raise whatever it meets
        raise ModelError(f"{what}: {one_line(error)}{remedy}") from error


def _reading_gguf(files: ModelFiles) -> AbstractContextManager[None]:
    return reading(
        f"model.gguf_file: could not read {files.folder / str(files.gguf_file)}",
        "; download it again, or use safetensors weights",
    )


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
    files = locate_model(cfg)
    return config_of(files.folder, files.gguf_file)


def config_of(folder: Path, gguf_file: str | None = None) -> Any:
    """Load the transformers configuration in a folder, or of a GGUF file in it.

    Raises:
        ModelError: If it is missing or cannot be read.
    """
    from transformers import AutoConfig

    options = {"gguf_file": gguf_file} if gguf_file else {}
    with quiet_transformers(), reading(f"model.path: could not load the config in {folder}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
