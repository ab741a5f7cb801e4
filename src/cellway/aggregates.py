"""Aggregates (seed 004): named groups of hosts with metadata, in the API database, over all cells.

Nouns over the API database. `compute/aggregates.py` changes them, since a zone is a matter of servers too;
`compute/fleet.py` reads all of them with its sweep, and `http/aggregates.py` shows them. Host names and keys are equal
only when every character is.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cellway.db.api_tables import aggregate_hosts, aggregate_metadata, aggregates
from cellway.db.transaction import ApiTx, insert_if_absent, unique_violation
from cellway.errors import Conflict, Invalid, NotFound

ZONE_KEY = "availability_zone"
"""The metadata key that makes an aggregate an availability zone."""

NAME_TAKEN = "aggregate.exists"
"""The code of the `Conflict` that says that another aggregate has the name."""

Merged = Mapping[str, frozenset[str]]
"""The metadata of all of a host's aggregates: each key with the values that it has in any of them."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A group of hosts."""

    id: int
    uuid: str
    name: str
    created_at: datetime | None
    updated_at: datetime | None
    hosts: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def zone(self) -> str | None:
        """The availability zone that the aggregate makes, if any."""
        return self.metadata.get(ZONE_KEY)


_A, _H, _M = aggregates.c, aggregate_hosts.c, aggregate_metadata.c
_SOME: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)


def _reading(ids: sa.BindParameter[Any] | None) -> sa.CompoundSelect[Any]:
    """Return the rows of three tables in one statement, so that no aggregate is ever seen half changed."""
    nothing = sa.null()
    own = sa.select(
        _A.id.label("aggregate"), _A.uuid, _A.name, _A.created_at, _A.updated_at,
        sa.literal_column("0").label("part"), _A.id.label("nth"), nothing.label("text"), nothing.label("more"),
    )  # fmt: skip
    members = sa.select(
        _H.aggregate_id, nothing, nothing, nothing, nothing, sa.literal_column("1"), _H.id, _H.host, nothing
    )
    metadata = sa.select(
        _M.aggregate_id, nothing, nothing, nothing, nothing, sa.literal_column("2"), _M.id, _M.key, _M.value
    )
    if ids is not None:
        own, members, metadata = (
            own.where(_A.id.in_(ids)),
            members.where(_H.aggregate_id.in_(ids)),
            metadata.where(_M.aggregate_id.in_(ids)),
        )
    return sa.union_all(own, members, metadata).order_by("part", "nth")


_ALL = _reading(None)
_THESE = _reading(_SOME)
_ID = sa.select(_A.id).where(_A.uuid == sa.bindparam("the_uuid"))
_HOSTS: sa.BindParameter[Any] = sa.bindparam("hosts", expanding=True)
_BY_HOST = sa.select(_H.aggregate_id, _H.host).where(_H.host == sa.bindparam("the_host"))
_BY_KEY = sa.select(_M.aggregate_id).where(_M.key == sa.bindparam("the_key"))
_BY_VALUE = sa.select(_M.aggregate_id).where(_M.value == sa.bindparam("the_value"))
_BY_KEY_AND_VALUE = _BY_KEY.where(_M.value == sa.bindparam("the_value"))
_BY_PREFIX = sa.select(_M.aggregate_id, _M.key).where(
    sa.func.substr(_M.key, 1, sa.bindparam("length", type_=sa.Integer)) == sa.bindparam("prefix"),
    _M.value == sa.bindparam("the_value"),
)
_JOINED = aggregate_metadata.join(aggregate_hosts, _H.aggregate_id == _M.aggregate_id)
_OF_HOST = sa.select(_H.host, _M.key, _M.value).select_from(_JOINED).where(_H.host == sa.bindparam("the_host"))
_ZONES = (
    sa.select(_H.host, _M.value)
    .select_from(_JOINED)
    .where(_M.key == ZONE_KEY, _H.host.in_(_HOSTS))
    .order_by(_M.aggregate_id)
)


# ---- reading ---------------------------------------------------------------------------------------------------


def find_id(tx: ApiTx, uuid: str) -> int | None:
    """Return the id of the aggregate that has a uuid."""
    found: int | None = tx.execute(_ID, {"the_uuid": uuid}).scalar_one_or_none()
    return found


def get(tx: ApiTx, key: int | str) -> Aggregate:
    """Return one aggregate, by its id or its uuid.

    Raises: NotFound.
    """
    number = key if isinstance(key, int) else find_id(tx, key)
    found = _load(tx, [number]) if number is not None else []
    if not found:
        raise NotFound("aggregate.not_found", f"Aggregate {key} could not be found.", aggregate=key)
    return found[0]


def list(tx: ApiTx) -> Sequence[Aggregate]:
    """Return every aggregate, the oldest first."""
    return _assemble(tx.execute(_ALL))


def list_by_host(tx: ApiTx, host: str, key: str | None = None) -> Sequence[Aggregate]:
    """Return the aggregates that a host is in; with `key`, those of them that have this key."""
    found = _load(tx, [row.aggregate_id for row in tx.execute(_BY_HOST, {"the_host": host}) if row.host == host])
    return [one for one in found if key is None or key in one.metadata]


def list_by_metadata(
    tx: ApiTx, *, key: str | None = None, value: str | None = None, hosts: Iterable[str] | None = None
) -> Sequence[Aggregate]:
    """Return the aggregates that have a key, or a value, or both in one; with `hosts`, those that hold one of them."""
    if key is not None and value is not None:
        rows = tx.execute(_BY_KEY_AND_VALUE, {"the_key": key, "the_value": value})
    elif value is not None:
        rows = tx.execute(_BY_VALUE, {"the_value": value})
    elif key is not None:
        rows = tx.execute(_BY_KEY, {"the_key": key})
    else:
        raise Invalid("aggregate.no_criterion", "Either a metadata key or a value is needed")
    among = None if hosts is None else {*hosts}
    return [one for one in _load(tx, {*rows.scalars()}) if among is None or not among.isdisjoint(one.hosts)]


def list_non_matching(tx: ApiTx, ignored: Iterable[str], *, prefix: str, value: str) -> Sequence[Aggregate]:
    """Return the aggregates that give `value` to a key that begins with `prefix` and is none of `ignored`."""
    passed = {*ignored}
    rows = tx.execute(_BY_PREFIX, {"length": len(prefix), "prefix": prefix, "the_value": value})
    return _load(tx, {row.aggregate_id for row in rows if row.key not in passed})


def zones_of(tx: ApiTx, hosts: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the zones that each host's aggregates make, of the oldest aggregate first; a host in none is left out."""
    zones: defaultdict[str, dict[str, None]] = defaultdict(dict)
    if hosts:
        for host, zone in tx.execute(_ZONES, {"hosts": [*hosts]}):
            zones[host][zone] = None
    return {host: tuple(found) for host, found in zones.items()}


def metadata_of(tx: ApiTx, host: str) -> Merged:
    """Return the metadata of all of a host's aggregates."""
    rows = tx.execute(_OF_HOST, {"the_host": host})
    return merge((row.key, row.value) for row in rows if row.host == host)


def merge(metadata: Iterable[tuple[str, str]]) -> Merged:
    """Return each key with all its values; a value with commas is several."""
    merged: defaultdict[str, set[str]] = defaultdict(set)
    for key, value in metadata:
        merged[key].update(one.strip() for one in value.split(","))
    return {key: frozenset(values) for key, values in merged.items()}


def _load(tx: ApiTx, ids: Iterable[int]) -> Sequence[Aggregate]:
    wanted = [*ids]
    return _assemble(tx.execute(_THESE, {"ids": wanted})) if wanted else []


def _assemble(rows: Iterable[sa.Row[Any]]) -> Sequence[Aggregate]:
    made: dict[int, sa.Row[Any]] = {}
    hosts: dict[int, dict[str, None]] = {}
    metadata: dict[int, dict[str, str]] = {}
    for row in rows:
        if row.part == 0:
            made[row.aggregate] = row
        elif row.part == 1:
            hosts.setdefault(row.aggregate, {})[row.text] = None
        else:
            metadata.setdefault(row.aggregate, {})[row.text] = row.more
    return [
        Aggregate(
            key, row.uuid, row.name, row.created_at, row.updated_at, (*hosts.get(key, ()),), metadata.get(key, {})
        )
        for key, row in made.items()
    ]


# ---- writing ---------------------------------------------------------------------------------------------------

_HOLD = sa.select(_A.id).order_by(_A.id).with_for_update()
_RENAME = (
    sa.update(aggregates)
    .where(_A.id == sa.bindparam("the_id"))
    .values(name=sa.bindparam("new_name"), updated_at=sa.bindparam("now"))
)
_ONE_KEY = sa.and_(_M.aggregate_id == sa.bindparam("the_id"), _M.key == sa.bindparam("the_key"))
_UPDATE_KEY = (
    sa.update(aggregate_metadata)
    .where(_ONE_KEY)
    .values(value=sa.bindparam("the_value"), updated_at=sa.bindparam("now"))
)
_DELETE_KEY = sa.delete(aggregate_metadata).where(_ONE_KEY)
_REMOVE_HOST = sa.delete(aggregate_hosts).where(
    _H.aggregate_id == sa.bindparam("the_id"), _H.host == sa.bindparam("the_host")
)
_FORGET_HOST = sa.delete(aggregate_hosts).where(_H.host == sa.bindparam("the_host"))
_DELETE = (
    sa.delete(aggregate_metadata).where(_M.aggregate_id == sa.bindparam("the_id")),
    sa.delete(aggregates).where(_A.id == sa.bindparam("the_id")),
)


def hold(tx: ApiTx) -> None:
    """Keep everybody else from changing any aggregate until the transaction ends; every change begins with this.

    All of them, since a zone is one host's in several.
    """
    tx.execute(_HOLD).all()


def create(tx: ApiTx, uuid: str, name: str, metadata: Mapping[str, str]) -> Aggregate:
    """Make an aggregate without hosts.

    Raises: Conflict when the name is taken; Invalid for a zone that cannot be one.
    """
    _check_zone(metadata)
    with _name_taken(name):
        tx.execute(sa.insert(aggregates), {"created_at": tx.now, "uuid": uuid, "name": name})
    made = get(tx, uuid)
    _merge_metadata(tx, made, metadata)
    return get(tx, made.id)


def update(
    tx: ApiTx, aggregate_id: int, *, name: str | None = None, metadata: Mapping[str, str | None] | None = None
) -> Aggregate:
    """Rename an aggregate, and set the keys of `metadata`, or remove those whose value is None; others stay.

    Raises: NotFound; Conflict when the name is taken; Invalid for a zone that cannot be one.
    """
    changes = metadata or {}
    _check_zone(changes)
    hold(tx)
    present = get(tx, aggregate_id)
    if name is not None and name != present.name:
        with _name_taken(name):
            tx.execute(_RENAME, {"the_id": aggregate_id, "new_name": name, "now": tx.now})
    _merge_metadata(tx, present, changes)
    return get(tx, aggregate_id)


def delete(tx: ApiTx, aggregate_id: int) -> None:
    """Remove an aggregate.

    Raises: NotFound; Conflict while it has hosts.
    """
    hold(tx)
    if get(tx, aggregate_id).hosts:
        message = f"Unable to delete aggregate {aggregate_id}: it is not empty."
        raise Conflict("aggregate.not_empty", message, aggregate=aggregate_id)
    for statement in _DELETE:
        tx.execute(statement, {"the_id": aggregate_id})


def add_host(tx: ApiTx, aggregate_id: int, host: str) -> Aggregate:
    """Put a host into an aggregate.

    Raises: NotFound when there is no such aggregate; Conflict when the host is in it.
    """
    hold(tx)
    get(tx, aggregate_id)
    if not insert_if_absent(tx, aggregate_hosts, {"created_at": tx.now, "aggregate_id": aggregate_id, "host": host}):
        message = f"Aggregate {aggregate_id} already has host {host}."
        raise Conflict("aggregate.host_exists", message, aggregate=aggregate_id, host=host)
    return get(tx, aggregate_id)


def remove_host(tx: ApiTx, aggregate_id: int, host: str) -> Aggregate:
    """Take a host out of an aggregate.

    Raises: NotFound when there is no such aggregate, or the host is not in it.
    """
    hold(tx)
    if host not in get(tx, aggregate_id).hosts:
        message = f"Aggregate {aggregate_id} has no host {host}."
        raise NotFound("aggregate.host_not_found", message, aggregate=aggregate_id, host=host)
    tx.execute(_REMOVE_HOST, {"the_id": aggregate_id, "the_host": host})
    return get(tx, aggregate_id)


def forget_host(tx: ApiTx, host: str) -> None:
    """Take a host that is gone out of every aggregate."""
    hold(tx)
    tx.execute(_FORGET_HOST, {"the_host": host})


def _check_zone(metadata: Mapping[str, str | None]) -> None:
    zone = metadata.get(ZONE_KEY)
    if zone is not None and (not zone.strip() or ":" in zone):
        raise Invalid("aggregate.bad_zone", f"Aggregate metadata: {zone!r} cannot be an availability zone", zone=zone)


def _merge_metadata(tx: ApiTx, aggregate: Aggregate, changes: Mapping[str, str | None]) -> None:
    the_id, present = aggregate.id, aggregate.metadata
    removed = [{"the_id": the_id, "the_key": key} for key, value in changes.items() if value is None]
    changed = [
        {"the_id": the_id, "the_key": key, "the_value": value, "now": tx.now}
        for key, value in changes.items()
        if value is not None and key in present
    ]
    added = [
        {"created_at": tx.now, "aggregate_id": the_id, "key": key, "value": value}
        for key, value in changes.items()
        if value is not None and key not in present
    ]
    if removed:
        tx.execute(_DELETE_KEY, removed)
    if changed:
        tx.execute(_UPDATE_KEY, changed)
    if added:
        # MariaDB ignores blanks at the end of a key.
        message = f"Aggregate {aggregate.id} has metadata of like keys."
        with unique_violation(Conflict("aggregate.metadata_exists", message, aggregate=aggregate.id)):
            tx.execute(sa.insert(aggregate_metadata), added)


def _name_taken(name: str) -> AbstractContextManager[None]:
    return unique_violation(Conflict(NAME_TAKEN, f"Aggregate {name} already exists.", name=name))
