"""The command `tether`, which is also `python -m tether`."""

import sys

from tether.cli.heap import keep_in_one_piece


def start() -> int:
    """Run the command of this process; its exit code."""
    keep_in_one_piece(sys.argv[1:])
    from tether.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
