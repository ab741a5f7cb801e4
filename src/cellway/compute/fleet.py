"""What one process knows of all hosts: which cell each is in, whether it is up, what it may promise.

A sweep reads every cell, maps new hosts, and writes changed capacity to the API database; the scheduler reads the
copy in memory. Whether a host is up is judged by this process's monotonic clock since it last saw the host's report
counter change, so nobody's wall clock can take a host down, and nor can a restart of ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from cellway import aggregates, hosts
from cellway.aggregates import Aggregate, Merged
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.compute.scheduler import HostState
from cellway.config import Limits
from cellway.context import Clock, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.errors import Conflict
from cellway.hosts import Capacity, HostRow

log = structlog.get_logger()


@dataclass(slots=True)
class _Seen:
    report_count: int
    changed_at: float
    looked_at: float


class Fleet:
    """The hosts of all cells."""

    def __init__(self, cells: Cells, *, limits: Limits, clock: Clock, default_zone: str) -> None:
        self.default_zone = default_zone
        self._cells = cells
        self._limits = limits
        self._clock = clock
        self._seen: dict[tuple[int, str], _Seen] = {}
        self._began = clock.monotonic()
        self._forced_down: set[tuple[int, str]] = set()
        self._unreachable: set[int] = set()
        self._refused: set[tuple[int, str]] = set()
        self._capacity: dict[str, Capacity] = {}
        self._readings = self._reading = 0
        self._aggregates: Sequence[Aggregate] = ()
        self._zones: Mapping[str, str] = {}
        self._metadata: Mapping[str, Merged] = {}

    # ---- liveness

    def observe(self, cell_id: int, row: HostRow) -> bool:
        """Take note of a host's row and tell whether the host is up."""
        now = self._clock.monotonic()
        seen = self._seen.get((cell_id, row.host))
        # Silence counts only while somebody looks: not while the cell's database, or this process, stood still.
        longest_pause = max(self._limits.heartbeat_seconds, 2 * self._limits.fleet_sweep_seconds)
        stood_still = seen is not None and now - seen.looked_at > longest_pause
        if seen is None or seen.report_count != row.report_count or stood_still:
            self._seen[cell_id, row.host] = _Seen(row.report_count, now, now)
        else:
            seen.looked_at = now
        (self._forced_down.add if row.forced_down else self._forced_down.discard)((cell_id, row.host))
        return self.is_up(cell_id, row.host)

    def is_up(self, cell_id: int, host: str) -> bool:
        """Tell whether a host has reported within the limit, as far as this process saw since it began."""
        seen = self._seen.get((cell_id, host))
        silent = self._clock.monotonic() - (self._began if seen is None else seen.changed_at)
        return silent <= self._limits.host_down_seconds and (cell_id, host) not in self._forced_down

    # ---- the scheduler's copy

    def states(self) -> list[HostState]:
        """Return every host as the scheduler sees it."""
        cells = self._cells.snapshot.by_id
        return [
            HostState(
                host=capacity.host,
                cell_id=capacity.cell_id,
                zone=self.zone_of(capacity.host),
                up=self.is_up(capacity.cell_id, capacity.host),
                enabled=not capacity.disabled,
                cell_enabled=capacity.cell_id in cells and not cells[capacity.cell_id].disabled,
                cell_answers=capacity.cell_id not in self._unreachable,
                vcpus=capacity.vcpus,
                memory_mb=capacity.memory_mb,
                disk_gb=capacity.disk_gb,
                vcpus_used=capacity.vcpus_used,
                memory_mb_used=capacity.memory_mb_used,
                disk_gb_used=capacity.disk_gb_used,
                metadata=self._metadata.get(capacity.host, {}),
            )
            for capacity in self._capacity.values()
        ]

    def zone_of(self, host: str) -> str:
        """Return the availability zone of a host: its oldest aggregate's that makes one, else the default."""
        return self._zones.get(host, self.default_zone)

    def status_of(self, host: str) -> str:
        """Return UP, DOWN, MAINTENANCE (disabled) or UNKNOWN (never seen)."""
        capacity = self._capacity.get(host)
        if capacity is None:
            return "UNKNOWN"
        if capacity.disabled:
            return "MAINTENANCE"
        return "UP" if self.is_up(capacity.cell_id, host) else "DOWN"

    def took(self, host: str, vcpus: int, memory_mb: int, disk_gb: int) -> None:
        """Count a claim that this process made; negative amounts give it back. The next sweep reads the truth."""
        capacity = self._capacity.get(host)
        if capacity is not None:
            self._capacity[host] = replace(
                capacity,
                vcpus_used=capacity.vcpus_used + vcpus,
                memory_mb_used=capacity.memory_mb_used + memory_mb,
                disk_gb_used=capacity.disk_gb_used + disk_gb,
            )

    async def reload(self) -> None:
        """Read again what every host may promise and has promised, and the aggregates."""
        self._readings += 1
        number = self._readings
        rows, found = await self._cells.databases.on(API).read(_capacity_and_aggregates)
        if number < self._reading:
            # It began before one that is here already: who waited for that has seen what may be missing in this.
            return
        self._reading = number
        self._capacity = {row.host: row for row in rows}
        if found != self._aggregates:
            self._aggregates = found
            self._zones, self._metadata = _zones(found), _metadata(found)

    # ---- sweeping

    async def sweep(self, context: RequestContext) -> int:
        """Read the hosts of every cell, map new ones and write what changed; return how many were mapped.

        A cell that does not answer is left as it was, and gets no builds until it does.
        """
        await self.reload()
        mapped = 0
        outcomes = await gather(
            self._cells,
            context,
            self._cells.snapshot.with_hosts,
            lambda _cell, cctx: self._cells.databases.on(cctx).read(hosts.list_rows),
        )
        for cell, outcome in outcomes.items():
            if isinstance(outcome, Answered):
                self._unreachable.discard(cell.id)
                mapped += await self._absorb(cell, outcome.value)
            else:
                self._unreachable.add(cell.id)
        if mapped:
            await self.reload()
        return mapped

    async def _absorb(self, cell: Cell, rows: list[HostRow]) -> int:
        mapped = 0
        for row in rows:
            self.observe(cell.id, row)
            wanted = _capacity(cell, row)
            present = self._capacity.get(row.host)
            if row.node_id is None or (present is not None and _same_limits(present, wanted)):
                continue
            try:
                new = await self._cells.databases.on(API).write(_map, wanted)
            except Conflict as error:
                # The name is taken by a host of another cell: this one gets no servers until one of them is renamed.
                if (cell.id, row.host) not in self._refused:
                    log.error("host_name_taken", host=row.host, cell=cell.ref.name, problem=error.message)
                self._refused.add((cell.id, row.host))
                continue
            used = present or wanted
            self._capacity[row.host] = replace(
                wanted,
                vcpus_used=used.vcpus_used,
                memory_mb_used=used.memory_mb_used,
                disk_gb_used=used.disk_gb_used,
            )
            if new:
                mapped += 1
                log.info("host_mapped", host=row.host, cell=cell.ref.name)
        return mapped

    async def watch(self, context: RequestContext) -> None:
        """Sweep for ever; a failure is logged once per outage."""
        failing = False
        while True:
            try:
                await self.sweep(context)
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("fleet_sweep_failed", error=repr(error))
                failing = True
            await self._clock.sleep(self._limits.fleet_sweep_seconds)


def _map(tx: ApiTx, capacity: Capacity) -> bool:
    new = mappings.map_host(tx, capacity.host, capacity.cell_id)
    hosts.put_capacity(tx, capacity)
    return new


def _capacity_and_aggregates(tx: ApiTx) -> tuple[Sequence[Capacity], Sequence[Aggregate]]:
    return hosts.list_capacity(tx), aggregates.list(tx)


def _zones(found: Sequence[Aggregate]) -> Mapping[str, str]:
    zones: dict[str, str] = {}
    for aggregate in found:
        if aggregate.zone is not None:
            for host in aggregate.hosts:
                zones.setdefault(host, aggregate.zone)
    return zones


def _metadata(found: Sequence[Aggregate]) -> Mapping[str, Merged]:
    places: dict[str, tuple[int, ...]] = {}
    for place, aggregate in enumerate(found):
        for host in aggregate.hosts:
            places[host] = (*places.get(host, ()), place)
    # Of many hosts few are in different aggregates.
    merged = {
        several: aggregates.merge(pair for place in several for pair in found[place].metadata.items())
        for several in {*places.values()}
    }
    return {host: merged[several] for host, several in places.items()}


def _capacity(cell: Cell, row: HostRow) -> Capacity:
    return Capacity(
        row.host,
        cell.id,
        int(row.vcpus * row.cpu_allocation_ratio),
        int(row.memory_mb * row.ram_allocation_ratio),
        int(row.local_gb * row.disk_allocation_ratio),
        row.disabled,
    )


def _same_limits(one: Capacity, other: Capacity) -> bool:
    return (one.cell_id, one.vcpus, one.memory_mb, one.disk_gb, one.disabled) == (
        other.cell_id,
        other.vcpus,
        other.memory_mb,
        other.disk_gb,
        other.disabled,
    )
