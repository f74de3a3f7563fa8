"""The mutations of all packages.

A new mutation goes into the table of the package that its first edit changes.
"""

from __future__ import annotations

from tests.mutation import activation_store, analysis, cluster, conf, project, sae_core
from tests.mutation.mutation import FAULTS

TABLES = (activation_store, sae_core, conf, cluster, analysis, project)
ALL = sorted(
    (mutation for table in TABLES for mutation in table.MUTATIONS),
    key=lambda mutation: mutation.fault,
)
MUTATIONS = [mutation for mutation in ALL if mutation.fault in FAULTS]
"""Mutations of the fault table, by number."""
EXTRA = [mutation for mutation in ALL if mutation.fault not in FAULTS]
"""Mutations of further protections, by number."""
