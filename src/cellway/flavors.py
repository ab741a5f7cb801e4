"""Flavors: the sizes that servers come in, their extra specs, and which projects may use a private one.

Nouns over the API database; the verbs and `http/flavors.py` call them. A server keeps a copy of its flavor in its
cell (`to_stored`, `from_stored`), in the incumbent's JSON, so deleting a flavor changes no server. Nothing here knows
a request, a policy or a cell's database. Seed: none of its own.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from cellway.db.api_tables import flavor_extra_specs, flavor_projects, flavors
from cellway.db.transaction import ApiTx, insert_if_absent, unique_violation
from cellway.errors import Conflict, Invalid, NotFound


class Flavor(msgspec.Struct, frozen=True, kw_only=True):
    """A size. `id` is the row's number, `flavorid` the name that users and clients mean by "id"."""

    id: int
    flavorid: str
    name: str
    memory_mb: int
    vcpus: int
    root_gb: int
    ephemeral_gb: int = 0
    swap: int = 0
    """MiB."""
    rxtx_factor: float | None = 1.0
    vcpu_weight: int | None = None
    disabled: bool = False
    is_public: bool = True
    description: str | None = None
    extra_specs: dict[str, str] = msgspec.field(default_factory=dict)
    created_at: datetime | None = None
    updated_at: datetime | None = None


# ---- reading ---------------------------------------------------------------------------------------------------

_ACCESSIBLE = sa.or_(
    flavors.c.is_public,
    sa.exists().where(
        flavor_projects.c.flavor_id == flavors.c.id, flavor_projects.c.project_id == sa.bindparam("project")
    ),
)
_VISIBLE = sa.or_(sa.bindparam("everything", type_=sa.Boolean), _ACCESSIBLE)
_GET = sa.select(flavors).where(flavors.c.flavorid == sa.bindparam("flavorid"), _VISIBLE)
_SPECS = (
    sa.select(flavor_extra_specs.c.flavor_id, flavor_extra_specs.c.key, flavor_extra_specs.c.value)
    .where(flavor_extra_specs.c.flavor_id.in_(sa.bindparam("flavors", expanding=True)))
    .order_by(flavor_extra_specs.c.key)
)
_MARKER = sa.select(flavors.c.id).where(flavors.c.flavorid == sa.bindparam("flavorid"), _VISIBLE)

_SORT_KEYS: Mapping[str, object] = {
    "created_at": datetime.min,
    "description": "",
    "disabled": False,
    "ephemeral_gb": 0,
    "flavorid": None,
    "id": None,
    "is_public": False,
    "memory_mb": None,
    "name": None,
    "root_gb": 0,
    "rxtx_factor": 0.0,
    "swap": None,
    "updated_at": datetime.min,
    "vcpu_weight": 0,
    "vcpus": None,
}
"""What may be sorted by, and what a missing value sorts as: NULLs have no place in a page's order."""


_MARKED = sa.bindparam("marker", type_=sa.Integer)
_LIST = (
    sa.select(flavors)
    .where(
        _VISIBLE,
        sa.or_(sa.bindparam("public", type_=sa.Boolean), sa.not_(sa.func.coalesce(flavors.c.is_public, False))),
        sa.or_(sa.bindparam("disabled", type_=sa.Boolean), sa.not_(sa.func.coalesce(flavors.c.disabled, False))),
        flavors.c.memory_mb >= sa.bindparam("min_ram"),
        sa.func.coalesce(flavors.c.root_gb, 0) >= sa.bindparam("min_disk"),
    )
    .limit(sa.bindparam("limit", type_=sa.Integer))
)


def _page(key: str, direction: str) -> sa.Select[Any]:
    """Return the statement for the page, in one order, that follows the row `marker`, if that is given."""
    last, number = flavors.alias("last"), flavors.c.id
    sort: sa.ColumnElement[Any] = flavors.c[key]
    marked: sa.ColumnElement[Any] = last.c[key]
    if (missing := _SORT_KEYS[key]) is not None:
        sort, marked = sa.func.coalesce(sort, missing), sa.func.coalesce(marked, missing)
    # Compared inside the database: a FLOAT that has been read does not equal itself on MariaDB.
    reached = sa.select(marked).where(last.c.id == _MARKED).scalar_subquery()
    if direction == "asc":
        page = _LIST.order_by(sort, number)
        further = sa.or_(sort > reached, sa.and_(sort == reached, number > _MARKED))
    else:
        page = _LIST.order_by(sort.desc(), number.desc())
        further = sa.or_(sort < reached, sa.and_(sort == reached, number < _MARKED))
    return page.where(sa.or_(_MARKED.is_(None), further))


_PAGES = {(key, direction): _page(key, direction) for key in _SORT_KEYS for direction in ("asc", "desc")}


def get(tx: ApiTx, flavorid: str, *, project_id: str, all_projects: bool) -> Flavor:
    """Return the flavor `flavorid` if `project_id` may use it, or in any case with `all_projects`.

    Raises: NotFound.
    """
    row = tx.execute(_GET, {"flavorid": flavorid, "project": project_id, "everything": all_projects}).one_or_none()
    if row is None:
        raise _not_found(flavorid)
    return _with_specs(tx, [row])[0]


def list(
    tx: ApiTx,
    *,
    project_id: str,
    all_projects: bool,
    limit: int,
    marker: str | None = None,
    is_public: bool | None = True,
    min_ram: int = 0,
    min_disk: int = 0,
    sort_key: str = "flavorid",
    sort_dir: str = "asc",
) -> Sequence[Flavor]:
    """Return at most `limit` of the flavors that follow the flavor `marker` in the order asked for.

    With `is_public` true: the public ones and those that `project_id` was given; false: the private ones; None: both.
    Without `all_projects` only those that are enabled and that `project_id` may use. `min_ram` is in MiB, `min_disk`
    in GiB.

    Raises: Invalid for an unknown sort key or direction, or a marker that is no flavor.
    """
    statement = _PAGES.get((sort_key, sort_dir))
    if statement is None:
        raise Invalid("flavor.bad_sort", f"Flavors cannot be sorted by {sort_key} {sort_dir}", key=sort_key)
    who = {"project": project_id, "everything": all_projects}
    after = None
    if marker is not None:
        after = tx.execute(_MARKER, {**who, "flavorid": marker}).scalar_one_or_none()
        if after is None:
            raise Invalid("flavor.bad_marker", f"marker [{marker}] not found", marker=marker)
    rows = tx.execute(
        statement,
        {
            **who,
            "everything": all_projects and is_public is not True,
            "public": is_public is not False,
            "disabled": all_projects,
            "min_ram": min_ram,
            "min_disk": min_disk,
            "marker": after,
            "limit": limit,
        },
    )
    return _with_specs(tx, rows.all())


def get_extra_spec(tx: ApiTx, flavorid: str, key: str, *, project_id: str, all_projects: bool) -> str:
    """Return one extra spec of a flavor that `get` would return.

    Raises: NotFound when there is no such flavor, or it has no such key.
    """
    value = get(tx, flavorid, project_id=project_id, all_projects=all_projects).extra_specs.get(key)
    if value is None:
        raise _no_extra_spec(flavorid, key)
    return value


def _with_specs(tx: ApiTx, rows: Sequence[sa.Row[Any]]) -> Sequence[Flavor]:
    specs: dict[int, dict[str, str]] = {row.id: {} for row in rows}
    if specs:
        for spec in tx.execute(_SPECS, {"flavors": [*specs]}):
            specs[spec.flavor_id][spec.key] = spec.value or ""
    return [
        Flavor(
            id=row.id,
            flavorid=row.flavorid,
            name=row.name,
            memory_mb=row.memory_mb,
            vcpus=row.vcpus,
            root_gb=row.root_gb or 0,
            ephemeral_gb=row.ephemeral_gb or 0,
            swap=row.swap,
            rxtx_factor=row.rxtx_factor,
            vcpu_weight=row.vcpu_weight,
            disabled=bool(row.disabled),
            is_public=bool(row.is_public),
            description=row.description,
            extra_specs=specs[row.id],
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
        for row in rows
    ]


def _not_found(flavorid: str) -> NotFound:
    return NotFound("flavor.not_found", f"Flavor {flavorid} could not be found.", flavor=flavorid)


# ---- writing ---------------------------------------------------------------------------------------------------

_FIND = sa.select(flavors.c.id, flavors.c.is_public).where(flavors.c.flavorid == sa.bindparam("flavorid"))
_LOCK = _FIND.with_for_update()
_TAKEN = sa.select(flavors.c.flavorid, flavors.c.name).where(
    sa.or_(flavors.c.flavorid == sa.bindparam("flavorid"), flavors.c.name == sa.bindparam("name"))
)
_INSERT = sa.insert(flavors)
_DESCRIBE = (
    sa.update(flavors)
    .where(flavors.c.id == sa.bindparam("flavor"))
    .values(description=sa.bindparam("text"), updated_at=sa.bindparam("now"))
)
_DELETE = (
    sa.delete(flavor_extra_specs).where(flavor_extra_specs.c.flavor_id == sa.bindparam("flavor")),
    sa.delete(flavor_projects).where(flavor_projects.c.flavor_id == sa.bindparam("flavor")),
    sa.delete(flavors).where(flavors.c.id == sa.bindparam("flavor")),
)


def create(
    tx: ApiTx,
    *,
    flavorid: str,
    name: str,
    memory_mb: int,
    vcpus: int,
    root_gb: int,
    ephemeral_gb: int = 0,
    swap: int = 0,
    rxtx_factor: float = 1.0,
    is_public: bool = True,
    description: str | None = None,
) -> Flavor:
    """Add a flavor.

    Raises: Conflict when the id or the name is taken.
    """
    taken = tx.execute(_TAKEN, {"flavorid": flavorid, "name": name}).first()
    if taken is not None:
        which = f"ID {flavorid}" if taken.flavorid == flavorid else f"name {name}"
        raise Conflict("flavor.exists", f"Flavor with {which} already exists.", flavor=flavorid, name=name)
    with unique_violation(Conflict("flavor.exists", f"Flavor with ID {flavorid} or name {name} already exists.")):
        tx.execute(
            _INSERT,
            {
                "created_at": tx.now,
                "flavorid": flavorid,
                "name": name,
                "memory_mb": memory_mb,
                "vcpus": vcpus,
                "root_gb": root_gb,
                "ephemeral_gb": ephemeral_gb,
                "swap": swap,
                "rxtx_factor": rxtx_factor,
                "disabled": False,
                "is_public": is_public,
                "description": description,
            },
        )
    return get(tx, flavorid, project_id="", all_projects=True)


def update_description(tx: ApiTx, flavorid: str, description: str | None) -> Flavor:
    """Change what a flavor says of itself; nothing else of one may change.

    Raises: NotFound.
    """
    tx.execute(_DESCRIBE, {"flavor": _lock(tx, flavorid).id, "text": description, "now": tx.now})
    return get(tx, flavorid, project_id="", all_projects=True)


def delete(tx: ApiTx, flavorid: str) -> None:
    """Remove a flavor with its extra specs and access list.

    Raises: NotFound.
    """
    flavor = _lock(tx, flavorid)
    for statement in _DELETE:
        tx.execute(statement, {"flavor": flavor.id})


def _lock(tx: ApiTx, flavorid: str) -> sa.Row[tuple[int, bool | None]]:
    """Return a flavor's id and is_public, and keep others from changing it or what belongs to it meanwhile."""
    row = tx.execute(_LOCK, {"flavorid": flavorid}).one_or_none()
    if row is None:
        raise _not_found(flavorid)
    return row


# ---- extra specs -----------------------------------------------------------------------------------------------

_SPEC_KEYS = sa.select(flavor_extra_specs.c.key).where(flavor_extra_specs.c.flavor_id == sa.bindparam("flavor"))
_INSERT_SPEC = sa.insert(flavor_extra_specs)
_ONE_SPEC = sa.and_(
    flavor_extra_specs.c.flavor_id == sa.bindparam("flavor"), flavor_extra_specs.c.key == sa.bindparam("spec")
)
_UPDATE_SPEC = (
    sa.update(flavor_extra_specs).where(_ONE_SPEC).values(value=sa.bindparam("text"), updated_at=sa.bindparam("now"))
)
_DELETE_SPEC = sa.delete(flavor_extra_specs).where(_ONE_SPEC)


def set_extra_specs(tx: ApiTx, flavorid: str, specs: Mapping[str, str]) -> None:
    """Add `specs` to a flavor's own, replacing the values of keys that it has.

    Raises: NotFound; Conflict for two keys that the database takes for one.
    """
    flavor = _lock(tx, flavorid)
    present = set(tx.execute(_SPEC_KEYS, {"flavor": flavor.id}).scalars())
    changed = [
        {"flavor": flavor.id, "spec": key, "text": value, "now": tx.now}
        for key, value in specs.items()
        if key in present
    ]
    added = [
        {"created_at": tx.now, "flavor_id": flavor.id, "key": key, "value": value}
        for key, value in specs.items()
        if key not in present
    ]
    if changed:
        tx.execute(_UPDATE_SPEC, changed)
    if added:
        # MariaDB ignores blanks at the end of a key.
        with unique_violation(Conflict("flavor.extra_spec_exists", f"Flavor {flavorid} has extra specs of like keys.")):
            tx.execute(_INSERT_SPEC, added)


def delete_extra_spec(tx: ApiTx, flavorid: str, key: str) -> None:
    """Remove one extra spec.

    Raises: NotFound when there is no such flavor, or it has no such key.
    """
    flavor = _lock(tx, flavorid)
    if not tx.execute(_DELETE_SPEC, {"flavor": flavor.id, "spec": key}).rowcount:
        raise _no_extra_spec(flavorid, key)


def _no_extra_spec(flavorid: str, key: str) -> NotFound:
    message = f"Flavor {flavorid} has no extra specs with key {key}."
    return NotFound("flavor.extra_spec_not_found", message, flavor=flavorid, key=key)


# ---- access ----------------------------------------------------------------------------------------------------

_ACCESS = (
    sa.select(flavor_projects.c.project_id)
    .where(flavor_projects.c.flavor_id == sa.bindparam("flavor"))
    .order_by(flavor_projects.c.project_id)
)
_REVOKE = sa.delete(flavor_projects).where(
    flavor_projects.c.flavor_id == sa.bindparam("flavor"), flavor_projects.c.project_id == sa.bindparam("project")
)


def list_access(tx: ApiTx, flavorid: str) -> Sequence[str]:
    """Return the projects that may use a private flavor.

    Raises: NotFound, also for a public flavor, which has no such list.
    """
    flavor = tx.execute(_FIND, {"flavorid": flavorid}).one_or_none()
    if flavor is None:
        raise _not_found(flavorid)
    if flavor.is_public:
        message = "Access list not available for public flavors."
        raise NotFound("flavor.access_of_public", message, flavor=flavorid)
    return _access(tx, flavor.id)


def add_access(tx: ApiTx, flavorid: str, project_id: str, *, public_too: bool = False) -> Sequence[str]:
    """Let a project use a private flavor, and return all that may; with `public_too`, a public one may be meant.

    Raises: NotFound; Conflict when the project has access already, or the flavor is public.
    """
    flavor = _lock(tx, flavorid)
    if flavor.is_public and not public_too:
        raise Conflict("flavor.access_to_public", "Can not add access to a public flavor.", flavor=flavorid)
    values = {"created_at": tx.now, "flavor_id": flavor.id, "project_id": project_id}
    if not insert_if_absent(tx, flavor_projects, values):
        message = f"Flavor access already exists for flavor {flavorid} and project {project_id} combination."
        raise Conflict("flavor.access_exists", message, flavor=flavorid, project=project_id)
    return _access(tx, flavor.id)


def remove_access(tx: ApiTx, flavorid: str, project_id: str) -> Sequence[str]:
    """Take a project's access back, and return those that still have it.

    Raises: NotFound when there is no such flavor, or the project has no access.
    """
    flavor = _lock(tx, flavorid)
    if not tx.execute(_REVOKE, {"flavor": flavor.id, "project": project_id}).rowcount:
        message = f"Flavor access not found for {flavorid} / {project_id} combination."
        raise NotFound("flavor.access_not_found", message, flavor=flavorid, project=project_id)
    return _access(tx, flavor.id)


def _access(tx: ApiTx, flavor_id: int) -> Sequence[str]:
    return tx.execute(_ACCESS, {"flavor": flavor_id}).scalars().all()


# ---- a server's copy -------------------------------------------------------------------------------------------


class _Object(msgspec.Struct):
    data: Flavor = msgspec.field(name="nova_object.data")


class _Stored(msgspec.Struct):
    cur: _Object


_decoder = msgspec.json.Decoder(_Stored)


def to_stored(flavor: Flavor) -> str:
    """Return the text that `instance_extra.flavor` holds. The description stays out, as the incumbent keeps it out."""
    data = msgspec.structs.asdict(flavor) | {
        "description": None,
        "created_at": _zoned(flavor.created_at),
        "updated_at": _zoned(flavor.updated_at),
        "deleted_at": None,
        "deleted": False,
    }
    current = {
        "nova_object.name": "Flavor",
        "nova_object.namespace": "nova",
        "nova_object.version": "1.2",
        "nova_object.data": data,
    }
    return msgspec.json.encode({"cur": current, "old": None, "new": None}).decode()


def from_stored(text: str) -> Flavor:
    """Return the flavor that a server has now, from the text that `to_stored` or the incumbent wrote.

    Raises: msgspec.DecodeError for a text that is damaged.
    """
    flavor = _decoder.decode(text).cur.data
    if flavor.created_at is None and flavor.updated_at is None:
        return flavor
    return msgspec.structs.replace(flavor, created_at=_naive(flavor.created_at), updated_at=_naive(flavor.updated_at))


def _zoned(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC, microsecond=0)


def _naive(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
