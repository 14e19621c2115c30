"""What every `emguard` command ends with. One number, one meaning."""

from __future__ import annotations

EXIT_PASS, EXIT_FAIL, EXIT_ERROR, EXIT_INCONCLUSIVE, EXIT_INPUT = 0, 1, 2, 3, 4
"""Measured, and passed where there is a gate; above the gate; not measured; measured but cannot tell; wrong input."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it."""
