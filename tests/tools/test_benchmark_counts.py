"""What steps need at least, and to which layer a kernel belongs."""

import contextlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tools" / "benchmarks" / "workers"))

import kernels  # noqa: E402
from benchmarks import block, counts, roofline  # noqa: E402
from benchmarks.results import Case  # noqa: E402

from effv2_jax.models.block_spec import expand_blocks  # noqa: E402
from effv2_jax.models.network import create_model  # noqa: E402
from effv2_jax.models.summary import summarize, totals  # noqa: E402
from effv2_jax.models.variants import get_variant  # noqa: E402

NETWORKS = ("testing", "efficientnetv2-b0", "efficientnetv2-s", "efficientnet-b0")


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("size", [75, 192])
def test_layers_add_up_to_the_network(model, size):
    rows = summarize(get_variant(model), image_size=size)
    layers = counts.count_layers(get_variant(model), image_size=size)
    _, parameters, _, multiply_adds = totals(rows)
    assert sum(layer.multiply_adds for layer in layers) == multiply_adds
    assert sum(layer.weights for layer in layers) == parameters
    for row in rows[:-1]:  # all but the classifier
        last = [layer for layer in layers if layer.stage == row.stage][-1]
        assert (last.side, last.side, last.features) == row.output


def _layer(**changes):
    return counts.Layer(**{
        "stage": "1", "kind": "pointwise", "inputs": 100, "outputs": 10, "side": 1, "features": 10,
        "weights": 0, "multiply_adds": 50, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "infer", "train"),
    [
        ({}, 110, 340),  # 110 forward, 3 x 10 + 2 x 100 backward
        ({"gated": True}, 110, 370),  # + 3 x 10
        ({"shortcut": True}, 120, 360),  # + 2 x 10
        ({"first": True}, 110, 440),  # + 100
        ({"weights": 8}, 118, 388),  # + 6 x 8: parameters at batch 1
    ],
)
def test_least_bytes_are_those_of_the_text(changes, infer, train):
    layer = _layer(**changes)
    assert layer.bytes("infer", dtype="float32", batch=1) == 4 * infer
    assert layer.bytes("train", dtype="float32", batch=1) == 4 * train
    assert layer.operations("train") == 3 * layer.operations("infer") == 300


def test_pictures_are_bytes_and_need_no_gradient():
    stem = _layer(kind="stem")
    assert stem.bytes("infer", dtype="float32", batch=1) == 100 + 4 * 10
    assert stem.bytes("train", dtype="float32", batch=1) == 2 * 100 + 4 * 4 * 10


def test_a_layer_is_bound_by_the_slower_of_its_two_needs():
    arithmetic = counts.Rates(1.0, 1e9).bound(_layer(), "infer", dtype="float32", batch=1)
    assert (arithmetic.seconds, arithmetic.by) == (100, "matmul")
    traffic = counts.Rates(1e9, 1.0).bound(_layer(), "infer", dtype="float32", batch=1)
    assert (traffic.seconds, traffic.by) == (440, "copy")


def test_the_bound_of_a_step_counts_the_whole_batch():
    case = Case(
        model="testing", image_size=32, batch=4, dtype="float32", cores=1, mode="infer"
    )  # fmt: skip
    rows = roofline.layer_bounds(case, counts.Rates(1e9, 1e30))
    multiply_adds = totals(summarize(get_variant("testing"), image_size=32))[3]
    assert sum(row["operations"] for row in rows.values()) == 4 * 2 * multiply_adds
    assert sum(row["bound_ms"] for row in rows.values()) == pytest.approx(8e-6 * multiply_adds)
    assert all(row["arithmetic_ms"] == row["bound_ms"] for row in rows.values())


@pytest.mark.parametrize("model", NETWORKS)
def test_parts_of_a_network_are_all_its_blocks(model):
    variant = get_variant(model)
    parts = block.parts_of(model, 224)
    blocks = len(expand_blocks(variant.blocks, width=variant.width, depth=variant.depth))
    assert sum(part.count for part in parts if part.part == "block") == blocks
    assert (parts[0].part, parts[0].input) == ("stem", (224, 224, 3))
    assert (parts[-1].part, parts[-1].block) == ("head", None)
    work = sum(part.count * counts.total(part.layers, "infer", dtype="float32", batch=1)[0]
               for part in parts)  # fmt: skip
    classifier = 2 * counts.count_layers(variant, image_size=224)[-1].multiply_adds
    assert work + classifier == 2 * totals(summarize(variant, image_size=224))[3]


FORWARD = "jit(f)/shard_map/jvp(EfficientNet)/"
BACKWARD = "jit(f)/transpose(jvp(EfficientNet))/"


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        (FORWARD + "stem/conv/conv_general_dilated", ("stem", "convolution", "forward")),
        (FORWARD + "stem/norm/jit(silu)/mul", ("stem", "activation", "forward")),
        (FORWARD + "blocks_1/expand_conv/dot_general", ("dense", "convolution", "forward")),
        (FORWARD + "blocks_1/expand_norm/norm._moments/div", ("dense", "norm", "forward")),
        (FORWARD + "blocks_1/expand_norm/jit(silu)/mul", ("dense", "activation", "forward")),
        (BACKWARD + "blocks_1/project_conv/add", ("pointwise", "convolution", "backward")),
        (FORWARD + "blocks_0/project_norm/mul", ("dense", "norm", "forward")),
        (BACKWARD + "blocks_4/depthwise_conv/mul", ("depthwise", "convolution", "backward")),
        (FORWARD + "blocks_4/expand_norm/jit(silu)/exp", ("pointwise", "activation", "forward")),
        (FORWARD + "blocks_4/depthwise_norm/jit(silu)/exp", ("depthwise", "activation", "forward")),
        (
            BACKWARD + "blocks_4/depthwise_norm/se/se.factor/jit(silu)/mul",
            ("depthwise", "squeeze-excite", "backward"),
        ),
        (
            FORWARD + "blocks_4/depthwise_norm/jvp(se.factor)/expand/squeeze",
            ("depthwise", "squeeze-excite", "forward"),
        ),
        (  # applied, as `remat_norms` has it, inside the norm before it
            BACKWARD + "blocks_4/expand_norm/depthwise_conv/reduce_sum",
            ("depthwise", "convolution", "backward"),
        ),
        (
            BACKWARD + "blocks_4/depthwise_norm/transpose(jvp(project_conv))/dot_general",
            ("pointwise", "convolution", "backward"),
        ),
        (
            FORWARD + "blocks_1/expand_norm/project_conv/dot_general",
            ("pointwise", "convolution", "forward"),
        ),
        (FORWARD + "blocks_4/blocks_4._residual/add", ("pointwise", "shortcut", "forward")),
        ("jit(f)/EfficientNet/classifier/dot_general", ("classifier", "convolution", "forward")),
        (FORWARD + "reduce_sum", ("head", "pooling", "forward")),
        ("jit(f)/sub", ("rest", "update, loss, copies", "forward")),
        ("", ("rest", "update, loss, copies", "forward")),
    ],
)
def test_a_kernel_belongs_to_the_layer_that_asked_for_it(name, owner):
    variant = get_variant("testing")
    blocks = expand_blocks(variant.blocks, width=variant.width, depth=variant.depth)
    assert kernels.owner_of(name, blocks) == owner


@pytest.mark.parametrize("remat_norms", [False, True])
def test_the_names_are_those_of_the_network_as_it_is_built(remat_norms):
    model = create_model("testing", 10, remat_norms=remat_norms)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        options = {"dropout_rate": 0.0, "survival_prob": 1.0, "mutable": ["batch_stats"]}
        return model.apply(variables, images, train=True, **options)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(variables, images).as_text("hlo", debug_info=True)
    names = set(re.findall(r'op_name="([^"]*)"', text))
    owners = {kernels.owner_of(name, model.block_specs)[:2] for name in names}
    gate = ("depthwise", "squeeze-excite")
    assert owners >= {gate, ("head", "pooling"), ("pointwise", "shortcut")}
    for layer in ("stem", "dense", "pointwise", "depthwise", "head"):
        assert owners >= {(layer, part) for part in ("convolution", "norm", "activation")}


BLOCKS = create_model("testing", 10).block_specs
PROGRAM = """\
HloModule jit_f

%transposed (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %copy.1 = f32[2]{0} copy(%p)
}

%turned (p.1: f32[2], p.2: f32[2]) -> f32[2] {
  ROOT %convolution.8 = f32[2]{0} convolution(%p.1, %p.2), window={size=2}, dim_labels=b01f_01io->b01f
}

%several (p.3: f32[2]) -> f32[2] {
  %dot.1 = f32[2]{0} dot(%p.3, %p.3), metadata={op_name="jit(f)/EfficientNet/head/conv/dot_general"}
  ROOT %dot.2 = f32[2]{0} dot(%dot.1, %p.3), metadata={op_name="jit(f)/EfficientNet/classifier/dot"}
}

%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %dot.5 = f32[2]{0} dot(%t, %t), metadata={op_name="NAME/blocks_1/expand_conv/while/body/dot"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %while.1 = (s32[], f32[2]) while(%a), condition=%c, body=%body, metadata={op_name="NAME/x/while"}
  %a = f32[2]{0} parameter(0), metadata={op_name="a"}
  %copy_fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%transposed
  %ynn_fusion.1 = f32[2]{0} fusion(%copy_fusion.1, %a), kind=kCustom, calls=%turned
  %transpose.3 = f32[2]{0} transpose(%ynn_fusion.1), metadata={op_name="NAME/stem/conv/transpose"}
  %copy.7 = f32[2]{0} copy(%transpose.3)
  ROOT %ynn_fusion.2 = f32[2]{0} fusion(%a), calls=%several, metadata={op_name="f/EfficientNet/div"}
}
""".replace("NAME", BACKWARD.rstrip("/"))  # noqa: E501


def test_what_has_no_name_belongs_to_what_reads_it():
    owners = kernels.owners_of(PROGRAM, BLOCKS)
    stem = ("stem", "convolution", "backward")
    assert [owners[key] for key in ("copy_fusion.1", "ynn_fusion.1", "transpose.3")] == [stem] * 3
    assert owners["copy.7"][0] == "rest"
    assert "convolution.8" not in owners


def test_the_kernels_of_a_loop_count_and_not_the_loop():
    owners = kernels.owners_of(PROGRAM, BLOCKS)
    assert owners["dot.5"] == ("dense", "convolution", "backward")
    assert "while.1" not in owners


def test_a_kernel_with_several_products_belongs_to_the_first():
    assert kernels.owners_of(PROGRAM, BLOCKS)["ynn_fusion.2"] == ("head", "convolution", "forward")


def test_a_step_is_made_between_reading_a_program_and_tracing_it(monkeypatch):
    made = []

    class Program:
        def as_text(self):
            made.append("text")
            return PROGRAM

    @contextlib.contextmanager
    def trace(folder, **_):
        made.append("trace")
        yield
        Path(folder, "host.xplane.pb").write_bytes(b"")

    monkeypatch.setattr(jax.profiler, "trace", trace)
    kernels.profile(Program(), made.append, steps=3, devices=1, blocks=BLOCKS)
    assert made == ["text", 1, "trace", 3]


def test_kernel_times_are_those_of_a_step_that_is_not_profiled():
    record = {
        "step_ms": 50.0,
        "wall_ms": 100.0,
        "kernels": [["stem", "norm", "forward", 10.0], ["stem", "norm", "backward", 30.0]],
    }
    assert roofline.kernel_times(record, "layer") == {"stem": 20.0}
    assert roofline.kernel_times(record, "part", "pass")["norm", "backward"] == 15.0


def test_the_counts_in_the_document_are_those_of_the_tool():
    rows = re.findall(
        r"^\| ([\w ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "performance.md").read_text(),
        re.MULTILINE,
    )
    kinds = {
        "stem": "stem",
        "3x3 convolutions": "dense",
        "1x1 convolutions": "pointwise",
        "depthwise convolutions": "depthwise",
        "head": "head",
        "classifier": "classifier",
    }
    assert [name for name, *_ in rows] == [*kinds, "a training step", "inference"]
    cases = (("efficientnetv2-b0", 192, "float32", 8), ("efficientnetv2-s", 300, "bfloat16", 128))
    for column, (model, size, dtype, batch) in enumerate(cases):
        layers = counts.count_layers(get_variant(model), image_size=size)
        for name, *numbers in rows:
            chosen = [layer for layer in layers if layer.kind == kinds.get(name, layer.kind)]
            mode = "infer" if name == "inference" else "train"
            work, least = counts.total(chosen, mode, dtype=dtype, batch=batch)
            expected = [f"{work / 1e9:.2f}", f"{least / 1e6:.1f}"]
            assert numbers[2 * column : 2 * column + 2] == expected
