"""The form of norm, activation and squeeze-and-excite for GPUs against the plain one."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from effv2_jax.models import layers, lowering
from effv2_jax.models.blocks import SqueezeExcite
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.lowering import gpu_sums
from effv2_jax.models.network import create_model
from effv2_jax.models.norm import BatchNorm

# Sums of a few hundred float32 products in another order, divided by deviations of about 1;
# measured 2e-6 of the largest value.
TOLERANCE = 1e-5
SHAPE = (8, 5, 6, 4)


class _Layer(nn.Module):
    """A norm with all that may follow it."""

    implementation: str
    activation: str | None = "silu"
    gated: bool = False
    group_size: int = 0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(layers.Conv, dtype=self.dtype, implementation="plain")
        norm = BatchNorm(
            group_size=self.group_size,
            axis_name=self.axis_name,
            implementation=self.implementation,
            dtype=self.dtype,
            name="norm",
        )
        activation = layers.get_activation(self.activation) if self.activation else None
        gate = SqueezeExcite(2, conv, jax.nn.silu, name="se") if self.gated else None
        return norm(x, True, activation, gate)


def _inputs(dtype=jnp.float32, shape=SHAPE):
    draw = np.random.default_rng(0)
    x = draw.normal(0.7, 1.5, shape).astype(np.float32)
    cotangent = draw.normal(0.1, 1, shape).astype(np.float32)
    variables = jax.jit(_Layer("plain", gated=True).init)(jax.random.key(0), x)
    variables = jax.tree.map(
        lambda v: v + 0.3 * draw.standard_normal(v.shape).astype(np.float32), variables
    )
    return variables, jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)


def _results(layer, variables, x, cotangent):
    """Value, moving statistics, and gradients with respect to x and all parameters."""
    used = {"norm", "se"} if layer.gated else {"norm"}
    params = {name: variables["params"][name] for name in sorted(used)}
    rest = {"batch_stats": variables["batch_stats"]}

    def apply(params, x):
        return layer.apply({"params": params, **rest}, x, mutable=["batch_stats"])

    y, pull, moved = jax.vjp(apply, params, x, has_aux=True)
    return {"value": y, "moved": moved, "gradients": pull(cotangent)}


def _assert_same(results, expected, tolerance=TOLERANCE, floor=1e-6):
    def same(path, a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        worst = np.abs(a - b).max() / max(np.abs(b).max(), floor)
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst}"

    jax.tree.map_with_path(same, results, expected)


@pytest.mark.parametrize(
    ("activation", "gated", "group_size"),
    [(None, False, 0), ("silu", False, 0), ("silu", True, 0), ("silu", True, 2), ("relu", True, 0)],
)
def test_value_statistics_and_gradients_equal_the_plain_ones(activation, gated, group_size):
    inputs = _inputs()
    forms = [
        jax.jit(functools.partial(_results, _Layer(form, activation, gated, group_size)))(*inputs)
        for form in ("gpu", "plain")
    ]
    _assert_same(*forms)


@pytest.mark.parametrize("group_size", [0, 2])
def test_gradients_of_the_kernel_equal_the_plain_ones(monkeypatch, group_size):
    """The one that GPUs run, interpreted: on CPUs the same form takes the sums from XLA."""
    kernel = functools.partial(gpu_sums.kernel_sums, interpret=True)
    monkeypatch.setattr(gpu_sums, "image_sums", kernel)
    inputs = _inputs()
    forms = [
        jax.jit(functools.partial(_results, _Layer(form, "silu", True, group_size)))(*inputs)
        for form in ("gpu", "plain")
    ]
    _assert_same(*forms)


@pytest.mark.parametrize("shape", [(4, 5, 6, 70), (2, 3, 3, 8), (2, 4, 8, 64), (2, 21, 50, 9)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_kernel_sums_pixels_and_channels_that_do_not_fill_its_blocks(shape, groups):
    draw = np.random.default_rng(0)
    arrays = [jnp.asarray(draw.normal(size=shape), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    vectors = [jnp.asarray(draw.normal(size=(groups, shape[-1])), jnp.float32) for _ in range(2)]

    def terms(arrays, vectors):
        (a, b), (c, d) = arrays, vectors
        return a * jnp.exp(b * c), jnp.cos(a - d), jnp.ones_like(a)

    found = gpu_sums.kernel_sums(terms, 3, arrays, vectors, interpret=True)
    expected = gpu_sums.plain_sums(terms, 3, arrays, vectors)
    assert float(found[2][0, 0]) == shape[1] * shape[2]
    _assert_same(found, expected)


def _gpu_program(trace, *arguments):
    """What is traced, lowered for a GPU that is not there; JAX 0.12 must be told which."""
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))
    with use_abstract_mesh(mesh):
        return trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_the_backward_pass_of_every_activation_compiles_to_a_gpu_program(name):
    """As far as a machine without one goes; "gelu" has no kernel and takes XLA's sums."""
    how = lowering.Norm(1e-3, activation=layers.get_activation(name), gate=lambda _, means: means)

    def gradient(x, channels):
        _, pull = jax.vjp(
            lambda x: lowering.TABLE["gpu"].norm(how, x, channels, channels, ())[0], x
        )
        return pull(x)

    text = _gpu_program(jax.jit(gradient).trace, jnp.zeros(SHAPE), jnp.zeros(SHAPE[-1:]))
    assert ("image_sums" in text) == (name != "gelu")


@pytest.mark.parametrize(("capability", "kernels"), [("7.5", 0), ("8.0", 1), ("10.0", 1)])
def test_processors_older_than_the_kernel_compiler_take_the_sums_from_xla(
    monkeypatch, capability, kernels
):
    def sums(x, vector):
        return gpu_sums.image_sums(
            lambda arrays, vectors: (arrays[0] * vectors[0],), 1, [x], [vector]
        )

    device = types.SimpleNamespace(compute_capability=capability)

    def trace(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            patch.setattr(jax, "devices", lambda: [device])
            return jax.jit(sums).trace(*arguments)

    text = _gpu_program(trace, jnp.zeros(SHAPE), jnp.zeros((1, SHAPE[-1])))
    assert text.count("@__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize("group_size", [0, 1, 4])
def test_devices_share_statistics_and_their_gradients(group_size):
    """Group sizes of a part of a device, of two devices, and of all four."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    variables, x, cotangent = _inputs()

    def run(form, variables, x, cotangent):
        layer = _Layer(form, gated=True, group_size=group_size, axis_name="data")
        results = _results(layer, variables, x, cotangent)
        params_gradient, x_gradient = results["gradients"]
        return results["value"], x_gradient, jax.lax.psum(params_gradient, "data"), results["moved"]

    data, all_of_it = PartitionSpec("data"), PartitionSpec()
    forms = [
        jax.jit(
            jax.shard_map(
                functools.partial(run, form),
                mesh=mesh,
                in_specs=(all_of_it, data, data),
                out_specs=(data, data, all_of_it, all_of_it),
                check_vma=False,
            )
        )(variables, x, cotangent)
        for form in ("gpu", "plain")
    ]
    _assert_same(*forms)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_is_nearer_to_float32_than_the_plain_form(gated):
    """The plain form rounds before and after the activation, this one at the end.

    Also the gradients of the parameters of squeeze-and-excite, whose sums come from a pass of
    their own.
    """
    variables, x, cotangent = _inputs(jnp.bfloat16, shape=(8, 19, 19, 4))
    exact = jax.jit(functools.partial(_results, _Layer("plain", gated=gated)))(
        variables, x.astype(jnp.float32), cotangent.astype(jnp.float32)
    )
    errors = {}
    for form in ("gpu", "plain"):
        layer = _Layer(form, gated=gated, dtype=jnp.bfloat16)
        found = jax.jit(functools.partial(_results, layer))(variables, x, cotangent)
        assert found["value"].dtype == found["gradients"][1].dtype == jnp.bfloat16
        errors[form] = {
            "value": _distance(found["value"], exact["value"]),
            "x": _distance(found["gradients"][1], exact["gradients"][1]),
            **{
                name: _distance(found["gradients"][0][name], expected)
                for name, expected in exact["gradients"][0].items()
            },
        }
    assert max(errors["gpu"].values()) < 2**-7
    for name, error in errors["gpu"].items():
        assert error <= 1.05 * errors["plain"][name], name


def _distance(found, expected):
    """Between two trees, relative to the length of the second."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def network_gradients():
    """A network's gradients and results: (form, **overrides) -> them."""
    blocks = ("r1_k3_s1_e1_i8_o8_c1", "r1_k3_s2_e4_i8_o8_c1", "r2_k3_s2_e4_i8_o8_se0.25")
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = init_variables(create_model("testing", 5, blocks=blocks), 0)

    @functools.cache
    def run(form, **overrides):
        model = create_model(
            "testing", 5, blocks=blocks, lowering=form, survival_prob=0.8, **overrides
        )

        def loss(params):
            logits, moved = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images,
                train=True,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.sin(logits)), (logits, moved)

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    return run


@pytest.mark.parametrize("overrides", [{}, {"remat": True}, {"remat_norms": True}])
def test_a_whole_network_trains_the_same(network_gradients, overrides):
    found, expected = network_gradients("gpu", **overrides), network_gradients("plain")
    # Twelve norms one after another, the last over 16 pixels. What lies before a linear norm is
    # shifted by it, so that many gradients are 0 but for rounding.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[0]))
    _assert_same(found, expected, tolerance=5e-4, floor=1e-2 * largest)


@pytest.mark.parametrize(
    ("train", "changes"), [(False, {}), (True, {"freeze": ".*"}), (True, {"two_pass": True})]
)
def test_what_has_no_form_of_its_own_is_the_plain_program(train, changes):
    """Evaluation, frozen norms, and statistics in two passes."""
    variables, x, _ = _inputs()
    variables = {name: tree["norm"] for name, tree in variables.items()}
    programs = [
        jax.make_jaxpr(
            functools.partial(
                BatchNorm(implementation=form, **changes).apply, mutable=["batch_stats"]
            ),
            static_argnums=2,
        )(variables, x, train)
        for form in ("gpu", "plain")
    ]
    assert str(programs[0]) == str(programs[1])


def test_initial_variables_do_not_depend_on_the_form():
    images = jnp.zeros((1, 32, 32, 3))
    trees = [
        jax.eval_shape(create_model("testing", 5, lowering=form).init, jax.random.key(0), images)
        for form in ("gpu", "plain")
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


@pytest.mark.parametrize("gated", [False, True])
def test_nothing_but_input_and_output_is_kept_for_the_backward_pass(gated):
    """What GPUs read and write: neither normalised values nor activations are stored."""
    variables, x, _ = _inputs()
    layer = _Layer("gpu", gated=gated)

    def kept(variables, x):
        _, pull = jax.vjp(lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0], x)
        return pull

    large = [leaf for leaf in jax.tree.leaves(jax.eval_shape(kept, variables, x)) if leaf.ndim == 4]
    assert [leaf.shape for leaf in large if leaf.size >= x.size] == [x.shape]


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_dense_convolutions_equal_the_plain_ones(stride, kernel, padding):
    draw = np.random.default_rng(0)
    x, weights = (
        jnp.asarray(draw.standard_normal(shape), jnp.float32)
        for shape in ((2, 7, 6, 3), (kernel, kernel, 3, 5))
    )

    @jax.jit
    def run(x, weights):
        results = []
        for form in ("gpu", "plain"):
            operation = functools.partial(
                lowering.conv2d, stride=stride, padding=padding, implementation=form
            )
            y, pull = jax.vjp(operation, x, weights)
            results.append((y, *pull(jnp.cos(y))))
        return results

    _assert_same(*run(x, weights))


def test_graphics_processors_take_it_and_others_do_not(monkeypatch):
    assert lowering.TABLE["gpu"].norm is not None
    assert lowering.TABLE["cpu"].norm is lowering.TABLE["tpu"].norm is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lowering.choose("auto") is lowering.TABLE["gpu"]
