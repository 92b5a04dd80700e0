"""`python -m retinaray`: the same as the `retinaray` command."""

from __future__ import annotations

import sys

from retinaray.cli import main

if __name__ == "__main__":
    sys.exit(main())
