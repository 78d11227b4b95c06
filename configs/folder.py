"""Your own photos: a folder with one sub-folder per class, from scratch or from weights.

Source:    `:scratch` and `:finetune` are this project's; `:official` is ImagenetFt of google/automl
           efficientnetv2 (datasets.py), shortened from 10,000 steps of 512 to 1,000 of 64.
Command:   python -m effv2_jax.main --config configs/folder.py:scratch --workdir runs/mine \
               --config.data.dir=PHOTOS
           python -m effv2_jax.main --config configs/folder.py:finetune --workdir runs/mine \
               --config.data.dir=PHOTOS --config.init.weights=WEIGHTS
           WEIGHTS: a .safetensors file, or a released one, efficientnetv2-s:imagenet21k-ft1k;
           --config.model.name must be its network.
           PHOTOS holds train/ and val/ (or validation/), or the classes themselves: then a fifth
           of each is held out (--config.data.eval_fraction).
Hardware:  a GPU; on a CPU choose --config.model.name=efficientnetv2-b0 and smaller pictures,
           --config.progressive.image_size=128 --config.progressive.min_image_size=64
           --config.eval.image_size=160.
Wall time: 4 to 6 minutes for the 244 photos of ants and bees (PyTorch's tutorial) with V2-B0 at
           128 px, 20 epochs, measured here on two cores busy with other work.
Result:    75.8 % (raw) and 74.5 % top-1 (moving average) of its 153 others, measured here from
           weights of configs/imagenette_cpu.py, 75.8 % already after 5 epochs (one seed; a standard
           error is 3.5 points); with the same settings from scratch 75.2 and 74.5 %, after 5
           epochs 58.2 %; the classifier alone 69.9 %.
"""

from ml_collections import ConfigDict

from effv2_jax.config import base_config
from effv2_jax.config_files import pick


def get_config(argument: str = "scratch") -> ConfigDict:
    config = base_config()

    config.model.name = "efficientnetv2-s"

    config.data.source = "folder"
    config.data.dir = "photos"
    config.data.eval_fraction = 0.2  # only where the folder has no val/

    kinds = {"scratch": _scratch, "finetune": _finetune, "official": _official}
    pick(argument, kinds, config="folder.py")(config)
    return config


def _scratch(config: ConfigDict) -> None:
    """Long, with magnitudes that grow with the pictures."""
    config.model.initializer = "fan_in"  # few classes, few photos (docs/design.md)

    config.data.augment = "randaugment"

    config.train.batch_size = 64
    config.train.epochs = 200.0
    # The official RMSProp is tuned for 4096 images a step; with few, AdamW learns faster.
    config.train.optimizer = "adamw"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.004  # for 256 photos
    config.train.warmup_epochs = 5.0
    config.train.weight_decay = 0.0
    config.train.decoupled_weight_decay = 0.05
    config.train.ema_decay = 0.999

    config.progressive.preset = "official"

    config.eval.every_epochs = 5.0


def _finetune(config: ConfigDict) -> None:
    """Short, at the full size, gently: a small rate that falls, next to no dropout."""
    config.model.survival_prob = 0.8

    config.data.preprocessing = "finetune"
    config.data.crop_area = (0.35, 1.0)
    config.data.augment = "none"

    config.train.batch_size = 64
    config.train.epochs = 20.0
    config.train.optimizer = "adamw"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.008  # for 256 photos
    config.train.warmup_epochs = 1.0
    config.train.weight_decay = 0.0
    config.train.decoupled_weight_decay = 0.05
    config.train.ema_decay = 0.99

    config.progressive.preset = "none"
    config.progressive.image_size = 1.0  # of the evaluation size
    config.progressive.dropout_rate = 1e-6
    config.progressive.mixup_alpha = 0.0
    config.progressive.cutmix_alpha = 0.0


def _official(config: ConfigDict) -> None:
    """ImagenetFt: RMSProp at a constant small rate, whole pictures with cutout."""
    config.model.survival_prob = 0.8

    config.data.preprocessing = "finetune"
    config.data.crop = "none"
    config.data.augment = "none"
    config.data.cutout = True

    config.train.batch_size = 64
    config.train.epochs = 15.0
    config.train.min_steps = 1000
    config.train.optimizer = "rmsprop"
    config.train.schedule = "constant"
    config.train.learning_rate = 0.0005  # for 256 photos
    config.train.warmup_epochs = 1.0
    config.train.ema_decay = 0.9996

    config.progressive.preset = "none"
    config.progressive.image_size = 1.0  # of the evaluation size
    config.progressive.dropout_rate = 1e-6
    config.progressive.mixup_alpha = 0.0
    config.progressive.cutmix_alpha = 0.0
