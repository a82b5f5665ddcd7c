"""Who may use which tool, as a function of rules and caller.

The tables of the file, the rule that decides, and doubtful rules.
"""

import fnmatch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fjmcp_broker
from fjmcp_broker import (
    MAX_NAME,
    NO_RIGHTS,
    ConfigurationError,
    Rights,
    ToolRule,
    covers,
    load_settings,
    matches_any,
    never_reached,
    rights_of,
    rights_sentence,
    rule_warnings,
)

NEEDED = {
    "public_url": "https://mcp.example.org",
    "forgejo_url": "https://forge.example.org",
    "forgejo_oauth_client_id": "id",
    "forgejo_oauth_client_secret": "canary-secret",
}
TOOLS = ("get_repo", "list_repos", "create_repo", "delete_repo", "delete_branch")


def rules(*tables):
    return fjmcp_broker.KINDS["tool_rules"](list(tables))


def warnings(*tables, tools=TOOLS):
    return rule_warnings(rules(*tables), tools)


# -- the tables of the file


def test_a_rule_of_the_file_has_every_key(tmp_path):
    (tmp_path / "b.toml").write_text(
        """
[[tool_rules]]
users = ["Alice", "bob-*", "id:42"]
groups = ["Org:Writers", "staff"]
clients = ["https://claude.ai/*", "My-Client"]
allow = ["get_*", "Create_*"]
deny = ["get_secret"]
access = "read"
resources = true

[[tool_rules]]
"""
    )
    first, last = load_settings(NEEDED, {}, str(tmp_path / "b.toml")).tool_rules
    assert first == ToolRule(
        ("alice", "bob-*", "id:42"),
        ("org:writers", "staff"),
        ("https://claude.ai/*", "My-Client"),
        Rights(("get_*", "Create_*"), ("get_secret",), True, True, False),
    )
    assert last == ToolRule() and last.rights.admits("anything") and last.rights.prompts


@pytest.mark.parametrize(
    "table, said",
    [
        ({"user": ["a"]}, "rule 2: unknown key 'user'; did you mean 'users'?"),
        ({"name": "x"}, "rule 2: unknown key 'name'; known are users, groups"),
        ({"users": []}, "rule 2: users = []: names nobody"),
        ({"users": [""]}, "names nobody"),
        ({"users": [3]}, "rule 2: users = [3]: must be text"),
        ({"users": 3}, "must be a list of text"),
        ({"users": ["id:"]}, "'id:' is not a login, or `id:` and a number"),
        ({"users": ["id:*"]}, "'id:*' is not"),
        ({"users": ["id:007"]}, "'id:007' is not"),
        ({"users": ["org:team"]}, "'org:team' is not a login"),
        ({"users": ["a@example.org"]}, "is not a login"),
        (
            {"groups": ["org:*"]},
            "rule 2: groups = ['org:*']: 'org:*' is not `org` or `org:team`; it takes no wildcards",
        ),
        ({"groups": ["a:b:c"]}, "is not `org`"),
        (
            {"clients": ["Claude Code"]},
            "rule 2: clients = ['Claude Code']: 'Claude Code' is not a client_id; a name does not count",
        ),
        ({"clients": []}, "names nobody"),
        ({"allow": {"a": 1}}, "rule 2: allow"),
        ({"deny": [["x"]]}, "rule 2: deny"),
        ({"access": "write"}, "rule 2: access = 'write': must be \"read\""),
        ({"access": True}, 'must be "read"'),
        ({"resources": "no"}, "rule 2: resources = 'no': must be true or false"),
        ({"prompts": 1}, "rule 2: prompts = 1: must be true or false"),
    ],
)
def test_what_is_wrong_with_a_rule_is_said_with_its_number_and_key(table, said):
    with pytest.raises(ValueError) as error:
        rules({}, table)
    assert said in str(error.value)


def test_everything_that_is_wrong_with_the_rules_is_said_at_once(tmp_path):
    (tmp_path / "b.toml").write_text(
        '[[tool_rules]]\nusers = []\nacces = "read"\n[[tool_rules]]\n[[tool_rules]]\nprompts = '
        '3\n[[clients]]\nclient_secret = "canary-secret"'
    )
    with pytest.raises(ConfigurationError) as error:
        load_settings(NEEDED, {}, str(tmp_path / "b.toml"))
    text = str(error.value)
    for part in (
        "b.toml: tool_rules: rule 1: unknown key 'acces'",
        "rule 1: users",
        "rule 3: prompts",
        "clients",
    ):
        assert part in text
    assert "canary-secret" not in text


@pytest.mark.parametrize("value", ["x", 3, ["x"], {"users": ["a"]}])
def test_what_is_no_list_of_tables_is_refused(value):
    with pytest.raises(ValueError, match=r"\[\[tool_rules\]\]"):
        fjmcp_broker.KINDS["tool_rules"](value)


def test_rules_come_from_the_file_only():
    for flags, environment in (({"tool_rules": "x"}, {}), ({}, {"FJMCP_BROKER_TOOL_RULES": "x"})):
        with pytest.raises(ConfigurationError, match="in the configuration file only"):
            load_settings({**NEEDED, **flags}, environment)


def test_reload_takes_rules_over():
    running, newer = load_settings(NEEDED, {}), load_settings(NEEDED, {})
    newer.tool_rules = rules({"access": "read"})
    assert running.reload(newer) == [] and running.tool_rules[0].rights.reads_only


# -- the rule that decides


def decided(*tables, sub="7", login="Alice", groups=("acme", "acme:writers"), client="c-1"):
    return rights_of(rules(*tables), sub, login, groups, client)


def test_without_a_rule_there_is_nothing_to_decide():
    assert decided() is None


@pytest.mark.parametrize(
    "conditions, matches",
    [
        ({}, True),
        ({"users": ["alice"]}, True),
        ({"users": ["ALI?E"]}, True),
        ({"users": ["lice", "alic"]}, False),
        ({"users": ["id:7"]}, True),
        ({"users": ["id:77", "7", "id:1"]}, False),
        ({"groups": ["ACME:Writers"]}, True),
        ({"groups": ["acm", "acme:writer", "writers"]}, False),
        ({"clients": ["c-1"]}, True),
        ({"clients": ["C-1", "c", "-1"]}, False),
        ({"clients": ["c-?"]}, True),
        ({"users": ["alice"], "groups": ["acme"], "clients": ["c-*"]}, True),
        ({"users": ["bob"], "groups": ["acme"], "clients": ["c-*"]}, False),
        ({"users": ["alice"], "groups": ["other"], "clients": ["c-*"]}, False),
        ({"users": ["alice"], "groups": ["acme"], "clients": ["d-*"]}, False),
    ],
)
def test_all_conditions_of_a_rule_must_match(conditions, matches):
    assert (decided(conditions) == Rights()) is matches
    assert matches or decided(conditions) == NO_RIGHTS


def test_a_login_that_looks_like_a_number_is_not_that_number():
    assert decided({"users": ["id:7"]}, sub="8", login="7") == NO_RIGHTS


def test_a_client_is_matched_as_a_whole():
    for client in ("https://claude.ai.evil.example/x", "xhttps://claude.ai/x", "https://claude.ai", "Claude"):
        assert decided({"clients": ["https://claude.ai/*"]}, client=client) == NO_RIGHTS
    assert decided({"clients": ["https://claude.ai/*"]}, client="https://claude.ai/oauth/x") == Rights()


def test_the_first_rule_that_matches_decides():
    assert decided({"users": ["bob"]}, {"access": "read"}, {}).reads_only
    assert not decided({"users": ["alice"]}, {"access": "read"}, {}).reads_only


@pytest.mark.parametrize(
    "table, names",
    [
        ({}, set(TOOLS)),
        ({"deny": ["delete_*"]}, {"get_repo", "list_repos", "create_repo"}),
        ({"allow": ["*_repo"]}, {"get_repo", "create_repo", "delete_repo"}),
        ({"allow": ["*_repo"], "deny": ["delete_*"]}, {"get_repo", "create_repo"}),
        ({"allow": ["GET_*", "list_repo"]}, set()),
        ({"allow": []}, set()),
        ({"deny": ["*"], "allow": ["*"]}, set()),
    ],
)
def test_allow_and_deny_choose_names_with_case_and_deny_wins(table, names):
    rights = decided(table)
    assert {name for name in TOOLS if rights.admits(name)} == names


def test_resources_and_prompts_go_with_allow_if_nothing_is_said():
    for table, left in (
        ({}, (True, True)),
        ({"deny": ["x"], "access": "read"}, (True, True)),
        ({"allow": ["x"]}, (False, False)),
        ({"allow": ["x"], "prompts": True}, (False, True)),
        ({"resources": False}, (False, True)),
    ):
        rights = decided(table)
        assert (rights.resources, rights.prompts) == left


def test_whom_no_rule_matches_may_use_nothing():
    assert decided({"users": ["bob"]}) == NO_RIGHTS
    assert not any(map(NO_RIGHTS.admits, TOOLS)) and not NO_RIGHTS.resources and not NO_RIGHTS.prompts


def test_a_name_that_is_longer_than_what_is_kept_of_a_list_is_nobodys():
    assert Rights().admits("x" * MAX_NAME) and not Rights().admits("x" * (MAX_NAME + 1))


globs = st.text("ab*?[]!-", max_size=6)
names = st.text("ab-!]", max_size=6)
logins = st.sampled_from(["alice", "bob", "Bob", "carol"])
groups = st.lists(st.sampled_from(["acme", "acme:writers", "Acme:Readers", "other"]), max_size=3)
clients = st.sampled_from(["c-1", "c-2", "https://claude.ai/x", "https://claude.ai.evil.example/x"])
tables = st.fixed_dictionaries(
    {},
    optional={
        "users": st.lists(
            st.sampled_from(["alice", "b*", "*", "id:7", "id:8", "?arol"]), min_size=1, max_size=2
        ),
        "groups": st.lists(
            st.sampled_from(["acme", "acme:writers", "acme:readers", "other"]), min_size=1, max_size=2
        ),
        "clients": st.lists(
            st.sampled_from(["c-*", "c-1", "https://*", "https://claude.ai*", "*"]), min_size=1, max_size=2
        ),
        "allow": st.lists(st.sampled_from(["*", "get_*", "*_repo", "delete_repo"]), max_size=2),
        "deny": st.lists(st.sampled_from(["*", "delete_*", "get_repo"]), max_size=2),
        "access": st.just("read"),
        "resources": st.booleans(),
        "prompts": st.booleans(),
    },
)
callers = st.fixed_dictionaries(
    {"sub": st.sampled_from(["7", "8", "9"]), "login": logins, "groups": groups, "client": clients}
)


def matching(table, caller):
    """Whether a rule is for a caller, spelled out anew."""
    theirs = [group.lower() for group in caller["groups"]]
    return all(
        any(
            {
                "users": entry == f"id:{caller['sub']}"
                or fnmatch.fnmatchcase(caller["login"].lower(), entry),
                "groups": entry in theirs,
                "clients": fnmatch.fnmatchcase(caller["client"], entry),
            }[key]
            for entry in table[key]
        )
        for key in ("users", "groups", "clients")
        if key in table
    )


@given(st.lists(tables, min_size=1, max_size=4), callers, st.sampled_from(TOOLS))
def test_a_tool_is_admitted_by_the_first_rule_that_matches_and_by_nothing_else(written, caller, tool):
    rights = decided(*written, **caller)
    first = next((table for table in written if matching(table, caller)), None)
    allowed = first is not None and (
        not any(fnmatch.fnmatchcase(tool, glob) for glob in first.get("deny", ()))
        and ("allow" not in first or any(fnmatch.fnmatchcase(tool, glob) for glob in first["allow"]))
    )
    assert rights.admits(tool) is allowed
    if first is not None:
        assert rights.reads_only is ("access" in first)
        assert rights.resources is first.get("resources", "allow" not in first)


# -- what is left, in words


@pytest.mark.parametrize(
    "table, sentence",
    [
        ({}, "All tools."),
        ({"access": "read"}, "Tools that only read."),
        ({"deny": ["delete_*", "x"]}, "All tools, but none named delete_*, x."),
        ({"allow": ["get_*"]}, "All tools named get_*; no resources and no prompts."),
        (
            {"allow": ["get_*"], "deny": ["get_x"], "prompts": True, "access": "read"},
            "Tools that only read named get_*, but none named get_x; no resources.",
        ),
        ({"allow": []}, "No tools; no resources and no prompts."),
    ],
)
def test_what_rules_leave_is_said_in_a_sentence(table, sentence):
    assert rights_sentence(decided(table)) == sentence


def test_without_rules_nothing_is_said():
    assert rights_sentence(None) == ""
    assert rights_sentence(NO_RIGHTS) == "No tools; no resources and no prompts."


# -- doubtful rules

TWO_MAY_DELETE = ({"users": ["id:1", "id:2"]}, {"deny": ["delete_*"]})
STAFF_WRITES = ({"groups": ["acme:staff"]}, {"access": "read"})
KNOWN_WRITE = ({"clients": ["https://claude.ai/*", "c-1"]}, {"access": "read"})


@pytest.mark.parametrize("written", [(), ({},), TWO_MAY_DELETE, STAFF_WRITES, KNOWN_WRITE])
def test_rules_that_mean_what_they_say_have_no_warning(written):
    assert warnings(*written) == [] and warnings(*written, tools=()) == []


@pytest.mark.parametrize(
    "written, last, takers",
    [
        (({}, {"users": ["alice"]}), 2, "rule 1"),
        (({"access": "read"}, {}), 2, "rule 1"),
        (({"users": ["*"]}, {"users": ["id:1"], "clients": ["x"]}), 2, "rule 1"),
        (({"users": ["a*"]}, {"users": ["alice", "a?*"]}), 2, "rule 1"),
        (
            ({"users": ["Alice"]}, {"users": ["bob"]}, {"users": ["alice", "bob"], "groups": ["x"]}),
            3,
            "rule 1 and rule 2",
        ),
        (({"groups": ["acme"]}, {"groups": ["ACME:Team"]}), 2, "rule 1"),
        (
            ({"clients": ["https://claude.ai/*"]}, {"clients": ["https://claude.ai/x"], "users": ["a"]}),
            2,
            "rule 1",
        ),
        (({"clients": ["*"]}, {}), 2, "rule 1"),
    ],
)
def test_a_rule_that_can_never_decide_is_named(written, last, takers):
    found = warnings(*written)
    assert any(f"rule {last} can never decide: {takers} before it" in text for text in found)


@pytest.mark.parametrize(
    "written",
    [
        ({"users": ["alice"]}, {"users": ["alice", "bob"]}),
        ({"users": ["alice"], "clients": ["c"]}, {"users": ["alice"]}),
        ({"users": ["i*"]}, {"users": ["id:1"]}),
        ({"groups": ["acme:team"]}, {"groups": ["acme"]}),
        ({"groups": ["acme"]}, {"groups": ["acmes"]}),
        ({"users": ["a?"]}, {"users": ["a*"]}),
        ({"users": ["a*b]"]}, {"users": ["a[cb]"]}),
        ({"groups": ["x"]}, {"users": ["x"]}),
    ],
)
def test_a_rule_that_may_decide_is_not_called_unreachable(written):
    assert not any("never decide" in text for text in warnings(*written))


@given(st.lists(tables, min_size=2, max_size=4), callers)
def test_a_rule_that_is_called_unreachable_never_decides(written, caller):
    parsed = rules(*written)
    # Forgejo reports a member of a team as one of its organization.
    theirs = {group for name in caller["groups"] for group in (name, name.partition(":")[0])}
    who = (caller["sub"], caller["login"], theirs, caller["client"])
    for number, rule in enumerate(parsed):
        if never_reached(rule, parsed[:number]) and rule.is_for(*who):
            assert any(earlier.is_for(*who) for earlier in parsed[:number])


@given(globs, globs, names)
@example("a*]", "a[b]", "ab")
def test_a_glob_that_covers_another_matches_all_that_it_does(wide, narrow, name):
    if covers(wide, narrow) and matches_any(name, [narrow]):
        assert matches_any(name, [wide])


def test_a_glob_that_matches_no_tool_is_named():
    found = warnings(
        {"allow": ["get_*", "delte_*"], "deny": ["Delete_*"], "users": ["id:1"]}, {"deny": ["nothing"]}
    )
    assert [text.partition(" matches")[0] for text in found] == [
        "tool_rules: rule 1: allow: 'delte_*'",
        "tool_rules: rule 1: deny: 'Delete_*'",
        "tool_rules: rule 2: deny: 'nothing'",
    ]
    assert warnings({"allow": ["delte_*"]}, tools=()) == []


@pytest.mark.parametrize(
    "written",
    [
        ({"groups": ["trainees"], "access": "read"}, {}),
        ({"groups": ["trainees"], "deny": ["delete_*"]}, {}),
        ({"groups": ["trainees"], "allow": ["get_*"]}, {}),
        ({"groups": ["trainees"], "prompts": False}, {}),
        ({"users": ["alice"], "access": "read"}, {}),
        ({"users": ["id:1", "alice"], "access": "read"}, {"users": ["*"]}),
        ({"groups": ["acme:trainees"], "access": "read"}, {"groups": ["acme"]}),
        ({"groups": ["t"], "access": "read", "clients": ["c"]}, {"clients": ["c", "d"]}),
        ({"groups": ["t"], "allow": []}, {"access": "read"}),
    ],
)
def test_rights_taken_by_group_or_login_before_a_wider_rule_are_named(written):
    for tools in (TOOLS, ()):
        found = warnings(*written, tools=tools)
        assert len(found) == 1 and "rule 1 takes rights by group or login, and rule 2 after it" in found[0]


@pytest.mark.parametrize(
    "written",
    [
        ({"users": ["id:1"], "access": "read"}, {}),
        ({"users": ["alice"]}, {"access": "read"}),
        ({"groups": ["t"], "access": "read"}, {"allow": ["get_*"], "access": "read"}),
        ({"groups": ["t"], "access": "read"}, {"users": ["carol"]}),
        ({"groups": ["t"], "access": "read", "clients": ["c"]}, {"groups": ["t"]}),
        ({"groups": ["t"], "access": "read", "clients": ["c"]}, {"clients": ["d"]}),
        ({"clients": ["c"], "access": "read"}, {}),
        ({"groups": ["t"], "deny": ["delete_*"]}, {"deny": ["*_repo", "delete_*"]}),
    ],
)
def test_rights_that_nobody_escapes_from_have_no_warning(written):
    for tools in (TOOLS, ()):
        assert not any("takes rights" in text for text in warnings(*written, tools=tools))


@pytest.mark.parametrize(
    "glob, reaches",
    [
        ("https://*", True),
        ("https://*/client.json", True),
        ("https://claude.ai*", True),
        ("https://*.claude.ai/x", True),
        ("https://claude.a?/x", True),
        ("https://[c]laude.ai/x", True),
        ("http*", True),
        ("*claude*", True),
        ("*", True),
        ("https://claude.ai/*", False),
        ("https://claude.ai/oauth/*.json", False),
        ("https://claude.ai/x", False),
        ("my-client-*", False),
        ("my-client", False),
    ],
)
def test_a_wildcard_that_reaches_into_a_clients_host_is_named(glob, reaches):
    found = warnings({"clients": [glob]})
    assert bool(found) is reaches
    assert not found or "rule 1: clients: " + repr(glob) in found[0]
