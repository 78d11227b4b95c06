"""Progressive learning: the plan of a run's stages. Pure Python, importable without JAX.

Image size and regularisation grow together (EfficientNetV2, arXiv:2104.00298, section 4 and
Algorithm 1). A stage fixes the image size, the RandAugment magnitude, mixup, CutMix, dropout and
the batch size for a range of steps. Where paper and released code differ (official: main.py):

* Image size. Paper: stage i interpolates from the first to the last size, both included (S:
  128, 185, 242, 300). Code: the interpolation starts one stage earlier, the smallest size is never
  trained: int(128 + (last - 128) * (i + 1) / n) (S: 171, 214, 257, 300).
* Last size. Paper: S 300, M and L 380. Code: S 300, M and L 384.
* RandAugment. Paper: 5 to 15, 20, 25 for S, M, L. Code: 5 to 10, 15, 20. B0 to B3 run from 5
  down to 0 in the code, which nobody notices: they use AutoAugment, which has no magnitude.
* Dropout. Paper: 0.1 to 0.3, 0.4, 0.5. Code: computes such a list and drops it; the rate is the
  model's in every stage (0.2, 0.3, 0.4).
* Mixup. Paper: 0 to 0, 0.2, 0.5. Code: the same, and CutMix with the same numbers beside it.
* V1 models and fine-tuning configs have one stage.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from effv2_jax.errors import UserError

PRESETS = ("official", "paper", "none")

# Values of the first stage. The code's and the paper's agree where both have one.
FIRST_MAGNITUDE = 5.0
FIRST_MIXUP_ALPHA = 0.0
FIRST_CUTMIX_ALPHA = 0.0
FIRST_PAPER_DROPOUT_RATE = 0.1

# Lists of the config, one entry a stage.
LISTS = ("image_sizes", "epochs", "magnitudes", "dropout_rates")
LISTS += ("mixup_alphas", "cutmix_alphas", "batch_sizes")

PAPER_STAGES = 4  # section 4.1: "about 87 epochs per stage" of 350

# A configured size up to this one is a factor of the evaluation size (official: main.py).
LARGEST_SIZE_FACTOR = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: what holds for steps start_step <= n < end_step.

    The learning-rate schedule runs in base steps: examples seen / train.batch_size. With the same
    batch size in all stages these are the steps themselves, as in the official code.
    """

    index: int
    image_size: int  # px, square
    batch_size: int  # global
    start_step: int
    end_step: int  # exclusive
    first_example: int  # examples drawn from the stream before this stage
    epochs: float  # of this stage
    magnitude: float  # RandAugment
    dropout_rate: float
    mixup_alpha: float
    cutmix_alpha: float
    schedule_start: float  # base steps at start_step
    schedule_scale: float  # base steps per step
    lr_scale: float  # factor of the learning rate: batch_size / train.batch_size

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.end_step - self.start_step

    def schedule_step(self, step: int) -> float:
        """Returns the base step at which the schedule stands at `step` of this stage."""
        return self.schedule_start + (step - self.start_step) * self.schedule_scale


def plan_stages(
    *,
    num_examples: int,
    batch_size: int,
    epochs: float,
    image_size: int,
    magnitude: float = 0.0,
    dropout_rate: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    preset: str = "official",
    num_stages: int | None = None,
    min_image_size: int = 128,
    min_steps: int = 0,
    image_sizes: Sequence[int] = (),
    stage_epochs: Sequence[float] = (),
    magnitudes: Sequence[float] = (),
    dropout_rates: Sequence[float] = (),
    mixup_alphas: Sequence[float] = (),
    cutmix_alphas: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
) -> tuple[Stage, ...]:
    """Plans the stages of a run.

    The scalars are the values of the LAST stage; the preset says how the stages before it lead
    there (see the module's text). A list, one entry a stage, replaces what the preset says.

    Args:
      num_examples: training examples per epoch.
      batch_size: global examples per step, unless batch_sizes says otherwise; one base step of
        the learning-rate schedule.
      epochs: length of the run; the stages share it equally, boundaries rounded down to steps.
      image_size: px.
      magnitude: RandAugment magnitude.
      dropout_rate: of the classifier, in [0, 1).
      mixup_alpha: 0 is off.
      cutmix_alpha: 0 is off.
      preset: official, paper or none (the same values in all stages).
      num_stages: None: as many as the lists have entries, else 1.
      min_image_size: px; official: where the interpolation starts; paper: size of stage 0.
      min_steps: the run has at least this many base steps.
      image_sizes: px.
      stage_epochs: epochs of each stage; their sum replaces `epochs`.
      magnitudes: RandAugment.
      dropout_rates: of the classifier.
      mixup_alphas: of mixup.
      cutmix_alphas: of CutMix.
      batch_sizes: global examples per step of each stage; the learning rate follows in proportion
        and the schedule counts examples, so that both mean the same as with one batch size.

    Returns:
      Stages in order; they cover the run without gap.

    Raises:
      UserError: names every key that is wrong, in the config's words.
    """
    given = (image_sizes, stage_epochs, magnitudes, dropout_rates)
    given += (mixup_alphas, cutmix_alphas, batch_sizes)
    lists = {name: tuple(values) for name, values in zip(LISTS, given, strict=True)}
    _check_run(num_examples=num_examples, batch_size=batch_size, epochs=epochs, preset=preset)
    n = _count_stages(num_stages, lists)
    if not lists["image_sizes"]:
        _check_sizes_grow(preset, n, image_size=image_size, min_image_size=min_image_size)
        lists["image_sizes"] = _image_sizes(preset, n, min_image_size, image_size)
    constant = preset == "none"
    ramps = {
        "magnitudes": (FIRST_MAGNITUDE, magnitude),
        "mixup_alphas": (FIRST_MIXUP_ALPHA, mixup_alpha),
        "cutmix_alphas": (FIRST_CUTMIX_ALPHA, cutmix_alpha),
        "dropout_rates": (
            min(FIRST_PAPER_DROPOUT_RATE, dropout_rate) if preset == "paper" else dropout_rate,
            dropout_rate,
        ),
    }
    for name, (first, last) in ramps.items():
        lists[name] = lists[name] or _linear(last if constant else first, last, n)
    lists["batch_sizes"] = lists["batch_sizes"] or (batch_size,) * n
    _check_values(lists)

    run = {"num_examples": num_examples, "batch_size": batch_size, "epochs": epochs}
    ends = _last_examples(lists["epochs"], n, min_steps=min_steps, **run)
    stages: list[Stage] = []
    step, example = 0, 0
    for index in range(n):
        batch = lists["batch_sizes"][index]
        # Counted from the start of the run, so that what one stage leaves over (less than one
        # batch) is not lost but belongs to the next.
        steps = int((ends[index] - example) // batch)
        if steps < 1:
            raise UserError(
                f"progressive: stage {index} of {n} has no step ({ends[index] - example:g} "
                f"examples left for it, batch {batch}): use fewer stages (progressive.stages), "
                "more epochs (train.epochs) or a smaller batch (train.batch_size)"
            )
        stages.append(
            Stage(
                index=index,
                image_size=int(lists["image_sizes"][index]),
                batch_size=int(batch),
                start_step=step,
                end_step=step + steps,
                first_example=example,
                epochs=steps * batch / num_examples,
                magnitude=float(lists["magnitudes"][index]),
                dropout_rate=float(lists["dropout_rates"][index]),
                mixup_alpha=float(lists["mixup_alphas"][index]),
                cutmix_alpha=float(lists["cutmix_alphas"][index]),
                schedule_start=example / batch_size,
                schedule_scale=batch / batch_size,
                lr_scale=batch / batch_size,
            )
        )
        step += steps
        example += steps * batch
    return tuple(stages)


def make_stages(config: Any, *, variant: Any, num_examples: int) -> tuple[Stage, ...]:
    """Reads a config (`config.base_config`) and plans its stages.

    Args:
      config: the complete config.
      variant: `models.variants.Variant` of config.model.name: official values for what is None.
      num_examples: training examples per epoch.

    Returns:
      The stages, see `plan_stages`. With preset 'paper', models outside the paper's Table 6 take
      the values of the last stage from the released code.

    Raises:
      UserError: see `plan_stages`.
    """
    progressive = config.progressive
    eval_size = resolve_image_size(config.eval.image_size, variant.eval_size, key="eval.image_size")
    last = _last_values(progressive.preset, variant)
    if progressive.image_size is None:
        image_size = last["image_size"]
    else:
        image_size = resolve_image_size(
            progressive.image_size, eval_size, key="progressive.image_size"
        )
    strengths = {
        name: last[name] if progressive[name] is None else progressive[name]
        for name in ("magnitude", "dropout_rate", "mixup_alpha", "cutmix_alpha")
    }
    return plan_stages(
        num_examples=num_examples,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        min_steps=config.train.min_steps,
        preset=progressive.preset,
        num_stages=_configured_stages(progressive, variant),
        image_size=image_size,
        min_image_size=progressive.min_image_size,
        **strengths,
        **{"stage_epochs" if n == "epochs" else n: progressive[n] for n in LISTS},
    )


def schedule_length(config: Any, *, num_examples: int) -> float:
    """Returns the length of the learning-rate schedule in base steps, as a float.

    The official model_fn takes max(min_steps, epochs * images / batch) unrounded, while the run
    stops at the floored integer (official: main.py). progressive.epochs replaces train.epochs.
    """
    epochs = math.fsum(config.progressive.epochs) or config.train.epochs
    return max(config.train.min_steps, epochs * num_examples / config.train.batch_size)


def resolve_image_size(size: float | None, reference: int, *, key: str = "image_size") -> int:
    """Returns a size in px: None is the reference, up to 16 a factor of it (official: main.py).

    A factor gives multiples of 16: 0.8 of 456 is 352. A size of 16 px or less can only be asked
    for in the list progressive.image_sizes, which is always in px.
    """
    if size is None:
        return int(reference)
    if size > LARGEST_SIZE_FACTOR:
        return int(size)
    resolved = int(reference * size) // 16 * 16
    if resolved < 1:
        raise UserError(
            f"{key}: {size:g} is a factor of {reference} px (all up to {LARGEST_SIZE_FACTOR} are) "
            f"and gives {resolved} px: use a larger factor, or progressive.image_sizes in px"
        )
    return resolved


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Returns the stage to which step number `step` (0 is the first) belongs.

    Raises:
      IndexError: the run has no such step.
    """
    for stage in stages:
        if stage.start_step <= step < stage.end_step:
            return stage
    raise IndexError(f"step {step} is outside the run's {stages[-1].end_step} steps")


def _last_values(preset: str, variant: Any) -> dict[str, float]:
    """Image size and strengths of the last stage, where the config does not say."""
    if preset == "paper" and variant.paper is not None:
        last = {name: ends[1] for name, ends in dataclasses.asdict(variant.paper).items()}
        return {**last, "cutmix_alpha": 0.0}  # the paper does not use CutMix
    return {
        "image_size": variant.train_size,
        "magnitude": variant.randaugment_magnitude,
        "mixup_alpha": variant.mixup_alpha,
        "cutmix_alpha": variant.cutmix_alpha,
        "dropout_rate": variant.dropout_rate,
    }


def _configured_stages(progressive: Any, variant: Any) -> int | None:
    """Number of stages: the config's, the lists', or what the model has in the official code."""
    if progressive.stages is not None or any(progressive[name] for name in LISTS):
        return progressive.stages
    if progressive.preset == "none":
        return 1
    if progressive.preset == "paper":
        return variant.stages or PAPER_STAGES  # V1 models have none in the released code
    return max(variant.stages, 1)


def _linear(first: float, last: float, n: int) -> tuple[float, ...]:
    """The n values from first to last, both included; one value: the last."""
    if n == 1:
        return (last,)
    step = (last - first) / (n - 1)
    return (*(first + i * step for i in range(n - 1)), last)


def _image_sizes(preset: str, n: int, first: int, last: int) -> tuple[int, ...]:
    if preset == "none":
        return (last,) * n
    if preset == "paper":
        return tuple(int(size) for size in _linear(first, last, n))
    return tuple(int(first + (last - first) * ((i + 1) / n)) for i in range(n))


def _last_examples(
    stage_epochs: Sequence[float],
    n: int,
    *,
    num_examples: int,
    batch_size: int,
    epochs: float,
    min_steps: int,
) -> list[float]:
    """Number of examples that the run should have seen at the end of each stage."""
    if not stage_epochs:
        total = max(min_steps, int(epochs * num_examples // batch_size))
        return [int((i + 1) / n * total) * batch_size for i in range(n)]
    # Rounded to a millionth of an example, so that 0.1 + 0.7 epochs do not lose a step.
    ends = [round(math.fsum(stage_epochs[: i + 1]) * num_examples, 6) for i in range(n)]
    if ends[-1] < min_steps * batch_size:
        raise UserError(
            f"progressive.epochs: the listed epochs are {ends[-1] // batch_size:.0f} steps, fewer "
            f"than train.min_steps = {min_steps}: list more epochs or set train.min_steps=0"
        )
    return ends


def _count_stages(num_stages: int | None, lists: dict[str, tuple]) -> int:
    lengths = {name: len(values) for name, values in lists.items() if values}
    if num_stages is not None:
        lengths = {"stages": num_stages, **lengths}
    if len(set(lengths.values())) > 1:
        found = ", ".join(
            f"progressive.{name} = {n}" if name == "stages" else f"progressive.{name} has {n}"
            for name, n in lengths.items()
        )
        raise UserError(f"{found}: every list needs one entry per stage, all of the same length")
    n = next(iter(lengths.values()), 1)
    if n < 1:
        raise UserError(f"progressive.stages: {n} is impossible; use 1 or more")
    return n


def _check_run(*, num_examples: int, batch_size: int, epochs: float, preset: str) -> None:
    problems = []
    if preset not in PRESETS:
        problems.append(f"progressive.preset: {preset!r} is none of {', '.join(PRESETS)}")
    if num_examples < 1:
        problems.append(f"data: the training split has {num_examples} examples; at least 1 needed")
    if batch_size < 1:
        problems.append(f"train.batch_size: {batch_size} must be 1 or more")
    if not epochs > 0:
        problems.append(f"train.epochs: {epochs} must be positive")
    if problems:
        raise UserError("; ".join(problems))


def _check_sizes_grow(preset: str, n: int, *, image_size: int, min_image_size: int) -> None:
    if preset != "none" and n > 1 and min_image_size > image_size:
        raise UserError(
            f"progressive.min_image_size: {min_image_size} px is more than the last stage's "
            f"{image_size} px, sizes would shrink: set progressive.min_image_size below it, or "
            "list progressive.image_sizes"
        )


def _check_values(lists: dict[str, tuple]) -> None:
    """Refuses values that no stage can have; all problems in one message."""
    whole = ("a whole number, 1 or more", lambda v: v == int(v) and v >= 1)
    at_least_0 = ("0 or more", lambda v: v >= 0)
    rules = {
        "image_sizes": whole,
        "batch_sizes": whole,
        "epochs": ("positive", lambda v: v > 0),
        "magnitudes": at_least_0,
        "mixup_alphas": at_least_0,
        "cutmix_alphas": at_least_0,
        "dropout_rates": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    }
    problems = [
        f"progressive.{name}: {value!r} of stage {index} must be {text}"
        for name, (text, accepts) in rules.items()
        for index, value in enumerate(lists[name])
        if not (math.isfinite(value) and accepts(value))
    ]
    if problems:
        raise UserError("; ".join(problems))
