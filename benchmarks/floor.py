"""The least that an operation could cost: an empty handler whose answer has the same size, and the bare driver.

The statements of one real request are recorded where SQLAlchemy hands them to the driver, and run again over a plain
connection of the driver's to the same database, in transactions as the request's were.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from uuid import uuid4

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cellway.config import Secret
from cellway.db.engines import API, open_engine
from cellway.testing import Deployment


class Statement(NamedTuple):
    """What the driver was given; `parameters` is a list of rows when `many`."""

    text: str
    parameters: Any
    many: bool


@dataclass(slots=True)
class Transaction:
    """The statements of one transaction. One that writes is committed, one that reads is rolled back."""

    database: Secret
    begin: str | None
    """What opens it; None where the driver does by itself, or nothing does."""
    autocommit: bool | None
    """psycopg's mode; None for other drivers."""
    statements: list[Statement] = field(default_factory=list)
    committed: bool = False


def record(deployment: Deployment) -> list[Transaction]:
    """Return a list that the transactions of every database in use are added to from now on."""
    recorded: list[Transaction] = []
    databases = deployment.app.databases
    _listen(databases.on(API).engine(), deployment.folder.api_database, recorded)
    for database in databases.open_cells:
        assert database.cell is not None
        _listen(database.engine(), deployment.folder.cell_database(database.cell.name), recorded)
    return recorded


def _listen(engine: sa.Engine, url: Secret, recorded: list[Transaction]) -> None:
    dialect = engine.dialect
    running: dict[object, Transaction] = {}

    def begin(connection: sa.Connection) -> None:
        words = str(connection.get_execution_options()["begin"]) if dialect.name == "sqlite" else None
        raw: Any = connection.connection.dbapi_connection
        transaction = running[raw] = Transaction(url, words, raw.autocommit if dialect.driver == "psycopg" else None)
        recorded.append(transaction)

    def commit(connection: sa.Connection) -> None:
        running[connection.connection.dbapi_connection].committed = True

    def listener(many: bool, execute: Callable[..., None]) -> Callable[..., None]:
        def listen(cursor: Any, text: str, parameters: Any, context: Any = None) -> None:
            running[cursor.connection].statements.append(Statement(text, parameters, many))
            execute(cursor, text, parameters, context)

        return listen

    sa.event.listen(engine, "begin", begin)
    sa.event.listen(engine, "commit", commit)
    # Where every statement passes, whoever compiled it.
    for name, many in (("do_execute", False), ("do_executemany", True)):
        setattr(dialect, name, listener(many, getattr(dialect, name)))


class Replay:
    """Runs recorded transactions over plain connections, one to each database."""

    def __init__(self, transactions: Sequence[Transaction]) -> None:
        self._transactions = transactions
        self._connections = {
            one.database: open_engine(one.database, deadline_seconds=60).raw_connection() for one in transactions
        }

    def prepared(self, times: int, renewed: str = "") -> Callable[[], None]:
        """Return a function that runs all of them so many times, with a new uuid for `renewed` in each."""
        runs = [self._transactions] * times
        if renewed:
            runs = [_with_another(self._transactions, renewed) for _ in range(times)]

        def run() -> None:
            for transactions in runs:
                for transaction in transactions:
                    self._run(transaction)

        return run

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()

    def _run(self, transaction: Transaction) -> None:
        connection: Any = self._connections[transaction.database].dbapi_connection
        if transaction.autocommit is not None and transaction.autocommit != connection.autocommit:
            connection.autocommit = transaction.autocommit
        cursor = connection.cursor()
        if transaction.begin is not None:
            cursor.execute(transaction.begin)
        for text, parameters, many in transaction.statements:
            if many:
                cursor.executemany(text, parameters)
            else:
                cursor.execute(text, parameters)
                if cursor.description is not None:
                    cursor.fetchall()
        cursor.close()
        if transaction.committed:
            connection.commit()
        else:
            connection.rollback()


def _with_another(transactions: Sequence[Transaction], renewed: str) -> list[Transaction]:
    new = str(uuid4())

    def change(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(change(one) for one in value)
        if isinstance(value, Mapping):
            return {name: change(one) for name, one in value.items()}
        return value.replace(renewed, new) if isinstance(value, str) else value

    return [
        replace(one, statements=[Statement(s.text, change(s.parameters), s.many) for s in one.statements])
        for one in transactions
    ]


def empty_handlers(answers: Mapping[tuple[str, str], tuple[int, bytes]]) -> Starlette:
    """Return an application with a handler for each (method, path) that only gives its answer."""

    def handler(status: int, body: bytes) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            await request.body()
            return Response(body, status, media_type="application/json")

        return handle

    return Starlette(
        routes=[
            Route(path.partition("?")[0], handler(status, body), methods=[method])
            for (method, path), (status, body) in answers.items()
        ]
    )
