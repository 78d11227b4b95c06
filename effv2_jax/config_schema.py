"""The config schema: every option, its default, its unit or bound.

A recipe in `configs/` calls `base_config()` and sets what differs. Defaults are those of the
official code (hparams.py, datasets.py of google/automl efficientnetv2) where it has the option.
`None` means "derived": from the model, the data set or the machine, as the comment says.
"""

from ml_collections import ConfigDict, config_dict


def _int() -> object:
    return config_dict.placeholder(int)


def _float() -> object:
    return config_dict.placeholder(float)


def _text() -> object:
    return config_dict.placeholder(str)


def base_config() -> ConfigDict:
    """Returns the complete config with every default filled in, locked against unknown keys."""
    config = ConfigDict()

    # A table: the comments stand in one column.
    # fmt: off

    config.model = ConfigDict({
        "name": "efficientnetv2-s",      # see effv2_jax.list_models()
        "num_classes": _int(),           # None: as many as the data set has
        "width": _float(),               # multiplier of channels; None: the variant's
        "depth": _float(),               # multiplier of repeats; None: the variant's
        "blocks": (),                    # block strings "r2_k3_s1_e1_i24_o24_c1"; (): the variant's
        "activation": "silu",            # silu, relu, relu6, hswish, gelu, mish, ...
        "survival_prob": _float(),       # of the last block; None: the variant's; 1: no drop path
        "dtype": "auto",                 # auto (bfloat16 on GPU and TPU), float32, bfloat16
        "remat": False,                  # recompute each block in the backward pass: less memory
        "remat_fused": True,             # FusedMBConv too; False: MBConv alone, costs less time
        "remat_norms": False,            # recompute norms and activations alone: costs little time
        "bn_momentum": 0.9,
        "bn_epsilon": _float(),          # added to variances; None: the variant's
        "padding": _text(),              # SAME (TensorFlow), SYMMETRIC (PyTorch); None: variant's
        "bn_group_size": 0,              # examples per BatchNorm group; 0: the whole global batch
        "head_bias": 0.0,                # initial bias of the classifier
        "initializer": "official",       # official, or fan_in: learns faster from few images
        "lowering": "auto",              # auto (by backend), plain, cpu, gpu
    })

    config.data = ConfigDict({
        "source": "folder",              # tfds, folder, arrays, digits, synthetic
        "name": "",                      # tfds: data set name, e.g. "imagenette/320px-v2"
        "dir": "",                       # tfds: data_dir; folder and arrays: where the files are
        "train_split": "train",          # tfds: split expression; folder: sub-folder
        "eval_split": "validation",      # tfds: split expression; folder: sub-folder
        "eval_fraction": 0.0,            # folder without splits: share of each class held out
        "train_list": "",                # folder: text file of relative paths, one a line
        "eval_list": "",                 # the same for evaluation
        "multilabel": False,             # labels are multi-hot vectors
        "num_examples": 1024,            # synthetic: training examples
        "preprocessing": "v2",           # v2, v1, finetune, advprop, pillow-...: see data/kinds.py
        "crop": "inception",             # training crop: inception, none
        "crop_area": (0.05, 1.0),        # share of the image's area
        "crop_aspect": (0.75, 1.33),     # width / height
        "crop_attempts": 100,
        "flip": True,                    # horizontal, probability 1/2
        "augment": "randaugment",        # none, randaugment, autoaugment, ra_aa
        "augment_layers": 2,             # RandAugment operations per image
        "cutout": False,                 # the 'ft' cutout: noise square of a quarter of the size
        "random_erasing": 0.0,           # probability per image
        "on_corrupt": "error",           # error (names the file) or skip (counted and reported)
        "decoder": "pillow",             # pillow, pillow_draft (reduced JPEG decoding for
                                         # training crops), simplejpeg (extra fast-decode)
        "cache": "none",                 # none, decoded: keep decoded images in host memory
        "workers": _int(),               # loader processes; None: by the number of cores
        "threads": 2,                    # decoding threads per process
        "prefetch": 2,                   # batches ready on the device
    })

    config.train = ConfigDict({
        "seed": 0,
        "batch_size": 4096,              # global; divisible by the number of devices
        "epochs": 350.0,
        "min_steps": 0,                  # train at least this long
        "optimizer": "rmsprop",          # rmsprop, momentum, sgd, adam, adamw
        "schedule": "exponential",       # exponential, cosine, linear, constant
        "learning_rate": 0.016,          # per 256 examples; scaled by batch_size / 256
        "min_learning_rate": 0.0,        # per 256 examples
        "warmup_epochs": 5.0,
        "decay_epochs": 2.4,             # exponential: epochs per stair
        "decay_factor": 0.97,            # exponential: factor per stair
        "weight_decay": 1e-5,            # L2 in the loss: weight_decay * sum(w^2) / 2
        "weight_decay_inc": 0.0,         # weight_decay grows to (1 + inc) times over the run
        "weight_decay_exclude": ".*/(bias|scale)",   # full match on parameter paths
        "decoupled_weight_decay": 0.0,   # adamw: p -= lr * decay * p
        "ema_decay": 0.9999,             # 0: no moving average
        "label_smoothing": 0.1,
        "gradient_clip": 0.0,            # norm; 0: off
        "loss": "softmax",               # softmax, sigmoid, summed_sigmoid
        "on_nonfinite": "stop",          # stop the run, or skip the step and count it
    })

    config.progressive = ConfigDict({
        "preset": "official",            # official, paper, none (one stage); lists below win
        "stages": _int(),                # None: the preset's
        "image_size": _float(),          # last stage, px; <= 16: factor of eval; None: variant's
        "min_image_size": 128,           # official: where the interpolation starts (ibase)
        "magnitude": _float(),           # RandAugment, of the last stage; None: the preset's
        "mixup_alpha": _float(),         # of the last stage; None: the preset's
        "cutmix_alpha": _float(),        # of the last stage; None: the preset's
        "dropout_rate": _float(),        # of the last stage; None: the preset's
        "image_sizes": (),               # explicit, one entry a stage
        "epochs": (),                    # explicit epochs per stage
        "magnitudes": (),
        "mixup_alphas": (),
        "cutmix_alphas": (),
        "dropout_rates": (),
        "batch_sizes": (),
    })

    config.eval = ConfigDict({
        "batch_size": _int(),            # global; None: train.batch_size
        "image_size": _float(),          # px; <= 16: factor of the model's; None: the model's
        "every_epochs": 1.0,
        "raw": True,                     # evaluate the raw weights
        "ema": True,                     # evaluate the moving average
        "label_subset": "none",          # --mode eval: none; imagenet1k: a network of ImageNet21k
                                         # on ImageNet
    })

    config.init = ConfigDict({
        "weights": "",                   # to start from: a .safetensors file, or NAME:WEIGHTS of
                                         # the released ones (python -m effv2_jax.pretrained)
        "freeze": "",                    # parameters whose path matches (re.match) stay as they
                                         # are, and so do the statistics of such norms
    })

    config.runtime = ConfigDict({
        "distributed": "auto",           # auto: join the processes srun, mpirun, a TPU pod or
                                         # JAX_COORDINATOR_ADDRESS tell of; off: train alone
        "devices": 0,                    # devices of the data mesh; 0: all
        "compilation_cache": "auto",     # auto (user cache folder), none, or a folder
        "background_compile": True,      # compile the next stage while this one trains
        "checkpoint_every_minutes": 10.0,
        "checkpoint_every_steps": 0,     # 0: by minutes and at every evaluation only
        "keep_last": 2,
        "keep_best": 1,
        "log_every_steps": 50,
        "tensorboard": True,
        "profile": "",                   # folder: trace some steps of each stage into it
    })
    # fmt: on
    return config.lock()
