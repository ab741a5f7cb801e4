"""A control plane started as users start it, `cellway up`, a process of its own; and the real client beside it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = Path(sys.executable).parent
CELLWAY = (sys.executable, "-c", "from cellway.cli.main import main; main()")
"""The `cellway` command of the checkout under test."""
START_SECONDS = 60
NO_QUOTA = "instances = -1\ncores = -1\nram = -1"
"""Lines of the section `[quota]` with which no server is refused for its number."""
ADMIN, MEMBER = "cellway-admin", "cellway"


@dataclass
class Process:
    """A `cellway` process that serves, started and stopped by the test. What it says on stderr is added to `log`."""

    arguments: Sequence[str]
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    """What it finds in its environment beside ours."""
    popen: "subprocess.Popen[str] | None" = None

    def launch(self) -> None:
        """Start, without waiting for anything."""
        with self.log.open("a") as log:
            command, environ = [*CELLWAY, *self.arguments, "--format", "json"], {**os.environ, **self.environ}
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environ, text=True)

    def wait_ready(self) -> dict[str, Any]:
        """Wait for the line that says that it is ready, and return it."""
        assert self.popen is not None
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise AssertionError(f"{self.arguments} ended with {self.end()}: {self.log.read_text()[-2000:]}")
        ready: dict[str, Any] = json.loads(line)
        assert ready["event"] == "ready", ready
        return ready

    def stop(self) -> int:
        """Stop as an operator would, and return the exit status."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        """Kill -9, if it runs."""
        if self.popen is not None:
            self.popen.kill()
            self.end()

    def end(self) -> int:
        """Wait until it has ended, and return the exit status."""
        assert self.popen is not None
        status = self.popen.wait(timeout=START_SECONDS)
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self.popen = None
        return status


class Plane:
    """A control plane as the real client sees it."""

    clouds: Path
    hosts: list[str]

    @property
    def log(self) -> str:
        """Everything its processes said on stderr."""
        raise NotImplementedError

    def client(self, cloud: str, *command: str, form: str = "json") -> Any:
        """Run the real `openstack` command and return what it printed."""
        shown = ["-f", form] if form else []
        result = self.run_client(cloud, *command, *shown)
        assert result.returncode == 0, f"openstack {' '.join(command)}: {result.stderr}"
        return json.loads(result.stdout) if form == "json" else result.stdout

    def run_client(self, cloud: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run the real `openstack` command."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("OS_")}
        environ |= {"OS_CLIENT_CONFIG_FILE": str(self.clouds), "OS_CLOUD": cloud}
        return subprocess.run(
            [PROGRAMS / "openstack", *command], env=environ, capture_output=True, text=True, check=False, timeout=120
        )


@dataclass
class ControlPlane(Plane):
    """`cellway up` over a data folder."""

    data: Path
    port: int = 0
    cells: int = 3
    hosts_per_cell: int = 2
    process: Process | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clouds = self.data / "clouds.yaml"
        self.hosts = host_names(self.cells, self.hosts_per_cell)

    def start(self) -> None:
        """Start, and wait for the line that says that it is ready."""
        size = ["--cells", str(self.cells), "--hosts-per-cell", str(self.hosts_per_cell)]
        command = ["up", "--data", str(self.data), "--port", str(self.port), *size]
        self.process = Process(command, self.data.parent / "stderr.log")
        self.process.launch()
        self.ready = self.process.wait_ready()
        self.port = int(self.ready["api"].split(":")[2].split("/")[0])

    def stop(self) -> int:
        """Stop as an operator would, and return the exit status."""
        assert self.process is not None
        return self.process.stop()

    def kill(self) -> None:
        """Kill -9."""
        assert self.process is not None
        self.process.kill()

    @property
    def log(self) -> str:
        """Everything it said on stderr, over all its lives."""
        return (self.data.parent / "stderr.log").read_text()


def host_names(cells: int, hosts_per_cell: int) -> list[str]:
    """Return the names of all hosts, in their order."""
    return [f"cell{cell + 1}-h{host + 1}" for cell in range(cells) for host in range(hosts_per_cell)]


@contextlib.contextmanager
def running(plane: ControlPlane) -> Iterator[ControlPlane]:
    """Start a control plane for the length of the block, and leave no process behind."""
    plane.start()
    try:
        yield plane
    finally:
        plane.kill()
