"""Usage on a real cell database of each kind: which instances count for a period, how much, and in which order."""

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.config import Secret
from cellway.db.cell_tables import instance_extra, instances
from cellway.db.schema import Tree
from cellway.db.transaction import CellTx
from cellway.instances import usage
from cellway.instances.usage import ProjectUsage, ServerUsage
from tests.databases import KINDS, Shelf, engine_of, upgraded

START, STOP = datetime(2026, 3, 1, 12, 0, 0, 250000), datetime(2026, 3, 1, 18, 30)
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf
) -> Iterator[sa.Engine]:
    """Give a cell's database of each kind for the module; every test rolls back what it wrote."""
    if request.param == "sqlite":
        url = upgraded(Secret(f"sqlite:///{tmp_path_factory.mktemp('usage') / 'cell.sqlite'}"), Tree.CELL)
    else:
        url = shelf.take(request.param, "cell1")
    made = engine_of(url)
    yield made
    made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[CellTx]:
    """Open a transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield CellTx(connection, START)
        transaction.rollback()


def ran(tx: CellTx, uuid: str, launched: datetime | None, ended: datetime | None = None, **more: Any) -> None:
    """Write an instance that ran from one moment to another."""
    values = {"project_id": "blue", "vcpus": 2, "memory_mb": 512, "root_gb": 10, "ephemeral_gb": 5, "deleted": 0} | more
    tx.execute(sa.insert(instances), values | {"uuid": uuid, "launched_at": launched, "terminated_at": ended})


def seconds(tx: CellTx) -> dict[str, float]:
    """Return what each instance took of the period."""
    found = usage.list_servers(tx, START, STOP, None, 1000, None)
    return {one.uuid: round(one.seconds, 2) for one in found}


def test_an_instance_counts_while_it_ran_within_the_period(tx: CellTx) -> None:
    """What began before or goes on after is cut off; what ended before, began after or never began is left out."""
    ran(tx, "through", START - 9 * HOUR)
    ran(tx, "within", START.replace(microsecond=0) + HOUR, STOP - HOUR)
    ran(tx, "ended within", START - HOUR, STOP - HOUR)
    ran(tx, "began within", STOP - HOUR)
    ran(tx, "ended after", STOP - HOUR, STOP + HOUR)
    ran(tx, "ended before", START - 2 * HOUR, START - HOUR)
    ran(tx, "began after", STOP + HOUR)
    ran(tx, "began at the end", STOP)
    ran(tx, "never", None)
    whole = (STOP - START).total_seconds()
    assert seconds(tx) == {
        "through": whole,
        "within": 4.5 * 3600,
        "ended within": whole - 3600,
        "began within": 3600,
        "ended after": 3600,
    }


def test_deleted_instances_count_until_their_end(tx: CellTx) -> None:
    """Soft deletion of an instance and of its flavor's row hides neither."""
    ran(tx, "gone", STOP - 2 * HOUR, STOP - HOUR, deleted=7, vm_state="deleted", display_name="old")
    tx.execute(sa.insert(instance_extra), {"instance_uuid": "gone", "flavor": "{}", "deleted": 7})
    [one] = usage.list_servers(tx, START, STOP, "blue", 10, None)
    assert replace(one, seconds=round(one.seconds, 2)) == ServerUsage(
        "blue", "gone", "old", "deleted", "{}", 2, 512, 15, STOP - 2 * HOUR, STOP - HOUR, 3600
    )


def test_the_database_sums_what_its_rows_say(tx: CellTx) -> None:
    """For any instances, a project's sums are those of its servers, and what the times themselves say."""
    dice = random.Random(3)
    expected: dict[str, float] = {}
    whole_second = START.replace(microsecond=0)
    for number in range(60):
        began = whole_second + timedelta(seconds=dice.randrange(-20_000, 30_000))
        ended = dice.choice([None, began + timedelta(seconds=dice.randrange(0, 30_000))])
        project = dice.choice(["blue", "green", "Red"])
        has = {"vcpus": dice.randrange(1, 9), "memory_mb": dice.randrange(1, 9000), "root_gb": dice.choice([None, 20])}
        ran(tx, f"i{number}", began, ended, project_id=project, **has)
        length = min(ended or STOP, STOP) - max(began, START)
        expected[project] = expected.get(project, 0.0) + max(0.0, length.total_seconds())
    summed = usage.add_up(usage.list_sums(tx, START, STOP))
    assert [one.project_id for one in summed] == ["Red", "blue", "green"]
    of_servers = usage.sums_of(usage.list_servers(tx, START, STOP, None, 1000, None))
    for one, other in zip(summed, of_servers, strict=True):
        assert one.seconds == pytest.approx(expected[one.project_id], abs=0.01)
        for name in ("seconds", "vcpus", "memory_mb", "disk_gb"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)


def test_pages_follow_each_other(tx: CellTx) -> None:
    """In the order of project and uuid, by code points on every database, each server once, for one project or all."""
    for project in ("blue", "Blue", "blue2", "éclair"):
        for uuid in ("1", "2", "3"):
            ran(tx, f"{project}-{uuid}", START, project_id=project)
    for project_id in (None, "blue", "nobody"):
        everything = usage.list_servers(tx, START, STOP, project_id, 1000, None)
        order = [(one.project_id, one.uuid) for one in everything]
        assert order == sorted(order)
        for size in (1, 2, 5):
            paged: list[ServerUsage] = []
            while page := usage.list_servers(
                tx, START, STOP, project_id, size, (paged[-1].project_id, paged[-1].uuid) if paged else None
            ):
                assert len(page) <= size
                paged += page
            assert paged == everything
    assert len(usage.list_servers(tx, START, STOP, "blue", 1000, None)) == 3


def test_sums_of_several_cells_are_one() -> None:
    """A project that is in two cells has one sum, and projects come in order."""
    parts = [ProjectUsage("b", 1, 2, 3, 4), ProjectUsage("a", 1, 1, 1, 1), ProjectUsage("b", 10, 20, 30, 40)]
    assert usage.add_up(parts) == [ProjectUsage("a", 1, 1, 1, 1), ProjectUsage("b", 11, 22, 33, 44)]
