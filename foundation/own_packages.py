"""Check that this project's packages are the ones that Python imports.

Their names are common words. A package of another distribution, or a folder on PYTHONPATH, may have
the same name and come first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from foundation.errors import EXIT_BAD_INPUT

_NAMES = ("activation_store", "analysis", "cluster", "conf", "foundation", "sae_core")


def require_own_packages() -> None:
    """End the process with a message if one of the packages is imported from elsewhere."""
    root = Path(__file__).resolve().parents[1]
    for name in _NAMES:
        spec = importlib.util.find_spec(name)
        found = [] if spec is None else list(spec.submodule_search_locations or [str(spec.origin)])
        if not found or Path(found[0]).resolve() != root / name:
            places = ", ".join(found) or "nowhere"
            print(
                f"error: package {name!r} was found in {places}: expected {root / name}, the "
                "package of latent-foundry; remove the other one from PYTHONPATH, uninstall its "
                "distribution, or use a separate environment for latent-foundry",
                file=sys.stderr,
            )
            sys.exit(EXIT_BAD_INPUT)
