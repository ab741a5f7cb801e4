"""Flavors over HTTP: made and removed by admins, used by all who may, with extra specs and lists of projects."""

from typing import Any

import pytest

from cellway.testing import TINY_IMAGE, Client, Deployment

pytestmark = pytest.mark.anyio

KEYS = {
    "id", "name", "links", "ram", "disk", "swap", "vcpus", "OS-FLV-EXT-DATA:ephemeral", "OS-FLV-DISABLED:disabled",
    "os-flavor-access:is_public", "rxtx_factor",
}  # fmt: skip


async def make(shared: Deployment, name: str, **more: Any) -> Any:
    """Make a flavor and return it."""
    wanted = {"name": name, "ram": 64, "vcpus": 1, "disk": 1} | more
    answer = await shared.admin.post("/flavors", {"flavor": wanted})
    assert answer.status == 200, answer.body
    return answer.json["flavor"]


async def ids(client: Client, query: str = "") -> list[str]:
    """Return the ids that both lists give for a query."""
    answers = [await client.get(f"{path}?{query}") for path in ("/flavors", "/flavors/detail")]
    assert [answer.status for answer in answers] == [200, 200], answers[0].body
    brief, full = ([flavor["id"] for flavor in answer.json["flavors"]] for answer in answers)
    assert brief == full
    return brief


async def test_a_flavor_is_made_shown_and_removed(shared: Deployment) -> None:
    """A flavor shows what it was made with until it is removed; its id is a uuid when none is given."""
    made = await make(
        shared, "fl.one", id="fl-1", ram="128", swap=256, rxtx_factor=2.5, **{"OS-FLV-EXT-DATA:ephemeral": 3}
    )
    assert set(made) == KEYS
    assert made | {"links": []} == {
        "id": "fl-1", "name": "fl.one", "ram": 128, "disk": 1, "swap": 256, "vcpus": 1, "OS-FLV-EXT-DATA:ephemeral": 3,
        "OS-FLV-DISABLED:disabled": False, "os-flavor-access:is_public": True, "rxtx_factor": 2.5, "links": [],
    }  # fmt: skip
    assert (await shared.member.get("/flavors/fl-1")).json == {"flavor": made}
    assert made in (await shared.member.get("/flavors/detail")).json["flavors"]
    brief = (await shared.member.get("/flavors")).json["flavors"]
    assert {key: made[key] for key in ("id", "name", "links")} in brief
    for taken in ({"name": "fl.one", "id": "fl-2"}, {"name": "fl.two", "id": "fl-1"}):
        body = {"flavor": {"ram": 1, "vcpus": 1, "disk": 1} | taken}
        assert (await shared.admin.post("/flavors", body)).status == 409
    removed = await shared.admin.delete("/flavors/fl-1")
    assert (removed.status, removed.body) == (202, b"")
    assert (await shared.admin.get("/flavors/fl-1")).status == 404
    assert (await shared.admin.delete("/flavors/fl-1")).status == 404
    unnamed = await make(shared, "fl.auto", id=None)
    assert len(unnamed["id"]) == 36
    assert unnamed["swap"] == ""
    await shared.admin.delete(f"/flavors/{unnamed['id']}")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""}, {"name": "n" * 256}, {"name": " n"}, {"name": 1}, {"name": None}, {"ram": 0}, {"ram": -1},
        {"ram": 2**31}, {"ram": "x"}, {"ram": 1.5}, {"ram": None}, {"ram": "99999999999"}, {"vcpus": 0}, {"vcpus": "0"},
        {"disk": -1}, {"disk": True}, {"swap": -1}, {"OS-FLV-EXT-DATA:ephemeral": -1}, {"id": ""}, {"id": "a/b"},
        {"id": " a"}, {"id": "i" * 256}, {"id": []}, {"rxtx_factor": 0}, {"rxtx_factor": -1}, {"rxtx_factor": "x"},
        {"rxtx_factor": 1e39}, {"os-flavor-access:is_public": "perhaps"}, {"description": "not before 2.55"},
        {"colour": "red"}, {"OS-FLV-DISABLED:disabled": True},
    ],
)  # fmt: skip
async def test_a_flavor_that_cannot_be_is_a_400(shared: Deployment, changes: dict[str, Any]) -> None:
    """A flavor with one thing wrong is refused, and nothing is made."""
    body = {"flavor": {"name": "fl.bad", "ram": 1, "vcpus": 1, "disk": 1, "id": "fl-bad"} | changes}
    assert (await shared.admin.post("/flavors", body)).status == 400
    assert (await shared.admin.get("/flavors/fl-bad")).status == 404


async def test_flavors_are_filtered_sorted_and_paged(shared: Deployment) -> None:
    """Lists keep to the sizes asked for and come in the order asked for, page by page, each flavor once."""
    sizes = {"fl-p1": (9001, 7), "fl-p2": (9003, 5), "fl-p3": (9002, 9)}
    for flavor, (ram, disk) in sizes.items():
        await make(shared, f"name {flavor}", id=flavor, ram=ram, disk=disk)
    assert await ids(shared.member, "minRam=9001&minDisk=2") == ["fl-p1", "fl-p2", "fl-p3"]
    assert await ids(shared.member, "minRam=9001&minDisk=6") == ["fl-p1", "fl-p3"]
    assert await ids(shared.member, "minRam=9004&minDisk=2") == []
    assert await ids(shared.member, "minRam=9001&minDisk=2&sort_key=memory_mb&sort_dir=desc") == [
        "fl-p2",
        "fl-p3",
        "fl-p1",
    ]
    assert await ids(shared.member, "minRam=9001&minDisk=2&sort_key=root_gb") == ["fl-p2", "fl-p1", "fl-p3"]
    for path in ("/flavors", "/flavors/detail"):
        seen: list[str] = []
        address = f"{path}?minRam=9001&minDisk=2&sort_key=memory_mb&limit=1"
        while address:
            answer = (await shared.member.get(address)).json
            seen += [flavor["id"] for flavor in answer["flavors"]]
            address = answer["flavors_links"][0]["href"] if "flavors_links" in answer else ""
        assert seen == ["fl-p1", "fl-p3", "fl-p2"]
    for flavor in sizes:
        await shared.admin.delete(f"/flavors/{flavor}")


async def test_a_private_flavor_is_for_those_who_were_given_it(shared: Deployment) -> None:
    """A private flavor can be seen and booted by the projects on its list, and by no other."""
    guest = await shared.add_user("flavor-guest", "flavor-guests", "member")
    project = shared.identity.store.find_project_named("flavor-guests")
    assert project is not None
    await make(shared, "fl.private", id="fl-private", **{"os-flavor-access:is_public": False})
    access, path = "/flavors/fl-private/os-flavor-access", "/flavors/fl-private/action"
    wanted = {"name": "p", "flavorRef": "fl-private", "imageRef": TINY_IMAGE, "networks": "none"}
    assert (await shared.admin.get(access)).json == {"flavor_access": []}
    assert "fl-private" not in await ids(guest)
    assert "fl-private" not in await ids(shared.admin)
    assert "fl-private" in await ids(shared.admin, "is_public=None")
    assert "fl-private" in await ids(shared.admin, "is_public=False")
    assert (await guest.get("/flavors/fl-private")).status == 404
    assert (await guest.post("/servers", {"server": wanted})).status == 400
    given = await shared.admin.post(path, {"addTenantAccess": {"tenant": project.id}})
    listed = {"flavor_access": [{"flavor_id": "fl-private", "tenant_id": project.id}]}
    assert (given.status, given.json) == (200, listed)
    assert (await shared.admin.post(path, {"addTenantAccess": {"tenant": project.id}})).status == 409
    assert (await shared.admin.get(access)).json == listed
    assert "fl-private" in await ids(guest)
    assert (await guest.get("/flavors/fl-private")).status == 200
    server = await guest.post("/servers", {"server": wanted})
    assert server.status == 202
    taken = await shared.admin.post(path, {"removeTenantAccess": {"tenant": project.id}})
    assert (taken.status, taken.json) == (200, {"flavor_access": []})
    assert (await shared.admin.post(path, {"removeTenantAccess": {"tenant": project.id}})).status == 404
    assert "fl-private" not in await ids(guest)
    await shared.until_status(server.json["server"]["id"], "ACTIVE", guest)
    await shared.admin.delete("/flavors/fl-private")
    assert (await guest.get(f"/servers/{server.json['server']['id']}")).json["server"]["flavor"]["ram"] == 64


async def test_access_to_a_public_flavor(shared: Deployment) -> None:
    """A public flavor has no list of projects; adding to it is a conflict from 2.7."""
    assert (await shared.admin.get("/flavors/m1.tiny/os-flavor-access")).status == 404
    body = {"addTenantAccess": {"tenant": "somebody"}}
    assert (await shared.admin.post("/flavors/m1.tiny/action", body)).status == 409
    assert (await shared.admin.at("2.7").post("/flavors/m1.tiny/action", body)).status == 409
    assert (await shared.admin.at("2.6").post("/flavors/m1.tiny/action", body)).status == 200
    assert (await shared.admin.post("/flavors/none/action", body)).status == 404
    wrong: list[dict[str, Any]] = [
        {}, {"addTenantAccess": {}}, {"addTenantAccess": {"tenant": ""}}, {"addTenantAccess": {"tenant": "t", "x": 1}},
        {"explode": None}, body | {"removeTenantAccess": {"tenant": "somebody"}},
    ]  # fmt: skip
    for bad in wrong:
        assert (await shared.admin.post("/flavors/m1.tiny/action", bad)).status == 400
    await shared.admin.post("/flavors/m1.tiny/action", {"removeTenantAccess": {"tenant": "somebody"}})


async def test_extra_specs(shared: Deployment) -> None:
    """Extra specs are added, set, shown and removed one by one, as texts."""
    await make(shared, "fl.specs", id="fl-specs")
    path = "/flavors/fl-specs/os-extra_specs"
    answer = await shared.admin.post(path, {"extra_specs": {"hw:cpu_policy": "shared", "n": 2}})
    assert (answer.status, answer.json) == (200, {"extra_specs": {"hw:cpu_policy": "shared", "n": "2"}})
    answer = await shared.admin.put(f"{path}/n", {"n": "3"})
    assert (answer.status, answer.json) == (200, {"n": "3"})
    assert (await shared.member.get(path)).json == {"extra_specs": {"hw:cpu_policy": "shared", "n": "3"}}
    assert (await shared.member.get(f"{path}/n")).json == {"n": "3"}
    assert (await shared.admin.put(f"{path}/n", {"m": "3"})).status == 400
    assert (await shared.admin.put(f"{path}/n", {"n": "3", "m": "3"})).status == 400
    for bad in ({"": "v"}, {"k" * 256: "v"}, {"a/b": "v"}, {"k": "v" * 256}, {"k": None}, {"k": ["v"]}):
        assert (await shared.admin.post(path, {"extra_specs": bad})).status == 400, bad
    removed = await shared.admin.delete(f"{path}/n")
    assert (removed.status, removed.body) == (200, b"")
    for method in ("GET", "DELETE"):
        assert (await shared.admin.request(method, f"{path}/n")).status == 404
    server = await shared.boot("specified", flavor="fl-specs")
    built = await shared.until_status(server, "ACTIVE")
    assert built["flavor"]["extra_specs"] == {"hw:cpu_policy": "shared"}
    await shared.admin.delete("/flavors/fl-specs")
    for suffix in ("", "/hw:cpu_policy"):
        assert (await shared.admin.get(path + suffix)).status == 404
    await shared.member.delete(f"/servers/{server}")


async def test_a_flavor_that_says_no_disk_is_for_admins_to_boot(shared: Deployment) -> None:
    """A flavor without a disk limit boots an image for an admin alone."""
    await make(shared, "fl.diskless", id="fl-diskless", disk=0)
    wanted = {"name": "d", "flavorRef": "fl-diskless", "imageRef": TINY_IMAGE, "networks": "none"}
    assert (await shared.member.post("/servers", {"server": wanted})).status == 403
    answer = await shared.admin.post("/servers", {"server": wanted})
    assert answer.status == 202
    await shared.admin.delete(f"/servers/{answer.json['server']['id']}")
    await shared.admin.delete("/flavors/fl-diskless")
