"""The create saga: from an accepted request to a server that is ACTIVE, or in cell0 with a fault that says why.

`Builder` claims build requests and runs each through STEPS, a table of (name, do, undo). Every step may be repeated: a
builder that takes over starts at the first and finds what is done already. A step that refuses is undone in reverse,
and the build goes to another host or to cell0. Nobody but a builder decides; conductors and agents only report.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Concatenate, NamedTuple, ParamSpec

import msgspec
import structlog

from cellway import aggregates, builds, flavors, hosts, server_groups
from cellway.aggregates import Merged
from cellway.builds import BuildClaim, Overtaken
from cellway.cells import mappings
from cellway.cells.mappings import InstanceMapping
from cellway.cells.registry import Cell, Cells
from cellway.compute import scheduler
from cellway.compute.fleet import Fleet
from cellway.compute.scheduler import HostState
from cellway.compute.watch import Watch
from cellway.config import Limits
from cellway.context import Clock, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.errors import CellwayError, Conflict, HostUnreachable, Unavailable
from cellway.hosts import Claim
from cellway.ids import ProjectId, RequestId, UserId
from cellway.instances import lifecycle
from cellway.instances.lifecycle import FenceState
from cellway.instances.records import Fault, Instance, TaskState, VmState
from cellway.quota import usage
from cellway.rpc.calls import BUILD_INSTANCE, DESTROY_INSTANCE, BuildInstance, DestroyInstance, host_address
from cellway.rpc.messaging import cast
from cellway.server_groups import Placement

P = ParamSpec("P")

log = structlog.get_logger()


class BuildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for beyond the instance's own record; the JSON of `request_specs.spec`."""

    request_id: str
    zone: str | None = None
    host: str | None = None
    group: str | None = None


class Refused(Exception):
    """A step cannot be done this way; `host_failed` says that another host may do it."""

    def __init__(self, why: str, *, host_failed: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.host_failed = host_failed


class Cancelled(Exception):
    """The server's deletion was asked for while it was being built."""


class Running(Exception):
    """A build was to be undone, but its host has finished it by now: a server that runs is never taken back."""


@dataclass(slots=True)
class Build:
    """One build in this process's hands."""

    claim: BuildClaim
    instance: Instance
    spec: BuildSpec
    context: RequestContext
    attempt: int
    failed_hosts: list[str]
    failure: str | None
    cell: Cell | None = None
    host: str | None = None
    cancelled: bool = False
    runs: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def uuid(self) -> str:
        """The instance's uuid."""
        return self.claim.instance_uuid


class Step(NamedTuple):
    """A part of the saga. `undo` leaves no trace of `do`, whether that happened, half happened or did not."""

    name: str
    do: Callable[["Builder", Build], Awaitable[None]]
    undo: Callable[["Builder", Build], Awaitable[None]] | None


class Builder:
    """Carries out build requests. Any number of processes may run one."""

    def __init__(
        self,
        cells: Cells,
        fleet: Fleet,
        watch: Watch,
        *,
        limits: Limits,
        clock: Clock,
        dice: random.Random,
        steps: "tuple[Step, ...] | None" = None,
    ) -> None:
        """`steps` is STEPS unless a test makes one of them fail."""
        self._cells = cells
        self._fleet = fleet
        self._watch = watch
        self._limits = limits
        self._clock = clock
        self._dice = dice
        self._builds: dict[str, Build] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._steps = steps or STEPS

    def wake(self) -> None:
        """Look for requests now: one was accepted in this process."""
        self._wake.set()

    def cancel(self, uuid: str) -> None:
        """Stop a build of this process now; its deletion was accepted. Other processes find out by asking."""
        build = self._builds.get(uuid)
        if build is not None:
            build.cancelled = True
            self._watch.interrupt(uuid)

    async def left(self, uuid: str, seconds: float) -> None:
        """Wait until this process has let go of a build, `seconds` at most."""
        build = self._builds.get(uuid)
        if build is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await build.left.wait()

    @property
    def in_progress(self) -> int:
        """How many builds this process works on."""
        return len(self._builds)

    async def run(self) -> None:
        """Carry out requests for ever."""
        failing = quiet = False
        while True:
            self._wake.clear()
            try:
                if quiet:
                    await self._notice_cancelled()
                full = await self.run_once()
                failing = False
            except Exception as error:
                full = False
                if not failing:
                    log.warning("builder_waits", error=repr(error))
                failing = True
            quiet = not full and await self._idle()

    async def _idle(self) -> bool:
        """Wait for work; tell whether none was announced."""
        try:
            async with asyncio.timeout(self._limits.builder_poll_seconds):
                await self._wake.wait()
        except TimeoutError:
            return True
        return False

    async def run_once(self) -> bool:
        """Claim what waits, as far as there is room, and begin with it; tell whether more may be taken now."""
        room = self._limits.builds_at_once - len(self._tasks)
        if room <= 0:
            return False
        api = self._cells.databases.on(API)
        waiting = await api.read(builds.list_waiting, room)
        for claim in await api.write(_take_all, waiting, self._limits.claim_seconds) if waiting else ():
            task = asyncio.create_task(self._carry_out(claim))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(waiting) == room

    async def aclose(self, grace_seconds: float) -> None:
        """Let running builds finish within the grace; others go on with the rest when their claims expire."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _notice_cancelled(self) -> None:
        if self._builds:
            for uuid in await self._cells.databases.on(API).read(builds.list_cancelled, list(self._builds)):
                self.cancel(uuid)

    # ---- one build

    async def _carry_out(self, claim: BuildClaim) -> None:
        instance = msgspec.json.decode(claim.instance, type=Instance)
        spec = msgspec.json.decode(claim.spec, type=BuildSpec)
        context = RequestContext(
            user_id=UserId(instance.user_id),
            project_id=ProjectId(instance.project_id),
            request_id=RequestId(spec.request_id),
        )
        build = Build(claim, instance, spec, context, claim.attempt, list(claim.failed_hosts), claim.failure)
        build.cancelled = claim.cancelled
        self._builds[build.uuid] = build
        renewing = asyncio.create_task(self._renew(build))
        bound = log.bind(instance_uuid=build.uuid, request_id=spec.request_id, generation=claim.generation)
        try:
            await self._decide(build)
        except Overtaken as error:
            bound.info("build_overtaken", reason=error.message)
        except Unavailable as error:
            bound.warning("build_waits", reason=error.message)
            await self._postpone(build)
        except Exception:
            # The claim expires and somebody goes on; the bounded number of take-overs ends it at last.
            bound.exception("build_failed")
        finally:
            renewing.cancel()
            if self._builds.get(build.uuid) is build:
                # Not when this process has taken its own lapsed claim again.
                del self._builds[build.uuid]
            build.left.set()
            self._wake.set()

    async def _decide(self, build: Build) -> None:
        """Try hosts until the server runs, is cancelled, or nothing is left to try."""
        while True:
            try:
                await self._run_steps(build)
                return
            except Running:
                await self._finish(build)
                return
            except Cancelled:
                await self._write(build, _finish_cancelled)
                return
            except Refused as refusal:
                if not refusal.host_failed:
                    await self._bury(build, refusal.why)
                    return
                if len(build.failed_hosts) >= self._limits.build_hosts:
                    await self._bury(build, f"Exceeded {self._limits.build_hosts} hosts. Last failure: {refusal.why}")
                    return

    async def _run_steps(self, build: Build) -> None:
        step = self._steps[0]
        try:
            for step in self._steps:
                await step.do(self, build)
                # Not after the last: a finished server is deleted like any other.
                if build.cancelled and step is not self._steps[-1]:
                    raise Cancelled
        except (Refused, Cancelled) as reason:
            log.info("build_undone", instance_uuid=build.uuid, step=step.name, reason=str(reason) or "cancelled")
            if isinstance(reason, Refused) and reason.host_failed:
                build.failure = reason.why
            # All of them: an earlier builder may have been further.
            for step in reversed(self._steps):
                if step.undo is not None:
                    await step.undo(self, build)
            raise

    async def _renew(self, build: Build) -> None:
        while True:
            await self._clock.sleep(self._limits.claim_renew_seconds)
            try:
                await self._write(build, lambda _tx, _build: None)
            except Overtaken:
                return
            except Exception as error:
                log.warning("claim_not_renewed", instance_uuid=build.uuid, error=repr(error))

    async def _postpone(self, build: Build) -> None:
        try:
            await self._cells.databases.on(API).write(builds.postpone, build.claim, self._limits.builder_poll_seconds)
        except CellwayError as error:
            log.warning("build_not_postponed", instance_uuid=build.uuid, error=error.message)

    async def _write(
        self, build: Build, function: Callable[Concatenate[ApiTx, Build, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Run one transaction on the API database under the build's claim. Raises: Overtaken."""

        def held(tx: ApiTx) -> None:
            builds.hold(tx, build.claim, self._limits.claim_seconds)
            function(tx, build, *args, **kwargs)

        await self._cells.databases.on(API).write(held)

    # ---- the steps

    async def _place(self, build: Build) -> None:
        """Claim a host, and write its cell to the mapping, in one transaction; or find that this is done."""
        present, mapping = await self._cells.databases.on(API).read(_whereabouts, build.uuid)
        if present is not None:
            build.host, build.cell = present.host, self._cells.snapshot.by_id.get(present.cell_id)
        if build.claim.takeovers > self._limits.build_takeovers:
            raise Refused(f"The build was interrupted {build.claim.takeovers} times.")
        if build.cancelled:
            return
        if present is not None:
            if build.cell is None:
                raise Refused("The cell of its host is gone.", host_failed=True)
            return
        home = mapping.cell_id if mapping is not None else None
        fresh = False
        while True:
            request = await self._request(build)
            choice = scheduler.choose(self._fleet.states(), request, self._dice)
            if choice.hosts and await self._claim(build, choice.hosts[0], request, home):
                return
            if not choice.hosts and fresh:
                why = choice.why_none()
                if choice.waits:
                    raise Unavailable("build.cells_silent", why)
                raise Refused(why if not build.failure else f"{why} Last failure: {build.failure}")
            # What is remembered of the hosts may be old: nobody is refused on that.
            await self._fleet.reload()
            fresh = True

    async def _request(self, build: Build) -> scheduler.Request:
        """Return what the server needs of a host, with where the others of its group are now."""
        group = None
        if build.spec.group is not None:
            group = await self._cells.databases.on(API).read(server_groups.find_placement, build.spec.group)
        return scheduler.Request(
            vcpus=build.instance.vcpus,
            memory_mb=build.instance.memory_mb,
            disk_gb=build.instance.disk_gb,
            zone=build.spec.zone,
            host=build.spec.host,
            excluded_hosts=frozenset(build.failed_hosts),
            group=group,
            project_id=build.instance.project_id,
            aggregate_specs=scheduler.aggregate_specs(flavors.from_stored(build.instance.flavor).extra_specs),
        )

    async def _claim(self, build: Build, chosen: HostState, request: scheduler.Request, home: int | None) -> bool:
        """Take a share of the chosen host; tell whether that was still allowed: its room, its aggregates, the group."""
        cell = self._cells.snapshot.by_id[chosen.cell_id]
        if home is not None and home != cell.id:
            await self._leave(build, home)
        wanted = Claim(build.uuid, chosen.host, cell.id, request.vcpus, request.memory_mb, request.disk_gb)
        try:
            await self._write(build, _claim_host, wanted, request.group, chosen.metadata)
        except _NoRoom:
            return False
        self._fleet.took(chosen.host, request.vcpus, request.memory_mb, request.disk_gb)
        self._cells.forget_mapping(build.uuid)
        build.host, build.cell = chosen.host, cell
        build.attempt += 1
        return True

    async def _leave(self, build: Build, cell_id: int) -> None:
        """Fence the cell that the mapping names. Only then may the mapping name another.

        Raises: Running; Overtaken.
        """
        cell = self._cells.snapshot.by_id.get(cell_id)
        if cell is None:
            return
        with self._cells.target_cell(build.context, cell) as cctx:
            try:
                withdrawn = await self._cells.databases.on(cctx).write(
                    lifecycle.withdraw, build.uuid, generation=build.claim.generation
                )
            except Conflict as error:
                raise Overtaken(build.uuid) from error
        if not withdrawn:
            raise Running

    async def _unplace(self, build: Build) -> None:
        """Give the host back and remember that it failed."""
        host = build.host
        if host is not None and host not in build.failed_hosts:
            build.failed_hosts.append(host)
        await self._write(build, _release_host)
        if host is not None:
            self._fleet.took(host, -build.instance.vcpus, -build.instance.memory_mb, -build.instance.disk_gb)
        build.host = build.cell = None

    async def _create(self, build: Build) -> None:
        """Make the instance in the chosen cell, under the claim's fence."""
        assert build.cell is not None
        instance = msgspec.structs.replace(
            build.instance, host=build.host, node=build.host, task_state=TaskState.SCHEDULING.value
        )
        build.runs = await self._put(build, build.cell, instance) == FenceState.ACTIVE

    async def _put(self, build: Build, cell: Cell, instance: Instance) -> str:
        """Make the instance in a cell under the build's attempt; return how far the attempt is there."""
        while True:
            with self._cells.target_cell(build.context, cell) as cctx:
                try:
                    state = await self._cells.databases.on(cctx).write(
                        lifecycle.put,
                        instance,
                        generation=build.claim.generation,
                        attempt=build.attempt,
                        host=instance.host,
                        request_id=build.spec.request_id,
                    )
                except Conflict as error:
                    raise Overtaken(build.uuid) from error
            if state != FenceState.WITHDRAWN:
                return state
            # Its undoing was interrupted. The order to remove its remains may still be under way: another number.
            await self._write(build, _next_attempt)
            build.attempt += 1

    async def _uncreate(self, build: Build) -> None:
        """Take the instance out of the cell, leaving the fence, and tell the host to remove what it may have built.

        In this order: an overtaken builder stops at the fence. A host that is away cleans up when it comes back.
        """
        if build.cell is None or build.host is None:
            return
        await self._leave(build, build.cell.id)
        request = DestroyInstance(instance_uuid=build.uuid, attempt=build.attempt)
        with self._cells.target_cell(build.context, build.cell) as cctx:
            try:
                await cast(
                    cctx,
                    DESTROY_INSTANCE,
                    request,
                    address=host_address(build.host),
                    timeout_seconds=self._limits.rpc_timeout_seconds,
                )
            except Unavailable as error:
                log.info("remains_left", instance_uuid=build.uuid, host=build.host, reason=error.message)

    async def _launch(self, build: Build) -> None:
        """Tell the host's agent to build."""
        if build.runs:
            return
        assert build.cell is not None
        assert build.host is not None
        request = BuildInstance(
            instance_uuid=build.uuid,
            attempt=build.attempt,
            name=build.instance.display_name,
            vcpus=build.instance.vcpus,
            memory_mb=build.instance.memory_mb,
            disk_gb=build.instance.disk_gb,
        )
        with self._cells.target_cell(build.context, build.cell) as cctx:
            try:
                await cast(
                    cctx,
                    BUILD_INSTANCE,
                    request,
                    address=host_address(build.host),
                    timeout_seconds=self._limits.rpc_timeout_seconds,
                )
            except HostUnreachable as error:
                raise Refused(f"Host {build.host} is not there.", host_failed=True) from error
            except Unavailable as error:
                if self._fleet.is_up(build.cell.id, build.host):
                    raise
                raise Refused(f"Host {build.host} went down.", host_failed=True) from error

    async def _await_outcome(self, build: Build) -> None:
        """Watch the cell until the attempt has ended; send it again now and then, since a message may be lost."""
        if build.runs:
            return
        assert build.cell is not None
        assert build.host is not None
        began = self._clock.monotonic()
        while True:
            fence = await self._watch.until(
                build.context,
                build.cell,
                build.uuid,
                lambda fence: fence.attempt == build.attempt and fence.state in _ENDED,
                self._limits.recast_seconds,
            )
            if build.cancelled:
                return
            if fence is not None and fence.state == FenceState.ACTIVE:
                return
            if fence is not None:
                raise Refused(fence.failure or f"Host {build.host} failed to build it.", host_failed=True)
            if not self._fleet.is_up(build.cell.id, build.host):
                raise Refused(f"Host {build.host} went down.", host_failed=True)
            if self._clock.monotonic() - began > self._limits.launch_seconds:
                raise Refused(f"Host {build.host} did not finish in time.", host_failed=True)
            await self._launch(build)

    async def _finish(self, build: Build) -> None:
        """The server runs: the request is done, and what was reserved for it is in use."""
        await self._cells.databases.on(API).write(_finish_running, build)

    # ---- giving up

    async def _bury(self, build: Build, why: str) -> None:
        """Put the server into cell0, in ERROR, with a fault that says why."""
        cell0 = self._cells.snapshot.cell0()
        mapping = await self._cells.databases.on(API).read(mappings.find_instance, build.uuid)
        if mapping is not None and mapping.cell_id not in (None, cell0.id):
            assert mapping.cell_id is not None
            await self._leave(build, mapping.cell_id)

        def to_cell0(tx: ApiTx, build: Build) -> None:
            hosts.release(tx, build.uuid)
            mappings.set_instance_cell(tx, build.uuid, cell0.id)

        await self._write(build, to_cell0)
        self._cells.forget_mapping(build.uuid)
        fault = Fault(code=500, message=why, details=None, created_at=self._clock.now())
        instance = msgspec.structs.replace(
            build.instance, vm_state=VmState.ERROR.value, task_state=None, host=None, node=None, fault=fault
        )
        build.attempt += 1
        await self._put(build, cell0, instance)
        await self._cells.databases.on(API).write(_finish_buried, build)
        log.info("server_buried", instance_uuid=build.uuid, reason=why)


_ENDED = frozenset({FenceState.ACTIVE, FenceState.FAILED, FenceState.WITHDRAWN})

STEPS: tuple[Step, ...] = (
    Step("place", Builder._place, Builder._unplace),
    Step("create", Builder._create, Builder._uncreate),
    Step("launch", Builder._launch, None),
    Step("watch", Builder._await_outcome, None),
    Step("finish", Builder._finish, None),
)
"""The saga, in order."""


def _take_all(tx: ApiTx, uuids: list[str], seconds: float) -> list[BuildClaim]:
    return [claim for uuid in uuids if (claim := builds.take(tx, uuid, seconds)) is not None]


class _NoRoom(Exception):
    """The host has changed since it was chosen; raised so that the transaction leaves no trace."""


def _claim_host(tx: ApiTx, build: Build, wanted: Claim, group: Placement | None, metadata: Merged) -> None:
    builds.set_attempt(tx, build.claim, build.attempt + 1)
    mappings.set_instance_cell(tx, build.uuid, wanted.cell_id)
    if build.spec.group is not None and group is not None:
        now = server_groups.find_placement(tx, build.spec.group, hold=True)
        if now is not None and not scheduler.holds(wanted.host, group, now):
            raise _NoRoom
    # In this order: whoever moves a host to another zone holds it, and looks for claims.
    if not hosts.claim(tx, wanted) or aggregates.metadata_of(tx, wanted.host) != metadata:
        raise _NoRoom


def _next_attempt(tx: ApiTx, build: Build) -> None:
    builds.set_attempt(tx, build.claim, build.attempt + 1)


def _whereabouts(tx: ApiTx, uuid: str) -> tuple[Claim | None, InstanceMapping | None]:
    return hosts.find_claim(tx, uuid), mappings.find_instance(tx, uuid)


def _release_host(tx: ApiTx, build: Build) -> None:
    builds.set_failed(tx, build.claim, build.failed_hosts, build.failure or "")
    hosts.release(tx, build.uuid)


def _finish_running(tx: ApiTx, build: Build) -> None:
    builds.finish(tx, build.claim)
    usage.commit(tx, build.uuid)


def _finish_buried(tx: ApiTx, build: Build) -> None:
    builds.finish(tx, build.claim)
    usage.refund(tx, build.uuid, keep=True)


def _finish_cancelled(tx: ApiTx, build: Build) -> None:
    hosts.release(tx, build.uuid)
    builds.finish(tx, build.claim)
