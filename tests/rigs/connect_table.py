"""The table of docs/connect.md from the one table of assistants.

`python3 tests/rigs/connect_table.py` writes it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import fjmcp_broker  # noqa: E402

DOCUMENT = ROOT / "docs/connect.md"
HEAD = "| | how | seen to work |\n|---|---|---|\n"
EXAMPLE = "https://mcp.example.org/mcp"


def table() -> str:
    """The table's text: what the home page shows, for an example's address."""
    rows = (
        f"| **{name}** | {steps.replace('{url}', EXAMPLE)} | {seen or 'not yet'} |\n"
        for name, steps, seen in fjmcp_broker.ASSISTANTS
    )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(HEAD)
    DOCUMENT.write_text(before + table() + "\n" + rest.partition("\n\n")[2])
