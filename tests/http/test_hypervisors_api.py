"""Hypervisors over HTTP: the hosts of all cells, what they have, and which servers are on them."""

from typing import Any

import msgspec
import pytest

from cellway.testing import BASE, Client, Deployment

pytestmark = pytest.mark.anyio

HOSTS = ["cell1-h1", "cell1-h2", "cell2-h1", "cell2-h2"]
NOBODY = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
BRIEF = {"id", "hypervisor_hostname", "state", "status"}
RESOURCES = {
    "vcpus", "vcpus_used", "memory_mb", "memory_mb_used", "local_gb", "local_gb_used", "free_ram_mb", "free_disk_gb",
    "disk_available_least", "current_workload", "running_vms",
}  # fmt: skip
FULL = BRIEF | RESOURCES | {"hypervisor_type", "hypervisor_version", "host_ip", "service", "cpu_info"}
LISTS = ("/os-hypervisors", "/os-hypervisors/detail")


async def hypervisors(client: Client, path: str = "/os-hypervisors") -> Any:
    """Return the hypervisors that a path gives."""
    answer = await client.get(path)
    assert answer.status == 200, answer.body
    return answer.json["hypervisors"]


def names(found: Any) -> list[str]:
    """Return what hypervisors are called."""
    return [one["hypervisor_hostname"] for one in found]


async def id_of(shared: Deployment, name: str) -> str:
    """Return a hypervisor's uuid."""
    return str(next(one["id"] for one in await hypervisors(shared.admin) if one["hypervisor_hostname"] == name))


async def test_hypervisors_of_all_cells_are_listed(shared: Deployment) -> None:
    """Every host is listed once, by cell and name, briefly or in full, with a number as its id or from 2.53 a uuid."""
    for version in ("2.1", "2.32", "2.33", "2.52", "2.53"):
        brief, full = [await hypervisors(shared.admin.at(version), path) for path in LISTS]
        assert names(brief) == names(full) == HOSTS
        assert all(set(one) == BRIEF for one in brief)
        assert all(set(one) == FULL for one in full)
        assert all({key: one[key] for key in BRIEF} == first for one, first in zip(full, brief, strict=True))
        assert {(one["state"], one["status"]) for one in brief} == {("up", "enabled")}
        if version == "2.53":
            assert [len(one["id"]) for one in brief] == [36] * 4
        else:
            assert [one["id"] for one in brief] == [1, 2, 1, 2]


async def test_a_hypervisor_shows_what_it_has(shared: Deployment) -> None:
    """A hypervisor shows its kind, address, service and resources, as its host reported them."""
    shown = (await shared.admin.get(f"/os-hypervisors/{await id_of(shared, 'cell2-h1')}")).json["hypervisor"]
    (service,) = (await shared.admin.get("/os-services?host=cell2-h1")).json["services"]
    assert set(shown) == FULL
    assert shown["service"] == {"id": service["id"], "host": "cell2-h1", "disabled_reason": None}
    assert (shown["hypervisor_type"], shown["host_ip"], shown["current_workload"]) == ("fake", "127.0.0.1", 0)
    assert shown["free_ram_mb"] == shown["memory_mb"] - shown["memory_mb_used"] > 0
    assert shown["free_disk_gb"] == shown["disk_available_least"] == shown["local_gb"] - shown["local_gb_used"] > 0
    assert shown in await hypervisors(shared.admin, "/os-hypervisors/detail")


async def test_cpu_info_is_text_before_2_28(shared: Deployment) -> None:
    """What is known of the processor is JSON in a string until 2.27, and an object from 2.28."""
    old = (await hypervisors(shared.admin.at("2.27"), "/os-hypervisors/detail"))[0]["cpu_info"]
    new = (await hypervisors(shared.admin.at("2.28"), "/os-hypervisors/detail"))[0]["cpu_info"]
    assert isinstance(old, str)
    assert msgspec.json.decode(old) == new
    assert {"arch", "model", "vendor", "features", "topology"} <= set(new)


async def test_hypervisors_are_for_admins(shared: Deployment) -> None:
    """A member sees no hypervisor in any way."""
    for path in (*LISTS, f"/os-hypervisors/{NOBODY}", "/os-hypervisors/statistics", f"/os-hypervisors/{NOBODY}/uptime"):
        assert (await shared.member.get(path)).status == 403, path
    for path in ("/os-hypervisors/cell/search", "/os-hypervisors/cell/servers"):
        assert (await shared.member.at("2.52").get(path)).status == 403, path


async def test_pages_follow_each_other(shared: Deployment) -> None:
    """From 2.53 pages of any size give every hypervisor once, in order, and the last one says so."""
    for path in LISTS:
        for size in (1, 2, 3, 4):
            seen: list[str] = []
            address = f"{path}?limit={size}"
            for _ in range(6):
                page = (await shared.admin.get(address)).json
                seen += names(page["hypervisors"])
                if "hypervisors_links" not in page:
                    break
                (link,) = page["hypervisors_links"]
                assert link["rel"] == "next"
                assert link["href"].startswith(f"{BASE}/compute/v2.1{path}?")
                address = link["href"]
            assert seen == HOSTS, (path, size)


async def test_pages_begin_at_2_33(shared: Deployment) -> None:
    """Before 2.33 the list is whole; from then to 2.52 a marker is a number, refused when several cells have it."""
    assert names(await hypervisors(shared.admin.at("2.32"), "/os-hypervisors?limit=1&marker=7")) == HOSTS
    page = (await shared.admin.at("2.33").get("/os-hypervisors?limit=2")).json
    assert (names(page["hypervisors"]), len(page["hypervisors_links"])) == (HOSTS[:2], 1)
    for version, query in (
        ("2.33", "marker=1"),
        ("2.33", "marker=99"),
        ("2.52", f"marker={NOBODY}"),
        ("2.53", f"marker={NOBODY}"),
        ("2.53", "marker=1"),
        ("2.53", "limit=-1"),
        ("2.33", "limit=many"),
    ):
        answer = await shared.admin.at(version).get(f"/os-hypervisors?{query}")
        assert answer.status == 400, (version, query, answer.body)


async def test_hypervisors_are_found_by_a_part_of_their_name(shared: Deployment) -> None:
    """A pattern from 2.53, and a search before, give the names that hold it, whatever its case, or a 404."""
    for pattern, expected in (("cell2", HOSTS[2:]), ("CELL1-H", HOSTS[:2]), ("h1", [HOSTS[0], HOSTS[2]])):
        for path in LISTS:
            found = await hypervisors(shared.admin, f"{path}?hypervisor_hostname_pattern={pattern}")
            assert names(found) == expected
        found = await hypervisors(shared.admin.at("2.52"), f"/os-hypervisors/{pattern}/search")
        assert names(found) == expected
        assert all(set(one) == BRIEF for one in found)
    assert (await shared.admin.get("/os-hypervisors?hypervisor_hostname_pattern=nowhere")).status == 404
    assert (await shared.admin.at("2.52").get("/os-hypervisors/nowhere/search")).status == 404
    assert (await shared.admin.at("2.52").get("/os-hypervisors/nowhere/servers")).status == 404
    assert names(await hypervisors(shared.admin.at("2.52"), "/os-hypervisors?hypervisor_hostname_pattern=h1")) == HOSTS
    for more in ("limit=1", f"marker={NOBODY}"):
        answer = await shared.admin.get(f"/os-hypervisors?hypervisor_hostname_pattern=cell&{more}")
        assert answer.status == 400


async def test_calls_that_2_53_replaced_are_gone(shared: Deployment) -> None:
    """From 2.53 `search` and `servers` are a 404."""
    for last in ("search", "servers"):
        assert (await shared.admin.at("2.52").get(f"/os-hypervisors/cell/{last}")).status == 200
        assert (await shared.admin.at("2.53").get(f"/os-hypervisors/cell/{last}")).status == 404


async def test_a_bad_or_unknown_id_is_refused(shared: Deployment) -> None:
    """Before 2.53 a number that several cells have is a 400 and any other a 404; from 2.53 what is no uuid is a 400."""
    for version, key, status in (
        ("2.52", "1", 400),
        ("2.52", "99", 404),
        ("2.52", "cell1-h1", 404),
        ("2.52", NOBODY, 404),
        ("2.53", "1", 400),
        ("2.53", "cell1-h1", 400),
        ("2.53", NOBODY, 404),
    ):
        for path in (f"/os-hypervisors/{key}", f"/os-hypervisors/{key}/uptime"):
            answer = await shared.admin.at(version).get(path)
            assert answer.status == status, (version, path, answer.body)


async def test_uptime_is_not_known(shared: Deployment) -> None:
    """No driver reports its uptime, so it is a 501, which clients take for that."""
    answer = await shared.admin.get(f"/os-hypervisors/{await id_of(shared, 'cell1-h1')}/uptime")
    assert (answer.status, list(answer.json)) == (501, ["notImplemented"])


async def test_servers_are_shown_with_their_hypervisor(deployment: Deployment) -> None:
    """A server stands at the hypervisor of its host and no other, and takes its share there, until it is deleted."""
    server = await deployment.boot("one")
    await deployment.until_status(server, "ACTIVE")
    host = (await deployment.admin.get(f"/servers/{server}")).json["server"]["OS-EXT-SRV-ATTR:host"]
    key, expected = await id_of(deployment, host), {host: [{"uuid": server, "name": "one"}]}
    old = deployment.admin.at("2.52")
    lists = [
        *[await hypervisors(deployment.admin, f"{path}?with_servers=true") for path in LISTS],
        await hypervisors(deployment.admin, "/os-hypervisors?with_servers=1&hypervisor_hostname_pattern=cell"),
        await hypervisors(old, "/os-hypervisors/cell/servers"),
        [(await deployment.admin.get(f"/os-hypervisors/{key}?with_servers=True")).json["hypervisor"]],
    ]
    for found in lists:
        assert {one["hypervisor_hostname"]: one["servers"] for one in found if "servers" in one} == expected
    for found in (await hypervisors(deployment.admin), await hypervisors(old, "/os-hypervisors?with_servers=true")):
        assert not any("servers" in one for one in found)
    assert (await deployment.admin.get("/os-hypervisors?with_servers=perhaps")).status == 400

    async def taken() -> bool:
        one = (await deployment.admin.get(f"/os-hypervisors/{key}")).json["hypervisor"]
        return (one["running_vms"], one["vcpus_used"], one["memory_mb_used"], one["local_gb_used"]) == (1, 1, 512, 1)

    await deployment.until(taken)
    total = (await deployment.admin.get("/os-hypervisors/statistics")).json["hypervisor_statistics"]
    assert (total["running_vms"], total["vcpus_used"], total["memory_mb_used"]) == (1, 1, 512)
    assert (await deployment.member.delete(f"/servers/{server}")).status == 204
    await deployment.until_gone(server)

    async def left() -> bool:
        found = await hypervisors(deployment.admin, "/os-hypervisors?with_servers=true")
        return not any("servers" in one for one in found)

    await deployment.until(left)


async def test_statistics_sum_the_hosts_that_are_enabled(shared: Deployment) -> None:
    """The totals are those of every enabled host of every cell, at every microversion."""
    full = await hypervisors(shared.admin, "/os-hypervisors/detail")
    for version in ("2.1", "2.53"):
        totals = (await shared.admin.at(version).get("/os-hypervisors/statistics")).json["hypervisor_statistics"]
        assert set(totals) == RESOURCES | {"count"}
        assert totals["count"] == 4
        assert totals["vcpus"] == sum(one["vcpus"] for one in full)
        assert totals["local_gb"] == sum(one["local_gb"] for one in full)
    path = f"/os-services/{full[0]['service']['id']}"
    try:
        await shared.admin.put(path, {"status": "disabled", "disabled_reason": "rain"})
        totals = (await shared.admin.get("/os-hypervisors/statistics")).json["hypervisor_statistics"]
        assert (totals["count"], totals["vcpus"]) == (3, sum(one["vcpus"] for one in full[1:]))
        first = (await hypervisors(shared.admin, "/os-hypervisors/detail"))[0]
        assert (first["status"], first["state"], first["service"]["disabled_reason"]) == ("disabled", "up", "rain")
    finally:
        await shared.admin.put(path, {"status": "enabled"})


async def test_a_cell_that_is_down_hides_only_its_own_hypervisors(deployment: Deployment) -> None:
    """While a cell does not answer, the hypervisors of the others are listed."""
    deployment.break_cell("cell1", "refuse")
    for path in LISTS:
        assert names(await hypervisors(deployment.admin, path)) == HOSTS[2:]
    deployment.heal_cell("cell1")
    assert names(await hypervisors(deployment.admin)) == HOSTS
