"""The embedded deployment: everything in one process over one data folder. `cellway up` and the tests use it.

The folder holds `cellway.conf`, one SQLite file per database, the users, `clouds.yaml`, and the journals of the
simulated hosts. One process at a time: `lock` says which.
"""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cellway.cells import mappings
from cellway.config import Config, DatabaseSection, IdentitySection, Secret
from cellway.context import Clock
from cellway.db.engines import API, Databases
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import Conflict, Invalid
from cellway.ids import CELL0_UUID, CellUuid, IdSource
from cellway.operations import schemas


class Layout(msgspec.Struct, frozen=True):
    """How the folder was made: how many cells and hosts, and by which release."""

    cells: int
    hosts_per_cell: int
    written_by: str


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The data folder of an embedded deployment."""

    path: Path
    databases: Callable[[str], Secret] | None = None
    """Gives the URL of a database, by its name ("api", "cell0", "cell1" …), when they are not files in the folder."""

    @property
    def api_database(self) -> Secret:
        """The URL of the API database."""
        return self.cell_database("api")

    def cell_database(self, name: str) -> Secret:
        """The URL of a cell's database."""
        return self.databases(name) if self.databases is not None else Secret(f"sqlite:///{self.path / name}.db")

    def transport(self, name: str) -> Secret:
        """The URL of a cell's message queue."""
        return Secret("none:///" if name == "cell0" else f"memory://{name}")

    @property
    def clouds(self) -> Path:
        """The client configuration that is written here."""
        return self.path / "clouds.yaml"

    @property
    def layout_file(self) -> Path:
        """Where the layout is kept."""
        return self.path / "layout.json"

    def journal(self, host: str) -> Path:
        """The journal of a simulated host."""
        return self.path / "hosts" / f"{host}.journal"

    def read_layout(self) -> Layout | None:
        """Return how the folder was made, or None for a new one. Raises: Invalid."""
        try:
            return msgspec.json.decode(self.layout_file.read_bytes(), type=Layout)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise Invalid("up.damaged", f"{self.layout_file} cannot be read") from error

    def lock(self) -> int:
        """Take the folder for this process until it ends; return the descriptor that holds it.

        Raises: Conflict naming the process that has it.
        """
        return hold(self.path / "lock", "up.in_use", str(self.path))

    @property
    def config_file(self) -> Path:
        """The configuration of this deployment, for an operator to edit."""
        return self.path / "cellway.conf"

    def config(self, config: Config, *, listen: str | None = None, port: int | None = None) -> Config:
        """Return `config` with what the folder decides filled in, and perhaps another address to listen on."""
        api = replace(
            config.api,
            listen=listen if listen is not None else config.api.listen,
            port=port if port is not None else config.api.port,
        )
        users = IdentitySection(str(self.path / "users.json"), str(self.clouds))
        return replace(config, api_database=DatabaseSection(self.api_database), api=api, identity=users)


def hold(lock: Path, code: str, what: str) -> int:
    """Take a lock file for this process until it ends; return the descriptor that holds it. Its folder is made.

    Raises: Conflict with that code, naming the process that has it; Invalid when the file cannot be written.
    """
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Invalid("lock.unwritable", f"cannot write {lock}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 64).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise Conflict(code, f"{what} is in use by another cellway (pid {holder})") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def cell_names(cells: int) -> list[str]:
    """Return the names of the cells with hosts."""
    return [f"cell{number + 1}" for number in range(cells)]


def host_names(cell: str, hosts: int) -> list[str]:
    """Return the names of a cell's simulated hosts."""
    return [f"{cell}-h{number + 1}" for number in range(hosts)]


async def prepare(folder: DataFolder, config: Config, layout: Layout, *, clock: Clock, ids: IdSource) -> None:
    """Make or upgrade every database of the folder and map the cells; what is there already stays.

    Raises: Conflict for databases of a later release; Unavailable, Invalid.
    """
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder.path / "hosts").mkdir(mode=0o700, exist_ok=True)
    schemas.sync("api", folder.api_database, Tree.API, limits=config.limits)
    names = ["cell0", *cell_names(layout.cells)]
    for name in names:
        schemas.sync(name, folder.cell_database(name), Tree.CELL, limits=config.limits)
    databases = Databases(folder.api_database, limits=config.limits, clock=clock)
    try:
        await databases.on(API).write(_map_cells, folder, names, [ids.uuid() for _ in names])
    finally:
        await databases.aclose()
    if not folder.config_file.exists():
        folder.config_file.write_text(_CONFIG, encoding="utf-8")
        folder.config_file.chmod(0o600)
    folder.layout_file.write_bytes(msgspec.json.encode(layout))


_CONFIG = """\
# Settings of this deployment; docs/operations.md lists the options. Databases and users are in this folder.
[agent]
latency_seconds = 0.05
"""


def _map_cells(tx: ApiTx, folder: DataFolder, names: list[str], uuids: list[str]) -> None:
    # By its queue: names and databases are the operator's to change.
    present = {cell.transport_url: cell for cell in mappings.list_cells(tx)}
    for name, uuid in zip(names, uuids, strict=True):
        database, transport = folder.cell_database(name), folder.transport(name)
        cell = present.get(transport)
        if cell is None:
            own = CELL0_UUID if name == "cell0" else CellUuid(uuid)
            mappings.create_cell(tx, own, name, transport_url=transport, database_connection=database)
        elif _was_moved(cell.database_connection, database):
            mappings.update_cell(tx, cell.uuid, database_connection=database)


def _was_moved(before: Secret, now: Secret) -> bool:
    """Tell whether the folder was moved: the same file name in a folder that is no longer there."""
    old, new = Path(before.reveal().removeprefix("sqlite:///")), Path(now.reveal().removeprefix("sqlite:///"))
    return old != new and old.name == new.name and not old.exists()
