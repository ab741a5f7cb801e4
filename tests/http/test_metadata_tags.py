"""A server's metadata and tags over HTTP, and that nothing of a server can be changed before it is built."""

from typing import Any
from urllib.parse import quote

import pytest

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio


class Server:
    """A server with its client. `path` is its address."""

    def __init__(self, deployment: Deployment, client: Client, uuid: str) -> None:
        self.deployment = deployment
        self.client = client
        self.path = f"/servers/{uuid}"

    async def metadata(self) -> dict[str, str]:
        """Return its metadata, which both addresses show alike."""
        alone = (await self.client.get(f"{self.path}/metadata")).json["metadata"]
        assert alone == (await self.client.get(self.path)).json["server"]["metadata"]
        return dict(alone)

    async def tags(self) -> list[str]:
        """Return its tags, which both addresses show alike."""
        alone = (await self.client.get(f"{self.path}/tags")).json["tags"]
        assert alone == (await self.client.get(self.path)).json["server"]["tags"]
        return list(alone)


@pytest.fixture(scope="module")
async def server(shared: Deployment, anyio_backend: str) -> Server:
    """A running server."""
    uuid = await shared.boot("labelled", metadata={"a": "1", "b": "2"}, tags=["one", "two"])
    await shared.until_status(uuid, "ACTIVE")
    return Server(shared, shared.member, uuid)


# ---- metadata --------------------------------------------------------------------------------------------------


async def test_metadata_is_merged_replaced_and_removed(server: Server) -> None:
    """POST adds to what there is, PUT of all replaces it, PUT of one sets one, DELETE removes one."""
    client, path = server.client, f"{server.path}/metadata"
    assert (await client.put(path, {"metadata": {"a": "1", "b": "2"}})).status == 200
    answer = await client.post(path, {"metadata": {"b": "3", "c": ""}})
    assert (answer.status, answer.json) == (200, {"metadata": {"a": "1", "b": "3", "c": ""}})
    assert await server.metadata() == {"a": "1", "b": "3", "c": ""}
    answer = await client.put(path, {"metadata": {"d": "☂" * 255}})
    assert (answer.status, answer.json) == (200, {"metadata": {"d": "☂" * 255}})
    answer = await client.put(f"{path}/e", {"meta": {"e": "5"}})
    assert (answer.status, answer.json) == (200, {"meta": {"e": "5"}})
    assert (await client.get(f"{path}/e")).json == {"meta": {"e": "5"}}
    answer = await client.delete(f"{path}/d")
    assert (answer.status, answer.body) == (204, b"")
    assert await server.metadata() == {"e": "5"}
    assert (await client.put(path, {"metadata": {}})).status == 200
    assert await server.metadata() == {}


@pytest.mark.parametrize("key", ["k" * 255, "a b", "A.b_c-d:e"])
async def test_a_metadata_key_names_its_own_address(server: Server, key: str) -> None:
    """Every key that may be set can be shown and deleted under it."""
    path = f"{server.path}/metadata"
    assert (await server.client.post(path, {"metadata": {key: "v"}})).status == 200
    assert (await server.client.get(f"{path}/{key}")).json == {"meta": {key: "v"}}
    assert (await server.client.delete(f"{path}/{key}")).status == 204


async def test_metadata_that_is_not_there_is_not_found(server: Server) -> None:
    """A key that the server lacks is neither shown nor deleted."""
    for method in ("GET", "DELETE"):
        assert (await server.client.request(method, f"{server.path}/metadata/none")).status == 404


@pytest.mark.parametrize(
    "body",
    [
        {}, {"metadata": None}, {"metadata": {"a": None}}, {"metadata": {"a": 1}}, {"metadata": {"a": {"b": "c"}}},
        {"metadata": {"": "v"}}, {"metadata": {"k" * 256: "v"}}, {"metadata": {"k": "v" * 256}},
        {"metadata": {"a/b": "v"}}, {"metadata": {"ä": "v"}}, {"metadata": {}, "more": 1}, {"meta": {"a": "b"}},
    ],
)  # fmt: skip
async def test_metadata_that_cannot_be_is_a_400(server: Server, body: Any) -> None:
    """Metadata are texts by keys of the incumbent's alphabet; nothing is changed by what is not."""
    before = await server.metadata()
    assert (await server.client.post(f"{server.path}/metadata", body)).status == 400
    assert (await server.client.put(f"{server.path}/metadata", body)).status == 400
    assert await server.metadata() == before


@pytest.mark.parametrize("body", [{}, {"meta": {}}, {"meta": {"b": "1"}}, {"meta": {"a": "1", "b": "1"}}])
async def test_one_key_at_its_own_address(server: Server, body: Any) -> None:
    """What is put at a key's address is that key and no other."""
    assert (await server.client.put(f"{server.path}/metadata/a", body)).status == 400


async def test_there_is_a_most_of_metadata(server: Server) -> None:
    """A server takes so many keys and no more, whichever way they come, and a refusal changes nothing."""
    path = f"{server.path}/metadata"
    most = {f"key{number}": "v" for number in range(128)}
    assert (await server.client.put(path, {"metadata": most})).status == 200
    for refused in (
        await server.client.post(path, {"metadata": {"another": "v"}}),
        await server.client.put(f"{path}/another", {"meta": {"another": "v"}}),
        await server.client.put(path, {"metadata": most | {"another": "v"}}),
    ):
        # The incumbent says 403 here, as for every quota.
        assert refused.status == 403
    assert await server.metadata() == most
    assert (await server.client.put(f"{path}/key1", {"meta": {"key1": "other"}})).status == 200
    assert (await server.client.put(path, {"metadata": {}})).status == 200


# ---- tags ------------------------------------------------------------------------------------------------------


async def test_tags_are_set_added_and_removed(server: Server) -> None:
    """PUT of all replaces, PUT of one adds and says whether it was new, DELETE removes one or all."""
    client, path = server.client, f"{server.path}/tags"
    answer = await client.put(path, {"tags": ["b", "a", "b"]})
    assert (answer.status, answer.json) == (200, {"tags": ["a", "b"]})
    answer = await client.put(f"{path}/c")
    assert (answer.status, answer.body) == (201, b"")
    assert answer.headers["location"].endswith(f"/v2.1{path}/c")
    assert (await client.put(f"{path}/c")).status == 204
    for tag, status in (("c", 204), ("C", 404), ("none", 404)):
        assert (await client.get(f"{path}/{tag}")).status == status
    assert await server.tags() == ["a", "b", "c"]
    assert (await client.delete(f"{path}/b")).status == 204
    assert (await client.delete(f"{path}/b")).status == 404
    assert await server.tags() == ["a", "c"]
    assert (await client.delete(path)).status == 204
    assert await server.tags() == []
    assert (await client.delete(path)).status == 204


@pytest.mark.parametrize("tag", ["a b", "ü☂", "t" * 60, "100%", "a&b=c;d"])
async def test_the_location_of_a_tag_is_an_address(server: Server, tag: str) -> None:
    """A tag of any characters is quoted in the Location, which then leads to it."""
    path = f"{server.path}/tags/{tag}"
    answer = await server.client.put(path)
    assert answer.status == 201
    assert answer.headers["location"].endswith(f"{server.path}/tags/{quote(tag, safe='')}")
    assert (await server.client.delete(path)).status == 204


@pytest.mark.parametrize(
    "tags",
    [None, "a", ["a", 1], [""], ["t" * 61], ["a,b"], ["a/b"], [str(number) for number in range(51)], {"a": "b"}],
)
async def test_tags_that_cannot_be_are_a_400(server: Server, tags: Any) -> None:
    """Tags are up to 50 short texts without commas and slashes; nothing is changed by what is not."""
    before = await server.tags()
    assert (await server.client.put(f"{server.path}/tags", {"tags": tags})).status == 400
    assert await server.tags() == before


async def test_a_tag_in_an_address_keeps_the_same_rules(server: Server) -> None:
    """A tag that is too long or has a comma is refused, and so is the 51st."""
    for tag in ("t" * 61, "a,b"):
        assert (await server.client.put(f"{server.path}/tags/{tag}")).status == 400
    fifty = [str(number) for number in range(50)]
    assert (await server.client.put(f"{server.path}/tags", {"tags": fifty})).status == 200
    assert (await server.client.put(f"{server.path}/tags/7")).status == 204
    assert (await server.client.put(f"{server.path}/tags/another")).status == 400
    assert (await server.client.delete(f"{server.path}/tags")).status == 204


# ---- a server that is being built ------------------------------------------------------------------------------


async def test_nothing_of_a_server_changes_while_it_is_built(unbuilt: Deployment) -> None:
    """A server that is accepted shows what it will be, and every change to it is a conflict until it is built."""
    uuid = await unbuilt.boot("early", metadata={"a": "b"}, tags=["t"])
    server = Server(unbuilt, unbuilt.member, uuid)
    shown = (await server.client.get(server.path)).json["server"]
    assert (shown["status"], shown["OS-EXT-STS:task_state"], shown["progress"]) == ("BUILD", "scheduling", 0)
    assert await server.metadata() == {"a": "b"}
    assert await server.tags() == ["t"]
    for method, path, body in (
        ("POST", "/metadata", {"metadata": {"c": "d"}}), ("PUT", "/metadata", {"metadata": {}}),
        ("PUT", "/metadata/a", {"meta": {"a": "c"}}), ("DELETE", "/metadata/a", None),
        ("PUT", "/tags", {"tags": []}), ("PUT", "/tags/u", None), ("DELETE", "/tags/t", None),
        ("DELETE", "/tags", None), ("PUT", "", {"server": {"name": "late"}}), ("POST", "/action", {"os-stop": None}),
        ("POST", "/action", {"lock": None}), ("POST", "/action", {"unlock": None}),
    ):  # fmt: skip
        answer = await server.client.request(method, server.path + path, body)
        assert (answer.status, set(answer.json)) == (409, {"conflictingRequest"}), (method, path)
    assert (await unbuilt.admin.post(f"{server.path}/action", {"os-resetState": {"state": "error"}})).status == 409
    assert (await server.client.get(server.path)).json["server"] == shown
    assert (await server.client.delete(server.path)).status == 204


async def test_lists_hold_what_is_not_built_yet(unbuilt: Deployment) -> None:
    """A server is listed, filtered, sorted and paged the same from the moment that it was accepted."""
    client = await unbuilt.add_user("early-lister", "early-lists", "member")
    made = {name: await unbuilt.boot(name, client, tags=[name, "all"]) for name in ("ant", "bee", "Cat")}
    for query, expected in (
        ("", "ant bee Cat"), ("name=^.E", "bee"), ("name=a", "ant Cat"), ("status=BUILD", "ant bee Cat"),
        ("status=ACTIVE", ""), ("tags=all,bee", "bee"), ("not-tags=bee", "ant Cat"), ("tags-any=ant,bee", "ant bee"),
        ("not-tags-any=ant,bee", "Cat"), ("flavor=m1.tiny", "ant bee Cat"), ("flavor=none", ""),
        ("changes-since=2001-01-01", "ant bee Cat"), ("changes-since=2999-01-01", ""), ("deleted=True", "ant bee Cat"),
    ):  # fmt: skip
        listed = (await client.get(f"/servers?{query}")).json["servers"]
        assert {server["name"] for server in listed} == set(expected.split()), query
    address, seen = "/servers?sort_key=created_at&sort_dir=asc&limit=1", []
    while address:
        answer = (await client.get(address)).json
        seen += [server["id"] for server in answer["servers"]]
        address = answer["servers_links"][0]["href"] if "servers_links" in answer else ""
    assert sorted(seen) == sorted(made.values())
