"""The three mappings of the API database: cells, hosts and instances (seed 002), and their queries.

An instance mapping exists before its cell is chosen (`cell_id` NULL) and outlives the instance: it goes when the
instance's row is purged. `cells/registry.py`, the verbs and the command line call these.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from cellway.config import Secret
from cellway.db.api_tables import cell_mappings, host_mappings, instance_mappings
from cellway.db.transaction import ApiTx, Row, insert_if_absent, unique_violation
from cellway.errors import Conflict, NotFound
from cellway.ids import CELL0_UUID, CellUuid


@dataclass(frozen=True, slots=True)
class CellMapping:
    """A cell as it is stored. The URLs may be templates or references; `cells/registry.py` resolves them."""

    id: int
    uuid: CellUuid
    name: str
    transport_url: Secret = field(repr=False)
    database_connection: Secret = field(repr=False)
    disabled: bool = False

    @property
    def is_cell0(self) -> bool:
        """Whether this is the cell without hosts."""
        return self.uuid == CELL0_UUID


@dataclass(frozen=True, slots=True)
class InstanceMapping:
    """Where an instance is. `cell_id` is None until a cell is chosen."""

    instance_uuid: str
    cell_id: int | None
    project_id: str
    user_id: str
    queued_for_delete: bool


@dataclass(frozen=True, slots=True)
class HostMapping:
    """Which cell a host belongs to. Host names are unique over all cells."""

    host: str
    cell_id: int


# ---- cells -----------------------------------------------------------------------------------------------------

_CELLS = sa.select(
    cell_mappings.c.id,
    cell_mappings.c.uuid,
    cell_mappings.c.name,
    cell_mappings.c.transport_url,
    cell_mappings.c.database_connection,
    cell_mappings.c.disabled,
).order_by(cell_mappings.c.id)


def _cell(row: Row) -> CellMapping:
    return CellMapping(
        row.id,
        CellUuid(row.uuid),
        row.name or row.uuid,
        Secret(row.transport_url or "none:///"),
        Secret(row.database_connection or ""),
        bool(row.disabled),
    )


def list_cells(tx: ApiTx) -> list[CellMapping]:
    """Return every cell, in the order in which they were made."""
    return [_cell(row) for row in tx.execute(_CELLS)]


def get_cell(tx: ApiTx, name_or_uuid: str) -> CellMapping:
    """Return one cell, by uuid or by name.

    Raises: NotFound; Conflict when several cells have that name.
    """
    cells = list_cells(tx)
    found = [cell for cell in cells if cell.uuid == name_or_uuid] or [
        cell for cell in cells if cell.name == name_or_uuid
    ]
    if not found:
        raise NotFound("cell.not_found", f"There is no cell {name_or_uuid}", cell=name_or_uuid)
    if len(found) > 1:
        raise Conflict("cell.ambiguous", f"Several cells are named {name_or_uuid}; use the uuid", cell=name_or_uuid)
    return found[0]


def create_cell(
    tx: ApiTx, uuid: CellUuid, name: str, *, transport_url: Secret, database_connection: Secret, disabled: bool = False
) -> CellMapping:
    """Add a cell.

    Raises: Conflict when the uuid or the name is taken.
    """
    if any(cell.name == name for cell in list_cells(tx)):
        raise Conflict("cell.exists", f"There is already a cell {name}", cell=name)
    with unique_violation(Conflict("cell.exists", f"There is already a cell {uuid}", cell=uuid)):
        tx.execute(
            sa.insert(cell_mappings),
            {
                "created_at": tx.now,
                "uuid": uuid,
                "name": name,
                "transport_url": transport_url.reveal(),
                "database_connection": database_connection.reveal(),
                "disabled": disabled,
            },
        )
    return get_cell(tx, uuid)


def update_cell(
    tx: ApiTx,
    uuid: CellUuid,
    *,
    name: str | None = None,
    transport_url: Secret | None = None,
    database_connection: Secret | None = None,
    disabled: bool | None = None,
) -> CellMapping:
    """Change what is given; None leaves a value as it is.

    Raises: NotFound; Conflict when another cell has the name.
    """
    before = get_cell(tx, uuid)
    if name is not None and any(cell.name == name and cell.uuid != uuid for cell in list_cells(tx)):
        raise Conflict("cell.exists", f"There is already a cell {name}", cell=name)
    changes: dict[str, Any] = {"updated_at": tx.now}
    if name is not None:
        changes["name"] = name
    if transport_url is not None:
        changes["transport_url"] = transport_url.reveal()
    if database_connection is not None:
        changes["database_connection"] = database_connection.reveal()
    if disabled is not None:
        changes["disabled"] = disabled
    tx.execute(sa.update(cell_mappings).where(cell_mappings.c.id == before.id), changes)
    return get_cell(tx, uuid)


def delete_cell(tx: ApiTx, cell: CellMapping) -> None:
    """Remove a cell and the mappings of its deleted instances.

    Raises: Conflict while hosts or live instances are mapped to it, with both counts.
    """
    hosts = count_hosts(tx, cell.id)
    servers = count_instances(tx, cell.id)
    if hosts or servers:
        raise Conflict(
            "cell.not_empty",
            f"{cell.name} has {hosts} hosts and {servers} servers, so it is not deleted",
            cell=cell.name,
            hosts=hosts,
            servers=servers,
        )
    tx.execute(sa.delete(instance_mappings).where(instance_mappings.c.cell_id == cell.id))
    tx.execute(sa.delete(cell_mappings).where(cell_mappings.c.id == cell.id))


# ---- hosts -----------------------------------------------------------------------------------------------------

_HOSTS = sa.select(host_mappings.c.host, host_mappings.c.cell_id).order_by(host_mappings.c.host)
_HOST = _HOSTS.where(host_mappings.c.host == sa.bindparam("host"))
_THESE_HOSTS = _HOSTS.where(host_mappings.c.host.in_(sa.bindparam("hosts", expanding=True)))
_COUNT_HOSTS = sa.select(sa.func.count()).where(host_mappings.c.cell_id == sa.bindparam("cell"))


def list_hosts(tx: ApiTx) -> list[HostMapping]:
    """Return every mapped host, by name."""
    return [HostMapping(row.host, row.cell_id) for row in tx.execute(_HOSTS)]


def find_host(tx: ApiTx, host: str) -> HostMapping | None:
    """Return the mapping of one host."""
    row = tx.execute(_HOST, {"host": host}).one_or_none()
    return HostMapping(row.host, row.cell_id) if row is not None else None


def cells_of_hosts(tx: ApiTx, hosts: Collection[str]) -> dict[str, int]:
    """Return the id of the cell of each of these hosts; one that is not mapped is left out."""
    return {row.host: row.cell_id for row in tx.execute(_THESE_HOSTS, {"hosts": [*hosts]}) if row.host in hosts}


def map_host(tx: ApiTx, host: str, cell_id: int) -> bool:
    """Map a host to a cell unless it is mapped; tell whether this call did it.

    Raises: Conflict when it is mapped to another cell.
    """
    if insert_if_absent(tx, host_mappings, {"created_at": tx.now, "host": host, "cell_id": cell_id}):
        return True
    present = find_host(tx, host)
    if present is not None and present.cell_id != cell_id:
        raise Conflict("host.in_another_cell", f"Host {host} is already mapped to another cell", host=host)
    return False


def unmap_host(tx: ApiTx, host: str) -> None:
    """Remove a host's mapping, if it is there."""
    tx.execute(sa.delete(host_mappings).where(host_mappings.c.host == host))


def count_hosts(tx: ApiTx, cell_id: int) -> int:
    """Count the hosts of a cell."""
    return int(tx.execute(_COUNT_HOSTS, {"cell": cell_id}).scalar_one())


# ---- instances -------------------------------------------------------------------------------------------------

_INSTANCES = sa.select(
    instance_mappings.c.instance_uuid,
    instance_mappings.c.cell_id,
    instance_mappings.c.project_id,
    instance_mappings.c.user_id,
    instance_mappings.c.queued_for_delete,
)
_INSTANCE = _INSTANCES.where(instance_mappings.c.instance_uuid == sa.bindparam("uuid"))
_INSTANCES_OF = _INSTANCES.where(instance_mappings.c.instance_uuid.in_(sa.bindparam("uuids", expanding=True)))
_COUNT_LIVE = sa.select(sa.func.count()).where(
    sa.not_(sa.func.coalesce(instance_mappings.c.queued_for_delete, sa.false()))
)
_COUNT_INSTANCES = _COUNT_LIVE.where(instance_mappings.c.cell_id == sa.bindparam("cell"))
_SET_CELL = (
    sa.update(instance_mappings)
    .where(instance_mappings.c.instance_uuid == sa.bindparam("uuid"))
    .values(cell_id=sa.bindparam("cell"), updated_at=sa.bindparam("now"))
)
_QUEUE_FOR_DELETE = (
    sa.update(instance_mappings)
    .where(instance_mappings.c.instance_uuid == sa.bindparam("uuid"))
    .values(queued_for_delete=True, updated_at=sa.bindparam("now"))
)
_INSERT = sa.insert(instance_mappings)
_PROJECT_CELLS = (
    sa.select(instance_mappings.c.cell_id)
    .where(instance_mappings.c.project_id == sa.bindparam("project"), instance_mappings.c.cell_id.is_not(None))
    .distinct()
)


def _instance(row: Row) -> InstanceMapping:
    return InstanceMapping(
        row.instance_uuid, row.cell_id, row.project_id, row.user_id or "", bool(row.queued_for_delete)
    )


def find_instance(tx: ApiTx, uuid: str) -> InstanceMapping | None:
    """Return where an instance is, or None when no instance of that uuid was ever accepted."""
    row = tx.execute(_INSTANCE, {"uuid": uuid}).one_or_none()
    return _instance(row) if row is not None else None


def find_instances(tx: ApiTx, uuids: Sequence[str]) -> dict[str, InstanceMapping]:
    """Return where these instances are, without those that have no mapping."""
    return {row.instance_uuid: _instance(row) for row in tx.execute(_INSTANCES_OF, {"uuids": list(uuids)})}


def create_instances(tx: ApiTx, uuids: Sequence[str], *, project_id: str, user_id: str) -> None:
    """Map new instances to no cell yet.

    Raises: Conflict when one of the uuids is taken.
    """
    rows = [
        {
            "created_at": tx.now,
            "instance_uuid": uuid,
            "project_id": project_id,
            "user_id": user_id,
            "queued_for_delete": False,
        }
        for uuid in uuids
    ]
    with unique_violation(Conflict("instance.exists", "An instance of that uuid exists")):
        tx.execute(_INSERT, rows)


def set_instance_cell(tx: ApiTx, uuid: str, cell_id: int) -> None:
    """Write the chosen cell; this happens before the instance is made there."""
    tx.execute(_SET_CELL, {"uuid": uuid, "cell": cell_id, "now": tx.now})


def queue_instance_for_delete(tx: ApiTx, uuid: str) -> None:
    """Mark that the instance is to go, or gone. The mapping itself stays (seed 002)."""
    tx.execute(_QUEUE_FOR_DELETE, {"uuid": uuid, "now": tx.now})


def purge_instances(tx: ApiTx, uuids: Sequence[str]) -> int:
    """Remove the mappings of instances whose rows were removed from their cell; return how many went."""
    return tx.execute(sa.delete(instance_mappings).where(instance_mappings.c.instance_uuid.in_(uuids))).rowcount


def count_instances(tx: ApiTx, cell_id: int) -> int:
    """Count the live instances that are mapped to a cell."""
    return int(tx.execute(_COUNT_INSTANCES, {"cell": cell_id}).scalar_one())


def count_live_instances(tx: ApiTx) -> int:
    """Count the instances that are not deleted, with or without a cell."""
    return int(tx.execute(_COUNT_LIVE).scalar_one())


def cells_of_project(tx: ApiTx, project_id: str) -> set[int]:
    """Return the ids of the cells that hold, or held, an instance of the project."""
    return {row.cell_id for row in tx.execute(_PROJECT_CELLS, {"project": project_id})}
