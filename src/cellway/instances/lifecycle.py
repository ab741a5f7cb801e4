"""Making, building and removing instances, under fences (`instance_fences`).

A fence row holds the highest claim generation that a builder has shown in this cell, and the build attempt and host
that count. Instance and fence change in one transaction, so a builder or an agent that was overtaken changes nothing.
`compute/build.py` calls the builder's half, `compute/conductor.py` the agents' half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from cellway.db.cell_tables import instance_actions, instance_fences, instances
from cellway.db.transaction import CellTx, insert_if_absent
from cellway.errors import Conflict
from cellway.instances import actions, reading, writing
from cellway.instances.records import Instance, PowerState, TaskState, VmState


class FenceState(StrEnum):
    """How far the attempt is that counts."""

    PLACED = "placed"
    BUILDING = "building"
    ACTIVE = "active"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Fence:
    """The attempt that counts for an instance, and how it goes."""

    instance_uuid: str
    generation: int
    attempt: int
    host: str | None
    state: str
    failure: str | None


_FENCE = instance_fences.c
_FENCES = sa.select(_FENCE.instance_uuid, _FENCE.generation, _FENCE.attempt, _FENCE.host, _FENCE.state, _FENCE.failure)
_SOME = _FENCES.where(_FENCE.instance_uuid.in_(sa.bindparam("uuids", expanding=True)))
_RAISE = (
    sa.update(instance_fences)
    .where(_FENCE.instance_uuid == sa.bindparam("the_uuid"), _FENCE.generation <= sa.bindparam("the_generation"))
    .values(generation=sa.bindparam("the_generation"), updated_at=sa.bindparam("now"))
)
_RESTART = (
    sa.update(instance_fences)
    .where(_FENCE.instance_uuid == sa.bindparam("the_uuid"))
    .values(
        attempt=sa.bindparam("the_attempt"),
        host=sa.bindparam("the_host"),
        state=sa.bindparam("the_state"),
        failure=None,
        updated_at=sa.bindparam("now"),
    )
)
_START = (
    sa.update(instance_fences)
    .where(
        _FENCE.instance_uuid == sa.bindparam("the_uuid"),
        _FENCE.attempt == sa.bindparam("the_attempt"),
        _FENCE.host == sa.bindparam("the_host"),
        sa.or_(
            _FENCE.state == FenceState.PLACED.value,
            sa.and_(_FENCE.state == FenceState.BUILDING.value, _FENCE.epoch <= sa.bindparam("the_epoch")),
        ),
    )
    .values(state=FenceState.BUILDING.value, epoch=sa.bindparam("the_epoch"), updated_at=sa.bindparam("now"))
)
_END = (
    sa.update(instance_fences)
    .where(
        _FENCE.instance_uuid == sa.bindparam("the_uuid"),
        _FENCE.attempt == sa.bindparam("the_attempt"),
        _FENCE.host == sa.bindparam("the_host"),
        _FENCE.epoch <= sa.bindparam("the_epoch"),
        _FENCE.state == FenceState.BUILDING.value,
    )
    .values(
        state=sa.bindparam("the_state"),
        failure=sa.bindparam("the_failure"),
        sequence=sa.bindparam("the_sequence"),
        updated_at=sa.bindparam("now"),
    )
)
_DELETED = (
    sa.update(instance_fences)
    .where(_FENCE.instance_uuid == sa.bindparam("the_uuid"))
    .values(state=FenceState.DELETED.value, updated_at=sa.bindparam("now"))
)
_CREATE_REQUEST = sa.select(instance_actions.c.request_id).where(
    instance_actions.c.instance_uuid == sa.bindparam("the_uuid"), instance_actions.c.action == "create"
)
_ON_HOST = (
    sa.select(
        instances.c.uuid,
        instances.c.display_name,
        instances.c.vm_state,
        instances.c.task_state,
        instances.c.vcpus,
        instances.c.memory_mb,
        instances.c.root_gb,
        instances.c.ephemeral_gb,
        sa.func.coalesce(_FENCE.attempt, 0).label("attempt"),
    )
    .outerjoin(instance_fences, _FENCE.instance_uuid == instances.c.uuid)
    .where(instances.c.host == sa.bindparam("the_host"), instances.c.deleted == 0)
    .order_by(instances.c.id)
)


def _raise_fence(tx: CellTx, uuid: str, generation: int) -> Fence | None:
    """Show a claim's generation here; return the fence as it was, or None when this call made it.

    Raises: Conflict when a higher generation was here first.
    """
    first = {
        "created_at": tx.now,
        "updated_at": tx.now,
        "instance_uuid": uuid,
        "generation": generation,
        "attempt": 0,
        "state": FenceState.WITHDRAWN.value,
        "epoch": 0,
        "sequence": 0,
    }
    if insert_if_absent(tx, instance_fences, first):
        return None
    if tx.execute(_RAISE, {"the_uuid": uuid, "the_generation": generation, "now": tx.now}).rowcount != 1:
        raise Conflict("build.overtaken", f"Another builder has taken over instance {uuid}", instance=uuid)
    return fences(tx, [uuid])[uuid]


def fences(tx: CellTx, uuids: Sequence[str]) -> dict[str, Fence]:
    """Return the fences of instances that have one."""
    return {row.instance_uuid: Fence(*row) for row in tx.execute(_SOME, {"uuids": list(uuids)})}


def put(tx: CellTx, instance: Instance, *, generation: int, attempt: int, host: str | None, request_id: str) -> str:
    """Make the instance here for a build attempt, unless that attempt made it already; return the attempt's state.

    WITHDRAWN means that the attempt was taken back and nothing is made: its number is spent.

    Raises: Conflict when a later builder or attempt was here.
    """
    fence = _raise_fence(tx, instance.uuid, generation)
    if fence is not None:
        if fence.attempt > attempt:
            raise Conflict(
                "build.overtaken", f"A later attempt has built instance {instance.uuid}", instance=instance.uuid
            )
        if fence.attempt == attempt:
            return fence.state
        writing.erase(tx, instance.uuid)
    state = FenceState.PLACED.value if host is not None else FenceState.FAILED.value
    made = {"the_uuid": instance.uuid, "the_attempt": attempt, "the_host": host, "the_state": state, "now": tx.now}
    tx.execute(_RESTART, made)
    writing.insert(tx, instance)
    actions.record(
        tx,
        instance.uuid,
        "create",
        request_id=request_id,
        user_id=instance.user_id,
        project_id=instance.project_id,
        start_time=instance.created_at,
    )
    if instance.fault is not None:
        actions.close(tx, instance.uuid, request_id, instance.fault.message)
    return state


def withdraw(tx: CellTx, uuid: str, *, generation: int) -> bool:
    """Take a build back out of this cell, and let no earlier builder put it in again; False when it runs by now.

    Raises: Conflict when a later builder was here.
    """
    fence = _raise_fence(tx, uuid, generation)
    if fence is None:
        return True
    if fence.state == FenceState.ACTIVE:
        return False
    tx.execute(
        _RESTART,
        {
            "the_uuid": uuid,
            "the_attempt": fence.attempt,
            "the_host": None,
            "the_state": FenceState.WITHDRAWN.value,
            "now": tx.now,
        },
    )
    writing.erase(tx, uuid)
    return True


# ---- on behalf of agents ---------------------------------------------------------------------------------------


def start_build(tx: CellTx, uuid: str, *, attempt: int, host: str, epoch: int) -> bool:
    """Let the host build an attempt, if it is the one that counts and has not ended.

    The host asks again when it did not hear the answer, or when it starts anew; it drops repeated orders itself.
    """
    found = tx.execute(
        _START, {"the_uuid": uuid, "the_attempt": attempt, "the_host": host, "the_epoch": epoch, "now": tx.now}
    )
    if found.rowcount != 1:
        return False
    writing.update_live(tx, uuid, {"task_state": TaskState.SPAWNING.value})
    request_id = tx.execute(_CREATE_REQUEST, {"the_uuid": uuid}).scalar_one_or_none()
    if request_id is not None:
        action, events = actions.get_with_events(tx, uuid, request_id)
        if all(event.host != host or event.finish_time is not None for event in events):
            actions.add_event(tx, action.id, "compute__do_build_and_run_instance", host)
    return True


def finish_build(
    tx: CellTx, uuid: str, *, attempt: int, host: str, epoch: int, sequence: int, failure: str | None
) -> bool:
    """Write how a build ended; False when it no longer counts. A repeated report is accepted without effect."""
    state = FenceState.ACTIVE if failure is None else FenceState.FAILED
    found = tx.execute(
        _END,
        {
            "the_uuid": uuid,
            "the_attempt": attempt,
            "the_host": host,
            "the_epoch": epoch,
            "the_sequence": sequence,
            "the_state": state.value,
            "the_failure": failure,
            "now": tx.now,
        },
    )
    if found.rowcount != 1:
        fence = fences(tx, [uuid]).get(uuid)
        return fence is not None and (fence.attempt, fence.host, fence.state) == (attempt, host, state.value)
    if failure is None:
        running = {
            "vm_state": VmState.ACTIVE.value,
            "task_state": None,
            "power_state": PowerState.RUNNING.value,
            "launched_at": tx.now,
        }
        writing.update_live(tx, uuid, running, instances.c.vm_state == VmState.BUILDING.value)
    request_id = tx.execute(_CREATE_REQUEST, {"the_uuid": uuid}).scalar_one_or_none()
    if request_id is not None:
        actions.close(tx, uuid, request_id, failure)
    return True


@dataclass(frozen=True, slots=True)
class OnHost:
    """An instance that a host should have."""

    uuid: str
    name: str
    vm_state: str
    task_state: str | None
    vcpus: int
    memory_mb: int
    disk_gb: int
    attempt: int


def list_on_host(tx: CellTx, host: str) -> list[OnHost]:
    """Return the live instances of a host."""
    return [
        OnHost(
            row.uuid, row.display_name or "", row.vm_state or "", row.task_state, row.vcpus or 0, row.memory_mb or 0,
            (row.root_gb or 0) + (row.ephemeral_gb or 0), row.attempt,
        )
        for row in tx.execute(_ON_HOST, {"the_host": host})
    ]  # fmt: skip


# ---- deleting --------------------------------------------------------------------------------------------------


def begin_delete(tx: CellTx, uuid: str, *, request_id: str, user_id: str, project_id: str) -> Instance | None:
    """Mark that the instance is being deleted and return it; None when it is not here or gone already."""
    if not writing.update_live(tx, uuid, {"task_state": TaskState.DELETING.value}):
        return None
    actions.record(tx, uuid, "delete", request_id=request_id, user_id=user_id, project_id=project_id)
    return reading.get(tx, uuid)


def finish_delete(tx: CellTx, uuid: str, *, host: str | None = None) -> bool:
    """Delete the instance whose removal was asked for; with `host`, only if it is still there. False when there was
    nothing to do.
    """
    instance = reading.find(tx, uuid)
    if instance is None or instance.deleted or instance.task_state != TaskState.DELETING:
        return False
    if host is not None and instance.host != host:
        return False
    for action in actions.list_of(tx, uuid):
        if action.action == "delete":
            actions.close(tx, uuid, action.request_id, None)
    tx.execute(_DELETED, {"the_uuid": uuid, "now": tx.now})
    return writing.soft_delete(tx, uuid)
