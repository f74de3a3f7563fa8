"""Parse hookpoints; each selects one tensor of a module of the language model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foundation.errors import ConfigError

DEFAULT_KIND = "output"
"""Kind of a hookpoint that is only a module name."""

_HOOKPOINT = re.compile(
    r"(?P<module>\w[\w.\-]*)(?:@(?P<kind>\w[\w.\-]*)(?:\[(?P<options>[^\[\]]+)\])?)?", re.ASCII
)
_OPTION = re.compile(r"([\w.\-]+)=([\w.\-]+)", re.ASCII)


@dataclass(frozen=True)
class Hookpoint:
    """A tensor of the language model, identified by its module and by a kind with options.

    Two strings for the same tensor, such as `model.layers.9` and `model.layers.9@output`, give
    equal hookpoints.
    """

    module: str
    """Name of the module, such as `model.layers.9`."""
    kind: str = DEFAULT_KIND
    """Name of the hookpoint kind, such as `output`."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values of the options, sorted by name. The kind defines their meaning."""

    def __str__(self) -> str:
        """Return the shortest string that `parse_hookpoint` reads as this hookpoint."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        if self.kind == DEFAULT_KIND and not options:
            return self.module
        return f"{self.module}@{self.kind}" + (f"[{options}]" if options else "")

    def describe(self, quote: str = "'") -> str:
        """Return a readable description, such as "output of 'model.layers.9'".

        Args:
            quote: Quotation mark to put around the module's name.
        """
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        words = f"{self.kind} of {quote}{self.module}{quote}"
        return f"{words} ({options})" if options else words


def parse_hookpoint(text: str, key: str = "model.hookpoints") -> Hookpoint:
    """Parse `module`, `module@kind` or `module@kind[option=value,...]`.

    Only the syntax is checked, not whether the module and the kind exist.

    Args:
        text: The hookpoint.
        key: The setting that the hookpoint comes from, for the error message.

    Raises:
        ConfigError: If the text does not have one of these forms, or an option is given twice.
    """
    found = _HOOKPOINT.fullmatch(text)
    if found is None:
        raise _malformed(key, text)
    options: dict[str, str] = {}
    for part in found["options"].split(",") if found["options"] else []:
        option = _OPTION.fullmatch(part)
        if option is None or option[1] in options:
            raise _malformed(key, text)
        options[option[1]] = option[2]
    return Hookpoint(found["module"], found["kind"] or DEFAULT_KIND, tuple(sorted(options.items())))


def check_hookpoints(texts: Sequence[str]) -> None:
    """Check the syntax of `model.hookpoints`, and that no tensor is listed twice.

    Raises:
        ConfigError: If a string is malformed, or two strings name the same tensor.
    """
    if len({parse_hookpoint(text) for text in texts}) != len(texts):
        raise ConfigError(
            "model.hookpoints", list(texts), "each hookpoint only once", "remove the duplicates"
        )


def find_hookpoint(text: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is the same tensor as `text`; None if there is none.

    An equal name is preferred. Names of a store's arrays need not be hookpoints; such a name
    matches only itself.

    Args:
        text: A hookpoint, or the name of an array.
        names: Hookpoints, or names of arrays.
    """
    known = list(names)
    if text in known:
        return text
    wanted = _parsed(text)
    if wanted is None:
        return None
    return next((name for name in known if _parsed(name) == wanted), None)


def _parsed(text: str) -> Hookpoint | None:
    try:
        return parse_hookpoint(text)
    except ConfigError:
        return None


def _malformed(key: str, text: str) -> ConfigError:
    return ConfigError(
        key,
        text,
        "module, module@kind or module@kind[option=value,...], with each option once and names of "
        "letters, digits, dots, dashes and underscores",
        "use for example model.layers.9 or model.layers.9@output",
    )
