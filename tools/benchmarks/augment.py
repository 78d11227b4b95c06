"""Measures what augmentation and mixing cost per image on the present device.

    python tools/benchmark.py augment [--sizes 128 192] [--batch 32] [--implementation auto]

Each row is one jitted function; times are medians of several calls, each waited for. Rows of
single operations apply that operation to every image; policies draw theirs. "processor" is the
time of the host's cores, on which other load of the machine has little influence.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.command import Parser
from effv2_jax.data import augment
from effv2_jax.data.augment_apply import IMPLEMENTATIONS, apply_operations
from effv2_jax.data.mix import mix
from effv2_jax.data.policy import OPERATIONS, make_policy

MAGNITUDE = 12.0
CLASSES = 1000

Row = tuple[str, Callable[..., object], tuple[jax.Array, ...]]


def photo_like(batch: int, size: int) -> np.ndarray:
    """Patches with noise: uint8 [batch, size, size, 3], the same at every call."""
    random = np.random.RandomState(0)
    patches = -(-size // 16)
    coarse = random.randint(10, 240, (batch, patches, patches, 3))
    images = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :size, :size]
    return (images + random.randint(-9, 10, images.shape)).clip(0, 255).astype(np.uint8)


def rows(batch: int, size: int, implementation: str) -> Iterator[Row]:
    """Yields (name, function, arguments) of everything that is measured at one size."""
    images = jnp.asarray(photo_like(batch, size))
    keys = jax.random.split(jax.random.key(0), batch)
    table = make_policy("randaugment").table(MAGNITUDE)
    for number, name in enumerate(OPERATIONS):
        operations = jnp.full((batch, 1), number)
        arguments = jnp.tile(jnp.asarray(table[number]), (batch, 1, 1))
        centres = jnp.full((batch, 1, 2), size // 2)

        def one(images, operations, arguments, centres):  # noqa: ANN001, ANN202
            return apply_operations(
                images,
                operations,
                arguments=arguments,
                centres=centres,
                implementation=implementation,
            )

        yield name, one, (images, operations, arguments, centres)
    for label, name, layers in (
        ("RandAugment(1)", "randaugment", 1),
        ("RandAugment(2)", "randaugment", 2),
        ("AutoAugment", "autoaugment", 2),
        ("ra_aa", "ra_aa", 2),
    ):
        policy = make_policy(name, layers=layers)

        def draw(images, keys, table, policy=policy):  # noqa: ANN001, ANN202
            return augment.augment(images, keys, table, policy, implementation)

        yield label, draw, (images, keys, jnp.asarray(policy.table(MAGNITUDE)))
    yield "flip", augment.flip, (images, keys)
    values = images.astype(jnp.float32) / 128 - 1
    yield "cutout ('ft')", augment.finetune_cutout, (values, keys)
    yield "erasing (p=0.25)", lambda x, k: augment.random_erasing(x, k, 0.25), (values, keys)
    labels = jnp.zeros((batch, CLASSES), jnp.float32)
    for name, mixup, cutmix in (("mixup", 0.2, 0.0), ("cutmix", 0.0, 1.0), ("both", 0.2, 1.0)):

        def mixed(images, labels, key, use=(mixup > 0, cutmix > 0), alphas=(mixup, cutmix)):  # noqa: ANN001, ANN202
            return mix(
                images,
                labels,
                key,
                mixup_alpha=alphas[0],
                cutmix_alpha=alphas[1],
                use_mixup=use[0],
                use_cutmix=use[1],
            )

        yield name, mixed, (values, labels, jax.random.key(0))


def measure(
    function: Callable[..., object], arguments: tuple, *, rounds: int
) -> tuple[float, float]:
    """Median seconds of a call by the clock and of the host's cores, after one that compiles."""
    program = jax.jit(function)
    jax.block_until_ready(program(*arguments))
    wall, processor = [], []
    for _ in range(rounds):
        start, start_processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(program(*arguments))
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return statistics.median(wall), statistics.median(processor)


def run(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = Parser(__doc__.splitlines()[0], prog="tools/benchmark.py augment")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 192], help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images, an even number")
    parser.add_argument("--rounds", type=int, default=9, help="calls of which to take the median")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto")
    args = parser.parse_args(arguments)

    times: dict[str, list[tuple[float, float]]] = {}
    for size in args.sizes:
        for name, function, arguments in rows(args.batch, size, args.implementation):
            taken = measure(function, arguments, rounds=args.rounds)
            times.setdefault(name, []).append(taken)
    device = jax.devices()[0]
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}, batch {args.batch}, "
        f"implementation {args.implementation}, median of {args.rounds}, load average {load}"
    )
    columns = ("images/s", "ms/image", "processor ms")
    header = [f"{size} px {column}" for size in args.sizes for column in columns]
    print(" | ".join([f"| {'operation':16s}", *header]) + " |")
    print("|" + "---|" * (1 + len(header)))
    for name, by_size in times.items():
        cells = [f"| {name:16s}"]
        for title, (wall, processor) in zip(header[:: len(columns)], by_size, strict=True):
            cells.append(f"{args.batch / wall:{len(title)},.0f}")
            cells += [f"{1e3 * x / args.batch:{len(title)}.3f}" for x in (wall, processor)]
        print(" | ".join(cells) + " |")
