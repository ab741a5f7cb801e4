"""Targeting: what a context reaches, and what it never reaches (seeds 000 and 001)."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from cellway.cells.registry import Cell
from cellway.cells.target import target_cell
from cellway.config import Limits, Secret
from cellway.context import CellContext, RequestContext
from cellway.db import cell_tables
from cellway.db.engines import Databases
from cellway.db.schema import Tree
from cellway.db.transaction import CellTx
from cellway.errors import CellHasNoQueue, CellNotTargeted, CellUnavailable, Unavailable
from cellway.instances import reading
from cellway.rpc import calls
from cellway.rpc.calls import DestroyInstance, host_address
from cellway.rpc.messaging import cast
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.databases import CONTEXT, KINDS, FakeClock, Shelf, make_cell, upgraded

pytestmark = pytest.mark.anyio

LIMITS = Limits(database_deadline_seconds=60.0)
HOST = host_address("h1")
IN_A, IN_B = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"


@dataclass
class World:
    """Two cells, each with a database and a queue of its own, and what each queue's consumer took."""

    databases: Databases
    transports: Transports
    clock: FakeClock
    a: Cell
    b: Cell
    taken: dict[str, list[bytes]] = field(default_factory=dict)

    def target(self, cell: Cell, context: RequestContext = CONTEXT) -> AbstractContextManager[CellContext]:
        """Target a cell."""
        return target_cell(context, cell, self.databases, self.transports)

    def cell_of(self, cctx: CellContext) -> str | None:
        """Return the name of the cell whose database a context reaches."""
        cell = self.databases.on(cctx).cell
        return cell and cell.name

    async def listen(self, cell: Cell) -> None:
        """Record the bytes of every message for the host `h1` of a cell's queue."""
        taken: list[bytes] = []
        self.taken[cell.ref.name] = taken

        async def deliver(message: bytes) -> None:
            taken.append(message)

        await self.transports.lease(cell.transport_url).consume(HOST, deliver)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell database without rows, to be copied."""
    path = tmp_path_factory.mktemp("schema") / "cell.sqlite"
    upgraded(Secret(f"sqlite:///{path}"), Tree.CELL)
    return path


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, schema: Path, tmp_path: Path, shelf: Shelf) -> AsyncIterator[World]:
    """Two cells; nothing is open yet."""

    def database(name: str) -> Secret:
        if request.param == "sqlite":
            return Secret(f"sqlite:///{shutil.copy(schema, tmp_path / name)}")
        return shelf.take(request.param, f"cell {name}")

    a, b = (make_cell(name, database(name)) for name in ("a", "b"))
    clock = FakeClock()
    transports = Transports(MemoryBrokers(), LIMITS, clock)
    databases = Databases(None, limits=LIMITS, clock=clock)
    yield World(databases, transports, clock, a, b)
    await transports.aclose()
    await databases.aclose()


def add_instance(tx: CellTx, uuid: str) -> None:
    """Insert an instance."""
    tx.execute(sa.insert(cell_tables.instances), {"uuid": uuid, "deleted": 0})


def dump(tx: CellTx) -> str:
    """Return every row of every table, as text."""
    return "\n".join(
        str(tuple(row)) for table in cell_tables.CELL_METADATA.sorted_tables for row in tx.execute(sa.select(table))
    )


# ---- the functional test that seed 001 asks for ----------------------------------------------------------------


async def test_an_instance_is_in_its_own_cell_alone(world: World) -> None:
    """An instance of cell A is invisible from B, and the other way round: no table of B holds anything of it (T1)."""
    with world.target(world.a) as in_a, world.target(world.b) as in_b:
        await world.databases.on(in_a).write(add_instance, IN_A)
        await world.databases.on(in_b).write(add_instance, IN_B)
        for cctx, own, other in ((in_a, IN_A, IN_B), (in_b, IN_B, IN_A)):
            database = world.databases.on(cctx)
            assert await database.read(reading.exists, own)
            assert not await database.read(reading.exists, other)
            rows = await database.read(dump)
            assert own in rows
            assert other not in rows


async def test_a_message_reaches_its_own_cell_alone(world: World) -> None:
    """A message for a host of cell A is seen by A's consumer alone, though B has a host of that name (T1)."""
    await world.listen(world.a)
    await world.listen(world.b)
    for cell, uuid in ((world.a, IN_A), (world.b, IN_B)):
        with world.target(cell) as cctx:
            request = DestroyInstance(instance_uuid=uuid)
            await cast(cctx, calls.DESTROY_INSTANCE, request, address=HOST, timeout_seconds=5)
    await asyncio.sleep(0)
    assert [len(messages) for messages in world.taken.values()] == [1, 1]
    in_a, in_b = world.taken["a"][0], world.taken["b"][0]
    assert IN_A.encode() in in_a
    assert IN_B.encode() not in in_a
    assert IN_B.encode() in in_b
    assert IN_A.encode() not in in_b


async def test_concurrent_requests_do_not_meet(world: World) -> None:
    """Many requests in both cells at once each reach their own database and queue (T1)."""
    await world.listen(world.a)
    await world.listen(world.b)

    async def visit(cell: Cell, number: int) -> None:
        uuid = f"{cell.ref.name * 8}-0000-4000-8000-{number:012}"
        context = replace(CONTEXT, project_id=type(CONTEXT.project_id)(uuid))
        with world.target(cell, context) as cctx:
            await world.databases.on(cctx).write(add_instance, uuid)
            request = DestroyInstance(instance_uuid=uuid)
            await cast(cctx, calls.DESTROY_INSTANCE, request, address=HOST, timeout_seconds=5)
            assert await world.databases.on(cctx).read(reading.exists, uuid)

    await asyncio.gather(*(visit(cell, number) for number in range(20) for cell in (world.a, world.b)))
    for cell, other in ((world.a, "bbbbbbbb"), (world.b, "aaaaaaaa")):
        with world.target(cell) as cctx:
            assert other not in await world.databases.on(cctx).read(dump)
        messages = world.taken[cell.ref.name]
        assert len(messages) == 20
        assert other.encode() not in b"".join(messages)


# ---- contexts --------------------------------------------------------------------------------------------------


async def test_targeting_gives_a_new_context_with_both_connections(world: World) -> None:
    """Who asks stays the same; the cell, its database key and its transport are set."""
    with world.target(world.a) as cctx:
        assert cctx is not CONTEXT
        assert cctx.cell == world.a.ref
        assert cctx.db_connection == world.a.database_key
        assert cctx.mq_connection is world.transports.lease(world.a.transport_url)
        assert cctx.to_wire() == CONTEXT.to_wire()


async def test_the_original_is_untouched(world: World) -> None:
    """Inside the block and after it the first context reaches no cell."""
    with world.target(world.a):
        assert (CONTEXT.db_connection, CONTEXT.mq_connection) == (None, None)
        with pytest.raises(CellNotTargeted):
            world.databases.on(CONTEXT)
    with pytest.raises(CellNotTargeted):
        await cast(
            CONTEXT, calls.DESTROY_INSTANCE, DestroyInstance(instance_uuid=IN_A), address=HOST, timeout_seconds=5
        )


async def test_a_target_cannot_be_changed(world: World) -> None:
    """A context is frozen: nothing can point it elsewhere."""
    with world.target(world.a) as cctx, pytest.raises(FrozenInstanceError):
        cctx.db_connection = world.b.database_key  # type: ignore[misc]


async def test_nested_targets_do_not_leak(world: World) -> None:
    """A block inside a block reaches its own cell; the outer context reaches its own before, meanwhile and after."""
    with world.target(world.a) as outer:
        with world.target(world.b) as inner:
            assert [world.cell_of(outer), world.cell_of(inner)] == ["a", "b"]
        assert world.cell_of(outer) == "a"


async def test_a_targeted_context_may_be_targeted_again(world: World) -> None:
    """Retargeting inside a block gives an independent context: another database and another queue, same user."""
    with world.target(world.a) as first, world.target(world.b, first) as second:
        assert (world.cell_of(first), world.cell_of(second)) == ("a", "b")
        assert first.mq_connection is not second.mq_connection
        assert second.to_wire() == first.to_wire()


async def test_one_cell_twice_is_two_contexts(world: World) -> None:
    """The inner block's end takes nothing from the outer one."""
    with world.target(world.a) as outer:
        with world.target(world.a) as inner:
            assert inner is not outer
        world.databases.retire(world.a.database_key)
        assert await world.databases.on(outer).read(dump) == ""


# ---- leases and failures ---------------------------------------------------------------------------------------


def leases(world: World) -> list[str]:
    """Return the names of the databases that are open once everything unused is closed."""
    world.clock.seconds += LIMITS.idle_seconds + 1
    world.databases.expire_idle()
    return [database.name for database in world.databases.open_cells]


async def test_leases_are_given_back(world: World) -> None:
    """While a block runs its database stays open; afterwards it may close."""
    with world.target(world.a):
        assert leases(world) == ["the database of cell a"]
    assert leases(world) == []


async def test_leases_are_given_back_after_an_exception(world: World) -> None:
    """An error inside the block passes, and nothing stays held: not the database, not the transport."""
    tight = replace(LIMITS, open_transports=1)
    world.transports = Transports(MemoryBrokers(), tight, world.clock)
    with pytest.raises(ZeroDivisionError), world.target(world.a):
        raise ZeroDivisionError
    assert leases(world) == []
    with world.target(world.b):
        assert leases(world) == ["the database of cell b"]
    await world.transports.aclose()


async def test_leases_are_given_back_after_a_cancellation(world: World) -> None:
    """A request that is cancelled inside the block holds nothing any more."""
    inside = asyncio.Event()

    async def wait() -> None:
        with world.target(world.a):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(wait())
    await inside.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert leases(world) == []


async def test_the_database_is_given_back_when_the_queue_refuses(world: World) -> None:
    """Too many transports in use: the block is not entered, and its database is not held."""
    tight = Transports(MemoryBrokers(), replace(LIMITS, open_transports=1), world.clock)
    tight.lease(world.b.transport_url)
    with pytest.raises(Unavailable), target_cell(CONTEXT, world.a, world.databases, tight):
        pass
    assert leases(world) == []
    await tight.aclose()


async def test_targeting_does_no_io(world: World, tmp_path: Path) -> None:
    """A cell whose database cannot be reached is entered like any other, and fails at the first use, by name."""
    broken = make_cell("broken", Secret(f"sqlite:///{tmp_path / 'no such folder' / 'x.sqlite'}"))
    with world.target(broken) as cctx:
        with pytest.raises(CellUnavailable) as refusal:
            await world.databases.on(cctx).read(dump)
        assert refusal.value.fields == {"cell": "broken"}


@pytest.mark.parametrize("database", ["no url at all", "nothing+known://user:hunter2@db/x"])
async def test_a_database_url_that_cannot_be_used_is_an_outage_of_that_cell(world: World, database: str) -> None:
    """Users hear that the cell is not available, at its first use, and nothing of the URL."""
    with world.target(make_cell("broken", Secret(database))) as cctx:
        with pytest.raises(CellUnavailable) as refusal:
            await world.databases.on(cctx).read(dump)
        assert "hunter2" not in repr(refusal.value)


@pytest.mark.parametrize("transport", ["memory://", "no url at all", "carrier-pigeon://user:hunter2@loft/"])
async def test_a_transport_url_that_cannot_be_used_is_an_outage_of_that_cell(world: World, transport: str) -> None:
    """Users hear that the cell is misconfigured, not that their request is wrong; its database is not held."""
    broken = replace(world.a, transport_url=Secret(transport))
    with pytest.raises(CellUnavailable, match="Cell a: ") as refusal, world.target(broken):
        pass
    assert "hunter2" not in repr(refusal.value)
    assert leases(world) == []


async def test_cell0_has_no_queue_and_no_fallback(world: World) -> None:
    """A message for a cell without a queue is refused, and reaches no other cell's consumer."""
    await world.listen(world.a)
    with world.target(replace(world.b, transport_url=Secret("none:///"))) as cctx, pytest.raises(CellHasNoQueue):
        await cast(cctx, calls.DESTROY_INSTANCE, DestroyInstance(instance_uuid=IN_B), address=HOST, timeout_seconds=5)
    assert world.taken == {"a": []}
