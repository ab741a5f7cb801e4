"""Finding instances: one by uuid, or pages by filter, in an order that can be merged across cells.

`matches` and `sort_key` give the same answers in Python as the statements give in SQL, for instances that are still
build requests. The order is total: each key with its NULLs last when ascending, then the uuid.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from cellway.db.cell_tables import (
    instance_extra,
    instance_faults,
    instance_info_caches,
    instance_metadata,
    instances,
    tags,
)
from cellway.db.columns import IpAddress
from cellway.db.prepared import Prepared, Values
from cellway.db.transaction import CellTx, Row, by_code_point
from cellway.errors import NotFound
from cellway.instances.records import Fault, Instance, VmState

_COLUMNS = tuple(
    instances.c[name]
    for name in (
        "uuid project_id user_id display_name created_at vcpus memory_mb root_gb ephemeral_gb instance_type_id "
        "display_description hostname image_ref key_name key_data user_data reservation_id launch_index "
        "availability_zone config_drive auto_disk_config access_ip_v4 access_ip_v6 root_device_name vm_state "
        "task_state power_state host node locked locked_by progress updated_at launched_at terminated_at deleted"
    ).split()
)
_VM_STATE = [column.name for column in _COLUMNS].index("vm_state")
_FROM = instances.outerjoin(
    instance_extra, sa.and_(instance_extra.c.instance_uuid == instances.c.uuid, instance_extra.c.deleted == 0)
).outerjoin(instance_info_caches, instance_info_caches.c.instance_uuid == instances.c.uuid)
_BASE = sa.select(*_COLUMNS, instance_extra.c.flavor, instance_info_caches.c.network_info).select_from(_FROM)
_BY_UUID = Prepared(_BASE.where(instances.c.uuid == sa.bindparam("uuid")))


def _children(owner: Callable[[sa.ColumnElement[Any]], sa.ColumnElement[bool]]) -> sa.CompoundSelect[Any]:
    """Metadata and tags in one statement: rows of (uuid, key, value), with a NULL value for a tag."""
    return sa.union_all(
        sa.select(instance_metadata.c.instance_uuid, instance_metadata.c.key, instance_metadata.c.value).where(
            owner(instance_metadata.c.instance_uuid), instance_metadata.c.deleted == 0
        ),
        sa.select(tags.c.resource_id, tags.c.tag, sa.null()).where(owner(tags.c.resource_id)),
    )


_CHILDREN_OF_ONE = Prepared(_children(lambda column: column == sa.bindparam("uuid")))
_CHILDREN_OF_MANY = _children(lambda column: column.in_(sa.bindparam("uuids", expanding=True)))
_FAULTS = (
    sa.select(
        instance_faults.c.instance_uuid,
        instance_faults.c.code,
        instance_faults.c.message,
        instance_faults.c.details,
        instance_faults.c.created_at,
    )
    .where(instance_faults.c.instance_uuid.in_(sa.bindparam("uuids", expanding=True)), instance_faults.c.deleted == 0)
    .order_by(instance_faults.c.created_at, instance_faults.c.id)
)
_EXISTS = sa.select(instances.c.uuid).where(instances.c.uuid == sa.bindparam("uuid"), instances.c.deleted == 0)


def not_found(uuid: str) -> NotFound:
    """Return the error for an instance that is not there, or not the caller's."""
    return NotFound("instance.not_found", f"Instance {uuid} could not be found.", instance=uuid)


def find(tx: CellTx, uuid: str) -> Instance | None:
    """Return an instance, deleted or not, with its metadata, tags and last fault."""
    row = _BY_UUID.first(tx, {"uuid": uuid})
    if row is None:
        return None
    metadata: dict[str, str] = {}
    tagged: list[str] = []
    for _uuid, key, value in _CHILDREN_OF_ONE.rows(tx, {"uuid": uuid}):
        if value is None:
            tagged.append(key)
        else:
            metadata[key] = value
    fault = _faults(tx, [uuid]).get(uuid) if row[_VM_STATE] in _FAULTY else None
    return _instance(row, metadata, tuple(sorted(tagged)), fault)


def get(tx: CellTx, uuid: str) -> Instance:
    """Return a live instance. Raises: NotFound."""
    found = find(tx, uuid)
    if found is None or found.deleted:
        raise not_found(uuid)
    return found


def exists(tx: CellTx, uuid: str) -> bool:
    """Tell whether the live instance is in this cell."""
    return tx.execute(_EXISTS, {"uuid": uuid}).first() is not None


class Size(NamedTuple):
    """What an instance takes, whose it is, and whether it counts: not when it is deleted, or marked to be."""

    uuid: str
    project_id: str
    user_id: str
    vcpus: int
    memory_mb: int
    live: bool


_SIZES = sa.select(
    instances.c.uuid,
    instances.c.project_id,
    instances.c.user_id,
    sa.func.coalesce(instances.c.vcpus, 0),
    sa.func.coalesce(instances.c.memory_mb, 0),
    instances.c.deleted,
    instances.c.vm_state,
)
_SIZES_OF = _SIZES.where(instances.c.uuid.in_(sa.bindparam("uuids", expanding=True)))
_SIZES_AFTER = (
    _SIZES.where(instances.c.uuid > sa.bindparam("after"), instances.c.deleted == 0)
    .order_by(instances.c.uuid)
    .limit(sa.bindparam("most"))
)
_SOFT_DELETED = "soft-delete"
"""The incumbent's word for an instance that its owner may still restore."""


def sizes(tx: CellTx, uuids: Sequence[str]) -> list[Size]:
    """Return what these instances take, the deleted ones included."""
    return [_size(row) for row in tx.execute(_SIZES_OF, {"uuids": list(uuids)})]


def list_sizes(tx: CellTx, after: str, most: int) -> list[Size]:
    """Return what live instances take, a page of them in the order of their uuids."""
    return [_size(row) for row in tx.execute(_SIZES_AFTER, {"after": after, "most": most})]


def _size(row: Row) -> Size:
    uuid, project_id, user_id, vcpus, memory_mb, deleted, vm_state = row
    live = not deleted and vm_state != _SOFT_DELETED
    return Size(uuid, project_id or "", user_id or "", vcpus, memory_mb, live)


_FAULTY = {VmState.ERROR.value, VmState.DELETED.value}


def _faults(tx: CellTx, uuids: Sequence[str]) -> dict[str, Fault]:
    if not uuids:
        return {}
    return {
        row.instance_uuid: Fault(
            code=row.code, message=row.message or "", details=row.details, created_at=row.created_at
        )
        for row in tx.execute(_FAULTS, {"uuids": list(uuids)})
    }


def _instance(row: Values, metadata: dict[str, str], tagged: tuple[str, ...], fault: Fault | None) -> Instance:
    # By position: some forty attribute look-ups a row are what a page of a thousand would otherwise spend its time on.
    (
        uuid, project_id, user_id, display_name, created_at, vcpus, memory_mb, root_gb, ephemeral_gb, instance_type_id,
        description, hostname, image_ref, key_name, key_data, user_data, reservation_id, launch_index, zone,
        config_drive, auto_disk_config, v4, v6, root_device, vm_state, task_state, power_state, host, node,
        locked, locked_by, progress, updated_at, launched_at, terminated_at, deleted, flavor, network_info,
    ) = row  # fmt: skip
    return Instance(
        uuid=uuid, project_id=project_id, user_id=user_id, display_name=display_name or "", created_at=created_at,
        flavor=flavor or "", vcpus=vcpus or 0, memory_mb=memory_mb or 0, root_gb=root_gb or 0,
        ephemeral_gb=ephemeral_gb or 0, instance_type_id=instance_type_id, display_description=description,
        hostname=hostname, image_ref=image_ref,
        key_name=key_name, key_data=key_data, user_data=user_data, reservation_id=reservation_id,
        launch_index=launch_index or 0, availability_zone=zone, config_drive=config_drive,
        auto_disk_config=bool(auto_disk_config), access_ip_v4=str(v4) if v4 else None, access_ip_v6=str(v6) if v6 else
        None, root_device_name=root_device, vm_state=vm_state, task_state=task_state, power_state=power_state or 0,
        host=host,
        node=node, locked=bool(locked), locked_by=locked_by, progress=progress or 0, updated_at=updated_at,
        launched_at=launched_at, terminated_at=terminated_at, deleted=bool(deleted), network_info=network_info,
        metadata=metadata, tags=tagged, fault=fault,
    )  # fmt: skip


# ---- lists -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """Which instances. None is no condition; `name` is a pattern (see `name_pattern`)."""

    project_id: str | None = None
    user_id: str | None = None
    uuids: tuple[str, ...] | None = None
    name: str | None = None
    vm_states: tuple[str, ...] | None = None
    task_states: tuple[str | None, ...] | None = None
    image_ref: str | None = None
    instance_type_id: int | None = None
    host: str | None = None
    node: str | None = None
    reservation_id: str | None = None
    availability_zone: str | None = None
    key_name: str | None = None
    power_state: int | None = None
    locked: bool | None = None
    changes_since: datetime | None = None
    tags: tuple[str, ...] = ()
    tags_any: tuple[str, ...] = ()
    not_tags: tuple[str, ...] = ()
    not_tags_any: tuple[str, ...] = ()
    deleted: bool | None = False


_EQUAL = {
    name: instances.c[name]
    for name in (
        "project_id user_id image_ref instance_type_id host node reservation_id availability_zone key_name power_state"
    ).split()
}

# Columns whose NULL is read as something else (`_instance`): they are in order as they are read.
_NULL_IS: Mapping[str, Any] = {
    "auto_disk_config": sa.false(),
    "display_name": "",
    "launch_index": 0,
    "power_state": 0,
    "progress": 0,
}


def _sortable(name: str) -> sa.ColumnElement[Any]:
    column = instances.c[name]
    read = sa.func.coalesce(column, _NULL_IS[name]) if name in _NULL_IS else column
    # A uuid is in the same order under every collation, and its index serves.
    return by_code_point(read) if isinstance(column.type, sa.String | IpAddress) and name != "uuid" else read


SORT_KEYS: Mapping[str, sa.ColumnElement[Any]] = {
    name: _sortable(name)
    for name in (
        "access_ip_v4 access_ip_v6 auto_disk_config availability_zone config_drive created_at display_description "
        "display_name host hostname image_ref instance_type_id key_name launch_index launched_at locked_by node "
        "power_state progress project_id root_device_name task_state terminated_at updated_at user_id uuid vm_state"
    ).split()
}
"""What a list may be sorted by."""

Sort = tuple[tuple[str, bool], ...]
"""Sort keys, each with whether it descends. The uuid is always the last."""

DEFAULT_SORT: Sort = (("created_at", True),)


def name_pattern(pattern: str) -> "re.Pattern[str]":
    """Return what a name must match from its start: any case, with `^`, `$`, `.` and `.*` as in a regular expression.

    Every other character stands for itself: the incumbent's full expressions differ between databases, and some run for
    ever. Here each piece, once found, stays where it was found, so the time grows with the name's length alone.
    """
    pieces = [re.escape(one).replace(r"\.", ".") for one in pattern.removeprefix("^").removesuffix("$").split(".*")]
    text = ""
    for index, piece in enumerate(pieces):
        anchored = index == 0 and pattern.startswith("^")
        if index == len(pieces) - 1 and pattern.endswith("$"):
            text += ("" if anchored else ".*") + piece + r"\Z"
        else:
            text += piece if anchored else f"(?>.*?{piece})"
    return re.compile(text, re.DOTALL | re.IGNORECASE)


def _like(pattern: str) -> str:
    """Return the LIKE form of a name filter, `!` escaping."""
    start = "" if pattern.startswith("^") else "%"
    end = "" if pattern.endswith("$") else "%"
    body = pattern.removeprefix("^").removesuffix("$")
    pieces = []
    for piece in body.split(".*"):
        escaped = piece.replace("!", "!!").replace("%", "!%").replace("_", "!_")
        pieces.append(escaped.replace(".", "_"))
    return start + "%".join(pieces) + end


def list_page(
    tx: CellTx, where: Filter, sort: Sort, limit: int, after: Sequence[Any] | None = None, *, details: bool = True
) -> list[Instance]:
    """Return up to `limit` instances in order, those after the sort values `after` (see `sort_values`).

    Without `details`, metadata, tags and faults are left out.
    """
    conditions, parameters = _conditions(where)
    statement = _page_statement(
        conditions, sort, tuple(value is None for value in after) if after is not None else None
    )
    parameters["page_limit"] = limit
    if after is not None:
        parameters.update({f"after_{index}": value for index, value in enumerate(after) if value is not None})
    rows = tx.execute(statement, parameters).all()
    if not details or not rows:
        return [_instance(row, {}, (), None) for row in rows]
    uuids = [row[0] for row in rows]
    metadata: dict[str, dict[str, str]] = {uuid: {} for uuid in uuids}
    tagged: dict[str, list[str]] = {uuid: [] for uuid in uuids}
    for uuid, key, value in tx.execute(_CHILDREN_OF_MANY, {"uuids": uuids}):
        if value is None:
            tagged[uuid].append(key)
        else:
            metadata[uuid][key] = value
    faults = _faults(tx, [row[0] for row in rows if row[_VM_STATE] in _FAULTY])
    return [_instance(row, metadata[row[0]], tuple(sorted(tagged[row[0]])), faults.get(row[0])) for row in rows]


def _conditions(where: Filter) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of the conditions in force, which choose the statement, and their values."""
    parameters: dict[str, Any] = {name: value for name in _EQUAL if (value := getattr(where, name)) is not None}
    names = list(parameters)
    for name in ("uuids", "vm_states", "tags_any", "not_tags_any"):
        if value := getattr(where, name):
            names.append(name)
            parameters[name] = list(value)
    for name in ("tags", "not_tags"):
        if value := getattr(where, name):
            names.append(name)
            parameters[name] = list(value)
            parameters[f"{name}_count"] = len(set(value))
    if where.uuids == () or where.vm_states == ():
        names.append("nothing")
    if where.task_states:
        named = [state for state in where.task_states if state is not None]
        names.append("task_states_or_none" if None in where.task_states else "task_states")
        parameters["task_states"] = named
    if where.name is not None:
        names.append("name")
        parameters["name"] = _like(where.name)
    if where.locked is not None:
        names.append("locked")
        parameters["locked"] = where.locked
    if where.changes_since is not None:
        names.append("changes_since")
        parameters["changes_since"] = where.changes_since
    if where.deleted is not None:
        names.append("deleted" if where.deleted else "live")
    return tuple(names), parameters


def _condition(name: str) -> sa.ColumnElement[bool]:
    if name in _EQUAL:
        return _EQUAL[name] == sa.bindparam(name)
    many: sa.BindParameter[Any] = sa.bindparam(name, expanding=True)
    tagged = sa.select(tags.c.resource_id).where(tags.c.tag.in_(many))
    all_tagged = tagged.group_by(tags.c.resource_id).having(sa.func.count() == sa.bindparam(f"{name}_count"))
    match name:
        case "uuids":
            return instances.c.uuid.in_(many)
        case "vm_states":
            return instances.c.vm_state.in_(many)
        case "task_states":
            return instances.c.task_state.in_(many)
        case "task_states_or_none":
            return sa.or_(
                instances.c.task_state.in_(sa.bindparam("task_states", expanding=True)),
                instances.c.task_state.is_(None),
            )
        case "name":
            return instances.c.display_name.ilike(sa.bindparam("name"), escape="!")
        case "locked":
            return sa.func.coalesce(instances.c.locked, sa.false()) == sa.bindparam("locked")
        case "changes_since":
            return sa.func.coalesce(instances.c.updated_at, instances.c.created_at) >= sa.bindparam("changes_since")
        case "tags":
            return instances.c.uuid.in_(all_tagged)
        case "not_tags":
            return instances.c.uuid.not_in(all_tagged)
        case "tags_any":
            return instances.c.uuid.in_(tagged)
        case "not_tags_any":
            return instances.c.uuid.not_in(tagged)
        case "deleted":
            return instances.c.deleted != 0
        case "live":
            return instances.c.deleted == 0
        case "nothing":
            return sa.false()
    raise AssertionError(name)


@lru_cache(maxsize=512)
def _page_statement(names: tuple[str, ...], sort: Sort, after_is_null: tuple[bool, ...] | None) -> sa.Select[Any]:
    statement = _BASE.where(*(_condition(name) for name in names))
    named = (*sort, ("uuid", False))
    keys = [(SORT_KEYS[name], descending) for name, descending in named]
    if after_is_null is not None:
        statement = statement.where(_after(keys, after_is_null))
    order: list[sa.ColumnElement[Any]] = []
    for (name, _), (column, descending) in zip(named, keys, strict=True):
        if instances.c[name].nullable and name not in _NULL_IS:
            null_rank = sa.case((column.is_(None), 1), else_=0)
            order.append(null_rank.desc() if descending else null_rank)
        order.append(column.desc() if descending else column.asc())
    return statement.order_by(*order).limit(sa.bindparam("page_limit"))


def _after(keys: list[tuple[sa.ColumnElement[Any], bool]], after_is_null: tuple[bool, ...]) -> sa.ColumnElement[bool]:
    """Rows that follow the marker: greater in the first key, or equal there and greater in the next, and so on."""
    alternatives = []
    equal: list[sa.ColumnElement[bool]] = []
    for index, ((column, descending), is_null) in enumerate(zip(keys, after_is_null, strict=True)):
        value: sa.BindParameter[Any] = sa.bindparam(f"after_{index}")
        greater: sa.ColumnElement[bool]
        same: sa.ColumnElement[bool]
        if is_null:
            greater = column.is_not(None) if descending else sa.false()
            same = column.is_(None)
        else:
            greater = column < value if descending else sa.or_(column > value, column.is_(None))
            same = column == value
        alternatives.append(sa.and_(*equal, greater))
        equal.append(same)
    return sa.or_(*alternatives)


def sort_values(instance: Instance, sort: Sort) -> tuple[Any, ...]:
    """Return the values that place an instance in the order `sort`."""
    return (*(getattr(instance, key) for key, _ in sort), instance.uuid)


@dataclass(frozen=True, slots=True)
class _Descending:
    value: Any

    def __lt__(self, other: "_Descending") -> bool:
        return bool(other.value < self.value)


def key_of_values(sort: Sort, values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the key under which an instance with these `sort_values` is ordered in Python, as `list_page` does in
    SQL.
    """
    parts: list[Any] = []
    for (_, descending), value in zip(sort, values, strict=False):
        place = (value is None, "" if value is None else value)
        parts.append(_Descending(place) if descending else place)
    return (*parts, values[-1])


def sort_key(sort: Sort) -> Callable[[Instance], tuple[Any, ...]]:
    """Return the key function for `sort`."""
    return lambda instance: key_of_values(sort, sort_values(instance, sort))


def matches(instance: Instance, where: Filter) -> bool:
    """Tell whether an instance that is not in a cell yet fits the filter, as the statements would."""
    if any(wanted is not None and wanted != getattr(instance, name) for name, wanted in _equalities(where)):
        return False
    if where.uuids is not None and instance.uuid not in where.uuids:
        return False
    if where.vm_states is not None and instance.vm_state not in where.vm_states:
        return False
    if where.task_states and instance.task_state not in where.task_states:
        return False
    if where.name is not None and not name_pattern(where.name).match(instance.display_name):
        return False
    if where.locked is not None and where.locked != instance.locked:
        return False
    if where.changes_since is not None and (instance.updated_at or instance.created_at) < where.changes_since:
        return False
    return not where.deleted and _tags_match(set(instance.tags), where)


def _equalities(where: Filter) -> Iterable[tuple[str, Any]]:
    return ((name, getattr(where, name)) for name in _EQUAL)


def _tags_match(have: set[str], where: Filter) -> bool:
    return (
        have.issuperset(where.tags)
        and (not where.tags_any or not have.isdisjoint(where.tags_any))
        and not (where.not_tags and have.issuperset(where.not_tags))
        and have.isdisjoint(where.not_tags_any)
    )
