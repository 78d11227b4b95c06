"""EfficientNetV2-S on ImageNet (ILSVRC2012) from scratch: the recipe of the released code.

Source:    google/automl, efficientnetv2: datasets.py (ImageNet), hparams.py, effnetv2_configs.py.
           `:paper` instead: arXiv:2104.00298, section 5.1 and Table 6, wherever the two differ
           (last magnitude 15 instead of 10, dropout 0.1 to 0.3 instead of 0.2, sizes from 128 px,
           BatchNorm momentum 0.99); README.md has the whole table.
Command:   python -m effv2_jax.main --config configs/v2s_imagenet.py --workdir runs/v2s \
               --config.data.dir=TFDS_DIR
Stages:    4, 87.5 epochs each: 171, 214, 257, 300 px, RandAugment 5 to 10; evaluation at 384 px.
Hardware:  the authors used TPUs with 4096 images a step; where that does not fit, a smaller
           --config.train.batch_size scales the learning rate with it.
Wall time: not measured here (Table 7 of the paper has it for 32 TPUv3 cores).
Result:    not measured here (paper: 83.9 % top-1).
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config
from effv2_jax.config_files import pick


def get_config(argument: str = "official") -> ConfigDict:
    config = base_config()

    config.model.name = "efficientnetv2-s"

    # Like the released code, which keeps 2 % of the training images for choosing checkpoints.
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.train_split = "train[2%:]"
    config.data.eval_split = "validation"
    config.data.augment = "randaugment"

    config.train.batch_size = 4096
    config.train.epochs = 350.0
    config.train.optimizer = "rmsprop"
    config.train.schedule = "exponential"
    config.train.learning_rate = 0.016  # for 256 examples: 0.256 at 4096
    config.train.warmup_epochs = 5.0
    config.train.decay_epochs = 2.4
    config.train.decay_factor = 0.97
    config.train.weight_decay = 1e-5
    config.train.ema_decay = 0.9999
    config.train.label_smoothing = 0.1

    # Sizes, magnitudes, mixup and dropout of the four stages: training/progressive.py.
    config.progressive.preset = pick(argument, ("official", "paper"), config="v2s_imagenet.py")
    if argument == "paper":
        config.model.bn_momentum = 0.99

    return config
