"""Aggregates (seed 004): named groups of hosts with metadata, in the API database.

Called by the HTTP shell. Only reading is built so far, and no aggregate makes a zone yet (docs/compatibility.md).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from cellway.db.api_tables import aggregate_hosts, aggregate_metadata, aggregates
from cellway.db.transaction import ApiTx

ZONE_KEY = "availability_zone"
"""The metadata key that makes an aggregate an availability zone."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A group of hosts."""

    id: int
    uuid: str
    name: str
    created_at: datetime | None
    updated_at: datetime | None
    hosts: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def zone(self) -> str | None:
        """The availability zone that the aggregate makes, if any."""
        return self.metadata.get(ZONE_KEY)


_AGGREGATES = sa.select(
    aggregates.c.id, aggregates.c.uuid, aggregates.c.name, aggregates.c.created_at, aggregates.c.updated_at
).order_by(aggregates.c.id)
_HOSTS = sa.select(aggregate_hosts.c.aggregate_id, aggregate_hosts.c.host).order_by(aggregate_hosts.c.id)
_METADATA = sa.select(aggregate_metadata.c.aggregate_id, aggregate_metadata.c.key, aggregate_metadata.c.value)


def list_all(tx: ApiTx) -> list[Aggregate]:
    """Return every aggregate, the oldest first."""
    hosts: defaultdict[int, list[str]] = defaultdict(list)
    for aggregate_id, host in tx.execute(_HOSTS):
        hosts[aggregate_id].append(host)
    metadata: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for aggregate_id, key, value in tx.execute(_METADATA):
        metadata[aggregate_id][key] = value
    return [
        Aggregate(key, uuid, name, created_at, updated_at, tuple(hosts[key]), metadata[key])
        for key, uuid, name, created_at, updated_at in tx.execute(_AGGREGATES)
    ]
