"""Separate processes on servers that operators trust: the real client, and each cell on its own database and queue.

Two API processes, one builder, and for each of two cells one conductor and two agents.
"""

import asyncio

import aio_pika
import sqlalchemy as sa

from tests.acceptance.control_plane import ADMIN, MEMBER, Plane
from tests.acceptance.processes import CELLS, SeparatePlane
from tests.acceptance.test_real_client import RealClient
from tests.brokers import Rabbit, control
from tests.databases import engine_of

TAP = "tap"
"""The queue of a vhost in which the broker's tracing leaves a copy of every message that is published there."""


class Separate(RealClient):
    """The whole scenario of the real client, and that cells share nothing."""

    def test_each_cell_has_its_own_database_and_queue(self, plane: Plane, flavor: str) -> None:
        """An instance is in its cell's database only, and the messages about it were in its cell's vhost only."""
        assert isinstance(plane, SeparatePlane)
        for vhost in plane.vhosts.values():
            control("trace_on", "-p", vhost.vhost)
            asyncio.run(tap(vhost))
        cell_of: dict[str, str] = {}
        for number in range(5):
            # A cell that a busy machine keeps from answering in time gets none for a moment.
            size = ("--min", "4", "--max", "4", "--wait", f"many-{number}")
            plane.client(MEMBER, "server", "create", "--flavor", flavor, "--image", "tiny", *size)
            listed = plane.client(ADMIN, "server", "list", "--all-projects", "--long", "--name", "many")
            cell_of = {row["ID"]: row["Host"].partition("-")[0] for row in listed}
            if set(cell_of.values()) == set(CELLS):
                break
        assert set(cell_of.values()) == set(CELLS)
        for cell in ("cell0", *CELLS):
            assert in_database(plane, cell) & cell_of.keys() == {uuid for uuid in cell_of if cell_of[uuid] == cell}
        for cell in CELLS:
            seen = asyncio.run(tapped(plane.vhosts[cell]))
            assert {uuid for uuid in cell_of if uuid.encode() in seen} == {u for u in cell_of if cell_of[u] == cell}

    def test_one_conductor_of_a_cell_and_one_agent_of_a_host(self, plane: Plane) -> None:
        """A second one ends by itself with 5 and says whose place is taken; the first goes on."""
        assert isinstance(plane, SeparatePlane)
        config = plane.configure("second-agent", f"[DEFAULT]\ntransport_url = {plane.queue('cell1')}\n")
        agent = plane.launch("second-agent", "agent", "--cell", "cell1", "--host", "cell1-h1", config=config)
        config = plane.folder / "cell1-conductor.conf"
        conductor = plane.launch("second-conductor", "conductor", "--cell", "cell1", config=config)
        for name, process, place in (("agent", agent, "compute.cell1-h1"), ("conductor", conductor, "conductor")):
            assert plane.processes.pop(f"second-{name}").end() == 5
            assert f"error: {place} already has a consumer" in process.log.read_text()
            process.log.unlink()
        assert plane.client(ADMIN, "hypervisor", "show", "cell1-h1")["state"] == "up"

    def test_processes_end_in_peace(self, plane: Plane) -> None:
        """Each ends with 0 on SIGTERM: conductors and agents first, so that nobody may wait for them."""
        assert isinstance(plane, SeparatePlane)
        for name, process in plane.processes.items():
            assert process.stop() == 0, name
        assert '"level": "error"' not in plane.log


class TestPostgresql(Separate):
    """PostgreSQL and RabbitMQ."""

    databases = "postgresql"


class TestMariadb(Separate):
    """MariaDB and RabbitMQ."""

    databases = "mariadb"


def in_database(plane: SeparatePlane, cell: str) -> set[str]:
    """Return the uuids of all instances in a cell's database."""
    engine = engine_of(plane.databases[cell])
    with engine.connect() as connection:
        found = set(connection.execute(sa.text("SELECT uuid FROM instances")).scalars())
    engine.dispose()
    return found


async def tap(vhost: Rabbit) -> None:
    """Keep a copy of what is published in a vhost from now on."""
    async with await aio_pika.connect(vhost.url().reveal().replace("rabbit://", "amqp://")) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(TAP)
        await queue.bind("amq.rabbitmq.trace", "publish.#")


async def tapped(vhost: Rabbit) -> bytes:
    """Return the bodies of all those messages, one after the other."""
    bodies = []
    async with await aio_pika.connect(vhost.url().reveal().replace("rabbit://", "amqp://")) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(TAP)
        while (message := await queue.get(no_ack=True, fail=False)) is not None:
            bodies.append(message.body)
    return b"\n".join(bodies)
