"""Every recipe in configs/ loads and is valid; the official ones equal what main.py derives."""

import ast
import functools
import importlib.util
import re
import time
from pathlib import Path

import pytest

from effv2_jax.config import validate
from effv2_jax.config_files import load_config, pick, split_argument
from effv2_jax.errors import UserError
from effv2_jax.models.variants import get_variant
from effv2_jax.training.progressive import make_stages, schedule_length
from effv2_jax.training.recipe import make_recipe
from tests import reference

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"

# Every recipe with every argument it takes.
ARGUMENTS = {
    "b_imagenet": ("b0", "b1", "b2", "b3"),
    "digits": (None,),
    "fashion_mnist": (None,),
    "folder": ("scratch", "finetune", "official"),
    "imagenette_cpu": (None,),
    "v1_imagenet": ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "l2"),
    "v2_imagenet21k": ("s", "m", "l", "xl"),
    "v2l_imagenet": ("official", "paper"),
    "v2m_imagenet": ("official", "paper"),
    "v2s_imagenet": ("official", "paper"),
    "v2s_imagenette": ("tfds", "folder"),
}
RECIPES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]

# Recipe -> (model, data set) of schedules.json.
OFFICIAL = {
    **{("b_imagenet", f"b{i}"): (f"efficientnetv2-b{i}", "imagenet") for i in range(4)},
    **{("v1_imagenet", f"b{i}"): (f"efficientnet-b{i}", "imagenet") for i in range(9)},
    ("v1_imagenet", "l2"): ("efficientnet-l2", "imagenet"),
    **{
        ("v2_imagenet21k", size): (f"efficientnetv2-{size}", "imagenet21k")
        for size in ("s", "m", "l", "xl")
    },
    **{
        (f"v2{size}_imagenet", "official"): (f"efficientnetv2-{size}", "imagenet")
        for size in ("s", "m", "l")
    },
}


def _load(name, argument):
    return load_config(CONFIGS / f"{name}.py", argument)


def test_the_list_of_recipes_is_complete():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), RECIPES)
def test_recipe_is_valid_locked_and_plans_its_stages(name, argument):
    config = _load(name, argument)
    validate(config)
    assert config.is_locked
    variant = get_variant(config.model.name)
    stages = make_stages(config, variant=variant, num_examples=9469)
    sizes = [stage.image_size for stage in stages]
    assert sizes == sorted(sizes)


def test_loading_and_checking_a_recipe_takes_milliseconds():
    _load("digits", None)  # imports
    times = []
    for name, argument in RECIPES:
        start = time.process_time()
        validate(_load(name, argument))
        times.append(time.process_time() - start)
    # Measured 2 ms; the bound leaves room for slow machines, not for an import of JAX.
    assert sorted(times)[len(times) // 2] < 0.05


@pytest.mark.parametrize(("name", "argument"), OFFICIAL)
def test_official_recipe_derives_what_the_released_code_derives(name, argument):
    config = _load(name, argument)
    model, dataset = OFFICIAL[name, argument]
    expected = reference.load_json("schedules.json")["models"][model][dataset]
    images = expected["train_images"]
    variant = get_variant(config.model.name)
    stages = make_stages(config, variant=variant, num_examples=images)
    recipe = make_recipe(
        config, stages=stages, num_examples=images, num_classes=expected["num_classes"]
    )

    assert config.model.name == model
    assert config.train.batch_size == expected["batch_size"]
    assert config.train.epochs == expected["epochs"]
    assert stages[-1].end_step == expected["train_steps_main"]
    assert schedule_length(config, num_examples=images) == pytest.approx(
        expected["train_steps_model_fn"], rel=1e-12
    )
    found = [
        {
            "image_size": stage.image_size,
            "max_steps": stage.end_step,
            "ram": stage.magnitude,
            "mixup_alpha": stage.mixup_alpha,
            "cutmix_alpha": stage.cutmix_alpha,
            "dropout": stage.dropout_rate,
        }
        for stage in stages
    ]
    assert len(found) == len(expected["stages"])
    for ours, theirs in zip(found, expected["stages"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)

    assert recipe.optimizer == expected["optimizer"]
    assert recipe.schedule.keywords["kind"] == expected["lr_sched"]
    assert recipe.schedule.keywords["initial"] == pytest.approx(expected["scaled_lr"])
    assert recipe.schedule.keywords["floor"] == pytest.approx(expected["scaled_lr_min"])
    assert recipe.schedule.keywords["warmup_steps"] == expected["warmup_steps"]
    assert recipe.schedule.keywords["decay_steps"] == pytest.approx(expected["decay_steps"])
    assert recipe.schedule.keywords["decay_factor"] == expected["decay_factor"]
    assert recipe.weight_decay == expected["weight_decay"]
    assert recipe.weight_decay_inc == expected["weight_decay_inc"]
    assert recipe.ema_decay == expected["ema_decay"]
    assert recipe.label_smoothing == expected["label_smoothing"]
    assert recipe.gradient_clip == expected["gclip"]
    assert recipe.multilabel == expected["multiclass"]
    assert (expected["loss_type"] or "softmax") == recipe.loss

    survival = config.model.survival_prob
    assert (variant.survival_prob if survival is None else survival) == expected["survival_prob"]
    augment = {
        "randaug": ("randaugment", "v2", (0.05, 1.0), 100),
        "effnetv1_autoaug": ("autoaugment", "v1", (0.08, 1.0), 10),
        None: ("none", "v2", (0.05, 1.0), 100),
    }[expected["augname"]]
    data = config.data
    assert (data.augment, data.preprocessing, data.crop_area, data.crop_attempts) == augment
    assert data.augment_layers == expected["ra_num_layers"]
    size = config.eval.image_size
    assert (variant.eval_size if size is None else size) == expected["eval_isize"]


@pytest.mark.parametrize(
    ("size", "last", "magnitude", "mixup", "dropout"),
    [("s", 300, 15, 0, 0.3), ("m", 380, 20, 0.2, 0.4), ("l", 380, 25, 0.5, 0.5)],
)
def test_paper_recipe_runs_from_the_first_to_the_last_column_of_table_6(
    size, last, magnitude, mixup, dropout
):
    config = _load(f"v2{size}_imagenet", "paper")
    variant = get_variant(config.model.name)
    first, *_, final = make_stages(config, variant=variant, num_examples=1_281_167)
    assert (first.image_size, final.image_size) == (128, last)
    assert (first.magnitude, final.magnitude) == pytest.approx((5, magnitude))
    assert (first.mixup_alpha, final.mixup_alpha) == pytest.approx((0, mixup))
    assert (first.dropout_rate, final.dropout_rate) == pytest.approx((0.1, dropout))
    assert (first.cutmix_alpha, final.cutmix_alpha) == (0, 0)
    assert config.model.bn_momentum == 0.99


def test_finetune_settings_are_the_official_ones_but_for_batch_and_length():
    config = _load("folder", "official")
    expected = reference.load_json("schedules.json")["models"]["efficientnetv2-s"]["imagenetft"]
    (stage,) = make_stages(config, variant=get_variant("efficientnetv2-s"), num_examples=10_000)
    assert stage.image_size == expected["train_isize"]
    assert stage.dropout_rate == expected["dropout"]
    assert config.train.optimizer == expected["optimizer"]
    assert config.train.schedule == expected["lr_sched"]
    assert config.train.learning_rate == expected["lr_base"]
    assert config.train.warmup_epochs == expected["warmup_epochs"]
    assert config.train.ema_decay == expected["ema_decay"]
    assert config.model.survival_prob == expected["survival_prob"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_docstring_tells_source_command_hardware_time_and_result(name):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    for heading in ("Source:", "Command:", "Hardware:", "Wall time:", "Result:"):
        assert re.search(f"^{heading}", text, re.MULTILINE), heading
    assert f"--config configs/{name}.py" in text
    for heading in ("Wall time:", "Result:"):
        told = re.search(f"^{heading}(.*?)(?=^\\S|\\Z)", text, re.MULTILINE | re.DOTALL)[1]
        assert re.search(r"\bmeasured here\b", told), f"{heading} measured here, or not?"


@functools.cache
def _quoted_commands():
    text = "\n".join(path.read_text() for path in CONFIGS.glob("*.py"))
    return re.findall(r"--config (configs/\S+)((?:[^`\n]|\\\n)*)", text)


def test_commands_in_docstrings_name_existing_recipes_and_keys():
    from effv2_jax.config import base_config, keys

    commands = _quoted_commands()
    assert len(commands) >= len(ARGUMENTS)
    for config, rest in commands:
        path, argument = split_argument(config)
        load_config(ROOT / path, argument)
        for key in re.findall(r"--config\.([\w.]+)=", rest):
            assert key in keys(base_config()), f"{config}: {key}"


@pytest.mark.parametrize("name", [n for n, arguments in ARGUMENTS.items() if None not in arguments])
def test_unknown_argument_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"no such variant.*known: "):
        _load(name, "b99")


@pytest.mark.parametrize("name", [n for n, arguments in ARGUMENTS.items() if None in arguments])
def test_argument_of_a_recipe_without_any_is_refused(name):
    with pytest.raises(UserError, match="takes no argument; found 'b0'"):
        _load(name, "b0")


def test_argument_is_split_off_behind_the_file_only():
    assert split_argument("configs/a.py") == ("configs/a.py", None)
    assert split_argument("configs/a.py:b:c") == ("configs/a.py", "b:c")
    assert split_argument("d:/configs/a.py:b") == ("d:/configs/a.py", "b")


def test_pick_takes_names_or_a_table():
    assert pick("a", ("a", "b"), config="x.py") == "a"
    assert pick("a", {"a": 1}, config="x.py") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config.train.epoch = 5", r"line 4: unknown key 'epoch' \(nearest: .*train\.epochs"),
        ("config.trian.epochs = 5", r"line 4: .*trian"),
        ("config.train.batch_size = 'a'", r"line 4: TypeError: .*batch_size"),
        ("1 / 0", r"line 4: ZeroDivisionError: division by zero"),
        ("import effv2_jax.nothing", r"line 4: ModuleNotFoundError"),
        ("return 3", r"returned int, expected the ConfigDict"),
        ("config = [", r"line \d: "),
    ],
)
def test_config_file_that_fails_is_told_in_one_line_with_its_place(tmp_path, text, says):
    path = tmp_path / "mine.py"
    lines = ("from effv2_jax.config import base_config", "def get_config():")
    lines += ("    config = base_config()", f"    {text}", "    return config")
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=says) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_config_file_names_the_nearest():
    with pytest.raises(UserError, match=r"no config file .*nearest: .*digits\.py"):
        load_config(CONFIGS / "digit.py")


def test_file_without_get_config_is_told(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"defines no get_config"):
        load_config(tmp_path / "mine.py")


def test_recipes_import_without_jax():
    for path in CONFIGS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "optax"), path
                assert importlib.util.find_spec(name.split(".")[0]), path
