"""Schema versions on every database that this machine has: fresh, adopted, interrupted, and at the same time."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from cellway.config import Secret
from cellway.db.api_tables import API_METADATA, aggregates, build_claims
from cellway.db.cell_tables import CELL_METADATA, instances
from cellway.db.migrate import upgrade
from cellway.db.schema import VERSION_TABLE, SchemaStatus, Tree, status
from cellway.errors import Conflict, Unavailable
from tests.databases import KINDS, SLOW_SERVERS, empty_database, engine_of

METADATA = {Tree.API: API_METADATA, Tree.CELL: CELL_METADATA}

OpenEngine = Callable[[], sa.Engine]


@pytest.fixture(params=SLOW_SERVERS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenEngine]:
    """Give a way to open engines on an empty database of the test's own."""
    with empty_database(request.param, tmp_path) as url:
        yield lambda: engine_of(url)


def differences(connection: sa.Connection, tree: Tree) -> list[Any]:
    """Return what alembic would change to make the database what the code declares."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found: list[Any] = compare_metadata(context, METADATA[tree])
    return found


def shape(connection: sa.Connection, names: Iterable[str]) -> dict[str, Any]:
    """Return all that reflection knows of some tables, comparable."""
    inspector = sa.inspect(connection)
    return {
        name: (
            [{**column, "type": repr(column["type"])} for column in inspector.get_columns(name)],
            inspector.get_pk_constraint(name),
            sorted(map(repr, inspector.get_indexes(name))),
            sorted(map(repr, inspector.get_unique_constraints(name))),
            sorted(map(repr, inspector.get_foreign_keys(name))),
            inspector.get_table_options(name),
        )
        for name in names
    }


@pytest.mark.parametrize("tree", Tree)
def test_versions_follow_each_other_as_their_files_do(tree: Tree) -> None:
    """`Tree.versions`, read from file names, is the chain that alembic finds in the files."""
    chain = [
        script.revision for script in ScriptDirectory(tree.folder, version_locations=[tree.folder]).walk_revisions()
    ]
    assert chain[::-1] == list(tree.versions)


@pytest.mark.parametrize("tree", Tree)
def test_an_empty_database_gets_the_declared_schema(database: OpenEngine, tree: Tree) -> None:
    """After an upgrade there is no difference between the database and the tables that the code declares."""
    engine = database()
    head = tree.versions[-1]
    assert upgrade(engine, tree) == SchemaStatus(None, head, len(tree.versions))
    assert upgrade(engine, tree) == SchemaStatus(head, head, 0)
    with engine.connect() as connection:
        assert status(connection, tree) == SchemaStatus(head, head, 0)
        assert differences(connection, tree) == []


@pytest.mark.parametrize("tree", Tree)
def test_an_upgrade_leaves_out_no_detail(database: OpenEngine, tree: Tree) -> None:
    """Defaults, collations and options too are those of tables made straight from the declarations."""
    engine = database()
    metadata = METADATA[tree]
    upgrade(engine, tree)
    with engine.begin() as connection:
        upgraded = shape(connection, metadata.tables)
        metadata.drop_all(connection)
        metadata.create_all(connection)
        assert upgraded == shape(connection, metadata.tables)


def test_a_database_without_versions_has_them_all_pending(database: OpenEngine) -> None:
    """`status` reads an empty database without changing it."""
    with database().connect() as connection:
        assert status(connection, Tree.API) == SchemaStatus(None, Tree.API.versions[-1], len(Tree.API.versions))
        assert sa.inspect(connection).get_table_names() == []


def test_what_is_written_is_what_is_read(database: OpenEngine) -> None:
    """Names differ by case, our own times keep microseconds, addresses are text: on every database alike."""
    engine = database()
    upgrade(engine, Tree.API)
    moment = datetime(2026, 5, 4, 3, 2, 1, 987654)
    with engine.begin() as connection:
        connection.execute(sa.insert(aggregates), [{"uuid": "u", "name": "rack"}, {"uuid": "U", "name": "RACK"}])
        assert connection.scalars(sa.select(aggregates.c.uuid).where(aggregates.c.name == "RACK")).all() == ["U"]
        connection.execute(sa.insert(build_claims), {"instance_uuid": "i", "generation": 1, "expires_at": moment})
        row = connection.execute(sa.select(build_claims)).one()
        assert (row.expires_at, row.cancelled, row.attempt, row.failed_hosts) == (moment, False, 0, "[]")


def test_addresses_are_text(database: OpenEngine) -> None:
    """An address comes back as the text that was written."""
    engine = database()
    upgrade(engine, Tree.CELL)
    with engine.begin() as connection:
        connection.execute(sa.insert(instances), {"uuid": "i", "access_ip_v4": "10.0.0.1", "access_ip_v6": "fe80::1"})
        row = connection.execute(sa.select(instances)).one()
        assert (row.access_ip_v4, row.access_ip_v6, row.deleted, row.hidden) == ("10.0.0.1", "fe80::1", 0, False)


@pytest.mark.parametrize("tree", Tree)
def test_upgrades_at_the_same_time_take_turns(database: OpenEngine, tree: Tree) -> None:
    """Of four upgrades started together one does the work and the others find nothing to do."""
    start = threading.Barrier(4)

    def run(engine: sa.Engine) -> int:
        start.wait()
        return upgrade(engine, tree).pending

    with ThreadPoolExecutor(4) as pool:
        pending = list(pool.map(run, [database() for _ in range(4)]))
    assert sorted(pending) == [0, 0, 0, len(tree.versions)]
    with database().connect() as connection:
        assert differences(connection, tree) == []


def test_both_trees_may_be_upgraded_at_once_in_one_process(tmp_path: Path) -> None:
    """Upgrades of different databases by threads of one process do not meet in alembic's global state."""
    trees = [Tree.API, Tree.CELL, Tree.CELL, Tree.CELL]
    start = threading.Barrier(len(trees))

    def run(number: int) -> list[Any]:
        engine = engine_of(Secret(f"sqlite:///{tmp_path / str(number)}.sqlite"))
        start.wait()
        upgrade(engine, trees[number])
        with engine.connect() as connection:
            return differences(connection, trees[number])

    with ThreadPoolExecutor(len(trees)) as pool:
        assert list(pool.map(run, range(len(trees)))) == [[]] * len(trees)


def test_an_upgrade_waits_no_longer_than_it_was_told(database: OpenEngine) -> None:
    """While another upgrade is at work, one with little patience gives up with a clear error, and can come back."""
    working, proceed = threading.Event(), threading.Event()
    slow = database()

    @sa.event.listens_for(slow, "before_cursor_execute")
    def pause(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "CREATE TABLE host_mappings" in statement:
            working.set()
            assert proceed.wait(60)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(upgrade, slow, Tree.API)
        try:
            assert working.wait(60)
            with pytest.raises(Unavailable) as caught:
                upgrade(database(), Tree.API, wait_seconds=0.01)
        finally:
            proceed.set()
        assert caught.value.code == "schema.upgrade_failed"
        assert first.result().pending == len(Tree.API.versions)
    assert upgrade(database(), Tree.API).pending == 0


class PowerFailure(Exception):
    """The sudden end of a process."""


def mortal(engine: sa.Engine, death: int | str) -> sa.Engine:
    """Make an engine die before its `death`-th CREATE, or before its first statement of that name."""
    created = 0

    @sa.event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        nonlocal created
        verb = statement.split(maxsplit=1)[0]
        created += verb == "CREATE"
        if death in (created, verb):
            raise PowerFailure

    return engine


@pytest.mark.parametrize("tree", Tree)
def test_an_interrupted_upgrade_can_be_run_again(database: OpenEngine, tree: Tree) -> None:
    """An upgrade that dies before any of its statements leaves a database that the next one completes."""
    # The version table, the first table, two of those in the middle, the record of the version.
    for death in (1, 2, 5, 10, "INSERT"):
        with pytest.raises(PowerFailure):
            upgrade(mortal(database(), death), tree)
    assert upgrade(database(), tree).pending == len(tree.versions)
    with database().connect() as connection:
        assert differences(connection, tree) == []


@pytest.mark.slow
@pytest.mark.parametrize("tree", Tree)
def test_an_upgrade_may_be_cut_before_each_of_its_tables(database: OpenEngine, tree: Tree) -> None:
    """Each run dies one CREATE later than the last, on what the last one left, until one comes to its end."""
    # MariaDB keeps what each run made, so the second CREATE is always a new one; the others begin again.
    keeps = database().dialect.name not in ("sqlite", "postgresql")
    for death in range(1, 200):
        try:
            upgrade(mortal(database(), min(death, 2) if keeps else death), tree)
            break
        except PowerFailure:
            continue
    assert death > len(METADATA[tree].tables)
    assert upgrade(database(), tree).pending == 0
    with database().connect() as connection:
        assert differences(connection, tree) == []


SYNC = """
import sys
from cellway.config import Limits, Secret
from cellway.db.schema import Tree
from cellway.operations.schemas import sync
print("ready", flush=True)
sys.stdin.readline()
report = sync("it", Secret(sys.argv[1]), Tree(sys.argv[2]), limits=Limits(database_deadline_seconds=60.0))
print(report.before, report.after, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tree", Tree)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_sync_at_the_same_time_take_turns(kind: str, tmp_path: Path, tree: Tree) -> None:
    """Of three processes one makes the schema, and the others find it made."""
    head = tree.versions[-1]
    with empty_database(kind, tmp_path) as url:
        command = [sys.executable, "-c", SYNC, url.reveal(), tree.value]
        with ExitStack() as opened:
            running = [
                opened.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
                for _ in range(3)
            ]
            for process in running:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in running:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            answers = sorted(process.communicate(timeout=120)[0].strip() for process in running)
        assert answers == sorted([f"None {head}", f"{head} {head}", f"{head} {head}"])
        engine = engine_of(url)
        with engine.connect() as connection:
            assert differences(connection, tree) == []
        engine.dispose()


INCUMBENT = {
    Tree.API: """
        CREATE TABLE cell_mappings (created_at {time}, updated_at {time}, id INTEGER PRIMARY KEY,
            uuid VARCHAR(36) NOT NULL, name VARCHAR(255), transport_url TEXT, database_connection TEXT,
            disabled BOOLEAN, region VARCHAR(10), CONSTRAINT uniq_cell_mappings0uuid UNIQUE (uuid));
        CREATE TABLE aggregates (created_at {time}, updated_at {time}, id INTEGER PRIMARY KEY, uuid VARCHAR(36),
            name VARCHAR(255), CONSTRAINT uniq_aggregate0name UNIQUE (name));
        CREATE TABLE aggregate_notes (id INTEGER PRIMARY KEY, note TEXT);
        INSERT INTO cell_mappings (id, uuid, name, region) VALUES (7, 'seven', 'north', 'eu');
        INSERT INTO aggregates (id, uuid, name) VALUES (1, 'same', 'a'), (2, 'same', 'b'), (3, NULL, NULL);
        INSERT INTO aggregate_notes VALUES (1, 'not ours')""",
    Tree.CELL: """
        CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);
        CREATE TABLE quotas (id INTEGER PRIMARY KEY, created_at {time}, updated_at {time}, deleted_at {time},
            project_id VARCHAR(255), resource VARCHAR(255) NOT NULL, hard_limit INTEGER, deleted INTEGER,
            remark VARCHAR(20));
        CREATE TABLE shadow_quotas (id INTEGER, project_id VARCHAR(255));
        INSERT INTO alembic_version VALUES ('8f2f1571d55b');
        INSERT INTO quotas (id, project_id, resource, hard_limit, deleted, remark)
            VALUES (1, 'p', 'cores', 20, 0, 'x'), (2, 'p', 'cores', 30, 0, 'twice'), (3, 'p', 'fixed_ips', -1, 3, NULL);
        INSERT INTO shadow_quotas VALUES (4, 'p')""",
}


def build_incumbent(connection: sa.Connection, tree: Tree, *, without: str = "") -> None:
    """Make a database as an existing deployment would have it, in its own words."""
    script = INCUMBENT[tree].format(time="TIMESTAMP NULL").replace(without, "")
    for statement in script.split(";"):
        connection.exec_driver_sql(statement)


def contents(connection: sa.Connection, names: list[str]) -> dict[str, list[str]]:
    """Return all rows of some tables."""
    everything = {name: connection.execute(sa.select(sa.text("*")).select_from(sa.table(name))) for name in names}
    return {name: sorted(map(repr, rows)) for name, rows in everything.items()}


def names_in(difference: Any) -> set[str]:
    """Return the names of the tables that one of alembic's differences speaks of."""
    if isinstance(difference, list):
        return set().union(*map(names_in, difference))
    items = {item.name for item in difference if isinstance(item, sa.Table)}
    items |= {str(item.table) for item in difference if isinstance(item, sa.Index | sa.UniqueConstraint)}
    return items | {item for item in difference if isinstance(item, str)}


@pytest.mark.parametrize("tree", Tree)
def test_an_existing_deployment_is_adopted_untouched(database: OpenEngine, tree: Tree) -> None:
    """Tables that are there keep their columns, keys and rows, also what violates our keys; ours come beside them."""
    engine = database()
    with engine.begin() as connection:
        build_incumbent(connection, tree)
        theirs = sa.inspect(connection).get_table_names()
        before = shape(connection, theirs), contents(connection, theirs)
    upgrade(engine, tree)
    with engine.connect() as connection:
        assert (shape(connection, theirs), contents(connection, theirs)) == before
        declared = set(METADATA[tree].tables)
        assert set(sa.inspect(connection).get_table_names()) == declared | set(theirs) | {VERSION_TABLE}
        elsewhere = [found for found in differences(connection, tree) if not names_in(found) & set(theirs)]
        assert elsewhere == []


def test_a_table_without_a_column_we_need_is_not_adopted(database: OpenEngine) -> None:
    """A deployment that is too old is refused by naming what it lacks, and nothing is created."""
    engine = database()
    with engine.begin() as connection:
        build_incumbent(connection, Tree.API, without="disabled BOOLEAN,")
        theirs = sa.inspect(connection).get_table_names()
    with pytest.raises(Conflict) as caught:
        upgrade(engine, Tree.API)
    assert caught.value.fields["missing"] == ["cell_mappings.disabled"]
    with engine.connect() as connection:
        assert set(sa.inspect(connection).get_table_names()) <= {*theirs, VERSION_TABLE}


def test_the_wrong_kind_of_database_is_refused(database: OpenEngine) -> None:
    """A cell's database is not taken for the API database, nor a newer release's for ours."""
    engine = database()
    upgrade(engine, Tree.CELL)
    with pytest.raises(Conflict) as caught:
        upgrade(engine, Tree.API)
    assert caught.value.code == "schema.unknown_version"
    with engine.connect() as connection, pytest.raises(Conflict):
        status(connection, Tree.API)


def test_a_database_that_refuses_is_reported_without_its_url(tmp_path: Path) -> None:
    """An upgrade that the database refuses is a domain error."""
    path = tmp_path / "not a database"
    path.write_text("x" * 4096, encoding="ascii")
    with pytest.raises(Unavailable) as caught:
        upgrade(engine_of(Secret(f"sqlite:///{path}")), Tree.API)
    assert str(tmp_path) not in str(caught.value)
