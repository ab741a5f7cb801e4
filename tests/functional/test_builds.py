"""The create saga under everything that may happen to a step: a server ends in one cell, on one host, or in ERROR."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from cellway.cells import mappings
from cellway.compute.build import STEPS, Build, Builder, Refused, Step
from cellway.compute.watch import Watch
from cellway.config import AgentSection, Secret
from cellway.db.api_tables import (
    build_claims,
    build_requests,
    delete_requests,
    host_capacity,
    host_claims,
    server_charges,
)
from cellway.db.cell_tables import instances
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.testing import QUICK, Deployment, deployment
from tests.databases import Urls

pytestmark = pytest.mark.anyio

Do = Callable[[Builder, Build], Awaitable[None]]

HASTY = replace(QUICK, claim_seconds=0.5, claim_renew_seconds=0.1, launch_seconds=2.0, recast_seconds=0.3)
NAMES = [step.name for step in STEPS]


class Killed(BaseException):
    """The process that ran the builder is gone."""


@pytest.fixture
async def unbuilt(tmp_path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each, and no builder yet."""
    async with deployment(tmp_path / "data", databases=databases, limits=HASTY, builder=False) as running:
        await running.make_flavor()
        yield running


def builder_with(running: Deployment, name: str, around: Callable[[Do], Do], **limits: float) -> Builder:
    """Return a builder of its own, as another process would have, whose step `name` is wrapped by `around`."""
    steps = tuple(step._replace(do=around(step.do)) if step.name == name else step for step in STEPS)
    return make_builder(running, steps, **limits)


def make_builder(running: Deployment, steps: tuple[Step, ...] = STEPS, **limits: Any) -> Builder:
    """Return a builder as another process would have one."""
    app = running.app
    watch = Watch(app.cells, clock=app.clock)
    own = replace(HASTY, **limits)
    return Builder(app.cells, app.fleet, watch, limits=own, clock=app.clock, dice=random.Random(7), steps=steps)


async def settled(running: Deployment, server: str) -> dict[str, Any]:
    """Let the deployment's own builder go on, and return the server once its request is gone."""
    running.app.start_builder()

    async def finished() -> Any:
        left = await running.in_api(lambda tx: tx.execute(sa.select(build_claims.c.id)).all())
        return not left

    await running.until(finished)
    answer = await running.admin.get(f"/servers/{server}")
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.json["server"]
    return body


async def places(running: Deployment) -> dict[str, list[tuple[str, str | None]]]:
    """Return the live instances of all cells: uuid to (cell, host) of each place that has it."""
    found: dict[str, list[tuple[str, str | None]]] = {}

    def live(tx: CellTx) -> Any:
        return tx.execute(sa.select(instances.c.uuid, instances.c.host).where(instances.c.deleted == 0)).all()

    for cell in running.app.cells.snapshot.all:
        for uuid, host in await running.in_cell(cell.ref.name, live):
            found.setdefault(uuid, []).append((cell.ref.name, host))
    return found


async def guests(running: Deployment) -> dict[str, list[str]]:
    """Return what the hypervisors run: uuid to hosts."""
    found: dict[str, list[str]] = {}
    for host, agent in running.app.agents.items():
        for uuid in await agent.driver.inventory():
            found.setdefault(uuid, []).append(host)
    return found


async def check(running: Deployment, expected: dict[str, str], vcpus: int = 1) -> None:
    """Assert that exactly these servers exist, in these states, each once everywhere, and that nothing else is left."""

    def books(tx: ApiTx) -> Any:
        claims = {row.instance_uuid: row.host for row in tx.execute(sa.select(host_claims))}
        used = {row.host: row.vcpus_used for row in tx.execute(sa.select(host_capacity)) if row.vcpus_used}
        charged = {row.instance_uuid for row in tx.execute(sa.select(server_charges))}
        waiting = [tx.execute(sa.select(table)).all() for table in (build_requests, build_claims, delete_requests)]
        return claims, used, charged, waiting

    async def swept() -> bool:
        return set(await guests(running)) <= {uuid for uuid, status in expected.items() if status == "ACTIVE"}

    await running.until(swept)
    where, running_on = await places(running), await guests(running)
    claims, used, charged, waiting = await running.in_api(books)
    assert {uuid: len(cells) for uuid, cells in where.items()} == dict.fromkeys(expected, 1)
    assert charged == set(expected)
    assert waiting == [[], [], []]
    counted: dict[str, int] = {}
    for uuid, status in expected.items():
        [(cell, host)] = where[uuid]
        if status == "ERROR":
            assert (cell, host) == ("cell0", None)
            assert uuid not in claims
            continue
        assert host is not None
        assert claims[uuid] == host
        assert running_on[uuid] == [host]
        counted[host] = counted.get(host, 0) + vcpus
    assert used == counted
    assert set(claims) == {uuid for uuid, status in expected.items() if status == "ACTIVE"}


@pytest.mark.parametrize("name", NAMES)
async def test_a_step_that_refuses_is_undone_and_another_host_taken(unbuilt: Deployment, name: str) -> None:
    """Whichever step refuses, what went before is undone and another host taken; a server that runs already stays."""
    refused: list[str | None] = []

    def around(do: Do) -> Do:
        async def once(builder: Builder, build: Build) -> None:
            if not refused:
                refused.append(build.host)
                raise Refused("not this time", host_failed=True)
            await do(builder, build)

        return once

    server = await unbuilt.boot("s")
    await builder_with(unbuilt, name, around).run_once()
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    await check(unbuilt, {server: "ACTIVE"})
    stayed = (await places(unbuilt))[server][0][1] == refused[0]
    # Before "watch" is undone the host may have the server running, or not: then either is right.
    assert name == "watch" or stayed == (name == "finish")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_builder_that_dies_at_a_step_is_replaced(unbuilt: Deployment, name: str, moment: str) -> None:
    """Whichever step a process dies before or after, the next builder finishes what it began."""

    def around(do: Do) -> Do:
        async def deadly(builder: Builder, build: Build) -> None:
            if moment == "after":
                await do(builder, build)
            raise Killed

        return deadly

    server = await unbuilt.boot("s")
    await builder_with(unbuilt, name, around).run_once()
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    await check(unbuilt, {server: "ACTIVE"})


@pytest.mark.parametrize("name", NAMES)
async def test_a_repeated_step_changes_nothing_more(unbuilt: Deployment, name: str) -> None:
    """Doing any step twice is doing it once; the last one finds that the request is gone."""

    def around(do: Do) -> Do:
        async def twice(builder: Builder, build: Build) -> None:
            await do(builder, build)
            await do(builder, build)

        return twice

    server = await unbuilt.boot("s")
    await builder_with(unbuilt, name, around).run_once()
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    await check(unbuilt, {server: "ACTIVE"})


@pytest.mark.parametrize("name", [step.name for step in STEPS if step.undo is not None])
async def test_a_repeated_undo_changes_nothing_more(unbuilt: Deployment, name: str) -> None:
    """Undoing any step twice is undoing it once."""
    failed: list[bool] = []

    async def fail_once(builder: Builder, build: Build) -> None:
        if not failed:
            failed.append(True)
            raise Refused("not this time", host_failed=True)
        await STEPS[NAMES.index("watch")].do(builder, build)

    def doubled(step: Step) -> Step:
        undo = step.undo
        assert undo is not None

        async def twice(builder: Builder, build: Build) -> None:
            await undo(builder, build)
            await undo(builder, build)

        return step._replace(undo=twice)

    steps = tuple(
        step._replace(do=fail_once) if step.name == "watch" else doubled(step) if step.name == name else step
        for step in STEPS
    )
    server = await unbuilt.boot("s")
    await make_builder(unbuilt, steps).run_once()
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    await check(unbuilt, {server: "ACTIVE"})


@pytest.mark.parametrize("name", NAMES)
async def test_a_builder_that_was_paused_past_its_claim_changes_nothing(unbuilt: Deployment, name: str) -> None:
    """One that sleeps before a step while another finishes the build wakes up, and everything stays as it is."""
    asleep, wake = asyncio.Event(), asyncio.Event()

    def around(do: Do) -> Do:
        async def paused(builder: Builder, build: Build) -> None:
            asleep.set()
            await wake.wait()
            await do(builder, build)

        return paused

    server = await unbuilt.boot("s")
    zombie = builder_with(unbuilt, name, around, claim_renew_seconds=1000.0)
    await zombie.run_once()
    await asleep.wait()
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    before = await places(unbuilt)
    wake.set()
    await zombie.aclose(5.0)
    assert await places(unbuilt) == before
    await check(unbuilt, {server: "ACTIVE"})


@pytest.mark.parametrize("name", NAMES)
async def test_a_delete_that_meets_a_build_wins(unbuilt: Deployment, name: str) -> None:
    """A DELETE answered 204 at any step leaves no server, no guest, no claim and no charge."""

    def around(do: Do) -> Do:
        async def overtaken(builder: Builder, build: Build) -> None:
            assert (await unbuilt.member.delete(f"/servers/{build.uuid}")).status == 204
            build.cancelled = True
            await do(builder, build)

        return overtaken

    server = await unbuilt.boot("s")
    builder = builder_with(unbuilt, name, around)
    await builder.run_once()
    unbuilt.app.start_builder()
    await unbuilt.until_gone(server)

    await unbuilt.until(lambda: no_deletions(unbuilt))
    await builder.aclose(5.0)
    await check(unbuilt, {})
    mapping = await unbuilt.app.cells.find_mapping(server, fresh=True)
    assert mapping is not None
    assert mapping.queued_for_delete


async def test_a_server_that_no_host_can_take_is_buried(tmp_path: Path, databases: Urls) -> None:
    """It is in cell0, in ERROR, with a fault that says what it lacked."""
    async with deployment(tmp_path / "data", databases=databases) as running:
        await running.make_flavor("huge", vcpus=1000)
        server = await running.boot("s", flavor="huge")
        shown = await running.until_status(server, "ERROR")
        assert "vcpus" in shown["fault"]["message"]
        await running.until(lambda: no_claims(running))
        await check(running, {server: "ERROR"})
        assert (await running.member.delete(f"/servers/{server}")).status == 204
        await running.until_gone(server)
        await running.until(lambda: no_deletions(running))
        await check(running, {})


async def test_hosts_that_fail_are_left_for_others_and_at_last_given_up(tmp_path: Path, databases: Urls) -> None:
    """When every host fails, a bounded number is tried, and the fault names the last failure."""
    failing = AgentSection(latency_seconds=0.0, failure_rate=1.0)
    async with deployment(tmp_path / "data", databases=databases, limits=HASTY, agent=failing) as running:
        await running.make_flavor()
        server = await running.boot("s")
        shown = await running.until_status(server, "ERROR")
        assert "Exceeded 3 hosts" in shown["fault"]["message"]
        await check(running, {server: "ERROR"})


async def test_more_servers_than_there_is_room_for(tmp_path: Path, databases: Urls) -> None:
    """Of 40 builds at once exactly as many as fit become ACTIVE, the rest ERROR, and no host is ever overbooked."""
    async with deployment(tmp_path / "data", databases=databases, limits=QUICK) as running:
        await running.make_flavor("slice", vcpus=8)  # 4 hosts, each 16 vcpus at a ratio of 4: eight a host
        answer = await running.member.post(
            "/servers",
            {
                "server": {
                    "name": "many",
                    "flavorRef": "slice",
                    "imageRef": "7f3c1f52-7c1b-4c59-9d0e-5a4b3f0c7e11",
                    "networks": "none",
                    "min_count": 40,
                }
            },
        )
        assert answer.status == 202
        overbooked: list[Any] = []

        async def finished() -> bool:
            def over(tx: ApiTx) -> Any:
                crowded = host_capacity.c.vcpus_used > host_capacity.c.vcpus
                return tx.execute(sa.select(host_capacity.c.host).where(crowded)).all()

            overbooked.extend(await running.in_api(over))
            listed = (await running.member.get("/servers/detail")).json["servers"]
            return len(listed) == 40 and all(server["status"] in ("ACTIVE", "ERROR") for server in listed)

        await running.until(finished)
        listed = (await running.member.get("/servers/detail")).json["servers"]
        states = {server["id"]: server["status"] for server in listed}
        assert sorted(states.values()).count("ACTIVE") == 32
        assert overbooked == []
        await running.until(lambda: no_claims(running))
        await check(running, states, vcpus=8)


async def no_claims(running: Deployment) -> bool:
    """Tell whether every build is finished."""
    return not await running.in_api(lambda tx: tx.execute(sa.select(build_claims.c.id)).all())


async def no_deletions(running: Deployment) -> bool:
    """Tell whether every deletion is carried out."""
    return not await running.in_api(lambda tx: tx.execute(sa.select(delete_requests.c.id)).all())


async def test_a_deployment_comes_back_with_its_servers(tmp_path: Path, databases: Urls) -> None:
    """What was accepted before an abrupt end is built after the next start, and what ran still runs."""
    async with deployment(tmp_path / "data", databases=databases, limits=HASTY) as first:
        await first.make_flavor()
        ran = await first.boot("ran")
        await first.until_status(ran, "ACTIVE")
    async with deployment(tmp_path / "data", databases=databases, limits=HASTY, builder=False) as second:
        waits = await second.boot("waits")
    async with deployment(tmp_path / "data", databases=databases, limits=HASTY) as third:
        assert (await third.until_status(ran, "ACTIVE"))["name"] == "ran"
        assert (await third.until_status(waits, "ACTIVE"))["name"] == "waits"
        await third.until(lambda: no_claims(third))
        await check(third, {ran: "ACTIVE", waits: "ACTIVE"})


@pytest.mark.parametrize("how", ["refuse", "hang"])
async def test_a_delete_while_the_cell_is_down_is_carried_out_later(tmp_path: Path, databases: Urls, how: Any) -> None:
    """DELETE is 204 at once; when the cell is back, server, guest, claim and charge go."""
    async with deployment(
        tmp_path / "data", databases=databases, limits=replace(QUICK, database_deadline_seconds=3.0)
    ) as running:
        await running.make_flavor()
        server = await running.boot("s")
        await running.until_status(server, "ACTIVE")
        await running.until(lambda: no_claims(running))
        [(cell, _)] = (await places(running))[server]
        running.break_cell(cell, how)
        assert (await running.member.delete(f"/servers/{server}")).status == 204
        running.heal_cell(cell)
        await running.until_gone(server)

        await running.until(lambda: no_deletions(running))
        await check(running, {})


# ---- hosts and cells that are lost -----------------------------------------------------------------------------

FORGETFUL = replace(HASTY, rpc_timeout_seconds=1.0, host_down_seconds=2.0)
"""An agent that is closed leaves undone what takes it longer, and is soon missed."""
ENDLESS, QUICKLY = AgentSection(latency_seconds=3600.0), AgentSection(latency_seconds=0.0)


async def start_agent(running: Deployment, host: str, settings: AgentSection = QUICKLY) -> None:
    """Start a host's agent anew, with what its hypervisor remembers."""
    folder = running.folder
    queue = folder.transport(host.partition("-")[0])
    await running.app.start_agent(host, queue, settings, journal=folder.journal(host))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("place", "finish")])
async def test_a_cell_lost_in_mid_build_is_waited_for(unbuilt: Deployment, name: str) -> None:
    """Whichever step in the cell meets the outage, the server stays there and is ACTIVE once the cell is back."""
    lost: list[str] = []

    def around(do: Do) -> Do:
        async def outage(builder: Builder, build: Build) -> None:
            assert build.cell is not None
            lost.append(build.cell.ref.name)
            unbuilt.break_cell(lost[0], "refuse")
            await do(builder, build)

        return outage

    server = await unbuilt.boot("s")
    builder = builder_with(unbuilt, name, around, launch_seconds=60.0)
    await builder.run_once()
    await unbuilt.until(lambda: _is(lambda: lost))
    unbuilt.heal_cell(lost[0])
    assert (await settled(unbuilt, server))["status"] == "ACTIVE"
    assert (await places(unbuilt))[server][0][0] == lost[0]
    await check(unbuilt, {server: "ACTIVE"})


async def _is(condition: Callable[[], object]) -> object:
    return condition()


async def test_a_host_lost_in_mid_build_is_left_for_another(tmp_path: Path, databases: Urls) -> None:
    """The server runs on the other host, once, also after the lost one is back and has seen what became of it."""
    async with deployment(tmp_path / "data", databases=databases, cells=1, limits=FORGETFUL, agent=ENDLESS) as running:
        await running.make_flavor()
        server = await running.boot("s")

        async def placed() -> str | None:
            [(_, host)] = (await places(running)).get(server, [("", None)])
            return host

        lost = await running.until(placed)
        other = next(host for host in running.app.agents if host != lost)
        await running.app.agents[other].aclose()
        await start_agent(running, other)
        await running.app.agents[lost].aclose()
        await running.until_status(server, "ACTIVE")
        assert await placed() == other
        await start_agent(running, lost)
        await running.until(lambda: no_claims(running))
        await check(running, {server: "ACTIVE"})


async def boot_and_leave(running: Deployment) -> str:
    """Make a server that runs on the only host, and close that host's agent."""
    await running.make_flavor()
    server = await running.boot("s")
    await running.until_status(server, "ACTIVE")
    await running.until(lambda: no_claims(running))
    await running.app.agents["cell1-h1"].aclose()
    return server


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_delete_while_the_agent_is_away_is_carried_out(
    tmp_path: Path, databases: Urls, comes_back: bool
) -> None:
    """DELETE is 204; the agent that starts again removes the guest, before its host counts as down or after."""
    patient = replace(FORGETFUL, host_down_seconds=60.0) if comes_back else FORGETFUL
    async with deployment(
        tmp_path / "data", databases=databases, cells=1, hosts_per_cell=1, limits=patient, agent=QUICKLY
    ) as running:
        server = await boot_and_leave(running)
        assert (await running.member.delete(f"/servers/{server}")).status == 204
        if not comes_back:
            # Nobody waits for a host that is down.
            await running.until_gone(server)
            await running.until(lambda: no_deletions(running))
        await start_agent(running, "cell1-h1")
        await running.until_gone(server)
        await running.until(lambda: no_deletions(running))
        await check(running, {})


async def test_a_delete_waits_for_the_broker_of_a_host_that_is_down(tmp_path: Path, databases: Urls) -> None:
    """While the order to the host cannot be kept anywhere the server is not called gone: its guest may still run."""
    async with deployment(
        tmp_path / "data", databases=databases, cells=1, hosts_per_cell=1, limits=FORGETFUL, agent=QUICKLY
    ) as running:
        server = await boot_and_leave(running)
        cell = running.cell("cell1")

        async def use_queue(url: Secret) -> None:
            await running.app.databases.on(API).write(mappings.update_cell, cell.ref.uuid, transport_url=url)
            await running.app.cells.refresh()

        await use_queue(Secret("rabbit://127.0.0.1:1/nobody"))
        await running.until(lambda: _is(lambda: not running.app.fleet.is_up(cell.id, "cell1-h1")))
        with capture_logs() as logs:
            assert (await running.member.delete(f"/servers/{server}")).status == 204
            await running.until(lambda: _is(lambda: sum(one["event"] == "delete_waits" for one in logs) >= 3))
        assert (await running.member.get(f"/servers/{server}")).status == 200
        await use_queue(running.folder.transport("cell1"))
        await running.until_gone(server)
        await start_agent(running, "cell1-h1")
        await running.until(lambda: no_deletions(running))
        await check(running, {})
