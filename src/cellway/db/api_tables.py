"""The tables of the API database. Nouns and `cells` read and write them through an `ApiTx`.

The first part are the incumbent's tables: same names, columns and types, so that an existing deployment's database
can be read in place. Where it forgot a constraint, the tables that we create have it: unique keys on quota classes,
usages, aggregate uuids and the members of server groups, and no NULL in any unique key, because a key over NULL is
none. The second part are tables of our own. A change here needs a new version in `api_versions/`. Seeds 002, 003, 004.
"""

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Enum,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Text,
    UniqueConstraint,
    false,
)

from cellway.db.columns import (
    MEDIUM_TEXT,
    NAME,
    PRECISE_TIME,
    UUID,
    identity,
    precise_timestamps,
    table,
    timestamps,
)

API_METADATA = MetaData()

# ---- cells and where things are --------------------------------------------------------------------------------

cell_mappings = table(
    API_METADATA,
    "cell_mappings",
    *timestamps(),
    identity(),
    Column("uuid", UUID, nullable=False),
    Column("name", NAME),
    Column("transport_url", Text),
    Column("database_connection", Text),
    Column("disabled", Boolean, default=False),
    UniqueConstraint("uuid", name="uniq_cell_mappings0uuid"),
    Index("uuid_idx", "uuid"),
)

instance_mappings = table(
    API_METADATA,
    "instance_mappings",
    *timestamps(),
    identity(),
    Column("instance_uuid", UUID, nullable=False),
    Column("cell_id", Integer, ForeignKey("cell_mappings.id")),
    Column("project_id", NAME, nullable=False),
    Column("queued_for_delete", Boolean, nullable=False, default=False, server_default=false()),
    Column("user_id", NAME),
    UniqueConstraint("instance_uuid", name="uniq_instance_mappings0instance_uuid"),
    Index("instance_uuid_idx", "instance_uuid"),
    Index("project_id_idx", "project_id"),
    Index("instance_mappings_user_id_project_id_idx", "user_id", "project_id"),
)

host_mappings = table(
    API_METADATA,
    "host_mappings",
    *timestamps(),
    identity(),
    Column("cell_id", Integer, ForeignKey("cell_mappings.id"), nullable=False),
    Column("host", NAME, nullable=False),
    UniqueConstraint("host", name="uniq_host_mappings0host"),
    Index("host_idx", "host"),
)

# ---- servers that are not yet in a cell ------------------------------------------------------------------------

build_requests = table(
    API_METADATA,
    "build_requests",
    *timestamps(),
    identity(),
    Column("project_id", NAME, nullable=False),
    Column("instance_uuid", UUID, nullable=False),
    Column("instance", MEDIUM_TEXT),
    Column("block_device_mappings", MEDIUM_TEXT),
    Column("tags", Text),
    UniqueConstraint("instance_uuid", name="uniq_build_requests0instance_uuid"),
    Index("build_requests_project_id_idx", "project_id"),
    Index("build_requests_instance_uuid_idx", "instance_uuid"),
)

request_specs = table(
    API_METADATA,
    "request_specs",
    *timestamps(),
    identity(),
    Column("instance_uuid", UUID, nullable=False),
    Column("spec", MEDIUM_TEXT, nullable=False),
    UniqueConstraint("instance_uuid", name="uniq_request_specs0instance_uuid"),
    Index("request_spec_instance_uuid_idx", "instance_uuid"),
)

# ---- flavors and keypairs --------------------------------------------------------------------------------------

flavors = table(
    API_METADATA,
    "flavors",
    *timestamps(),
    Column("name", NAME, nullable=False),
    identity(),
    Column("memory_mb", Integer, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("swap", Integer, nullable=False),
    Column("vcpu_weight", Integer),
    Column("flavorid", NAME, nullable=False),
    Column("rxtx_factor", Float),
    Column("root_gb", Integer),
    Column("ephemeral_gb", Integer),
    Column("disabled", Boolean),
    Column("is_public", Boolean),
    Column("description", Text),
    UniqueConstraint("flavorid", name="uniq_flavors0flavorid"),
    UniqueConstraint("name", name="uniq_flavors0name"),
)

flavor_extra_specs = table(
    API_METADATA,
    "flavor_extra_specs",
    *timestamps(),
    identity(),
    Column("flavor_id", Integer, ForeignKey("flavors.id"), nullable=False),
    Column("key", NAME, nullable=False),
    Column("value", NAME),
    UniqueConstraint("flavor_id", "key", name="uniq_flavor_extra_specs0flavor_id0key"),
    Index("flavor_extra_specs_flavor_id_key_idx", "flavor_id", "key"),
)

flavor_projects = table(
    API_METADATA,
    "flavor_projects",
    *timestamps(),
    identity(),
    Column("flavor_id", Integer, ForeignKey("flavors.id"), nullable=False),
    Column("project_id", NAME, nullable=False),
    UniqueConstraint("flavor_id", "project_id", name="uniq_flavor_projects0flavor_id0project_id"),
)

key_pairs = table(
    API_METADATA,
    "key_pairs",
    *timestamps(),
    identity(),
    Column("name", NAME, nullable=False),
    Column("user_id", NAME, nullable=False),
    Column("fingerprint", NAME),
    Column("public_key", Text),
    Column("type", Enum("ssh", "x509", name="keypair_types"), nullable=False, server_default="ssh"),
    UniqueConstraint("user_id", "name", name="uniq_key_pairs0user_id0name"),
)

# ---- server groups ---------------------------------------------------------------------------------------------

instance_groups = table(
    API_METADATA,
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

instance_group_policy = table(
    API_METADATA,
    "instance_group_policy",
    *timestamps(),
    identity(),
    Column("policy", NAME),
    Column("group_id", Integer, ForeignKey("instance_groups.id"), nullable=False),
    Column("rules", Text),
    UniqueConstraint("group_id", name="uniq_instance_group_policy0group_id"),
    Index("instance_group_policy_policy_idx", "policy"),
)

instance_group_member = table(
    API_METADATA,
    "instance_group_member",
    *timestamps(),
    identity(),
    Column("instance_uuid", NAME, nullable=False),
    Column("group_id", Integer, ForeignKey("instance_groups.id"), nullable=False),
    UniqueConstraint("group_id", "instance_uuid", name="uniq_instance_group_member0group_id0instance_uuid"),
    Index("instance_group_member_instance_idx", "instance_uuid"),
)

# ---- quotas (seed 003) -----------------------------------------------------------------------------------------

quotas = table(
    API_METADATA,
    "quotas",
    identity(),
    *timestamps(),
    Column("project_id", NAME, nullable=False),
    Column("resource", NAME, nullable=False),
    Column("hard_limit", Integer),
    UniqueConstraint("project_id", "resource", name="uniq_quotas0project_id0resource"),
)

project_user_quotas = table(
    API_METADATA,
    "project_user_quotas",
    identity(),
    *timestamps(),
    Column("user_id", NAME, nullable=False),
    Column("project_id", NAME, nullable=False),
    Column("resource", NAME, nullable=False),
    Column("hard_limit", Integer),
    UniqueConstraint("user_id", "project_id", "resource", name="uniq_project_user_quotas0user_id0project_id0resource"),
    Index("project_user_quotas_project_id_idx", "project_id"),
    Index("project_user_quotas_user_id_idx", "user_id"),
)

quota_classes = table(
    API_METADATA,
    "quota_classes",
    *timestamps(),
    identity(),
    Column("class_name", NAME, nullable=False),
    Column("resource", NAME, nullable=False),
    Column("hard_limit", Integer),
    UniqueConstraint("class_name", "resource", name="uniq_quota_classes0class_name0resource"),
    Index("quota_classes_class_name_idx", "class_name"),
)

quota_usages = table(
    API_METADATA,
    "quota_usages",
    *timestamps(),
    identity(),
    Column("project_id", NAME, nullable=False),
    Column("resource", NAME, nullable=False),
    Column("in_use", Integer, nullable=False),
    Column("reserved", Integer, nullable=False),
    Column("until_refresh", Integer),
    # '' is the project's own row, beside one row for each of its users.
    Column("user_id", NAME, nullable=False, server_default=""),
    UniqueConstraint("project_id", "user_id", "resource", name="uniq_quota_usages0project_id0user_id0resource"),
    Index("quota_usages_project_id_idx", "project_id"),
    Index("quota_usages_user_id_idx", "user_id"),
)

reservations = table(
    API_METADATA,
    "reservations",
    *timestamps(),
    identity(),
    Column("uuid", UUID, nullable=False),
    Column("usage_id", Integer, ForeignKey("quota_usages.id"), nullable=False),
    Column("project_id", NAME),
    Column("resource", NAME),
    Column("delta", Integer, nullable=False),
    Column("expire", DateTime),
    Column("user_id", NAME),
    Index("reservations_project_id_idx", "project_id"),
    Index("reservations_uuid_idx", "uuid"),
    Index("reservations_expire_idx", "expire"),
    Index("reservations_user_id_idx", "user_id"),
)

# ---- aggregates (seed 004) -------------------------------------------------------------------------------------

aggregates = table(
    API_METADATA,
    "aggregates",
    *timestamps(),
    identity(),
    Column("uuid", UUID, nullable=False),
    Column("name", NAME, nullable=False),
    UniqueConstraint("uuid", name="uniq_aggregate0aggregate_uuid"),
    UniqueConstraint("name", name="uniq_aggregate0name"),
    Index("aggregate_uuid_idx", "uuid"),
)

aggregate_hosts = table(
    API_METADATA,
    "aggregate_hosts",
    *timestamps(),
    identity(),
    Column("host", NAME, nullable=False),
    Column("aggregate_id", Integer, ForeignKey("aggregates.id"), nullable=False),
    UniqueConstraint("host", "aggregate_id", name="uniq_aggregate_hosts0host0aggregate_id"),
)

aggregate_metadata = table(
    API_METADATA,
    "aggregate_metadata",
    *timestamps(),
    identity(),
    Column("aggregate_id", Integer, ForeignKey("aggregates.id"), nullable=False),
    Column("key", NAME, nullable=False),
    Column("value", NAME, nullable=False),
    UniqueConstraint("aggregate_id", "key", name="uniq_aggregate_metadata0aggregate_id0key"),
    Index("aggregate_metadata_key_idx", "key"),
)

# ---- our own: builds and deletes -------------------------------------------------------------------------------

build_claims = table(
    API_METADATA,
    "build_claims",
    identity(),
    *precise_timestamps(),
    Column("instance_uuid", UUID, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("expires_at", PRECISE_TIME, nullable=False),
    Column("cancelled", Boolean, nullable=False, server_default=false()),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("takeovers", Integer, nullable=False, server_default="0"),
    # A JSON list. MariaDB's TEXT has no default in the table, so this one is ours alone.
    Column("failed_hosts", Text, nullable=False, default="[]"),
    Column("failure", Text),
    UniqueConstraint("instance_uuid", name="uniq_build_claims0instance_uuid"),
    Index("build_claims_expires_at_idx", "expires_at"),
)

delete_requests = table(
    API_METADATA,
    "delete_requests",
    identity(),
    Column("created_at", PRECISE_TIME),
    Column("instance_uuid", UUID, nullable=False),
    Column("project_id", NAME, nullable=False),
    Column("user_id", NAME, nullable=False),
    Column("request_id", NAME, nullable=False),
    Column("next_try_at", PRECISE_TIME, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    UniqueConstraint("instance_uuid", name="uniq_delete_requests0instance_uuid"),
    Index("delete_requests_next_try_at_idx", "next_try_at"),
)

# ---- our own: what the hosts have, and who took it -------------------------------------------------------------

host_capacity = table(
    API_METADATA,
    "host_capacity",
    identity(),
    *precise_timestamps(),
    Column("host", NAME, nullable=False),
    Column("cell_id", Integer, ForeignKey("cell_mappings.id"), nullable=False),
    # The totals times their allocation ratios: the most that may be promised.
    Column("vcpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_gb", Integer, nullable=False),
    Column("vcpus_used", Integer, nullable=False, server_default="0"),
    Column("memory_mb_used", Integer, nullable=False, server_default="0"),
    Column("disk_gb_used", Integer, nullable=False, server_default="0"),
    Column("disabled", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("host", name="uniq_host_capacity0host"),
)

host_claims = table(
    API_METADATA,
    "host_claims",
    identity(),
    Column("created_at", PRECISE_TIME),
    Column("instance_uuid", UUID, nullable=False),
    Column("host", NAME, nullable=False),
    Column("cell_id", Integer, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_gb", Integer, nullable=False),
    UniqueConstraint("instance_uuid", name="uniq_host_claims0instance_uuid"),
    Index("host_claims_host_idx", "host"),
)

server_charges = table(
    API_METADATA,
    "server_charges",
    identity(),
    Column("created_at", PRECISE_TIME),
    Column("instance_uuid", UUID, nullable=False),
    Column("project_id", NAME, nullable=False),
    Column("user_id", NAME, nullable=False),
    Column("instances", Integer, nullable=False),
    Column("cores", Integer, nullable=False),
    Column("ram", Integer, nullable=False),
    UniqueConstraint("instance_uuid", name="uniq_server_charges0instance_uuid"),
    Index("server_charges_project_id_user_id_idx", "project_id", "user_id"),
)

# ---- our own: online data migrations, and writes of unknown outcome --------------------------------------------

migrated_keys = table(
    API_METADATA,
    "migrated_keys",
    Column("kind", String(64), nullable=False),
    # Together with `kind` just below the 3072 bytes that a key may have on MariaDB.
    Column("key", String(700), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", PRECISE_TIME),
    PrimaryKeyConstraint("kind", "key"),
)

migration_state = table(
    API_METADATA,
    "migration_state",
    identity(),
    Column("name", NAME, nullable=False),
    Column("cell_uuid", UUID, nullable=False),
    Column("complete", Boolean, nullable=False, server_default=false()),
    Column("found", Integer, nullable=False, server_default="0"),
    Column("done", Integer, nullable=False, server_default="0"),
    Column("updated_at", PRECISE_TIME),
    Column("cursor", Text),
    UniqueConstraint("name", "cell_uuid", name="uniq_migration_state0name0cell_uuid"),
)

idempotency_keys = table(
    API_METADATA,
    "idempotency_keys",
    Column("key", NAME, primary_key=True),
    Column("created_at", PRECISE_TIME, nullable=False),
    Index("idempotency_keys_created_at_idx", "created_at"),
)
