"""Databases for one run: files, or made as they are asked for on a server of this machine and dropped at the end."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa

from benchmarks.operations import Place
from cellway.config import Secret
from cellway.db.engines import open_engine

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}
DRIVERS = {"sqlite": "sqlite3", "postgresql": "psycopg", "mariadb": "PyMySQL"}
_SERVERS = {
    "postgresql": ("postgresql+psycopg://postgres@127.0.0.1:5432/", "postgres", " WITH (FORCE)"),
    "mariadb": ("mysql+pymysql://root@127.0.0.1:3306/", "mysql", ""),
}


class NoServer(Exception):
    """What is measured is not there; its text says what is needed."""


@contextmanager
def open_places(kind: str, folder: Path) -> Iterator[Callable[[str], Place]]:
    """Give a function that gives deployments a place, by a name for each. Raises: NoServer."""
    if kind == "sqlite":
        yield lambda name: Place(folder / name, None)
        return
    url, maintenance, force = _SERVERS[kind]
    made: dict[str, Secret] = {}
    engine = open_engine(Secret(url + maintenance), deadline_seconds=60).execution_options(isolation_level="AUTOCOMMIT")
    try:
        server = engine.connect()
    except sa.exc.OperationalError as error:
        raise NoServer(f"{DATABASES[kind]} is needed at {url} with the right to make databases") from error

    def place(deployment: str) -> Place:
        def database(name: str) -> Secret:
            database = f"cellway_bench_{marker}_{deployment}_{name}"
            if database not in made:
                server.exec_driver_sql(f"CREATE DATABASE {database}")
                made[database] = Secret(url + database)
            return made[database]

        return Place(folder / deployment, database)

    marker = uuid4().hex[:12]
    with closing(server):
        try:
            yield place
        finally:
            for database in made:
                server.exec_driver_sql(f"DROP DATABASE {database}{force}")
