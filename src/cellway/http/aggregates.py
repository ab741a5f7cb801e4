"""Aggregates over HTTP: list and show.

Handlers call the noun `cellway.aggregates` on the API database; `http/app.py` takes ROUTES. Seed 004.
"""

from typing import Any

from cellway import aggregates
from cellway.aggregates import Aggregate
from cellway.errors import NotFound
from cellway.http.routes import Route
from cellway.http.wire import Answer, Call, answer, integer, long_stamp


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


async def index(call: Call) -> Answer:
    """List aggregates."""
    found = await call.services.api.read(aggregates.list_all)
    return answer({"aggregates": [_view(call, aggregate) for aggregate in found]})


async def show(call: Call) -> Answer:
    """Show one aggregate."""
    wanted = integer(call.path["id"], "id")
    for aggregate in await call.services.api.read(aggregates.list_all):
        if aggregate.id == wanted:
            return answer({"aggregate": _view(call, aggregate)})
    raise NotFound("aggregate.not_found", f"Aggregate {wanted} could not be found.", aggregate=wanted)


_RULE = "os_compute_api:os-aggregates"

ROUTES = (
    Route("GET", "/os-aggregates", index, f"{_RULE}:index"),
    Route("GET", "/os-aggregates/{id}", show, f"{_RULE}:show"),
)
