"""Changing aggregates: what must not move servers from one availability zone to another, whatever happens at once.

A change is made in its transaction, and the zones of the hosts concerned are compared before and after it. While a host
whose zone would change has servers, the transaction is rolled back. Servers that Cellway placed have claims in the API
database, which no build adds to while the host is held; others are known only to the host's cell, which is asked
between two tries, and no other cell is. The HTTP shell calls this. Seed 004.
"""

from collections.abc import Callable, Mapping

import structlog

from cellway import aggregates, hosts
from cellway.aggregates import ZONE_KEY, Aggregate
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.compute.fleet import Fleet
from cellway.context import CellContext, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.errors import CellUnavailable, Conflict, NotFound
from cellway.ids import IdSource

log = structlog.get_logger()

Change = Callable[[ApiTx], Aggregate]


class _NotAsked(Exception):
    """The zone of these hosts would change, and their cells were not asked for servers yet; the change is undone."""

    def __init__(self, moved: frozenset[str]) -> None:
        super().__init__()
        self.moved = moved


class AggregateApi:
    """The verbs on aggregates."""

    def __init__(self, cells: Cells, fleet: Fleet, *, ids: IdSource) -> None:
        self._cells = cells
        self._fleet = fleet
        self._ids = ids

    async def create(self, name: str, zone: str | None = None) -> Aggregate:
        """Make an aggregate without hosts, which is an availability zone if `zone` names one.

        Raises: Conflict when the name is taken; Invalid for a zone that cannot be one.
        """
        uuid, metadata = self._ids.uuid(), {} if zone is None else {ZONE_KEY: zone}
        return await self._cells.databases.on(API).write_once(
            lambda tx: aggregates.find_id(tx, uuid) is not None, aggregates.create, uuid, name, metadata
        )

    async def update(
        self,
        context: RequestContext,
        aggregate_id: int,
        *,
        name: str | None = None,
        metadata: Mapping[str, str | None] | None = None,
    ) -> Aggregate:
        """Rename an aggregate, and set the keys of `metadata`, or remove those whose value is None; others stay.

        Raises: NotFound; Conflict when the name is taken, a host is in another zone, or servers would change theirs;
        Invalid for a zone that cannot be one; CellUnavailable when it cannot be known whether there are servers.
        """

        def change(tx: ApiTx) -> Aggregate:
            return aggregates.update(tx, aggregate_id, name=name, metadata=metadata)

        if metadata is None or ZONE_KEY not in metadata:
            changed = await self._cells.databases.on(API).write_once(None, change)
            await self._fleet.reload()
            return changed
        return await self._change(context, aggregate_id, None, change)

    async def delete(self, aggregate_id: int) -> None:
        """Remove an aggregate. Raises: NotFound; Conflict while it has hosts."""
        await self._cells.databases.on(API).write_once(None, aggregates.delete, aggregate_id)
        await self._fleet.reload()

    async def add_host(self, context: RequestContext, aggregate_id: int, host: str) -> Aggregate:
        """Put a host with a compute service into an aggregate.

        Raises: NotFound for either; Conflict when it is there, or in another zone, or its servers would change theirs;
        CellUnavailable when it cannot be known whether there are servers.
        """

        def change(tx: ApiTx) -> Aggregate:
            if host not in hosts.hold(tx, [host]):
                raise NotFound("host.not_found", f"Compute host {host} could not be found.", host=host)
            return aggregates.add_host(tx, aggregate_id, host)

        return await self._change(context, aggregate_id, host, change)

    async def remove_host(self, context: RequestContext, aggregate_id: int, host: str) -> Aggregate:
        """Take a host out of an aggregate.

        Raises: NotFound; Conflict when its servers would change their zone; CellUnavailable when it cannot be known
        whether there are any.
        """
        return await self._change(
            context, aggregate_id, host, lambda tx: aggregates.remove_host(tx, aggregate_id, host)
        )

    async def _change(self, context: RequestContext, aggregate_id: int, host: str | None, change: Change) -> Aggregate:
        """Make a change that concerns the zone of one host, or of all of the aggregate's."""
        api = self._cells.databases.on(API)
        empty: frozenset[str] = frozenset()
        while True:
            try:
                changed = await api.write_once(
                    None, _guarded, aggregate_id, host, change, empty, self._fleet.default_zone
                )
            except _NotAsked as found:
                await self._check_empty(context, found.moved)
                empty |= found.moved
            else:
                await self._fleet.reload()
                return changed

    async def _check_empty(self, context: RequestContext, names: frozenset[str]) -> None:
        """Ask the cells of these hosts, and no others. Raises: Conflict; CellUnavailable."""
        cell_of = await self._cells.databases.on(API).read(mappings.cells_of_hosts, names)
        if not self._cells.snapshot.by_id.keys() >= {*cell_of.values()}:
            await self._cells.refresh()
        by_cell: dict[Cell, list[str]] = {}
        for name, cell_id in cell_of.items():
            by_cell.setdefault(self._cells.snapshot.by_id[cell_id], []).append(name)

        async def ask(cell: Cell, cctx: CellContext) -> set[str]:
            return await self._cells.databases.on(cctx).read(hosts.with_servers, by_cell[cell])

        busy, silent = set[str](), list[str]()
        for cell, outcome in (await gather(self._cells, context, by_cell, ask)).items():
            if isinstance(outcome, Answered):
                busy |= outcome.value
            else:
                silent.append(cell.ref.name)
        if busy:
            raise _has_servers(busy)
        if silent:
            log.warning("cells_not_asked", cells=silent, request_id=context.request_id)
            raise CellUnavailable(
                "cell.unavailable",
                f"The availability zone of hosts of {_some(silent)} would change, and whether they have servers is not "
                "known: the cell does not answer",
                cell=silent[0],
            )


def _guarded(
    tx: ApiTx, aggregate_id: int, host: str | None, change: Change, empty: frozenset[str], default_zone: str
) -> Aggregate:
    """Make the change unless a host with servers would get another zone. `empty` hosts have none that a cell knows of.

    Raises: _NotAsked; Conflict; what the change raises.
    """
    aggregates.hold(tx)
    concerned = aggregates.get(tx, aggregate_id).hosts if host is None else (host,)
    # From here on no build gets one of them; one that waits for it reads the zone again.
    hosts.hold(tx, concerned)
    before = aggregates.zones_of(tx, concerned)
    changed = change(tx)
    after = aggregates.zones_of(tx, concerned)
    for name, zones in after.items():
        if len(zones) > 1 and not {*zones} <= {*before.get(name, ())}:
            raise Conflict(
                "aggregate.host_in_zone",
                f"Host {name} is already in an availability zone: {', '.join(before.get(name, zones))}",
                host=name,
            )
    none = (default_zone,)
    moved = frozenset(name for name in concerned if before.get(name, none)[0] != after.get(name, none)[0])
    if busy := hosts.with_claims(tx, moved):
        raise _has_servers(busy)
    if not moved <= empty:
        raise _NotAsked(moved)
    return changed


def _has_servers(names: set[str]) -> Conflict:
    message = f"The availability zone of hosts with servers would change: {_some(names)}"
    return Conflict("aggregate.hosts_have_servers", message, hosts=sorted(names))


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
