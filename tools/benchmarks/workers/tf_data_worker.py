"""tf.data doing a loader's work: `python tf_data_worker.py`, see serve.py, benchmarks/loader.py.

The operations are those of the official preprocessing.py (google/automl, efficientnetv2): only the
crop is decoded. Order is not kept, parallelism is TensorFlow's choice within the cores.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from pipeline import timed
from serve import Prepared, serve


def _prepare(task: Mapping[str, Any]) -> Prepared:
    files = sorted(str(path) for path in Path(task["folder"], "train").rglob("*.jpg"))
    size = task["image_size"]
    whole = tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])

    def picture(path: tf.Tensor) -> tf.Tensor:
        encoded = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            whole,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(extent)
        window = tf.stack([top, left, height, width])
        pixels = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        return tf.cast(tf.image.resize(pixels, (size, size)), tf.uint8)

    def start() -> Iterator[Any]:
        pipeline = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
        pipeline = pipeline.map(picture, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
        pipeline = pipeline.batch(task["batch"], drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.threading.private_threadpool_size = task["cores"]
        options.autotune.enabled = True
        return pipeline.with_options(options).as_numpy_iterator()

    settings = f"tensorflow {tf.__version__}, {task['cores']} threads"
    return Prepared(run=timed(start, warm=5), facts={"settings": settings})


if __name__ == "__main__":
    serve(_prepare)
