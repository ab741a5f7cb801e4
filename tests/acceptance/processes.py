"""A control plane of separate processes: two APIs behind one address, a builder, and for each of two cells a conductor
and two agents. Its databases and its queues' vhosts are its own, and are removed at the end.
"""

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from cellway.config import Secret
from tests.acceptance.control_plane import CELLWAY, NO_QUOTA, Plane, Process, host_names
from tests.brokers import Rabbit, new_virtual_host
from tests.databases import empty_database
from tests.proxy import Proxy, opened

CELLS = ("cell1", "cell2")
HOSTS_PER_CELL = 2


@dataclass
class SeparatePlane(Plane):
    """The processes by name, the databases by name (`api`, `cell0`, each cell), and each cell's vhost."""

    folder: Path
    databases: dict[str, Secret]
    vhosts: dict[str, Rabbit]
    front: "Balancer"
    ways: dict[str, Proxy]
    """If asked for, what stands between all processes and each database (`api`, `cell0`, each cell) or `CELL queue`."""
    processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clouds = self.folder / "clouds.yaml"
        self.hosts = host_names(len(CELLS), HOSTS_PER_CELL)

    @property
    def log(self) -> str:
        """Everything any of them said on stderr."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def queue(self, cell: str) -> str:
        """Return the URL of a cell's queue."""
        way = self.ways.get(f"{cell} queue")
        return self.vhosts[cell].url(*([way.port] if way else [])).reveal()

    def database(self, name: str) -> str:
        """Return the URL by which the processes reach a database."""
        url, way = sa.make_url(self.databases[name].reveal()), self.ways.get(name)
        return (url.set(port=way.port) if way else url).render_as_string(hide_password=False)

    def configure(self, name: str, text: str) -> Path:
        """Write a configuration file."""
        path = self.folder / f"{name}.conf"
        path.write_text(text)
        path.chmod(0o600)
        return path

    def launch(self, name: str, *arguments: str, config: Path) -> Process:
        """Start a process, without waiting for anything."""
        process = self.processes[name] = Process([*arguments, "--config", str(config)], self.folder / f"{name}.log")
        process.launch()
        return process

    def restart(self, name: str) -> None:
        """Kill -9 a process and start it again, without waiting for anything; an API process gets its port back."""
        process = self.processes[name]
        process.kill()
        if name in self.front.ports:
            process.environ = {"CELLWAY_API__PORT": str(self.front.ports[name])}
        process.launch()

    def operate(self, *arguments: str) -> str:
        """Run an operator's command on the control host, and return what it printed."""
        config = self.folder / "builder.conf"
        command = [*CELLWAY, *arguments, "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"cellway {' '.join(arguments)}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def separate(
    kind: str,
    folder: Path,
    *,
    builders: int = 1,
    limits: str = "",
    agents: str = "",
    quota: str = NO_QUOTA,
    proxies: bool = False,
) -> Iterator[SeparatePlane]:
    """Run all processes for the length of the block, over databases of that kind and RabbitMQ.

    `limits` are lines of everybody's section `[limits]`, `quota` of `[quota]`, `agents` of the agents' `[agent]`.
    With `proxies` one stands between the processes and each database and queue.
    """
    with contextlib.ExitStack() as stack:
        names = ("api", "cell0", *CELLS)
        databases = {name: stack.enter_context(empty_database(kind, folder)) for name in names}
        vhosts = {cell: stack.enter_context(new_virtual_host()) for cell in CELLS}
        servers = {name: sa.make_url(url.reveal()).port for name, url in databases.items()}
        servers |= {f"{cell} queue": made.port for cell, made in vhosts.items()}
        ways = {name: stack.enter_context(opened(port)) for name, port in servers.items() if port and proxies}
        plane = SeparatePlane(folder, databases, vhosts, stack.enter_context(balancer()), ways)
        stack.callback(_kill_all, plane)
        _start(plane, builders, f"[limits]\n{limits}\n[quota]\n{quota}\n", agents)
        yield plane


def _start(plane: SeparatePlane, builders: int, limits: str, agents: str) -> None:
    """Start the cells' processes before there is any schema, then make everything, then start the rest."""
    own = {name: plane.database(name) for name in plane.databases}
    for cell in CELLS:
        queue = f"{limits}[DEFAULT]\ntransport_url = {plane.queue(cell)}\n"
        config = plane.configure(f"{cell}-conductor", f"{queue}[database]\nconnection = {own[cell]}\n")
        plane.launch(f"{cell}-conductor", "conductor", "--cell", cell, config=config)
        host = f"[agent]\nstate_folder = {plane.folder / 'hosts'}\n{agents}\n"
        config = plane.configure(f"{cell}-agent", queue + host)
        for host in [name for name in plane.hosts if name.startswith(f"{cell}-")]:
            plane.launch(host, "agent", "--cell", cell, "--host", host, config=config)
    above = f"{limits}[api_database]\nconnection = {own['api']}\n"
    builder = plane.configure("builder", above)
    plane.operate("db", "sync", "api")
    plane.operate("cell", "create", "cell0", "--database-url", own["cell0"])
    for cell in CELLS:
        plane.operate("cell", "create", cell, "--database-url", own[cell], "--transport-url", plane.queue(cell))
    plane.operate("db", "sync")
    for process in plane.processes.values():
        process.wait_ready()
    users = f"[identity]\nusers_file = {plane.folder / 'users.json'}\nclouds_file = {plane.clouds}\n"
    api = plane.configure("api", f"{above}{users}[api]\nport = 0\npublic_endpoint = {plane.front.url}\n")
    started = {name: plane.launch(name, "api", config=api) for name in ("api1", "api2")}
    building = [plane.launch(f"builder{number + 1}", "builder", config=builder) for number in range(builders)]
    for process in building:
        process.wait_ready()
    plane.front.ports = {name: _port(process.wait_ready()["listen"]) for name, process in started.items()}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _kill_all(plane: SeparatePlane) -> None:
    for process in plane.processes.values():
        process.kill()


class Balancer:
    """One address before several: connections go to the `ports` of this machine in turn, past those that refuse."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.url = ""
        self._turns = itertools.count()

    def order(self) -> list[int]:
        """Return the ports as the next connection shall try them."""
        ports, turn = list(self.ports.values()), next(self._turns)
        return ports[turn % 2 :] + ports[: turn % 2]


@contextlib.contextmanager
def balancer() -> Iterator[Balancer]:
    """Run a balancer for the length of the block."""
    front = Balancer()
    with opened(front.order) as way:
        front.url = f"http://127.0.0.1:{way.port}"
        yield front
