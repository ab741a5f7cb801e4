"""What has one place, or none: engines, the words' imports, docstrings, addresses that belong in no file.

Imports between our own modules and of starlette and the broker's library are `test_layers.py`'s.
"""

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cellway"
WORDS = ("ids", "errors", "config", "context", "outside")
ENGINE_MAKERS = {"create_engine", "create_async_engine", "engine_from_config"}


@pytest.fixture(scope="module")
def tracked() -> dict[str, str]:
    """Return every text file that is, or would be, committed, by its path from the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = {}
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                files[name] = content.decode()
    return files


def test_engines_are_born_in_one_file() -> None:
    """Only `db/engines.py` opens connections to databases."""
    places = {str(path.relative_to(SOURCE)) for path, tree in _modules(SOURCE) if ENGINE_MAKERS & set(_names(tree))}
    assert places == {"db/engines.py"}


@pytest.mark.parametrize("word", WORDS)
def test_the_bottom_layer_needs_the_standard_library_and_msgspec_alone(word: str) -> None:
    """Whoever imports a word pulls in nothing else."""
    allowed = sys.stdlib_module_names | {"cellway", "msgspec"}
    assert {name.partition(".")[0] for name in _imports(_parse(SOURCE / f"{word}.py"))} <= allowed


def test_every_module_says_what_it_is_for() -> None:
    """Every module of the source and of the tests has a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for folder in (SOURCE, ROOT / "tests")
        for path, tree in _modules(folder)
        if not ast.get_docstring(tree)
    ]
    assert silent == []


def test_every_test_states_its_property() -> None:
    """Every test function has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}::{node.name}"
        for path, tree in _modules(ROOT / "tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_file_names_a_package_registry(tracked: dict[str, str]) -> None:
    """The lists install from whatever registry the reader's own pip is set to."""
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("deb.debian", "org"), ("registry.npmjs", "org")]
    assert _mentions(tracked, "|".join(re.escape(".".join(host)) for host in hosts)) == []


def test_no_file_names_a_place_on_this_machine(tracked: dict[str, str]) -> None:
    """Neither the checkout's own path, nor the folder around it, nor the home folder stands in any file."""
    places = {ROOT, ROOT.parent, Path.home()} - {Path(tempfile.gettempdir()), Path("/")}
    assert _mentions(tracked, "|".join(rf"(?<![\w./]){re.escape(str(place))}(?![\w@-])" for place in places)) == []


def _mentions(files: dict[str, str], pattern: str) -> list[str]:
    found = re.compile(pattern, re.IGNORECASE)
    return [
        f"{name}:{number}"
        for name, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def _modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, _parse(path)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)):
                yield module
