"""`jinv relabel` from a checkout; `--help` says what it does."""

import sys

from jinv.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["relabel", *sys.argv[1:]]))
