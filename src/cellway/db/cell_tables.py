"""The tables of a cell's database. Nouns read and write them through a `CellTx`.

The first part are the incumbent's tables: same names, columns and types, with its soft deletion (`deleted` is 0, or
the row's own id), so that an existing cell can be read in place. The quota and aggregate tables among them are there
to be migrated away (seeds 003, 004). Columns that only the newest of the incumbent's releases have are left out. The
last part are tables of our own. A change here needs a new version in `cell_versions/`.
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
    String,
    Text,
    Unicode,
    UniqueConstraint,
)

from cellway.db.columns import (
    MEDIUM_TEXT,
    NAME,
    PRECISE_TIME,
    UUID,
    IpAddress,
    identity,
    precise_timestamps,
    soft_deletion,
    table,
    timestamps,
)

CELL_METADATA = MetaData()

# ---- instances -------------------------------------------------------------------------------------------------

instances = table(
    CELL_METADATA,
    "instances",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("user_id", NAME),
    Column("project_id", NAME),
    Column("image_ref", NAME),
    Column("kernel_id", NAME),
    Column("ramdisk_id", NAME),
    Column("launch_index", Integer),
    Column("key_name", NAME),
    Column("key_data", MEDIUM_TEXT),
    Column("power_state", Integer),
    Column("vm_state", NAME),
    Column("memory_mb", Integer),
    Column("vcpus", Integer),
    Column("hostname", NAME),
    Column("host", NAME),
    Column("user_data", MEDIUM_TEXT),
    Column("reservation_id", NAME),
    Column("launched_at", DateTime),
    Column("terminated_at", DateTime),
    Column("display_name", NAME),
    Column("display_description", NAME),
    Column("availability_zone", NAME),
    Column("locked", Boolean),
    Column("os_type", NAME),
    Column("launched_on", MEDIUM_TEXT),
    Column("instance_type_id", Integer),
    Column("vm_mode", NAME),
    Column("uuid", UUID, nullable=False),
    Column("architecture", NAME),
    Column("root_device_name", NAME),
    Column("access_ip_v4", IpAddress),
    Column("access_ip_v6", IpAddress),
    Column("config_drive", NAME),
    Column("task_state", NAME),
    Column("default_ephemeral_device", NAME),
    Column("default_swap_device", NAME),
    Column("progress", Integer),
    Column("auto_disk_config", Boolean),
    Column("shutdown_terminate", Boolean),
    Column("disable_terminate", Boolean),
    Column("root_gb", Integer),
    Column("ephemeral_gb", Integer),
    Column("cell_name", NAME),
    Column("node", NAME),
    Column("locked_by", Enum("owner", "admin", name="instances0locked_by")),
    Column("cleaned", Integer, default=0),
    Column("ephemeral_key_uuid", UUID),
    Column("hidden", Boolean, default=False),
    Index("instances_reservation_id_idx", "reservation_id"),
    Index("instances_terminated_at_launched_at_idx", "terminated_at", "launched_at"),
    Index("instances_task_state_updated_at_idx", "task_state", "updated_at"),
    Index("instances_uuid_deleted_idx", "uuid", "deleted"),
    Index("instances_host_node_deleted_idx", "host", "node", "deleted"),
    Index("instances_host_deleted_cleaned_idx", "host", "deleted", "cleaned"),
    Index("instances_project_id_deleted_idx", "project_id", "deleted"),
    Index("instances_deleted_created_at_idx", "deleted", "created_at"),
    Index("instances_project_id_idx", "project_id"),
    Index("instances_updated_at_project_id_idx", "updated_at", "project_id"),
    UniqueConstraint("uuid", name="uniq_instances0uuid"),
)

instance_extra = table(
    CELL_METADATA,
    "instance_extra",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column(
        "instance_uuid", UUID, ForeignKey("instances.uuid", name="instance_extra_instance_uuid_fkey"), nullable=False
    ),
    Column("numa_topology", Text),
    Column("pci_requests", Text),
    Column("flavor", Text),
    Column("vcpu_model", Text),
    Column("migration_context", Text),
    Column("keypairs", Text),
    Column("device_metadata", Text),
    Column("trusted_certs", Text),
    Column("resources", Text),
    Index("instance_extra_idx", "instance_uuid"),
)

instance_info_caches = table(
    CELL_METADATA,
    "instance_info_caches",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("network_info", MEDIUM_TEXT),
    Column(
        "instance_uuid",
        UUID,
        ForeignKey("instances.uuid", name="instance_info_caches_instance_uuid_fkey"),
        nullable=False,
    ),
    UniqueConstraint("instance_uuid", name="uniq_instance_info_caches0instance_uuid"),
)

instance_metadata = table(
    CELL_METADATA,
    "instance_metadata",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("key", NAME),
    Column("value", NAME),
    Column("instance_uuid", UUID, ForeignKey("instances.uuid", name="instance_metadata_instance_uuid_fkey")),
    Index("instance_metadata_instance_uuid_idx", "instance_uuid"),
)

instance_system_metadata = table(
    CELL_METADATA,
    "instance_system_metadata",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("instance_uuid", UUID, ForeignKey("instances.uuid", name="instance_system_metadata_ibfk_1"), nullable=False),
    Column("key", NAME, nullable=False),
    Column("value", NAME),
    Index("instance_uuid", "instance_uuid"),
)

instance_faults = table(
    CELL_METADATA,
    "instance_faults",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("instance_uuid", UUID, ForeignKey("instances.uuid", name="fk_instance_faults_instance_uuid")),
    Column("code", Integer, nullable=False),
    Column("message", NAME),
    Column("details", MEDIUM_TEXT),
    Column("host", NAME),
    Index("instance_faults_host_idx", "host"),
    Index("instance_faults_instance_uuid_deleted_created_at_idx", "instance_uuid", "deleted", "created_at"),
)

instance_actions = table(
    CELL_METADATA,
    "instance_actions",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("action", NAME),
    Column("instance_uuid", UUID, ForeignKey("instances.uuid", name="fk_instance_actions_instance_uuid")),
    Column("request_id", NAME),
    Column("user_id", NAME),
    Column("project_id", NAME),
    Column("start_time", DateTime),
    Column("finish_time", DateTime),
    Column("message", NAME),
    Index("instance_uuid_idx", "instance_uuid"),
    Index("request_id_idx", "request_id"),
    Index("instance_actions_instance_uuid_updated_at_idx", "instance_uuid", "updated_at"),
)

instance_actions_events = table(
    CELL_METADATA,
    "instance_actions_events",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("event", NAME),
    Column("action_id", Integer, ForeignKey("instance_actions.id")),
    Column("start_time", DateTime),
    Column("finish_time", DateTime),
    Column("result", NAME),
    Column("traceback", Text),
    Column("host", NAME),
    Column("details", Text),
    # The incumbent has none, so listing a server's events reads the whole table on PostgreSQL.
    Index("instance_actions_events_action_id_idx", "action_id"),
)

tags = table(
    CELL_METADATA,
    "tags",
    Column("resource_id", UUID, primary_key=True),
    Column("tag", Unicode(80), primary_key=True),
    Index("tags_tag_idx", "tag"),
)

# ---- hosts -----------------------------------------------------------------------------------------------------

services = table(
    CELL_METADATA,
    "services",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("host", NAME),
    Column("binary", NAME),
    Column("topic", NAME),
    Column("report_count", Integer, nullable=False),
    Column("disabled", Boolean),
    Column("disabled_reason", NAME),
    Column("last_seen_up", DateTime),
    Column("forced_down", Boolean, default=False),
    Column("version", Integer, default=0),
    Column("uuid", UUID),
    Index("services_uuid_idx", "uuid", unique=True),
    UniqueConstraint("host", "topic", "deleted", name="uniq_services0host0topic0deleted"),
    UniqueConstraint("host", "binary", "deleted", name="uniq_services0host0binary0deleted"),
)

compute_nodes = table(
    CELL_METADATA,
    "compute_nodes",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("service_id", Integer),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("local_gb", Integer, nullable=False),
    Column("vcpus_used", Integer, nullable=False),
    Column("memory_mb_used", Integer, nullable=False),
    Column("local_gb_used", Integer, nullable=False),
    Column("hypervisor_type", MEDIUM_TEXT, nullable=False),
    Column("hypervisor_version", Integer, nullable=False),
    Column("cpu_info", MEDIUM_TEXT, nullable=False),
    Column("disk_available_least", Integer),
    Column("free_ram_mb", Integer),
    Column("free_disk_gb", Integer),
    Column("current_workload", Integer),
    Column("running_vms", Integer),
    Column("hypervisor_hostname", NAME),
    Column("host_ip", IpAddress),
    Column("supported_instances", Text),
    Column("pci_stats", Text),
    Column("metrics", Text),
    Column("extra_resources", Text),
    Column("stats", Text, default="{}"),
    Column("numa_topology", Text),
    Column("host", NAME),
    Column("ram_allocation_ratio", Float),
    Column("cpu_allocation_ratio", Float),
    Column("uuid", UUID),
    Column("disk_allocation_ratio", Float),
    Column("mapped", Integer, default=0),
    Index("compute_nodes_uuid_idx", "uuid", unique=True),
    UniqueConstraint(
        "host", "hypervisor_hostname", "deleted", name="uniq_compute_nodes0host0hypervisor_hostname0deleted"
    ),
)

# ---- quotas, to be migrated away (seed 003) --------------------------------------------------------------------

quotas = table(
    CELL_METADATA,
    "quotas",
    identity(),
    *timestamps(),
    *soft_deletion(),
    Column("project_id", NAME),
    Column("resource", NAME, nullable=False),
    Column("hard_limit", Integer),
    UniqueConstraint("project_id", "resource", "deleted", name="uniq_quotas0project_id0resource0deleted"),
)

project_user_quotas = table(
    CELL_METADATA,
    "project_user_quotas",
    identity(),
    *timestamps(),
    *soft_deletion(),
    Column("user_id", NAME, nullable=False),
    Column("project_id", NAME, nullable=False),
    Column("resource", NAME, nullable=False),
    Column("hard_limit", Integer),
    Index("project_user_quotas_project_id_deleted_idx", "project_id", "deleted"),
    Index("project_user_quotas_user_id_deleted_idx", "user_id", "deleted"),
    UniqueConstraint(
        "user_id",
        "project_id",
        "resource",
        "deleted",
        name="uniq_project_user_quotas0user_id0project_id0resource0deleted",
    ),
)

quota_classes = table(
    CELL_METADATA,
    "quota_classes",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("class_name", NAME),
    Column("resource", NAME),
    Column("hard_limit", Integer),
    Index("ix_quota_classes_class_name", "class_name"),
)

quota_usages = table(
    CELL_METADATA,
    "quota_usages",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("project_id", NAME),
    Column("resource", NAME, nullable=False),
    Column("in_use", Integer, nullable=False),
    Column("reserved", Integer, nullable=False),
    Column("until_refresh", Integer),
    Column("user_id", NAME),
    Index("ix_quota_usages_project_id", "project_id"),
    Index("ix_quota_usages_user_id_deleted", "user_id", "deleted"),
)

reservations = table(
    CELL_METADATA,
    "reservations",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("uuid", UUID, nullable=False),
    Column("usage_id", Integer, ForeignKey("quota_usages.id", name="reservations_ibfk_1"), nullable=False),
    Column("project_id", NAME),
    Column("resource", NAME),
    Column("delta", Integer, nullable=False),
    Column("expire", DateTime),
    Column("user_id", NAME),
    Index("ix_reservations_project_id", "project_id"),
    Index("ix_reservations_user_id_deleted", "user_id", "deleted"),
    Index("reservations_uuid_idx", "uuid"),
    Index("reservations_deleted_expire_idx", "deleted", "expire"),
)

# ---- aggregates, to be migrated away (seed 004) ----------------------------------------------------------------

aggregates = table(
    CELL_METADATA,
    "aggregates",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("name", NAME),
    Column("uuid", UUID),
    Index("aggregate_uuid_idx", "uuid"),
)

aggregate_hosts = table(
    CELL_METADATA,
    "aggregate_hosts",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("host", NAME),
    Column("aggregate_id", Integer, ForeignKey("aggregates.id"), nullable=False),
    UniqueConstraint("host", "aggregate_id", "deleted", name="uniq_aggregate_hosts0host0aggregate_id0deleted"),
)

aggregate_metadata = table(
    CELL_METADATA,
    "aggregate_metadata",
    *timestamps(),
    *soft_deletion(),
    identity(),
    Column("aggregate_id", Integer, ForeignKey("aggregates.id"), nullable=False),
    Column("key", NAME, nullable=False),
    Column("value", NAME, nullable=False),
    Index("aggregate_metadata_key_idx", "key"),
    Index("aggregate_metadata_value_idx", "value"),
    UniqueConstraint("aggregate_id", "key", "deleted", name="uniq_aggregate_metadata0aggregate_id0key0deleted"),
)

# ---- our own ---------------------------------------------------------------------------------------------------

instance_fences = table(
    CELL_METADATA,
    "instance_fences",
    identity(),
    *precise_timestamps(),
    Column("instance_uuid", UUID, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("host", NAME),
    # placed, building, active, failed or withdrawn
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("sequence", Integer, nullable=False, server_default="0"),
    Column("failure", Text),
    UniqueConstraint("instance_uuid", name="uniq_instance_fences0instance_uuid"),
)

host_reports = table(
    CELL_METADATA,
    "host_reports",
    identity(),
    Column("host", NAME, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("updated_at", PRECISE_TIME),
    UniqueConstraint("host", name="uniq_host_reports0host"),
)

idempotency_keys = table(
    CELL_METADATA,
    "idempotency_keys",
    Column("key", NAME, primary_key=True),
    Column("created_at", PRECISE_TIME, nullable=False),
    Index("idempotency_keys_created_at_idx", "created_at"),
)
