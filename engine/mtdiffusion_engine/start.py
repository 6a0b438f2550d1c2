"""Where the command ``mtdiffusion`` begins. Nothing is imported here: what the command line itself imports takes a
while, in which Ctrl-C is to be heeded, too."""

import sys


def main() -> int:
    """Run the command line (:func:`mtdiffusion_engine.cli.main`).

    Returns:
        Its exit status.
    """
    try:
        from mtdiffusion_engine import cli

        return cli.main()
    except KeyboardInterrupt:
        print("mtdiffusion: interrupted", file=sys.stderr)
        return 130
