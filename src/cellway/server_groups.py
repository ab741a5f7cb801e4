"""Server groups: servers that are to be together on one host, or apart.

Nouns over the API database; `compute/api.py`, `compute/build.py`, `compute/delete.py` and `http/server_groups.py` call
them. The group's own row is the lock under which members join and get their hosts: whoever holds it sees where the
others are, and nobody adds to that before the transaction ends. Seed: none of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from cellway.db.api_tables import (
    host_claims,
    instance_group_member,
    instance_group_policy,
    instance_groups,
    instance_mappings,
)
from cellway.db.transaction import ApiTx
from cellway.errors import NotFound

Policy = Literal["affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGroup:
    """A group. `policy` is empty, or a word that means nothing, only in a database that was adopted."""

    uuid: str
    project_id: str
    user_id: str
    name: str
    policy: str
    max_server_per_host: int | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """What decides where the next member may be: the policy, and how many members each host has."""

    policy: str
    max_server_per_host: int = 1
    hosts: Mapping[str, int] = field(default_factory=dict)


class _Rules(msgspec.Struct):
    max_server_per_host: int | None = None


_GROUP, _POLICY, _MEMBER, _MAPPING = (
    instance_groups.c,
    instance_group_policy.c,
    instance_group_member.c,
    instance_mappings.c,
)
_GROUPS = sa.select(
    _GROUP.id,
    _GROUP.uuid,
    _GROUP.project_id,
    _GROUP.user_id,
    _GROUP.name,
    _POLICY.policy,
    _POLICY.rules,
).outerjoin(instance_group_policy, _POLICY.group_id == _GROUP.id)
_BY_UUID = _GROUPS.where(_GROUP.uuid == sa.bindparam("the_uuid"))
_PAGE = (
    _GROUPS.order_by(_GROUP.id)
    .limit(sa.bindparam("most", type_=sa.Integer))
    .offset(sa.bindparam("skipped", type_=sa.Integer))
)
_PAGE_OF = _PAGE.where(_GROUP.project_id == sa.bindparam("the_project"))
_LIVE = (
    sa.select(_MEMBER.group_id, _MEMBER.instance_uuid)
    .join(instance_mappings, _MAPPING.instance_uuid == _MEMBER.instance_uuid)
    .where(sa.not_(_MAPPING.queued_for_delete))
)
_MEMBERS = _LIVE.where(_MEMBER.group_id.in_(sa.bindparam("ids", expanding=True))).order_by(_MEMBER.id)
_HOLD = sa.update(instance_groups).where(_GROUP.uuid == sa.bindparam("the_uuid")).values(updated_at=sa.bindparam("now"))
_ID = sa.select(_GROUP.id).where(_GROUP.uuid == sa.bindparam("the_uuid"))
_PLACEMENT = (
    sa.select(_POLICY.policy, _POLICY.rules, host_claims.c.host, sa.func.count())
    .select_from(
        instance_groups.outerjoin(instance_group_policy, _POLICY.group_id == _GROUP.id)
        .outerjoin(instance_group_member, _MEMBER.group_id == _GROUP.id)
        .outerjoin(host_claims, host_claims.c.instance_uuid == _MEMBER.instance_uuid)
    )
    .where(_GROUP.uuid == sa.bindparam("the_uuid"))
    .group_by(_POLICY.policy, _POLICY.rules, host_claims.c.host)
)
_REMOVE = sa.delete(instance_group_member).where(_MEMBER.instance_uuid == sa.bindparam("the_server"))
_COUNT_OF_PROJECT = (
    sa.select(sa.func.count()).select_from(instance_groups).where(_GROUP.project_id == sa.bindparam("the_project"))
)
_COUNT_OF_USER = _COUNT_OF_PROJECT.where(_GROUP.user_id == sa.bindparam("the_user"))
_COUNT_MEMBERS = (
    _LIVE.with_only_columns(sa.func.count())
    .join(instance_groups, _GROUP.id == _MEMBER.group_id)
    .where(_GROUP.uuid == sa.bindparam("the_uuid"), _MAPPING.user_id == sa.bindparam("the_user"))
)


def get(tx: ApiTx, uuid: str) -> ServerGroup:
    """Return a group with its members.

    Raises: NotFound.
    """
    row = tx.execute(_BY_UUID, {"the_uuid": uuid}).first()
    if row is None:
        raise not_found(uuid)
    return _groups(tx, [row])[0]


def list(tx: ApiTx, project_id: str | None, *, limit: int, offset: int = 0) -> Sequence[ServerGroup]:
    """Return at most `limit` groups of a project, or of all, after the first `offset`, the oldest first."""
    page: dict[str, Any] = {"most": limit, "skipped": offset}
    if project_id is None:
        return _groups(tx, tx.execute(_PAGE, page).all())
    return _groups(tx, tx.execute(_PAGE_OF, {**page, "the_project": project_id}).all())


def create(
    tx: ApiTx,
    uuid: str,
    *,
    project_id: str,
    user_id: str,
    name: str,
    policy: Policy,
    max_server_per_host: int | None = None,
) -> ServerGroup:
    """Make a group without members. `max_server_per_host` counts for anti-affinity alone; None is 1."""
    values = {"created_at": tx.now, "uuid": uuid, "project_id": project_id, "user_id": user_id, "name": name}
    tx.execute(sa.insert(instance_groups), values)
    rules = {} if max_server_per_host is None else {"max_server_per_host": max_server_per_host}
    tx.execute(
        sa.insert(instance_group_policy),
        {
            "created_at": tx.now,
            "group_id": tx.execute(_ID, {"the_uuid": uuid}).scalar_one(),
            "policy": policy,
            "rules": msgspec.json.encode(rules).decode(),
        },
    )
    return get(tx, uuid)


def delete(tx: ApiTx, uuid: str) -> None:
    """Remove a group; its servers stay where they are.

    Raises: NotFound.
    """
    group_id = _hold(tx, uuid)
    for table in (instance_group_member, instance_group_policy):
        tx.execute(sa.delete(table).where(table.c.group_id == group_id))
    tx.execute(sa.delete(instance_groups).where(_GROUP.id == group_id))


def add_members(tx: ApiTx, uuid: str, servers: Sequence[str]) -> None:
    """Make servers members of a group, and hold the group until the transaction ends.

    Raises: NotFound.
    """
    group_id = _hold(tx, uuid)
    tx.execute(
        sa.insert(instance_group_member),
        [{"created_at": tx.now, "group_id": group_id, "instance_uuid": server} for server in servers],
    )


def remove_member(tx: ApiTx, server: str) -> None:
    """Take a server that is gone out of the group that it is in, if any."""
    tx.execute(_REMOVE, {"the_server": server})


def find_placement(tx: ApiTx, uuid: str, *, hold: bool = False) -> Placement | None:
    """Return what decides where a group's next member may be; None when there is no such group.

    With `hold`, no other member gets a host before the transaction ends.
    """
    if hold and not tx.execute(_HOLD, {"the_uuid": uuid, "now": tx.now}).rowcount:
        return None
    rows = tx.execute(_PLACEMENT, {"the_uuid": uuid}).all()
    if not rows:
        return None
    policy, rules, _host, _count = rows[0]
    hosts = {host: count for _policy, _rules, host, count in rows if host is not None}
    return Placement(policy or "", _rules_of(rules).max_server_per_host or 1, hosts)


def count_groups(tx: ApiTx, project_id: str, user_id: str | None = None) -> int:
    """Return how many groups a project has, or one user in it."""
    if user_id is None:
        return int(tx.execute(_COUNT_OF_PROJECT, {"the_project": project_id}).scalar_one())
    return int(tx.execute(_COUNT_OF_USER, {"the_project": project_id, "the_user": user_id}).scalar_one())


def count_members(tx: ApiTx, uuid: str, user_id: str) -> int:
    """Return how many live servers of a user are in a group."""
    return int(tx.execute(_COUNT_MEMBERS, {"the_uuid": uuid, "the_user": user_id}).scalar_one())


def not_found(uuid: str) -> NotFound:
    """Return the error for a group that is not there, or not the caller's."""
    return NotFound("server_group.not_found", f"Instance group {uuid} could not be found.", group=uuid)


def _hold(tx: ApiTx, uuid: str) -> int:
    """Lock a group's row until the transaction ends, and return its id. Raises: NotFound."""
    if not tx.execute(_HOLD, {"the_uuid": uuid, "now": tx.now}).rowcount:
        raise not_found(uuid)
    return int(tx.execute(_ID, {"the_uuid": uuid}).scalar_one())


def _groups(tx: ApiTx, rows: Sequence[sa.Row[Any]]) -> Sequence[ServerGroup]:
    members: dict[int, tuple[str, ...]] = {}
    if rows:
        for group_id, server in tx.execute(_MEMBERS, {"ids": [row.id for row in rows]}):
            members[group_id] = (*members.get(group_id, ()), server)
    return [
        ServerGroup(
            uuid=row.uuid,
            project_id=row.project_id or "",
            user_id=row.user_id or "",
            name=row.name or "",
            policy=row.policy or "",
            max_server_per_host=_rules_of(row.rules).max_server_per_host,
            members=members.get(row.id, ()),
        )
        for row in rows
    ]


def _rules_of(text: str | None) -> _Rules:
    # The incumbent writes its numbers as text.
    return msgspec.json.decode(text or "{}", type=_Rules, strict=False)
