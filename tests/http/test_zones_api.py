"""Availability zones over HTTP: all see which there are, operators also what is in them."""

from typing import Any

import pytest

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio

HOSTS = ["cell1-h1", "cell1-h2", "cell2-h1", "cell2-h2"]


async def zone(client: Client, path: str = "/os-availability-zone/detail") -> Any:
    """Return the only zone."""
    answer = await client.get(path)
    assert answer.status == 200, answer.body
    (found,) = answer.json["availabilityZoneInfo"]
    return found


async def test_everybody_sees_the_zones_without_hosts(shared: Deployment) -> None:
    """The list names the default zone and no host, at every microversion."""
    for client in (shared.admin, shared.member, shared.member.at("2.1")):
        found = await zone(client, "/os-availability-zone")
        assert found == {"zoneName": "nova", "zoneState": {"available": True}, "hosts": None}


async def test_an_admin_sees_the_hosts_of_all_cells(shared: Deployment) -> None:
    """In detail a zone has every host of every cell, with its service's state; a member may not see that."""
    found = await zone(shared.admin)
    assert (found["zoneName"], found["zoneState"]) == ("nova", {"available": True})
    assert list(found["hosts"]) == HOSTS
    for host in found["hosts"].values():
        (binary,) = host
        assert (binary, set(host[binary])) == ("nova-compute", {"active", "available", "updated_at"})
        assert (host[binary]["active"], host[binary]["available"]) == (True, True)
        assert len(host[binary]["updated_at"]) == len("2013-08-18T12:17:55.751757")
    assert (await shared.member.get("/os-availability-zone/detail")).status == 403


async def test_a_zone_is_available_while_one_of_its_hosts_takes_servers(deployment: Deployment) -> None:
    """A disabled or downed host shows as that; the zone goes when the last one does, and comes back with one."""
    services = (await deployment.admin.get("/os-services")).json["services"]
    changes: list[dict[str, Any]] = [{"status": "disabled"}, {"forced_down": True}] * 2
    for service, change in zip(services, changes, strict=True):
        assert (await zone(deployment.member, "/os-availability-zone"))["zoneState"] == {"available": True}
        assert (await deployment.admin.put(f"/os-services/{service['id']}", change)).status == 200
    found = await zone(deployment.admin)
    assert found["zoneState"] == {"available": False}
    states = [(host["nova-compute"]["active"], host["nova-compute"]["available"]) for host in found["hosts"].values()]
    assert states == [(False, True), (True, False)] * 2
    await deployment.admin.put(f"/os-services/{services[2]['id']}", {"status": "enabled"})
    assert (await zone(deployment.member, "/os-availability-zone"))["zoneState"] == {"available": True}
