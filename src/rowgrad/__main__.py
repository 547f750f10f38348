"""`python -m rowgrad`: the same as the `rowgrad` command."""

import sys

from rowgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
