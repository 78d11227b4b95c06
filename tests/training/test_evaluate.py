"""Metrics are exact: every example counts once, whatever the batch and the devices."""

import jax
import numpy as np
import pytest

from effv2_jax.data import loader
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.training import evaluate, setup
from effv2_jax.training import mesh as meshes
from effv2_jax.training.compile import Programs
from effv2_jax.training.step import make_eval_step
from tests.training import tiny

EXAMPLES = 37  # divides by none of the batches


class FewExamples:
    """The first examples of a source."""

    def __init__(self, source, count):
        self._source, self._count = source, count
        self.num_classes, self.label_names = source.num_classes, source.label_names
        self.in_memory = source.in_memory

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        assert index < self._count
        return self._source[index]


@pytest.fixture(scope="module")
def parts():
    return setup.prepare(tiny.tiny_config())


@pytest.fixture(scope="module")
def weights(parts):
    """Two sets of variables; large classifiers, so that their answers differ."""
    chosen = {}
    for seed, prefix in enumerate(("", "ema_")):
        variables = jax.tree.map(np.array, init_variables(parts.model, seed, 24))
        kernel = variables["params"]["classifier"]["kernel"]
        kernel[:] = np.random.default_rng(seed).normal(size=kernel.shape)
        chosen[prefix] = variables
    return chosen


def evaluator(parts, *, batch_size, devices=1, programs=None):
    mesh = meshes.make_mesh(devices)
    return evaluate.Evaluator(
        make_eval_step(parts.mesh_model, parts.recipe, mesh=mesh),
        source=FewExamples(parts.eval_source, EXAMPLES),
        data_config=parts.config.data,
        image_size=24,
        batch_size=batch_size,
        mesh=mesh,
        programs=programs or Programs(background=False),
    )


def placed(weights, devices=1):
    return meshes.put_replicated(weights, meshes.make_mesh(devices))


def expected(parts, variables):
    """The metrics by the definition, in one batch, in NumPy."""
    source = FewExamples(parts.eval_source, EXAMPLES)
    (batch,) = loader.eval_batches(source, parts.config.data, image_size=24, batch_size=EXAMPLES)
    images = (batch["image"] - 128) / 128
    logits = np.asarray(parts.model.apply(variables, images), np.float64)
    right = np.arange(EXAMPLES), batch["label"]
    losses = np.log(np.exp(logits).sum(-1)) - logits[right]
    rank = (logits > logits[right][:, None]).sum(-1)
    return {"loss": losses.mean(), "top1": (rank < 1).mean(), "top5": (rank < 5).mean()}


def test_metrics_are_those_of_the_definition(parts, weights):
    results = evaluator(parts, batch_size=7)(placed(weights))
    for prefix, variables in weights.items():
        for name, value in expected(parts, variables).items():
            assert results[prefix + name] == pytest.approx(value, rel=1e-5), prefix + name
    assert results["loss"] != results["ema_loss"]
    assert 0 < results["top1"] < results["top5"] < 1


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (64, 1), (7, 4), (64, 4)])
def test_batch_size_and_devices_do_not_matter(parts, weights, batch_size, devices):
    reference = evaluator(parts, batch_size=7)(placed(weights))
    results = evaluator(parts, batch_size=batch_size, devices=devices)(placed(weights, devices))
    for name, value in reference.items():
        if "loss" in name:  # another order of float32 sums
            assert results[name] == pytest.approx(value, rel=1e-6), name
        else:  # counts
            assert results[name] == value, name


def test_raw_and_averaged_weights_share_one_program(parts, weights):
    programs = Programs(background=False)
    evaluation = evaluator(parts, batch_size=7, programs=programs)
    evaluation(placed(weights))
    evaluation(placed(weights))
    assert programs.compilations == 1


def test_program_prepared_ahead_is_the_one_used(parts, weights):
    with Programs() as programs:
        evaluation = evaluator(parts, batch_size=8, programs=programs)
        variables = placed(weights)
        evaluation.prepare(setup.shapes_of(variables[""]), parts.eval_batch(8))
        evaluation(variables)
        assert programs.compilations == 1


def test_small_data_set_is_not_padded_to_a_large_batch(parts):
    assert evaluator(parts, batch_size=4096).batch_size == EXAMPLES
    assert evaluator(parts, batch_size=4096, devices=4).batch_size == 40
    assert evaluator(parts, batch_size=7, devices=4).batch_size == 8


def test_stopped_evaluation_returns_nothing(parts, weights):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 3

    assert evaluator(parts, batch_size=7)(placed(weights), stop=stop) is None


@pytest.mark.parametrize("missing", [1, -1])
def test_lost_or_repeated_example_is_an_error(parts, weights, monkeypatch, missing):
    whole = loader.eval_batches

    def wrong(*args, **kwargs):
        for batch in whole(*args, **kwargs):
            mask = batch["mask"].copy()
            if not mask.all():  # the last one: mask one more, or count some padding
                mask[-1 - list(mask[::-1]).index(1) + (0 if missing == 1 else 1)] = missing != 1
            yield {**batch, "mask": mask}

    monkeypatch.setattr(loader, "eval_batches", wrong)
    with pytest.raises(RuntimeError, match=f"counted {EXAMPLES - missing} examples of {EXAMPLES}"):
        evaluator(parts, batch_size=7)(placed(weights))
