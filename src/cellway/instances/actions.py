"""What may be done to an instance, and the record of what was (`instance_actions`).

`begin` is the API's: it takes the instance for one action and records it in one transaction. `start` and `finish` are
the conductor's, on behalf of the agent: an action has its effect once, however often its message arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cellway.db.cell_tables import instance_actions, instance_actions_events, instances
from cellway.db.transaction import CellTx, Row
from cellway.errors import Conflict
from cellway.instances.reading import get, not_found
from cellway.instances.records import Instance, TaskState, VmState
from cellway.instances.writing import add_fault, update_live


@dataclass(frozen=True, slots=True)
class Transition:
    """An operation of the driver as a change of state. `recorded` is the name under which it is audited."""

    recorded: str
    task_state: TaskState
    allowed: frozenset[VmState]
    becomes: VmState


_ANY_OFF_OR_ON = frozenset({VmState.ACTIVE, VmState.STOPPED, VmState.PAUSED, VmState.SUSPENDED, VmState.ERROR})

TRANSITIONS = {
    "start": Transition("start", TaskState.POWERING_ON, frozenset({VmState.STOPPED}), VmState.ACTIVE),
    "stop": Transition("stop", TaskState.POWERING_OFF, frozenset({VmState.ACTIVE, VmState.ERROR}), VmState.STOPPED),
    "reboot": Transition("reboot", TaskState.REBOOTING, frozenset({VmState.ACTIVE}), VmState.ACTIVE),
    "hard_reboot": Transition("reboot", TaskState.REBOOTING_HARD, _ANY_OFF_OR_ON, VmState.ACTIVE),
    "pause": Transition("pause", TaskState.PAUSING, frozenset({VmState.ACTIVE}), VmState.PAUSED),
    "unpause": Transition("unpause", TaskState.UNPAUSING, frozenset({VmState.PAUSED}), VmState.ACTIVE),
    "suspend": Transition("suspend", TaskState.SUSPENDING, frozenset({VmState.ACTIVE}), VmState.SUSPENDED),
    "resume": Transition("resume", TaskState.RESUMING, frozenset({VmState.SUSPENDED}), VmState.ACTIVE),
}
"""Every operation, by the name that crosses the queue (`rpc/calls.py`, ActOnInstance)."""

_BY_TASK_STATE = {transition.task_state.value: name for name, transition in TRANSITIONS.items()}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that was done for an action. `result` is Success, Error or None while it goes on."""

    event: str
    start_time: datetime
    finish_time: datetime | None
    result: str | None
    traceback: str | None
    host: str | None


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """One thing that was asked of an instance."""

    id: int
    action: str
    instance_uuid: str
    request_id: str
    user_id: str | None
    project_id: str | None
    start_time: datetime
    updated_at: datetime | None
    message: str | None


_INSERT = sa.insert(instance_actions)
_INSERT_EVENT = sa.insert(instance_actions_events)
_OF = sa.select(instance_actions).where(instance_actions.c.instance_uuid == sa.bindparam("the_uuid"))
_LIST = _OF.order_by(instance_actions.c.start_time.desc(), instance_actions.c.id.desc())
_ONE = _OF.where(instance_actions.c.request_id == sa.bindparam("the_request")).order_by(instance_actions.c.id.desc())
_EVENTS = (
    sa.select(instance_actions_events)
    .where(instance_actions_events.c.action_id == sa.bindparam("the_action"))
    .order_by(instance_actions_events.c.start_time.desc(), instance_actions_events.c.id.desc())
)
_UNSTARTED = (
    sa.select(instance_actions.c.instance_uuid, instance_actions.c.request_id, instances.c.task_state)
    .join(instances, instances.c.uuid == instance_actions.c.instance_uuid)
    .outerjoin(instance_actions_events, instance_actions_events.c.action_id == instance_actions.c.id)
    .where(
        instances.c.host == sa.bindparam("the_host"),
        instances.c.deleted == 0,
        instances.c.task_state.in_(list(_BY_TASK_STATE)),
        instance_actions.c.finish_time.is_(None),
        instance_actions_events.c.id.is_(None),
    )
    .order_by(instance_actions.c.id)
)
_STARTED = (
    sa.select(instance_actions.c.instance_uuid, instance_actions.c.request_id, instances.c.task_state)
    .join(instances, instances.c.uuid == instance_actions.c.instance_uuid)
    .join(instance_actions_events, instance_actions_events.c.action_id == instance_actions.c.id)
    .where(
        instances.c.host == sa.bindparam("the_host"),
        instances.c.deleted == 0,
        instances.c.task_state.in_(list(_BY_TASK_STATE)),
        instance_actions.c.finish_time.is_(None),
        instance_actions_events.c.finish_time.is_(None),
    )
)


def record(
    tx: CellTx,
    uuid: str,
    action: str,
    *,
    request_id: str,
    user_id: str,
    project_id: str,
    start_time: datetime | None = None,
) -> None:
    """Write down that `action` was asked for, once per request."""
    if tx.execute(_ONE, {"the_uuid": uuid, "the_request": request_id}).first() is not None:
        return
    tx.execute(
        _INSERT,
        {
            "created_at": tx.now,
            "updated_at": tx.now,
            "action": action,
            "instance_uuid": uuid,
            "request_id": request_id,
            "user_id": user_id,
            "project_id": project_id,
            "start_time": start_time or tx.now,
            "deleted": 0,
        },
    )


def check_lock(instance: Instance, *, may_override: bool) -> None:
    """Raises: Conflict when the instance is locked and the caller may not pass."""
    if instance.locked and not may_override:
        raise Conflict("instance.locked", f"Instance {instance.uuid} is locked")


def begin(
    tx: CellTx, uuid: str, name: str, *, request_id: str, user_id: str, project_id: str, may_override_lock: bool
) -> str:
    """Take the instance for an operation and record it; return the host that is to carry it out.

    Raises: NotFound; Conflict when it is locked, busy, or in a state that the operation does not start from.
    """
    transition = TRANSITIONS[name]
    instance = get(tx, uuid)
    check_lock(instance, may_override=may_override_lock)
    if instance.host is None:
        raise Conflict(
            "instance.no_host", f"Cannot '{transition.recorded}' instance {uuid}: it is on no host", instance=uuid
        )
    taken = update_live(
        tx,
        uuid,
        {"task_state": transition.task_state.value},
        instances.c.vm_state.in_([state.value for state in transition.allowed]),
        instances.c.task_state.is_(None)
        if name != "hard_reboot"
        else instances.c.task_state.is_distinct_from("deleting"),
    )
    if not taken:
        busy = instance.task_state is not None and instance.vm_state in transition.allowed
        what, value = ("task_state", instance.task_state) if busy else ("vm_state", instance.vm_state)
        raise Conflict(
            "instance.wrong_state",
            f"Cannot '{transition.recorded}' instance {uuid} while it is in {what} {value}",
            instance=uuid,
        )
    record(tx, uuid, transition.recorded, request_id=request_id, user_id=user_id, project_id=project_id)
    return instance.host


def start(tx: CellTx, uuid: str, name: str, *, request_id: str, host: str) -> bool:
    """Let the host carry out a recorded action; False when it is finished, overtaken, or another host's."""
    # The update comes first: on its row lock two conductors meet, and the second then sees the first one's event.
    waiting = instances.c.task_state == TRANSITIONS[name].task_state.value
    if not update_live(tx, uuid, {}, instances.c.host == host, waiting):
        return False
    row = tx.execute(_ONE, {"the_uuid": uuid, "the_request": request_id}).first()
    if row is None or row.finish_time is not None:
        return False
    event = tx.execute(_EVENTS, {"the_action": row.id}).first()
    if event is None:
        add_event(tx, row.id, f"compute_{TRANSITIONS[name].recorded}_instance", host)
        return True
    # The host asks again when it did not hear the answer; it drops repeated orders, and a restart closes the event.
    return event.host == host and event.finish_time is None


def add_event(tx: CellTx, action_id: int, event: str, host: str | None) -> None:
    """Write down that work for an action has begun."""
    tx.execute(
        _INSERT_EVENT,
        {
            "created_at": tx.now,
            "event": event,
            "action_id": action_id,
            "start_time": tx.now,
            "host": host,
            "deleted": 0,
        },
    )


def finish(
    tx: CellTx, uuid: str, name: str, *, request_id: str, host: str, power_state: int, failure: str | None
) -> bool:
    """Write how an action ended; False when that is written, or when the instance waits for something else by now."""
    # First, since it happens once: a repeat must not end a later action of the same kind.
    if not close(tx, uuid, request_id, failure):
        return False
    transition = TRANSITIONS[name]
    values: dict[str, Any] = {"task_state": None, "power_state": power_state}
    if failure is None:
        values["vm_state"] = transition.becomes.value
    accepted = update_live(
        tx, uuid, values, instances.c.host == host, instances.c.task_state == transition.task_state.value
    )
    if accepted and failure is not None:
        add_fault(tx, uuid, 500, failure, None, host)
    return accepted


def take_back(tx: CellTx, uuid: str, name: str, *, request_id: str, failure: str) -> None:
    """Give up an action that could not be sent to its host, unless the host has it all the same."""
    row = tx.execute(_ONE, {"the_uuid": uuid, "the_request": request_id}).first()
    waiting = instances.c.task_state == TRANSITIONS[name].task_state.value
    # On this row it meets `start`: the second of the two sees what the first did.
    if row is None or not update_live(tx, uuid, {}, waiting):
        return
    if tx.execute(_EVENTS, {"the_action": row.id}).first() is None and close(tx, uuid, request_id, failure):
        update_live(tx, uuid, {"task_state": None}, waiting)


def close(tx: CellTx, uuid: str, request_id: str, failure: str | None) -> bool:
    """Write the end of an action and of its event; tell whether it was open."""
    row = tx.execute(_ONE, {"the_uuid": uuid, "the_request": request_id}).first()
    if row is None:
        return False
    ended = {"updated_at": tx.now, "finish_time": tx.now}
    closed = tx.execute(
        sa.update(instance_actions)
        .where(instance_actions.c.id == row.id, instance_actions.c.finish_time.is_(None))
        .values(**ended, message="Error" if failure is not None else None)
    )
    if closed.rowcount != 1:
        return False
    tx.execute(
        sa.update(instance_actions_events)
        .where(instance_actions_events.c.action_id == row.id, instance_actions_events.c.finish_time.is_(None))
        .values(**ended, result="Error" if failure is not None else "Success", traceback=failure)
    )
    return True


def hand_over(tx: CellTx, host: str) -> dict[str, tuple[str, str]]:
    """Settle the actions of a host that starts anew, and return those it has still to do: uuid → (operation, request
    id).

    What was started and never finished is given up, because nobody can say whether it happened; the instance is free
    again.
    """
    for uuid, request_id, task_state in tx.execute(_STARTED, {"the_host": host}).all():
        if update_live(tx, uuid, {"task_state": None}, instances.c.task_state == task_state):
            close(tx, uuid, request_id, "The host restarted while this was being done")
    return {
        uuid: (_BY_TASK_STATE[task_state], request_id)
        for uuid, request_id, task_state in tx.execute(_UNSTARTED, {"the_host": host})
    }


def list_of(tx: CellTx, uuid: str) -> list[ActionRecord]:
    """Return what was asked of an instance, the latest first."""
    return [_record(row) for row in tx.execute(_LIST, {"the_uuid": uuid})]


def get_with_events(tx: CellTx, uuid: str, request_id: str) -> tuple[ActionRecord, Sequence[Event]]:
    """Return one action and its events. Raises: NotFound."""
    row = tx.execute(_ONE, {"the_uuid": uuid, "the_request": request_id}).first()
    if row is None:
        raise not_found(uuid)
    events = [
        Event(event.event, event.start_time, event.finish_time, event.result, event.traceback, event.host)
        for event in tx.execute(_EVENTS, {"the_action": row.id})
    ]
    return _record(row), events


def _record(row: Row) -> ActionRecord:
    return ActionRecord(
        row.id, row.action, row.instance_uuid, row.request_id or "", row.user_id, row.project_id,
        row.start_time, row.updated_at, row.message,
    )  # fmt: skip
