"""Cell, host and instance mappings on every database, their cache, and the live set of cells (seed 002)."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from cellway.cells import mappings
from cellway.cells.mappings import HostMapping, InstanceMapping
from cellway.cells.registry import Cells, Templates
from cellway.config import Limits, Secret
from cellway.db.api_tables import cell_mappings, instance_mappings
from cellway.db.engines import API, Databases
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import CellUnavailable, Conflict, NotFound, Unavailable
from cellway.ids import CELL0_UUID, CellUuid
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.databases import CONTEXT, KINDS, FakeClock, Shelf, empty_database, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)
CELL1 = CellUuid("11111111-1111-4111-8111-111111111111")
CELL2 = CellUuid("22222222-2222-4222-8222-222222222222")
SERVER = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
OTHER = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
MISSING = "cccccccc-cccc-4ccc-8ccc-cccccccccccc"


# ---- the queries, on every database ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """An API database of each kind in turn; every test rolls back what it wrote."""
    with empty_database(request.param, tmp_path_factory.mktemp("mappings")) as url:
        made = engine_of(upgraded(url, Tree.API))
        yield made
        made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[ApiTx]:
    """A transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield ApiTx(connection, NOW)
        transaction.rollback()


def add_cell(tx: ApiTx, uuid: CellUuid = CELL1, name: str = "one", database: str = "sqlite:////one") -> int:
    """Map a cell, and return its id."""
    queue = Secret(f"memory://{name}")
    return mappings.create_cell(tx, uuid, name, transport_url=queue, database_connection=Secret(database)).id


def add_instance(tx: ApiTx, *uuids: str) -> None:
    """Accept instances of alice's, in no cell yet."""
    mappings.create_instances(tx, uuids or (SERVER,), project_id="demo", user_id="alice")


def test_a_cell_reads_back_as_it_was_made(tx: ApiTx) -> None:
    """By uuid and by name, its URLs character by character."""
    made = mappings.create_cell(
        tx,
        CELL1,
        "one",
        transport_url=Secret("rabbit://u:p%25ä{{@h:5672/v"),
        database_connection=Secret("mysql+pymysql://u:%s'@h/d?charset=utf8mb4"),
        disabled=True,
    )
    assert made == mappings.get_cell(tx, CELL1) == mappings.get_cell(tx, "one")
    assert (made.uuid, made.name, made.disabled, made.is_cell0) == (CELL1, "one", True, False)
    assert made.transport_url.reveal() == "rabbit://u:p%25ä{{@h:5672/v"
    assert made.database_connection.reveal() == "mysql+pymysql://u:%s'@h/d?charset=utf8mb4"


def test_cells_are_listed_in_the_order_of_their_making(tx: ApiTx) -> None:
    """Cell0 is known by its uuid, whatever its name."""
    add_cell(tx, CELL2, "z")
    add_cell(tx, CELL0_UUID, "buried")
    add_cell(tx, CELL1, "a")
    assert [(cell.name, cell.is_cell0) for cell in mappings.list_cells(tx)] == [
        ("z", False),
        ("buried", True),
        ("a", False),
    ]


def test_an_unknown_cell_is_not_found(tx: ApiTx) -> None:
    """By name and by uuid."""
    for name in ("nowhere", CELL2):
        with pytest.raises(NotFound):
            mappings.get_cell(tx, name)


def test_a_cell_name_is_taken_once(tx: ApiTx) -> None:
    """Neither a new cell nor a renamed one may have another's name."""
    add_cell(tx)
    with pytest.raises(Conflict, match="already a cell one"):
        add_cell(tx, CELL2, "one")
    add_cell(tx, CELL2, "two")
    with pytest.raises(Conflict):
        mappings.update_cell(tx, CELL2, name="one")
    assert mappings.update_cell(tx, CELL2, name="two").name == "two"


def test_a_cell_uuid_is_taken_once(tx: ApiTx) -> None:
    """A second cell of the same uuid is a conflict."""
    add_cell(tx)
    with pytest.raises(Conflict, match=CELL1):
        add_cell(tx, CELL1, "two")


def test_a_name_that_two_cells_have_is_ambiguous(tx: ApiTx) -> None:
    """An adopted database may hold such a pair; the uuid still finds each."""
    add_cell(tx)
    add_cell(tx, CELL2, "two")
    tx.execute(sa.update(cell_mappings).values(name="same"))
    with pytest.raises(Conflict, match="use the uuid"):
        mappings.get_cell(tx, "same")
    assert mappings.get_cell(tx, CELL2).uuid == CELL2


def test_an_adopted_cell_may_lack_everything(tx: ApiTx) -> None:
    """Without a name it goes by its uuid; without a queue it has none."""
    tx.execute(sa.insert(cell_mappings), {"uuid": CELL1, "disabled": False})
    cell = mappings.get_cell(tx, CELL1)
    assert (cell.name, cell.transport_url.reveal(), cell.database_connection.reveal()) == (CELL1, "none:///", "")


def test_an_update_changes_what_is_given(tx: ApiTx) -> None:
    """The rest stays, each field by itself."""
    add_cell(tx)
    before = mappings.get_cell(tx, CELL1)
    assert mappings.update_cell(tx, CELL1) == before
    assert mappings.update_cell(tx, CELL1, name="new") == replace(before, name="new")
    assert mappings.update_cell(tx, CELL1, name="one", disabled=True) == replace(before, disabled=True)
    database, queue = Secret("sqlite:////new"), Secret("memory://new")
    after = mappings.update_cell(tx, CELL1, database_connection=database, transport_url=queue, disabled=False)
    assert after == replace(before, database_connection=database, transport_url=queue)


def test_updating_an_unknown_cell_is_not_found(tx: ApiTx) -> None:
    """Nothing is made by it."""
    with pytest.raises(NotFound):
        mappings.update_cell(tx, CELL1, name="new")


def test_a_cell_with_hosts_or_servers_stays(tx: ApiTx) -> None:
    """The refusal counts both."""
    cell = add_cell(tx)
    mappings.map_host(tx, "h1", cell)
    mappings.map_host(tx, "h2", cell)
    add_instance(tx)
    mappings.set_instance_cell(tx, SERVER, cell)
    with pytest.raises(Conflict, match="2 hosts and 1 servers") as refusal:
        mappings.delete_cell(tx, mappings.get_cell(tx, "one"))
    assert refusal.value.fields == {"cell": "one", "hosts": 2, "servers": 1}


def test_a_cell_of_deleted_servers_goes_with_their_mappings(tx: ApiTx) -> None:
    """What another cell holds stays."""
    cell, other = add_cell(tx), add_cell(tx, CELL2, "two")
    add_instance(tx, SERVER, OTHER)
    mappings.set_instance_cell(tx, SERVER, cell)
    mappings.set_instance_cell(tx, OTHER, other)
    mappings.queue_instance_for_delete(tx, SERVER)
    mappings.delete_cell(tx, mappings.get_cell(tx, "one"))
    assert [cell.name for cell in mappings.list_cells(tx)] == ["two"]
    assert mappings.find_instance(tx, SERVER) is None
    assert mappings.find_instance(tx, OTHER) is not None


def test_a_host_is_mapped_once(tx: ApiTx) -> None:
    """The first call says that it did it, a second that it did not."""
    cell = add_cell(tx)
    assert [mappings.map_host(tx, "h1", cell), mappings.map_host(tx, "h1", cell)] == [True, False]
    assert mappings.find_host(tx, "h1") == HostMapping("h1", cell)


def test_a_host_is_in_one_cell(tx: ApiTx) -> None:
    """A host of the same name in another cell is a conflict, and stays where it is."""
    cell, other = add_cell(tx), add_cell(tx, CELL2, "two")
    mappings.map_host(tx, "h1", cell)
    with pytest.raises(Conflict, match="another cell"):
        mappings.map_host(tx, "h1", other)
    assert mappings.find_host(tx, "h1") == HostMapping("h1", cell)


def test_hosts_are_listed_by_name(tx: ApiTx) -> None:
    """Of all cells, and counted for each."""
    cell, other = add_cell(tx), add_cell(tx, CELL2, "two")
    for host, where in (("b", cell), ("a", other), ("c", cell)):
        mappings.map_host(tx, host, where)
    assert mappings.list_hosts(tx) == [HostMapping("a", other), HostMapping("b", cell), HostMapping("c", cell)]
    assert [mappings.count_hosts(tx, cell), mappings.count_hosts(tx, other)] == [2, 1]


def test_a_host_can_be_unmapped(tx: ApiTx) -> None:
    """And that may be repeated."""
    mappings.map_host(tx, "h1", add_cell(tx))
    mappings.unmap_host(tx, "h1")
    mappings.unmap_host(tx, "h1")
    assert mappings.find_host(tx, "h1") is None


def test_a_new_instance_is_in_no_cell(tx: ApiTx) -> None:
    """The mapping is there before the cell is chosen."""
    add_instance(tx)
    assert mappings.find_instance(tx, SERVER) == InstanceMapping(SERVER, None, "demo", "alice", False)


def test_an_instance_uuid_is_taken_once(tx: ApiTx) -> None:
    """A second instance of the same uuid is a conflict, whoever asks."""
    add_instance(tx)
    with pytest.raises(Conflict) as refusal:
        mappings.create_instances(tx, [OTHER, SERVER], project_id="another", user_id="bob")
    assert refusal.value.code == "instance.exists"


def test_the_chosen_cell_is_written(tx: ApiTx) -> None:
    """And may change, when a build moves on."""
    cell, other = add_cell(tx), add_cell(tx, CELL2, "two")
    add_instance(tx)
    for chosen in (cell, other):
        mappings.set_instance_cell(tx, SERVER, chosen)
        assert mappings.find_instance(tx, SERVER) == InstanceMapping(SERVER, chosen, "demo", "alice", False)


def test_a_mapping_outlives_its_instance(tx: ApiTx) -> None:
    """After the delete it still says where the instance was, and no longer counts as live."""
    cell = add_cell(tx)
    add_instance(tx)
    mappings.set_instance_cell(tx, SERVER, cell)
    assert mappings.count_instances(tx, cell) == 1
    mappings.queue_instance_for_delete(tx, SERVER)
    assert mappings.find_instance(tx, SERVER) == InstanceMapping(SERVER, cell, "demo", "alice", True)
    assert mappings.count_instances(tx, cell) == 0


def test_a_purged_mapping_is_gone(tx: ApiTx) -> None:
    """The count tells how many went; purging nothing, or what is gone, is fine."""
    add_instance(tx, SERVER, OTHER)
    assert mappings.purge_instances(tx, [SERVER, MISSING]) == 1
    assert mappings.purge_instances(tx, [SERVER]) == 0
    assert mappings.purge_instances(tx, []) == 0
    assert mappings.find_instance(tx, SERVER) is None
    assert mappings.find_instance(tx, OTHER) is not None


def test_an_adopted_mapping_may_lack_its_user(tx: ApiTx) -> None:
    """The incumbent left the column empty in old rows."""
    add_instance(tx)
    tx.execute(sa.update(instance_mappings).values(user_id=None))
    assert mappings.find_instance(tx, SERVER) == InstanceMapping(SERVER, None, "demo", "", False)


def test_the_cells_of_a_project(tx: ApiTx) -> None:
    """Each once, with those of deleted servers, without those of servers that have none yet."""
    cell, other = add_cell(tx), add_cell(tx, CELL2, "two")
    add_instance(tx, SERVER, OTHER, MISSING)
    mappings.set_instance_cell(tx, SERVER, cell)
    mappings.set_instance_cell(tx, OTHER, cell)
    mappings.queue_instance_for_delete(tx, OTHER)
    mappings.create_instances(tx, ["d"], project_id="another", user_id="bob")
    mappings.set_instance_cell(tx, "d", other)
    assert mappings.cells_of_project(tx, "demo") == {cell}
    assert mappings.cells_of_project(tx, "another") == {other}
    assert mappings.cells_of_project(tx, "nobody") == set()


# ---- the live set of cells -------------------------------------------------------------------------------------


@dataclass
class Registry:
    """The cells of a deployment, with what stands around them."""

    cells: Cells
    databases: Databases
    clock: FakeClock
    environ: dict[str, str]

    async def write(self, change: Callable[[ApiTx], object]) -> None:
        """Change the API database, as another process would."""
        await self.databases.on(API).write(change)

    def names(self) -> list[str]:
        """Return the names of the cells that are known now."""
        return [cell.ref.name for cell in self.cells.snapshot.all]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An API database without rows, to be copied."""
    path = tmp_path_factory.mktemp("schema") / "api.sqlite"
    upgraded(Secret(f"sqlite:///{path}"), Tree.API)
    return path


@pytest.fixture(params=KINDS)
async def registry(
    request: pytest.FixtureRequest, schema: Path, tmp_path: Path, shelf: Shelf, anyio_backend: str
) -> AsyncIterator[Registry]:
    """A registry that knows no cell yet, with room for three instance mappings."""
    if request.param == "sqlite":
        url = Secret(f"sqlite:///{shutil.copy(schema, tmp_path / 'api.sqlite')}")
    else:
        url = shelf.take(request.param, "api")
    limits, clock = Limits(mapping_cache_entries=3, database_deadline_seconds=60.0), FakeClock()
    databases = Databases(url, limits=limits, clock=clock)
    transports, environ = Transports(MemoryBrokers(), limits, clock), dict[str, str]()
    templates = Templates(database=Secret("postgresql://cellway:s%3Ccret@db:5432/main"), environ=environ)
    cells = Cells(databases, transports, limits=limits, clock=clock, templates=templates)
    yield Registry(cells, databases, clock, environ)
    await transports.aclose()
    await databases.aclose()


@pytest.mark.anyio
async def test_a_refresh_tells_whether_anything_changed(registry: Registry) -> None:
    """Nothing is rebuilt, or logged, while nothing changes."""
    await registry.write(add_cell)
    assert await registry.cells.refresh()
    before = registry.cells.snapshot
    with capture_logs() as logs:
        assert not await registry.cells.refresh()
    assert registry.cells.snapshot is before
    assert logs == []


@pytest.mark.anyio
async def test_a_new_cell_is_seen(registry: Registry) -> None:
    """Without a restart; a snapshot that was taken before stays as it was."""
    await registry.write(add_cell)
    await registry.cells.refresh()
    before = registry.cells.snapshot
    await registry.write(lambda tx: add_cell(tx, CELL2, "two"))
    await registry.cells.refresh()
    assert registry.names() == ["one", "two"]
    assert len(before.all) == 1


@pytest.mark.anyio
async def test_a_renamed_a_disabled_and_a_deleted_cell_are_seen(registry: Registry) -> None:
    """Each with the next refresh."""
    await registry.write(add_cell)
    await registry.cells.refresh()
    await registry.write(lambda tx: mappings.update_cell(tx, CELL1, name="renamed"))
    await registry.cells.refresh()
    assert registry.names() == ["renamed"]
    await registry.write(lambda tx: mappings.update_cell(tx, CELL1, disabled=True))
    await registry.cells.refresh()
    assert [cell.disabled for cell in registry.cells.snapshot.all] == [True]
    await registry.write(lambda tx: mappings.delete_cell(tx, mappings.get_cell(tx, CELL1)))
    await registry.cells.refresh()
    assert registry.names() == []


@pytest.mark.anyio
async def test_cell0_is_a_cell_without_hosts(registry: Registry) -> None:
    """It is among all cells, not among those with hosts; without one, asking for it says how to make it."""
    await registry.write(add_cell)
    await registry.cells.refresh()
    with pytest.raises(NotFound, match="cell create cell0"):
        registry.cells.snapshot.cell0()
    await registry.write(lambda tx: add_cell(tx, CELL0_UUID, "cell0"))
    await registry.cells.refresh()
    assert registry.cells.snapshot.cell0().ref.name == "cell0"
    assert [cell.ref.name for cell in registry.cells.snapshot.with_hosts] == ["one"]


def where(tx: ApiTx) -> str:
    """Return the name of the file that an SQLite transaction is on."""
    return Path(str(tx.connection.exec_driver_sql("PRAGMA database_list").one()[2])).name


@pytest.mark.anyio
async def test_a_changed_url_is_used_without_a_restart(registry: Registry, schema: Path, tmp_path: Path) -> None:
    """The next target reaches the new database; the old one closes when its last user is gone."""
    old, new = (f"sqlite:///{shutil.copy(schema, tmp_path / name)}" for name in ("old", "new"))
    await registry.write(lambda tx: add_cell(tx, database=old))
    await registry.cells.refresh()
    (cell,) = registry.cells.snapshot.all
    with registry.cells.target_cell(CONTEXT, cell) as before:
        await registry.write(lambda tx: mappings.update_cell(tx, CELL1, database_connection=Secret(new)))
        await registry.cells.refresh()
        (cell,) = registry.cells.snapshot.all
        with registry.cells.target_cell(CONTEXT, cell) as after:
            assert await registry.databases.on(after).read(where) == "new"  # type: ignore[arg-type]
            assert await registry.databases.on(before).read(where) == "old"  # type: ignore[arg-type]
            assert len(registry.databases.open_cells) == 2
    assert len(registry.databases.open_cells) == 1


@pytest.mark.anyio
async def test_the_database_of_a_deleted_cell_closes(registry: Registry) -> None:
    """A refresh that no longer finds the cell retires it."""
    await registry.write(add_cell)
    await registry.cells.refresh()
    with registry.cells.target_cell(CONTEXT, registry.cells.snapshot.all[0]):
        await registry.write(lambda tx: mappings.delete_cell(tx, mappings.get_cell(tx, CELL1)))
        await registry.cells.refresh()
        assert len(registry.databases.open_cells) == 1
    assert not registry.databases.open_cells


@pytest.mark.anyio
async def test_an_outage_of_the_api_database_leaves_the_cells_as_they_were(registry: Registry) -> None:
    """Refreshing fails, and the snapshot still serves."""
    await registry.write(add_cell)
    await registry.cells.refresh()
    outage = registry.databases.on(API).outage()

    def refuse(_: Callable[[], bool]) -> None:
        raise outage

    registry.databases.on(API).fault = refuse
    with pytest.raises(Unavailable):
        await registry.cells.refresh()
    assert registry.names() == ["one"]


@dataclass
class TurnClock(FakeClock):
    """A clock whose sleepers wake when the test says so."""

    def __post_init__(self) -> None:
        self.asleep = asyncio.Event()
        self.wake = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.asleep.set()
        await self.wake.wait()
        self.wake.clear()
        self.asleep.clear()

    async def turn(self) -> None:
        """Let the loop run once around."""
        await self.asleep.wait()
        self.asleep.clear()
        self.wake.set()
        await self.asleep.wait()


@pytest.mark.anyio
async def test_watching_goes_on_after_an_outage(registry: Registry) -> None:
    """An outage is logged once; afterwards changes are seen again, and what is idle is closed."""
    clock = TurnClock()
    limits = registry.cells.limits
    cells = Cells(registry.databases, registry.cells.transports, limits=limits, clock=clock)
    watching = asyncio.ensure_future(cells.watch())
    api = registry.databases.on(API)
    outage = api.outage()

    def refuse(_: Callable[[], bool]) -> None:
        raise outage

    with capture_logs() as logs:
        api.fault = refuse
        await clock.turn()
        await clock.turn()
        api.fault = None
        await registry.write(add_cell)
        await clock.turn()
    assert [entry["event"] for entry in logs] == ["cells_refresh_failed", "cells_changed"]
    assert len(cells.snapshot.all) == 1
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


# ---- references in URLs ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_cell_with_a_broken_reference_refuses(registry: Registry) -> None:
    """It is listed, and targeting it names the cell and what is missing; other cells work."""
    await registry.write(lambda tx: add_cell(tx, database="env:CELL_ONE_DATABASE"))
    await registry.write(lambda tx: add_cell(tx, CELL2, "two"))
    with capture_logs() as logs:
        await registry.cells.refresh()
    one, two = registry.cells.snapshot.all
    with (
        pytest.raises(CellUnavailable, match=r"Cell one: .*\$CELL_ONE_DATABASE, which is not set"),
        registry.cells.target_cell(CONTEXT, one),
    ):
        pass
    with registry.cells.target_cell(CONTEXT, two):
        assert registry.names() == ["one", "two"]
    assert [entry["cell"] for entry in logs if entry["log_level"] == "error"] == ["one"]


@pytest.mark.anyio
async def test_a_mended_reference_is_seen_without_a_restart(registry: Registry, tmp_path: Path) -> None:
    """A file that comes later, and one that changes, take effect with the next refresh, though no mapping changed."""
    secret = tmp_path / "one.url"
    await registry.write(lambda tx: add_cell(tx, database=f"file:{secret}"))
    await registry.cells.refresh()
    assert registry.cells.snapshot.all[0].problem is not None
    for url in ("sqlite:////first", "sqlite:////second"):
        secret.write_text(url + "\n")
        assert await registry.cells.refresh()
        (cell,) = registry.cells.snapshot.all
        assert (cell.problem, cell.database_url.reveal()) == (None, url)


@pytest.mark.anyio
async def test_a_template_is_filled_from_this_processs_own_url(registry: Registry) -> None:
    """A stored URL may hold parts of it."""
    template = "{scheme}://{username}:{password}@{hostname}:{port}/cell1"
    await registry.write(lambda tx: add_cell(tx, database=template))
    await registry.cells.refresh()
    (cell,) = registry.cells.snapshot.all
    assert cell.database_url.reveal() == "postgresql://cellway:s%3Ccret@db:5432/cell1"


# ---- the cache of instance mappings ----------------------------------------------------------------------------


async def accept(registry: Registry, *uuids: str) -> None:
    """Make the cells 1 and 2, and instances that are in none of them yet."""

    def both(tx: ApiTx) -> None:
        # On the servers, what was deleted before has used up the first numbers.
        for number, made in enumerate((add_cell(tx), add_cell(tx, CELL2, "two")), 1):
            tx.execute(sa.update(cell_mappings).where(cell_mappings.c.id == made).values(id=number))

    await registry.write(both)
    await registry.write(lambda tx: add_instance(tx, *uuids))


async def moved(registry: Registry, uuid: str, cell: int) -> None:
    """Write an instance's cell, as another process would."""
    await registry.write(lambda tx: mappings.set_instance_cell(tx, uuid, cell))


async def found(registry: Registry, uuid: str = SERVER, *, fresh: bool = False) -> int | None:
    """Return the id of the cell that an instance is said to be in."""
    mapping = await registry.cells.find_mapping(uuid, fresh=fresh)
    assert mapping is not None
    return mapping.cell_id


@pytest.mark.anyio
async def test_a_mapping_is_remembered(registry: Registry) -> None:
    """A second look-up asks the API database nothing."""
    await accept(registry, SERVER)
    await moved(registry, SERVER, 1)
    assert await found(registry) == 1
    await moved(registry, SERVER, 2)
    assert await found(registry) == 1


@pytest.mark.anyio
async def test_a_mapping_without_a_cell_is_never_remembered(registry: Registry) -> None:
    """The cell is seen as soon as it is chosen, also when the mapping lost one that was remembered."""
    await accept(registry, SERVER)
    assert await found(registry) is None
    await moved(registry, SERVER, 1)
    assert await found(registry) == 1
    await registry.write(lambda tx: tx.execute(sa.update(instance_mappings).values(cell_id=None)))
    assert await found(registry, fresh=True) is None
    await moved(registry, SERVER, 2)
    assert await found(registry) == 2


@pytest.mark.anyio
async def test_an_unknown_instance_is_not_remembered(registry: Registry) -> None:
    """It is found as soon as it is accepted."""
    assert await registry.cells.find_mapping(SERVER) is None
    await registry.write(add_instance)
    assert await registry.cells.find_mapping(SERVER) is not None


@pytest.mark.anyio
async def test_the_cache_is_corrected_when_the_cell_has_no_such_instance(registry: Registry) -> None:
    """A fresh look-up, which callers make then, tells the truth and is what is remembered from then on."""
    await accept(registry, SERVER)
    await moved(registry, SERVER, 1)
    await found(registry)
    await moved(registry, SERVER, 2)
    assert await found(registry, fresh=True) == 2
    assert await found(registry) == 2


@pytest.mark.anyio
async def test_a_purged_mapping_leaves_the_cache_when_looked_up_afresh(registry: Registry) -> None:
    """It is not found again from memory."""
    await accept(registry, SERVER)
    await moved(registry, SERVER, 1)
    await found(registry)
    await registry.write(lambda tx: mappings.purge_instances(tx, [SERVER]))
    assert await registry.cells.find_mapping(SERVER, fresh=True) is None
    assert await registry.cells.find_mapping(SERVER) is None


@pytest.mark.anyio
async def test_a_forgotten_mapping_is_read_again(registry: Registry) -> None:
    """Forgetting what is not remembered is fine."""
    await accept(registry, SERVER)
    await moved(registry, SERVER, 1)
    await found(registry)
    await moved(registry, SERVER, 2)
    registry.cells.forget_mapping(SERVER)
    registry.cells.forget_mapping(SERVER)
    assert await found(registry) == 2


@pytest.mark.anyio
async def test_a_mapping_is_remembered_for_a_time(registry: Registry) -> None:
    """After `Limits.mapping_cache_seconds` it is read again."""
    await accept(registry, SERVER)
    await moved(registry, SERVER, 1)
    await found(registry)
    await moved(registry, SERVER, 2)
    registry.clock.seconds += registry.cells.limits.mapping_cache_seconds - 1
    assert await found(registry) == 1
    registry.clock.seconds += 2
    assert await found(registry) == 2


@pytest.mark.anyio
async def test_the_cache_is_bounded(registry: Registry) -> None:
    """At most `Limits.mapping_cache_entries` are remembered: the first one has been forgotten."""
    uuids = [f"{number:08}-0000-4000-8000-000000000000" for number in range(4)]
    await accept(registry, *uuids)
    for uuid in uuids:
        await moved(registry, uuid, 1)
        await found(registry, uuid)
    await registry.write(lambda tx: tx.execute(sa.update(instance_mappings).values(cell_id=2)))
    assert [await found(registry, uuid) for uuid in reversed(uuids)] == [1, 1, 1, 2]


@pytest.mark.anyio
async def test_the_cell_of_a_mapping_may_be_new(registry: Registry) -> None:
    """One that was made a moment ago is looked up at once; one that is gone is not found."""
    await registry.cells.refresh()
    await accept(registry, SERVER)
    mapping = InstanceMapping(SERVER, 1, "demo", "alice", False)
    assert (await registry.cells.cell_of(mapping)).ref.name == "one"
    with pytest.raises(NotFound):
        await registry.cells.cell_of(replace(mapping, cell_id=99))
