"""A door for programs outside the suite, which start this file: it is rigs/stdio_child.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent / "rigs" / "stdio_child.py"), run_name="__main__")
