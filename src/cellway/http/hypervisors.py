"""Hypervisors over HTTP: list, show, search, statistics.

Handlers call `compute/host_api.py`; `http/app.py` takes ROUTES. A hypervisor is a host whose compute node is known. Ids
and markers are a cell's own numbers before 2.53: one that several cells have is a 400, never a guess. Drivers report no
uptime, so that is a 501, which clients expect of such drivers. Seed: none of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from cellway.compute.host_api import HostInCell
from cellway.errors import Invalid, NotFound
from cellway.hosts import HostRow
from cellway.http.faults import NotImplementedHere
from cellway.http.routes import Route
from cellway.http.services import condition, only
from cellway.http.wire import Answer, Call, answer, boolean
from cellway.ids import is_uuid

log = structlog.get_logger()

# ---- views -----------------------------------------------------------------------------------------------------

_View = Callable[[Call, HostInCell], dict[str, Any]]
_Servers = Mapping[str, list[tuple[str, str]]]


def _id(call: Call, host: HostInCell) -> int | str | None:
    return host.row.node_uuid if call.version >= 53 else host.row.node_id


def _brief(call: Call, host: HostInCell) -> dict[str, Any]:
    return {"id": _id(call, host), "hypervisor_hostname": host.row.hypervisor_hostname, **condition(host)}


def _full(call: Call, host: HostInCell) -> dict[str, Any]:
    row = host.row
    return _brief(call, host) | {
        "hypervisor_type": row.hypervisor_type,
        "hypervisor_version": row.hypervisor_version,
        "host_ip": row.host_ip,
        "service": {
            "id": row.service_uuid if call.version >= 53 else row.service_id,
            "host": row.host,
            "disabled_reason": row.disabled_reason,
        },
        "cpu_info": _cpu_info(row) if call.version >= 28 else row.cpu_info or "",
        **{key: amount(row) for key, amount in _RESOURCES.items()},
    }


# A server's disk is taken in full, so the disk that is free is also the least that is available.
_RESOURCES: Mapping[str, Callable[[HostRow], int]] = {
    "vcpus": lambda row: row.vcpus,
    "vcpus_used": lambda row: row.vcpus_used,
    "memory_mb": lambda row: row.memory_mb,
    "memory_mb_used": lambda row: row.memory_mb_used,
    "local_gb": lambda row: row.local_gb,
    "local_gb_used": lambda row: row.local_gb_used,
    "free_ram_mb": lambda row: row.memory_mb - row.memory_mb_used,
    "free_disk_gb": lambda row: row.local_gb - row.local_gb_used,
    "disk_available_least": lambda row: row.local_gb - row.local_gb_used,
    "current_workload": lambda row: 0,
    "running_vms": lambda row: row.running_vms,
}


def _cpu_info(row: HostRow) -> dict[str, Any]:
    if not row.cpu_info:
        return {}
    try:
        return msgspec.json.decode(row.cpu_info, type=dict[str, Any])
    except msgspec.DecodeError as error:
        # One host's bad report must not hide the others.
        log.warning("cpu_info_unreadable", host=row.host, problem=str(error))
        return {}


def _with_servers(view: dict[str, Any], host: HostInCell, servers: _Servers) -> dict[str, Any]:
    """Add a host's servers, if it has any: before 2.75 an empty list is left out."""
    here = [{"uuid": uuid, "name": name} for uuid, name in servers.get(host.row.host, [])]
    return view | {"servers": here} if here else view


# ---- finding ---------------------------------------------------------------------------------------------------


async def _all(call: Call) -> list[HostInCell]:
    return [host for host in await call.services.hosts.list_hosts(call.context) if host.row.node_id is not None]


def _matching(hosts: Sequence[HostInCell], pattern: str) -> list[HostInCell]:
    found = [host for host in hosts if pattern.casefold() in (host.row.hypervisor_hostname or "").casefold()]
    if not found:
        raise NotFound("hypervisor.no_match", f"No hypervisor matching '{pattern}' could be found.")
    return found


async def _one(call: Call) -> HostInCell:
    key = call.path["id"]
    if call.version >= 53 and not is_uuid(key):
        raise Invalid("request.bad_id", f"Invalid uuid {key}")
    return only([host for host in await _all(call) if str(_id(call, host)) == key], "Hypervisor", key)


def _after(call: Call, hosts: Sequence[HostInCell], marker: str) -> Sequence[HostInCell]:
    places = [place for place, host in enumerate(hosts) if str(_id(call, host)) == marker]
    if not places:
        raise Invalid("request.bad_marker", f"marker [{marker}] not found", marker=marker)
    only([hosts[place] for place in places], "marker", marker)
    return hosts[places[0] + 1 :]


async def _servers(call: Call, of: Sequence[HostInCell]) -> _Servers:
    """Return the servers of the hosts, if the query asks for them."""
    if call.version < 53 or not boolean(call.query.get("with_servers", "false"), "with_servers"):
        return {}
    return await call.services.hosts.servers_on(call.context, of)


# ---- handlers --------------------------------------------------------------------------------------------------


async def _list(call: Call, path: str, view: _View) -> Answer:
    found: Sequence[HostInCell] = await _all(call)
    pattern = call.query.get("hypervisor_hostname_pattern") if call.version >= 53 else None
    links = None
    if pattern:
        if "limit" in call.query or "marker" in call.query:
            raise Invalid(
                "hypervisor.paged_pattern",
                "Paging over hypervisors with the hypervisor_hostname_pattern query parameter is not supported.",
            )
        found = _matching(found, pattern)
    elif call.version >= 33:
        page = call.page()
        found = (_after(call, found, page.marker) if page.marker is not None else found)[: page.limit]
        links = call.next_links(path, [_id(call, host) for host in found], page.limit)
    servers = await _servers(call, found)
    body: dict[str, Any] = {"hypervisors": [_with_servers(view(call, host), host, servers) for host in found]}
    return answer(body | {"hypervisors_links": links} if links else body)


async def index(call: Call) -> Answer:
    """List hypervisors."""
    return await _list(call, "os-hypervisors", _brief)


async def detail(call: Call) -> Answer:
    """List hypervisors with what they have and what is used."""
    return await _list(call, "os-hypervisors/detail", _full)


async def show(call: Call) -> Answer:
    """Show one hypervisor."""
    host = await _one(call)
    servers = await _servers(call, [host])
    return answer({"hypervisor": _with_servers(_full(call, host), host, servers)})


async def uptime(call: Call) -> Answer:
    """Refuse, as the incumbent does for a driver that does not know its uptime; also for a host that is down.

    There the incumbent answers 400, at which `openstack hypervisor show` gives up; at a 501 it shows the rest.
    """
    await _one(call)
    raise NotImplementedHere("hypervisor.no_uptime", "Virt driver does not implement uptime function.")


async def statistics(call: Call) -> Answer:
    """Sum the resources of the hosts that are enabled, up or not."""
    rows = [host.row for host in await _all(call) if not host.row.disabled]
    totals = {key: sum(amount(row) for row in rows) for key, amount in _RESOURCES.items()}
    return answer({"hypervisor_statistics": {"count": len(rows), **totals}})


async def search(call: Call) -> Answer:
    """List hypervisors whose name holds a word."""
    found = _matching(await _all(call), call.path["pattern"])
    return answer({"hypervisors": [_brief(call, host) for host in found]})


async def servers_of(call: Call) -> Answer:
    """List hypervisors whose name holds a word, with their servers."""
    found = _matching(await _all(call), call.path["pattern"])
    servers = await call.services.hosts.servers_on(call.context, found)
    return answer({"hypervisors": [_with_servers(_brief(call, host), host, servers) for host in found]})


_RULE = "os_compute_api:os-hypervisors"

ROUTES = (
    Route("GET", "/os-hypervisors", index, f"{_RULE}:list"),
    Route("GET", "/os-hypervisors/detail", detail, f"{_RULE}:list-detail"),
    Route("GET", "/os-hypervisors/statistics", statistics, f"{_RULE}:statistics", until=87),
    Route("GET", "/os-hypervisors/{id}", show, f"{_RULE}:show"),
    Route("GET", "/os-hypervisors/{id}/uptime", uptime, f"{_RULE}:uptime", until=87),
    Route("GET", "/os-hypervisors/{pattern}/search", search, f"{_RULE}:search", until=52),
    Route("GET", "/os-hypervisors/{pattern}/servers", servers_of, f"{_RULE}:servers", until=52),
)
