"""Commits whose answer is lost: the database has done it, nobody hears of it, and nothing happens twice or not at all.

A proxy stands between a deployment and its databases. It cuts the connection after the server has carried a COMMIT out.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.config import Limits, Secret
from cellway.db.api_tables import instance_mappings
from cellway.testing import QUICK, TINY_IMAGE, Deployment, deployment
from tests import proxy
from tests.databases import SERVERS, Shelf
from tests.functional.test_builds import check, no_claims, no_deletions
from tests.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ACCEPTED = rb"INSERT INTO server_charges.*COMMIT\b"
KEYED = rb"INSERT INTO idempotency_keys.*COMMIT\b"


@pytest.fixture(params=SERVERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server in turn."""
    return str(request.param)


@pytest.fixture
def way(kind: str, shelf: Shelf) -> Iterator[Proxy]:
    """A proxy before the server."""
    port = sa.make_url(shelf.take(kind, "api").reveal()).port
    assert port is not None
    with proxy.opened(port) as made:
        yield made


Start = Callable[..., Any]


@pytest.fixture
def start(kind: str, way: Proxy, shelf: Shelf, tmp_path: Path) -> Start:
    """Give a way to run a deployment whose databases are all behind the proxy."""

    def behind(name: str) -> Secret:
        url = sa.make_url(shelf.find(kind, name).reveal()).set(port=way.port)
        return Secret(url.render_as_string(hide_password=False))

    @asynccontextmanager
    async def run(limits: Limits = QUICK) -> AsyncIterator[Deployment]:
        for name in ("api", "cell0", "cell1", "cell2"):
            shelf.take(kind, name)
        async with deployment(tmp_path / "data", databases=behind, limits=limits) as running:
            await running.make_flavor()
            yield running
            # Before the end: closing waits for threads.
            way.heal()

    return run


async def ask_for(running: Deployment, name: str) -> tuple[int, str | None]:
    """Ask for a server; return the status and its id."""
    wanted = {"name": name, "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}
    answer = await running.member.post("/servers", {"server": wanted})
    return answer.status, answer.json["server"]["id"] if answer.status == 202 else None


async def listed(running: Deployment) -> dict[str, str]:
    """Return the name of every server by its id."""
    servers = (await running.member.get("/servers")).json["servers"]
    return {server["id"]: server["name"] for server in servers}


async def settled(running: Deployment) -> dict[str, str]:
    """Wait until nothing is under way any more, and return every server's status by its id."""
    await running.until(lambda: no_claims(running))
    await running.until(lambda: no_deletions(running))
    servers = (await running.member.get("/servers/detail")).json["servers"]
    return {server["id"]: server["status"] for server in servers}


@pytest.mark.parametrize("many", [4, pytest.param(100, marks=pytest.mark.slow)])
async def test_a_server_is_accepted_once(start: Start, way: Proxy, many: int) -> None:
    """Every request is answered 202 though the answer to its commit was lost, and each makes one server."""
    names = [f"s{number:03}" for number in range(many)]
    async with start() as running:
        way.cut(ACCEPTED, times=many)
        room = asyncio.Semaphore(4)

        async def one(name: str) -> tuple[int, str | None]:
            async with room:
                return await ask_for(running, name)

        answers = await asyncio.gather(*map(one, names))
        assert way.cuts == many
        way.heal()
        assert [status for status, _ in answers] == [202] * many
        assert await listed(running) == {uuid: name for name, (_, uuid) in zip(names, answers, strict=True)}
        states = await settled(running)
        assert set(states.values()) == {"ACTIVE"}
        await check(running, states)

        def mapped(tx: Any) -> set[str]:
            return set(tx.execute(sa.select(instance_mappings.c.instance_uuid)).scalars())

        assert await running.in_api(mapped) == set(states)


@pytest.mark.slow
async def test_a_commit_that_meets_the_deadline_is_looked_for_too(start: Start, way: Proxy) -> None:
    """When the connection stays open and silent, the deadline ends the wait, and the server is found."""
    async with start(replace(QUICK, database_deadline_seconds=10.0)) as running:
        way.cut(ACCEPTED, times=2, silently=True)
        answers = await asyncio.gather(*(ask_for(running, name) for name in ("a", "b")))
        assert way.cuts == 2
        way.heal()
        assert [status for status, _ in answers] == [202, 202]
        states = await settled(running)
        assert set(states) == {uuid for _, uuid in answers}
        await check(running, states)


async def test_a_commit_that_never_comes_through_is_an_outage(start: Start, way: Proxy) -> None:
    """While the database does not come back the answer is 503, and the request made one server or none."""
    async with start() as running:
        way.cut(ACCEPTED)
        asked = asyncio.ensure_future(ask_for(running, "a"))

        async def cut() -> bool:
            if way.cuts:
                way.refuse()
            return way.cuts > 0

        await running.until(cut)
        status, uuid = await asked
        way.heal()
        assert status in (202, 503)
        names = await running.until(lambda: found(running))
        assert list(names.values()) == ["a"]
        assert uuid is None or uuid in names
        await check(running, await settled(running))


async def found(running: Deployment) -> dict[str, str] | None:
    """Return the servers once the databases answer again."""
    answer = await running.member.get("/servers")
    return await listed(running) if answer.status == 200 else None


async def test_whatever_is_asked_for_happens_once(start: Start, way: Proxy) -> None:
    """Every other writing request is answered as if nothing had been lost: not 409, not 404, not 503."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl a@b"
    async with start() as running:
        admin, member = running.admin, running.member
        server = await running.boot("s")
        await running.until_status(server, "ACTIVE")
        await settled(running)
        service = (await admin.get("/os-services?binary=nova-compute")).json["services"][0]["id"]
        flavor = {"name": "new", "vcpus": 1, "ram": 512, "disk": 1, "id": "new"}
        new_group = {"server_group": {"name": "g", "policies": ["affinity"]}}
        group = (await member.post("/os-server-groups", new_group)).json["server_group"]["id"]
        address = f"/servers/{server}"
        for client, method, path, body, status in (
            (admin, "POST", "/flavors", {"flavor": flavor}, 200),
            (admin, "POST", "/flavors/new/os-extra_specs", {"extra_specs": {"a": "b"}}, 200),
            (admin, "DELETE", "/flavors/new/os-extra_specs/a", None, 200),
            (admin, "DELETE", "/flavors/new", None, 202),
            (member, "POST", "/os-keypairs", {"keypair": {"name": "k", "type": "ssh", "public_key": key}}, 201),
            (member, "DELETE", "/os-keypairs/k", None, 204),
            (member, "POST", "/os-server-groups", new_group, 200),
            (member, "DELETE", f"/os-server-groups/{group}", None, 204),
            (admin, "PUT", f"/os-services/{service}", {"status": "disabled"}, 200),
            (member, "PUT", address, {"server": {"name": "renamed"}}, 200),
            (member, "POST", f"{address}/metadata", {"metadata": {"a": "b"}}, 200),
            (member, "DELETE", f"{address}/metadata/a", None, 204),
            (member, "PUT", f"{address}/tags/t", None, 201),
            (member, "DELETE", f"{address}/tags/t", None, 204),
            (member, "POST", f"{address}/action", {"lock": None}, 202),
            (member, "POST", f"{address}/action", {"unlock": None}, 202),
            (member, "POST", f"{address}/action", {"os-stop": None}, 202),
        ):
            way.cut(KEYED, times=1)
            answer = await client.request(method, path, body)
            assert (method, path, answer.status, way.cuts) == (method, path, status, 1), answer.body
            way.heal()
            way.cuts = 0
        await running.until_status(server, "SHUTOFF")
        assert [action["action"] for action in await history(running, server)].count("stop") == 1
        way.cut(rb"INSERT INTO delete_requests.*COMMIT\b", times=1)
        assert (await member.delete(address)).status == 204
        assert way.cuts == 1
        way.heal()
        await running.until_gone(server)
        await settled(running)
        await check(running, {})


async def history(running: Deployment, server: str) -> list[dict[str, Any]]:
    """Return what was asked of a server."""
    actions: list[dict[str, Any]] = (await running.member.get(f"/servers/{server}/os-instance-actions")).json[
        "instanceActions"
    ]
    return actions


@pytest.mark.slow
async def test_builders_agents_and_deleters_go_on(start: Start, way: Proxy) -> None:
    """Whichever commits are lost on the way, builds and deletions come to their end, and nothing is left over."""
    async with start(replace(QUICK, claim_seconds=2.0, claim_renew_seconds=0.2)) as running:
        cuts = 0
        for number in range(10):
            way.cut(rb"COMMIT\b", times=10)
            status, uuid = await ask_for(running, f"s{number}")
            assert status in (202, 503)
            await running.until(lambda: reached(way, 10))
            cuts += way.cuts
            way.cuts = 0
            way.heal()
            if uuid is not None and number % 2:
                await running.until_status(uuid, "ACTIVE")
                way.cut(rb"COMMIT\b", times=10)
                assert (await running.member.delete(f"/servers/{uuid}")).status in (204, 503)
                await running.until(lambda: reached(way, 10))
                cuts += way.cuts
                way.cuts = 0
                way.heal()
        assert cuts >= 100
        states = await settled(running)
        names = list((await listed(running)).values())
        assert len(names) == len(set(names))
        assert set(states.values()) <= {"ACTIVE"}
        await check(running, states)


async def reached(way: Proxy, cuts: int) -> bool:
    """Tell whether so many commits were cut."""
    return way.cuts >= cuts
