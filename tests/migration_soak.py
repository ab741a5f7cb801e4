"""`make soak-migration`: move 3 × 20,000 limits out of cells that disagree, under kills, and write down what was seen.

It does what `tests/acceptance/test_migration_kill.py` does, for longer and on any database, and puts a row for each
rule into the table of docs/migration-runs.md. It needs the named database on this machine.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from cellway.quota.moving import Rule
from tests.acceptance.migration_trial import BLOCKED, CELLS, torment, trial

RULES = (Rule.KEEP, Rule.LOWEST, Rule.HIGHEST)
HEAD = "| Rule | Rows | What happened | Time | Seen |\n|---|---|---|---|---|\n"
BATCH = 100
"""Smaller than the default, so that more of the kills hit something unfinished."""


def soak(kind: str, rule: Rule, rows: int, kills: int, seed: int) -> tuple[str, bool]:
    """Run once, and return the row of the table and whether all was as it has to be."""
    with (
        tempfile.TemporaryDirectory(prefix="cellway-soak-") as folder,
        trial(kind, Path(folder), rule=rule, seed=seed, rows_per_cell=rows) as running,
    ):
        began = time.monotonic()
        last = torment(running, kills=kills, seconds=0.4, batch=BATCH, changes=5)
        seconds = time.monotonic() - began
        result, expected, left = running.result(), running.expected(), running.left()
        wrong = sum(result.get(key) != value for key, value in expected.items()) + len(result.keys() - expected.keys())
        held = not wrong and not running.lost and left == BLOCKED * len(CELLS) and set(running.said) == {3}
        verdict = (
            f"{len(expected)} limits, every one as the rule says; none stood nowhere in {running.looks} looks"
            if held
            else f"{wrong} wrong, {len(running.lost)} lost, {left} rows left, exit {dict(running.said)}"
        )
        return (
            f"| `{rule}` | {running.rows} | {2 * kills} kills, {running.at_work} of them at work; {running.changes} "
            f"sets and deletions over the API; seed {seed} | {seconds:.0f} s, the last run {last:.1f} s "
            f"| {verdict}; {left} rows without an owner left and listed |",
            held,
        )


def main() -> int:
    """Run for every rule, print each row as it comes, and write them when asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.migration_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=("sqlite", "postgresql", "mariadb"), default="sqlite")
    parser.add_argument("--rule", choices=RULES, type=Rule, action="append", help="only this one; may be repeated")
    parser.add_argument("--rows", type=int, default=20_000, help="in each cell (default: 20000)")
    parser.add_argument("--kills", type=int, default=12, metavar="N", help="of two runs at once (default: 12)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the rows into this database's table in FILE")
    chosen = parser.parse_args()
    rows, all_held = [], True
    for rule in chosen.rule or RULES:
        row, held = soak(chosen.database, rule, chosen.rows, chosen.kills, chosen.seed)
        rows.append(row)
        all_held &= held
        print(row, flush=True)
    if chosen.write is not None:
        _write(chosen.write, chosen.database, rows)
    return int(not all_held)


def _write(page: Path, database: str, rows: list[str]) -> None:
    before, begin, rest = page.read_text().partition(f"<!-- {database} -->\n")
    _, end, after = rest.partition(f"<!-- end of {database} -->")
    page.write_text(before + begin + HEAD + "".join(f"{row}\n" for row in rows) + end + after)


if __name__ == "__main__":
    sys.exit(main())
