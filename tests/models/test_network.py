import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from effv2_jax.errors import UserError
from effv2_jax.models import lowering
from effv2_jax.models.block_spec import parse_blocks
from effv2_jax.models.infer import infer, round_kernels
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model, linear_survival
from effv2_jax.models.variants import get_variant
from tests import reference

# Programs of tests: half the time to compile, the same arithmetic.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def _images(n=8, size=32):
    return reference.image(size, size, n, 3)


@functools.cache
def _model(**overrides):
    """Four blocks, two of them with a shortcut."""
    return create_model("testing", 10, **{"depth": 0.5, "lowering": "plain", **overrides})


@functools.cache
def _variables():
    return init_variables(_model(), 0)


def _train(model, variables, images, key, *, dropout_rate=None, survival_prob=None):
    """Logits, moved statistics, parameter gradients of a training call."""

    def loss(params):
        logits, moved = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            dropout_rate=dropout_rate,
            survival_prob=survival_prob,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.sin(logits)), (logits, moved["batch_stats"])

    grads, (logits, moved) = jax.grad(loss, has_aux=True)(variables["params"])
    return logits, moved, grads


@functools.cache
def _trained(**overrides):
    """The training call of the tiny network with traced rates; returns the compiled function."""
    model = _model(**overrides)

    @_jit
    def run(variables, images, key, dropout_rate, survival_prob):
        return _train(
            model, variables, images, key, dropout_rate=dropout_rate, survival_prob=survival_prob
        )

    return run


def _assert_trees_close(found, expected, *, rtol):
    """Relative to each tensor's largest element, or a tenth of the tree's.

    A bias whose next norm takes it away again has a gradient that is the rounding of its terms,
    1e-7 of the tree's largest element, and another one with every order of the sums.
    """
    floor = 0.1 * max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= rtol * max(np.max(np.abs(b)), floor)


def test_new_rates_do_not_compile_a_new_program_and_change_the_result():
    run, key = _trained(), jax.random.key(0)
    outs = [
        run(_variables(), _images(), key, jnp.float32(rate), jnp.float32(survival))[0]
        for rate, survival in ((0.0, 1.0), (0.5, 1.0), (0.0, 0.5))
    ]
    assert run._cache_size() == 1
    assert not np.allclose(outs[0], outs[1])
    assert not np.allclose(outs[0], outs[2])


def test_traced_rates_equal_static_ones_and_zero_switches_both_off():
    run, key = _trained(), jax.random.key(0)

    @_jit
    def static(variables, images):
        train = functools.partial(_train, _model(), variables, images)
        return train(key, dropout_rate=0.5, survival_prob=0.5), train(
            key, dropout_rate=0.0, survival_prob=1.0
        )

    on, off = static(_variables(), _images())
    traced_on = run(_variables(), _images(), key, jnp.float32(0.5), jnp.float32(0.5))
    traced_off = run(_variables(), _images(), key, jnp.float32(0), jnp.float32(0))
    _assert_trees_close(traced_on, on, rtol=1e-5)
    _assert_trees_close(traced_off, off, rtol=1e-5)


def test_training_without_noise_needs_no_random_key():
    model = _model(dropout_rate=0.0, survival_prob=1.0)
    shapes = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
        _variables(),
        _images(),
    )
    assert shapes[0].shape == (8, 10)


def test_four_devices_compute_what_one_computes():
    # Dropout and drop path are on: their noise does not depend on the number of devices.
    model = _model(axis_name="data")
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def run(variables, images, key):
        logits, moved, grads = _train(
            model, variables, images, key, dropout_rate=0.4, survival_prob=0.5
        )
        return logits, moved, jax.lax.psum(grads, "data")

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=(P("data"), P(), P()),
        check_vma=False,
    )
    four = _jit(sharded)(_variables(), _images(), jax.random.key(3))
    rates = jnp.float32(0.4), jnp.float32(0.5)
    one = _trained()(_variables(), _images(), jax.random.key(3), *rates)
    # The sums of the statistics run in another order; measured 7e-6.
    _assert_trees_close(four, one, rtol=3e-5)


def test_inference_of_a_few_images_at_a_time_gives_the_same_logits(monkeypatch):
    few = dataclasses.replace(lowering.choose("plain"), pixels_at_once=lambda dtype: 2 * 16 * 16)
    monkeypatch.setitem(lowering.TABLE, "cpu", few)
    model = _model().clone(lowering="cpu")

    run = functools.partial(infer, model)
    traced = jax.make_jaxpr(run)(_variables(), _images())
    assert "f32[1,32,32,3]" in str(traced)  # the stem takes one image at a time
    assert "f32[2,16,16," in str(traced)  # the blocks behind it two, those further on all
    program = _jit(run).lower(_variables(), _images()).compile()
    size = _images().size
    for name, shape in re.findall(r"(\S*copy\S*) = f32\[([\d,]+)\]", program.as_text()):
        assert math.prod(map(int, shape.split(","))) < size, f"{name} copies the images"
    whole = _jit(_model().apply)(_variables(), _images())
    np.testing.assert_allclose(program(_variables(), _images()), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_that_are_rounded_once_give_the_same_logits(form, dtype):
    model = _model().clone(lowering=form, dtype=dtype)
    rounded = round_kernels(model, _variables())
    program = _jit(functools.partial(infer, model)).lower(rounded, _images()).compile()
    plainly = _jit(functools.partial(infer, model))(_variables(), _images())
    np.testing.assert_array_equal(program(rounded, _images()), plainly)

    types = {str(leaf.dtype) for leaf in jax.tree.leaves(rounded)}
    assert types == {"float32", jnp.dtype(dtype).name}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rounded["params"]):
        assert leaf.dtype == (dtype if leaf.ndim == 4 else jnp.float32), path


@pytest.mark.parametrize(
    "overrides",
    [
        {"remat": True},
        {"remat_norms": True},
        {"remat": True, "remat_norms": True},
        {"remat_norms": True, "bn_two_pass": True},
        {"remat_norms": True, "bn_group_size": 2},
        {"remat_norms": True, "freeze": "blocks_[02]/.*"},
        {"remat_norms": True, "lowering": "cpu"},
    ],
    ids=str,
)
def test_remat_changes_neither_values_nor_gradients(overrides):
    arguments = (_variables(), _images(), jax.random.key(1), jnp.float32(0.3), jnp.float32(0.6))
    plain = {key: value for key, value in overrides.items() if not key.startswith("remat")}
    _assert_trees_close(_trained(**overrides)(*arguments), _trained(**plain)(*arguments), rtol=1e-5)


def test_endpoints_of_training_are_there_with_recomputed_norms():
    def ends(**overrides):
        run = functools.partial(
            _model(**overrides).apply, train=True, endpoints=True, mutable=["batch_stats"],
            dropout_rate=0.0, survival_prob=1.0,
        )  # fmt: skip
        return _jit(run)(_variables(), _images())[0][1]

    _assert_trees_close(ends(remat_norms=True), ends(), rtol=1e-5)


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "share"), [({"remat": True}, 0.5), ({"remat_norms": True}, 0.75)]
)
def test_remat_does_not_keep_what_it_computes_again(form, devices, overrides, share):
    # XLA's CPU backend may begin the second computation early and hold both, which saves nothing.
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    blocks = ("r1_k3_s1_e1_i32_o16_c1", "r3_k3_s1_e4_i16_o16_c1", "r4_k3_s1_e6_i16_o16_se0.25")

    def temporaries(**overrides):
        model = create_model(
            "testing", 10, blocks=blocks, lowering=form, axis_name="data", **overrides
        )
        variables = jax.eval_shape(lambda: init_variables(model, 0))

        def gradients(variables, images, key):
            return jax.lax.psum(_train(model, variables, images, key)[2], "data")

        sharded = _jit(
            jax.shard_map(
                gradients,
                mesh=mesh,
                in_specs=(P(), P("data"), P()),
                out_specs=P(),
                check_vma=False,
            )
        )
        images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
        compiled = sharded.lower(variables, images, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(**overrides) < share * temporaries()


def test_remat_of_mbconv_alone_lies_between_none_and_all():
    def recomputed(**overrides):
        model = _model(**overrides)
        run = functools.partial(_train, model)
        text = jax.make_jaxpr(run)(_variables(), _images(), jax.random.key(0))
        return str(text).count("conv_general_dilated")

    none, one, every = (
        recomputed(**how) for how in ({}, {"remat": True, "remat_fused": False}, {"remat": True})
    )
    assert none < one < every
    arguments = (_variables(), _images(), jax.random.key(1), jnp.float32(0.3), jnp.float32(0.6))
    found = _trained(remat=True, remat_fused=False)(*arguments)
    _assert_trees_close(found, _trained()(*arguments), rtol=1e-5)


def test_survival_falls_linearly_as_in_the_official_network():
    for name in ("efficientnetv2-s", "efficientnet-b3"):
        rows = reference.model_facts(name)["blocks"]
        survival = get_variant(name).survival_prob
        found = [linear_survival(i, len(rows), survival) for i in range(len(rows))]
        np.testing.assert_allclose(found, [row["survival_prob"] for row in rows], rtol=1e-12)


def test_survival_of_each_block_can_be_a_custom_function():
    seen = []

    def shallow_blocks_survive(index, count, survival_prob):
        seen.append((index, count))
        return 1.0 if index < 2 else survival_prob

    model = _model(survival_fn=shallow_blocks_survive, dropout_rate=0.0)
    half = functools.partial(_train, model, survival_prob=0.5)
    shapes = jax.eval_shape(half, _variables(), _images(), jax.random.key(0))
    # Only blocks with a shortcut are asked.
    assert seen == [(0, 4), (3, 4)]
    assert shapes[0].shape == (8, 10)


@pytest.mark.parametrize(("form", "maps"), [("plain", jnp.bfloat16), ("cpu", jnp.float32)])
def test_bfloat16_computes_in_bfloat16_with_float32_state_and_logits(form, maps):
    model = create_model("testing", 10, dtype=jnp.bfloat16, lowering=form)

    def run(variables, images, key):
        logits, ends = model.apply(variables, images, endpoints=True)
        return (logits, ends), _train(model, variables, images, key, dropout_rate=0.1)

    variables = jax.eval_shape(model.init, jax.random.key(0), _images())
    (logits, ends), (train_logits, moved, grads) = jax.eval_shape(
        run, variables, _images(), jax.random.key(0)
    )
    assert {x.dtype for x in jax.tree.leaves((variables, moved, grads))} == {jnp.dtype("float32")}
    assert logits.dtype == train_logits.dtype == jnp.float32
    inner = {name: x.dtype for name, x in ends.items() if name not in ("pooled_features", "head")}
    # CPUs round what is multiplied alone.
    assert set(inner.values()) == {jnp.dtype(maps)}


@pytest.mark.parametrize("onednn", [True, False])
def test_results_on_cpus_are_narrow_in_inference_alone(onednn, monkeypatch):
    monkeypatch.setattr(lowering.cpu_narrow.cpu_onednn, "is_available", lambda: onednn)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        model = create_model("testing", 10, dtype=dtype, lowering="cpu")
        assert model.result_dtype(train=True) == model.map_dtype == jnp.float32
        narrow = onednn and dtype == jnp.bfloat16
        assert model.result_dtype(train=False) == (dtype if narrow else jnp.float32)
        for form in ("plain", "gpu"):
            assert model.clone(lowering=form).result_dtype(train=False) == dtype

        def infer(variables, model=model):
            return model.apply(variables, _images())

        def train(variables, model=model):
            return model.apply(
                variables,
                _images(),
                train=True,
                dropout_rate=0,
                survival_prob=0,
                mutable=["batch_stats"],
            )[0]

        variables = jax.eval_shape(model.init, jax.random.key(0), _images())
        for run, expected in ((infer, narrow), (train, False)):
            results = re.findall(r"(\w+)\[[\d,]*\] = ffi_call", str(jax.make_jaxpr(run)(variables)))
            assert bool(results) == (onednn and dtype == jnp.bfloat16)
            assert set(results) <= {"bf16" if expected else "f32"}


def test_bfloat16_stays_near_float32():
    logits = [
        _jit(_model(dtype=dtype).apply)(_variables(), _images())
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    # 8 bits of mantissa over a dozen layers.
    assert 0 < np.std(logits[1] - logits[0]) < 0.05 * np.std(logits[0])


def test_no_classes_gives_the_pooled_features():
    model = create_model("testing", 0, depth=0.5, lowering="plain")
    variables = {
        "params": {k: v for k, v in _variables()["params"].items() if k != "classifier"},
        "batch_stats": _variables()["batch_stats"],
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), _images())
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    features = _jit(model.apply)(variables, _images())
    _, ends = _jit(functools.partial(_model().apply, endpoints=True))(_variables(), _images())
    assert features.shape == (8, 32)
    np.testing.assert_allclose(features, ends["pooled_features"], rtol=1e-6, atol=1e-6)


def test_all_official_endpoints_are_returned():
    model = create_model("testing", 10)
    variables = jax.eval_shape(model.init, jax.random.key(0), _images())
    _, ends = jax.eval_shape(
        functools.partial(model.apply, endpoints=True), variables, _images(2, 33)
    )
    blocks = [f"block_{i}" for i in range(6)]
    reductions = [f"reduction_{i}" for i in (1, 2, 3)]
    inner = [f"{name}/expansion_output" for name in (*blocks, *reductions)]
    outer = ["stem", "features", "head_1x1", "pooled_features", "head"]
    assert sorted(ends) == sorted([*blocks, *reductions, *inner, *outer])
    assert ends["stem"].shape == (2, 17, 17, 8)
    assert ends["reduction_1"].shape == ends["block_0"].shape == (2, 17, 17, 8)
    assert ends["reduction_2"].shape == ends["block_2"].shape == (2, 9, 9, 16)
    assert ends["reduction_3"].shape == ends["features"].shape == (2, 5, 5, 24)
    assert ends["block_5/expansion_output"].shape == (2, 5, 5, 144)


def test_custom_blocks_width_and_depth_make_the_network_they_say():
    rows = ("r1_k3_s1_e1_i16_o24_c1", "r2_k5_s2_e4_i24_o40_se0.5")
    model = create_model("efficientnetv2-s", 7, blocks=rows, width=0.5, depth=2, feature_size=64)
    assert [(b.in_channels, b.channels) for b in model.block_specs] == [
        (8, 16), (16, 16), (16, 24), (24, 24), (24, 24), (24, 24),
    ]  # fmt: skip
    variables = jax.eval_shape(model.init, jax.random.key(0), _images())
    params = variables["params"]
    assert params["blocks_2"]["depthwise_conv"]["kernel"].shape == (5, 5, 1, 64)
    assert params["blocks_2"]["se"]["reduce"]["kernel"].shape == (1, 1, 64, 8)
    assert params["head"]["conv"]["kernel"].shape == (1, 1, 24, 32)
    assert params["classifier"]["kernel"].shape == (32, 7)
    assert create_model("efficientnetv2-s", 7, blocks=parse_blocks(rows)).blocks == model.blocks


def test_none_and_empty_overrides_mean_the_variant():
    model = create_model("efficientnet-b1", width=None, depth=None, blocks=(), survival_prob=None)
    assert model == create_model("efficientnet-b1")
    assert (model.depth, model.dropout_rate, model.survival_prob) == (1.1, 0.2, 0.8)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("efficientnetv2-z", {}, "unknown model 'efficientnetv2-z'"),
        ("testing", {"widht": 2.0}, "did you mean 'width'"),
        ("testing", {"activation": "silo"}, "did you mean 'silu'"),
        ("testing", {"width": -1.0}, "model.width is -1.0"),
        ("testing", {"num_classes": -1}, "model.num_classes is -1"),
        ("testing", {"dropout_rate": 1.5}, "model.dropout_rate is 1.5"),
        ("testing", {"survival_prob": 1.5}, "model.survival_prob is 1.5"),
        ("testing", {"padding": "VALID"}, "model.padding is 'VALID'"),
        ("testing", {"lowering": "fast"}, "model.lowering is 'fast'"),
        ("testing", {"initializer": "he"}, "model.initializer is 'he'"),
        ("testing", {"blocks": ("r1_k3",)}, "block 'r1_k3'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(name, arguments, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        create_model(name, **arguments)


def test_init_variables_draws_the_same_tree_as_init():
    model = create_model("testing", 5, head_bias=-1.5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), _images())
    variables = init_variables(model, 1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], np.full(5, -1.5))
    again, other = init_variables(model, 1), init_variables(model, 2)
    kernels = [v["params"]["stem"]["conv"]["kernel"] for v in (variables, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])


@pytest.mark.parametrize("drawn_by", ["init", "init_variables"])
def test_fan_in_gives_every_kernel_the_deviation_of_its_inputs(drawn_by):
    model = create_model("testing", 100, initializer="fan_in", feature_size=512)
    if drawn_by == "init":
        variables = jax.jit(model.init)(jax.random.key(0), _images())
    else:
        variables = init_variables(model, 0)
    kernels = traverse_util.flatten_dict(variables["params"], sep="/")
    kernels = {name: value for name, value in kernels.items() if name.endswith("kernel")}
    assert len(kernels) > 10
    for name, kernel in kernels.items():
        expected = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
        # 5 standard deviations of the estimate.
        assert np.std(kernel) == pytest.approx(expected, rel=5 / np.sqrt(2 * kernel.size)), name


def test_init_variables_has_the_official_deviations():
    params = init_variables(create_model("efficientnetv2-b0"), 0)["params"]
    block = params["blocks_6"]
    # 4 standard deviations of the estimate, 1 / sqrt(2 n), with n = 36,864, 3,456, 9,216.
    for kernel, fan_out, rel in (
        (block["expand_conv"]["kernel"], 384, 0.015),
        (block["depthwise_conv"]["kernel"], 9, 0.05),
        (block["se"]["expand"]["kernel"], 384, 0.03),
    ):
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_out), rel=rel)
    dense = np.asarray(params["classifier"]["kernel"])
    assert np.max(np.abs(dense)) <= 1 / np.sqrt(1000)
    assert np.std(dense) == pytest.approx(1 / np.sqrt(3000), rel=0.003)
    # No zero scale at the end of a branch, other than in many ResNets.
    np.testing.assert_array_equal(block["project_norm"]["scale"], np.ones(112 - 16))
