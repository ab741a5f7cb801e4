"""Prepared reads: what SQLAlchemy's own execution answers, and what its errors become."""

import os
import socket
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from cellway.config import Limits
from cellway.db.columns import PRECISE_TIME, IpAddress
from cellway.db.engines import API, Database, Databases
from cellway.db.prepared import Prepared
from cellway.db.transaction import ApiTx
from tests.databases import KINDS, SERVERS, FakeClock, empty_database, engine_of

pytestmark = pytest.mark.anyio

METADATA = sa.MetaData()
things = sa.Table(
    "things",
    METADATA,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("at", sa.DateTime),
    sa.Column("exactly_at", PRECISE_TIME),
    sa.Column("wanted", sa.Boolean),
    sa.Column("address", IpAddress),
    sa.Column("number", sa.Integer),
)
ROWS: list[dict[str, Any]] = [
    {
        "name": "100% full",
        "at": datetime(2026, 1, 2, 3, 4, 5),
        "exactly_at": datetime(2026, 1, 2, 3, 4, 5, 678901),
        "wanted": True,
        "address": "10.0.0.1",
        "number": 7,
    },
    {"name": "empty", "at": None, "exactly_at": None, "wanted": None, "address": None, "number": None},
    {"name": "none", "at": None, "exactly_at": None, "wanted": False, "address": "2001:db8::1", "number": 0},
]

EVERYTHING = sa.select(things).where(things.c.name != sa.bindparam("but")).order_by(things.c.name)
NUMBERED = sa.union_all(
    sa.select(things.c.name, things.c.number).where(things.c.number == sa.bindparam("number")),
    sa.select(things.c.name, sa.null()).where(things.c.wanted == sa.true(), things.c.name.like("100% f%")),
)
BROKEN: sa.Select[Any] = (
    sa.select(sa.column("nothing")).select_from(sa.table("missing")).where(sa.column("a") == sa.bindparam("a"))
)


@pytest.fixture(params=KINDS)
async def database(
    request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str
) -> AsyncIterator[Database[ApiTx]]:
    """A database of each kind, with three rows."""
    with empty_database(request.param, tmp_path) as url:
        engine = engine_of(url)
        with engine.begin() as connection:
            METADATA.create_all(connection)
            connection.execute(sa.insert(things), ROWS)
        engine.dispose()
        limits = Limits(database_deadline_seconds=60.0, database_threads=1)
        databases = Databases(url, limits=limits, clock=FakeClock())
        yield databases.on(API)
        await databases.aclose()


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [(EVERYTHING, {"but": "nothing"}), (EVERYTHING, {"but": "empty"}), (NUMBERED, {"number": 7})],
)
async def test_answers_as_sqlalchemy_does(
    database: Database[ApiTx], statement: Any, parameters: dict[str, str | int]
) -> None:
    """A prepared read gives the values, of the types, that the same statement gives when it is executed."""

    def both(tx: ApiTx) -> tuple[list[Any], list[Any]]:
        return [tuple(row) for row in Prepared(statement).rows(tx, parameters)], [
            tuple(row) for row in tx.execute(statement, parameters)
        ]

    prepared, executed = await database.read(both)
    assert prepared == executed
    assert prepared
    assert [list(map(type, row)) for row in prepared] == [list(map(type, row)) for row in executed]


async def test_gives_the_first_row_or_none(database: Database[ApiTx]) -> None:
    """Where no row fits, there is none; the statement serves again with other parameters."""
    prepared = Prepared(sa.select(things.c.name).where(things.c.number == sa.bindparam("number")))

    def read(tx: ApiTx) -> list[Any]:
        return [prepared.first(tx, {"number": number}) for number in (7, 8, 0)]

    found = [row and tuple(row) for row in await database.read(read)]
    assert found == [("100% full",), None, ("none",)]


async def test_errors_are_sqlalchemys_and_show_no_parameter(database: Database[ApiTx]) -> None:
    """What the driver refuses is raised as an error of SQLAlchemy's that hides what was bound."""

    def read(tx: ApiTx) -> None:
        Prepared(BROKEN).rows(tx, {"a": "a-secret"})

    with pytest.raises(DBAPIError) as raised:
        await database.read(read)
    assert "missing" in str(raised.value)
    assert "a-secret" not in str(raised.value)


@pytest.mark.parametrize("database", SERVERS, indirect=True)
async def test_a_connection_that_breaks_is_replaced(database: Database[ApiTx]) -> None:
    """A connection that is lost under a prepared read is given up, and the read runs again on another."""
    prepared = Prepared(EVERYTHING)
    seen: list[object] = []

    def read(tx: ApiTx) -> int:
        raw: Any = tx.connection.connection.dbapi_connection
        if len(seen) == 1:
            descriptor = (getattr(raw, "_sock", None) or raw).fileno()
            with socket.socket(fileno=os.dup(descriptor)) as line:
                line.shutdown(socket.SHUT_RDWR)
        seen.append(raw)
        return len(prepared.rows(tx, {"but": "nothing"}))

    assert [await database.read(read), await database.read(read)] == [3, 3]
    assert len(seen) == 3
    assert seen[2] is not seen[0]
