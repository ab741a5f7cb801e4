"""How far each online data migration is in each cell (seeds 003, 004): the table `migration_state`.

`online_migrations.py` writes it as it goes on. The fallback reads ask it: where a migration is complete, no cell is
asked any more. A cell without a row, such as a new one, is not complete. It knows no migration and no cell by itself.
"""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from cellway.db.api_tables import migration_state
from cellway.db.transaction import ApiTx, insert_many_if_absent


@dataclass(frozen=True, slots=True)
class State:
    """One migration in one cell. Of the `found` rows that it has seen, `done` have left the cell."""

    name: str
    cell_uuid: str
    complete: bool
    found: int
    done: int
    updated_at: datetime | None
    """Once complete: since when."""

    @property
    def blocked(self) -> int:
        """Rows that could not be migrated when they were last looked at."""
        return max(0, self.found - self.done)


_table = migration_state
_LIST = sa.select(
    _table.c.name, _table.c.cell_uuid, _table.c.complete, _table.c.found, _table.c.done, _table.c.updated_at
).order_by(_table.c.name, _table.c.cell_uuid)
_COMPLETE = sa.select(_table.c.name, _table.c.cell_uuid).where(_table.c.complete.is_(True))
_IS_IT = sa.and_(_table.c.name == sa.bindparam("the_name"), _table.c.cell_uuid == sa.bindparam("the_cell"))
_MARK = (
    sa.update(_table)
    .where(_IS_IT, _table.c.complete.is_(False))
    .values(complete=True, found=_table.c.done, updated_at=sa.bindparam("now"))
)
_REOPEN = (
    sa.update(_table).where(_IS_IT, _table.c.complete.is_(True)).values(complete=False, updated_at=sa.bindparam("now"))
)
_ADD = (
    sa.update(_table)
    .where(_IS_IT)
    # In this order: MariaDB reads a column that was assigned before as already changed.
    .ordered_values(
        (_table.c.found, _table.c.done + sa.bindparam("more") + sa.bindparam("left_out")),
        (_table.c.done, _table.c.done + sa.bindparam("more")),
        (_table.c.updated_at, sa.bindparam("now")),
    )
)


def list_states(tx: ApiTx) -> list[State]:
    """Return every migration in every cell that it has visited, by name and cell."""
    return [State(*row) for row in tx.execute(_LIST)]


def complete_cells(tx: ApiTx) -> set[tuple[str, str]]:
    """Return (migration, cell uuid) for what is complete: there a cell need not be asked."""
    return {(row.name, row.cell_uuid) for row in tx.execute(_COMPLETE)}


def mark_complete(tx: ApiTx, name: str, cell_uuid: str) -> None:
    """Write down that a cell has nothing left to migrate. May be repeated; the time of the first stays."""
    _make(tx, name, cell_uuid)
    tx.execute(_MARK, {"the_name": name, "the_cell": cell_uuid, "now": tx.now})


def reopen(tx: ApiTx, name: str, cell_uuid: str) -> None:
    """Take completeness back: rows have appeared in the cell since."""
    tx.execute(_REOPEN, {"the_name": name, "the_cell": cell_uuid, "now": tx.now})


def add_progress(tx: ApiTx, name: str, cell_uuid: str, *, done: int, blocked: int) -> None:
    """Count rows that have left the cell, and say how many this run has found that cannot."""
    _make(tx, name, cell_uuid)
    tx.execute(_ADD, {"the_name": name, "the_cell": cell_uuid, "more": done, "left_out": blocked, "now": tx.now})


def _make(tx: ApiTx, name: str, cell_uuid: str) -> None:
    insert_many_if_absent(tx, _table, [{"name": name, "cell_uuid": cell_uuid, "complete": False}])
