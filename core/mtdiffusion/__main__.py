"""``python -m mtdiffusion``: what the command ``mtdiffusion`` does, wherever that is installed from."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points


def main() -> int:
    """Run the installed command, whose arguments are those of this process.

    Returns:
        Its exit status; 2 if there is no such command.
    """
    for script in entry_points(group="console_scripts", name="mtdiffusion"):
        return int(script.load()() or 0)
    how = "pip install /path/to/a/clone/of/mtdiffusion"
    print(f"mtdiffusion: error: the command is not installed; run: {how}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
