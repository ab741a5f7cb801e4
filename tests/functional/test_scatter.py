"""Asking many cells at once: every cell's answer is its own, and so is its failure."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import sqlalchemy as sa

from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, Failed, TimedOut, gather
from cellway.config import Limits, Secret
from cellway.context import CellContext
from cellway.db.engines import Databases
from cellway.db.transaction import Tx
from cellway.errors import CellUnavailable, DeadlineExceeded, NotFound
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.databases import CONTEXT, SLOW_SERVERS, FakeClock, empty_database, engine_of, make_cell

pytestmark = pytest.mark.anyio

LIMITS = Limits(database_deadline_seconds=60.0)


@pytest.fixture
async def opened(anyio_backend: str) -> AsyncIterator[Callable[..., Cells]]:
    """A maker of `Cells` that are closed after the test."""
    made = list[Cells]()

    def make(limits: Limits = LIMITS) -> Cells:
        clock = FakeClock()
        databases = Databases(None, limits=limits, clock=clock)
        made.append(Cells(databases, Transports(MemoryBrokers(), limits, clock), limits=limits, clock=clock))
        return made[-1]

    yield make
    for cells in made:
        await cells.transports.aclose()
        await cells.databases.aclose()


Opened = Callable[..., Cells]


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str, str], Secret]]:
    """A way to a database of each cell on each server, made when it is first asked for."""
    with ExitStack() as opened:
        yield cache(lambda kind, _cell: opened.enter_context(empty_database(kind, Path())))


@pytest.fixture(params=SLOW_SERVERS)
def five(request: pytest.FixtureRequest, servers: Callable[[str, str], Secret], tmp_path: Path) -> list[Cell]:
    """Five cells with a database each, of no particular order."""
    made = []
    for number, name in enumerate(("c", "a", "e", "b", "d"), 1):
        url = Secret(f"sqlite:///{tmp_path / name}") if request.param == "sqlite" else servers(request.param, name)
        with engine_of(url).begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS cell")
            connection.exec_driver_sql("CREATE TABLE cell (name VARCHAR(10))")
            connection.execute(sa.text("INSERT INTO cell VALUES (:name)"), {"name": name})
        made.append(make_cell(name, url, number=number))
    return made


def name_in(tx: Tx) -> str:
    """Return the name that a cell's database has."""
    return str(tx.connection.exec_driver_sql("SELECT name FROM cell").scalar_one())


async def test_every_cell_answers_for_itself(opened: Opened, five: list[Cell]) -> None:
    """Each is asked through a context of its own, and the outcomes come in the order of the cells given."""
    cells = opened()

    async def ask(cell: Cell, cctx: CellContext) -> str:
        assert cctx.cell == cell.ref
        return await cells.databases.on(cctx).read(name_in)

    outcomes = await gather(cells, CONTEXT, five, ask)
    assert list(outcomes.items()) == [(cell, Answered(cell.ref.name)) for cell in five]


async def test_cells_are_asked_at_once(opened: Opened, five: list[Cell]) -> None:
    """No cell has answered when the last one is asked, so five slow cells take as long as one."""
    asked, all_asked = list[str](), asyncio.Event()

    async def ask(cell: Cell, _: CellContext) -> None:
        asked.append(cell.ref.name)
        if len(asked) == len(five):
            all_asked.set()
        await all_asked.wait()

    outcomes = await gather(opened(), CONTEXT, five, ask)
    assert set(outcomes.values()) == {Answered(None)}


async def test_the_order_is_kept_whoever_answers_first(opened: Opened, five: list[Cell]) -> None:
    """The last cell answers first, and still comes last."""
    turns = [asyncio.Event() for _ in five]
    turns[-1].set()

    async def ask(cell: Cell, _: CellContext) -> int:
        await turns[cell.id - 1].wait()
        turns[cell.id - 2].set()
        return cell.id

    outcomes = await gather(opened(), CONTEXT, five, ask)
    assert list(outcomes.values()) == [Answered(cell.id) for cell in five]


async def test_no_more_than_the_limit_are_asked_at_once(opened: Opened, five: list[Cell]) -> None:
    """`Limits.scatter_concurrency` bounds what one request may occupy; the rest have their turn."""
    running, most = set[int](), 0

    async def ask(cell: Cell, _: CellContext) -> None:
        nonlocal most
        running.add(cell.id)
        most = max(most, len(running))
        await asyncio.sleep(0)
        running.remove(cell.id)

    outcomes = await gather(opened(replace(LIMITS, scatter_concurrency=2)), CONTEXT, five, ask)
    assert (most, set(outcomes.values())) == (2, {Answered(None)})


async def test_no_cells_give_no_outcomes(opened: Opened) -> None:
    """Asking nobody is fine."""

    async def ask(_: Cell, __: CellContext) -> None:
        raise AssertionError

    assert await gather(opened(), CONTEXT, [], ask) == {}


async def test_a_hung_cell_blames_no_other(opened: Opened, five: list[Cell]) -> None:
    """It has timed out after its own deadline; all the others have answered."""
    answered = list[int]()

    async def ask(cell: Cell, _: CellContext) -> None:
        if cell is five[1]:
            await asyncio.Event().wait()
        answered.append(cell.id)

    outcomes = await gather(opened(), CONTEXT, five, ask, deadline_seconds=0.2)
    assert outcomes[five[1]] == TimedOut(0.2)
    assert [outcomes[cell] for cell in five if cell is not five[1]] == [Answered(None)] * 4


async def test_waiting_for_a_turn_costs_no_deadline(opened: Opened, five: list[Cell]) -> None:
    """With one turn at a time and the first cell hung, the others still have a whole deadline each."""

    async def ask(cell: Cell, _: CellContext) -> None:
        if cell is five[0]:
            await asyncio.Event().wait()

    cells = opened(replace(LIMITS, scatter_concurrency=1))
    outcomes = await gather(cells, CONTEXT, five, ask, deadline_seconds=0.2)
    assert list(outcomes.values()) == [TimedOut(0.2), *[Answered(None)] * 4]


async def test_a_database_that_does_not_answer_has_timed_out(opened: Opened, five: list[Cell]) -> None:
    """The database's own deadline, which comes first by default, is told apart from a refusal."""
    cells, pause = opened(replace(LIMITS, database_deadline_seconds=2.0)), threading.Event()

    def hang(expired: Callable[[], bool]) -> None:
        while not expired():
            pause.wait(0.01)

    with cells.target_cell(CONTEXT, five[2]) as cctx:
        cells.databases.on(cctx).fault = hang

    async def ask(_: Cell, cctx: CellContext) -> str:
        return await cells.databases.on(cctx).read(name_in)

    outcomes = await gather(cells, CONTEXT, five[2:3], ask)
    assert outcomes == {five[2]: TimedOut(2.25)}


async def test_a_queue_that_does_not_answer_has_timed_out(opened: Opened, five: list[Cell]) -> None:
    """So has a call to a conductor or an agent that met its deadline."""

    async def ask(_: Cell, __: CellContext) -> None:
        raise DeadlineExceeded("message.unanswered", "conductor did not answer in time")

    outcomes = await gather(opened(), CONTEXT, five[:1], ask, deadline_seconds=5)
    assert outcomes == {five[0]: TimedOut(5)}


async def test_a_cell_that_refuses_has_failed(opened: Opened, five: list[Cell], tmp_path: Path) -> None:
    """Its error is its outcome; the others have answered."""
    cells, broken = opened(), make_cell("broken", Secret(f"sqlite:///{tmp_path / 'missing'}"))

    async def ask(_: Cell, cctx: CellContext) -> str:
        return await cells.databases.on(cctx).read(name_in)

    outcomes = await gather(cells, CONTEXT, [five[0], broken, five[1]], ask)
    failed = outcomes[broken]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, CellUnavailable)
    assert failed.error.fields == {"cell": "broken"}
    assert (outcomes[five[0]], outcomes[five[1]]) == (Answered("c"), Answered("a"))


async def test_a_domain_error_is_an_outcome(opened: Opened, five: list[Cell]) -> None:
    """What the cell says is not there is that cell's outcome, unchanged."""
    error = NotFound("thing.not_found", "There is no such thing")

    async def ask(cell: Cell, _: CellContext) -> str:
        if cell is five[0]:
            raise error
        return "found"

    outcomes = await gather(opened(), CONTEXT, five[:2], ask)
    assert list(outcomes.values()) == [Failed(error), Answered("found")]


async def test_a_misconfigured_cell_has_failed(opened: Opened, five: list[Cell]) -> None:
    """It is never asked."""
    broken = replace(five[0], problem="its database URL is in $X, which is not set")

    async def ask(cell: Cell, _: CellContext) -> int:
        assert cell is not broken
        return cell.id

    outcomes = await gather(opened(), CONTEXT, [broken, five[1]], ask)
    failed = outcomes[broken]
    assert isinstance(failed, Failed)
    assert failed.error.message == "Cell c: its database URL is in $X, which is not set"
    assert outcomes[five[1]] == Answered(2)


async def test_a_programming_error_is_raised(opened: Opened, five: list[Cell]) -> None:
    """It is no outcome, and comes after all others have ended."""
    ended = list[int]()

    async def ask(cell: Cell, _: CellContext) -> None:
        if cell is five[0]:
            raise ZeroDivisionError
        await asyncio.sleep(0)
        ended.append(cell.id)

    with pytest.raises(ZeroDivisionError):
        await gather(opened(), CONTEXT, five, ask)
    assert ended == [2, 3, 4, 5]


async def test_a_cancelled_request_asks_nobody_any_more(opened: Opened, five: list[Cell]) -> None:
    """All cells are let go, and their databases are held by nobody."""
    cells, asked, ended = opened(), asyncio.Event(), list[int]()

    async def ask(cell: Cell, _: CellContext) -> None:
        try:
            if cell is five[-1]:
                asked.set()
            await asyncio.Event().wait()
        finally:
            ended.append(cell.id)

    task = asyncio.ensure_future(gather(cells, CONTEXT, five, ask))
    await asked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sorted(ended) == [1, 2, 3, 4, 5]
    for cell in five:
        cells.databases.retire(cell.database_key)
    assert not cells.databases.open_cells
