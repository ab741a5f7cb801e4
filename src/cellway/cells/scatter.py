"""Asking many cells at once. What each said is a value: an outcome, never an exception among the answers.

Every read that crosses cells goes through `gather`, so that one bad cell is handled in one place. It knows nothing of
what is asked; the policy for failures (fail, skip, mark) is the caller's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from cellway.cells.registry import Cell, Cells
from cellway.context import CellContext, RequestContext
from cellway.db.engines import CELL_DEADLINE
from cellway.errors import CellwayError, DeadlineExceeded

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answered(Generic[T]):
    """The cell gave this."""

    value: T


@dataclass(frozen=True, slots=True)
class Failed:
    """The cell, or the way to it, gave an error."""

    error: CellwayError


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The cell said nothing within the deadline."""

    seconds: float


Outcome: TypeAlias = Answered[T] | Failed | TimedOut


async def gather(
    cells: Cells,
    context: RequestContext,
    among: Iterable[Cell],
    ask: Callable[[Cell, CellContext], Awaitable[T]],
    *,
    deadline_seconds: float | None = None,
) -> Mapping[Cell, Outcome[T]]:
    """Run `ask` in every cell of `among`, targeted there, and return each one's outcome in the given order.

    They run at once, `Limits.scatter_concurrency` at most; each has a deadline of its own (the cell read's by default).
    A programming error is not an outcome: it is raised, after all have ended.
    """
    seconds = deadline_seconds if deadline_seconds is not None else cells.limits.database_deadline_seconds + 0.25
    turn = asyncio.Semaphore(cells.limits.scatter_concurrency)

    async def one(cell: Cell) -> Outcome[T]:
        async with turn:
            try:
                async with asyncio.timeout(seconds):
                    with cells.target_cell(context, cell) as cctx:
                        return Answered(await ask(cell, cctx))
            except (TimeoutError, DeadlineExceeded):
                return TimedOut(seconds)
            except CellwayError as error:
                return TimedOut(seconds) if error.code == CELL_DEADLINE else Failed(error)

    targets = tuple(among)
    outcomes = await asyncio.gather(*(one(cell) for cell in targets), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return {
        cell: outcome for cell, outcome in zip(targets, outcomes, strict=True) if not isinstance(outcome, BaseException)
    }
