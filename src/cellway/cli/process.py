"""What the processes of a deployment share: what each may know, signals, and how they say that they are ready.

The commands `api`, `builder`, `conductor` and `agent` run one process each through `run`; `up` uses the parts. A
process is given only the connections that it needs, and one that is given more refuses to start.
"""

import asyncio
import json
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Protocol, TypeVar

import structlog
import typer
import uvloop

from cellway.app import Application, open_application
from cellway.cli.output import Format, LogLevel, note, set_up_logs
from cellway.config import Config, Secret, load
from cellway.errors import Invalid, Unavailable

T = TypeVar("T")

log = structlog.get_logger()

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="CELLWAY_CONFIG", help="Configuration file of this process; else the environment."),
]
CellOption = Annotated[str, typer.Option("--cell", help="Name of its cell.")]

API_DATABASE: Final = "[api_database] connection"
CELL_DATABASE: Final = "[database] connection"
CELL_QUEUE: Final = "[DEFAULT] transport_url"
USERS: Final = "[identity] users_file"

_SECRETS: Mapping[str, Callable[[Config], object]] = {
    API_DATABASE: lambda config: config.api_database.connection,
    CELL_DATABASE: lambda config: config.database.connection,
    CELL_QUEUE: lambda config: config.default.transport_url,
    USERS: lambda config: config.identity.users_file,
}
_NEEDS = {
    "api": (API_DATABASE, USERS),
    "builder": (API_DATABASE,),
    "conductor": (CELL_DATABASE, CELL_QUEUE),
    "agent": (CELL_QUEUE,),
}
_MAY_NOT_KNOW = {
    "api": (),
    "builder": (),
    "conductor": (API_DATABASE, USERS),
    "agent": (API_DATABASE, CELL_DATABASE, USERS),
}

FIRST_PAUSE_SECONDS: Final = 0.2
LONGEST_PAUSE_SECONDS: Final = 2.0
"""Between tries of what does not answer at the start: what comes back is in use within this."""


class Ready(Protocol):
    """Says that the process serves; the fields say what."""

    def __call__(self, **fields: str) -> None: ...


Work = Callable[[Application, Ready], Coroutine[Any, Any, None]]
"""What a process does until it is cancelled, or ends by itself."""


def read_config(process: str, path: Path | None) -> Config:
    """Return a process's own configuration.

    Raises: Invalid for one that cannot be read, lacks what the process needs, or holds what it may not know.
    """
    config = load(path)
    for option in _MAY_NOT_KNOW[process]:
        if _SECRETS[option](config):
            raise Invalid(
                "process.knows_too_much", f"cellway {process} may not know {option}: give it a configuration of its own"
            )
    for option in _NEEDS[process]:
        if not _SECRETS[option](config):
            raise Invalid("process.missing_option", f"cellway {process} needs {option}")
    return config


def own_queue(config: Config) -> Secret:
    """Return the queue of a conductor's or an agent's cell. Raises: Invalid for one that cannot join two processes."""
    url = config.default.transport_url
    assert url is not None
    if url.reveal().startswith("none:"):
        raise Invalid("process.no_queue", f"{CELL_QUEUE} is none:///, which is cell0's: a cell with hosts has a queue")
    refuse_memory(url, CELL_QUEUE)
    return url


def refuse_memory(url: Secret, where: str) -> None:
    """Raises: Invalid for a queue that is inside one process, so that others would wait for its messages for ever."""
    if url.reveal().startswith("memory:"):
        raise Invalid(
            "process.memory_transport",
            f"{where} is memory://, a queue inside one process (cellway up); separate processes need rabbit://",
        )


async def start_cells(application: Application) -> None:
    """Read and follow the cells, waiting until the API database answers.

    Raises: Invalid when a cell's queue is inside one process; Conflict for a schema of a later release.
    """
    await until_answered(application.start_cells)
    for cell in application.cells.snapshot.all:
        refuse_memory(cell.transport_url, f"the queue of cell {cell.ref.name}")


async def until_answered(begin: Callable[[], Awaitable[T]]) -> T:
    """Begin again, after growing pauses, while something does not answer: processes start in any order."""
    pause_seconds = FIRST_PAUSE_SECONDS
    before = None
    while True:
        try:
            return await begin()
        except Unavailable as error:
            if error.code != before:
                log.warning("waiting", code=error.code, reason=error.message)
            before = error.code
        await asyncio.sleep(pause_seconds * random.uniform(0.5, 1))
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)


def run(process: str, config: Config, work: Work, *, log_level: LogLevel, form: Format) -> None:
    """Do a process's work until SIGINT or SIGTERM, or until it ends by itself; then close what it opened."""
    set_up_logs(log_level, as_json=form == Format.JSON, serving=True)
    uvloop.run(_run(process, config, work, form))


async def _run(process: str, config: Config, work: Work, form: Format) -> None:
    def ready(**fields: str) -> None:
        if form == Format.JSON:
            print(json.dumps({"event": "ready", "process": process, **fields, "pid": os.getpid()}), flush=True)
        else:
            told = ", ".join(f"{name} {value}" for name, value in fields.items())
            print(f"cellway {process} is ready{': ' if told else ''}{told}", flush=True)
        notify_ready()

    async with open_application(config) as application:
        working = asyncio.create_task(work(application, ready))
        await until_signal(working)
        note_builds(application)
        working.cancel()
        try:
            await working
        except asyncio.CancelledError:
            log.info("stopping")
    if form == Format.JSON:
        print(json.dumps({"event": "stopped", "process": process}), flush=True)


async def for_ever() -> NoReturn:
    """Wait until cancelled: what was started works by itself."""
    while True:
        await asyncio.Event().wait()


async def until_signal(work: "asyncio.Task[None]") -> None:
    """Wait for SIGINT or SIGTERM, or for `work` to end by itself. A second signal ends the process at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopped.is_set():
            os._exit(130)
        stopped.set()

    for wanted in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(wanted, stop)
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait({waiting, work}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def note_builds(application: Application) -> None:
    """Tell whoever stops a builder why that takes a moment."""
    builds = application.builder.in_progress
    if builds:
        note(f"Stopping: {builds} builds finish first (Ctrl-C again to stop now).")


def notify_ready() -> None:
    """Tell systemd, when it started us, that we serve."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.sendall(b"READY=1")
