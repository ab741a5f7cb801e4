"""Schema version api_002: server groups.

A frozen copy of those tables of `api_tables` as they were then. Loaded by alembic for `migrate.upgrade`. Tables that an
existing deployment has already are left as they are.
"""

from alembic.operations import Operations
from sqlalchemy import Column, ForeignKey, Index, Integer, MetaData, Text, UniqueConstraint

from cellway.db.columns import NAME, UUID, identity, table, timestamps
from cellway.db.migrate import create_missing

revision = "api_002"
down_revision = "api_001"

TABLES = MetaData()

table(
    TABLES,
    "instance_groups",
    *timestamps(),
    identity(),
    Column("user_id", NAME),
    Column("project_id", NAME),
    Column("uuid", UUID, nullable=False),
    Column("name", NAME),
    UniqueConstraint("uuid", name="uniq_instance_groups0uuid"),
    Index("instance_groups_project_id_idx", "project_id"),
)

table(
    TABLES,
    "instance_group_policy",
    *timestamps(),
    identity(),
    Column("policy", NAME),
    Column("group_id", Integer, ForeignKey("instance_groups.id"), nullable=False),
    Column("rules", Text),
    UniqueConstraint("group_id", name="uniq_instance_group_policy0group_id"),
    Index("instance_group_policy_policy_idx", "policy"),
)

table(
    TABLES,
    "instance_group_member",
    *timestamps(),
    identity(),
    Column("instance_uuid", NAME, nullable=False),
    Column("group_id", Integer, ForeignKey("instance_groups.id"), nullable=False),
    UniqueConstraint("group_id", "instance_uuid", name="uniq_instance_group_member0group_id0instance_uuid"),
    Index("instance_group_member_instance_idx", "instance_uuid"),
)


def upgrade(op: Operations) -> None:
    """Create what is missing."""
    create_missing(op.get_bind(), TABLES)
