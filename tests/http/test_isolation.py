"""One project never learns anything of another's: its things answer as things that do not exist."""

import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from cellway.http.actions import ACTIONS
from cellway.http.app import ROUTES
from cellway.testing import TINY_IMAGE, Client, Deployment, Response

pytestmark = pytest.mark.anyio

RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd"
NEW = {"name": "a", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}
_ID = re.compile(r"(req-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
BODIES: tuple[Any, ...] = (
    None,
    {},
    {"server": {"name": "mine"}},
    {"metadata": {"key": "mine"}},
    {"meta": {"key": "mine"}},
    {"tags": ["mine"]},
)


class Others(NamedTuple):
    """A member and a reader of another project, and what the first project has that they may not know of."""

    member: Client
    reader: Client
    servers: dict[str, str]
    flavor: str


@pytest.fixture(scope="module")
async def others(shared: Deployment, anyio_backend: str) -> AsyncIterator[Others]:
    """Another project, beside one that has a running, a locked, a deleted and a buried server."""
    member = await shared.add_user("stranger", "elsewhere", "member")
    reader = await shared.add_user("strange-reader", "elsewhere", "reader")
    flavor = await shared.make_flavor("private", **{"os-flavor-access:is_public": False})
    await shared.make_flavor("impossible", vcpus=100_000)
    servers = {
        name: await shared.boot(f"secret-{name}", metadata={"key": "secret"}, tags=["key"])
        for name in ("running", "locked", "deleted")
    }
    servers["buried"] = await shared.boot("secret-buried", flavor="impossible")
    for name in ("running", "locked", "deleted"):
        await shared.until_status(servers[name], "ACTIVE")
    await shared.until_status(servers["buried"], "ERROR")
    assert (await shared.member.post(f"/servers/{servers['locked']}/action", {"lock": None})).status == 202
    assert (await shared.member.delete(f"/servers/{servers['deleted']}")).status == 204
    await shared.until_gone(servers["deleted"])
    yield Others(member, reader, servers, flavor)
    await shared.admin.delete(f"/flavors/{flavor}")


def plain(answer: Response) -> tuple[int, dict[str, str], str]:
    """Return an answer without ids."""
    headers = {key: _ID.sub("ID", value) for key, value in answer.headers.items()}
    return answer.status, headers, _ID.sub("ID", answer.body.decode())


CALLS = sorted({(route.method, route.path) for route in ROUTES if "{server_id}" in route.path})


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_anothers_server_is_as_none(others: Others, method: str, path: str) -> None:
    """Every call about another project's server answers byte for byte as about an id that nobody has."""
    for client in (others.member, others.reader):
        for body in BODIES if method in ("POST", "PUT") else (None,):
            rest = {"key": "key", "tag": "key", "network": "none", "request_id": "req-1"}
            expected = plain(await client.request(method, path.format(server_id=RANDOM, **rest), body))
            assert 400 <= expected[0] < 500
            for server in others.servers.values():
                seen = plain(await client.request(method, path.format(server_id=server, **rest), body))
                assert seen == expected


@pytest.mark.parametrize("action", [*ACTIONS, "resize", "no-such-action"])
async def test_an_action_on_anothers_server_is_as_on_none(others: Others, action: str) -> None:
    """No action tells another project's server from none: not its state, its lock or its cell."""
    for argument in (None, {"type": "HARD"}, {"state": "active"}):
        for client in (others.member, others.reader):
            expected = plain(await client.post(f"/servers/{RANDOM}/action", {action: argument}))
            for server in others.servers.values():
                assert plain(await client.post(f"/servers/{server}/action", {action: argument})) == expected


async def test_nothing_that_was_refused_was_done(shared: Deployment, others: Others) -> None:
    """The server that the others tried everything on is as it was made."""
    shown = (await shared.member.get(f"/servers/{others.servers['running']}")).json["server"]
    assert (shown["name"], shown["status"], shown["metadata"]) == ("secret-running", "ACTIVE", {"key": "secret"})
    assert (shown["tags"], shown["locked"]) == (["key"], False)


@pytest.mark.parametrize("how", ["refuse", "hang"])
async def test_a_broken_cell_tells_nothing_either(shared: Deployment, others: Others, how: Any) -> None:
    """Whose cell is down does not matter to those who may not know of the server at all."""
    expected = plain(await others.member.get(f"/servers/{RANDOM}"))
    for cell in ("cell0", "cell1", "cell2"):
        shared.break_cell(cell, how)
    try:
        for name in ("running", "locked", "buried"):
            assert plain(await others.member.get(f"/servers/{others.servers[name]}")) == expected
    finally:
        for cell in ("cell0", "cell1", "cell2"):
            shared.heal_cell(cell)


async def test_no_list_shows_anothers_servers(others: Others) -> None:
    """Lists hold a project's own servers alone, whatever is filtered by."""
    server = others.servers["running"]
    for query in (
        "", "name=secret", f"uuid={server}", "tags=key", "deleted=True", "changes-since=2000-01-01", "project_id=demo",
        "tenant_id=demo", "all_tenants=0", "status=ERROR", "flavor=m1.tiny", "host=cell1-h1", "limit=1",
    ):  # fmt: skip
        for path in ("/servers", "/servers/detail"):
            answer = await others.member.get(f"{path}?{query}")
            assert (answer.status, answer.json) == (200, {"servers": []}), query
    assert (await others.member.get("/servers?all_tenants=1")).status == 403
    assert (await others.member.get("/servers/detail?all_tenants=1")).status == 403


async def test_a_marker_of_anothers_is_as_none(others: Others) -> None:
    """Paging from another project's server is refused as from an id that nobody has."""
    expected = plain(await others.member.get(f"/servers?marker={RANDOM}"))
    assert expected[0] == 400
    for server in others.servers.values():
        assert plain(await others.member.get(f"/servers?marker={server}")) == expected


async def test_a_private_flavor_is_as_none(others: Others) -> None:
    """A flavor that a project was not given cannot be seen, listed from, filtered by or booted."""
    for path in ("/flavors/{}", "/flavors/{}/os-extra_specs", "/flavors/{}/os-extra_specs/key", "/flavors?marker={}",
                 "/servers?flavor={}", "/flavors/{}/os-flavor-access"):  # fmt: skip
        seen, expected = [await others.member.get(path.format(flavor)) for flavor in (others.flavor, "missing")]
        assert seen.status == expected.status
        assert seen.body.decode().replace(others.flavor, "missing") == expected.body.decode()
    listed = (await others.member.get("/flavors?is_public=None")).json["flavors"]
    assert others.flavor not in [flavor["id"] for flavor in listed]
    seen, expected = [
        await others.member.post(
            "/servers",
            {"server": NEW | {"flavorRef": flavor}},
        )
        for flavor in (others.flavor, "missing")
    ]
    assert seen.status == expected.status == 400
    assert seen.body.decode().replace(others.flavor, "missing") == expected.body.decode()


async def test_anothers_keypair_is_as_none(shared: Deployment, others: Others) -> None:
    """Keypairs are their user's: neither shown, listed, deleted nor booted with by anybody else."""
    made = await shared.member.post("/os-keypairs", {"keypair": {"name": "secret-key", "public_key": KEY}})
    assert made.status == 201
    for method in ("GET", "DELETE"):
        seen = await others.member.request(method, "/os-keypairs/secret-key")
        expected = await others.member.request(method, "/os-keypairs/no-key")
        assert seen.status == expected.status == 404
        assert seen.body.decode().replace("secret-key", "no-key") == expected.body.decode()
    assert (await others.member.get("/os-keypairs")).json == {"keypairs": []}
    owner = (await shared.member.get(f"/servers/{others.servers['running']}")).json["server"]["user_id"]
    seen = await others.member.get(f"/os-keypairs?user_id={owner}")
    assert seen.status == (await others.member.get(f"/os-keypairs?user_id={RANDOM}")).status == 403
    seen, expected = [
        await others.member.post(
            "/servers",
            {"server": NEW | {"key_name": key}},
        )
        for key in ("secret-key", "no-key")
    ]
    assert (seen.status, seen.body) == (expected.status, expected.body)
    assert seen.status == 400
    assert (await shared.member.get("/os-keypairs/secret-key")).status == 200
