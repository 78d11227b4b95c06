"""Pictures read, decoded and brought to the network's size, in batches of one shape."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from effv2_jax.data.decode import CorruptImageError, decode
from effv2_jax.data.kinds import Kind
from effv2_jax.data.preprocess import evaluation_box, evaluation_image
from effv2_jax.errors import UserError
from effv2_jax.inference.pictures import listed
from effv2_jax.startup import usable_cores

_VIEW = 480  # px of a view's longer side


@dataclasses.dataclass(frozen=True)
class View:
    """A picture for people.

    Attributes:
        pixels: uint8 [h, w, 3], the whole upright picture, made smaller.
        box: (top, left, bottom, right) in shares of it: what the network is shown.
    """

    pixels: np.ndarray
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the network gets it.

    Attributes:
        path: of the file.
        image: float32 [S, S, 3] in 0..255, not normalised.
        view: None unless asked for.
    """

    path: str
    image: np.ndarray
    view: View | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures for one run of the program.

    Attributes:
        pictures: at least one, at most the batch size.
        images: float32 [batch size, S, S, 3]; behind the pictures all zero.
    """

    pictures: tuple[Picture, ...]
    images: np.ndarray


class PictureReader:
    """Reads pictures ahead of their use, in threads: decoding frees the interpreter lock.

    Args:
        kind: of preprocessing.
        image_size: px.
        batch_size: examples of every batch.
        on_broken: called with path and reason of a file that is no picture, which is then left
            out; None: it is an error, which names all such files.
        views: whether to make a view of each picture.
    """

    def __init__(
        self,
        *,
        kind: Kind,
        image_size: int,
        batch_size: int,
        on_broken: Callable[[str, str], None] | None = None,
        views: bool = False,
    ) -> None:
        self._kind, self._size, self._batch_size = kind, image_size, batch_size
        self._on_broken, self._views = on_broken, views

    def batches(self, paths: Sequence[str]) -> Iterator[Batch]:
        """Yields the pictures in the order of the paths.

        Raises:
            UserError: a file cannot be read, or some are no pictures: behind the first of these,
                the others are read too, so that all are named.
        """
        waiting: list[Picture] = []
        for picture in self._pictures(paths):
            waiting.append(picture)
            if len(waiting) == self._batch_size:
                yield self._batch(waiting)
                waiting = []
        if waiting:
            yield self._batch(waiting)

    def _batch(self, pictures: Sequence[Picture]) -> Batch:
        images = np.zeros((self._batch_size, self._size, self._size, 3), np.float32)
        for row, picture in enumerate(pictures):
            images[row] = picture.image
        return Batch(tuple(pictures), images)

    def _pictures(self, paths: Sequence[str]) -> Iterator[Picture]:
        threads = usable_cores()
        ahead = max(2 * threads, self._batch_size)
        under_way: deque[tuple[str, Future[Picture]]] = deque()
        broken: list[tuple[str, str]] = []
        rest = iter(paths)
        with ThreadPoolExecutor(threads, "decode") as pool:
            try:
                while True:
                    for path in rest:
                        under_way.append((path, pool.submit(self._read, path)))
                        if len(under_way) >= ahead:
                            break
                    if not under_way:
                        break
                    path, future = under_way.popleft()
                    try:
                        picture = future.result()
                    except CorruptImageError as error:
                        if self._on_broken is None:
                            broken.append((path, error.reason))
                        else:
                            self._on_broken(path, error.reason)
                    else:
                        if not broken:  # else only looking for further ones
                            yield picture
            finally:  # whoever stops early does not wait for what was read ahead
                pool.shutdown(wait=False, cancel_futures=True)
        if broken:
            raise UserError(_told(broken, len(paths)))

    def _read(self, path: str) -> Picture:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        pixels = decode(data, name=path)
        image = evaluation_image(pixels, size=self._size, kind=self._kind)
        return Picture(path, image, self._view(pixels) if self._views else None)

    def _view(self, pixels: np.ndarray) -> View:
        height, width = pixels.shape[:2]
        box = evaluation_box(height, width, size=self._size, kind=self._kind)
        shares = (
            box.top / height,
            box.left / width,
            (box.top + box.height) / height,
            (box.left + box.width) / width,
        )
        picture = Image.fromarray(pixels)
        picture.thumbnail((_VIEW, _VIEW))  # never larger
        return View(np.asarray(picture), shares)


def _told(broken: Sequence[tuple[str, str]], count: int) -> str:
    """The error that names broken files, (path, reason), of `count` that were read."""
    advice = "leave such files out with --on-corrupt skip"
    if len(broken) == 1:
        ((path, reason),) = broken
        return f"{path}: cannot decode this image ({reason}); remove or replace it, or {advice}"
    names = listed([f"{path} ({reason})" for path, reason in broken])
    return (
        f"cannot decode {len(broken):,} of {count:,} images: {names}: remove or replace them, or "
        f"{advice}"
    )
