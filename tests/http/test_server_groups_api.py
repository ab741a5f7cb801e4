"""Server groups over HTTP: their shape at each microversion, whose they are, and what is refused."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from starlette.datastructures import QueryParams

from cellway.context import RequestContext
from cellway.errors import Invalid
from cellway.http import server_groups as handlers
from cellway.http.routes import Handler
from cellway.http.wire import Call
from cellway.ids import ProjectId, RequestId, UserId
from cellway.testing import TINY_IMAGE, Client, Deployment

pytestmark = pytest.mark.anyio

RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
NEW: dict[str, Any] = {"name": "web", "policies": ["anti-affinity"]}
SERVER: dict[str, Any] = {"name": "s", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}


@pytest.fixture(scope="module")
async def member(shared: Deployment, anyio_backend: str) -> AsyncIterator[Client]:
    """A member of a project of this file's own."""
    client = await shared.add_user("groups-member", "groups", "member")
    yield client
    for server in (await client.get("/servers")).json["servers"]:
        await shared.admin.delete(f"/servers/{server['id']}")


async def made(client: Client, **more: Any) -> dict[str, Any]:
    """Make a group and return it."""
    answer = await client.post("/os-server-groups", {"server_group": NEW | more})
    assert answer.status == 200, answer.body
    group: dict[str, Any] = answer.json["server_group"]
    return group


async def test_a_group_at_each_microversion(member: Client) -> None:
    """2.13 brings its owner; what create answers is what show and list give."""
    for version, more in (("2.1", set()), ("2.12", set()), ("2.13", {"project_id", "user_id"}), ("2.53", {"user_id"})):
        client = member.at(version)
        group = await made(client)
        assert set(group) - {"project_id", "user_id"} == {"id", "name", "policies", "members", "metadata"}
        assert more <= set(group)
        assert (more == set()) == ("project_id" not in group)
        assert (group["name"], group["policies"], group["members"], group["metadata"]) == (
            "web",
            ["anti-affinity"],
            [],
            {},
        )
        assert (await client.get(f"/os-server-groups/{group['id']}")).json == {"server_group": group}
        assert (await client.get(f"/os-server-groups/{group['id'].upper()}")).json == {"server_group": group}
        assert (await client.get("/os-server-groups")).json == {"server_groups": [group]}
        answer = await client.delete(f"/os-server-groups/{group['id']}")
        assert (answer.status, answer.body) == (204, b"")
        assert (await client.get(f"/os-server-groups/{group['id']}")).status == 404
        assert (await client.delete(f"/os-server-groups/{group['id']}")).status == 404


async def test_soft_policies_come_with_2_15(member: Client) -> None:
    """Before it they are refused."""
    for policy in ("soft-affinity", "soft-anti-affinity"):
        body = {"server_group": {"name": "soft", "policies": [policy]}}
        assert (await member.at("2.14").post("/os-server-groups", body)).status == 400
        answer = await member.at("2.15").post("/os-server-groups", body)
        assert answer.json["server_group"]["policies"] == [policy]
        await member.delete(f"/os-server-groups/{answer.json['server_group']['id']}")


@pytest.mark.parametrize(
    "group",
    [
        None, {}, [], "web", {"name": "web"}, {"policies": ["affinity"]}, NEW | {"policies": []},
        NEW | {"policies": "affinity"}, NEW | {"policies": ["affinity", "anti-affinity"]}, NEW | {"policies": [""]},
        NEW | {"policies": ["affinity", "affinity"]}, NEW | {"policies": ["legacy"]}, NEW | {"policies": [None]},
        NEW | {"name": ""}, NEW | {"name": " a"}, NEW | {"name": "a" * 256}, NEW | {"name": "a\nb"}, NEW | {"name": 1},
        NEW | {"name": "\x00"}, NEW | {"metadata": {}}, NEW | {"rules": {}}, NEW | {"policy": "affinity"},
        {"name": "web", "policy": "affinity"},
    ],
)  # fmt: skip
async def test_a_bad_group_is_refused(member: Client, group: Any) -> None:
    """Exactly a name and a list of one policy make a group, before 2.64."""
    answer = await member.post("/os-server-groups", {"server_group": group})
    assert (answer.status, list(answer.json)) == (400, ["badRequest"])
    assert (await member.post("/os-server-groups", {"server_group": NEW, "more": 1})).status == 400
    assert (await member.get("/os-server-groups")).json == {"server_groups": []}


async def test_lists_have_pages(member: Client, shared: Deployment) -> None:
    """`limit` and `offset` cut a list, and numbers that are none are refused."""
    groups = [(await made(member, name=name))["id"] for name in ("a", "b", "c")]

    async def listed(query: str, client: Client = member) -> list[str]:
        answer = await client.get(f"/os-server-groups?{query}")
        assert answer.status == 200, answer.body
        return [group["id"] for group in answer.json["server_groups"]]

    assert await listed("") == groups
    assert await listed("limit=2") == groups[:2]
    assert await listed("limit=2&offset=1") == groups[1:]
    assert await listed("limit=0") == groups
    assert await listed("offset=3") == []
    assert await listed("all_projects=True") == groups
    assert set(groups).isdisjoint(await listed("", shared.admin))
    assert set(groups) <= set(await listed("all_projects", shared.admin))
    for query in ("limit=-1", "offset=-1", "limit=a", "offset=a", "offset=99999999999999"):
        assert (await member.get(f"/os-server-groups?{query}")).status == 400
    for group in groups:
        await member.delete(f"/os-server-groups/{group}")


async def test_anothers_group_is_as_none(member: Client, shared: Deployment) -> None:
    """It is not shown, deleted or joined; an admin sees and deletes it, and joins it no more than others."""
    group = (await made(member))["id"]
    for path in (group, RANDOM, "web", "x" * 300):
        for method in ("GET", "DELETE"):
            assert (await shared.member.request(method, f"/os-server-groups/{path}")).status == 404
    for client in (shared.member, shared.admin):
        texts = []
        for hint in (group, RANDOM):
            answer = await client.post("/servers", {"server": SERVER, "os:scheduler_hints": {"group": hint}})
            assert answer.status == 400
            texts.append(answer.body.decode().replace(hint, "ID"))
        assert texts[0] == texts[1]
    assert (await shared.admin.get(f"/os-server-groups/{group}")).status == 200
    assert (await shared.admin.delete(f"/os-server-groups/{group}")).status == 204


async def test_both_names_of_the_hints_are_heard(member: Client, shared: Deployment) -> None:
    """The newer one wins when both are there, and hints that are not known change nothing."""
    group, other = (await made(member))["id"], (await made(member))["id"]
    hints: tuple[dict[str, Any], ...] = (
        {"os:scheduler_hints": {"group": group}},
        {"OS-SCH-HNT:scheduler_hints": {"group": group}},
        {"os:scheduler_hints": {"group": group}, "OS-SCH-HNT:scheduler_hints": {"group": other}},
        {"os:scheduler_hints": {"group": group.upper(), "same_host": [RANDOM], "query": "[]", "mine": {"a": 1}}},
        {"os:scheduler_hints": {"mine": 1}, "OS-SCH-HNT:scheduler_hints": {"group": other}},
        {"os:scheduler_hints": {}},
    )
    servers = []
    for hint in hints:
        answer = await member.post("/servers", {"server": SERVER, **hint})
        assert answer.status == 202, answer.body
        servers.append(answer.json["server"]["id"])
    assert (await member.get(f"/os-server-groups/{group}")).json["server_group"]["members"] == servers[:4]
    assert (await member.get(f"/os-server-groups/{other}")).json["server_group"]["members"] == []
    for server in servers:
        assert (await member.delete(f"/servers/{server}")).status == 204
    assert (await member.get(f"/os-server-groups/{group}")).json["server_group"]["members"] == []
    for server in servers:
        await shared.until_gone(server, member)
    for uuid in (group, other):
        assert (await member.delete(f"/os-server-groups/{uuid}")).status == 204


@pytest.mark.parametrize(
    "hints",
    [
        None, [], "group", {"group": None}, {"group": 1}, {"group": [RANDOM]}, {"group": "web"}, {"group": ""},
        {"group": RANDOM + "0"}, {"group": RANDOM},
    ],
)  # fmt: skip
async def test_a_bad_hint_is_refused(member: Client, hints: Any) -> None:
    """A group that is not there, or can be none, makes no server."""
    for name in ("os:scheduler_hints", "OS-SCH-HNT:scheduler_hints"):
        answer = await member.post("/servers", {"server": SERVER, name: hints})
        assert (answer.status, list(answer.json)) == (400, ["badRequest"])
    assert (await member.get("/servers")).json == {"servers": []}


# ---- what is not advertised yet --------------------------------------------------------------------------------


async def at_2_64(shared: Deployment, handler: Handler, body: Any = None, **path: str) -> Any:
    """Call a handler as 2.64 would, and return what it answers."""
    services = shared.app.open_services(shared.identity)
    context = RequestContext(
        user_id=UserId("alice"),
        project_id=ProjectId("later"),
        request_id=RequestId("req-1"),
        roles=frozenset({"member", "reader"}),
    )
    rule = "os_compute_api:os-server-groups:show"
    answer = await handler(Call(context, 64, rule, path, QueryParams(), msgspec.json.encode(body), services))
    return msgspec.json.decode(answer.body) if answer.body else None


async def test_one_policy_with_rules_from_2_64(shared: Deployment) -> None:
    """A policy instead of a list, rules instead of metadata; only anti-affinity has one."""
    three = {"max_server_per_host": 3}
    cases: tuple[tuple[Any, Any], ...] = (({}, {}), (three, three), ({"max_server_per_host": "3"}, three))
    for rules, shown in cases:
        new = {"name": "web", "policy": "anti-affinity", "rules": rules}
        group = (await at_2_64(shared, handlers.create, {"server_group": new}))["server_group"]
        assert group == {
            "id": group["id"], "name": "web", "policy": "anti-affinity", "rules": shown, "members": [],
            "project_id": "later", "user_id": "alice",
        }  # fmt: skip
        assert await at_2_64(shared, handlers.show, id=group["id"]) == {"server_group": group}
        assert await at_2_64(shared, handlers.index) == {"server_groups": [group]}
        await at_2_64(shared, handlers.delete, id=group["id"])
    soft = {"server_group": {"name": "web", "policy": "soft-affinity"}}
    assert (await at_2_64(shared, handlers.create, soft))["server_group"]["rules"] == {}


BAD_RULES: list[Any] = [
    None, [], {"more": 1}, {"max_server_per_host": 0}, {"max_server_per_host": "0"},
    {"max_server_per_host": -1}, {"max_server_per_host": 1.5}, {"max_server_per_host": 1 << 31},
    {"max_server_per_host": "9" * 400}, {"max_server_per_host": "١"}, {"max_server_per_host": None},
]  # fmt: skip


@pytest.mark.parametrize(
    "group",
    [
        {"name": "web"}, {"name": "web", "policies": ["affinity"]}, {"name": "web", "policy": "legacy"},
        {"name": "web", "policy": "affinity", "rules": {"max_server_per_host": 1}},
        *({"name": "web", "policy": "anti-affinity", "rules": rules} for rules in BAD_RULES),
    ],
)  # fmt: skip
async def test_a_bad_group_is_refused_from_2_64(shared: Deployment, group: Any) -> None:
    """Rules are for anti-affinity alone, and a positive number."""
    with pytest.raises(Invalid):
        await at_2_64(shared, handlers.create, {"server_group": group})
