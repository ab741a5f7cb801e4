"""The online data migration of limits, in a running deployment with two cells and cell0, on each kind of database."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from cellway import migration_state, online_migrations
from cellway.config import Secret
from cellway.context import service_context
from cellway.db import api_tables, cell_tables
from cellway.db.engines import API
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import NotFound
from cellway.ids import RequestId
from cellway.online_migrations import Options, Report
from cellway.quota import legacy, moving
from cellway.quota.legacy import UNLIMITED, Kind, LegacyLimit
from cellway.quota.moving import Fate, Held, Limit, Rule, Source
from cellway.testing import QUICK, Deployment
from cellway.testing import deployment as open_deployment
from tests.databases import SERVERS, SLOW_SERVERS, Urls, empty_database, engine_of, upgraded
from tests.incumbent import add_rows, make_tables

CONTEXT = service_context(RequestId("req-migration"))
OWNERS = {"quotas": "p", "project_user_quotas": ("p", "u"), "quota_classes": "c"}
Values: TypeAlias = Mapping[str, int | None]


@pytest.fixture
async def running(tmp_path: Path, databases: Urls, anyio_backend: str) -> AsyncIterator[Deployment]:
    """Two cells and cell0, with small batches."""
    limits = replace(QUICK, migration_batch=3, quota_sweep_seconds=3600)
    async with open_deployment(
        tmp_path / "data", hosts_per_cell=1, builder=False, databases=databases, limits=limits
    ) as made:
        # At its start it has found out that nothing has to be moved.
        await in_api(made, lambda tx: tx.execute(sa.delete(api_tables.migration_state)))
        yield made


def row_of(kind: Kind, owner: legacy.Owner, resource: str | None, limit: int | None, **more: Any) -> dict[str, Any]:
    """Return a row of a cell's table."""
    names = (owner,) if isinstance(owner, str) else owner
    columns = dict(zip(legacy.OWNER_COLUMNS[kind], names, strict=True))
    return {**columns, "resource": resource, "hard_limit": limit, **more}


async def fill(running: Deployment, cell: str, kind: Kind, *rows: Mapping[str, Any]) -> None:
    """Put rows into a cell's table."""
    with running.targeted(cell) as cctx:
        await running.app.databases.on(cctx).write(lambda tx: add_rows(tx.connection, kind.value, rows))


async def give(running: Deployment, cell: str, values: Values, kind: Kind = Kind.PROJECT) -> None:
    """Give the one owner limits in a cell."""
    owner: legacy.Owner = OWNERS[kind.value]  # type: ignore[assignment]
    await fill(running, cell, kind, *(row_of(kind, owner, resource, limit) for resource, limit in values.items()))


async def migrate(running: Deployment, **options: Any) -> Report:
    """Run the migration."""
    return await online_migrations.run(running.app.cells, CONTEXT, running.app.clock, Options(**options))


async def limits(running: Deployment, kind: Kind = Kind.PROJECT) -> dict[Any, int]:
    """Return all limits in the API database, by owner's columns and resource."""
    table = api_tables.API_METADATA.tables[kind.value]
    columns = [table.c[name] for name in (*legacy.OWNER_COLUMNS[kind], "resource", "hard_limit")]
    rows = await running.in_api(lambda tx: tx.execute(sa.select(*columns)).all())
    return {tuple(row[:-1]): row[-1] for row in rows}


async def left(running: Deployment, kind: Kind = Kind.PROJECT) -> dict[str, int]:
    """Return how many live rows each cell has, where there are any."""
    cells = ("cell0", "cell1", "cell2")
    counts = {cell: await running.in_cell(cell, partial(_count, kind=kind)) for cell in cells}
    return {cell: count for cell, count in counts.items() if count}


def _count(tx: CellTx, kind: Kind) -> int:
    return legacy.count(tx, kind)


async def in_api(running: Deployment, write: Callable[[ApiTx], Any]) -> Any:
    """Write to the API database."""
    return await running.app.databases.on(API).write(write)


def set_limit(tx: ApiTx, owner: str, resource: str, value: int) -> None:
    """Set a project's limit as the API does."""
    legacy.claim_by_api(tx, Kind.PROJECT, owner, [resource])
    table = api_tables.quotas
    tx.execute(sa.delete(table).where(table.c.project_id == owner, table.c.resource == resource))
    tx.execute(sa.insert(table), {"project_id": owner, "resource": resource, "hard_limit": value})


def delete_limits(tx: ApiTx, owner: str) -> None:
    """Delete a project's limits as the API does."""
    for kind in (Kind.PROJECT, Kind.USER):
        legacy.tombstone(tx, kind, owner)
    for table in (api_tables.quotas, api_tables.project_user_quotas):
        tx.execute(sa.delete(table).where(table.c.project_id == owner))


def fates(report: Report) -> dict[str, int]:
    """Return how often each fate was met."""
    met: Counter[str] = Counter()
    for part in report.parts:
        met += part.fates
    return dict(met)


def told(report: Report) -> list[tuple[str, str, str, Any, Any]]:
    """Return every difference: cell, key, fate, the cell's value and what stands."""
    return [
        (part.cell, one.key, one.fate, one.value, one.stands)
        for part in report.parts
        for one in (*part.differences, *part.blocked)
    ]


async def complete(running: Deployment) -> set[tuple[str, str]]:
    """Return (migration, cell name) of what is complete."""
    names = {cell.ref.uuid: cell.ref.name for cell in running.app.cells.snapshot.all}
    found = await running.in_api(migration_state.complete_cells)
    return {(name, names[uuid]) for name, uuid in found if name in list(Kind)}


EVERYWHERE = {(kind.value, cell) for kind in Kind for cell in ("cell0", "cell1", "cell2")}


@pytest.mark.anyio
async def test_limits_leave_every_cell_for_the_api_database(running: Deployment) -> None:
    """Rows of all three tables, of cell0 and of a disabled cell too, are moved, buried, counted and complete."""
    await give(running, "cell0", {"cores": 1})
    await give(running, "cell1", {f"r{number}": number for number in range(10)})
    await give(running, "cell1", {"cores": 3, "ram": None}, Kind.USER)
    await give(running, "cell2", {"cores": 4}, Kind.CLASS)
    await in_api(running, lambda tx: tx.execute(sa.update(api_tables.cell_mappings).values(disabled=True)))
    await running.app.cells.refresh()
    report = await migrate(running)
    assert await limits(running) == {("p", "cores"): 1, **{("p", f"r{number}"): number for number in range(10)}}
    assert await limits(running, Kind.USER) == {("p", "u", "cores"): 3, ("p", "u", "ram"): -1}
    assert await limits(running, Kind.CLASS) == {("c", "cores"): 4}
    assert [await left(running, kind) for kind in Kind] == [{}, {}, {}]
    assert await complete(running) == EVERYWHERE
    assert (report.done, fates(report), told(report)) == (14, {"moved": 14}, [])
    assert {(part.migration, part.cell): part.done for part in report.parts if part.done} == {
        ("quotas", "cell0"): 1,
        ("quotas", "cell1"): 10,
        ("project_user_quotas", "cell1"): 2,
        ("quota_classes", "cell2"): 1,
    }
    unknown = {part.cell: dict(part.unknown) for part in report.parts if part.unknown}
    assert unknown == {"cell1": {f"r{number}": 1 for number in range(10)}}
    assert (await migrate(running)).done == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("rule", "stands", "second"),
    [
        (Rule.KEEP, {"a": 10, "b": -1, "c": 7, "d": 10}, {"a": "kept", "b": "kept", "c": "kept", "d": "present"}),
        (Rule.LOWEST, {"a": 5, "b": 5, "c": 7, "d": 10}, {"a": "replaced", "b": "replaced", "c": "kept"}),
        (Rule.HIGHEST, {"a": 10, "b": -1, "c": -1, "d": 10}, {"a": "kept", "b": "kept", "c": "replaced"}),
        (Rule.FAIL, {"a": 10, "b": -1, "c": 7, "d": 10}, {"a": "blocked", "b": "blocked", "c": "blocked"}),
    ],
)
async def test_between_cells_the_rule_decides(
    running: Deployment, rule: Rule, stands: dict[str, int], second: dict[str, str]
) -> None:
    """The named rule chooses between two cells, no limit is the highest, and each difference is told."""
    await give(running, "cell1", {"a": 10, "b": None, "c": 7, "d": 10})
    await give(running, "cell2", {"a": 5, "b": 5, "c": -1, "d": 10})
    report = await migrate(running, rule=rule)
    assert await limits(running) == {("p", resource): value for resource, value in stands.items()}
    differences = {resource: fate for resource, fate in second.items() if fate != "present"}
    assert {key: fate for _, key, fate, _, _ in told(report)} == {
        f"p/{name}": fate for name, fate in differences.items()
    }
    assert {cell for cell, *_ in told(report)} == {"cell2"}
    assert await left(running) == ({"cell2": 3} if rule is Rule.FAIL else {})
    assert (("quotas", "cell2") in await complete(running)) == (rule is not Rule.FAIL)


@pytest.mark.anyio
@pytest.mark.parametrize("rule", [Rule.KEEP, Rule.LOWEST, Rule.HIGHEST])
async def test_the_order_of_the_cells_does_not_matter(running: Deployment, rule: Rule) -> None:
    """Cells that are migrated one at a time, the last by name first, end as they do together."""
    await give(running, "cell0", {"a": 5, "b": 20, "c": 1})
    await give(running, "cell1", {"a": 7, "b": -1, "c": 2})
    await give(running, "cell2", {"a": 6, "b": 30, "c": 2})
    for cell in ("cell2", "cell1", "cell0"):
        await migrate(running, rule=rule, cells=frozenset({cell}))
    expected = {Rule.KEEP: [5, 20, 1], Rule.LOWEST: [5, 20, 1], Rule.HIGHEST: [7, -1, 2]}[rule]
    assert await limits(running) == {("p", name): value for name, value in zip("abc", expected, strict=True)}


@pytest.mark.anyio
@pytest.mark.parametrize("rule", list(Rule))
async def test_what_the_api_has_wins(running: Deployment, rule: Rule) -> None:
    """A value that was set over the API, before any cell's came or after, stays under every rule, and is told."""
    await give(running, "cell1", {"cores": 10, "ram": 20})
    await give(running, "cell2", {"cores": 11, "ram": 21, "instances": 22})
    await in_api(running, lambda tx: set_limit(tx, "p", "cores", 15))
    await migrate(running, cells=frozenset({"cell1"}), rule=rule)
    await in_api(running, lambda tx: set_limit(tx, "p", "ram", 20))
    report = await migrate(running, rule=rule)
    assert await limits(running) == {("p", "cores"): 15, ("p", "ram"): 20, ("p", "instances"): 22}
    assert told(report) == [("cell2", "p/ram", "overruled", 21, 20), ("cell2", "p/cores", "overruled", 11, 15)]
    assert await left(running) == {}


@pytest.mark.anyio
async def test_a_deleted_limit_does_not_come_back(running: Deployment) -> None:
    """What was deleted over the API, before or between batches, is buried in the cells, told, and not moved."""
    for cell in ("cell1", "cell2"):
        await give(running, cell, {"cores": 10, "ram": 10})
        await give(running, cell, {"cores": 5}, Kind.USER)
        await fill(running, cell, Kind.PROJECT, row_of(Kind.PROJECT, "other", "cores", 3))
    await migrate(running, cells=frozenset({"cell1"}))
    await in_api(running, lambda tx: delete_limits(tx, "p"))
    report = await migrate(running)
    assert await limits(running) == {("other", "cores"): 3}
    assert await limits(running, Kind.USER) == {}
    assert [fate for *_, fate, _, _ in told(report)] == ["dropped"] * 3
    assert [await left(running, kind) for kind in Kind] == [{}, {}, {}]
    await in_api(running, lambda tx: set_limit(tx, "p", "cores", 1))
    await give(running, "cell1", {"cores": 77})
    await migrate(running)
    assert await limits(running) == {("other", "cores"): 3, ("p", "cores"): 1}


@pytest.mark.anyio
async def test_a_dry_run_says_what_a_run_does_and_writes_nothing(running: Deployment) -> None:
    """Its report is that of the run after it, differences between cells included."""
    await give(running, "cell1", {"cores": 10, "ram": 10, "x": 1, "y": 1, "z": 1})
    await give(running, "cell2", {"cores": 5, "ram": 10, "x": 2})
    await fill(
        running, "cell2", Kind.PROJECT, row_of(Kind.PROJECT, "q", "cores", 3), {"project_id": None, "resource": "r"}
    )
    await in_api(running, lambda tx: set_limit(tx, "q", "cores", 15))
    before = await limits(running)
    dry = await migrate(running, rule=Rule.LOWEST, dry=True)
    assert await limits(running) == before
    assert await left(running) == {"cell1": 5, "cell2": 5}
    assert await complete(running) == set()
    wet = await migrate(running, rule=Rule.LOWEST)
    assert [(part.done, part.found, part.left, part.fates) for part in dry.parts] == [
        (part.done, part.found, part.left, part.fates) for part in wet.parts
    ]
    assert told(dry) == told(wet)


@pytest.mark.anyio
async def test_a_run_takes_no_more_than_it_is_told(running: Deployment) -> None:
    """`most` bounds the rows of all migrations and cells together; further runs go on, until it is complete."""
    await give(running, "cell1", {f"r{number}": number for number in range(5)})
    await give(running, "cell2", {f"s{number}": number for number in range(3)})
    await give(running, "cell2", {"cores": 3}, Kind.CLASS)
    done, more = [], []
    for _ in range(4):
        report = await migrate(running, most=4)
        done.append(report.done)
        more.append(any(part.has_more for part in report.parts))
    assert (done, more) == ([4, 4, 1, 0], [True, True, False, False])
    assert await complete(running) == EVERYWHERE


@pytest.mark.anyio
async def test_rows_that_cannot_be_moved_stay_and_stop_no_others(running: Deployment) -> None:
    """They are told with their reason, in every run, and keep the migration from being complete there."""
    bad = {"project_id": None, "resource": "cores", "hard_limit": 3}
    await fill(running, "cell1", Kind.PROJECT, bad, *(row_of(Kind.PROJECT, "p", f"r{n}", n) for n in range(5)), bad)
    for done in (5, 0):
        report = await migrate(running)
        assert report.done == done
        [part] = [part for part in report.parts if part.blocked]
        assert [(one.key, one.reason) for one in part.blocked] == [("NULL/cores", "project_id is NULL")] * 2
        assert (part.left, part.has_more) == (2, False)
    assert await complete(running) == EVERYWHERE - {("quotas", "cell1")}
    [status] = [
        one
        for one in await online_migrations.read_status(running.app.cells, CONTEXT)
        if (one.migration, one.cell) == ("quotas", "cell1")
    ]
    assert (status.left, status.done, status.blocked, status.complete_since) == (2, 5, 2, None)


@pytest.mark.anyio
async def test_a_duplicate_counts_for_nothing(running: Deployment) -> None:
    """Of several class rows for one limit the lowest id is the cell's value, under a rule that would prefer another."""
    rows = [row_of(Kind.CLASS, "c", "cores", value) for value in (10, 2, 3, 4, 5)]
    await fill(running, "cell1", Kind.CLASS, *rows)
    await fill(running, "cell2", Kind.CLASS, row_of(Kind.CLASS, "c", "cores", 8))
    await migrate(running, rule=Rule.LOWEST, most=2)
    report = await migrate(running, rule=Rule.LOWEST)
    assert await limits(running, Kind.CLASS) == {("c", "cores"): 8}
    assert fates(report) == {"duplicate": 2, "moved": 1, "replaced": 1}
    assert await left(running, Kind.CLASS) == {}


@pytest.mark.anyio
async def test_a_cell_that_does_not_answer_is_told_and_the_others_go_on(running: Deployment) -> None:
    """Its part has the problem and is not complete; when it is back, a run brings the rest, by the same rule."""
    await give(running, "cell1", {"cores": 10})
    await give(running, "cell2", {"cores": 20, "ram": 5})
    running.break_cell("cell1", "refuse")
    report = await migrate(running)
    assert {(part.cell, part.left) for part in report.problems} == {("cell1", None)}
    assert await limits(running) == {("p", "cores"): 20, ("p", "ram"): 5}
    assert await complete(running) == {one for one in EVERYWHERE if one[1] != "cell1"}
    states = await online_migrations.read_status(running.app.cells, CONTEXT)
    assert [one.left for one in states if one.cell == "cell1"] == [None] * 3
    running.heal_cell("cell1")
    report = await migrate(running)
    assert told(report) == [("cell1", "p/cores", "replaced", 10, 10)]
    assert await limits(running) == {("p", "cores"): 10, ("p", "ram"): 5}
    assert await complete(running) == EVERYWHERE


@pytest.mark.anyio
async def test_rows_after_completion_are_told_and_moved(running: Deployment) -> None:
    """Status warns of them, and a run takes the completeness back until they have left."""
    await migrate(running)
    assert await complete(running) == EVERYWHERE
    await give(running, "cell2", {"cores": 3})
    found = [one for one in await online_migrations.read_status(running.app.cells, CONTEXT) if one.reappeared]
    assert [(one.migration, one.cell, one.left, one.complete_since) for one in found] == [("quotas", "cell2", 1, None)]
    report = await migrate(running, dry=True)
    assert [part.cell for part in report.parts if part.reappeared] == ["cell2"]
    report = await migrate(running)
    assert [part.cell for part in report.parts if part.reappeared] == ["cell2"]
    assert await complete(running) == EVERYWHERE
    await fill(running, "cell2", Kind.PROJECT, {"project_id": None, "resource": "cores"})
    await migrate(running)
    assert await complete(running) == EVERYWHERE - {("quotas", "cell2")}


@pytest.mark.anyio
async def test_a_cell_that_is_not_there_is_refused(running: Deployment) -> None:
    """A name that no cell has is an error, not an empty run."""
    with pytest.raises(NotFound, match="no cell nowhere"):
        await migrate(running, cells=frozenset({"cell1", "nowhere"}))


@pytest.mark.anyio
async def test_a_run_that_is_told_to_stop_finishes_its_batch(running: Deployment) -> None:
    """What the batch in hand has moved is buried and counted, nothing after it is touched, and the next run goes on."""
    await give(running, "cell1", {f"r{number}": number for number in range(10)})
    stopping = asyncio.Event()
    report = await online_migrations.run(
        running.app.cells,
        CONTEXT,
        running.app.clock,
        Options(),
        watch=lambda _part, outcomes: stopping.set() if outcomes else None,
        stopping=stopping,
    )
    assert (report.stopped, report.done, await left(running)) == (True, 3, {"cell1": 7})
    assert (await migrate(running)).done == 7


@pytest.mark.anyio
async def test_two_runs_at_once_end_as_one_does(running: Deployment) -> None:
    """Rows are moved once, counted once, and each limit has the value that the rule chooses."""
    for number, cell in enumerate(("cell0", "cell1", "cell2")):
        rows = [row_of(Kind.PROJECT, f"p{n % 7}", f"r{n}", (n * 7 + number * 5) % 11) for n in range(40)]
        await fill(running, cell, Kind.PROJECT, *rows)
    reports = await asyncio.gather(*(migrate(running, rule=Rule.LOWEST) for _ in range(3)))
    expected = {(f"p{n % 7}", f"r{n}"): min((n * 7 + number * 5) % 11 for number in range(3)) for n in range(40)}
    assert await limits(running) == expected
    assert sum(report.done for report in reports) == 120
    assert await left(running) == {}
    assert await complete(running) == EVERYWHERE


@pytest.mark.anyio
@pytest.mark.parametrize("change", ["set", "deleted"])
@pytest.mark.parametrize("databases", [pytest.param(kind, marks=pytest.mark.slow) for kind in SERVERS], indirect=True)
async def test_a_change_over_the_api_waits_for_the_batch(running: Deployment, change: str) -> None:
    """A value that is set, or a deletion, while a batch is not committed yet is what stands afterwards."""
    await give(running, "cell1", {"cores": 10})
    [row] = await running.in_cell("cell1", lambda tx: legacy.list_rows(tx, Kind.PROJECT, None, 9))
    cell_id = running.cell("cell1").id
    moved, begun = threading.Event(), threading.Event()

    def batch(tx: ApiTx) -> None:
        moving.move(tx, Kind.PROJECT, [row], Rule.KEEP, Source(cell_id, (cell_id,)))
        moved.set()
        assert begun.wait(30)

    def other(tx: ApiTx) -> None:
        assert moved.wait(30)
        begun.set()
        if change == "set":
            set_limit(tx, "p", "cores", 3)
        else:
            delete_limits(tx, "p")

    api = running.app.databases.on(API)
    await asyncio.gather(api.write(batch), api.write(other))
    assert await limits(running) == ({("p", "cores"): 3} if change == "set" else {})
    await migrate(running)
    assert await limits(running) == ({("p", "cores"): 3} if change == "set" else {})


@pytest.mark.anyio
@pytest.mark.parametrize("kind", SLOW_SERVERS)
async def test_a_cell_of_the_incumbent_is_migrated_in_place(kind: str, tmp_path: Path, anyio_backend: str) -> None:
    """Its tables, collations, NULLs, duplicates and soft-deleted rows are taken as they are; no row is lost."""
    with ExitStack() as opened:
        urls: dict[str, Secret] = {}
        for name in ("api", "cell0", "cell1", "cell2"):
            urls[name] = opened.enter_context(empty_database(kind, tmp_path))
            if name == "cell1":
                engine = engine_of(urls[name])
                with engine.begin() as connection:
                    make_tables(connection)
                engine.dispose()
            upgraded(urls[name], Tree.API if name == "api" else Tree.CELL)
        async with open_deployment(
            tmp_path / "data", hosts_per_cell=1, builder=False, databases=lambda name: urls[name]
        ) as running:
            names = ["P", "p", "ä", "p "] if kind != "mariadb" else ["P", "q", "ä", "r "]
            await fill(
                running,
                "cell1",
                Kind.PROJECT,
                *(row_of(Kind.PROJECT, name, "cores", number) for number, name in enumerate(names)),
                row_of(Kind.PROJECT, "p", "ram", None, deleted=None),
                row_of(Kind.PROJECT, "p", "fixed_ips", -1),
                row_of(Kind.PROJECT, "p", "gpus", 4),
                row_of(Kind.PROJECT, "p", "key_pairs", 9, id=99, deleted=99),
                {"project_id": None, "resource": "cores", "hard_limit": 1},
            )
            await fill(
                running,
                "cell1",
                Kind.CLASS,
                *(row_of(Kind.CLASS, name, "cores", number) for number, name in enumerate("aAa")),
                {"class_name": "a", "resource": None, "hard_limit": 1},
            )
            report = await migrate(running)
            assert await limits(running) == {
                **{(name, "cores"): number for number, name in enumerate(names)},
                ("p", "ram"): -1,
                ("p", "fixed_ips"): -1,
                ("p", "gpus"): 4,
            }
            assert await limits(running, Kind.CLASS) == {("a", "cores"): 0, ("A", "cores"): 1}
            assert [await left(running, one) for one in Kind] == [{"cell1": 1}, {}, {"cell1": 1}]
            assert {(key, fate) for _, key, fate, _, _ in told(report)} == {
                ("NULL/cores", "blocked"),
                ("a/NULL", "blocked"),
                ("a/cores", "duplicate"),
            }
            [unknown] = [dict(part.unknown) for part in report.parts if part.unknown]
            assert unknown == {"gpus": 1}
            buried = sa.select(cell_tables.quotas.c.id, cell_tables.quotas.c.deleted)
            assert all(
                number == deleted
                for number, deleted in await running.in_cell("cell1", lambda tx: tx.execute(buried).all())
                if deleted
            )


@pytest.mark.anyio
@pytest.mark.parametrize("databases", [pytest.param("mariadb", marks=pytest.mark.slow)], indirect=True)
async def test_a_name_that_the_api_database_takes_for_another_is_blocked(running: Deployment) -> None:
    """Where `r` equals `r ` in a unique key, the second of the two stays in its cell, and is told."""
    await fill(running, "cell1", Kind.CLASS, *(row_of(Kind.CLASS, name, "cores", len(name)) for name in ("r ", "r")))
    report = await migrate(running)
    assert await limits(running, Kind.CLASS) == {("r", "cores"): 1}
    [blocked] = [one for part in report.parts for one in part.blocked]
    assert (blocked.key, blocked.reason) == ("r /cores", "the API database takes its name for another's")
    assert await left(running, Kind.CLASS) == {"cell1": 1}


@pytest.mark.anyio
@pytest.mark.slow
async def test_a_name_that_an_adopted_api_database_cannot_hold_is_blocked(tmp_path: Path, anyio_backend: str) -> None:
    """A character of four bytes, where the incumbent's tables take three at most, stops no other row of its batch."""
    with ExitStack() as opened:
        urls: dict[str, Secret] = {}
        for name in ("api", "cell0", "cell1", "cell2"):
            urls[name] = upgraded(
                opened.enter_context(empty_database("mariadb", tmp_path)), Tree.API if name == "api" else Tree.CELL
            )
        engine = engine_of(urls["api"])
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE quota_classes CONVERT TO CHARACTER SET utf8mb3")
        engine.dispose()
        async with open_deployment(
            tmp_path / "data", hosts_per_cell=1, builder=False, databases=lambda name: urls[name]
        ) as running:
            names = ["a", "b\U0001f600", "c", "é", "d"]
            await fill(running, "cell1", Kind.CLASS, *(row_of(Kind.CLASS, name, "cores", 1) for name in names))
            report = await migrate(running)
            assert await limits(running, Kind.CLASS) == {(name, "cores"): 1 for name in names if len(name) == 1}
            [blocked] = [one for part in report.parts for one in part.blocked]
            assert (blocked.key, blocked.reason) == ("b\U0001f600/cores", "the API database cannot hold it")


@pytest.mark.anyio
async def test_users_see_the_same_limits_before_during_and_after(tmp_path: Path, anyio_backend: str) -> None:
    """After each row that moves, quota sets are what they were; what was set or deleted meanwhile stays so."""
    async with open_deployment(tmp_path / "data", hosts_per_cell=1, builder=False) as before:
        kept, changed, deleted = [before.identity.store.create_project(name).id for name in ("kept", "changed", "gone")]
        for cell, more in (("cell1", 0), ("cell2", 1)):
            rows = [
                row_of(Kind.PROJECT, project, resource, limit + more)
                for project in (kept, changed, deleted)
                for resource, limit in (("cores", 10), ("ram", 20))
            ]
            await fill(before, cell, Kind.PROJECT, *rows)
        await in_api(before, lambda tx: tx.execute(sa.delete(api_tables.migration_state)))
    async with open_deployment(tmp_path / "data", hosts_per_cell=1, builder=False) as running:

        async def shown() -> dict[str, tuple[int, int]]:
            sets = {}
            for project in (kept, changed, deleted):
                answer = await running.admin.get(f"/os-quota-sets/{project}")
                assert answer.status == 200, answer.body
                sets[project] = answer.json["quota_set"]["cores"], answer.json["quota_set"]["ram"]
            return sets

        expected = {kept: (10, 20), changed: (10, 20), deleted: (10, 20)}
        assert await shown() == expected
        for step in range(13):
            await migrate(running, most=1)
            if step == 3:
                answer = await running.admin.put(f"/os-quota-sets/{changed}", {"quota_set": {"cores": 15}})
                assert answer.status == 200, answer.body
                assert (await running.admin.delete(f"/os-quota-sets/{deleted}")).status in (202, 204)
                expected |= {changed: (15, 20), deleted: (-1, -1)}
            assert await shown() == expected, step
        assert await complete(running) == EVERYWHERE
        for cell in ("cell0", "cell1", "cell2"):
            running.break_cell(cell, "refuse")
        assert await shown() == expected


# ---- the rule, without a database ------------------------------------------------------------------------------

CELLS = st.dictionaries(st.integers(1, 4), st.integers(-1, 3), min_size=1)


@given(
    CELLS,
    st.permutations([1, 2, 3, 4]),
    st.lists(st.integers(1, 4), max_size=12),
    st.sampled_from([Rule.KEEP, Rule.LOWEST, Rule.HIGHEST]),
)
def test_the_rule_is_the_same_in_every_order_and_however_often(
    values: dict[int, int], order: list[int], visits: list[int], rule: Rule
) -> None:
    """Whatever cells come in whatever order, again and again, the value is what the rule says of all that have come."""
    held: dict[Limit, Held] = {}
    met: set[int] = set()
    for cell in visits:
        if cell in values:
            met.add(cell)
            row = LegacyLimit(Kind.PROJECT, 1, ("p",), "cores", values[cell])
            moving.decide([row], held, set(), rule, Source(cell, tuple(order)))
    chosen = {
        Rule.KEEP: lambda: values[min(met, key=order.index)],
        Rule.LOWEST: lambda: min((values[cell] for cell in met), key=_height),
        Rule.HIGHEST: lambda: max((values[cell] for cell in met), key=_height),
    }
    assert {limit: one.value for limit, one in held.items()} == ({("p", "cores"): chosen[rule]()} if met else {})


def _height(value: int) -> float:
    return float("inf") if value == UNLIMITED else value


def test_a_cell_that_is_no_longer_mapped_keeps_what_it_gave() -> None:
    """Under `keep` the value of a cell that was deleted since is nobody's to replace."""
    held: dict[Limit, Held] = {("p", "cores"): Held(5, 77)}
    row = LegacyLimit(Kind.PROJECT, 1, ("p",), "cores", 6)
    [outcome] = moving.decide([row], held, set(), Rule.KEEP, Source(1, (1, 2)))
    assert (outcome.fate, outcome.stands) == (Fate.KEPT, 5)
