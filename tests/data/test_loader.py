import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from effv2_jax.data import loader
from effv2_jax.data.cache import DecodedCache
from effv2_jax.data.decode import decode
from effv2_jax.data.loader import default_workers, eval_batches, train_batches
from effv2_jax.data.order import example_indices
from effv2_jax.data.preprocess import evaluation_image, get_kind
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures
from tests.data.pictures import data_config as _config


@dataclasses.dataclass(frozen=True)
class Stage:
    """The fields of training.progressive.Stage that the loader reads."""

    index: int
    image_size: int
    batch_size: int
    start_step: int
    end_step: int
    first_example: int


# Two stages; batches larger and smaller than the loader's chunk of 32, and no multiple of it.
STAGES = (Stage(0, 12, 40, 0, 3, 0), Stage(1, 16, 20, 3, 7, 120))


def _batches(data, *, stages=STAGES, seed=0, start=0, stop=7, **hosts):
    source = open_source(data, "train")
    with train_batches(
        source, stages, data, seed=seed, start_step=start, stop_step=stop, **hosts
    ) as batches:
        return list(batches)


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def undisturbed():
    return _batches(_config())


def test_a_batch_has_the_size_of_its_stage(undisturbed):
    assert [batch["image"].shape for batch in undisturbed] == [(40, 12, 12, 3)] * 3 + [
        (20, 16, 16, 3)
    ] * 4
    assert all(batch["image"].dtype == np.uint8 for batch in undisturbed)
    assert all(batch["label"].dtype == np.int32 for batch in undisturbed)


@pytest.mark.parametrize("start", range(7))
def test_any_step_is_reached_directly(undisturbed, start):
    _assert_equal(_batches(_config(), start=start), undisturbed[start:])
    _assert_equal(_batches(_config(), start=start, stop=start + 1), undisturbed[start : start + 1])


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(undisturbed, threads):
    _assert_equal(_batches(_config(threads=threads)), undisturbed)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_host_sees(undisturbed, hosts):
    parts = [_batches(_config(), process_index=i, process_count=hosts) for i in range(hosts)]
    together = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _assert_equal(together, undisturbed)


def test_the_seed_decides(undisturbed):
    other = _batches(_config(), seed=1)
    assert (other[0]["label"] != undisturbed[0]["label"]).any()


def test_every_epoch_shows_every_example_once():
    # Uncropped digits at their own size are recognised by their pixels.
    data = _config(crop="none")
    source = open_source(data, "train")
    count = len(source)
    stage = Stage(0, 8, count, 0, 2, 0)
    expected = sorted(source[i].image.tobytes() for i in range(count))
    batches = _batches(data, stages=(stage,), stop=2)
    for batch in batches:
        assert sorted(image[:, :, 0].tobytes() for image in batch["image"]) == expected
    assert (batches[0]["label"] != batches[1]["label"]).any()


def test_labels_belong_to_their_pictures():
    data = _config(crop="none")
    source = open_source(data, "train")
    batch = _batches(data, stages=(Stage(0, 8, 50, 0, 9, 0),), start=5, stop=6, seed=3)[0]
    indices = example_indices(np.arange(250, 300), len(source), seed=3)
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(batch["image"][row, :, :, 0], source[int(index)].image)
        assert batch["label"][row] == source[int(index)].label


def test_the_same_example_is_cropped_differently_every_epoch():
    data = _config("synthetic", num_examples=4)
    batches = _batches(data, stages=(Stage(0, 16, 4, 0, 2, 0),), stop=2)
    images = np.concatenate([batch["image"] for batch in batches])
    assert len({image.tobytes() for image in images}) == 8


def test_multi_hot_labels():
    batch = _batches(_config(multilabel=True), stop=1)[0]
    plain = _batches(_config(), stop=1)[0]
    assert batch["label"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], np.eye(10)[plain["label"]])


def test_a_batch_that_the_hosts_cannot_divide_is_refused():
    with pytest.raises(UserError, match=r"train.batch_size: found 40 in stage 0, .* 3 hosts"):
        _batches(_config(), process_count=3)
    data = _config()
    source = open_source(data, "eval")
    with pytest.raises(UserError, match=r"eval.batch_size: found 40, .* 3 hosts"):
        eval_batches(source, data, image_size=8, batch_size=40, process_count=3)


# --- evaluation --------------------------------------------------------------------------------


def _evaluate(data, *, batch_size=64, size=10, **hosts):
    source = open_source(data, "eval")
    with eval_batches(source, data, image_size=size, batch_size=batch_size, **hosts) as batches:
        return source, list(batches)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [64, 500])
def test_evaluation_shows_every_example_once_over_all_hosts(hosts, batch_size):
    parts = [
        _evaluate(_config(), batch_size=batch_size, process_index=i, process_count=hosts)
        for i in range(hosts)
    ]
    source = parts[0][0]
    counts = {len(batches) for _, batches in parts}
    assert len(counts) == 1, "a host with fewer batches would leave the others waiting"
    rows = []
    for _, batches in parts:
        for batch in batches:
            assert batch["image"].shape == (batch_size // hosts, 10, 10, 3)
            assert batch["image"].dtype == batch["mask"].dtype == np.float32
            padding = batch["mask"] == 0
            assert not batch["image"][padding].any()
            assert not batch["label"][padding].any()
            real = zip(batch["image"][~padding], batch["label"][~padding], strict=True)
            rows += [(image.tobytes(), int(label)) for image, label in real]
    kind = get_kind("v2")
    expected = []
    for i in range(len(source)):
        rgb = np.repeat(source[i].image[:, :, None], 3, axis=2)
        image = evaluation_image(rgb, size=10, kind=kind)
        expected.append((image.tobytes(), source[i].label))
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_keeps_the_order_of_the_examples(threads):
    source, batches = _evaluate(_config(threads=threads))
    labels = np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])
    assert labels.tolist() == [source[i].label for i in range(len(source))]


# --- broken pictures ---------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Six pictures in train/ and three in val/, one broken in each."""
    root = pictures.class_folders(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 1})
    (root / "train/a/001.png").write_bytes(b"text")
    (root / "val/a/001.png").write_bytes(pictures.encode(pictures.photograph())[:200])
    return root


@pytest.mark.parametrize("threads", [0, 2])
def test_a_broken_picture_stops_the_run_and_is_named(damaged, threads):
    data = _config("folder", damaged, threads=threads)
    with pytest.raises(UserError, match=r"train/a/001.png: cannot decode this image") as caught:
        _batches(data)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"val/a/001.png: cannot decode"):
        _evaluate(data)


def test_broken_training_pictures_are_replaced_counted_and_reported(damaged, caplog):
    data = _config("folder", damaged, on_corrupt="skip", crop="none", threads=2)
    stages = (Stage(0, 14, 6, 0, 20, 0),)
    source = open_source(data, "train")
    with train_batches(source, stages, data, seed=0, start_step=0, stop_step=20) as batches:
        images = np.concatenate([batch["image"] for batch in batches])
        # Twenty epochs: the picture is met once in each, and again when it replaces itself.
        assert 20 <= batches.num_skipped <= 35
        assert len(batches.skipped) == 1
        assert "train/a/001.png" in batches.skipped[0]
    assert sum("001.png" in record.message for record in caplog.records) == 1
    good = {
        evaluation_image(
            decode(source[i].image, name="x"), size=14, kind=get_kind("finetune")
        ).astype(np.uint8).tobytes()
        for i in (0, 2, 3, 4, 5)
    }  # fmt: skip
    assert {image.tobytes() for image in images} == good
    # The substitutes are the same every time, wherever one starts.
    later = _batches(data, stages=stages, start=10, stop=20)
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in later]), images[60:])


def test_broken_evaluation_pictures_are_left_out_and_counted(damaged):
    data = _config("folder", damaged, on_corrupt="skip")
    source = open_source(data, "eval")
    batches = eval_batches(source, data, image_size=8, batch_size=4)
    batch = next(batches)
    assert batch["mask"].tolist() == [1, 0, 1, 0]
    assert not batch["image"][1].any()
    assert batches.num_skipped == 1
    assert "val/a/001.png" in batches.skipped[0]


def test_a_data_set_of_broken_pictures_is_not_skipped_for_ever(tmp_path):
    pictures.write_tree(tmp_path, {"train/a/1.png": b"text", "train/b/2.png": b"text"})
    with pytest.raises(UserError, match=r"found 20 broken pictures in a row, the last: .*png"):
        _batches(_config("folder", tmp_path, on_corrupt="skip"))


# --- the cache ---------------------------------------------------------------------------------


def test_the_cache_changes_no_batch_and_reads_every_file_once(tmp_path, monkeypatch):
    pictures.class_folders(tmp_path, {"train/a": 5, "train/b": 4})
    plain = _config("folder", tmp_path)
    cached = _config("folder", tmp_path, cache="decoded", threads=2)
    expected = _batches(plain)
    source = open_source(cached, "train")
    reads = []
    inner = source._source
    read = type(inner).__getitem__

    def counted(self, index):
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(type(inner), "__getitem__", counted)
    for _ in range(2):
        batches = train_batches(source, STAGES, cached, seed=0, start_step=0, stop_step=7)
        _assert_equal(list(batches), expected)
    assert sorted(set(reads)) == list(range(9))
    assert len(reads) <= 18  # two threads may read a file at the same time


def test_a_full_cache_goes_on_without_keeping(tmp_path, caplog):
    pictures.class_folders(tmp_path, {"train/a": 5})
    data = _config("folder", tmp_path)
    source = DecodedCache(open_source(data, "train"), decoder="pillow", limit_bytes=2 * 14 * 12 * 3)
    for _ in range(2):
        images = [source[i].image for i in range(5)]
        assert all(image.shape == (12, 14, 3) for image in images)
    assert len(source._kept) == 2
    assert sum("2 of 5 pictures" in record.message for record in caplog.records) == 1


def test_a_cache_in_every_process_is_refused(tmp_path):
    pictures.class_folders(tmp_path, {"train/a": 2})
    with pytest.raises(UserError, match=r"data.workers: found 2 with data.cache='decoded'"):
        _batches(_config("folder", tmp_path, cache="decoded", workers=2))


@pytest.mark.real_data
def test_real_photographs_of_every_shape():
    data = _config("folder", pictures.real_data() / "ants_bees", threads=2)
    stage = Stage(0, 96, 122, 0, 2, 0)
    batches = _batches(data, stages=(stage,), stop=2)
    assert np.bincount(np.concatenate([batch["label"] for batch in batches])).tolist() == [123, 121]
    # Photographs are neither black nor flat.
    assert all(image.std() > 8 for batch in batches for image in batch["image"])
    source, evaluation = _evaluate(data, batch_size=100, size=96)
    assert sum(batch["mask"].sum() for batch in evaluation) == len(source) == 153


# --- processes, settings, imports --------------------------------------------------------------


def test_the_number_of_workers_follows_the_machine(tmp_path):
    pictures.class_folders(tmp_path, {"train/a": 1})
    folder = open_source(_config("folder", tmp_path), "train")
    digits = open_source(_config(), "train")
    assert [default_workers(folder, cores=cores) for cores in (1, 2, 4, 8, 16, 200)] == [
        0, 0, 0, 6, 14, 16,
    ]  # fmt: skip
    assert default_workers(digits, cores=64) == 0


def test_little_shared_memory_means_fewer_workers(caplog):
    fit = loader._fitting_workers
    assert fit(8, chunk_bytes=2**20, free_bytes=2**30) == 8
    assert not caplog.records
    assert fit(8, chunk_bytes=4 * 2**20, free_bytes=64 * 2**20) == 3
    assert "64 MB free: 3 loader processes instead of 8" in caplog.text
    assert fit(8, chunk_bytes=2**30, free_bytes=2**20) == 0


def test_importing_the_loader_does_not_import_jax():
    program = (
        "import sys\n"
        "from effv2_jax.data import chunks, decode, device, loader, preprocess, sources\n"
        "print(sorted({'jax', 'grain', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
