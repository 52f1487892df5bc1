"""`python -m edgestill`, `compress` and `edgestill`. Standard library only.

The command is imported inside the try: even a failing import is exit 70, never 1, because 1 means
"the gate failed" and a crash must not read as a verdict.
"""

from __future__ import annotations

import sys
import traceback

BUG = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Run the command and exit with its code (README, "Exit codes")."""
    try:
        from .pipeline.cli import entry

        code = entry(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except Exception:  # noqa: BLE001 (the command's last line: everything else is a bug of ours)
        traceback.print_exc()
        sys.stderr.write("edgestill: this is a bug; please report it with the lines above\n")
        code = BUG
    sys.exit(code)


if __name__ == "__main__":
    main()
