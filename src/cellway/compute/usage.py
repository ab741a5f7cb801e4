"""What projects took over a period, over all cells. `http/tenant_usage.py` calls this.

Every cell is asked once and at the same time; one that does not answer is left out and logged, as in lists of servers.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from heapq import merge
from itertools import islice
from typing import TypeVar

import structlog

from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.context import CellContext, RequestContext
from cellway.errors import Invalid
from cellway.instances import usage
from cellway.instances.usage import ProjectUsage, ServerUsage

T = TypeVar("T")

log = structlog.get_logger()


class UsageApi:
    """The questions about usage."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    async def list_projects(self, context: RequestContext, start: datetime, stop: datetime) -> Sequence[ProjectUsage]:
        """Return what each project took of a period, by project. The cells do the sums."""

        async def ask(_cell: Cell, cctx: CellContext) -> list[ProjectUsage]:
            return await self._cells.databases.on(cctx).read(usage.list_sums, start, stop)

        return usage.add_up(part for parts in await self._answers(context, ask) for part in parts)

    async def list_servers(
        self,
        context: RequestContext,
        start: datetime,
        stop: datetime,
        *,
        project_id: str | None,
        limit: int,
        marker: str | None,
    ) -> Sequence[ServerUsage]:
        """Return a page of the servers of a period, of one project or all, by project and uuid.

        Raises: Invalid for a marker that is no server, or another project's.
        """
        after = None
        if marker is not None:
            mapping = await self._cells.find_mapping(marker)
            if mapping is None or project_id not in (None, mapping.project_id):
                raise Invalid("request.bad_marker", f"marker [{marker}] not found", marker=marker)
            after = (mapping.project_id, mapping.instance_uuid)

        async def ask(_cell: Cell, cctx: CellContext) -> list[ServerUsage]:
            return await self._cells.databases.on(cctx).read(usage.list_servers, start, stop, project_id, limit, after)

        pages = await self._answers(context, ask)
        return list(islice(merge(*pages, key=lambda one: (one.project_id, one.uuid)), limit))

    async def _answers(self, context: RequestContext, ask: Callable[[Cell, CellContext], Awaitable[T]]) -> Sequence[T]:
        """Ask every cell that has hosts: what never ran is not counted, so cell0 has nothing to say."""
        answers = []
        for cell, outcome in (await gather(self._cells, context, self._cells.snapshot.with_hosts, ask)).items():
            if isinstance(outcome, Answered):
                answers.append(outcome.value)
            else:
                log.warning("cell_left_out_of_usage", cell=cell.ref.name, request_id=context.request_id)
        return answers
