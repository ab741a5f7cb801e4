"""Usage of projects over HTTP: how long their servers ran in a period, and what they had.

Handlers call `compute/usage.py`; `http/app.py` takes ROUTES. *Tenant* is the wire's word for a project. Seed: none of
its own.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from cellway.errors import Invalid
from cellway.flavors import from_stored
from cellway.http.routes import Route
from cellway.http.wire import Answer, Call, Page, answer, long_stamp, moment
from cellway.instances.usage import ProjectUsage, ServerUsage, sums_of

_PATH = "os-simple-tenant-usage"
_HOUR = 3600


# ---- the query -------------------------------------------------------------------------------------------------


def _period(call: Call) -> tuple[datetime, datetime]:
    """Return the period asked for, as far as it is past; what is left out is now. Raises: Invalid."""
    now = call.services.clock.now()
    given = [call.query.get(name) for name in ("start", "end")]
    start, stop = (moment(text, name) if text else now for name, text in zip(("start", "end"), given, strict=True))
    if any(given) and not start < stop:
        raise Invalid("usage.bad_period", "Invalid start time. The start time cannot occur after the end time.")
    stop = min(stop, now)
    return min(start, stop), stop


def _page(call: Call) -> Page:
    """Return the page asked for; before 2.40 there is but the first. Raises: Invalid."""
    return call.page() if call.version >= 40 else Page(call.limits.page_size, None)


# ---- views -----------------------------------------------------------------------------------------------------


def _project_view(sums: ProjectUsage, start: datetime, stop: datetime) -> dict[str, Any]:
    return {
        "tenant_id": sums.project_id,
        "total_hours": sums.seconds / _HOUR,
        "total_vcpus_usage": sums.vcpus / _HOUR,
        "total_memory_mb_usage": sums.memory_mb / _HOUR,
        "total_local_gb_usage": sums.disk_gb / _HOUR,
        "start": long_stamp(start),
        "stop": long_stamp(stop),
    }


def _server_view(server: ServerUsage, flavor_name: str, now: datetime) -> dict[str, Any]:
    ended = server.terminated_at
    return {
        "instance_id": server.uuid,
        "name": server.name,
        "tenant_id": server.project_id,
        "flavor": flavor_name,
        "hours": server.seconds / _HOUR,
        "vcpus": server.vcpus,
        "memory_mb": server.memory_mb,
        "local_gb": server.disk_gb,
        "started_at": long_stamp(server.launched_at),
        "ended_at": long_stamp(ended),
        "state": "terminated" if ended is not None else server.vm_state,
        "uptime": max(0, int(((ended or now) - server.launched_at).total_seconds())),
    }


def _detailed_views(
    call: Call, servers: Sequence[ServerUsage], start: datetime, stop: datetime
) -> list[dict[str, Any]]:
    """Return each project with its servers."""
    now = call.services.clock.now()
    # The servers of a page have few flavors between them.
    names = {text: from_stored(text).name if text else "" for text in {one.flavor for one in servers}}
    listed: dict[str, list[dict[str, Any]]] = {}
    for one in servers:
        listed.setdefault(one.project_id, []).append(_server_view(one, names[one.flavor], now))
    return [_project_view(sums, start, stop) | {"server_usages": listed[sums.project_id]} for sums in sums_of(servers)]


# ---- handlers --------------------------------------------------------------------------------------------------


async def index(call: Call) -> Answer:
    """List what every project used; from 2.40, when a page is asked for, what the servers on it did."""
    start, stop = _period(call)
    # Clients send `True`, which the incumbent takes for no.
    detailed = call.query.get("detailed", "0").lower() in ("1", "true")
    if not detailed and (call.version < 40 or not {"limit", "marker"} & call.query.keys()):
        sums = await call.services.usage.list_projects(call.context, start, stop)
        return answer({"tenant_usages": [_project_view(one, start, stop) for one in sums]})
    page = _page(call)
    servers = await call.services.usage.list_servers(
        call.context, start, stop, project_id=None, limit=page.limit, marker=page.marker
    )
    if detailed:
        views = _detailed_views(call, servers, start, stop)
    else:
        views = [_project_view(one, start, stop) for one in sums_of(servers)]
    return _answer(call, "tenant_usages", views, _PATH, servers, page)


async def show(call: Call) -> Answer:
    """Show what one project used, with its servers."""
    project_id = call.path["id"]
    call.require(project_id=project_id)
    start, stop = _period(call)
    page = _page(call)
    servers = await call.services.usage.list_servers(
        call.context, start, stop, project_id=project_id, limit=page.limit, marker=page.marker
    )
    views = _detailed_views(call, servers, start, stop)
    path = f"{_PATH}/{quote(project_id, safe='')}"
    return _answer(call, "tenant_usage", views[0] if views else {}, path, servers, page)


def _answer(call: Call, name: str, view: Any, path: str, servers: Sequence[ServerUsage], page: Page) -> Answer:
    body: dict[str, Any] = {name: view}
    links = call.next_links(path, [one.uuid for one in servers], page.limit) if call.version >= 40 else None
    return answer(body | {f"{name}_links": links} if links else body)


_RULE = "os_compute_api:os-simple-tenant-usage"

ROUTES = (
    Route("GET", f"/{_PATH}", index, f"{_RULE}:list"),
    Route("GET", f"/{_PATH}/{{id}}", show, f"{_RULE}:show"),
)
