"""The door to every database: sharing, draining, bounds, deadlines, retries and what its errors become."""

import asyncio
import socket
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError

from cellway.cells.registry import Cell
from cellway.cells.target import target_cell
from cellway.config import Limits, Secret
from cellway.context import CellContext
from cellway.db.engines import API, Database, Databases, connection_key
from cellway.db.transaction import ApiTx, CellTx, Tx, insert_if_absent, unique_violation
from cellway.errors import (
    CellNotTargeted,
    CellUnavailable,
    CellwayError,
    Conflict,
    DeadlineExceeded,
    Invalid,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from cellway.ids import CellUuid
from cellway.rpc.transport import MemoryBrokers, Transports
from tests import proxy
from tests.databases import CONTEXT, KINDS, SERVERS, FakeClock, empty_database, engine_of, make_cell
from tests.proxy import Proxy

pytestmark = pytest.mark.anyio

T = TypeVar("T")

PATIENT = Limits(database_deadline_seconds=60.0)
"""A deadline that no stall of the machine reaches."""
HASTY = Limits(database_deadline_seconds=0.3, database_threads=1)

METADATA = sa.MetaData()
things = sa.Table(
    "things",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(50), nullable=False, unique=True),
    sa.Column("note", sa.String(50)),
)
keys = sa.Table(
    "idempotency_keys",
    METADATA,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("created_at", sa.DateTime),
)
FOREVER = "WITH RECURSIVE c(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


def add(tx: Tx, number: int, name: str) -> None:
    """Insert one row."""
    tx.execute(sa.insert(things), {"id": number, "name": name})


def names(tx: Tx) -> list[str]:
    """Return every row's name."""
    return list(tx.execute(sa.select(things.c.name).order_by(things.c.id)).scalars())


def one(tx: Tx) -> int:
    """Ask the database for the number 1."""
    return int(tx.connection.exec_driver_sql("SELECT 1").scalar_one())


def forever(tx: Tx) -> None:
    """Run a statement that never ends."""
    tx.connection.exec_driver_sql(FOREVER)


def make_tables(url: Secret) -> None:
    """Make the tables of these tests."""
    engine = engine_of(url)
    with engine.begin() as connection:
        METADATA.create_all(connection)
    engine.dispose()


class Held:
    """A unit of work that keeps its thread until it is let go, and then reads."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, tx: Tx) -> int:
        self.begun.set()
        assert self.go.wait(60)
        return one(tx)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until `condition` is true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - threads set no asyncio.Event
            await asyncio.sleep(0)


async def eventually(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask until there is an answer: a hasty deadline may pass when the machine stalls."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(0)


def threads() -> set[threading.Thread]:
    """Return the threads of databases that run now."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("db-")}


@pytest.fixture
def clock() -> FakeClock:
    """A clock that the test moves."""
    return FakeClock()


@pytest.fixture
def url(tmp_path: Path) -> Secret:
    """An SQLite file with the tables of these tests."""
    made = Secret(f"sqlite:///{tmp_path / 'cell.sqlite'}")
    make_tables(made)
    return made


@pytest.fixture
async def opened(clock: FakeClock) -> AsyncIterator[Callable[..., Databases]]:
    """A maker of `Databases` that are closed after the test; their threads must have ended then."""
    before, made = threads(), list[Databases]()

    def make(limits: Limits = PATIENT, *, api: Secret | None = None) -> Databases:
        made.append(Databases(api, limits=limits, clock=clock))
        return made[-1]

    yield make
    for databases in made:
        await databases.aclose()
    assert threads() <= before


Opened = Callable[..., Databases]


@contextmanager
def targeted(databases: Databases, cell: Cell) -> Iterator[CellContext]:
    """Target a cell without a queue."""
    transports = Transports(MemoryBrokers(), PATIENT, FakeClock())
    with target_cell(CONTEXT, replace(cell, transport_url=Secret("none:///")), databases, transports) as cctx:
        yield cctx


@contextmanager
def door(databases: Databases, url: Secret, name: str = "one") -> Iterator[Database[CellTx]]:
    """Open one cell's database."""
    with targeted(databases, make_cell(name, url)) as cctx:
        yield databases.on(cctx)


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Secret]]:
    """A way to one database on each server, made when it is first asked for."""
    with ExitStack() as opened:

        @cache
        def get(kind: str) -> Secret:
            made = opened.enter_context(empty_database(kind, Path()))
            make_tables(made)
            return made

        yield get


def emptied(url: Secret) -> Secret:
    """Delete every row."""
    engine = engine_of(url)
    with engine.begin() as connection:
        connection.execute(sa.delete(things))
        connection.execute(sa.delete(keys))
    engine.dispose()
    return url


@pytest.fixture(params=KINDS)
def anywhere(request: pytest.FixtureRequest, servers: Callable[[str], Secret]) -> Secret:
    """A database with the tables of these tests, of each kind in turn."""
    if request.param == "sqlite":
        file: Secret = request.getfixturevalue("url")
        return file
    return emptied(servers(request.param))


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, servers: Callable[[str], Secret]) -> Secret:
    """The same, on each server in turn."""
    return emptied(servers(request.param))


@pytest.fixture
def postgresql(servers: Callable[[str], Secret]) -> Secret:
    """The same, on PostgreSQL."""
    return emptied(servers("postgresql"))


def session(tx: Tx) -> int:
    """Return the server's number of this session."""
    postgresql = tx.connection.dialect.name == "postgresql"
    return int(
        tx.connection.exec_driver_sql(f"SELECT {'pg_backend_pid' if postgresql else 'connection_id'}()").scalar_one()
    )


def kill(url: Secret, number: int) -> None:
    """End a session from outside, and wait until it is gone."""
    engine = engine_of(url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.dialect.name == "postgresql":
            end, left = "SELECT pg_terminate_backend(:n)", "SELECT count(*) FROM pg_stat_activity WHERE pid = :n"
        else:
            end, left = "KILL :n", "SELECT count(*) FROM information_schema.processlist WHERE id = :n"
        connection.execute(sa.text(end), {"n": number})
        while connection.execute(sa.text(left), {"n": number}).scalar_one():
            continue
    engine.dispose()


# ---- which database, and how many engines ----------------------------------------------------------------------


async def test_contexts_of_one_cell_share_its_database(opened: Opened, url: Secret) -> None:
    """Two contexts targeted at the same cell and URL reach the same database."""
    databases, cell = opened(), make_cell("one", url)
    with targeted(databases, cell) as first, targeted(databases, cell) as second:
        assert databases.on(first) is databases.on(second)
    assert len(databases.open_cells) == 1


async def test_the_engine_is_made_once(opened: Opened, url: Secret) -> None:
    """Threads that ask for the engine at the same moment get the same one."""
    barrier = threading.Barrier(8)
    with door(opened(), url) as database, ThreadPoolExecutor(8) as pool:

        def engine(_: int) -> sa.Engine:
            barrier.wait(30)
            return database.engine()

        assert len({id(made) for made in pool.map(engine, range(8))}) == 1


async def test_two_cells_have_two_databases(opened: Opened, url: Secret, tmp_path: Path) -> None:
    """What is written in one cell is not in the other."""
    other = Secret(f"sqlite:///{tmp_path / 'other.sqlite'}")
    make_tables(other)
    databases = opened()
    with door(databases, url, "one") as first, door(databases, other, "two") as second:
        await first.write(add, 1, "only here")
        assert [await first.read(names), await second.read(names)] == [["only here"], []]


def test_the_key_is_of_cell_and_url() -> None:
    """Another cell or another URL is another key, and the key holds nothing of the URL."""
    one, two = CellUuid("11111111-1111-4111-8111-111111111111"), CellUuid("22222222-2222-4222-8222-222222222222")
    url = Secret("postgresql://user:hunter2@db/cell")
    key = connection_key(one, url)
    assert key == connection_key(one, Secret(url.reveal()))
    assert len({key, connection_key(two, url), connection_key(one, Secret("postgresql://user:hunter3@db/cell"))}) == 3
    assert not any(part in key for part in ("hunter2", "user", "postgresql"))


async def test_an_untargeted_context_has_no_database(opened: Opened) -> None:
    """There is no default cell, not even for a context that carries some key."""
    databases = opened()
    with pytest.raises(CellNotTargeted):
        databases.on(CONTEXT)
    with pytest.raises(CellNotTargeted):
        databases.on(replace(CONTEXT, db_connection="11111111-1111-4111-8111-111111111111:0123456789abcdef"))


async def test_a_context_is_dead_when_its_database_was_closed(opened: Opened, url: Secret) -> None:
    """A context that is used long after its block reaches nothing."""
    databases, cell = opened(), make_cell("one", url)
    with targeted(databases, cell) as cctx:
        kept = cctx
    databases.retire(cell.database_key)
    with pytest.raises(CellNotTargeted):
        databases.on(kept)


async def test_the_api_database_is_none_of_the_cells(opened: Opened, url: Secret, tmp_path: Path) -> None:
    """`API` means the API database, whose transactions are of another type."""
    api = Secret(f"sqlite:///{tmp_path / 'api.sqlite'}")
    make_tables(api)
    databases = opened(api=api)
    with door(databases, url) as cell:
        await cell.write(add, 1, "in the cell")
        assert await databases.on(API).read(names) == []
        assert await databases.on(API).read(type) is ApiTx
        assert await cell.read(type) is CellTx


async def test_a_process_may_have_no_api_database(opened: Opened) -> None:
    """Then asking for it says so."""
    with pytest.raises(Invalid, match="no API database"):
        opened().on(API)


# ---- closing: replaced, idle, too many, the end ----------------------------------------------------------------


async def test_a_changed_url_drains_the_old_database(opened: Opened, url: Secret, tmp_path: Path) -> None:
    """The new URL has an engine at once; a long read on the old one still finishes, and then its threads end."""
    newer = Secret(f"sqlite:///{tmp_path / 'newer.sqlite'}")
    make_tables(newer)
    others = threads()
    databases, work = opened(), Held()
    old = make_cell("one", url)
    with targeted(databases, old) as before:
        reading = asyncio.ensure_future(databases.on(before).read(work))
        await until(work.begun.is_set)
        running = threads() - others
        databases.retire(old.database_key)
        with door(databases, newer) as after:
            assert after is not databases.on(before)
            assert await after.read(one) == 1
        work.go.set()
        assert await reading == 1
    assert [database.name for database in databases.open_cells] == [after.name]
    await until(lambda: not running & threads())


async def test_a_stale_user_of_an_old_url_does_not_disturb_the_new_one(opened: Opened, url: Secret) -> None:
    """A holder of the old URL opens it anew for itself; the database of the new one stays as it is."""
    databases, old = opened(), make_cell("one", url)
    new = make_cell("one", Secret(url.reveal() + "?new"))
    with targeted(databases, new) as cctx:
        database = databases.on(cctx)
    with targeted(databases, old):
        databases.retire(old.database_key)
    for cell in (old, new, old, new):
        with targeted(databases, cell) as cctx:
            assert (databases.on(cctx) is database) is (cell is new)


async def test_a_renamed_cell_keeps_its_database(opened: Opened, url: Secret) -> None:
    """A new name closes nothing, and errors use it from then on."""
    databases, cell = opened(), make_cell("one", url)
    with targeted(databases, cell) as cctx:
        database = databases.on(cctx)
    with targeted(databases, replace(cell, ref=cell.ref._replace(name="renamed"))) as cctx:
        assert databases.on(cctx) is database
    assert database.outage().fields == {"cell": "renamed"}


async def test_the_least_recently_used_makes_room(opened: Opened, url: Secret, clock: FakeClock) -> None:
    """At the bound, the database that nobody used for longest is closed for a new one."""
    databases = opened(replace(PATIENT, open_databases=2))
    for name in ("one", "two", "one"):
        with door(databases, url, name):
            clock.seconds += 1
    with door(databases, url, "three"):
        assert {str(database.cell and database.cell.name) for database in databases.open_cells} == {"one", "three"}


async def test_no_room_when_all_are_in_use(opened: Opened, url: Secret) -> None:
    """At the bound, with every database in use, a further cell is refused and the others work on."""
    databases = opened(replace(PATIENT, open_databases=1))
    with door(databases, url) as database:
        with pytest.raises(Unavailable, match="Too many"), door(databases, url, "two"):
            pass
        assert await database.read(one) == 1


async def test_the_idle_are_closed(opened: Opened, url: Secret, clock: FakeClock) -> None:
    """A database that nobody used for the idle time is closed and its threads end; one in use stays."""
    others = threads()
    databases = opened()
    with door(databases, url, "idle") as idle:
        await idle.read(one)
    running = threads() - others
    with door(databases, url, "used") as used:
        clock.seconds += PATIENT.idle_seconds - 1
        databases.expire_idle()
        assert len(databases.open_cells) == 2
        clock.seconds += 1
        databases.expire_idle()
        assert list(databases.open_cells) == [used]
    await until(lambda: not running & threads())


async def test_the_idle_open_anew(opened: Opened, url: Secret, clock: FakeClock) -> None:
    """The next use of a database that was closed when idle works."""
    databases = opened()
    for _ in range(2):
        with door(databases, url) as database:
            assert await database.read(one) == 1
        clock.seconds += PATIENT.idle_seconds
        databases.expire_idle()
        assert databases.open_cells == ()


async def test_the_owner_closes_everything(clock: FakeClock, url: Secret, tmp_path: Path) -> None:
    """After `aclose` no thread is left: not of the API database, of cells, nor of those that were draining."""
    before = threads()
    databases = Databases(url, limits=PATIENT, clock=clock)
    await databases.on(API).read(one)
    work, draining = Held(), make_cell("draining", url)
    with targeted(databases, draining) as cctx:
        reading = asyncio.ensure_future(databases.on(cctx).read(work))
        await until(work.begun.is_set)
    databases.retire(draining.database_key)
    with door(databases, url) as database:
        await asyncio.gather(*(database.read(one) for _ in range(8)), database.write(add, 1, "x"))
    assert len(threads() - before) > 2
    closing = asyncio.ensure_future(databases.aclose())
    await until(lambda: len(threads() - before) == 1)
    work.go.set()
    await closing
    assert threads() <= before
    assert await reading == 1


async def test_nothing_opens_after_the_end(clock: FakeClock, url: Secret) -> None:
    """Late leases are refused, late reads are an outage, and a lease from before can still be given back."""
    databases = Databases(None, limits=PATIENT, clock=clock)
    with door(databases, url) as database:
        await databases.aclose()
        with pytest.raises(Unavailable):
            await database.read(one)
        with pytest.raises(Unavailable), door(databases, url, "two"):
            pass


# ---- threads ---------------------------------------------------------------------------------------------------


async def test_one_after_the_other_needs_one_thread(opened: Opened, url: Secret) -> None:
    """Threads start only when there is work for them at once."""
    before = threads()
    with door(opened(), url) as database:
        for _ in range(20):
            await database.read(one)
        assert len(threads() - before) == 1


async def test_all_threads_work_at_once(opened: Opened, server: Secret) -> None:
    """Whatever is asked at the same moment runs at the same moment, up to the number of threads."""

    def meet(_: Tx, barrier: threading.Barrier) -> int:
        return barrier.wait(30)

    for _ in range(5):
        databases, barrier = opened(replace(PATIENT, database_threads=4)), threading.Barrier(4)
        with door(databases, server) as database:
            met = await asyncio.gather(*(database.read(meet, barrier) for _ in range(4)))
            assert sorted(met) == [0, 1, 2, 3]
        await databases.aclose()


async def test_on_sqlite_a_read_waits_for_no_write(opened: Opened, url: Secret) -> None:
    """Reads have one thread and writes another."""
    work = Held()
    with door(opened(), url) as database:
        written = asyncio.ensure_future(database.write(work))
        await until(work.begun.is_set)
        assert await database.read(one) == 1
        work.go.set()
        assert await written == 1


async def test_a_cell_cannot_use_the_threads_of_another(opened: Opened, url: Secret) -> None:
    """With every thread of one cell held, another cell still answers."""
    databases = opened(replace(PATIENT, database_threads=1))
    work = Held()
    with door(databases, url, "slow") as slow, door(databases, url, "quick") as quick:
        held = asyncio.ensure_future(slow.read(work))
        await until(work.begun.is_set)
        assert await quick.read(one) == 1
        work.go.set()
        await held


async def test_writers_of_a_file_take_turns(opened: Opened, url: Secret) -> None:
    """Concurrent writes to one SQLite file all succeed, on one thread that reads do not need."""
    with door(opened(), url) as database:
        await asyncio.gather(*(database.write(add, number, f"n{number}") for number in range(20)))
        assert len(await database.read(names)) == 20


async def test_too_many_waiting_are_refused_at_once(opened: Opened, url: Secret) -> None:
    """Beyond the queue's bound an outage is told at once, and what waits is still done."""
    work = Held()
    with door(opened(replace(PATIENT, database_threads=1, database_queue=1)), url) as database:
        held = asyncio.ensure_future(database.read(work))
        await until(work.begun.is_set)
        waiting = asyncio.ensure_future(database.read(one))
        await asyncio.sleep(0)
        with pytest.raises(CellUnavailable):
            await database.read(one)
        work.go.set()
        assert list(await asyncio.gather(held, waiting)) == [1, 1]


# ---- deadlines and cancelling ----------------------------------------------------------------------------------


async def test_a_slow_statement_is_stopped_at_the_deadline(opened: Opened, url: Secret) -> None:
    """The caller hears in time that the cell did not answer, and the only thread is free again."""
    with door(opened(HASTY), url) as database:
        with pytest.raises(CellUnavailable, match="did not answer in time") as refusal:
            await database.read(forever)
        assert refusal.value.fields == {"cell": "one"}
        assert await eventually(lambda: database.read(one)) == 1


async def test_the_api_database_has_a_deadline_of_its_own_kind(opened: Opened, url: Secret) -> None:
    """A slow API database is DeadlineExceeded: there is no cell to name."""
    with pytest.raises(DeadlineExceeded):
        await opened(HASTY, api=url).on(API).read(forever)


async def test_work_is_stopped_when_the_deadline_falls_between_two_statements(opened: Opened, url: Secret) -> None:
    """At the deadline there is nothing to interrupt; the statement that begins after it is stopped all the same."""
    work = Held()

    def slow(tx: Tx) -> None:
        work(tx)
        forever(tx)

    with door(opened(HASTY), url) as database:
        with pytest.raises(CellUnavailable):
            await database.read(slow)
        work.go.set()
        assert await eventually(lambda: database.read(one)) == 1


async def test_a_late_write_is_not_kept(opened: Opened, url: Secret) -> None:
    """A write whose function ends after the deadline is rolled back."""
    begun, go = threading.Event(), threading.Event()

    def slow(tx: Tx) -> None:
        add(tx, 1, "late")
        begun.set()
        assert go.wait(60)

    with door(opened(HASTY), url) as database:
        with pytest.raises(CellUnavailable):
            await database.write(slow)
        go.set()
        await eventually(lambda: database.write(add, 2, "in time"))
        assert await eventually(lambda: database.read(names)) == ["in time"]


async def test_work_that_waited_past_its_deadline_is_not_begun(opened: Opened, url: Secret) -> None:
    """Nobody waits for its result any more."""
    work, ran = Held(), list[str]()
    with door(opened(HASTY), url) as database:
        held = asyncio.ensure_future(database.read(work))
        await until(work.begun.is_set)
        with pytest.raises(CellUnavailable):
            await database.read(lambda tx: ran.append("late"))
        work.go.set()
        await asyncio.gather(held, return_exceptions=True)
        await eventually(lambda: database.read(one))
    assert ran == []


async def test_a_cancelled_caller_frees_the_thread(opened: Opened, url: Secret) -> None:
    """Whoever is cancelled leaves no statement running, long before the deadline."""
    begun = threading.Event()

    def slow(tx: Tx) -> None:
        begun.set()
        forever(tx)

    with door(opened(replace(PATIENT, database_threads=1)), url) as database:
        asking = asyncio.ensure_future(database.read(slow))
        await until(begun.is_set)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await database.read(one) == 1


async def test_a_hang_of_the_door_ends_with_the_deadline(opened: Opened, url: Secret) -> None:
    """What a test puts before the work is told that the deadline passed."""
    ended = threading.Event()

    def hang(expired: Callable[[], bool]) -> None:
        while not expired():
            ended.wait(0.001)
        ended.set()

    with door(opened(HASTY), url) as database:
        database.fault = hang
        with pytest.raises(CellUnavailable):
            await database.read(one)
        database.fault = None
        await until(ended.is_set)
        assert await eventually(lambda: database.read(one)) == 1


# ---- transactions ----------------------------------------------------------------------------------------------


async def test_a_function_that_raises_leaves_nothing(opened: Opened, anywhere: Secret) -> None:
    """What it wrote is rolled back, and its own error reaches the caller as it is."""
    error = NotFound("thing.not_found", "There is no such thing")

    def failing(tx: Tx) -> None:
        add(tx, 1, "x")
        raise error

    with door(opened(), anywhere) as database:
        with pytest.raises(NotFound) as refusal:
            await database.write(failing)
        assert refusal.value is error
        assert await database.read(names) == []


class Unusual(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("x"), Unusual("x")])
async def test_programming_errors_pass(opened: Opened, url: Secret, error: BaseException) -> None:
    """They are not taken for an outage, and the thread lives on."""

    def failing(tx: Tx) -> None:
        raise error

    with door(opened(replace(PATIENT, database_threads=1)), url) as database:
        outcome, *_ = await asyncio.gather(database.read(failing), return_exceptions=True)
        assert outcome is error
        assert await database.read(one) == 1


async def test_a_stray_stop_iteration_is_told(opened: Opened, url: Secret) -> None:
    """No future can hold one, so it comes as a RuntimeError at once, not as a deadline."""
    with door(opened(), url) as database, pytest.raises(RuntimeError, match="StopIteration"):
        await database.read(lambda tx: next(iter(())))


async def test_a_read_keeps_nothing(opened: Opened, anywhere: Secret) -> None:
    """Whatever a read's function writes is rolled back, or refused (PostgreSQL)."""
    with door(opened(), anywhere) as database:
        with pytest.raises(Unavailable) if "postgresql" in anywhere.reveal() else nullcontext():
            await database.read(add, 1, "x")
        assert await database.read(names) == []
        await database.write(add, 2, "y")
        assert await database.read(names) == ["y"]


async def test_what_is_written_is_read(opened: Opened, anywhere: Secret) -> None:
    """Arguments and results pass the door unchanged, on every database."""
    with door(opened(), anywhere) as database:
        await database.write(add, 7, name="süß 'quoted' %s :x")
        assert await database.read(names) == ["süß 'quoted' %s :x"]


async def test_a_read_sees_one_snapshot(opened: Opened, url: Secret) -> None:
    """A write that commits between two statements of a read is not seen by the second (SQLite)."""
    looked, go = threading.Event(), threading.Event()

    def twice(tx: Tx) -> tuple[list[str], list[str]]:
        before = names(tx)
        looked.set()
        assert go.wait(60)
        return before, names(tx)

    with door(opened(), url) as database:
        reading = asyncio.ensure_future(database.read(twice))
        await until(looked.is_set)
        await database.write(add, 1, "x")
        go.set()
        assert await reading == ([], [])
        assert await database.read(names) == ["x"]


async def test_the_time_is_the_databases(opened: Opened, server: Secret) -> None:
    """`now` is naive UTC by the server's clock, however wrong ours is, and stands still within a transaction."""

    def times(tx: Tx) -> tuple[datetime, datetime]:
        first = tx.now
        one(tx)
        return first, tx.now

    with door(opened(), server) as database:
        first, second = await database.read(times)
        assert first == second
        assert abs(first - datetime.now(UTC).replace(tzinfo=None)) < timedelta(minutes=1)


# ---- retries ---------------------------------------------------------------------------------------------------


REFUSE_ONCE = (
    "CREATE SEQUENCE attempts",
    "CREATE FUNCTION refuse_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "IF nextval('attempts') = 1 THEN RAISE EXCEPTION 'once' USING ERRCODE = '40001'; END IF; RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON things DEFERRABLE INITIALLY DEFERRED "
    "FOR EACH ROW EXECUTE FUNCTION refuse_once()",
)
"""PostgreSQL's COMMIT of an insert fails the first time."""


def path_of(url: Secret) -> str:
    """Return the file of an SQLite URL."""
    return url.reveal().removeprefix("sqlite:///")


async def test_a_write_is_tried_again_when_the_file_is_busy(opened: Opened, url: Secret) -> None:
    """A write that meets another's lock runs again, and succeeds once the lock is gone."""
    attempts = list[int]()
    with door(opened(), url) as database, closing(sqlite3.connect(path_of(url), isolation_level=None)) as other:
        await database.write(lambda tx: tx.connection.exec_driver_sql("PRAGMA busy_timeout = 0").all())
        other.execute("BEGIN IMMEDIATE")
        locked = threading.Event()

        def second_attempt(_: Callable[[], bool]) -> None:
            attempts.append(1)
            if len(attempts) == 3:
                locked.set()

        database.fault = second_attempt
        writing = asyncio.ensure_future(database.write(add, 1, "x"))
        await until(locked.is_set)
        other.execute("ROLLBACK")
        await writing
        assert await database.read(names) == ["x"]
    assert len(attempts) >= 3


async def test_a_write_waits_for_a_lock(opened: Opened, url: Secret) -> None:
    """A short lock of another process costs a write time, and nothing else."""
    with door(opened(), url) as database, closing(sqlite3.connect(path_of(url), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        begun = threading.Event()
        database.fault = lambda _: begun.set()
        writing = asyncio.ensure_future(database.write(add, 1, "x"))
        await until(begun.is_set)
        assert not writing.done()
        other.execute("COMMIT")
        await writing
        assert await database.read(names) == ["x"]


async def test_a_lock_that_stays_is_an_outage(opened: Opened, url: Secret) -> None:
    """After the last attempt the caller hears that the cell is not available, not the driver's error."""
    limits = replace(PATIENT, database_write_attempts=2)
    with door(opened(limits), url) as database, closing(sqlite3.connect(path_of(url), isolation_level=None)) as other:
        await database.write(lambda tx: tx.connection.exec_driver_sql("PRAGMA busy_timeout = 0").all())
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CellUnavailable):
            await database.write(add, 1, "x")
        other.execute("ROLLBACK")
        await database.write(add, 1, "x")


async def test_a_deadlock_runs_the_function_again(opened: Opened, server: Secret) -> None:
    """Two writes that wait for each other both end well: the server's victim is run again, whole."""
    barrier, runs = threading.Barrier(2), list[str]()

    def cross(tx: Tx, mine: int, theirs: int) -> bool:
        runs.append("run")
        insert_if_absent(tx, things, {"id": mine, "name": f"n{mine}"})
        if len(runs) <= 2:
            barrier.wait(30)
        return insert_if_absent(tx, things, {"id": theirs, "name": f"n{theirs}"})

    with door(opened(), server) as database:
        await asyncio.gather(database.write(cross, 1, 2), database.write(cross, 2, 1))
        assert await database.read(names) == ["n1", "n2"]
    assert len(runs) >= 3


async def test_a_refusal_at_commit_that_may_pass_is_tried_again(opened: Opened, postgresql: Secret) -> None:
    """A serialisation failure that COMMIT itself reports has done nothing, so the function runs again."""
    engine = engine_of(postgresql)
    with engine.begin() as connection:
        for statement in REFUSE_ONCE:
            connection.exec_driver_sql(statement)
    with door(opened(), postgresql) as database:
        await database.write(add, 1, "x")
        assert await database.read(names) == ["x"]
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON things")


async def test_a_connection_that_broke_while_idle_costs_nobody_an_error(opened: Opened, server: Secret) -> None:
    """After the server ended the session, the next unit of work connects anew."""
    with door(opened(replace(PATIENT, database_threads=1)), server) as database:
        before = await database.read(session)
        kill(server, before)
        assert await database.read(session) != before
        kill(server, await database.read(session))
        await database.write(add, 1, "x")
        assert await database.read(names) == ["x"]


async def test_a_connection_lost_at_commit_leaves_the_outcome_unknown(opened: Opened, server: Secret) -> None:
    """Nobody can tell whether it was committed, so it is not run again."""
    runs = list[int]()

    def doomed(tx: Tx) -> None:
        runs.append(1)
        add(tx, 1, "x")
        kill(server, session(tx))

    with door(opened(), server) as database:
        with pytest.raises(OutcomeUnknown):
            await database.write(doomed)
        assert len(runs) == 1
        assert await database.read(one) == 1


async def test_a_commit_that_did_not_happen_is_made_up_for(opened: Opened, server: Secret) -> None:
    """Its key is not there, so the function runs again; what it returns is what the caller gets."""
    runs = list[int]()

    def doomed_at_first(tx: Tx) -> int:
        runs.append(1)
        add(tx, len(runs), "x")
        if len(runs) == 1:
            kill(server, session(tx))
        return len(runs)

    with door(opened(), server) as database:
        assert await database.write_once(None, doomed_at_first) == 2
        assert await database.read(names) == ["x"]


@pytest.mark.parametrize("silently", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_commit_that_happened_is_not_repeated(
    opened: Opened, way: tuple[Proxy, Secret], silently: bool
) -> None:
    """Whether the connection breaks or stays silent until the deadline: the first run's result counts."""
    between, url = way
    runs = list[int]()

    def write(tx: Tx) -> int:
        runs.append(1)
        add(tx, len(runs), str(len(runs)))
        return len(runs)

    with door(opened(replace(PATIENT, database_deadline_seconds=10.0)), url) as database:
        await eventually(lambda: database.read(one))
        between.cut(rb"INSERT INTO things.*COMMIT\b", times=1, silently=silently)
        assert await database.write_once(None, write) == 1
        assert between.cuts == 1
        between.heal()
        assert await eventually(lambda: database.read(names)) == ["1"]


async def test_a_refusal_leaves_no_key_and_is_the_callers(opened: Opened, server: Secret) -> None:
    """What the function raises passes, as it does from `write`."""

    def refuse(_tx: Tx) -> None:
        raise Conflict("thing.exists", "There is such a thing")

    with door(opened(), server) as database:
        with pytest.raises(Conflict, match="such a thing"):
            await database.write_once(None, refuse)
        assert await database.read(key_names) == []


async def test_old_keys_are_removed(opened: Opened, server: Secret, clock: FakeClock) -> None:
    """Now and then, by a write that leaves a key of its own; younger ones stay."""

    def leave(tx: Tx, name: str, age: timedelta) -> None:
        tx.execute(sa.insert(keys), {"key": name, "created_at": tx.now - age})

    with door(opened(), server) as database:
        await database.write(leave, "old", timedelta(hours=1))
        await database.write(leave, "young", timedelta(minutes=1))
        await database.write_once(None, add, 1, "x")
        assert {"old", "young"} < set(await database.read(key_names))
        clock.seconds += 3600
        await database.write_once(None, add, 2, "y")
        left = set(await database.read(key_names))
        assert "young" in left
        assert "old" not in left


def key_names(tx: Tx) -> list[str]:
    """Return every key."""
    return list(tx.execute(sa.select(keys.c.key)).scalars())


# ---- what errors become ----------------------------------------------------------------------------------------


async def test_a_missing_file_is_an_outage(opened: Opened, tmp_path: Path) -> None:
    """A file that is not there is never an empty database, and is not made; when it comes, it is used."""
    path = tmp_path / "missing.sqlite"
    missing = Secret(f"sqlite:///{path}")
    with door(opened(), missing) as database:
        with pytest.raises(CellUnavailable, match="cell one"):
            await database.read(one)
        with pytest.raises(CellUnavailable):
            await database.write(add, 1, "x")
        assert not path.exists()
        make_tables(missing)
        assert await database.read(names) == []


async def test_a_damaged_file_is_an_outage(opened: Opened, tmp_path: Path) -> None:
    """A file that is no database is an outage, and stays as it is."""
    path = tmp_path / "damaged.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with door(opened(), Secret(f"sqlite:///{path}")) as database, pytest.raises(CellUnavailable):
        await database.read(names)
    assert path.read_bytes() == b"not a database" * 1000


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no url at all",
        "sqlite://",
        "oracle+nothing://user:hunter2@db/x",
        "postgresql://user:hunter2@db:port/x",
        "mysql+pymysql://user:hunter2@127.0.0.1:1/x?no_such_option=1",
        "postgresql://user:hunter2@127.0.0.1:1/x?no_such_option=1",
        "postgresql://user:hunter2@127.0.0.1:1/x",
        "mysql+pymysql://user:hunter2@127.0.0.1:1/x",
    ],
)
async def test_a_cell_whose_url_leads_nowhere_is_an_outage(opened: Opened, url: str) -> None:
    """Whatever is wrong with a cell's URL, users hear that the cell is not available."""
    with door(opened(), Secret(url)) as database, pytest.raises(CellUnavailable) as refusal:
        await database.read(one)
    assert "hunter2" not in repr(refusal.value)


@pytest.mark.parametrize("url", ["no url at all", "sqlite://", "oracle+nothing://user:hunter2@db/x"])
def test_a_bad_url_of_the_api_database_is_told_at_the_start(clock: FakeClock, url: str) -> None:
    """It is a mistake in this process's own configuration; the message does not show the URL."""
    with pytest.raises(Invalid) as refusal:
        Databases(Secret(url), limits=PATIENT, clock=clock)
    assert url not in repr(refusal.value)


async def test_a_mistake_in_sql_is_not_an_outage(opened: Opened, anywhere: Secret) -> None:
    """A table or a column that does not exist is the programmer's error."""
    with door(opened(), anywhere) as database:
        for statement in ("SELECT nothing FROM things", "SELECT 1 FROM no_such_table"):
            with pytest.raises((OperationalError, ProgrammingError)):
                await database.read(Tx.execute, sa.text(statement))
        assert await database.read(one) == 1


async def test_a_value_that_the_driver_refuses_is_not_an_outage(opened: Opened, url: Secret) -> None:
    """Nor is a value of a type that the driver cannot send; the thread lives on."""
    with door(opened(), url) as database:
        with pytest.raises(DBAPIError):
            await database.write(add, 1, object())  # type: ignore[arg-type]
        assert await database.read(one) == 1


async def test_a_server_that_only_reads_is_an_outage_for_writes(opened: Opened, server: Secret) -> None:
    """As after a failover to a standby; reads go on, and writes too once it takes them again."""
    only_reads = True

    def write(tx: Tx) -> None:
        if only_reads:
            make_read_only(tx)
        add(tx, 1, "x")

    with door(opened(), server) as database:
        with pytest.raises(CellUnavailable):
            await database.write(write)
        assert await database.read(names) == []
        only_reads = False
        await database.write(write)
        assert await database.read(names) == ["x"]


def make_read_only(tx: Tx) -> None:
    """Let the server refuse what this session writes."""
    if tx.connection.dialect.name == "postgresql":
        tx.connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    else:
        tx.connection.exec_driver_sql("ROLLBACK")
        tx.connection.exec_driver_sql("START TRANSACTION READ ONLY")


@contextmanager
def poor_user(url: Secret) -> Iterator[Secret]:
    """Give the URL for a user of its own who may have one connection at a time."""
    name = f"cellway_test_{uuid.uuid4().hex[:12]}"
    own = sa.make_url(url.reveal()).set(username=name)
    engine = engine_of(url)
    if engine.dialect.name == "postgresql":
        making = [
            f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 1",
            f"GRANT ALL ON things TO {name}",
        ]
        ending = [f"DROP OWNED BY {name}", f"DROP ROLE {name}"]
    else:
        making = [
            f"CREATE USER {name}@'%' WITH MAX_USER_CONNECTIONS 1",
            f"GRANT ALL ON {own.database}.* TO {name}@'%'",
        ]
        ending = [f"DROP USER {name}@'%'"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in making:
            connection.execute(sa.text(statement))
        try:
            yield Secret(own.render_as_string(hide_password=False))
        finally:
            for statement in ending:
                connection.execute(sa.text(statement))
    engine.dispose()


async def test_a_server_without_a_free_connection_is_an_outage(opened: Opened, server: Secret) -> None:
    """It ends as soon as there is one, without a restart."""
    with poor_user(server) as url, door(opened(), url) as database:
        hoarder = engine_of(url)
        with hoarder.connect():
            with pytest.raises(CellUnavailable):
                await database.read(one)
            with pytest.raises(CellUnavailable):
                await database.write(add, 1, "x")
        hoarder.dispose()
        assert await eventually(lambda: database.read(names)) == []
        await database.aclose()


# ---- servers that are slow or silent ---------------------------------------------------------------------------


def sleep(tx: Tx) -> None:
    """Run a statement that takes half a minute, which the server itself would let pass."""
    postgresql = tx.connection.dialect.name == "postgresql"
    tx.connection.exec_driver_sql(f"SET {'statement_timeout' if postgresql else 'max_statement_time'} = 0")
    tx.connection.exec_driver_sql(f"SELECT {'pg_sleep' if postgresql else 'SLEEP'}(30)")


async def test_the_deadline_frees_the_thread_of_a_slow_server(opened: Opened, server: Secret) -> None:
    """The socket is shut down under the driver; the next unit of work has a connection of its own."""
    limits = replace(PATIENT, database_deadline_seconds=2.0, database_threads=1)
    with door(opened(limits), server) as database:
        await eventually(lambda: database.read(one))
        with pytest.raises(CellUnavailable, match="in time"):
            await database.read(sleep)
        assert await eventually(lambda: database.read(one)) == 1


async def test_a_cancelled_caller_frees_the_thread_of_a_slow_server(opened: Opened, server: Secret) -> None:
    """Long before any deadline of ours or of the server's."""
    begun = threading.Event()

    def slow(tx: Tx) -> None:
        begun.set()
        sleep(tx)

    with door(opened(replace(PATIENT, database_threads=1)), server) as database:
        asking = asyncio.ensure_future(database.read(slow))
        await until(begun.is_set)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await database.read(one) == 1


async def test_a_connection_that_was_cut_is_not_used_again(opened: Opened, server: Secret) -> None:
    """A caller that gives up while the connection rests spoils nothing for the next one."""
    work = Held()
    with door(opened(replace(PATIENT, database_threads=1)), server) as database:
        asking = asyncio.ensure_future(database.read(work))
        await until(work.begun.is_set)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        following = asyncio.ensure_future(database.write(add, 1, "x"))
        work.go.set()
        await following
        assert await database.read(names) == ["x"]


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "mysql+pymysql"])
async def test_a_server_that_never_answers_keeps_no_thread(opened: Opened, scheme: str) -> None:
    """One that accepts connections and is silent is an outage, and the thread ends when the owner closes."""
    before = threads()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = Secret(f"{scheme}://user:secret@127.0.0.1:{silent.getsockname()[1]}/x")
        databases = opened(replace(PATIENT, database_deadline_seconds=1.0))
        with door(databases, url) as database, pytest.raises(CellUnavailable):
            await database.read(one)
        await databases.aclose()
        await until(lambda: threads() <= before)


@pytest.fixture
def way(server: Secret) -> Iterator[tuple[Proxy, Secret]]:
    """A proxy before a server, and the URL of the same database through it."""
    url = sa.make_url(server.reveal())
    assert url.port is not None
    with proxy.opened(url.port) as made:
        yield made, Secret(url.set(port=made.port).render_as_string(hide_password=False))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "stall", "refuse", "reset"])
async def test_a_way_that_breaks_is_an_outage_and_heals(opened: Opened, way: tuple[Proxy, Secret], how: str) -> None:
    """Whatever the way does to open connections and to new ones, threads and connections do not grow, and when it is
    whole again, so is the database.
    """
    between, url = way
    limits = replace(PATIENT, database_deadline_seconds=1.0, database_threads=2)
    breaking: dict[str, Callable[[], None]] = {
        "hang": between.hang,
        "stall": lambda: between.stall(after=3),
        "refuse": between.refuse,
        "reset": lambda: between.cut(b"."),
    }
    others = threads()
    with door(opened(limits), url) as database:
        await asyncio.gather(*(eventually(lambda: database.read(one)) for _ in range(4)))
        breaking[how]()
        for _ in range(2):
            asked = await asyncio.gather(*(database.read(one) for _ in range(4)), return_exceptions=True)
            assert {type(answer) for answer in asked} == {CellUnavailable}
        assert len(threads() - others) <= 2
        between.heal()
        assert await eventually(lambda: database.read(one)) == 1
        await until(lambda: between.connections <= 2)


async def test_killed_sessions_lose_and_repeat_nothing(opened: Opened, server: Secret) -> None:
    """While the server ends sessions at any moment, what was answered is there, and what failed is not."""
    done, failed, unknown = set[int](), set[int](), set[int]()

    def there(number: int) -> Callable[[Tx], bool]:
        return lambda tx: tx.execute(sa.select(things.c.id).where(things.c.id == number)).first() is not None

    async def write(database: Database[CellTx], number: int) -> None:
        try:
            await database.write_once(there(number), add, number, str(number))
            done.add(number)
        except OutcomeUnknown:
            unknown.add(number)
        except CellUnavailable:
            failed.add(number)

    engine = engine_of(server)
    with (
        door(opened(), server) as database,
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as ender,
    ):
        for first in range(0, 100, 10):
            writes = [write(database, number) for number in range(first, first + 10)]
            await asyncio.gather(asyncio.to_thread(end_all, ender), *writes)
        present = set(map(int, await eventually(lambda: database.read(names))))
    engine.dispose()
    assert done <= present
    assert not failed & present


def end_all(connection: sa.Connection) -> None:
    """End every other session in this connection's database."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return
    others = connection.exec_driver_sql(
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> connection_id()"
    ).scalars()
    for session in others.all():
        try:
            connection.exec_driver_sql(f"KILL {session:d}")
        except DBAPIError:  # it ended by itself
            continue


# ---- unique keys -----------------------------------------------------------------------------------------------


async def test_insert_if_absent_inserts_once(opened: Opened, anywhere: Secret) -> None:
    """The first call inserts and says so; the second changes nothing, and the transaction goes on."""

    def twice(tx: Tx) -> tuple[bool, bool, bool]:
        first = insert_if_absent(tx, things, {"id": 1, "name": "a", "note": "first"})
        second = insert_if_absent(tx, things, {"id": 2, "name": "a", "note": "second"})
        return first, second, insert_if_absent(tx, things, {"id": 3, "name": "b", "note": None})

    with door(opened(), anywhere) as database:
        assert await database.write(twice) == (True, False, True)
        rows = await database.read(lambda tx: [tuple(row) for row in tx.execute(sa.select(things))])
        assert rows == [(1, "a", "first"), (3, "b", None)]


async def test_insert_if_absent_lets_one_of_many_win(opened: Opened, anywhere: Secret) -> None:
    """Of callers at the same moment exactly one inserted."""

    def claim(tx: Tx, number: int) -> bool:
        return insert_if_absent(tx, things, {"id": number, "name": "the only one"})

    with door(opened(), anywhere) as database:
        won = await asyncio.gather(*(database.write(claim, number) for number in range(8)))
    assert sorted(won) == [False] * 7 + [True]


async def test_insert_if_absent_refuses_what_is_wrong_otherwise(opened: Opened, anywhere: Secret) -> None:
    """A missing value is an error, not an absent row."""
    with door(opened(), anywhere) as database, pytest.raises(IntegrityError):
        await database.write(lambda tx: insert_if_absent(tx, things, {"id": 1, "name": None}))


async def test_a_unique_violation_becomes_the_given_error(opened: Opened, anywhere: Secret) -> None:
    """By primary key or by another unique key alike."""
    taken: CellwayError = Conflict("thing.exists", "There is such a thing")

    def again(tx: Tx, number: int, name: str) -> None:
        with unique_violation(taken):
            add(tx, number, name)

    with door(opened(), anywhere) as database:
        await database.write(add, 1, "a")
        for number, name in ((1, "b"), (2, "a")):
            with pytest.raises(Conflict) as refusal:
                await database.write(again, number, name)
            assert refusal.value is taken


async def test_other_violations_stay_what_they_are(opened: Opened, anywhere: Secret) -> None:
    """A missing value is not taken for a duplicate."""

    def missing(tx: Tx) -> None:
        with unique_violation(Conflict("thing.exists", "There is such a thing")):
            tx.execute(sa.insert(things), {"id": 1, "name": None})

    with door(opened(), anywhere) as database, pytest.raises(IntegrityError):
        await database.write(missing)
