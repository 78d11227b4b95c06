"""EfficientNetV2-S on Imagenette: ten classes of ImageNet, from scratch, in four stages.

Source:    the recipe of configs/v2s_imagenet.py with what 9,469 images need instead of 1.25
           million: a smaller batch, and averages (EMA) over fewer steps. Imagenette: fast.ai,
           https://github.com/fastai/imagenette
Command:   python -m effv2_jax.main --config configs/v2s_imagenette.py --workdir runs/imagenette
           reads the TFDS data set imagenette/320px-v2 from --config.data.dir (default:
           ~/tensorflow_datasets). The folders of the published archive, train/ and val/:
           python -m effv2_jax.main --config configs/v2s_imagenette.py:folder \
               --workdir runs/imagenette --config.data.dir=imagenette2-320
Stages:    4 of 87.5 epochs: 171, 214, 257, 300 px, RandAugment 5 to 10; evaluation at 384 px.
Hardware:  one GPU with 24 GB or more. For CPUs: configs/imagenette_cpu.py.
Wall time: not measured here.
Result:    not measured here. To set beside it: 89.75 % top-1, reported for V2-S in four stages of
           87 epochs on one RTX 3090 (a student reproduction at TU Delft).
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config
from effv2_jax.config_files import pick


def get_config(argument: str = "tfds") -> ConfigDict:
    config = base_config()

    config.model.name = "efficientnetv2-s"

    config.data.source = pick(argument, ("tfds", "folder"), config="v2s_imagenette.py")
    if argument == "tfds":
        config.data.name = "imagenette/320px-v2"
    else:
        config.data.dir = "imagenette2-320"
    config.data.train_split = "train"
    config.data.eval_split = "validation"  # in folders also found as val/
    config.data.augment = "randaugment"

    config.train.batch_size = 128
    config.train.epochs = 350.0
    config.train.optimizer = "rmsprop"
    config.train.schedule = "exponential"
    config.train.learning_rate = 0.016  # for 256 images
    config.train.warmup_epochs = 5.0
    config.train.decay_epochs = 2.4
    config.train.decay_factor = 0.97
    config.train.weight_decay = 1e-5
    config.train.ema_decay = 0.999  # 26,000 steps in all; 0.9999 would average over a third of them
    config.train.label_smoothing = 0.1

    config.progressive.preset = "official"

    config.eval.every_epochs = 5.0

    return config
