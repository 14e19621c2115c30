"""`python -m emguard_plugin.cli`."""

from emguard_plugin.cli import main

main()
