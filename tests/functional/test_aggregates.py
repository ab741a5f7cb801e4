"""Aggregates: the rows on a real API database, zones that no server ever changes, and where servers of all cells go."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from cellway import aggregates, hosts
from cellway.aggregates import ZONE_KEY, Aggregate
from cellway.config import Secret
from cellway.db.api_tables import aggregate_hosts, aggregate_metadata, cell_mappings, host_claims
from cellway.db.cell_tables import instances
from cellway.db.engines import API, open_engine
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import Conflict, Invalid, NotFound
from cellway.hosts import Capacity, Claim
from cellway.testing import QUICK, Client, Deployment, Response, deployment
from tests.databases import KINDS, SERVERS, Shelf, Urls, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)
ONE, TWO, THREE = (f"5b0d9e0e-6a7c-4c0e-9d8e-{number:012}" for number in (1, 2, 3))


# ---- the noun --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf
) -> Iterator[sa.Engine]:
    """Give an API database of each kind for the module; every test rolls back what it wrote."""
    if request.param == "sqlite":
        url = upgraded(Secret(f"sqlite:///{tmp_path_factory.mktemp('aggregates') / 'api.sqlite'}"), Tree.API)
    else:
        url = shelf.take(request.param, "api")
    made = engine_of(url)
    yield made
    made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[ApiTx]:
    """Open a transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield ApiTx(connection, NOW)
        transaction.rollback()


def names(found: Any) -> list[str]:
    """Return the names of aggregates."""
    return [one.name for one in found]


def test_an_aggregate_reads_back_as_it_was_made(tx: ApiTx) -> None:
    """By its id and by its uuid, and in the list, the oldest first."""
    made = aggregates.create(tx, TWO, "fast", {ZONE_KEY: "east", "ssd": "true"})
    assert made == Aggregate(made.id, TWO, "fast", NOW, None, (), {ZONE_KEY: "east", "ssd": "true"})
    assert made.zone == "east"
    assert made == aggregates.get(tx, made.id) == aggregates.get(tx, TWO)
    plain = aggregates.create(tx, ONE, "plain", {})
    aggregates.add_host(tx, plain.id, "h2")
    plain = aggregates.add_host(tx, plain.id, "h1")
    assert (plain.hosts, plain.zone) == (("h2", "h1"), None)
    assert aggregates.list(tx) == [made, plain]
    for missing in (THREE, plain.id + 1):
        with pytest.raises(NotFound):
            aggregates.get(tx, missing)


@pytest.mark.parametrize("again", [(TWO, "one"), (ONE, "two")], ids=["name", "uuid"])
def test_names_and_uuids_are_unique(tx: ApiTx, again: tuple[str, str]) -> None:
    """Two names that differ in case are two names; the same one again is refused, and so is the same uuid."""
    aggregates.create(tx, ONE, "one", {})
    aggregates.create(tx, THREE, "ONE", {})
    with pytest.raises(Conflict):
        aggregates.create(tx, *again, {})


def test_an_update_changes_what_it_names(tx: ApiTx) -> None:
    """The name, keys that are there and keys that are not; None removes; only a new name counts as an update."""
    made = aggregates.create(tx, ONE, "one", {"kept": "1", "changed": "1", "gone": "1"})
    changed = aggregates.update(tx, made.id, metadata={"changed": "2", "gone": None, "never": None, "new": "1"})
    assert changed.metadata == {"kept": "1", "changed": "2", "new": "1"}
    assert (changed.name, changed.updated_at) == ("one", None)
    assert aggregates.update(tx, made.id, name="one") == changed
    renamed = aggregates.update(tx, made.id, name="two", metadata={"Kept": "other"})
    assert (renamed.name, renamed.updated_at) == ("two", NOW)
    assert renamed.metadata == {"kept": "1", "changed": "2", "new": "1", "Kept": "other"}
    for zone in ("", " ", "a:b"):
        with pytest.raises(Invalid):
            aggregates.update(tx, made.id, name="three", metadata={ZONE_KEY: zone})
    assert aggregates.get(tx, made.id) == renamed
    aggregates.create(tx, TWO, "taken", {})
    with pytest.raises(Conflict):
        aggregates.update(tx, made.id, name="taken")


def test_host_names_are_compared_exactly(tx: ApiTx) -> None:
    """A host is in an aggregate once; another spelling of its name is another host."""
    first, second = aggregates.create(tx, ONE, "one", {}).id, aggregates.create(tx, TWO, "two", {"k": "v"}).id
    for name in ("h1", "H1"):
        aggregates.add_host(tx, first, name)
    aggregates.add_host(tx, second, "h1")
    with pytest.raises(Conflict):
        aggregates.add_host(tx, second, "h1")
    with pytest.raises(NotFound):
        aggregates.remove_host(tx, second, "H1")
    assert names(aggregates.list_by_host(tx, "h1")) == ["one", "two"]
    assert names(aggregates.list_by_host(tx, "H1")) == ["one"]
    assert (aggregates.metadata_of(tx, "h1"), aggregates.metadata_of(tx, "H1")) == ({"k": frozenset({"v"})}, {})
    assert aggregates.remove_host(tx, first, "h1").hosts == ("H1",)
    aggregates.forget_host(tx, "h1")
    assert [one.hosts for one in aggregates.list(tx)] == [("H1",), ()]
    with pytest.raises(NotFound):
        aggregates.add_host(tx, second + 1, "h1")


def test_a_deleted_aggregate_leaves_nothing(tx: ApiTx) -> None:
    """Not while it has hosts; then its metadata goes with it, and its name is free."""
    made = aggregates.create(tx, ONE, "one", {"k": "v"}).id
    aggregates.add_host(tx, made, "h1")
    with pytest.raises(Conflict):
        aggregates.delete(tx, made)
    aggregates.remove_host(tx, made, "h1")
    aggregates.delete(tx, made)
    with pytest.raises(NotFound):
        aggregates.delete(tx, made)
    assert [tx.execute(sa.select(table)).all() for table in (aggregate_hosts, aggregate_metadata)] == [[], []]
    assert aggregates.create(tx, TWO, "one", {}).metadata == {}


def test_aggregates_are_found_by_their_hosts_and_metadata(tx: ApiTx) -> None:
    """By host, by host and key, by key, by value, by both, by hosts as well, and by what a key begins with."""
    fast = aggregates.create(tx, ONE, "fast", {"trait:SSD": "required", "ssd": "true", "%_x": "y"}).id
    slow = aggregates.create(tx, TWO, "slow", {"trait:HDD": "required", "Trait:x": "required", "ssd": "no"}).id
    aggregates.create(tx, THREE, "none", {})
    for aggregate, host in ((fast, "h1"), (fast, "h2"), (slow, "h2")):
        aggregates.add_host(tx, aggregate, host)
    assert names(aggregates.list_by_host(tx, "h2")) == ["fast", "slow"]
    assert names(aggregates.list_by_host(tx, "h2", "trait:HDD")) == ["slow"]
    assert names(aggregates.list_by_host(tx, "h3")) == []
    assert names(aggregates.list_by_metadata(tx, key="ssd")) == ["fast", "slow"]
    assert names(aggregates.list_by_metadata(tx, key="SSD")) == []
    assert names(aggregates.list_by_metadata(tx, key="ssd", hosts=["h1", "h9"])) == ["fast"]
    assert names(aggregates.list_by_metadata(tx, value="required")) == ["fast", "slow"]
    assert names(aggregates.list_by_metadata(tx, key="ssd", value="no")) == ["slow"]
    with pytest.raises(Invalid):
        aggregates.list_by_metadata(tx)

    def not_matching(*ignored: str, prefix: str = "trait:") -> list[str]:
        return names(aggregates.list_non_matching(tx, ignored, prefix=prefix, value="required"))

    assert not_matching() == ["fast", "slow"]
    assert not_matching("trait:SSD") == ["slow"]
    assert not_matching("trait:SSD", "trait:HDD") == []
    assert not_matching(prefix="%") == []


def test_a_hosts_metadata_is_that_of_all_its_aggregates(tx: ApiTx) -> None:
    """Each key has every value, a list with commas several; the zones come in the order of the aggregates."""
    for uuid, name, metadata in (
        (ONE, "one", {ZONE_KEY: "west", "tier": "gold, silver"}),
        (TWO, "two", {ZONE_KEY: "east", "tier": "bronze"}),
        (THREE, "three", {ZONE_KEY: "west"}),
    ):
        aggregates.add_host(tx, aggregates.create(tx, uuid, name, metadata).id, "h1")
    assert aggregates.metadata_of(tx, "h1") == {
        ZONE_KEY: {"west", "east"},
        "tier": {"gold", "silver", "bronze"},
    }
    assert aggregates.zones_of(tx, ["h1", "h2"]) == {"h1": ("west", "east")}
    assert aggregates.zones_of(tx, []) == {}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_change_of_zones_keeps_claims_and_other_changes_out(kind: str, shelf: Shelf) -> None:
    """A host that is held gets no claim, and aggregates that are held are held by nobody else, until it is over."""
    url = shelf.take(kind, "api")
    patient, hasty = engine_of(url), open_engine(url, deadline_seconds=1.0)

    def prepare(tx: ApiTx) -> int:
        aggregates.create(tx, ONE, "one", {})
        tx.execute(sa.insert(cell_mappings), {"uuid": ONE, "name": "cell1"})
        cell = int(tx.execute(sa.select(cell_mappings.c.id)).scalar_one())
        for host in ("h1", "h2"):
            hosts.put_capacity(tx, Capacity(host, cell, 8, 8, 8, False))
        return cell

    with patient.begin() as connection:
        cell = prepare(ApiTx(connection, NOW))
    with patient.connect() as first, hasty.connect() as second:
        holding, waiting = ApiTx(first, NOW), ApiTx(second, NOW)
        aggregates.hold(holding)
        assert hosts.hold(holding, ["h1", "H2", "h9"]) == {"h1"}
        assert hosts.claim(waiting, Claim(TWO, "h2", cell, 1, 1, 1))
        for blocked in (
            lambda: hosts.claim(waiting, Claim(THREE, "h1", cell, 1, 1, 1)),
            lambda: aggregates.hold(waiting),
        ):
            with pytest.raises(OperationalError):
                blocked()
            second.rollback()
        first.rollback()
        assert hosts.claim(waiting, Claim(THREE, "h1", cell, 1, 1, 1))
        assert hosts.with_claims(waiting, ["h1", "h2"]) == {"h1"}
    shelf.take(kind, "api")
    patient.dispose()
    hasty.dispose()


# ---- zones -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def running(tmp_path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each."""
    async with deployment(tmp_path / "data", databases=databases) as running:
        await running.make_flavor()
        yield running


async def make(client: Client, name: str, *members: str, **metadata: str) -> int:
    """Make an aggregate with hosts and metadata, and return its id."""
    answer = await client.post("/os-aggregates", {"aggregate": {"name": name}})
    assert answer.status == 200, answer.body
    key = int(answer.json["aggregate"]["id"])
    if metadata:
        assert (await act(client, key, "set_metadata", metadata=metadata)).status == 200
    for host in members:
        assert (await act(client, key, "add_host", host=host)).status == 200
    return key


async def act(client: Client, key: int, action: str, **argument: Any) -> Response:
    """Do something to an aggregate."""
    return await client.post(f"/os-aggregates/{key}/action", {action: argument})


async def host_of(running: Deployment, server: str) -> str:
    """Wait until a server runs, and return its host."""
    shown = await running.until_status(server, "ACTIVE", running.admin)
    return str(shown["OS-EXT-SRV-ATTR:host"])


async def zones(running: Deployment) -> dict[str, bool]:
    """Return every zone, and whether it is available."""
    listed = (await running.member.get("/os-availability-zone")).json["availabilityZoneInfo"]
    return {zone["zoneName"]: zone["zoneState"]["available"] for zone in listed}


@pytest.mark.anyio
async def test_of_twenty_that_make_one_name_one_succeeds(running: Deployment) -> None:
    """The others get 409, and there is one aggregate."""
    body = {"aggregate": {"name": "one", "availability_zone": "east"}}
    answers = await asyncio.gather(*(running.admin.post("/os-aggregates", body) for _ in range(20)))
    assert Counter(answer.status for answer in answers) == {200: 1, 409: 19}
    listed = (await running.admin.get("/os-aggregates")).json["aggregates"]
    assert [(one["name"], one["metadata"]) for one in listed] == [("one", {ZONE_KEY: "east"})]


@pytest.mark.anyio
async def test_of_many_that_give_a_host_a_zone_one_succeeds(running: Deployment) -> None:
    """Whether they add it to another zone or make a zone of where it is: it ends in one, and the others are refused."""
    client = running.admin
    keys = [await make(client, f"a{number}", availability_zone=f"z{number}") for number in range(4)]
    there = [await make(client, f"b{number}", "cell1-h1") for number in range(4)]
    answers = await asyncio.gather(
        *(act(client, key, "add_host", host="cell1-h1") for key in keys),
        *(act(client, key, "set_metadata", metadata={ZONE_KEY: f"y{key}"}) for key in there),
    )
    assert Counter(answer.status // 100 for answer in answers) == {2: 1, 4: 7}
    found = await running.in_api(lambda tx: aggregates.zones_of(tx, ["cell1-h1"]))
    assert len(found["cell1-h1"]) == 1
    assert {*await zones(running)} == {"nova", *found["cell1-h1"]}


@pytest.mark.anyio
async def test_servers_land_in_the_zone_that_they_ask_for(running: Deployment) -> None:
    """A zone spans cells, shows in the list at once, takes servers, and is what a server of it shows."""
    await make(running.admin, "east", "cell1-h2", "cell2-h1", availability_zone="east")
    assert await zones(running) == {"nova": True, "east": True}
    asked = {zone: [await running.boot(zone, availability_zone=zone) for _ in range(3)] for zone in ("east", "nova")}
    placed = {zone: {await host_of(running, server) for server in servers} for zone, servers in asked.items()}
    assert placed["east"] <= {"cell1-h2", "cell2-h1"}
    assert placed["nova"] <= {"cell1-h1", "cell2-h2"}
    shown = (await running.member.get(f"/servers/{asked['east'][0]}")).json["server"]
    assert shown["OS-EXT-AZ:availability_zone"] == "east"
    there = await running.boot("there", running.admin, availability_zone="east:cell2-h1")
    assert await host_of(running, there) == "cell2-h1"
    elsewhere = await running.boot("elsewhere", running.admin, availability_zone="east:cell1-h1")
    fault = (await running.until_status(elsewhere, "ERROR", running.admin))["fault"]["message"]
    assert fault.endswith("1 by zone).")
    bad = {"name": "s", "flavorRef": "m1.tiny", "imageRef": "x", "networks": "none", "availability_zone": "west"}
    assert (await running.member.post("/servers", {"server": bad})).status == 400


@pytest.mark.anyio
async def test_no_server_changes_its_zone(running: Deployment) -> None:
    """While a host has a server its zone stays: 409 for hosts, 400 for metadata. What leaves the zone may change."""
    client = running.admin
    east = await make(client, "east", "cell1-h1", availability_zone="east")
    west = await make(client, "west", availability_zone="west")
    plain = await make(client, "plain", "cell1-h1")
    server = await running.boot("s", availability_zone="east")
    assert await host_of(running, server) == "cell1-h1"
    for key, action, argument, status in (
        (east, "remove_host", {"host": "cell1-h1"}, 409),
        (west, "add_host", {"host": "cell1-h1"}, 409),
        (east, "set_metadata", {"metadata": {ZONE_KEY: "other"}}, 400),
        (east, "set_metadata", {"metadata": {ZONE_KEY: None}}, 400),
        (plain, "set_metadata", {"metadata": {ZONE_KEY: "other"}}, 400),
    ):
        assert (await act(client, key, action, **argument)).status == status, (action, argument)
    for change in ({"availability_zone": "other"}, {"availability_zone": None, "name": "renamed"}):
        refused = await client.put(f"/os-aggregates/{east}", {"aggregate": change})
        assert (refused.status, "cell1-h1" in refused.json["badRequest"]["message"]) == (400, True)
    assert (await client.get(f"/os-aggregates/{east}")).json["aggregate"]["name"] == "east"
    # The same zone twice, other keys, and hosts without servers change nobody's zone.
    assert (await act(client, plain, "set_metadata", metadata={ZONE_KEY: "east", "ssd": "true"})).status == 200
    assert (await act(client, plain, "remove_host", host="cell1-h1")).status == 200
    assert (await act(client, west, "add_host", host="cell1-h2")).status == 200
    await running.member.delete(f"/servers/{server}")

    async def given_back() -> bool:
        return not await running.in_api(lambda tx: tx.execute(sa.select(host_claims.c.id)).all())

    await running.until(given_back)
    assert (await client.put(f"/os-aggregates/{east}", {"aggregate": {"availability_zone": "other"}})).status == 200
    assert (await act(client, east, "remove_host", host="cell1-h1")).status == 200
    assert await zones(running) == {"nova": True, "west": True}


@pytest.mark.anyio
async def test_only_the_cells_of_the_hosts_concerned_are_asked(running: Deployment) -> None:
    """Another cell may be down; their own is named when it is, also for servers that only the cell knows of."""
    client, databases = running.admin, running.app.databases

    def put_instance(tx: CellTx, deleted: int) -> None:
        tx.execute(sa.delete(instances))
        tx.execute(sa.insert(instances), {"uuid": ONE, "host": "cell1-h1", "deleted": deleted})

    running.break_cell("cell2", "refuse")
    east = await make(client, "east", "cell1-h1", "cell1-h2", availability_zone="east")
    refused = await act(client, east, "add_host", host="cell2-h1")
    assert (refused.status, "cell2" in refused.json["serviceUnavailable"]["message"]) == (503, True)
    plain = await make(client, "plain", "cell2-h1")
    assert (await act(client, plain, "set_metadata", metadata={"ssd": "true"})).status == 200
    assert (await act(client, plain, "set_metadata", metadata={ZONE_KEY: "west"})).status == 503
    with running.targeted("cell1") as cctx:
        await databases.on(cctx).write(put_instance, 0)
        assert (await act(client, east, "remove_host", host="cell1-h2")).status == 200
        assert (await act(client, east, "remove_host", host="cell1-h1")).status == 409
        await databases.on(cctx).write(put_instance, 1)
        assert (await act(client, east, "remove_host", host="cell1-h1")).status == 200
    running.heal_cell("cell2")
    assert (await act(client, plain, "set_metadata", metadata={ZONE_KEY: "west"})).status == 200
    running.break_cell("cell2", "refuse")
    running.break_cell("cell1", "refuse")
    assert {*await zones(running)} == {"nova", "west"}


@pytest.mark.anyio
async def test_what_a_process_remembers_of_aggregates_decides_nothing(tmp_path: Path, databases: Urls) -> None:
    """A zone that another process has just made is known, and a builder with old aggregates finds out as it claims."""
    limits = replace(QUICK, fleet_sweep_seconds=3600.0, host_down_seconds=7200.0)
    async with deployment(tmp_path / "data", databases=databases, limits=limits) as running:
        await running.make_flavor()

        def behind_its_back(tx: ApiTx) -> None:
            made = aggregates.create(tx, ONE, "east", {ZONE_KEY: "east"}).id
            for host in ("cell1-h1", "cell1-h2", "cell2-h1"):
                aggregates.add_host(tx, made, host)

        await running.app.databases.on(API).write(behind_its_back)
        servers = [await running.boot("nova", availability_zone="nova") for _ in range(4)]
        assert {await host_of(running, server) for server in servers} == {"cell2-h2"}

        def again(tx: ApiTx) -> None:
            aggregates.add_host(tx, aggregates.create(tx, TWO, "west", {ZONE_KEY: "west"}).id, "cell2-h2")

        await running.app.databases.on(API).write(again)
        assert await host_of(running, await running.boot("west", availability_zone="west")) == "cell2-h2"


@pytest.mark.anyio
async def test_zones_that_change_while_servers_are_built(running: Deployment) -> None:
    """Whatever happens at once, each server runs in the zone that it asked for, and stays in it."""
    client = running.admin
    east = await make(client, "east", "cell1-h1", availability_zone="east")
    done = asyncio.Event()
    seen: Counter[int] = Counter()

    async def move(host: str) -> None:
        while not done.is_set():
            for action in ("add_host", "remove_host"):
                seen[(await act(client, east, action, host=host)).status] += 1

    async def boot(number: int) -> None:
        for zone in ("east", "nova"):
            server = await running.boot(f"{zone}-{number}", availability_zone=zone)
            await running.until_status(server, "ACTIVE")
            if number % 2:
                await running.member.delete(f"/servers/{server}")

    moving = [asyncio.create_task(move(host)) for host in ("cell1-h2", "cell2-h1")]
    await asyncio.gather(*(boot(number) for number in range(6)))
    done.set()
    await asyncio.gather(*moving)
    assert {*seen} <= {200, 404, 409}, seen
    claims = await running.in_api(
        lambda tx: tx.execute(sa.select(host_claims.c.host, host_claims.c.instance_uuid)).all()
    )
    found = await running.in_api(lambda tx: aggregates.zones_of(tx, [host for host, _ in claims]))
    listed = (await running.admin.get("/servers/detail?all_tenants=1")).json["servers"]
    asked = {server["id"]: server["OS-EXT-AZ:availability_zone"] for server in listed}
    actual = {uuid: found.get(host, ("nova",))[0] for host, uuid in claims if uuid in asked}
    assert len(actual) >= 6
    assert actual == {uuid: asked[uuid] for uuid in actual}


@pytest.mark.anyio
async def test_aggregates_steer_servers_over_all_cells(running: Deployment) -> None:
    """A flavor's extra specs lead to hosts whose aggregates match, and hosts kept for a project take no others."""
    client = running.admin
    await make(client, "fast", "cell1-h1", "cell2-h1", ssd="true", iops="9000")
    await make(client, "slow", "cell1-h2", ssd="false")
    mine = await client.get("/servers")
    assert mine.status == 200
    await running.make_flavor("quick")
    specs = {"aggregate_instance_extra_specs:ssd": "true", "aggregate_instance_extra_specs:iops": ">= 5000"}
    assert (await client.post("/flavors/quick/os-extra_specs", {"extra_specs": specs})).status == 200
    quick = [await running.boot("quick", flavor="quick") for _ in range(4)]
    assert {await host_of(running, server) for server in quick} == {"cell1-h1", "cell2-h1"}
    first = (await running.member.get(f"/servers/{quick[0]}")).json["server"]
    others = await running.add_user("other", "elsewhere", "member")
    await make(client, "kept", "cell1-h1", "cell1-h2", "cell2-h2", filter_tenant_id=f"nobody, {first['tenant_id']}")
    strangers = [await running.boot("stranger", others) for _ in range(3)]
    assert {await host_of(running, server) for server in strangers} == {"cell2-h1"}
    await make(client, "kept too", "cell2-h1", filter_tenant_id2="nobody")
    refused = await running.boot("refused", others)
    fault = (await running.until_status(refused, "ERROR", others))["fault"]["message"]
    assert fault == "No valid host was found (4 by project isolation of aggregates)."


@pytest.mark.anyio
async def test_a_removed_host_leaves_its_aggregates(running: Deployment) -> None:
    """With its compute service it goes from all of them, and its zone goes when it was the last."""
    client = running.admin
    east = await make(client, "east", "cell2-h2", availability_zone="east")
    services = (await client.get("/os-services")).json["services"]
    (service,) = [one["id"] for one in services if one["host"] == "cell2-h2"]
    await running.app.agents.pop("cell2-h2").aclose()
    assert (await client.delete(f"/os-services/{service}")).status == 204
    assert (await client.get(f"/os-aggregates/{east}")).json["aggregate"]["hosts"] == []
    assert {*await zones(running)} == {"nova"}
    assert (await act(client, east, "add_host", host="cell2-h2")).status == 404
