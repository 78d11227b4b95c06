"""Measures the input pipeline: images per second of each of its parts, on this machine.

    python tools/benchmark.py input                        # made-up 500x375 JPEGs
    python tools/benchmark.py input --dir photos           # a folder of classes
    python tools/benchmark.py input --source arrays --dir fashion_mnist

Every part is timed several times; the median and the range are printed. "per core" divides by the
processor time that was used, not by the clock, so that other load on the machine matters little.
"""

import importlib.util
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.command import Parser
from effv2_jax.config import base_config
from effv2_jax.data.chunks import Options
from effv2_jax.data.decode import EncodedImage, as_rgb
from effv2_jax.data.examples import Example, Source
from effv2_jax.data.loader import eval_batches, to_device, train_batches
from effv2_jax.data.order import position_generator
from effv2_jax.data.preprocess import evaluation_image, training_image
from effv2_jax.data.sources import open_source
from effv2_jax.training.progressive import plan_stages

_PICTURES = 64  # of the source that are used
_ENDLESS = 1_000_000  # steps


def write_photographs(folder: Path) -> None:
    """Writes 64 JPEGs of 500x375 with about as much detail as photographs (about 55 KB each)."""
    from PIL import Image

    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None, :]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / 500) ** 1.1
    for number in range(_PICTURES):
        noise = np.fft.fft2(rng.normal(size=(3, 375, 500)), axes=(1, 2)) * falloff
        field = np.fft.ifft2(noise, axes=(1, 2)).real
        field = 128 + 45 * field / field.std()
        pixels = np.clip(field, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        target = folder / "train" / f"class{number % 4}" / f"{number:03d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, "JPEG", quality=82)


def _processor_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, ended))


def _report(name: str, rates: Sequence[tuple[float, float]], note: str = "") -> None:
    """Prints a line: rates are (images per second, images per processor second)."""
    wall = statistics.median(rate for rate, _ in rates)
    core = sorted(rate for _, rate in rates)
    print(
        f"{name:<44}{wall:>10,.0f}{statistics.median(core):>12,.0f}"
        f"   ({core[0]:,.0f} to {core[-1]:,.0f}) {note}".rstrip(),
        flush=True,
    )


def _measure(name: str, work: Callable[[int], Any], seconds: float, note: str = "") -> None:
    """Times `work(i)`, one picture, for about `seconds` in five rounds."""
    work(0)
    rates = []
    position = 0
    for _ in range(5):
        count, start, busy = 0, time.perf_counter(), _processor_seconds()
        while (elapsed := time.perf_counter() - start) < seconds / 5:
            work(position)
            position += 1
            count += 1
        rates.append((count / elapsed, count / max(_processor_seconds() - busy, 1e-6)))
    _report(name, rates, note)


def _measure_parts(source: Source, data_config: Any, sizes: Sequence[int], seconds: float) -> None:
    """The parts one by one, in this thread."""
    options = Options.from_config(data_config)
    kind = options.kind
    count = min(len(source), _PICTURES)
    _measure("read", lambda i: source[i % count], seconds)
    examples: list[Example] = [source[i] for i in range(count)]
    encoded = not isinstance(examples[0].image, np.ndarray)
    fast = all(importlib.util.find_spec(name) for name in ("simplejpeg", "cv2"))
    decoders = ("pillow", "pillow_draft", *(("simplejpeg",) if fast else ())) if encoded else ()

    def open_image(i: int, decoder: str) -> EncodedImage:
        example = examples[i % count]
        return EncodedImage(example.image, name=example.name, decoder=decoder)

    for decoder in decoders:
        if decoder != "pillow_draft":  # decodes whole pictures as pillow does
            _measure(f"decode, {decoder}", lambda i, d=decoder: open_image(i, d).pixels(), seconds)
    if encoded:
        arrays = [open_image(i, "pillow").pixels() for i in range(count)]
    else:
        arrays = [as_rgb(example.image, name=example.name) for example in examples]

    def training(i: int, size: int, image: EncodedImage | np.ndarray, fast_resize: bool) -> None:
        training_image(
            image,
            size=size,
            rng=position_generator(i, seed=0),
            kind=kind,
            sampling=options.sampling,
            fast_resize=fast_resize,
        )

    for size in sizes:
        _measure(
            f"crop and resize to {size}",
            lambda i, s=size: training(i, s, arrays[i % count], False),
            seconds,
        )
        if fast and not kind.bicubic:
            _measure(
                f"crop and resize to {size}, opencv",
                lambda i, s=size: training(i, s, arrays[i % count], True),
                seconds,
            )
        for decoder in decoders:
            _measure(
                f"decode, crop, resize to {size}, {decoder}",
                lambda i, s=size, d=decoder: training(i, s, open_image(i, d), d == "simplejpeg"),
                seconds,
            )
        _measure(
            f"evaluation crop and resize to {size}",
            lambda i, s=size: evaluation_image(arrays[i % count], size=s, kind=kind),
            seconds,
        )


def _measure_loader(
    source: Source, data_config: Any, sizes: Sequence[int], batch_size: int, seconds: float
) -> None:
    """Whole batches, as the trainer gets them; start-up of processes is not counted."""
    workers = data_config.workers
    how = f"{workers} processes x" if workers else "this process,"
    for size in sizes:
        stages = plan_stages(
            num_examples=_ENDLESS * batch_size, batch_size=batch_size, epochs=1.0, image_size=size
        )
        batches = train_batches(
            source, stages, data_config, seed=0, start_step=0, stop_step=_ENDLESS
        )
        with batches:
            # The buffers are emptied first: what was made before the clock started is not counted.
            for _ in range(2 + 4 * data_config.threads * max(workers, 1) * 32 // batch_size):
                next(batches)
            rates = []
            for _ in range(3):
                made, start, busy = 0, time.perf_counter(), _processor_seconds()
                while (elapsed := time.perf_counter() - start) < seconds / 2:
                    next(batches)
                    made += batch_size
                used = _processor_seconds() - busy if not workers else elapsed * workers
                rates.append((made / elapsed, made / max(used, 1e-6)))
        _report(f"loader to {size}, {how} {data_config.threads} threads", rates)
    rates = []
    for _ in range(3):
        made, start, busy = 0, time.perf_counter(), _processor_seconds()
        while (elapsed := time.perf_counter() - start) < seconds / 2:
            options = {"image_size": sizes[-1], "batch_size": min(batch_size, len(source))}
            with eval_batches(source, data_config, **options) as batches:
                made += sum(int(batch["mask"].sum()) for batch in itertools.islice(batches, 8))
        rates.append((made / elapsed, made / max(_processor_seconds() - busy, 1e-6)))
    if not workers:
        _report(f"evaluation batches at {sizes[-1]}", rates)


def _measure_transfer(sizes: Sequence[int], batch_size: int) -> None:
    """Batches that are ready on the host, until they are on the device."""
    import jax

    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    batch_size = max(batch_size // len(jax.devices()), 1) * len(jax.devices())
    for size in sizes:
        image = np.zeros((batch_size, size, size, 3), np.uint8)
        batch = {"image": image, "label": np.zeros(batch_size, np.int32)}
        rates = []
        for _ in range(5):
            start, busy = time.perf_counter(), _processor_seconds()
            for placed in to_device(iter([batch] * 8), mesh, depth=2):
                jax.block_until_ready(placed)
            elapsed, used = time.perf_counter() - start, _processor_seconds() - busy
            rates.append((8 * batch_size / elapsed, 8 * batch_size / max(used, 1e-6)))
        speed = statistics.median(rate for rate, _ in rates) * size * size * 3 / 1e9
        device = jax.devices()[0].device_kind
        _report(f"transfer of {size} px", rates, f"{speed:.1f} GB/s to {device}")


def run(arguments: Sequence[str]) -> None:
    """Reads the flags, measures, prints."""
    parser = Parser(__doc__.splitlines()[0], prog="tools/benchmark.py input")
    parser.add_argument("--source", default="folder", help="folder, arrays, tfds, digits, ...")
    parser.add_argument("--dir", default="", help="of the data; empty with folder: made up")
    parser.add_argument("--name", default="", help="data.name, for tfds and synthetic")
    parser.add_argument("--split", default="train", help="data.train_split")
    parser.add_argument("--preprocessing", default="v2", help="v2, v1, finetune, advprop")
    parser.add_argument("--sizes", default="128,224,300", help="pixels, separated by commas")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--threads", type=int, default=2, help="per process")
    parser.add_argument("--decoder", default="pillow", help="of the loader")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    parser.add_argument("--no-transfer", action="store_true", help="do not start JAX")
    flags = parser.parse_args(arguments)
    data_config = base_config().data
    data_config.source, data_config.dir, data_config.name = flags.source, flags.dir, flags.name
    data_config.train_split, data_config.preprocessing = flags.split, flags.preprocessing
    data_config.workers, data_config.threads = flags.workers, flags.threads
    data_config.decoder = flags.decoder
    sizes = [int(size) for size in flags.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        if flags.source == "folder" and not flags.dir:
            write_photographs(Path(folder))
            data_config.dir = folder
        source = open_source(data_config, "train")
        example = source[0].image
        shape = list(example.shape) if isinstance(example, np.ndarray) else f"{len(example)} bytes"
        print(
            f"{len(source)} pictures (the first: {shape}), {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}"
        )
        print(f"{'':<44}{'images/s':>10}{'per core':>12}   (range)")
        _measure_parts(source, data_config, sizes, flags.seconds)
        _measure_loader(source, data_config, sizes, flags.batch_size, flags.seconds)
        if not flags.no_transfer:
            _measure_transfer(sizes, flags.batch_size)
