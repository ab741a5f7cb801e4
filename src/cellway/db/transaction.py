"""An open transaction, and what its statements need to mean the same on SQLite, PostgreSQL and MariaDB.

Nouns take an `ApiTx` or a `CellTx` as their first argument, so that a cell's query cannot run on the API database.
Only `engines` opens one. It makes no engine and knows no table.
"""

import enum
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from cellway.db.columns import IpAddress
from cellway.errors import CellwayError

Row: TypeAlias = sa.Row[*tuple[Any, ...]]
"""A row of any columns."""
Result: TypeAlias = sa.CursorResult[*tuple[Any, ...]]
Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


class Tx:
    """An open transaction: a connection, and one `now` (naive UTC by the database's clock) for all of it."""

    __slots__ = ("connection", "now")

    def __init__(self, connection: sa.Connection, now: datetime) -> None:
        self.connection = connection
        self.now = now

    def execute(self, statement: sa.Executable, parameters: Parameters = None) -> Result:
        """Run one statement."""
        return self.connection.execute(statement, parameters)


class ApiTx(Tx):
    """A transaction on the API database."""

    __slots__ = ()


class CellTx(Tx):
    """A transaction on one cell's database."""

    __slots__ = ()


def insert_if_absent(tx: Tx, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert one row unless a unique key of it is taken; tell whether this call inserted it."""
    dialect = tx.connection.dialect.name
    if dialect == "postgresql":
        statement = postgresql.insert(table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        return tx.execute(statement, values).rowcount == 1
    if dialect == "sqlite":
        return tx.execute(sqlite.insert(table).on_conflict_do_nothing(), values).rowcount == 1
    # MariaDB's INSERT IGNORE also truncates what does not fit, and its row counts cannot tell.
    try:
        with tx.connection.begin_nested():
            tx.execute(sa.insert(table), values)
    except IntegrityError as error:
        if not _is_unique_violation(error):
            raise
        return False
    return True


def insert_many_if_absent(tx: Tx, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert each row unless a unique key of it is taken, without telling which; the taken ones stay as they are.

    A key that another transaction has written and not committed is waited for.
    """
    if not rows:
        return
    match tx.connection.dialect.name:
        case "postgresql":
            # With RETURNING, SQLAlchemy makes one statement of many rows.
            key = next(iter(table.primary_key))
            statement: sa.Executable = postgresql.insert(table).on_conflict_do_nothing().returning(key)
        case "sqlite":
            statement = sqlite.insert(table).on_conflict_do_nothing()
        case _:
            # Not INSERT IGNORE, which also truncates what does not fit.
            key = next(iter(table.primary_key))
            statement = mysql.insert(table).on_duplicate_key_update({key.name: key})
    tx.execute(statement, rows)


@contextmanager
def unique_violation(becomes: CellwayError) -> Iterator[None]:
    """Turn a unique key's refusal inside the block into `becomes`; other integrity errors pass."""
    try:
        yield
    except IntegrityError as error:
        if not _is_unique_violation(error):
            raise
        raise becomes from error


_SQLITE_UNIQUE = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY}
_SQLITE_AGAIN = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SQLITE_DOWN = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_READONLY,
}
_POSTGRESQL_AGAIN = {"40001", "40P01", "55P03"}
_POSTGRESQL_READ_ONLY = "25006"
_MARIADB_DUPLICATE = 1062
_MARIADB_AGAIN = {1205, 1213, 1305}
"""Lock timeout, deadlock, and no such savepoint: the deadlock that is met under one takes the savepoint with it."""
_MARIADB_OURS = {1054, 4025}
"""No such column, and a CHECK that refuses: PyMySQL gives them the class of outages."""


class Verdict(enum.Enum):
    """What a driver's error means for the unit of work that met it."""

    AGAIN = enum.auto()
    """A deadlock or lock timeout: the transaction did nothing, and the next try may succeed."""
    DOWN = enum.auto()
    """The database or the way to it has failed."""
    OURS = enum.auto()
    """A mistake in the statement or its values."""


def judge(error: DBAPIError) -> Verdict:
    """Tell what a driver's error says of its database."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        # What the module itself refuses, such as a value of a wrong type, has no code.
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        return Verdict.AGAIN if code in _SQLITE_AGAIN else Verdict.DOWN if code in _SQLITE_DOWN else Verdict.OURS
    state, number = getattr(cause, "sqlstate", None), _mariadb_number(error)
    if state in _POSTGRESQL_AGAIN or number in _MARIADB_AGAIN:
        return Verdict.AGAIN
    if error.connection_invalidated or state == _POSTGRESQL_READ_ONLY:
        return Verdict.DOWN
    outage = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) and number not in _MARIADB_OURS
    return Verdict.DOWN if outage else Verdict.OURS


def _is_unique_violation(error: IntegrityError) -> bool:
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        return cause.sqlite_errorcode in _SQLITE_UNIQUE
    return getattr(cause, "sqlstate", None) == "23505" or _mariadb_number(error) == _MARIADB_DUPLICATE


def _mariadb_number(error: DBAPIError) -> object:
    return error.orig.args[0] if error.orig is not None and error.orig.args else None


class by_code_point(FunctionElement[str]):
    """A column's text in the order of Python's strings, whatever the column's collation or type."""

    inherit_cache = True
    name = "by_code_point"
    type = sa.String()


@compiles(by_code_point)
def _as_it_is(element: by_code_point, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(by_code_point, "postgresql")
def _in_the_c_locale(element: by_code_point, compiler: SQLCompiler, **options: Any) -> str:
    text = compiler.process(element.clauses, **options)
    (column,) = element.clauses
    if isinstance(column.type, sa.Enum):
        # Its own order is that of its declaration.
        text = f"CAST({text} AS VARCHAR)"
    elif isinstance(column.type, IpAddress):
        text = f"host({text})"
    return f'({text} COLLATE "C")'


@compiles(by_code_point, "mysql", "mariadb")
def _as_bytes(element: by_code_point, compiler: SQLCompiler, **options: Any) -> str:
    # UTF-8 keeps the order of its code points, and bytes are not filled up with spaces.
    return f"CAST({compiler.process(element.clauses, **options)} AS BINARY)"


class seconds_between(FunctionElement[float]):
    """The seconds from one time to a later one, with their fraction."""

    inherit_cache = True
    name = "seconds_between"
    type = sa.Float()


@compiles(seconds_between, "sqlite")
def _by_julian_days(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    first, last = (compiler.process(clause, **options) for clause in element.clauses)
    return f"((julianday({last}) - julianday({first})) * 86400.0)"


@compiles(seconds_between, "postgresql")
def _by_epoch(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    first, last = (compiler.process(clause, **options) for clause in element.clauses)
    return f"CAST(EXTRACT(EPOCH FROM {last} - {first}) AS DOUBLE PRECISION)"


@compiles(seconds_between, "mysql", "mariadb")
def _by_microseconds(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    first, last = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(TIMESTAMPDIFF(MICROSECOND, {first}, {last}) / 1000000e0)"
