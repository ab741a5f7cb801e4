"""What instances took of a period: each one's seconds in it, and projects' sums.

An instance counts from its launch until its end, so one that never ran (all of cell0) does not count, and one that was
deleted does. `compute/usage.py` calls this in every cell; both statements measure the time in the database.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from cellway.db.cell_tables import instance_extra, instances
from cellway.db.transaction import CellTx, by_code_point, seconds_between


@dataclass(frozen=True, slots=True)
class ServerUsage:
    """One instance in a period. `flavor` is the JSON of `instance_extra.flavor`, or empty."""

    project_id: str
    uuid: str
    name: str
    vm_state: str
    flavor: str
    vcpus: int
    memory_mb: int
    disk_gb: int
    launched_at: datetime
    terminated_at: datetime | None
    seconds: float


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """The sums of a project's instances in a period: seconds, and seconds times what each had."""

    project_id: str
    seconds: float = 0.0
    vcpus: float = 0.0
    memory_mb: float = 0.0
    disk_gb: float = 0.0

    def __add__(self, other: "ProjectUsage") -> "ProjectUsage":
        return ProjectUsage(
            self.project_id,
            self.seconds + other.seconds,
            self.vcpus + other.vcpus,
            self.memory_mb + other.memory_mb,
            self.disk_gb + other.disk_gb,
        )


_START, _STOP = sa.bindparam("start", type_=sa.DateTime), sa.bindparam("stop", type_=sa.DateTime)
_INSTANCE = instances.c
_IN_PERIOD = sa.and_(
    _INSTANCE.launched_at < _STOP, sa.or_(_INSTANCE.terminated_at.is_(None), _INSTANCE.terminated_at > _START)
)
_SECONDS: sa.ColumnElement[float] = seconds_between(
    sa.case((_INSTANCE.launched_at > _START, _INSTANCE.launched_at), else_=_START),
    sa.case((_INSTANCE.terminated_at < _STOP, _INSTANCE.terminated_at), else_=_STOP),
)
_VCPUS, _MEMORY, _DISK = (
    sa.func.coalesce(_INSTANCE.vcpus, 0),
    sa.func.coalesce(_INSTANCE.memory_mb, 0),
    sa.func.coalesce(_INSTANCE.root_gb, 0) + sa.func.coalesce(_INSTANCE.ephemeral_gb, 0),
)
_PROJECT = sa.func.coalesce(_INSTANCE.project_id, "")
_IN_ORDER = by_code_point(_PROJECT)
_SUMS = (
    sa.select(
        _PROJECT,
        sa.func.sum(_SECONDS),
        sa.func.sum(_SECONDS * _VCPUS),
        sa.func.sum(_SECONDS * _MEMORY),
        sa.func.sum(_SECONDS * _DISK),
    )
    .where(_IN_PERIOD)
    .group_by(_PROJECT)
)
_SERVERS = (
    sa.select(
        _PROJECT,
        _INSTANCE.uuid,
        sa.func.coalesce(_INSTANCE.display_name, ""),
        sa.func.coalesce(_INSTANCE.vm_state, ""),
        # Of a deleted instance too, whose row there the incumbent deletes softly with it.
        sa.func.coalesce(instance_extra.c.flavor, ""),
        _VCPUS,
        _MEMORY,
        _DISK,
        _INSTANCE.launched_at,
        _INSTANCE.terminated_at,
        _SECONDS,
    )
    .outerjoin(instance_extra, instance_extra.c.instance_uuid == _INSTANCE.uuid)
    .where(_IN_PERIOD)
    .order_by(_IN_ORDER, _INSTANCE.uuid)
    .limit(sa.bindparam("most", type_=sa.Integer))
)
_AFTER = sa.or_(
    sa.bindparam("after_project") < _IN_ORDER,
    sa.and_(sa.bindparam("after_project") == _PROJECT, _INSTANCE.uuid > sa.bindparam("after_uuid")),
)
_OF_PROJECT = _INSTANCE.project_id == sa.bindparam("the_project")
_PAGES = {
    (False, False): _SERVERS,
    (False, True): _SERVERS.where(_AFTER),
    (True, False): _SERVERS.where(_OF_PROJECT),
    (True, True): _SERVERS.where(_OF_PROJECT, _AFTER),
}
"""By whether the servers are one project's, and whether they follow a marker."""


def list_sums(tx: CellTx, start: datetime, stop: datetime) -> list[ProjectUsage]:
    """Return what each project's instances here took of a period."""
    return [ProjectUsage(*row) for row in tx.execute(_SUMS, {"start": start, "stop": stop})]


def list_servers(
    tx: CellTx, start: datetime, stop: datetime, project_id: str | None, limit: int, after: tuple[str, str] | None
) -> list[ServerUsage]:
    """Return at most `limit` instances of a period, of a project or all, those after (project, uuid), in that order."""
    parameters: dict[str, object] = {"start": start, "stop": stop, "most": limit}
    if project_id is not None:
        parameters["the_project"] = project_id
    if after is not None:
        parameters["after_project"], parameters["after_uuid"] = after
    return [ServerUsage(*row) for row in tx.execute(_PAGES[project_id is not None, after is not None], parameters)]


def sums_of(servers: Iterable[ServerUsage]) -> Sequence[ProjectUsage]:
    """Return the sums of some instances, in the order of their projects."""
    return add_up(
        ProjectUsage(
            one.project_id,
            one.seconds,
            one.seconds * one.vcpus,
            one.seconds * one.memory_mb,
            one.seconds * one.disk_gb,
        )
        for one in servers
    )


def add_up(parts: Iterable[ProjectUsage]) -> Sequence[ProjectUsage]:
    """Return one sum for each project, in the order of their ids."""
    whole: dict[str, ProjectUsage] = {}
    for part in parts:
        before = whole.get(part.project_id)
        whole[part.project_id] = part if before is None else before + part
    return [whole[project_id] for project_id in sorted(whole)]
