"""--mode eval: what a trained network is worth on a data set, and where it errs.

What is found goes to WORKDIR/eval/, so that a run may be training in the workdir meanwhile:

    eval.json        everything: the metrics, every class, the confusions, the calibration
    per_class.csv    a line per class
    confusion.png    the confusions (report/confusion.py)
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from effv2_jax.config import validate
from effv2_jax.data import imagenet
from effv2_jax.data.examples import Source
from effv2_jax.data.kinds import Kind, get_kind, kind_of
from effv2_jax.data.sources import open_source
from effv2_jax.data.synset_folders import among_imagenet
from effv2_jax.errors import UserError
from effv2_jax.pretrained import open_weights
from effv2_jax.startup import enable_compilation_cache
from effv2_jax.training import evaluation_report as reports
from effv2_jax.training import mesh as meshes
from effv2_jax.training import setup
from effv2_jax.training.answers import make_answer_step
from effv2_jax.training.checkpoint import Checkpoints
from effv2_jax.training.compile import Programs
from effv2_jax.training.evaluate import Evaluator
from effv2_jax.training.metrics import summary
from effv2_jax.training.progressive import resolve_image_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, on what.

    Attributes:
        name: for people.
        model: the network, knowing the mesh axis.
        weights: prefix of the metrics' names ("" or "ema_") -> variables, on the mesh.
        titles: the same prefixes -> what the variables are, for people.
        labels: names of its classes, or None.
        kind: of preprocessing.
        image_size: px.
        source: the evaluation examples.
        mesh: the devices.
    """

    name: str
    model: nn.Module
    weights: Mapping[str, Any]
    titles: Mapping[str, str]
    labels: tuple[str, ...] | None
    kind: Kind
    image_size: int
    source: Source
    mesh: Mesh


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of the workdir or, without one, the weights init.weights.

    Args:
        config: complete; data and eval say what is evaluated and how.
        workdir: folder of a run; for init.weights one without checkpoints. Its config.json is not
            read: the config says what was trained there.

    Returns:
        The metrics: loss, top1, top5 and, of a checkpoint, ema_loss, ema_top1, ema_top5.

    Raises:
        UserError: config, data or devices are wrong, or there are no weights.
    """
    validate(config)
    meshes.join_processes(config.runtime.distributed)
    enable_compilation_cache(config.runtime.compilation_cache)
    subject = _from_checkpoint(config, Path(workdir)) or _from_weights(config, workdir)
    subset = _subset(config, subject)
    step = make_answer_step(
        subject.model,
        kind=subject.kind,
        loss=config.train.loss,
        multilabel=config.data.multilabel,
        subset=subset,
        mesh=subject.mesh,
    )
    with Programs(devices=len(subject.mesh.local_devices), background=False) as programs:
        evaluator = Evaluator(
            step,
            source=subject.source,
            data_config=config.data,
            image_size=subject.image_size,
            batch_size=config.eval.batch_size or config.train.batch_size,
            mesh=subject.mesh,
            programs=programs,
            kind=subject.kind,
        )
        answers = evaluator.answers(subject.weights)
    if jax.process_index() == 0:
        report = reports.make_report(
            {subject.titles[prefix]: each for prefix, each in answers.items()},
            labels=subject.source.label_names or subject.labels,
            num_classes=subject.model.num_classes if subset is None else len(subset),
            facts=_facts(config, subject, left_out=evaluator.left_out),
        )
        print(reports.as_text(report), flush=True)
        print(reports.write(report, Path(workdir, "eval")), flush=True)
    return {
        f"{prefix}{name}": value
        for prefix, each in answers.items()
        for name, value in summary(each).items()
        if name in ("loss", "top1", "top5")
    }


def _from_checkpoint(config: ConfigDict, workdir: Path) -> Subject | None:
    """The newest checkpoint of a run; None if there is none."""
    if not (workdir / "checkpoints").is_dir():
        return None
    parts = setup.prepare(config)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(
            setup.state_shapes(parts), sharding=meshes.replicated(parts.mesh)
        )
    if state is None:
        return None
    return Subject(
        name=f"checkpoint of step {int(state.step)}",
        model=parts.mesh_model,
        weights=setup.evaluated_variables(config, state),
        titles={"": "raw weights", "ema_": "moving average"},
        labels=parts.train_source.label_names,
        kind=get_kind(config.data.preprocessing),
        image_size=parts.eval_size,
        source=parts.eval_source,
        mesh=parts.mesh,
    )


def _from_weights(config: ConfigDict, workdir: str | Path) -> Subject:
    """The weights that init.weights names; of the data set only the evaluation split is opened."""
    spec = config.init.weights
    if not spec:
        raise UserError(
            f"--workdir {workdir}: no checkpoint to evaluate; train there first, or name weights "
            "with --config.init.weights=FILE"
        )
    mesh = meshes.make_mesh(config.runtime.devices)
    source = open_source(config.data, "eval")
    model, variables, info = open_weights(spec)
    kind = get_kind(config.data.preprocessing)
    if info["preprocessing"]:
        made_with = kind_of(info["preprocessing"], image_size=info["image_size"])
        if made_with.name != kind.name:
            raise UserError(
                f"init.weights = {spec}: made for data.preprocessing = {made_with.name!r}, the "
                f"config has {kind.name!r}: set --config.data.preprocessing={made_with.name}"
            )
        kind = made_with
    labels = None if info["labels"] is None else tuple(info["labels"])
    if not config.data.multilabel and labels in (None, imagenet.labels(model.num_classes)):
        is_subset = config.eval.label_subset == "imagenet1k"
        source = among_imagenet(source, imagenet.NUM_1K if is_subset else model.num_classes)
    model = model.clone(
        dtype=setup.compute_dtype(config.model.dtype),
        lowering=config.model.lowering,
        axis_name=meshes.AXIS,
    )
    return Subject(
        name=spec,
        model=model,
        weights={"": meshes.put_replicated(variables, mesh)},
        titles={"": "weights"},
        labels=labels,
        kind=kind,
        image_size=resolve_image_size(
            config.eval.image_size, info["image_size"], key="eval.image_size"
        ),
        source=source,
        mesh=mesh,
    )


def _subset(config: ConfigDict, subject: Subject) -> np.ndarray | None:
    """The outputs that stand for the data set's classes; None: all, in order.

    Raises:
        UserError: the network's classes are not those of the data set.
    """
    found, wanted = subject.model.num_classes, subject.source.num_classes
    if config.eval.label_subset == "imagenet1k":
        if (found, wanted) != (imagenet.NUM_21K, imagenet.NUM_1K):
            raise UserError(
                f"eval.label_subset = 'imagenet1k': is for a network of {imagenet.NUM_21K:,} "
                f"classes and a data set of {imagenet.NUM_1K:,}, or of some of these by their "
                f"synsets, found {found:,} ({subject.name}) and {wanted:,}: leave it out"
            )
        return imagenet.subset_1k_of_21k()
    if found < wanted or (found != wanted and subject.name == config.init.weights):
        both = (imagenet.NUM_21K, imagenet.NUM_1K)
        hint = ", or set --config.eval.label_subset=imagenet1k" if (found, wanted) == both else ""
        raise UserError(
            f"{subject.name}: has {found:,} classes, the data set has {wanted:,}: evaluate it on "
            f"the data set it was trained for{hint}"
        )
    ours, theirs = subject.labels, subject.source.label_names
    if ours and theirs and ours != theirs and sorted(ours) == sorted(set(theirs)):
        return np.asarray([ours.index(name) for name in theirs], np.int32)  # in another order
    return None


def _facts(config: ConfigDict, subject: Subject, *, left_out: int) -> dict[str, Any]:
    """What stands beside the metrics."""
    data = config.data
    return {
        "weights": subject.name,
        "model": subject.model.variant,
        "data": " ".join(filter(None, (data.source, data.name, data.dir))),
        "image_size": subject.image_size,
        "preprocessing": subject.kind.name,
        "label_subset": config.eval.label_subset,
        "left_out": left_out,
        "other_names": _other_name(subject),
    }


def _other_name(subject: Subject) -> dict[str, Any] | None:
    """The first class that network and data set call by names that are not the same thing."""
    ours, theirs = subject.labels, subject.source.label_names
    if not ours or not theirs or len(ours) != len(theirs):
        return None
    for synsets in (imagenet.synsets_1k, imagenet.synsets_21k):
        if theirs == synsets() and ours == imagenet.labels(len(ours)):
            return None
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own not in theirs:
            return {"class": index, "weights": own, "data": other}
    return None
