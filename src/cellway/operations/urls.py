"""Connection URLs as operators give and see them: checked without being opened, shown without passwords."""

import re
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from cellway.config import Secret
from cellway.errors import Invalid

_SCHEMES = {
    "database": {"sqlite", "postgresql", "postgresql+psycopg", "mysql", "mysql+pymysql", "mysql+mysqldb", "mariadb"},
    "transport": {"none", "memory", "rabbit", "amqp", "amqps"},
}
_REFERENCES = ("env:", "file:")
_SECRET_PARAMETER = re.compile(r"pass|secret|key|token|pwd", re.IGNORECASE)


def check_url(url: Secret, kind: str) -> Secret:
    """Return the URL of a `database` or `transport` if its form can be used.

    Raises: Invalid, without showing it.
    """
    text = url.reveal()
    scheme = text.partition(":")[0]
    if text.startswith(_REFERENCES) or "{" in scheme:
        return url
    if scheme not in _SCHEMES[kind]:
        known = ", ".join(sorted(_SCHEMES[kind]))
        raise Invalid("cell.bad_url", f"the {kind} URL has an unknown scheme; known are {known}")
    return url


def masked(url: Secret) -> str:
    """Return a URL with every password replaced by `***`: each host's, and those among the parameters."""
    text = url.reveal()
    if text.startswith(_REFERENCES) or "://" not in text:
        return text
    parts = urlsplit(text)
    hosts = []
    for host in _split_hosts(parts.netloc):
        user, at, where = host.rpartition("@")
        name, colon, _password = user.partition(":")
        hosts.append(f"{name}{':***' if colon else ''}{at}{where}")
    query = urlencode(
        [
            (name, "***" if _SECRET_PARAMETER.search(name) else value)
            for name, value in parse_qsl(parts.query, keep_blank_values=True)
        ],
        safe="*",
        quote_via=quote,
    )
    # Not `urlunsplit`, which takes the slashes of `sqlite:////path` for its own.
    rest = (f"?{query}" if query else "") + (f"#{parts.fragment}" if parts.fragment else "")
    return f"{parts.scheme}://{','.join(hosts)}{parts.path}{rest}"


def _split_hosts(netloc: str) -> list[str]:
    """Split `user:pass@host:port,user:pass@host:port`, where a password may hold a comma."""
    hosts: list[str] = []
    rest = netloc
    while rest:
        _user, at, after = rest.rpartition("@") if rest.count("@") == 1 else rest.partition("@")
        cut = after.find(",") if at else rest.find(",")
        if cut < 0:
            hosts.append(rest)
            break
        end = len(rest) - len(after) + cut if at else cut
        hosts.append(rest[:end])
        rest = rest[end + 1 :]
    return hosts
