"""A project's limits over HTTP: how much it may have, and has.

The handler calls `compute/limits.py`; `http/app.py` takes ROUTES. Seed 003.
"""

from collections.abc import Mapping
from typing import Any

from cellway.http.routes import Route
from cellway.http.wire import Answer, Call, answer
from cellway.quota.usage import Usage


def _view(call: Call, limits: Mapping[str, int], used: Mapping[str, Usage]) -> dict[str, int]:
    view = {
        "maxServerMeta": limits["metadata_items"],
        "maxTotalInstances": limits["instances"],
        "maxTotalCores": limits["cores"],
        "maxTotalRAMSize": limits["ram"],
        "maxTotalKeypairs": limits["key_pairs"],
        "maxServerGroups": limits["server_groups"],
        "maxServerGroupMembers": limits["server_group_members"],
        "totalInstancesUsed": used["instances"].total,
        "totalCoresUsed": used["cores"].total,
        "totalRAMUsed": used["ram"].total,
        "totalServerGroupsUsed": used["server_groups"].total,
    }
    if call.version < 57:
        view |= {
            "maxPersonality": limits["injected_files"],
            "maxPersonalitySize": limits["injected_file_content_bytes"],
        }
    if call.version < 39:
        # Two names of one limit.
        view["maxImageMeta"] = limits["metadata_items"]
    if call.version < 36:
        view |= {
            "maxSecurityGroups": limits["security_groups"],
            "maxSecurityGroupRules": limits["security_group_rules"],
            "maxTotalFloatingIps": limits["floating_ips"],
            "totalSecurityGroupsUsed": 0,
            "totalFloatingIpsUsed": 0,
        }
    return view


async def show(call: Call) -> Answer:
    """Show the limits and usage of the caller's project, or of another's for an admin.

    `reserved` changes nothing: what is used includes what is reserved, as the limits do.
    """
    project_id: str = call.query.get("tenant_id") or call.context.project_id
    if project_id != call.context.project_id:
        call.require(project_id=project_id, rule="os_compute_api:limits:other_project")
    quotas = call.services.quotas
    allowed = await quotas.allowed(call.context, project_id, "")
    used = await quotas.usage(call.context, project_id)
    body: dict[str, Any] = {"rate": [], "absolute": _view(call, allowed.project, used)}
    return answer({"limits": body})


ROUTES = (Route("GET", "/limits", show, "os_compute_api:limits"),)
