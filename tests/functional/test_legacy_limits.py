"""The limits in a cell that the incumbent made, on each kind of database: who reads what, and what a burial changes."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellway.db.api_tables import migrated_keys
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx, CellTx
from cellway.quota import legacy
from cellway.quota.legacy import Kind
from tests.databases import KINDS, Shelf, empty_database, engine_of, upgraded
from tests.incumbent import add_rows, make_tables

NOW = datetime(2026, 3, 1, 12, 30, 15)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """Give a database with the incumbent's tables, on each kind of database."""
    with empty_database(request.param, tmp_path_factory.mktemp("cell")) as url:
        made = engine_of(url)
        with made.begin() as connection:
            make_tables(connection)
        yield made
        made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[CellTx]:
    """Open a transaction on it that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield CellTx(connection, NOW)
        transaction.rollback()


@pytest.fixture(scope="module", params=KINDS)
def api_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Any:
    """Give an API database of each kind."""
    if request.param == "sqlite":
        with empty_database("sqlite", tmp_path_factory.mktemp("api")) as url:
            made = engine_of(upgraded(url, Tree.API))
    else:
        made = engine_of(shelf.take(request.param, "api"))
    yield made
    made.dispose()


@pytest.fixture
def api(api_engine: sa.Engine) -> Iterator[ApiTx]:
    """Open a transaction on it that leaves nothing behind."""
    with api_engine.connect() as connection, connection.begin() as transaction:
        yield ApiTx(connection, NOW)
        transaction.rollback()


def add(tx: CellTx, kind: Kind, *rows: dict[str, Any]) -> None:
    """Add rows to a cell's table."""
    add_rows(tx.connection, kind.value, rows)


def project(number: int, project_id: str | None, resource: str, limit: int | None, **more: Any) -> dict[str, Any]:
    """Return a row of `quotas`."""
    return {"id": number, "project_id": project_id, "resource": resource, "hard_limit": limit} | more


def of_class(number: int, name: str | None, resource: str | None, limit: int | None, **more: Any) -> dict[str, Any]:
    """Return a row of `quota_classes`."""
    return {"id": number, "class_name": name, "resource": resource, "hard_limit": limit} | more


def test_limits_are_found_by_owner(tx: CellTx) -> None:
    """Each kind of owner has its own limits; NULL and anything below 0 reads as -1, soft-deleted rows not at all."""
    add(
        tx,
        Kind.PROJECT,
        project(1, "p", "cores", 20),
        project(2, "p", "ram", None, deleted=None),
        project(3, "p", "instances", -7),
        project(4, "p", "key_pairs", 5, deleted=4),
        project(5, "other", "cores", 1),
    )
    user = {"user_id": "u", "project_id": "p", "resource": "cores", "hard_limit": 3}
    add(tx, Kind.USER, {"id": 1, **user}, {"id": 2, **user, "user_id": "v", "hard_limit": 4})
    add(tx, Kind.CLASS, of_class(1, "default", "cores", 9))
    assert legacy.find_limits(tx, Kind.PROJECT, "p") == {"cores": 20, "ram": -1, "instances": -1}
    assert legacy.find_limits(tx, Kind.USER, ("p", "u")) == {"cores": 3}
    assert legacy.find_limits(tx, Kind.USER, ("u", "p")) == {}
    assert legacy.find_limits(tx, Kind.CLASS, "default") == {"cores": 9}


@pytest.mark.parametrize("name", ["a", "A", "ä", "a ", "ａ"])
def test_names_are_compared_exactly(tx: CellTx, name: str) -> None:
    """Capitals, accents, blanks at the end and wide letters make another class, whatever the table's collation."""
    names = ["a", "A", "ä", "a ", "ａ"]
    add(tx, Kind.CLASS, *(of_class(number, one, "cores", number) for number, one in enumerate(names, 1)))
    assert legacy.find_limits(tx, Kind.CLASS, name) == {"cores": names.index(name) + 1}
    assert legacy.find_limits(tx, Kind.CLASS, "A" + chr(0x1F600)) == {}
    assert not any(row.duplicate for row in legacy.list_rows(tx, Kind.CLASS, None, 10))


def test_of_several_rows_for_one_limit_the_lowest_id_counts(tx: CellTx) -> None:
    """The others are called duplicates, and come first, as long as the lowest is live."""
    add(
        tx,
        Kind.CLASS,
        of_class(3, "default", "cores", 10),
        of_class(5, "default", "cores", 20),
        of_class(7, "default", "cores", 30),
        of_class(2, "default", "cores", 40, deleted=2),
    )
    assert legacy.find_limits(tx, Kind.CLASS, "default") == {"cores": 10}
    rows = legacy.list_rows(tx, Kind.CLASS, None, 10)
    assert [(row.id, row.duplicate) for row in rows] == [(7, True), (5, True), (3, False)]


def test_rows_come_in_pages_from_the_highest_id_down(tx: CellTx) -> None:
    """Following the lowest id of each page gives every live row once."""
    add(tx, Kind.PROJECT, *(project(number, f"p{number}", "cores", number) for number in range(1, 8)))
    add(tx, Kind.PROJECT, project(20, "p1", "cores", 1, deleted=20))
    seen: list[int] = []
    while page := legacy.list_rows(tx, Kind.PROJECT, seen[-1] if seen else None, 3):
        seen += [row.id for row in page]
    assert seen == [7, 6, 5, 4, 3, 2, 1]
    assert legacy.count(tx, Kind.PROJECT) == 7
    assert (legacy.is_empty(tx, Kind.PROJECT), legacy.is_empty(tx, Kind.USER)) == (False, True)


def test_a_burial_is_the_incumbents_soft_deletion(tx: CellTx) -> None:
    """`deleted` becomes the row's id and `deleted_at` the time; a row that was changed or buried since stays."""
    add(
        tx,
        Kind.PROJECT,
        project(1, "p", "cores", 20),
        project(2, "p", "ram", None, deleted=None),
        project(3, "p", "instances", 30),
        project(4, "p", "key_pairs", 40),
    )
    rows = legacy.list_rows(tx, Kind.PROJECT, None, 10)
    table = sa.table("quotas", *map(sa.column, ("id", "hard_limit", "deleted", "deleted_at")))
    tx.execute(sa.update(table).where(table.c.id == 3).values(hard_limit=31))
    assert legacy.bury(tx, [row for row in rows if row.id != 4]) == 2
    assert legacy.bury(tx, rows) == 1
    assert legacy.bury(tx, []) == 0
    left = [row.id for row in legacy.list_rows(tx, Kind.PROJECT, None, 10)]
    assert left == [3]
    buried = tx.execute(sa.select(table).where(table.c.id == 2)).one()
    assert (buried.deleted, str(buried.deleted_at)[:19], buried.hard_limit) == (2, str(NOW), None)


def test_what_cannot_be_migrated_says_why(tx: CellTx) -> None:
    """A row without an owner or resource has a problem; one with odd but valid values has none."""
    add(tx, Kind.PROJECT, project(1, None, "cores", 20), project(2, "", "", None))
    add(tx, Kind.CLASS, of_class(1, None, "cores", 1), of_class(2, "x", None, 1), of_class(3, "x" * 255, "y" * 255, -1))
    assert [row.problem for row in legacy.list_rows(tx, Kind.PROJECT, None, 9)] == [None, "project_id is NULL"]
    problems = [row.problem for row in legacy.list_rows(tx, Kind.CLASS, None, 9)]
    assert problems == [None, "resource is NULL", "class_name is NULL"]


def test_what_only_a_file_can_hold_is_a_problem_too(tmp_path: Path) -> None:
    """SQLite keeps texts of any length, and texts where numbers belong; both are refused, not cut or guessed."""
    with empty_database("sqlite", tmp_path) as url, engine_of(url).begin() as connection:
        make_tables(connection)
        tx = CellTx(connection, NOW)
        add(tx, Kind.PROJECT, project(1, "p" * 256, "cores", 20), project(2, "p", "ram", 2**40))
        connection.exec_driver_sql("INSERT INTO quotas VALUES (3, NULL, NULL, NULL, x'00', 'cores', 1, 0)")
        add(tx, Kind.PROJECT, project(5, "p\0", "cores", 20))
        connection.exec_driver_sql("INSERT INTO quotas VALUES (4, NULL, NULL, NULL, 'p', 'cores', 'many', 0)")
        assert [row.problem for row in legacy.list_rows(tx, Kind.PROJECT, None, 9)] == [
            "project_id holds a NUL character",
            "hard_limit is not a whole number of 32 bits",
            "project_id is not text",
            "hard_limit is not a whole number of 32 bits",
            "project_id is longer than 255 characters",
        ]


def test_keys_are_unambiguous_and_bounded() -> None:
    """Whatever the names hold, two limits or owners of a kind never share a key, and every key fits its column."""
    odd = ["a", "a/b", "b", "%2F", "/", "", " ", "a ", "A", "ü", "%sha256:0", "x" * 255, "/" * 255, "/" * 254 + "x"]
    keys = [legacy.key_of(Kind.USER, one) for one in odd]
    keys += [legacy.key_of(Kind.USER, (one, other)) for one in odd for other in odd]
    keys += [legacy.key_of(Kind.USER, (one, other), "cores") for one in odd for other in odd]
    assert len(set(keys)) == len(keys)
    assert max(map(len, keys)) <= migrated_keys.c.key.type.length  # type: ignore[attr-defined]
    assert all(key.isascii() for key in keys)


def test_a_deletion_is_remembered_for_whom_it_was(api: ApiTx) -> None:
    """A deleted project takes the limits of its users with it; a deleted user or class takes nobody else's."""
    legacy.claim_by_api(api, Kind.PROJECT, "p", ["cores"])
    for kind, owner in ((Kind.PROJECT, "p"), (Kind.USER, "p"), (Kind.USER, ("q", "u")), (Kind.CLASS, "c")):
        legacy.tombstone(api, kind, owner)
        legacy.tombstone(api, kind, owner)
    asked: list[tuple[Kind, legacy.Owner]] = [
        *((Kind.PROJECT, name) for name in ("p", "P", "q")),
        *((Kind.USER, owner) for owner in ("p", ("p", "u"), ("q", "u"), ("q", "v"), "q")),
        *((Kind.CLASS, name) for name in ("c", "p")),
    ]
    deleted = {
        (Kind.PROJECT, "p"),
        (Kind.USER, "p"),
        (Kind.USER, ("p", "u")),
        (Kind.USER, ("q", "u")),
        (Kind.CLASS, "c"),
    }
    assert legacy.is_deleted(api, asked) == deleted
    assert legacy.is_deleted(api, []) == set()
    legacy.claim_by_api(api, Kind.PROJECT, "p", ["cores"])
    assert legacy.is_deleted(api, asked) == deleted
