"""The benchmark itself: same weights on both sides, a gate that closes, ratios pair by pair, the products counted."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from toys import assert_near

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "side_by_side"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks come with the checkout of the course")
MODULES = ("setting", "ours", "plain_hf", "floor", "gate", "table", "environments", "run")


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's files as modules, and a setting that takes milliseconds."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in (*MODULES, "setting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import floor
    import gate
    import ours
    import setting
    import table

    small = dataclasses.replace(
        setting.Setting(), vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, prompt_tokens=3, response_tokens=4, batch_size=2, steps=1, warmup=0, ragged_median=10,
        ragged_cap=20, part_tokens=20, ppo_epochs=2, new_tokens=3,
    )  # fmt: skip
    yield types.SimpleNamespace(floor=floor, gate=gate, ours=ours, setting=setting, table=table, small=small)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_both_sides_have_the_same_model(bench):
    pytest.importorskip("transformers")
    import plain_hf

    ids = torch.randint(2, 50, (2, 7))
    assert_near(bench.ours.llama(bench.small, 1)(ids), plain_hf.llama(bench.small, 1)(ids).logits, 1e-5)
    clock = bench.setting.Clock(bench.small)
    assert plain_hf.run_sft(bench.small, "plain", 1, clock) == pytest.approx(
        bench.ours.run_sft(bench.small, "plain", 1, bench.setting.Clock(bench.small)), abs=1e-5
    )


@pytest.mark.parametrize("task", ["sft", "rm", "dpo", "ppo", "ragged"])
def test_our_variants_have_the_same_losses(bench, monkeypatch, task):
    variants = ("plain", "unshared", "fast") if task in ("rm", "dpo") else ("plain", "fast")
    losses = []
    for variant in variants:
        for module in ("dpo", "ppo", "reward", "sft"):  # the benchmark puts its clock into the loops
            package = getattr(bench.ours, module)
            for name in ("shuffled_batch", "reference_log_probs"):
                if hasattr(package, name):
                    monkeypatch.setattr(package, name, getattr(package, name))
        clock = bench.setting.Clock(bench.small, keep_first=True)
        losses.append(getattr(bench.ours, f"run_{task}")(bench.small, variant, 2, clock))
        assert len(clock.marks) == 3 and clock.result()["steps"] == 2
        assert clock.first is not None
        monkeypatch.undo()
        monkeypatch.syspath_prepend(str(FOLDER))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-4)


def test_the_floor_counts_the_products_that_are_left(bench):
    """Forward and backward (three products each); the last block's output and MLP at response positions only."""
    s, rows = bench.small, 2
    d, wide, vocabulary = s.hidden_size, s.intermediate_size, s.vocab_size
    everywhere, responses = rows * (s.prompt_tokens + s.response_tokens - 1), rows * s.response_tokens
    block = 4 * d * d + 3 * d * wide
    expected = (
        everywhere * block + everywhere * 3 * d * d + responses * (d * d + 3 * d * wide) + responses * d * vocabulary
    )
    counted = sum(2 * a[0].numel() * b[0][-1] for a, b in bench.floor.products(s, "sft"))
    assert counted == 2 * 3 * expected


def test_the_gate_closes_on_another_loss_and_on_another_movement(bench, tmp_path):
    model = bench.ours.llama(bench.small, 1)
    parameters = {name: p.detach() + 1e-4 * torch.randn_like(p) for name, p in model.named_parameters()}
    elsewhere = {name: p + 1e-4 * torch.randn_like(p) for name, p in parameters.items()}
    torch.save(parameters, tmp_path / "a")
    torch.save(elsewhere, tmp_path / "b")

    def passed(losses, theirs, other="a"):
        found = bench.gate.compare(
            {"losses": losses}, {"losses": theirs}, tmp_path / "a", tmp_path / other, bench.small
        )
        return found["passed"]

    assert passed([1.0, 0.9], [1.0, 0.90005])
    assert not passed([1.0, 0.9], [1.0, 0.9002])
    assert not passed([1.0, 0.9], [1.0, 0.9], other="b")
    assert not passed([1.0], [1.0])  # two steps are asked for


def measured(side: str, variant: str, cpu_ms: float, **more) -> dict:
    run = {
        "side": side,
        "variant": variant,
        "cpu_ms": cpu_ms,
        "wall_ms": cpu_ms,
        "ms": cpu_ms,
        "peak_mb": 100.0,
        "training_mb": 50.0,
    }
    return run | {"tokens_per_cpu_s": 1.0, "import": {"cpu_s": 1.0}, "versions": {"torch": "2"}} | more


def test_ratios_are_taken_pair_by_pair_and_missed_bars_are_said(bench):
    rounds = [
        [measured("trl", "tuned", 100), measured("ours", "fast", 100), measured("ours", "fast", 50),
         measured("trl", "tuned", 60), measured("ours", "plain", 80), measured("floor", "fast", 30)],
        [measured("trl", "tuned", 90, peak_mb=90.0), measured("ours", "fast", 90), measured("ours", "fast", 100),
         measured("trl", "tuned", 100)],
    ]  # fmt: skip
    task = {"rounds": rounds, "date": "2026-01-01", "code": "abc", "load": [0.0, 9.0]}
    runs = bench.table.runs_of(task)
    assert bench.table.ratios("sft", task, ("ours", "fast"), runs) == [1.0, 1.2, 1.0, 1.0]
    assert bench.table.ratios("sft", task, ("ours", "plain"), runs) == [1.0]
    assert bench.table.floor_share(task) == [0.3, 0.6]
    machine = {"cpu": "a processor", "cores": 2, "system": "Linux"}
    text = bench.table.markdown(
        {"tasks": {"sft": task}, "machine": machine, "setting": dataclasses.asdict(bench.small)}
    )
    assert "| SFT: CPU time, TRL tuned / ours fast | 1.2 | 1.00 | **missed** |" in text
    assert "| SFT: peak memory, TRL's / ours | 1 | 1.00 | met |" in text
    assert "busy with other work during SFT:" in text


def test_without_trl_or_behind_a_closed_gate_the_rest_is_still_told(bench):
    """What was measured has its lines, and nothing is set against the plain loop in TRL's place."""
    alone = {
        "rounds": [[measured("ours", "fast", 50), measured("plain_hf", "plain", 80), measured("floor", "fast", 40)]],
        "date": "2026-01-01", "load": [0.0, 1.0],
    }  # fmt: skip
    closed = {
        "losses": [1.0], "trl_losses": [2.0], "largest_loss_difference": 1.0, "movement_difference": 1.0,
        "largest_parameter_difference": 1.0, "passed": False,
    }  # fmt: skip
    results = {
        "tasks": {"sft": alone, "dpo": {"gate": {"fast": closed}}},
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux"},
        "setting": dataclasses.asdict(bench.small),
    }
    text = bench.table.markdown(results)
    assert "SFT not noted" in text and "SFT: share of the matmul floor | 0.7 | 0.80 | met" in text
    assert "TRL tuned / ours" not in text and "DPO, ours fast | 1.0e+00" in text and "**failed**: not timed" in text
    on_gpu = dataclasses.asdict(dataclasses.replace(bench.small, device="cuda"))
    assert "times as fast (wall)" in bench.table.markdown(results | {"setting": on_gpu})


def test_a_closed_gate_is_written_down(bench, monkeypatch, tmp_path):
    import run

    monkeypatch.setattr(run, "parity", lambda *_: {"fast": {"passed": False}})
    monkeypatch.setattr(run.Bench, "python", lambda *_: Path(sys.executable))
    monkeypatch.setattr(run.table, "markdown", lambda results: "")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "sft", "--out", str(tmp_path / "results")])
    run.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"] == {"sft": {"gate": {"fast": {"passed": False}}}}
    assert {"profile", "setting", "machine"} < results.keys()


def test_without_a_network_the_message_says_what_is_missing(bench, monkeypatch, tmp_path, capsys):
    import environments

    def fails(command, **keywords):
        return subprocess.CompletedProcess(command, 1, "", "no route to host\n")

    monkeypatch.setattr(environments.subprocess, "run", fails)
    assert environments.make("trl", tmp_path) is None
    assert "nothing is compared with it: no route to host" in capsys.readouterr().out


def test_the_page_is_what_its_numbers_make_and_tells_of_the_whole_update(bench):
    results = FOLDER.parent / "results" / "side_by_side.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    text = bench.table.markdown(found)
    assert text == results.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{found['ppo_update']['largest_difference']:.1e} at most" in text
