"""The separate processes, run as `cellway …`: what each may know, what is refused, how they start and stop.

What needs a queue between processes is in `tests/acceptance/test_processes.py`.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml

from cellway.cli.main import main
from cellway.config import Secret
from cellway.db.schema import Tree
from cellway.operations.embedded import hold
from tests.acceptance.control_plane import CELLWAY, Process
from tests.databases import upgraded

pytestmark = pytest.mark.slow  # each starts a process or several

API = "[api_database]\nconnection = sqlite:////nowhere/api.db\n"
CELL = "[database]\nconnection = sqlite:////nowhere/cell1.db\n"
QUEUE = "[DEFAULT]\ntransport_url = rabbit://guest:guest@127.0.0.1:1/cell1\n"
MEMORY = "[DEFAULT]\ntransport_url = memory://cell1\n"
NONE = "[DEFAULT]\ntransport_url = none:///\n"
USERS = "[identity]\nusers_file = /nowhere/users.json\n"
CONDUCTOR = ("conductor", "--cell", "cell1")
AGENT = ("agent", "--cell", "cell1", "--host", "h1")
WAIT_SECONDS = 60


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Leave the logs of this process as they were."""
    yield
    structlog.reset_defaults()


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> tuple[int, str]:
    """Run a command that ends by itself; return its exit status and what it said."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--config", str(config)])
    printed = capsys.readouterr()
    assert printed.out == ""
    return int(end.value.code or 0), printed.err


@pytest.mark.parametrize(
    ("command", "text", "code", "named"),
    [
        (("api",), USERS, "process.missing_option", "[api_database] connection"),
        (("api",), API, "process.missing_option", "[identity] users_file"),
        (("builder",), "", "process.missing_option", "[api_database] connection"),
        (CONDUCTOR, CELL, "process.missing_option", "[DEFAULT] transport_url"),
        (CONDUCTOR, QUEUE, "process.missing_option", "[database] connection"),
        (AGENT, "", "process.missing_option", "[DEFAULT] transport_url"),
        (CONDUCTOR, QUEUE + CELL + API, "process.knows_too_much", "[api_database] connection"),
        (CONDUCTOR, QUEUE + CELL + USERS, "process.knows_too_much", "[identity] users_file"),
        (AGENT, QUEUE + API, "process.knows_too_much", "[api_database] connection"),
        (AGENT, QUEUE + CELL, "process.knows_too_much", "[database] connection"),
        (AGENT, QUEUE + USERS, "process.knows_too_much", "[identity] users_file"),
        (CONDUCTOR, MEMORY + CELL, "process.memory_transport", "[DEFAULT] transport_url"),
        (AGENT, MEMORY, "process.memory_transport", "[DEFAULT] transport_url"),
        (CONDUCTOR, NONE + CELL, "process.no_queue", "[DEFAULT] transport_url"),
        (AGENT, NONE, "process.no_queue", "[DEFAULT] transport_url"),
        (("agent", "--cell", "c", "--host", "../h"), QUEUE, "agent.bad_host", "--host"),
    ],
)
def test_a_process_is_given_what_it_needs_and_no_more(
    command: tuple[str, ...], text: str, code: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing connection, one that it may not know, or a queue inside one process is refused (2) by its name."""
    config = tmp_path / "own.conf"
    config.write_text(text)
    status, said = refusal(capsys, config, *command)
    assert status == 2
    assert f"code: {code}" in said
    assert named in said
    assert "guest" not in said


def test_the_environment_counts_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that an agent may not know is refused from the environment as well."""
    config = tmp_path / "own.conf"
    config.write_text(QUEUE)
    monkeypatch.setenv("CELLWAY_API_DATABASE__CONNECTION", "sqlite:////nowhere/api.db")
    assert "code: process.knows_too_much" in refusal(capsys, config, *AGENT)[1]


def test_two_agents_do_not_share_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent is refused (5), naming its host, while another on this machine has the host's journal."""
    config = tmp_path / "own.conf"
    config.write_text(f"{QUEUE}[agent]\nstate_folder = {tmp_path / 'state'}\n")
    lock = hold(tmp_path / "state" / "h1.lock", "agent.in_use", "host h1")
    try:
        status, said = refusal(capsys, config, *AGENT)
    finally:
        os.close(lock)
    assert (status, "host h1 is in use by another cellway" in said) == (5, True)


@pytest.mark.parametrize("process", ["api", "builder"])
def test_cells_with_a_queue_inside_one_process_are_refused(process: str, tmp_path: Path) -> None:
    """An API or a builder over the databases of a `cellway up` ends with 2 and says why, without serving."""
    api = upgraded(Secret(f"sqlite:///{tmp_path / 'api.db'}"), Tree.API).reveal()
    config = tmp_path / "own.conf"
    users = f"[identity]\nusers_file = {tmp_path / 'users.json'}\n" if process == "api" else ""
    config.write_text(f"[api_database]\nconnection = {api}\n[api]\nport = 0\n{users}")
    cell = ("--database-url", f"sqlite:///{tmp_path / 'cell1.db'}", "--transport-url", "memory://cell1")
    done = cellway("cell", "create", "cell1", *cell, "--config", str(config))
    assert done.returncode == 0, done.stderr
    done = cellway(process, "--config", str(config))
    assert (done.returncode, done.stdout) == (2, "")
    assert "code: process.memory_transport" in done.stderr


def cellway(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command that ends by itself."""
    return subprocess.run([*CELLWAY, *arguments], capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)


# ---- two API processes and a builder, over SQLite and without cells that have hosts ------------------------------


@dataclass
class Api:
    """One API process, as a client sees it."""

    address: str
    token: str = ""

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request; return status and document."""
        with closing(HTTPConnection(self.address, timeout=WAIT_SECONDS)) as connection:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"X-Auth-Token": self.token, "Content-Type": "application/json"})
            answer = connection.getresponse()
            self.token = answer.headers.get("X-Subject-Token", self.token)
            return answer.status, json.load(answer)

    def sign_in(self, clouds: Path, cloud: str) -> int:
        """Get a token with the password of a cloud; return the status."""
        auth = yaml.safe_load(clouds.read_text())["clouds"][cloud]["auth"]
        user = {"name": auth["username"], "domain": {"id": "default"}, "password": auth["password"]}
        identity = {"methods": ["password"], "password": {"user": user}}
        return self.call("POST", "/identity/v3/auth/tokens", {"auth": {"identity": identity}})[0]

    def until(self, path: str, holds: Callable[[int, Any], bool]) -> Any:
        """Ask until the answer is as wanted; return its document."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            status, document = self.call("GET", path)
            if holds(status, document):
                return document
            assert time.monotonic() < deadline, (status, document)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Api], list[Process]]]:
    """Two APIs and a builder, started at once before there are any databases or users."""
    folder = tmp_path_factory.mktemp("processes")
    database = f"[api_database]\nconnection = sqlite:///{folder / 'api.db'}\n"
    (folder / "builder.conf").write_text(database)
    users = f"[identity]\nusers_file = {folder / 'users.json'}\nclouds_file = {folder / 'clouds.yaml'}\n"
    (folder / "api.conf").write_text(f"{database}{users}[api]\nport = 0\npublic_endpoint = http://front.example\n")
    processes = [
        Process([name, "--config", str(folder / f"{name}.conf")], folder / f"{number}.log")
        for number, name in enumerate(("api", "api", "builder"))
    ]
    for process in processes:
        process.launch()
    try:
        yield folder, [Api(process.wait_ready()["listen"]) for process in processes[:2]], processes
    finally:
        for process in processes:
            process.kill()


Started = tuple[Path, list[Api], list[Process]]


def test_one_users_file_is_made_and_shared(started: Started) -> None:
    """APIs that start at once agree on users and passwords: those of clouds.yaml, and a token, are good at both."""
    folder, (first, second), _ = started
    for cloud in ("cellway", "cellway-admin"):
        assert (first.sign_in(folder / "clouds.yaml", cloud), second.sign_in(folder / "clouds.yaml", cloud)) == (
            201,
            201,
        )
    second.token = first.token
    assert second.call("GET", "/identity/v3/auth/projects")[0] == 200


def test_processes_start_before_their_databases(started: Started) -> None:
    """Without a database the APIs live and answer 503; when it is made they, and the builder, go on by themselves."""
    folder, apis, processes = started
    for api in apis:
        assert api.sign_in(folder / "clouds.yaml", "cellway-admin") == 201
        assert (api.call("GET", "/healthz")[0], api.call("GET", "/readyz")[0]) == (200, 503)
        assert api.call("GET", "/compute/v2.1/servers")[0] == 503
    config = ("--config", str(folder / "builder.conf"))
    for arguments in (
        ("db", "sync", "api"),
        ("cell", "create", "cell0", "--database-url", f"sqlite:///{folder / 'cell0.db'}"),
        ("db", "sync"),
    ):
        done = cellway(*arguments, *config)
        assert done.returncode == 0, done.stderr
    assert processes[2].wait_ready()["process"] == "builder"
    for api in apis:
        api.until("/readyz", lambda status, _: status == 200)
        assert api.call("GET", "/compute/v2.1/servers") == (200, {"servers": []})


def test_one_process_accepts_and_another_builds(started: Started) -> None:
    """A server that one API accepted is carried through by the builder (to cell0: there are no hosts), as both say."""
    folder, (first, second), _ = started
    assert first.sign_in(folder / "clouds.yaml", "cellway-admin") == 201
    second.token = first.token
    flavor = {"name": "tiny", "id": "tiny", "vcpus": 1, "ram": 512, "disk": 1}
    assert first.call("POST", "/compute/v2.1/flavors", {"flavor": flavor})[0] == 200
    server = {"name": "s", "flavorRef": "tiny", "imageRef": "7f3c1f52-7c1b-4c59-9d0e-5a4b3f0c7e11"}
    status, made = first.call("POST", "/compute/v2.1/servers", {"server": server})
    assert status == 202
    path = f"/compute/v2.1/servers/{made['server']['id']}"
    for api in (second, first):
        shown = api.until(path, lambda _, document: document["server"]["status"] != "BUILD")
        assert (shown["server"]["status"], "fault" in shown["server"]) == ("ERROR", True)


def test_processes_end_in_peace(started: Started) -> None:
    """SIGTERM ends each with 0, and none has logged an error."""
    folder, _, processes = started
    assert [process.stop() for process in processes] == [0, 0, 0]
    assert [line for log in folder.glob("*.log") for line in log.read_text().splitlines() if '"error"' in line] == []


def test_a_process_that_waits_can_be_stopped(tmp_path: Path) -> None:
    """SIGTERM ends a builder, whose database is not there, with 0 too."""
    (tmp_path / "own.conf").write_text(f"[api_database]\nconnection = sqlite:///{tmp_path / 'api.db'}\n")
    process = Process(["builder", "--config", str(tmp_path / "own.conf")], tmp_path / "log")
    process.launch()
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while "waiting" not in process.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.stop() == 0
    finally:
        process.kill()


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that serves sends READY=1 to the socket that systemd names."""
    upgraded(Secret(f"sqlite:///{tmp_path / 'api.db'}"), Tree.API)
    (tmp_path / "own.conf").write_text(f"[api_database]\nconnection = sqlite:///{tmp_path / 'api.db'}\n")
    process = Process(["builder", "--config", str(tmp_path / "own.conf")], tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        process.launch()
        try:
            assert process.wait_ready()["event"] == "ready"
            assert systemd.recv(100) == b"READY=1"
        finally:
            process.kill()
