"""What may be asked about hosts: services and hypervisors over all cells. The HTTP shell and the command line call
this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog

from cellway import aggregates, hosts
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.compute.fleet import Fleet
from cellway.context import CellContext, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import CellUnavailable, NotFound
from cellway.hosts import HostRow

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HostInCell:
    """A host, the cell it is in, and whether it is up."""

    cell: Cell
    row: HostRow
    up: bool
    zone: str


class HostApi:
    """The verbs on hosts."""

    def __init__(self, cells: Cells, fleet: Fleet) -> None:
        self._cells = cells
        self._fleet = fleet

    def zone_of(self, host: str) -> str:
        """Return the availability zone of a host."""
        return self._fleet.zone_of(host)

    def status_of(self, host: str) -> str:
        """Return what a server's `host_status` says of its host: UP, DOWN, MAINTENANCE or UNKNOWN."""
        return self._fleet.status_of(host)

    async def list_hosts(self, context: RequestContext, *, complete: bool = False) -> list[HostInCell]:
        """Return every host, by cell and name. A cell that does not answer is left out and logged.

        Raises: CellUnavailable for such a cell when the list must be `complete`, as for finding the one host to change.
        """

        async def ask(_cell: Cell, cctx: CellContext) -> list[HostRow]:
            return await self._cells.databases.on(cctx).read(hosts.list_rows)

        found = []
        for cell, outcome in (await gather(self._cells, context, self._cells.snapshot.with_hosts, ask)).items():
            if not isinstance(outcome, Answered):
                if complete:
                    raise CellUnavailable(
                        "cell.unavailable", f"Cell {cell.ref.name} is not available", cell=cell.ref.name
                    )
                log.warning("cell_left_out_of_list", cell=cell.ref.name, request_id=context.request_id)
                continue
            found += [
                HostInCell(cell, row, self._fleet.observe(cell.id, row), self._fleet.zone_of(row.host))
                for row in outcome.value
            ]
        return found

    async def get_host(self, context: RequestContext, fits: Callable[[HostRow], bool], named: str) -> HostInCell:
        """Return the first host that fits. Raises: NotFound naming `named`."""
        for host in await self.list_hosts(context):
            if fits(host.row):
                return host
        raise NotFound("host.not_found", f"Compute host {named} could not be found.", host=named)

    async def update_service(self, context: RequestContext, host: HostInCell, changes: Mapping[str, Any]) -> HostInCell:
        """Set `disabled`, `disabled_reason` or `forced_down`, and return the host as it is then."""
        await self._in_cell(context, host.cell, hosts.update_service, host.row.host, dict(changes))
        await self._fleet.sweep(context)
        return await self.get_host(
            context, lambda row: row.service_id == host.row.service_id and row.host == host.row.host, host.row.host
        )

    async def delete_service(self, context: RequestContext, host: HostInCell) -> None:
        """Remove a host: its capacity, mapping and aggregates, so that no build can choose it, then from its cell.

        Raises: Conflict while it has servers; when the cell says so, the next sweep maps the host again.
        """
        await self._cells.databases.on(API).write_once(None, _forget_host, host.row.host)
        await self._fleet.reload()
        await self._in_cell(context, host.cell, hosts.delete_service, host.row.host)

    async def servers_on(self, context: RequestContext, of: Sequence[HostInCell]) -> dict[str, list[tuple[str, str]]]:
        """Return (uuid, name) of the servers of each host, asking each cell concerned once."""
        by_cell: dict[Cell, list[str]] = {}
        for host in of:
            by_cell.setdefault(host.cell, []).append(host.row.host)

        async def ask(cell: Cell, cctx: CellContext) -> dict[str, list[tuple[str, str]]]:
            return await self._cells.databases.on(cctx).read(hosts.servers_on, by_cell[cell])

        servers: dict[str, list[tuple[str, str]]] = {}
        for cell, outcome in (await gather(self._cells, context, by_cell, ask)).items():
            if isinstance(outcome, Answered):
                servers.update(outcome.value)
            else:
                log.warning("cell_left_out_of_list", cell=cell.ref.name, request_id=context.request_id)
        return servers

    async def _in_cell(
        self,
        context: RequestContext,
        cell: Cell,
        function: Callable[Concatenate[CellTx, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        with self._cells.target_cell(context, cell) as cctx:
            return await self._cells.databases.on(cctx).write_once(None, function, *args, **kwargs)


def _forget_host(tx: ApiTx, host: str) -> None:
    aggregates.forget_host(tx, host)
    hosts.drop_capacity(tx, host)
    mappings.unmap_host(tx, host)
