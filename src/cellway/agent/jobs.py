"""What an agent has in hand: the orders of one instance run one after another, those of different ones side by side.

Only `agent.py` uses it. A repeat of an order in hand is dropped; an order in hand that a newer one makes pointless is
cancelled. Nothing is kept of an instance without orders. It carries out nothing itself and talks to nobody.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from cellway.context import RequestContext
from cellway.rpc.calls import ActOnInstance, AssignedInstance, BuildInstance, DestroyInstance

Order = BuildInstance | ActOnInstance | DestroyInstance | AssignedInstance
"""What is to be done with one instance; an AssignedInstance is to be made as it says."""

Log = structlog.typing.FilteringBoundLogger


@dataclass(slots=True, eq=False)
class _Job:
    ctx: RequestContext
    order: Order
    task: asyncio.Task[None] = field(init=False)


class Jobs:
    """The jobs in hand; `run` carries one out."""

    def __init__(self, run: Callable[[RequestContext, Order, Log], Coroutine[Any, Any, None]], log: Log) -> None:
        self._run = run
        self._log = log
        self._in_hand: dict[str, list[_Job]] = {}

    def begin(self, ctx: RequestContext, order: Order) -> asyncio.Task[None] | None:
        """Put an order behind the others of its instance; return its task, or None when one of them does the same.

        The task's errors are logged here.
        """
        job = _Job(ctx, order)
        others = self._in_hand.get(order.instance_uuid, [])
        if any(_repeats(job, other) for other in others):
            self._log_of(job).debug("repeat_ignored")
            return None
        for other in others:
            if _withdraws(order, other.order):
                other.task.cancel()
        job.task = asyncio.create_task(self._in_turn(job, [other.task for other in others]))
        job.task.add_done_callback(partial(self._end, job))
        self._in_hand.setdefault(order.instance_uuid, []).append(job)
        return job.task

    def instances(self) -> frozenset[str]:
        """Return the instances that have a job in hand."""
        return frozenset(self._in_hand)

    def cancel(self) -> None:
        """Cancel every job."""
        for task in self._tasks():
            task.cancel()

    async def settle(self, timeout_seconds: float | None = None) -> None:
        """Wait until the jobs in hand now have ended, at most so long."""
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=timeout_seconds)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [job.task for jobs in self._in_hand.values() for job in jobs]

    async def _in_turn(self, job: _Job, earlier: list[asyncio.Task[None]]) -> None:
        if earlier:
            await asyncio.wait(earlier)
        await self._run(job.ctx, job.order, self._log_of(job))

    def _end(self, job: _Job, task: asyncio.Task[None]) -> None:
        jobs = self._in_hand[job.order.instance_uuid]
        jobs.remove(job)
        if not jobs:
            del self._in_hand[job.order.instance_uuid]
        if task.cancelled():
            self._log_of(job).info("job_cancelled")
        elif error := task.exception():
            self._log_of(job).error("job_failed", exc_info=error)

    def _log_of(self, job: _Job) -> Log:
        order = job.order
        log = self._log.bind(
            order=type(order).__name__, instance_uuid=order.instance_uuid, request_id=job.ctx.request_id
        )
        return log.bind(action=order.action) if isinstance(order, ActOnInstance) else log.bind(attempt=order.attempt)


def _repeats(job: _Job, other: _Job) -> bool:
    """Tell whether `other`, which is in hand, does all that `job` would do."""
    match job.order, other.order:
        case BuildInstance(attempt=mine), BuildInstance(attempt=theirs):
            return mine <= theirs
        case ActOnInstance(action=mine), ActOnInstance(action=theirs):
            return mine == theirs and job.ctx.request_id == other.ctx.request_id
        case DestroyInstance(attempt=mine), DestroyInstance(attempt=theirs):
            return theirs is None or (mine is not None and mine <= theirs)
        case _:
            return False


def _withdraws(order: Order, other: Order) -> bool:
    """Tell whether `other`, which is in hand, has become pointless by `order`."""
    match order, other:
        case DestroyInstance(attempt=None), BuildInstance() | ActOnInstance() | AssignedInstance():
            return True
        case DestroyInstance(attempt=int() as up_to), BuildInstance(attempt=attempt):
            return attempt <= up_to
        case BuildInstance(attempt=newer), BuildInstance(attempt=attempt):
            return attempt < newer
        case _:
            return False
