"""EfficientNetV2-M on ImageNet (ILSVRC2012) from scratch: the recipe of V2-S, a larger network.

Source:    google/automl, efficientnetv2: datasets.py (ImageNet), hparams.py, effnetv2_configs.py.
           `:paper` instead: arXiv:2104.00298, section 5.1 and Table 6 (128 to 380 px, RandAugment
           5 to 20, mixup 0 to 0.2 without CutMix, dropout 0.1 to 0.4, BatchNorm momentum 0.99).
Command:   python -m effv2_jax.main --config configs/v2m_imagenet.py --workdir runs/v2m \
               --config.data.dir=TFDS_DIR
Stages:    4, 87.5 epochs each: 192, 256, 320, 384 px, RandAugment 5 to 15, mixup and CutMix 0 to
           0.2, dropout 0.3; evaluation at 480 px.
Hardware:  the authors used TPUs with 4096 images a step; --config.model.remat=true trades time
           for memory.
Wall time: not measured here (Table 7 of the paper has it for 32 TPUv3 cores).
Result:    not measured here (paper: 85.1, released weights: 85.2 % top-1).
"""

from pathlib import Path

from ml_collections import ConfigDict

from effv2_jax.config_files import load_config


def get_config(argument: str = "official") -> ConfigDict:
    config = load_config(Path(__file__).with_name("v2s_imagenet.py"), argument)

    # The variant brings its sizes, magnitudes and dropout (models/variants.py, Table 6).
    config.model.name = "efficientnetv2-m"

    return config
