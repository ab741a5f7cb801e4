"""Usage over HTTP: what each project's servers took of a period, page by page, and what is refused."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio

PATH = "/os-simple-tenant-usage"
RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
SUMS = {
    "tenant_id",
    "total_hours",
    "total_vcpus_usage",
    "total_memory_mb_usage",
    "total_local_gb_usage",
    "start",
    "stop",
}
SERVER = {
    "name", "instance_id", "flavor", "hours", "vcpus", "memory_mb", "local_gb", "tenant_id", "started_at", "ended_at",
    "state", "uptime",
}  # fmt: skip


class Used(NamedTuple):
    """A member whose project had servers: one deleted, one that never ran, the rest running in both cells."""

    client: Client
    project: str
    running: list[str]
    deleted: str
    buried: str

    @property
    def all(self) -> list[str]:
        """Those that count, in the order of pages."""
        return sorted([*self.running, self.deleted])


@pytest.fixture(scope="module")
async def used(shared: Deployment, anyio_backend: str) -> AsyncIterator[Used]:
    """A project of this file's own."""
    client = await shared.add_user("usage-member", "usage", "member")
    await shared.make_flavor("usage.two", vcpus=2, ram=256, disk=3, **{"OS-FLV-EXT-DATA:ephemeral": 1})
    await shared.make_flavor("usage.huge", vcpus=100_000)
    running = [await shared.boot(f"usage-{number}", client, flavor="usage.two") for number in range(5)]
    buried = await shared.boot("usage-buried", client, flavor="usage.huge")
    for server in running:
        await shared.until_status(server, "ACTIVE", client)
    await shared.until_status(buried, "ERROR", client)
    deleted = running.pop()
    assert (await client.delete(f"/servers/{deleted}")).status == 204
    await shared.until_gone(deleted, client)
    project = (await client.get(f"/servers/{buried}")).json["server"]["tenant_id"]
    yield Used(client, project, running, deleted, buried)
    for server in (*running, buried):
        await client.delete(f"/servers/{server}")
    for flavor in ("usage.two", "usage.huge"):
        await shared.admin.delete(f"/flavors/{flavor}")


def now() -> datetime:
    """Return the time, as the API writes it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def since(**ago: float) -> str:
    """Return a query for the period from so long ago until now."""
    return f"start={(now() - timedelta(**ago)).isoformat()}"


async def of_project(client: Client, query: str, project: str) -> Any:
    """Return one project's part of the list of all."""
    answer = await client.get(f"{PATH}?{query}")
    assert answer.status == 200, answer.body
    return next((usage for usage in answer.json["tenant_usages"] if usage["tenant_id"] == project), None)


async def test_a_project_sees_what_its_servers_took(used: Used) -> None:
    """Running and deleted servers count with what they had, one that never ran does not; the sums are of the rows."""
    for version in ("2.1", "2.39", "2.40", "2.53"):
        answer = await used.client.at(version).get(f"{PATH}/{used.project}?{since(days=1)}")
        assert answer.status == 200, answer.body
        assert set(answer.json) == {"tenant_usage"}
        usage = answer.json["tenant_usage"]
        assert set(usage) == SUMS | {"server_usages"}
        rows = {row["instance_id"]: row for row in usage["server_usages"]}
        assert sorted(rows) == used.all
        for uuid, row in rows.items():
            assert set(row) == SERVER
            assert (row["tenant_id"], row["flavor"], row["vcpus"], row["memory_mb"]) == (
                used.project,
                "usage.two",
                2,
                256,
            )
            assert row["local_gb"] == 4
            assert row["name"].startswith("usage-")
            assert row["state"] == ("terminated" if uuid == used.deleted else "active")
            assert (row["ended_at"] is None) == (uuid != used.deleted)
            assert 0 <= row["hours"] < 1
            assert 0 <= row["uptime"] < 3600
        hours = sum(row["hours"] for row in rows.values())
        assert usage["total_hours"] == pytest.approx(hours)
        assert usage["total_vcpus_usage"] == pytest.approx(2 * hours)
        assert usage["total_memory_mb_usage"] == pytest.approx(256 * hours)
        assert usage["total_local_gb_usage"] == pytest.approx(4 * hours)


async def test_an_admin_sees_every_project(used: Used, shared: Deployment) -> None:
    """With servers where asked for, and without them the same sums, which the cells have made."""
    stop = now().isoformat()
    period = f"{since(days=1)}&end={stop}"
    for version in ("2.1", "2.53"):
        admin = shared.admin.at(version)
        plain = await of_project(admin, period, used.project)
        assert set(plain) == SUMS
        assert plain["stop"].startswith(stop[:10])
        for word in ("1", "True", "true"):
            detailed = await of_project(admin, f"{period}&detailed={word}", used.project)
            assert [row["instance_id"] for row in detailed["server_usages"]] == used.all
            for name in SUMS - {"tenant_id", "start", "stop"}:
                assert detailed[name] == pytest.approx(plain[name], abs=1e-5)
        for word in ("0", "False", "no", "2"):
            assert set(await of_project(admin, f"{period}&detailed={word}", used.project)) == SUMS
    other = (await shared.admin.get(f"{PATH}/{used.project}?{period}")).json["tenant_usage"]
    assert len(other["server_usages"]) == len(used.all)


async def test_pages_from_2_40(used: Used, shared: Deployment) -> None:
    """Following the links gives each server once, in one order over all cells, and the pages' sums add up."""
    stop = now().isoformat()
    path: str | None = f"{PATH}/{used.project}?{since(days=1)}&end={stop}&limit=2"
    whole = (await used.client.get(f"{PATH}/{used.project}?{since(days=1)}&end={stop}")).json["tenant_usage"]
    seen: list[str] = []
    hours = 0.0
    while path is not None:
        body = (await used.client.get(path)).json
        seen += [row["instance_id"] for row in body["tenant_usage"].get("server_usages", [])]
        hours += body["tenant_usage"].get("total_hours", 0.0)
        links = body.get("tenant_usage_links")
        assert links is None or [link["rel"] for link in links] == ["next"]
        path = links[0]["href"] if links else None
    assert seen == used.all
    assert hours == pytest.approx(whole["total_hours"], abs=1e-5)
    for detailed in (0, 1):
        body = (await shared.admin.get(f"{PATH}?{since(days=1)}&limit=1&detailed={detailed}")).json
        assert len(body["tenant_usages"]) == 1
        assert "marker=" in body["tenant_usages_links"][0]["href"]
        assert ("server_usages" in body["tenant_usages"][0]) == (detailed == 1)
    after = f"{PATH}/{used.project}?{since(days=1)}&marker={used.deleted}"
    rest = (await used.client.get(after)).json["tenant_usage"].get("server_usages", [])
    assert [row["instance_id"] for row in rest] == used.all[used.all.index(used.deleted) + 1 :]
    old = (await used.client.at("2.39").get(f"{after}&limit=1")).json
    assert len(old["tenant_usage"]["server_usages"]) == len(used.all)
    assert "tenant_usage_links" not in old


async def test_periods_without_anything(used: Used, shared: Deployment) -> None:
    """Before the first server, after now and for a project without any, usage is an empty object."""
    empty: dict[str, Any] = {"tenant_usage": {}}
    old = "start=2012-10-08T20:10:44.587336&end=2012-10-08T21:10:44"
    assert (await used.client.get(f"{PATH}/{used.project}?{old}")).json == empty
    assert (await shared.admin.get(f"{PATH}?{old}")).json == {"tenant_usages": []}
    assert (await shared.admin.get(f"{PATH}/nobody?{since(days=1)}")).json == empty
    future = (await used.client.get(f"{PATH}/{used.project}?start=9999-01-01T00:00:00&end=9999-02-01T00:00:00")).json
    assert future["tenant_usage"]["total_hours"] == pytest.approx(0, abs=1e-4)
    present = (await used.client.get(f"{PATH}/{used.project}")).json["tenant_usage"]
    assert present["total_hours"] == pytest.approx(0, abs=1e-4)
    assert len(present["server_usages"]) == len(used.running)


@pytest.mark.parametrize(
    "query",
    [
        "start=yesterday", "end=2012-13-01T00:00:00", "start=2012-10-08T20:10:44.5Q", "start=1349726644",
        "start=2012-10-08T20:10:44&end=2012-10-08T20:10:44", "start=2012-10-08T20:10:45&end=2012-10-08T20:10:44",
        "start=9999-01-01T00:00:00", "end=2012-10-08T20:10:44", "start=\u0661", "limit=-1", "limit=a",
        f"marker={RANDOM}", "marker=x", "marker=",
    ],
)  # fmt: skip
async def test_a_bad_query_is_refused(used: Used, shared: Deployment, query: str) -> None:
    """Times that are none or the wrong way round, and pages that are none."""
    query = query.encode().decode("latin-1")
    for client, path in ((used.client, f"{PATH}/{used.project}"), (shared.admin, f"{PATH}")):
        more = "&detailed=1" if "start" in query or "end" in query else f"&detailed=1&{since(days=1)}"
        answer = await client.get(f"{path}?{query}{more}")
        assert (answer.status, list(answer.json)) == (400, ["badRequest"])


async def test_usage_is_its_projects_own(used: Used, shared: Deployment) -> None:
    """Another project's usage is refused whether it exists or not, and so is its server as a marker."""
    for project in (used.project, "nobody"):
        assert (await shared.member.get(f"{PATH}/{project}?{since(days=1)}")).status == 403
    assert (await used.client.get(PATH)).status == 403
    server = await shared.boot("usage-other")
    await shared.until_status(server, "ACTIVE")
    assert (await used.client.get(f"{PATH}/{used.project}?{since(days=1)}&marker={server}")).status == 400
    await shared.member.delete(f"/servers/{server}")
    await shared.until_gone(server)


async def test_a_broken_cell_is_left_out(used: Used, shared: Deployment) -> None:
    """The other cells' servers are counted, and it is logged; cell0 is not asked at all."""
    placed = {
        uuid: (await shared.admin.get(f"/servers/{uuid}")).json["server"]["OS-EXT-SRV-ATTR:host"].partition("-")[0]
        for uuid in used.running
    }
    for cell in ("cell0", "cell1"):
        shared.break_cell(cell, "refuse")
    try:
        with capture_logs() as logs:
            usage = (await used.client.get(f"{PATH}/{used.project}?{since(days=1)}")).json["tenant_usage"]
    finally:
        for cell in ("cell0", "cell1"):
            shared.heal_cell(cell)
    seen = {row["instance_id"] for row in usage.get("server_usages", [])}
    assert seen - {used.deleted} == {uuid for uuid, cell in placed.items() if cell == "cell2"}
    assert [one["cell"] for one in logs if one["event"] == "cell_left_out_of_usage"] == ["cell1"]
