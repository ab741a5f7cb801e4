"""What clients were promised, and whether it was kept: a load with a journal, and the invariants of what it leaves.

The tests that kill, pause and cut use it. The oracles look at databases and hypervisors directly, never through the
code that they judge.
"""

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from cellway.config import Secret
from cellway.testing import TINY_IMAGE
from tests.databases import engine_of

SETTLE_SECONDS = 90
FLAVOR = {"name": "small", "id": "small", "vcpus": 1, "ram": 512, "disk": 1}
CAPACITY = 12
"""vCPUs of each host, and so servers."""
WORK = ("build_requests", "build_claims", "delete_requests")
"""Tables of the API database whose rows are work to do."""


@dataclass
class Journal:
    """What clients asked and were promised: ids accepted, deletions asked for, and those of them that were accepted."""

    accepted: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    """A deletion whose answer was cut off may have been carried out or not."""
    deleted: set[str] = field(default_factory=set)
    refused: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0


@dataclass
class Api:
    """A plain HTTP client of the compute API; it signs in once, since tokens outlive restarts."""

    url: str
    clouds: Path
    token: str = ""

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request. Raises: OSError or HTTPException when the server is gone."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
        try:
            headers = {"X-Auth-Token": self.token, "OpenStack-API-Version": "compute 2.53"}
            content = None
            if body is not None:
                content = json.dumps(body)
                headers["Content-Type"] = "application/json"
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            text = answer.read()
            if path.endswith("/auth/tokens"):
                self.token = answer.headers["X-Subject-Token"]
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def sign_in(self) -> None:
        """Get a token as the admin of clouds.yaml, and make the flavor of the load."""
        clouds = yaml.safe_load(self.clouds.read_text())["clouds"]
        password = clouds["cellway-admin"]["auth"]["password"]
        user = {"name": "admin", "domain": {"id": "default"}, "password": password}
        identity = {"methods": ["password"], "password": {"user": user}}
        status, _ = self.call("POST", "/identity/v3/auth/tokens", {"auth": {"identity": identity}})
        assert status == 201
        assert self.call("POST", "/compute/v2.1/flavors", {"flavor": FLAVOR})[0] == 200

    def servers(self) -> dict[str, Any]:
        """Return every server by id. Raises: AssertionError when the list is refused."""
        status, body = self.call("GET", "/compute/v2.1/servers/detail?all_tenants=1&limit=1000")
        assert status == 200, body
        return {server["id"]: server for server in body["servers"]}


class Load:
    """Three clients that create and delete servers until told to stop, and write down what they were told."""

    def __init__(self, api: Api, dice: random.Random, journal: Journal, *, most_servers: int) -> None:
        self.journal = journal
        self._api = api
        self._dice = dice
        self._most_servers = most_servers
        self._names = itertools.count(len(journal.accepted) + journal.refused.total() + journal.unanswered)
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._work) for _ in range(3)]

    def __enter__(self) -> None:
        for client in self._clients:
            client.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _work(self) -> None:
        journal, dice = self.journal, self._dice
        while not self._stop.is_set():
            try:
                alive = sorted(journal.accepted - journal.deleted)
                if alive and (len(alive) >= self._most_servers or dice.random() < 0.3):
                    self._delete(dice.choice(alive))
                    continue
                name = f"s{next(self._names)}"
                server = {"name": name, "flavorRef": "small", "imageRef": TINY_IMAGE, "networks": "none"}
                status, body = self._api.call("POST", "/compute/v2.1/servers", {"server": server})
                if status == 202:
                    journal.accepted.add(body["server"]["id"])
                else:
                    journal.refused[status] += 1
            except (OSError, http.client.HTTPException):
                journal.unanswered += 1
                time.sleep(0.02)

    def _delete(self, uuid: str) -> None:
        self.journal.asked.add(uuid)
        status, _ = self._api.call("DELETE", f"/compute/v2.1/servers/{uuid}")
        if status == 204:
            self.journal.deleted.add(uuid)
        else:
            self.journal.refused[status] += 1


def rows(database: Secret, query: str) -> list[tuple[Any, ...]]:
    """Read a database as a stranger would."""
    engine = engine_of(database)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]
    finally:
        engine.dispose()


def settle(api: Api, journal: Journal, api_database: Secret, seconds: float = SETTLE_SECONDS) -> dict[str, Any]:
    """Wait until servers are ACTIVE or ERROR, deleted ones gone, and no work is left; return the servers by id."""
    deadline = time.monotonic() + seconds
    while True:
        work = [table for table in WORK if rows(api_database, f"SELECT * FROM {table}")]  # noqa: S608
        try:
            said = api.servers()
        except (OSError, http.client.HTTPException):
            # It is still being started.
            assert time.monotonic() < deadline, "the API does not answer"
            time.sleep(0.2)
            continue
        busy = [
            (server["id"], server["status"], server["OS-EXT-STS:task_state"])
            for server in said.values()
            if server["status"] not in ("ACTIVE", "ERROR")
            or server["OS-EXT-STS:task_state"] is not None
            or server["id"] in journal.deleted
        ]
        if not busy and not work:
            return said
        assert time.monotonic() < deadline, (busy, work)
        time.sleep(0.2)


# ---- the invariants --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aftermath:
    """A control plane at rest after a load: its databases by name, what each host runs, and what clients were told."""

    databases: Mapping[str, Secret]
    guests: Mapping[str, set[str]]
    journal: Journal
    said: dict[str, Any]

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """Read one database."""
        return rows(self.databases[database], query)

    def live(self) -> dict[str, list[tuple[str, str | None]]]:
        """Return the live instances by uuid: each cell that has it, and its host there."""
        found: dict[str, list[tuple[str, str | None]]] = {}
        for cell in self.databases:
            if cell != "api":
                for uuid, host in self.rows(cell, "SELECT uuid, host FROM instances WHERE deleted = 0"):
                    found.setdefault(uuid, []).append((cell, host))
        return found


def every_accepted_server_is_there(after: Aftermath) -> list[str]:
    """Each is ACTIVE, or ERROR with a fault that says why; none is lost, none came back (X4, L1)."""
    journal, said = after.journal, after.said
    lost = journal.accepted - journal.asked - said.keys()
    back = journal.deleted & said.keys()
    mute = {uuid for uuid, server in said.items() if server["status"] == "ERROR" and not server["fault"]["message"]}
    return [f"lost {lost}"] * bool(lost) + [f"came back {back}"] * bool(back) + [f"no fault {mute}"] * bool(mute)


def no_request_made_two_servers(after: Aftermath) -> list[str]:
    """Each request has a name of its own, and each name at most one server (X5)."""
    times = Counter(server["name"] for server in after.said.values())
    return [f"{name} was made {count} times" for name, count in times.items() if count > 1]


def no_server_is_in_two_cells(after: Aftermath) -> list[str]:
    """The union over all cells has each uuid once, where its mapping says, and the API lists just these (X1, X2)."""
    found = after.live()
    wrong = [f"{uuid} is in {places}" for uuid, places in found.items() if len(places) > 1]
    if unlisted := found.keys() ^ after.said.keys():
        wrong.append(f"listed or live, not both: {unlisted}")
    query = "SELECT m.instance_uuid, c.name FROM instance_mappings m JOIN cell_mappings c ON c.id = m.cell_id"
    mapped = dict(after.rows("api", query))
    wrong += [
        f"{uuid} is mapped to {mapped.get(uuid)}" for uuid, [(cell, _), *_] in found.items() if mapped.get(uuid) != cell
    ]
    return wrong


def no_host_has_promised_more_than_it_has(after: Aftermath) -> list[str]:
    """The claims of a host add up to what is booked, and to no more than its capacity (H1)."""
    claimed = Counter(host for (host,) in after.rows("api", "SELECT host FROM host_claims"))
    booked = after.rows("api", "SELECT host, vcpus_used, vcpus FROM host_capacity")
    wrong = [f"{host}: {used} booked, {claimed[host]} claimed" for host, used, _ in booked if used != claimed[host]]
    wrong += [f"{host}: {used} of {total}" for host, used, total in booked if not used <= total == CAPACITY]
    return wrong + [f"hosts {sorted(host for host, *_ in booked)}"] * (
        {host for host, *_ in booked} != set(after.guests)
    )


def nothing_is_left_over(after: Aftermath) -> list[str]:
    """No request, claim, deletion, charge or share of a host outlives its server (L2, Q2)."""
    found = after.live()
    wrong = [f"{table} has rows" for table in WORK if after.rows("api", f"SELECT * FROM {table}")]  # noqa: S608
    charged = {uuid for (uuid,) in after.rows("api", "SELECT instance_uuid FROM server_charges")}
    placed = {uuid for uuid, [(_, host), *_] in found.items() if host is not None}
    claimed = {uuid for (uuid,) in after.rows("api", "SELECT instance_uuid FROM host_claims")}
    wrong += [f"charged or live, not both: {charged ^ found.keys()}"] * (charged != found.keys())
    return wrong + [f"claimed or placed, not both: {claimed ^ placed}"] * (claimed != placed)


def usages_add_up(after: Aftermath) -> list[str]:
    """What is in use is what the live servers take that got a host, of each project and user; nothing is reserved
    (Q2).
    """
    expected: Counter[tuple[str, str, str]] = Counter()
    for cell in after.databases:
        query = "SELECT project_id, user_id, vcpus, memory_mb FROM instances WHERE deleted = 0"
        for project, user, vcpus, memory_mb in after.rows(cell, query) if cell not in ("api", "cell0") else ():
            for scope in ("", user):
                expected.update(
                    {
                        (project, scope, "instances"): 1,
                        (project, scope, "cores"): vcpus,
                        (project, scope, "ram"): memory_mb,
                    }
                )
    usages = after.rows("api", "SELECT project_id, user_id, resource, in_use, reserved FROM quota_usages")
    servers = [row for row in usages if row[2] in ("instances", "cores", "ram")]
    found = Counter({(project, user, resource): in_use for project, user, resource, in_use, _ in servers})
    wrong = [
        f"{key}: {found[key]} in use, {expected[key]} taken"
        for key in {*found, *expected}
        if found[key] != expected[key]
    ]
    wrong += [f"reserved: {row}" for row in usages if row[4] != 0]
    return wrong + ["reservations has rows"] * bool(after.rows("api", "SELECT * FROM reservations"))


def each_guest_runs_on_one_host(after: Aftermath) -> list[str]:
    """What the simulated hypervisors run is what the cells say, each guest once (X3)."""
    expected: dict[str, set[str]] = {host: set() for host in after.guests}
    for uuid, [(_, host), *_] in after.live().items():
        if host is not None and after.said.get(uuid, {}).get("status") == "ACTIVE":
            expected[host].add(uuid)
    return [f"{host}: {expected[host] ^ runs}" for host, runs in after.guests.items() if expected[host] != runs]


INVARIANTS: Sequence[Callable[[Aftermath], list[str]]] = (
    every_accepted_server_is_there,
    no_request_made_two_servers,
    no_server_is_in_two_cells,
    no_host_has_promised_more_than_it_has,
    nothing_is_left_over,
    usages_add_up,
    each_guest_runs_on_one_host,
)
"""Each returns what breaks it; nothing when it holds."""


def guests_of(journal: Path) -> set[str]:
    """Return what a simulated hypervisor runs, from its journal: a torn last line never took effect."""
    running: set[str] = set()
    for line in journal.read_bytes().split(b"\n")[:-1]:
        done = json.loads(line)
        (running.discard if done["guest"] is None else running.add)(done["instance_uuid"])
    return running
