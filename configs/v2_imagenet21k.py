"""EfficientNetV2 on ImageNet21k (21,843 classes, several labels an image): s, m, l or xl.

Source:    google/automl, efficientnetv2: datasets.py (ImageNet21k); arXiv:2104.00298, section 5.2.
           One stage at 224 px, no augmentation beyond crop and flip, next to no dropout: with
           12.7 million images the networks hardly overfit in 60 epochs.
Command:   python -m effv2_jax.main --config configs/v2_imagenet21k.py:xl --workdir runs/xl_21k \
               --config.data.dir=TFDS_DIR
Data:      not public as a TFDS data set: build one named imagenet21k whose examples have `image`
           and `labels` (several), or give a folder per class with --config.data.source=folder,
           --config.data.eval_fraction=0.008 and --config.data.multilabel=false.
Hardware:  the authors used TPUs with 4096 images a step.
Wall time: not measured here (paper, Table 7: 45 hours on 32 TPUv3 cores for XL).
Result:    not measured here; the paper gives the accuracy after fine-tuning on ImageNet:
           84.9 (S), 86.2 (M), 86.8 (L), 87.3 (XL) % top-1.
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config
from effv2_jax.config_files import pick


def get_config(argument: str = "s") -> ConfigDict:
    config = base_config()

    size = pick(argument, ("s", "m", "l", "xl"), config="v2_imagenet21k.py")
    config.model.name = f"efficientnetv2-{size}"
    config.model.num_classes = 21843
    config.model.survival_prob = 1.0

    # The released code evaluates on the first 16 of its files, 100,357 images.
    config.data.source = "tfds"
    config.data.name = "imagenet21k"
    config.data.train_split = "train[100357:]"
    config.data.eval_split = "train[:100357]"
    config.data.multilabel = True
    config.data.augment = "none"

    # The labels of an image are divided by their number, so that they sum to 1 under the softmax.
    config.train.loss = "softmax"
    config.train.batch_size = 4096
    config.train.epochs = 60.0
    config.train.optimizer = "rmsprop"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.008  # for 256 examples: 0.128 at 4096
    config.train.warmup_epochs = 1.0
    config.train.weight_decay = 1e-5
    config.train.ema_decay = 0.9999
    config.train.label_smoothing = 0.0

    config.progressive.preset = "none"
    config.progressive.image_size = 224
    config.progressive.dropout_rate = 1e-6
    config.progressive.mixup_alpha = 0.0
    config.progressive.cutmix_alpha = 0.0

    config.eval.image_size = 224
    config.eval.batch_size = 1024

    return config
