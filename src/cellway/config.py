"""One typed configuration, read from an INI file, and every limit of the system with its reason.

`load` is called by `app.py` and the command line; everything else is handed the piece it needs. Section and
option names are the ecosystem's own where the meaning is the same. Nothing is interpolated, so a `%` in a
password is a `%`. An option may be set by `CELLWAY_SECTION__OPTION` in the environment.
"""

import configparser
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from cellway.errors import Invalid


class Secret:
    """A string that must not be shown: a password, a key, or a connection URL that holds one.

    It prints as `***` everywhere; `reveal()` is called only where a driver needs the text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a Secret is never serialised")


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit, with the reason for its default. Section `[limits]` of the configuration."""

    # Databases
    database_threads: int = 4
    """Threads, and so connections, per database and process: a slow cell can exhaust only its own. SQLite has one for
    reads and one for writes.
    """
    database_queue: int = 256
    """Units of work that may wait for one database before new ones are refused: 4 threads clear it in well under a
    second.
    """
    database_deadline_seconds: float = 2.0
    """A cell's read: long enough for a loaded server, short enough that a user keeps waiting."""
    database_write_attempts: int = 5
    """Times that a unit of work is run when the database reports a deadlock or a lock timeout, or a commit is lost."""
    open_databases: int = 256
    """Cell engines open at once: 100 cells in a process, with room for replaced ones that drain."""
    idle_seconds: float = 300.0
    """An engine or transport unused for so long is closed; the next use opens it anew."""

    # Message queues
    rpc_timeout_seconds: float = 10.0
    """A call to an agent or conductor, publishing included."""
    open_transports: int = 256
    """As `open_databases`."""
    message_bytes: int = 1 << 20
    """One message on a queue; user data (64 KiB) and metadata fit many times."""
    consumer_concurrency: int = 64
    """Messages of one consumer worked on at once; more wait in the queue. RabbitMQ counts calls and casts apart."""
    queue_messages: int = 4096
    """Messages that wait at one address: every host of a large cell reports to its conductor at once after an outage.
    RabbitMQ keeps it, as the next two, from when a queue is first made: to change it, remove the queue.
    """
    queue_deliveries: int = 20
    """Times that RabbitMQ hands out a cast again before it is laid among the dead ones: its own default from 4.0 on. A
    restart of the consumer counts as one.
    """
    dead_messages: int = 1000
    """Casts of one virtual host that failed, kept for an operator to look at: at most 1 GiB, the oldest go first."""
    broker_connect_seconds: float = 3.0
    """A host of a broker that has not let us in within this is given up for the next: three fit into one call."""
    broker_retry_seconds: float = 0.1
    """The first pause after a failed attempt to connect; it doubles with each further one."""
    broker_retry_most_seconds: float = 3.0
    """The longest such pause: a broker that is back is used within 5 s."""
    broker_heartbeat_seconds: int = 4
    """Either end of a broker's connection takes the other for dead after three silent ones: 15 s at most."""

    # Cells
    registry_refresh_seconds: float = 2.0
    """How soon a changed cell mapping is in force in every process (5 s)."""
    mapping_cache_entries: int = 65536
    """Instance mappings remembered per process, about 20 MB."""
    mapping_cache_seconds: float = 300.0
    """A mapping changes only when a build moves, and the cell's answer corrects it; this bounds the memory of deleted
    ones.
    """
    scatter_concurrency: int = 32
    """Cells asked at once by one request."""

    # Online data migrations
    migration_batch: int = 500
    """Rows of one batch. Two to three times as many rows a second as in the incumbent's 50 on a database server, where
    2000 bring little more; a tenth of the deadline, and a change of a limit over the API waits for one batch at most.
    """

    # Hosts
    heartbeat_seconds: float = 10.0
    """An agent reports this often."""
    host_down_seconds: float = 60.0
    """A host silent for so long is down: six missed reports, as the incumbent."""
    fleet_sweep_seconds: float = 2.0
    """How often the hosts of every cell are read: a new host is mapped, and a changed one seen, within this."""

    # Builds
    claim_seconds: float = 15.0
    """A builder's claim on a request; another process goes on after so long."""
    claim_renew_seconds: float = 5.0
    """A living builder renews three times before its claim would lapse."""
    build_hosts: int = 3
    """Hosts tried before a server is buried."""
    build_takeovers: int = 25
    """Processes that may die holding one build before it is buried, in case it is what kills them."""
    builds_at_once: int = 64
    """Builds that one process works on at a time."""
    launch_seconds: float = 30.0
    """An agent that was sent a build and has not finished it within this is given up, and another host chosen."""
    recast_seconds: float = 3.0
    """The same build attempt, or delete, is sent again after so long without an answer; agents ignore repeats."""
    builder_poll_seconds: float = 1.0
    """How often requests accepted by other processes are looked for; those of this process wake it at once."""

    # Quotas
    quota_sweep_seconds: float = 60.0
    """How often expired reservations are returned, and servers looked for that nobody has charged."""

    # HTTP
    page_size: int = 1000
    """Rows in one answer, as the incumbent's `max_limit`."""
    body_bytes: int = 256 * 1024
    """A request body: 64 KiB of base64 user data, metadata and names fit twice over."""
    header_bytes: int = 32 * 1024
    """All request headers together; a large token is 8 KiB."""
    json_depth: int = 24
    """Nesting of a request body; the API's own bodies need 5."""
    receive_seconds: float = 30.0
    """A client must have sent its whole request within this."""
    servers_per_request: int = 100
    """`max_count` of one create."""
    tags_per_server: int = 50
    """As the incumbent."""
    name_characters: int = 255
    """Names, keys and values: the width of the columns that hold them."""
    user_data_bytes: int = 65535
    """Encoded user data: the incumbent's limit."""

    # Identity
    token_seconds: float = 3600.0
    """Life of a token of the built-in identity."""
    token_cache_entries: int = 10000
    """Verified tokens remembered per process."""
    token_cache_seconds: float = 60.0
    """A revoked token works at most so long."""


@dataclass(frozen=True, slots=True)
class DefaultSection:
    """`[DEFAULT]`"""

    transport_url: Secret | None = None
    """The cell's message queue, for a conductor or an agent."""
    default_availability_zone: str = "nova"
    """The zone of hosts that no aggregate puts in another."""


@dataclass(frozen=True, slots=True)
class DatabaseSection:
    """`[api_database]`, and `[database]` for a conductor's cell."""

    connection: Secret | None = None


@dataclass(frozen=True, slots=True)
class ApiSection:
    """`[api]`"""

    listen: str = "127.0.0.1"
    port: int = 8774
    public_endpoint: str = ""
    """The address that links and the service catalog show; empty means `http://LISTEN:PORT`."""
    policy_file: str = ""
    """A `policy.yaml` with overrides."""


@dataclass(frozen=True, slots=True)
class IdentitySection:
    """`[identity]`: the built-in Keystone subset."""

    users_file: str = ""
    """JSON file of users, projects and the token key, mode 0600. All API processes use the same."""
    clouds_file: str = ""
    """A `clouds.yaml`, mode 0600, into which an API process writes the passwords that it makes."""


@dataclass(frozen=True, slots=True)
class AgentSection:
    """`[agent]`: the simulated driver."""

    vcpus: int = 16
    memory_mb: int = 65536
    disk_gb: int = 500
    cpu_allocation_ratio: float = 4.0
    ram_allocation_ratio: float = 1.0
    disk_allocation_ratio: float = 1.0
    latency_seconds: float = 0.05
    """How long the simulated hypervisor takes over each operation."""
    failure_rate: float = 0.0
    """The share of builds that fail, 0 to 1."""
    state_folder: str = ""
    """Where `cellway agent` keeps what its simulated host runs; empty means that its guests end with the process."""


@dataclass(frozen=True, slots=True)
class QuotaSection:
    """`[quota]`: what a project may have that has no limits of its own, nor its class; -1 is unlimited. The incumbent's
    names and defaults.
    """

    instances: int = 10
    cores: int = 20
    ram: int = 51200
    """MB."""
    metadata_items: int = 128
    """Per server."""
    injected_files: int = 5
    injected_file_content_bytes: int = 10240
    injected_file_path_length: int = 255
    key_pairs: int = 100
    """Per user."""
    server_groups: int = 10
    server_group_members: int = 10
    """Per group."""
    max_age: int = 0
    """Seconds after which a usage is counted anew before it is used; 0 is never."""
    until_refresh: int = 0
    """The same after so many uses."""
    silent_cells: Literal["refuse", "ignore"] = "refuse"
    """What is done when a cell that may hold limits, or servers that nobody has counted, does not answer."""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    default: DefaultSection = field(default_factory=DefaultSection)
    api_database: DatabaseSection = field(default_factory=DatabaseSection)
    database: DatabaseSection = field(default_factory=DatabaseSection)
    api: ApiSection = field(default_factory=ApiSection)
    identity: IdentitySection = field(default_factory=IdentitySection)
    agent: AgentSection = field(default_factory=AgentSection)
    quota: QuotaSection = field(default_factory=QuotaSection)
    limits: Limits = field(default_factory=Limits)


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration from `path` (or defaults when None) and the environment.

    Raises: Invalid for a file that cannot be read, an unknown section or option (with the nearest name), or a value
    of the wrong type.
    """
    given: dict[str, dict[str, str]] = {}
    if path is not None:
        parser = configparser.ConfigParser(interpolation=None, default_section="no default section", strict=True)
        try:
            with path.open(encoding="utf-8") as lines:
                parser.read_file(lines)
        except OSError as error:
            raise Invalid("config.unreadable", f"cannot read {path}: {error.strerror}") from error
        except (configparser.Error, UnicodeDecodeError) as error:
            # The parser's own message quotes the line, which may hold a password.
            broken = [number for number, _ in getattr(error, "errors", ())]
            line = getattr(error, "lineno", None) or next(iter(broken), None)
            where = f" at line {line}" if line else ""
            raise Invalid("config.malformed", f"{path} is not a valid configuration file{where}") from None
        for section in parser.sections():
            given.setdefault(section.lower(), {}).update(parser.items(section))
    for variable, text in environ.items():
        if variable.startswith("CELLWAY_") and "__" in variable:
            section, _, option = variable.removeprefix("CELLWAY_").partition("__")
            given.setdefault(section.lower(), {})[option.lower()] = text
    return _build(given)


def _build(given: Mapping[str, Mapping[str, str]]) -> Config:
    sections = get_type_hints(Config)
    made: dict[str, Any] = {}
    for name, options in given.items():
        if name not in sections:
            raise Invalid("config.unknown_section", f"unknown section [{name}]{_nearest(name, sections)}")
        section = sections[name]
        assert is_dataclass(section)
        kinds = get_type_hints(section)
        known = {f.name for f in fields(section)}
        values: dict[str, Any] = {}
        for option, text in options.items():
            if option not in known:
                raise Invalid("config.unknown_option", f"unknown option {option} in [{name}]{_nearest(option, known)}")
            values[option] = _convert(name, option, text, kinds[option])
        made[name] = cast(Any, section)(**values)
    return Config(**made)


_LEAST = {"limits": (0, "above 0"), "quota": (-1, "not below -1")}


def _convert(section: str, option: str, text: str, kind: object) -> object:
    if kind is int or kind is float:
        try:
            number = int(text) if kind is int else float(text)
        except ValueError:
            number = math.nan
        least, said = _LEAST.get(section, (0, "not below 0"))
        if not least <= number < math.inf or (number == 0 and section == "limits"):
            wanted = "a whole number" if kind is int else "a number"
            raise Invalid("config.wrong_type", f"option {option} in [{section}] must be {wanted}, {said}")
        return number
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise Invalid(
                "config.wrong_type", f"option {option} in [{section}] must be one of {', '.join(get_args(kind))}"
            )
        return text
    return Secret(text) if text else None


def _nearest(word: str, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
