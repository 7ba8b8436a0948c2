"""`python -m fastpeft`: the same as the `fastpeft` command."""

from __future__ import annotations

import sys

from fastpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
