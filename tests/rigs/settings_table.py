"""docs/settings.md from the one table of settings: `python3 tests/rigs/settings_table.py > docs/settings.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import fjmcp_broker  # noqa: E402

HEAD = """# Settings

Each is a key in `broker.toml`, a flag (`--forgejo-url`) and an environment variable (`FJMCP_BROKER_FORGEJO_URL`); a flag counts before the
environment, that before the file, that before the default. A setting that is one piece of text can be read from a file: `NAME_file`. Secrets (*s*)
may stand in `secrets_file`. What SIGHUP (`systemctl reload`) takes over while running is marked *r*. Durations are `90s`, `15m`, `1h`,
`30d`; sizes `64KiB`, `4MiB`; lists are TOML lists, or separated by commas in flags and environment.

| key | default | | |
|---|---|---|---|
"""


def table():
    """The document's text."""
    rows = []
    for setting in fjmcp_broker.SETTINGS:
        default = (
            "required"
            if setting.default is fjmcp_broker.REQUIRED
            else f"`{setting.default}`"
            if setting.default
            else ""
        )
        default = "off" if setting.default is False else default
        marks = " ".join(mark for mark, is_set in (("s", setting.secret), ("r", setting.reload)) if is_set)
        rows.append(
            f"| `{setting.name}` | {default} | {setting.help.replace('|', chr(92) + '|')} | {marks} |\n"
        )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
