"""The import contracts of `pyproject.toml` hold, and each of them refuses what it is there to refuse."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cellway"
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]

OFFENCES = {
    "imports only point down": ("errors", "import cellway.config"),
    "a shell adapts one outside and never imports another": ("http", "import cellway.identity"),
    "nouns are independent of each other: what needs several is a verb": ("hosts", "import cellway.flavors"),
    "wires know nothing of each other": ("db", "import cellway.rpc"),
    "agents hold no database credentials": ("agent", "import cellway.instances"),
    "one broker library in one file": ("cells", "import aio_pika"),
    "starlette only in the shells that speak HTTP": ("compute", "import starlette"),
}


def lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Check the contracts against the package `cellway` in `folder`."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            *("--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_contracts_hold() -> None:
    """Imports go where the design lets them, and nowhere else."""
    result = lint(SOURCE.parent)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_new_module_has_to_be_given_a_layer(tmp_path: Path) -> None:
    """A module that no layer names is refused."""
    _skeleton(tmp_path)
    (tmp_path / "cellway" / "somewhere.py").touch()
    assert "somewhere" in lint(tmp_path).stdout


@pytest.fixture(scope="module")
def offended(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what the linter says of a package that breaks every contract once."""
    folder = tmp_path_factory.mktemp("offended")
    _skeleton(folder)
    for module, statement in OFFENCES.values():
        package = folder / "cellway" / module / "__init__.py"
        (package if package.exists() else folder / "cellway" / f"{module}.py").write_text(statement + "\n")
    result = lint(folder)
    return result.stdout + result.stderr


@pytest.mark.parametrize("contract", CONTRACTS)
def test_each_contract_refuses_its_offence(contract: str, offended: str) -> None:
    """A contract that could never be broken would guard nothing."""
    assert f"{contract} BROKEN" in offended, offended


def _skeleton(folder: Path) -> None:
    """Make a package `cellway` with the real one's top-level modules, all empty."""
    package = folder / "cellway"
    package.mkdir()
    (package / "__init__.py").touch()
    for path in SOURCE.iterdir():
        if path.suffix == ".py":
            (package / path.name).touch()
        elif (path / "__init__.py").exists():
            (package / path.name).mkdir()
            (package / path.name / "__init__.py").touch()
