"""The configuration: every option from the file and the environment, and what is said about a mistake."""

import copy
import pickle
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellway.config import Config, Limits, Secret, load
from cellway.errors import Invalid

SECTIONS = get_type_hints(Config)
OPTIONS = [
    (section, option.name, get_type_hints(kind)[option.name])
    for section, kind in SECTIONS.items()
    for option in fields(kind)
]
NUMBERS = [(section, option, kind) for section, option, kind in OPTIONS if kind in (int, float)]


def write(tmp_path: Path, text: str) -> Path:
    """Write a configuration file."""
    path = tmp_path / "cellway.conf"
    path.write_text(text, encoding="utf-8")
    return path


def sample(kind: object) -> tuple[str, Any]:
    """Return a value of an option as text, and as it is when read."""
    if kind is int:
        return "7", 7
    if kind is float:
        return "7.5", 7.5
    if get_origin(kind) is Literal:
        # Not the first, which is the default.
        return get_args(kind)[-1], get_args(kind)[-1]
    return ("text", "text") if kind is str else ("text", Secret("text"))


def refusal(path: Path | None, environ: dict[str, str] | None = None) -> Invalid:
    """Return the error of loading."""
    with pytest.raises(Invalid) as refused:
        load(path, environ or {})
    return refused.value


def test_without_a_file_there_are_defaults() -> None:
    """Every section is there."""
    assert load(None, {}) == Config()
    assert load(None, {}).limits == Limits()


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    """As is a section without options."""
    assert load(write(tmp_path, ""), {}) == Config()
    assert load(write(tmp_path, "[limits]\n[api]\n# a remark\n; another\n"), {}) == Config()


@pytest.mark.parametrize(("section", "option", "kind"), OPTIONS)
def test_every_option_is_read_from_the_file(tmp_path: Path, section: str, option: str, kind: object) -> None:
    """It comes as its type, and nothing else changes."""
    text, value = sample(kind)
    config = load(write(tmp_path, f"[{section}]\n{option} = {text}\n"), {})
    assert getattr(getattr(config, section), option) == value
    assert sum(getattr(config, name) != getattr(Config(), name) for name in SECTIONS) == 1


@pytest.mark.parametrize(("section", "option", "kind"), OPTIONS)
def test_every_option_is_read_from_the_environment(tmp_path: Path, section: str, option: str, kind: object) -> None:
    """It wins over the file."""
    text, value = sample(kind)
    other = get_args(kind)[0] if get_origin(kind) is Literal else "1" if kind in (int, float) else "other"
    path = write(tmp_path, f"[{section}]\n{option} = {other}\n")
    config = load(path, {f"CELLWAY_{section}__{option}".upper(): text})
    assert getattr(getattr(config, section), option) == value


def test_the_environment_adds_to_a_section(tmp_path: Path) -> None:
    """The file's other options of that section stay."""
    config = load(write(tmp_path, "[api]\nport = 1\nlisten = ::1\n"), {"CELLWAY_API__PORT": "2"})
    assert (config.api.port, config.api.listen) == (2, "::1")


def test_other_variables_are_left_alone() -> None:
    """Only those with a section and an option are ours."""
    assert load(None, {"CELLWAY": "1", "CELLWAY_TEST_REQUIRE": "mariadb", "OTHER_API__PORT": "x"}) == Config()


def test_an_empty_url_is_none(tmp_path: Path) -> None:
    """So an environment variable may take away what the file sets."""
    path = write(tmp_path, "[api_database]\nconnection = sqlite:///x\n")
    assert load(path, {"CELLWAY_API_DATABASE__CONNECTION": ""}).api_database.connection is None


def test_section_and_option_names_ignore_case(tmp_path: Path) -> None:
    """`[DEFAULT]` is a section like any other, and one section may be written in two pieces."""
    config = load(write(tmp_path, "[API]\nPort = 1\n[api]\nlisten = ::1\n[DEFAULT]\ntransport_url = none:///\n"), {})
    assert (config.api.port, config.api.listen, config.default.transport_url) == (1, "::1", Secret("none:///"))


@pytest.mark.parametrize("text", ["%", "%%", "%(host)s", "${x}", "a#b", "p;w", "{{x}}", '"q"', "ä€", "a=b:c", "a\\nb"])
def test_a_value_is_taken_as_it_stands(tmp_path: Path, text: str) -> None:
    """Nothing is interpolated or unquoted: a `%` in a password is a `%`."""
    url = f"postgresql://u:{text}@h/d"
    config = load(write(tmp_path, f"[database]\nconnection = {url}\n"), {})
    assert config.database.connection == Secret(url)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_password_survives(tmp_path: Path, password: str) -> None:
    """From the file and from the environment alike."""
    url = f"rabbit://u:{password}@h/"
    assert load(write(tmp_path, f"[DEFAULT]\ntransport_url = {url}\n"), {}).default.transport_url == Secret(url)
    assert load(None, {"CELLWAY_DEFAULT__TRANSPORT_URL": url}).default.transport_url == Secret(url)


def test_an_unknown_option_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """The message names section, option and what was probably meant."""
    error = refusal(write(tmp_path, "[api_database]\nconection = secret\n"))
    assert error.message == "unknown option conection in [api_database]; did you mean connection?"


def test_an_unknown_section_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """From the file and from the environment alike."""
    expected = "unknown section [api_databse]; did you mean api_database?"
    assert refusal(write(tmp_path, "[api_databse]\nconnection = secret\n")).message == expected
    assert refusal(None, {"CELLWAY_API_DATABSE__CONNECTION": "secret"}).message == expected


def test_nothing_is_suggested_when_nothing_is_near(tmp_path: Path) -> None:
    """The option is still named."""
    assert refusal(write(tmp_path, "[api]\nzzz = 1\n")).message == "unknown option zzz in [api]"


@pytest.mark.parametrize(("section", "option", "kind"), NUMBERS)
def test_a_number_must_be_one(tmp_path: Path, section: str, option: str, kind: object) -> None:
    """Anything else is refused, without showing what was written there."""
    too_little = "-2" if section == "quota" else "-1"
    for text in ("hunter2", "", "1e", "nan", "inf", too_little, "1.5.1", *(["1.5"] if kind is int else [])):
        error = refusal(write(tmp_path, f"[{section}]\n{option} = {text}\n"))
        wanted = "a whole number" if kind is int else "a number"
        assert f"option {option} in [{section}] must be {wanted}" in error.message
        assert "hunter2" not in error.message


def test_a_limit_is_above_nothing(tmp_path: Path) -> None:
    """No threads at all would serve nobody; elsewhere 0 has a meaning."""
    assert "above 0" in refusal(write(tmp_path, "[limits]\ndatabase_threads = 0\n")).message
    assert load(write(tmp_path, "[agent]\nfailure_rate = 0\nlatency_seconds = 0\n"), {}).agent.latency_seconds == 0


def test_a_quota_may_be_none(tmp_path: Path) -> None:
    """-1 is unlimited, and 0 is nothing at all."""
    quota = load(write(tmp_path, "[quota]\ncores = -1\nram = 0\n"), {}).quota
    assert (quota.cores, quota.ram) == (-1, 0)


def test_one_of_several_words_is_asked_for(tmp_path: Path) -> None:
    """Another is refused with those that there are, without showing what was written."""
    error = refusal(write(tmp_path, "[quota]\nsilent_cells = hunter2\n"))
    assert error.message == "option silent_cells in [quota] must be one of refuse, ignore"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """With the path and the system's reason."""
    error = refusal(tmp_path / "missing.conf")
    assert "missing.conf: No such file" in error.message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """It is told like a missing file."""
    assert refusal(tmp_path).code == "config.unreadable"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("connection = hunter2\n", 1),
        ("[database]\nhunter2\n", 2),
        ("[database]\nconnection = a\nconnection = hunter2\n", 3),
        ("[database]\n[database]\nconnection = hunter2\n", 2),
        ("[database\nconnection = hunter2\n", 1),
        ("\n= hunter2\n", 2),
    ],
)
def test_a_malformed_file_is_told_by_its_line_number(tmp_path: Path, text: str, line: int) -> None:
    """The line itself may hold a password, so it is shown neither in the message nor in a traceback."""
    error = refusal(write(tmp_path, text))
    assert error.message.endswith(f"is not a valid configuration file at line {line}")
    assert "hunter2" not in "".join(traceback.format_exception(error))


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    """Nothing of it is shown."""
    path = tmp_path / "cellway.conf"
    path.write_bytes(b"[database]\nconnection = hunter2\xff\n")
    error = refusal(path)
    assert error.code == "config.malformed"
    assert "hunter2" not in "".join(traceback.format_exception(error))


# ---- secrets ---------------------------------------------------------------------------------------------------


@given(st.text(min_size=1))
def test_a_secret_prints_as_stars(text: str) -> None:
    """However it is printed; only `reveal` gives it."""
    secret = Secret(text)
    assert {repr(secret), str(secret), f"{secret}", f"{secret!r}", "%s" % secret, "{}".format(secret)} == {"***"}  # noqa: UP031, UP032
    assert secret.reveal() == text


def test_a_secret_is_a_value() -> None:
    """Equal to one of the same text, never to the text itself."""
    assert Secret("x") == Secret("x")
    assert hash(Secret("x")) == hash(Secret("x"))
    assert Secret("x") != Secret("y")
    assert Secret("x") != "x"
    assert [bool(Secret("")), bool(Secret("x"))] == [False, True]


def test_a_secret_is_never_serialised() -> None:
    """Not by pickling, not by copying."""
    for serialise in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never serialised"):
            serialise(Secret("hunter2"))


def test_a_configuration_shows_no_secret(tmp_path: Path) -> None:
    """Its repr may be logged."""
    secrets = [(name, key) for name, key, kind in OPTIONS if kind == Secret | None]
    text = "".join(f"[{name}]\n{key} = hunter2\n" for name, key in secrets)
    config = load(write(tmp_path, text), {})
    assert "***" in repr(config)
    assert "hunter2" not in repr(config)
