"""Waiting for what cells report: one poll per cell for everything that is waited for there.

Builders and deleters wait for fences to reach a state. Polling the cell's database needs no message to arrive, so
nothing is lost when one is; a cell where nothing is awaited is not asked at all.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cellway.cells.registry import Cell, Cells
from cellway.context import Clock, RequestContext
from cellway.errors import CellwayError
from cellway.instances import lifecycle
from cellway.instances.lifecycle import Fence

log = structlog.get_logger()

FIRST_SECONDS = 0.01
"""A poll follows the first wait so soon: a quick hypervisor has answered by then."""
SLOWEST_SECONDS = 0.25
"""While nothing changes the polls slow down to this."""


@dataclass(slots=True)
class _Waiter:
    reached: Callable[[Fence], bool]
    future: "asyncio.Future[Fence | None]"


class Watch:
    """Everything that this process waits for in cells."""

    def __init__(self, cells: Cells, *, clock: Clock) -> None:
        self._cells = cells
        self._clock = clock
        self._waiters: dict[int, dict[str, _Waiter]] = {}
        self._polls: dict[int, asyncio.Task[None]] = {}
        self._pace: dict[int, float] = {}

    async def until(
        self, context: RequestContext, cell: Cell, uuid: str, reached: Callable[[Fence], bool], seconds: float
    ) -> Fence | None:
        """Return the fence of an instance once `reached` says so; None after `seconds`, or when interrupted."""
        waiter = _Waiter(reached, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(cell.id, {})[uuid] = waiter
        self._pace[cell.id] = FIRST_SECONDS
        if cell.id not in self._polls:
            self._polls[cell.id] = asyncio.create_task(self._poll(context, cell))
        try:
            async with asyncio.timeout(seconds):
                return await waiter.future
        except TimeoutError:
            return None
        finally:
            if self._waiters[cell.id].get(uuid) is waiter:
                del self._waiters[cell.id][uuid]

    def interrupt(self, uuid: str) -> None:
        """End the wait for an instance now."""
        for waiters in self._waiters.values():
            waiter = waiters.get(uuid)
            if waiter is not None and not waiter.future.done():
                waiter.future.set_result(None)

    async def aclose(self) -> None:
        """Stop polling."""
        polls = list(self._polls.values())
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)

    async def _poll(self, context: RequestContext, cell: Cell) -> None:
        try:
            while waiters := self._waiters[cell.id]:
                await self._clock.sleep(self._pace[cell.id])
                self._pace[cell.id] = min(self._pace[cell.id] * 1.5, SLOWEST_SECONDS)
                try:
                    # As it is now: its URL may have changed since the first began to wait.
                    now = self._cells.snapshot.by_id.get(cell.id, cell)
                    with self._cells.target_cell(context, now) as cctx:
                        fences = await self._cells.databases.on(cctx).read(lifecycle.fences, list(waiters))
                except CellwayError as error:
                    log.info("watch_failed", cell=cell.ref.name, error=error.message)
                    self._pace[cell.id] = SLOWEST_SECONDS
                    continue
                for uuid, fence in fences.items():
                    waiter = waiters.get(uuid)
                    if waiter is not None and not waiter.future.done() and waiter.reached(fence):
                        waiter.future.set_result(fence)
                        self._pace[cell.id] = FIRST_SECONDS
        finally:
            del self._polls[cell.id]
