"""EfficientNet V1, B0 to B8 and L2, on ImageNet (ILSVRC2012), as the V2 code trains them.

Source:    google/automl, efficientnetv2: datasets.py (ImageNet), effnetv2_configs.py. One stage at
           80 % of the evaluation size, rounded down to a multiple of 16 (b0: 176 of 224 px);
           AutoAugment. arXiv:1905.11946 trained at the evaluation size itself:
           --config.progressive.image_size=1.0
Command:   python -m effv2_jax.main --config configs/v1_imagenet.py:b0 --workdir runs/v1b0 \
               --config.data.dir=TFDS_DIR
Hardware:  the authors used TPUs with 4096 images a step.
Wall time: not measured here.
Result:    not measured here. (The accuracies published for b8 and l2 come from AdvProp and Noisy
           Student, which this recipe is not.)
"""

from pathlib import Path

from ml_collections import ConfigDict

from effv2_jax.config_files import load_config, pick

_SIZES = (*(f"b{size}" for size in range(9)), "l2")


def get_config(argument: str = "b0") -> ConfigDict:
    size = pick(argument, _SIZES, config="v1_imagenet.py")
    config = load_config(Path(__file__).with_name("b_imagenet.py"))

    config.model.name = f"efficientnet-{size}"

    config.progressive.preset = "none"  # one stage, at the variant's 80 %

    return config
