"""`jinv train-shadow-models` from a checkout; `--help` says what it does."""

import sys

from jinv.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train-shadow-models", *sys.argv[1:]]))
