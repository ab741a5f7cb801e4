"""`cellway quota` over a data folder with two projects' servers: limits and their levels, usage, and every drift."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.config import Secret
from cellway.db.api_tables import instance_mappings, quota_usages, server_charges
from cellway.db.cell_tables import instances, project_user_quotas, quotas
from cellway.testing import Deployment, deployment
from tests.commands import Run
from tests.databases import engine_of

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder: three built servers in two projects, a keypair, a group, and one server without a host."""
    path = tmp_path / "data"
    asyncio.run(furnish(path))
    return path


async def furnish(path: Path) -> None:
    """Run a deployment there, and leave it with everything settled."""
    async with deployment(path) as running:
        await running.make_flavor()
        await running.make_flavor("m1.huge", vcpus=10_000, ram=512)
        other = await running.add_user("other", "other", "member")
        answer = await other.post("/os-keypairs", {"keypair": {"name": "k", "public_key": KEY}})
        assert answer.status == 201
        group = {"name": "g", "policies": ["affinity"]}
        assert (await running.member.post("/os-server-groups", {"server_group": group})).status == 200
        made = [
            (await running.boot("a"), running.member, "ACTIVE"),
            (await running.boot("b"), running.member, "ACTIVE"),
            (await running.boot("c", other), other, "ACTIVE"),
            (await running.boot("d", flavor="m1.huge"), running.member, "ERROR"),
        ]
        for server, client, status in made:
            await running.until_status(server, status, client)
        await running.until(partial(settled, running))


async def settled(running: Deployment) -> bool:
    """Tell whether no build is on its way any more."""
    return not running.app.builder.in_progress and not await running.in_api(
        lambda tx: tx.execute(sa.text("SELECT 1 FROM build_requests")).first()
    )


def change(data: Path, name: str, statement: sa.Executable, rows: Any = None) -> Any:
    """Run one statement in a database of the folder, and return its rows if it gives any."""
    engine = engine_of(Secret(f"sqlite:///{data / name}.db"))
    with engine.begin() as connection:
        result = connection.execute(statement, rows)
        found = list(result) if result.returns_rows else result.rowcount
    engine.dispose()
    return found


def owners(data: Path) -> list[tuple[str, str]]:
    """Return project and user of the three charged servers; the first has two."""
    charged = sa.select(server_charges.c.project_id, server_charges.c.user_id).where(server_charges.c.instances > 0)
    rows = [(row.project_id, row.user_id) for row in change(data, "api", charged)]
    return sorted(rows, key=rows.count, reverse=True)


def in_cell(data: Path) -> tuple[str, str]:
    """Return a cell and a server in it of the first project."""
    (project, _), *_ = owners(data)
    for cell in ("cell1", "cell2"):
        found = change(data, cell, sa.select(instances.c.uuid).where(instances.c.project_id == project))
        if found:
            return cell, found[0].uuid
    raise AssertionError("no server is anywhere")


def limits_of(run: Run, *arguments: str) -> dict[str, tuple[int, str]]:
    """Return the limits that `show` gives, with where they come from."""
    answer = run("quota", "show", *arguments, "--format", "json")
    assert answer.status == 0, answer.err
    return {item["resource"]: (item["limit"], item["source"]) for item in answer.json["items"]}


def test_each_level_is_shown_as_where_a_limit_comes_from(run: Run, data: Path) -> None:
    """A limit is the configuration's until a class, a project or a user has its own, in this order."""
    (project, user), *_ = owners(data)
    assert limits_of(run, project)["cores"] == (20, "configuration")
    for arguments, expected in (
        (("--class", "default", "--cores", "30"), {project: (30, "default"), "gold": (30, "default")}),
        (("--class", "gold", "--cores", "31"), {project: (30, "default"), "gold": (31, "class")}),
        ((project, "--cores", "32"), {project: (32, "project"), user: (32, "project")}),
        ((project, "--user", user, "--cores", "5"), {project: (32, "project"), user: (5, "user")}),
    ):
        assert run("quota", "set", *arguments).status == 0
        for who, where in expected.items():
            asked = {project: [project], user: [project, "--user", user], "gold": ["--class", "gold"]}[who]
            assert limits_of(run, *asked)["cores"] == where
    assert limits_of(run, "--default")["cores"] == (30, "default")
    for owner, left in (
        ([project, "--user", user], (32, "project")),
        ([project], (30, "default")),
        (["--class", "default"], (20, "configuration")),
    ):
        assert run("quota", "delete", *owner).status == 0
        assert limits_of(run, project, "--user", user)["cores"] == left


def test_a_limit_that_lies_in_a_cell_is_shown_as_such(run: Run, data: Path) -> None:
    """NULL is -1, the first cell by name wins, and a limit that was deleted here does not come back."""
    (project, user), *_ = owners(data)
    row = {"project_id": project, "resource": "cores", "hard_limit": None, "deleted": 0}
    change(data, "cell2", sa.insert(quotas), [row, {**row, "resource": "ram", "hard_limit": 7}])
    change(data, "cell1", sa.insert(quotas), [{**row, "resource": "ram", "hard_limit": 9}])
    change(data, "cell1", sa.insert(project_user_quotas), [{**row, "user_id": user, "hard_limit": 3}])
    # A deployment that never had such rows knows that its cells are empty; one that is adopted does not.
    change(data, "api", sa.text("DELETE FROM migration_state"))
    found = limits_of(run, project, "--user", user)
    assert (found["cores"], found["ram"]) == ((3, "user (in a cell)"), (9, "project (in a cell)"))
    assert limits_of(run, project)["cores"] == (-1, "project (in a cell)")
    assert run("quota", "delete", project).status == 0
    assert limits_of(run, project, "--user", user)["cores"] == (20, "configuration")


def test_usage_and_headroom_are_shown(run: Run, data: Path) -> None:
    """What servers take of a project and of a user in it; a server that got no host takes nothing."""
    (project, user), *_ = owners(data)
    run("quota", "set", project, "--ram", "-1")
    items = run("quota", "usage", project, "-f", "json").json["items"]
    shown = {item["resource"]: (item["limit"], item["in_use"], item["reserved"], item["headroom"]) for item in items}
    assert shown["instances"] == (10, 2, 0, 8)
    assert shown["ram"] == (-1, 1024, 0, None)
    users = run("quota", "usage", project, "--user", user, "-f", "json").json["items"]
    assert {item["resource"]: item["in_use"] for item in users if item["in_use"]} == {
        "instances": 2, "cores": 2, "ram": 1024, "server_groups": 1,
    }  # fmt: skip
    assert run("quota", "usage", project).out.splitlines()[0].split() == [
        "RESOURCE", "LIMIT", "IN", "USE", "RESERVED", "HEADROOM",
    ]  # fmt: skip


def test_what_is_refused_says_why(run: Run, data: Path) -> None:
    """A limit below what is used needs `--force`; an owner is a project or a class; a limit is a number from -1."""
    (project, user), *_ = owners(data)
    answer = run("quota", "set", project, "--instances", "1", "--cores", "9")
    assert (answer.status, "must be greater than or equal to already used and reserved 2." in answer.err) == (2, True)
    assert limits_of(run, project)["cores"] == (20, "configuration")
    assert run("quota", "set", project, "--instances", "1", "--force").status == 0
    for arguments in (
        ("set", project), ("set", "--cores", "1"), ("set", project, "--class", "x", "--cores", "1"),
        ("set", project, "--cores", "-2"), ("set", project, "--cores", str(2**31)), ("show",),
        ("show", "--user", user), ("delete",), ("refresh",), ("refresh", project, "--all"),
    ):  # fmt: skip
        assert run("quota", *arguments).status == 2, arguments


def drift_of(run: Run, *arguments: str) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Verify, and return the drift that was found: kind, subject, what is stored and what was counted."""
    answer = run("quota", "verify", *arguments, "--format", "json")
    items = answer.json["items"]
    assert answer.status == (8 if items else 0)
    return [(item["kind"], item["subject"], item["stored"], item["counted"]) for item in items]


def test_a_settled_deployment_has_no_drift(run: Run, data: Path) -> None:
    """Charges of nothing, of servers that never got a host, are right."""
    assert drift_of(run) == []
    assert run("quota", "verify").out.split() == ["KIND", "PROJECT", "USER", "SUBJECT", "STORED", "COUNTED"]


ONE = {"instances": 1, "cores": 1, "ram": 512}


def spoil_usage(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Change what a project is said to have reserved, and a user to use."""
    mine = sa.update(quota_usages).where(quota_usages.c.project_id == owners(data)[0][0])
    change(data, "api", mine.where(quota_usages.c.user_id == "", quota_usages.c.resource == "ram").values(reserved=5))
    change(data, "api", mine.where(quota_usages.c.user_id != "", quota_usages.c.resource == "cores").values(in_use=-1))
    return [
        ("usage", "ram", {"in_use": 1024, "reserved": 5}, {"in_use": 1024, "reserved": 0}),
        ("usage", "cores", {"in_use": -1, "reserved": 0}, {"in_use": 2, "reserved": 0}),
    ]


def spoil_groups(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Change how many server groups a project and a user are said to have."""
    change(data, "api", sa.update(quota_usages).where(quota_usages.c.resource == "server_groups").values(in_use=3))
    return [("usage", "server_groups", {"in_use": 3, "reserved": 0}, {"in_use": 1, "reserved": 0})] * 2


def forget_charge(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Remove a charge, as if its server had come from elsewhere; its usage then is wrong too."""
    _, uuid = in_cell(data)
    change(data, "api", sa.delete(server_charges).where(server_charges.c.instance_uuid == uuid))
    return [*less_used(), ("uncharged", uuid, {}, ONE)]


def less_used() -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Return the usages that are wrong when a charge is gone: the project's and the user's."""
    two, one = {"instances": 2, "cores": 2, "ram": 1024}, ONE
    return [
        ("usage", name, {"in_use": two[name], "reserved": 0}, {"in_use": one[name], "reserved": 0})
        for _ in range(2)
        for name in sorted(two)
    ]


def forget_server(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Mark a server in its cell as deleted, behind everybody's back."""
    cell, uuid = in_cell(data)
    gone = sa.update(instances).where(instances.c.uuid == uuid).values(deleted=instances.c.id)
    change(data, cell, gone)
    return [("no server", uuid, ONE, {})]


def grow_server(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Change a server's size in its cell."""
    cell, uuid = in_cell(data)
    change(data, cell, sa.update(instances).where(instances.c.uuid == uuid).values(vcpus=3, memory_mb=700))
    return [("size", uuid, ONE, {"instances": 1, "cores": 3, "ram": 700})]


def lose_mapping_and_server(data: Path) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Leave nothing of a server but its charge."""
    [(kind, uuid, *numbers)] = forget_server(data)
    change(data, "api", sa.delete(instance_mappings).where(instance_mappings.c.instance_uuid == uuid))
    return [(kind, uuid, numbers[0], numbers[1])]


@pytest.mark.parametrize(
    "spoil", [spoil_usage, spoil_groups, forget_charge, forget_server, grow_server, lose_mapping_and_server]
)
def test_verify_finds_each_kind_of_drift_and_refresh_mends_it(
    run: Run, data: Path, spoil: Callable[[Path], list[Any]]
) -> None:
    """Exactly what was spoilt is found, for its project and among all, and nothing of another; then nothing more."""
    expected = spoil(data)
    (project, _), *_, (other, _) = owners(data)
    assert drift_of(run) == expected
    assert drift_of(run, project) == expected
    assert drift_of(run, other) == []
    assert "cellway quota refresh --all" in run("quota", "verify").err
    assert run("quota", "refresh", project).status == 0
    assert drift_of(run) == []


def test_keypairs_are_verified_and_counted_anew_with_everything(run: Run, data: Path) -> None:
    """They are a user's own, so they belong to no project's drift."""
    change(data, "api", sa.update(quota_usages).where(quota_usages.c.resource == "key_pairs").values(in_use=4))
    assert drift_of(run) == [("usage", "key_pairs", {"in_use": 4, "reserved": 0}, {"in_use": 1, "reserved": 0})]
    assert run("quota", "refresh", "--all", "-f", "json").json["items"] == [{"project": "all", "user": None}]
    assert drift_of(run) == []


def test_a_cell_that_does_not_answer_proves_nothing(run: Run, data: Path) -> None:
    """It is named and makes it 6; its servers are not drift, and a refresh leaves them their charges."""
    cell, _ = in_cell(data)
    grow_server(data)
    (data / f"{cell}.db").rename(data / "away.db")
    answer = run("quota", "verify", "-f", "json")
    assert (answer.status, answer.json["items"], answer.json["partial"]) == (
        6, [], [{"cell": cell, "reason": "no answer"}],
    )  # fmt: skip
    assert f"warning: {cell} did not answer" in answer.err
    assert run("quota", "refresh", "--all").status == 6
    (data / "away.db").rename(data / f"{cell}.db")
    assert [kind for kind, *_ in drift_of(run)] == ["size"]
    spoil_usage(data)
    (data / f"{cell}.db").rename(data / "away.db")
    assert run("quota", "verify").status == 8
