"""The fleet: hosts are mapped by themselves, silence takes them down and only that, and builds go where they may."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from cellway import hosts
from cellway.cells import mappings
from cellway.compute.fleet import Fleet
from cellway.config import AgentSection
from cellway.context import service_context
from cellway.db.api_tables import host_capacity
from cellway.db.cell_tables import services
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import Unavailable
from cellway.hosts import Claim
from cellway.ids import RequestId
from cellway.rpc.calls import HostResources
from cellway.testing import QUICK, Deployment, deployment
from tests.databases import FakeClock, Urls

pytestmark = pytest.mark.anyio

CONTEXT = service_context(RequestId("req-fleet"))
LIMITS = replace(QUICK, database_deadline_seconds=20.0, heartbeat_seconds=10.0, host_down_seconds=60.0)
UP_TO_LIMIT, PAST_LIMIT = 60.0, 60.1
RESOURCES = HostResources(
    vcpus=4,
    memory_mb=4096,
    disk_gb=40,
    cpu_allocation_ratio=2.0,
    ram_allocation_ratio=1.5,
    disk_allocation_ratio=1.0,
    hypervisor_type="fake",
    hypervisor_version=1,
    hypervisor_hostname="new",
    cpu_info="{}",
    host_ip="127.0.0.1",
)


class Sky:
    """A fleet on a clock that the test moves, over the cells of a deployment whose agents are still."""

    def __init__(self, running: Deployment) -> None:
        self.running = running
        self.clock = FakeClock()
        self.fleet = self.another()

    def another(self) -> Fleet:
        """Return a fleet as a process has it that starts now."""
        return Fleet(self.running.app.cells, limits=LIMITS, clock=self.clock, default_zone="nova")

    async def sweep(self) -> int:
        """Sweep once."""
        return await self.fleet.sweep(CONTEXT)

    async def look_for(self, seconds: float) -> None:
        """Let time pass while the fleet looks every second."""
        whole, rest = divmod(seconds, 1.0)
        for step in [1.0] * int(whole) + [rest]:
            self.clock.seconds += step
            await self.sweep()

    def is_up(self, host: str) -> bool:
        """Tell whether a host is up."""
        return self.fleet.is_up(self.running.cell(host.partition("-")[0]).id, host)

    async def write(self, cell: str, change: Any, *args: Any, **values: Any) -> None:
        """Run a change in a cell's database."""
        with self.running.targeted(cell) as cctx:
            await self.running.app.databases.on(cctx).write(change, *args, **values)

    async def add_host(self, cell: str, host: str) -> None:
        """Register a host, as its agent does when it starts."""
        await self.write(
            cell,
            hosts.register,
            host,
            RESOURCES,
            service_uuid=self.running.app.ids.uuid(),
            node_uuid=self.running.app.ids.uuid(),
            version=1,
        )

    async def report(self, host: str) -> None:
        """Move a host's report counter, as a heartbeat does."""

        def count(tx: CellTx) -> None:
            tx.execute(
                sa.update(services).where(services.c.host == host).values(report_count=services.c.report_count + 1)
            )

        await self.write(host.partition("-")[0], count)


@asynccontextmanager
async def still(path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """Run two cells with two hosts each that report once, when they start."""
    calm = replace(LIMITS, heartbeat_seconds=3600.0, fleet_sweep_seconds=3600.0)
    async with deployment(path, databases=databases, limits=calm, builder=False) as running:
        yield running


@pytest.fixture
async def sky(tmp_path: Path, databases: Urls) -> AsyncIterator[Sky]:
    """Two cells with two hosts each, seen once."""
    async with still(tmp_path / "data", databases) as running:
        made = Sky(running)
        await made.sweep()
        yield made


# ---- up and down -----------------------------------------------------------------------------------------------


async def test_a_silent_host_is_down_after_the_limit_and_up_with_its_next_report(sky: Sky) -> None:
    """Not before, and by the change of its counter alone."""
    await sky.look_for(UP_TO_LIMIT)
    assert sky.is_up("cell1-h1")
    await sky.report("cell1-h2")
    await sky.look_for(PAST_LIMIT - UP_TO_LIMIT)
    assert not sky.is_up("cell1-h1")
    assert sky.is_up("cell1-h2")
    assert not next(state for state in sky.fleet.states() if state.host == "cell1-h1").up
    await sky.report("cell1-h1")
    await sky.sweep()
    assert sky.is_up("cell1-h1")


async def test_a_process_that_starts_declares_nobody_down_for_one_limit(sky: Sky) -> None:
    """However long a host has been silent, whoever looks for the first time waits one full limit."""
    await sky.look_for(2 * PAST_LIMIT)
    assert not sky.is_up("cell1-h1")
    sky.fleet = sky.another()
    await sky.sweep()
    await sky.look_for(UP_TO_LIMIT)
    assert sky.is_up("cell1-h1")
    await sky.look_for(PAST_LIMIT - UP_TO_LIMIT)
    assert not sky.is_up("cell1-h1")


async def test_a_stall_of_a_cells_database_takes_no_host_down(sky: Sky) -> None:
    """Hosts could not report while it stalled, so their silence counts from its return."""
    sky.running.break_cell("cell1", "refuse")
    await sky.look_for(PAST_LIMIT)
    sky.running.heal_cell("cell1")
    await sky.sweep()
    assert sky.is_up("cell1-h1")
    assert not sky.is_up("cell2-h1")
    await sky.look_for(PAST_LIMIT)
    assert not sky.is_up("cell1-h1")


async def test_a_pause_of_this_process_takes_no_host_down(sky: Sky) -> None:
    """After a long pause the first look says what is, and silence counts from then."""
    sky.clock.seconds += 3600.0
    await sky.sweep()
    assert sky.is_up("cell1-h1")
    await sky.look_for(PAST_LIMIT)
    assert not sky.is_up("cell1-h1")


async def test_a_host_that_an_operator_forces_down_is_down(sky: Sky) -> None:
    """At the next sweep, though it reports, and up again when that is taken back."""
    await sky.write("cell1", hosts.update_service, "cell1-h1", {"forced_down": True})
    await sky.report("cell1-h1")
    await sky.sweep()
    assert not sky.is_up("cell1-h1")
    await sky.write("cell1", hosts.update_service, "cell1-h1", {"forced_down": False})
    await sky.sweep()
    assert sky.is_up("cell1-h1")


# ---- mapping and capacity --------------------------------------------------------------------------------------


async def test_a_new_host_is_mapped_by_the_next_sweep(sky: Sky) -> None:
    """It is counted once, mapped to its cell, and may be promised what it has times its ratios."""
    await sky.add_host("cell2", "cell2-h9")
    assert await sky.sweep() == 1
    assert await sky.sweep() == 0
    found = await sky.running.in_api(lambda tx: mappings.find_host(tx, "cell2-h9"))
    assert found is not None
    assert found.cell_id == sky.running.cell("cell2").id
    [state] = [state for state in sky.fleet.states() if state.host == "cell2-h9"]
    assert (state.vcpus, state.memory_mb, state.disk_gb) == (8, 6144, 40)
    assert state.up
    assert state.enabled


async def test_a_name_that_two_cells_use_is_refused_loudly(sky: Sky) -> None:
    """The first keeps it; the second is named in the log once, and gets nothing."""
    await sky.add_host("cell2", "cell1-h1")
    with capture_logs() as logged:
        assert await sky.sweep() == 0
        assert await sky.sweep() == 0
    assert [(entry["log_level"], entry["host"], entry["cell"]) for entry in logged if "host" in entry] == [
        ("error", "cell1-h1", "cell2")
    ]
    [state] = [state for state in sky.fleet.states() if state.host == "cell1-h1"]
    assert state.cell_id == sky.running.cell("cell1").id


async def test_changed_resources_are_seen_and_what_is_promised_stays(sky: Sky) -> None:
    """A host that comes back with other resources keeps the claims on it."""
    cell_id = sky.running.cell("cell1").id
    await sky.running.app.databases.on(API).write(hosts.claim, Claim("u", "cell1-h1", cell_id, 3, 512, 1))
    await sky.add_host("cell1", "cell1-h1")
    await sky.sweep()

    def capacity(tx: ApiTx) -> Any:
        return tx.execute(sa.select(host_capacity).where(host_capacity.c.host == "cell1-h1")).one()

    row = await sky.running.in_api(capacity)
    assert (row.vcpus, row.vcpus_used) == (8, 3)
    [state] = [state for state in sky.fleet.states() if state.host == "cell1-h1"]
    assert (state.vcpus, state.vcpus_used) == (8, 3)


async def test_a_cell_that_does_not_answer_keeps_its_hosts_and_gets_no_builds(sky: Sky) -> None:
    """Its hosts stay known; only the silence of the cell keeps builds away, until it answers."""
    sky.running.break_cell("cell1", "refuse")
    await sky.sweep()
    states = {state.host: state for state in sky.fleet.states()}
    assert len(states) == 4
    assert not states["cell1-h1"].cell_answers
    assert states["cell1-h1"].up
    assert states["cell2-h1"].cell_answers
    sky.running.heal_cell("cell1")
    await sky.sweep()
    assert all(state.cell_answers for state in sky.fleet.states())


async def test_without_the_api_database_a_sweep_fails_and_the_next_one_works(sky: Sky) -> None:
    """What is known stays known."""
    database = sky.running.app.databases.on(API)
    outage = database.outage()

    def fault(_expired: Any) -> None:
        raise outage

    database.fault = fault
    with pytest.raises(Unavailable):
        await sky.sweep()
    assert len(sky.fleet.states()) == 4
    database.fault = None
    assert await sky.sweep() == 0


# ---- builds ----------------------------------------------------------------------------------------------------


async def hosts_of(running: Deployment, count: int) -> set[str]:
    """Boot servers, and return the hosts that they came to."""
    found = set()
    for number in range(count):
        server = await running.boot(f"s{number}")
        await running.until_status(server, "ACTIVE")
        shown = await running.admin.get(f"/servers/{server}")
        found.add(shown.json["server"]["OS-EXT-SRV-ATTR:host"])
    return found


@pytest.fixture
async def living(tmp_path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each that report all the time."""
    patient = replace(QUICK, database_deadline_seconds=20.0, host_down_seconds=60.0)
    async with deployment(tmp_path / "data", databases=databases, limits=patient) as running:
        await running.make_flavor()
        yield running


async def services_of(running: Deployment) -> dict[str, dict[str, Any]]:
    """Return the compute services by host."""
    answer = await running.admin.get("/os-services?binary=nova-compute")
    return {service["host"]: service for service in answer.json["services"]}


@pytest.mark.parametrize("how", ["disabled", "forced_down"])
async def test_hosts_that_take_no_builds_get_none(living: Deployment, how: str) -> None:
    """With three of four hosts disabled or forced down, every server comes to the fourth."""
    change = {"status": "disabled"} if how == "disabled" else {"forced_down": True}
    for host, service in (await services_of(living)).items():
        if host != "cell2-h1":
            assert (await living.admin.put(f"/os-services/{service['id']}", change)).status == 200

    async def seen() -> bool:
        states = living.app.fleet.states()
        return sum(state.up and state.enabled for state in states) == 1

    await living.until(seen)
    assert await hosts_of(living, 4) == {"cell2-h1"}


async def test_a_host_that_is_added_gets_builds(living: Deployment) -> None:
    """Nobody has to map it: the emptiest host of all is the one that was started last."""
    await hosts_of(living, 4)
    folder = living.folder
    await living.app.start_agent(
        "cell1-h9", folder.transport("cell1"), AgentSection(latency_seconds=0.0), journal=folder.journal("cell1-h9")
    )

    async def mapped() -> bool:
        return any(state.host == "cell1-h9" for state in living.app.fleet.states())

    await living.until(mapped)
    assert await hosts_of(living, 1) == {"cell1-h9"}


async def test_servers_come_to_every_host(living: Deployment) -> None:
    """Builds are spread over hosts and cells, since the emptiest comes first."""
    assert await hosts_of(living, 4) == {"cell1-h1", "cell1-h2", "cell2-h1", "cell2-h2"}
