"""What users set on an instance: its name, metadata, tags, lock; and making and removing its rows.

Every function looks only at live instances. `lifecycle.py` decides when an instance may be made or removed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from cellway.db.cell_tables import (
    instance_actions,
    instance_actions_events,
    instance_extra,
    instance_faults,
    instance_info_caches,
    instance_metadata,
    instance_system_metadata,
    instances,
    tags,
)
from cellway.db.transaction import CellTx, insert_if_absent
from cellway.errors import NotFound
from cellway.instances.reading import get, not_found
from cellway.instances.records import Instance, PowerState, VmState

_LIVE = sa.and_(instances.c.uuid == sa.bindparam("the_uuid"), instances.c.deleted == 0)
_INSERT = sa.insert(instances)
_INSERT_EXTRA = sa.insert(instance_extra)
_INSERT_CACHE = sa.insert(instance_info_caches)
_INSERT_METADATA = sa.insert(instance_metadata)
_INSERT_TAG = sa.insert(tags)
_INSERT_FAULT = sa.insert(instance_faults)
_DELETE_METADATA = sa.delete(instance_metadata).where(instance_metadata.c.instance_uuid == sa.bindparam("the_uuid"))
_DELETE_METADATA_KEY = _DELETE_METADATA.where(instance_metadata.c.key == sa.bindparam("the_key"))
_DELETE_TAGS = sa.delete(tags).where(tags.c.resource_id == sa.bindparam("the_uuid"))
_DELETE_TAG = _DELETE_TAGS.where(tags.c.tag == sa.bindparam("the_tag"))
_SOFT_DELETE = (
    sa.update(instances)
    .where(_LIVE)
    .values(
        deleted=instances.c.id,
        deleted_at=sa.bindparam("now"),
        terminated_at=sa.bindparam("now"),
        updated_at=sa.bindparam("now"),
        vm_state=VmState.DELETED.value,
        task_state=None,
        power_state=PowerState.NOSTATE.value,
    )
)


def update_live(tx: CellTx, uuid: str, values: Mapping[str, Any], *conditions: sa.ColumnElement[bool]) -> bool:
    """Set columns of a live instance if `conditions` hold; tell whether it was there and they did."""
    statement = sa.update(instances).where(_LIVE, *conditions).values(updated_at=tx.now, **values)
    return tx.execute(statement, {"the_uuid": uuid}).rowcount == 1


def insert(tx: CellTx, instance: Instance) -> None:
    """Make the rows of a new instance."""
    tx.execute(
        _INSERT,
        {
            "uuid": instance.uuid,
            "project_id": instance.project_id,
            "user_id": instance.user_id,
            "display_name": instance.display_name,
            "display_description": instance.display_description,
            "hostname": instance.hostname,
            "created_at": instance.created_at,
            "updated_at": tx.now,
            "vcpus": instance.vcpus,
            "memory_mb": instance.memory_mb,
            "root_gb": instance.root_gb,
            "ephemeral_gb": instance.ephemeral_gb,
            "instance_type_id": instance.instance_type_id,
            "image_ref": instance.image_ref,
            "key_name": instance.key_name,
            "key_data": instance.key_data,
            "user_data": instance.user_data,
            "reservation_id": instance.reservation_id,
            "launch_index": instance.launch_index,
            "availability_zone": instance.availability_zone,
            "config_drive": instance.config_drive,
            "auto_disk_config": instance.auto_disk_config,
            "access_ip_v4": instance.access_ip_v4,
            "access_ip_v6": instance.access_ip_v6,
            "root_device_name": instance.root_device_name,
            "vm_state": instance.vm_state,
            "task_state": instance.task_state,
            "power_state": instance.power_state,
            "host": instance.host,
            "node": instance.node,
            "locked": instance.locked,
            "progress": instance.progress,
            "hidden": False,
            "deleted": 0,
        },
    )
    own = {"instance_uuid": instance.uuid, "created_at": tx.now, "deleted": 0}
    tx.execute(_INSERT_EXTRA, own | {"flavor": instance.flavor})
    tx.execute(_INSERT_CACHE, own | {"network_info": instance.network_info or "[]"})
    if instance.metadata:
        tx.execute(_INSERT_METADATA, [own | {"key": key, "value": value} for key, value in instance.metadata.items()])
    if instance.tags:
        tx.execute(_INSERT_TAG, [{"resource_id": instance.uuid, "tag": tag} for tag in instance.tags])
    if instance.fault is not None:
        add_fault(tx, instance.uuid, instance.fault.code, instance.fault.message, instance.fault.details)


def erase(tx: CellTx, uuid: str) -> bool:
    """Remove every row of an instance that never ran here; tell whether there was one.

    What was recorded about it goes too: the build starts over elsewhere, and records itself there.
    """
    actions = sa.select(instance_actions.c.id).where(instance_actions.c.instance_uuid == uuid)
    tx.execute(sa.delete(instance_actions_events).where(instance_actions_events.c.action_id.in_(actions)))
    for table in _CHILDREN:
        tx.execute(sa.delete(table).where(table.c.instance_uuid == uuid))
    tx.execute(_DELETE_TAGS, {"the_uuid": uuid})
    return tx.execute(sa.delete(instances).where(instances.c.uuid == uuid)).rowcount == 1


_CHILDREN = (
    instance_actions,
    instance_extra,
    instance_faults,
    instance_info_caches,
    instance_metadata,
    instance_system_metadata,
)


def soft_delete(tx: CellTx, uuid: str) -> bool:
    """Mark an instance deleted, as the incumbent does; tell whether it was live."""
    return tx.execute(_SOFT_DELETE, {"the_uuid": uuid, "now": tx.now}).rowcount == 1


def add_fault(tx: CellTx, uuid: str, code: int, message: str, details: str | None, host: str | None = None) -> None:
    """Record why something failed. Messages are cut to the column's 255 characters."""
    tx.execute(
        _INSERT_FAULT,
        {
            "instance_uuid": uuid,
            "created_at": tx.now,
            "code": code,
            "message": message[:255],
            "details": details,
            "host": host,
            "deleted": 0,
        },
    )


def update(tx: CellTx, uuid: str, values: Mapping[str, Any]) -> Instance:
    """Set columns that belong to the user and return the instance. Raises: NotFound."""
    if not update_live(tx, uuid, values):
        raise not_found(uuid)
    return get(tx, uuid)


def set_lock(tx: CellTx, uuid: str, locked_by: str | None) -> None:
    """Lock an instance for `owner` or `admin`, or unlock it with None. Raises: NotFound."""
    if not update_live(tx, uuid, {"locked": locked_by is not None, "locked_by": locked_by}):
        raise not_found(uuid)


def reset_state(tx: CellTx, uuid: str, vm_state: VmState) -> None:
    """Set the state by decree, and stop waiting for whatever was being done. Raises: NotFound."""
    if not update_live(tx, uuid, {"vm_state": vm_state.value, "task_state": None}):
        raise not_found(uuid)


# ---- metadata and tags -----------------------------------------------------------------------------------------


def merge_metadata(tx: CellTx, uuid: str, items: Mapping[str, str], *, replace: bool) -> dict[str, str]:
    """Add or replace metadata, dropping what is not named when `replace`; return all of it. Raises: NotFound."""
    before = update(tx, uuid, {}).metadata
    for key in before if replace else set(before) & set(items):
        tx.execute(_DELETE_METADATA_KEY, {"the_uuid": uuid, "the_key": key})
    if items:
        own = {"instance_uuid": uuid, "created_at": tx.now, "deleted": 0}
        tx.execute(_INSERT_METADATA, [own | {"key": key, "value": value} for key, value in items.items()])
    return dict(items) if replace else before | dict(items)


def delete_metadata(tx: CellTx, uuid: str, key: str) -> None:
    """Remove one key. Raises: NotFound for the instance or the key."""
    if not update_live(tx, uuid, {}):
        raise not_found(uuid)
    if not tx.execute(_DELETE_METADATA_KEY, {"the_uuid": uuid, "the_key": key}).rowcount:
        raise NotFound("metadata.not_found", "Metadata item was not found", key=key)


def replace_tags(tx: CellTx, uuid: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """Set the tags to exactly `wanted` and return them sorted. Raises: NotFound."""
    if not update_live(tx, uuid, {}):
        raise not_found(uuid)
    tx.execute(_DELETE_TAGS, {"the_uuid": uuid})
    unique = tuple(sorted(set(wanted)))
    if unique:
        tx.execute(_INSERT_TAG, [{"resource_id": uuid, "tag": tag} for tag in unique])
    return unique


def add_tag(tx: CellTx, uuid: str, tag: str) -> bool:
    """Add a tag; tell whether it is new. Raises: NotFound."""
    if not update_live(tx, uuid, {}):
        raise not_found(uuid)
    return insert_if_absent(tx, tags, {"resource_id": uuid, "tag": tag})


def delete_tag(tx: CellTx, uuid: str, tag: str) -> None:
    """Remove a tag. Raises: NotFound for the instance or the tag."""
    if not update_live(tx, uuid, {}):
        raise not_found(uuid)
    if not tx.execute(_DELETE_TAG, {"the_uuid": uuid, "the_tag": tag}).rowcount:
        raise NotFound("tag.not_found", f"Server {uuid} has no tag '{tag}'", tag=tag)
