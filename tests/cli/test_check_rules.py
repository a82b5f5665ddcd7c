"""What is said of tool rules before they are in force, by `check`."""

DOUBTFUL = """
[[tool_rules]]
groups = ["trainees"]
allow = ["get_*", "delte_*"]
[[tool_rules]]
clients = ["https://*"]
access = "read"
[[tool_rules]]
[[tool_rules]]
users = ["bob"]
"""


def test_check_warns_of_rules_that_hardly_mean_what_they_say(make_installation):
    for child in ((), ("--era", "modern", "--mode", "page=3")):
        installation = make_installation(child=child)
        installation.config.write_text(installation.config.read_text() + DOUBTFUL)
        said = installation.command("check").stdout
        for part in (
            "rule 1: allow: 'delte_*' matches no tool",
            "rule 1 takes rights by group or login, and rule 2 after it gives more",
            "rule 2: clients: 'https://*' has a wildcard that reaches into the host",
            "rule 4 can never decide: rule 3 before it takes all",
        ):
            assert part in said, (child, said)
        assert "'get_*' matches no tool" not in said


def test_check_says_nothing_of_rules_without_doubt(make_installation):
    installation = make_installation()
    installation.config.write_text(
        installation.config.read_text()
        + '[[tool_rules]]\nusers = ["id:1"]\n[[tool_rules]]\ndeny = ["create_*"]\n'
    )
    assert "tool_rules" not in installation.command("check").stdout


def test_check_reads_rules_also_when_no_child_starts(make_installation):
    installation = make_installation()
    text = installation.config.read_text().splitlines()
    text = [line for line in text if not line.startswith("forgejo_mcp_binary")]
    installation.config.write_text("\n".join(['forgejo_mcp_binary = "/nowhere"', *text, DOUBTFUL]))
    assert "rule 4 can never decide" in installation.command("check").stdout
