"""Lists of instances: the statements give what Python says, in Python's order, on any rows, and pages lose nothing."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellway.db.cell_tables import instance_extra, instances, tags
from cellway.db.schema import Tree
from cellway.db.transaction import CellTx
from cellway.instances import reading, writing
from cellway.instances.reading import SORT_KEYS, Filter, Sort
from cellway.instances.records import Instance
from tests.databases import SLOW_SERVERS, empty_database, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)
# Text that collations, patterns and byte orders treat differently; cased letters only where every database folds alike.
TEXTS = [
    "",
    "a",
    "A",
    "b",
    "B",
    "ab",
    "aB",
    "a.b",
    "a%b",
    "a_b",
    "a!b",
    "^a",
    "a$",
    "a*b",
    "a\\b",
    "a\n",
    "-",
    "~",
    "10",
    "9",
]
WIDE = ["中", "文", "ﬀ", "🐈", "\u00a0", "a中"]
PIECES = ["a", "A", "b", ".", ".*", "%", "_", "!", "*", "^", "$", "\\", "中", "🐈", "("]
TAGS = ["red", "blue", "Red", "中"]
STATES = ["active", "building", "error"]
TASKS = ["spawning", "deleting"]

texts = st.sampled_from(TEXTS + WIDE)
maybe_text = st.none() | texts
# Nothing that is compared for equality can end in a space; what a user writes freely can.
free_text = maybe_text | st.just("a ")
moments = st.integers(0, 3).map(lambda seconds: NOW + timedelta(seconds=seconds))
small = st.none() | st.integers(0, 2)
ROW = st.fixed_dictionaries(
    {
        "uuid": st.uuids().map(str),
        "display_name": free_text,
        "display_description": free_text,
        "project_id": st.sampled_from(["p", "q"]),
        "user_id": st.sampled_from(["u", "v"]),
        "host": st.none() | st.sampled_from(["h1", "h2"]),
        "image_ref": maybe_text,
        "key_name": maybe_text,
        "availability_zone": maybe_text,
        "locked": st.none() | st.booleans(),
        "locked_by": st.none() | st.sampled_from(["owner", "admin"]),
        "auto_disk_config": st.none() | st.booleans(),
        "power_state": small,
        "progress": small,
        "launch_index": small,
        "instance_type_id": small,
        "vm_state": st.sampled_from(STATES),
        "task_state": st.none() | st.sampled_from(TASKS),
        "created_at": moments,
        "updated_at": st.none() | moments,
        "launched_at": st.none() | moments,
        "access_ip_v4": st.none() | st.sampled_from(["10.0.0.1", "10.0.0.9", "10.0.0.10"]),
    }
)
ROWS = st.lists(st.tuples(ROW, st.sets(st.sampled_from(TAGS))), max_size=10, unique_by=lambda pair: pair[0]["uuid"])
SORTS = st.lists(
    st.tuples(st.sampled_from(sorted(SORT_KEYS)), st.booleans()), min_size=1, max_size=3, unique_by=lambda key: key[0]
).map(tuple)
some_tags = st.lists(st.sampled_from(TAGS), max_size=2).map(tuple)
FILTERS = st.builds(
    Filter,
    project_id=st.none() | st.just("p"),
    user_id=st.none() | st.just("u"),
    name=st.none() | st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    vm_states=st.none() | st.lists(st.sampled_from(STATES), max_size=2).map(tuple),
    task_states=st.none() | st.lists(st.none() | st.sampled_from(TASKS), max_size=2).map(tuple),
    image_ref=maybe_text,
    host=st.none() | st.just("h1"),
    instance_type_id=small,
    locked=st.none() | st.booleans(),
    changes_since=st.none() | moments,
    tags=some_tags,
    tags_any=some_tags,
    not_tags=some_tags,
    not_tags_any=some_tags,
    deleted=st.sampled_from([False, None]),
)
EVERYTHING = Filter(deleted=None)
BY_UUID: Sort = (("uuid", False),)

quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=SLOW_SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """A cell's database of each kind in turn."""
    with empty_database(request.param, tmp_path_factory.mktemp("reading")) as url:
        made = engine_of(upgraded(url, Tree.CELL))
        yield made
        made.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that leaves nothing behind; each example rolls back to its beginning."""
    with engine.connect() as opened, opened.begin() as transaction:
        yield opened
        transaction.rollback()


def store(connection: sa.Connection, rows: list[tuple[dict[str, Any], set[str]]]) -> tuple[CellTx, list[Instance]]:
    """Put the rows into the cell instead of those of the last example, and return them as they are read one by one."""
    for table in (tags, instance_extra, instances):
        connection.execute(sa.delete(table))
    tx = CellTx(connection, NOW)
    if rows:
        tx.execute(sa.insert(instances), [row | {"deleted": 0} for row, _ in rows])
        extra = [{"instance_uuid": row["uuid"], "flavor": "{}", "deleted": 0} for row, _ in rows]
        tx.execute(sa.insert(instance_extra), extra)
    if tagged := [{"resource_id": row["uuid"], "tag": tag} for row, of_row in rows for tag in of_row]:
        tx.execute(sa.insert(tags), tagged)
    return tx, [reading.get(tx, row["uuid"]) for row, _ in rows]


def uuids(found: list[Instance]) -> list[str]:
    """Return which they are."""
    return [instance.uuid for instance in found]


@quick
@given(rows=ROWS, sort=SORTS)
def test_the_order_is_the_same_in_both_languages(
    connection: sa.Connection, rows: list[tuple[dict[str, Any], set[str]]], sort: Sort
) -> None:
    """A page sorted by the statement is the page sorted by `sort_key`, with its NULLs, so that cells can be merged."""
    tx, all_of_them = store(connection, rows)
    page = reading.list_page(tx, EVERYTHING, sort, 100)
    assert uuids(page) == uuids(sorted(all_of_them, key=reading.sort_key(sort)))
    assert page == sorted(all_of_them, key=reading.sort_key(sort))


@quick
@given(rows=ROWS, where=FILTERS)
def test_a_filter_means_the_same_in_both_languages(
    connection: sa.Connection, rows: list[tuple[dict[str, Any], set[str]]], where: Filter
) -> None:
    """The statement finds what `matches` says of the same instances."""
    named = [(row | {"display_name": row["display_name"] or ""}, tagged) for row, tagged in rows]
    tx, all_of_them = store(connection, named)
    expected = {instance.uuid for instance in all_of_them if reading.matches(instance, where)}
    assert set(uuids(reading.list_page(tx, where, BY_UUID, 100))) == expected


@quick
@given(rows=ROWS, sort=SORTS, size=st.integers(1, 4))
def test_pages_by_marker_give_each_instance_once(
    connection: sa.Connection, rows: list[tuple[dict[str, Any], set[str]]], sort: Sort, size: int
) -> None:
    """From page to page by the last one's sort values, none is left out or comes twice, equal keys and NULLs too."""
    tx, all_of_them = store(connection, rows)
    read: list[Instance] = []
    while page := reading.list_page(tx, EVERYTHING, sort, size, reading.sort_values(read[-1], sort) if read else None):
        read += page
        assert len(read) <= len(all_of_them)
    assert uuids(read) == uuids(sorted(all_of_them, key=reading.sort_key(sort)))


@quick
@given(rows=ROWS, sort=SORTS, data=st.data())
def test_what_follows_a_marker_is_the_same_in_both_languages(
    connection: sa.Connection, rows: list[tuple[dict[str, Any], set[str]]], sort: Sort, data: st.DataObject
) -> None:
    """The rows after any marker are those whose key is greater, also when the marker itself is not in this cell."""
    tx, [*others] = store(connection, rows)
    if not others:
        return
    marker = others.pop(data.draw(st.integers(0, len(others) - 1)))
    writing.erase(tx, marker.uuid)
    after = reading.sort_values(marker, sort)
    key = reading.sort_key(sort)
    expected = sorted((one for one in others if key(one) > reading.key_of_values(sort, after)), key=key)
    assert uuids(reading.list_page(tx, EVERYTHING, sort, 100, after)) == uuids(expected)


def test_a_list_without_details_leaves_them_out(connection: sa.Connection) -> None:
    """It has the same instances, without metadata and tags."""
    row = {"uuid": str(UUID(int=1)), "display_name": "s", "project_id": "p", "created_at": NOW, "vm_state": "active"}
    tx, [whole] = store(connection, [(row, {"red"})])
    [brief] = reading.list_page(tx, EVERYTHING, BY_UUID, 10, details=False)
    assert (whole.tags, brief.tags) == (("red",), ())
    assert brief.uuid == whole.uuid
