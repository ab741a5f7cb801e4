"""What projects and users have of their limits (seed 003): reserve, commit, roll back, expire, refund, recount.

A usage row says how much is in use and how much reserved, for each resource of a project (`user_id` is '') and of each
user in it. An increase is granted by one conditional UPDATE of all the rows that it counts for, so that
`in_use + reserved` never passes a limit, however many ask at once. Before that the *gate*, the project's row of the
first resource of its family, is locked: whoever changes usages or limits of a project takes it first, so nobody waits
for two others in a ring, and limits are read after everybody else's change of them.

What a server takes is a charge, a row of its own; a usage can always be counted again from the charges. Servers are
reserved for without an expiry: their build request, made in the same transaction, is carried to its end by somebody.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from cellway.db.api_tables import instance_mappings, quota_usages, reservations, server_charges
from cellway.db.prepared import Prepared
from cellway.db.transaction import ApiTx, Row, insert_if_absent, insert_many_if_absent
from cellway.errors import CellwayError, OverQuota
from cellway.quota.limits import MOST, Allowed

SERVER: Final = ("instances", "cores", "ram")
"""What a server takes; `ram` in MB. The first is the gate of the family, as of the two below."""
_FAMILIES: Final = (SERVER, ("server_groups",), ("key_pairs",))
COUNTED: Final = tuple(resource for family in _FAMILIES for resource in family)
"""The resources that have a usage."""
_PROJECT: Final = ""
_TOO_MANY: Final = {
    "key_pairs": "Quota exceeded, too many key pairs.",
    "server_groups": "Quota exceeded, too many server groups.",
}
"""What the incumbent says without numbers."""

Key = tuple[str, str, str]
"""Project, user and resource of a usage: no user in a project's own, no project in what is a user's alone."""
Ask = Mapping[str, int]
"""How much more of each resource; less than 0 gives back."""


class Uncounted(CellwayError):
    """There is no usage to decide on, or it has to be counted anew first: count, and ask again."""

    def __init__(self, project_id: str, user_id: str, resources: Collection[str], *, first: bool) -> None:
        super().__init__("quota.uncounted", "The usage has to be counted first", project=project_id, user=user_id)
        self.project_id = project_id
        self.user_id = user_id
        self.resources = frozenset(resources)
        self.first = first


@dataclass(frozen=True, slots=True)
class Charge:
    """What one server takes of its project's and user's limits."""

    instance_uuid: str
    project_id: str
    user_id: str
    cores: int
    ram: int
    instances: int = 1

    @property
    def taken(self) -> dict[str, int]:
        """The same by resource."""
        return {"instances": self.instances, "cores": self.cores, "ram": self.ram}


@dataclass(frozen=True, slots=True)
class Usage:
    """How much of one resource is in use, and how much is reserved."""

    in_use: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        """What counts against a limit."""
        return self.in_use + self.reserved


@dataclass(frozen=True, slots=True)
class Recount:
    """When a usage is counted anew before it is used. 0 is never."""

    after_seconds: int = 0
    after_uses: int = 0


NEVER: Final = Recount()


class _Row(NamedTuple):
    """A usage as it stands."""

    id: int
    user_id: str
    resource: str
    in_use: int
    reserved: int
    until_refresh: int | None
    updated_at: datetime | None


class _Pending(NamedTuple):
    """What a reservation holds of one usage."""

    usage_id: int
    project_id: str
    user_id: str
    resource: str
    delta: int


_U = quota_usages.c
_R = reservations.c
_C = server_charges.c
_GATE = Prepared(
    sa.select(_U.id)
    .where(
        _U.project_id == sa.bindparam("the_project"),
        _U.user_id == sa.bindparam("the_user"),
        _U.resource == sa.bindparam("the_gate"),
    )
    .with_for_update()
)
_FIND = Prepared(
    sa.select(_U.id, _U.user_id, _U.resource, _U.in_use, _U.reserved, _U.until_refresh, _U.updated_at).where(
        _U.project_id == sa.bindparam("the_project"),
        sa.or_(_U.user_id == "", _U.user_id == sa.bindparam("the_user")),
    )
)
_PENDING = Prepared(
    sa.select(_R.usage_id, _R.project_id, _R.user_id, _R.resource, _R.delta).where(_R.uuid == sa.bindparam("the_uuid"))
)
_FORGET = sa.delete(reservations).where(_R.uuid == sa.bindparam("the_uuid"))
_EXPIRED = (
    sa.select(_R.uuid)
    .where(_R.expire <= sa.bindparam("now"))
    .group_by(_R.uuid)
    .order_by(sa.func.min(_R.expire))
    .limit(sa.bindparam("most"))
)
_CHARGE_OF = sa.select(_C.instance_uuid, _C.project_id, _C.user_id, _C.cores, _C.ram, _C.instances).where(
    _C.instance_uuid == sa.bindparam("the_uuid")
)
_CHARGES = (
    sa.select(_C.id, _C.instance_uuid, _C.project_id, _C.user_id, _C.cores, _C.ram, _C.instances)
    .where(_C.id > sa.bindparam("after"))
    .order_by(_C.id)
    .limit(sa.bindparam("most"))
)
_CHARGES_IN = _CHARGES.where(_C.project_id == sa.bindparam("the_project"))
_CHARGES_OF = sa.select(_C.instance_uuid, _C.project_id, _C.user_id, _C.cores, _C.ram, _C.instances).where(
    _C.instance_uuid.in_(sa.bindparam("the_uuids", expanding=True))
)
_RECHARGE = (
    sa.update(server_charges)
    .where(_C.instance_uuid == sa.bindparam("the_uuid"), _C.instances > 0)
    .values(cores=sa.bindparam("the_cores"), ram=sa.bindparam("the_ram"))
)
_UNCHARGE = sa.delete(server_charges).where(_C.instance_uuid == sa.bindparam("the_uuid"))
_CHARGE_NOTHING = (
    sa.update(server_charges)
    .where(_C.instance_uuid == sa.bindparam("the_uuid"), _C.instances > 0)
    .values(instances=0, cores=0, ram=0)
)
_REFUND = (
    sa.update(quota_usages)
    .where(
        _U.project_id == sa.bindparam("the_project"),
        sa.or_(_U.user_id == "", _U.user_id == sa.bindparam("the_user")),
        _U.resource.in_(SERVER),
    )
    .values(
        in_use=_U.in_use
        - sa.case(
            *((_U.resource == resource, sa.bindparam(f"the_{resource}", type_=sa.BigInteger)) for resource in SERVER)
        )
    )
)


# ---- granting --------------------------------------------------------------------------------------------------


def lock(tx: ApiTx, project_id: str, user_id: str, resources: Collection[str]) -> bool:
    """Take the gates of a project's usages, or without a project of a user's, until the transaction ends.

    Tell whether they are all there; where one is not, nothing was ever counted.
    """
    return all(_lock(tx, gate) for gate in _gates(project_id, user_id, resources))


def _lock_or_make(tx: ApiTx, project_id: str, user_id: str, resources: Collection[str]) -> None:
    """Take the gates, also where nothing was counted: whoever counts at this moment waits, or is waited for."""
    for gate in _gates(project_id, user_id, resources):
        if not _lock(tx, gate):
            # What is worth nothing until it is counted.
            _make(tx, [gate], until_refresh=0)
            _lock(tx, gate)


def _gates(project_id: str, user_id: str, resources: Collection[str]) -> list[Key]:
    user = _PROJECT if project_id else user_id
    return [(project_id, user, family[0]) for family in _FAMILIES if not set(family).isdisjoint(resources)]


def _lock(tx: ApiTx, gate: Key) -> bool:
    project_id, user_id, resource = gate
    wanted = {"the_project": project_id, "the_user": user_id, "the_gate": resource}
    return _GATE.first(tx, wanted) is not None


def reserve(
    tx: ApiTx,
    uuid: str,
    project_id: str,
    user_id: str,
    asked: Ask,
    allowed: Callable[[], Allowed],
    *,
    expires_at: datetime | None,
    recount: Recount = NEVER,
) -> None:
    """Reserve all that is asked, for the project and the user, or nothing.

    `uuid` is the caller's own and new; `commit` and `rollback` take it. `allowed` is asked for the limits once nobody
    else can change them. Raises: OverQuota; Uncounted.
    """
    rows = _grant(tx, project_id, user_id, asked, 1, allowed, recount)
    _note(tx, [uuid], project_id, asked, rows, expires_at)


def reserve_servers(
    tx: ApiTx,
    charges: Sequence[Charge],
    allowed: Callable[[], Allowed],
    *,
    least: int | None = None,
    recount: Recount = NEVER,
) -> None:
    """Reserve for equal servers, all or none, and charge them. Each reservation's uuid is its server's.

    `least` is how many would do; only a refusal says so. Raises: OverQuota, whose field `room` says how many of them
    there is room for; Uncounted.
    """
    one = charges[0]
    rows = _grant(tx, one.project_id, one.user_id, one.taken, len(charges), allowed, recount, least)
    _note(tx, [charge.instance_uuid for charge in charges], one.project_id, one.taken, rows, None)
    write_charges(tx, charges)


def take(tx: ApiTx, project_id: str, user_id: str, asked: Ask, allowed: Callable[[], Allowed]) -> None:
    """Have what is asked at once, for what this same transaction makes. Raises: OverQuota; Uncounted."""
    rows = _grant(tx, project_id, user_id, asked, 1, allowed, NEVER)
    _settle(tx, [(row.id, asked[row.resource], max(0, asked[row.resource])) for row in rows])


def give_back(tx: ApiTx, project_id: str, user_id: str, resource: str) -> None:
    """Give back one of what was taken, in the transaction that removes it. Without a usage there is nothing to do."""
    _lock_or_make(tx, project_id, user_id, [resource])
    rows = _find(tx, project_id, user_id, [resource])
    _settle(tx, [(row.id, -1, 0) for row in rows if row.in_use > 0])


def _grant(
    tx: ApiTx,
    project_id: str,
    user_id: str,
    asked: Ask,
    times: int,
    allowed: Callable[[], Allowed],
    recount: Recount,
    least: int | None = None,
) -> list[_Row]:
    """Add what is asked, so many times, to what is reserved; return the usage rows as they were before."""
    lock(tx, project_id, user_id, asked)
    rows = _find(tx, project_id, user_id, asked)
    if len(rows) != len(asked) * (2 if project_id else 1):
        raise Uncounted(project_id, user_id, asked, first=True)
    if any(_is_stale(row, tx.now, recount) for row in rows):
        raise Uncounted(project_id, user_id, asked, first=False)
    limits = allowed()
    change: dict[str, int] = {}
    for number, row in enumerate(rows):
        limit = (limits.user if row.user_id else limits.project)[row.resource]
        change[f"id{number}"] = row.id
        change[f"more{number}"] = max(0, asked[row.resource] * times)
        change[f"limit{number}"] = MOST if limit < 0 or asked[row.resource] <= 0 else limit
    if tx.execute(_take(len(rows)), change).rowcount != len(rows):
        raise _over(rows, asked, (least or times, times), [change[f"limit{number}"] for number in range(len(rows))])
    return rows


@cache
def _take(rows: int) -> sa.Update:
    """Return the statement that grants: it changes as many rows as it is for, or the transaction is given up."""
    more = _by_id("more", rows)
    return (
        sa.update(quota_usages)
        .where(
            _U.id.in_([sa.bindparam(f"id{number}") for number in range(rows)]),
            _U.in_use + _U.reserved + more <= _by_id("limit", rows),
        )
        .values(reserved=_U.reserved + more, until_refresh=_U.until_refresh - 1)
    )


@cache
def _change(rows: int) -> sa.Update:
    """Return the statement that moves what was reserved into use, or gives it back."""
    return (
        sa.update(quota_usages)
        .where(_U.id.in_([sa.bindparam(f"id{number}") for number in range(rows)]))
        .values(in_use=_U.in_use + _by_id("more", rows), reserved=_U.reserved - _by_id("less", rows))
    )


def _by_id(what: str, rows: int) -> sa.ColumnElement[int]:
    return sa.case(
        *(
            (_U.id == sa.bindparam(f"id{number}"), sa.bindparam(f"{what}{number}", type_=sa.BigInteger))
            for number in range(rows)
        )
    )


def _find(tx: ApiTx, project_id: str, user_id: str, resources: Collection[str]) -> list[_Row]:
    """Return the usages of a project and of a user in it, the project's first."""
    found = [_Row(*row) for row in _FIND.rows(tx, {"the_project": project_id, "the_user": user_id})]
    wanted = [row for row in found if row.resource in resources]
    return sorted(wanted, key=lambda row: (row.user_id, COUNTED.index(row.resource)))


def _is_stale(row: _Row, now: datetime, recount: Recount) -> bool:
    return (
        row.in_use < 0
        or row.reserved < 0
        or (row.until_refresh is not None and row.until_refresh <= 0)
        or (
            recount.after_seconds > 0
            and (row.updated_at is None or now - row.updated_at > timedelta(seconds=recount.after_seconds))
        )
    )


def _over(rows: Sequence[_Row], asked: Ask, counts: tuple[int, int], limits: Sequence[int]) -> OverQuota:
    """Return the refusal in the incumbent's words: which resources, and how much of them is used.

    `counts` is how many times what is asked would do, and how many are wanted.
    """
    least, times = counts
    over: dict[str, tuple[int, int]] = {}
    room = times
    for row, limit in zip(rows, limits, strict=True):
        used, more = row.in_use + row.reserved, asked[row.resource]
        if more > 0 and used + more * times > limit:
            # The user's own limit comes last: it is the narrower one.
            over[row.resource] = used, limit
            room = min(room, max(0, (limit - used) // more))
    names = sorted(over)
    if names[0] in _TOO_MANY:
        return OverQuota("quota.over", _TOO_MANY[names[0]], resources=names, room=room)
    listed = ", ".join(names)
    number = str(times) if least == times else f"{least}-{times}"
    wanted = ", ".join(number if name == "instances" else str(asked[name] * times) for name in names)
    used_up = ", ".join(str(over[name][0]) for name in names)
    most = ", ".join(str(over[name][1]) for name in names)
    return OverQuota(
        "quota.over",
        f"Quota exceeded for {listed}: Requested {wanted}, but already used {used_up} of {most} {listed}",
        resources=names,
        room=room,
    )


# ---- reservations ----------------------------------------------------------------------------------------------


def _note(
    tx: ApiTx,
    uuids: Sequence[str],
    project_id: str,
    asked: Ask,
    rows: Sequence[_Row],
    expires_at: datetime | None,
) -> None:
    tx.execute(
        sa.insert(reservations),
        [
            {
                "created_at": tx.now,
                "uuid": uuid,
                "usage_id": row.id,
                "project_id": project_id,
                "resource": row.resource,
                "delta": asked[row.resource],
                "expire": expires_at,
                "user_id": row.user_id,
            }
            for uuid in uuids
            for row in rows
        ],
    )


def is_reserved(tx: ApiTx, uuid: str) -> bool:
    """Tell whether a reservation is there that was not committed, rolled back or expired."""
    return _PENDING.first(tx, {"the_uuid": uuid}) is not None


def commit(tx: ApiTx, uuid: str) -> bool:
    """Turn a reservation into use, once; tell whether it was still there."""
    pending = _take_out(tx, uuid)
    _settle(tx, [(row.usage_id, row.delta, max(0, row.delta)) for row in pending])
    return bool(pending)


def rollback(tx: ApiTx, uuid: str) -> bool:
    """Give a reservation back, once; tell whether it was still there."""
    pending = _take_out(tx, uuid)
    _settle(tx, [(row.usage_id, 0, max(0, row.delta)) for row in pending])
    return bool(pending)


def list_expired(tx: ApiTx, most: int) -> list[str]:
    """Return reservations that nobody has settled in their time; roll each back in a transaction of its own."""
    return list(tx.execute(_EXPIRED, {"now": tx.now, "most": most}).scalars())


def _take_out(tx: ApiTx, uuid: str) -> list[_Pending]:
    pending = [_Pending(*row) for row in _PENDING.rows(tx, {"the_uuid": uuid})]
    if pending:
        lock(tx, pending[0].project_id, pending[0].user_id, {row.resource for row in pending})
    # Whoever was at the gate before may have settled it.
    if pending and tx.execute(_FORGET, {"the_uuid": uuid}).rowcount == 0:
        return []
    return pending


def _settle(tx: ApiTx, changes: Sequence[tuple[int, int, int]]) -> None:
    """Add to what is in use and take from what is reserved, by the usage's id. Take the gate first."""
    if changes:
        values: dict[str, int] = {}
        for number, (usage_id, more, less) in enumerate(changes):
            values |= {f"id{number}": usage_id, f"more{number}": more, f"less{number}": less}
        tx.execute(_change(len(changes)), values)


# ---- charges ---------------------------------------------------------------------------------------------------


def write_charges(tx: ApiTx, charges: Sequence[Charge]) -> None:
    """Write what servers take that are charged nothing yet. The usage is the caller's."""
    tx.execute(sa.insert(server_charges), [_charge_row(one, tx.now) for one in charges])


def _charge_row(charge: Charge, now: datetime) -> dict[str, Any]:
    return {
        "created_at": now,
        "instance_uuid": charge.instance_uuid,
        "project_id": charge.project_id,
        "user_id": charge.user_id,
        **charge.taken,
    }


def list_charges(tx: ApiTx, project_id: str | None, *, after: int, most: int) -> list[tuple[int, Charge]]:
    """Return a page of the charges of a project, or of all, each with its id; the next begins `after` the last id."""
    wanted = {"after": after, "most": most}
    rows = (
        tx.execute(_CHARGES, wanted)
        if project_id is None
        else tx.execute(_CHARGES_IN, {**wanted, "the_project": project_id})
    )
    return [(number, Charge(*values)) for number, *values in rows]


def find_charges(tx: ApiTx, uuids: Collection[str]) -> dict[str, Charge]:
    """Return what these servers are charged, without those that are not."""
    return {row[0]: Charge(*row) for row in tx.execute(_CHARGES_OF, {"the_uuids": list(uuids)})}


def recharge(tx: ApiTx, charge: Charge) -> None:
    """Correct what a server is charged, unless it is charged nothing any more. Count its project anew afterwards."""
    _lock_or_make(tx, charge.project_id, _PROJECT, SERVER)
    tx.execute(_RECHARGE, {"the_uuid": charge.instance_uuid, "the_cores": charge.cores, "the_ram": charge.ram})


def refund(tx: ApiTx, instance_uuid: str, *, keep: bool = False) -> bool:
    """Give back what a server takes, once; tell whether it took anything.

    `keep` leaves a charge of nothing, for a server that is still there and never got a host: else it would be found
    uncharged, and counted.
    """
    row = tx.execute(_CHARGE_OF, {"the_uuid": instance_uuid}).one_or_none()
    if row is None:
        return False
    charged = Charge(*row)
    _lock_or_make(tx, charged.project_id, charged.user_id, SERVER)
    if tx.execute(_CHARGE_NOTHING if keep else _UNCHARGE, {"the_uuid": instance_uuid}).rowcount == 0:
        return False
    if not rollback(tx, instance_uuid):
        tx.execute(
            _REFUND,
            {
                "the_project": charged.project_id,
                "the_user": charged.user_id,
                **{f"the_{resource}": amount for resource, amount in charged.taken.items()},
            },
        )
    return True


_UNCHARGED = (
    sa.select(instance_mappings.c.id, instance_mappings.c.instance_uuid, instance_mappings.c.cell_id)
    .join(server_charges, _C.instance_uuid == instance_mappings.c.instance_uuid, isouter=True)
    .where(
        instance_mappings.c.id > sa.bindparam("after"),
        instance_mappings.c.cell_id.in_(sa.bindparam("cells", expanding=True)),
        sa.not_(instance_mappings.c.queued_for_delete),
        _C.instance_uuid.is_(None),
    )
    .order_by(instance_mappings.c.id)
    .limit(sa.bindparam("most"))
)
_UNCHARGED_OF = _UNCHARGED.where(instance_mappings.c.project_id == sa.bindparam("the_project"))
_STILL_LIVE = (
    sa.select(instance_mappings.c.instance_uuid)
    .where(
        instance_mappings.c.instance_uuid.in_(sa.bindparam("the_uuids", expanding=True)),
        sa.not_(instance_mappings.c.queued_for_delete),
    )
    .order_by(instance_mappings.c.instance_uuid)
    .with_for_update()
)


def adopt(tx: ApiTx, project_id: str, charges: Sequence[Charge], *, recount: Recount) -> None:
    """Charge servers of a project that were found in cells without a charge, and count anew what was counted before.

    Those whose deletion was accepted meanwhile are left out. A first count is the caller's: only it knows whether more
    cells are still to be asked.
    """
    # Locked: a deletion that is accepted later comes to its refund later.
    live = set(tx.execute(_STILL_LIVE, {"the_uuids": [one.instance_uuid for one in charges]}).scalars())
    _lock_or_make(tx, project_id, _PROJECT, SERVER)
    for one in charges:
        if one.instance_uuid in live:
            insert_if_absent(tx, server_charges, _charge_row(one, tx.now))
    refresh_counted(tx, project_id, recount=recount)


def list_uncharged(tx: ApiTx, cell_ids: Collection[int], project_id: str | None, *, after: int, most: int) -> list[Row]:
    """Return a page of the servers in these cells, of a project or all, that nobody has charged yet.

    The rows are (id, instance_uuid, cell_id); the next page begins `after` the last id.
    """
    wanted = {"cells": list(cell_ids), "after": after, "most": most}
    if project_id is None:
        return list(tx.execute(_UNCHARGED, wanted))
    return list(tx.execute(_UNCHARGED_OF, {**wanted, "the_project": project_id}))


# ---- counting --------------------------------------------------------------------------------------------------

_CHARGED = (
    sa.select(_C.user_id, *(sa.func.sum(_C[resource]).label(resource) for resource in SERVER))
    .where(_C.project_id == sa.bindparam("the_project"))
    .group_by(_C.user_id)
)
_RESERVED = (
    sa.select(
        _R.user_id,
        _R.resource,
        sa.func.sum(_R.delta).label("reserved"),
        sa.func.sum(sa.case((_C.instance_uuid.is_not(None), _R.delta), else_=0)).label("charged"),
    )
    .join(server_charges, _C.instance_uuid == _R.uuid, isouter=True)
    .where(_R.project_id == sa.bindparam("the_project"), _R.delta > 0)
    .group_by(_R.user_id, _R.resource)
)
_SET = (
    sa.update(quota_usages)
    .where(
        _U.project_id == sa.bindparam("the_project"),
        _U.user_id == sa.bindparam("the_user"),
        _U.resource == sa.bindparam("the_resource"),
    )
    .values(
        in_use=sa.bindparam("used"),
        reserved=sa.bindparam("held"),
        until_refresh=sa.bindparam("uses", type_=sa.Integer),
        updated_at=sa.bindparam("now"),
    )
)
_USERS = sa.select(_U.user_id).where(_U.project_id == sa.bindparam("the_project"), _U.user_id != "").distinct()
_PROJECTS = sa.union(
    sa.select(_U.project_id).where(_U.project_id != ""), sa.select(_C.project_id), sa.select(_R.project_id)
)
_LIST_OF = sa.select(_U.user_id, _U.resource, _U.in_use, _U.reserved).where(
    _U.project_id == sa.bindparam("the_project"), sa.or_(_U.until_refresh.is_(None), _U.until_refresh > 0)
)
Count = dict[tuple[str, str], Usage]
"""Usages by user ('' for the project) and resource."""


def count(tx: ApiTx, project_id: str) -> Count:
    """Count what a project's servers take, and each user's, from their charges."""
    counted: dict[tuple[str, str], int] = {}
    for row in tx.execute(_CHARGED, {"the_project": project_id}):
        for resource in SERVER:
            amount = int(row._mapping[resource])
            counted[row.user_id, resource] = amount
            counted[_PROJECT, resource] = counted.get((_PROJECT, resource), 0) + amount
    held: dict[tuple[str, str], tuple[int, int]] = {}
    for row in tx.execute(_RESERVED, {"the_project": project_id}):
        held[row.user_id, row.resource] = int(row.reserved), int(row.charged)
    return {
        key: Usage(counted.get(key, 0) - held.get(key, (0, 0))[1], held.get(key, (0, 0))[0])
        for key in {*counted, *(key for key in held if key[1] in SERVER)}
    }


def refresh(
    tx: ApiTx,
    project_id: str,
    users: Collection[str] | None,
    *,
    recount: Recount = NEVER,
) -> None:
    """Write the usages of a project's servers as they are counted from the charges.

    `users` are whose rows are written beside the project's; None means every user's.
    """
    _lock_or_make(tx, project_id, _PROJECT, SERVER)
    counted = count(tx, project_id)
    if users is None:
        known = tx.execute(_USERS, {"the_project": project_id}).scalars()
        users = {*known, *(user for user, _ in counted)}
    wanted = {
        (user, resource): counted.get((user, resource), Usage())
        for user in {_PROJECT, *users}
        for resource in SERVER
    }  # fmt: skip
    _write(tx, project_id, wanted, recount)


def refresh_counted(tx: ApiTx, project_id: str, *, recount: Recount = NEVER) -> None:
    """Do the same for the usages that were counted before, and leave the others to their first count."""
    _lock_or_make(tx, project_id, _PROJECT, SERVER)
    counted = count(tx, project_id)
    known = [key for key in list_of(tx, project_id) if key[1] in SERVER]
    if known:
        _write(tx, project_id, {key: counted.get(key, Usage()) for key in known}, recount)


def refresh_other(
    tx: ApiTx, project_id: str, user_id: str, resource: str, counting: Callable[[], Mapping[str, int]]
) -> None:
    """Write the usages of a resource that is no server's.

    `counting` returns how many each user has ('' is the project), and is asked once nobody else can change that.
    """
    _lock_or_make(tx, project_id, user_id, [resource])
    counted = {(user, resource): Usage(in_use) for user, in_use in counting().items()}
    _write(tx, project_id, counted, NEVER)


def _write(tx: ApiTx, project_id: str, usages: Mapping[tuple[str, str], Usage], recount: Recount) -> None:
    _make(tx, [(project_id, *key) for key in sorted(usages)])
    tx.execute(
        _SET,
        [
            {
                "the_project": project_id,
                "the_user": user,
                "the_resource": resource,
                "used": usages[user, resource].in_use,
                "held": usages[user, resource].reserved,
                "uses": recount.after_uses or None,
                "now": tx.now,
            }
            for user, resource in sorted(usages)
        ],
    )


def _make(tx: ApiTx, keys: Collection[Key], *, until_refresh: int | None = None) -> None:
    rows = [
        {
            "created_at": tx.now,
            "project_id": project_id,
            "user_id": user_id,
            "resource": resource,
            "in_use": 0,
            "reserved": 0,
            "until_refresh": until_refresh,
        }
        for project_id, user_id, resource in keys
    ]
    insert_many_if_absent(tx, quota_usages, rows)


def find(tx: ApiTx, project_id: str, user_id: str = _PROJECT) -> dict[str, Usage]:
    """Return the usages of a project, or of a user in it, by resource; none that was never counted."""
    rows = _find(tx, project_id, user_id, COUNTED)
    return {row.resource: Usage(row.in_use, row.reserved) for row in rows if row.user_id == user_id}


def get(tx: ApiTx, project_id: str, user_id: str, *, recount: Recount = NEVER) -> dict[str, Usage]:
    """Return the same with nothing missing. Without a project these are the user's own. Raises: Uncounted."""
    wanted = [resource for resource in COUNTED if (resource == "key_pairs") != bool(project_id)]
    rows = [row for row in _find(tx, project_id, user_id, wanted) if row.user_id == user_id]
    counted = {row.resource: Usage(row.in_use, row.reserved) for row in rows if not _is_stale(row, tx.now, recount)}
    missing = [resource for resource in wanted if resource not in counted]
    if missing:
        raise Uncounted(project_id, user_id, missing, first=len(rows) < len(wanted))
    return counted


def list_projects(tx: ApiTx) -> list[str]:
    """Return every project that has usages, charges or reservations, in order."""
    return sorted(tx.execute(_PROJECTS).scalars())


def list_of(tx: ApiTx, project_id: str) -> Count:
    """Return every usage of a project as it stands, but for those that are counted anew before they are used.

    Without a project these are the users' own.
    """
    rows = tx.execute(_LIST_OF, {"the_project": project_id})
    return {(row.user_id, row.resource): Usage(row.in_use, row.reserved) for row in rows}
