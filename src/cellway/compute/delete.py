"""Carrying out accepted deletions, however long a cell, a queue or an agent is away.

A deletion that was answered 204 is a row in `delete_requests`. Any process may take it; each step may be repeated;
the row goes when the server is gone from its cell, and with it, in the same transaction, go its host claim and its
charge.
"""

import asyncio

import structlog

from cellway import builds, hosts, server_groups
from cellway.builds import DeleteRequest
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.compute.build import Builder
from cellway.compute.fleet import Fleet
from cellway.compute.watch import Watch
from cellway.config import Limits
from cellway.context import RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.errors import HostUnreachable, Unavailable
from cellway.ids import ProjectId, RequestId, UserId
from cellway.instances import lifecycle
from cellway.instances.lifecycle import FenceState
from cellway.quota import usage
from cellway.rpc.calls import DESTROY_INSTANCE, DestroyInstance, host_address
from cellway.rpc.messaging import cast

log = structlog.get_logger()


class Deleter:
    """Carries out delete requests. Any number of processes may run one."""

    def __init__(self, cells: Cells, fleet: Fleet, watch: Watch, builder: Builder, *, limits: Limits) -> None:
        self._cells = cells
        self._fleet = fleet
        self._watch = watch
        self._builder = builder
        self._limits = limits
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Look for requests now: one was accepted in this process."""
        self._wake.set()

    async def run(self) -> None:
        """Carry out deletions for ever."""
        failing = False
        while True:
            self._wake.clear()
            try:
                await self.run_once()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("deleter_waits", error=repr(error))
                failing = True
            try:
                async with asyncio.timeout(self._limits.builder_poll_seconds):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def run_once(self) -> None:
        """Begin with the deletions that are due, as far as there is room."""
        room = self._limits.builds_at_once - len(self._tasks)
        if room <= 0:
            return
        due = await self._cells.databases.on(API).write(builds.take_deletes, room, self._limits.recast_seconds)
        for request in due:
            task = asyncio.create_task(self._carry_out(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Stop; what is not finished is due again soon, here or elsewhere."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, request: DeleteRequest) -> None:
        context = RequestContext(
            user_id=UserId(request.user_id),
            project_id=ProjectId(request.project_id),
            request_id=RequestId(request.request_id),
        )
        bound = log.bind(instance_uuid=request.instance_uuid, request_id=request.request_id)
        try:
            if await self._is_gone(context, request):
                await self._cells.databases.on(API).write(_settle, request.instance_uuid)
                self._cells.forget_mapping(request.instance_uuid)
                bound.info("server_deleted")
        except Unavailable as error:
            bound.info("delete_waits", reason=error.message)
        except Exception:
            bound.exception("delete_failed")

    async def _is_gone(self, context: RequestContext, request: DeleteRequest) -> bool:
        """Remove the server from its cell; tell whether it is gone by now."""
        uuid = request.instance_uuid
        api = self._cells.databases.on(API)
        await self._builder.left(uuid, self._limits.recast_seconds)
        if await api.read(builds.is_building, uuid):
            return False
        mapping = await api.read(mappings.find_instance, uuid)
        if mapping is None or mapping.cell_id is None:
            return True
        cell = await self._cells.cell_of(mapping)
        with self._cells.target_cell(context, cell) as cctx:
            instance = await self._cells.databases.on(cctx).write(
                lifecycle.begin_delete,
                uuid,
                request_id=request.request_id,
                user_id=request.user_id,
                project_id=request.project_id,
            )
            if instance is None:
                return True
            if instance.host is None:
                return await self._cells.databases.on(cctx).write(lifecycle.finish_delete, uuid)
            is_up = self._fleet.is_up(cell.id, instance.host)
            try:
                await cast(
                    cctx,
                    DESTROY_INSTANCE,
                    DestroyInstance(instance_uuid=uuid),
                    address=host_address(instance.host),
                    timeout_seconds=self._limits.rpc_timeout_seconds,
                )
            except HostUnreachable:
                if is_up:
                    raise
            if not is_up:
                # The order waits in its queue, or there is no agent: one that starts removes what is not its own.
                return await self._cells.databases.on(cctx).write(lifecycle.finish_delete, uuid)
        return await self._destroyed(context, cell, uuid)

    async def _destroyed(self, context: RequestContext, cell: Cell, uuid: str) -> bool:
        fence = await self._watch.until(
            context, cell, uuid, lambda fence: fence.state == FenceState.DELETED, self._limits.recast_seconds
        )
        return fence is not None


def _settle(tx: ApiTx, uuid: str) -> None:
    builds.finish_delete(tx, uuid)
    server_groups.remove_member(tx, uuid)
    hosts.release(tx, uuid)
    usage.refund(tx, uuid)
