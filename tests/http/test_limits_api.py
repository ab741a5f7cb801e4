"""Limits over HTTP: what a project may have, and has."""

from typing import Any

import pytest

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio

ALWAYS = {
    "maxServerMeta", "maxTotalInstances", "maxTotalCores", "maxTotalRAMSize", "maxTotalKeypairs", "maxServerGroups",
    "maxServerGroupMembers", "totalInstancesUsed", "totalCoresUsed", "totalRAMUsed", "totalServerGroupsUsed",
    "maxPersonality", "maxPersonalitySize",
}  # fmt: skip
NETWORK = {
    "maxSecurityGroups", "maxSecurityGroupRules", "maxTotalFloatingIps", "totalSecurityGroupsUsed",
    "totalFloatingIpsUsed",
}  # fmt: skip


async def absolute(client: Client, query: str = "") -> Any:
    """Return the absolute limits."""
    answer = await client.get(f"/limits{query}")
    assert answer.status == 200, answer.body
    assert set(answer.json) == {"limits"}
    assert answer.json["limits"]["rate"] == []
    return answer.json["limits"]["absolute"]


async def used(client: Client, query: str = "") -> tuple[int, int, int]:
    """Return how many instances, cores and MB are used."""
    found = await absolute(client, query)
    return found["totalInstancesUsed"], found["totalCoresUsed"], found["totalRAMUsed"]


async def test_each_microversion_has_its_limits(shared: Deployment) -> None:
    """Network limits end with 2.35 and image metadata with 2.38; what is not limited reads as -1."""
    for version, expected in (
        ("2.1", ALWAYS | NETWORK | {"maxImageMeta"}),
        ("2.35", ALWAYS | NETWORK | {"maxImageMeta"}),
        ("2.36", ALWAYS | {"maxImageMeta"}),
        ("2.38", ALWAYS | {"maxImageMeta"}),
        ("2.39", ALWAYS),
        ("2.53", ALWAYS),
    ):
        found = await absolute(shared.member.at(version))
        assert set(found) == expected, version
        limited = {"maxServerMeta": 128, "maxImageMeta": 128, "maxPersonality": 5, "maxPersonalitySize": 10240}
        assert {key: found[key] for key in found if key.startswith("max")} == {
            key: limited.get(key, -1) for key in expected if key.startswith("max")
        }


async def test_a_project_sees_what_it_uses(shared: Deployment) -> None:
    """A server counts from when it is accepted until it is gone, in its project alone, whatever `reserved` says."""
    one, other = [await shared.add_user(f"limits-{name}", f"limits-{name}", "member") for name in ("one", "other")]
    await shared.make_flavor("limits.two", vcpus=2, ram=256)
    servers = [await shared.boot("a", one), await shared.boot("b", one, flavor="limits.two")]
    for query in ("", "?reserved=1", "?reserved=False"):
        assert await used(one, query) == (2, 3, 768)
    assert await used(other) == (0, 0, 0)
    for server, left in zip(servers, ((1, 2, 256), (0, 0, 0)), strict=True):
        assert (await one.delete(f"/servers/{server}")).status == 204

        async def refunded(expected: tuple[int, int, int] = left) -> bool:
            return await used(one) == expected

        await shared.until(refunded)
    assert (await shared.admin.delete("/flavors/limits.two")).status == 202


async def test_only_an_admin_sees_another_projects_limits(unbuilt: Deployment) -> None:
    """`tenant_id` names another project for an admin, one's own for everybody, and is a 403 otherwise."""
    user = await unbuilt.add_user("limits-third", "limits-third", "member")
    server = await unbuilt.boot("c", user)
    project = (await user.get(f"/servers/{server}")).json["server"]["tenant_id"]
    assert await used(user, f"?tenant_id={project}") == (1, 1, 512)
    assert await used(unbuilt.admin, f"?tenant_id={project}") == (1, 1, 512)
    assert await used(unbuilt.admin, "?tenant_id=nobody") == (0, 0, 0)
    refused = await unbuilt.member.get(f"/limits?tenant_id={project}")
    assert (refused.status, list(refused.json)) == (403, ["forbidden"])
