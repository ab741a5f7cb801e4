"""What the tables of both kinds of database are made of: column types, common columns and table options.

`api_tables`, `cell_tables` and the schema versions use it. A version that is released relies on what stands here: add
to it, do not change it. It makes no table itself. Seeds 002, 003, 004; the schema rule is section 10 of the design.
"""

from typing import Any

from sqlalchemy import Column, DateTime, Dialect, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeDecorator, TypeEngine

_MARIADB = ("mysql", "mariadb")  # SQLAlchemy's names for its two spellings of the URL

UUID = String(36)
NAME = String(255)
MEDIUM_TEXT = Text().with_variant(mysql.MEDIUMTEXT(), *_MARIADB)
PRECISE_TIME = DateTime().with_variant(mysql.DATETIME(fsp=6), *_MARIADB)
"""MariaDB's plain DATETIME, which the incumbent's tables have, drops the fraction of a second; ours keep it."""

_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in _MARIADB
    # Ids, names and keys are equal only when their bytes are, as on the other two databases.
    for option, value in {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}.items()
}


class IpAddress(TypeDecorator[str]):
    """An address as text: INET on PostgreSQL, 39 characters elsewhere."""

    impl = String(39)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the type of the column."""
        return dialect.type_descriptor(postgresql.INET() if dialect.name == "postgresql" else String(39))

    def process_result_value(self, value: object | None, _dialect: Dialect) -> str | None:
        """Make text of the address objects that PostgreSQL's driver returns."""
        return None if value is None else str(value)


def table(metadata: MetaData, name: str, *items: SchemaItem) -> Table:
    """Declare a table with the options that all of ours have."""
    return Table(name, metadata, *items, **_OPTIONS)


def identity() -> Column[int]:
    """Return the primary key that almost every table has."""
    return Column("id", Integer, primary_key=True)


def timestamps() -> tuple[Column[Any], ...]:
    """Return the columns that the incumbent puts into every table."""
    return Column("created_at", DateTime), Column("updated_at", DateTime)


def soft_deletion() -> tuple[Column[Any], ...]:
    """Return the incumbent's columns of a soft-deletable table: `deleted` is 0, or the row's own id once deleted."""
    return Column("deleted_at", DateTime), Column("deleted", Integer, default=0)


def precise_timestamps() -> tuple[Column[Any], ...]:
    """Return the same two columns for a table of our own."""
    return Column("created_at", PRECISE_TIME), Column("updated_at", PRECISE_TIME)
