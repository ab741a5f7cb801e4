"""How much each project and user may have (seed 003): limits, and the levels that they are found on.

A user's own limit in a project comes first, then the project's, its quota class's, the class `default`, and last the
configuration. -1 is unlimited, and a NULL in an adopted table reads as that. While limits still lie in the cells, what
was found there (`legacy`) is passed in as `older`: a limit of the API database comes before an older one of its level.
"""

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from cellway.config import QuotaSection
from cellway.db.api_tables import project_user_quotas, quota_classes, quotas
from cellway.db.prepared import Prepared
from cellway.db.transaction import ApiTx, insert_if_absent
from cellway.errors import Invalid
from cellway.quota import legacy
from cellway.quota.legacy import Kind, Owner

UNLIMITED: Final = -1
DEFAULT_CLASS: Final = "default"
MOST: Final = 0x7FFFFFFF
"""The largest limit that its column holds."""

ENFORCED: Final = (
    "instances",
    "cores",
    "ram",
    "metadata_items",
    "injected_files",
    "injected_file_content_bytes",
    "injected_file_path_bytes",
    "key_pairs",
    "server_groups",
    "server_group_members",
)
NETWORK: Final = ("fixed_ips", "floating_ips", "security_groups", "security_group_rules")
"""What the network service limits today. Kept and shown at old microversions, and counted by nobody."""
RESOURCES: Final = ENFORCED + NETWORK
"""Every resource with a limit. An adopted database may hold others, which are kept and never shown."""


class Level(enum.IntEnum):
    """Where a limit was found; the highest wins."""

    CONFIGURATION = 0
    DEFAULT = 1
    CLASS = 2
    PROJECT = 3
    USER = 4


Older = Mapping[tuple[Level, str], int]
"""Limits by level and resource that were found in cells, for the same project, user and class."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The limits of a project and of one user in it, by resource; -1 is none."""

    project: Mapping[str, int]
    user: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Source:
    """A limit in force, the level that it was found on, and whether it still lies in a cell."""

    limit: int
    level: Level
    in_cell: bool = False


def defaults_of(section: QuotaSection) -> dict[str, int]:
    """Return the configured limit of every resource."""
    return {
        "instances": section.instances,
        "cores": section.cores,
        "ram": section.ram,
        "metadata_items": section.metadata_items,
        "injected_files": section.injected_files,
        "injected_file_content_bytes": section.injected_file_content_bytes,
        "injected_file_path_bytes": section.injected_file_path_length,
        "key_pairs": section.key_pairs,
        "server_groups": section.server_groups,
        "server_group_members": section.server_group_members,
    } | dict.fromkeys(NETWORK, UNLIMITED)


def _level(level: Level, table: sa.Table, *where: sa.ColumnElement[bool]) -> sa.Select[tuple[int, str, int]]:
    return sa.select(sa.literal(int(level)).label("level"), table.c.resource, table.c.hard_limit).where(*where)


_CLASSES = sa.select(
    sa.case((quota_classes.c.class_name == DEFAULT_CLASS, int(Level.DEFAULT)), else_=int(Level.CLASS)).label("level"),
    quota_classes.c.resource,
    quota_classes.c.hard_limit,
).where(sa.or_(quota_classes.c.class_name == DEFAULT_CLASS, quota_classes.c.class_name == sa.bindparam("the_class")))
_FIND = Prepared(
    sa.union_all(
        _level(
            Level.USER,
            project_user_quotas,
            project_user_quotas.c.project_id == sa.bindparam("the_project"),
            project_user_quotas.c.user_id == sa.bindparam("the_user"),
        ),
        _level(Level.PROJECT, quotas, quotas.c.project_id == sa.bindparam("the_project")),
        _CLASSES,
    )
)
_GIVEN = (
    sa.select(project_user_quotas.c.resource, sa.func.sum(project_user_quotas.c.hard_limit))
    .where(
        project_user_quotas.c.project_id == sa.bindparam("the_project"),
        project_user_quotas.c.user_id != sa.bindparam("the_user"),
        project_user_quotas.c.hard_limit > 0,
    )
    .group_by(project_user_quotas.c.resource)
)


def find(
    tx: ApiTx, project_id: str, user_id: str, *, class_name: str = DEFAULT_CLASS, older: Older | None = None
) -> dict[tuple[Level, str], int]:
    """Return every limit that was set for them, by level and resource."""
    found = _valid(tx, older, project_id, user_id, class_name) if older else {}
    wanted = {"the_project": project_id, "the_user": user_id, "the_class": class_name}
    for level, resource, limit in _FIND.rows(tx, wanted):
        found[Level(level), resource] = UNLIMITED if limit is None else limit
    return found


def _valid(tx: ApiTx, older: Older, project_id: str, user_id: str, class_name: str) -> dict[tuple[Level, str], int]:
    """Return those of the older limits that were not deleted over the API since."""
    owners: dict[Level, tuple[Kind, Owner]] = {
        Level.USER: (Kind.USER, (project_id, user_id)),
        Level.PROJECT: (Kind.PROJECT, project_id),
        Level.CLASS: (Kind.CLASS, class_name),
        Level.DEFAULT: (Kind.CLASS, DEFAULT_CLASS),
    }
    gone = legacy.is_deleted(tx, [owners[level] for level in {level for level, _ in older}])
    return {(level, resource): limit for (level, resource), limit in older.items() if owners[level] not in gone}


def resolve(found: Mapping[tuple[Level, str], int], defaults: Mapping[str, int], *, up_to: Level) -> dict[str, int]:
    """Return the limit in force of every resource, looking at no level above `up_to`."""
    limits = dict(defaults)
    for level, resource in sorted(found):
        if level <= up_to and resource in limits:
            limits[resource] = found[level, resource]
    return limits


def explain(
    found: Mapping[tuple[Level, str], int],
    known: Collection[tuple[Level, str]],
    defaults: Mapping[str, int],
    *,
    up_to: Level,
) -> dict[str, Source]:
    """Return the same as `resolve`, with where each limit stands; what is not among the `known` stands in a cell."""
    sources = {resource: Source(limit, Level.CONFIGURATION) for resource, limit in defaults.items()}
    for level, resource in sorted(found):
        if level <= up_to and resource in sources:
            sources[resource] = Source(found[level, resource], level, in_cell=(level, resource) not in known)
    return sources


def allowed(
    tx: ApiTx, defaults: Mapping[str, int], project_id: str, user_id: str, older: Older | None = None
) -> Allowed:
    """Return the limits in force for a project and a user in it."""
    found = find(tx, project_id, user_id, older=older)
    return Allowed(resolve(found, defaults, up_to=Level.PROJECT), resolve(found, defaults, up_to=Level.USER))


def given_to_users(tx: ApiTx, project_id: str, *, but: str | None) -> dict[str, int]:
    """Return how much of the project's limits its users have for themselves together, all but one, by resource."""
    rows = tx.execute(_GIVEN, {"the_project": project_id, "the_user": but or ""})
    return {resource: int(limit) for resource, limit in rows}


# ---- changing --------------------------------------------------------------------------------------------------


def set_project(tx: ApiTx, project_id: str, limits: Mapping[str, int]) -> None:
    """Set limits of a project. Raises: Invalid for a resource or value that is none."""
    _set(tx, Kind.PROJECT, project_id, quotas, {"project_id": project_id}, limits)


def set_user(tx: ApiTx, project_id: str, user_id: str, limits: Mapping[str, int]) -> None:
    """Set limits of a user in a project. Raises: Invalid for a resource or value that is none."""
    owner = {"project_id": project_id, "user_id": user_id}
    _set(tx, Kind.USER, (project_id, user_id), project_user_quotas, owner, limits)


def set_class(tx: ApiTx, class_name: str, limits: Mapping[str, int]) -> None:
    """Set limits of a quota class. Raises: Invalid for a resource or value that is none."""
    _set(tx, Kind.CLASS, class_name, quota_classes, {"class_name": class_name}, limits)


def _set(
    tx: ApiTx, kind: Kind, owner: Owner, table: sa.Table, columns: Mapping[str, str], limits: Mapping[str, int]
) -> None:
    _check(limits)
    legacy.claim_by_api(tx, kind, owner, sorted(limits))
    theirs = [table.c[name] == value for name, value in columns.items()]
    for resource, limit in sorted(limits.items()):
        row = {**columns, "resource": resource, "hard_limit": limit}
        if not insert_if_absent(tx, table, {**row, "created_at": tx.now}):
            mine = sa.update(table).where(*theirs, table.c.resource == resource)
            tx.execute(mine.values(hard_limit=limit, updated_at=tx.now))


def _check(limits: Mapping[str, int]) -> None:
    for resource, limit in limits.items():
        if resource not in RESOURCES:
            raise Invalid("quota.unknown_resource", f"There is no quota for {resource}.", resource=resource)
        if not UNLIMITED <= limit <= MOST:
            raise Invalid(
                "quota.bad_limit", f"Quota limit {limit} for {resource} must be in the range of -1 and {MOST}."
            )


def delete_project(tx: ApiTx, project_id: str) -> None:
    """Remove every limit of a project and of its users; those that still lie in cells do not come back either."""
    legacy.tombstone(tx, Kind.PROJECT, project_id)
    tx.execute(sa.delete(quotas).where(quotas.c.project_id == project_id))
    legacy.tombstone(tx, Kind.USER, project_id)
    tx.execute(sa.delete(project_user_quotas).where(project_user_quotas.c.project_id == project_id))


def delete_user(tx: ApiTx, project_id: str, user_id: str) -> None:
    """Remove the limits of a user in a project."""
    legacy.tombstone(tx, Kind.USER, (project_id, user_id))
    theirs = project_user_quotas.c.project_id == project_id, project_user_quotas.c.user_id == user_id
    tx.execute(sa.delete(project_user_quotas).where(*theirs))


def delete_class(tx: ApiTx, class_name: str) -> None:
    """Remove the limits of a quota class."""
    legacy.tombstone(tx, Kind.CLASS, class_name)
    tx.execute(sa.delete(quota_classes).where(quota_classes.c.class_name == class_name))
