"""What to do to an image: policies of operations, and their arguments for a magnitude.

Official: efficientnetv2/autoaugment.py (google/automl); RandAugment arXiv:1909.13719,
AutoAugment arXiv:1805.09501. Nothing here runs on a device.
"""

import dataclasses
import difflib
import math

import numpy as np

from effv2_jax.errors import UserError

# RandAugment's operations in the order in which the official code numbers them.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
# The number of doing nothing.
IDENTITY = len(OPERATIONS)

POLICIES = ("none", "randaugment", "autoaugment", "ra_aa")
_MAX_LEVEL = 10.0
# Operations that go in a random one of two directions.
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

# AutoAugment v0, the policy of the paper: pairs of (operation, probability, magnitude).
AUTOAUGMENT_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which operations an image may get; made by `make_policy`.

    Attributes:
      name: one of POLICIES.
      layers: RandAugment's operations per image.
    """

    name: str
    layers: int

    @property
    def uses_randaugment(self) -> bool:
        """Whether images may get RandAugment."""
        return self.name in ("randaugment", "ra_aa")

    @property
    def uses_autoaugment(self) -> bool:
        """Whether images may get AutoAugment."""
        return self.name in ("autoaugment", "ra_aa")

    @property
    def table_rows(self) -> int:
        """The number of rows of `table`."""
        pairs = sum(len(pair) for pair in AUTOAUGMENT_V0)
        return len(OPERATIONS) * self.uses_randaugment + pairs * self.uses_autoaugment

    @property
    def max_layers(self) -> int:
        """The largest number of operations one image gets."""
        return max(self.layers * self.uses_randaugment, 2 * self.uses_autoaugment)

    def table(self, magnitude: float) -> np.ndarray:
        """Returns the operations' arguments, to be passed to the step as a traced array.

        Args:
          magnitude: RandAugment's, >= 0, possibly fractional. AutoAugment has its own.

        Returns:
          float32 [table_rows, 2]: 16 for RandAugment (one per operation, in the order of
          OPERATIONS) followed by 50 for AutoAugment (two per sub-policy). Computed in Python's
          float64 with the official truncations, then rounded to float32 once.

        Raises:
          UserError: if the magnitude is negative or not finite.
        """
        if not (math.isfinite(magnitude) and magnitude >= 0):
            raise UserError(
                f"augmentation magnitude is {magnitude}, expected a number >= 0 "
                "(usual values are 5 to 30)"
            )
        rows = []
        if self.uses_randaugment:
            for name in OPERATIONS:
                rows.append(operation_arguments(name, float(magnitude), cutout=40, translate=100))
        if self.uses_autoaugment:
            for pair in AUTOAUGMENT_V0:
                for name, _, level in pair:
                    rows.append(operation_arguments(name, level, cutout=100, translate=250))
        return np.asarray(rows, np.float32).reshape(-1, 2)


def make_policy(name: str, *, layers: int = 2) -> Policy:
    """Makes a policy.

    Args:
      name: "none", "randaugment", "autoaugment" (v0), or "ra_aa": half of the images get
        AutoAugment, the others RandAugment.
      layers: RandAugment's operations per image.

    Returns:
      A Policy, hashable, so that it can be a static argument of a jitted function.

    Raises:
      UserError: for an unknown name or a number of layers below 0.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(str(name), POLICIES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"augmentation {name!r} is unknown, did you mean {near!r}? "
            f"Expected one of {', '.join(POLICIES)}"
        )
    if layers < 0:
        raise UserError(f"RandAugment has {layers} layers, expected 0 or more")
    return Policy(name=name, layers=layers)


def level_to_argument(name: str, level: float, *, cutout: int, translate: int) -> float:
    """Returns what the official code passes to an operation, before the random sign.

    Args:
      name: one of OPERATIONS.
      level: magnitude; 10 is the usual maximum, larger ones extrapolate.
      cutout: half the side of Cutout's square at level 10, pixels.
      translate: Translate's distance at level 10, pixels, whatever the image's size.

    Returns:
      Rotate: degrees; Shear: slope; Translate: pixels; Posterize: bits; Solarize: threshold;
      SolarizeAdd: addition; Cutout: half side; Color, Contrast, Brightness, Sharpness: factor;
      the others 0. Official: autoaugment.py level_to_arg.
    """
    share = level / _MAX_LEVEL
    match name:
        case "Rotate":
            return share * 30.0
        case "Posterize":
            return int(share * 4)
        case "Solarize":
            return int(share * 256)
        case "SolarizeAdd":
            return int(share * 110)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share * 1.8 + 0.1
        case "ShearX" | "ShearY":
            return share * 0.3
        case "TranslateX" | "TranslateY":
            return share * float(translate)
        case "Cutout":
            return int(share * cutout)
    return 0.0


def operation_arguments(
    name: str, level: float, *, cutout: int, translate: int
) -> tuple[float, float]:
    """Returns what our operations take for a level: two numbers, the second mostly 0.

    Rotate: cosine and sine; Posterize: the bits that are cleared, where the official shift of an
    uint8 wraps and is clamped; Solarize: the threshold, which the official code stores in a uint8.
    See `level_to_argument` for the others and for the arguments.
    """
    value = level_to_argument(name, level, cutout=cutout, translate=translate)
    if name == "Rotate":
        radians = float(np.float32(value) * np.float32(math.pi / 180.0))
        return math.cos(radians), math.sin(radians)
    if name == "Posterize":
        return float(min((8 - int(value)) % 256, 7)), 0.0
    if name == "Solarize":
        return float(int(value) % 256), 0.0
    return float(value), 0.0
