"""Aggregates over HTTP: what each call takes and answers, at which microversions, and what is refused."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.db.api_tables import aggregate_hosts, aggregate_metadata, aggregates
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.testing import Client, Deployment, Response

pytestmark = pytest.mark.anyio

UUID = "0c3e1c1a-71c5-4a4b-9b55-2f9c52c1a0de"


def _make_aggregate(tx: ApiTx) -> int:
    made = datetime(2026, 3, 1, 12, 30, 15)
    tx.execute(sa.insert(aggregates), {"uuid": UUID, "name": "fast", "created_at": made})
    key = int(tx.execute(sa.select(aggregates.c.id)).scalar_one())
    for host in ("h2", "h1"):
        tx.execute(sa.insert(aggregate_hosts), {"aggregate_id": key, "host": host})
    for name, value in (("ssd", "true"), ("availability_zone", "east")):
        tx.execute(sa.insert(aggregate_metadata), {"aggregate_id": key, "key": name, "value": value})
    return key


async def test_aggregates_are_read_from_their_tables(deployment: Deployment) -> None:
    """There is no aggregate until one stands in the tables; then it shows with its hosts and metadata, to admins."""
    assert (await deployment.admin.get("/os-aggregates")).json == {"aggregates": []}
    key = await deployment.app.databases.on(API).write(_make_aggregate)
    expected = {
        "id": key, "uuid": UUID, "name": "fast", "availability_zone": "east",
        "hosts": ["h2", "h1"], "metadata": {"ssd": "true", "availability_zone": "east"},
        "created_at": "2026-03-01T12:30:15.000000", "updated_at": None, "deleted": False, "deleted_at": None,
    }  # fmt: skip
    assert (await deployment.admin.get("/os-aggregates")).json == {"aggregates": [expected]}
    assert (await deployment.admin.get(f"/os-aggregates/{key}")).json == {"aggregate": expected}
    del expected["uuid"]
    assert (await deployment.admin.at("2.40").get(f"/os-aggregates/{key}")).json == {"aggregate": expected}
    for path, status in ((f"{key + 1}", 404), ("fast", 400), ("-1", 400)):
        assert (await deployment.admin.get(f"/os-aggregates/{path}")).status == status, path
    assert (await deployment.member.get("/os-aggregates")).status == 403


class Admin:
    """What an admin does with aggregates; what it made is removed at the end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.made: list[int] = []

    async def make(self, name: str, **more: Any) -> int:
        """Make an aggregate, and return its id."""
        answer = await self.client.post("/os-aggregates", {"aggregate": {"name": name, **more}})
        assert answer.status == 200, answer.body
        self.made.append(answer.json["aggregate"]["id"])
        return self.made[-1]

    async def show(self, key: int) -> Any:
        """Return an aggregate."""
        return (await self.client.get(f"/os-aggregates/{key}")).json["aggregate"]

    async def act(self, key: int, action: str, **argument: Any) -> Response:
        """Do something to an aggregate."""
        return await self.client.post(f"/os-aggregates/{key}/action", {action: argument})

    async def put(self, key: int, **changes: Any) -> Response:
        """Change an aggregate's name or zone."""
        return await self.client.put(f"/os-aggregates/{key}", {"aggregate": changes})


@pytest.fixture
async def admin(shared: Deployment) -> AsyncIterator[Admin]:
    """An admin of the shared deployment, who cleans up."""
    admin = Admin(shared.admin)
    yield admin
    for key in admin.made:
        answer = await admin.client.get(f"/os-aggregates/{key}")
        for host in answer.json["aggregate"]["hosts"] if answer.status == 200 else ():
            assert (await admin.act(key, "remove_host", host=host)).status == 200
        await admin.client.delete(f"/os-aggregates/{key}")


async def test_create_answers_without_hosts_and_metadata(admin: Admin) -> None:
    """The zone is there, the uuid from 2.41, and what it left out shows afterwards."""
    body = {"aggregate": {"name": "fast", "availability_zone": "east"}}
    answer = await admin.client.post("/os-aggregates", body)
    made = answer.json["aggregate"]
    admin.made.append(made["id"])
    assert answer.status == 200
    assert {*made} == {
        "id", "uuid", "name", "availability_zone", "created_at", "updated_at", "deleted", "deleted_at",
    }  # fmt: skip
    assert (made["name"], made["availability_zone"], made["updated_at"]) == ("fast", "east", None)
    shown = await admin.show(made["id"])
    assert shown == made | {"hosts": [], "metadata": {"availability_zone": "east"}}
    old = await admin.client.at("2.40").post(
        "/os-aggregates", {"aggregate": {"name": "old", "availability_zone": None}}
    )
    admin.made.append(old.json["aggregate"]["id"])
    assert "uuid" not in old.json["aggregate"]
    assert old.json["aggregate"]["availability_zone"] is None
    assert (await admin.client.post("/os-aggregates", body)).status == 409


async def test_update_changes_what_it_names(admin: Admin) -> None:
    """The name, the zone, or both; null takes the zone away, and nothing of a refused update stays."""
    key, _other = await admin.make("one"), await admin.make("two")
    answer = await admin.put(key, name="first", availability_zone="east")
    assert (answer.status, answer.json["aggregate"]) == (200, await admin.show(key))
    assert (answer.json["aggregate"]["name"], answer.json["aggregate"]["availability_zone"]) == ("first", "east")
    assert answer.json["aggregate"]["updated_at"] is not None
    assert (await admin.put(key, name="two", availability_zone="west")).status == 409
    assert (await admin.put(key, name="three", availability_zone="a:b")).status == 400
    assert await admin.show(key) == answer.json["aggregate"]
    assert (await admin.put(key, name="first")).status == 200
    gone = await admin.put(key, availability_zone=None)
    assert (gone.json["aggregate"]["name"], gone.json["aggregate"]["availability_zone"]) == ("first", None)
    assert (await admin.put(4040404, name="x")).status == 404


async def test_metadata_is_merged_and_null_removes(admin: Admin) -> None:
    """Keys that are not named stay; removing one that is not there is nothing."""
    key = await admin.make("meta", availability_zone="east")
    answer = await admin.act(key, "set_metadata", metadata={"ssd": "true", "gpu": "no"})
    assert answer.json["aggregate"]["metadata"] == {"availability_zone": "east", "ssd": "true", "gpu": "no"}
    answer = await admin.act(key, "set_metadata", metadata={"ssd": "false", "gpu": None, "other": None})
    assert (answer.status, answer.json["aggregate"]) == (200, await admin.show(key))
    assert answer.json["aggregate"]["metadata"] == {"availability_zone": "east", "ssd": "false"}
    answer = await admin.act(key, "set_metadata", metadata={"availability_zone": "west"})
    assert answer.json["aggregate"]["availability_zone"] == "west"
    for zone in ("", " ", "a:b"):
        assert (await admin.act(key, "set_metadata", metadata={"availability_zone": zone, "ssd": "x"})).status == 400
    assert (await admin.show(key))["metadata"] == {"availability_zone": "west", "ssd": "false"}
    assert (await admin.act(4040404, "set_metadata", metadata={})).status == 404


async def test_hosts_come_and_go(admin: Admin) -> None:
    """A host with a compute service is put in once, in exactly its spelling; an aggregate with hosts is not deleted."""
    key = await admin.make("hosts")
    answer = await admin.act(key, "add_host", host="cell2-h1")
    assert (answer.status, answer.json["aggregate"]["hosts"]) == (200, ["cell2-h1"])
    assert (await admin.act(key, "add_host", host="cell1-h1")).json["aggregate"]["hosts"] == ["cell2-h1", "cell1-h1"]
    assert (await admin.act(key, "add_host", host="cell2-h1")).status == 409
    for action, host in (("add_host", "nowhere"), ("add_host", "CELL1-h2"), ("remove_host", "CELL1-h1")):
        assert (await admin.act(key, action, host=host)).status == 404, host
    assert (await admin.act(key, "remove_host", host="cell1-h2")).status == 404
    assert (await admin.client.delete(f"/os-aggregates/{key}")).status == 400
    answer = await admin.act(key, "remove_host", host="cell2-h1")
    assert (answer.status, answer.json["aggregate"]["hosts"]) == (200, ["cell1-h1"])
    await admin.act(key, "remove_host", host="cell1-h1")
    answer = await admin.client.delete(f"/os-aggregates/{key}")
    assert (answer.status, answer.body) == (200, b"")
    assert (await admin.client.delete(f"/os-aggregates/{key}")).status == 404
    assert (await admin.act(key, "add_host", host="cell1-h1")).status == 404


async def test_a_host_is_in_one_zone_at_most(deployment: Deployment) -> None:
    """A second zone is refused, by a host as 409 and by metadata as 400; a second aggregate of the zone is not."""
    # Of its own: on the shared hosts other tests may have left servers, which must not change their zone.
    admin = Admin(deployment.admin)
    east, more, west, none = [
        await admin.make("east", availability_zone="east"),
        await admin.make("more east", availability_zone="east"),
        await admin.make("west", availability_zone="west"),
        await admin.make("none"),
    ]
    for key in (east, more, none):
        assert (await admin.act(key, "add_host", host="cell1-h2")).status == 200
    refused = await admin.act(west, "add_host", host="cell1-h2")
    assert (refused.status, "east" in refused.json["conflictingRequest"]["message"]) == (409, True)
    for key in (more, none):
        assert (await admin.put(key, availability_zone="west")).status == 400
        assert (await admin.act(key, "set_metadata", metadata={"availability_zone": "west"})).status == 400
    assert (await admin.show(west))["hosts"] == []
    zones = (await admin.client.get("/os-availability-zone/detail")).json["availabilityZoneInfo"]
    assert {zone["zoneName"]: [*zone["hosts"]] for zone in zones} == {
        "east": ["cell1-h2"],
        "nova": ["cell1-h1", "cell2-h1", "cell2-h2"],
    }


@pytest.mark.parametrize(
    "body",
    [
        {}, {"aggregate": {}}, {"aggregate": {"name": ""}}, {"aggregate": {"name": "x" * 256}},
        {"aggregate": {"name": " x"}}, {"aggregate": {"name": "x\n"}}, {"aggregate": {"name": None}},
        {"aggregate": {"name": "x", "availability_zone": ""}}, {"aggregate": {"name": "x", "availability_zone": "a:b"}},
        {"aggregate": {"name": "x", "availability_zone": "z" * 256}}, {"aggregate": {"name": "x", "hosts": []}},
    ],
)  # fmt: skip
async def test_a_bad_aggregate_is_refused(admin: Admin, body: Any) -> None:
    """Neither made nor changed to: 400."""
    assert (await admin.client.post("/os-aggregates", body)).status == 400
    key = await admin.make("good")
    assert (await admin.client.put(f"/os-aggregates/{key}", body)).status == 400
    assert (await admin.show(key))["name"] == "good"


@pytest.mark.parametrize(
    "body",
    [
        {}, {"unknown": {}}, {"add_host": {}}, {"add_host": {"host": ""}}, {"add_host": {"host": "a b"}},
        {"add_host": {"host": "cell1-h1", "force": True}}, {"add_host": None}, {"remove_host": {"host": 1}},
        {"add_host": {"host": "cell1-h1"}, "remove_host": {"host": "cell1-h1"}},
        {"set_metadata": {}}, {"set_metadata": {"metadata": None}}, {"set_metadata": {"metadata": {"k": 1}}},
        {"set_metadata": {"metadata": {"": "v"}}}, {"set_metadata": {"metadata": {"k": "v" * 256}}},
        {"set_metadata": {"metadata": {"k/": "v"}}},
    ],
)  # fmt: skip
async def test_a_bad_action_is_refused(admin: Admin, body: Any) -> None:
    """What is no action, two of them, or one with a bad argument: 400."""
    key = await admin.make("still")
    assert (await admin.client.post(f"/os-aggregates/{key}/action", body)).status == 400
    shown = await admin.show(key)
    assert (shown["hosts"], shown["metadata"]) == ([], {})


async def test_an_id_that_is_no_number_is_refused(admin: Admin) -> None:
    """As the incumbent does: 400, where a number that no aggregate has is 404."""
    for call in (
        admin.client.get("/os-aggregates/x"),
        admin.client.delete("/os-aggregates/x"),
        admin.client.put("/os-aggregates/x", {"aggregate": {"name": "y"}}),
        admin.client.post("/os-aggregates/x/action", {"add_host": {"host": "cell1-h1"}}),
    ):
        assert (await call).status == 400
    assert (await admin.client.post("/os-aggregates/1/images", {"cache": []})).status == 404
