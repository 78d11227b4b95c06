"""Where examples come from: random access to (encoded image or pixels, label, name).

`open_source(config.data, "train" | "eval")` opens what `data.source` names:

* `folder`: one sub-folder per class (sources_folder.py);
* `tfds`: a TensorFlow Datasets data set by name, read without TensorFlow (sources_tfds.py);
* `arrays`: idx files as Fashion-MNIST publishes them, or npz (sources_arrays.py);
* `digits`: scikit-learn's handwritten digits, embedded: no download (sources_arrays.py);
* `synthetic`: made-up pictures with labels that can be learnt (sources_arrays.py).
"""

from typing import Any

from effv2_jax.data.examples import Source
from effv2_jax.errors import UserError

SOURCES = ("tfds", "folder", "arrays", "digits", "synthetic")
SPLITS = ("train", "eval")


def open_source(data_config: Any, split: str) -> Source:
    """Opens one split of the data set that a config describes.

    Args:
      data_config: the section `data` of a config (config_schema.py).
      split: "train" or "eval".

    Raises:
      UserError: the data set or the split does not exist, is empty or is inconsistent; the message
        says what was found and what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    # Imported here: tensorflow_datasets alone takes a second that no other source should pay.
    match data_config.source:
        case "folder":
            from effv2_jax.data.sources_folder import open_folder

            source = open_folder(data_config, split)
        case "tfds":
            from effv2_jax.data.sources_tfds import open_tfds

            source = open_tfds(data_config, split)
        case "arrays":
            from effv2_jax.data.sources_arrays import open_arrays

            source = open_arrays(data_config, split)
        case "digits":
            from effv2_jax.data.sources_arrays import open_digits

            source = open_digits(split)
        case "synthetic":
            from effv2_jax.data.sources_arrays import open_synthetic

            source = open_synthetic(data_config, split)
        case other:
            raise UserError(f"data.source: found {other!r}, expected one of {', '.join(SOURCES)}")
    if data_config.cache == "decoded" and not source.in_memory:
        from effv2_jax.data.cache import DecodedCache

        source = DecodedCache(source, decoder=data_config.decoder)
    return source
