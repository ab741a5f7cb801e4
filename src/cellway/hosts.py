"""Hosts: what each has and does (in its cell), and what of it is promised to servers (in the API database).

The cell's half is written by conductors on behalf of agents: services, compute nodes, epochs. The API database's half
is swept from the cells by `compute/fleet.py` and decides who gets a host: a claim is one conditional update, so
concurrent builds cannot promise more than there is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cellway.db.api_tables import host_capacity, host_claims
from cellway.db.cell_tables import compute_nodes, host_reports, instances, services
from cellway.db.transaction import ApiTx, CellTx, Row, insert_if_absent
from cellway.errors import Conflict, NotFound
from cellway.rpc.calls import HostReport, HostResources

COMPUTE_BINARY = "nova-compute"
"""The name under which clients look for an agent's service."""

# ---- in a cell -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host as its cell has it: its service and its compute node."""

    host: str
    service_id: int
    service_uuid: str
    report_count: int
    last_seen_up: datetime | None
    service_updated_at: datetime | None
    disabled: bool
    disabled_reason: str | None
    forced_down: bool
    node_id: int | None
    node_uuid: str | None
    hypervisor_hostname: str | None
    hypervisor_type: str | None
    hypervisor_version: int | None
    host_ip: str | None
    cpu_info: str | None
    vcpus: int
    vcpus_used: int
    memory_mb: int
    memory_mb_used: int
    local_gb: int
    local_gb_used: int
    running_vms: int
    cpu_allocation_ratio: float
    ram_allocation_ratio: float
    disk_allocation_ratio: float


_LIST = (
    sa.select(
        services.c.host,
        services.c.id,
        services.c.uuid,
        services.c.report_count,
        services.c.last_seen_up,
        services.c.updated_at,
        services.c.disabled,
        services.c.disabled_reason,
        services.c.forced_down,
        compute_nodes.c.id,
        compute_nodes.c.uuid,
        compute_nodes.c.hypervisor_hostname,
        compute_nodes.c.hypervisor_type,
        compute_nodes.c.hypervisor_version,
        compute_nodes.c.host_ip,
        compute_nodes.c.cpu_info,
        compute_nodes.c.vcpus,
        compute_nodes.c.vcpus_used,
        compute_nodes.c.memory_mb,
        compute_nodes.c.memory_mb_used,
        compute_nodes.c.local_gb,
        compute_nodes.c.local_gb_used,
        compute_nodes.c.running_vms,
        compute_nodes.c.cpu_allocation_ratio,
        compute_nodes.c.ram_allocation_ratio,
        compute_nodes.c.disk_allocation_ratio,
    )
    .outerjoin(compute_nodes, sa.and_(compute_nodes.c.host == services.c.host, compute_nodes.c.deleted == 0))
    .where(services.c.binary == COMPUTE_BINARY, services.c.deleted == 0)
    .order_by(services.c.host)
)
_SERVICE = sa.select(services.c.id).where(
    services.c.host == sa.bindparam("the_host"), services.c.binary == COMPUTE_BINARY, services.c.deleted == 0
)
_NODE = sa.select(compute_nodes.c.id).where(
    compute_nodes.c.host == sa.bindparam("the_host"), compute_nodes.c.deleted == 0
)
_EPOCH = sa.select(host_reports.c.epoch).where(host_reports.c.host == sa.bindparam("the_host"))
_NEXT_EPOCH = (
    sa.update(host_reports)
    .where(host_reports.c.host == sa.bindparam("the_host"))
    .values(epoch=host_reports.c.epoch + 1, sequence=0, updated_at=sa.bindparam("now"))
)
_REPORT = (
    sa.update(host_reports)
    .where(
        host_reports.c.host == sa.bindparam("the_host"),
        host_reports.c.epoch == sa.bindparam("the_epoch"),
        host_reports.c.sequence < sa.bindparam("the_sequence"),
    )
    .values(sequence=sa.bindparam("the_sequence"), updated_at=sa.bindparam("now"))
)
_SEEN = (
    sa.update(services)
    .where(services.c.host == sa.bindparam("the_host"), services.c.binary == COMPUTE_BINARY, services.c.deleted == 0)
    .values(report_count=services.c.report_count + 1, last_seen_up=sa.bindparam("now"), updated_at=sa.bindparam("now"))
)
_USED = (
    sa.update(compute_nodes)
    .where(compute_nodes.c.host == sa.bindparam("the_host"), compute_nodes.c.deleted == 0)
    .values(
        vcpus_used=sa.bindparam("cpus"),
        memory_mb_used=sa.bindparam("memory"),
        local_gb_used=sa.bindparam("disk"),
        free_ram_mb=compute_nodes.c.memory_mb - sa.bindparam("memory"),
        free_disk_gb=compute_nodes.c.local_gb - sa.bindparam("disk"),
        running_vms=sa.bindparam("running"),
        updated_at=sa.bindparam("now"),
    )
)
_SERVERS = (
    sa.select(instances.c.host, instances.c.uuid, instances.c.display_name)
    .where(instances.c.host.in_(sa.bindparam("hosts", expanding=True)), instances.c.deleted == 0)
    .order_by(instances.c.id)
)
_WITH_SERVERS = (
    sa.select(instances.c.host)
    .where(instances.c.host.in_(sa.bindparam("hosts", expanding=True)), instances.c.deleted == 0)
    .distinct()
)
_LIVE_ON = sa.select(sa.func.count()).where(instances.c.host == sa.bindparam("the_host"), instances.c.deleted == 0)


def list_rows(tx: CellTx) -> list[HostRow]:
    """Return the hosts of this cell, by name."""
    return [_row(row) for row in tx.execute(_LIST)]


def _row(row: Row) -> HostRow:
    (
        host, service_id, service_uuid, report_count, last_seen_up, updated_at, disabled, reason, forced_down, node_id,
        node_uuid, name, kind, version, ip, cpu_info, *numbers,
    ) = row  # fmt: skip
    whole, ratios = numbers[:7], numbers[7:]
    return HostRow(
        host, service_id, service_uuid or "", report_count, last_seen_up, updated_at, bool(disabled), reason,
        bool(forced_down), node_id, node_uuid, name, kind, version, str(ip) if ip else None, cpu_info,
        *(number or 0 for number in whole), *(ratio or 1.0 for ratio in ratios),
    )  # fmt: skip


def register(
    tx: CellTx, host: str, resources: HostResources, *, service_uuid: str, node_uuid: str, version: int
) -> int:
    """Write a starting host's service and compute node, and return its new epoch.

    The uuids are used only when the host is new here.
    """
    insert_if_absent(tx, host_reports, {"host": host, "epoch": 0, "sequence": 0, "updated_at": tx.now})
    tx.execute(_NEXT_EPOCH, {"the_host": host, "now": tx.now})
    if tx.execute(_SERVICE, {"the_host": host}).first() is None:
        tx.execute(
            sa.insert(services),
            {
                "created_at": tx.now, "host": host, "binary": COMPUTE_BINARY, "topic": "compute", "report_count": 0,
                "disabled": False, "forced_down": False, "version": version, "uuid": service_uuid, "deleted": 0,
            },
        )  # fmt: skip
    tx.execute(_SEEN, {"the_host": host, "now": tx.now})
    values = {
        "updated_at": tx.now,
        "vcpus": resources.vcpus,
        "memory_mb": resources.memory_mb,
        "local_gb": resources.disk_gb,
        "hypervisor_type": resources.hypervisor_type,
        "hypervisor_version": resources.hypervisor_version,
        "hypervisor_hostname": resources.hypervisor_hostname,
        "cpu_info": resources.cpu_info,
        "host_ip": resources.host_ip,
        "cpu_allocation_ratio": resources.cpu_allocation_ratio,
        "ram_allocation_ratio": resources.ram_allocation_ratio,
        "disk_allocation_ratio": resources.disk_allocation_ratio,
    }
    node = tx.execute(_NODE, {"the_host": host}).first()
    if node is not None:
        tx.execute(sa.update(compute_nodes).where(compute_nodes.c.id == node.id), values)
    else:
        unused = {"vcpus_used": 0, "memory_mb_used": 0, "local_gb_used": 0, "running_vms": 0, "current_workload": 0}
        new = {"created_at": tx.now, "host": host, "uuid": node_uuid, "deleted": 0, "mapped": 0, "stats": "{}"}
        tx.execute(sa.insert(compute_nodes), values | unused | new)
    return int(tx.execute(_EPOCH, {"the_host": host}).scalar_one())


def check_epoch(tx: CellTx, host: str, epoch: int) -> bool:
    """Tell whether `epoch` is the host's present one. Raises: NotFound for a host that never registered here."""
    present = tx.execute(_EPOCH, {"the_host": host}).scalar_one_or_none()
    if present is None:
        raise NotFound("host.not_registered", f"Host {host} has not registered in this cell", host=host)
    return int(present) == epoch


def report(tx: CellTx, beat: HostReport) -> bool:
    """Write a heartbeat, unless a later one was here; False for a past epoch: that ends the agent. Raises: NotFound."""
    if not check_epoch(tx, beat.host, beat.epoch):
        return False
    moved = tx.execute(
        _REPORT, {"the_host": beat.host, "the_epoch": beat.epoch, "the_sequence": beat.sequence, "now": tx.now}
    )
    if moved.rowcount == 1:
        tx.execute(_SEEN, {"the_host": beat.host, "now": tx.now})
        used = {
            "cpus": beat.vcpus_used,
            "memory": beat.memory_mb_used,
            "disk": beat.disk_gb_used,
            "running": beat.running,
        }
        tx.execute(_USED, {"the_host": beat.host, "now": tx.now, **used})
    return True


def update_service(tx: CellTx, host: str, changes: dict[str, Any]) -> None:
    """Set `disabled`, `disabled_reason` or `forced_down` of a host's service. Raises: NotFound."""
    changed = tx.execute(
        sa.update(services)
        .where(services.c.host == host, services.c.binary == COMPUTE_BINARY, services.c.deleted == 0)
        .values(updated_at=tx.now, **changes)
    )
    if changed.rowcount != 1:
        raise NotFound("service.not_found", f"Service {COMPUTE_BINARY} on host {host} could not be found.", host=host)


def delete_service(tx: CellTx, host: str) -> None:
    """Remove a host's service and compute node. Raises: Conflict while it has servers."""
    if tx.execute(_LIVE_ON, {"the_host": host}).scalar_one():
        raise Conflict(
            "host.has_servers", f"Unable to delete compute service on {host}: it is hosting instances", host=host
        )
    for table in (services, compute_nodes):
        tx.execute(
            sa.update(table)
            .where(table.c.host == host, table.c.deleted == 0)
            .values(deleted=table.c.id, deleted_at=tx.now)
        )


def servers_on(tx: CellTx, names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return (uuid, name) of the live servers of each host."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for host, uuid, name in tx.execute(_SERVERS, {"hosts": list(names)}):
        found[host].append((uuid, name or ""))
    return found


def with_servers(tx: CellTx, names: Collection[str]) -> set[str]:
    """Return those of the hosts that have servers in this cell, soft-deleted ones included."""
    return {*tx.execute(_WITH_SERVERS, {"hosts": [*names]}).scalars()}.intersection(names)


# ---- in the API database ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a host may promise (allocation ratios applied), and what it has promised."""

    host: str
    cell_id: int
    vcpus: int
    memory_mb: int
    disk_gb: int
    disabled: bool
    vcpus_used: int = 0
    memory_mb_used: int = 0
    disk_gb_used: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A server's share of a host."""

    instance_uuid: str
    host: str
    cell_id: int
    vcpus: int
    memory_mb: int
    disk_gb: int


_CAPACITIES = sa.select(
    host_capacity.c.host,
    host_capacity.c.cell_id,
    host_capacity.c.vcpus,
    host_capacity.c.memory_mb,
    host_capacity.c.disk_gb,
    host_capacity.c.disabled,
    host_capacity.c.vcpus_used,
    host_capacity.c.memory_mb_used,
    host_capacity.c.disk_gb_used,
)
_CLAIM = sa.select(
    host_claims.c.instance_uuid,
    host_claims.c.host,
    host_claims.c.cell_id,
    host_claims.c.vcpus,
    host_claims.c.memory_mb,
    host_claims.c.disk_gb,
).where(host_claims.c.instance_uuid == sa.bindparam("the_uuid"))
_HOLD = (
    sa.select(host_capacity.c.host)
    .where(host_capacity.c.host.in_(sa.bindparam("hosts", expanding=True)))
    .order_by(host_capacity.c.host)
    .with_for_update()
)
_WITH_CLAIMS = (
    sa.select(host_claims.c.host).where(host_claims.c.host.in_(sa.bindparam("hosts", expanding=True))).distinct()
)
_TAKE = (
    sa.update(host_capacity)
    .where(
        host_capacity.c.host == sa.bindparam("the_host"),
        host_capacity.c.cell_id == sa.bindparam("the_cell"),
        sa.not_(host_capacity.c.disabled),
        host_capacity.c.vcpus_used + sa.bindparam("cpus") <= host_capacity.c.vcpus,
        host_capacity.c.memory_mb_used + sa.bindparam("memory") <= host_capacity.c.memory_mb,
        host_capacity.c.disk_gb_used + sa.bindparam("disk") <= host_capacity.c.disk_gb,
    )
    .values(
        vcpus_used=host_capacity.c.vcpus_used + sa.bindparam("cpus"),
        memory_mb_used=host_capacity.c.memory_mb_used + sa.bindparam("memory"),
        disk_gb_used=host_capacity.c.disk_gb_used + sa.bindparam("disk"),
    )
)
_GIVE = (
    sa.update(host_capacity)
    .where(host_capacity.c.host == sa.bindparam("the_host"))
    .values(
        vcpus_used=host_capacity.c.vcpus_used - sa.bindparam("cpus"),
        memory_mb_used=host_capacity.c.memory_mb_used - sa.bindparam("memory"),
        disk_gb_used=host_capacity.c.disk_gb_used - sa.bindparam("disk"),
    )
)


def list_capacity(tx: ApiTx) -> list[Capacity]:
    """Return what every host may promise and has promised."""
    return [Capacity(*row) for row in tx.execute(_CAPACITIES)]


def put_capacity(tx: ApiTx, capacity: Capacity) -> None:
    """Write what a host may promise; what it has promised is left alone."""
    limits = {
        "cell_id": capacity.cell_id,
        "vcpus": capacity.vcpus,
        "memory_mb": capacity.memory_mb,
        "disk_gb": capacity.disk_gb,
        "disabled": capacity.disabled,
    }
    unused = {"vcpus_used": 0, "memory_mb_used": 0, "disk_gb_used": 0}
    if not insert_if_absent(tx, host_capacity, {"created_at": tx.now, "host": capacity.host, **limits, **unused}):
        tx.execute(
            sa.update(host_capacity).where(host_capacity.c.host == capacity.host).values(updated_at=tx.now, **limits)
        )


def drop_capacity(tx: ApiTx, host: str) -> None:
    """Forget a host that was removed. Raises: Conflict while servers claim it."""
    if tx.execute(sa.select(host_claims.c.id).where(host_claims.c.host == host)).first() is not None:
        raise Conflict("host.has_servers", f"Host {host} has servers", host=host)
    tx.execute(sa.delete(host_capacity).where(host_capacity.c.host == host))


def hold(tx: ApiTx, names: Collection[str]) -> set[str]:
    """Keep builds from claiming these hosts until the transaction ends; return those that have a compute service."""
    return {*tx.execute(_HOLD, {"hosts": [*names]}).scalars()}.intersection(names)


def with_claims(tx: ApiTx, names: Collection[str]) -> set[str]:
    """Return those of the hosts that servers claim, also servers that are still being built."""
    return {*tx.execute(_WITH_CLAIMS, {"hosts": [*names]}).scalars()}.intersection(names)


def find_claim(tx: ApiTx, instance_uuid: str) -> Claim | None:
    """Return a server's claim."""
    row = tx.execute(_CLAIM, {"the_uuid": instance_uuid}).one_or_none()
    return Claim(*row) if row is not None else None


def claim(tx: ApiTx, wanted: Claim) -> bool:
    """Take a share of a host if it has room; tell whether it had.

    Raises: Conflict when the server has a claim already.
    """
    shares = {"cpus": wanted.vcpus, "memory": wanted.memory_mb, "disk": wanted.disk_gb}
    row = {
        "created_at": tx.now,
        "instance_uuid": wanted.instance_uuid,
        "host": wanted.host,
        "cell_id": wanted.cell_id,
        "vcpus": wanted.vcpus,
        "memory_mb": wanted.memory_mb,
        "disk_gb": wanted.disk_gb,
    }
    if not insert_if_absent(tx, host_claims, row):
        raise Conflict(
            "host.claimed", f"Instance {wanted.instance_uuid} has a claim already", instance=wanted.instance_uuid
        )
    if tx.execute(_TAKE, {"the_host": wanted.host, "the_cell": wanted.cell_id, **shares}).rowcount == 1:
        return True
    tx.execute(sa.delete(host_claims).where(host_claims.c.instance_uuid == wanted.instance_uuid))
    return False


def release(tx: ApiTx, instance_uuid: str) -> bool:
    """Give a server's share back, once; tell whether there was one."""
    held = find_claim(tx, instance_uuid)
    if held is None:
        return False
    # The row count decides who gives back: of two at once, one deletes the row.
    if tx.execute(sa.delete(host_claims).where(host_claims.c.instance_uuid == instance_uuid)).rowcount != 1:
        return False
    tx.execute(_GIVE, {"the_host": held.host, "cpus": held.vcpus, "memory": held.memory_mb, "disk": held.disk_gb})
    return True
