"""Availability zones over HTTP: which there are, and for operators which hosts are in them.

Handlers call `compute/api.py` and `compute/host_api.py`; `http/app.py` takes ROUTES. There is no `internal` zone: it
held the incumbent's control services, and ours are no services of the API. Seed: none of its own.
"""

from typing import Any

from cellway.compute.host_api import HostInCell
from cellway.hosts import COMPUTE_BINARY
from cellway.http.routes import Route
from cellway.http.wire import Answer, Call, answer, long_stamp

# ---- views -----------------------------------------------------------------------------------------------------


def _view(name: str, available: bool, hosts: dict[str, Any] | None) -> dict[str, Any]:
    return {"zoneName": name, "zoneState": {"available": available}, "hosts": hosts}


def _host(host: HostInCell) -> dict[str, Any]:
    updated = long_stamp(host.row.service_updated_at)
    return {COMPUTE_BINARY: {"active": not host.row.disabled, "available": host.up, "updated_at": updated}}


# ---- handlers --------------------------------------------------------------------------------------------------


async def index(call: Call) -> Answer:
    """List zones."""
    zones = call.services.compute.zones()
    return answer({"availabilityZoneInfo": [_view(name, zones[name], None) for name in sorted(zones)]})


async def detail(call: Call) -> Answer:
    """List zones with their hosts, disabled ones included."""
    hosts = await call.services.hosts.list_hosts(call.context)
    zones = call.services.compute.zones()
    views = [
        _view(name, zones[name], {host.row.host: _host(host) for host in hosts if host.zone == name})
        for name in sorted(zones)
    ]
    return answer({"availabilityZoneInfo": views})


_RULE = "os_compute_api:os-availability-zone"

ROUTES = (
    Route("GET", "/os-availability-zone", index, f"{_RULE}:list"),
    Route("GET", "/os-availability-zone/detail", detail, f"{_RULE}:detail"),
)
