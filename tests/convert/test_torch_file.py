"""Files of PyTorch: read exactly, and nothing in them is ever run."""

import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest

from effv2_jax.convert.torch_file import StoredTensor, read_torch_file
from effv2_jax.errors import UserError
from tests import reference
from tests.convert.torch_pickles import (
    call,
    items,
    mapping,
    name,
    number,
    save,
    save_legacy,
    tensor,
    text,
)

FOLDER = reference.DATA / "frameworks"


def _read_all(path) -> None:
    content = read_torch_file(path)
    for value in content.values() if isinstance(content, dict) else ():
        if isinstance(value, StoredTensor):
            value.read()


def message_of(path) -> str:
    with pytest.raises(UserError) as caught:
        _read_all(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("file", ["odd.pth", "odd_legacy.pth"])
def test_every_kind_of_tensor_that_pytorch_wrote_is_read_exactly(file):
    """Windows, transposed and empty tensors, half precision, integers, both layouts of the file."""
    expected = reference.load_npz("frameworks/odd.npz")
    found = read_torch_file(FOLDER / file)
    assert list(found) == list(expected)
    for key, stored in found.items():
        value = stored.read()
        assert value.shape == stored.shape == expected[key].shape, key
        assert value.dtype == expected[key].dtype, key
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    assert found["bfloat16"].dtype == "bfloat16"
    assert found["half"].dtype == "float16"


def test_what_tests_write_is_read_like_what_pytorch_writes(tmp_path):
    path = save(tmp_path / "a.pth", mapping(a=tensor(), b=tensor(shape=(2, 2), strides=(1, 3))))
    found = read_torch_file(path)
    np.testing.assert_array_equal(found["a"].read(), np.arange(6))
    np.testing.assert_array_equal(found["b"].read(), [[0, 3], [1, 4]])


@pytest.mark.parametrize("protocol", range(6))
def test_the_layout_before_pytorch_1_6_is_read_whatever_protocol_it_was_pickled_with(
    tmp_path, protocol
):
    body = mapping(
        a=tensor("0", view=b"N"), b=tensor("17", shape=(2, 2), strides=(1, 3)), epoch=number(3)
    )
    path = save_legacy(tmp_path / "a.pth", body, protocol=protocol, keys=("17", "0"), counts=(6, 6))
    found = read_torch_file(path)
    np.testing.assert_array_equal(found["a"].read(), np.arange(6))
    np.testing.assert_array_equal(found["b"].read(), [[0, 3], [1, 4]])
    assert found["epoch"] == 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_the_installed_pytorch_writes_is_read_exactly(tmp_path, protocol, legacy):
    torch = pytest.importorskip("torch", reason="writes the files")
    expected = {
        "whole": torch.arange(24.0).reshape(2, 3, 4),
        "part": torch.arange(24.0).reshape(2, 3, 4)[:, 1:, ::2],
        "count": torch.tensor(7),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    }
    path = tmp_path / "a.pth"
    torch.save(
        {"state_dict": expected, "epoch": 4},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    found = read_torch_file(path)
    assert found["epoch"] == 4
    for key, stored in found["state_dict"].items():
        np.testing.assert_array_equal(stored.read(), expected[key].numpy(), err_msg=key)


def test_plain_values_beside_tensors_are_kept(tmp_path):
    arguments = call("argparse Namespace") + mapping(lr=number(1)) + b"b"
    body = mapping(epoch=number(3), arch=text("b0"), state_dict=mapping(a=tensor()), args=arguments)
    found = read_torch_file(save(tmp_path / "a.pth", body))
    assert (found["epoch"], found["arch"]) == (3, "b0")
    assert isinstance(found["state_dict"]["a"], StoredTensor)
    assert not vars(found["args"])  # nothing of it is taken


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_named_and_not_run(tmp_path, legacy):
    target, path = tmp_path / "ran", tmp_path / "evil.pth"
    evil = pickle.dumps({"weight": _Runs(target)}, protocol=2)
    write = save_legacy if legacy else save
    write(path, evil[2:-1])
    message = message_of(path)
    assert f"its pickle asks for {os.mkdir.__module__}.mkdir" in message
    assert "nothing of it was run" in message
    assert "torch.save(model.state_dict()" in message
    assert not target.exists()


@pytest.mark.parametrize(
    "function",
    ["os system", "builtins eval", "__builtin__ eval", "builtins getattr", "torch load",
     "torch._utils _rebuild_tensor", "numpy.core.multiarray scalar", "collections Counter",
     "torch.hub load", "functools partial", "torch._utils os.system"],
)  # fmt: skip
def test_any_other_name_is_refused(tmp_path, function):
    path = save(tmp_path / "a.pth", mapping(a=call(function, text("1"))))
    assert f"asks for {function.replace(' ', '.')}" in message_of(path)


def test_names_built_from_strings_are_refused_too(tmp_path):
    body = b"\x8c\x02os\x8c\x06system\x93" + items(text("true")) + b"R"  # STACK_GLOBAL
    assert "asks for os.system" in message_of(save(tmp_path / "a.pth", mapping(a=body)))


def test_a_whole_model_is_refused_with_the_way_out():
    message = message_of(FOLDER / "whole_model.pth")
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict()" in message


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (tensor(shape=(7,)), "reaches beyond storage 0"),
        (tensor(offset=4, shape=(3,)), "reaches beyond storage 0"),
        (tensor(shape=(3,), strides=(3,)), "reaches beyond storage 0"),
        (tensor(shape=(1000, 1000, 1000), strides=(0, 0, 0)), "reaches beyond storage 0"),
        (tensor(offset=-1, shape=(2,)), "not described as one"),
        (tensor(shape=(2,), strides=(-1,)), "not described as one"),
        (tensor(shape=(2, 2)), "not described as one"),
        (tensor(size=8, shape=(8,)), "storage 0 has 24 bytes, expected 32"),
        (tensor(kind="DoubleStorage"), "storage 0 has 24 bytes, expected 48"),
        (tensor("1"), "archive/data/1"),
        (tensor("../../secret"), "secret"),
        (tensor(size=-6), "unknown storage"),
    ],
)
def test_tensors_that_do_not_fit_the_file_are_refused(tmp_path, body, reason):
    message = message_of(save(tmp_path / "a.pth", mapping(a=body)))
    assert "damaged or truncated" in message
    assert reason in message


def test_a_tensor_cannot_be_changed_after_it_was_checked(tmp_path):
    for state in (mapping(shape=items(number(99))), mapping(_offset=number(-9))):
        for form in (state, b"N" + state + b"\x86"):  # of __dict__, of slots
            path = save(tmp_path / "a.pth", mapping(a=tensor() + form + b"b"))
            assert "attributes of something that has none" in message_of(path)


def test_compressed_storages_are_refused(tmp_path):
    """A file of kilobytes could unpack to any size."""
    path = save(tmp_path / "a.pth", mapping(a=tensor()), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in message_of(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": 1000}, "unknown version 1000"),
        ({"system": []}, "unknown version"),
        ({"system": {"little_endian": False}}, "big-endian"),
        ({"counts": (7,)}, "storage 0 has 7 numbers, expected 6"),
        ({"counts": (-1,)}, "storage 0 has -1 numbers, expected 6"),
        ({"counts": ()}, "storage 0 has 0 numbers, expected 6"),
        ({"keys": ("1",)}, "damaged or truncated ('1')"),
        ({"keys": ()}, "storage 0 is missing"),
        ({"keys": 7}, "not iterable"),
        ({"keys": ("0", "0"), "counts": (6,)}, "storage 0 has 0 numbers"),
    ],
)
def test_storages_that_do_not_follow_as_the_old_layout_says_are_refused(tmp_path, options, reason):
    message = message_of(save_legacy(tmp_path / "a.pth", mapping(a=tensor()), **options))
    assert "damaged or truncated" in message
    assert reason in message


def test_storages_larger_than_the_file_are_refused_without_reserving_their_memory(tmp_path):
    huge = tensor(size=2**31 - 1, shape=(2**31 - 1,))
    message = message_of(save_legacy(tmp_path / "a.pth", mapping(a=huge), counts=(2**31 - 1,)))
    assert "ends within storage 0" in message


def test_parts_of_storages_under_other_names_are_refused_with_the_way_out(tmp_path):
    view = items(text("1"), number(2), number(3))
    message = message_of(save_legacy(tmp_path / "a.pth", mapping(a=tensor(view=view))))
    assert "before 0.4" in message
    assert "save it again" in message


@pytest.mark.parametrize("file", ["timm_rw.pth", "timm_rw_legacy.pth"])
@pytest.mark.parametrize("kept", [0.0005, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_noticed(tmp_path, file, kept):
    content = (FOLDER / file).read_bytes()
    path = tmp_path / file
    path.write_bytes(content[: int(kept * len(content))])
    assert "damaged or truncated" in message_of(path) or kept < 0.001


def test_a_flipped_bit_is_noticed(tmp_path):
    content = bytearray((FOLDER / "timm_rw.pth").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(content)
    assert "damaged or truncated" in message_of(path)


def test_code_in_any_part_of_the_old_layout_is_named_and_not_run(tmp_path):
    target, path = tmp_path / "ran", tmp_path / "evil.pth"
    for part in ("version", "system", "keys"):
        save_legacy(path, mapping(a=tensor()), **{part: _Runs(target)})
        assert f"asks for {os.mkdir.__module__}.mkdir" in message_of(path), part
        assert not target.exists(), part


def test_a_pickle_of_something_else_is_not_run_and_the_way_out_is_told(tmp_path):
    target, path = tmp_path / "ran", tmp_path / "evil.pth"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"weight": _Runs(target)}, protocol))
        message = message_of(path)
        assert "not a file of PyTorch but another pickle; nothing of it was run" in message
        assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello\n" * 40, b"\x89PNG\r\n", b"\x80\x04K\x01."])
def test_other_files_are_noticed(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert "not a file of PyTorch" in message_of(path)


def test_an_archive_of_something_else_is_noticed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no data.pkl in it" in message_of(tmp_path / "a.pth")


def test_random_bytes_in_the_pickle_never_raise_anything_else(tmp_path):
    good = b"\x80\x02" + mapping(a=tensor(), b=tensor(shape=(2, 3), strides=(3, 1))) + b"."
    rng = np.random.default_rng(0)
    path = tmp_path / "a.pth"
    for _ in range(300):
        broken = bytearray(good)
        for position in rng.integers(2, len(good), 3):
            broken[position] = rng.integers(256)
        save(path, bytes(broken[2:-1]))
        with contextlib.suppress(UserError):
            _read_all(path)


def test_a_damaged_file_cannot_reserve_all_memory(tmp_path):
    body = b"}r" + (2**31 - 1).to_bytes(4, "little")  # LONG_BINPUT: 2^31 entries to remember
    assert read_torch_file(save(tmp_path / "a.pth", body)) == {}


def test_names_that_are_asked_for_do_not_become_code():
    """The types of storages are names to us, never classes of an imported PyTorch."""
    assert name("torch FloatStorage") == b"ctorch\nFloatStorage\n"
    assert isinstance(read_torch_file(FOLDER / "timm_rw.pth"), dict)
