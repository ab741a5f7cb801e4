"""One running deployment for all tests of the HTTP shell: what they need of their own is a project, not a system."""

from collections.abc import AsyncIterator

import pytest

from cellway.testing import Deployment, deployment


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    """Run asynchronous tests and the shared deployment on one asyncio loop."""
    return "asyncio"


@pytest.fixture(scope="package")
async def shared(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Deployment]:
    """Two cells with two hosts each, cell0, and a flavor `m1.tiny`: shared, so a test leaves it as it was found."""
    async with deployment(tmp_path_factory.mktemp("shared")) as running:
        await running.make_flavor()
        yield running


@pytest.fixture(scope="package")
async def unbuilt(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Deployment]:
    """One cell with one host and a flavor `m1.tiny`, in which nothing builds: every server stays as it was accepted."""
    path = tmp_path_factory.mktemp("unbuilt")
    async with deployment(path, cells=1, hosts_per_cell=1, builder=False) as running:
        await running.make_flavor()
        yield running
