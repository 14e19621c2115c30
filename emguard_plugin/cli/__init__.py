"""`emguard` on the command line: a file for each command, `app` with all of them."""

import sys

from emguard_plugin.exit_codes import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is being loaded."""
    try:
        from emguard_plugin.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
