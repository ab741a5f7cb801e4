"""Limits in three cells that disagree, the real command that moves them, and what must come out whatever kills it.

`Trial` keeps a model of every limit: what each cell has, what was set or deleted over the API meanwhile. From it
follows what the API database must hold in the end, whatever happened on the way.
"""

import asyncio
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from cellway.config import Config, Limits, Secret
from cellway.context import SystemClock
from cellway.db import api_tables, cell_tables
from cellway.db.engines import API, Databases
from cellway.db.transaction import ApiTx
from cellway.ids import RandomIds
from cellway.operations.embedded import DataFolder, Layout, prepare
from cellway.quota import legacy
from cellway.quota.legacy import OWNER_COLUMNS, UNLIMITED, Kind, Owner
from cellway.quota.moving import Rule
from tests.acceptance.control_plane import CELLWAY
from tests.databases import empty_database, engine_of

CELLS: Final = ("cell1", "cell2", "cell3")
BLOCKED: Final = 5
"""Rows without an owner, in each cell."""
PATIENT: Final = Limits(database_deadline_seconds=60.0)
_SHARE: Final = {Kind.PROJECT: 0.6, Kind.USER: 0.3, Kind.CLASS: 0.1}
Key = tuple[Kind, Owner, str]
T = TypeVar("T")


@dataclass
class Trial:
    """Databases with limits in them, and what is known of each limit."""

    urls: dict[str, Secret]
    rule: Rule
    dice: random.Random
    in_cells: dict[str, dict[Key, int]] = field(default_factory=dict)
    set_over_api: dict[Key, int] = field(default_factory=dict)
    deleted: set[tuple[Kind, Owner]] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    """Limits that, at some moment, stood nowhere."""
    said: Counter[int] = field(default_factory=Counter)
    """The exit statuses of the runs."""
    rows: int = 0
    at_work: int = 0
    """How many of the runs that were killed had not come to their end."""
    looks: int = 0
    changes: int = 0
    """Limits that were set, and owners whose limits were deleted, over the API."""

    # ---- before

    def fill(self, rows_per_cell: int) -> None:
        """Give every cell so many limits, most of them also in another cell, and a few rows that cannot be moved."""
        for cell in CELLS:
            self.in_cells[cell] = {}
            for kind, share in _SHARE.items():
                rows = [self._row(cell, kind, number) for number in range(int(rows_per_cell * share))]
                if kind is Kind.CLASS:
                    # The incumbent's table takes a second row for one limit; the first counts.
                    rows += [{**row, "hard_limit": self._value()} for row in rows[::20]]
                if kind is Kind.PROJECT:
                    rows += [{"project_id": None, "resource": f"r{number}"} for number in range(BLOCKED)]
                table = cell_tables.CELL_METADATA.tables[kind.value]
                columns = dict.fromkeys((*OWNER_COLUMNS[kind], "resource", "hard_limit"))
                self._execute(cell, sa.insert(table), [{**columns, **row, "deleted": 0} for row in rows])
                self.rows += len(rows)

    def _row(self, cell: str, kind: Kind, number: int) -> dict[str, Any]:
        whose = "every" if self.dice.random() < 0.7 else cell
        names = [f"{whose}-{column[:-3]}-{number // 5}" for column in OWNER_COLUMNS[kind]]
        resource = ("cores", "ram", "instances", "key_pairs", "gpus")[number % 5]
        value = self._value()
        owner: Owner = (names[0], names[1]) if len(names) > 1 else names[0]
        self.in_cells[cell][kind, owner, resource] = UNLIMITED if value is None else value
        return {**dict(zip(OWNER_COLUMNS[kind], names, strict=True)), "resource": resource, "hard_limit": value}

    def _value(self) -> int | None:
        value = self.dice.randrange(-2, 6)
        return None if value == -2 else value

    # ---- meanwhile

    def command(self, *more: str) -> list[str]:
        """Return the command that migrates."""
        return [*CELLWAY, "db", "online-data-migrations", "--on-conflict", self.rule, "--format", "json", *more]

    def start(
        self, *more: str, batch: int, output: int = subprocess.DEVNULL, errors: int = subprocess.DEVNULL
    ) -> "subprocess.Popen[bytes]":
        """Start a run of the real command."""
        environ = {
            **os.environ,
            "CELLWAY_API_DATABASE__CONNECTION": self.urls["api"].reveal(),
            "CELLWAY_LIMITS__MIGRATION_BATCH": str(batch),
            "CELLWAY_LIMITS__DATABASE_DEADLINE_SECONDS": "60",
        }
        return subprocess.Popen(self.command(*more), stdout=output, stderr=errors, env=environ)

    def finish(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait for a run to end by itself."""
        status = process.wait(timeout=300)
        self.said[status] += 1
        return status

    def change_over_api(self, times: int) -> None:
        """Set some limits and delete some owners', as the API does."""
        keys = self.dice.sample(sorted(self.known(), key=repr), 2 * times)
        self.changes += len(keys)
        asyncio.run(self._change(keys[:times], {(kind, owner) for kind, owner, _ in keys[times:]}))

    async def _change(self, keys: list[Key], owners: set[tuple[Kind, Owner]]) -> None:
        databases = Databases(self.urls["api"], limits=PATIENT, clock=SystemClock())
        try:
            for key in keys:
                value = self.dice.randrange(100, 200)
                await databases.on(API).write(_set, key, value)
                self.set_over_api[key] = value
            for kind, owner in sorted(owners, key=repr):
                await databases.on(API).write(_delete, kind, owner)
                self.deleted.add((kind, owner))
                gone = [key for key in self.set_over_api if key[:2] == (kind, owner)]
                for key in gone:
                    del self.set_over_api[key]
        finally:
            await databases.aclose()

    def look(self) -> None:
        """Note every limit that stands neither in a cell nor in the API database, at this moment."""
        self.looks += 1
        # In this order: what leaves a cell was in the API database before.
        live = set[Key]()
        for cell in CELLS:
            live |= self._live(cell).keys()
        moved = self.result()
        self.lost += [repr(key) for key in self.expected().keys() - live - moved.keys()]

    # ---- and in the end

    def known(self) -> set[Key]:
        """Return every limit that a cell had."""
        return {key for limits in self.in_cells.values() for key in limits}

    def expected(self) -> dict[Key, int]:
        """Return what the API database has to hold."""
        found: dict[Key, int] = {}
        for key in self.known():
            if key[:2] not in self.deleted:
                found[key] = self._chosen([self.in_cells[cell][key] for cell in CELLS if key in self.in_cells[cell]])
        return {**found, **self.set_over_api}

    def _chosen(self, values: list[int]) -> int:
        match self.rule:
            case Rule.LOWEST:
                return min(values, key=_height)
            case Rule.HIGHEST:
                return max(values, key=_height)
            case _:
                return values[0]

    def result(self) -> dict[Key, int]:
        """Return what the API database holds."""
        tables = {kind: api_tables.API_METADATA.tables[kind.value] for kind in Kind}
        return {key: value for kind, table in tables.items() for key, value in self._limits("api", kind, table)}

    def left(self) -> int:
        """Return how many live rows the cells have."""
        return sum(self._count(cell, kind) for cell in CELLS for kind in Kind)

    def _count(self, cell: str, kind: Kind) -> int:
        table = cell_tables.CELL_METADATA.tables[kind.value]
        statement = sa.select(sa.func.count()).select_from(table).where(table.c.deleted == 0)
        return int(self._read(cell, lambda connection: connection.execute(statement).scalar_one()))

    def _live(self, cell: str) -> dict[Key, int]:
        tables = {kind: cell_tables.CELL_METADATA.tables[kind.value] for kind in Kind}
        return {
            key: value
            for kind, table in tables.items()
            for key, value in self._limits(cell, kind, table, table.c.deleted == 0)
        }

    def _limits(
        self, name: str, kind: Kind, table: sa.Table, *where: sa.ColumnElement[bool]
    ) -> Iterator[tuple[Key, int]]:
        columns = [table.c[column] for column in OWNER_COLUMNS[kind]]
        statement = sa.select(*columns, table.c.resource, table.c.hard_limit).where(*where)
        for *names, resource, value in self._read(name, lambda one: one.execute(statement).all()):
            yield (kind, tuple(names) if len(names) > 1 else names[0], resource), value

    def _execute(self, name: str, statement: sa.Executable, rows: list[dict[str, Any]]) -> None:
        engine = engine_of(self.urls[name])
        with engine.begin() as connection:
            connection.execute(statement, rows)
        engine.dispose()

    def _read(self, name: str, read: Callable[[sa.Connection], T]) -> T:
        engine = engine_of(self.urls[name])
        with engine.connect() as connection:
            found = read(connection)
        engine.dispose()
        return found


def _height(value: int) -> float:
    return float("inf") if value == UNLIMITED else value


def _set(tx: ApiTx, key: Key, value: int) -> None:
    kind, owner, resource = key
    legacy.claim_by_api(tx, kind, owner, [resource])
    table = api_tables.API_METADATA.tables[kind.value]
    names = dict(zip(OWNER_COLUMNS[kind], (owner,) if isinstance(owner, str) else owner, strict=True))
    is_it = [table.c[column] == name for column, name in {**names, "resource": resource}.items()]
    tx.execute(sa.delete(table).where(*is_it))
    tx.execute(sa.insert(table), {**names, "resource": resource, "hard_limit": value})


def _delete(tx: ApiTx, kind: Kind, owner: Owner) -> None:
    legacy.tombstone(tx, kind, owner)
    table = api_tables.API_METADATA.tables[kind.value]
    names = (owner,) if isinstance(owner, str) else owner
    tx.execute(sa.delete(table).where(*(table.c[c] == n for c, n in zip(OWNER_COLUMNS[kind], names, strict=True))))


@contextmanager
def trial(kind: str, folder: Path, *, rule: Rule, seed: int, rows_per_cell: int) -> Iterator[Trial]:
    """Make the databases of a deployment with three cells, with limits in each."""
    with ExitStack() as opened:
        names = ("api", "cell0", *CELLS)
        urls = {name: opened.enter_context(empty_database(kind, folder)) for name in names}
        data = DataFolder(folder / "data", urls.__getitem__)
        made = Layout(len(CELLS), 1, "trial")
        asyncio.run(prepare(data, Config(limits=PATIENT), made, clock=SystemClock(), ids=RandomIds()))
        running = Trial(urls, rule, random.Random(seed))
        running.fill(rows_per_cell)
        yield running


def torment(running: Trial, *, kills: int, seconds: float, batch: int, changes: int = 2) -> float:
    """Let two runs at once be killed so often, the API change limits between, and look for what is lost.

    They are killed at random moments in so many seconds after rows have begun to move. In the end one is left alone;
    return how long that took.
    """
    for number in range(kills):
        before = running.left()
        processes = [running.start(batch=batch) for _ in range(2)]
        while running.left() == before and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        running.change_over_api(changes)
        if number % 3 == 0:
            running.look()
        for process in running.dice.sample(processes, 2):
            time.sleep(running.dice.uniform(0, seconds / 2))
            running.at_work += process.poll() is None
            process.kill()
            process.wait()
        running.look()
    began = time.monotonic()
    running.finish(running.start(batch=batch))
    return time.monotonic() - began
