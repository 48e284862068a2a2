"""A folder of pictures as a data set that TensorFlow Datasets reads without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAME = "synthetic"
"""The data set's name: `data: {format: tfds, name: synthetic, folder: FOLDER}` in a config."""


def write(folder: Path, pictures: Path, classes: Sequence[str], channels: int) -> None:
    """Write pictures CLASS/FILE.png as array_record, with the labels that their folders number.

    Args:
      folder: tfds' `data_dir`; what it holds of an earlier run is replaced.
      pictures: one folder a class, called by its number.
      classes: names of all classes.
      channels: of the pictures, 1 or 3.

    Raises:
      ImportError: tensorflow-datasets is missing.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "array_record needs tensorflow-datasets: pip install 'jinv[tfds]'"
        ) from error

    class Synthetic(tfds.core.GeneratorBasedBuilder):
        """Images that were read out of trained networks."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(None, None, channels), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(classes)),
            }
            told = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=told)

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for path in sorted(pictures.glob("*/*.png")):
                key = f"{path.parent.name}/{path.name}"
                yield key, {"image": path, "label": int(path.parent.name)}

    shutil.rmtree(folder, ignore_errors=True)
    builder = Synthetic(data_dir=str(folder), file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it downloads, which it does not
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
