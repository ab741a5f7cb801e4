"""The agent of one host: it consumes its cell's queue and drives a hypervisor (a shell; `app` builds it).

It knows its cell's transport and nothing else of Cellway: no database, no other cell.
"""

import random
from pathlib import Path

from cellway.agent.agent import Agent
from cellway.agent.drivers import FakeDriver
from cellway.config import AgentSection, Limits
from cellway.context import Clock, Transport
from cellway.ids import IdSource

__all__ = ["Agent", "build"]


def build(
    host: str,
    transport: Transport,
    settings: AgentSection,
    *,
    limits: Limits,
    clock: Clock,
    ids: IdSource,
    journal: Path | None = None,
) -> Agent:
    """Make the agent of a simulated host, not yet started; with `journal` its guests outlive the process.

    Raises: Invalid when the journal cannot be used.
    """
    driver = FakeDriver(host, settings, clock=clock, randomness=random.Random(ids.uuid()), journal=journal)
    return Agent(host, driver, transport, limits=limits, clock=clock, ids=ids)
