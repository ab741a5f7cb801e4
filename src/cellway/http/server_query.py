"""The query of a server list, as a filter, an order and a page.

Members may filter by fewer things than admins; what they may not use is ignored, as the incumbent does, so that
`deleted=False` from any client is harmless.
"""

from dataclasses import dataclass, replace
from typing import Any

from cellway.errors import Forbidden, Invalid
from cellway.http.wire import Call, boolean, integer, moment
from cellway.instances.reading import DEFAULT_SORT, SORT_KEYS, Filter, Sort
from cellway.instances.records import TaskState, VmState

_STATES: dict[str, tuple[tuple[VmState, ...], tuple[TaskState, ...]]] = {
    "ACTIVE": ((VmState.ACTIVE,), ()),
    "BUILD": ((VmState.BUILDING,), ()),
    "ERROR": ((VmState.ERROR,), ()),
    "PAUSED": ((VmState.PAUSED,), ()),
    "SHUTOFF": ((VmState.STOPPED,), ()),
    "SUSPENDED": ((VmState.SUSPENDED,), ()),
    "DELETED": ((VmState.DELETED,), ()),
    "REBOOT": ((VmState.ACTIVE,), (TaskState.REBOOTING,)),
    "HARD_REBOOT": (tuple(VmState), (TaskState.REBOOTING_HARD,)),
}
"""Status to the states that show as it: the instance's, and the task's when that is what makes the difference."""

_ELSEWHERE = {
    "MIGRATING", "PASSWORD", "REBUILD", "RESCUE", "RESIZE", "REVERT_RESIZE", "SHELVED", "SHELVED_OFFLOADED",
    "SOFT_DELETED", "UNKNOWN", "VERIFY_RESIZE",
}  # fmt: skip
"""Statuses of the API that no server here can have."""

_TEXT = {
    "image": "image_ref",
    "image_ref": "image_ref",
    "reservation_id": "reservation_id",
    "availability_zone": "availability_zone",
    "key_name": "key_name",
    "host": "host",
    "node": "node",
    "user_id": "user_id",
}
_MEMBER = {"reservation_id", "image"}
"""Of _TEXT, what everybody may filter by; the rest is for admins until 2.83."""

_LEGACY_SORT = {"created": "created_at", "updated": "updated_at", "name": "display_name", "id": "uuid"}


@dataclass(frozen=True, slots=True)
class ServerQuery:
    """What a list asks for."""

    where: Filter
    sort: Sort
    limit: int
    marker: str | None


async def read_query(call: Call) -> ServerQuery:
    """Return what the query asks for. Raises: Invalid, Forbidden."""
    admin = call.allows("os_compute_api:servers:allow_all_filters")
    page = call.page()
    where = Filter(project_id=_project(call, admin))
    changes: dict[str, Any] = {}
    for parameter, field in _TEXT.items():
        value = call.query.get(parameter)
        if value is not None and (admin or parameter in _MEMBER):
            changes[field] = value
    _add_states(call, changes)
    if (name := call.query.get("name")) is not None:
        if len(name) > call.limits.name_characters:
            raise Invalid("request.bad_parameter", "The name filter is longer than a name may be", parameter="name")
        changes["name"] = name
    if (since := call.query.get("changes-since")) is not None:
        # Whoever follows changes wants to hear of deletions too.
        changes |= {"changes_since": moment(since, "changes-since"), "deleted": None}
    if admin:
        changes |= _admin_filters(call)
    if (flavor := call.query.get("flavor")) is not None:
        row_id = await call.services.compute.flavor_row_id(call.context, flavor)
        changes |= {"instance_type_id": row_id} if row_id is not None else {"uuids": ()}
    if call.version >= 26:
        for parameter in ("tags", "tags-any", "not-tags", "not-tags-any"):
            if (listed := call.query.get(parameter)) is not None:
                changes[parameter.replace("-", "_")] = tuple(sorted(set(listed.split(","))))
    if (ip := call.query.get("ip")) or (ip := call.query.get("ip6") if call.version >= 5 else None):
        # Servers have no addresses while there is no network service, so none matches.
        changes["uuids"] = () if ip else None
    return ServerQuery(replace(where, **changes), _sort(call, admin), page.limit, page.marker)


def _project(call: Call, admin: bool) -> str | None:
    """Return the project whose servers are asked for; None for all. Raises: Forbidden, Invalid."""
    text = call.query.get("all_tenants")
    everybody = text is not None and (text == "" or boolean(text, "all_tenants"))
    named = call.query.get("project_id") or call.query.get("tenant_id")
    if everybody:
        rule = f"{call.rule}:get_all_tenants"
        if not call.allows(rule):
            raise Forbidden("policy.denied", f"Policy doesn't allow {rule} to be performed.", rule=rule)
        return named
    return named if admin and named else call.context.project_id


def _add_states(call: Call, changes: dict[str, Any]) -> None:
    wanted = [text.upper() for text in call.query.getlist("status")]
    if not wanted:
        return
    unknown = [text for text in wanted if text not in _STATES and text not in _ELSEWHERE]
    if unknown and call.version >= 38:
        raise Invalid("server.bad_status", "Invalid status value", status=unknown[0][:64])
    states = [_STATES[text] for text in wanted if text in _STATES]
    changes["vm_states"] = tuple(sorted({state.value for vm_states, _ in states for state in vm_states}))
    tasks = {task.value for _, named in states for task in named}
    if tasks and all(named for _, named in states):
        changes["task_states"] = tuple(sorted(tasks))
    elif "ACTIVE" in wanted and "REBOOT" not in wanted:
        others = tuple(task.value for task in TaskState if task not in (TaskState.REBOOTING, TaskState.REBOOTING_HARD))
        changes["task_states"] = (None, *others)
    if "DELETED" in wanted:
        if not call.allows("context_is_admin"):
            raise Forbidden("policy.denied", "Only administrators may list deleted servers")
        changes["deleted"] = True


def _admin_filters(call: Call) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if (uuid := call.query.get("uuid")) is not None:
        changes["uuids"] = (uuid,)
    if (state := call.query.get("vm_state")) is not None:
        changes["vm_states"] = (state,)
    if (task := call.query.get("task_state")) is not None:
        changes["task_states"] = (task,)
    if (power := call.query.get("power_state")) is not None:
        changes["power_state"] = integer(power, "power_state")
    deleted = call.query.get("deleted")
    if deleted is not None and boolean(deleted, "deleted"):
        changes["deleted"] = True
    return changes


def _sort(call: Call, admin: bool) -> Sort:
    """Return the order asked for; the incumbent's default for none. Raises: Invalid, Forbidden."""
    keys = [_LEGACY_SORT.get(key, key) for key in call.query.getlist("sort_key")]
    directions = call.query.getlist("sort_dir")
    if any(direction not in ("asc", "desc") for direction in directions):
        raise Invalid("request.bad_parameter", "sort_dir must be asc or desc", parameter="sort_dir")
    unknown = [key for key in keys if key not in SORT_KEYS]
    if unknown:
        raise Invalid("request.bad_parameter", f"Servers cannot be sorted by {unknown[0][:64]}", parameter="sort_key")
    if not admin and {"host", "node"} & set(keys):
        raise Forbidden("policy.denied", "Only administrators can sort servers by host or node")
    if not keys:
        return DEFAULT_SORT if not directions else (("created_at", directions[0] == "desc"),)
    last = directions[-1] if directions else "desc"
    padded = [*directions, *[last] * len(keys)]
    return tuple((key, direction == "desc") for key, direction in dict(zip(keys, padded, strict=False)).items())
