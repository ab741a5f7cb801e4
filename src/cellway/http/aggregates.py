"""Aggregates over HTTP: list, show, create, update, delete, and the actions on hosts and metadata.

Handlers call the verbs of `compute/aggregates.py`, and to read the noun `cellway.aggregates` on the API database;
`http/app.py` takes ROUTES. Seed 004.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from cellway import aggregates
from cellway.aggregates import ZONE_KEY, Aggregate
from cellway.errors import Conflict, Invalid
from cellway.http.routes import Route
from cellway.http.wire import Answer, Body, Call, MetadataKey, Name, answer, integer, long_stamp

# ---- bodies ----------------------------------------------------------------------------------------------------

_Zone = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[^\x00-\x1f\x7f:]*(?<!\s)\Z")]
_Host = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9._-]*\Z")]


class _New(Body, frozen=True):
    name: Name
    availability_zone: _Zone | None = None


class _Create(Body, frozen=True):
    aggregate: _New


class _Changes(Body, frozen=True):
    name: Name | UnsetType = UNSET
    availability_zone: _Zone | UnsetType | None = UNSET


class _Update(Body, frozen=True):
    aggregate: _Changes


class _OneHost(Body, frozen=True):
    host: _Host


class _Metadata(Body, frozen=True):
    metadata: dict[MetadataKey, Annotated[str, msgspec.Meta(max_length=255)] | None]


class _Action(Body, frozen=True):
    add_host: _OneHost | UnsetType = UNSET
    remove_host: _OneHost | UnsetType = UNSET
    set_metadata: _Metadata | UnsetType = UNSET


# ---- views -----------------------------------------------------------------------------------------------------


def _view(call: Call, aggregate: Aggregate) -> dict[str, Any]:
    view = {
        "id": aggregate.id,
        "name": aggregate.name,
        "availability_zone": aggregate.zone,
        "hosts": aggregate.hosts,
        "metadata": aggregate.metadata,
        "created_at": long_stamp(aggregate.created_at),
        "updated_at": long_stamp(aggregate.updated_at),
        "deleted": False,
        "deleted_at": None,
    }
    return view | {"uuid": aggregate.uuid} if call.version >= 41 else view


# ---- handlers --------------------------------------------------------------------------------------------------


async def index(call: Call) -> Answer:
    """List aggregates."""
    found = await call.services.api.read(aggregates.list)
    return answer({"aggregates": [_view(call, aggregate) for aggregate in found]})


async def show(call: Call) -> Answer:
    """Show one aggregate."""
    found = await call.services.api.read(aggregates.get, _id(call))
    return answer({"aggregate": _view(call, found)})


async def create(call: Call) -> Answer:
    """Make an aggregate; the answer is without its hosts and metadata, as the incumbent's."""
    new = call.decode(_Create).aggregate
    view = _view(call, await call.services.aggregates.create(new.name, new.availability_zone))
    del view["hosts"], view["metadata"]
    return answer({"aggregate": view})


async def update(call: Call) -> Answer:
    """Change the name or the zone of an aggregate."""
    number, changes = _id(call), call.decode(_Update).aggregate
    if changes == _Changes():
        raise Invalid("request.invalid", "Invalid input: name or availability_zone is expected")
    with _bad_request():
        changed = await call.services.aggregates.update(
            call.context,
            number,
            name=None if changes.name is UNSET else changes.name,
            metadata=None if changes.availability_zone is UNSET else {ZONE_KEY: changes.availability_zone},
        )
    return answer({"aggregate": _view(call, changed)})


async def delete(call: Call) -> Answer:
    """Remove an aggregate that has no hosts."""
    with _bad_request():
        await call.services.aggregates.delete(_id(call))
    return Answer(200)


async def act(call: Call) -> Answer:
    """Put a host in, take one out, or change metadata."""
    verbs = call.services.aggregates
    match call.decode(_Action):
        case _Action(add_host=_OneHost(host=host), remove_host=msgspec.UNSET, set_metadata=msgspec.UNSET):
            call.require(rule=f"{_RULE}:add_host")
            changed = await verbs.add_host(call.context, _id(call), host)
        case _Action(add_host=msgspec.UNSET, remove_host=_OneHost(host=host), set_metadata=msgspec.UNSET):
            call.require(rule=f"{_RULE}:remove_host")
            changed = await verbs.remove_host(call.context, _id(call), host)
        case _Action(add_host=msgspec.UNSET, remove_host=msgspec.UNSET, set_metadata=_Metadata(metadata=metadata)):
            call.require(rule=f"{_RULE}:set_metadata")
            with _bad_request():
                changed = await verbs.update(call.context, _id(call), metadata=metadata)
        case _:
            message = "Invalid input: one of add_host, remove_host and set_metadata is expected"
            raise Invalid("request.invalid", message)
    return answer({"aggregate": _view(call, changed)})


def _id(call: Call) -> int:
    return integer(call.path["id"], "id")


@contextmanager
def _bad_request() -> Iterator[None]:
    """Make the incumbent's 400 of what contradicts an aggregate's state; only a name that is taken is its 409."""
    try:
        yield
    except Conflict as error:
        if error.code == aggregates.NAME_TAKEN:
            raise
        raise Invalid(error.code, error.message, **error.fields) from error


_RULE = "os_compute_api:os-aggregates"

ROUTES = (
    Route("GET", "/os-aggregates", index, f"{_RULE}:index"),
    Route("POST", "/os-aggregates", create, f"{_RULE}:create"),
    Route("GET", "/os-aggregates/{id}", show, f"{_RULE}:show"),
    Route("PUT", "/os-aggregates/{id}", update, f"{_RULE}:update"),
    Route("DELETE", "/os-aggregates/{id}", delete, f"{_RULE}:delete"),
    # Each action has a rule of its own, checked once its name is known.
    Route("POST", "/os-aggregates/{id}/action", act, ""),
)
