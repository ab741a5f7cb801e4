"""Limits and usage across cells: which is in force while some still lie in cells, and counting what nobody charged.

A second process stands beside the deployment, with nothing running in it, so that what it asks of a cell is counted.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.app import Application, open_application
from cellway.cells import mappings
from cellway.cells.registry import Cell
from cellway.compute.audit import Audit, Report
from cellway.config import QuotaSection, Secret
from cellway.context import service_context
from cellway.db.api_tables import (
    migration_state,
    project_user_quotas,
    quota_classes,
    quota_usages,
    quotas,
    reservations,
    server_charges,
)
from cellway.db.cell_tables import instances
from cellway.db.engines import API
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import Unavailable
from cellway.ids import CellUuid, RequestId
from cellway.operations.schemas import sync
from cellway.quota import legacy, usage
from cellway.quota.legacy import Kind
from cellway.quota.limits import Allowed
from cellway.quota.usage import Charge, Usage
from cellway.testing import QUICK, Deployment
from cellway.testing import deployment as open_deployment
from tests.databases import Urls, engine_of
from tests.incumbent import add_rows

pytestmark = pytest.mark.anyio

CONTEXT = service_context(RequestId("req-limits"))
SECTION = QuotaSection(instances=10, cores=20, ram=51200)
NEW_CELL = CellUuid("8d3f5a4e-1b1c-4d38-9a53-5a8c1f2e7b60")


class Process:
    """A process of a deployment, in which nothing runs by itself; `asked` counts the units of work of each cell."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.asked: dict[str, int] = {}

    def watch(self) -> None:
        """Count what is asked of every cell from now on."""
        self.asked = {}
        for cell in self.app.cells.snapshot.all:
            self._put(cell.ref.name, partial(self._count, cell.ref.name))

    def silence(self, name: str) -> None:
        """Let a cell's database refuse this process."""
        with self.app.cells.target_cell(CONTEXT, self.cell(name)) as cctx:
            outage = self.app.databases.on(cctx).outage()

        def refuse(_expired: Callable[[], bool]) -> None:
            raise outage

        self._put(name, refuse)

    def _count(self, name: str, _expired: Callable[[], bool]) -> None:
        self.asked[name] = self.asked.get(name, 0) + 1

    def _put(self, name: str, fault: Callable[[Callable[[], bool]], None]) -> None:
        with self.app.cells.target_cell(CONTEXT, self.cell(name)) as cctx:
            self.app.databases.on(cctx).fault = fault

    def cell(self, name: str) -> Cell:
        """Return a cell by name."""
        return next(cell for cell in self.app.cells.snapshot.all if cell.ref.name == name)

    async def allowed(self, project: str = "p", user: str = "u") -> Allowed:
        """Return the limits in force."""
        return await self.app.quotas.allowed(CONTEXT, project, user)

    async def cores(self, project: str = "p", user: str = "u") -> tuple[int, int]:
        """Return how many cores the project and the user may have."""
        found = await self.allowed(project, user)
        return found.project["cores"], found.user["cores"]


@asynccontextmanager
async def process(running: Deployment, **quota: Any) -> AsyncIterator[Process]:
    """Open another process over the same databases, with other options of `[quota]`."""
    config = running.app.config
    async with open_application(replace(config, quota=replace(config.quota, **quota))) as app:
        await app.cells.refresh()
        opened = Process(app)
        opened.watch()
        yield opened


@pytest.fixture
async def running(tmp_path: Path, databases: Urls, anyio_backend: str) -> AsyncIterator[Deployment]:
    """A deployment of two cells on each kind of database in turn, in which nothing builds."""
    path = tmp_path / "data"
    async with open_deployment(path, hosts_per_cell=1, databases=databases, quota=SECTION, builder=False) as made:
        yield made


async def in_api(running: Deployment, *statements: sa.Executable | tuple[sa.Executable, Any]) -> None:
    """Run statements in the API database."""

    def run(tx: ApiTx) -> None:
        for one in statements:
            if isinstance(one, tuple):
                tx.execute(*one)
            else:
                tx.execute(one)

    await running.app.databases.on(API).write(run)


async def in_cell(running: Deployment, name: str, run: Callable[[CellTx], Any]) -> Any:
    """Run something in a cell's database."""
    with running.targeted(name) as cctx:
        return await running.app.databases.on(cctx).write(run)


async def leave_in_cell(running: Deployment, name: str, kind: Kind, **row: Any) -> None:
    """Add a limit to a cell, as if it had been there before Cellway: nothing is known of any cell yet."""
    await in_cell(running, name, lambda tx: add_rows(tx.connection, kind.value, [row]))
    await in_api(running, sa.delete(migration_state))


def of_project(limit: int | None, resource: str = "cores", project: str = "p") -> dict[str, Any]:
    """Return a project's limit."""
    return {"project_id": project, "resource": resource, "hard_limit": limit}


def of_class(limit: int | None, name: str = "default") -> dict[str, Any]:
    """Return a class's limit."""
    return {"class_name": name, "resource": "cores", "hard_limit": limit}


# ---- levels ----------------------------------------------------------------------------------------------------


async def test_a_limit_is_the_users_the_projects_the_classs_or_the_configured(running: Deployment) -> None:
    """Each level hides those below it, NULL is unlimited on each, and a resource that nobody knows is no limit."""
    async with process(running) as one:
        assert await one.cores() == (20, 20)
        for table, row, expected in (
            (quota_classes, of_class(7, "gold"), (20, 20)),
            (quota_classes, of_class(None), (-1, -1)),
            (quotas, of_project(30), (30, 30)),
            (quotas, of_project(1, "networks"), (30, 30)),
            (project_user_quotas, of_project(None) | {"user_id": "u"}, (30, -1)),
        ):
            await in_api(running, (sa.insert(table), row))
            assert await one.cores() == expected
        assert await one.cores("p", "v") == (30, 30)
        assert await one.cores("q", "u") == (-1, -1)
        assert "networks" not in (await one.allowed()).project
        gold = await one.app.quotas.class_limits(CONTEXT, "gold")
        assert (gold["cores"], gold["instances"]) == (7, 10)
        assert (await one.app.quotas.class_limits(CONTEXT, "silver"))["cores"] == -1


# ---- limits that still lie in cells ------------------------------------------------------------------------------


async def test_each_level_is_found_in_the_api_database_before_the_cells(running: Deployment) -> None:
    """A limit of the API database hides a cell's of its own level; of several cells the first by name counts."""
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    await leave_in_cell(running, "cell1", Kind.PROJECT, **of_project(None))
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(6, "instances"))
    await leave_in_cell(running, "cell0", Kind.CLASS, **of_class(8))
    await leave_in_cell(running, "cell2", Kind.USER, **of_project(4), user_id="u")
    async with process(running) as one:
        assert await one.cores() == (-1, 4)
        assert (await one.allowed()).project["instances"] == 6
        assert await one.cores("q") == (8, 8)
        await in_api(running, (sa.insert(quotas), of_project(9)))
        assert await one.cores() == (9, 4)
        await in_api(running, (sa.insert(quota_classes), of_class(10)))
        assert await one.cores("q") == (10, 10)


async def test_a_cell_is_not_asked_once_its_tables_are_known_to_be_empty(running: Deployment) -> None:
    """The first miss asks every cell, once; later ones none, in this process and in one that starts afterwards."""
    await in_api(running, sa.delete(migration_state))
    async with process(running) as one, process(running) as before:
        assert await one.cores() == (20, 20)
        assert one.asked == {"cell0": 1, "cell1": 1, "cell2": 1}
        for _ in range(3):
            assert await one.cores() == (20, 20)
            await one.app.quotas.class_limits(CONTEXT, "gold")
        assert sum(one.asked.values()) == 3
        async with process(running) as later:
            for opened in (before, later):
                assert await opened.cores() == (20, 20)
                assert opened.asked == {}


async def test_a_cell_is_asked_until_its_last_limit_is_gone(running: Deployment) -> None:
    """Only the table that holds one, and only of the cell that has it; whoever buries it finds it empty."""
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    async with process(running) as one:
        for times in range(1, 4):
            assert await one.cores() == (5, 5)
            assert one.asked == {"cell0": 1, "cell1": 1, "cell2": times}
        await in_cell(running, "cell2", lambda tx: legacy.bury(tx, legacy.list_rows(tx, Kind.PROJECT, None, 10)))
        for _ in range(2):
            assert await one.cores() == (20, 20)
            assert one.asked["cell2"] == 4


async def test_a_new_cell_starts_incomplete(tmp_path: Path, databases: Urls) -> None:
    """A cell that is mapped when the others are complete is asked, and its limits are in force."""
    async with open_deployment(
        tmp_path / "data", cells=1, hosts_per_cell=1, databases=databases, quota=SECTION, builder=False
    ) as running, process(running) as one:  # fmt: skip
        assert await one.cores() == (20, 20)
        assert one.asked == {}
        url = running.folder.cell_database("cell2")
        sync("cell2", url, Tree.CELL, limits=QUICK)
        engine = engine_of(url)
        with engine.begin() as connection:
            add_rows(connection, "quotas", [of_project(5)])
        engine.dispose()

        def make(tx: ApiTx) -> None:
            queue = Secret("memory://cell2")
            mappings.create_cell(tx, NEW_CELL, "cell2", transport_url=queue, database_connection=url)

        await running.app.databases.on(API).write(make)
        await one.app.cells.refresh()
        one.watch()
        assert await one.cores() == (5, 5)
        assert one.asked == {"cell2": 1}


async def test_a_cell_that_does_not_answer_is_not_empty(running: Deployment) -> None:
    """Nothing is decided without it, or, if the operator wants that, as if it had none; it is asked again each time."""
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    async with process(running, silent_cells="refuse") as one, process(running, silent_cells="ignore") as other:
        for opened in (one, other):
            opened.silence("cell2")
        with pytest.raises(Unavailable, match="Cell cell2 may hold limits, and does not answer"):
            await one.allowed()
        assert await other.cores() == (20, 20)
        for opened in (one, other):
            opened.watch()
            assert await opened.cores() == (5, 5)
            assert opened.asked["cell2"] == 1


async def test_the_last_answer_of_a_cell_is_remembered(running: Deployment) -> None:
    """A cell that falls silent changes no limit of whom it was asked about before."""
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    for setting in ("refuse", "ignore"):
        async with process(running, silent_cells=setting) as one:
            assert await one.cores() == (5, 5)
            one.silence("cell2")
            for _ in range(2):
                assert await one.cores() == (5, 5)


async def test_a_limit_that_was_deleted_does_not_come_back(running: Deployment) -> None:
    """Deleting needs no cell, and holds for what lies in a silent one: a user's, and a project's with its users'."""
    for user in ("u", "v"):
        await leave_in_cell(running, "cell2", Kind.USER, **of_project(3), user_id=user)
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    async with process(running) as one:
        one.silence("cell2")
        await one.app.quotas.delete_limits("p", "u")
        one.watch()
        assert [await one.cores("p", user) for user in ("u", "v")] == [(5, 5), (5, 3)]
        one.silence("cell2")
        await one.app.quotas.delete_limits("p", None)
        one.watch()
        async with process(running) as other:
            for opened in (one, other):
                assert [await opened.cores("p", user) for user in ("u", "v")] == [(20, 20)] * 2


async def test_a_limit_that_is_set_wins_over_what_lies_in_a_cell(running: Deployment) -> None:
    """At once and everywhere; the answer has the cell's other limits, and so has whoever asks later."""
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(5))
    await leave_in_cell(running, "cell2", Kind.PROJECT, **of_project(6, "instances"))
    await leave_in_cell(running, "cell1", Kind.CLASS, **of_class(40))
    async with process(running) as one, process(running) as other:
        for limit in (7, 8):
            answer = await one.app.quotas.set_limits(CONTEXT, "p", None, {"cores": limit}, force=False)
            assert (answer.project["cores"], answer.project["instances"]) == (limit, 6)
            for opened in (one, other):
                assert await opened.cores() == (limit, limit)
                assert (await opened.allowed()).project["instances"] == 6
        assert (await one.app.quotas.set_class_limits(CONTEXT, "default", {"ram": 1}))["cores"] == 40
        one.silence("cell2")
        with pytest.raises(Unavailable):
            await one.app.quotas.set_class_limits(CONTEXT, "bronze", {"ram": 2})
        assert (await other.app.quotas.class_limits(CONTEXT, "bronze"))["ram"] == 1


# ---- counting ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def adopted(tmp_path: Path, databases: Urls, anyio_backend: str) -> AsyncIterator[Deployment]:
    """Servers that nobody has charged, as in a deployment of the incumbent's: three of the member's in two cells, one
    without a host in cell0, one deleted, one that may still be restored; and one of another project.
    """
    async with open_deployment(tmp_path / "data", hosts_per_cell=1, databases=databases) as made:
        await made.make_flavor()
        await made.make_flavor("m1.huge", vcpus=10_000, ram=512)
        other = await made.add_user("other", "other", "member")
        servers = [await made.boot(f"s{number}") for number in range(5)]
        apart = await made.boot("apart", other)
        for server in servers:
            await made.until_status(server, "ACTIVE")
        await made.until_status(apart, "ACTIVE", other)
        await made.until_status(await made.boot("nowhere", flavor="m1.huge"), "ERROR")
        assert (await made.member.delete(f"/servers/{servers[0]}")).status == 204
        await made.until_gone(servers[0])
        await made.until(partial(at_rest, made))
        gone = sa.update(instances).where(instances.c.uuid == servers[1]).values(vm_state="soft-delete")
        for name in ("cell1", "cell2"):
            await in_cell(made, name, lambda tx: tx.execute(gone).rowcount)
        tables = (reservations, quota_usages, server_charges, migration_state)
        await in_api(made, *(sa.delete(table) for table in tables))
        yield made


async def at_rest(running: Deployment) -> bool:
    """Tell whether nothing is being built or deleted any more."""
    return not await running.in_api(
        lambda tx: list(tx.execute(sa.text("SELECT id FROM build_requests UNION SELECT id FROM delete_requests")))
    )


def owner_of(running: Deployment, name: str) -> tuple[str, str]:
    """Return the ids of a project and a user of one name."""
    project, user = running.identity.store.find_project_named(name), running.identity.store.find_user_named(name)
    assert project is not None
    assert user is not None
    return project.id, user.id


MINE = {"instances": Usage(4), "cores": Usage(10_003), "ram": Usage(2048)}
"""Three servers and the one in cell0."""


async def servers_of(one: Process, project: str, user: str | None = None) -> dict[str, Usage]:
    """Return what servers take of a project, or of a user in it."""
    return {name: has for name, has in (await one.app.quotas.usage(CONTEXT, project, user)).items() if name in MINE}


async def test_servers_that_nobody_charged_are_counted_once(adopted: Deployment) -> None:
    """Of all cells, cell0 included, without those deleted or about to be; each cell is asked once, for this alone."""
    project, user = owner_of(adopted, "demo")
    async with process(adopted) as one:
        assert await servers_of(one, project) == MINE
        first = dict(one.asked)
        assert first["cell0"] == 1
        assert await servers_of(one, project, user) == MINE
        assert await servers_of(one, project) == MINE
        assert one.asked == first
        charged = sa.select(server_charges.c.project_id)
        assert await adopted.in_api(lambda tx: list(tx.execute(charged).scalars())) == [project] * 4
    async with process(adopted) as later:
        assert await servers_of(later, project) == MINE
        assert later.asked == {}


async def test_the_first_count_waits_for_a_cell_or_goes_on_without_as_the_operator_wants(adopted: Deployment) -> None:
    """A cell that has uncounted servers and does not answer refuses, or is counted by a later sweep."""
    project, _ = owner_of(adopted, "demo")
    async with process(adopted, silent_cells="refuse") as one:
        one.silence("cell0")
        with pytest.raises(Unavailable, match="Cell cell0 has servers"):
            await servers_of(one, project)
        # Nor the second time: what the other cells answered is not taken for all.
        await one.app.quotas.refresh(CONTEXT, project)
        with pytest.raises(Unavailable, match="Cell cell0 has servers"):
            await servers_of(one, project)
    async with process(adopted, silent_cells="ignore") as other:
        other.silence("cell0")
        assert (await servers_of(other, project))["instances"] == Usage(3)
        other.watch()
        await other.app.quotas.sweep(CONTEXT)
        assert await servers_of(other, project) == MINE


async def test_a_silent_cell_lowers_no_usage_and_changes_nobodys_headroom(adopted: Deployment) -> None:
    """With every cell silent, what was counted stands, also when it is counted anew, and reservations are decided."""
    project, user = owner_of(adopted, "demo")
    async with process(adopted) as one:
        assert await servers_of(one, project, user) == MINE
        await one.app.quotas.sweep(CONTEXT)
        for name in ("cell0", "cell1", "cell2"):
            one.silence(name)
        await one.app.quotas.refresh(CONTEXT, project)
        assert await servers_of(one, project) == MINE
        await one.app.quotas.set_limits(CONTEXT, project, None, {"instances": 5}, force=False)
        api = one.app.databases.on(API)
        allowed = await one.app.quotas.allowed(CONTEXT, project, user)
        charges = [Charge(f"{number:036}", project, user, 1, 1) for number in range(2)]
        await api.write(usage.reserve_servers, charges[:1], lambda: allowed)
        with pytest.raises(Exception, match="already used 5 of 5 instances"):
            await api.write(usage.reserve_servers, charges[1:], lambda: allowed)


async def test_sweeps_of_two_processes_count_and_give_back_once(adopted: Deployment) -> None:
    """At the same moment, again and again: every server has one charge, and what expired is returned."""
    project, user = owner_of(adopted, "demo")
    other = owner_of(adopted, "other")
    async with process(adopted) as one, process(adopted) as two:
        await asyncio.gather(*(opened.app.quotas.sweep(CONTEXT) for opened in (one, two, one, two)))
        await asyncio.gather(*(servers_of(opened, project, user) for opened in (one, two)))

        def reserve(tx: ApiTx) -> None:
            unlimited = Allowed(dict.fromkeys(MINE, -1), dict.fromkeys(MINE, -1))
            usage.reserve(tx, "a" * 36, project, user, {"cores": 5}, lambda: unlimited, expires_at=tx.now)

        await one.app.databases.on(API).write(reserve)
        assert (await servers_of(one, project))["cores"] == Usage(10_003, 5)
        await asyncio.gather(*(opened.app.quotas.sweep(CONTEXT) for opened in (one, two, one, two)))
        for opened in (one, two):
            assert await servers_of(opened, project, user) == await servers_of(opened, project) == MINE
            assert (await servers_of(opened, other[0]))["instances"] == Usage(1)
            opened.watch()
            await opened.app.quotas.sweep(CONTEXT)
            # All of them are known to be charged, and to hold no limits.
            assert opened.asked == {}


async def test_burying_and_deleting_give_back_once(adopted: Deployment) -> None:
    """A server that gets no host takes nothing any more, and deleting it, or another twice, returns nothing more."""
    project, user = owner_of(adopted, "other")
    member = await adopted.sign_in("other", "other-password")
    async with process(adopted) as one:
        assert (await servers_of(one, project))["instances"] == Usage(1)
        lost = await adopted.boot("lost", member, flavor="m1.huge")
        await adopted.until_status(lost, "ERROR", member)
        await adopted.until(partial(at_rest, adopted))
        assert await servers_of(one, project, user) == {
            "instances": Usage(1), "cores": Usage(1), "ram": Usage(512),
        }  # fmt: skip
        [apart] = [row["id"] for row in (await member.get("/servers")).json["servers"] if row["id"] != lost]
        answers = await asyncio.gather(*(member.delete(f"/servers/{server}") for server in (lost, apart, apart, lost)))
        assert {answer.status for answer in answers} <= {204, 404}
        await adopted.until(partial(at_rest, adopted))
        for _ in range(2):
            assert set((await servers_of(one, project, user)).values()) == {Usage()}
            assert set((await servers_of(one, project)).values()) == {Usage()}
            await one.app.quotas.refresh(CONTEXT, project)


# ---- verifying ---------------------------------------------------------------------------------------------------


async def test_nothing_seems_wrong_while_servers_come_and_go(tmp_path: Path, databases: Urls) -> None:
    """Verifying and counting anew again and again, while others create, bury and delete, finds and makes no drift."""
    async with open_deployment(
        tmp_path / "data", hosts_per_cell=1, databases=databases, quota=SECTION
    ) as running, process(running) as one:  # fmt: skip
        await running.make_flavor()
        await running.make_flavor("m1.huge", vcpus=10_000, ram=1)
        body = {"quota_set": {"cores": -1}}
        project, _ = owner_of(running, "demo")
        assert (await running.admin.put(f"/os-quota-sets/{project}", body)).status == 200
        audit = Audit(one.app.cells, one.app.quotas)
        over = asyncio.Event()
        rounds = 0

        async def verify() -> None:
            nonlocal rounds
            while not over.is_set():
                assert await audit.verify(CONTEXT) == Report((), ())
                await audit.refresh(CONTEXT, *([project] if rounds % 2 else []))
                rounds += 1

        async def use(number: int) -> None:
            for turn in range(4):
                server = await running.boot(f"s{number}-{turn}", flavor="m1.huge" if turn == 2 else "m1.tiny")
                if turn:
                    await running.until_status(server, "ERROR" if turn == 2 else "ACTIVE")
                assert (await running.member.delete(f"/servers/{server}")).status == 204
                await running.until_gone(server)

        verifying = asyncio.create_task(verify())
        await asyncio.gather(*map(use, range(4)))
        over.set()
        await verifying
        assert rounds > 1
        await running.until(partial(at_rest, running))
        assert set((await servers_of(one, project)).values()) == {Usage()}
        assert not await running.in_api(lambda tx: list(tx.execute(sa.select(server_charges.c.id))))
