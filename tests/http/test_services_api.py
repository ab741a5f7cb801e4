"""Compute services over HTTP: every agent of every cell, and what an operator may do to it."""

from typing import Any

import pytest

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio

HOSTS = ["cell1-h1", "cell1-h2", "cell2-h1", "cell2-h2"]
NOBODY = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
BY_HOST = {"host": "cell2-h1", "binary": "nova-compute"}


async def services(client: Client, query: str = "") -> Any:
    """Return the services that a query gives."""
    answer = await client.get(f"/os-services{query}")
    assert answer.status == 200, answer.body
    return answer.json["services"]


async def service(client: Client, host: str) -> Any:
    """Return one host's service."""
    (found,) = await services(client, f"?host={host}")
    return found


async def test_services_of_all_cells_are_listed(shared: Deployment) -> None:
    """Every host is listed once, by cell and name, with the keys of the microversion: a number or a uuid as its id."""
    keys = {"id", "binary", "host", "zone", "status", "state", "updated_at", "disabled_reason"}
    for version, more in (
        ("2.1", set[str]()),
        ("2.10", set[str]()),
        ("2.11", {"forced_down"}),
        ("2.52", {"forced_down"}),
    ):
        found = await services(shared.admin.at(version))
        assert [one["host"] for one in found] == HOSTS
        assert all(set(one) == keys | more for one in found)
        assert [one["id"] for one in found] == [1, 2, 1, 2]
    found = await services(shared.admin)
    assert [one["host"] for one in found] == HOSTS
    assert len({one["id"] for one in found}) == 4
    for one in found:
        assert len(one["id"]) == 36
        assert len(one["updated_at"]) == len("2013-08-18T12:17:55.751757")
        fixed = {"binary": "nova-compute", "zone": "nova", "status": "enabled", "state": "up", "forced_down": False}
        assert one | fixed | {"disabled_reason": None} == one


async def test_services_are_filtered_by_host_and_binary(shared: Deployment) -> None:
    """A filter gives what fits it exactly; other binaries have no services; unknown parameters are ignored."""
    for query, expected in (
        ("?host=cell2-h1", ["cell2-h1"]),
        ("?host=cell2", []),
        ("?binary=nova-compute&host=cell1-h2", ["cell1-h2"]),
        ("?binary=nova-compute&colour=red", HOSTS),
        ("?binary=nova-conductor", []),
    ):
        assert [one["host"] for one in await services(shared.admin, query)] == expected, query


async def test_services_are_for_admins(shared: Deployment) -> None:
    """A member may neither see nor change services."""
    assert (await shared.member.get("/os-services")).status == 403
    assert (await shared.member.put(f"/os-services/{NOBODY}", {"status": "disabled"})).status == 403
    assert (await shared.member.at("2.1").put("/os-services/disable", BY_HOST)).status == 403
    assert (await shared.member.delete(f"/os-services/{NOBODY}")).status == 403


async def test_a_service_is_disabled_and_enabled_by_uuid(shared: Deployment) -> None:
    """From 2.53 a service is changed by its uuid; the answer is the service, and enabling it forgets the reason."""
    before = await service(shared.admin, "cell2-h1")
    path = f"/os-services/{before['id']}"
    fixed = {"id": before["id"], "host": "cell2-h1", "zone": "nova", "forced_down": False}
    for body, expected in (
        (
            {"status": "disabled", "disabled_reason": "a new disk"},
            {"status": "disabled", "disabled_reason": "a new disk"},
        ),
        ({"status": "disabled"}, {"status": "disabled", "disabled_reason": None}),
        ({"status": "disabled", "disabled_reason": "again"}, {"status": "disabled", "disabled_reason": "again"}),
        ({"status": "enabled"}, {"status": "enabled", "disabled_reason": None}),
    ):
        changed = await shared.admin.put(path, body)
        assert changed.status == 200, changed.body
        assert set(changed.json["service"]) == set(before)
        for shown in (changed.json["service"], await service(shared.admin, "cell2-h1")):
            assert shown | fixed | expected == shown
    assert (await service(shared.admin, "cell1-h1"))["status"] == "enabled"


async def test_a_service_is_forced_down_by_uuid(shared: Deployment) -> None:
    """A host that is forced down is down although it reports, and up again once that is lifted."""
    path = f"/os-services/{(await service(shared.admin, 'cell2-h2'))['id']}"
    for forced, state in ((True, "down"), (False, "up"), ("yes", "down"), ("False", "up")):
        changed = await shared.admin.put(path, {"forced_down": forced})
        assert changed.status == 200, changed.body
        assert (changed.json["service"]["state"], changed.json["service"]["status"]) == (state, "enabled")
        assert (await service(shared.admin, "cell2-h2"))["state"] == state
    both = await shared.admin.put(path, {"status": "disabled", "forced_down": True})
    assert (both.json["service"]["state"], both.json["service"]["status"]) == ("down", "disabled")
    restored = await shared.admin.put(path, {"status": "enabled", "forced_down": False})
    assert (restored.json["service"]["state"], restored.json["service"]["status"]) == ("up", "enabled")


async def test_a_bad_change_by_uuid_is_refused(shared: Deployment) -> None:
    """A change that says nothing, or nonsense, is a 400; an unknown service is a 404; nothing changes."""
    before = await service(shared.admin, "cell1-h1")
    path = f"/os-services/{before['id']}"
    for body in (
        {},
        {"disabled_reason": "because"},
        {"status": "enabled", "disabled_reason": "because"},
        {"status": "broken"},
        {"status": None},
        {"status": "disabled", "disabled_reason": ""},
        {"status": "disabled", "disabled_reason": "x" * 256},
        {"forced_down": "perhaps"},
        {"forced_down": None},
        {"status": "disabled", "host": "cell1-h1"},
    ):
        assert (await shared.admin.put(path, body)).status == 400, body
    for key in ("1", "disable", "force-down"):
        assert (await shared.admin.put(f"/os-services/{key}", {"status": "disabled"})).status == 400, key
    assert (await shared.admin.put(f"/os-services/{NOBODY}", {"status": "disabled"})).status == 404
    assert (await service(shared.admin, "cell1-h1")) | {"updated_at": None} == before | {"updated_at": None}


async def test_a_service_is_changed_by_host_and_binary(shared: Deployment) -> None:
    """Until 2.52 the path says what to do, the body to which host, and the answer what was done."""
    for version in ("2.1", "2.10", "2.11", "2.52"):
        client = shared.admin.at(version)
        for action, more, shown in (
            ("disable", {}, {"status": "disabled"}),
            ("disable-log-reason", {"disabled_reason": "rain"}, {"status": "disabled", "disabled_reason": "rain"}),
            ("enable", {}, {"status": "enabled"}),
        ):
            changed = await client.put(f"/os-services/{action}", BY_HOST | more)
            assert (changed.status, changed.json) == (200, {"service": BY_HOST | shown})
            after = await service(client, "cell2-h1")
            assert after | {"disabled_reason": None} | shown == after
    for forced, state in ((True, "down"), (False, "up")):
        changed = await shared.admin.at("2.52").put("/os-services/force-down", BY_HOST | {"forced_down": forced})
        assert (changed.status, changed.json) == (200, {"service": BY_HOST | {"forced_down": forced}})
        assert (await service(shared.admin, "cell2-h1"))["state"] == state


async def test_a_bad_change_by_host_is_refused(shared: Deployment) -> None:
    """What names no service or no action is a 404; what lacks its point or says too much is a 400."""
    for version, action, body, status in (
        ("2.52", "disable", BY_HOST | {"host": "nowhere"}, 404),
        ("2.52", "disable", BY_HOST | {"binary": "nova-conductor"}, 404),
        ("2.52", "explode", BY_HOST, 404),
        ("2.10", "force-down", BY_HOST, 404),
        ("2.10", "disable", BY_HOST | {"forced_down": True}, 400),
        ("2.11", "force-down", BY_HOST, 400),
        ("2.11", "force-down", BY_HOST | {"forced_down": "perhaps"}, 400),
        ("2.1", "disable-log-reason", BY_HOST, 400),
        ("2.1", "disable-log-reason", BY_HOST | {"disabled_reason": ""}, 400),
        ("2.1", "disable", {"host": "cell2-h1"}, 400),
        ("2.1", "disable", BY_HOST | {"colour": "red"}, 400),
    ):
        answer = await shared.admin.at(version).put(f"/os-services/{action}", body)
        assert answer.status == status, (version, action, body, answer.body)
    after = await service(shared.admin, "cell2-h1")
    assert (after["state"], after["status"]) == ("up", "enabled")


async def test_a_service_with_an_ambiguous_or_bad_id_is_not_deleted(shared: Deployment) -> None:
    """A number that several cells have is a 400 before 2.53, as is one that is none; from 2.53 an id is a uuid."""
    for version, key, status in (
        ("2.52", "1", 400),
        ("2.52", "99", 404),
        ("2.52", "one", 400),
        ("2.52", NOBODY, 400),
        ("2.53", "1", 400),
        ("2.53", NOBODY, 404),
    ):
        answer = await shared.admin.at(version).delete(f"/os-services/{key}")
        assert answer.status == status, (version, key, answer.body)
    assert [one["host"] for one in await services(shared.admin)] == HOSTS


async def test_a_service_is_deleted_once_it_has_no_servers(deployment: Deployment) -> None:
    """A host with a server keeps its service; an empty one goes, from services, hypervisors and zones alike."""
    server = await deployment.boot("one")
    await deployment.until_status(server, "ACTIVE")
    host = (await deployment.admin.get(f"/servers/{server}")).json["server"]["OS-EXT-SRV-ATTR:host"]
    busy, idle = await service(deployment.admin, host), HOSTS[0] if host != HOSTS[0] else HOSTS[1]
    refused = await deployment.admin.delete(f"/os-services/{busy['id']}")
    assert (refused.status, list(refused.json)) == (409, ["conflictingRequest"])
    unused = (await service(deployment.admin, idle))["id"]
    removed = await deployment.admin.delete(f"/os-services/{unused}")
    assert (removed.status, removed.body) == (204, b"")
    assert (await deployment.admin.delete(f"/os-services/{unused}")).status == 404
    left = [name for name in HOSTS if name != idle]
    assert [one["host"] for one in await services(deployment.admin)] == left
    hypervisors = (await deployment.admin.get("/os-hypervisors")).json["hypervisors"]
    assert [one["hypervisor_hostname"] for one in hypervisors] == left
    (zone,) = (await deployment.admin.get("/os-availability-zone/detail")).json["availabilityZoneInfo"]
    assert list(zone["hosts"]) == left


async def test_a_number_that_one_cell_alone_has_names_its_service(deployment: Deployment) -> None:
    """Once a number is unique again, it deletes its service at 2.1."""
    first = (await service(deployment.admin, "cell1-h2"))["id"]
    assert (await deployment.admin.at("2.1").delete("/os-services/2")).status == 400
    assert (await deployment.admin.delete(f"/os-services/{first}")).status == 204
    assert (await deployment.admin.at("2.1").delete("/os-services/2")).status == 204
    assert [one["host"] for one in await services(deployment.admin)] == ["cell1-h1", "cell2-h1"]


async def test_a_cell_that_is_down_hides_only_its_own_services(deployment: Deployment) -> None:
    """While a cell does not answer, the services of the others are listed and changed as ever."""
    deployment.break_cell("cell2", "refuse")
    assert [one["host"] for one in await services(deployment.admin)] == ["cell1-h1", "cell1-h2"]
    key = (await service(deployment.admin, "cell1-h1"))["id"]
    assert (await deployment.admin.put(f"/os-services/{key}", {"status": "disabled"})).status == 200
    deployment.heal_cell("cell2")
    assert [one["host"] for one in await services(deployment.admin)] == HOSTS
