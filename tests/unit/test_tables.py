"""The declared tables: rules that hold for every one of them, whatever the database."""

from types import ModuleType

import pytest
import sqlalchemy as sa

from cellway.db import api_tables, cell_tables
from cellway.db.api_tables import API_METADATA
from cellway.db.cell_tables import CELL_METADATA

MARIADB_KEY_BYTES = 3072
UTF8MB4_BYTES = 4

API_TABLES = API_METADATA.sorted_tables
CELL_TABLES = CELL_METADATA.sorted_tables
CELL_OWN = {"host_reports", "idempotency_keys", "instance_fences"}


def key_columns(table: sa.Table) -> dict[str, list[sa.Column[object]]]:
    """Return the columns of each key of a table, by the key's name."""
    keys = {str(index.name): list(index.columns) for index in table.indexes}
    for constraint in table.constraints:
        if isinstance(constraint, sa.UniqueConstraint | sa.PrimaryKeyConstraint):
            keys[str(constraint.name or f"primary key of {table.name}")] = list(constraint.columns)
    return keys


@pytest.mark.parametrize(
    ("module", "metadata"), [(api_tables, API_METADATA), (cell_tables, CELL_METADATA)], ids=["api", "cell"]
)
def test_each_table_is_found_under_its_own_name(module: ModuleType, metadata: sa.MetaData) -> None:
    """A table is imported by the name that it has in the database."""
    declared = {name: value for name, value in vars(module).items() if isinstance(value, sa.Table)}
    assert declared == dict(metadata.tables)


@pytest.mark.parametrize("table", API_TABLES + CELL_TABLES, ids=str)
def test_every_key_fits_mariadb(table: sa.Table) -> None:
    """No key is longer than InnoDB allows when every character takes four bytes."""
    for name, columns in key_columns(table).items():
        size = sum(getattr(column.type, "length", None) or 2 for column in columns) * UTF8MB4_BYTES
        assert size <= MARIADB_KEY_BYTES, name


@pytest.mark.parametrize("tables", [API_TABLES, CELL_TABLES], ids=["api", "cell"])
def test_key_names_are_unique_in_a_database(tables: list[sa.Table]) -> None:
    """PostgreSQL keeps the names of all keys and tables of a database in one list."""
    names = [name for table in tables for name in (table.name, *key_columns(table))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "table", [*API_TABLES, *(table for table in CELL_TABLES if table.name in CELL_OWN)], ids=lambda table: table.name
)
def test_no_unique_key_of_ours_holds_null(table: sa.Table) -> None:
    """A unique key over NULL is none, so no column of one may be NULL in the tables that we create."""
    for constraint in table.constraints:
        if isinstance(constraint, sa.UniqueConstraint):
            assert [column.name for column in constraint.columns if column.nullable] == [], constraint.name


@pytest.mark.parametrize("table", [t for t in CELL_TABLES if t.name not in CELL_OWN | {"tags"}], ids=str)
def test_the_incumbents_cell_tables_delete_softly(table: sa.Table) -> None:
    """A row inserted without saying so is live: its `deleted` is 0."""
    default = table.c.deleted.default
    assert isinstance(default, sa.ColumnDefault)
    assert default.arg == 0
    assert isinstance(table.c.deleted_at.type, sa.DateTime)


def test_no_api_table_deletes_softly() -> None:
    """Rows of the API database are deleted for good."""
    assert [table.name for table in API_TABLES if "deleted" in table.c] == []
