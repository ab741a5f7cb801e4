"""Upgrade a database's schema to the newest version of its tree, with alembic.

Called by `cellway db sync` and by `cellway up`; the versions themselves call `create_missing`. Schemas only go
forward. It opens no engine, and it never touches a table that was there before: an existing deployment's tables are
adopted as they are, and ours are created beside them. Seed 000.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.compiler import DDLCompiler

from cellway.db.schema import VERSION_TABLE, SchemaStatus, Tree, status
from cellway.errors import Conflict, Unavailable

_POSTGRESQL_LOCK = 0x63656C6C776179  # "cellway"; of all numbers only this one has to differ from other programs'


def upgrade(engine: sa.Engine, tree: Tree, *, wait_seconds: float = 60.0) -> SchemaStatus:
    """Bring a database to the newest version of `tree`, and return the status it had before.

    Safe to run again after a crash, and at the same time from several processes: the others wait up to
    `wait_seconds` for the first, then find nothing to do.

    Raises: Conflict for a version that this release does not know, or for tables that cannot be adopted; Unavailable
    when another upgrade holds the database for too long, or when the database refuses.
    """
    try:
        with _exclusively(engine, wait_seconds) as connection:
            before = status(connection, tree)
            if before.pending:
                _run(connection, tree)
            return before
    except DBAPIError as error:
        reason = str(error.orig).partition("\n")[0]
        raise Unavailable("schema.upgrade_failed", f"The database did not take the schema upgrade: {reason}") from error


def create_missing(connection: sa.Connection, tables: sa.MetaData) -> None:
    """Create those of `tables` that the database does not have, each with its keys in one piece.

    Raises: Conflict, before anything is created, when a table is there and lacks a column that we need.
    """
    inspector = sa.inspect(connection)
    existing = set(inspector.get_table_names()) & set(tables.tables)
    columns = inspector.get_multi_columns(filter_names=sorted(existing)) if existing else {}
    missing = [
        f"{name}.{column}"
        for (_, name), present in sorted(columns.items())
        for column in set(tables.tables[name].columns.keys()) - {column["name"] for column in present}
    ]
    if missing:
        raise Conflict(
            "schema.not_adoptable",
            f"This database is too old to be adopted; it lacks {', '.join(sorted(missing))}",
            missing=sorted(missing),
        )
    for table in tables.sorted_tables:
        if table.name in existing:
            continue
        if connection.dialect.name in ("mysql", "mariadb"):
            connection.execute(_CreateWithKeys(table))
        else:
            table.create(connection, checkfirst=False)


class _CreateWithKeys(CreateTable):
    """CREATE TABLE with the keys inside.

    MariaDB commits each statement by itself, and a table that a crash left without its keys would be taken for one
    of the incumbent's by the next run.
    """


@compiles(_CreateWithKeys)
def _create_with_keys(create: _CreateWithKeys, compiler: DDLCompiler, **kwargs: Any) -> str:
    statement: str = compiler.visit_create_table(create, **kwargs)  # type: ignore[no-untyped-call]
    body, end, options = statement.rpartition("\n)")
    preparer = compiler.preparer
    keys = [
        f", \n\t{'UNIQUE ' if index.unique else ''}KEY {preparer.format_index(index)}"
        f" ({', '.join(preparer.format_column(column) for column in index.columns)})"
        for index in sorted(create.element.indexes, key=lambda index: str(index.name))
    ]
    return "".join([body, *keys, end, options])


def _run(connection: sa.Connection, tree: Tree) -> None:
    scripts = ScriptDirectory(tree.folder, version_locations=[tree.folder])

    def steps(current: Sequence[str], _context: MigrationContext) -> list[RevisionStep]:
        newest_first = scripts.iterate_revisions("head", tuple(current) or "base")
        return [MigrationStep.upgrade_from_script(scripts.revision_map, script) for script in reversed([*newest_first])]

    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "fn": steps})
    # Given as an argument, because `alembic.op` is one global for all threads.
    context.run_migrations(op=Operations(context))


@contextmanager
def _exclusively(engine: sa.Engine, wait_seconds: float) -> Iterator[sa.Connection]:
    """Open a transaction that no other upgrade of the same database runs beside."""
    with engine.connect() as connection:
        connection.detach()  # its lock and its settings end with it
        if connection.dialect.name == "sqlite":
            driver: Any = connection.connection.dbapi_connection
            driver.execute(f"PRAGMA busy_timeout = {int(wait_seconds * 1000)}")
            connection.execution_options(begin="BEGIN IMMEDIATE")
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(wait_seconds * 1000)}")
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
            elif connection.dialect.name != "sqlite":
                connection.exec_driver_sql("SET max_statement_time = 0")
                name = "CONCAT('cellway ', SHA1(DATABASE()))"  # the lock is the whole server's
                if connection.exec_driver_sql(f"SELECT GET_LOCK({name}, {wait_seconds})").scalar_one() != 1:
                    raise Unavailable("schema.upgrade_failed", "Another schema upgrade holds the database")
            yield connection
