"""The limits that still stand in the cells (seed 003): reading and burying them, and who may still move one.

A cell's tables `quotas`, `project_user_quotas` and `quota_classes` are the incumbent's: a row is live while `deleted`
is 0 or NULL, and a limit of NULL is none. Nothing here writes to them but `bury`. The fallback reads
(`compute/limits.py`) and the online data migration (`online_migrations.py`) call this.

In the API database, `migrated_keys` decides between a migration and whoever changes limits over the API meanwhile. The
row of an *owner* is its lock, and says whether its limits were deleted; the row of a *limit* says that the value was
brought from a cell, and from which. A migration locks the owners of a batch before it reads or writes a limit of
theirs, so whoever sets or deletes limits calls `claim_by_api` or `tombstone` **first** in the transaction: then it
waits for the batch, or the batch sees what it did. Everything here may be repeated.
"""

import enum
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import quote

import sqlalchemy as sa

from cellway.db import cell_tables
from cellway.db.api_tables import migrated_keys
from cellway.db.transaction import ApiTx, CellTx, Row, by_code_point, insert_many_if_absent


class Kind(enum.StrEnum):
    """The three tables of limits. The table's name is also the migration's, and `migrated_keys.kind`."""

    PROJECT = "quotas"
    USER = "project_user_quotas"
    CLASS = "quota_classes"


Owner: TypeAlias = str | tuple[str, str]
"""Whose limits: a project's id, (project, user), or the name of a class. A project's id alone with `Kind.USER` means
all its users, where that makes sense.
"""
OWNER_COLUMNS: Final = {
    Kind.PROJECT: ("project_id",),
    Kind.USER: ("project_id", "user_id"),
    Kind.CLASS: ("class_name",),
}
"""The columns that name the owner, in a cell's table and in the API database's alike."""

UNLIMITED: Final = -1
_WIDTH: Final = 255
_MOST: Final = 2**31 - 1
_NULL: Final = -(2**31)


@dataclass(frozen=True, slots=True)
class LegacyLimit:
    """A live row of a cell's table."""

    kind: Kind
    id: int
    names: tuple[object, ...]
    """What stands in the columns of the owner."""
    resource: object
    stored: object
    """What stands in `hard_limit`."""
    duplicate: bool = False
    """A live row with a lower id has a value for the same limit, and it is that one's that counts."""

    @property
    def problem(self) -> str | None:
        """Why this row cannot be migrated, if it cannot."""
        for column, value in zip((*OWNER_COLUMNS[self.kind], "resource"), (*self.names, self.resource), strict=True):
            if not isinstance(value, str):
                return f"{column} is {'NULL' if value is None else 'not text'}"
            if len(value) > _WIDTH:
                return f"{column} is longer than {_WIDTH} characters"
            if "\0" in value:
                return f"{column} holds a NUL character"
        if self.stored is not None and not (isinstance(self.stored, int) and _NULL <= self.stored <= _MOST):
            return "hard_limit is not a whole number of 32 bits"
        return None

    @property
    def owner(self) -> Owner:
        """Whose limit it is. Only for a row without a problem."""
        first, *second = map(str, self.names)
        return (first, second[0]) if second else first

    @property
    def value(self) -> int:
        """The limit: NULL, and whatever is below 0, is none. Only for a row without a problem."""
        return _limit(self.stored)


def _limit(stored: object) -> int:
    return stored if isinstance(stored, int) and stored >= 0 else UNLIMITED


# ---- in a cell -------------------------------------------------------------------------------------------------


def _live(table: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.or_(table.c.deleted == 0, table.c.deleted.is_(None))


def _as_it_is(column: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    return column


FORMS: Final = (_as_it_is, by_code_point)
"""How a column is compared with names that are plain, and with others."""


def are_plain(names: Iterable[str]) -> bool:
    """Tell whether these names may be compared with any column.

    MariaDB refuses to compare a character of four bytes with the incumbent's columns, which hold three at most.
    """
    return all(name.isascii() or max(name) <= "\uffff" for name in names)


class _Statements:
    """What is asked of one table."""

    def __init__(self, kind: Kind) -> None:
        table, names = cell_tables.CELL_METADATA.tables[kind.value], OWNER_COLUMNS[kind]
        columns = [table.c[name] for name in names]
        self.find, self.find_by_bytes = (
            sa.select(*columns, table.c.resource, table.c.hard_limit)
            .where(*(form(table.c[name]) == sa.bindparam(f"the_{name}") for name in names), _live(table))
            .order_by(table.c.id.desc())
            for form in FORMS
        )
        self.any = sa.select(table.c.id).where(_live(table)).limit(1)
        self.count = sa.select(sa.func.count()).select_from(table).where(_live(table))
        other = table.alias("other")
        # Plain equality is for the index: the incumbent's collations on MariaDB take `A` for `a`.
        same = [
            sa.and_(other.c[name] == table.c[name], by_code_point(other.c[name]) == by_code_point(table.c[name]))
            for name in (*names, "resource")
        ]
        duplicate = sa.exists().where(*same, other.c.id < table.c.id, _live(other))
        self.page = (
            sa.select(table.c.id, *columns, table.c.resource, table.c.hard_limit, duplicate.label("duplicate"))
            .where(table.c.id <= sa.bindparam("the_last"), _live(table))
            .order_by(table.c.id.desc())
            .limit(sa.bindparam("most"))
        )
        self.bury = (
            sa.update(table)
            .where(
                table.c.id.in_(sa.bindparam("ids", expanding=True)),
                table.c.hard_limit.is_not_distinct_from(sa.bindparam("the_limit", type_=sa.Integer)),
                _live(table),
            )
            .values(deleted=table.c.id, deleted_at=sa.bindparam("now"))
        )


_STATEMENTS: Final = {kind: _Statements(kind) for kind in Kind}


def find_limits(tx: CellTx, kind: Kind, owner: Owner) -> dict[str, int]:
    """Return an owner's live limits in this cell, by resource. Of several rows for one limit, the lowest id counts."""
    names = (owner,) if isinstance(owner, str) else owner
    parameters = {f"the_{column}": name for column, name in zip(OWNER_COLUMNS[kind], names, strict=True)}
    statements = _STATEMENTS[kind]
    rows = tx.execute(statements.find if are_plain(names) else statements.find_by_bytes, parameters)
    # Compared once more: in the incumbent's tables on MariaDB, `A` equals `a`, and on every MariaDB `a` equals `a `.
    return {row.resource: _limit(row.hard_limit) for row in rows if tuple(row[: len(names)]) == tuple(names)}


def is_empty(tx: CellTx, kind: Kind) -> bool:
    """Tell whether this cell has no live row."""
    return tx.execute(_STATEMENTS[kind].any).first() is None


def count(tx: CellTx, kind: Kind) -> int:
    """Return how many live rows this cell has."""
    return int(tx.execute(_STATEMENTS[kind].count).scalar_one())


def list_rows(tx: CellTx, kind: Kind, before: int | None, most: int) -> list[LegacyLimit]:
    """Return live rows with ids below `before`, the highest first: duplicates come before what they duplicate."""
    rows = tx.execute(_STATEMENTS[kind].page, {"the_last": _MOST if before is None else before - 1, "most": most})
    return [_row(kind, row) for row in rows]


def _row(kind: Kind, row: Row) -> LegacyLimit:
    number, *names, resource, stored, duplicate = row
    return LegacyLimit(kind, number, tuple(names), resource, stored, bool(duplicate))


def bury(tx: CellTx, rows: Sequence[LegacyLimit]) -> int:
    """Soft-delete rows of one kind, where they are live and have the value that they were read with; return how many.

    This is the only write to these tables. `deleted` becomes the row's own id, as the incumbent does it.
    """
    # One statement for each value: there are few of them, and many pairs in one are dear on PostgreSQL.
    by_value: dict[object, list[int]] = {}
    for row in rows:
        by_value.setdefault(row.stored, []).append(row.id)
    return sum(
        tx.execute(_STATEMENTS[rows[0].kind].bury, {"ids": sorted(ids), "the_limit": value, "now": tx.now}).rowcount
        for value, ids in by_value.items()
    )


# ---- in the API database ---------------------------------------------------------------------------------------

_DELETED: Final = "deleted"
_MOVED: Final = "moved"
_KEY_WIDTH: Final = 700

_IS_KIND = migrated_keys.c.kind == sa.bindparam("the_kind")
_IS_KEY = migrated_keys.c.key.in_(sa.bindparam("keys", expanding=True))
_STATES = sa.select(migrated_keys.c.key, migrated_keys.c.state).where(_IS_KIND, _IS_KEY)
_LOCK = _STATES.order_by(migrated_keys.c.key).with_for_update()
_BURY_OWNER = sa.update(migrated_keys).where(_IS_KIND, _IS_KEY).values(state=_DELETED)
_FORGET = sa.delete(migrated_keys).where(_IS_KIND, _IS_KEY)


def key_of(kind: Kind, owner: Owner, resource: str | None = None) -> str:
    """Return the key in `migrated_keys` of an owner, or of one limit of its: unambiguous, bounded, and plain ASCII.

    The kinds do not share keys, and within one an owner's key has fewer parts than a limit's.
    """
    parts = [owner] if isinstance(owner, str) else [*owner]
    key = "/".join(quote(part, safe="") for part in (*parts, *([] if resource is None else [resource])))
    # No quoted text has a % before an s.
    return key if len(key) <= _KEY_WIDTH else f"%sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _owner_keys(kind: Kind, owner: Owner) -> tuple[str, ...]:
    """Return the keys that can say that an owner's limits were deleted."""
    own = key_of(kind, owner)
    return (own,) if isinstance(owner, str) else (key_of(kind, owner[0]), own)


def tombstone(tx: ApiTx, kind: Kind, owner: Owner) -> None:
    """Write down that an owner's limits are deleted, so that none comes from a cell any more.

    Call it first, before the rows are removed: it waits for a migration that is just moving them. A project's limits
    are those of `Kind.PROJECT` and, with the same owner, `Kind.USER`.
    """
    key = key_of(kind, owner)
    _insert_keys(tx, kind, [key], _DELETED)
    tx.execute(_BURY_OWNER, {"the_kind": kind, "keys": [key]})


def is_deleted(tx: ApiTx, owners: Iterable[tuple[Kind, Owner]]) -> set[tuple[Kind, Owner]]:
    """Return those of the owners whose limits were deleted: what a cell still has of them no longer counts."""
    wanted = set(owners)
    states = {
        kind: read_keys(tx, kind, {key for other, owner in wanted if other is kind for key in _owner_keys(kind, owner)})
        for kind in {kind for kind, _ in wanted}
    }
    return {
        (kind, owner)
        for kind, owner in wanted
        if any(states[kind].get(key) == _DELETED for key in _owner_keys(kind, owner))
    }


def claim_by_api(tx: ApiTx, kind: Kind, owner: Owner, resources: Iterable[str]) -> None:
    """Write down that these limits now have a value of the API's own, which wins over every cell's.

    Call it first, before the limits are written: it waits for a migration that is just moving them.
    """
    _lock(tx, kind, [key_of(kind, owner)])
    keys = [key_of(kind, owner, resource) for resource in resources]
    if keys:
        tx.execute(_FORGET, {"the_kind": kind, "keys": keys})


def lock_owners(tx: ApiTx, kind: Kind, owners: Collection[Owner]) -> set[Owner]:
    """Keep everybody else from changing these owners' limits till the end of the transaction; return the deleted ones.

    Locks are taken in the order of the keys, which keeps two batches from waiting for each other.
    """
    states = _lock(tx, kind, {key for owner in owners for key in _owner_keys(kind, owner)})
    return {owner for owner in owners if any(states[key] == _DELETED for key in _owner_keys(kind, owner))}


def _lock(tx: ApiTx, kind: Kind, keys: Collection[str]) -> dict[str, str]:
    if not keys:
        return {}
    _insert_keys(tx, kind, sorted(keys), _MOVED)
    return {row.key: row.state for row in tx.execute(_LOCK, {"the_kind": kind, "keys": sorted(keys)})}


def read_keys(tx: ApiTx, kind: Kind, keys: Collection[str]) -> dict[str, str]:
    """Return the states of those keys that are there."""
    if not keys:
        return {}
    return {row.key: row.state for row in tx.execute(_STATES, {"the_kind": kind, "keys": sorted(keys)})}


def _insert_keys(tx: ApiTx, kind: Kind, keys: Sequence[str], state: str) -> None:
    rows: list[dict[str, Any]] = [{"kind": kind, "key": key, "state": state, "created_at": tx.now} for key in keys]
    insert_many_if_absent(tx, migrated_keys, rows)
