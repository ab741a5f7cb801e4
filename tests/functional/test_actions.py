"""Actions on servers: allowed states, locks, one effect for however many messages, nothing stuck after a restart."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.agent import Agent
from cellway.agent.drivers import FakeDriver, PowerState
from cellway.config import AgentSection
from cellway.db.cell_tables import instances
from cellway.db.transaction import CellTx
from cellway.ids import RequestId
from cellway.instances import actions
from cellway.instances.actions import TRANSITIONS
from cellway.instances.records import VmState
from cellway.rpc.calls import ACT_ON_INSTANCE, ActOnInstance, host_address
from cellway.rpc.messaging import cast
from cellway.testing import QUICK, Client, Deployment, deployment
from tests.databases import Urls

pytestmark = pytest.mark.anyio

ASKED = {
    "start": {"os-start": None},
    "stop": {"os-stop": None},
    "reboot": {"reboot": {"type": "SOFT"}},
    "hard_reboot": {"reboot": {"type": "HARD"}},
    "pause": {"pause": None},
    "unpause": {"unpause": None},
    "suspend": {"suspend": None},
    "resume": {"resume": None},
}
"""How a client asks for each operation."""
WAYS = {
    VmState.ACTIVE: None,
    VmState.STOPPED: "stop",
    VmState.PAUSED: "pause",
    VmState.SUSPENDED: "suspend",
}
"""The operation that leads from ACTIVE to each state."""
STATUS = {
    VmState.ACTIVE: "ACTIVE",
    VmState.STOPPED: "SHUTOFF",
    VmState.PAUSED: "PAUSED",
    VmState.SUSPENDED: "SUSPENDED",
    VmState.ERROR: "ERROR",
}
POWER = {
    VmState.ACTIVE: PowerState.RUNNING,
    VmState.STOPPED: PowerState.SHUTDOWN,
    VmState.PAUSED: PowerState.PAUSED,
    VmState.SUSPENDED: PowerState.SUSPENDED,
}
SLOW = AgentSection(latency_seconds=60.0)
PATIENT = replace(QUICK, rpc_timeout_seconds=3.0, database_deadline_seconds=20.0, host_down_seconds=60.0)


class Server:
    """One server that runs, and its place."""

    def __init__(self, running: Deployment, uuid: str, host: str) -> None:
        self.running = running
        self.uuid = uuid
        self.host = host
        self.cell = host.partition("-")[0]

    @property
    def driver(self) -> FakeDriver:
        """The hypervisor that runs it."""
        driver = self.running.app.agents[self.host].driver
        assert isinstance(driver, FakeDriver)
        return driver

    def done(self) -> list[str]:
        """Return what the hypervisor did to it since it was made."""
        return [one.operation for one in self.driver.operations if one.instance_uuid == self.uuid][1:]

    async def ask(self, operation: str, client: Client | None = None) -> int:
        """Ask for an operation, and return the HTTP status."""
        answer = await (client or self.running.member).post(f"/servers/{self.uuid}/action", ASKED[operation])
        return answer.status

    async def until(self, state: VmState) -> None:
        """Wait until it is in a state, and nothing is being done to it."""
        await self.running.until_status(self.uuid, STATUS[state])

    async def bring_to(self, state: VmState) -> None:
        """Lead it from ACTIVE to a state."""
        way = WAYS[state]
        if way is not None:
            assert await self.ask(way) == 202
        await self.until(state)

    async def set(self, **values: Any) -> None:
        """Write to its row, as nobody does."""

        def update(tx: CellTx) -> None:
            tx.execute(sa.update(instances).where(instances.c.uuid == self.uuid).values(**values))

        with self.running.targeted(self.cell) as cctx:
            await self.running.app.databases.on(cctx).write(update)

    async def send(self, operation: str, request_id: str) -> None:
        """Send the order for an operation to its host, as the API does."""
        with self.running.targeted(self.cell) as cctx:
            await cast(
                cctx.with_request_id(RequestId(request_id)),
                ACT_ON_INSTANCE,
                ActOnInstance(instance_uuid=self.uuid, action=operation),
                address=host_address(self.host),
                timeout_seconds=5.0,
            )

    async def record(self) -> list[dict[str, Any]]:
        """Return what was asked of it, the latest first."""
        answer = await self.running.member.get(f"/servers/{self.uuid}/os-instance-actions")
        found: list[dict[str, Any]] = answer.json["instanceActions"]
        return found

    async def start_agent(self, settings: AgentSection | None = None) -> Agent:
        """Start its host's agent anew."""
        folder = self.running.folder
        return await self.running.app.start_agent(
            self.host,
            folder.transport(self.cell),
            settings or AgentSection(latency_seconds=0.0),
            journal=folder.journal(self.host),
        )


async def boot(running: Deployment) -> Server:
    """Make a server that runs."""
    uuid = await running.boot("s")
    await running.until_status(uuid, "ACTIVE")
    shown = (await running.admin.get(f"/servers/{uuid}")).json["server"]
    return Server(running, uuid, shown["OS-EXT-SRV-ATTR:host"])


@pytest.fixture
async def server(tmp_path: Path, databases: Urls) -> AsyncIterator[Server]:
    """A server that runs, in a deployment of one cell and one host."""
    async with deployment(tmp_path / "data", databases=databases, cells=1, hosts_per_cell=1, limits=PATIENT) as running:
        await running.make_flavor()
        yield await boot(running)


# ---- states ----------------------------------------------------------------------------------------------------


def test_every_operation_can_be_asked_for() -> None:
    """The tests below leave none out."""
    assert set(ASKED) == set(TRANSITIONS)


@pytest.mark.parametrize("operation", sorted(TRANSITIONS))
async def test_an_operation_leads_from_each_allowed_state_to_its_end(server: Server, operation: str) -> None:
    """Server and guest are what the table says, and the hypervisor did it once."""
    transition = TRANSITIONS[operation]
    for state in WAYS:
        if state in transition.allowed:
            await server.bring_to(state)
            before = len(server.done())
            assert await server.ask(operation) == 202
            await server.until(transition.becomes)
            guest = await server.driver.find(server.uuid)
            assert guest is not None
            assert guest.power_state == POWER[transition.becomes]
            assert server.done()[before:] == [operation]
            if transition.becomes != VmState.ACTIVE:
                assert await server.ask("hard_reboot") == 202
                await server.until(VmState.ACTIVE)


async def test_an_operation_is_refused_in_every_other_state(server: Server) -> None:
    """The answer is 409, and neither the server, nor its record, nor its guest changes."""
    recorded = await server.record()
    for state in STATUS:
        await server.set(vm_state=state.value)
        for operation, transition in TRANSITIONS.items():
            if state not in transition.allowed:
                assert await server.ask(operation) == 409, (state, operation)
        await server.until(state)
    assert await server.record() == recorded
    assert server.done() == []


async def test_a_busy_server_is_refused_but_for_a_hard_reboot(server: Server) -> None:
    """While something is being done only the way out is open, and not even that while it is being deleted."""
    await server.set(task_state="rebooting")
    for operation in set(TRANSITIONS) - {"hard_reboot"}:
        assert await server.ask(operation) == 409
    await server.set(task_state="deleting")
    assert await server.ask("hard_reboot") == 409
    await server.set(task_state="rebooting")
    assert await server.ask("hard_reboot") == 202
    await server.until(VmState.ACTIVE)
    assert server.done() == ["hard_reboot"]


async def test_a_locked_server_is_its_admins_alone(server: Server) -> None:
    """Its owner is refused every operation, an admin is not, and after unlocking the owner is not either."""
    member, admin = server.running.member, server.running.admin
    assert (await member.post(f"/servers/{server.uuid}/action", {"lock": None})).status == 202
    for operation in TRANSITIONS:
        assert await server.ask(operation) == 409
    assert (await member.delete(f"/servers/{server.uuid}")).status == 409
    assert server.done() == []
    assert await server.ask("stop", admin) == 202
    await server.until(VmState.STOPPED)
    assert (await member.post(f"/servers/{server.uuid}/action", {"unlock": None})).status == 202
    assert await server.ask("start") == 202
    await server.until(VmState.ACTIVE)


async def test_a_server_that_waits_for_its_host_takes_no_operation(tmp_path: Path, databases: Urls) -> None:
    """Accepted and not yet built it is there, and busy: 409, not 404."""
    async with deployment(tmp_path / "data", databases=databases, cells=1, hosts_per_cell=1, builder=False) as running:
        await running.make_flavor()
        waits = Server(running, await running.boot("s"), "cell1-h1")
        for operation in TRANSITIONS:
            assert await waits.ask(operation) == 409


# ---- messages --------------------------------------------------------------------------------------------------


async def test_an_order_that_is_repeated_has_one_effect(server: Server) -> None:
    """The same message again, during the action and after it, reboots nothing."""
    assert await server.ask("reboot") == 202
    request_id = (await server.record())[0]["request_id"]
    for _ in range(3):
        await server.send("reboot", request_id)
    await server.until(VmState.ACTIVE)
    for _ in range(3):
        await server.send("reboot", request_id)
    assert await server.ask("stop") == 202
    await server.until(VmState.STOPPED)
    assert server.done() == ["reboot", "stop"]


async def test_an_order_that_nobody_asked_for_has_none(server: Server) -> None:
    """A message without its record is refused by the conductor."""
    await server.send("stop", "req-forged")
    assert await server.ask("reboot") == 202
    await server.until(VmState.ACTIVE)
    assert server.done() == ["reboot"]


async def test_an_action_on_a_host_that_is_gone_is_refused_and_leaves_the_server_free(server: Server) -> None:
    """503, and once the host is back the next request works, and the refused one was never done."""
    await server.running.app.agents[server.host].aclose()
    assert await server.ask("stop") == 503
    await server.until(VmState.ACTIVE)
    assert (await server.record())[0]["message"] == "Error"
    await server.start_agent()
    assert await server.ask("pause") == 202
    await server.until(VmState.PAUSED)
    assert [one.operation for one in server.driver.operations] == ["pause"]


# ---- restarts --------------------------------------------------------------------------------------------------


async def test_an_action_that_waits_when_its_host_starts_is_done_then(server: Server) -> None:
    """The API recorded it and died before it sent it: the agent that registers does it, once."""
    await server.running.app.agents[server.host].aclose()

    def begin(tx: CellTx) -> str:
        return actions.begin(
            tx, server.uuid, "stop", request_id="req-1", user_id="u", project_id="p", may_override_lock=False
        )

    with server.running.targeted(server.cell) as cctx:
        await server.running.app.databases.on(cctx).write(begin)
    await server.start_agent()
    await server.until(VmState.STOPPED)
    await server.send("stop", "req-1")
    assert [one.operation for one in server.driver.operations] == ["stop"]
    assert (await server.record())[0]["message"] is None


async def test_an_action_that_was_cut_off_frees_the_server(server: Server) -> None:
    """The host died in the middle: the record ends in an error, the server can be used, and its guest runs."""
    await server.running.app.agents[server.host].aclose()
    await server.start_agent(SLOW)
    assert await server.ask("reboot") == 202

    async def begun() -> bool:
        request_id = (await server.record())[0]["request_id"]
        shown = await server.running.member.get(f"/servers/{server.uuid}/os-instance-actions/{request_id}")
        return bool(shown.json["instanceAction"]["events"])

    await server.running.until(begun)
    await server.running.app.agents[server.host].aclose()
    await server.start_agent()
    await server.until(VmState.ACTIVE)
    assert (await server.record())[0]["message"] == "Error"
    assert await server.ask("reboot") == 202
    await server.until(VmState.ACTIVE)
    assert [one.operation for one in server.driver.operations] == ["reboot"]
