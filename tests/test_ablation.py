"""Ablations: each variant leaves out what its name says, the table is complete, and nothing is done twice."""

import json
from dataclasses import replace

import pytest

from cs336_alignment import ablation
from cs336_alignment.ablation import VARIANTS, ablate
from cs336_alignment.pipeline import demo_config
from cs336_alignment.world import PRETRAINING_SHARES
from cs336_alignment.world_training import profile


@pytest.fixture
def quick(monkeypatch):
    """Three variants, and SFT of two steps."""
    kept = ("the recipe", "no copying exercises", "SFT without replay")
    monkeypatch.setattr(ablation, "VARIANTS", {name: VARIANTS[name] for name in kept})

    def config(name, seed):
        config = demo_config(name, seed)
        config.sft = replace(config.sft, steps=2, warmup=1, decay=1)
        return config

    monkeypatch.setattr(ablation, "demo_config", config)


def test_what_is_left_out_exists():
    for variant in VARIANTS.values():
        assert set(variant.without) < set(PRETRAINING_SHARES)
    assert VARIANTS["the recipe"] == ablation.Variant()
    assert len(set(VARIANTS.values())) == len(VARIANTS)


def test_all_variants_are_measured_and_a_second_run_trains_none(quick, tmp_path, monkeypatch):
    made, trained = [], []

    def spy(model, world, config, *, shares, **kwargs):
        made.append((config.seed, set(shares)))
        return pretrain(model, world, config, shares=shares, progress=False)

    def spy_sft(town, model, config, *, shares):
        trained.append((config.sft.replay_rows, set(shares)))
        return sft_stage(town, model, config, shares=shares)

    pretrain, sft_stage = ablation.pretrain, ablation.sft_stage
    monkeypatch.setattr(ablation, "pretrain", spy)
    monkeypatch.setattr(ablation, "sft_stage", spy_sft)
    arguments = ("test", [0, 1], 4, tmp_path / "work", tmp_path / "results" / "ablation")
    table = ablate(*arguments)
    everything = set(PRETRAINING_SHARES)
    # the third variant shares the first one's base model
    assert made == [(s, kinds) for s in (0, 1) for kinds in (everything, everything - {"copying"})]
    assert trained == [(2, everything), (2, everything - {"copying"}), (0, everything)] * 2  # the replay too
    record = json.loads((tmp_path / "results" / "ablation.json").read_text())
    assert {name: sorted(seeds) for name, seeds in record["runs"].items()} == {
        name: ["0", "1"] for name in ablation.VARIANTS
    }
    assert record["steps"] == 4 and record["world"] == profile("test").key
    assert all(f"| {name} |" in table for name in ablation.VARIANTS) and "±" in table
    assert (tmp_path / "results" / "ablation.md").read_text() == table

    monkeypatch.setattr(ablation, "run_variant", None)  # would raise if it were called
    assert ablate(*arguments) == table
