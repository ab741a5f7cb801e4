"""Moving limits from the cells into the API database (seed 003): what becomes of each row, and the writes of a batch.

`online_migrations.py` calls `move` for every batch, in one transaction, and then buries at the source what `Outcome`
says is settled; `plan` says the same beforehand and writes nothing. `decide` is the rule, without a database.

What a batch does may be repeated: a row whose limit is in the API database already is settled as it was before. For
every moved limit, its row in `migrated_keys` says from which cell the value is. So the rule between cells gives the
same result in whatever order they come, how often, and wherever a run ended in between; and where that row is missing,
the value is the API's own, and stays.
"""

import enum
from collections.abc import Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, assert_never

import sqlalchemy as sa

from cellway.db import api_tables
from cellway.db.api_tables import migrated_keys
from cellway.db.transaction import ApiTx, insert_many_if_absent
from cellway.quota.legacy import (
    FORMS,
    OWNER_COLUMNS,
    UNLIMITED,
    Kind,
    LegacyLimit,
    Owner,
    are_plain,
    is_deleted,
    key_of,
    lock_owners,
    read_keys,
)
from cellway.quota.limits import RESOURCES


class Rule(enum.StrEnum):
    """Which value stands when cells disagree. No limit counts as the highest."""

    KEEP = "keep"
    """The one of the cell whose name comes first."""
    LOWEST = "lowest"
    HIGHEST = "highest"
    FAIL = "fail"
    """The one that came first; the other is left in its cell, for an operator to decide."""


class Fate(enum.StrEnum):
    """What became of a row."""

    MOVED = "moved"
    PRESENT = "present"
    """The same value stood in the API database already."""
    OVERRULED = "overruled"
    """Another value was set over the API, and stays."""
    KEPT = "kept"
    """The value of another cell stays, by the rule."""
    REPLACED = "replaced"
    """It has replaced the value of another cell, by the rule."""
    DUPLICATE = "duplicate"
    """The cell has a row with a lower id for the same limit, which counts."""
    DROPPED = "dropped"
    """The limit was deleted over the API."""
    BLOCKED = "blocked"
    """It cannot be moved, and stays in its cell."""


@dataclass(frozen=True, slots=True)
class Source:
    """The cell that rows come from. `order` is the ids of all cells, by name."""

    cell_id: int
    order: tuple[int, ...]

    def place(self, cell_id: int) -> int:
        """Return where a cell comes among the others; one that is no longer known comes before all."""
        return self.order.index(cell_id) if cell_id in self.order else -1


@dataclass(frozen=True, slots=True)
class Held:
    """A limit in the API database. `cell_id` is where it is from; None is the API itself."""

    value: int
    cell_id: int | None
    row_id: int | None = None


Limit: TypeAlias = tuple[Owner, str]
"""An owner and a resource."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row. `stands` is the value in the API database then, if there is one."""

    row: LegacyLimit
    fate: Fate
    stands: int | None = None
    reason: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is wanted of the row, so that it can be buried."""
        return self.fate is not Fate.BLOCKED

    @property
    def is_unknown(self) -> bool:
        """Whether it was moved although nobody knows the resource."""
        return self.fate in (Fate.MOVED, Fate.REPLACED) and self.row.resource not in RESOURCES


def decide(
    rows: Sequence[LegacyLimit],
    held: MutableMapping[Limit, Held],
    deleted: AbstractSet[Owner],
    rule: Rule,
    source: Source,
) -> list[Outcome]:
    """Say what becomes of each row, one after the other, and bring `held` up to date with it."""
    outcomes = []
    for row in rows:
        if row.problem is not None:
            outcomes.append(Outcome(row, Fate.BLOCKED, reason=row.problem))
        elif row.duplicate:
            outcomes.append(Outcome(row, Fate.DUPLICATE))
        elif row.owner in deleted:
            outcomes.append(Outcome(row, Fate.DROPPED))
        else:
            limit = (row.owner, str(row.resource))
            now, fate = _settle(held.get(limit), row.value, rule, source)
            held[limit] = now
            reason = "another cell has another value" if fate is Fate.BLOCKED else None
            outcomes.append(Outcome(row, fate, now.value, reason))
    return outcomes


def _settle(before: Held | None, value: int, rule: Rule, source: Source) -> tuple[Held, Fate]:
    if before is None:
        return Held(value, source.cell_id), Fate.MOVED
    if before.cell_id is None:
        return before, Fate.PRESENT if before.value == value else Fate.OVERRULED
    mine = Held(value, source.cell_id, before.row_id)
    is_first = source.place(source.cell_id) < source.place(before.cell_id)
    if before.value == value:
        # It is the first cell's from now on, so that a third one is compared with that.
        return mine if is_first else before, Fate.PRESENT
    match rule:
        case Rule.FAIL:
            return before, Fate.BLOCKED
        case Rule.KEEP:
            wins = is_first
        case Rule.LOWEST:
            wins = _height(value) < _height(before.value)
        case Rule.HIGHEST:
            wins = _height(value) > _height(before.value)
        case _:
            assert_never(rule)
    return (mine, Fate.REPLACED) if wins else (before, Fate.KEPT)


def _height(value: int) -> float:
    return float("inf") if value == UNLIMITED else value


# ---- in the API database ---------------------------------------------------------------------------------------


class _Statements:
    """What is asked of one table of limits."""

    def __init__(self, kind: Kind) -> None:
        self.table = api_tables.API_METADATA.tables[kind.value]
        columns = [self.table.c[name] for name in OWNER_COLUMNS[kind]]
        self.read, self.read_by_bytes = (
            sa.select(self.table.c.id, *columns, self.table.c.resource, self.table.c.hard_limit).where(
                *(form(column).in_(sa.bindparam(f"every_{column.name}", expanding=True)) for column in columns)
            )
            for form in FORMS
        )
        self.update = (
            sa.update(self.table)
            .where(self.table.c.id == sa.bindparam("the_id"))
            .values(hard_limit=sa.bindparam("the_value"), updated_at=sa.bindparam("now"))
        )


_STATEMENTS: Final = {kind: _Statements(kind) for kind in Kind}
_ORIGIN: Final = "moved:"
_SET_ORIGIN = (
    sa.update(migrated_keys)
    .where(
        migrated_keys.c.kind == sa.bindparam("the_kind"),
        migrated_keys.c.key.in_(sa.bindparam("keys", expanding=True)),
    )
    .values(state=sa.bindparam("the_origin"))
)


def move(tx: ApiTx, kind: Kind, rows: Sequence[LegacyLimit], rule: Rule, source: Source) -> list[Outcome]:
    """Write the limits of a batch by the rule, and read them back; nothing may be buried before this is committed.

    A row whose limit cannot be read back is blocked: an API database that takes its name for another's has that one.
    """
    movable = _movable(rows)
    deleted = lock_owners(tx, kind, {row.owner for row in movable})
    before = _read(tx, kind, movable)
    held = dict(before)
    outcomes = decide(rows, held, deleted, rule, source)
    changed = {limit: one for limit, one in held.items() if one != before.get(limit)}
    if not changed:
        return outcomes
    _write(tx, kind, before, changed)
    stored = _read_values(tx, kind, movable)
    proven = [limit for limit, one in changed.items() if limit in stored and stored[limit].value == one.value]
    _write_origins(tx, kind, proven, before, source)
    missing = changed.keys() - set(proven)
    return [_proven(outcome, missing) for outcome in outcomes]


def plan(
    tx: ApiTx,
    kind: Kind,
    rows: Sequence[LegacyLimit],
    rule: Rule,
    source: Source,
    planned: MutableMapping[Limit, Held],
) -> list[Outcome]:
    """Say what `move` would do, if what is `planned` were there already; add to it."""
    movable = _movable(rows)
    found = is_deleted(tx, {(kind, row.owner) for row in movable})
    held = _read(tx, kind, movable)
    held.update({limit: planned[limit] for limit in map(_limit_of, movable) if limit in planned})
    outcomes = decide(rows, held, {owner for _, owner in found}, rule, source)
    planned.update(held)
    return outcomes


def _movable(rows: Sequence[LegacyLimit]) -> list[LegacyLimit]:
    return [row for row in rows if row.problem is None and not row.duplicate]


def _limit_of(row: LegacyLimit) -> Limit:
    return row.owner, str(row.resource)


def _read(tx: ApiTx, kind: Kind, rows: Sequence[LegacyLimit]) -> dict[Limit, Held]:
    """Return those of the rows' limits that the API database has, and where they are from."""
    found = _read_values(tx, kind, rows)
    keys = {key_of(kind, *limit): limit for limit in found}
    for key, state in read_keys(tx, kind, keys).items():
        limit = keys[key]
        found[limit] = replace(found[limit], cell_id=int(state.removeprefix(_ORIGIN)))
    return found


def _read_values(tx: ApiTx, kind: Kind, rows: Sequence[LegacyLimit]) -> dict[Limit, Held]:
    """Return the same without where they are from. Names are compared exactly."""
    wanted = {_limit_of(row) for row in rows}
    if not wanted:
        return {}
    names = [sorted({*map(str, every)}) for every in zip(*(row.names for row in rows), strict=True)]
    statements = _STATEMENTS[kind]
    statement = statements.read if all(map(are_plain, names)) else statements.read_by_bytes
    parameters = {f"every_{column}": every for column, every in zip(OWNER_COLUMNS[kind], names, strict=True)}
    found: dict[Limit, Held] = {}
    for number, *owner, resource, value in tx.execute(statement, parameters):
        limit: Limit = (tuple(owner) if len(owner) > 1 else owner[0], resource)
        if limit in wanted:
            found[limit] = Held(UNLIMITED if value is None or value < 0 else value, None, number)
    return found


def _write(tx: ApiTx, kind: Kind, before: Mapping[Limit, Held], changed: Mapping[Limit, Held]) -> None:
    statements = _STATEMENTS[kind]
    new: list[dict[str, Any]] = []
    other: list[dict[str, Any]] = []
    for (owner, resource), one in changed.items():
        if one.row_id is None:
            names = (owner,) if isinstance(owner, str) else owner
            columns = dict(zip(OWNER_COLUMNS[kind], names, strict=True))
            new.append({**columns, "resource": resource, "hard_limit": one.value, "created_at": tx.now})
        elif one.value != before[owner, resource].value:
            other.append({"the_id": one.row_id, "the_value": one.value, "now": tx.now})
    insert_many_if_absent(tx, statements.table, new)
    if other:
        tx.execute(statements.update, sorted(other, key=lambda row: int(row["the_id"])))


def _write_origins(
    tx: ApiTx, kind: Kind, limits: Sequence[Limit], before: Mapping[Limit, Held], source: Source
) -> None:
    origin = f"{_ORIGIN}{source.cell_id}"
    keys = {limit: key_of(kind, *limit) for limit in limits}
    new = sorted(key for limit, key in keys.items() if limit not in before)
    rows = [{"kind": kind, "key": key, "state": origin, "created_at": tx.now} for key in new]
    insert_many_if_absent(tx, migrated_keys, rows)
    other = sorted(key for limit, key in keys.items() if limit in before)
    if other:
        tx.execute(_SET_ORIGIN, {"the_kind": kind, "keys": other, "the_origin": origin})


def _proven(outcome: Outcome, missing: AbstractSet[Limit]) -> Outcome:
    is_missing = outcome.is_settled and outcome.row.problem is None and _limit_of(outcome.row) in missing
    if not is_missing or outcome.fate in (Fate.DUPLICATE, Fate.DROPPED):
        return outcome
    return Outcome(outcome.row, Fate.BLOCKED, reason="the API database takes its name for another's")
