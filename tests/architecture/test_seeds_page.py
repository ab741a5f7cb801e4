"""`docs/seeds.md` tells the truth: every symbol and every test that it names exists.

Each row of its tables names, in backticks and from the repository's root, at least one `src/…/file.py:symbol` (a
method or field as `Class.name`) and one `tests/…/file.py::test`.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYMBOL = re.compile(r"`(src/[^`:]+\.py):([\w.]+)`")
TEST = re.compile(r"`(tests/[^`:]+\.py)::([\w:]+)`")


def rows() -> list[str]:
    """Return the lines of the page's tables, without their headings and rules."""
    lines = (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    rules = {number for number, line in enumerate(table) if set(line) <= set("|-: ")}
    return [line for number, line in enumerate(table) if number not in rules and number + 1 not in rules]


@pytest.fixture(scope="module")
def page() -> list[str]:
    """Return the rows of the page."""
    return rows()


def test_the_page_has_rows(page: list[str]) -> None:
    """A page without a table would pass every other test here."""
    assert page


def test_every_work_item_names_its_code_and_its_test(page: list[str]) -> None:
    """A row without a symbol or without a test is a promise without proof."""
    assert [row for row in page if not (SYMBOL.search(row) and TEST.search(row))] == []


def test_every_named_symbol_and_test_exists(page: list[str]) -> None:
    """Renaming or removing one means changing the page."""
    named = [match for row in page for pattern in (SYMBOL, TEST) for match in pattern.findall(row)]
    missing = [f"{file} {name}" for file, name in named if name.replace("::", ".") not in _defined(ROOT / file)]
    assert missing == []


def _defined(file: Path) -> set[str]:
    """Return the functions, classes and variables of a module, and the members of its classes as `Class.name`."""
    if not file.is_file():
        return set()
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(prefix + name)
                case ast.ClassDef(name=name, body=members):
                    names.add(prefix + name)
                    collect(members, f"{prefix}{name}.")
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(prefix + name)
                case ast.Assign(targets=targets):
                    names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return names
