"""The forms written for XLA's CPU backend against XLA's own convolutions."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from effv2_jax.models import lowering
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.lowering import (
    cpu_activation,
    cpu_dense,
    cpu_depthwise,
    cpu_onednn,
    cpu_winograd,
    windows,
)
from effv2_jax.models.lowering.bands import Bands
from effv2_jax.models.lowering.geometry import make_geometry
from effv2_jax.models.network import create_model

# Sums of up to k * k * C (values) or N * H * W (gradients of kernels) float32 products in another
# order; measured 1e-6 of the largest value.
TOLERANCE = 1e-5
SYMMETRIC = {1: ((0, 0), (0, 0)), 3: ((1, 1), (1, 1)), 5: ((2, 2), (2, 2))}


def _operation(kind, implementation, stride, padding):
    function = lowering.depthwise_conv2d if kind == "depthwise" else lowering.conv2d
    return functools.partial(
        function, stride=stride, padding=padding, implementation=implementation
    )


def _operands(kind, *, n=2, size, channels=6, filters=5, kernel, dtype=np.float32):
    draw = np.random.default_rng(0)
    shape = (kernel, kernel) + ((1, channels) if kind == "depthwise" else (channels, filters))
    x = draw.standard_normal((n, *size, channels)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(draw.standard_normal(shape).astype(np.float32))


def _value_and_gradients(operation, x, kernel):
    y, pull_back = jax.vjp(operation, x, kernel)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *pull_back(cotangent.astype(y.dtype))


def _assert_same(results, expected, tolerance=TOLERANCE):
    for name, a, b in zip(("value", "dx", "dkernel"), results, expected, strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6), name


def _assert_equal_forms(kind, x, kernel, *, stride, padding="SAME"):
    @jax.jit  # both in one program: half the compilations
    def run(x, kernel):
        return [
            _value_and_gradients(_operation(kind, form, stride, padding), x, kernel)
            for form in ("cpu", "plain")
        ]

    _assert_same(*run(x, kernel))


@pytest.mark.parametrize("padding", ["SAME", "symmetric"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_cpu_forms_equal_the_plain_ones(kind, stride, kernel, size, padding):
    padding = SYMMETRIC[kernel] if padding == "symmetric" else padding
    x, weights = _operands(kind, size=size, kernel=kernel)
    _assert_equal_forms(kind, x, weights, stride=stride, padding=padding)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["dense", "depthwise"]),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    pads=st.tuples(*[st.integers(0, 5)] * 4),
)
def test_any_geometry_equals_the_plain_form(kind, kernel, stride, height, width, pads):
    """Even kernels, paddings beyond the kernel and other strides too: those take the plain form."""
    x, weights = _operands(kind, n=1, size=(height, width), channels=3, kernel=kernel)
    padding = (pads[:2], pads[2:])
    _assert_equal_forms(kind, x, weights, stride=stride, padding=padding)


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride"),
    [
        (8, 12, 1, 1),  # gradient of the kernel in chunks of rows
        (100, 104, 1, 1),  # as one product
        (100, 8, 1, 1),  # of the transposed kernel
        (24, 48, 3, 1),  # everything by Winograd's transformations
        (24, 24, 3, 1),  # only the gradient of the kernel
        (40, 48, 3, 2),  # by products of patches; the gradient of the input is XLA's
        (20, 40, 3, 2),  # the gradient of the input by phases
        (3, 24, 3, 2),  # the stem: a fourth channel of zeros
    ],
)
def test_every_choice_by_shape_equals_the_plain_form(channels, filters, kernel, stride):
    x, weights = _operands(
        "dense", n=1, size=(64, 64), channels=channels, filters=filters, kernel=kernel
    )
    _assert_equal_forms("dense", x, weights, stride=stride)


@pytest.mark.parametrize("size", [(40, 24), (33, 21), (12, 12)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bands_of_any_size_give_the_same_numbers(stride, size, monkeypatch):
    """Several bands of an image, the last of them not full, or several images in one."""
    for pixels in (60, 130, 400):
        monkeypatch.setattr(cpu_dense, "_PATCHES", pixels)
        monkeypatch.setattr(cpu_winograd, "_CONVOLUTION_TILES", pixels // 16)
        monkeypatch.setattr(cpu_winograd, "_GRADIENT_TILES", pixels // 8)
        x, weights = _operands("dense", n=3, size=size, channels=32, filters=32, kernel=3)
        _assert_equal_forms("dense", x, weights, stride=stride)


def test_bands_cover_every_output_once_or_again():
    geometry = make_geometry((6, 75, 75, 8), (3, 3, 8, 8), stride=1, padding="SAME")
    apart = Bands(6, geometry, pixels=1200, unit=4)
    assert (apart.images, apart.rows, apart.columns, apart.count) == (1, 20, 76, 24)
    outputs = jnp.zeros((6, 75, 75, 8))
    assert apart.pad_output(outputs).shape == (6, 80, 76, 8)  # zeros where the last is outside
    overlapping = Bands(6, geometry, pixels=1200, unit=4, overlap=True)
    assert overlapping.count == 24
    assert overlapping.pad_output(outputs).shape == (6, 75, 76, 8)  # the last starts earlier
    together = Bands(6, geometry, pixels=18000)
    assert (together.images, together.rows, together.count) == (3, 75, 2)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 1), (2, 0)), ((2, 2), (1, 1))])
@pytest.mark.parametrize("size", [(10, 11), (13, 10)])
def test_winograd_equals_the_plain_form(size, padding, monkeypatch):
    calls = []
    for name in ("convolve", "kernel_gradient"):
        form = getattr(cpu_winograd, name)
        spy = functools.partial(lambda form, name, *a: calls.append(name) or form(*a), form, name)
        monkeypatch.setattr(cpu_winograd, name, spy)
    x, weights = _operands("dense", size=size, channels=24, filters=48, kernel=3)
    _assert_equal_forms("dense", x, weights, stride=1, padding=padding)
    assert sorted(calls) == ["convolve", "convolve", "kernel_gradient"]


def test_winograd_rounds_at_balanced_points():
    x, weights = _operands("dense", size=(24, 24), channels=48, filters=192, kernel=3)
    with jax.enable_x64(True):
        wide = [np.asarray(v, np.float64) for v in (x, weights)]
        exact = _value_and_gradients(_operation("dense", "plain", 1, "SAME"), *wide)
        exact = [np.asarray(v) for v in exact]

    results = _value_and_gradients(_operation("dense", "cpu", 1, "SAME"), x, weights)
    pairs = zip(map(np.float64, results), exact, strict=True)
    errors = np.array([np.sqrt(np.mean((a - b) ** 2)) / np.std(b) for a, b in pairs])
    # Measured 7.3e-7, 7.6e-7 and 1.1e-6: two or three times those of the direct convolution, and
    # half of those at the points that are usually taken.
    assert np.all(errors < [1e-6, 1e-6, 1.5e-6])


def test_tall_images_are_cut_into_bands_with_the_same_gradient(monkeypatch):
    monkeypatch.setattr(cpu_depthwise, "_MAX_UNROLLED_ROWS", 4)
    for size, stride in (((13, 6), 1), ((16, 5), 1), ((21, 7), 2)):
        x, weights = _operands("depthwise", size=size, kernel=3)
        _assert_equal_forms("depthwise", x, weights, stride=stride)


@pytest.mark.parametrize("small", [1, 10**6])
def test_maps_are_taken_a_few_images_at_a_time_or_all(small, monkeypatch):
    monkeypatch.setattr(cpu_depthwise, "_SECOND_LEVEL", small)
    for examples, stride in ((4, 1), (6, 2), (3, 1), (1, 1)):
        x, weights = _operands("depthwise", n=examples, size=(9, 8), kernel=3)
        _assert_equal_forms("depthwise", x, weights, stride=stride)


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_bfloat16_sums_in_float32(kind):
    x, weights = _operands(kind, size=(12, 12), channels=24, filters=40, kernel=3)
    weights = weights.astype(jnp.bfloat16).astype(jnp.float32)
    half = x.astype(jnp.bfloat16)
    cpu = functools.partial(_value_and_gradients, _operation(kind, "cpu", 2, "SAME"))
    plain = functools.partial(_value_and_gradients, _operation(kind, "plain", 2, "SAME"))
    results = jax.jit(cpu)(half, weights)
    assert [a.dtype for a in results] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    # One rounding to 8 bits of the result and one of the cotangent: measured 3.4e-3. Depthwise
    # sums in bfloat16 would be 7.5e-3 off.
    _assert_same(results, jax.jit(plain)(half.astype(jnp.float32), weights), tolerance=4.5e-3)


def test_rounding_by_bits_is_that_of_a_cast():
    special = [0, 1e-45, -1e-40, 2**-126, 3.38e38, 3.4e38, np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8]
    drawn = np.random.default_rng(0).integers(0, 2**32, 10**5, np.uint32).view(np.float32)
    x = np.float32([*special, *(-v for v in special), *drawn[~np.isnan(drawn)]])
    found = jax.jit(windows.rounded, static_argnums=1)(x, jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(found), np.float32(jnp.asarray(x, jnp.bfloat16)))
    slope = jax.grad(lambda x: windows.rounded(x, jnp.bfloat16).astype(jnp.float32) ** 2)(3.0)
    assert slope == 6
    for dtype in (jnp.float16, jnp.float32):
        assert windows.rounded(jnp.ones(3), dtype).dtype == dtype


def _rounded(x, dtype=jnp.bfloat16):
    return x.astype(dtype).astype(jnp.float32)


# What is multiplied as bfloat16 by oneDNN, and as float32 elsewhere: both on one machine.
ONEDNN = pytest.param(
    True,
    id="onednn",
    marks=pytest.mark.skipif(
        not cpu_onednn.is_available(),
        reason="BFLOAT16 BY ONEDNN NOT TESTED: not this processor, system or version of jaxlib",
    ),
)
NARROW = pytest.mark.parametrize("onednn", [ONEDNN, pytest.param(False, id="float32")])


@NARROW
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("kind", "shape", "kernel", "filters", "stride"),
    [
        ("dense", (1, 1, 1, 8), 1, 1, 1),
        ("dense", (1, 1, 1, 1), 1, 8, 1),
        ("dense", (2, 1, 3, 1), 1, 1, 1),
        ("dense", (3, 5, 7, 17), 1, 30, 1),
        ("dense", (8, 12, 12, 40), 1, 24, 1),
        ("dense", (2, 48, 48, 8), 1, 16, 1),
        ("dense", (2, 12, 12, 16), 3, 64, 1),
        ("dense", (2, 13, 11, 5), 3, 72, 2),
        ("dense", (3, 60, 44, 3), 3, 64, 1),  # bands, of which the last begins in the one before
        ("dense", (2, 9, 9, 8), 3, 16, 2),
        ("dense", (2, 8, 7, 3), 3, 24, 2),
        ("dense", (1, 8, 8, 64), 3, 64, 1),
        ("dense", (2, 9, 10, 6), 5, 7, 2),
        ("depthwise", (2, 12, 12, 48), 3, 48, 1),
        ("depthwise", (3, 13, 10, 7), 3, 7, 2),
        ("depthwise", (2, 6, 6, 1152), 3, 1152, 1),
        ("depthwise", (2, 12, 7, 5), 5, 5, 2),
        ("depthwise", (1, 5, 6, 1), 5, 1, 1),
    ],
)
def test_a_narrow_kernel_is_multiplied_by_narrow_numbers(
    kind, shape, kernel, filters, stride, dtype, onednn, monkeypatch
):
    monkeypatch.setattr(cpu_onednn, "is_available", lambda: onednn)
    _, *size, channels = shape
    x, weights = _operands(
        kind, n=shape[0], size=size, channels=channels, filters=filters, kernel=kernel
    )
    cpu, plain = (_operation(kind, form, stride, "SAME") for form in ("cpu", "plain"))
    y, pull_back = jax.vjp(jax.jit(cpu), x, weights.astype(dtype))
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    dx, dkernel = jax.jit(pull_back)(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.float32, dtype)

    def exact(x, dy, weights):
        y, pull_back = jax.vjp(plain, x, weights)
        return y, *pull_back(dy)

    # What is rounded is rounded once, before it is multiplied, and the kernel's gradient at last.
    narrow = onednn and dtype == jnp.bfloat16 and (kernel > 1 or y.size // y.shape[3] >= 32)
    operands = [_rounded(v, dtype) if narrow else v for v in (x, dy)]
    expected = list(jax.jit(exact)(*operands, _rounded(weights, dtype)))
    if kind == "depthwise" and stride == 2:  # that gradient is no convolution of oneDNN's
        expected[1] = jax.jit(exact)(x, dy, _rounded(weights, dtype))[1]
    for found, wanted, step in zip(
        (y, dx, dkernel), expected, (0.0, 0.0, float(jnp.finfo(dtype).eps)), strict=True
    ):
        np.testing.assert_allclose(np.float32(found), wanted, **_within(wanted, rtol=step))


@NARROW
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_narrow_images_give_narrow_results(kind, onednn, monkeypatch):
    monkeypatch.setattr(cpu_onednn, "is_available", lambda: onednn)
    x, weights = _operands(kind, size=(12, 12), channels=24, filters=24, kernel=3)
    operands = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    compiled = jax.jit(_operation(kind, "cpu", 1, "SAME")).lower(*operands).compile()
    y = compiled(*operands)
    assert y.dtype == jnp.bfloat16
    calls = re.findall(r" = (\w+)\[.* custom-call\(.*__onednn\$convolution", compiled.as_text())
    assert calls == (["bf16"] if onednn else [])
    wanted = jax.jit(_operation(kind, "plain", 1, "SAME"))(*(_rounded(v) for v in operands))
    np.testing.assert_allclose(np.float32(y), wanted, **_within(wanted, rtol=2**-8))


def _within(values, rtol=0.0):
    return {"rtol": rtol, "atol": TOLERANCE * max(float(np.abs(values).max()), 1e-3)}


@pytest.mark.parametrize("onednn", [ONEDNN])
def test_products_of_narrow_numbers_are_not_widened(onednn):
    """By the compiled program: values and both gradients are oneDNN's, of operands of 16 bits."""
    for kind, stride, kernel, expected in (
        ("dense", 1, 1, ["convolution"] * 2 + ["matmul"]),
        ("dense", 1, 3, ["convolution"] * 2 + ["matmul"]),
        ("dense", 2, 3, ["convolution"] * 5 + ["matmul"]),
        ("depthwise", 1, 3, ["convolution"] * 2),
        ("depthwise", 2, 3, ["convolution"]),
    ):
        x, weights = _operands(kind, size=(12, 12), channels=24, filters=24, kernel=kernel)
        run = functools.partial(_value_and_gradients, _operation(kind, "cpu", stride, "SAME"))
        compiled = jax.jit(run).lower(x, weights.astype(jnp.bfloat16)).compile().as_text()
        types = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", compiled))
        calls = re.findall(
            r" custom-call\(%?([\w.\-]+), %?([\w.\-]+)\), .*__onednn\$(\w+)", compiled
        )
        assert sorted(call[2] for call in calls) == expected, (kind, stride, kernel)
        assert {types[name] for call in calls for name in call[:2]} == {"bf16"}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_programs_for_other_devices_have_nothing_of_onednn(platform, monkeypatch):
    monkeypatch.setattr(cpu_onednn, "is_available", lambda: True)
    for kind in ("dense", "depthwise"):
        x, weights = _operands(kind, size=(12, 12), channels=24, filters=24, kernel=3)
        run = functools.partial(_value_and_gradients, _operation(kind, "cpu", 1, "SAME"))
        traced = jax.jit(run).trace(x, weights.astype(jnp.bfloat16))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("__onednn$" in text) == (platform == "cpu")


@pytest.mark.parametrize(
    ("flags", "version", "machine", "limit", "expected"),
    [
        ("fpu avx512f amx_bf16 amx_tile", (0, 10, 2), "x86_64", None, True),
        ("fpu avx512_bf16", (0, 12, 0, 1), "x86_64", None, True),
        ("fpu avx512f avx512_bf16x", (0, 10, 2), "x86_64", None, False),
        ("fpu avx512_bf16", (0, 13, 0), "x86_64", None, False),
        ("fpu avx512_bf16", (0, 9, 2), "x86_64", None, False),
        ("fpu avx512_bf16", (0, 10, 2), "aarch64", None, False),
        ("fpu avx512_bf16", (0, 10, 2), "x86_64", "AVX2", False),
    ],
)
def test_onednn_is_used_where_it_was_tested(flags, version, machine, limit, expected, monkeypatch):
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr("effv2_jax.processor.describe", lambda: {"flags": flags})
    monkeypatch.setattr("jaxlib.version.__version_info__", version)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sys.platform", "linux")
    assert cpu_onednn.is_available.__wrapped__() is expected


def test_values_that_are_not_finite_or_tiny_pass_unchanged():
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e38, -1.5, 2**-149]
    for dtype in (np.float32, jnp.bfloat16):
        x = jnp.asarray(np.asarray(special, np.float32), dtype)
        y = jax.jit(windows.materialize)(x)
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        np.testing.assert_array_equal(
            np.asarray(y).view(bits)[:5], np.asarray(x).view(bits)[:5], strict=True
        )
        np.testing.assert_array_equal(np.asarray(y[5:], np.float32), np.asarray(x[5:], np.float32))


@pytest.mark.parametrize("form", ["plain", "cpu", "gpu", "tpu"])
def test_what_waits_for_another_value_stays_the_same(form):
    after = lowering.TABLE.get(form, lowering.choose("plain")).after
    x = jax.random.normal(jax.random.key(0), (2, 3), jnp.bfloat16)
    for first in (0.0, -1.5, jnp.inf):
        y = jnp.zeros((4, 5)).at[0, 0].set(first)
        assert jnp.array_equal(jax.jit(after)(x, y), x)


class _Tiny(nn.Module):
    products: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self._kernel("depthwise", (3, 3, 1, 4))
        x = lowering.depthwise_conv2d(x, kernel, stride=2, implementation="cpu")
        x = lowering.conv2d(x, self._kernel("pointwise", (1, 1, 4, 2)), implementation="cpu")
        kernel = self._kernel("dense", (3, 3, 2, 40))
        return jnp.sum(jnp.sin(lowering.conv2d(x, kernel, stride=2, implementation="cpu")))

    def _kernel(self, name, shape):
        return self.param(name, nn.initializers.normal(), shape).astype(self.products)


@pytest.mark.parametrize(
    ("products", "tolerance"),
    # Sums in another order are rounded to another of two neighbours of 8 bits.
    [(jnp.float32, 1e-4), (jnp.bfloat16, 1e-2)],
)
def test_gradients_are_equal_under_remat_vmap_and_shard_map(products, tolerance):
    tiny = _Tiny(products)
    x = jax.random.normal(jax.random.key(0), (4, 9, 9, 4))
    variables = jax.jit(tiny.init)(jax.random.key(1), x)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=auto)

    def gradient(variables, x):
        return jax.grad(lambda v: tiny.apply(v, x))(variables)

    def with_remat(variables, x):
        return jax.grad(lambda v: nn.remat(_Tiny)(products).apply(v, x))(variables)

    def image_by_image(variables, x):
        one = jax.vmap(lambda v, image: tiny.apply(v, image[None]), (None, 0))
        return jax.grad(lambda v: jnp.sum(one(v, x)))(variables)

    sharded = jax.shard_map(
        lambda v, x: jax.lax.psum(gradient(v, x), "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    expected = jax.jit(gradient)(variables, x)["params"]
    for function in (with_remat, image_by_image, sharded):
        for name, found in jax.jit(function)(variables, x)["params"].items():
            atol = tolerance * float(np.abs(expected[name]).max())
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=atol, err_msg=name)


def test_gradient_of_the_gradient_exists():
    x, weights = _operands("depthwise", n=1, size=(5, 5), channels=2, kernel=3)

    def slope(weights, form):
        operation = _operation("depthwise", form, 2, "SAME")
        return jnp.sum(jax.grad(lambda w: jnp.sum(jnp.sin(operation(x, w))))(weights) ** 2)

    second = [jax.jit(jax.grad(slope), static_argnums=1)(weights, f) for f in ("cpu", "plain")]
    np.testing.assert_allclose(*second, rtol=1e-4, atol=1e-4)


@NARROW
@pytest.mark.parametrize(
    ("kind", "kernel", "stride"),
    [("dense", 1, 1), ("dense", 3, 1), ("dense", 3, 2), ("depthwise", 3, 1)],
)
def test_gradient_of_the_gradient_exists_for_narrow_numbers(
    kind, kernel, stride, onednn, monkeypatch
):
    monkeypatch.setattr(cpu_onednn, "is_available", lambda: onednn)
    x, weights = _operands(kind, n=2, size=(6, 6), channels=3, kernel=kernel)

    def slope(x, form):
        def value(x):
            narrow = weights.astype(jnp.bfloat16) if form == "cpu" else _rounded(weights)
            return jnp.sum(jnp.sin(_operation(kind, form, stride, "SAME")(x, narrow)))

        return jnp.sum(jax.grad(value)(x) ** 2)

    def of_kernel(weights, form):
        def value(weights):
            narrow = weights.astype(jnp.bfloat16) if form == "cpu" else weights
            return jnp.sum(jnp.sin(_operation(kind, form, stride, "SAME")(x, narrow)))

        return jnp.sum(jax.grad(value)(weights) ** 2)

    for function, at in ((slope, x), (of_kernel, 0.1 * weights)):
        one, other = (
            jax.jit(jax.grad(function), static_argnums=1)(at, f) for f in ("cpu", "plain")
        )
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < 0.02, error  # a few roundings to 8 bits; without a term of it 0.5 or more


def test_the_stored_activation_has_the_same_values_and_gradients():
    x = jnp.linspace(-9, 9, 37)

    def derivatives(function):
        def first(x):
            return jnp.sum(jax.grad(lambda x: jnp.sum(function(x) ** 2))(x) ** 2)

        return function(x), first(x), jax.grad(first)(x)

    stored = lowering.choose("cpu").activation(nn.silu)
    for one, other in zip(derivatives(stored), derivatives(nn.silu), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_silu_rounds_no_worse_than_it_says():
    x = jnp.concatenate([jnp.linspace(-80, 88, 300_001), jnp.linspace(-2, 2, 300_001)])
    exact = np.asarray(x, np.float64)
    sigmoid = 1 / (1 + np.exp(-exact))
    values = jax.jit(cpu_activation.silu)(x)
    np.testing.assert_allclose(values, exact * sigmoid, rtol=3e-7, atol=1e-33)
    slopes = jax.jit(jax.vmap(jax.grad(cpu_activation.silu)))(x)
    np.testing.assert_allclose(slopes, sigmoid * (1 + exact * (1 - sigmoid)), rtol=0, atol=2e-6)


def test_silu_of_what_is_no_usual_number():
    x = jnp.array([jnp.nan, jnp.inf, 3e38, 0.0, -90.0, -3e38])
    np.testing.assert_allclose(cpu_activation.silu(x), [jnp.nan, jnp.inf, 3e38, 0, 0, 0], atol=2)
    for dtype in (jnp.bfloat16, jnp.float16):
        few = jnp.linspace(-9, 9, 99, dtype=dtype)
        same = [jax.vmap(jax.value_and_grad(f))(few) for f in (cpu_activation.silu, nn.silu)]
        np.testing.assert_array_equal(*same)


def test_the_table_decides_by_backend(monkeypatch):
    assert lowering.choose("auto") is lowering.TABLE["cpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert lowering.choose("auto") is lowering.TABLE["tpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "one not known yet")
    assert lowering.choose("auto") is lowering.choose("plain")
    assert lowering.choose("cpu") is lowering.TABLE["cpu"]
    with pytest.raises(ValueError, match=r"'fast'.*auto.*plain.*cpu"):
        lowering.choose("fast")


@pytest.mark.parametrize(
    ("side", "count", "at_once"),
    [(192, 8, 1), (24, 8, 1), (16, 32, 4), (12, 16, 4), (12, 32, 4), (12, 24, 6), (12, 22, 22)]
    + [(19, 8, 2), (10, 16, 8), (6, 32, 16), (6, 64, 16), (6, 8, 8), (192, 1, 1), (24, 0, 0)],
)
def test_a_few_images_at_a_time_in_inference_on_cpus(side, count, at_once):
    cpu, gpu = lowering.choose("cpu"), lowering.choose("gpu")
    assert cpu.images_at_once(count, side * side, jnp.float32) == at_once
    assert gpu.images_at_once(count, side * side, jnp.float32) == count


@NARROW
def test_more_images_at_a_time_where_onednn_orders_the_kernels_in_every_call(onednn, monkeypatch):
    monkeypatch.setattr(cpu_onednn, "is_available", lambda: onednn)
    few = [
        lowering.choose("cpu").images_at_once(32, side * side, jnp.bfloat16)
        for side in (6, 192, 300, 1200)
    ]
    assert few == ([32, 16, 8, 1] if onednn else [16, 1, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: lowering.conv2d(x, jnp.ones((3, 3, 4, 8))), r"\(1, 6, 6, 5\).*\(3, 3, 4, 8\)"),
        (lambda x: lowering.depthwise_conv2d(x, jnp.ones((3, 3, 5, 1))), r"\[k, k, 1, C\]"),
        (lambda x: lowering.conv2d(x, jnp.ones((3, 3, 5, 8)), padding="FULL"), "'FULL'.*SAME"),
        (lambda x: lowering.conv2d(x, jnp.ones((7, 7, 5, 8)), padding="VALID"), "smaller"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((1, 6, 6, 5)))


@functools.cache
def _network_program(form):
    """Optimised program of the gradient of a network with every kind of block."""
    blocks = ("r1_k3_s2_e4_i8_o8_c1", "r2_k3_s2_e4_i8_o8_se0.25")
    model = create_model("testing", 5, blocks=blocks, lowering=form)
    variables = jax.eval_shape(lambda: init_variables(model, 0))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def loss(params, stats, images):
        logits, _ = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jnp.sum(logits**2)

    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"], images)
    return lowered.compile().as_text()


def test_the_training_program_has_no_grouped_or_dilated_convolution():
    """What made the plain forms 4 to 6 times slower; see docs/performance.md."""
    slow = re.compile(r"(?:feature|batch)_group_count=(?!1\b)|lhs_dilate=\d*[2-9]")
    assert slow.search(_network_program("plain"))
    assert not slow.search(_network_program("cpu"))


def test_a_depthwise_convolution_is_computed_once_for_all_its_consumers(monkeypatch):
    """XLA's CPU backend copies cheap expressions, and sums of taps, into each consumer."""
    x, weights = _operands("depthwise", size=(16, 16), channels=8, kernel=3)

    def loss(x, weights):
        y = lowering.depthwise_conv2d(x, weights, implementation="cpu")
        y = y.reshape(1, *y.shape)  # one group of examples, as in BatchNorm
        mean, square = (jnp.mean(v, (1, 2, 3), keepdims=True) for v in (y, y * y))
        return jnp.sum(nn.silu((y - mean) * jax.lax.rsqrt(square - mean**2)) ** 2)

    def taps():
        jax.clear_caches()  # JAX would return the program it has
        program = jax.jit(jax.grad(loss)).lower(x, weights).compile().as_text()
        return program.count(" slice(")

    once = taps()
    monkeypatch.setattr(cpu_depthwise, "materialize", lambda x: x)
    # Measured: 34 and 93. If they are equal, XLA has changed: is `materialize` still needed?
    assert once < 40
    assert taps() > 2 * once
