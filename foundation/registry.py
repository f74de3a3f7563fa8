"""A registry of named members, used to look up and add every kind of extension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from foundation.errors import ConfigError, FoundryError

T = TypeVar("T")


class Registry(Generic[T]):
    """Members of one kind, such as architectures or codecs, by name.

    Members come from three sources. The package that owns the registry lists the built-in members.
    Installed packages declare entry points in the group `latent_foundry.<group>`. `register` adds a
    member in this process only. A member is imported when it is first looked up, so that listing
    the names needs no heavy import.

    Args:
        kind: Word for a member in messages, such as "architecture".
        key: Setting that names a member, for messages, such as "sae.architecture".
        group: Last part of the name of the entry point group, such as "architectures".
        builtin: Name -> "module:attribute" of each built-in member.
    """

    def __init__(self, kind: str, key: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.key = key
        self.group = f"latent_foundry.{group}"
        self._places = dict(builtin)
        self._packages: dict[str, str] = {}
        """Name of each installed member -> the package that declares it."""
        self._members: dict[str, T] = {}
        self._looked_for_plugins = False

    def register(self, name: str, member: T) -> None:
        """Add a member in this process.

        Raises:
            ValueError: If the name is already taken.
        """
        if name in self.names():
            raise ValueError(f"{self.kind} {name!r} already exists; choose another name")
        self._members[name] = member

    @contextmanager
    def registered(self, name: str, member: T) -> Iterator[None]:
        """Add a member for the duration of the block."""
        self.register(name, member)
        try:
            yield
        finally:
            del self._members[name]

    def names(self) -> list[str]:
        """Return the names of all members: first built-in, then installed, then registered ones.

        No member is imported.

        Raises:
            FoundryError: If an installed package declares a name that is already taken.
        """
        if not self._looked_for_plugins:
            self._find_plugins()
        return list(dict.fromkeys([*self._places, *self._members]))

    def _find_plugins(self) -> None:
        places = dict(self._places)
        packages: dict[str, str] = {}
        for point in entry_points(group=self.group):
            package = point.dist.name if point.dist else "an installed package"
            if places.setdefault(point.name, point.value) != point.value:
                owner = packages.get(point.name, "this project")
                raise FoundryError(
                    f"{package} declares the {self.kind} {point.name!r}, which already belongs "
                    f"to {owner}; uninstall {package}, or rename its entry point in the group "
                    f"{self.group}"
                )
            packages[point.name] = package
        # Only now: after an error, the next call must find the same clash again.
        self._places = places
        self._packages = packages
        self._looked_for_plugins = True

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> T:
        """Return a member, importing it on first use.

        Raises:
            ConfigError: If no member has this name. The message lists the existing names.
            FoundryError: If the package that declares the member cannot be imported.
        """
        self.check(name)
        if name not in self._members:
            self._members[name] = self._import(name)
        return self._members[name]

    def _import(self, name: str) -> T:
        place = self._places[name]
        try:
            return cast(T, import_attribute(place))
        except Exception as error:  # the package's code may raise any exception
            if name not in self._packages:
                raise
            package = self._packages[name]
            raise FoundryError(
                f"{self.kind} {name!r} of {package} could not be imported from {place}: "
                f"{type(error).__name__}: {error}; fix or uninstall {package}"
            ) from error

    def check(self, name: str, key: str | None = None) -> None:
        """Check that a member named `name` exists, without importing it.

        Args:
            name: Name of the member.
            key: Setting to name in the error message; None means the registry's own `key`.

        Raises:
            ConfigError: If no member has this name.
        """
        if name not in self.names():
            raise ConfigError(key or self.key, name, f"one of: {', '.join(self.names())}")

    def items(self) -> Iterator[tuple[str, T]]:
        """Import all members, and yield each with its name."""
        for name in self.names():
            yield name, self[name]


def import_attribute(place: str) -> Any:
    """Import the object named "module:attribute"; the attribute may contain dots."""
    module, _, path = place.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value
