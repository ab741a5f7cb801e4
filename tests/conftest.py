"""Fixtures that every test may use: a running deployment with two cells and cell0, and settings for all."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest

from cellway.testing import Deployment
from cellway.testing import deployment as open_deployment
from tests.brokers import Rabbit, virtual_host
from tests.databases import SLOW_SERVERS, Shelf, Urls

# These machines stall at times; how long an example took says nothing about it.
hypothesis.settings.register_profile("cellway", deadline=None)
hypothesis.settings.load_profile("cellway")


@pytest.fixture
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, the loop that the system runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def shelf() -> Iterator[Shelf]:
    """This process's own databases on the servers."""
    made = Shelf()
    yield made
    made.close()


@pytest.fixture(params=SLOW_SERVERS)
def databases(request: pytest.FixtureRequest, shelf: Shelf) -> Urls:
    """Where a deployment keeps its databases, on each kind in turn: what `testing.deployment` takes."""
    if request.param == "sqlite":
        return None
    for name in ("api", "cell0", "cell1", "cell2"):
        shelf.take(request.param, name)
    return partial(shelf.find, request.param)


@pytest.fixture
async def deployment(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each, cell0, and a flavor `m1.tiny`."""
    async with open_deployment(tmp_path / "data") as running:
        await running.make_flavor()
        yield running


@pytest.fixture(scope="session")
def rabbit() -> Iterator[Rabbit]:
    """A virtual host of RabbitMQ for this process; tests keep apart by addresses of their own."""
    with virtual_host() as made:
        yield made
