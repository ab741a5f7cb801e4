"""`kill -9` of everything, again and again under load: nothing accepted is lost, doubled or leaked (L1, X1–X5, H1)."""

import random
import time
from collections.abc import Callable

import pytest

from cellway.config import Secret
from tests.acceptance.control_plane import NO_QUOTA, ControlPlane, running
from tests.acceptance.oracles import CAPACITY, INVARIANTS, Aftermath, Api, Journal, Load, guests_of, settle

KILLS = 20
LIFE_SECONDS = (0.3, 1.5)


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Kill it 20 times under load, let it settle, and stop it. The load asks for more servers than there is room."""
    data = tmp_path_factory.mktemp("kill") / "data"
    data.mkdir(mode=0o700)
    settings = f"[agent]\nvcpus = {CAPACITY}\ncpu_allocation_ratio = 1\nlatency_seconds = 0.2\nfailure_rate = 0.05\n"
    limits = "[limits]\nheartbeat_seconds = 1\nhost_down_seconds = 6\nclaim_seconds = 4\nclaim_renew_seconds = 1\n"
    (data / "cellway.conf").write_text(f"{settings}{limits}[quota]\n{NO_QUOTA}\n")
    plane = ControlPlane(data)
    databases = {name: Secret(f"sqlite:///{data / name}.db") for name in ("api", "cell0", "cell1", "cell2", "cell3")}
    dice = random.Random(20261121)
    with running(plane):
        api = Api(f"http://127.0.0.1:{plane.port}", plane.clouds)
        api.sign_in()
        journal = Journal()
        with Load(api, dice, journal, most_servers=110):
            for _ in range(KILLS):
                time.sleep(dice.uniform(*LIFE_SECONDS))
                plane.kill()
                plane.start()
        said = settle(api, journal, databases["api"])
        assert plane.stop() == 0
    guests = {host: guests_of(data / "hosts" / f"{host}.journal") for host in plane.hosts}
    return Aftermath(databases, guests, journal, said)


def test_the_load_was_real(aftermath: Aftermath) -> None:
    """Enough was accepted and deleted between the kills for the rest to mean something, and refusals were honest."""
    journal = aftermath.journal
    assert len(journal.accepted) > 3 * KILLS
    assert len(journal.deleted) > KILLS
    assert len(journal.asked - journal.deleted) < len(journal.deleted)
    assert set(journal.refused) <= {404, 503}
    assert sum(server["status"] == "ACTIVE" for server in aftermath.said.values()) > 0


@pytest.mark.parametrize("holds", INVARIANTS, ids=lambda invariant: invariant.__name__)
def test_it_was_kept(aftermath: Aftermath, holds: Callable[[Aftermath], list[str]]) -> None:
    """Each invariant holds once everything has settled."""
    assert holds(aftermath) == []
