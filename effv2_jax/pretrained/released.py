"""The table of released checkpoints. Imports no JAX.

Sources: README.md and effnetv2_model.py (get_model) of google/automl efficientnetv2 at 6a54c87, for
V2; README.md of tensorflow/tpu models/official/efficientnet at 7dc921f, for V1. Accuracies are
those printed there, on ImageNet's validation set; None where nothing is printed. Image sizes are
the evaluation sizes of the configs that the weights were trained with (datasets.py: ImageNet21k is
224 px for every network, ImagenetFt the network's own). Preprocessing likewise: `v2` for S to XL
and for all of ImageNet-21k, `v1` for V1 and for V2-B0..B3 on ImageNet-1k (augname
effnetv1_autoaug), `finetune` for 21k-ft1k (augname ft), `advprop` for AdvProp
(eval_ckpt_main.py: --advprop_preprocessing). timm's settings agree with all of these.

No checksum or size is published; the server says both when it is asked (`download.py`).
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence

from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import BlockSpec
from effv2_jax.models.variants import RELEASED_V1_B3, get_variant, list_models

BASE_URL = "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """A released checkpoint.

    Attributes:
        model: name in `models.variants`.
        weights: what it was trained on, or how.
        path: of the archive, below `BASE_URL` or a mirror.
        num_classes: outputs.
        image_size: px.
        preprocessing: kind, see `data.preprocess`.
        top1: published accuracy on ImageNet's validation set, percent; None: not published.
        size: of the archive, bytes; None: not published, the server's word is taken.
    """

    model: str
    weights: str
    path: str
    num_classes: int
    image_size: int
    preprocessing: str
    top1: float | None
    size: int | None = None

    @property
    def name(self) -> str:
        """As commands take it: "efficientnetv2-s:imagenet21k-ft1k"."""
        return f"{self.model}:{self.weights}"

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """Rows of the network; V1-B3 was released with others than the V2 code gives it."""
        v1_b3 = self.model == "efficientnet-b3"
        return RELEASED_V1_B3 if v1_b3 else get_variant(self.model).blocks

    @property
    def loss(self) -> str:
        """Trained with: the outputs for ImageNet-21k are classes each for itself (README.md)."""
        return "sigmoid" if self.weights == "imagenet21k" else "softmax"

    @property
    def url(self) -> str:
        """Where it was released."""
        return f"{BASE_URL}/{self.path}"


def _v2(model: str, top1: tuple[float | None, float | None]) -> list[Released]:
    """The checkpoints of a V2 network; top1: of imagenet1k (None: not released), of 21k-ft1k."""
    own_size = get_variant(model).eval_size
    kind = get_variant(model).preprocessing
    rows = [
        ("imagenet1k", "", 1000, own_size, kind, top1[0]),
        ("imagenet21k", "-21k", 21843, 224, "v2", None),
        ("imagenet21k-ft1k", "-21k-ft1k", 1000, own_size, "finetune", top1[1]),
    ]
    return [
        Released(
            model=model,
            weights=weights,
            path=f"v2/{model}{suffix}.tgz",
            num_classes=classes,
            image_size=size,
            preprocessing=preprocessing,
            top1=accuracy,
        )
        for weights, suffix, classes, size, preprocessing, accuracy in rows
        if weights != "imagenet1k" or accuracy is not None
    ]


def _v1(weights: str, path: str, top1: Sequence[float | None], kind: str = "v1") -> list[Released]:
    """The checkpoints of one V1 training; top1: of B0, B1, ...; None: not released."""
    return [
        Released(
            model=f"efficientnet-b{i}",
            weights=weights,
            path=path.format(model=f"efficientnet-b{i}"),
            num_classes=1000,
            image_size=get_variant(f"efficientnet-b{i}").eval_size,
            preprocessing=kind,
            top1=accuracy,
        )
        for i, accuracy in enumerate(top1)
        if accuracy is not None
    ]


def _l2(weights: str, file: str, image_size: int, top1: float) -> Released:
    return Released(
        model="efficientnet-l2",
        weights=weights,
        path=f"noisystudent/{file}.tar.gz",
        num_classes=1000,
        image_size=image_size,
        preprocessing="v1",
        top1=top1,
    )


RELEASED: tuple[Released, ...] = (
    *_v2("efficientnetv2-b0", (78.7, None)),
    *_v2("efficientnetv2-b1", (79.8, None)),
    *_v2("efficientnetv2-b2", (80.5, None)),
    *_v2("efficientnetv2-b3", (82.1, None)),
    *_v2("efficientnetv2-s", (83.9, 84.9)),
    *_v2("efficientnetv2-m", (85.2, 86.2)),
    *_v2("efficientnetv2-l", (85.7, 86.9)),
    *_v2("efficientnetv2-xl", (None, 87.2)),
    # of V1:                                B0    B1    B2    B3    B4    B5    B6    B7    B8
    *_v1("baseline", "ckpts/{model}.tar.gz",
                                          (76.7, 78.7, 79.8, 81.1, 82.5, 83.1)),
    *_v1("autoaugment", "ckptsaug/{model}.tar.gz",
                                          (77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3)),
    *_v1("randaugment", "randaug/{model}-randaug.tar.gz",
                                          (None, None, None, None, None, 83.7, None, 84.7)),
    *_v1("advprop", "advprop/{model}.tar.gz",
                                          (77.6, 79.6, 80.5, 81.9, 83.3, 84.3, 84.8, 85.2, 85.5),
         kind="advprop"),
    *_v1("noisystudent", "noisystudent/noisy_student_{model}.tar.gz",
                                          (78.8, 81.5, 82.4, 84.1, 85.3, 86.1, 86.4, 86.9)),
    _l2("noisystudent-475", "noisy_student_efficientnet-l2_475", 475, 88.2),
    _l2("noisystudent", "noisy_student_efficientnet-l2", 800, 88.4),
)  # fmt: skip


def find(model: str, weights: str) -> Released:
    """Returns the row of a released checkpoint.

    Raises:
        UserError: no such network, or no such weights of it; names those that there are.
    """
    known = {row.weights: row for row in RELEASED if row.model == model}
    if weights in known:
        return known[weights]
    if not known:
        near = difflib.get_close_matches(model, list_models(), n=1, cutoff=0.0)[0]
        raise UserError(
            f"{model}:{weights}: no weights of {model!r} were released; did you mean {near!r}? "
            f"Networks: {', '.join(list_models())}"
        )
    there = f"of {model} were released: {', '.join(known)}"
    if not weights:
        raise UserError(f"{model}: say which weights, NAME:WEIGHTS; {there}")
    near = difflib.get_close_matches(weights, known, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{model}:{weights}: no such weights; {meant}{there}")


def names_weights(spec: str) -> bool:
    """Whether WEIGHTS is NAME:WEIGHTS, known or not, and not a file."""
    return re.fullmatch(r"[\w.-]{2,}:[\w.-]+", spec) is not None and not spec.endswith(
        ".safetensors"
    )


def parse(spec: str) -> Released:
    """Returns the row of NAME:WEIGHTS.

    Raises:
        UserError: no such row.
    """
    model, _, weights = spec.partition(":")
    return find(model, weights)
