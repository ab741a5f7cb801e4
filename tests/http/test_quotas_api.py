"""Quota sets, quota classes and what they forbid, over HTTP: exact keys, refusals, and nothing left behind by one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import sqlalchemy as sa
from starlette.datastructures import QueryParams

from cellway.config import QuotaSection
from cellway.context import RequestContext
from cellway.db.api_tables import (
    build_claims,
    build_requests,
    instance_mappings,
    quota_usages,
    reservations,
    server_charges,
)
from cellway.db.transaction import ApiTx
from cellway.errors import Invalid
from cellway.http import limits, quotas
from cellway.http.routes import Handler
from cellway.http.wire import Call
from cellway.ids import ProjectId, RequestId, UserId
from cellway.testing import TINY_IMAGE, Client, Deployment, Response
from cellway.testing import deployment as open_deployment

pytestmark = pytest.mark.anyio

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd"
SECTION = QuotaSection(instances=3, cores=5, ram=2048, metadata_items=2, key_pairs=2)
ALWAYS = {"instances", "cores", "ram", "metadata_items", "key_pairs"}
GROUPS = {"server_groups", "server_group_members"}
INJECTED = {"injected_files", "injected_file_content_bytes", "injected_file_path_bytes"}
NETWORK = {"fixed_ips", "floating_ips", "security_groups", "security_group_rules"}
CONFIGURED = {
    "instances": 3, "cores": 5, "ram": 2048, "metadata_items": 2, "key_pairs": 2, "server_groups": 10,
    "server_group_members": 10, "injected_files": 5, "injected_file_content_bytes": 10240,
    "injected_file_path_bytes": 255, "fixed_ips": -1, "floating_ips": -1, "security_groups": -1,
    "security_group_rules": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Owner:
    """A member of a project of its own."""

    client: Client
    project: str
    user: str


@pytest.fixture(scope="module")
async def limited(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Deployment]:
    """A deployment whose configuration limits everybody, in which nothing builds before a test starts the builder."""
    path = tmp_path_factory.mktemp("limited")
    async with open_deployment(path, cells=1, hosts_per_cell=1, quota=SECTION, builder=False) as running:
        await running.make_flavor()
        await running.make_flavor("m1.two", vcpus=2, ram=1024)
        yield running


@pytest.fixture
async def owner(limited: Deployment) -> Owner:
    """A member of a new project."""
    return await join(limited, f"project-{uuid4()}")


async def join(limited: Deployment, project: str, user: str | None = None) -> Owner:
    """Add a member to a new or existing project."""
    name = user or f"{project}-user"
    client = await limited.add_user(name, project, "member")
    found, known = limited.identity.store.find_project_named(project), limited.identity.store.find_user_named(name)
    assert found is not None
    assert known is not None
    return Owner(client, found.id, known.id)


async def shown(client: Client, path: str) -> Any:
    """Return the quota set, or class set, at a path."""
    answer = await client.get(path)
    assert answer.status == 200, answer.body
    [body] = answer.json.values()
    return body


async def change(limited: Deployment, path: str, **limits: Any) -> Response:
    """Set limits as an admin."""
    return await limited.admin.put(f"/os-quota-sets/{path}", {"quota_set": limits})


def refused(answer: Response, status: int = 400) -> str:
    """Return why a request was refused."""
    assert answer.status == status, answer.body
    [(name, fault)] = answer.json.items()
    assert name == {400: "badRequest", 403: "forbidden"}[status]
    return str(fault["message"])


async def boot(client: Client, flavor: str = "m1.tiny", **more: Any) -> Response:
    """Ask for servers."""
    wanted = {"name": "one", "flavorRef": flavor, "imageRef": TINY_IMAGE, "networks": "none"} | more
    return await client.post("/servers", {"server": wanted})


async def snapshot(limited: Deployment) -> dict[str, list[Any]]:
    """Return every row that a create writes."""
    tables = (quota_usages, reservations, server_charges, instance_mappings, build_requests, build_claims)

    def read(tx: ApiTx) -> dict[str, list[Any]]:
        return {table.name: [tuple(row) for row in tx.execute(sa.select(table))] for table in tables}

    rows: dict[str, list[Any]] = await limited.in_api(read)
    return rows


# ---- what is shown ---------------------------------------------------------------------------------------------

VERSIONS = [
    ("2.1", ALWAYS | GROUPS | INJECTED | NETWORK), ("2.35", ALWAYS | GROUPS | INJECTED | NETWORK),
    ("2.36", ALWAYS | GROUPS | INJECTED), ("2.49", ALWAYS | GROUPS | INJECTED), ("2.50", ALWAYS | GROUPS | INJECTED),
    ("2.53", ALWAYS | GROUPS | INJECTED),
]  # fmt: skip
CLASS_VERSIONS = [
    ("2.1", ALWAYS | INJECTED | NETWORK), ("2.36", ALWAYS | INJECTED | NETWORK), ("2.49", ALWAYS | INJECTED | NETWORK),
    ("2.50", ALWAYS | GROUPS | INJECTED), ("2.53", ALWAYS | GROUPS | INJECTED),
]  # fmt: skip


@pytest.mark.parametrize(("version", "keys"), VERSIONS)
async def test_a_quota_set_has_the_keys_of_its_microversion(
    limited: Deployment, owner: Owner, version: str, keys: set[str]
) -> None:
    """Show, defaults, detail and update have exactly these; an update has no id, and takes no others."""
    path = f"/os-quota-sets/{owner.project}"
    configured = {key: CONFIGURED[key] for key in keys}
    for call in (path, f"{path}/defaults", f"{path}?user_id={owner.user}"):
        assert await shown(owner.client.at(version), call) == configured | {"id": owner.project}
    for call in (f"{path}/detail", f"{path}/detail?user_id={owner.user}"):
        assert await shown(owner.client.at(version), call) == {
            key: {"limit": limit, "in_use": 0, "reserved": 0} for key, limit in configured.items()
        } | {"id": owner.project}
    admin = limited.admin.at(version)
    answer = await admin.put(path, {"quota_set": dict.fromkeys(keys, 7)})
    assert (answer.status, answer.json) == (200, {"quota_set": dict.fromkeys(keys, 7)})
    for other in CONFIGURED.keys() - keys | {"networks"}:
        assert other in refused(await admin.put(path, {"quota_set": {other: 7}}))
    assert await shown(owner.client.at(version), path) == dict.fromkeys(keys, 7) | {"id": owner.project}
    assert await shown(owner.client.at(version), f"{path}/defaults") == configured | {"id": owner.project}


@pytest.mark.parametrize(("version", "keys"), CLASS_VERSIONS)
async def test_a_class_set_has_the_keys_of_its_microversion(limited: Deployment, version: str, keys: set[str]) -> None:
    """Any name is a class, server groups are there from 2.50 on, and an update has no id and takes no other keys."""
    admin, path = limited.admin.at(version), f"/os-quota-class-sets/of-{version}"
    assert await shown(admin, path) == {key: CONFIGURED[key] for key in keys} | {"id": f"of-{version}"}
    answer = await admin.put(path, {"quota_class_set": {"cores": 9, "metadata_items": "-1"}})
    changed = {key: CONFIGURED[key] for key in keys} | {"cores": 9, "metadata_items": -1}
    assert (answer.status, answer.json) == (200, {"quota_class_set": changed})
    assert await shown(admin, path) == changed | {"id": f"of-{version}"}
    for other in CONFIGURED.keys() - keys | {"networks", "force"}:
        assert other in refused(await admin.put(path, {"quota_class_set": {other: 7}}))


async def test_only_the_class_default_is_in_force(limited: Deployment, owner: Owner) -> None:
    """Its limits stand between a project's and the configured ones; those of another class are only kept."""
    path = f"/os-quota-sets/{owner.project}"
    assert (await limited.admin.put("/os-quota-class-sets/gold", {"quota_class_set": {"cores": 99}})).status == 200
    assert (await shown(owner.client, path))["cores"] == CONFIGURED["cores"]
    try:
        body = {"quota_class_set": {"injected_files": 77, "metadata_items": 78}}
        assert (await limited.admin.put("/os-quota-class-sets/default", body)).status == 200
        assert (await change(limited, owner.project, metadata_items=8)).status == 200
        for call, expected in ((path, (77, 8)), (f"{path}/defaults", (77, 78))):
            found = await shown(owner.client, call)
            assert (found["injected_files"], found["metadata_items"]) == expected
        assert (await shown(limited.admin, "/os-quota-class-sets/gold"))["injected_files"] == 77
    finally:
        given = {"injected_files": CONFIGURED["injected_files"], "metadata_items": CONFIGURED["metadata_items"]}
        await limited.admin.put("/os-quota-class-sets/default", {"quota_class_set": given})


# ---- changing --------------------------------------------------------------------------------------------------


async def test_a_user_has_limits_of_its_own_until_they_are_deleted(limited: Deployment, owner: Owner) -> None:
    """Those of a user are within the project's and change nobody else's; a delete brings the project's back."""
    path = f"/os-quota-sets/{owner.project}"
    user = f"{path}?user_id={owner.user}"
    answer = await change(limited, f"{owner.project}?user_id={owner.user}", cores=2)
    assert (answer.status, answer.json["quota_set"]["cores"]) == (200, 2)
    assert (await shown(owner.client, user))["cores"] == 2
    for call in (path, f"{path}?user_id=somebody", f"{path}/defaults"):
        assert (await shown(owner.client, call))["cores"] == 5
    assert refused(await change(limited, f"{owner.project}?user_id=other", cores=4)) == (
        "Quota limit 4 for cores must be less than or equal to 3."
    )
    for limit, least in ((-1, "less than or equal to 3"), (6, "less than or equal to 3")):
        assert least in refused(await change(limited, f"{owner.project}?user_id=other", cores=limit))
    assert (await change(limited, f"{owner.project}?user_id=other", cores=4, force=True)).status == 200
    assert refused(await change(limited, owner.project, cores=5)) == (
        "Quota limit 5 for cores must be greater than or equal to already used and reserved 6."
    )
    assert (await limited.admin.delete(user)).status == 202
    assert (await shown(owner.client, user))["cores"] == 5
    assert (await shown(limited.admin, f"{path}?user_id=other"))["cores"] == 4


async def test_deleting_is_accepted_also_when_there_is_nothing(limited: Deployment, owner: Owner) -> None:
    """DELETE is a 202 without a body, takes the limits of all users too, and may be repeated."""
    path = f"/os-quota-sets/{owner.project}"
    for call in (path, f"{path}?user_id={owner.user}"):
        answer = await limited.admin.delete(call)
        assert (answer.status, answer.body) == (202, b"")
    await change(limited, owner.project, cores=4, ram=-1)
    await change(limited, f"{owner.project}?user_id={owner.user}", cores=1)
    for _ in range(2):
        assert (await limited.admin.delete(path)).status == 202
        for call in (path, f"{path}?user_id={owner.user}"):
            found = await shown(owner.client, call)
            assert (found["cores"], found["ram"]) == (5, 2048)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cores": -2}, {"cores": "-2"}, {"cores": 2**31}, {"cores": str(2**31)}, {"cores": 10**30}, {"cores": 1.5},
        {"cores": "9" * 200}, {"cores": "9" * 5000}, {"cores": None}, {"cores": True}, {"cores": "many"},
        {"cores": ""}, {"cores": "1\n"}, {"cores": "٣"}, {"cores": [1]}, {"cores": {}}, {"networks": 1},
        {"tenant_id": "x"}, {"id": 1}, {"Cores": 1}, {"force": "maybe"}, {"force": None}, {"force": 2}, {"": 1},
    ],
    ids=str,
)  # fmt: skip
async def test_what_is_no_limit_changes_nothing(limited: Deployment, owner: Owner, wrong: dict[str, Any]) -> None:
    """One wrong value or key refuses the whole update, the good ones before and after it included."""
    path = f"/os-quota-sets/{owner.project}"
    before = await shown(owner.client, path)
    refused(await change(limited, owner.project, instances=1, **wrong, ram=1))
    assert await shown(owner.client, path) == before
    if "force" not in wrong:
        body = {"quota_class_set": {"instances": 1, **wrong, "ram": 1}}
        refused(await limited.admin.put("/os-quota-class-sets/wrong", body))
        assert (await shown(limited.admin, "/os-quota-class-sets/wrong"))["instances"] == 3


@pytest.mark.parametrize(
    "body", [None, [], {}, {"quota_set": None}, {"quota_set": []}, {"quota_set": {}, "x": 1}, {"quota_class_set": {}}]
)
async def test_a_body_of_another_shape_is_a_400(limited: Deployment, owner: Owner, body: Any) -> None:
    """Only a quota set is one; an empty one changes nothing."""
    refused(await limited.admin.put(f"/os-quota-sets/{owner.project}", body))
    assert (await change(limited, owner.project)).status == 200


async def test_the_largest_and_the_written_numbers_are_taken(limited: Deployment, owner: Owner) -> None:
    """-1 to 2^31-1, as numbers or as text, as the incumbent does; `force` in its spellings too."""
    for given, kept in ((0, 0), ("0", 0), (-1, -1), ("-1", -1), (2**31 - 1, 2**31 - 1), ("2147483647", 2**31 - 1)):
        answer = await change(limited, owner.project, cores=given, force="true")
        assert (answer.status, answer.json["quota_set"]["cores"]) == (200, kept)
    assert (await boot(owner.client)).status == 202


async def test_a_project_that_is_none_is_a_400(limited: Deployment, owner: Owner) -> None:
    """Each call on a project that the identity service does not know is refused, and so is a name too long."""
    for method, path in (
        ("GET", ""), ("GET", "/detail"), ("GET", "/defaults"), ("PUT", ""), ("DELETE", ""),
    ):  # fmt: skip
        body = {"quota_set": {"cores": 1}} if method == "PUT" else None
        answer = await limited.admin.request(method, f"/os-quota-sets/nobody{path}", body)
        assert refused(answer) == "Project ID nobody is not a valid project."
    refused(await limited.admin.get(f"/os-quota-sets/{owner.project}?user_id={'u' * 256}"))
    refused(await limited.admin.get(f"/os-quota-class-sets/{'c' * 256}"))
    assert (await limited.admin.get(f"/os-quota-class-sets/{'c' * 255}")).status == 200


async def test_a_member_sees_its_own_project_and_changes_nothing(limited: Deployment, owner: Owner) -> None:
    """Another's limits, and every change, are an admin's; the defaults are anybody's."""
    other = await join(limited, "quota-other")
    for path in (f"/os-quota-sets/{owner.project}", f"/os-quota-sets/{owner.project}/detail"):
        assert (await owner.client.get(path)).status == 200
        refused(await other.client.get(path), 403)
        assert (await limited.admin.get(path)).status == 200
    assert (await other.client.get(f"/os-quota-sets/{owner.project}/defaults")).status == 200
    for who in (owner, other):
        refused(await who.client.put(f"/os-quota-sets/{owner.project}", {"quota_set": {"cores": 1}}), 403)
        refused(await who.client.delete(f"/os-quota-sets/{owner.project}"), 403)
        refused(await who.client.get("/os-quota-class-sets/default"), 403)
        refused(await who.client.put("/os-quota-class-sets/default", {"quota_class_set": {"cores": 1}}), 403)


# ---- usage -----------------------------------------------------------------------------------------------------


async def test_a_limit_is_not_set_below_what_is_used_unless_forced(limited: Deployment, owner: Owner) -> None:
    """A refused update leaves all as it was; a forced one refuses whatever comes next, and takes nothing away."""
    assert (await boot(owner.client, "m1.two")).status == 202
    for path in (owner.project, f"{owner.project}?user_id={owner.user}"):
        assert refused(await change(limited, path, metadata_items=1, cores=1)) == (
            "Quota limit 1 for cores must be greater than or equal to already used and reserved 2."
        )
    assert (await shown(owner.client, f"/os-quota-sets/{owner.project}"))["metadata_items"] == 2
    assert (await change(limited, owner.project, cores=2)).status == 200
    assert (await change(limited, owner.project, cores=1, force=True)).status == 200
    assert refused(await boot(owner.client), 403) == (
        "Quota exceeded for cores: Requested 1, but already used 2 of 1 cores"
    )
    assert len((await owner.client.get("/servers")).json["servers"]) == 1


async def used(client: Client, call: str) -> dict[str, tuple[int, int]]:
    """Return what is in use and what is reserved of what servers take."""
    found = await shown(client, call)
    return {name: (found[name]["in_use"], found[name]["reserved"]) for name in ("instances", "cores", "ram")}


async def test_detail_and_limits_say_what_is_reserved_and_in_use(tmp_path: Path) -> None:
    """A server is reserved while it is built and in use from then on, of its project and its user alone."""
    async with open_deployment(tmp_path, cells=1, hosts_per_cell=1, quota=SECTION, builder=False) as running:
        await running.make_flavor("m1.two", vcpus=2, ram=1024)
        owner, colleague, other = [await join(running, *who) for who in (("p", "a"), ("p", "b"), ("q", "c"))]
        path = f"/os-quota-sets/{owner.project}/detail"
        mine, theirs = f"{path}?user_id={owner.user}", f"{path}?user_id={colleague.user}"
        server = await running.boot("one", owner.client, flavor="m1.two")
        nothing = {"instances": (0, 0), "cores": (0, 0), "ram": (0, 0)}

        async def check(expected: dict[str, tuple[int, int]]) -> bool:
            assert await used(colleague.client, theirs) == nothing
            assert await used(other.client, f"/os-quota-sets/{other.project}/detail") == nothing
            return await used(colleague.client, path) == expected == await used(owner.client, mine)

        assert await check({"instances": (0, 1), "cores": (0, 2), "ram": (0, 1024)})
        for _ in range(2):
            absolute = (await colleague.client.get("/limits")).json["limits"]["absolute"]
            assert (absolute["maxTotalCores"], absolute["maxTotalInstances"], absolute["maxTotalRAMSize"]) == (
                5,
                3,
                2048,
            )
            totals = tuple(absolute[f"total{name}Used"] for name in ("Cores", "Instances", "RAM"))
            assert totals == (2, 1, 1024)
            running.app.start_builder()
            await running.until_status(server, "ACTIVE", owner.client)
            await running.until(lambda: check({"instances": (1, 0), "cores": (2, 0), "ram": (1024, 0)}))
        assert (await owner.client.delete(f"/servers/{server}")).status == 204
        await running.until(lambda: check(nothing))


# ---- over quota ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "more", "message"),
    [
        ("m1.tiny", {"min_count": 4}, "instances: Requested 4, but already used 0 of 3 instances"),
        ("m1.two", {"min_count": 3}, "cores, ram: Requested 6, 3072, but already used 0, 0 of 5, 2048 cores, ram"),
        (
            "m1.two",
            {"min_count": 4, "max_count": 5},
            "cores, instances, ram: Requested 10, 4-5, 5120, but already used 0, 0, 0 of 5, 3, 2048 "
            "cores, instances, ram",
        ),
    ],
)
async def test_servers_over_the_limit_are_refused_and_leave_nothing(
    limited: Deployment, owner: Owner, flavor: str, more: dict[str, int], message: str
) -> None:
    """A 403 in the incumbent's words and numbers; no usage, reservation, charge, mapping or request has changed."""
    await shown(owner.client, f"/os-quota-sets/{owner.project}/detail?user_id={owner.user}")
    before = await snapshot(limited)
    assert refused(await boot(owner.client, flavor, **more), 403) == f"Quota exceeded for {message}"
    assert await snapshot(limited) == before
    assert (await owner.client.get("/servers")).json["servers"] == []


async def test_the_last_place_is_given_and_no_more(limited: Deployment, owner: Owner) -> None:
    """What is accepted counts at once, a delete gives it back, and -1 lets everything through."""
    made = [await boot(owner.client) for _ in range(3)]
    assert [answer.status for answer in made] == [202] * 3
    assert refused(await boot(owner.client), 403) == (
        "Quota exceeded for instances: Requested 1, but already used 3 of 3 instances"
    )
    assert (await change(limited, owner.project, instances=-1)).status == 200
    assert (await boot(owner.client)).status == 202
    assert refused(await boot(owner.client), 403) == (
        "Quota exceeded for ram: Requested 512, but already used 2048 of 2048 ram"
    )


async def test_as_many_as_fit_are_made_from_min_count_on(limited: Deployment, owner: Owner) -> None:
    """Between `min_count` and `max_count` the limit decides; below `min_count` there is none at all."""
    refused(await boot(owner.client, "m1.two", min_count=3, max_count=4), 403)
    assert (await owner.client.get("/servers")).json["servers"] == []
    assert (await boot(owner.client, "m1.two", min_count=1, max_count=4)).status == 202
    names = sorted(server["name"] for server in (await owner.client.get("/servers")).json["servers"])
    assert names == ["one-1", "one-2"]
    detail = f"/os-quota-sets/{owner.project}/detail"
    assert await used(owner.client, detail) == {"instances": (0, 2), "cores": (0, 4), "ram": (0, 2048)}


async def test_a_user_runs_into_its_own_limit_before_the_projects(limited: Deployment, owner: Owner) -> None:
    """The refusal names the user's numbers, and a colleague goes on."""
    project = limited.identity.store.find_project(owner.project)
    assert project is not None
    colleague = await join(limited, project.name, f"{project.name}-colleague")
    assert (await change(limited, f"{owner.project}?user_id={owner.user}", instances=1)).status == 200
    assert (await boot(owner.client)).status == 202
    assert refused(await boot(owner.client), 403) == (
        "Quota exceeded for instances: Requested 1, but already used 1 of 1 instances"
    )
    assert (await boot(colleague.client)).status == 202


async def test_many_at_once_get_exactly_what_there_is(limited: Deployment, owner: Owner) -> None:
    """Of twenty simultaneous requests three are accepted and the others refused."""
    answers = await asyncio.gather(*(boot(owner.client) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [202] * 3 + [403] * 17
    assert (await used(owner.client, f"/os-quota-sets/{owner.project}/detail"))["instances"] == (0, 3)


async def test_keypairs_are_a_users_and_limited(limited: Deployment, owner: Owner) -> None:
    """One too many is a 403 and is not kept; a deleted one makes room, a name that is taken stays a 409."""

    async def keep(name: str) -> Response:
        return await owner.client.post("/os-keypairs", {"keypair": {"name": name, "public_key": KEY}})

    assert [(await keep(name)).status for name in ("a", "b")] == [201, 201]
    assert refused(await keep("c"), 403) == "Quota exceeded, too many key pairs."
    assert [one["keypair"]["name"] for one in (await owner.client.get("/os-keypairs")).json["keypairs"]] == ["a", "b"]
    assert (await keep("a")).status == 409
    detail = f"/os-quota-sets/{owner.project}/detail"
    assert (await shown(owner.client, f"{detail}?user_id={owner.user}"))["key_pairs"]["in_use"] == 2
    assert (await shown(owner.client, detail))["key_pairs"]["in_use"] == 0
    assert (await owner.client.delete("/os-keypairs/a")).status == 204
    assert (await owner.client.delete("/os-keypairs/a")).status == 404
    assert ((await keep("c")).status, (await keep("d")).status) == (201, 403)
    assert (await change(limited, f"{owner.project}?user_id={owner.user}", key_pairs=3, force=True)).status == 200
    assert (await keep("d")).status == 201


async def test_metadata_items_are_limited(shared: Deployment) -> None:
    """At a create and at every later change; what is refused leaves the items as they were."""
    owner = await join(shared, "quota-metadata")
    body = {"quota_set": {"metadata_items": 2}}
    assert (await shared.admin.put(f"/os-quota-sets/{owner.project}", body)).status == 200
    most = "Maximum number of metadata items exceeds 2"
    items = {"a": "1", "b": "2"}
    assert refused(await boot(owner.client, metadata=items | {"c": "3"}), 403) == most
    server = await shared.boot("labelled", owner.client, metadata=items)
    await shared.until_status(server, "ACTIVE", owner.client)
    path = f"/servers/{server}/metadata"
    assert refused(await owner.client.post(path, {"metadata": {"c": "3"}}), 403) == most
    assert refused(await owner.client.put(f"{path}/c", {"meta": {"c": "3"}}), 403) == most
    assert refused(await owner.client.put(path, {"metadata": items | {"c": "3"}}), 403) == most
    assert (await owner.client.get(path)).json == {"metadata": items}
    assert (await owner.client.put(path, {"metadata": {"c": "3"}})).status == 200
    assert (await owner.client.delete(f"/servers/{server}")).status == 204


# ---- what is not advertised yet --------------------------------------------------------------------------------


async def at_2_57(limited: Deployment, owner: Owner, handler: Handler, body: Any = None, **path: str) -> Any:
    """Call a handler as 2.57 would, for an admin of the owner's project, and return what it answers."""
    context = RequestContext(
        user_id=UserId(owner.user),
        project_id=ProjectId(owner.project),
        request_id=RequestId("req-1"),
        roles=frozenset({"admin", "member", "reader"}),
    )
    services = limited.app.open_services(limited.identity)
    rule = "os_compute_api:os-quota-sets:update"
    answer = await handler(Call(context, 57, rule, path, QueryParams(), msgspec.json.encode(body), services))
    return msgspec.json.decode(answer.body)


async def test_injected_files_end_with_2_56(limited: Deployment, owner: Owner) -> None:
    """From 2.57 quota sets, classes and limits have none of them, and an update takes none."""
    keys = ALWAYS | GROUPS
    for handler in (quotas.show, quotas.defaults, quotas.detail):
        found = await at_2_57(limited, owner, handler, project=owner.project)
        assert found["quota_set"].keys() == keys | {"id"}
    changed = await at_2_57(limited, owner, quotas.update, {"quota_set": {"cores": 4}}, project=owner.project)
    assert changed["quota_set"].keys() == keys
    with pytest.raises(Invalid, match="injected_files"):
        await at_2_57(limited, owner, quotas.update, {"quota_set": {"injected_files": 4}}, project=owner.project)
    found = await at_2_57(limited, owner, quotas.show_class, name="default")
    assert found["quota_class_set"].keys() == keys | {"id"}
    absolute = (await at_2_57(limited, owner, limits.show))["limits"]["absolute"]
    assert {key for key in absolute if "Personality" in key} == set()
    assert absolute["maxTotalCores"] == 4
