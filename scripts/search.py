"""`jinv search` from a checkout; `--help` says what it does."""

import sys

from jinv.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
