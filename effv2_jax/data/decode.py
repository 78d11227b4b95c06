"""From an encoded file to uint8 RGB pixels: awkward files right, broken files named.

What every decoder here guarantees, whatever the file:

* EXIF orientation is applied: the array is the upright picture. (TensorFlow's and Keras' decoders
  ignore it. ImageNet's validation files carry almost none, photographs from telephones nearly
  always do.)
* 16-bit pixels are scaled to 8 bits; Pillow's own conversion of grey ones clips to white.
* CMYK, grey, palette and bilevel pictures become RGB; an alpha channel is dropped, not blended.
* Of an animation the first frame is taken.
* Anything that cannot be decoded to the end raises `CorruptImageError` with the file's name: no
  half-grey pictures.
"""

import io

import numpy as np
from PIL import Image

from effv2_jax.data import decode_fast
from effv2_jax.errors import UserError

DECODERS = ("pillow", "pillow_draft", "simplejpeg")

_JPEG = ("JPEG", "MPO")  # MPO: a JPEG with further pictures behind it, as some cameras write
_EXIF_ORIENTATION = 0x0112
_SWAPPED = (5, 6, 7, 8)  # orientations stored with width and height exchanged
_FLIPPED_AXES = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}  # after the exchange


class CorruptImageError(UserError):
    """A file is not an image, or is damaged. The message names the file and the reason.

    Attributes:
      reason: what is wrong with it, without the name.
    """

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # Pillow names the in-memory file object, which means nothing to the reader.
    return "not an image file" if "cannot identify image file" in text else text


def _corrupt(name: str, reason: str) -> CorruptImageError:
    return CorruptImageError(
        f"{name}: cannot decode this image ({reason}); remove or replace the file, or set "
        f"data.on_corrupt='skip'",
        reason=reason,
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata of a good picture: it is shown as stored
        return 1


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels upright.

    Args:
      pixels: [H, W, 3] as stored in the file.
      orientation: the EXIF tag 0x0112, 1..8; anything else is taken as 1.

    Returns:
      [H, W, 3] or [W, H, 3], contiguous.
    """
    if orientation in _SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _FLIPPED_AXES:
        pixels = np.flip(pixels, _FLIPPED_AXES[orientation])
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit grey
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()}..{values.max()} are not 16-bit")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class EncodedImage:
    """An encoded picture whose size is known and whose pixels are decoded when asked for.

    Attributes:
      height: of the upright picture, pixels.
      width: of the upright picture, pixels.
    """

    def __init__(self, data: bytes, *, name: str, decoder: str = "pillow") -> None:
        """Reads the header.

        Args:
          data: the bytes of the file.
          name: what errors call it, normally the path.
          decoder: one of `DECODERS`.

        Raises:
          CorruptImageError: not an image, or larger than Pillow's limit for decompression bombs.
        """
        if not data:
            raise _corrupt(name, "the file is empty")
        self._data, self._name, self._decoder = data, name, decoder
        try:
            self._image = Image.open(io.BytesIO(data))
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder stumbles over, the file is to blame
            raise _corrupt(name, _reason(error)) from error
        self._orientation = _orientation(self._image)
        self.width, self.height = self._image.size
        if self._orientation in _SWAPPED:
            self.width, self.height = self.height, self.width

    @property
    def reducible(self) -> bool:
        """Whether `pixels(reduction)` can decode at a fraction of the size (JPEG only)."""
        return self._decoder == "pillow_draft" and self._image.format in _JPEG

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Decodes.

        Args:
          reduction: 1, 2, 4 or 8: JPEG only, every block's inverse DCT gives 1/reduction of its
            pixels per side, which is faster and averages the rest away.

        Returns:
          [ceil(height / reduction), ceil(width / reduction), 3] uint8.

        Raises:
          CorruptImageError: the data are damaged or end early.
        """
        try:
            # CMYK needs a conversion that only Pillow has.
            plain_jpeg = self._image.format in _JPEG and self._image.mode in ("RGB", "L")
            if self._decoder == "simplejpeg" and plain_jpeg:
                return apply_orientation(decode_fast.decode_jpeg(self._data), self._orientation)
            if reduction > 1:
                width, height = self._image.size
                # Pillow reduces so far that both sides stay at least as large as asked.
                self._image.draft("RGB", (width // reduction, height // reduction))
            return apply_orientation(_to_rgb(self._image), self._orientation)
        except MemoryError:
            raise
        except Exception as error:  # see __init__
            raise _corrupt(self._name, _reason(error)) from error


def decode(data: bytes, *, name: str, decoder: str = "pillow") -> np.ndarray:
    """Decodes a whole picture to [H, W, 3] uint8, upright; see the module's guarantees.

    Raises:
      CorruptImageError: the data are not an image, or are damaged.
    """
    return EncodedImage(data, name=name, decoder=decoder).pixels()


def as_rgb(array: np.ndarray, *, name: str) -> np.ndarray:
    """Makes [H, W, 3] uint8 of an array that is [H, W], [H, W, 1] or [H, W, 3] uint8."""
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(
            f"{name}: found an array {array.dtype}{list(array.shape)}, expected uint8 of shape "
            f"[H, W], [H, W, 1] or [H, W, 3]"
        )
    return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2) if grey else array
