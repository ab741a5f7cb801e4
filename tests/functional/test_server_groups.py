"""Server groups: the rows on a real API database, and where servers of a group end up, whoever builds them at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway import hosts, server_groups
from cellway.cells import mappings
from cellway.compute.build import Builder
from cellway.config import Secret
from cellway.db.api_tables import (
    build_claims,
    delete_requests,
    host_claims,
    instance_group_member,
    instance_group_policy,
    instance_groups,
)
from cellway.db.engines import API
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import NotFound
from cellway.hosts import Claim
from cellway.server_groups import Placement, Policy, ServerGroup
from cellway.testing import NO_QUOTA, TINY_IMAGE, Deployment, deployment
from tests.databases import KINDS, Shelf, Urls, engine_of, upgraded
from tests.functional.test_builds import check, make_builder

NOW = datetime(2026, 3, 1, 12, 30, 15)
ONE, TWO, THREE = (f"5b0d9e0e-6a7c-4c0e-9d8e-{number:012}" for number in (1, 2, 3))


# ---- the noun --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf
) -> Iterator[sa.Engine]:
    """Give an API database of each kind for the module; every test rolls back what it wrote."""
    if request.param == "sqlite":
        url = upgraded(Secret(f"sqlite:///{tmp_path_factory.mktemp('groups') / 'api.sqlite'}"), Tree.API)
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


def make(tx: ApiTx, uuid: str, project: str = "blue", user: str = "alice", policy: Policy = "affinity") -> ServerGroup:
    """Make a group."""
    return server_groups.create(tx, uuid, project_id=project, user_id=user, name="g", policy=policy)


def join(tx: ApiTx, group: str, *servers: str, user: str = "alice") -> None:
    """Accept servers of a user into a group."""
    mappings.create_instances(tx, servers, project_id="blue", user_id=user)
    server_groups.add_members(tx, group, servers)


def test_a_group_reads_back_as_it_was_made(tx: ApiTx) -> None:
    """What create returns is what get returns, with the policy and its rule."""
    made = server_groups.create(
        tx, ONE, project_id="blue", user_id="alice", name="web", policy="anti-affinity", max_server_per_host=3
    )
    assert made == server_groups.get(tx, ONE)
    assert made == ServerGroup(
        uuid=ONE,
        project_id="blue",
        user_id="alice",
        name="web",
        policy="anti-affinity",
        max_server_per_host=3,
    )
    assert server_groups.find_placement(tx, ONE) == Placement("anti-affinity", 3, {})


def test_groups_are_listed_a_page_at_a_time(tx: ApiTx) -> None:
    """They come in the order in which they were made, of one project or of all, each with its own members."""
    for uuid, project in ((TWO, "blue"), (ONE, "green"), (THREE, "blue")):
        make(tx, uuid, project)
    join(tx, TWO, "a", "b")
    join(tx, THREE, "c")
    listed = server_groups.list(tx, None, limit=10)
    assert [(group.uuid, group.members) for group in listed] == [(TWO, ("a", "b")), (ONE, ()), (THREE, ("c",))]
    assert [group.uuid for group in server_groups.list(tx, "blue", limit=10)] == [TWO, THREE]
    assert [group.uuid for group in server_groups.list(tx, "blue", limit=1, offset=1)] == [THREE]
    assert [group.uuid for group in server_groups.list(tx, None, limit=2, offset=1)] == [ONE, THREE]
    assert server_groups.list(tx, "red", limit=10) == []


def test_members_are_shown_and_counted_while_their_servers_live(tx: ApiTx) -> None:
    """One that is to be deleted is a member no more, though its host counts until it is gone."""
    make(tx, ONE)
    join(tx, ONE, "a", "b")
    join(tx, ONE, "c", user="bob")
    assert [server_groups.count_members(tx, ONE, user) for user in ("alice", "bob", "carol")] == [2, 1, 0]
    claim(tx, "a", "h1")
    mappings.queue_instance_for_delete(tx, "a")
    assert server_groups.get(tx, ONE).members == ("b", "c")
    assert server_groups.count_members(tx, ONE, "alice") == 1
    assert server_groups.find_placement(tx, ONE) == Placement("affinity", 1, {"h1": 1})
    server_groups.remove_member(tx, "a")
    assert server_groups.find_placement(tx, ONE) == Placement("affinity", 1, {})
    server_groups.remove_member(tx, "a")
    assert server_groups.get(tx, ONE).members == ("b", "c")


def claim(tx: ApiTx, server: str, host: str) -> None:
    """Let a server have a host."""
    tx.execute(
        sa.insert(host_claims),
        {"instance_uuid": server, "host": host, "cell_id": 1, "vcpus": 1, "memory_mb": 1, "disk_gb": 1},
    )


def test_a_placement_counts_the_groups_own_members_on_each_host(tx: ApiTx) -> None:
    """Members without a host, and other groups' members, do not count."""
    make(tx, ONE, policy="soft-affinity")
    make(tx, TWO)
    join(tx, ONE, "a", "b", "c", "d")
    join(tx, TWO, "e")
    for server, host in (("a", "h1"), ("b", "h2"), ("c", "h1"), ("e", "h1")):
        claim(tx, server, host)
    for hold in (False, True):
        assert server_groups.find_placement(tx, ONE, hold=hold) == Placement("soft-affinity", 1, {"h1": 2, "h2": 1})


def test_groups_are_counted_for_a_project_and_for_a_user(tx: ApiTx) -> None:
    """A user's groups in another project count there."""
    for uuid, project, user in ((ONE, "blue", "alice"), (TWO, "blue", "bob"), (THREE, "green", "alice")):
        make(tx, uuid, project, user)
    assert server_groups.count_groups(tx, "blue") == 2
    assert [server_groups.count_groups(tx, "blue", user) for user in ("alice", "bob", "carol")] == [1, 1, 0]


def test_a_deleted_group_leaves_nothing(tx: ApiTx) -> None:
    """Policy and members go with it, and other groups stay."""
    make(tx, ONE)
    make(tx, TWO)
    join(tx, ONE, "a")
    join(tx, TWO, "b")
    server_groups.delete(tx, ONE)
    for call in (server_groups.get, server_groups.delete):
        with pytest.raises(NotFound) as caught:
            call(tx, ONE)
        assert caught.value.code == "server_group.not_found"
    with pytest.raises(NotFound):
        server_groups.add_members(tx, ONE, ["c"])
    assert server_groups.find_placement(tx, ONE) is None
    assert server_groups.find_placement(tx, ONE, hold=True) is None
    assert server_groups.get(tx, TWO).members == ("b",)
    assert len(tx.execute(sa.select(instance_group_policy)).all()) == 1


def test_what_an_adopted_database_holds_is_understood(tx: ApiTx) -> None:
    """Numbers written as text, a group without a policy, and members whose servers are long gone."""
    made = {"project_id": "blue", "user_id": "alice", "name": "old"}
    tx.execute(sa.insert(instance_groups), [made | {"uuid": ONE}, made | {"uuid": TWO, "name": None}])
    ids = {row.uuid: row.id for row in tx.execute(sa.select(instance_groups))}
    rules = '{"max_server_per_host": "2"}'
    policy = {"group_id": ids[ONE], "policy": "anti-affinity", "rules": rules}
    tx.execute(sa.insert(instance_group_policy), policy)
    tx.execute(sa.insert(instance_group_member), {"group_id": ids[ONE], "instance_uuid": "purged"})
    assert server_groups.get(tx, ONE).max_server_per_host == 2
    assert server_groups.find_placement(tx, ONE) == Placement("anti-affinity", 2, {})
    assert server_groups.get(tx, ONE).members == ()
    assert (server_groups.get(tx, TWO).policy, server_groups.get(tx, TWO).name) == ("", "")
    assert server_groups.find_placement(tx, TWO) == Placement("", 1, {})


# ---- servers ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def unbuilt(tmp_path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each, and no builder yet."""
    async with deployment(tmp_path / "data", databases=databases, builder=False) as running:
        await running.make_flavor()
        yield running


async def new_group(running: Deployment, policy: str) -> str:
    """Make a group of the member's."""
    answer = await running.member.post("/os-server-groups", {"server_group": {"name": policy, "policies": [policy]}})
    assert answer.status == 200, answer.body
    return str(answer.json["server_group"]["id"])


async def boot_into(running: Deployment, group: str, count: int, **more: Any) -> list[str]:
    """Ask for servers of a group, and return their ids."""
    wanted = {"name": "s", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none", "min_count": count}
    before = set(await members(running, group))
    body = {"server": wanted | more, "os:scheduler_hints": {"group": group}}
    answer = await running.member.post("/servers", body)
    assert answer.status == 202, answer.body
    return [server for server in await members(running, group) if server not in before]


async def members(running: Deployment, group: str) -> list[str]:
    """Return the members that the API shows."""
    shown: list[str] = (await running.member.get(f"/os-server-groups/{group}")).json["server_group"]["members"]
    return shown


async def built(running: Deployment) -> dict[str, Any]:
    """Let two builders finish everything, and return all servers by id."""
    other: Builder = make_builder(running)
    while await other.run_once():
        pass
    running.app.start_builder()

    async def finished() -> bool:
        return not await running.in_api(lambda tx: tx.execute(sa.select(build_claims.c.id)).all())

    await running.until(finished)
    await other.aclose(5.0)
    listed = (await running.admin.get("/servers/detail?all_tenants=1")).json["servers"]
    return {server["id"]: server for server in listed}


def states(servers: dict[str, Any]) -> dict[str, str]:
    """Return the servers' states."""
    return {uuid: server["status"] for uuid, server in servers.items()}


def spread(servers: dict[str, Any]) -> list[int]:
    """Return how many servers each host has that has any."""
    hosts = [server["OS-EXT-SRV-ATTR:host"] for server in servers.values()]
    return sorted(Counter(host for host in hosts if host is not None).values())


@pytest.mark.anyio
async def test_eight_that_shun_each_other_on_four_hosts(unbuilt: Deployment) -> None:
    """Four run, each on a host of its own over both cells; four are in cell0 and say why."""
    group = await new_group(unbuilt, "anti-affinity")
    asked = await boot_into(unbuilt, group, 8)
    assert len(asked) == 8
    servers = await built(unbuilt)
    assert spread(servers) == [1, 1, 1, 1]
    assert Counter(states(servers).values()) == {"ACTIVE": 4, "ERROR": 4}
    faults = {server["fault"]["message"] for server in servers.values() if server["status"] == "ERROR"}
    assert faults == {"No valid host was found (4 by server group)."}
    assert sorted(await members(unbuilt, group)) == sorted(asked)
    await check(unbuilt, states(servers))


@pytest.mark.anyio
async def test_eight_that_stay_together(unbuilt: Deployment) -> None:
    """All run on one host, though two builders began with them at once and every host was as good."""
    await boot_into(unbuilt, await new_group(unbuilt, "affinity"), 8)
    servers = await built(unbuilt)
    assert spread(servers) == [8]
    await check(unbuilt, states(servers))


@pytest.mark.anyio
async def test_those_that_stay_together_need_room_together(unbuilt: Deployment) -> None:
    """When the host is full the rest are in cell0, while the other hosts are empty."""
    await unbuilt.make_flavor("slice", vcpus=8)
    await boot_into(unbuilt, await new_group(unbuilt, "affinity"), 10, flavorRef="slice")
    servers = await built(unbuilt)
    assert spread(servers) == [8]
    assert Counter(states(servers).values()) == {"ACTIVE": 8, "ERROR": 2}
    await check(unbuilt, states(servers), vcpus=8)


@pytest.mark.anyio
async def test_those_that_would_rather_be_together(unbuilt: Deployment) -> None:
    """They fill one host, and go on to another when it is full."""
    await unbuilt.make_flavor("slice", vcpus=8)
    await boot_into(unbuilt, await new_group(unbuilt, "soft-affinity"), 10, flavorRef="slice")
    servers = await built(unbuilt)
    assert spread(servers) == [2, 8]
    await check(unbuilt, states(servers), vcpus=8)


@pytest.mark.anyio
async def test_those_that_would_rather_be_apart(unbuilt: Deployment) -> None:
    """They are on all hosts alike, and run all the same when there are more of them than hosts."""
    await boot_into(unbuilt, await new_group(unbuilt, "soft-anti-affinity"), 10)
    servers = await built(unbuilt)
    assert spread(servers) == [2, 2, 3, 3]
    await check(unbuilt, states(servers))


@pytest.mark.anyio
async def test_so_many_on_one_host(unbuilt: Deployment) -> None:
    """The rule of an anti-affinity group says how many of it a host may have."""
    first = await unbuilt.boot("alone")
    shown = (await unbuilt.member.get(f"/servers/{first}")).json["server"]
    await unbuilt.app.databases.on(API).write(
        server_groups.create,
        ONE,
        project_id=shown["tenant_id"],
        user_id=shown["user_id"],
        name="pairs",
        policy="anti-affinity",
        max_server_per_host=2,
    )
    asked = await boot_into(unbuilt, ONE, 10)
    servers = await built(unbuilt)
    await check(unbuilt, states(servers))
    assert spread({uuid: servers[uuid] for uuid in asked}) == [2, 2, 2, 2]


@pytest.mark.anyio
async def test_a_host_is_free_again_when_its_member_is_gone(unbuilt: Deployment) -> None:
    """Deleted servers leave the group, running or buried, and the next one gets the host that one had."""
    group = await new_group(unbuilt, "anti-affinity")
    await boot_into(unbuilt, group, 5)
    servers = await built(unbuilt)
    for status in ("ACTIVE", "ERROR"):
        gone = next(uuid for uuid, server in servers.items() if server["status"] == status)
        assert (await unbuilt.member.delete(f"/servers/{gone}")).status == 204
        assert gone not in await members(unbuilt, group)

    async def settled() -> bool:
        return not await unbuilt.in_api(lambda tx: tx.execute(sa.select(delete_requests.c.id)).all())

    await unbuilt.until(settled)
    left = await unbuilt.in_api(lambda tx: tx.execute(sa.select(instance_group_member.c.instance_uuid)).scalars().all())
    assert sorted(left) == sorted(await members(unbuilt, group))
    assert len(left) == 3
    [new] = await boot_into(unbuilt, group, 1)
    assert (await unbuilt.until_status(new, "ACTIVE"))["id"] == new
    [late] = await boot_into(unbuilt, group, 1)
    await unbuilt.until_status(late, "ERROR")


@pytest.mark.anyio
async def test_a_deleted_group_leaves_its_servers(unbuilt: Deployment) -> None:
    """Those that run go on, and one that waits to be built is built as if it were in none."""
    group = await new_group(unbuilt, "anti-affinity")
    await boot_into(unbuilt, group, 6)
    assert (await unbuilt.member.delete(f"/os-server-groups/{group}")).status == 204
    servers = await built(unbuilt)
    assert set(states(servers).values()) == {"ACTIVE"}
    await check(unbuilt, states(servers))
    assert await unbuilt.in_api(lambda tx: tx.execute(sa.select(instance_group_member)).all()) == []


@pytest.mark.anyio
async def test_whoever_holds_a_group_sees_every_host_that_was_taken_before(unbuilt: Deployment) -> None:
    """Of eight transactions at once that each take a host for a member if the policy allows it, one does."""
    group = await new_group(unbuilt, "anti-affinity")
    asked = await boot_into(unbuilt, group, 8)
    cell = unbuilt.cell("cell1")

    def take(tx: ApiTx, server: str) -> bool:
        placement = server_groups.find_placement(tx, group, hold=True)
        assert placement is not None
        return not placement.hosts and hosts.claim(tx, Claim(server, "cell1-h1", cell.id, 1, 1, 1))

    api = unbuilt.app.databases.on(API)
    taken = await asyncio.gather(*(api.write(take, server) for server in asked))
    assert sorted(taken) == [False] * 7 + [True]


# ---- their limits ----------------------------------------------------------------------------------------------

GROUPS, MEMBERS = 3, 4


@pytest.fixture
async def limited(tmp_path: Path, databases: Urls) -> AsyncIterator[Deployment]:
    """A deployment where a project may have 3 groups, and a user 4 servers in each."""
    quota = replace(NO_QUOTA, server_groups=GROUPS, server_group_members=MEMBERS)
    async with deployment(tmp_path / "data", databases=databases, quota=quota) as running:
        await running.make_flavor()
        yield running


@pytest.mark.anyio
async def test_no_more_groups_than_the_limit(limited: Deployment) -> None:
    """Of eight who ask at once three get a group; a deleted one makes room for another, once."""
    asked = {"server_group": {"name": "g", "policies": ["affinity"]}}

    async def ask() -> tuple[int, Any]:
        answer = await limited.member.post("/os-server-groups", asked)
        return answer.status, answer.json

    answers = await asyncio.gather(*(ask() for _ in range(8)))
    assert Counter(status for status, _ in answers) == {200: GROUPS, 403: 8 - GROUPS}
    groups = [body["server_group"]["id"] for status, body in answers if status == 200]
    for group in (groups[0], groups[0]):
        await limited.member.delete(f"/os-server-groups/{group}")
    assert [(await ask())[0] for _ in range(2)] == [200, 403]
    used = (await limited.member.get("/limits")).json["limits"]["absolute"]
    assert (used["totalServerGroupsUsed"], used["maxServerGroups"]) == (GROUPS, GROUPS)


@pytest.mark.anyio
async def test_no_more_members_than_the_limit(limited: Deployment) -> None:
    """Of eight servers that are asked for at once four get into the group, and the others are not made."""
    group = await new_group(limited, "soft-affinity")
    wanted = {"name": "s", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}
    body = {"server": wanted, "os:scheduler_hints": {"group": group}}
    answers = await asyncio.gather(*(limited.member.post("/servers", body) for _ in range(8)))
    assert Counter(answer.status for answer in answers) == {202: MEMBERS, 403: 8 - MEMBERS}
    assert len(await members(limited, group)) == MEMBERS
    assert len((await limited.member.get("/servers")).json["servers"]) == MEMBERS
    used = (await limited.member.get("/limits")).json["limits"]["absolute"]
    assert used["totalInstancesUsed"] == MEMBERS
