"""`make soak`: break separate processes on real servers for a long time under load, and write down what was seen.

Each scenario breaks one thing again and again, then lets everything settle and asks the oracles. What it prints and
writes into docs/faults.md is what happened in this run. It needs PostgreSQL or MariaDB, and RabbitMQ on this machine
with the right to stop it: nothing else should use that broker meanwhile.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.acceptance.oracles import CAPACITY, INVARIANTS, Aftermath, Api, Journal, Load, guests_of, settle
from tests.acceptance.processes import SeparatePlane, separate
from tests.brokers import control

LIMITS: Final = (
    "heartbeat_seconds = 1\nhost_down_seconds = 6\nclaim_seconds = 4\nclaim_renew_seconds = 1\nlaunch_seconds = 8\n"
    "broker_heartbeat_seconds = 1"
)
AGENTS: Final = f"vcpus = {CAPACITY}\ncpu_allocation_ratio = 1\nlatency_seconds = 0.1\nfailure_rate = 0.02"
CLAIM_SECONDS, SILENCE_SECONDS = 4.0, 6.0
MOST_SERVERS: Final = 30
SETTLE_SECONDS: Final = 60.0
"""L1: after the last restart everything accepted has its end within this."""
HEAD: Final = "| Broken | How often | Load | Seen |\n|---|---|---|---|\n"


@dataclass
class Rig:
    """What a scenario breaks: the processes, and the way of the API processes to the API database."""

    plane: SeparatePlane
    api: Api
    dice: random.Random
    rounds: int

    def names(self, *roles: str) -> list[str]:
        """Return the processes of some roles: api, builder, conductor, agent."""
        return [name for name in self.plane.processes if _role(name) in roles]


def _role(name: str) -> str:
    if name.endswith("-conductor"):
        return "conductor"
    return "agent" if "-h" in name else name.rstrip("0123456789")


# ---- what is broken --------------------------------------------------------------------------------------------


def kill_anything(rig: Rig) -> str:
    """`kill -9` of an API process, a builder, a conductor or an agent, and its start"""
    killed: Counter[str] = Counter()
    for _ in range(rig.rounds):
        role = rig.dice.choice(("api", "builder", "conductor", "agent"))
        rig.plane.restart(rig.dice.choice(rig.names(role)))
        killed[role] += 1
        time.sleep(rig.dice.uniform(0.3, 2.0))
    return "killed: " + ", ".join(f"{count} × {role}" for role, count in sorted(killed.items()))


def pause_builders(rig: Rig) -> str:
    """SIGSTOP of a builder until past its claim, then SIGCONT; another builder goes on meanwhile"""
    return _pause(rig, "builder", CLAIM_SECONDS + 1.5)


def pause_agents(rig: Rig) -> str:
    """SIGSTOP of an agent until past the limit of its heartbeat, then SIGCONT"""
    return _pause(rig, "agent", SILENCE_SECONDS + 1.5)


def _pause(rig: Rig, role: str, seconds: float) -> str:
    for _ in range(rig.rounds):
        process = rig.plane.processes[rig.dice.choice(rig.names(role))].popen
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        time.sleep(rig.dice.uniform(0.2, 1.0))
    return f"paused {rig.rounds} times for {seconds:g} s"


def stop_broker(rig: Rig) -> str:
    """`rabbitmqctl stop_app`, 2 to 5 s, `start_app`: both cells' queues are gone meanwhile"""
    for _ in range(rig.rounds):
        control("stop_app")
        time.sleep(rig.dice.uniform(2, 5))
        control("start_app")
        time.sleep(rig.dice.uniform(3, 5))
    return f"stopped {rig.rounds} times"


def alarm_broker(rig: Rig) -> str:
    """The broker's disk alarm for 5 s: it stops reading from whoever publishes, and refuses nothing"""
    for _ in range(rig.rounds):
        control("set_disk_free_limit", "999GB")
        try:
            time.sleep(5)
        finally:
            control("set_disk_free_limit", "50MB")
        time.sleep(rig.dice.uniform(2, 4))
    return f"{rig.rounds} alarms"


def break_ways(rig: Rig) -> str:
    """The way from all processes to one database or queue refuses, hangs, stalls, is reset or slow for 3 s"""
    broken: Counter[str] = Counter()
    for _ in range(rig.rounds):
        name, how = (
            rig.dice.choice(sorted(rig.plane.ways)),
            rig.dice.choice(("refuse", "hang", "stall", "reset", "slow")),
        )
        way = rig.plane.ways[name]
        match how:
            case "stall":
                way.stall(rig.dice.randrange(5000))
            case "slow":
                way.slow(delay_seconds=0.05)
            case _:
                getattr(way, how)()
        time.sleep(3)
        way.heal()
        broken[how] += 1
        time.sleep(rig.dice.uniform(1, 3))
    return "; ".join(f"{count} × {how}" for how, count in sorted(broken.items()))


def cut_commits(rig: Rig) -> str:
    """The answer to COMMIT is cut after the API database has carried it out, whoever sent it"""
    way, before = rig.plane.ways["api"], rig.plane.ways["api"].cuts
    for _ in range(rig.rounds):
        way.cut(b"COMMIT", times=5)
        time.sleep(rig.dice.uniform(0.5, 1.5))
    way.heal()
    return f"{way.cuts - before} COMMITs cut"


# ---- effects ---------------------------------------------------------------------------------------------------


def kill_agents_at_their_effects(rig: Rig) -> str:
    """`kill -9` of an agent right after an effect (a reboot) is in its hypervisor's journal, before it acknowledges"""
    servers = [server for server in rig.api.servers().values() if server["status"] == "ACTIVE"][:8]
    assert servers, "the scenarios before leave servers"
    effects: Counter[str] = Counter()
    stop = threading.Event()
    asking = threading.Thread(target=_reboot, args=(rig.api, [server["id"] for server in servers], stop))
    asking.start()
    kills = 0
    try:
        for _ in range(rig.rounds):
            name = rig.dice.choice(rig.names("agent"))
            journal = rig.plane.folder / "hosts" / f"{name}.journal"
            before, deadline = journal.stat().st_size, time.monotonic() + 10
            while journal.stat().st_size <= before and time.monotonic() < deadline:
                time.sleep(0.0005)
            process = rig.plane.processes[name].popen
            assert process is not None
            process.kill()
            process.wait()
            kills += 1
            # The next start writes the journal anew, without what was done.
            effects += _reboots(journal)
            rig.plane.restart(name)
            time.sleep(rig.dice.uniform(1.5, 2.5))
    finally:
        stop.set()
        asking.join()
    _until_idle(rig.api, [server["id"] for server in servers])
    for name in rig.names("agent"):
        effects += _reboots(rig.plane.folder / "hosts" / f"{name}.journal")
    wrong, done, failed = [], 0, 0
    for server in servers:
        _, body = rig.api.call("GET", f"/compute/v2.1/servers/{server['id']}/os-instance-actions")
        asked = [action for action in body["instanceActions"] if action["action"] == "reboot"]
        errors = sum(action["message"] is not None for action in asked)
        done, failed = done + len(asked) - errors, failed + errors
        if not len(asked) - errors <= effects[server["id"]] <= len(asked):
            wrong.append(f"{server['id']}: {len(asked)} asked, {errors} failed, {effects[server['id']]} done")
    assert not wrong, wrong
    total = sum(effects[server["id"]] for server in servers)
    return f"{kills} kills; reboots: {done} succeeded, {failed} ended in an error, {total} effects"


def _reboot(api: Api, servers: Sequence[str], stop: threading.Event) -> None:
    while not stop.is_set():
        for uuid in servers:
            try:
                api.call("POST", f"/compute/v2.1/servers/{uuid}/action", {"reboot": {"type": "SOFT"}})
            except OSError:
                time.sleep(0.1)
        time.sleep(0.05)


def _reboots(journal: Path) -> "Counter[str]":
    done = (json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1])
    return Counter(one["instance_uuid"] for one in done if one["operation"] in ("reboot", "hard_reboot"))


def _until_idle(api: Api, servers: Sequence[str]) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(server["OS-EXT-STS:task_state"] for uuid, server in api.servers().items() if uuid in servers):
        assert time.monotonic() < deadline, "an action has no end"
        time.sleep(0.2)


# ---- running ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """One kind of fault. `quiet` ones bring their own load."""

    run: Callable[[Rig], str]
    rounds: int
    quiet: bool = False


SCENARIOS: Final = (
    Scenario(kill_anything, 200),
    Scenario(pause_builders, 30),
    Scenario(pause_agents, 30),
    Scenario(stop_broker, 10),
    Scenario(alarm_broker, 10),
    Scenario(break_ways, 30),
    Scenario(cut_commits, 40),
    Scenario(kill_agents_at_their_effects, 30, quiet=True),
)


@dataclass(frozen=True)
class Seen:
    """A row of the table."""

    fault: str
    rounds: str
    load: str
    found: str


def soak(database: str, scenarios: Sequence[Scenario], share: float, seed: int) -> Iterator[Seen]:
    """Run scenarios one after another on one deployment, and yield what was seen of each."""
    with tempfile.TemporaryDirectory(prefix="cellway-soak-") as temporary:
        folder = Path(temporary)
        with separate(database, folder, builders=2, limits=LIMITS, agents=AGENTS, proxies=True) as plane:
            api = Api(plane.front.url, plane.clouds)
            api.sign_in()
            journal = Journal()
            for scenario in scenarios:
                rig = Rig(
                    plane, api, random.Random(f"{seed} {scenario.run.__name__}"), max(1, round(scenario.rounds * share))
                )
                yield _run(rig, scenario, journal)


def _run(rig: Rig, scenario: Scenario, journal: Journal) -> Seen:
    accepted, deleted = len(journal.accepted), len(journal.deleted)
    refused, unanswered = journal.refused.total(), journal.unanswered
    print(f"{scenario.run.__name__}: {rig.rounds} rounds", file=sys.stderr, flush=True)
    if scenario.quiet:
        done = scenario.run(rig)
    else:
        with Load(rig.api, rig.dice, journal, most_servers=MOST_SERVERS):
            done = scenario.run(rig)
    healed = time.monotonic()
    said = settle(rig.api, journal, rig.plane.databases["api"], SETTLE_SECONDS)
    seconds = time.monotonic() - healed
    guests = {host: guests_of(rig.plane.folder / "hosts" / f"{host}.journal") for host in rig.plane.hosts}
    after = Aftermath(rig.plane.databases, guests, journal, said)
    broken = [f"{holds.__name__}: {what}" for holds in INVARIANTS for what in holds(after)]
    if not set(journal.refused) <= {404, 503}:
        broken.append(f"answers {dict(journal.refused)}")
    states = Counter(server["status"] for server in said.values())
    load = (
        "reboots of 8 servers"
        if scenario.quiet
        else f"{len(journal.accepted) - accepted} creates and {len(journal.deleted) - deleted} deletes accepted, "
        f"{journal.refused.total() - refused} refused, {journal.unanswered - unanswered} unanswered"
    )
    end = f"settled after {seconds:.0f} s: {states['ACTIVE']} ACTIVE, {states['ERROR']} ERROR with a fault"
    return Seen(str(scenario.run.__doc__), done, load, "; ".join(broken) or f"{end}; every invariant held")


def lines(rows: Sequence[Seen], seed: int) -> list[str]:
    """Return the rows as lines of a table in Markdown."""
    return [f"| {row.fault} | {row.rounds}; seed {seed} | {row.load} | {row.found} |" for row in rows]


def main() -> int:
    """Run the scenarios, print each row as it comes, and write the table when asked to."""
    names = {scenario.run.__name__: scenario for scenario in SCENARIOS}
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=("postgresql", "mariadb"), default="postgresql")
    parser.add_argument("--scenario", choices=names, action="append", help="only this one; may be repeated")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the usual rounds (default: 1.0)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the rows into this database's table in FILE")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", file=sys.stderr)
    rows: list[Seen] = []
    wanted = [names[name] for name in chosen.scenario] if chosen.scenario else SCENARIOS
    for row in soak(chosen.database, wanted, chosen.share, chosen.seed):
        rows.append(row)
        print(f"  {row.rounds}\n  {row.load}\n  {row.found}", flush=True)
    if chosen.write is not None:
        _write(chosen.write, chosen.database, lines(rows, chosen.seed))
    return int(any("every invariant held" not in row.found for row in rows))


def _write(page: Path, database: str, rows: Sequence[str]) -> None:
    """Put the rows into the database's table, each instead of the one about the same fault."""
    text = page.read_text()
    begin, end = f"<!-- {database} -->\n", f"<!-- end of {database} -->"
    before, _, rest = text.partition(begin)
    table, _, after = rest.partition(end)
    kept = {_fault(line): line for line in (*table.splitlines()[2:], *rows)}
    order = [str(scenario.run.__doc__) for scenario in SCENARIOS]
    made = "".join(f"{kept[fault]}\n" for fault in order if fault in kept)
    page.write_text(f"{before}{begin}{HEAD}{made}{end}{after}")


def _fault(line: str) -> str:
    return line.removeprefix("| ").partition(" | ")[0]


if __name__ == "__main__":
    sys.exit(main())
