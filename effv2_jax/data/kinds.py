"""The kinds of preprocessing, as data: which part of a picture, how resized, how normalised.

A kind travels with the weights. Five sorts:

| kind | evaluation shows | resize | normalised |
|---|---|---|---|
| v2 | the centre below 320 px, else the whole picture, squeezed | bilinear | (x-128)/128 |
| v1 | the centre, at every size | v1 bicubic | ImageNet mean, deviation |
| finetune | the whole picture, squeezed to a square | bilinear | (x/255-.5)/.5 |
| advprop | as v1 | v1 bicubic | x*2/255-1 |
| pillow-R-S-N | the centre of the picture that was resized to size / S | R | N |

Official: preprocessing.py (v2 and finetune) and preprocess_legacy.py (v1) of google/automl
efficientnetv2; advprop: eval_ckpt_main.py (`advprop_preprocessing`) of tensorflow/tpu efficientnet.

pillow-R-S-N are those of torchvision (transforms/_presets.py: ImageClassification) and timm
(data/transforms_factory.py: transforms_imagenet_eval): Pillow's antialiased resizing R, bilinear or
bicubic, of the shorter side to floor(size / S), then the central square; S is timm's crop_pct. With
"squash" before it (timm's crop_mode) both sides are resized to that. N is imagenet (mean and
deviation) or half (0.5 both). Examples: pillow-bicubic-0.875-imagenet, pillow-bicubic-squash1-half.
Imports neither JAX nor NumPy.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from effv2_jax.errors import UserError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)  # shares of 255; preprocess_legacy.py:mean_rgb
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

# What a weights file may say of them; of pillow kinds the crop is S.
_CROPS = ("central", "none")
_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one kind of preprocessing does.

    Attributes:
      name: as in the config.
      mean: subtracted from pixels 0..255, per channel.
      std: what the difference is divided by.
      bicubic: bicubic (v1's, or Pillow's) instead of bilinear resizing, in training and evaluation.
      crop_below: evaluation crops the centre for sizes below this (px); 0: never.
      round_up: the central crop's offset is (free + 1) // 2 instead of free // 2.
      min_covered: training crops below this share of the picture are drawn again (the official
        v1 code asks for 0.1 of the box that is the whole picture).
      centre_when_whole: a training crop equal to the whole picture is replaced by the central one.
      pillow: Pillow resizes, with antialiasing; in evaluation before the crop.
      share: pillow: of the resized picture's (shorter) side that evaluation shows.
      squash: pillow: evaluation resizes to a square instead of keeping the shape.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bicubic: bool = False
    crop_below: float = 0.0
    round_up: bool = False
    min_covered: float = 0.0
    centre_when_whole: bool = False
    pillow: bool = False
    share: float = 1.0
    squash: bool = False


_V1 = Kind(
    name="v1",
    mean=tuple(255 * m for m in _IMAGENET_MEAN),
    std=tuple(255 * s for s in _IMAGENET_DEVIATION),
    bicubic=True,
    crop_below=math.inf,
    round_up=True,
    min_covered=0.1,
    centre_when_whole=True,
)
KINDS: dict[str, Kind] = {
    "v2": Kind(name="v2", mean=(128.0,) * 3, std=(128.0,) * 3, crop_below=320),
    "v1": _V1,
    "finetune": Kind(name="finetune", mean=(127.5,) * 3, std=(127.5,) * 3),
    "advprop": dataclasses.replace(_V1, name="advprop", mean=(127.5,) * 3, std=(127.5,) * 3),
}

_PILLOW = re.compile(r"pillow-(bilinear|bicubic)-((?:squash)?(?:1|0\.\d*[1-9]\d*))-(imagenet|half)")
EXPECTED = f"{', '.join(KINDS)}, or like pillow-bicubic-0.875-imagenet"


def is_kind(name: str) -> bool:
    """Whether there is a kind of that name."""
    return name in KINDS or _PILLOW.fullmatch(name) is not None


def get_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
      UserError: there is none.
    """
    if name in KINDS:
        return KINDS[name]
    match = _PILLOW.fullmatch(name)
    if match is None:
        raise UserError(f"data.preprocessing: found {name!r}, expected one of {EXPECTED}")
    resize, share, normalised = match.groups()
    like = _V1 if normalised == "imagenet" else KINDS["finetune"]
    return Kind(
        name=name,
        mean=like.mean,
        std=like.std,
        bicubic=resize == "bicubic",
        pillow=True,
        share=float(share.removeprefix("squash")),
        squash=share.startswith("squash"),
    )


def kind_of(preprocessing: Mapping[str, Any], *, image_size: int) -> Kind:
    """The kind that a weights file describes, with what it says otherwise than the usual one.

    Args:
      preprocessing: "kind", "mean", "std", "crop" (central, none, or pillow's share),
        "interpolation" (bilinear, bicubic).
      image_size: px, the size for which "crop" was said.

    Raises:
      UserError: it says what there is not.
    """
    kind = get_kind(preprocessing["kind"])
    crops = (describe(kind.name, image_size)["crop"],) if kind.pillow else _CROPS
    for key, known in (("crop", crops), ("interpolation", _INTERPOLATIONS)):
        if preprocessing[key] not in known:
            raise UserError(
                f"preprocessing: {key} is {preprocessing[key]!r}, expected "
                f"{' or '.join(map(str, known))}"
            )
    crop_below = kind.crop_below
    if not kind.pillow and (preprocessing["crop"] == "central") != (image_size < crop_below):
        crop_below = math.inf if preprocessing["crop"] == "central" else 0.0
    return dataclasses.replace(
        kind,
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        bicubic=preprocessing["interpolation"] == "bicubic",
        crop_below=crop_below,
    )


def describe(kind: str, image_size: int) -> dict[str, Any]:
    """How evaluation images of a size (px) are made, as the weights file keeps it."""
    found = get_kind(kind)
    crop = "central" if image_size < found.crop_below else "none"
    return {
        "kind": found.name,
        "mean": list(found.mean),
        "std": list(found.std),
        "crop": found.name.split("-")[2] if found.pillow else crop,
        "interpolation": "bicubic" if found.bicubic else "bilinear",
    }
