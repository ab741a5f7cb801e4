"""Databases for tests: an empty one of any kind, cells upon them, and a clock that a test moves.

A test that runs on every kind takes `kind` from `KINDS`; a server that is not there skips it, or fails it when
CELLWAY_TEST_REQUIRE (a list with commas) names it.
"""

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TypeAlias

import pytest
import sqlalchemy as sa

from cellway.cells.registry import Cell
from cellway.config import Secret
from cellway.context import CellRef, RequestContext
from cellway.db.api_tables import API_METADATA
from cellway.db.cell_tables import CELL_METADATA
from cellway.db.engines import connection_key, open_engine
from cellway.db.migrate import upgrade
from cellway.db.schema import Tree
from cellway.ids import CellUuid, ProjectId, RequestId, UserId

KINDS: Final = ("sqlite", "postgresql", "mariadb")
SERVERS: Final = ("postgresql", "mariadb")
SLOW_SERVERS: Final = ("sqlite", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SERVERS))
"""KINDS for tests that run a deployment: `make check` runs them on SQLite, `make test` on every kind."""
CONTEXT: Final = RequestContext(
    user_id=UserId("alice"), project_id=ProjectId("demo"), request_id=RequestId("req-1"), roles=frozenset({"member"})
)
METADATA: Final = {Tree.API: API_METADATA, Tree.CELL: CELL_METADATA}
_ADDRESSES = {
    "postgresql": ("postgresql+psycopg://root@127.0.0.1:5432/", 5432, "postgres"),
    "mariadb": ("mysql+pymysql://root@127.0.0.1:3306/", 3306, "mysql"),
}


Urls: TypeAlias = Callable[[str], Secret] | None
"""What `testing.deployment` takes: gives a database's URL by its name; None for files in the deployment's folder."""


@dataclass
class FakeClock:
    """A clock that a test moves."""

    seconds: float = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def engine_of(url: Secret) -> sa.Engine:
    """Open an engine of the test's own, with a deadline that a busy machine keeps."""
    return open_engine(url, create=True, deadline_seconds=60.0)


def upgraded(url: Secret, tree: Tree) -> Secret:
    """Make the tables of a tree, and return the URL."""
    engine = engine_of(url)
    upgrade(engine, tree)
    engine.dispose()
    return url


@contextmanager
def empty_database(kind: str, folder: Path) -> Iterator[Secret]:
    """Give the URL of an empty database of its own; on a server it is dropped at the end."""
    if kind == "sqlite":
        yield Secret(f"sqlite:///{folder / f'{uuid.uuid4().hex}.sqlite'}")
        return
    url, port, maintenance = _ADDRESSES[kind]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            if kind in os.environ.get("CELLWAY_TEST_REQUIRE", "").split(","):
                pytest.fail(f"{kind} is required and nothing listens on port {port}")
            pytest.skip(f"nothing listens on port {port}")
    name = f"cellway_test_{uuid.uuid4().hex}"
    engine = engine_of(Secret(url + maintenance))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as server:
        server.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield Secret(url + name)
    finally:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as server:
            server.exec_driver_sql(f"DROP DATABASE {name}" + (" WITH (FORCE)" if kind == "postgresql" else ""))


class Shelf:
    """A process's own databases on the servers, made once and cleared for every test that takes them."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._made: dict[tuple[str, str], tuple[Secret, sa.Connection]] = {}

    def take(self, kind: str, name: str) -> Secret:
        """Give the URL of a database without rows: "api" with the tables of the API database, others with a cell's."""
        tree = Tree.API if name == "api" else Tree.CELL
        if (kind, name) not in self._made:
            url = upgraded(self._opened.enter_context(empty_database(kind, Path())), tree)
            connection = self._opened.enter_context(engine_of(url).connect())
            self._made[kind, name] = url, connection
        url, connection = self._made[kind, name]
        # Ten times as quick as TRUNCATE, which makes a file anew for every table.
        for table in reversed(METADATA[tree].sorted_tables):
            connection.execute(sa.delete(table))
        connection.commit()
        return url

    def find(self, kind: str, name: str) -> Secret:
        """Give the URL of a database that was taken, as it is."""
        return self._made[kind, name][0]

    def close(self) -> None:
        """Drop them all."""
        self._opened.close()


def make_cell(name: str, database: Secret, transport: str | None = None, *, number: int = 1) -> Cell:
    """Return a cell as the registry would, with a queue of its own inside this process."""
    cell_uuid = CellUuid(str(uuid.uuid5(uuid.NAMESPACE_DNS, name)))
    queue = Secret(transport or f"memory://{name}")
    return Cell(number, CellRef(cell_uuid, name), False, connection_key(cell_uuid, database), database, queue)
