"""Weights inside installable packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

from jinv.files import check_sha256


@dataclasses.dataclass(frozen=True)
class Package:
    """A file of weights inside an installable package.

    Attributes:
      distribution: the package's name.
      file: the file's, with as many of its folders as tell it from others.
      sha256: its first eight hex digits, as file names of published weights carry them.
      install: the command that installs it.
    """

    distribution: str
    file: str
    sha256: str
    install: str

    def find(self, what: str) -> Path:
        """Path of the installed file, checksum verified; the package is not imported.

        Raises:
          FileNotFoundError: `what` is not installed; says how to.
          ValueError: it is damaged.
        """
        try:
            inside = importlib.metadata.files(self.distribution) or []
        except importlib.metadata.PackageNotFoundError:
            inside = []
        for file in inside:
            path = Path(str(file.locate()))
            if file.match(self.file) and path.is_file():
                check_sha256(path, self.sha256, f"reinstall it: {self.install}")
                return path
        raise FileNotFoundError(f"{what} are not installed: {self.install}")
