"""The conductor: writes its cell's database on behalf of the cell's agents, who have no way to it of their own.

One per cell (more may share the queue later). It decides nothing about builds: it only lets through what the fences and
epochs still allow. It reaches its own cell alone, and never the API database.
"""

from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec, TypeVar

import structlog

from cellway import hosts
from cellway.cells.target import Target, target_cell
from cellway.config import Limits
from cellway.context import Consumer, RequestContext
from cellway.db.engines import Databases
from cellway.db.transaction import CellTx
from cellway.ids import IdSource
from cellway.instances import actions, lifecycle
from cellway.rpc import calls
from cellway.rpc.calls import (
    CONDUCTOR,
    AssignedInstance,
    Done,
    FinishAction,
    FinishBuild,
    HostReport,
    InstanceDestroyed,
    Registered,
    RegisterHost,
    StartAction,
    StartBuild,
)
from cellway.rpc.messaging import Handlers, serve
from cellway.rpc.transport import Transports

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


class Conductor:
    """Serves one cell's agents.

    `cell` gives the cell as it is now: a changed database URL counts from the next write on. Another queue counts from
    the next start.
    """

    def __init__(
        self, cell: Callable[[], Target], databases: Databases, transports: Transports, *, limits: Limits, ids: IdSource
    ) -> None:
        self._cell = cell
        self._databases = databases
        self._transports = transports
        self._limits = limits
        self._ids = ids
        self._consumer: Consumer | None = None

    async def start(self) -> None:
        """Begin to serve. Raises: Conflict when another conductor consumes the queue; Unavailable."""
        handlers = Handlers()
        handlers.on_call(calls.REGISTER_HOST, self._register_host)
        handlers.on_call(calls.HOST_REPORT, self._answering(_report))
        handlers.on_call(calls.START_BUILD, self._answering(_start_build))
        handlers.on_call(calls.FINISH_BUILD, self._answering(_finish_build))
        handlers.on_call(calls.START_ACTION, self._answering(_start_action))
        handlers.on_call(calls.FINISH_ACTION, self._answering(_finish_action))
        handlers.on_call(calls.INSTANCE_DESTROYED, self._answering(_destroyed))
        # Held for as long as the conductor serves, so that it is not closed as idle.
        self._transport = self._transports.lease(self._cell().transport_url)
        try:
            self._consumer = await serve(self._transport, CONDUCTOR, handlers, self._limits)
        except BaseException:
            self._transports.release(self._transport)
            raise

    async def aclose(self) -> None:
        """Stop serving; what was taken is finished first."""
        if self._consumer is not None:
            await self._consumer.aclose()
            self._consumer = None
            self._transports.release(self._transport)

    async def _write(
        self, context: RequestContext, function: Callable[Concatenate[CellTx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with target_cell(context, self._cell(), self._databases, self._transports) as cctx:
            return await self._databases.on(cctx).write(function, *args, **kwargs)

    def _answering(
        self, write: "Callable[[CellTx, RequestT], bool]"
    ) -> "Callable[[RequestContext, RequestT], Awaitable[Done]]":
        """Return the handler that runs one conditional write and says whether it was accepted."""

        async def handle(context: RequestContext, request: RequestT) -> Done:
            accepted = await self._write(context, write, request)
            if not accepted:
                log.info("report_refused", report=type(request).__name__, cell=self._cell().ref.name)
            return Done(accepted=accepted)

        return handle

    async def _register_host(self, context: RequestContext, request: RegisterHost) -> Registered:
        return await self._write(context, _register, request, self._ids.uuid(), self._ids.uuid())


RequestT = TypeVar("RequestT", bound=calls.Payload)


def _register(tx: CellTx, request: RegisterHost, service_uuid: str, node_uuid: str) -> Registered:
    epoch = hosts.register(
        tx,
        request.host,
        request.resources,
        service_uuid=service_uuid,
        node_uuid=node_uuid,
        version=request.version,
    )
    waiting = actions.hand_over(tx, request.host)
    assigned = []
    for instance in lifecycle.list_on_host(tx, request.host):
        action, request_id = waiting.get(instance.uuid, (None, None))
        assigned.append(
            AssignedInstance(
                instance_uuid=instance.uuid,
                name=instance.name,
                vm_state=instance.vm_state,
                task_state=instance.task_state,
                attempt=instance.attempt,
                vcpus=instance.vcpus,
                memory_mb=instance.memory_mb,
                disk_gb=instance.disk_gb,
                action=action,
                request_id=request_id,
            )
        )
    return Registered(epoch=epoch, instances=tuple(assigned))


def _report(tx: CellTx, request: HostReport) -> bool:
    return hosts.report(tx, request)


def _start_build(tx: CellTx, request: StartBuild) -> bool:
    return hosts.check_epoch(tx, request.host, request.epoch) and lifecycle.start_build(
        tx, request.instance_uuid, attempt=request.attempt, host=request.host, epoch=request.epoch
    )


def _finish_build(tx: CellTx, request: FinishBuild) -> bool:
    return hosts.check_epoch(tx, request.host, request.epoch) and lifecycle.finish_build(
        tx,
        request.instance_uuid,
        attempt=request.attempt,
        host=request.host,
        epoch=request.epoch,
        sequence=request.sequence,
        failure=request.failure,
    )


def _start_action(tx: CellTx, request: StartAction) -> bool:
    return hosts.check_epoch(tx, request.host, request.epoch) and actions.start(
        tx, request.instance_uuid, request.action, request_id=request.request_id, host=request.host
    )


def _finish_action(tx: CellTx, request: FinishAction) -> bool:
    return hosts.check_epoch(tx, request.host, request.epoch) and actions.finish(
        tx,
        request.instance_uuid,
        request.action,
        request_id=request.request_id,
        host=request.host,
        power_state=request.power_state,
        failure=request.failure,
    )


def _destroyed(tx: CellTx, request: InstanceDestroyed) -> bool:
    return hosts.check_epoch(tx, request.host, request.epoch) and lifecycle.finish_delete(
        tx, request.instance_uuid, host=request.host
    )
