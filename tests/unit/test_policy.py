"""The policy: its defaults, an operator's overrides, and its agreement with oslo.policy's own Enforcer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oslo_config import cfg
from oslo_policy import policy as oslo

from cellway.context import RequestContext
from cellway.errors import Forbidden, Invalid
from cellway.http.policy import OWN, RULES, Policy, Target
from cellway.ids import ProjectId, RequestId, UserId

SHOW = "os_compute_api:servers:show"


def caller(user: str, project: str, *roles: str) -> RequestContext:
    """Return the context of a user with `roles` in a project."""
    return RequestContext(
        user_id=UserId(user), project_id=ProjectId(project), request_id=RequestId("req-1"), roles=frozenset(roles)
    )


# As Keystone's tokens have it: admin implies member, member implies reader. A bare admin must do as well.
PERSONAS = {
    "admin": caller("root", "operations", "admin"),
    "member": caller("alice", "blue", "member", "reader"),
    "reader": caller("bob", "blue", "reader"),
    "other": caller("carol", "green", "member", "reader"),
    "nobody": caller("dave", "blue"),
    "shouting": caller("erin", "blue", "ADMIN"),
    "manager": caller("frank", "blue", "manager", "Member"),
    "service": caller("neutron", "services", "service"),
}
ALICES = Target(project_id="blue", user_id="alice")
TARGETS = [ALICES, OWN, Target(project_id="blue"), Target(user_id="alice"), Target(project_id="", user_id="")]


def write(folder: Path, rules: Mapping[str, str]) -> Path:
    """Write a policy file with `rules`."""
    path = folder / "policy.yaml"
    path.write_text(json.dumps(rules), encoding="utf-8")
    return path


def enforcer(path: Path) -> oslo.Enforcer:
    """Return oslo's own judge of our defaults, with the overrides in `path`."""
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[], default_config_dirs=[])
    judge = oslo.Enforcer(conf, policy_file=str(path))
    judge.register_defaults([oslo.RuleDefault(name, check) for name, check in RULES.items()])
    judge.load_rules()
    return judge


def judged(judge: oslo.Enforcer, rule: str, ctx: RequestContext, target: Target) -> bool:
    """Return oslo's verdict. What is None in our target is the caller's own, which oslo is told outright."""
    credentials = {
        "user_id": ctx.user_id,
        "project_id": ctx.project_id,
        "roles": sorted(ctx.roles),
        "is_admin": "admin" in {role.lower() for role in ctx.roles},
    }
    project = ctx.project_id if target.project_id is None else target.project_id
    user = ctx.user_id if target.user_id is None else target.user_id
    return bool(judge.authorize(rule, {"project_id": project, "user_id": user}, credentials))


def disagreements(path: Path, rules: Iterable[str] = RULES) -> list[tuple[str, str, Target]]:
    """Return where our verdict and oslo's differ."""
    ours, theirs = Policy.load(path), enforcer(path)
    return [
        (rule, name, target)
        for rule in rules
        for name, ctx in PERSONAS.items()
        for target in TARGETS
        if ours.allows(rule, ctx, target) is not judged(theirs, rule, ctx, target)
    ]


def refusal(path: Path) -> tuple[str, str]:
    """Return the code and the sentence with which a policy file is refused."""
    with pytest.raises(Invalid) as refused:
        Policy.load(path)
    return refused.value.code, refused.value.message


# ---- Defaults


def test_every_default_rule_gives_every_persona_the_verdict_of_oslos_enforcer(tmp_path: Path) -> None:
    """For each rule, persona and target, the compiled rule and oslo's Enforcer agree."""
    assert disagreements(write(tmp_path, {})) == []


def test_only_what_is_meant_for_anyone_is_open_to_a_user_without_a_role() -> None:
    """Without a role one may see flavors, zones and limits, and keep one's own keypairs; nothing else."""
    policy = Policy.load(None)
    open_rules = {rule for rule in RULES if policy.allows(rule, PERSONAS["nobody"])}
    assert open_rules - {"admin_or_owner"} == {
        "os_compute_api:flavors",
        "os_compute_api:limits",
        "os_compute_api:os-quota-sets:defaults",
        "os_compute_api:os-availability-zone:list",
        "os_compute_api:os-keypairs:index",
        "os_compute_api:os-keypairs:show",
        "os_compute_api:os-keypairs:create",
        "os_compute_api:os-keypairs:delete",
    }


def test_a_reader_reads_the_project_and_changes_nothing() -> None:
    """A reader passes the reading rules of the project and none that writes; a member passes both."""
    policy = Policy.load(None)
    for rule in (
        SHOW,
        "os_compute_api:servers:detail",
        "os_compute_api:ips:index",
        "os_compute_api:os-server-tags:show",
    ):
        assert policy.allows(rule, PERSONAS["reader"], ALICES)
        assert policy.allows(rule, PERSONAS["member"], ALICES)
        assert not policy.allows(rule, PERSONAS["other"], ALICES)
    for rule in (
        "os_compute_api:servers:delete",
        "os_compute_api:servers:create",
        "os_compute_api:server-metadata:update",
    ):
        assert not policy.allows(rule, PERSONAS["reader"], ALICES)
        assert policy.allows(rule, PERSONAS["member"], ALICES)
        assert not policy.allows(rule, PERSONAS["other"], ALICES)


def test_an_administrator_passes_every_rule_but_those_of_other_personas() -> None:
    """The admin role opens every rule of the API, in any project and in any case of letters."""
    policy = Policy.load(None)
    for rule in RULES:
        if rule.startswith("os_compute_api:"):
            assert policy.allows(rule, PERSONAS["admin"], ALICES)
            assert policy.allows(rule, PERSONAS["shouting"], ALICES)


def test_a_keypair_belongs_to_its_user_and_not_to_the_project() -> None:
    """Another user of the same project may not see a keypair, and its owner may."""
    policy = Policy.load(None)
    assert policy.allows("os_compute_api:os-keypairs:show", PERSONAS["member"], ALICES)
    assert not policy.allows("os_compute_api:os-keypairs:show", PERSONAS["reader"], ALICES)
    assert policy.allows("os_compute_api:os-keypairs:show", PERSONAS["admin"], ALICES)


def test_a_denial_names_the_rule() -> None:
    """`require` raises Forbidden with the rule's name, and nothing when the rule allows."""
    policy = Policy.load(None)
    policy.require(SHOW, PERSONAS["reader"], ALICES)
    with pytest.raises(Forbidden) as denied:
        policy.require(SHOW, PERSONAS["other"], ALICES)
    assert denied.value.code == "policy.denied"
    assert denied.value.message == "Policy doesn't allow os_compute_api:servers:show to be performed."
    assert denied.value.fields == {"rule": SHOW}


# ---- Overrides


def test_overrides_aliases_and_changed_personas_agree_with_oslo(tmp_path: Path) -> None:
    """A file that redefines personas, adds aliases and uses every kind of check is judged as oslo judges it."""
    overrides = {
        "operator": "role:manager or rule:context_is_admin",
        "project_reader_api": "(role:reader or role:auditor) and project_id:%(project_id)s",
        SHOW: "rule:operator or (rule:project_reader_api and not user_id:bob)",
        "os_compute_api:servers:delete": "!",
        "os_compute_api:servers:start": "@",
        "os_compute_api:servers:stop": "",
        "os_compute_api:servers:reboot": "is_admin:True or 'blue':%(project_id)s",
        "os_compute_api:servers:update": "rule:admin_or_owner and not is_admin:False",
        "os_compute_api:servers:create": "role:%(user_id)s or 'blue/alice':%(project_id)s/%(user_id)s",
        "os_compute_api:limits": "not role:member and not (role:reader or role:service)",
    }
    path = write(tmp_path, overrides)
    assert disagreements(path) == []
    policy = Policy.load(path)
    assert policy.allows(SHOW, PERSONAS["manager"], Target(project_id="green", user_id="carol"))
    assert not policy.allows(SHOW, PERSONAS["reader"], ALICES)
    assert not policy.allows("os_compute_api:servers:delete", PERSONAS["admin"], ALICES)


def test_is_admin_follows_a_changed_definition_of_the_administrator(tmp_path: Path) -> None:
    """`is_admin` asks `context_is_admin` about the caller, whatever the target."""
    path = write(tmp_path, {"context_is_admin": "role:manager and project_id:%(project_id)s", SHOW: "is_admin:true"})
    policy = Policy.load(path)
    assert policy.allows(SHOW, PERSONAS["manager"], Target(project_id="green"))
    assert not policy.allows(SHOW, PERSONAS["admin"], Target(project_id="green"))


def test_rules_of_the_incumbent_that_are_not_served_carry_over_without_effect(tmp_path: Path) -> None:
    """A file written for the incumbent loads, whole groups and single rules of its that we lack included."""
    path = write(
        tmp_path,
        {
            "default": "rule:admin_or_owner",
            "migrators": "role:migrator",
            "os_compute_api:os-migrate-server:migrate_live": "rule:migrators or rule:context_is_admin",
            "os_compute_api:os-shelve:shelve": "rule:project_manager_or_admin",
            "os_compute_api:servers:create:attach_network": "@",
            "os_compute_api:servers:migrations:index:host": "!",
            "compute:servers:resize:cross_cell": "rule:context_is_admin",
            "network:attach_external_network": "rule:service_or_admin",
        },
    )
    policy, defaults = Policy.load(path), Policy.load(None)
    for rule in RULES:
        for ctx in PERSONAS.values():
            assert policy.allows(rule, ctx, ALICES) is defaults.allows(rule, ctx, ALICES)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_a_file_without_rules_changes_nothing(tmp_path: Path, text: str) -> None:
    """An empty file, or one of comments, leaves the defaults."""
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    assert not Policy.load(path).allows(SHOW, PERSONAS["other"], ALICES)


# ---- Refusals


@pytest.mark.parametrize(
    ("rules", "code", "sentence"),
    [
        ({"os_compute_api:servers:shwo": "@"}, "unknown_rule", f"did you mean {SHOW}?"),
        ({"contextisadmin": "role:root"}, "unknown_rule", "did you mean context_is_admin?"),
        ({SHOW: "rule:context_is_admn"}, "unknown_rule", "did you mean context_is_admin?"),
        ({SHOW: "rule:a", "a": "rule:b", "b": "not rule:a"}, "cyclic", "a -> b -> a"),
        ({"context_is_admin": "is_admin:True"}, "cyclic", "context_is_admin -> context_is_admin"),
        ({SHOW: "role:admin or"}, "unparsable", "cannot understand 'role:admin or'"),
        ({SHOW: "role:admin role:member"}, "unparsable", "cannot understand"),
        ({SHOW: "(role:admin"}, "unparsable", "cannot understand"),
        ({SHOW: " "}, "unparsable", "cannot understand"),
        ({SHOW: "and"}, "unparsable", "cannot understand"),
        ({SHOW: "not admin"}, "unparsable", "'admin' is not a check"),
        ({SHOW: '"role:admin"'}, "unparsable", "is not a check"),
        ({SHOW: "not 'a':'b'"}, "unparsable", "is not a check"),
        ({SHOW: "http://policy.example/check"}, "unknown_check", "'http' is not a kind of check"),
        ({SHOW: "role:admin and system_scope:all"}, "unknown_check", "'system_scope' is not a kind of check"),
        ({SHOW: "'blue:%(project_id)s"}, "unknown_check", "is not a kind of check"),
        ({SHOW: "{[]}:x"}, "unknown_check", "is not a kind of check"),
        ({SHOW: "project_id:%(tenant_id)s"}, "unknown_target", "'%(tenant_id)s': a target has"),
        ({SHOW: "user_id:%s"}, "unknown_target", "'%s': a target has"),
        ({SHOW: "role:%(project_id)d"}, "unknown_target", "a target has"),
        ({SHOW: "not " * 5000 + "@"}, "too_deep", "nested too deeply"),
    ],
)
def test_a_rule_that_would_not_do_what_it_says_is_refused(
    tmp_path: Path, rules: Mapping[str, str], code: str, sentence: str
) -> None:
    """Each mistake in a rule is refused with the file, the code and a sentence that names it."""
    path = write(tmp_path, rules)
    got, message = refusal(path)
    assert got == f"policy.{code}"
    assert message.startswith(f"{path}: ")
    assert sentence in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML at line"),
        ("a: @", "is not valid YAML at line 1"),
        ("a: b\n---\nc: d", "is not valid YAML at line 2"),
        ("a: \x00", "is not valid YAML"),
        ("- a", "must be a map"),
        ("role:admin", "must be a map"),
        (f"# deny\n{SHOW}: !", 'line 2 is not of the form "NAME": "CHECK"'),
        (f"{SHOW}:", "line 1 is not of the form"),
        (f"{SHOW}: true", "line 1 is not of the form"),
        (f"{SHOW}: [[role:admin]]", "line 1 is not of the form"),
        ("1: role:admin", "line 1 is not of the form"),
        (f"{SHOW}: '@'\n{SHOW}: '!'", "stands there twice"),
        ("[\n" * 1500, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_a_map_of_strings_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    """Broken YAML, a bare `!` (which YAML reads as empty, and so as everybody), doubles and other types are refused."""
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    assert sentence in refusal(path)[1]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file and one that is not UTF-8 are refused with a sentence."""
    assert refusal(tmp_path / "absent.yaml")[0] == "policy.unreadable"
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"a: \xff\xfe")
    assert refusal(path)[0] == "policy.malformed"


# ---- Any rule at all

CHECKS = st.sampled_from(
    [
        "@",
        "!",
        "role:admin",
        "role:Member",
        "role:reader",
        "role:%(user_id)s",
        "rule:project_member_or_admin",
        "rule:alias",
        "project_id:%(project_id)s",
        "project_id:blue",
        "user_id:%(user_id)s",
        "user_id:%(project_id)s",
        "is_admin:True",
        "is_admin:False",
        "'blue':%(project_id)s",
        "True:%(user_id)s",
    ]
)
GAPS = st.sampled_from([" ", "  ", "\n\t"])


def joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return larger expressions made of `parts`, with parentheses or without, in any case and spacing."""
    operators = st.sampled_from(["and", "or", "AND", "Or"])
    return st.one_of(
        st.builds("{1}{0}{2}{0}{3}".format, GAPS, parts, operators, parts),
        st.builds("{1}{0}{2}".format, GAPS, st.sampled_from(["not", "NOT"]), parts),
        st.builds("({})".format, parts),
        st.builds("({0}{1}{0})".format, GAPS, parts),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give all examples of a property one folder."""
    return tmp_path_factory.mktemp("policy")


@settings(deadline=None)
@given(text=st.recursive(CHECKS, joined, max_leaves=12), alias=st.recursive(CHECKS, joined, max_leaves=3))
def test_any_well_formed_rule_is_judged_as_oslo_judges_it(folder: Path, text: str, alias: str) -> None:
    """Whatever the grammar allows is accepted, and means the same as to oslo, precedence included."""
    path = write(folder, {SHOW: text, "alias": alias.replace("rule:alias", "@"), "os_compute_api:limits": "rule:alias"})
    assert disagreements(path, [SHOW]) == []


WORDS = st.one_of(
    CHECKS,
    st.sampled_from(
        ["and", "or", "not", "(", ")", "(role:admin", "role:reader)", "((", "))", "admin", "'@'", "a:", ":"]
    ),
)


@settings(deadline=None)
@given(words=st.lists(WORDS, max_size=8))
def test_any_words_at_all_are_judged_as_oslo_judges_them_or_refused(folder: Path, words: list[str]) -> None:
    """A rule of arbitrary words is either refused at load or means the same as to oslo."""
    path = write(folder, {SHOW: " ".join(words), "alias": "role:reader", "os_compute_api:limits": "rule:alias"})
    try:
        Policy.load(path)
        code = None
    except Invalid as refused:
        code = refused.code
    assert code in {None, "policy.unparsable", "policy.unknown_check"}
    assert code is not None or disagreements(path, [SHOW]) == []
