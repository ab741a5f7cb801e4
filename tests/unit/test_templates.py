"""References and templates in stored URLs: what they become, and what is said when they cannot."""

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellway.cells.registry import Templates
from cellway.config import Secret
from cellway.errors import Invalid

OWN = Secret("mysql+pymysql://cellway:s%40cret@db.Example:3306/nova_main?charset=utf8mb4#part")
QUEUE = Secret("rabbit://guest:rabbits@mq:5672/vhost")
TEMPLATES = Templates(database=OWN, transport=QUEUE, environ={"CELL1": "sqlite:////cell1?{x}", "EMPTY": ""})


def resolve(text: str, kind: str = "database", templates: Templates = TEMPLATES) -> str:
    """Resolve a stored URL."""
    return templates.resolve(Secret(text), kind).reveal()


def refusal(text: str, kind: str = "database", templates: Templates = TEMPLATES) -> str:
    """Return what is said about a stored URL that cannot be resolved."""
    with pytest.raises(Invalid) as refused:
        resolve(text, kind, templates)
    assert text not in refused.value.message
    return refused.value.message


def test_a_plain_url_stays_as_it_is() -> None:
    """Character by character."""
    for text in ("sqlite:////x", "postgresql://u:%25s}}@h/d?x=y", ""):
        assert resolve(text) == text


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scheme", "mysql+pymysql"),
        ("username", "cellway"),
        ("password", "s%40cret"),
        ("hostname", "db.Example"),
        ("port", "3306"),
        ("path", "nova_main"),
        ("query", "charset=utf8mb4"),
        ("fragment", "part"),
    ],
)
def test_every_part_of_the_own_url_can_be_used(part: str, value: str) -> None:
    """As it is written there: nothing is decoded, nothing changes case."""
    assert resolve(f"x://{{{part}}}/y") == f"x://{value}/y"


def test_the_kind_says_whose_parts_are_used() -> None:
    """A queue's template is filled from the queue's URL."""
    template = "{scheme}://{username}:{password}@{hostname}:{port}/{path}"
    assert resolve(template, "transport") == QUEUE.reveal()
    assert resolve(template + "?{query}#{fragment}") == OWN.reveal()


def test_a_part_may_come_twice() -> None:
    """And beside plain text."""
    assert resolve("{username}_{username}:{password}") == "cellway_cellway:s%40cret"


def test_an_address_in_brackets_keeps_them() -> None:
    """So that a port can follow it."""
    templates = Templates(database=Secret("postgresql://u@[fe80::1]:5432/d"))
    assert resolve("postgresql://u@{hostname}:{port}/c", templates=templates) == "postgresql://u@[fe80::1]:5432/c"


def test_an_absent_query_is_empty() -> None:
    """A template with a place for it works on any URL."""
    assert resolve("{scheme}://h/x?{query}", "transport") == "rabbit://h/x?"


@pytest.mark.parametrize("part", ["username", "password", "hostname", "port"])
def test_a_part_that_the_own_url_lacks_is_told(part: str) -> None:
    """By its name: it never becomes an empty text or `None`."""
    templates = Templates(database=Secret("sqlite:////x"))
    assert f"its database URL needs {{{part}}}" in refusal(f"x://hunter2{{{part}}}", templates=templates)


def test_a_process_without_an_own_url_fills_nothing() -> None:
    """It says which part it would need."""
    assert "needs {password}" in refusal("x://u:{password}@h/", "transport", Templates())


@pytest.mark.parametrize("text", ["{", "{}", "{hunter2}", "{password", "{ password}", "{Password}", "a{b", "{{{x"])
def test_a_brace_that_begins_no_part_is_told(text: str) -> None:
    """It is not silently used as it is; what is in it is not shown, for it may be of a password."""
    said = refusal(f"x://u:{text}@h/")
    assert "{password}" in said
    assert "hunter2" not in said


def test_a_doubled_brace_is_a_brace() -> None:
    """Wherever it stands, and a closing one is itself."""
    assert resolve("{{") == "{"
    assert resolve("{{}") == "{}"
    assert resolve("{{password}") == "{password}"
    assert resolve("{{{{{username}}") == "{{cellway}"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_stored_password_survives(password: str) -> None:
    """With its braces doubled it comes out as it was, whatever it holds."""
    url = f"postgresql://u:{password}@h/d"
    assert resolve(url.replace("{", "{{")) == url


@given(st.text(min_size=1))
def test_any_own_password_survives(password: str) -> None:
    """What is put in is not looked at again: `%`, `{{` and `{password}` in it stay."""
    try:
        own = quote(password, safe="{}%$&'()*+,;=")
    except UnicodeEncodeError:
        return
    templates = Templates(database=Secret(f"postgresql://u:{own}@h:1/d"))
    assert resolve("x://{username}:{password}@{hostname}", templates=templates) == f"x://u:{own}@h"


@pytest.mark.parametrize("own", ["x://u:p#ss@h/", "x://u:hunter2/ss@h:1/", "x://u:p@[hunter2/", "x://u:p@h:99999/"])
def test_an_own_url_that_cannot_be_taken_apart_is_told(own: str) -> None:
    """Without quoting any of it, as the parser's own message does."""
    said = refusal("{scheme}://x", templates=Templates(database=Secret(own)))
    assert "this process's own database URL" in said
    assert not any(part in said for part in ("hunter2", "p#ss", "'p'", "99999"))


def test_a_url_may_be_in_the_environment() -> None:
    """It is then used as it is, without templates."""
    assert resolve("env:CELL1") == "sqlite:////cell1?{x}"
    assert resolve("env:EMPTY") == ""


def test_a_missing_variable_is_told() -> None:
    """By its name."""
    assert refusal("env:CELL2") == "its database URL is in $CELL2, which is not set"
    assert "transport URL" in refusal("env:CELL2", "transport")


def test_a_url_may_be_in_a_file(tmp_path: Path) -> None:
    """Without the white space around it, and read anew each time."""
    path = tmp_path / "secret"
    for url in ("postgresql://u:%{{@h/d", "postgresql://u:new@h/d"):
        path.write_text(f"{url} \n")
        assert resolve(f"file:{path}") == url


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """By its path: missing, a folder, not text, or a name that no file can have."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"hunter2\xff")
    for path in (tmp_path / "missing", tmp_path, binary):
        assert str(path) in refusal(f"file:{path}").replace("file:", "")
    assert "cannot be read" in refusal("file:a\0b")


def test_what_comes_out_is_a_secret() -> None:
    """It can be logged without harm."""
    assert repr(TEMPLATES.resolve(Secret("{password}"), "database")) == "***"
    assert "cret" not in repr(TEMPLATES)
