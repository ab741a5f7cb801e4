"""Which schema version a database has, and which one this release wants.

Every start asks `status`, so this module is quick to import; `migrate.upgrade`, which changes a schema, needs alembic
and lives apart for that reason. The versions of a tree are the files of its folder: `api_versions/api_001.py` is
version `api_001`, and they follow each other in that order. Seed 000.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import sqlalchemy as sa

from cellway.errors import Conflict

VERSION_TABLE = "cellway_alembic_version"
"""Not `alembic_version`: that one is the incumbent's, and stays beside ours in a database that was its."""

_CURRENT = sa.select(sa.column("version_num", sa.String)).select_from(sa.table(VERSION_TABLE))


class Tree(Enum):
    """The two kinds of database; each has its own versions."""

    API = "api"
    CELL = "cell"

    @property
    def folder(self) -> Path:
        """The folder that holds the versions."""
        return Path(__file__).with_name(f"{self.value}_versions")

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions, the oldest first."""
        return tuple(sorted(path.stem for path in self.folder.glob(f"{self.value}_*.py")))


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """The schema version of a database. `current` is None before the first upgrade; `pending` counts versions."""

    current: str | None
    head: str
    pending: int


def status(connection: sa.Connection, tree: Tree) -> SchemaStatus:
    """Compare a database's schema version with the newest one of `tree`.

    Raises: Conflict for a version that this release does not know: a newer release's, or the other tree's.
    """
    current: str | None = None
    if sa.inspect(connection).has_table(VERSION_TABLE):
        current = connection.execute(_CURRENT).scalar_one_or_none()
    versions = tree.versions
    if current is None:
        return SchemaStatus(None, versions[-1], len(versions))
    if current not in versions:
        raise Conflict(
            "schema.unknown_version",
            f"This database has schema version {current}, and this release knows {tree.value} databases "
            f"up to version {versions[-1]}",
            current=current,
            head=versions[-1],
        )
    return SchemaStatus(current, versions[-1], len(versions) - 1 - versions.index(current))
