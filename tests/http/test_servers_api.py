"""Servers over HTTP: made in every way, listed in every order, changed, acted on, remembered, and without one cell."""

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cellway import builds
from cellway.testing import QUICK, TINY_IMAGE, Client, Deployment, deployment

pytestmark = pytest.mark.anyio

RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd"
GOOD: dict[str, Any] = {"name": "one", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}


@pytest.fixture(scope="module")
async def member(shared: Deployment, anyio_backend: str) -> AsyncIterator[Client]:
    """A member of a project of this file's own."""
    client = await shared.add_user("servers-member", "servers", "member")
    yield client
    for server in (await client.get("/servers")).json["servers"]:
        await shared.admin.delete(f"/servers/{server['id']}")


async def shown(client: Client, server: str) -> Any:
    """Return a server as its owner sees it."""
    answer = await client.get(f"/servers/{server}")
    assert answer.status == 200, answer.body
    return answer.json["server"]


async def ready(shared: Deployment, client: Client, name: str, **more: Any) -> str:
    """Boot a server and wait until it runs."""
    server = await shared.boot(name, client, **more)
    await shared.until_status(server, "ACTIVE", client)
    return server


async def ids(client: Client, query: str) -> list[str]:
    """Return the ids that both lists give for a query."""
    answers = [await client.get(f"{path}?{query}") for path in ("/servers", "/servers/detail")]
    assert [answer.status for answer in answers] == [200, 200], answers[0].body
    brief, full = ([server["id"] for server in answer.json["servers"]] for answer in answers)
    assert brief == full
    return brief


async def act(client: Client, server: str, action: str, argument: Any = None) -> int:
    """Act on a server and return the status of the answer."""
    return (await client.post(f"/servers/{server}/action", {action: argument})).status


# ---- create ----------------------------------------------------------------------------------------------------


async def test_the_answer_to_a_create(member: Client) -> None:
    """A create is accepted with the id, where the server will be found, and a password."""
    answer = await member.post("/servers", {"server": GOOD | {"adminPass": "chosen"}})
    assert answer.status == 202
    made = answer.json["server"]
    assert set(made) == {"id", "links", "OS-DCF:diskConfig", "security_groups", "adminPass"}
    assert made["adminPass"] == "chosen"
    assert made["security_groups"] == [{"name": "default"}]
    assert answer.headers["location"] == made["links"][0]["href"]
    assert answer.headers["location"].endswith(f"/v2.1/servers/{made['id']}")
    first = await shown(member, made["id"])
    assert first["id"] == made["id"]
    again = (await member.post("/servers", {"server": GOOD})).json["server"]
    assert again["id"] != made["id"]
    assert again["adminPass"]


async def test_a_server_shows_what_it_was_made_with(shared: Deployment, member: Client) -> None:
    """Everything that a create takes is shown by the server, before it is placed and after."""
    await member.post("/os-keypairs", {"keypair": {"name": "made-with", "public_key": KEY}})
    data = base64.b64encode(b"#!/bin/sh\n").decode()
    wanted: dict[str, Any] = {
        "description": "für alle", "metadata": {"a": "1", "b": ""}, "tags": ["z", "a", "z"], "key_name": "made-with",
        "user_data": data, "config_drive": "True", "accessIPv4": "192.0.2.7", "accessIPv6": "2001:DB8::7",
        "availability_zone": "nova", "OS-DCF:diskConfig": "AUTO", "security_groups": [{"name": "default"}],
    }  # fmt: skip
    server = await shared.boot("Made With ☂", member, **wanted)
    expected = {
        "name": "Made With ☂", "description": "für alle", "metadata": {"a": "1", "b": ""}, "tags": ["a", "z"],
        "key_name": "made-with", "config_drive": "True", "accessIPv4": "192.0.2.7", "accessIPv6": "2001:db8::7",
        "OS-EXT-AZ:availability_zone": "nova", "OS-DCF:diskConfig": "AUTO",
    }  # fmt: skip
    first = await shown(member, server)
    assert expected.items() <= first.items()
    last = await shared.until_status(server, "ACTIVE", member)
    assert expected.items() <= last.items()
    admins = await shown(shared.admin, server)
    assert admins["OS-EXT-SRV-ATTR:user_data"] == data
    assert admins["OS-EXT-SRV-ATTR:hostname"] == "made-with"
    assert admins["OS-EXT-SRV-ATTR:root_device_name"] == "/dev/vda"


async def test_many_servers_of_one_request(shared: Deployment, member: Client) -> None:
    """A request for several servers numbers them, under one reservation, which it returns if asked to."""
    answer = await member.post("/servers", {"server": GOOD | {"name": "many", "min_count": "2", "max_count": 3}})
    assert answer.status == 202
    assert sorted([(await shown(member, one))["name"] for one in await ids(member, "name=^many-")]) == [
        "many-1", "many-2", "many-3",
    ]  # fmt: skip
    body = {"server": GOOD | {"name": "lot", "min_count": 2, "return_reservation_id": True}}
    answer = await member.post("/servers", body)
    assert (answer.status, set(answer.json)) == (202, {"reservation_id"})
    found = await ids(member, f"reservation_id={answer.json['reservation_id']}")
    assert len(found) == 2
    for server in found:
        await shared.until_status(server, "ACTIVE", member)
    assert sorted(await ids(member, f"reservation_id={answer.json['reservation_id']}")) == sorted(found)
    views = [await shown(shared.admin, server) for server in found]
    assert {view["OS-EXT-SRV-ATTR:launch_index"] for view in views} == {0, 1}


async def test_the_image_as_a_block_device(shared: Deployment, member: Client) -> None:
    """Clients may send the image as a block device too, or alone; either way it is the server's image."""
    device = {
        "uuid": TINY_IMAGE, "boot_index": 0, "source_type": "image", "destination_type": "local",
        "delete_on_termination": True,
    }  # fmt: skip
    for image in (TINY_IMAGE, ""):
        body = GOOD | {"imageRef": image, "block_device_mapping_v2": [device]}
        answer = await member.post("/servers", {"server": body})
        assert answer.status == 202, answer.body
        assert (await shown(member, answer.json["server"]["id"]))["image"]["id"] == TINY_IMAGE


@pytest.mark.parametrize(
    ("version", "networks", "status"),
    [
        ("2.1", None, 202), ("2.36", None, 202), ("2.36", [], 202), ("2.37", [], 202), ("2.37", "auto", 202),
        ("2.37", "none", 202), ("2.53", "auto", 202), ("2.36", "auto", 400), ("2.37", None, 400),
        ("2.1", [{"uuid": RANDOM}], 400), ("2.53", [{"port": RANDOM}], 400), ("2.53", "AUTO", 400), ("2.53", {}, 400),
    ],
)  # fmt: skip
async def test_networks_as_each_version_has_them(member: Client, version: str, networks: Any, status: int) -> None:
    """Until 2.36 networks may be left out; from 2.37 they are required, and may be auto or none."""
    body = {key: value for key, value in (GOOD | {"networks": networks}).items() if value is not None}
    assert (await member.at(version).post("/servers", {"server": body})).status == status


@pytest.mark.parametrize(("key", "value", "since"), [("description", "d", 19), ("tags", ["t"], 52)])
async def test_what_a_version_adds_is_unknown_before(member: Client, key: str, value: Any, since: int) -> None:
    """A key is refused until the version that brings it."""
    body = {name: content for name, content in GOOD.items() if name != "networks"} if since <= 37 else GOOD
    assert (await member.at(f"2.{since - 1}").post("/servers", {"server": body | {key: value}})).status == 400
    assert (await member.at(f"2.{since}").post("/servers", {"server": body | {key: value}})).status == 202


async def test_a_flavor_and_an_image_may_be_addresses(member: Client) -> None:
    """References may be what older clients send: the links of the flavor and the image."""
    body = GOOD | {
        "flavorRef": "http://127.0.0.1:8774/compute/flavors/m1.tiny",
        "imageRef": f"http://127.0.0.1:8774/compute/images/{TINY_IMAGE}",
    }
    assert (await member.post("/servers", {"server": body})).status == 202


async def test_scheduler_hints_are_taken(member: Client) -> None:
    """Hints that nobody heeds are accepted in either of their two places."""
    for key in ("os:scheduler_hints", "OS-SCH-HNT:scheduler_hints"):
        assert (await member.post("/servers", {"server": GOOD, key: {"build_near_host_ip": "10.0.0.1"}})).status == 202


async def test_only_an_admin_may_name_the_host(shared: Deployment, member: Client) -> None:
    """`zone:host` puts an admin's server there, and is refused to a member."""
    answer = await member.post("/servers", {"server": GOOD | {"availability_zone": "nova:cell2-h1"}})
    assert answer.status == 403
    server = await shared.boot("placed", shared.admin, availability_zone="nova:cell2-h1")
    placed = await shared.until_status(server, "ACTIVE", shared.admin)
    assert placed["OS-EXT-SRV-ATTR:host"] == "cell2-h1"
    assert placed["OS-EXT-AZ:availability_zone"] == "nova"
    await shared.admin.delete(f"/servers/{server}")


async def test_a_server_without_a_host_says_why(shared: Deployment, member: Client) -> None:
    """What no host can hold is an ERROR with a fault, whose details are for admins."""
    await shared.make_flavor("servers.huge", ram=10_000_000)
    server = await shared.boot("huge", member, flavor="servers.huge")
    buried = await shared.until_status(server, "ERROR", member)
    assert set(buried["fault"]) == {"code", "created", "message"}
    assert buried["fault"]["message"]
    assert "progress" not in buried
    assert buried["hostId"] == ""
    assert (await ids(member, "status=ERROR")) == [server]
    assert (await member.delete(f"/servers/{server}")).status == 204
    await shared.until_gone(server, member)


async def test_metadata_over_the_limit_is_over_quota(member: Client) -> None:
    """Too much metadata is the 403 that a quota gives."""
    metadata = {str(number): "v" for number in range(129)}
    assert (await member.post("/servers", {"server": GOOD | {"metadata": metadata}})).status == 403


# ---- list ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def fleet(shared: Deployment, anyio_backend: str) -> AsyncIterator[tuple[Client, dict[str, str]]]:
    """Seven servers of one project over both cells, one of them stopped, one paused, one in ERROR and one deleted."""
    client = await shared.add_user("lister", "lists", "member")
    await shared.make_flavor("lists.other")
    await shared.make_flavor("lists.huge", ram=10_000_000)
    made: dict[str, str] = {}
    for index, name in enumerate(("alpha", "bravo", "charlie", "delta", "echo")):
        made[name] = await shared.boot(
            name, client, tags=["all", name, *(["odd"] if index % 2 else [])], metadata={"index": str(index)}
        )
    made["foxtrot"] = await shared.boot("Foxtrot", client, flavor="lists.other")
    made["gone"] = await shared.boot("gone", client)
    for server in made.values():
        await shared.until_status(server, "ACTIVE", client)
    made["huge"] = await shared.boot("huge", client, flavor="lists.huge")
    await shared.until_status(made["huge"], "ERROR", client)
    assert await act(client, made["bravo"], "os-stop") == 202
    assert await act(client, made["delta"], "pause") == 202
    await client.delete(f"/servers/{made['gone']}")
    await shared.until_status(made["bravo"], "SHUTOFF", client)
    await shared.until_status(made["delta"], "PAUSED", client)
    await shared.until_gone(made["gone"], client)
    yield client, made
    for server in made.values():
        await shared.admin.delete(f"/servers/{server}")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("name=alpha", "alpha"),
        ("name=^.ravo$", "bravo"),
        ("name=^a.*a$", "alpha"),
        ("name=FOX", "foxtrot"),
        ("name=nothing", ""),
        ("status=ACTIVE", "alpha charlie echo foxtrot"),
        ("status=active&name=al", "alpha"),
        ("status=SHUTOFF", "bravo"),
        ("status=PAUSED&status=SHUTOFF", "bravo delta"),
        ("status=ERROR", "huge"),
        ("status=BUILD", ""),
        ("status=RESIZE", ""),
        ("flavor=lists.other", "foxtrot"),
        ("flavor=unknown", ""),
        (f"image={TINY_IMAGE}&name=alpha", "alpha"),
        (f"image={RANDOM}", ""),
        ("ip=192.0.2.1", ""),
        ("tags=all", "alpha bravo charlie delta echo"),
        ("tags=all,odd", "bravo delta"),
        ("tags-any=alpha,echo,none", "alpha echo"),
        ("not-tags=all", "foxtrot huge"),
        ("not-tags=all,odd", "alpha charlie echo foxtrot huge"),
        ("not-tags-any=odd,echo", "alpha charlie foxtrot huge"),
        ("tags=all&not-tags-any=odd&name=.h", "alpha charlie echo"),
        ("deleted=False", "alpha bravo charlie delta echo foxtrot huge"),
        ("deleted=True", "alpha bravo charlie delta echo foxtrot huge"),
        ("host=cell1-h1", "alpha bravo charlie delta echo foxtrot huge"),
        ("changes-since=2001-01-01T00:00:00Z", "alpha bravo charlie delta echo foxtrot gone huge"),
        ("changes-since=2999-01-01T00:00:00Z", ""),
        ("changes-since=2001-01-01T00:00:00%2B05:00&status=ACTIVE", "alpha charlie echo foxtrot"),
    ],
)
async def test_a_list_is_filtered(fleet: tuple[Client, dict[str, str]], query: str, expected: str) -> None:
    """Each filter keeps exactly its servers, alone and with others; what is not a member's to use changes nothing."""
    client, made = fleet
    assert set(await ids(client, query)) == {made[name] for name in expected.split()}


async def test_tags_do_not_filter_before_2_26(fleet: tuple[Client, dict[str, str]]) -> None:
    """Before there were tags their parameters meant nothing."""
    client, made = fleet
    assert len(await ids(client.at("2.25"), "tags=odd")) == len(made) - 1


async def test_what_only_an_admin_may_ask(shared: Deployment, fleet: tuple[Client, dict[str, str]]) -> None:
    """Other projects, deleted servers and hosts are for admins to list."""
    client, made = fleet
    project = (await shown(client, made["alpha"]))["tenant_id"]
    for query in ("all_tenants=1", "all_tenants", "all_tenants=True", "status=DELETED", "sort_key=host"):
        assert (await client.get(f"/servers?{query}")).status == 403, query
    live = {server for name, server in made.items() if name != "gone"}
    assert set(await ids(shared.admin, f"all_tenants=1&project_id={project}")) == live
    assert set(await ids(shared.admin, f"tenant_id={project}")) == live
    assert live <= set(await ids(shared.admin, "all_tenants=1"))
    assert not live & set(await ids(shared.admin, ""))
    assert not live & set(await ids(shared.admin, "all_tenants=0"))
    for query in ("deleted=True", "status=DELETED"):
        assert await ids(shared.admin, f"all_tenants=1&project_id={project}&{query}") == [made["gone"]]
    host = (await shown(shared.admin, made["alpha"]))["OS-EXT-SRV-ATTR:host"]
    assert made["alpha"] in await ids(shared.admin, f"all_tenants=1&host={host}")
    assert made["alpha"] not in await ids(shared.admin, "all_tenants=1&host=elsewhere")
    assert await ids(shared.admin, f"all_tenants=1&uuid={made['echo']}") == [made["echo"]]
    assert await ids(shared.admin, f"all_tenants=1&uuid={made['echo']}&flavor=unknown") == []
    assert set(await ids(shared.admin, f"tenant_id={project}&vm_state=stopped")) == {made["bravo"]}


async def test_a_list_is_sorted(fleet: tuple[Client, dict[str, str]]) -> None:
    """A list comes in the order asked for, over the servers of all cells and cell0."""
    client, made = fleet
    names = {server: name for name, server in made.items()}
    by_name = [names[one] for one in await ids(client, "sort_key=display_name&sort_dir=asc")]
    assert by_name in (sorted(by_name), ["foxtrot", *sorted(set(by_name) - {"foxtrot"})])
    backwards = [names[one] for one in await ids(client, "sort_key=display_name&sort_dir=desc")]
    assert backwards == by_name[::-1]
    states = [names[one] for one in await ids(client, "sort_key=vm_state&sort_key=display_name&sort_dir=asc")]
    assert [one for one in states if one not in ("bravo", "delta", "huge")] == [
        one for one in by_name if one not in ("bravo", "delta", "huge")
    ]
    assert states[-2:] == ["delta", "bravo"]
    newest = await client.get("/servers/detail")
    created = [server["created"] for server in newest.json["servers"]]
    assert created == sorted(created, reverse=True)


@pytest.mark.parametrize("query", ["", "sort_key=display_name&sort_dir=asc", "sort_key=launched_at", "name=a&limit=9"])
@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_pages_give_each_server_once(fleet: tuple[Client, dict[str, str]], query: str, limit: int) -> None:
    """Following the next links through all cells gives every server once, in the order of the whole list."""
    client, _made = fleet
    rest = query.removesuffix("&limit=9")
    whole = await ids(client, rest)
    for path in ("/servers", "/servers/detail"):
        seen: list[str] = []
        address: str | None = f"{path}?{rest}&limit={limit}"
        while address is not None:
            answer = await client.get(address)
            assert answer.status == 200, answer.body
            page = [server["id"] for server in answer.json["servers"]]
            assert len(page) <= limit
            seen += page
            links = answer.json.get("servers_links")
            assert (links is not None) == (len(page) == limit)
            address = links[0]["href"] if links else None
            assert address is None or (links[0]["rel"] == "next" and f"limit={limit}" in address)
        assert seen == whole


async def test_limit_zero_is_the_whole_page(fleet: tuple[Client, dict[str, str]]) -> None:
    """A limit of 0 means the server's own, as the incumbent's."""
    client, made = fleet
    assert len(await ids(client, "limit=0")) == len(made) - 1


async def test_pages_of_changes_pass_deleted_servers(fleet: tuple[Client, dict[str, str]]) -> None:
    """Who follows changes page by page may stop at a deleted server and go on from it."""
    client, made = fleet
    address: str | None = "/servers?changes-since=2001-01-01T00:00:00Z&limit=1"
    seen = set()
    while address is not None:
        answer = await client.get(address)
        assert answer.status == 200, answer.body
        seen |= {server["id"] for server in answer.json["servers"]}
        address = answer.json["servers_links"][0]["href"] if "servers_links" in answer.json else None
    assert seen == set(made.values())


# ---- change and delete -----------------------------------------------------------------------------------------


async def test_an_update_changes_what_it_names(shared: Deployment, member: Client) -> None:
    """An update sets what it names and leaves the rest; an unknown key, or one of a later version, is refused."""
    server = await ready(shared, member, "before", description="first")
    changes = {"name": "after", "accessIPv4": "192.0.2.1", "accessIPv6": "2001:db8::1", "OS-DCF:diskConfig": "AUTO"}
    answer = await member.put(f"/servers/{server}", {"server": changes})
    assert answer.status == 200
    assert changes.items() <= answer.json["server"].items()
    assert answer.json["server"]["description"] == "first"
    for given, kept in (("second", "second"), ("", ""), (None, None), ("d" * 255, "d" * 255)):
        await member.put(f"/servers/{server}", {"server": {"description": given}})
        assert (await shown(member, server))["description"] == kept
    await member.put(f"/servers/{server}", {"server": {"accessIPv4": ""}})
    assert changes | {"accessIPv4": ""} == {key: (await shown(member, server))[key] for key in changes}
    for refused in (
        {"name": ""}, {"name": "n" * 256}, {"name": " n"}, {"name": None}, {"status": "ACTIVE"}, {"accessIPv4": "x"},
        {"description": "d" * 256}, {"hostname": "h"}, {"OS-DCF:diskConfig": "maybe"},
    ):  # fmt: skip
        assert (await member.put(f"/servers/{server}", {"server": refused})).status == 400, refused
    early = await member.at("2.18").put(f"/servers/{server}", {"server": {"description": "d"}})
    assert early.status == 400
    assert (await shown(member, server))["name"] == "after"


async def test_a_delete_is_accepted_once(shared: Deployment, member: Client) -> None:
    """A deleted server is soon not found, by any call; an unknown one is not found at once."""
    server = await ready(shared, member, "short-lived")
    answer = await member.delete(f"/servers/{server}")
    assert (answer.status, answer.body) == (204, b"")
    await shared.until_gone(server, member)
    assert (await member.delete(f"/servers/{server}")).status == 404
    assert (await member.put(f"/servers/{server}", {"server": {"name": "n"}})).status == 404
    assert await act(member, server, "os-stop") == 404
    assert server not in await ids(member, "")
    assert (await member.delete(f"/servers/{RANDOM}")).status == 404


# ---- actions ---------------------------------------------------------------------------------------------------


async def test_a_server_goes_through_its_states(shared: Deployment, member: Client) -> None:
    """Every action leads where it should, and is a conflict from where it cannot start."""
    server = await ready(shared, member, "acted")
    for action, argument, status in (
        ("os-stop", None, "SHUTOFF"), ("os-start", None, "ACTIVE"), ("reboot", {"type": "SOFT"}, "ACTIVE"),
        ("reboot", {"type": "HARD"}, "ACTIVE"), ("pause", None, "PAUSED"), ("unpause", {}, "ACTIVE"),
        ("suspend", None, "SUSPENDED"), ("resume", None, "ACTIVE"), ("os-stop", None, "SHUTOFF"),
    ):  # fmt: skip
        answer = await member.post(f"/servers/{server}/action", {action: argument})
        assert (answer.status, answer.body) == (202, b""), (action, answer.body)
        await shared.until_status(server, status, member)
    for action in ("os-stop", "pause", "unpause", "suspend", "resume"):
        answer = await member.post(f"/servers/{server}/action", {action: None})
        assert answer.status == 409
        assert "vm_state stopped" in answer.json["conflictingRequest"]["message"]
    assert await act(member, server, "reboot", {"type": "SOFT"}) == 409


@pytest.mark.parametrize("action", ["resize", "rebuild", "createImage", "shelve", "migrate", "os-getConsoleOutput"])
async def test_what_is_not_served_says_so(member: Client, action: str) -> None:
    """An action of the API that there is not here is a 501, not an unknown one."""
    answer = await member.post(f"/servers/{RANDOM}/action", {action: {}})
    assert answer.status == 501
    assert action in answer.json["notImplemented"]["message"]


async def test_a_lock_keeps_its_owner_out(shared: Deployment, member: Client) -> None:
    """A locked server refuses what would change it until it is unlocked; an admin passes."""
    server = await ready(shared, member, "locked")
    assert await act(member, server, "lock") == 202
    assert (await shown(member, server))["locked"] is True
    for action in ("os-stop", "pause", "suspend"):
        assert await act(member, server, action) == 409
    assert (await member.delete(f"/servers/{server}")).status == 409
    assert (await member.post(f"/servers/{server}/metadata", {"metadata": {"a": "b"}})).status == 409
    assert await act(shared.admin, server, "reboot", {"type": "HARD"}) == 202
    await shared.until_status(server, "ACTIVE", member)
    assert await act(member, server, "unlock") == 202
    assert (await shown(member, server))["locked"] is False
    assert await act(member, server, "os-stop") == 202


async def test_an_admins_lock_is_not_its_owners_to_open(shared: Deployment, member: Client) -> None:
    """What an admin locked an admin unlocks."""
    server = await ready(shared, member, "sealed")
    assert await act(shared.admin, server, "lock") == 202
    assert await act(member, server, "unlock") == 403
    assert (await shown(member, server))["locked"] is True
    assert await act(shared.admin, server, "unlock") == 202
    assert await act(member, server, "os-stop") == 202


async def test_an_admin_sets_the_state_by_decree(shared: Deployment, member: Client) -> None:
    """Resetting a state changes what the server says of itself, both ways."""
    server = await ready(shared, member, "reset")
    assert await act(shared.admin, server, "os-resetState", {"state": "error"}) == 202
    assert (await shown(member, server))["status"] == "ERROR"
    assert await act(shared.admin, server, "os-resetState", {"state": "active"}) == 202
    assert (await shown(member, server))["status"] == "ACTIVE"


# ---- the record ------------------------------------------------------------------------------------------------


async def test_what_was_done_is_on_record(shared: Deployment, member: Client) -> None:
    """Each action is listed, the latest first, with who asked; its events are for admins before 2.51."""
    server = await ready(shared, member, "recorded")
    stopped = await member.post(f"/servers/{server}/action", {"os-stop": None})
    request = stopped.headers["x-openstack-request-id"]
    await shared.until_status(server, "SHUTOFF", member)
    listed = (await member.get(f"/servers/{server}/os-instance-actions")).json["instanceActions"]
    assert [one["action"] for one in listed] == ["stop", "create"]
    assert set(listed[0]) == {
        "action", "instance_uuid", "request_id", "user_id", "project_id", "start_time", "message",
    }  # fmt: skip
    assert (listed[0]["request_id"], listed[0]["instance_uuid"]) == (request, server)
    one = (await member.get(f"/servers/{server}/os-instance-actions/{request}")).json["instanceAction"]
    assert listed[0].items() <= one.items()
    assert [set(event) for event in one["events"]] == [{"event", "start_time", "finish_time", "result"}]
    early = await member.at("2.50").get(f"/servers/{server}/os-instance-actions/{request}")
    assert "events" not in early.json["instanceAction"]
    admins = await shared.admin.at("2.50").get(f"/servers/{server}/os-instance-actions/{request}")
    assert admins.json["instanceAction"]["events"][0]["result"] == "Success"
    assert "traceback" in admins.json["instanceAction"]["events"][0]
    assert (await member.get(f"/servers/{server}/os-instance-actions/req-{RANDOM}")).status == 404
    assert (await member.delete(f"/servers/{server}")).status == 204
    await shared.until_gone(server, member)
    left = (await member.get(f"/servers/{server}/os-instance-actions")).json["instanceActions"]
    assert [one["action"] for one in left][-2:] == ["stop", "create"]
    assert (await member.get(f"/servers/{server}/os-instance-actions/{request}")).status == 200
    assert (await member.at("2.20").get(f"/servers/{server}/os-instance-actions")).status == 404


# ---- one cell is down ------------------------------------------------------------------------------------------


async def _settled(shared: Deployment) -> bool:
    """Tell whether no build request is left: until then the API database knows of a server what its cell knows."""
    return not await shared.in_api(lambda tx: builds.list_requests(tx, None))


@pytest.mark.parametrize("how", ["refuse", "hang"])
async def test_a_broken_cell_takes_only_its_own_servers_away(tmp_path: Path, how: Any) -> None:
    """While one cell is down lists go without its servers, its own answer 503, the others serve, and deletes count."""
    async with deployment(tmp_path / "data", limits=replace(QUICK, database_deadline_seconds=3.0)) as running:
        await running.make_flavor()
        client = running.member
        mine: dict[str, str] = {}
        while set(mine) != {"cell1", "cell2"}:
            # Only admins may choose a host, so members' servers are spread until both cells have one.
            server = await ready(running, client, f"on-{how}")
            mine[(await shown(running.admin, server))["OS-EXT-SRV-ATTR:host"][:5]] = server
        doomed = await ready(running, client, "doomed")
        cell = (await shown(running.admin, doomed))["OS-EXT-SRV-ATTR:host"][:5]
        lost, kept = mine.pop(cell), mine.popitem()[1]
        await running.until(lambda: _settled(running))
        running.break_cell(cell, how)
        brief, full, *refused, kept_one, stopped, deleted = await asyncio.gather(
            client.get("/servers"),
            client.get("/servers/detail"),
            client.get(f"/servers/{lost}"),
            client.post(f"/servers/{lost}/action", {"os-stop": None}),
            client.put(f"/servers/{lost}", {"server": {"name": "n"}}),
            client.get(f"/servers/{kept}"),
            client.post(f"/servers/{kept}/action", {"os-stop": None}),
            client.delete(f"/servers/{doomed}"),
        )
        for listed in (brief, full):
            assert listed.status == 200
            seen = {server["id"] for server in listed.json["servers"]}
            assert kept in seen
            assert not {lost, doomed} & seen
        for answer in refused:
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert set(answer.json) == {"serviceUnavailable"}
            assert b"sqlite" not in answer.body
        assert (kept_one.status, stopped.status, deleted.status) == (200, 202, 204)
        running.heal_cell(cell)
        await running.until_gone(doomed, client)
        await running.until_status(kept, "SHUTOFF", client)
        await running.until_status(lost, "ACTIVE", client)
        assert lost in await ids(client, "")
