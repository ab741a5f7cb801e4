"""The one door to every database: the API database, and cells by key (seed 000).

`Databases.on(target)` is the single accessor with a parameter that the seed asks for: `on(API)` is the API database,
`on(cctx)` is the cell that the context's `db_connection` names, and there is no default. Verbs hand a synchronous
function to `read` or `write`; it runs in that database's own few threads, inside one transaction, under a deadline.
Each thread owns one connection. This is the only module that creates engines. It knows nothing of compute, and no
error, log line or repr of it holds a URL.
"""

import asyncio
import hashlib
import os
import queue
import random
import socket
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar, cast, overload
from urllib.parse import quote

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError

from cellway.config import Limits, Secret
from cellway.context import CellContext, CellRef, Clock, RequestContext
from cellway.db.columns import NAME, PRECISE_TIME
from cellway.db.transaction import ApiTx, CellTx, Tx, Verdict, judge, unique_violation
from cellway.errors import (
    CellNotTargeted,
    CellUnavailable,
    CellwayError,
    Conflict,
    DeadlineExceeded,
    Invalid,
    OutcomeUnknown,
    Unavailable,
)
from cellway.ids import CellUuid

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()

TxT = TypeVar("TxT", bound=Tx)


CELL_DEADLINE: Final = "cell.deadline"
"""The code of the `CellUnavailable` that says a cell's database did not answer in time."""


class ApiTarget:
    """The type of `API`, the target that is not a cell."""


API: Final = ApiTarget()


def connection_key(cell: CellUuid, url: Secret) -> str:
    """Return the opaque key of a cell's database: its uuid and the digest of its resolved URL."""
    return f"{cell}:{hashlib.sha256(url.reveal().encode()).hexdigest()[:16]}"


def open_engine(url: Secret, *, deadline_seconds: float, create: bool = False) -> sa.Engine:
    """Make an engine without a pool; with `create`, a missing SQLite file is made.

    Raises: Invalid for a URL that cannot be used (without showing it).
    """
    try:
        parsed = sa.make_url(url.reveal())
        backend = parsed.get_backend_name()
        if backend == "sqlite":
            return _sqlite_engine(parsed, create=create, deadline_seconds=deadline_seconds)
        return _server_engine(parsed, backend, deadline_seconds)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError):
        raise Invalid("database.bad_url", "the database URL cannot be used: its form or driver is unknown") from None


def _sqlite_engine(url: sa.URL, *, create: bool, deadline_seconds: float) -> sa.Engine:
    if not url.database:
        raise ValueError("no file named")
    # A missing file must not turn into an empty database by being opened.
    target = f"file:{quote(str(Path(url.database).absolute()))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            target, uri=True, isolation_level=None, check_same_thread=False, timeout=deadline_seconds
        )
        try:
            _use_wal(connection, deadline_seconds)
            for pragma in ("synchronous = NORMAL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool, hide_parameters=True)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        mode = connection.get_execution_options().get("begin", "BEGIN")
        raw = cast(sqlite3.Connection, connection.connection.dbapi_connection)
        try:
            raw.execute(mode)
        except sqlite3.Error as error:
            # SQLAlchemy wraps only what its own cursors raise.
            raise sa.exc.OperationalError(mode, None, error, hide_parameters=True) from error

    return engine


def _use_wal(connection: sqlite3.Connection, deadline_seconds: float) -> None:
    """Write a log ahead. Of two connections that change a new file at once, one is refused instead of made to wait."""
    end = time.monotonic() + deadline_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.005)


def _server_engine(url: sa.URL, backend: str, deadline_seconds: float) -> sa.Engine:
    milliseconds = int(deadline_seconds * 1000)
    connect_timeout = max(1, int(deadline_seconds))
    pymysql = url.get_driver_name() == "pymysql"
    if backend == "postgresql":
        options = (
            f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c timezone=UTC "
            f"-c idle_in_transaction_session_timeout={2 * milliseconds}"
        )
        arguments: dict[str, Any] = {"connect_timeout": connect_timeout, "options": options}
        setup: tuple[str, ...] = ()
    else:
        arguments = {"connect_timeout": connect_timeout}
        if pymysql:
            # Its connect_timeout leaves out the handshake; `prepare` takes this away again.
            arguments["read_timeout"] = connect_timeout
            if not url.query:
                # PyMySQL otherwise loads the machine's certificate bundle for every connection: 17 ms of CPU.
                arguments["ssl_disabled"] = True
        setup = (
            "SET time_zone = '+00:00'",
            f"SET max_statement_time = {deadline_seconds}",
            f"SET innodb_lock_wait_timeout = {connect_timeout}",
        )
    engine = sa.create_engine(
        url, poolclass=sa.NullPool, hide_parameters=True, isolation_level="READ COMMITTED", connect_args=arguments
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            for statement in setup:
                cursor.execute(statement)
        connection.commit()
        if pymysql:
            connection._read_timeout = None

    return engine


@dataclass(slots=True, eq=False)
class _Job:
    """One unit of work on its way through a pool."""

    run: Callable[[Any], Any]
    write: bool
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    expired: bool = False
    committing: bool = False
    worker: "_Worker | None" = None

    def resolve(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class _Worker(threading.Thread):
    """One thread with one connection, working through its pool's queue."""

    def __init__(self, database: "Database[Any]", jobs: "queue.SimpleQueue[_Job | None]", begin: str) -> None:
        super().__init__(name=f"db-{database.name}", daemon=True)
        self.finished = 0
        self._database = database
        self._jobs = jobs
        self._begin = begin
        self._connection: sa.Connection | None = None
        self._offset = timedelta()
        self._answers: deque[tuple[_Job, Any, BaseException | None]] = deque()
        # What another thread may touch, under the guard.
        self._guard = threading.Lock()
        self._job: _Job | None = None
        self._line: sqlite3.Connection | socket.socket | None = None

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._guard:
                self._job, job.worker = job, self
            if job.expired:
                with self._guard:
                    self._job = None
                self.finished += 1
            else:
                self._work(job)
            del job
        self._disconnect()

    def abort(self, job: _Job) -> bool:
        """Stop what this thread waits for, from another thread; tell whether it was still at work on `job`."""
        with self._guard:
            if self._job is not job:
                return False
            line = self._line
            if isinstance(line, sqlite3.Connection):
                line.interrupt()
            elif line is not None:
                self._line = None
                _shut_down(line)
            return True

    def hold(self, raw: Any) -> None:
        """Make a new connection reachable for `abort`, before anything is asked over it."""
        # A duplicate, because the driver may close its own at any time, and its number then means another file.
        line = raw if isinstance(raw, sqlite3.Connection) else socket.socket(fileno=os.dup(_descriptor(raw)))
        with self._guard:
            before, self._line = self._line, line
        if isinstance(before, socket.socket):
            # When another thread's connection broke meanwhile, SQLAlchemy replaces one that it has only just made.
            before.close()

    def _work(self, job: _Job) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = self._perform(job)
        except DBAPIError as error:
            ours = judge(error) is Verdict.OURS
            failure = error if ours else self._database.outage()
            failure.__cause__ = error.__cause__ if ours else error
        except StopIteration as error:
            failure = RuntimeError("the function let a StopIteration out, which no future can hold")
            failure.__cause__ = error
        except BaseException as error:  # whatever the function raised belongs to its caller, and the thread lives on
            failure = error
        with self._guard:
            self._job = None
        if job.expired:
            # The connection may have been cut after its last use.
            self._disconnect()
        self.finished += 1
        if not job.expired:
            self._answers.append((job, result, failure))
            if len(self._answers) == 1:
                # Otherwise the loop is on its way already: waking it costs as much as a small read.
                job.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Hand the answers to those who wait, in the loop. Each is taken out last, so that none is added unseen."""
        while self._answers:
            job, result, failure = self._answers[0]
            job.resolve(result, failure)
            self._answers.popleft()

    def _perform(self, job: _Job) -> Any:
        attempts = self._database.limits.database_write_attempts
        for attempt in range(1, attempts + 1):
            reused = self._connection is not None
            if self._database.fault is not None:
                self._database.fault(lambda: job.expired)
            try:
                return self._transact(job)
            except DBAPIError as error:
                # A connection that broke while it was idle, as by a restart of the server, is nobody's outage.
                again = judge(error) is Verdict.AGAIN or (reused and error.connection_invalidated)
                if job.expired or attempt == attempts or not again:
                    raise
                time.sleep(random.uniform(0, 0.005 * 2**attempt))
        raise AssertionError("unreachable")

    def _transact(self, job: _Job) -> Any:
        connection = self._connect()
        if job.expired:
            raise self._database.outage(late=True)
        job.committing = False
        try:
            _choose_mode(connection, write=job.write)
            transaction = connection.begin()
            try:
                result = job.run(self._database.tx_type(connection, self._database.clock.now() + self._offset))
            except BaseException:
                transaction.rollback()
                raise
            # Before the last look at the deadline: whoever lets it pass from now on sees that the outcome is unknown.
            job.committing = job.write
            if not job.write or job.expired:
                transaction.rollback()
                return result
        except DBAPIError as error:
            if judge(error) is Verdict.DOWN:
                self._disconnect()
            raise
        try:
            transaction.commit()
        except DBAPIError as error:
            self._disconnect()
            if judge(error) is Verdict.DOWN and not isinstance(error.orig, sqlite3.Error):
                raise self._database.unknown() from error
            raise
        return result

    def _connect(self) -> sa.Connection:
        if self._connection is None:
            try:
                self._connection = self._database.engine().connect().execution_options(begin=self._begin)
                self._offset = _clock_offset(self._connection, self._database.clock)
            except Exception as error:
                self._disconnect()
                if isinstance(error, DBAPIError) and judge(error) is Verdict.AGAIN:
                    raise
                # Also a URL that cannot be used, or an option in it that its driver does not know.
                raise self._database.outage() from error
        return self._connection

    def _disconnect(self) -> None:
        with self._guard:
            line, self._line = self._line, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()
        if isinstance(line, socket.socket):
            line.close()


def _hold(raw: Any, _record: object) -> None:
    cast(_Worker, threading.current_thread()).hold(raw)


def _refuse_writes_alone(raw: Any, _record: object) -> None:
    """Have PostgreSQL refuse what is written without a transaction; one that is begun says that it writes."""
    raw.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    raw.commit()
    raw.read_only = False


def _choose_mode(connection: sa.Connection, *, write: bool) -> None:
    """Do without BEGIN and ROLLBACK in a read on PostgreSQL: they are half of its ways to the server and back.

    Nothing is lost: under READ COMMITTED every statement has a view of its own, and a write is refused.
    """
    if connection.dialect.driver == "psycopg":
        raw = cast(Any, connection.connection.dbapi_connection)
        if raw.autocommit == write:
            raw.autocommit = not write


def _clock_offset(connection: sa.Connection, clock: Clock) -> timedelta:
    """Return how far the database's clock is ahead of ours; SQLite has no other clock than this machine's."""
    if connection.dialect.name == "sqlite":
        return timedelta()
    function = "clock_timestamp() AT TIME ZONE 'UTC'" if connection.dialect.name == "postgresql" else "UTC_TIMESTAMP(6)"
    theirs = connection.exec_driver_sql(f"SELECT {function}").scalar_one()
    connection.rollback()
    return cast(datetime, theirs) - clock.now()


def _descriptor(raw: Any) -> int:
    # PyMySQL shows no descriptor of its own.
    return cast(int, (getattr(raw, "_sock", None) or raw).fileno())


def _shut_down(line: socket.socket) -> None:
    """Shut down the connection under a driver, which wakes the thread that waits on it."""
    with line:
        try:
            line.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.info("database_was_disconnected", reason=error.strerror)


_ABORT_SECONDS: Final = 0.05

_KEYS: Final = sa.table(  # in the API database and in every cell's
    "idempotency_keys", sa.column("key", NAME), sa.column("created_at", PRECISE_TIME)
)
_KEY_SECONDS: Final = 600.0
"""How long a key is kept: no call lasts so long."""
_LEAVE_KEY: Final = sa.insert(_KEYS)
_SWEEP_KEYS: Final = sa.delete(_KEYS).where(_KEYS.c.created_at < sa.bindparam("before", type_=PRECISE_TIME))


class _IsDone(CellwayError):
    """An earlier run of this unit of work was committed; raised so that the transaction ends."""

    def __init__(self) -> None:
        super().__init__("database.done", "This was committed before")


Fault = Callable[[Callable[[], bool]], None]
"""What a test puts before every unit of work of a database. It is given a function that tells whether the deadline
passed.
"""


class Database(Generic[TxT]):
    """One database: `read` and `write` run a function in a transaction, in threads of this database alone."""

    def __init__(self, url: Secret, tx_type: type[TxT], *, cell: CellRef | None, limits: Limits, clock: Clock) -> None:
        self.cell = cell
        self.tx_type = tx_type
        self.limits = limits
        self.clock = clock
        self.fault: Fault | None = None
        self._url = url
        self._engine: sa.Engine | None = None
        self._engine_guard = threading.Lock()
        # SQLite takes one writer at a time, and its reads are so short that several threads only take the interpreter's
        # lock from one another: of each one thread, so that a read waits for no write.
        self._is_file = url.reveal().startswith("sqlite")
        self._readers = _Pool(self, 1 if self._is_file else limits.database_threads, "BEGIN")
        self._writers = _Pool(self, 1, "BEGIN IMMEDIATE") if self._is_file else self._readers
        self._sweep_keys_at = clock.monotonic() + _KEY_SECONDS

    def __repr__(self) -> str:
        return f"Database({self.name!r})"

    @property
    def name(self) -> str:
        """What it is called in errors and logs."""
        return f"the database of cell {self.cell.name}" if self.cell is not None else "the API database"

    async def read(self, function: Callable[Concatenate[TxT, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(tx, …)` and return what it returns; nothing that it writes is kept.

        It is a transaction that is rolled back; on PostgreSQL each statement is one, and what writes is refused.

        Raises: CellUnavailable or Unavailable when the database does not answer; DeadlineExceeded; whatever the
        function raises.
        """
        return await self._submit(self._readers, False, lambda tx: function(tx, *args, **kwargs))

    async def write(self, function: Callable[Concatenate[TxT, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(tx, …)` in a transaction that is committed when it returns, rolled back when it raises.

        A deadlock or lock timeout runs the whole function again. Raises: as `read`, and OutcomeUnknown when the
        connection is lost, or the deadline passes, during the commit: this is for what may be repeated as it is, by a
        caller who will. Everything else uses `write_once`.
        """
        return await self._submit(self._writers, True, lambda tx: function(tx, *args, **kwargs))

    async def write_once(
        self,
        found: Callable[[TxT], bool] | None,
        function: Callable[Concatenate[TxT, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Write, and find out for the caller whether a commit happened whose answer was lost; if not, do it again.

        `found` tells whether a row is there that the function writes under a uuid of this call alone. None: it writes
        no such row, so a key of its own goes into `idempotency_keys`.

        Raises: as `write`; OutcomeUnknown when the database does not come back in time.
        """
        key = None if found is not None or self._is_file else uuid.uuid4().hex
        made = list[T]()
        lost: OutcomeUnknown | None = None

        def unit(tx: TxT) -> None:
            if key is not None:
                self._leave_key(tx, key)
            elif found is not None and lost is not None and found(tx):
                raise _IsDone
            made.append(function(tx, *args, **kwargs))

        for attempt in range(1, self.limits.database_write_attempts + 1):
            try:
                await self.write(unit)
                break
            except _IsDone:
                break
            except OutcomeUnknown as error:
                lost = error
                if found is None and key is None:
                    raise
            except Unavailable:
                if lost is None:
                    raise
            except (IntegrityError, Conflict):
                # The commit that was given up may have come through just now: then the row is there at the next look.
                if lost is None or key is not None or attempt == self.limits.database_write_attempts:
                    raise
            await self.clock.sleep(random.uniform(0, 0.02 * 2**attempt))
        else:
            assert lost is not None
            raise lost
        if lost is not None:
            log.info("commit_resolved", database=self.name, attempts=attempt)
        # Of several runs only the last that came to its end can have been committed.
        return made[-1]

    def _leave_key(self, tx: TxT, key: str) -> None:
        """Write a key, first of all: if a commit of it is still under way, this waits. Raises: _IsDone."""
        with unique_violation(_IsDone()):
            tx.execute(_LEAVE_KEY, {"key": key, "created_at": tx.now})
        now = self.clock.monotonic()
        if now >= self._sweep_keys_at:
            self._sweep_keys_at = now + _KEY_SECONDS
            tx.execute(_SWEEP_KEYS, {"before": tx.now - timedelta(seconds=_KEY_SECONDS)})

    async def _submit(self, pool: "_Pool", write: bool, run: Callable[[TxT], T]) -> T:
        loop = asyncio.get_running_loop()
        job = _Job(run, write, loop, loop.create_future())
        pool.put(job)
        timer = loop.call_later(self.limits.database_deadline_seconds, self._expire, job)
        try:
            return cast(T, await job.future)
        except asyncio.CancelledError:
            self._expire(job)
            raise
        finally:
            timer.cancel()

    def _expire(self, job: _Job) -> None:
        job.expired = True
        job.resolve(None, self.unknown() if job.committing else self.outage(late=True))
        if job.worker is not None and job.worker.abort(job):
            # It may have been connecting, or between two statements, where there is nothing to stop: until it lets go.
            job.loop.call_later(_ABORT_SECONDS, self._expire, job)

    def outage(self, *, late: bool = False) -> Unavailable:
        """Return the error that says this database does not answer."""
        if self.cell is not None:
            code, how = (CELL_DEADLINE, "did not answer in time") if late else ("cell.unavailable", "is not available")
            return CellUnavailable(code, f"The database of cell {self.cell.name} {how}", cell=self.cell.name)
        if late:
            return DeadlineExceeded("api_database.deadline", "The API database did not answer in time")
        return Unavailable("api_database.unavailable", "The API database is not available")

    def unknown(self) -> OutcomeUnknown:
        """Return the error that says that nobody knows whether a transaction was committed."""
        return OutcomeUnknown("database.commit_unknown", f"The connection to {self.name} was lost while committing")

    def engine(self) -> sa.Engine:
        """Return the engine, made on first use; this database's threads connect through it.

        Raises: Invalid for a URL that cannot be used.
        """
        with self._engine_guard:
            if self._engine is None:
                self._engine = open_engine(self._url, deadline_seconds=self.limits.database_deadline_seconds)
                # First of all listeners: the others already ask the server something.
                sa.event.listen(self._engine, "connect", _hold, insert=True)
                if self._engine.dialect.driver == "psycopg":
                    sa.event.listen(self._engine, "connect", _refuse_writes_alone)
            return self._engine

    def close(self) -> None:
        """Let the threads finish what they have and end; their connections close with them."""
        self._readers.close()
        if self._writers is not self._readers:
            self._writers.close()

    async def aclose(self) -> None:
        """Close, and wait for the threads to end, one deadline at most."""
        self.close()
        deadline = self.limits.database_deadline_seconds
        await asyncio.gather(*(asyncio.to_thread(thread.join, deadline) for thread in self._threads))

    @property
    def ended(self) -> bool:
        """Whether none of its threads runs."""
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def _threads(self) -> "set[_Worker]":
        return {*self._readers.threads, *self._writers.threads}


class _Pool:
    """A few threads and the queue they share. Threads start as they are needed."""

    def __init__(self, database: Database[Any], size: int, begin: str) -> None:
        self.threads: list[_Worker] = []
        self._database = database
        self._size = size
        self._begin = begin
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._accepted = 0
        self._closed = False

    def put(self, job: _Job) -> None:
        if self._closed or self._jobs.qsize() >= self._database.limits.database_queue:
            raise self._database.outage()
        if len(self.threads) < self._size and self._unfinished() >= len(self.threads):
            worker = _Worker(self._database, self._jobs, self._begin)
            worker.start()
            self.threads.append(worker)
        self._accepted += 1
        self._jobs.put(job)

    def _unfinished(self) -> int:
        return self._accepted - sum(thread.finished for thread in self.threads)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for _ in self.threads:
                self._jobs.put(None)


@dataclass(slots=True)
class _Open:
    """A database that is open, and how many contexts hold it."""

    database: Database[CellTx]
    leases: int = 0
    used: float = 0.0
    retired: bool = False


class Databases:
    """All databases of a process. Used from one event loop, which makes opening single-flight by itself.

    Raises: Invalid when the URL of the API database cannot be used.
    """

    def __init__(self, api_url: Secret | None, *, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._api = Database(api_url, ApiTx, cell=None, limits=limits, clock=clock) if api_url else None
        if self._api is not None:
            self._api.engine()
        self._cells: dict[str, _Open] = {}
        self._ending: list[Database[CellTx]] = []
        self._closed = False

    @overload
    def on(self, target: ApiTarget) -> Database[ApiTx]: ...
    @overload
    def on(self, target: RequestContext) -> Database[CellTx]: ...
    def on(self, target: ApiTarget | RequestContext) -> Database[ApiTx] | Database[CellTx]:
        """Return the database that `target` means: `API`, or the cell that a context is targeted at.

        Raises: CellNotTargeted for a context without a `db_connection`, or one used after its `target_cell` block and
        long closed.
        """
        if isinstance(target, ApiTarget):
            if self._api is None:
                raise Invalid(
                    "database.no_api", "this process has no API database: [api_database] connection is not set"
                )
            return self._api
        if not isinstance(target, CellContext):
            raise CellNotTargeted("A cell's database")
        entry = self._cells.get(target.db_connection)
        if entry is None:
            raise CellNotTargeted("A cell's database")
        return entry.database

    def lease(self, key: str, cell: CellRef, url: Secret) -> None:
        """Hold the database of `key` open; `target_cell` calls this on entry. No I/O happens here.

        Raises: Unavailable when the limit of open databases is reached and all are in use, or after `aclose`.
        """
        if self._closed:
            raise Unavailable("database.closed", "The databases of this process are closed")
        entry = self._cells.get(key)
        if entry is None:
            self._make_room()
            database = Database(url, CellTx, cell=cell, limits=self._limits, clock=self._clock)
            entry = self._cells[key] = _Open(database)
        entry.database.cell = cell  # it may have another name by now
        entry.leases += 1

    def release(self, key: str) -> None:
        """Give the lease back; `target_cell` calls this on exit."""
        entry = self._cells[key]
        entry.leases -= 1
        entry.used = self._clock.monotonic()
        if entry.retired and entry.leases == 0:
            self._drop(key)

    def retire(self, key: str) -> None:
        """Close the database of `key` once its leases are gone; `Cells` calls this when no cell has that URL now."""
        entry = self._cells.get(key)
        if entry is not None:
            entry.retired = True
            if entry.leases == 0:
                self._drop(key)

    def expire_idle(self) -> None:
        """Close what nobody has used for `Limits.idle_seconds`; the owner calls this now and then."""
        oldest = self._clock.monotonic() - self._limits.idle_seconds
        for key, entry in list(self._cells.items()):
            if entry.leases == 0 and entry.used <= oldest:
                self._drop(key)

    @property
    def open_cells(self) -> tuple[Database[CellTx], ...]:
        """The cells' databases that are open now, for metrics and tests."""
        return tuple(entry.database for entry in self._cells.values())

    async def aclose(self) -> None:
        """Close everything, and wait for the threads to end."""
        self._closed = True
        databases: list[Database[Any]] = [*self._ending, *(entry.database for entry in self._cells.values())]
        if self._api is not None:
            databases.append(self._api)
        await asyncio.gather(*(database.aclose() for database in databases))

    def _make_room(self) -> None:
        if len(self._cells) < self._limits.open_databases:
            return
        unused = [(entry.used, key) for key, entry in self._cells.items() if entry.leases == 0]
        if not unused:
            raise Unavailable("database.too_many_open", "Too many cell databases are in use at once")
        self._drop(min(unused)[1])

    def _drop(self, key: str) -> None:
        entry = self._cells.pop(key)
        entry.database.close()
        self._ending = [*(database for database in self._ending if not database.ended), entry.database]
        log.info("database_closed", database=entry.database.name, retired=entry.retired)
