"""No password of a URL shows anywhere (invariant S1): not in a repr, a log line, an error, a traceback, on a queue.

Each test plants passwords that cannot occur by chance, and looks for them as they are, percent-encoded, in base64 and
as `repr` and JSON would escape them.
"""

import asyncio
import json
import logging
import socket
import string
import traceback
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cellway.cells import mappings
from cellway.cells.mappings import CellMapping
from cellway.cells.registry import Cell, Cells, Snapshot, Templates
from cellway.cells.scatter import gather
from cellway.cells.target import target_cell
from cellway.config import Limits, Secret
from cellway.context import CellContext
from cellway.db.engines import API, Databases, open_engine
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx, Tx
from cellway.errors import CellUnavailable, CellwayError, Conflict, Invalid, Unavailable
from cellway.ids import CellUuid
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.databases import CONTEXT, KINDS, FakeClock, empty_database, make_cell, upgraded

LIMITS = Limits(database_deadline_seconds=60.0)
MARKER = "Zq7-hunter2-"
PASSWORD = MARKER + "p%{{a}'\"@:/\\ä s"
UUID = CellUuid("11111111-1111-4111-8111-111111111111")

passwords = st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: MARKER + text) | st.text(
    string.ascii_letters + string.digits, min_size=12
)


def forms(secret: str) -> set[str]:
    """Return the ways in which a text may be written out, without what is too short to be telling."""
    plain = secret.encode()
    shifted = {
        encode(b"x" * shift + plain)[4:-4].decode() for encode in (b64encode, urlsafe_b64encode) for shift in (0, 1, 2)
    }
    written = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
    }
    return {form for form in written | shifted | {plain.hex()} if len(form) >= 8}


def assert_hidden(shown: str, *secrets: str) -> None:
    """Fail if a secret is in what is shown, in whatever form."""
    assert [form for secret in secrets for form in forms(secret) if form in shown] == []


def test_the_search_finds_every_form() -> None:
    """A search that finds nothing would pass every other test here."""
    for shown in (
        PASSWORD,
        f"{[PASSWORD]!r}",
        json.dumps({"x": PASSWORD}),
        f"postgresql://u:{quote(PASSWORD, safe='')}@h/d",
        b64encode(f"ab{PASSWORD}".encode()).decode(),
        b64encode(f"a{PASSWORD}".encode()).decode(),
        f"x{PASSWORD}".encode().hex(),
    ):
        with pytest.raises(AssertionError):
            assert_hidden(shown, PASSWORD)
    assert_hidden("postgresql://u:***@h/d", PASSWORD)


# ---- what is only held -----------------------------------------------------------------------------------------


def printed(value: object) -> str:
    """Return a value as code prints it."""
    return f"{value!r} {value} {[value]} {value!a}"


@given(passwords)
@settings(max_examples=50)
def test_nothing_that_holds_a_url_prints_it(password: str) -> None:
    """Cells, mappings, snapshots, databases and registries."""
    database = Secret(f"postgresql://user:{quote(password, safe='')}@db/x")
    queue = Secret(f"memory://{password}")
    cell = replace(make_cell("one", database), transport_url=queue)
    clock = FakeClock()
    databases = Databases(database, limits=LIMITS, clock=clock)
    transports = Transports(MemoryBrokers(), LIMITS, clock)
    templates = Templates(database=database, transport=queue)
    cells = Cells(databases, transports, limits=LIMITS, clock=clock, templates=templates)
    databases.lease(cell.database_key, cell.ref, cell.database_url)
    held = [
        cell,
        CellMapping(1, UUID, "one", queue, database),
        Snapshot({1: cell}),
        databases,
        databases.on(API),
        *databases.open_cells,
        databases.on(API).engine(),
        transports,
        templates,
        cells,
        database,
        cell.database_key,
    ]
    assert_hidden(" ".join(printed(value) for value in held), password, database.reveal(), queue.reveal())


@pytest.mark.anyio
async def test_a_targeted_context_shows_and_sends_no_url() -> None:
    """Neither printed, nor on a queue, nor in an error about it."""
    database, queue = Secret(f"postgresql://user:{quote(PASSWORD, safe='')}@db/x"), Secret(f"memory://{PASSWORD}")
    clock = FakeClock()
    databases, transports = Databases(None, limits=LIMITS, clock=clock), Transports(MemoryBrokers(), LIMITS, clock)
    cell = replace(make_cell("one", database), transport_url=queue)
    with target_cell(CONTEXT, cell, databases, transports) as cctx:
        sent = msgspec.msgpack.encode(cctx.to_wire()) + msgspec.json.encode(cctx.to_wire())
        shown = printed(cctx) + printed(cctx.mq_connection) + sent.decode(errors="replace")
        with pytest.raises(CellwayError) as refusal:
            await cctx.mq_connection.send("nobody", b"", timeout_seconds=1)
        shown += "".join(traceback.format_exception(refusal.value))
        assert_hidden(shown, PASSWORD, database.reveal(), queue.reveal(), cell.database_key)
    await transports.aclose()
    await databases.aclose()


@given(passwords)
@settings(max_examples=50)
def test_no_error_about_a_bad_url_quotes_it(password: str) -> None:
    """Whatever is wrong with it, for a database as for a queue, and for a process's own URL that fills templates."""
    transports = Transports(MemoryBrokers(), LIMITS, FakeClock())
    quoted = quote(password, safe="")
    for form in (
        "{}",
        "u:{}@h",
        "nothing+known://u:{}@h/x",
        "postgresql://u@h:{}/x",
        "sqlite://{}",
        "x://[{}/",
        "{{{}}}",
    ):
        url = Secret(form.format(quoted) if "{{" not in form else form.format(password))
        attempts: list[Callable[[], object]] = [
            lambda url=url: open_engine(url, deadline_seconds=1.0),  # type: ignore[misc]
            lambda url=url: transports.lease(url),  # type: ignore[misc]
            lambda url=url: Templates(database=url).resolve(Secret("{port}"), "database"),  # type: ignore[misc]
            lambda url=url: Templates().resolve(url, "database"),  # type: ignore[misc]
        ]
        for attempt in attempts:
            try:
                attempt()
            except Invalid as refusal:
                assert_hidden("".join(traceback.format_exception(refusal)) + printed(refusal), password, url.reveal())


# ---- what fails ------------------------------------------------------------------------------------------------


@contextmanager
def watched(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect all that is logged, ours and the libraries', with its tracebacks."""
    shown: list[str] = []
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs:
        yield shown
    shown += [_rendered(entry) for entry in logs]
    shown += [f"{record.getMessage()} {record.exc_text} {_told(record.exc_info)}" for record in caplog.records]


def _rendered(entry: Mapping[str, Any] | MutableMapping[str, Any]) -> str:
    error = entry.get("exc_info")
    told = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
    return f"{dict(entry)!r} {told}"


def _told(info: object) -> str:
    return "".join(traceback.format_exception(info[1])) if isinstance(info, tuple) and info[1] is not None else ""


async def failure(ask: Callable[[], Awaitable[object]]) -> BaseException:
    """Return what is raised."""
    outcome = (await asyncio.gather(ask(), return_exceptions=True))[0]
    assert isinstance(outcome, BaseException)
    return outcome


def one(tx: Tx) -> None:
    """Ask the database anything."""
    tx.connection.exec_driver_sql("SELECT 1")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, nor will meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


UNREACHABLE = {
    "postgresql refuses": "postgresql+psycopg://user:{}@127.0.0.1:{port}/x",
    "mariadb refuses": "mysql+pymysql://user:{}@127.0.0.1:{port}/x",
    "password in the query": "postgresql+psycopg://user@127.0.0.1:{port}/x?password={}",
    "password twice": "mysql+pymysql://user:{}@127.0.0.1:{port}/x?password={}",
    "unknown option": "postgresql+psycopg://user:{}@127.0.0.1:{port}/x?no_such_option={}",
    "unknown argument": "mysql+pymysql://user:{}@127.0.0.1:{port}/x?no_such_argument={}",
    "unknown host": "postgresql+psycopg://user:{}@no-such-host.invalid/x",
    "unknown driver": "nothing+known://user:{}@127.0.0.1/x",
    "port": "postgresql+psycopg://user:secret@127.0.0.1:{}/x",
    "no url": "{}",
    "missing file": "sqlite:////no such folder/x?password={}",
}
REFUSED = {
    "postgresql": "postgresql+psycopg://no_such_role:{}@127.0.0.1:5432/postgres",
    "mariadb": "mysql+pymysql://root:{}@127.0.0.1:3306/mysql",
}


@pytest.fixture
async def databases(anyio_backend: str) -> AsyncIterator[Databases]:
    """A process without an API database."""
    made = Databases(None, limits=LIMITS, clock=FakeClock())
    yield made
    await made.aclose()


async def fail_everywhere(databases: Databases, url: Secret, caplog: pytest.LogCaptureFixture) -> str:
    """Read and write in a cell whose database fails, alone and among others; return all that can be seen of it."""
    cell = make_cell("one", url)
    transports = Transports(MemoryBrokers(), LIMITS, FakeClock())
    cells = Cells(databases, transports, limits=LIMITS, clock=FakeClock())

    async def ask(_: Cell, cctx: CellContext) -> None:
        await databases.on(cctx).read(one)

    with watched(caplog) as shown:
        with target_cell(CONTEXT, cell, databases, transports) as cctx:
            database = databases.on(cctx)
            failures = [await failure(lambda: database.read(one)), await failure(lambda: database.write(one))]
            shown += [printed(cctx), printed(database)]
        outcomes = await gather(cells, CONTEXT, [cell], ask)
        databases.retire(cell.database_key)
        await transports.aclose()
    assert all(isinstance(error, CellUnavailable) for error in failures)
    shown += ["".join(traceback.format_exception(error)) for error in failures]
    shown += [printed(error) + printed(error.__dict__) for error in failures]
    return "\n".join([*shown, printed(outcomes), cell.ref.name])


@pytest.mark.anyio
@pytest.mark.parametrize("form", UNREACHABLE.values(), ids=UNREACHABLE.keys())
async def test_a_database_that_cannot_be_reached_shows_no_password(
    databases: Databases, caplog: pytest.LogCaptureFixture, closed_port: int, form: str
) -> None:
    """Not in the error, its causes, their traceback, nor in any log."""
    quoted = quote(PASSWORD, safe="")
    url = Secret(form.replace("{port}", str(closed_port)).replace("{}", quoted))
    assert_hidden(await fail_everywhere(databases, url, caplog), PASSWORD, quoted, url.reveal())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", REFUSED)
async def test_a_server_that_refuses_the_user_shows_no_password(
    databases: Databases, caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: str
) -> None:
    """The server's own words are in the traceback, and do not hold it."""
    quoted = quote(PASSWORD, safe="")
    url = Secret(REFUSED[kind].replace("{}", quoted))
    with empty_database(kind, tmp_path):  # there is such a server
        assert_hidden(await fail_everywhere(databases, url, caplog), PASSWORD, quoted, url.reveal())


@pytest.mark.anyio
async def test_an_api_database_that_fails_shows_no_password(caplog: pytest.LogCaptureFixture, closed_port: int) -> None:
    """Also when the registry meets it in its loop, and logs it."""
    quoted = quote(PASSWORD, safe="")
    url = Secret(f"mysql+pymysql://user:{quoted}@127.0.0.1:{closed_port}/x")
    databases = Databases(url, limits=LIMITS, clock=FakeClock())
    transports = Transports(MemoryBrokers(), LIMITS, FakeClock())
    cells = Cells(databases, transports, limits=LIMITS, clock=FakeClock())
    with watched(caplog) as shown:
        error = await failure(cells.refresh)
        watching = asyncio.ensure_future(cells.watch())
        await failure(cells.refresh)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await databases.aclose()
    assert isinstance(error, Unavailable)
    assert_hidden("".join([*shown, *traceback.format_exception(error)]), PASSWORD, quoted, url.reveal())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_writing_a_mapping_shows_no_password(caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: str) -> None:
    """URLs are values of statements: neither a conflict nor a mistake in one shows them, and a refresh logs none."""
    quoted = quote(PASSWORD, safe="")
    queue, cell = Secret(f"memory://{quoted}"), Secret(f"postgresql://u:{quoted}@h/{{nothing}}")

    def create(tx: ApiTx) -> None:
        mappings.create_cell(tx, UUID, "one", transport_url=queue, database_connection=cell)

    def again(tx: ApiTx) -> None:
        mappings.create_cell(tx, UUID, "two", transport_url=queue, database_connection=cell)

    def broken(tx: ApiTx) -> None:
        columns = mappings.list_cells(tx)[0]
        values = {"uuid": "x" * 5000, "database_connection": columns.database_connection.reveal(), "no": quoted}
        tx.execute(
            sa.text(
                "INSERT INTO cell_mappings (uuid, database_connection, no) VALUES (:uuid, :database_connection, :no)"
            ),
            values,
        )

    with empty_database(kind, tmp_path) as url:
        databases = Databases(upgraded(url, Tree.API), limits=LIMITS, clock=FakeClock())
        transports = Transports(MemoryBrokers(), LIMITS, FakeClock())
        cells = Cells(databases, transports, limits=LIMITS, clock=FakeClock())
        with watched(caplog) as shown:
            await databases.on(API).write(create)
            errors = [
                await failure(lambda: databases.on(API).write(again)),
                await failure(lambda: databases.on(API).write(broken)),
            ]
            await cells.refresh()
            shown.append(printed(await databases.on(API).read(mappings.list_cells)))
            with pytest.raises(CellUnavailable) as refusal, cells.target_cell(CONTEXT, cells.snapshot.all[0]):
                pass
            await databases.aclose()
    assert isinstance(errors[0], Conflict)
    shown += ["".join(traceback.format_exception(error)) for error in (*errors, refusal.value)]
    assert_hidden("\n".join([*shown, printed(cells.snapshot)]), PASSWORD, quoted, queue.reveal(), cell.reveal())
