"""The agent against a conductor double that speaks the real messages over a memory transport, in simulated time."""

import asyncio
import heapq
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from structlog import get_logger
from structlog.testing import capture_logs

from cellway.agent import build
from cellway.agent.agent import FROM_RUNNING, Agent
from cellway.agent.drivers import DriverError, FakeDriver, PowerState
from cellway.agent.jobs import Jobs
from cellway.config import AgentSection, Limits
from cellway.context import Consumer, RequestContext, service_context
from cellway.errors import CellwayError, Conflict, DeadlineExceeded, HostUnreachable, Invalid, NotFound
from cellway.ids import RandomIds, RequestId
from cellway.rpc.calls import (
    ACT_ON_INSTANCE,
    BUILD_INSTANCE,
    CONDUCTOR,
    DESTROY_INSTANCE,
    FINISH_ACTION,
    FINISH_BUILD,
    HOST_REPORT,
    INSTANCE_DESTROYED,
    REGISTER_HOST,
    START_ACTION,
    START_BUILD,
    ActOnInstance,
    AssignedInstance,
    BuildInstance,
    CastMethod,
    DestroyInstance,
    Done,
    FinishAction,
    FinishBuild,
    HostReport,
    InstanceDestroyed,
    Registered,
    RegisterHost,
    RequestT,
    StartAction,
    StartBuild,
    host_address,
)
from cellway.rpc.messaging import Handlers, cast, serve
from cellway.rpc.transport import MemoryBrokers, MemoryTransport

pytestmark = pytest.mark.anyio

HOST = "host1"
UUID = "7a1f2b5e-0000-4000-8000-000000000001"
OTHER = "7a1f2b5e-0000-4000-8000-000000000002"
LIMITS = Limits()
INSTANT = AgentSection(latency_seconds=0)
SLOW = AgentSection(latency_seconds=5)
RUNNING, PAUSED, SHUTDOWN, SUSPENDED = (
    PowerState.RUNNING,
    PowerState.PAUSED,
    PowerState.SHUTDOWN,
    PowerState.SUSPENDED,
)


class ManualClock:
    """A clock that a test moves; whoever sleeps wakes in the order of the times waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.asked_for: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def now(self) -> datetime:
        return datetime(2024, 1, 1) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.asked_for.append(seconds)
        awake = asyncio.Event()
        heapq.heappush(self._sleepers, (self.seconds + seconds, len(self.asked_for), awake))
        if seconds <= 0:
            heapq.heappop(self._sleepers)[2].set()
        await awake.wait()

    async def advance(self, seconds: float) -> None:
        """Move time on, and let everybody do what there is to do by then."""
        end = self.seconds + seconds
        await quiet()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.seconds, _, awake = heapq.heappop(self._sleepers)
            awake.set()
            await quiet()
        self.seconds = end


async def quiet() -> None:
    """Let every task go on until it waits for time, or for another process."""
    for _ in range(100):
        await asyncio.sleep(0)


@dataclass
class Server:
    """What the double keeps of a server."""

    instance: AssignedInstance
    started: tuple[int, int] = (0, 0)
    request_ids: set[str] = field(default_factory=set)


class ConductorDouble:
    """A conductor with a dictionary for a database. Its gates are as strict as the contract lets them be."""

    def __init__(self) -> None:
        self.epoch = 0
        self.knows_host = True
        self.servers: dict[str, Server] = {}
        self.requests: list[object] = []
        self.spoil: dict[type, list[CellwayError]] = {}
        """Errors that the next requests of a kind get after they have had their effect: an answer that is lost."""
        self.held: dict[type, asyncio.Event] = {}
        """What the next report of a host, or all reports of builds, wait for before they are looked at."""
        self._consumer: Consumer | None = None
        self._sequence = 0

    async def listen(self, transport: MemoryTransport) -> None:
        handlers = Handlers()
        handlers.on_call(REGISTER_HOST, self._register)
        handlers.on_call(HOST_REPORT, self._report)
        handlers.on_call(START_BUILD, self._start_build)
        handlers.on_call(FINISH_BUILD, self._finish_build)
        handlers.on_call(START_ACTION, self._start_action)
        handlers.on_call(FINISH_ACTION, self._finish_action)
        handlers.on_call(INSTANCE_DESTROYED, self._destroyed)
        self._consumer = await serve(transport, CONDUCTOR, handlers, LIMITS)

    async def leave(self) -> None:
        if self._consumer is not None:
            await self._consumer.aclose()

    def of(self, kind: type[RequestT]) -> list[RequestT]:
        """Return the requests of one kind, in the order in which they came."""
        return [request for request in self.requests if isinstance(request, kind)]

    def place(
        self,
        uuid: str = UUID,
        *,
        vm_state: str = "building",
        task_state: str | None = None,
        attempt: int = 1,
        action: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Put a server on the host."""
        self.servers[uuid] = Server(
            AssignedInstance(
                instance_uuid=uuid,
                name="web",
                vm_state=vm_state,
                task_state=task_state,
                attempt=attempt,
                vcpus=1,
                memory_mb=64,
                disk_gb=1,
                action=action,
                request_id=request_id,
            )
        )

    def change(self, uuid: str, **values: object) -> None:
        server = self.servers[uuid]
        server.instance = msgspec.structs.replace(server.instance, **values)

    def vm_state(self, uuid: str = UUID) -> str:
        return self.servers[uuid].instance.vm_state

    def _answer(self, request: object, accepted: bool) -> Done:
        self.requests.append(request)
        if errors := self.spoil.get(type(request)):
            raise errors.pop(0)
        return Done(accepted=accepted)

    def _current(self, epoch: int, uuid: str) -> Server | None:
        return self.servers.get(uuid) if epoch == self.epoch else None

    async def _register(self, ctx: RequestContext, request: RegisterHost) -> Registered:
        self.knows_host = True
        self.epoch += 1
        self._sequence = 0
        self._answer(request, True)
        return Registered(epoch=self.epoch, instances=tuple(server.instance for server in self.servers.values()))

    async def _report(self, ctx: RequestContext, request: HostReport) -> Done:
        if event := self.held.pop(HostReport, None):
            await event.wait()
        if not self.knows_host:
            self.requests.append(request)
            raise NotFound("host.not_found", "The host is not registered")
        accepted = request.epoch == self.epoch and request.sequence > self._sequence
        if accepted:
            self._sequence = request.sequence
        return self._answer(request, accepted)

    async def _start_build(self, ctx: RequestContext, request: StartBuild) -> Done:
        server = self._current(request.epoch, request.instance_uuid)
        this = (request.epoch, request.attempt)
        accepted = (
            server is not None
            and server.instance.vm_state == "building"
            and server.instance.attempt == request.attempt
            and server.started != this
        )
        if accepted and server is not None:
            server.started = this
        return self._answer(request, accepted)

    async def _finish_build(self, ctx: RequestContext, request: FinishBuild) -> Done:
        if event := self.held.get(FinishBuild):
            await event.wait()
        server = self._current(request.epoch, request.instance_uuid)
        accepted = server is not None and server.instance.attempt == request.attempt
        if accepted and request.failure is None:
            self.change(request.instance_uuid, vm_state="active")
        return self._answer(request, accepted)

    async def _start_action(self, ctx: RequestContext, request: StartAction) -> Done:
        server = self._current(request.epoch, request.instance_uuid)
        accepted = server is not None and request.request_id not in server.request_ids
        if accepted and server is not None:
            server.request_ids.add(request.request_id)
        return self._answer(request, accepted)

    async def _finish_action(self, ctx: RequestContext, request: FinishAction) -> Done:
        return self._answer(request, self._current(request.epoch, request.instance_uuid) is not None)

    async def _destroyed(self, ctx: RequestContext, request: InstanceDestroyed) -> Done:
        return self._answer(request, self.servers.pop(request.instance_uuid, None) is not None)


class CountingDriver(FakeDriver):
    """A simulated hypervisor that fails as often as a test says, per operation."""

    def __init__(self, settings: AgentSection, clock: ManualClock, journal: Path | None) -> None:
        super().__init__(HOST, settings, clock=clock, randomness=random.Random(1), journal=journal)
        self.failures: dict[str, int] = {}

    def effects(self, uuid: str = UUID) -> list[str]:
        return [done.operation for done in self.operations if done.instance_uuid == uuid]

    async def destroy(self, instance_uuid: str) -> None:
        self._fail("destroy")
        await super().destroy(instance_uuid)

    async def stop(self, instance_uuid: str) -> None:
        self._fail("stop")
        await super().stop(instance_uuid)

    def _fail(self, operation: str) -> None:
        if self.failures.get(operation, 0) > 0:
            self.failures[operation] -= 1
            raise DriverError("The hypervisor is tired.")


class World:
    """One cell's queue, its conductor, one host's hypervisor, and agents for it."""

    def __init__(self, settings: AgentSection = INSTANT, journal: Path | None = None) -> None:
        self.clock = ManualClock()
        self.brokers = MemoryBrokers()
        self.conductor = ConductorDouble()
        self.driver = CountingDriver(settings, self.clock, journal)
        self.transport = MemoryTransport(self.brokers, "cell1", LIMITS)

    def agent(self) -> Agent:
        return Agent(HOST, self.driver, self.transport, limits=LIMITS, clock=self.clock, ids=RandomIds())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Agent]:
        """Start an agent, and close it in the end."""
        agent = self.agent()
        await agent.start()
        await quiet()
        try:
            yield agent
        finally:
            await agent.aclose()

    async def send(self, method: CastMethod[RequestT], request: RequestT, request_id: str = "req-1") -> None:
        """Cast an order to the host, and let it be carried out as far as it goes without time passing."""
        ctx = replace(service_context(RequestId(request_id)), mq_connection=self.transport)
        await cast(ctx, method, request, address=host_address(HOST), timeout_seconds=1)
        await quiet()

    async def order_build(self, uuid: str = UUID, attempt: int = 1) -> None:
        request = BuildInstance(instance_uuid=uuid, attempt=attempt, name="web", vcpus=1, memory_mb=64, disk_gb=1)
        await self.send(BUILD_INSTANCE, request)

    async def order_action(self, action: str, request_id: str = "req-1") -> None:
        await self.send(ACT_ON_INSTANCE, ActOnInstance(instance_uuid=UUID, action=action), request_id)

    async def order_destroy(self, attempt: int | None = None) -> None:
        await self.send(DESTROY_INSTANCE, DestroyInstance(instance_uuid=UUID, attempt=attempt))

    async def spawn(self, uuid: str = UUID, attempt: int = 1) -> None:
        """Make a guest without an agent."""
        task = asyncio.ensure_future(
            self.driver.spawn(uuid, name="web", vcpus=1, memory_mb=64, disk_gb=1, attempt=attempt)
        )
        await self.clock.advance(10)
        await task

    async def guests(self) -> dict[str, tuple[PowerState, int]]:
        """Return power state and attempt of each guest."""
        return {uuid: (guest.power_state, guest.attempt) for uuid, guest in (await self.driver.inventory()).items()}


@pytest.fixture
async def world() -> World:
    """A host whose operations take no time, and a conductor that listens."""
    world = World()
    await world.conductor.listen(world.transport)
    return world


@pytest.fixture
async def slow_world() -> World:
    """A host whose operations take five seconds, and a conductor that listens."""
    world = World(SLOW)
    await world.conductor.listen(world.transport)
    return world


# ---- registration and heartbeat ------------------------------------------------------------------------------------


async def test_an_agent_registers_and_reports_what_its_driver_uses(world: World) -> None:
    """An agent registers once, then reports at each beat, with its epoch and a growing sequence."""
    world.conductor.place(UUID, vm_state="active")
    world.conductor.place(OTHER, vm_state="stopped")
    async with world.running():
        await world.clock.advance(3 * LIMITS.heartbeat_seconds)
        assert [request.host for request in world.conductor.of(RegisterHost)] == [HOST]
        reports = world.conductor.of(HostReport)
        assert [report.epoch for report in reports] == [1, 1, 1, 1]
        assert [report.sequence for report in reports] == sorted({report.sequence for report in reports})
        last = reports[-1]
        assert (last.running, last.vcpus_used, last.memory_mb_used, last.disk_gb_used) == (1, 2, 128, 2)


async def test_a_second_agent_of_a_host_is_refused_before_it_registers(world: World) -> None:
    """A second agent for a host that is served gets a Conflict, and the first keeps its epoch."""
    async with world.running():
        with pytest.raises(Conflict):
            await world.agent().start()
        await world.clock.advance(LIMITS.heartbeat_seconds)
        assert world.conductor.epoch == 1
        assert len(world.conductor.of(RegisterHost)) == 1


async def test_orders_wait_until_the_host_is_registered() -> None:
    """An agent waits for its conductor with growing pauses; an order that comes meanwhile is carried out then."""
    world = World()
    agent = world.agent()
    world.conductor.place(UUID)
    starting = asyncio.ensure_future(agent.start())
    with capture_logs() as logs:
        await world.clock.advance(60)
        await world.order_build()
        assert not starting.done()
        await world.conductor.listen(world.transport)
        await world.clock.advance(LIMITS.heartbeat_seconds)
    await starting
    assert world.conductor.vm_state() == "active"
    assert [line["event"] for line in logs].count("conductor_silent") == 1
    pauses = world.clock.asked_for
    assert pauses[0] < 0.5 < 4 < pauses[6] <= LIMITS.heartbeat_seconds
    await agent.aclose()


async def test_a_start_that_is_cancelled_gives_the_address_back() -> None:
    """An agent that is stopped while it waits for its conductor leaves the address, and the messages, to the next."""
    world = World()
    world.conductor.place(UUID)
    starting = asyncio.ensure_future(world.agent().start())
    await quiet()
    await world.order_build()
    starting.cancel()
    await asyncio.wait({starting})
    with pytest.raises(HostUnreachable):
        await world.order_build()
    await world.conductor.listen(world.transport)
    async with world.running():
        await quiet()
        assert world.conductor.vm_state() == "active"


async def test_an_outage_is_logged_once_and_tried_by_one_question_at_a_time(world: World) -> None:
    """However many builds wait for a silent conductor, it is tried at the pace of one; all go on when it is back."""
    uuids = [f"{number}" for number in range(12)]
    for uuid in uuids:
        world.conductor.place(uuid)
    async with world.running():
        await world.conductor.leave()
        await world.clock.advance(LIMITS.heartbeat_seconds)
        world.clock.asked_for.clear()
        with capture_logs() as logs:
            for uuid in uuids:
                await world.order_build(uuid)
            await world.clock.advance(60)
            assert len(world.clock.asked_for) < 20
            await world.conductor.listen(world.transport)
            await world.clock.advance(LIMITS.heartbeat_seconds)
        assert {world.conductor.vm_state(uuid) for uuid in uuids} == {"active"}
        events = [line["event"] for line in logs]
        assert events.count("conductor_silent") == 0
        assert events.count("conductor_answers") == 1


async def test_questions_that_fail_side_by_side_count_once(world: World) -> None:
    """Twelve answers lost together are one silence: after another the pause is still short, and all are asked again."""
    uuids = [f"{number}" for number in range(12)]
    for uuid in uuids:
        world.conductor.place(uuid)
    world.conductor.spoil[FinishBuild] = [DeadlineExceeded("x", "x") for _ in range(13)]
    go = world.conductor.held[FinishBuild] = asyncio.Event()
    async with world.running():
        for uuid in uuids:
            await world.order_build(uuid)
        go.set()
        await quiet()
        assert len(world.conductor.of(FinishBuild)) == 12
        await world.clock.advance(1)
        assert len(world.conductor.of(FinishBuild)) == 25


async def test_a_question_that_fails_over_there_stops_no_other(world: World) -> None:
    """A build whose report the conductor cannot handle is reported again later; another goes through meanwhile."""
    world.conductor.place(UUID)
    world.conductor.place(OTHER)
    world.conductor.spoil[FinishBuild] = [Invalid("x", "x")]
    async with world.running():
        await world.order_build(UUID)
        await world.order_build(OTHER)
        assert [report.instance_uuid for report in world.conductor.of(FinishBuild)] == [UUID, OTHER]
        await world.clock.advance(LIMITS.heartbeat_seconds)
        assert [report.instance_uuid for report in world.conductor.of(FinishBuild)] == [UUID, OTHER, UUID]


async def test_a_host_that_the_conductor_forgot_registers_again(world: World) -> None:
    """When the conductor says that it does not know the host, the agent registers and reports under the new epoch."""
    async with world.running():
        world.conductor.knows_host = False
        await world.clock.advance(2 * LIMITS.heartbeat_seconds)
        assert len(world.conductor.of(RegisterHost)) == 2
        assert world.conductor.of(HostReport)[-1].epoch == 2
        world.conductor.place(UUID)
        await world.order_build()
        assert world.conductor.vm_state() == "active"


async def test_registering_again_leaves_what_is_in_hand_alone(slow_world: World) -> None:
    """A build in hand while the host is registered anew is neither taken for a stranger nor done twice."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running():
        await world.clock.advance(LIMITS.heartbeat_seconds - 2)
        await world.order_build()
        world.conductor.knows_host = False
        await world.clock.advance(2)
        assert world.conductor.epoch == 2
        await world.clock.advance(5)
        assert world.driver.effects() == ["spawn"]
        assert world.conductor.vm_state() == "active"


async def test_registering_again_brings_nothing_back_that_is_being_deleted(slow_world: World) -> None:
    """A server that the conductor still lists while its deletion is in hand stays deleted."""
    world = slow_world
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    async with world.running():
        await world.clock.advance(LIMITS.heartbeat_seconds - 2)
        await world.order_destroy()
        world.conductor.knows_host = False
        await world.clock.advance(20)
        assert world.conductor.epoch == 2
        assert world.driver.effects() == ["spawn", "destroy"]


async def test_an_agent_whose_place_is_taken_stops_and_touches_nothing(slow_world: World) -> None:
    """An agent that hears of a newer epoch lets go: no guest is destroyed, the address is free, it says why."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running() as agent:
        await world.order_build()
        world.conductor.epoch += 1
        with capture_logs() as logs:
            await world.clock.advance(5)
            assert "build_left_to_newer_agent" in [line["event"] for line in logs]
            await world.clock.advance(LIMITS.heartbeat_seconds)
        assert "agent_superseded" in [line["event"] for line in logs]
        with pytest.raises(Conflict):
            await agent.wait()
        assert world.driver.effects() == ["spawn"]
        with pytest.raises(HostUnreachable):
            await world.order_build()


async def test_a_host_whose_driver_fails_sends_no_report(world: World) -> None:
    """A hypervisor that does not answer makes the host silent, not the agent dead."""

    class Silent(CountingDriver):
        silent = False

        async def inventory(self):  # type: ignore[no-untyped-def]
            if self.silent:
                raise DriverError("The hypervisor does not answer.")
            return await super().inventory()

    driver = world.driver = Silent(INSTANT, world.clock, None)
    async with world.running():
        before = len(world.conductor.of(HostReport))
        driver.silent = True
        await world.clock.advance(2 * LIMITS.heartbeat_seconds)
        assert len(world.conductor.of(HostReport)) == before
        driver.silent = False
        await world.clock.advance(LIMITS.heartbeat_seconds)
        assert len(world.conductor.of(HostReport)) == before + 1


# ---- builds --------------------------------------------------------------------------------------------------------


async def test_a_build_has_its_effect_once_however_often_it_is_sent(slow_world: World) -> None:
    """A build order sent before, while and after it is carried out spawns one guest and is reported once."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running():
        for _ in range(3):
            await world.order_build()
        await world.clock.advance(2)
        await world.order_build()
        assert len(world.conductor.of(StartBuild)) == 1
        await world.clock.advance(20)
        await world.order_build()
        await world.clock.advance(20)
        assert world.driver.effects() == ["spawn"]
        assert [report.failure for report in world.conductor.of(FinishBuild)] == [None]
        assert await world.guests() == {UUID: (RUNNING, 1)}


async def test_a_build_that_the_conductor_refuses_has_no_effect(world: World) -> None:
    """An order for an attempt that does not count any more does nothing."""
    world.conductor.place(UUID, attempt=2)
    async with world.running():
        await world.order_build(attempt=1)
        await world.order_build(OTHER)
        assert len(world.conductor.of(StartBuild)) == 2
        assert not world.driver.operations


async def test_a_failed_build_is_reported_with_its_sentence(world: World) -> None:
    """When the driver fails, the conductor hears why, and nothing is left on the host."""
    world.driver = CountingDriver(AgentSection(latency_seconds=0, failure_rate=1.0), world.clock, None)
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        (report,) = world.conductor.of(FinishBuild)
        assert report.failure is not None
        assert report.failure.endswith(".")
        assert await world.guests() == {}


async def test_a_late_builder_destroys_what_it_built(slow_world: World) -> None:
    """An attempt that was overtaken while it was being built is refused in the end, and its guest removed."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        world.conductor.change(UUID, attempt=2)
        await world.clock.advance(20)
        assert world.driver.effects() == ["spawn", "destroy"]
        assert await world.guests() == {}


async def test_a_lost_answer_to_the_report_loses_no_guest(world: World) -> None:
    """A report whose answer is lost is sent again with a higher sequence, until it is answered."""
    world.conductor.place(UUID)
    world.conductor.spoil[FinishBuild] = [DeadlineExceeded("x", "x"), DeadlineExceeded("x", "x")]
    async with world.running():
        await world.order_build()
        await world.clock.advance(2)
        sequences = [report.sequence for report in world.conductor.of(FinishBuild)]
        assert len(sequences) == 3
        assert sequences == sorted(set(sequences))
        assert await world.guests() == {UUID: (RUNNING, 1)}


async def test_a_build_that_the_conductor_knows_nothing_of_is_undone(world: World) -> None:
    """A report about what the conductor does not know is a refused one: the guest goes."""
    world.conductor.place(UUID)
    world.conductor.spoil[FinishBuild] = [NotFound("host.not_found", "The host is not registered")]
    async with world.running():
        await world.order_build()
        assert world.driver.effects() == ["spawn", "destroy"]


async def test_a_report_is_never_overtaken_by_the_agents_own_next_one(world: World) -> None:
    """A slow heartbeat and a refused build together do not look like a second agent."""
    world.conductor.place(UUID)
    async with world.running():
        go = world.conductor.held[HostReport] = asyncio.Event()
        await world.clock.advance(LIMITS.heartbeat_seconds)
        world.conductor.spoil[FinishBuild] = [NotFound("instance.not_found", "No such server")]
        await world.order_build()
        go.set()
        await world.clock.advance(LIMITS.heartbeat_seconds)
        assert world.driver.effects() == ["spawn", "destroy"]
        sequences = [report.sequence for report in world.conductor.of(HostReport)]
        assert sequences == sorted(sequences)
        assert len(sequences) == 4


async def test_a_guest_of_an_older_attempt_makes_way(world: World) -> None:
    """A build that may start replaces what an earlier attempt left on the host."""
    await world.spawn(attempt=1)
    world.conductor.place(UUID, attempt=2)
    async with world.running():
        await world.order_build(attempt=2)
        assert world.driver.effects() == ["spawn", "destroy", "spawn"]
        assert await world.guests() == {UUID: (RUNNING, 2)}
        assert world.conductor.vm_state() == "active"


async def test_a_higher_attempt_overtakes_a_lower_one_in_hand(slow_world: World) -> None:
    """A higher attempt for the same host cancels the lower one that is being built."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build(attempt=1)
        world.conductor.change(UUID, attempt=2)
        await world.order_build(attempt=2)
        await world.order_build(attempt=1)
        await world.clock.advance(20)
        assert world.driver.effects() == ["spawn"]
        assert [report.attempt for report in world.conductor.of(FinishBuild)] == [2]
        assert await world.guests() == {UUID: (RUNNING, 2)}


# ---- actions -------------------------------------------------------------------------------------------------------


async def test_an_action_has_its_effect_once_however_often_it_is_sent(slow_world: World) -> None:
    """An action sent before, while and after it is carried out has one effect and one report, with the power state."""
    world = slow_world
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    async with world.running():
        for _ in range(3):
            await world.order_action("reboot")
        await world.clock.advance(20)
        await world.order_action("reboot")
        await world.clock.advance(20)
        assert world.driver.effects() == ["spawn", "reboot"]
        await world.order_action("stop", "req-2")
        await world.clock.advance(20)
        reports = world.conductor.of(FinishAction)
        assert [(report.request_id, report.action, report.power_state, report.failure) for report in reports] == [
            ("req-1", "reboot", 1, None),
            ("req-2", "stop", 4, None),
        ]


@pytest.mark.parametrize(
    ("before", "action", "after"),
    [
        ((), "stop", SHUTDOWN),
        (("stop",), "start", RUNNING),
        ((), "reboot", RUNNING),
        (("stop",), "hard_reboot", RUNNING),
        ((), "pause", PAUSED),
        (("pause",), "unpause", RUNNING),
        ((), "suspend", SUSPENDED),
        (("suspend",), "resume", RUNNING),
    ],
)
async def test_each_action_is_the_driver_operation_of_its_name(
    world: World, before: tuple[str, ...], action: str, after: PowerState
) -> None:
    """Every action of the contract reaches the driver, and its power state the conductor."""
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        for number, step in enumerate((*before, action)):
            await world.order_action(step, f"req-{number}")
        assert world.driver.effects() == ["spawn", *before, action]
        assert world.conductor.of(FinishAction)[-1].power_state == after


@pytest.mark.parametrize("action", ["unpause", "levitate"])
async def test_an_action_that_cannot_be_done_is_reported_with_its_sentence(world: World, action: str) -> None:
    """An action that the driver refuses, or that nobody knows, fails with a sentence and the power state as it is."""
    await world.spawn()
    await world.driver.stop(UUID)
    world.conductor.place(UUID, vm_state="stopped")
    async with world.running():
        await world.order_action(action)
        (report,) = world.conductor.of(FinishAction)
        assert report.power_state == 4
        assert report.failure is not None
        assert report.failure.endswith(".")


async def test_actions_on_one_instance_run_one_after_another(slow_world: World) -> None:
    """Orders for one instance are carried out in the order in which they came, never side by side."""
    world = slow_world
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    async with world.running():
        for number, action in enumerate(("stop", "start", "pause", "unpause")):
            await world.order_action(action, f"req-{number}")
        await world.clock.advance(11)
        assert world.driver.effects() == ["spawn", "stop", "start"]
        await world.clock.advance(11)
        assert world.driver.effects() == ["spawn", "stop", "start", "pause", "unpause"]


async def test_an_order_outlives_the_conductors_absence(world: World) -> None:
    """An action that arrives while the conductor is away is carried out when it is back."""
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    async with world.running():
        await world.conductor.leave()
        await world.order_action("stop")
        await world.clock.advance(30)
        assert world.driver.effects() == ["spawn"]
        await world.conductor.listen(world.transport)
        await world.clock.advance(LIMITS.heartbeat_seconds)
        assert world.driver.effects() == ["spawn", "stop"]


# ---- deletion ------------------------------------------------------------------------------------------------------


async def test_a_deletion_is_reported_whether_or_not_the_guest_is_there(world: World) -> None:
    """A delete order removes the guest once and is confirmed each time it comes."""
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        await world.order_destroy()
        await world.order_destroy()
        assert world.driver.effects() == ["spawn", "destroy"]
        assert [report.instance_uuid for report in world.conductor.of(InstanceDestroyed)] == [UUID, UUID]


async def test_a_deletion_that_fails_is_not_reported(world: World) -> None:
    """A guest that the driver could not remove is not called destroyed; the next order tries again."""
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        world.driver.failures["destroy"] = 1
        await world.order_destroy()
        assert world.conductor.of(InstanceDestroyed) == []
        await world.order_destroy()
        assert len(world.conductor.of(InstanceDestroyed)) == 1
        assert await world.guests() == {}


@pytest.mark.parametrize(("built", "withdrawn", "stays"), [(1, 1, False), (1, 2, False), (2, 1, True)])
async def test_only_the_remains_of_a_withdrawn_attempt_are_removed(
    world: World, built: int, withdrawn: int, stays: bool
) -> None:
    """Withdrawing an attempt removes a guest of it or of an older one, never a newer one, and reports nothing."""
    world.conductor.place(UUID, attempt=built)
    async with world.running():
        await world.order_build(attempt=built)
        await world.order_destroy(attempt=withdrawn)
        assert (UUID in await world.guests()) is stays
        assert world.conductor.of(InstanceDestroyed) == []


@pytest.mark.parametrize("attempt", [None, 1])
async def test_a_running_build_is_cancelled(slow_world: World, attempt: int | None) -> None:
    """A delete order, or the withdrawal of the attempt, ends a build in hand without waiting for it."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running():
        await world.order_build()
        await world.clock.advance(4)
        await world.order_destroy(attempt)
        await world.clock.advance(20)
        assert world.driver.effects() == []
        assert world.conductor.of(FinishBuild) == []
        assert len(world.conductor.of(InstanceDestroyed)) == (attempt is None)


async def test_withdrawing_an_older_attempt_leaves_the_running_build(slow_world: World) -> None:
    """A late withdrawal of attempt 1 does not touch attempt 2 that is being built."""
    world = slow_world
    world.conductor.place(UUID, attempt=2)
    async with world.running():
        await world.order_build(attempt=2)
        await world.order_destroy(attempt=1)
        await world.clock.advance(20)
        assert await world.guests() == {UUID: (RUNNING, 2)}


async def test_a_deletion_ends_an_action_in_hand(slow_world: World) -> None:
    """A delete order does not wait for an action, and an action that waits is not begun."""
    world = slow_world
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    async with world.running():
        await world.order_action("stop", "req-1")
        await world.order_action("start", "req-2")
        await world.order_destroy()
        await world.clock.advance(5)
        assert world.driver.effects() == ["spawn", "destroy"]
        assert UUID not in world.conductor.servers


# ---- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [None, RUNNING, PAUSED, SHUTDOWN, SUSPENDED])
@pytest.mark.parametrize(
    ("vm_state", "wanted"), [("active", RUNNING), ("paused", PAUSED), ("stopped", SHUTDOWN), ("suspended", SUSPENDED)]
)
async def test_a_restart_makes_the_host_what_the_conductor_says(
    world: World, vm_state: str, wanted: PowerState, present: PowerState | None
) -> None:
    """Whatever a guest did, and if it was lost, a start makes it do what its server's state says, in two steps."""
    if present is not None:
        await world.spawn(attempt=3)
    if present is not None and present in FROM_RUNNING:
        await getattr(world.driver, FROM_RUNNING[present])(UUID)
    world.driver.operations.clear()
    world.conductor.place(UUID, vm_state=vm_state, attempt=3)
    async with world.running():
        assert await world.guests() == {UUID: (wanted, 3)}
        assert len(world.driver.effects()) <= 2
        assert (world.driver.effects() == []) is (present == wanted)


async def test_strangers_are_destroyed_and_unfinished_builds_left_alone(world: World) -> None:
    """A start destroys guests that the conductor does not place here, and waits with builds and failed servers."""
    for uuid in (UUID, OTHER, "stranger"):
        await world.spawn(uuid)
    world.conductor.place(UUID, vm_state="building")
    world.conductor.place(OTHER, vm_state="error")
    world.conductor.place("lost", vm_state="error")
    async with world.running():
        assert set(await world.guests()) == {UUID, OTHER}
        assert world.conductor.of(InstanceDestroyed) == []


async def test_a_server_in_the_middle_of_something_is_left_to_whoever_began_it(world: World) -> None:
    """A start does not bring back a guest whose server is being deleted."""
    world.conductor.place(UUID, vm_state="active", task_state="deleting")
    async with world.running():
        assert await world.guests() == {}


async def test_an_action_recorded_while_nobody_listened_is_carried_out_once(world: World) -> None:
    """A start carries out the recorded action under its own request id; the message that comes late does nothing."""
    await world.spawn()
    world.conductor.place(UUID, vm_state="active", task_state="powering-off", action="stop", request_id="req-7")
    async with world.running():
        await world.order_action("stop", "req-7")
        assert world.driver.effects() == ["spawn", "stop"]
        (report,) = world.conductor.of(FinishAction)
        assert (report.request_id, report.action, report.power_state) == ("req-7", "stop", 4)


async def test_one_server_that_cannot_be_restored_stops_no_other(world: World) -> None:
    """A driver's failure for one server leaves the others to be restored, and the recorded action to be reported."""
    await world.spawn(UUID)
    await world.spawn(OTHER)
    world.driver.failures["stop"] = 1
    world.conductor.place(UUID, vm_state="stopped")
    world.conductor.place(OTHER, vm_state="stopped")
    async with world.running():
        states = {uuid: state for uuid, (state, _) in (await world.guests()).items()}
        assert states == {UUID: RUNNING, OTHER: SHUTDOWN}


async def test_a_build_whose_report_was_never_sent_is_finished_by_the_next_agent(tmp_path: Path) -> None:
    """An agent that is killed between spawning and reporting loses nothing: the same attempt sent again finishes it."""
    journal = tmp_path / "journal"
    killed = World(journal=journal)
    await killed.spawn(attempt=1)
    world = World(journal=journal)
    world.conductor.place(UUID, attempt=1)
    await world.conductor.listen(world.transport)
    async with world.running():
        await world.order_build(attempt=1)
        assert world.driver.effects() == []
        assert world.conductor.vm_state() == "active"
        assert await world.guests() == {UUID: (RUNNING, 1)}


async def test_closing_finishes_what_is_in_hand(slow_world: World) -> None:
    """A build in hand is finished and reported before the agent is closed."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running() as agent:
        await world.order_build()
        closing = asyncio.ensure_future(agent.aclose())
        await world.clock.advance(5)
        await closing
        await agent.wait()
        assert world.conductor.vm_state() == "active"


async def test_closing_leaves_to_the_next_agent_what_takes_too_long(world: World) -> None:
    """An order that cannot be finished within the grace goes back to the queue, and the next agent carries it out."""
    await world.spawn()
    world.conductor.place(UUID, vm_state="active")
    hasty = replace(LIMITS, rpc_timeout_seconds=0.01)
    transport = MemoryTransport(world.brokers, "cell1", hasty)
    agent = Agent(HOST, world.driver, transport, limits=hasty, clock=world.clock, ids=RandomIds())
    await agent.start()
    await world.conductor.leave()
    await world.order_action("stop")
    await agent.aclose()
    assert world.driver.effects() == ["spawn"]
    await world.conductor.listen(world.transport)
    async with world.running():
        await world.clock.advance(1)
        assert world.driver.effects() == ["spawn", "stop"]
        assert len(world.conductor.of(FinishAction)) == 1


async def test_what_a_superseded_agent_had_in_hand_is_the_next_ones(slow_world: World) -> None:
    """An agent that stops by itself gives its unfinished orders back to the queue: nobody has to send them again."""
    world = slow_world
    world.conductor.place(UUID)
    async with world.running() as agent:
        await world.clock.advance(LIMITS.heartbeat_seconds - 2)
        await world.order_build()
        world.conductor.epoch += 1
        await world.clock.advance(2)
        with pytest.raises(Conflict):
            await agent.wait()
    assert world.driver.effects() == []
    async with world.running():
        await world.clock.advance(5)
        assert world.driver.effects() == ["spawn"]
        assert world.conductor.vm_state() == "active"


async def test_build_makes_an_agent_with_a_journal(tmp_path: Path) -> None:
    """The package's `build` gives a whole simulated host whose guests are in its journal."""
    world = World()
    world.conductor.place(UUID)
    await world.conductor.listen(world.transport)
    journal = tmp_path / "journal"
    agent = build(HOST, world.transport, INSTANT, limits=LIMITS, clock=world.clock, ids=RandomIds(), journal=journal)
    await agent.start()
    await world.order_build()
    await agent.aclose()
    assert UUID in journal.read_text()


# ---- jobs ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_kept_of_an_instance_without_orders() -> None:
    """Jobs of different instances run side by side, a failing one is logged, and the books are empty in the end."""

    def order(uuid: str) -> ActOnInstance:
        return ActOnInstance(instance_uuid=uuid, action="stop")

    begun: list[str] = []
    go = asyncio.Event()

    async def run(ctx: RequestContext, order: object, log: object) -> None:
        assert isinstance(order, ActOnInstance)
        begun.append(order.instance_uuid)
        await go.wait()
        if order.instance_uuid == "3":
            raise ValueError("a mistake")

    jobs = Jobs(run, get_logger())
    ctx = service_context(RequestId("req-1"))
    for number in range(10):
        assert jobs.begin(ctx, order(f"{number}")) is not None
        assert jobs.begin(ctx, order(f"{number}")) is None
        assert jobs.begin(ctx.with_request_id(RequestId("req-2")), order(f"{number}")) is not None
    await quiet()
    assert begun == [f"{number}" for number in range(10)]
    with capture_logs() as logs:
        go.set()
        await jobs.settle()
        await quiet()
    assert len(begun) == 20
    assert jobs.instances() == frozenset()
    assert [line["instance_uuid"] for line in logs if line["event"] == "job_failed"] == ["3", "3"]
