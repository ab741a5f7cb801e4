"""The control plane that the tests of a class share, and what they need of it."""

from collections.abc import Iterator

import pytest

from tests.acceptance.control_plane import ADMIN, MEMBER, ControlPlane, Plane, running
from tests.acceptance.processes import separate


@pytest.fixture(scope="class")
def plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """`cellway up` when the class's `databases` are SQLite's, else separate processes over servers."""
    kind = request.cls.databases
    folder = tmp_path_factory.mktemp(kind)
    with running(ControlPlane(folder / "data")) if kind == "sqlite" else separate(kind, folder) as started:
        yield started


@pytest.fixture(scope="class")
def flavor(plane: Plane) -> str:
    """A flavor that an admin made."""
    made = plane.client(ADMIN, "flavor", "create", "--ram", "512", "--vcpus", "1", "--disk", "1", "m1.tiny")
    assert made["ram"] == 512
    return str(made["name"])


@pytest.fixture(scope="class")
def server(plane: Plane, flavor: str) -> str:
    """A server that a member booted and waited for; its id."""
    made = plane.client(MEMBER, "server", "create", "--flavor", flavor, "--image", "tiny", "--wait", "web-1")
    assert made["status"] == "ACTIVE"
    return str(made["id"])
