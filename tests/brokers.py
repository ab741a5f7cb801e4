"""RabbitMQ for tests: a virtual host of our own, and consumers for them. What breaks the way to it is `tests.proxy`.

The virtual host is made on 127.0.0.1:5672 by `rabbitmqctl`, which only root may run. Others name one in
CELLWAY_TEST_RABBITMQ (`rabbit://USER:PASSWORD@HOST:PORT/VHOST`), where the tests leave queues of random names behind.
A broker that is not there skips a test, or fails it when CELLWAY_TEST_REQUIRE (a list with commas) names rabbitmq.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import pytest

from cellway.config import Secret

CONTROL: Final = "rabbitmqctl"


class Gate:
    """A consumer's work that waits until it is let through."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[bytes] = []
        self.done: list[bytes] = []
        self.most = 0

    async def deliver(self, message: bytes) -> bytes:
        self.begun.append(message)
        self.most = max(self.most, len(self.begun) - len(self.done))
        await self.open.wait()
        self.done.append(message)
        return b"re: " + message


async def echo(message: bytes) -> bytes:
    """Answer with the message."""
    return message


@dataclass(frozen=True)
class Rabbit:
    """A virtual host of a broker, and who may use it."""

    user: str
    password: str
    host: str
    port: int
    vhost: str

    def url(self, *ports: int, password: str | None = None, vhost: str | None = None) -> Secret:
        """Return the transport's URL, through the proxies at `ports` of this machine if any are given."""
        who = f"{quote(self.user, safe='')}:{quote(password or self.password, safe='')}"
        places = [f"127.0.0.1:{port}" for port in ports] or [f"{self.host}:{self.port}"]
        where = ",".join(f"{who}@{place}" for place in places)
        return Secret(f"rabbit://{where}/{quote(vhost or self.vhost, safe='')}")


@contextmanager
def virtual_host() -> Iterator[Rabbit]:
    """Give the virtual host that CELLWAY_TEST_RABBITMQ names, or else a new one."""
    if named := os.environ.get("CELLWAY_TEST_RABBITMQ"):
        parts = urlsplit(named)
        user, password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        yield Rabbit(user, password, parts.hostname or "127.0.0.1", parts.port or 5672, unquote(parts.path[1:]) or "/")
    else:
        with new_virtual_host() as made:
            yield made


@contextmanager
def new_virtual_host() -> Iterator[Rabbit]:
    """Make a virtual host with nothing in it, and remove it at the end."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 5672)) != 0:
            _missing("nothing listens on port 5672")
    if shutil.which(CONTROL) is None or os.geteuid() != 0:
        _missing(f"{CONTROL} cannot be used, and CELLWAY_TEST_RABBITMQ names no virtual host")
    name = f"cellway_test_{uuid.uuid4().hex}"
    control("add_vhost", name)
    try:
        control("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        yield Rabbit("guest", "guest", "127.0.0.1", 5672, name)
    finally:
        control("delete_vhost", name)


def control(*arguments: str) -> str:
    """Run the broker's own command, and return what it printed."""
    command = [CONTROL, "--quiet", *arguments]
    # A broker that has run out of files does not fail: it says nothing.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{CONTROL} {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _missing(why: str) -> None:
    if "rabbitmq" in os.environ.get("CELLWAY_TEST_REQUIRE", "").split(","):
        pytest.fail(f"rabbitmq is required and {why}")
    pytest.skip(why)
