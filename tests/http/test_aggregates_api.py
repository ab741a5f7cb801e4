"""Aggregates over HTTP: what stands in the API database is shown; nothing makes one yet."""

from datetime import datetime

import pytest
import sqlalchemy as sa

from cellway.db.api_tables import aggregate_hosts, aggregate_metadata, aggregates
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.testing import Deployment

pytestmark = pytest.mark.anyio

UUID = "0c3e1c1a-71c5-4a4b-9b55-2f9c52c1a0de"


def _make_aggregate(tx: ApiTx) -> int:
    made = datetime(2026, 3, 1, 12, 30, 15)
    tx.execute(sa.insert(aggregates), {"uuid": UUID, "name": "fast", "created_at": made})
    key = int(tx.execute(sa.select(aggregates.c.id)).scalar_one())
    for host in ("h2", "h1"):
        tx.execute(sa.insert(aggregate_hosts), {"aggregate_id": key, "host": host})
    for name, value in (("ssd", "true"), ("availability_zone", "east")):
        tx.execute(sa.insert(aggregate_metadata), {"aggregate_id": key, "key": name, "value": value})
    return key


async def test_aggregates_are_read_from_their_tables(deployment: Deployment) -> None:
    """There is no aggregate until one stands in the tables; then it shows with its hosts and metadata, to admins."""
    assert (await deployment.admin.get("/os-aggregates")).json == {"aggregates": []}
    key = await deployment.app.databases.on(API).write(_make_aggregate)
    expected = {
        "id": key, "uuid": UUID, "name": "fast", "availability_zone": "east",
        "hosts": ["h2", "h1"], "metadata": {"ssd": "true", "availability_zone": "east"},
        "created_at": "2026-03-01T12:30:15.000000", "updated_at": None, "deleted": False, "deleted_at": None,
    }  # fmt: skip
    assert (await deployment.admin.get("/os-aggregates")).json == {"aggregates": [expected]}
    assert (await deployment.admin.get(f"/os-aggregates/{key}")).json == {"aggregate": expected}
    del expected["uuid"]
    assert (await deployment.admin.at("2.40").get(f"/os-aggregates/{key}")).json == {"aggregate": expected}
    for path, status in ((f"{key + 1}", 404), ("fast", 400), ("-1", 400)):
        assert (await deployment.admin.get(f"/os-aggregates/{path}")).status == status, path
    assert (await deployment.member.get("/os-aggregates")).status == 403
