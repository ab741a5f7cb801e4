"""Who may do what: the default rules, and an operator's `policy.yaml` over them.

The rules bear the incumbent's names and defaults, so an existing `policy.yaml` carries over. They are written in
oslo.policy's language: oslo.policy reads each one into a tree of checks, which is walked once, at load, into plain
functions. What oslo would log and then deny, or silently allow, is refused at load. Loaded by `app.py`, asked by the
handlers through `Call`. Nothing here knows a route, a database or a token. Seed: none of its own.
"""

import ast
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

# Not the public `oslo_policy.policy`: that costs five times the start-up time, and its parser denies what it cannot
# read instead of saying so. `tests/unit/test_policy.py` compares the outcome with oslo's own Enforcer.
from oslo_policy import _checks, _parser

from cellway.context import RequestContext
from cellway.errors import Forbidden, Invalid

_ADMIN = "rule:context_is_admin"
_MEMBER = "rule:project_member_or_admin"
_READER = "rule:project_reader_or_admin"
_OWNER = "rule:context_is_admin or user_id:%(user_id)s"
_ANYONE = "@"

RULES: Mapping[str, str] = {
    # The personas, which the other rules refer to. The last six are used only by operators' own rules.
    "context_is_admin": "role:admin",
    "project_member_api": "role:member and project_id:%(project_id)s",
    "project_reader_api": "role:reader and project_id:%(project_id)s",
    "project_member_or_admin": "rule:project_member_api or rule:context_is_admin",
    "project_reader_or_admin": "rule:project_reader_api or rule:context_is_admin",
    "project_manager_api": "role:manager and project_id:%(project_id)s",
    "project_manager_or_admin": "rule:project_manager_api or rule:context_is_admin",
    "service_api": "role:service",
    "service_or_admin": "rule:service_api or rule:context_is_admin",
    "admin_api": "is_admin:True",
    "admin_or_owner": "is_admin:True or project_id:%(project_id)s",
    # Servers
    "os_compute_api:servers:index": _READER,
    "os_compute_api:servers:index:get_all_tenants": _ADMIN,
    "os_compute_api:servers:detail": _READER,
    "os_compute_api:servers:detail:get_all_tenants": _ADMIN,
    "os_compute_api:servers:allow_all_filters": _ADMIN,
    "os_compute_api:servers:show": _READER,
    "os_compute_api:servers:show:flavor-extra-specs": _READER,
    "os_compute_api:servers:show:host_status": _ADMIN,
    "os_compute_api:servers:show:host_status:unknown-only": _ADMIN,
    "os_compute_api:os-extended-server-attributes": _ADMIN,
    "os_compute_api:servers:create": _MEMBER,
    "os_compute_api:servers:create:forced_host": _ADMIN,
    "os_compute_api:servers:create:zero_disk_flavor": _ADMIN,
    "os_compute_api:servers:update": _MEMBER,
    "os_compute_api:servers:delete": _MEMBER,
    "os_compute_api:servers:start": _MEMBER,
    "os_compute_api:servers:stop": _MEMBER,
    "os_compute_api:servers:reboot": _MEMBER,
    "os_compute_api:os-pause-server:pause": _MEMBER,
    "os_compute_api:os-pause-server:unpause": _MEMBER,
    "os_compute_api:os-suspend-server:suspend": _MEMBER,
    "os_compute_api:os-suspend-server:resume": _MEMBER,
    "os_compute_api:os-lock-server:lock": _MEMBER,
    "os_compute_api:os-lock-server:unlock": _MEMBER,
    "os_compute_api:os-lock-server:unlock:unlock_override": _ADMIN,
    "os_compute_api:os-admin-actions:reset_state": _ADMIN,
    "os_compute_api:os-instance-actions:list": _READER,
    "os_compute_api:os-instance-actions:show": _READER,
    "os_compute_api:os-instance-actions:events": _ADMIN,
    "os_compute_api:os-instance-actions:events:details": _ADMIN,
    "os_compute_api:server-metadata:index": _READER,
    "os_compute_api:server-metadata:show": _READER,
    "os_compute_api:server-metadata:create": _MEMBER,
    "os_compute_api:server-metadata:update": _MEMBER,
    "os_compute_api:server-metadata:update_all": _MEMBER,
    "os_compute_api:server-metadata:delete": _MEMBER,
    "os_compute_api:os-server-tags:index": _READER,
    "os_compute_api:os-server-tags:show": _READER,
    "os_compute_api:os-server-tags:update": _MEMBER,
    "os_compute_api:os-server-tags:update_all": _MEMBER,
    "os_compute_api:os-server-tags:delete": _MEMBER,
    "os_compute_api:os-server-tags:delete_all": _MEMBER,
    "os_compute_api:ips:index": _READER,
    "os_compute_api:ips:show": _READER,
    # Flavors. The incumbent dropped the first rule; it stands here so that every route has one.
    "os_compute_api:flavors": _ANYONE,
    "os_compute_api:os-flavor-manage:create": _ADMIN,
    "os_compute_api:os-flavor-manage:update": _ADMIN,
    "os_compute_api:os-flavor-manage:delete": _ADMIN,
    "os_compute_api:os-flavor-access": _ADMIN,
    "os_compute_api:os-flavor-access:add_tenant_access": _ADMIN,
    "os_compute_api:os-flavor-access:remove_tenant_access": _ADMIN,
    "os_compute_api:os-flavor-extra-specs:index": _READER,
    "os_compute_api:os-flavor-extra-specs:show": _READER,
    "os_compute_api:os-flavor-extra-specs:create": _ADMIN,
    "os_compute_api:os-flavor-extra-specs:update": _ADMIN,
    "os_compute_api:os-flavor-extra-specs:delete": _ADMIN,
    # Keypairs
    "os_compute_api:os-keypairs:index": _OWNER,
    "os_compute_api:os-keypairs:show": _OWNER,
    "os_compute_api:os-keypairs:create": _OWNER,
    "os_compute_api:os-keypairs:delete": _OWNER,
    # The fleet
    "os_compute_api:os-services:list": _ADMIN,
    "os_compute_api:os-services:update": _ADMIN,
    "os_compute_api:os-services:delete": _ADMIN,
    "os_compute_api:os-hypervisors:list": _ADMIN,
    "os_compute_api:os-hypervisors:list-detail": _ADMIN,
    "os_compute_api:os-hypervisors:show": _ADMIN,
    "os_compute_api:os-hypervisors:statistics": _ADMIN,
    "os_compute_api:os-hypervisors:uptime": _ADMIN,
    "os_compute_api:os-hypervisors:search": _ADMIN,
    "os_compute_api:os-hypervisors:servers": _ADMIN,
    "os_compute_api:os-aggregates:index": _ADMIN,
    "os_compute_api:os-aggregates:show": _ADMIN,
    "os_compute_api:os-aggregates:create": _ADMIN,
    "os_compute_api:os-aggregates:update": _ADMIN,
    "os_compute_api:os-aggregates:delete": _ADMIN,
    "os_compute_api:os-aggregates:add_host": _ADMIN,
    "os_compute_api:os-aggregates:remove_host": _ADMIN,
    "os_compute_api:os-aggregates:set_metadata": _ADMIN,
    "os_compute_api:os-availability-zone:list": _ANYONE,
    "os_compute_api:os-availability-zone:detail": _ADMIN,
    # Server groups
    "os_compute_api:os-server-groups:index": _READER,
    "os_compute_api:os-server-groups:index:all_projects": _ADMIN,
    "os_compute_api:os-server-groups:show": _READER,
    "os_compute_api:os-server-groups:create": _MEMBER,
    "os_compute_api:os-server-groups:delete": _MEMBER,
    # Limits and usage
    "os_compute_api:limits": _ANYONE,
    "os_compute_api:limits:other_project": _ADMIN,
    "os_compute_api:os-simple-tenant-usage:list": _ADMIN,
    "os_compute_api:os-simple-tenant-usage:show": _READER,
    # Quotas
    "os_compute_api:os-quota-sets:show": _READER,
    "os_compute_api:os-quota-sets:defaults": _ANYONE,
    "os_compute_api:os-quota-sets:detail": _READER,
    "os_compute_api:os-quota-sets:update": _ADMIN,
    "os_compute_api:os-quota-sets:delete": _ADMIN,
    "os_compute_api:os-quota-class-sets:show": _ADMIN,
    "os_compute_api:os-quota-class-sets:update": _ADMIN,
}
"""Every rule that may be asked for, and its default."""

_NOT_SERVED = frozenset(
    """
    extensions os-admin-actions:inject_network_info os-admin-password
    os-assisted-volume-snapshots os-attach-interfaces os-baremetal-nodes os-console-auth-tokens os-console-output
    os-create-backup os-deferred-delete os-evacuate os-floating-ip-pools os-floating-ips os-hosts
    os-instance-usage-audit-log os-migrate-server os-migrations os-multinic os-networks
    os-remote-consoles os-rescue os-security-groups os-server-diagnostics os-server-external-events
    os-server-password os-server-shares os-shelve os-tenant-networks
    os-unrescue os-volumes os-volumes-attachments servers:confirm_resize servers:create:attach_network
    servers:create:attach_volume servers:create:trusted_certs servers:create_image servers:migrations servers:rebuild
    servers:resize servers:revert_resize servers:trigger_crash_dump
    compute:aggregates:images compute:server:topology compute:servers:create:requested_destination
    compute:servers:resize:cross_cell default network:attach_external_network
    """.split()
)
"""The incumbent's rules for what Cellway does not serve, singly or by group: an override of one changes nothing."""


class Target(NamedTuple):
    """Whose object is acted on. What is None is the caller's own."""

    project_id: str | None = None
    user_id: str | None = None


OWN = Target()
"""The caller's own project and user."""

Check = Callable[[RequestContext, Target], bool]


class Policy:
    """The rules in force. Made by `load`, and never changed."""

    __slots__ = ("_checks",)

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks

    @classmethod
    def load(cls, path: Path | None) -> "Policy":
        """Read the overrides in `path`, if any, and make every rule ready.

        Raises: Invalid for a file that cannot be read or is not a map of strings, and for a rule with an unknown name
        (with the nearest), that cannot be parsed, uses an unknown kind of check, or refers to itself or to nothing.
        """
        try:
            overrides = _read(path) if path is not None else {}
            loader = _Loader({**RULES, **overrides}, f"{path}: ")
            checks = {name: loader.rule(name) for name in loader.texts}
        except RecursionError as error:
            raise Invalid("policy.too_deep", f"{path}: the rules are nested too deeply") from error
        for name in overrides:
            if name not in RULES and name not in loader.referred and not _is_not_served(name):
                loader.refuse("unknown_rule", f"there is no rule {name}{_nearest(name, RULES)}")
        return cls({name: checks[name] for name in RULES})

    def allows(self, rule: str, ctx: RequestContext, target: Target = OWN) -> bool:
        """Tell whether the caller may do what `rule`, one of `RULES`, guards to `target`."""
        return self._checks[rule](ctx, target)

    def require(self, rule: str, ctx: RequestContext, target: Target = OWN) -> None:
        """Refuse what `allows` does not.

        Raises: Forbidden.
        """
        if not self._checks[rule](ctx, target):
            raise Forbidden("policy.denied", f"Policy doesn't allow {rule} to be performed.", rule=rule)


def _read(path: Path) -> dict[str, str]:
    """Return a file's rules. Composed, not loaded: loading drops duplicates and reads a bare `!` as an empty value."""
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise Invalid("policy.unreadable", f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise Invalid("policy.malformed", f"{path} is not valid YAML{where}") from error
    if document is None or document.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(document, yaml.MappingNode):
        raise Invalid("policy.malformed", f"{path} must be a map from names of rules to checks")
    rules: dict[str, str] = {}
    for key, value in document.value:
        if any(node.tag != "tag:yaml.org,2002:str" for node in (key, value)):
            line = key.start_mark.line + 1
            raise Invalid(
                "policy.malformed", f'{path}: line {line} is not of the form "NAME": "CHECK", quotes included'
            )
        if key.value in rules:
            raise Invalid("policy.duplicate", f"{path}: the rule {key.value} stands there twice", rule=key.value)
        rules[key.value] = value.value
    return rules


def _is_not_served(name: str) -> bool:
    parts = name.removeprefix("os_compute_api:").split(":")
    return any(":".join(parts[:length]) in _NOT_SERVED for length in range(1, len(parts) + 1))


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Loader:
    """Turns the texts of all rules into functions, each once, and notes which are referred to."""

    def __init__(self, texts: Mapping[str, str], source: str) -> None:
        self.texts = texts
        self.referred: set[str] = set()
        self._source = source
        self._checks: dict[str, Check] = {}
        self._open: list[str] = []

    def rule(self, name: str) -> Check:
        """Return the function of the rule `name`."""
        if name not in self._checks:
            if name in self._open:
                self.refuse("cyclic", f"a rule refers to itself: {' -> '.join([*self._open, name])}")
            self._open.append(name)
            self._checks[name] = self._compile(self._parse(self.texts[name]))
            self._open.pop()
        return self._checks[name]

    def refuse(self, code: str, reason: str) -> NoReturn:
        """Say what is wrong, and where."""
        if self._open:
            reason = f"rule {self._open[-1]}: {reason}"
        raise Invalid(f"policy.{code}", self._source + reason)

    def _parse(self, text: str) -> _checks.BaseCheck:
        if not text:
            return _checks.TrueCheck()
        state = _parser.ParseState()
        for token in self._tokens(text):
            state.shift(token)
        try:
            return state.result
        except ValueError:
            self.refuse("unparsable", f"cannot understand {text!r}")

    def _tokens(self, text: str) -> Iterator[_parser.Token[str] | _parser.CheckToken]:
        """Split a rule as oslo does: parentheses are grammar only at the ends of a word."""
        keywords = {"and": _parser.AndToken, "or": _parser.OrToken, "not": _parser.NotToken}
        for word in text.split():
            inner = word.lstrip("(")
            core = inner.rstrip(")")
            yield from [_parser.LeftParamToken("(")] * (len(word) - len(inner))
            if core.lower() in keywords:
                yield keywords[core.lower()](core)
            elif core:
                yield _parser.CheckToken(self._leaf(core))
            yield from [_parser.RightParamToken(")")] * (len(inner) - len(core))

    def _leaf(self, word: str) -> _checks.BaseCheck:
        if word == "@":
            return _checks.TrueCheck()
        if word == "!":
            return _checks.FalseCheck()
        kind, colon, match = word.partition(":")
        if not colon or (word[0] in "'\"" and word[0] == word[-1]):
            self.refuse("unparsable", f"{word!r} is not a check: write KIND:VALUE, @ or !")
        return {"rule": _checks.RuleCheck, "role": _checks.RoleCheck}.get(kind, _checks.GenericCheck)(kind, match)

    def _compile(self, check: _checks.BaseCheck) -> Check:
        match check:
            case _checks.TrueCheck():
                return lambda ctx, target: True
            case _checks.FalseCheck():
                return lambda ctx, target: False
            case _checks.NotCheck():
                inner = self._compile(check.rule)
                return lambda ctx, target: not inner(ctx, target)
            case _checks.AndCheck():
                return _all([self._compile(part) for part in check.rules])
            case _checks.OrCheck():
                return _any([self._compile(part) for part in check.rules])
            case _checks.RuleCheck():
                if check.match not in self.texts:
                    self.refuse("unknown_rule", f"there is no rule {check.match}{_nearest(check.match, self.texts)}")
                self.referred.add(check.match)
                return self.rule(check.match)
            case _checks.RoleCheck():
                role = self._value(check.match)
                return lambda ctx, target: role(ctx, target).lower() in _lowered(ctx.roles)
            case _checks.GenericCheck():
                return self._credential(check.kind, check.match)
            case _:
                raise AssertionError(f"the parser made a {type(check).__name__}")

    def _credential(self, kind: str, match: str) -> Check:
        """Compare what is known of the caller, or a constant, with a value."""
        if kind == "is_admin":
            admin, expected = self.rule("context_is_admin"), match.lower() == "true"
            return lambda ctx, target: admin(ctx, OWN) is expected
        value = self._value(match)
        if kind == "project_id":
            return lambda ctx, target: ctx.project_id == value(ctx, target)
        if kind == "user_id":
            return lambda ctx, target: ctx.user_id == value(ctx, target)
        try:
            constant = str(ast.literal_eval(kind))
        except (ValueError, SyntaxError, TypeError):
            known = "role, rule, project_id, user_id, is_admin or a quoted constant"
            self.refuse("unknown_check", f"{kind!r} is not a kind of check; use {known}")
        return lambda ctx, target: constant == value(ctx, target)

    def _value(self, match: str) -> Callable[[RequestContext, Target], str]:
        """Return how to make the right-hand side of a check."""
        if match == "%(project_id)s":
            return _project_of
        if match == "%(user_id)s":
            return _user_of
        if "%" in match.replace("%(project_id)s", "").replace("%(user_id)s", ""):
            self.refuse("unknown_target", f"{match!r}: a target has %(project_id)s and %(user_id)s, nothing else")
        if "%" not in match:
            return lambda ctx, target: match
        return lambda ctx, target: match % {"project_id": _project_of(ctx, target), "user_id": _user_of(ctx, target)}


def _project_of(ctx: RequestContext, target: Target) -> str:
    return ctx.project_id if target.project_id is None else target.project_id


def _user_of(ctx: RequestContext, target: Target) -> str:
    return ctx.user_id if target.user_id is None else target.user_id


@lru_cache(maxsize=1024)
def _lowered(roles: frozenset[str]) -> frozenset[str]:
    return frozenset(map(str.lower, roles))


def _all(checks: Sequence[Check]) -> Check:
    def check(ctx: RequestContext, target: Target) -> bool:
        for part in checks:  # noqa: SIM110 - a generator would take twice as long
            if not part(ctx, target):
                return False
        return True

    return check


def _any(checks: Sequence[Check]) -> Check:
    def check(ctx: RequestContext, target: Target) -> bool:
        for part in checks:  # noqa: SIM110 - a generator would take twice as long
            if part(ctx, target):
                return True
        return False

    return check
