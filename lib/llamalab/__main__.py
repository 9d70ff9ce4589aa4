"""`python -m llamalab`: the command line."""

import sys

from llamalab.cli import main

if __name__ == "__main__":
    sys.exit(main())
