"""A limit that two API processes cannot overrun together, however many ask at once and whichever of them is killed."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cellway.testing import TINY_IMAGE
from tests.acceptance.oracles import Aftermath, Api, Journal, rows, settle, usages_add_up
from tests.acceptance.processes import SeparatePlane, separate
from tests.databases import SERVERS

LIMIT, ASKED = 50, 200
QUOTA = f"instances = {LIMIT}\ncores = -1\nram = -1"
# On a busy machine 200 requests at once wait for each other longer than a request should.
LIMITS = "database_deadline_seconds = 30"


@pytest.fixture(scope="module", params=SERVERS)
def plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeparatePlane]:
    """Separate processes over each kind of server in turn, with room for every server on the hosts."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    with separate(request.param, folder, quota=QUOTA, limits=LIMITS) as started:
        yield started


@pytest.fixture(scope="module")
def api(plane: SeparatePlane) -> Api:
    """A client that is signed in."""
    made = Api(plane.front.url, plane.clouds)
    made.sign_in()
    return made


def ask_for(api: Api, numbers: range, asked: Callable[[int], None] = lambda number: None) -> tuple[Journal, list[str]]:
    """Ask for that many servers at once; return what was answered, and the words of every refusal."""
    journal, words = Journal(), list[str]()
    together = threading.Barrier(len(numbers))

    def ask(number: int) -> None:
        server = {"name": f"s{number}", "flavorRef": "small", "imageRef": TINY_IMAGE, "networks": "none"}
        together.wait()
        asked(number)
        try:
            status, body = api.call("POST", "/compute/v2.1/servers", {"server": server})
        except (OSError, http.client.HTTPException):
            journal.unanswered += 1
            return
        if status == 202:
            journal.accepted.add(body["server"]["id"])
        else:
            journal.refused[status] += 1
            words.append(body.get("forbidden", body)["message"] if status == 403 else str(body))

    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(ask, numbers))
    return journal, words


def check_sums(plane: SeparatePlane, journal: Journal, said: dict[str, object]) -> None:
    """What is in use is what runs, and nothing is reserved."""
    assert usages_add_up(Aftermath(plane.databases, {}, journal, said)) == []


def clear(plane: SeparatePlane, api: Api, journal: Journal) -> None:
    """Delete every server, and wait until all of it is given back."""
    for uuid in api.servers():
        assert api.call("DELETE", f"/compute/v2.1/servers/{uuid}")[0] == 204
        journal.deleted.add(uuid)
    check_sums(plane, journal, settle(api, journal, plane.databases["api"]))
    assert set(rows(plane.databases["api"], "SELECT in_use, reserved FROM quota_usages")) == {(0, 0)}


def test_exactly_as_many_are_accepted_as_the_limit_allows(plane: SeparatePlane, api: Api) -> None:
    """Of 200 requests at once 50 are accepted and come to run, and 150 are refused with 403; none ends in ERROR."""
    journal, words = ask_for(api, range(ASKED))
    assert (len(journal.accepted), journal.refused) == (LIMIT, Counter({403: ASKED - LIMIT})), words[:3]
    assert set(words) == {f"Quota exceeded for instances: Requested 1, but already used {LIMIT} of {LIMIT} instances"}
    said = settle(api, journal, plane.databases["api"])
    assert said.keys() == journal.accepted
    assert {server["status"] for server in said.values()} == {"ACTIVE"}
    check_sums(plane, journal, said)
    clear(plane, api, journal)


def test_it_adds_up_after_an_api_process_is_killed(plane: SeparatePlane, api: Api) -> None:
    """With one of the two API processes killed while 200 ask, no more than 50 servers come to run, every one that was
    accepted among them, and whoever asks afterwards gets exactly what is left.
    """
    fallen = threading.Event()

    def asked(number: int) -> None:
        if number == ASKED // 2:
            plane.processes["api1"].kill()
            fallen.set()

    journal, words = ask_for(api, range(ASKED), asked)
    assert fallen.is_set()
    assert set(journal.refused) <= {403}, words[:3]
    plane.restart("api1")
    plane.processes["api1"].wait_ready()
    said = settle(api, journal, plane.databases["api"])
    assert journal.accepted <= said.keys()
    assert len(said) <= LIMIT
    assert {server["status"] for server in said.values()} <= {"ACTIVE"}
    check_sums(plane, journal, said)
    rest, words = ask_for(api, range(ASKED, ASKED + LIMIT))
    assert len(rest.accepted) == LIMIT - len(said), words[:3]
    said = settle(api, rest, plane.databases["api"])
    assert len(said) == LIMIT
    check_sums(plane, rest, said)
    clear(plane, api, rest)
