"""The `cellway` command as tests run it: in this process, to its end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, decoded."""
        return json.loads(self.out)


Run = Callable[..., Result]
"""Runs a command with these arguments."""
