"""docs/settings.md from the one table of settings.

`python3 tests/rigs/settings_table.py > docs/settings.md`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import fjmcp_broker  # noqa: E402

HEAD = """# Settings

Each is a key in `broker.toml`, a flag (`--forgejo-url`) and an environment variable
(`FJMCP_BROKER_FORGEJO_URL`); a flag counts before the environment, that before the file, that before the
default. A setting that is one piece of text can be read from a file: `NAME_file`. Secrets (*s*) may stand in
`secrets_file`. What SIGHUP (`systemctl reload`) takes over while running is marked *r*. Durations are `90s`,
`15m`, `1h`, `30d`; sizes `64KiB`, `4MiB`; lists are TOML lists, or separated by commas in flags and
environment; switches are `true` or `false` (in flags and environment also `on`, `off`).

Without `--config` the file is what `FJMCP_BROKER_CONFIG` names, else `./broker.toml` if it and its folder
belong to the caller and nobody else can write there, else `/etc/fjmcp-broker/broker.toml` if that is there.

| key | default | | |
|---|---|---|---|
"""


def table() -> str:
    """The document's text."""
    rows = []
    for setting in fjmcp_broker.SETTINGS:
        default = f"`{setting.default}`" if setting.default else ""
        if setting.default is fjmcp_broker.REQUIRED:
            default = "required"
        elif setting.kind == "switch":
            default = "on" if setting.default else "off"
        marks = " ".join(mark for mark, is_set in (("s", setting.secret), ("r", setting.reload)) if is_set)
        rows.append(
            f"| `{setting.name}` | {default} | {setting.help.replace('|', chr(92) + '|')} | {marks} |\n"
        )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
