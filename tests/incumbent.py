"""The quota tables of a cell's database as the incumbent makes them, in its own words, and its rows in them.

On MariaDB they have the character set and collation of its older releases, under which `A` equals `a`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

_TABLES = (
    """
    CREATE TABLE quotas (
        id {serial}, created_at {time}, updated_at {time}, deleted_at {time},
        project_id VARCHAR(255), resource VARCHAR(255) NOT NULL, hard_limit INTEGER, deleted INTEGER,
        CONSTRAINT uniq_quotas0project_id0resource0deleted UNIQUE (project_id, resource, deleted)
    ){options}""",
    """
    CREATE TABLE project_user_quotas (
        id {serial}, created_at {time}, updated_at {time}, deleted_at {time}, deleted INTEGER,
        user_id VARCHAR(255) NOT NULL, project_id VARCHAR(255) NOT NULL, resource VARCHAR(255) NOT NULL,
        hard_limit INTEGER,
        CONSTRAINT uniq_project_user_quotas0user_id0project_id0resource0deleted
            UNIQUE (user_id, project_id, resource, deleted)
    ){options}""",
    "CREATE INDEX project_user_quotas_project_id_deleted_idx ON project_user_quotas (project_id, deleted)",
    """
    CREATE TABLE quota_classes (
        created_at {time}, updated_at {time}, deleted_at {time}, id {serial},
        class_name VARCHAR(255), resource VARCHAR(255), hard_limit INTEGER, deleted INTEGER
    ){options}""",
    "CREATE INDEX ix_quota_classes_class_name ON quota_classes (class_name)",
)
_WORDS = {
    "sqlite": {"serial": "INTEGER NOT NULL PRIMARY KEY", "time": "DATETIME", "options": ""},
    "postgresql": {"serial": "SERIAL NOT NULL PRIMARY KEY", "time": "TIMESTAMP WITHOUT TIME ZONE", "options": ""},
    "mysql": {
        "serial": "INTEGER NOT NULL AUTO_INCREMENT PRIMARY KEY",
        "time": "DATETIME",
        "options": " ENGINE=InnoDB DEFAULT CHARSET=utf8mb3 COLLATE=utf8mb3_general_ci",
    },
}
TABLES = ("quotas", "project_user_quotas", "quota_classes")


def make_tables(connection: sa.Connection) -> None:
    """Make the incumbent's tables in place of ours."""
    words = _WORDS[connection.dialect.name]
    for name in TABLES:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
    for statement in _TABLES:
        # PostgreSQL cuts the name that is too long for it, as it did for the incumbent.
        connection.exec_driver_sql(statement.format(**words))


def add_rows(connection: sa.Connection, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to one of the tables; those without `deleted` are live."""
    for row in rows:
        values = {"deleted": 0, **row}
        table = sa.table(name, *(sa.column(column) for column in values))
        connection.execute(sa.insert(table), values)
