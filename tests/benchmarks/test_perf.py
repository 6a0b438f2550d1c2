"""What is timed does the same work, and what is told of the times is right."""

from __future__ import annotations

import gc
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from mtdiffusion_benchmarks import launching, peers, perf
from mtdiffusion_benchmarks.timing import Contender, Setting, count_parameters
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import build_model, load_experiment, structure_experiment
from mtdiffusion_registry import Registry, UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", perf.CONFIGS, ids=str)
def test_the_loop_written_by_hand_predicts_what_the_framework_predicts(path: Path) -> None:
    """So neither is quicker by doing less: the network, what it is shown and the heads are the same."""
    model = build_model(load_experiment(ROOT / path, [], Registry.discover())).eval()
    lean = perf.Lean(model)
    z = torch.randn(3, *model.layout.latent.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([40, 200, 450])[:, None].expand(3, len(model.names)).clone()
    t[1, 0] = 0  # the first modality is observed
    with torch.no_grad():
        heads = model(z, t)
        by_hand = lean.predict(z, lean.level[t])
    for name, params in zip(model.names, by_hand, strict=True):
        for key, value in params.items():
            torch.testing.assert_close(value, heads.params[name][key], rtol=1e-4, atol=1e-5)


def test_further_modalities_are_instances_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the work of their heads is that of as many convolutions, forward and twice as much back."""
    monkeypatch.chdir(ROOT)
    own, total = [], []
    for count in (0, 1, 3):
        experiment = structure_experiment(perf.of_modalities("mask", count), Registry.discover(), "masks")
        assert list(experiment.modalities) == ["image", *(f"mask{i}" for i in range(count))]
        model = build_model(experiment)
        counts = perf.flops(model, load_data(experiment, model, "test").batch(range(2)))
        own.append(counts["encoders and heads"])
        total.append(counts["total"])
    conv = model.modality("mask0").decoder.logits.conv  # type: ignore[union-attr]
    places = model.layout.latent.height * model.layout.latent.width
    assert own[1] - own[0] == 2 * 3 * 2 * places * conv.weight.numel()
    assert own[2] - own[0] == 3 * (own[1] - own[0])
    assert total[2] - total[0] > own[2] - own[0], "what is shown of them to the backbone has its price, too"


def test_a_ratio_is_of_the_times_of_one_round() -> None:
    alone = perf.Contender("alone", lambda: None, seconds=[1.0, 2.0, 4.0], memory=100.0)
    other = perf.Contender("other", lambda: None, "alone", 1.2, [1.1, 2.6, 4.0], 150.0)
    (row,) = perf.ratios([alone, other])
    assert (row["least"], row["ratio"], row["greatest"]) == (1.0, 1.1, 1.3)
    result = {"ratios": {"group": [row, {**row, "what": "slow", "ratio": 1.5, "memory": None, "work": 0.75}]}}
    first, second = perf.table(result).splitlines()[2:]
    assert first == "| other | alone | **1.10** | 1.00 to 1.30 | 1.20 | met |  | 1.50 |"
    assert second.endswith("| 1.20 | not met | 0.75 | not measured |")


def test_a_race_leaves_its_first_round_out() -> None:
    turns: list[str] = []
    contenders = [perf.Contender(name, lambda name=name: turns.append(name)) for name in ("a", "b")]  # type: ignore[misc]
    perf.race(contenders, 2, lambda _: None, Setting())
    assert turns == ["a", "b"] * 3
    assert [len(contender.seconds) for contender in contenders] == [2, 2]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("peer", ["diffusers", "denoising_diffusion_pytorch"])
def test_other_libraries_networks_are_as_large_as_ours(peer: str, large: bool) -> None:
    pytest.importorskip(peer)
    make = {"diffusers": peers.diffusers_network, "denoising_diffusion_pytorch": peers.denoising_diffusion_network}
    tables = peers.our_tables(Setting(large=large))
    ours = build_model(structure_experiment(tables, Registry.discover(), "peers"), weightless=True)
    with torch.device("meta"):
        theirs = make[peer](large)
    assert count_parameters(theirs) == pytest.approx(count_parameters(ours), rel=peers.EQUAL)


def test_a_peer_trains_and_samples_beside_ours(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    contenders = peers.beside_diffusers(tmp_path, Registry.discover(), Setting(batch=2))
    perf.race(contenders, 1, lambda _: None, Setting())
    training, sampling = perf.ratios(contenders)
    assert training["against"] == "diffusers, training"
    assert training["ratio"] > 0
    assert sampling["images_per_second"] > 0
    assert all(perf.work(contender) > 1e6 for contender in contenders)  # an image's operations, ours and theirs


def test_in_bfloat16_ours_stands_beside_a_peer_in_either_precision(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    make = peers.in_bfloat16("diffusers", peers.beside_diffusers, target=0.4)
    contenders = make(tmp_path, Registry.discover(), Setting(batch=2))
    perf.race(contenders, 2, lambda _: None, Setting())
    rows = {row["what"]: row for row in perf.ratios(contenders)}
    assert {what: (row["against"], row["target"]) for what, row in rows.items()} == {
        "ours in bfloat16 beside diffusers, training": ("diffusers, training", 0.4),
        "ours beside diffusers in bfloat16, training": ("diffusers in bfloat16, training", None),
    }
    assert all(len(contender.seconds) == 2 for contender in contenders)


def test_what_needs_native_bfloat16_is_left_out_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    group = perf.Group(peers.beside_diffusers, native=True)
    monkeypatch.setattr(perf, "native_bfloat16", lambda device: False)
    assert group.left_out == "this processor does not multiply bfloat16"
    monkeypatch.setattr(perf, "native_bfloat16", lambda device: True)
    assert group.left_out == ""


def test_groups_are_chosen_by_title_and_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(perf.chosen(["start*"])) == ["start-up"]
    assert len(perf.chosen()) == len(perf.GROUPS)
    with pytest.raises(UserError, match="no group matches 'pears'; there are 'overhead: digits-demo'"):
        perf.chosen(["pears"])
    absent = perf.Group(peers.beside_diffusers, needs=("no_such_library",))
    monkeypatch.setattr(perf, "GROUPS", {"peers: absent": absent})
    result = perf.measure(1, 1, Registry.discover(), lambda _: None)
    assert result["left_out"] == {"peers: absent": "not installed: no_such_library"}
    assert perf.table(result).endswith("| peers: absent | not installed: no_such_library | not measured | | | | | |")
    assert perf.flops_table(result) == "not measured"


def test_what_is_measured_is_kept_though_a_later_group_fails_and_is_gone_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> list[Contender]:
        raise UserError("no luck")

    def two(*_: object) -> list[Contender]:
        return [Contender("one", lambda: None), Contender("two", lambda: None, "one")]

    monkeypatch.setattr(perf, "GROUPS", {"a": perf.Group(two, memory=False), "b": perf.Group(fails)})
    kept: list[str] = []
    with pytest.raises(UserError, match="no luck"):
        perf.measure(1, 1, Registry.discover(), lambda _: None, keep=lambda result: kept.append(json.dumps(result)))
    before = json.loads(kept[-1])
    assert list(before["ratios"]) == ["a"]

    monkeypatch.setattr(perf, "GROUPS", {"a": perf.Group(fails), "b": perf.Group(two, memory=False)})
    after = perf.measure(1, 1, Registry.discover(), lambda _: None, ["b"], before=before)
    assert after["ratios"]["a"] == before["ratios"]["a"] and list(after["ratios"]) == ["a", "b"]
    other = perf.measure(1, 1, Registry.discover(), lambda _: None, ["b"], before=before | {"version": "0.0"})
    assert list(other["ratios"]) == ["b"]  # another version's ratios do not stand beside it

    monkeypatch.setattr(perf, "GROUPS", {name: perf.Group(two, memory=False) for name in "ab"})
    again = perf.measure(1, 1, Registry.discover(), lambda _: None, ["a"], before=after)
    assert list(again["ratios"]) == ["a", "b"]  # in the order of the groups, not of their measurement


def test_a_command_that_fails_to_start_is_said_with_why() -> None:
    with pytest.raises(UserError, match=r"(?s)start-up: -c raise SystemExit\('why'\) failed: why"):
        launching._process("-c", "raise SystemExit('why')")()


@pytest.mark.long
def test_training_is_timed_with_freed_memory_kept_and_given_back() -> None:
    """What each takes of memory anew is tested in tests/engine/test_allocator.py; here, that both train and end."""
    before = set(multiprocessing.active_children())
    measured = perf.measure(1, 1, Registry.discover(), lambda _: None, ["freed memory"])
    (row,) = measured["ratios"]["freed memory"]
    assert row["ratio"] > 0
    assert row["images_per_second"] > 0
    gc.collect()
    for process in set(multiprocessing.active_children()) - before:
        process.join(30)
        assert process.exitcode == 0
