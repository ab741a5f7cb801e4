"""Making and upgrading the schemas of databases: what `cellway db` does, and `cellway up` at its start.

These run before there is anything to serve, so they use engines of their own, not the application's.
"""

from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from cellway.cells import mappings
from cellway.cells.mappings import CellMapping
from cellway.cells.registry import Templates
from cellway.config import Limits, Secret
from cellway.context import Clock
from cellway.db import migrate
from cellway.db.engines import open_engine
from cellway.db.schema import SchemaStatus, Tree, status
from cellway.db.transaction import ApiTx
from cellway.errors import CellwayError, Invalid, Unavailable


@dataclass(frozen=True, slots=True)
class SchemaReport:
    """One database's schema. `problem` says why it could not be read or upgraded."""

    database: str
    before: str | None
    after: str | None
    head: str
    problem: str | None = None


def sync(name: str, url: Secret | Invalid, tree: Tree, *, limits: Limits) -> SchemaReport:
    """Make a database if it is an SQLite file that is missing, and upgrade its schema. Safe when run twice at once.

    Raises: Invalid, Conflict, Unavailable.
    """
    if isinstance(url, Invalid):
        raise url
    # A schema change may wait for other sessions longer than any read may.
    engine = open_engine(url, create=True, deadline_seconds=30 * limits.database_deadline_seconds)
    try:
        before = migrate.upgrade(engine, tree)
    finally:
        engine.dispose()
    return SchemaReport(name, before.current, before.head, before.head)


def read_status(name: str, url: Secret | Invalid, tree: Tree, *, limits: Limits) -> SchemaReport:
    """Compare a database's schema with what this release wants. What goes wrong is in the report."""
    if isinstance(url, Invalid):
        return SchemaReport(name, None, None, tree.versions[-1], url.message)
    try:
        engine = open_engine(url, deadline_seconds=limits.database_deadline_seconds)
        with engine.connect() as connection:
            found: SchemaStatus = status(connection, tree)
    except CellwayError as error:
        return SchemaReport(name, None, None, tree.versions[-1], error.message)
    except DBAPIError:
        return SchemaReport(name, None, None, tree.versions[-1], "the database does not answer")
    return SchemaReport(name, found.current, found.current, found.head)


def read_cells(url: Secret, *, limits: Limits, clock: Clock) -> list[CellMapping]:
    """Return the cell mappings of an API database. Raises: Unavailable."""
    engine = open_engine(url, deadline_seconds=limits.database_deadline_seconds)
    try:
        with engine.connect() as connection:
            return mappings.list_cells(ApiTx(connection, clock.now()))
    except DBAPIError as error:
        raise Unavailable(
            "api_database.unavailable", "The API database does not answer, or has no schema yet"
        ) from error
    finally:
        engine.dispose()


def each_cell(cells: list[CellMapping], templates: Templates) -> list[tuple[str, Secret | Invalid]]:
    """Return name and resolved URL of every cell's database, or why it cannot be resolved."""
    found: list[tuple[str, Secret | Invalid]] = []
    for cell in cells:
        try:
            found.append((cell.name, templates.resolve(cell.database_connection, "database")))
        except Invalid as error:
            found.append((cell.name, error))
    return found
