"""Read the structure of the packages and tests: modules, their imports, layers, import cycles.

All import statements count, whether at the top of a file or inside a function. Importing `a.b.c`
also runs the `__init__.py` of `a` and `a.b`, but does not count as an import of these packages,
because a package may import its own members.
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LAYERS: tuple[tuple[str, ...], ...] = (
    ("foundation",),
    ("activation_store", "sae_core"),
    ("conf",),
    ("cluster",),
    ("analysis",),
    ("launch", "benchmarks"),
    ("tests",),
)
"""Lowest first. A package imports only packages of lower layers, never one of its own layer."""
MOST_MODULES = 16
"""Limit of modules in one folder; `__init__.py` and `__main__.py` do not count."""


@dataclass(frozen=True)
class Module:
    """One Python file."""

    name: str
    path: Path
    imports: dict[str, int]
    """Imported module (of this project or not) -> line of its first import."""
    strings: frozenset[str]
    """String constants, which may name modules that are started by name."""
    is_command: bool
    """True if it runs as `python -m name`."""


def read_house(root: Path) -> dict[str, Module]:
    """Read all modules of the packages in `LAYERS` below `root`, by name."""
    packages = [package for layer in LAYERS for package in layer]
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    paths += [root / f"{package}.py" for package in packages if (root / f"{package}.py").is_file()]
    names = {_name(root, path) for path in paths}
    modules = (_read(root, path, names) for path in paths)
    return {module.name: module for module in modules}


def packages_without_layer(root: Path) -> list[str]:
    """List the folders in `root` that contain Python modules but are not listed in `LAYERS`."""
    placed = {package for layer in LAYERS for package in layer}
    folders = {path.parent.name for path in root.glob("[!.]*/*.py")}
    return sorted(folders - placed)


def wrong_imports(house: dict[str, Module]) -> list[str]:
    """List imports of a package in the same layer or a higher one."""
    layer_of = {package: layer for layer, row in enumerate(LAYERS) for package in row}
    wrong = []
    for module in house.values():
        package = module.name.split(".")[0]
        for target, line in module.imports.items():
            other = target.split(".")[0]
            if other in layer_of and other != package and layer_of[other] >= layer_of[package]:
                wrong.append(f"{module.path}:{line} imports {target}")
    return wrong


def import_cycles(house: dict[str, Module]) -> list[list[str]]:
    """List groups of modules that import each other, in cycles of any length."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        """Tarjan's algorithm for strongly connected components."""
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for target in house[name].imports:
            if target not in house:
                continue
            if target not in index:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], index[target])
        if lowest[name] == index[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in house:
        if name not in index:
            visit(name)
    return found


def crowded_folders(house: dict[str, Module]) -> list[str]:
    """List folders with more than `MOST_MODULES` modules."""
    special = ("__init__.py", "__main__.py")
    counts = Counter(
        module.path.parent for module in house.values() if module.path.name not in special
    )
    return [
        f"{folder}: {count} modules" for folder, count in counts.items() if count > MOST_MODULES
    ]


def unused_modules(house: dict[str, Module]) -> list[str]:
    """List modules that nothing imports, starts by name or runs as a command.

    A package's module that only tests use counts as unused. Test files and `conftest.py` are used
    by pytest.
    """
    used: set[str] = set()
    used_by_tests: set[str] = set()
    for module in house.values():
        users = used_by_tests if _is_test(module) else used
        users.update(module.imports, module.strings)
    unused = []
    for name, module in house.items():
        is_run = module.is_command or module.path.name == "__init__.py"
        if _is_test(module):
            is_run = is_run or module.path.name.startswith(("test_", "conftest."))
            is_run = is_run or name in used_by_tests
        if not is_run and name not in used:
            unused.append(name)
    return unused


def _is_test(module: Module) -> bool:
    return module.name.split(".")[0] == "tests"


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(root: Path, path: Path, names: set[str]) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = _name(root, path)
    imports: dict[str, int] = {}
    strings = set()
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                targets.append(member if member in names else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value.partition(":")[0])  # also of "module:attribute"
        for target in targets:
            if target != name:
                imports.setdefault(target, getattr(node, "lineno", 0))
    guards = (ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If))
    is_command = path.name == "__main__.py" or "__name__ == '__main__'" in guards
    return Module(name, path, imports, frozenset(strings), is_command)
