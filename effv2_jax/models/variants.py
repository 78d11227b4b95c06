"""The table of architectures: EfficientNetV2 and EfficientNet (V1), as data.

Every number is that of the released code (google/automl, efficientnetv2: effnetv2_configs.py and
hparams.py); where the papers differ, `Variant.paper` says so. Papers: EfficientNetV2, Tan & Le 2021
(arXiv:2104.00298), EfficientNet, Tan & Le 2019 (arXiv:1905.11946). The family "timm" are networks
of PyTorch Image Models, drawn after the paper before that code was out. Imports neither jax nor
flax.
"""

import dataclasses
import difflib

from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import BlockSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperRange:
    """Progressive learning as printed in the paper (Table 6): (first stage, last stage)."""

    image_size: tuple[int, int]
    magnitude: tuple[float, float]
    mixup_alpha: tuple[float, float]
    dropout_rate: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """An architecture and the recipe it was released with.

    Attributes:
      name: official name.
      family: "v1", "v2", "timm" or "testing".
      blocks: rows, unscaled.
      width: multiplier of channels.
      depth: multiplier of repeats.
      feature_size: channels of the head before `width` scales them.
      padding: "SAME" (TensorFlow) or "SYMMETRIC" (PyTorch).
      bn_epsilon: added to the variances of the norms.
      eval_size: side of the evaluation images in pixels.
      train_size_setting: side of the last stage's images; up to 16: factor of `eval_size`.
      dropout_rate: before the classifier.
      survival_prob: of the last block (stochastic depth).
      augname: official name of the augmentation; "effnetv1_" also selects V1's preprocessing.
      randaugment_magnitude: official `ram` of the last stage (0-30).
      randaugment_layers: operations per image.
      mixup_alpha: Beta parameter of the last stage.
      cutmix_alpha: Beta parameter of the last stage.
      stages: stages of progressive learning; 0: none.
      sched: whether magnitudes grow with the stages.
      paper: what the paper prints for its progressive learning, where it does.
      citation: where the row comes from.
    """

    name: str
    family: str
    blocks: tuple[BlockSpec, ...]
    width: float = 1.0
    depth: float = 1.0
    feature_size: int = 1280
    padding: str = "SAME"
    bn_epsilon: float = 1e-3
    eval_size: int
    train_size_setting: float
    dropout_rate: float
    survival_prob: float = 0.8
    augname: str
    randaugment_magnitude: float
    randaugment_layers: int = 2
    mixup_alpha: float
    cutmix_alpha: float
    stages: int
    sched: bool
    paper: PaperRange | None = None
    citation: str

    @property
    def train_size(self) -> int:
        """Side of the last stage's training images in pixels (official: main.py)."""
        if self.train_size_setting > 16:
            return int(self.train_size_setting)
        return int(self.eval_size * self.train_size_setting) // 16 * 16

    @property
    def augment(self) -> str:
        """The augmentation's name in this package: "randaugment" or "autoaugment"."""
        return "autoaugment" if self.augname.endswith("autoaug") else "randaugment"

    @property
    def preprocessing(self) -> str:
        """The kind of preprocessing, "v1" or "v2": V2-B0..B3 were trained with V1's."""
        return "v1" if self.augname.startswith("effnetv1_") else "v2"


def _mbconv(
    repeats: int, *, kernel: int, stride: int, expand: int, channels: tuple[int, int]
) -> BlockSpec:
    """An MBConv row; every official one has squeeze-and-excite of a quarter of its input."""
    return BlockSpec(
        fused=False, kernel=kernel, stride=stride, expand=expand, in_channels=channels[0],
        channels=channels[1], repeats=repeats, se=0.25,
    )  # fmt: skip


def _fused(
    repeats: int, *, stride: int, expand: int, channels: tuple[int, int], two_convs: bool = False
) -> BlockSpec:
    """A FusedMBConv row; every official one is 3x3 without squeeze-and-excite."""
    return BlockSpec(
        fused=True, kernel=3, stride=stride, expand=expand, in_channels=channels[0],
        channels=channels[1], repeats=repeats, se=0.0, two_convs=two_convs,
    )  # fmt: skip


# EfficientNet-B0: Table 1 of arXiv:1905.11946.
_V1_B0 = (
    _mbconv(1, kernel=3, stride=1, expand=1, channels=(32, 16)),
    _mbconv(2, kernel=3, stride=2, expand=6, channels=(16, 24)),
    _mbconv(2, kernel=5, stride=2, expand=6, channels=(24, 40)),
    _mbconv(3, kernel=3, stride=2, expand=6, channels=(40, 80)),
    _mbconv(3, kernel=5, stride=1, expand=6, channels=(80, 112)),
    _mbconv(4, kernel=5, stride=2, expand=6, channels=(112, 192)),
    _mbconv(1, kernel=3, stride=1, expand=6, channels=(192, 320)),
)

# V1-B3 as it was released (tensorflow/tpu, efficientnet_model.py), and as Keras, timm and
# torchvision have it: that code rounds no channel count below 90 %, so the first stage has 24
# channels. In the V2 code, and therefore in the table below, it has 16. No other V1 differs.
# `create_model("efficientnet-b3", blocks=RELEASED_V1_B3)`: 20 times the width 1.2 rounds to 24.
RELEASED_V1_B3 = (
    _mbconv(1, kernel=3, stride=1, expand=1, channels=(32, 20)),
    _mbconv(2, kernel=3, stride=2, expand=6, channels=(20, 24)),
    *_V1_B0[2:],
)

# The base of V2-B0..B3 (effnetv2_configs.py; section 4.5 of arXiv:2104.00298 compares them).
_V2_BASE = (
    _fused(1, stride=1, expand=1, channels=(32, 16)),
    _fused(2, stride=2, expand=4, channels=(16, 32)),
    _fused(2, stride=2, expand=4, channels=(32, 48)),
    _mbconv(3, kernel=3, stride=2, expand=4, channels=(48, 96)),
    _mbconv(5, kernel=3, stride=1, expand=6, channels=(96, 112)),
    _mbconv(8, kernel=3, stride=2, expand=6, channels=(112, 192)),
)

# EfficientNetV2-S: Table 4 of arXiv:2104.00298.
_V2_S = (
    _fused(2, stride=1, expand=1, channels=(24, 24)),
    _fused(4, stride=2, expand=4, channels=(24, 48)),
    _fused(4, stride=2, expand=4, channels=(48, 64)),
    _mbconv(6, kernel=3, stride=2, expand=4, channels=(64, 128)),
    _mbconv(9, kernel=3, stride=1, expand=6, channels=(128, 160)),
    _mbconv(15, kernel=3, stride=2, expand=6, channels=(160, 256)),
)

# M, L and XL are printed only in the released code (effnetv2_configs.py).
_V2_M = (
    _fused(3, stride=1, expand=1, channels=(24, 24)),
    _fused(5, stride=2, expand=4, channels=(24, 48)),
    _fused(5, stride=2, expand=4, channels=(48, 80)),
    _mbconv(7, kernel=3, stride=2, expand=4, channels=(80, 160)),
    _mbconv(14, kernel=3, stride=1, expand=6, channels=(160, 176)),
    _mbconv(18, kernel=3, stride=2, expand=6, channels=(176, 304)),
    _mbconv(5, kernel=3, stride=1, expand=6, channels=(304, 512)),
)
_V2_L = (
    _fused(4, stride=1, expand=1, channels=(32, 32)),
    _fused(7, stride=2, expand=4, channels=(32, 64)),
    _fused(7, stride=2, expand=4, channels=(64, 96)),
    _mbconv(10, kernel=3, stride=2, expand=4, channels=(96, 192)),
    _mbconv(19, kernel=3, stride=1, expand=6, channels=(192, 224)),
    _mbconv(25, kernel=3, stride=2, expand=6, channels=(224, 384)),
    _mbconv(7, kernel=3, stride=1, expand=6, channels=(384, 640)),
)
_V2_XL = (
    _fused(4, stride=1, expand=1, channels=(32, 32)),
    _fused(8, stride=2, expand=4, channels=(32, 64)),
    _fused(8, stride=2, expand=4, channels=(64, 96)),
    _mbconv(16, kernel=3, stride=2, expand=4, channels=(96, 192)),
    _mbconv(24, kernel=3, stride=1, expand=6, channels=(192, 256)),
    _mbconv(32, kernel=3, stride=2, expand=6, channels=(256, 512)),
    _mbconv(8, kernel=3, stride=1, expand=6, channels=(512, 640)),
)

# timm's own: efficientnet.py, _gen_efficientnetv2_s. Its channel counts are written out, because
# timm rounds them otherwise (never below 90 %).
_RW_T = (
    _fused(2, stride=1, expand=1, channels=(24, 24)),
    _fused(4, stride=2, expand=4, channels=(24, 40)),
    _fused(4, stride=2, expand=4, channels=(40, 48)),
    _mbconv(6, kernel=3, stride=2, expand=4, channels=(48, 104)),
    _mbconv(9, kernel=3, stride=1, expand=6, channels=(104, 128)),
    _mbconv(14, kernel=3, stride=2, expand=6, channels=(128, 208)),
)
_RW_S = (
    _fused(2, stride=1, expand=1, channels=(24, 24), two_convs=True),
    _fused(4, stride=2, expand=4, channels=(24, 48)),
    _fused(4, stride=2, expand=4, channels=(48, 64)),
    _mbconv(6, kernel=3, stride=2, expand=4, channels=(64, 128)),
    _mbconv(9, kernel=3, stride=1, expand=6, channels=(128, 160)),
    _mbconv(15, kernel=3, stride=2, expand=6, channels=(160, 272)),
)
_RW_M = (
    _fused(3, stride=1, expand=1, channels=(32, 32), two_convs=True),
    _fused(5, stride=2, expand=4, channels=(32, 56)),
    _fused(5, stride=2, expand=4, channels=(56, 80)),
    _mbconv(8, kernel=3, stride=2, expand=4, channels=(80, 152)),
    _mbconv(15, kernel=3, stride=1, expand=6, channels=(152, 192)),
    _mbconv(24, kernel=3, stride=2, expand=6, channels=(192, 328)),
)

# One block of every kind, small enough to train in a test.
_TESTING = (
    _fused(1, stride=1, expand=1, channels=(8, 8)),
    _fused(2, stride=2, expand=2, channels=(8, 16)),
    _mbconv(2, kernel=3, stride=2, expand=4, channels=(16, 24)),
    _mbconv(1, kernel=5, stride=1, expand=6, channels=(24, 24)),
)


def _v2(
    name: str,
    blocks: tuple[BlockSpec, ...],
    *,
    sizes: tuple[int, int],
    dropout: float,
    magnitude: float,
    mix: float,
    paper: PaperRange,
    citation: str,
) -> Variant:
    """A variant of effnetv2_configs.py that is trained with RandAugment; sizes: (train, eval)."""
    return Variant(
        name=name, family="v2", blocks=blocks, train_size_setting=sizes[0], eval_size=sizes[1],
        dropout_rate=dropout, augname="randaug", randaugment_magnitude=magnitude, mixup_alpha=mix,
        cutmix_alpha=mix, stages=4, sched=True, paper=paper, citation=citation,
    )  # fmt: skip


def _v2_b(
    name: str, *, width: float, depth: float, sizes: tuple[int, int], dropout: float
) -> Variant:
    """V2-B0..B3: the base, scaled and augmented as EfficientNet V1; sizes: (train, eval)."""
    return Variant(
        name=name, family="v2", blocks=_V2_BASE, width=width, depth=depth,
        train_size_setting=sizes[0], eval_size=sizes[1], dropout_rate=dropout,
        augname="effnetv1_autoaug", randaugment_magnitude=0, mixup_alpha=0, cutmix_alpha=0,
        stages=4, sched=True,
        citation="arXiv:2104.00298 section 4.5; effnetv2_configs.py: v2_base_block",
    )  # fmt: skip


def _v1(name: str, *, width: float, depth: float, eval_size: int, dropout: float) -> Variant:
    """EfficientNet B0..B8 and L2; trained at 80 % of the evaluation size, without stages."""
    return Variant(
        name=name, family="v1", blocks=_V1_B0, width=width, depth=depth, train_size_setting=0.8,
        eval_size=eval_size, dropout_rate=dropout, augname="effnetv1_autoaug",
        randaugment_magnitude=15, mixup_alpha=0.0, cutmix_alpha=0.0, stages=0, sched=False,
        citation="arXiv:1905.11946; effnetv2_configs.py: efficientnetv1_params",
    )  # fmt: skip


def _rw(
    name: str, blocks: tuple[BlockSpec, ...], *, features: int, sizes: tuple[int, int]
) -> Variant:
    """V2 of timm; sizes: (train, eval). timm does not print its recipe: the rest is V2-S's."""
    return Variant(
        name=name, family="timm", blocks=blocks, feature_size=features, padding="SYMMETRIC",
        bn_epsilon=1e-5, train_size_setting=sizes[0], eval_size=sizes[1], dropout_rate=0.2,
        augname="randaug", randaugment_magnitude=10, mixup_alpha=0, cutmix_alpha=0, stages=4,
        sched=True, citation="huggingface/pytorch-image-models, efficientnet.py: efficientnetv2_rw",
    )  # fmt: skip


_PAPER_S = PaperRange(
    image_size=(128, 300), magnitude=(5, 15), mixup_alpha=(0, 0), dropout_rate=(0.1, 0.3)
)
_PAPER_M = PaperRange(
    image_size=(128, 380), magnitude=(5, 20), mixup_alpha=(0, 0.2), dropout_rate=(0.1, 0.4)
)
_PAPER_L = PaperRange(
    image_size=(128, 380), magnitude=(5, 25), mixup_alpha=(0, 0.5), dropout_rate=(0.1, 0.5)
)

_OFFICIAL = (
    _v2_b("efficientnetv2-b0", width=1.0, depth=1.0, sizes=(192, 224), dropout=0.2),
    _v2_b("efficientnetv2-b1", width=1.0, depth=1.1, sizes=(192, 240), dropout=0.2),
    _v2_b("efficientnetv2-b2", width=1.1, depth=1.2, sizes=(208, 260), dropout=0.3),
    _v2_b("efficientnetv2-b3", width=1.2, depth=1.4, sizes=(240, 300), dropout=0.3),
    _v2(
        "efficientnetv2-s", _V2_S, sizes=(300, 384), dropout=0.2, magnitude=10, mix=0,
        paper=_PAPER_S, citation="arXiv:2104.00298 Table 4; effnetv2_configs.py: v2_s_block",
    ),
    _v2(
        "efficientnetv2-m", _V2_M, sizes=(384, 480), dropout=0.3, magnitude=15, mix=0.2,
        paper=_PAPER_M, citation="arXiv:2104.00298 section 3.3; effnetv2_configs.py: v2_m_block",
    ),
    _v2(
        "efficientnetv2-l", _V2_L, sizes=(384, 480), dropout=0.4, magnitude=20, mix=0.5,
        paper=_PAPER_L, citation="arXiv:2104.00298 section 3.3; effnetv2_configs.py: v2_l_block",
    ),
    _v2(
        # The paper trains XL on ImageNet21k only, without a row of its own in Table 6: as L.
        "efficientnetv2-xl", _V2_XL, sizes=(384, 512), dropout=0.4, magnitude=20, mix=0.5,
        paper=_PAPER_L, citation="arXiv:2104.00298 section 4.2; effnetv2_configs.py: v2_xl_block",
    ),
    _v1("efficientnet-b0", width=1.0, depth=1.0, eval_size=224, dropout=0.2),
    _v1("efficientnet-b1", width=1.0, depth=1.1, eval_size=240, dropout=0.2),
    _v1("efficientnet-b2", width=1.1, depth=1.2, eval_size=260, dropout=0.3),
    _v1("efficientnet-b3", width=1.2, depth=1.4, eval_size=300, dropout=0.3),
    _v1("efficientnet-b4", width=1.4, depth=1.8, eval_size=380, dropout=0.4),
    _v1("efficientnet-b5", width=1.6, depth=2.2, eval_size=456, dropout=0.4),
    _v1("efficientnet-b6", width=1.8, depth=2.6, eval_size=528, dropout=0.5),
    _v1("efficientnet-b7", width=2.0, depth=3.1, eval_size=600, dropout=0.5),
    _v1("efficientnet-b8", width=2.2, depth=3.6, eval_size=672, dropout=0.5),
    _v1("efficientnet-l2", width=4.3, depth=5.3, eval_size=800, dropout=0.5),
)  # fmt: skip

_TIMM = (
    _rw("efficientnetv2-rw-t", _RW_T, features=1024, sizes=(224, 288)),
    _rw("efficientnetv2-rw-s", _RW_S, features=1792, sizes=(288, 384)),
    _rw("efficientnetv2-rw-m", _RW_M, features=2152, sizes=(320, 416)),
)

_TESTING_VARIANT = Variant(
    name="testing", family="testing", blocks=_TESTING, feature_size=32, train_size_setting=32,
    eval_size=32, dropout_rate=0.1, augname="randaug", randaugment_magnitude=10, mixup_alpha=0,
    cutmix_alpha=0, stages=2, sched=True, citation="none: one block of each kind, for tests",
)  # fmt: skip

_VARIANTS = {variant.name: variant for variant in (*_OFFICIAL, *_TIMM, _TESTING_VARIANT)}


def list_models(family: str | None = None) -> tuple[str, ...]:
    """Returns the names of the networks of a family.

    Args:
      family: "v1", "v2" or "timm"; None: the official networks, V1 and V2.
    """
    if family is None:
        return tuple(variant.name for variant in _OFFICIAL)
    return tuple(variant.name for variant in _VARIANTS.values() if variant.family == family)


def get_variant(name: str) -> Variant:
    """Returns the row of the table.

    Raises:
      UserError: unknown name; the message has the nearest valid one.
    """
    if name in _VARIANTS:
        return _VARIANTS[name]
    near = difflib.get_close_matches(name, _VARIANTS, n=1, cutoff=0.0)[0]
    raise UserError(
        f"unknown model {name!r}: did you mean {near!r}? Valid names: "
        f"{', '.join((*list_models(), *list_models('timm')))}"
    )
