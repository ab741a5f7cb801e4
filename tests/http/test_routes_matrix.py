"""Who may call what: every route and every action, by nobody, an expired token, and each kind of user.

A route or action that is added without a row here fails the first tests.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest

from cellway.context import SystemClock
from cellway.http.actions import ACTIONS
from cellway.http.app import ROUTES
from cellway.http.microversions import LATEST
from cellway.http.policy import RULES
from cellway.identity.tokens import Tokens
from cellway.testing import QUICK, TINY_IMAGE, Client, Deployment

pytestmark = pytest.mark.anyio

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd"
RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"


class Row(NamedTuple):
    """What a call answers to a member of the project that owns the things named, a member of another, a reader of
    the first, and an admin. The values of the path, and `{unique}` in the body, are made by `World`.
    """

    member: int
    stranger: int
    reader: int
    admin: int
    path: Mapping[str, str] = {}
    body: Any = None


SERVER = {"server_id": "server"}
FRESH = {"server_id": "fresh server"}
FALLBACK = {"fresh server": "server", "fresh flavor": "flavor", "fresh group": "group", "fresh aggregate": "aggregate"}
FLAVOR = {"id": "flavor"}
PROJECT = {"project": "project"}
NEW_SERVER = {"name": "one", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}
NEW_FLAVOR = {"name": "{unique}", "ram": 1, "vcpus": 1, "disk": 1}
NEW_GROUP = {"server_group": {"name": "{unique}", "policies": ["affinity"]}}
NAMES = ("member", "stranger", "reader", "admin")

TABLE: dict[tuple[str, str, int, int | None], Row] = {
    ("GET", "/servers", 1, None): Row(200, 200, 200, 200),
    ("GET", "/servers/detail", 1, None): Row(200, 200, 200, 200),
    ("POST", "/servers", 1, None): Row(202, 202, 403, 202, body={"server": NEW_SERVER}),
    ("GET", "/servers/{server_id}", 1, None): Row(200, 404, 200, 200, SERVER),
    ("PUT", "/servers/{server_id}", 1, None): Row(200, 404, 403, 200, SERVER, {"server": {"name": "other"}}),
    ("DELETE", "/servers/{server_id}", 1, None): Row(204, 404, 403, 204, FRESH),
    ("GET", "/servers/{server_id}/ips", 1, None): Row(200, 404, 200, 200, SERVER),
    ("GET", "/servers/{server_id}/ips/{network}", 1, None): Row(404, 404, 404, 404, SERVER | {"network": "key"}),
    ("GET", "/servers/{server_id}/metadata", 1, None): Row(200, 404, 200, 200, SERVER),
    ("POST", "/servers/{server_id}/metadata", 1, None): Row(200, 404, 403, 200, SERVER, {"metadata": {"other": "v"}}),
    ("PUT", "/servers/{server_id}/metadata", 1, None): Row(200, 404, 403, 200, FRESH, {"metadata": {"other": "v"}}),
    ("GET", "/servers/{server_id}/metadata/{key}", 1, None): Row(200, 404, 200, 200, SERVER | {"key": "key"}),
    ("PUT", "/servers/{server_id}/metadata/{key}", 1, None): Row(
        200, 404, 403, 200, SERVER | {"key": "key"}, {"meta": {"key": "other"}}
    ),
    ("DELETE", "/servers/{server_id}/metadata/{key}", 1, None): Row(204, 404, 403, 204, FRESH | {"key": "key"}),
    ("GET", "/servers/{server_id}/tags", 26, None): Row(200, 404, 200, 200, SERVER),
    ("PUT", "/servers/{server_id}/tags", 26, None): Row(200, 404, 403, 200, FRESH, {"tags": ["other"]}),
    ("DELETE", "/servers/{server_id}/tags", 26, None): Row(204, 404, 403, 204, FRESH),
    ("GET", "/servers/{server_id}/tags/{tag}", 26, None): Row(204, 404, 204, 204, SERVER | {"tag": "key"}),
    ("PUT", "/servers/{server_id}/tags/{tag}", 26, None): Row(201, 404, 403, 201, SERVER | {"tag": "unique"}),
    ("DELETE", "/servers/{server_id}/tags/{tag}", 26, None): Row(204, 404, 403, 204, FRESH | {"tag": "key"}),
    ("POST", "/servers/{server_id}/action", 1, None): Row(202, 404, 403, 202, FRESH, {"os-stop": None}),
    ("GET", "/servers/{server_id}/os-instance-actions", 1, None): Row(200, 404, 200, 200, SERVER),
    ("GET", "/servers/{server_id}/os-instance-actions/{request_id}", 1, None): Row(
        200, 404, 200, 200, SERVER | {"request_id": "request"}
    ),
    ("GET", "/flavors", 1, None): Row(200, 200, 200, 200),
    ("GET", "/flavors/detail", 1, None): Row(200, 200, 200, 200),
    ("GET", "/flavors/{id}", 1, None): Row(200, 200, 200, 200, FLAVOR),
    ("POST", "/flavors", 1, None): Row(403, 403, 403, 200, body={"flavor": NEW_FLAVOR}),
    # Not advertised yet, so nobody can reach it.
    ("PUT", "/flavors/{id}", 55, None): Row(404, 404, 404, 404, FLAVOR, {"flavor": {"description": "d"}}),
    ("DELETE", "/flavors/{id}", 1, None): Row(403, 403, 403, 202, {"id": "fresh flavor"}),
    ("GET", "/flavors/{id}/os-flavor-access", 1, None): Row(403, 403, 403, 200, {"id": "fresh flavor"}),
    ("POST", "/flavors/{id}/action", 1, None): Row(
        403, 403, 403, 200, {"id": "fresh flavor"}, {"addTenantAccess": {"tenant": "someone"}}
    ),
    ("GET", "/flavors/{id}/os-extra_specs", 1, None): Row(200, 200, 200, 200, FLAVOR),
    ("POST", "/flavors/{id}/os-extra_specs", 1, None): Row(
        403, 403, 403, 200, {"id": "fresh flavor"}, {"extra_specs": {"a": "b"}}
    ),
    ("GET", "/flavors/{id}/os-extra_specs/{key}", 1, None): Row(200, 200, 200, 200, FLAVOR | {"key": "key"}),
    ("PUT", "/flavors/{id}/os-extra_specs/{key}", 1, None): Row(
        403, 403, 403, 200, {"id": "fresh flavor", "key": "key"}, {"key": "other"}
    ),
    ("DELETE", "/flavors/{id}/os-extra_specs/{key}", 1, None): Row(
        403, 403, 403, 200, {"id": "fresh flavor", "key": "key"}
    ),
    # Everybody has keypairs of their own: another's name is not found.
    ("GET", "/os-keypairs", 1, None): Row(200, 200, 200, 200),
    ("POST", "/os-keypairs", 1, None): Row(
        201, 201, 201, 201, body={"keypair": {"name": "{unique}", "public_key": KEY}}
    ),
    ("GET", "/os-keypairs/{name}", 1, None): Row(200, 404, 404, 404, {"name": "fresh keypair"}),
    ("DELETE", "/os-keypairs/{name}", 1, None): Row(204, 404, 404, 404, {"name": "fresh keypair"}),
    ("GET", "/os-services", 1, None): Row(403, 403, 403, 200),
    ("PUT", "/os-services/{id}", 1, 52): Row(
        403, 403, 403, 200, {"id": "enable"}, {"host": "cell1-h1", "binary": "nova-compute"}
    ),
    ("PUT", "/os-services/{id}", 53, None): Row(403, 403, 403, 200, {"id": "service"}, {"status": "enabled"}),
    ("DELETE", "/os-services/{id}", 1, None): Row(403, 403, 403, 404, {"id": "random"}),
    ("GET", "/os-hypervisors", 1, None): Row(403, 403, 403, 200),
    ("GET", "/os-hypervisors/detail", 1, None): Row(403, 403, 403, 200),
    ("GET", "/os-hypervisors/statistics", 1, 87): Row(403, 403, 403, 200),
    ("GET", "/os-hypervisors/{id}", 1, None): Row(403, 403, 403, 200, {"id": "hypervisor"}),
    # A simulated host has no uptime to tell.
    ("GET", "/os-hypervisors/{id}/uptime", 1, 87): Row(403, 403, 403, 501, {"id": "hypervisor"}),
    ("GET", "/os-hypervisors/{pattern}/search", 1, 52): Row(403, 403, 403, 200, {"pattern": "cell1"}),
    ("GET", "/os-hypervisors/{pattern}/servers", 1, 52): Row(403, 403, 403, 200, {"pattern": "cell1"}),
    ("GET", "/os-availability-zone", 1, None): Row(200, 200, 200, 200),
    ("GET", "/os-availability-zone/detail", 1, None): Row(403, 403, 403, 200),
    ("GET", "/limits", 1, None): Row(200, 200, 200, 200),
    ("GET", "/os-simple-tenant-usage", 1, None): Row(403, 403, 403, 200),
    ("GET", "/os-simple-tenant-usage/{id}", 1, None): Row(200, 403, 200, 200, {"id": "project"}),
    ("GET", "/os-server-groups", 1, None): Row(200, 200, 200, 200),
    ("POST", "/os-server-groups", 1, None): Row(200, 200, 403, 200, body=NEW_GROUP),
    ("GET", "/os-server-groups/{id}", 1, None): Row(200, 404, 200, 200, {"id": "group"}),
    ("DELETE", "/os-server-groups/{id}", 1, None): Row(204, 404, 403, 204, {"id": "fresh group"}),
    ("GET", "/os-quota-sets/{project}", 1, None): Row(200, 403, 200, 200, PROJECT),
    ("GET", "/os-quota-sets/{project}/detail", 1, None): Row(200, 403, 200, 200, PROJECT),
    ("GET", "/os-quota-sets/{project}/defaults", 1, None): Row(200, 200, 200, 200, PROJECT),
    ("PUT", "/os-quota-sets/{project}", 1, None): Row(
        403, 403, 403, 200, PROJECT, {"quota_set": {"metadata_items": 128}}
    ),
    ("DELETE", "/os-quota-sets/{project}", 1, None): Row(403, 403, 403, 202, PROJECT),
    ("GET", "/os-quota-class-sets/{name}", 1, None): Row(403, 403, 403, 200, {"name": "default"}),
    ("PUT", "/os-quota-class-sets/{name}", 1, None): Row(
        403, 403, 403, 200, {"name": "matrix"}, {"quota_class_set": {"cores": 1}}
    ),
    ("GET", "/os-aggregates", 1, None): Row(403, 403, 403, 200),
    ("POST", "/os-aggregates", 1, None): Row(403, 403, 403, 200, body={"aggregate": {"name": "{unique}"}}),
    ("GET", "/os-aggregates/{id}", 1, None): Row(403, 403, 403, 200, {"id": "aggregate"}),
    ("PUT", "/os-aggregates/{id}", 1, None): Row(
        403, 403, 403, 200, {"id": "aggregate"}, {"aggregate": {"name": "{unique}"}}
    ),
    ("DELETE", "/os-aggregates/{id}", 1, None): Row(403, 403, 403, 200, {"id": "fresh aggregate"}),
    ("POST", "/os-aggregates/{id}/action", 1, None): Row(
        403, 403, 403, 200, {"id": "aggregate"}, {"set_metadata": {"metadata": {"key": "value"}}}
    ),
}

ACTION_TABLE: dict[str, tuple[Any, Row]] = {
    "os-start": (None, Row(409, 404, 403, 409)),
    "os-stop": (None, Row(202, 404, 403, 202)),
    "reboot": ({"type": "HARD"}, Row(202, 404, 403, 202)),
    "pause": (None, Row(202, 404, 403, 202)),
    "unpause": (None, Row(409, 404, 403, 409)),
    "suspend": (None, Row(202, 404, 403, 202)),
    "resume": (None, Row(409, 404, 403, 409)),
    "lock": (None, Row(202, 404, 403, 202)),
    "unlock": (None, Row(202, 404, 403, 202)),
    "os-resetState": ({"state": "error"}, Row(403, 403, 403, 202)),
}


class Past(SystemClock):
    """Yesterday."""

    def now(self) -> datetime:
        return super().now() - timedelta(days=1)


@dataclass
class World:
    """The users, and one of each thing that they act on."""

    deployment: Deployment
    clients: dict[str, Client]
    expired: Client
    known: dict[str, str] = field(default_factory=dict)
    made: int = 0

    async def value(self, name: str) -> str:
        """Return what a placeholder of the table stands for; what is fresh or unique is made now."""
        self.made += 1
        unique = f"matrix-{self.made}"
        match name:
            case "fresh server":
                return await self.server(unique)
            case "fresh flavor":
                flavor = await self.deployment.make_flavor(unique, **{"os-flavor-access:is_public": False})
                await self.clients["admin"].post(f"/flavors/{flavor}/os-extra_specs", {"extra_specs": {"key": "value"}})
                return flavor
            case "fresh keypair":
                answer = await self.clients["member"].post(
                    "/os-keypairs", {"keypair": {"name": unique, "public_key": KEY}}
                )
                assert answer.status == 201
                return unique
            case "fresh group":
                answer = await self.clients["member"].post("/os-server-groups", await self.filled(NEW_GROUP))
                assert answer.status == 200
                return str(answer.json["server_group"]["id"])
            case "fresh aggregate":
                answer = await self.clients["admin"].post("/os-aggregates", {"aggregate": {"name": unique}})
                assert answer.status == 200
                return str(answer.json["aggregate"]["id"])
            case "unique":
                return unique
            case _:
                return self.known.get(name, name)

    async def server(self, name: str) -> str:
        """Boot a server of the member's that has a metadata key and a tag."""
        made = await self.deployment.boot(name, metadata={"key": "value"}, tags=["key"])
        await self.deployment.until_status(made, "ACTIVE")
        return made

    async def filled(self, thing: Any) -> Any:
        """Return a body with `{unique}` replaced."""
        if isinstance(thing, dict):
            return {key: await self.filled(value) for key, value in thing.items()}
        return await self.value("unique") if thing == "{unique}" else thing


@pytest.fixture(scope="module")
async def world(shared: Deployment, anyio_backend: str) -> AsyncIterator[World]:
    """A member and a reader of one project, a member of another, an admin, and a token that has expired."""
    clients = {
        "member": shared.member,
        "stranger": await shared.add_user("matrix-stranger", "matrix-elsewhere", "member"),
        "reader": await shared.add_user("matrix-reader", "demo", "reader"),
        "admin": shared.admin,
    }
    store = shared.identity.store
    user, project = store.find_user_named("demo"), store.find_project_named("demo")
    assert user is not None
    assert project is not None
    token, _claims = Tokens(store, limits=QUICK, clock=Past()).issue(user, project)
    world = World(shared, clients, Client(shared.port, {"X-Auth-Token": token}))
    server = await world.server("matrix")
    recorded = (await shared.member.get(f"/servers/{server}/os-instance-actions")).json["instanceActions"]
    await shared.admin.post("/flavors/m1.tiny/os-extra_specs", {"extra_specs": {"key": "value"}})
    world.known = {
        "server": server,
        "request": recorded[0]["request_id"],
        "flavor": "m1.tiny",
        "project": project.id,
        "service": (await shared.admin.get("/os-services")).json["services"][0]["id"],
        "hypervisor": (await shared.admin.get("/os-hypervisors")).json["hypervisors"][0]["id"],
        "random": RANDOM,
    }
    world.known["group"] = await world.value("fresh group")
    world.known["aggregate"] = await world.value("fresh aggregate")
    yield world
    await shared.admin.delete("/flavors/m1.tiny/os-extra_specs/key")


def test_every_route_has_a_row() -> None:
    """The table names exactly the calls that are served."""
    assert {(route.method, route.path, route.since, route.until) for route in ROUTES} == set(TABLE)


def test_every_action_has_a_row() -> None:
    """The table names exactly the actions that are served."""
    assert set(ACTIONS) == set(ACTION_TABLE)


def test_every_route_and_action_has_a_rule_of_the_policy() -> None:
    """A rule that nobody defined guards nothing; only the action routes, whose actions have their own, have none."""
    for route in ROUTES:
        assert route.rule in RULES or (route.rule == "" and route.path.endswith("/action"))
    assert {action.rule for action in ACTIONS.values()} <= set(RULES)


@pytest.mark.parametrize("key", TABLE, ids=lambda key: f"{key[0]} {key[1]} {key[2]}")
async def test_a_route_answers_each_kind_of_user_as_the_table_says(
    world: World, key: tuple[str, str, int, int | None]
) -> None:
    """A call is for those whom its rule allows, on what they may see, and for nobody without a valid token."""
    method, path, since, until = key
    row = TABLE[key]
    version = f"2.{min(until or LATEST, LATEST)}" if since <= LATEST else f"2.{LATEST}"
    nobody = Client(world.deployment.port).at(version)
    expected = {"nobody": 401, "expired": 401, **dict(zip(NAMES, row[:4], strict=True))}
    seen: dict[str, int] = {}
    for name, client in {"nobody": nobody, "expired": world.expired, **world.clients}.items():
        # What is refused leaves the server as it is, so it needs no fresh one.
        spent = expected[name] < 400
        values = {
            place: await world.value(what if spent else FALLBACK.get(what, what)) for place, what in row.path.items()
        }
        answer = await client.at(version).request(method, path.format(**values), await world.filled(row.body))
        assert "x-openstack-request-id" in answer.headers
        seen[name] = answer.status
    assert seen == expected


@pytest.mark.parametrize("action", ACTION_TABLE)
async def test_an_action_answers_each_kind_of_user_as_the_table_says(world: World, action: str) -> None:
    """An action is for those whom its own rule allows, and a reader is refused whether the server exists or not."""
    argument, row = ACTION_TABLE[action]
    nobody = Client(world.deployment.port)
    seen: dict[str, int] = {}
    for name, client in {"nobody": nobody, "expired": world.expired, **world.clients}.items():
        server = await world.value("fresh server" if name in ("member", "admin") else "server")
        seen[name] = (await client.post(f"/servers/{server}/action", {action: argument})).status
        if seen[name] == 403:
            assert (await client.post(f"/servers/{RANDOM}/action", {action: argument})).status == 403
    assert seen == {"nobody": 401, "expired": 401, **dict(zip(NAMES, row[:4], strict=True))}


async def test_a_call_of_another_microversion_is_not_found(world: World) -> None:
    """Before the version that brings a call, and after the last that has it, the call does not exist."""
    server = world.known["server"]
    assert (await world.clients["member"].at("2.25").get(f"/servers/{server}/tags")).status == 404
    assert (await world.clients["member"].at("2.26").get(f"/servers/{server}/tags")).status == 200
    assert (await world.clients["admin"].at("2.52").get("/os-hypervisors/cell1/search")).status == 200
    assert (await world.clients["admin"].at("2.53").get("/os-hypervisors/cell1/search")).status == 404
