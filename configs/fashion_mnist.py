"""EfficientNetV2-B0 on Fashion-MNIST: how a new data set becomes one config.

Source:    this project. Data: Zalando Research, https://github.com/zalandoresearch/fashion-mnist
           (arXiv:1708.07747), the four published files *-ubyte.gz in one folder.
Command:   python -m effv2_jax.main --config configs/fashion_mnist.py --workdir runs/fashion \
               --config.data.dir=FOLDER_OF_THE_FOUR_FILES
Stages:    3 of 3 epochs: 48, 56, 64 px.
Hardware:  CPU; docs/add_a_dataset.md goes through the lines.
Wall time: 745 s for the first 8,000 pictures, measured here on two cores busy with other work;
           all 60,000: not measured here.
Result:    85.8 % top-1 (moving average) on the first 2,000 test pictures after 562 steps on the
           first 8,000 training pictures, measured here (one seed); with the official
           initialisation and half the learning rate it was 77.6 %. All 60,000 give
           seven times as many: not measured here.
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()

    config.model.name = "efficientnetv2-b0"
    config.model.survival_prob = 1.0
    config.model.initializer = "fan_in"  # with ten classes it learns much faster (docs/design.md)

    # What the data set is.
    config.data.source = "arrays"
    config.data.dir = "fashion-mnist"
    config.data.train_split = "train"
    config.data.eval_split = "t10k"

    # What may happen to its pictures: they fill the frame, and left and right do not matter.
    config.data.preprocessing = "finetune"
    config.data.crop_area = (0.6, 1.0)
    config.data.augment = "none"

    config.train.batch_size = 128
    config.train.epochs = 9.0
    config.train.optimizer = "adamw"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.008  # for 256 pictures
    config.train.warmup_epochs = 1.0
    config.train.weight_decay = 0.0
    config.train.decoupled_weight_decay = 0.05
    config.train.ema_decay = 0.999

    # The network divides sizes by 32: from 33 px on, its last maps have more than one place.
    config.progressive.image_sizes = (48, 56, 64)
    config.progressive.dropout_rates = (0.1, 0.2, 0.3)
    config.progressive.mixup_alphas = (0.0, 0.0, 0.0)
    config.progressive.cutmix_alphas = (0.0, 0.0, 0.0)

    config.eval.image_size = 64

    return config
