"""Online data migrations: rows that leave the cells for the API database while everything serves (seeds 003, 004).

`run` goes through `MIGRATIONS` in their order, each through every mapped cell in the order of names, in batches: the
API database is written first, and what was read back there is then buried in the cell. A run may end anywhere, and
several may be at work at once; the next one goes on. `read_status` says how far they are. `cellway db` calls both.

A migration is four functions of a noun, each over one transaction (`Migration`); whatever they say of a row is told
as an `Outcome`. No noun imports this.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog
from sqlalchemy.exc import DataError, DBAPIError

from cellway import migration_state
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.context import CellContext, Clock, RequestContext
from cellway.db.engines import API, Database
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import CellwayError, NotFound
from cellway.quota import legacy, moving
from cellway.quota.legacy import Kind
from cellway.quota.moving import Rule, Source

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row of a cell. `row` is the noun's own; `key` is its name for people."""

    row: Any
    row_id: int
    key: str
    fate: str
    is_settled: bool
    """Whether nothing more is wanted of it, so that it is buried in its cell."""
    is_difference: bool
    """Whether somebody should know: a value was lost to another, or dropped, or cannot be moved."""
    value: object
    stands: object
    """What the API database has for it then; None for nothing."""
    reason: str | None = None
    unknown: str | None = None
    """The kind of thing that nobody knows, of which it was moved all the same."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Rows of one table that leave the cells, by functions over one transaction."""

    name: str
    """Also in `migration_state`."""
    count: Callable[[CellTx], int]
    """How many rows a cell has left."""
    list_rows: Callable[[CellTx, int | None, int], Sequence[Any]]
    """At most so many rows with ids below the one given, the highest first; each has an `id`."""
    move: Callable[[ApiTx, Sequence[Any], Rule, Source], list[Outcome]]
    """Write a batch into the API database and read it back."""
    plan: Callable[[ApiTx, Sequence[Any], Rule, Source, dict[Any, Any]], list[Outcome]]
    """Say what `move` would do after everything that was put into the dictionary before, and write nothing."""
    refuse: Callable[[Any, str], Outcome]
    """Say that a row cannot be moved, and why."""
    bury: Callable[[CellTx, Sequence[Any]], int]
    """Soft-delete rows in the cell; return how many were live."""


def _of_limits(kind: Kind) -> Migration:
    def told(outcomes: Iterable[moving.Outcome]) -> list[Outcome]:
        return [_told(outcome) for outcome in outcomes]

    return Migration(
        kind.value,
        count=partial(_flipped, legacy.count, kind),
        list_rows=partial(_flipped, legacy.list_rows, kind),
        move=lambda tx, rows, rule, source: told(moving.move(tx, kind, rows, rule, source)),
        plan=lambda tx, rows, rule, source, planned: told(moving.plan(tx, kind, rows, rule, source, planned)),
        refuse=lambda row, reason: _told(moving.Outcome(row, moving.Fate.BLOCKED, reason=reason)),
        bury=legacy.bury,
    )


def _flipped(function: Callable[..., Any], kind: Kind, tx: CellTx, *arguments: Any) -> Any:
    return function(tx, kind, *arguments)


_EXPECTED: Final = (moving.Fate.MOVED, moving.Fate.PRESENT)


def _told(outcome: moving.Outcome) -> Outcome:
    row = outcome.row
    return Outcome(
        row=row,
        row_id=row.id,
        key="/".join("NULL" if name is None else str(name) for name in (*row.names, row.resource)),
        fate=outcome.fate.value,
        is_settled=outcome.is_settled,
        is_difference=outcome.fate not in _EXPECTED,
        value=row.stored,
        stands=outcome.stands,
        reason=outcome.reason,
        unknown=str(row.resource) if outcome.is_unknown else None,
    )


MIGRATIONS: Final = tuple(_of_limits(kind) for kind in (Kind.PROJECT, Kind.USER, Kind.CLASS))
"""Every migration, in the order in which they run."""


# ---- a run -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Part:
    """One migration in one cell, as a run found and left it."""

    migration: str
    cell: str
    total: int = 0
    """Rows that the cell had."""
    found: int = 0
    """Rows that were looked at."""
    done: int = 0
    """Rows that this run took out of the cell; in a dry run, would have taken."""
    left: int | None = None
    """Rows that the cell has now; None when it did not say."""
    fates: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    differences: list[Outcome] = field(default_factory=list)
    blocked: list[Outcome] = field(default_factory=list)
    reappeared: bool = False
    """Whether the cell had rows although the migration was complete there."""
    problem: str | None = None
    """Why the cell could not be worked on to the end."""

    def add(self, outcomes: Sequence[Outcome], done: int) -> None:
        """Count the outcomes of a batch, of which so many rows have left the cell."""
        self.found += len(outcomes)
        self.done += done
        self.fates.update(outcome.fate for outcome in outcomes if outcome.is_settled)
        self.unknown.update(outcome.unknown for outcome in outcomes if outcome.unknown is not None)
        self.differences += [outcome for outcome in outcomes if outcome.is_difference and outcome.is_settled]
        self.blocked += [outcome for outcome in outcomes if not outcome.is_settled]

    @property
    def has_more(self) -> bool:
        """Whether another run would find rows that can be moved."""
        return self.problem is None and (self.left or 0) > len(self.blocked)


@dataclass(slots=True)
class Report:
    """What a run did."""

    parts: list[Part] = field(default_factory=list)
    stopped: bool = False
    """Whether it was told to stop."""

    @property
    def done(self) -> int:
        """Rows that left the cells."""
        return sum(part.done for part in self.parts)

    @property
    def problems(self) -> list[Part]:
        """Where it could not work to the end."""
        return [part for part in self.parts if part.problem is not None]


@dataclass(frozen=True, slots=True)
class Options:
    """What a run may do. None of `cells` named means all of them."""

    cells: frozenset[str] = frozenset()
    rule: Rule = Rule.KEEP
    most: int | None = None
    """Rows to take out of the cells, all together."""
    dry: bool = False
    """Write nothing, and say what a run would do."""
    sleep_seconds: float = 0.0
    """A rest after every batch."""


Watch = Callable[[Part, Sequence[Outcome]], None]
"""Told of every batch: before anything of it is buried what became of its rows, and without any when it is over."""


async def run(
    cells: Cells,
    context: RequestContext,
    clock: Clock,
    options: Options,
    *,
    watch: Watch = lambda _part, _outcomes: None,
    stopping: asyncio.Event | None = None,
) -> Report:
    """Take the rows of all migrations out of the cells, and say what became of them.

    A cell that does not answer is told in its part and does not keep the others from going on. Once `stopping` is set,
    the batch in hand is the last.

    Raises: NotFound for a cell that is not there; Unavailable when the API database does not answer at the beginning.
    """
    unknown = options.cells - {name for cell in cells.snapshot.all for name in (cell.ref.name, cell.ref.uuid)}
    if unknown:
        raise NotFound("cell.not_found", f"There is no cell {min(unknown)}", cell=min(unknown))
    api = cells.databases.on(API)
    complete = await api.read(migration_state.complete_cells)
    in_order = by_name(cells)
    order = tuple(cell.id for cell in in_order)
    report = Report()
    for migration in MIGRATIONS:
        planned: dict[Any, Any] = {}
        for cell in in_order:
            if options.cells and not {cell.ref.name, cell.ref.uuid} & options.cells:
                continue
            part = Part(migration.name, cell.ref.name)
            report.parts.append(part)
            try:
                with cells.target_cell(context, cell) as cctx:
                    visit = _Visit(
                        migration=migration,
                        api=api,
                        database=cells.databases.on(cctx),
                        source=Source(cell.id, order),
                        cell_uuid=cell.ref.uuid,
                        options=options,
                        clock=clock,
                        watch=watch,
                        stopping=stopping or asyncio.Event(),
                        report=report,
                        part=part,
                        planned=planned,
                        was_complete=(migration.name, cell.ref.uuid) in complete,
                    )
                    await visit.everything()
            except CellwayError as error:
                part.problem = error.message
            except DBAPIError as error:
                # Such as a table that is not there. Its own message may hold anything.
                part.problem = f"a database refused a statement ({type(error).__name__}); see cellway db status"
            if part.problem is not None:
                part.left = None
                log.info("migration_failed", migration=part.migration, cell=part.cell, problem=part.problem)
            watch(part, ())
    report.stopped = stopping is not None and stopping.is_set()
    return report


def by_name(cells: Cells) -> list[Cell]:
    """Return every mapped cell, cell0 and disabled ones among them, in the order of their names."""
    return sorted(cells.snapshot.all, key=lambda cell: (cell.ref.name, cell.ref.uuid))


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the cell's part of a batch gave: how many rows were buried, and the rows of the next."""

    done: int
    following: Sequence[Any]
    left: int | None
    """How many rows are left, once none follows."""


@dataclass(slots=True, kw_only=True)
class _Visit:
    """One migration at work in one cell."""

    migration: Migration
    api: Database[ApiTx]
    database: Database[CellTx]
    source: Source
    cell_uuid: str
    options: Options
    clock: Clock
    watch: Watch
    stopping: asyncio.Event
    report: Report
    part: Part
    planned: dict[Any, Any]
    was_complete: bool
    recorded: int = 0
    """How many of the rows that are done stand in `migration_state`."""

    async def everything(self) -> None:
        """Go through the rows, and again as long as there are some that can be moved: others may be at work too."""
        idle = 0
        try:
            while True:
                before = self.part.done
                await self._go_through()
                idle = 0 if self.part.done > before else idle + 1
                if self.options.dry or not self.part.has_more or not self._room() or idle == _IDLE_PASSES:
                    break
                if idle:
                    await self._rest(_IDLE_SECONDS)
        finally:
            # Also when the cell has failed meanwhile.
            if not self.options.dry:
                await self._record()

    async def _go_through(self) -> None:
        part = self.part
        part.found -= len(part.blocked)
        part.blocked = []
        left, rows = await self.database.read(_begin, self.migration, self._room())
        part.left, part.total = left, max(part.total, part.done + left)
        if left and self.was_complete:
            part.reappeared = True
            if not self.options.dry:
                await self.api.write(migration_state.reopen, self.migration.name, self.cell_uuid)
            self.was_complete = False
        before = part.done
        while rows and not self.stopping.is_set():
            outcomes = await self._decide(rows)
            self.watch(part, outcomes)
            batch = await self._bury(rows, [outcome.row for outcome in outcomes if outcome.is_settled])
            part.add(outcomes, batch.done)
            rows = batch.following
            if batch.left is not None:
                part.left = batch.left - (part.done if self.options.dry else 0)
            self.watch(part, ())
            if rows and self.options.sleep_seconds:
                await self._rest(self.options.sleep_seconds)
        if rows:
            part.left = left - (part.done - before)

    async def _rest(self, seconds: float) -> None:
        """Sleep, but not on when the run is told to stop."""
        resting = asyncio.create_task(self.clock.sleep(seconds))
        told = asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait((resting, told), return_when=asyncio.FIRST_COMPLETED)
        finally:
            resting.cancel()
            told.cancel()

    async def _decide(self, rows: Sequence[Any]) -> list[Outcome]:
        if self.options.dry:
            return await self.api.read(self.migration.plan, rows, self.options.rule, self.source, self.planned)
        done = self.part.done - self.recorded
        try:
            outcomes = await self.api.write_once(None, self._move, rows, done)
        except DataError:
            # Such as a character that the tables of an adopted API database cannot hold: which row is it of?
            if len(rows) == 1:
                return [self.migration.refuse(rows[0], "the API database cannot hold it")]
            middle = len(rows) // 2
            return [*await self._decide(rows[:middle]), *await self._decide(rows[middle:])]
        self.recorded += done
        return outcomes

    def _move(self, tx: ApiTx, rows: Sequence[Any], done: int) -> list[Outcome]:
        outcomes = self.migration.move(tx, rows, self.options.rule, self.source)
        if done:
            # Of the batches before: only now is it known what has left the cell.
            blocked = len(self.part.blocked)
            migration_state.add_progress(tx, self.migration.name, self.cell_uuid, done=done, blocked=blocked)
        return outcomes

    async def _bury(self, rows: Sequence[Any], settled: Sequence[Any]) -> _Batch:
        room = self._room(len(settled))
        if self.options.dry:
            batch = await self.database.read(_go_on, self.migration, (), rows[-1].id, room)
            return _Batch(len(settled), batch.following, batch.left)
        return await self.database.write_once(None, _go_on, self.migration, settled, rows[-1].id, room)

    async def _record(self) -> None:
        part = self.part
        finished = part.left == 0 and not self.was_complete
        if finished or part.done > self.recorded or part.blocked:
            await self.api.write_once(None, self._write_record, part.done - self.recorded, finished)

    def _write_record(self, tx: ApiTx, done: int, finished: bool) -> None:
        name = self.migration.name
        migration_state.add_progress(tx, name, self.cell_uuid, done=done, blocked=len(self.part.blocked))
        if finished:
            migration_state.mark_complete(tx, name, self.cell_uuid)

    def _room(self, taken: int = 0) -> int:
        """Return how many rows the next batch may have."""
        if self.stopping.is_set():
            return 0
        most = self.database.limits.migration_batch
        return most if self.options.most is None else max(0, min(most, self.options.most - self.report.done - taken))


_IDLE_PASSES: Final = 5
_IDLE_SECONDS: Final = 0.5
"""What is left after a pass that moved nothing is probably in another run's hands: it gets so long for each batch."""


def _begin(tx: CellTx, migration: Migration, most: int) -> tuple[int, Sequence[Any]]:
    return migration.count(tx), migration.list_rows(tx, None, most) if most else ()


def _go_on(tx: CellTx, migration: Migration, settled: Sequence[Any], before: int, most: int) -> _Batch:
    done = migration.bury(tx, settled)
    following = migration.list_rows(tx, before, most) if most else ()
    return _Batch(done, following, None if following else migration.count(tx))


# ---- how far they are ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    """One migration in one cell. `left` is None when the cell did not answer."""

    migration: str
    cell: str
    left: int | None
    done: int
    blocked: int
    complete_since: datetime | None
    """None too when rows have appeared since."""
    reappeared: bool


async def read_status(cells: Cells, context: RequestContext) -> list[Status]:
    """Return how far each migration is in each cell, asking the cells how much they have left."""
    states = {(one.name, one.cell_uuid): one for one in await cells.databases.on(API).read(migration_state.list_states)}

    async def ask(_cell: Cell, cctx: CellContext) -> dict[str, int]:
        return await cells.databases.on(cctx).read(lambda tx: {one.name: one.count(tx) for one in MIGRATIONS})

    outcomes = await gather(cells, context, by_name(cells), ask)
    found = []
    for migration in MIGRATIONS:
        for cell, outcome in outcomes.items():
            left = outcome.value[migration.name] if isinstance(outcome, Answered) else None
            state = states.get((migration.name, cell.ref.uuid))
            complete = state is not None and state.complete
            found.append(
                Status(
                    migration.name,
                    cell.ref.name,
                    left,
                    done=state.done if state else 0,
                    blocked=state.blocked if state else 0,
                    complete_since=state.updated_at if state and complete and not left else None,
                    reappeared=complete and bool(left),
                )
            )
    return found
