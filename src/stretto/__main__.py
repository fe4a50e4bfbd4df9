"""`python -m stretto`: the same as the command."""

import sys

from stretto.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
