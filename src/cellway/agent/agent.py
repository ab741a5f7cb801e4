"""One agent per host: it takes orders from its cell's queue, drives the hypervisor, and reports to the conductor.

`app` starts and closes agents (through `build` of this package). An agent decides nothing: before each build and each
action it asks the conductor, whose conditional write says whether the order still counts, so an order that arrives
late, twice or after a newer one has no second effect. It knows no database and no other cell.

Jobs (`jobs.py`) run one after another for each instance; questions to the conductor (`asking.py`) are repeated until
they are answered.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, assert_never

import structlog

from cellway.agent.asking import Conductor
from cellway.agent.drivers import Driver, DriverError, PowerState
from cellway.agent.jobs import Jobs, Log, Order
from cellway.config import Limits
from cellway.context import Clock, Consumer, RequestContext, Transport, service_context
from cellway.errors import Conflict, NotFound
from cellway.ids import IdSource, RequestId
from cellway.rpc.calls import (
    ACT_ON_INSTANCE,
    BUILD_INSTANCE,
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
    CallMethod,
    DestroyInstance,
    Done,
    FinishAction,
    FinishBuild,
    HostReport,
    InstanceDestroyed,
    RegisterHost,
    RequestT,
    StartAction,
    StartBuild,
    host_address,
)
from cellway.rpc.messaging import Handlers, serve

POWER_STATE_OF: Final[Mapping[str, PowerState]] = {
    "active": PowerState.RUNNING,
    "paused": PowerState.PAUSED,
    "stopped": PowerState.SHUTDOWN,
    "suspended": PowerState.SUSPENDED,
}
"""What a guest does when its server is in one of these vm_states; in any other it is left alone."""

TO_RUNNING: Final[Mapping[PowerState, str]] = {
    PowerState.NOSTATE: "start",
    PowerState.PAUSED: "unpause",
    PowerState.SHUTDOWN: "start",
    PowerState.SUSPENDED: "resume",
}
FROM_RUNNING: Final[Mapping[PowerState, str]] = {
    PowerState.PAUSED: "pause",
    PowerState.SHUTDOWN: "stop",
    PowerState.SUSPENDED: "suspend",
}
"""Two steps lead from any power state to any other, through a running guest."""


class Agent:
    """The agent of one host.

    Neither it nor its driver is shared: a second agent for the host is refused while the first one listens, and one
    that lost its place while it was paused or cut off stops by itself.
    """

    def __init__(
        self, host: str, driver: Driver, transport: Transport, *, limits: Limits, clock: Clock, ids: IdSource
    ) -> None:
        self._host = host
        self.driver = driver
        self._transport = transport
        self._limits = limits
        self._clock = clock
        self._ids = ids
        self._log: Log = structlog.get_logger().bind(host=host)
        self._conductor = Conductor(limits, clock, random.Random(ids.uuid()), self._log)
        self._jobs = Jobs(self._carry_out, self._log)
        self._epoch = 0
        self._sequence = 0
        self._reporting = asyncio.Lock()
        self._restoring = asyncio.Semaphore(limits.consumer_concurrency)
        self._consumer: Consumer | None = None
        self._open: asyncio.Future[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self._letting_go = False

    # ---- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, register with the conductor (waiting until it answers), and begin to restore the host's servers.

        It listens first, so that a second agent is refused before it takes the host's epoch; orders wait until the
        host is registered.

        Raises: Conflict when an agent of this host listens already; CellHasNoQueue; Unavailable; DriverError.
        """
        handlers = Handlers()
        handlers.on_cast(BUILD_INSTANCE, self._receive)
        handlers.on_cast(ACT_ON_INSTANCE, self._receive)
        handlers.on_cast(DESTROY_INSTANCE, self._receive)
        self._open = asyncio.get_running_loop().create_future()
        self._consumer = await serve(self._transport, host_address(self._host), handlers, self._limits)
        try:
            await self._register()
        except BaseException:
            await self._let_go()
            raise
        self._life = asyncio.create_task(self._live())

    async def wait(self) -> None:
        """Wait until the agent has stopped, by `aclose` or by itself.

        Raises: Conflict when a newer agent has taken the host; whatever else ended it.
        """
        assert self._life is not None
        await asyncio.wait({self._life})
        if not self._life.cancelled():
            self._life.result()

    async def aclose(self) -> None:
        """Stop taking orders, finish those in hand within `Limits.rpc_timeout_seconds`, and stop.

        What is cancelled then is finished by the next start: the conductor knows what was begun.
        """
        if self._life is None or self._consumer is None:
            return
        await asyncio.gather(self._consumer.aclose(), self._jobs.settle(self._limits.rpc_timeout_seconds))
        self._life.cancel()
        await asyncio.wait({self._life})
        if not self._life.cancelled():
            # Already logged, and for whoever calls `wait` to raise.
            self._life.exception()

    async def _live(self) -> None:
        try:
            while await self._beat():
                await self._clock.sleep(self._limits.heartbeat_seconds)
            self._log.error("agent_superseded", epoch=self._epoch)
        except Exception:
            self._log.exception("agent_failed")
            raise
        finally:
            await self._let_go()
        raise Conflict("agent.superseded", f"A newer agent serves the host {self._host}", host=self._host)

    async def _let_go(self) -> None:
        """Give back the address and what waits there, and cancel the jobs."""
        assert self._consumer is not None
        assert self._open is not None
        self._letting_go = True
        self._open.cancel()
        self._jobs.cancel()
        await self._consumer.aclose()
        await self._jobs.settle()

    # ---- registration and heartbeat ------------------------------------------------------------------------

    async def _register(self) -> None:
        """Get an epoch, and begin to make the host what the conductor says it is. Raises: DriverError."""
        if self._open is None or self._open.done():
            self._open = asyncio.get_running_loop().create_future()
        ctx = self._own_context()
        resources = await self.driver.resources()
        # Taken before the conductor answers: a guest that is spawned later is no stranger. An instance with a job in
        # hand is settled by that job, which asks the conductor itself.
        busy = self._jobs.instances()
        present = await self.driver.inventory()
        request = RegisterHost(host=self._host, resources=resources)
        async with self._reporting:
            registered = await self._conductor.ask(ctx, REGISTER_HOST, lambda: request)
            self._epoch = registered.epoch
        self._log.info("host_registered", epoch=self._epoch, assigned=len(registered.instances), guests=len(present))
        assigned = {instance.instance_uuid for instance in registered.instances}
        for uuid, guest in present.items():
            if uuid not in assigned and uuid not in busy:
                self._jobs.begin(ctx, DestroyInstance(instance_uuid=uuid, attempt=guest.attempt))
        for instance in registered.instances:
            if instance.instance_uuid not in busy:
                asked_for = instance.request_id
                self._jobs.begin(ctx.with_request_id(RequestId(asked_for)) if asked_for else ctx, instance)
        self._open.set_result(None)

    async def _beat(self) -> bool:
        """Report once; return whether this agent still has the host."""
        try:
            try:
                return await self._report_host()
            except NotFound:
                self._log.warning("host_unknown", epoch=self._epoch)
                await self._register()
        except DriverError as error:
            # No report: a host whose hypervisor does not answer is down.
            self._log.error("driver_failed", error=str(error))
        return True

    async def _report_host(self) -> bool:
        """Tell the conductor what the host uses; return False when a newer agent has the host.

        Raises: NotFound when the conductor does not know the host; DriverError.
        """
        guests = (await self.driver.inventory()).values()
        # One at a time: a report that is overtaken by the next, or by a registration, would be refused as if another
        # agent had sent that.
        async with self._reporting:
            answer = await self._conductor.ask(
                self._own_context(),
                HOST_REPORT,
                lambda: HostReport(
                    host=self._host,
                    epoch=self._epoch,
                    sequence=self._next_sequence(),
                    running=sum(guest.power_state == PowerState.RUNNING for guest in guests),
                    vcpus_used=sum(guest.vcpus for guest in guests),
                    memory_mb_used=sum(guest.memory_mb for guest in guests),
                    disk_gb_used=sum(guest.disk_gb for guest in guests),
                ),
            )
        return answer.accepted

    def _own_context(self) -> RequestContext:
        ctx = service_context(RequestId(f"req-{self._ids.uuid()}"))
        return replace(ctx, mq_connection=self._transport)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    # ---- orders --------------------------------------------------------------------------------------------

    async def _receive(self, ctx: RequestContext, order: BuildInstance | ActOnInstance | DestroyInstance) -> None:
        """Do what a message orders. When the agent stops meanwhile, the queue keeps the message for the next one."""
        assert self._open is not None
        await asyncio.shield(self._open)
        job = self._jobs.begin(ctx, order)
        if job is None:
            return
        try:
            await asyncio.wait({job})
        finally:
            job.cancel()
        if job.cancelled() and self._letting_go:
            raise asyncio.CancelledError

    async def _carry_out(self, ctx: RequestContext, order: Order, log: Log) -> None:
        match order:
            case BuildInstance():
                await self._build(ctx, order, log)
            case ActOnInstance():
                await self._act(ctx, order.instance_uuid, order.action, log)
            case DestroyInstance():
                await self._destroy(ctx, order, log)
            case AssignedInstance():
                async with self._restoring:
                    await self._restore(ctx, order, log)
            case _:
                assert_never(order)

    async def _accepted(
        self, ctx: RequestContext, method: CallMethod[RequestT, Done], make: Callable[[], RequestT]
    ) -> bool:
        """Ask the conductor for a conditional write. A host that it does not know may write nothing."""
        try:
            answer = await self._conductor.ask(ctx, method, make)
        except NotFound:
            return False
        return answer.accepted

    # ---- builds --------------------------------------------------------------------------------------------

    async def _build(self, ctx: RequestContext, order: BuildInstance, log: Log) -> None:
        def ask_start() -> StartBuild:
            return StartBuild(
                host=self._host, epoch=self._epoch, instance_uuid=order.instance_uuid, attempt=order.attempt
            )

        if not await self._accepted(ctx, START_BUILD, ask_start):
            # A repeat of what is done, or withdrawn: whoever withdrew it also sends the order to remove its remains.
            log.info("build_refused")
            return
        log.info("build_started")
        failure = await self._spawn(order, log)

        def ask_finish() -> FinishBuild:
            return FinishBuild(
                host=self._host,
                epoch=self._epoch,
                sequence=self._next_sequence(),
                instance_uuid=order.instance_uuid,
                attempt=order.attempt,
                failure=failure,
            )

        if await self._accepted(ctx, FINISH_BUILD, ask_finish):
            log.info("build_finished", failure=failure)
        elif await self._superseded():
            log.warning("build_left_to_newer_agent")
        else:
            log.warning("build_withdrawn", failure=failure)
            await self._remove(order.instance_uuid, order.attempt, log)

    async def _spawn(self, order: BuildInstance, log: Log) -> str | None:
        """Make the guest; return None, or a sentence that says why it could not be made, when nothing of it remains."""
        try:
            present = await self.driver.find(order.instance_uuid)
            if present is not None and present.attempt < order.attempt:
                await self.driver.destroy(order.instance_uuid)
            await self.driver.spawn(
                order.instance_uuid,
                name=order.name,
                vcpus=order.vcpus,
                memory_mb=order.memory_mb,
                disk_gb=order.disk_gb,
                attempt=order.attempt,
            )
        except DriverError as error:
            await self._remove(order.instance_uuid, order.attempt, log)
            return str(error)
        return None

    async def _superseded(self) -> bool:
        """Tell whether a newer agent has the host: its guests are then no longer this agent's to touch."""
        try:
            return not await self._report_host()
        except NotFound:
            return False

    async def _remove(self, instance_uuid: str, up_to_attempt: int | None, log: Log) -> bool:
        """See that no guest is there, or none of that build attempt or an older one.

        Return False, and log why, when the driver cannot.
        """
        try:
            guest = await self.driver.find(instance_uuid)
            if guest is not None and (up_to_attempt is None or guest.attempt <= up_to_attempt):
                await self.driver.destroy(instance_uuid)
                log.info("guest_destroyed")
        except DriverError as error:
            log.error("destroy_failed", error=str(error))
            return False
        return True

    # ---- actions, deletion, restoring ----------------------------------------------------------------------

    async def _act(self, ctx: RequestContext, instance_uuid: str, action: str, log: Log) -> None:
        def ask_start() -> StartAction:
            return StartAction(
                host=self._host,
                epoch=self._epoch,
                instance_uuid=instance_uuid,
                request_id=ctx.request_id,
                action=action,
            )

        if not await self._accepted(ctx, START_ACTION, ask_start):
            log.info("action_refused", action=action)
            return
        failure = None
        power_state = PowerState.NOSTATE
        try:
            await self._operate(instance_uuid, action)
        except DriverError as error:
            failure = str(error)
        try:
            guest = await self.driver.find(instance_uuid)
            power_state = PowerState.NOSTATE if guest is None else guest.power_state
        except DriverError as error:
            log.error("driver_failed", error=str(error))

        def ask_finish() -> FinishAction:
            return FinishAction(
                host=self._host,
                epoch=self._epoch,
                sequence=self._next_sequence(),
                instance_uuid=instance_uuid,
                request_id=ctx.request_id,
                action=action,
                power_state=power_state,
                failure=failure,
            )

        accepted = await self._accepted(ctx, FINISH_ACTION, ask_finish)
        log.info("action_finished", action=action, failure=failure, accepted=accepted)

    async def _operate(self, instance_uuid: str, action: str) -> None:
        match action:
            case "start":
                await self.driver.start(instance_uuid)
            case "stop":
                await self.driver.stop(instance_uuid)
            case "reboot" | "hard_reboot":
                await self.driver.reboot(instance_uuid, hard=action == "hard_reboot")
            case "pause":
                await self.driver.pause(instance_uuid)
            case "unpause":
                await self.driver.unpause(instance_uuid)
            case "suspend":
                await self.driver.suspend(instance_uuid)
            case "resume":
                await self.driver.resume(instance_uuid)
            case _:
                raise DriverError("The host does not know this action.")

    async def _destroy(self, ctx: RequestContext, order: DestroyInstance, log: Log) -> None:
        if not await self._remove(order.instance_uuid, order.attempt, log) or order.attempt is not None:
            # A failure is not reported, so the order comes again; nobody waits to hear of a withdrawn build's remains.
            return
        reported = await self._accepted(
            ctx,
            INSTANCE_DESTROYED,
            lambda: InstanceDestroyed(host=self._host, epoch=self._epoch, instance_uuid=order.instance_uuid),
        )
        log.info("deletion_finished", accepted=reported)

    async def _restore(self, ctx: RequestContext, instance: AssignedInstance, log: Log) -> None:
        """Make a guest what the conductor says its server is, then do what was asked of it while nobody listened."""
        wanted = POWER_STATE_OF.get(instance.vm_state)
        if wanted is not None and (instance.task_state is None or instance.action is not None):
            try:
                await self._bring_to(instance, wanted, log)
            except DriverError as error:
                log.error("restore_failed", error=str(error))
        if instance.action is not None:
            await self._act(ctx, instance.instance_uuid, instance.action, log)

    async def _bring_to(self, instance: AssignedInstance, wanted: PowerState, log: Log) -> None:
        uuid = instance.instance_uuid
        guest = await self.driver.find(uuid)
        if guest is None:
            await self.driver.spawn(
                uuid,
                name=instance.name,
                vcpus=instance.vcpus,
                memory_mb=instance.memory_mb,
                disk_gb=instance.disk_gb,
                attempt=instance.attempt,
            )
        state = PowerState.RUNNING if guest is None else guest.power_state
        steps = []
        if state != wanted:
            if state != PowerState.RUNNING and wanted != PowerState.SHUTDOWN:
                steps.append(TO_RUNNING[state])
            if wanted != PowerState.RUNNING:
                steps.append(FROM_RUNNING[wanted])
        for step in steps:
            await self._operate(uuid, step)
        if steps or guest is None:
            log.warning("guest_restored", was_missing=guest is None, power_state=int(wanted))
