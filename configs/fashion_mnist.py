"""EfficientNetV2-B0 on Fashion-MNIST: how a new data set becomes one config.

Source:    this project. Data: Zalando Research, https://github.com/zalandoresearch/fashion-mnist
           (arXiv:1708.07747), the four published files *-ubyte.gz in one folder.
Command:   python -m effv2_jax.main --config configs/fashion_mnist.py --workdir runs/fashion \
               --config.data.dir=FOLDER_OF_THE_FOUR_FILES
Stages:    3 of 4 epochs: 32, 40, 48 px.
Hardware:  CPU; docs/add_a_dataset.md goes through the lines.
Wall time: not measured here.
Result:    not measured here.
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()

    config.model.name = "efficientnetv2-b0"
    config.model.survival_prob = 1.0

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
    config.train.epochs = 12.0
    config.train.optimizer = "momentum"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.1  # for 256 pictures
    config.train.warmup_epochs = 1.0
    config.train.weight_decay = 1e-4
    config.train.ema_decay = 0.999

    config.progressive.image_sizes = (32, 40, 48)
    config.progressive.dropout_rates = (0.1, 0.2, 0.3)
    config.progressive.mixup_alphas = (0.0, 0.0, 0.0)
    config.progressive.cutmix_alphas = (0.0, 0.0, 0.0)

    config.eval.image_size = 48

    return config
