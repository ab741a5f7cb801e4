"""Microversions: how one is agreed on, what each shows of a server, and where the links lead."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cellway.db.engines import API
from cellway.http.app import Services, build
from cellway.http.policy import Policy
from cellway.testing import TINY_IMAGE, Client, Deployment, Response

pytestmark = pytest.mark.anyio

SERVICES = "OpenStack-API-Version"
LEGACY = "X-OpenStack-Nova-API-Version"
PUBLIC = "http://127.0.0.1:8774/compute"

ALWAYS = {
    "id", "name", "status", "tenant_id", "user_id", "metadata", "hostId", "image", "flavor", "created", "updated",
    "addresses", "accessIPv4", "accessIPv6", "links", "key_name", "config_drive", "progress", "OS-DCF:diskConfig",
    "OS-EXT-AZ:availability_zone", "OS-EXT-STS:task_state", "OS-EXT-STS:vm_state", "OS-EXT-STS:power_state",
    "OS-SRV-USG:launched_at", "OS-SRV-USG:terminated_at", "os-extended-volumes:volumes_attached",
}  # fmt: skip
ADMIN = {f"OS-EXT-SRV-ATTR:{name}" for name in ("host", "hypervisor_hostname", "instance_name")}
ADMIN_3 = {
    f"OS-EXT-SRV-ATTR:{name}"
    for name in "hostname kernel_id ramdisk_id launch_index reservation_id root_device_name user_data".split()
}
NEW = {9: {"locked"}, 19: {"description"}, 26: {"tags"}}
"""What each version adds for everybody."""
FLAVOR = {"vcpus", "ram", "disk", "ephemeral", "swap", "original_name", "extra_specs"}


def expected(minor: int, admin: bool) -> set[str]:
    """Return the keys of a running server at 2.`minor`."""
    keys = ALWAYS.union(*(added for since, added in NEW.items() if minor >= since))
    if admin:
        keys |= ADMIN | (ADMIN_3 if minor >= 3 else set()) | ({"host_status"} if minor >= 16 else set())
    return keys


@pytest.fixture(scope="module")
async def server(shared: Deployment, anyio_backend: str) -> str:
    """A running server of the member's."""
    made = await shared.boot("versions", metadata={"a": "b"})
    await shared.until_status(made, "ACTIVE")
    return made


@pytest.mark.parametrize("minor", [1, 2, 3, 8, 9, 15, 16, 18, 19, 25, 26, 46, 47, 53])
async def test_a_server_has_exactly_its_versions_keys(shared: Deployment, server: str, minor: int) -> None:
    """Each version shows neither more nor less, to a member and to an admin, in show and in the detailed list."""
    for client, admin in ((shared.member, False), (shared.admin, True)):
        at = client.at(f"2.{minor}")
        shown = (await at.get(f"/servers/{server}")).json["server"]
        listed = (await at.get("/servers/detail?all_tenants=1&name=versions" if admin else "/servers/detail")).json
        assert set(shown) == expected(minor, admin)
        assert shown in listed["servers"]
        assert set(shown["flavor"]) == (FLAVOR if minor >= 47 else {"id", "links"})


@pytest.mark.parametrize("minor", [1, 9, 19, 26, 53])
async def test_the_answer_to_an_update_is_the_shorter_view(shared: Deployment, server: str, minor: int) -> None:
    """Before 2.75 an update answers without what the extensions once added."""
    answer = await shared.admin.at(f"2.{minor}").put(f"/servers/{server}", {"server": {"name": "versions"}})
    gone = {key for key in expected(minor, True) if key.startswith(("OS-EXT-", "OS-SRV-", "os-extended"))}
    assert set(answer.json["server"]) == expected(minor, True) - gone - {"config_drive", "key_name", "host_status"}


async def test_the_values_of_a_running_server(shared: Deployment, server: str) -> None:
    """A server shows what it was made with, in the incumbent's forms."""
    shown = (await shared.member.get(f"/servers/{server}")).json["server"]
    some: dict[str, Any] = {
        "id": server, "name": "versions", "status": "ACTIVE", "metadata": {"a": "b"}, "addresses": {}, "accessIPv4": "",
        "accessIPv6": "", "key_name": None, "config_drive": "", "OS-DCF:diskConfig": "MANUAL", "tags": [],
        "OS-EXT-AZ:availability_zone": "nova", "OS-EXT-STS:task_state": None, "OS-EXT-STS:vm_state": "active",
        "OS-EXT-STS:power_state": 1, "OS-SRV-USG:terminated_at": None, "locked": False, "description": None,
    }  # fmt: skip
    assert some.items() <= shown.items()
    assert len(shown["created"]) == len("2013-09-03T04:01:32Z")
    assert shown["created"].endswith("Z")
    assert len(shown["OS-SRV-USG:launched_at"]) == len("2013-08-18T12:17:55.751757")
    assert len(shown["hostId"]) == 56
    assert shown["image"]["id"] == TINY_IMAGE
    assert shown["flavor"] == {
        "vcpus": 1, "ram": 512, "disk": 1, "ephemeral": 0, "swap": 0, "original_name": "m1.tiny",
        "extra_specs": shown["flavor"]["extra_specs"],
    }  # fmt: skip


async def test_a_description_is_the_name_before_2_19(shared: Deployment) -> None:
    """Until users could give one, a server's name was its description."""
    body = {"name": "described", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE}
    made = (await shared.member.at("2.18").post("/servers", {"server": body})).json["server"]["id"]
    assert (await shared.member.get(f"/servers/{made}")).json["server"]["description"] == "described"


# ---- agreeing on one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "spoken"),
    [
        ({}, "2.1"),
        ({SERVICES: "compute 2.1"}, "2.1"),
        ({SERVICES: "compute 2.53"}, "2.53"),
        ({SERVICES: "compute latest"}, "2.53"),
        ({SERVICES: "Compute  2.7"}, "2.7"),
        ({SERVICES: "volume 3.50, compute 2.26"}, "2.26"),
        ({SERVICES: "volume 3.50"}, "2.1"),
        ({LEGACY: "2.26"}, "2.26"),
        ({LEGACY: "latest"}, "2.53"),
        ({SERVICES: "compute 2.30", LEGACY: "2.9"}, "2.30"),
        ({SERVICES: "volume 3.50", LEGACY: "2.9"}, "2.9"),
    ],
)
async def test_the_version_asked_for_is_spoken(shared: Deployment, headers: dict[str, str], spoken: str) -> None:
    """Either header chooses the version, the newer one first; the answer says in both which it was."""
    for path in ("/servers", "//compute/", "/nothing"):
        answer = await shared.member.at(None).get(path, headers=headers)
        assert answer.headers["openstack-api-version"] == f"compute {spoken}"
        assert answer.headers["x-openstack-nova-api-version"] == spoken
        assert answer.headers["vary"] == "OpenStack-API-Version, X-OpenStack-Nova-API-Version"
        assert answer.headers["x-openstack-request-id"] == answer.headers["x-compute-request-id"]


@pytest.mark.parametrize("version", ["2.0", "2.54", "2.99999", "1.1", "3.0", "0.0"])
async def test_a_version_out_of_range_is_a_406(shared: Deployment, version: str) -> None:
    """What is not spoken is refused, with what is."""
    for headers in ({SERVICES: f"compute {version}"}, {LEGACY: version}):
        answer = await shared.member.at(None).get("/servers", headers=headers)
        assert answer.status == 406
        assert "2.53" in answer.json["notAcceptable"]["message"]
        assert "x-openstack-request-id" in answer.headers


@pytest.mark.parametrize(
    "version", ["", "2", "2.", ".1", "2.1.1", "two", "2.1x", "v2.1", "2.-1", "2.\xb2", "2.1 2.2", "9" * 500, "2,1"]
)
async def test_a_malformed_version_is_a_400(shared: Deployment, version: str) -> None:
    """What is not a version is refused."""
    assert (await shared.member.at(None).get("/servers", headers={LEGACY: version})).status == 400
    assert (await shared.member.at(None).get("/servers", headers={SERVICES: f"compute {version}"})).status == 400


async def test_every_request_has_its_own_id(shared: Deployment) -> None:
    """Two answers never bear the same request id, and the client's own id is not taken for it."""
    own = {"X-OpenStack-Request-ID": "req-11111111-1111-1111-1111-111111111111"}
    ids = {(await shared.member.get("/servers", headers=own)).headers["x-openstack-request-id"] for _ in range(5)}
    assert len(ids) == 5
    assert own["X-OpenStack-Request-ID"] not in ids


# ---- documents and links ---------------------------------------------------------------------------------------


async def test_the_versions_documents_need_no_token(shared: Deployment) -> None:
    """Clients learn the range of versions from either document, before they have a token."""
    nobody = Client(shared.port)
    for path in ("//compute", "//compute/"):
        answer = await nobody.get(path)
        assert answer.status == 200
        [version] = answer.json["versions"]
        assert (version["id"], version["status"]) == ("v2.1", "CURRENT")
        assert (version["min_version"], version["version"]) == ("2.1", "2.53")
        assert version["links"] == [{"rel": "self", "href": f"{PUBLIC}/v2.1/"}]
    for path in ("", "/"):
        answer = await nobody.get(path)
        assert answer.status == 200
        one = answer.json["version"]
        assert (one["id"], one["min_version"], one["version"]) == ("v2.1", "2.1", "2.53")
        assert one["media-types"] == [
            {"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2.1"}
        ]


def links_of(value: Any) -> Iterator[str]:
    """Return every address in an answer."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "href":
                yield inner
            else:
                yield from links_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from links_of(inner)


async def test_every_link_starts_with_the_public_endpoint(shared: Deployment, server: str) -> None:
    """Addresses come from the configuration, whatever the client calls this host."""
    app = shared.app
    services = Services(
        compute=app.open_compute(shared.identity), quotas=app.quotas, projects=shared.identity.store, hosts=app.hosts,
        api=app.databases.on(API), policy=Policy.load(None),
        limits=app.config.limits, clock=app.clock, ids=app.ids,
        compute_url="https://cloud.example/compute/v2.1", identity_url="https://cloud.example/identity",
    )  # fmt: skip
    outside = replace(shared.admin, app=build(services, shared.identity.tokens))
    forged = {"host": "evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "gopher"}
    seen: list[Response] = [
        await outside.get(path, headers=forged)
        for path in (
            "//compute/", "", f"/servers/{server}", "/servers?limit=1&all_tenants=1",
            "/servers/detail?limit=1&all_tenants=1", "/flavors?limit=1", "/flavors/detail", "/flavors/m1.tiny",
            "/os-hypervisors", "/os-keypairs",
        )
    ]  # fmt: skip
    seen.append(await outside.put(f"/servers/{server}", {"server": {"name": "versions"}}, headers=forged))
    made = await outside.post(
        "/servers",
        {"server": {"name": "linked", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}},
        headers=forged,
    )
    seen.append(made)
    links = [link for answer in seen for link in links_of(answer.json)]
    assert len(links) > 15
    assert all(link.startswith("https://cloud.example/compute/") for link in [*links, made.headers["location"]])
    assert not any(b"evil.example" in answer.body for answer in seen)
    unauthorized = await Client(outside.app).get("/servers", headers=forged)
    assert unauthorized.headers["www-authenticate"] == 'Keystone uri="https://cloud.example/identity"'
