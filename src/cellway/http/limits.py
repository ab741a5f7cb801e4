"""A project's limits over HTTP: how much it may have, and has.

The handler calls the noun `cellway.quota.usage` on the API database; `http/app.py` takes ROUTES. A limit that nothing
enforces is shown as unlimited, -1 (docs/compatibility.md). Seed: none of its own.
"""

from typing import Any

from cellway.http.routes import Route
from cellway.http.wire import Answer, Call, answer
from cellway.quota import usage as quota
from cellway.quota.usage import Usage

_UNLIMITED = -1


def _view(call: Call, used: Usage) -> dict[str, int]:
    metadata = call.limits.metadata_items
    view = {
        "maxServerMeta": metadata,
        "maxTotalInstances": _UNLIMITED,
        "maxTotalCores": _UNLIMITED,
        "maxTotalRAMSize": _UNLIMITED,
        "maxTotalKeypairs": _UNLIMITED,
        "maxServerGroups": _UNLIMITED,
        "maxServerGroupMembers": _UNLIMITED,
        "totalInstancesUsed": used.instances,
        "totalCoresUsed": used.cores,
        "totalRAMUsed": used.ram,
        "totalServerGroupsUsed": 0,
    }
    if call.version < 57:
        view |= {"maxPersonality": 0, "maxPersonalitySize": 0}
    if call.version < 39:
        # Two names of one limit, `metadata_items`.
        view["maxImageMeta"] = metadata
    if call.version < 36:
        networks = ("maxSecurityGroups", "maxSecurityGroupRules", "maxTotalFloatingIps")
        view |= dict.fromkeys(networks, _UNLIMITED)
        view |= {"totalSecurityGroupsUsed": 0, "totalFloatingIpsUsed": 0}
    return view


async def show(call: Call) -> Answer:
    """Show the limits and usage of the caller's project, or of another's for an admin.

    `reserved` changes nothing: a server is charged when it is accepted, so what is used includes what is reserved.
    """
    project_id: str = call.query.get("tenant_id") or call.context.project_id
    if project_id != call.context.project_id:
        call.require(project_id=project_id, rule="os_compute_api:limits:other_project")
    used = await call.services.api.read(quota.usage, project_id)
    body: dict[str, Any] = {"rate": [], "absolute": _view(call, used)}
    return answer({"limits": body})


ROUTES = (Route("GET", "/limits", show, "os_compute_api:limits"),)
