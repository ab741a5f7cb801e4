"""What is done to servers: `POST /servers/{server_id}/action`, and the record of it."""

from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple

import msgspec

from cellway.errors import Invalid
from cellway.http.faults import NotImplementedHere
from cellway.http.routes import Route
from cellway.http.servers import find, owned_id, scope_of
from cellway.http.wire import Answer, Body, Call, answer, decode, long_stamp
from cellway.instances.actions import ActionRecord, Event
from cellway.instances.records import VmState


class Reboot(Body, frozen=True):
    """How to reboot."""

    type: Literal["SOFT", "HARD", "soft", "hard", "Soft", "Hard"]


class ResetState(Body, frozen=True):
    """Which state to set."""

    state: Literal["active", "error"]


class _Action(NamedTuple):
    rule: str
    argument: Any
    do: Callable[[Call, str, Any], Awaitable[None]]


def _operation(name: str) -> Callable[[Call, str, Any], Awaitable[None]]:
    async def do(call: Call, uuid: str, _argument: None) -> None:
        await call.services.compute.act(call.context, uuid, scope_of(call), name)

    return do


async def _reboot(call: Call, uuid: str, argument: Reboot) -> None:
    operation = "hard_reboot" if argument.type.upper() == "HARD" else "reboot"
    await call.services.compute.act(call.context, uuid, scope_of(call), operation)


async def _lock(call: Call, uuid: str, _argument: None) -> None:
    await call.services.compute.lock(call.context, uuid, scope_of(call))


async def _unlock(call: Call, uuid: str, _argument: None) -> None:
    await call.services.compute.unlock(call.context, uuid, scope_of(call))


async def _reset_state(call: Call, uuid: str, argument: ResetState) -> None:
    await call.services.compute.reset_state(call.context, uuid, scope_of(call), VmState(argument.state))


_RULE = "os_compute_api:"
ACTIONS = {
    "os-start": _Action(_RULE + "servers:start", None, _operation("start")),
    "os-stop": _Action(_RULE + "servers:stop", None, _operation("stop")),
    "reboot": _Action(_RULE + "servers:reboot", Reboot, _reboot),
    "pause": _Action(_RULE + "os-pause-server:pause", None, _operation("pause")),
    "unpause": _Action(_RULE + "os-pause-server:unpause", None, _operation("unpause")),
    "suspend": _Action(_RULE + "os-suspend-server:suspend", None, _operation("suspend")),
    "resume": _Action(_RULE + "os-suspend-server:resume", None, _operation("resume")),
    "lock": _Action(_RULE + "os-lock-server:lock", None, _lock),
    "unlock": _Action(_RULE + "os-lock-server:unlock", None, _unlock),
    "os-resetState": _Action(_RULE + "os-admin-actions:reset_state", ResetState, _reset_state),
}
"""Body key to what it does. `argument` is the type of its value."""

_NOT_SERVED = {
    "addFloatingIp", "addSecurityGroup", "changePassword", "confirmResize", "createBackup", "createImage", "evacuate",
    "forceDelete", "migrate", "os-getConsoleOutput", "os-migrateLive", "rebuild", "removeFloatingIp",
    "removeSecurityGroup", "rescue", "resize", "restore", "revertResize", "shelve", "shelveOffload",
    "trigger_crash_dump", "unrescue", "unshelve",
}  # fmt: skip


async def act(call: Call) -> Answer:
    """`POST …/action`"""
    body = call.decode(dict[str, msgspec.Raw])
    if len(body) != 1:
        raise Invalid("action.malformed", "The body must name exactly one action")
    [(name, argument)] = body.items()
    action = ACTIONS.get(name)
    if action is None:
        if name in _NOT_SERVED:
            raise NotImplementedHere("action.not_served", f"The action {name} is not available here")
        raise Invalid("action.unknown", f"There is no such action: {name[:64]}")
    decoded = decode(bytes(argument), action.argument, call.limits.json_depth) if action.argument else None
    if action.argument is None and bytes(argument).strip() not in (b"null", b"{}", b'""'):
        raise Invalid("action.malformed", f"The action {name} takes no argument")
    # A caller whose role never allows the action learns nothing of the server.
    call.require(rule=action.rule)
    instance = await find(call, action.rule)
    await action.do(call, instance.uuid, decoded)
    return Answer(202)


# ---- the record ------------------------------------------------------------------------------------------------


def _view(record: ActionRecord) -> dict[str, Any]:
    return {
        "action": record.action,
        "instance_uuid": record.instance_uuid,
        "request_id": record.request_id,
        "user_id": record.user_id,
        "project_id": record.project_id,
        "start_time": long_stamp(record.start_time),
        "message": record.message,
    }


def _event_view(call: Call, event: Event) -> dict[str, Any]:
    view: dict[str, Any] = {
        "event": event.event,
        "start_time": long_stamp(event.start_time),
        "finish_time": long_stamp(event.finish_time),
        "result": event.result,
    }
    if call.allows("os_compute_api:os-instance-actions:events"):
        view["traceback"] = event.traceback
    return view


async def index(call: Call) -> Answer:
    """`GET …/os-instance-actions`"""
    records = await call.services.compute.list_actions(call.context, await _visible(call), scope_of(call))
    return answer({"instanceActions": [_view(record) for record in records]})


async def show(call: Call) -> Answer:
    """`GET …/os-instance-actions/{request_id}`"""
    uuid = await _visible(call)
    record, events = await call.services.compute.get_action(call.context, uuid, scope_of(call), call.path["request_id"])
    view = _view(record)
    if call.version >= 51 or call.allows("os_compute_api:os-instance-actions:events"):
        view["events"] = [_event_view(call, event) for event in events]
    if call.version >= 58:
        view["updated_at"] = long_stamp(record.updated_at)
    return answer({"instanceAction": view})


async def _visible(call: Call) -> str:
    """Return the server's uuid; before 2.21 it must not be deleted."""
    if call.version < 21:
        return (await find(call)).uuid
    return await owned_id(call)


_HISTORY = "os_compute_api:os-instance-actions:"
ROUTES = (
    # Each action has a rule of its own, checked once its name is known.
    Route("POST", "/servers/{server_id}/action", act, ""),
    Route("GET", "/servers/{server_id}/os-instance-actions", index, _HISTORY + "list"),
    Route("GET", "/servers/{server_id}/os-instance-actions/{request_id}", show, _HISTORY + "show"),
)
