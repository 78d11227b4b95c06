"""Measuring in turns: order, pairs, equal terms, and what happens when a contestant cannot."""

import itertools
import os
import sys
from pathlib import Path

import pytest

from effv2_jax import startup
from effv2_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from benchmarks import contest, peers  # noqa: E402
from benchmarks.workers import pipeline, serve  # noqa: E402

WORKER = Path(__file__).parent / "idle_worker.py"


def _contestant(name, log, seconds=0.01, **more):
    command = (sys.executable, str(WORKER), name, str(log), str(seconds))
    return contest.Contestant(name=name, command=command, task={}, **more)


def _compete(*contestants, rounds=3, steps=1, seconds=1.0):
    cores = contest.usable_cores()[:1]
    return contest.compete(contestants, cores=cores, rounds=rounds, steps=steps, seconds=seconds)


def _log(path):
    return [
        (name, float(start), float(end), int(steps))
        for name, start, end, steps in map(str.split, path.read_text().splitlines())
    ]


def test_rounds_alternate_and_only_one_computes_at_a_time(tmp_path):
    log = tmp_path / "log"
    found = _compete(_contestant("a", log), _contestant("b", log), rounds=3)
    rounds = _log(log)[4:]  # two warm-up steps each
    assert [name for name, *_ in rounds] == ["a", "b"] * 3
    for (_, _, end, _), (_, start, _, _) in itertools.pairwise(rounds):
        assert end <= start
    assert all(measured.in_turns and len(measured.rounds) == 3 for measured in found)


def test_a_ratio_is_of_the_rounds_beside_each_other(tmp_path):
    fast, slow = _compete(
        _contestant("a", tmp_path / "log"), _contestant("b", tmp_path / "log", 0.05)
    )
    fast.rounds = [(1.0, 0), (2.0, 0), (4.0, 0)]
    slow.rounds = [(2.0, 0), (2.0, 0), (2.0, 0)]
    assert contest.ratios(fast, slow) == [2.0, 1.0, 0.5]
    assert contest.rate(fast, 8) == (4.0, 2.0, 8.0)


def test_rounds_take_about_as_long_as_asked_for(tmp_path):
    (measured,) = _compete(_contestant("a", tmp_path / "log", 0.02), steps=0, seconds=0.2)
    assert 6 <= measured.steps <= 10
    assert [steps for *_, steps in _log(tmp_path / "log")] == [1, 1] + [measured.steps] * 3


def test_all_get_the_same_cores_and_peers_the_allocator_of_the_first(tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_CONF", raising=False)
    own = _contestant("a", tmp_path / "log")
    peer = _contestant("b", tmp_path / "log", inherits=("MALLOC_CONF",))
    first, second = _compete(own, peer)
    assert first.facts["cores"] == second.facts["cores"] == contest.usable_cores()[:1]
    assert first.facts["allocator"] is None
    assert second.facts["allocator"] == "of the first"


@pytest.mark.parametrize("one", [False, True])
def test_one_arena_of_the_allocator_is_for_those_it_is_good_for(one):
    chosen = {"MALLOC_CONF": startup._MALLOC_CONF}
    peer = contest.Contestant(
        name="b", command=("b",), task={}, inherits=("MALLOC_CONF",), one_arena=one
    )
    taken = contest.environment_of(peer, chosen)["MALLOC_CONF"]
    assert taken + ("" if one else startup.ONE_ARENA) == chosen["MALLOC_CONF"]
    assert ("narenas" in taken) == one


def test_without_memory_for_all_they_are_measured_apart_and_it_is_said(tmp_path):
    found = _compete(_contestant("large", tmp_path / "log"), _contestant("b", tmp_path / "log"))
    assert [measured.in_turns for measured in found] == [False, False]
    names = [name for name, *_ in _log(tmp_path / "log")][2:]
    assert names == ["large"] * 5 + ["b"] * 5


def test_who_tried_several_ways_starts_again_with_the_best_alone(tmp_path):
    (measured,) = _compete(_contestant("tries", tmp_path / "log"))
    assert measured.facts["tried"] == {"a": "1", "b": "2"}
    assert measured.facts["candidate"] == "a"


@pytest.mark.parametrize(
    ("name", "message"),
    [("refuses", "this network is unknown"), ("ends", "ended with 9 at 'run': out of memory")],
)
def test_a_contestant_that_cannot_is_named_with_its_reason(tmp_path, name, message):
    with pytest.raises(contest.ContestError, match=message) as error:
        _compete(_contestant("a", tmp_path / "log"), _contestant(name, tmp_path / "log"))
    assert str(error.value).startswith(f"{name}: ")


def test_the_peers_names_of_networks():
    names = {
        "timm": ("tf_efficientnetv2_s", "tf_efficientnet_b0"),
        "torchvision": ("efficientnet_v2_s", "efficientnet_b0"),
        "keras-jax": ("EfficientNetV2S", "EfficientNetB0"),
        "keras-tf": ("EfficientNetV2S", "EfficientNetB0"),
    }
    assert set(names) == set(peers.PEERS)
    for name, (v2, v1) in names.items():
        assert peers.PEERS[name].network("efficientnetv2-s") == v2
        assert peers.PEERS[name].network("efficientnet-b0") == v1
        assert peers.PEERS[name].network("testing") is None
    assert peers.PEERS["timm"].network("efficientnetv2-rw-t") == "efficientnetv2_rw_t"
    assert peers.PEERS["torchvision"].network("efficientnetv2-b0") is None


def test_interpreters_are_one_for_all_or_one_each():
    names = ["timm", "keras-tf"]
    assert peers.interpreters("/a", names) == {"timm": "/a", "keras-tf": "/a"}
    found = peers.interpreters("keras-tf=/b", names)
    assert found == {"timm": sys.executable, "keras-tf": "/b"}
    with pytest.raises(UserError, match="expected PEER=PATH with one of timm, keras-tf"):
        peers.interpreters("keras-jax=/b", names)


def test_a_peer_that_is_not_installed_is_told_with_its_package(monkeypatch):
    monkeypatch.setattr(contest, "missing", lambda python, modules: ["timm"])
    with pytest.raises(UserError, match="has no timm; pip install timm there"):
        peers.check(["timm"], ["efficientnetv2-b0"], {"timm": "/x/python"})


def test_packages_are_looked_for_in_the_other_interpreter():
    assert contest.missing(sys.executable, ["json", "no_such_module"]) == ["no_such_module"]
    with pytest.raises(UserError, match="no Python interpreter that runs"):
        contest.missing("/no/such/python", ["json"])


def test_batches_that_come_four_at_once_are_not_taken_for_free(monkeypatch):
    clock = 0.0

    def start():
        nonlocal clock
        while True:
            clock += 4.0
            yield from range(4)

    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock)
    run = pipeline.timed(start, warm=9)
    for steps in (1, 25):
        assert run(steps) / steps == pytest.approx(1.0, rel=0.25)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says how large it is")
def test_memory_of_a_step_is_what_it_takes_beside_what_stays():
    stays = []

    def run(steps):
        stays.extend([b"\1" * 2**26] if not stays else [])
        for _ in range(steps):
            goes = b"\2" * 2**27
            del goes

    run(1)
    found = serve._step_bytes(serve.Prepared(run=run, facts={}))
    assert found == pytest.approx(2**27, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_peers_make_steps(name, mode):
    for module in peers.PEERS[name].modules:
        pytest.importorskip(module, reason=f"measures {name}")
    model = "efficientnetv2-s" if name == "torchvision" else "efficientnetv2-b0"
    task = {"model": model, "num_classes": 10, "image_size": 32, "batch": 2, "dtype": "float32"}
    task |= {"mode": mode, "compile": "off"}
    peer = peers.contestant(name, python=sys.executable, task=task, threads=1)
    (measured,) = _compete(peer, rounds=2)
    assert measured.facts["param_count"] > 10**6
    assert all(wall > 0 for wall, _ in measured.rounds)
    assert set(measured.facts["versions"]) >= {"python", *(["torch"] if "tor" in name else [])}
    assert os.path.basename(peer.command[1]) == peers.PEERS[name].worker
