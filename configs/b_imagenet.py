"""EfficientNetV2-B0 to B3 on ImageNet (ILSVRC2012): V2's blocks at the sizes of EfficientNet V1.

Source:    google/automl, efficientnetv2: datasets.py (ImageNet), hparams.py, effnetv2_configs.py.
           Made for a comparison with V1: its preprocessing and AutoAugment instead of RandAugment,
           but in four stages. (The released code also lets a RandAugment magnitude fall from 5 to
           0 over them; AutoAugment has none, so it changes nothing.)
Command:   python -m effv2_jax.main --config configs/b_imagenet.py:b0 --workdir runs/v2b0 \
               --config.data.dir=TFDS_DIR
Stages:    4, 87.5 epochs each; b0: 144, 160, 176, 192 px, evaluation at 224 px.
Hardware:  the authors used TPUs with 4096 images a step.
Wall time: not measured here.
Result:    not measured here (released: 78.7, 79.8, 80.5, 82.1 % top-1 for b0 to b3).
"""

from pathlib import Path

from ml_collections import ConfigDict

from effv2_jax.config_files import load_config, pick


def get_config(argument: str = "b0") -> ConfigDict:
    config = load_config(Path(__file__).with_name("v2s_imagenet.py"))

    size = pick(argument, ("b0", "b1", "b2", "b3"), config="b_imagenet.py")
    config.model.name = f"efficientnetv2-{size}"

    config.data.preprocessing = "v1"
    config.data.crop_area = (0.08, 1.0)
    config.data.crop_aspect = (3 / 4, 4 / 3)
    config.data.crop_attempts = 10
    config.data.augment = "autoaugment"

    return config
