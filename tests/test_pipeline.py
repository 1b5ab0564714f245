"""The demo from end to end on the small profile; its cache; and the town read by another model's tokenizer.

The demo runs once for this file. Its models have learned little: what is tested is that every stage gets what
it should, that nothing is trained twice, and that what is written can be read.
"""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from toys import weights_of

from cs336_alignment import pipeline
from cs336_alignment.bpe import END, train_bpe
from cs336_alignment.models import Llama, ModelConfig, load_progress, save_model
from cs336_alignment.paths import course_root
from cs336_alignment.pipeline import Cache, Story, TownTokenizer, demo_config, run_demo
from cs336_alignment.tokens import tokenize_prompt_and_output
from cs336_alignment.world import SMALL, World, chat_prompt

STAGES = ["base", "sft", "preferences", "reward", "ppo", "dpo", "corner"]
TRAINERS = ["pretrain", "train_sft", "sample_preferences", "train_reward_model", "train_ppo", "train_dpo"]


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """One run of the demo: its folder, its results, and what each loop was called with."""
    out, calls = tmp_path_factory.mktemp("demo"), {}

    def watched(name, function):
        def call(*args, **kwargs):
            calls.setdefault(name, []).append((args, kwargs))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in [*TRAINERS, "evaluate_policy", "gold_agreement"]:
            patch.setattr(pipeline, name, watched(name, getattr(pipeline, name)))
        results = run_demo(profile="test", device="cpu", out=out)
    return SimpleNamespace(out=out, results=results, calls=calls)


# -------------------------------------------------------------------------------------------- from end to end


def test_the_demo_writes_its_results_and_a_report(demo):
    assert json.loads((demo.out / "results.json").read_text(encoding="utf-8")) == demo.results
    report = (demo.out / "report.html").read_text(encoding="utf-8")
    assert report.lstrip().lower().startswith("<!doctype html>") and len(report) > 10_000
    assert 'src="http' not in report and '<link rel="stylesheet"' not in report  # one file, nothing to fetch
    assert sorted(path.name for path in demo.out.iterdir()) == sorted(
        [*(f"{stage}.pt" for stage in STAGES), "results.json", "report.html"]
    )  # and no unfinished run is left


def test_every_row_of_the_table_is_measured(demo):
    table = demo.results["table"]
    assert list(table) == ["base", "sft", "ppo", "dpo"]
    for row in table.values():
        assert all(math.isfinite(value) for value in row.values())
        assert {
            "reward",
            "reward_se",
            "kl",
            "follows",
            "follows_greedy",
            "length",
            "refusal",
            "over_refusal",
        } <= set(row)
        assert -6 < row["reward"] <= 2 and row["reward_se"] > 0
        assert all(0 <= row[name] <= 1 for name in ("follows", "finished", "refusal", "over_refusal"))
    assert table["sft"]["kl"] == pytest.approx(0, abs=1e-4)  # against itself
    assert table["base"]["kl"] > 0.5 and table["ppo"]["kl"] != 0 != table["dpo"]["kl"]


def test_each_stage_logs_what_it_did(demo):
    logs, config = demo.results["logs"], demo_config("test", 0)
    for stage in ("sft", "reward", "ppo", "dpo"):
        assert [line["step"] for line in logs[stage]] == list(range(getattr(config, stage).steps))
    assert logs["sft"][-1]["held_out_loss"] < logs["sft"][0]["held_out_loss"]
    for stage in ("ppo", "dpo"):
        measured = [line for line in logs[stage] if "eval_reward" in line]
        assert len(measured) >= 3
        assert measured[0].keys() >= {
            "eval_reward",
            "eval_reward_se",
            "eval_kl",
            "eval_proxy",
            "eval_proxy_se",
        }
    assert logs["dpo"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    corner = demo.results["corner"]
    assert corner["J_ref"] < corner["J_star"]
    for run in ("exact", "dpo", "ppo"):
        assert corner[run][0]["gap"] == pytest.approx(1, abs=1e-3)
    assert list(demo.results["timings"]) == STAGES


def test_the_answers_show_each_kind_before_and_after_each_stage(demo, world):
    rows = demo.results["answers"]
    assert [row["kind"] for row in rows] == ["fact", "tips", "names", "words", "lookalike", "harmful"]
    for row in rows:
        assert list(row["answers"]) == ["base", "sft", "ppo", "dpo"]
        task = world.task(row["instruction"])
        assert task.kind == row["kind"] and world.held_out(task)
        for answer in row["answers"].values():
            text = answer["text"] + " <end>" * answer["finished"]
            assert answer["gold"] == pytest.approx(world.utility(row["instruction"], text))
            assert answer["follows"] == world.follows(row["instruction"], text)


def test_every_stage_trains_on_training_prompts_and_is_measured_on_held_out_ones(demo, world):
    def held_out(prompts) -> set[bool]:
        prompts = list(prompts)
        assert prompts
        return {world.held_out(world.task(prompt)) for prompt in prompts}

    def call(name):
        ((args, kwargs),) = demo.calls[name]
        return args[2], kwargs

    demonstrations, options = call("train_sft")
    assert held_out(d["prompt"] for d in demonstrations) == {False}
    assert held_out(d["prompt"] for d in options["held_out"]) == {True}
    preferences, options = call("train_reward_model")
    assert held_out(pair["prompt"] for pair in preferences + options["held_out"]) == {False}
    assert not {json.dumps(p) for p in preferences} & {json.dumps(p) for p in options["held_out"]}
    pairs, _ = call("train_dpo")
    assert held_out(pair["prompt"] for pair in pairs) == {False}
    assert held_out(call("train_ppo")[0]) == {False}
    measured = [args[2] for args, _ in demo.calls["evaluate_policy"]]
    assert len(measured) > 8  # the curves of two stages, and four rows of the table
    assert held_out(prompt for prompts in measured for prompt in prompts) == {True}


def test_the_policies_start_from_sft_and_the_reward_model_is_finished_before_ppo(demo):
    """What is in the files: no stage has changed another's weights."""
    weights = {stage: load_progress(demo.out / f"{stage}.pt").get("model") for stage in STAGES}
    assert weights["preferences"] is None and weights["corner"] is None
    name = "model.layers.0.mlp.up_proj.weight"
    different = [weights[stage][name] for stage in ("base", "sft", "ppo", "dpo")]
    different.append(weights["reward"][f"backbone.{name}"])
    assert len({tuple(w.flatten().tolist()) for w in different}) == 5
    (args, kwargs), *_ = demo.calls["train_ppo"]
    assert torch.equal(kwargs["ref_model"].state_dict()[name], weights["sft"][name])
    (args, kwargs), *_ = demo.calls["train_dpo"]
    assert torch.equal(kwargs["ref_model"].state_dict()[name], weights["sft"][name])
    (args, _), *_ = demo.calls["gold_agreement"]
    assert torch.equal(args[1].state_dict()[f"backbone.{name}"], weights["reward"][f"backbone.{name}"])


def never(*args, **kwargs):
    raise AssertionError("trained again")


def same_but_for_the_clock(results: dict) -> dict:
    """Without what a second run may change: times, memory, the date."""
    kept = {k: v for k, v in results.items() if k not in ("timings", "seconds", "peak_memory_gb", "date")}

    def without_seconds(x):
        if isinstance(x, dict):
            return {k: without_seconds(v) for k, v in x.items() if k != "cpu_seconds"}
        return [without_seconds(v) for v in x] if isinstance(x, list) else x

    return without_seconds(kept)


def test_a_second_run_trains_nothing_and_finds_the_same(demo, monkeypatch, capsys):
    for name in [*TRAINERS, "corner_stage"]:
        monkeypatch.setattr(pipeline, name, never)
    again = run_demo(profile="test", device="cpu", out=demo.out)
    said = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage}: kept from" in said
        assert again["timings"][stage] == demo.results["timings"][stage] | {"cached": True}
    assert same_but_for_the_clock(again) == same_but_for_the_clock(demo.results)


def test_a_lecture_finds_the_demos_models_and_loads_only_what_it_asks_for(demo, monkeypatch):
    monkeypatch.setenv("CS336_FAST", "1")
    for name in [*TRAINERS, "corner_stage", "dpo_stage"]:
        monkeypatch.setattr(pipeline, name, never)
    story = Story(device="cpu", out=demo.out)  # the fast mode of the lectures is the test profile
    assert not story.sft.training and not any(p.requires_grad for p in story.sft.parameters())
    assert list(story.logs) == ["base", "sft"]
    assert story.ppo is story.ppo and story.logs["ppo"] == demo.results["logs"]["ppo"]
    assert "dpo" not in story.logs
    assert len(story.preferences) == demo.results["preference_pairs"]
    assert story.problem.gap(story.problem.optimum) == pytest.approx(0, abs=1e-6)


def test_a_story_is_of_the_full_town_unless_told_to_be_fast(monkeypatch, tmp_path):
    monkeypatch.delenv("CS336_FAST", raising=False)
    story = Story(device="cpu", out=tmp_path)
    assert story.sizes.name == "full" and list(tmp_path.iterdir()) == []
    assert Story(device="cpu", profile="full").out == course_root() / "runs" / "demo"


def test_what_a_stage_builds_on_is_not_in_its_time(demo, tmp_path, monkeypatch):
    """A lecture may ask for PPO first: the time of SFT and of the reward model is theirs."""
    shutil.copytree(demo.out, tmp_path / "demo")
    for name in ("reward.pt", "ppo.pt"):
        (tmp_path / "demo" / name).unlink()
    order = []
    monkeypatch.setattr(pipeline, "reward_stage", lambda *args: order.append("reward") or [])
    monkeypatch.setattr(pipeline, "ppo_stage", lambda *args: order.append("ppo") or [])
    story = Story("test", device="cpu", out=tmp_path / "demo")
    stage, running = story.cache.stage, []

    def watched(name, *args):
        running.append(name)
        assert running == [name], "a stage was started inside another"
        result = stage(name, *args)
        running.pop()
        return result

    monkeypatch.setattr(story.cache, "stage", watched)
    assert story.ppo is not None and order == ["reward", "ppo"]


def test_a_demo_killed_in_ppo_goes_on_there_and_ends_the_same(demo, tmp_path, monkeypatch):
    """Killed while the second point of PPO's curve is measured; what came before is kept, PPO resumes."""
    out = tmp_path / "demo"
    shutil.copytree(demo.out, out)
    for name in ("ppo.pt", "dpo.pt", "results.json", "report.html"):
        (out / name).unlink()
    evaluate_policy, calls = pipeline.evaluate_policy, 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return evaluate_policy(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "evaluate_policy", dies)
        run_demo(profile="test", device="cpu", out=out)
    (unfinished,) = out.glob("ppo-*.unfinished.pt")
    assert load_progress(unfinished)["step"] == 2 and not (out / "ppo.pt").exists()

    for name in ("pretrain", "train_sft", "sample_preferences", "train_reward_model", "corner_stage"):
        monkeypatch.setattr(pipeline, name, never)
    resumed = run_demo(profile="test", device="cpu", out=out)
    assert not resumed["timings"]["ppo"]["cached"] and resumed["timings"]["sft"]["cached"]
    assert not unfinished.exists()
    assert same_but_for_the_clock(resumed) == same_but_for_the_clock(demo.results)


def test_another_seed_in_the_same_folder_is_refused_and_nothing_is_lost(demo):
    before = {path.name: path.stat().st_mtime_ns for path in demo.out.iterdir()}
    with pytest.raises(ValueError, match=r"base\.pt was made with other settings \(.*seed.*--fresh.*--out"):
        run_demo(profile="test", device="cpu", out=demo.out, seed=1)
    assert {path.name: path.stat().st_mtime_ns for path in demo.out.iterdir()} == before


def test_fresh_trains_what_is_there_already(demo, tmp_path, monkeypatch):
    shutil.copy(demo.out / "base.pt", tmp_path / "base.pt")

    class Trained(Exception):
        pass

    def pretrain(*args, **kwargs):
        raise Trained

    monkeypatch.setattr(pipeline, "pretrain", pretrain)
    with pytest.raises(Trained):
        run_demo(profile="test", device="cpu", out=tmp_path, fresh=True)


@pytest.mark.parametrize("profile", ["full", "test"])
def test_the_seed_reaches_every_stage(profile):
    config = demo_config(profile, 7)
    stages = (config, config.sft, config.reward, config.ppo, config.dpo, config.corner_ppo)
    assert [stage.seed for stage in stages] == [7] * 6


# -------------------------------------------------------------------------------------------------- the cache


def layer(value: float = 0.0) -> torch.nn.Module:
    module = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(module.weight, value)
    return module


def made(model: torch.nn.Module, value: float):
    """A stage that sets the weights and returns a log."""

    def make(progress_path):
        torch.nn.init.constant_(model.weight, value)
        return [{"step": 0, "loss": value}]

    return make


def test_a_finished_stage_is_loaded_with_its_weights_and_log(tmp_path, capsys):
    first = layer()
    log = Cache(tmp_path, fresh=False).stage("sft", {"seed": 0}, first, made(first, 3.0))
    cache, second = Cache(tmp_path, fresh=False), layer()
    assert cache.stage("sft", {"seed": 0}, second, never) == log == [{"step": 0, "loss": 3.0}]
    assert torch.equal(weights_of(first), weights_of(second))
    assert cache.timings["sft"]["cached"] and "sft: kept from" in capsys.readouterr().out


def test_a_stage_without_a_model_keeps_its_result(tmp_path):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    cache = Cache(tmp_path, fresh=False)
    assert cache.stage("preferences", {}, None, lambda _: pairs) == pairs
    assert cache.stage("preferences", {}, None, never) == pairs


@pytest.mark.parametrize(("settings", "named"), [({"seed": 1}, "seed"), ({"seed": 0, "beta": 1}, "beta"), ({}, "seed")])
def test_other_settings_are_named_and_refused(tmp_path, settings, named):
    model = layer()
    Cache(tmp_path, fresh=False).stage("sft", {"seed": 0}, model, made(model, 3.0))
    with pytest.raises(ValueError, match=rf"sft\.pt was made with other settings \({named}\).*--fresh"):
        Cache(tmp_path, fresh=False).stage("sft", settings, layer(), never)


def test_settings_are_compared_as_json_would_keep_them(tmp_path):
    """Tuples become lists in a file: that is no other setting."""
    cache = Cache(tmp_path, fresh=False)
    cache.stage("sft", {"shape": (1, 2), "nested": {"a": (3,)}}, None, lambda _: 1)
    assert cache.stage("sft", {"shape": (1, 2), "nested": {"a": (3,)}}, None, never) == 1


def test_fresh_forgets_the_result_and_the_unfinished_run(tmp_path):
    model = layer()
    Cache(tmp_path, fresh=False).stage("sft", {"seed": 0}, model, made(model, 3.0))
    Cache(tmp_path, fresh=False).stage("ppo", {"seed": 0}, model, made(model, 3.0))
    Cache(tmp_path, fresh=False).progress_path("sft", {"seed": 1}).write_text("an older run")
    cache = Cache(tmp_path, fresh=True)
    # Gone at once, also what comes later in the story: an interrupted --fresh leaves no mixture of old and new.
    assert not list(tmp_path.iterdir())

    def make(progress_path):
        assert not progress_path.exists()  # it must not go on from there
        return made(model, 5.0)(progress_path)

    assert cache.stage("sft", {"seed": 1}, model, make)[0]["loss"] == 5.0
    assert Cache(tmp_path, fresh=False).stage("sft", {"seed": 1}, layer(), never)[0]["loss"] == 5.0


def test_a_stage_that_dies_leaves_its_progress_and_no_result(tmp_path):
    cache = Cache(tmp_path, fresh=False)

    def dies(progress_path):
        progress_path.write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.stage("ppo", {}, None, dies)
    assert cache.progress_path("ppo", {}).exists() and not (tmp_path / "ppo.pt").exists()
    assert cache.stage("ppo", {}, None, lambda _: 1) == 1
    assert not cache.progress_path("ppo", {}).exists()  # finished


def test_an_unfinished_run_belongs_to_its_settings(tmp_path):
    """Killed in SFT, then started from another base model: that one must not go on from the first one's weights."""
    cache = Cache(tmp_path, fresh=False)
    assert cache.progress_path("sft", {"base": "one"}) != cache.progress_path("sft", {"base": "another"})
    assert cache.progress_path("sft", {"base": "one"}) == cache.progress_path("sft", {"base": "one"})


# ------------------------------------------------------------------------------------------ another tokenizer


@pytest.fixture(scope="module")
def bpe(world):
    """A byte-level tokenizer that was trained on a little of what the town says."""
    texts = [f" {d['prompt']} {d['response']}" for d in world.demonstrations(300, 0)]
    return train_bpe([text.replace("<end>", "") for text in texts], vocab_size=500)


@pytest.fixture(scope="module")
def tokenizer(bpe) -> TownTokenizer:
    return TownTokenizer(bpe)


def test_the_towns_text_survives_another_tokenizer(tokenizer, world):
    texts = [d[key] for d in world.demonstrations(300, 1, held_out=True) for key in ("prompt", "response")]
    texts += [world.tokenizer.decode(document) for document in world.documents(3000, 0)]
    texts += ["", "<end>", "red", "<unk> é 漢"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_is_the_models_own_eos_token(tokenizer, bpe):
    assert tokenizer.eos_token_id == bpe.convert_tokens_to_ids(END)
    ids = tokenizer.encode("red blue <end>")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.encode("red blue") == ids[:-1]
    assert tokenizer.encode("<end>") == [tokenizer.eos_token_id] and tokenizer.encode("") == []


def test_a_prompt_and_its_answer_join_as_they_would_be_written(tokenizer, world):
    """So a model that was trained on joined texts sees the same tokens when they are encoded apart."""
    prompt, answer = chat_prompt("name two colours"), "red and blue <end>"
    joined = tokenizer.encode(prompt) + tokenizer.encode(answer)
    assert tokenizer.encode(f"{prompt} {answer}") == joined
    assert tokenizer.decode(torch.tensor(joined)) == f"{prompt} {answer}"
    batch = tokenize_prompt_and_output([prompt], [answer], tokenizer)
    labels = batch["labels"][batch["response_mask"]].tolist()
    assert tokenizer.decode(labels) == answer


def test_a_tokenizer_without_padding_pads_with_eos(world):
    class Bare:
        eos_token_id, pad_token_id = 5, None

    assert TownTokenizer(Bare()).pad_token_id == 5


def test_a_tokenizer_that_tidies_up_spaces_changes_no_word(world, tmp_path):
    """Some join " ." to the word before it when they decode; the town's words are separated by spaces."""
    from transformers import AutoTokenizer

    world.tokenizer.save_pretrained(tmp_path)
    tidy = AutoTokenizer.from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    text = "ada lives in oakford . how do i ? sure ! red , blue"
    ids = world.tokenizer.encode(f"{text} <end>")
    assert tidy.decode(ids, skip_special_tokens=True) != text  # or this would test nothing
    assert TownTokenizer(tidy).encode(f"{text} <end>") == ids
    assert TownTokenizer(tidy).decode(ids) == f"{text} <end>"


def test_the_demo_runs_on_a_model_from_a_folder(bpe, tmp_path):
    torch.manual_seed(0)
    shape = ModelConfig(
        len(bpe), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    save_model(Llama(shape), bpe, tmp_path / "model")
    out = tmp_path / "demo"
    results = run_demo(profile="test", device="cpu", model=str(tmp_path / "model"), out=out)
    assert list(results["table"]) == ["base", "sft", "ppo", "dpo"]
    assert results["corner"] is None and results["settings"]["model"] == str(tmp_path / "model")
    assert list(results["timings"]) == [stage for stage in STAGES if stage not in ("base", "corner")]
    assert results["logs"]["sft"][-1]["held_out_loss"] < results["logs"]["sft"][0]["held_out_loss"]
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    for row in results["table"].values():
        assert all(math.isfinite(value) for value in row.values())


def test_a_policy_that_spells_the_end_in_letters_is_not_finished(tokenizer):
    spelled = tokenizer.inner.encode(" red <end>", add_special_tokens=False)
    assert tokenizer.eos_token_id not in spelled
    assert tokenizer.decode(spelled) == "red"


def test_from_scratch_and_another_model_are_not_both_possible(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        run_demo(model="somewhere", from_scratch=True, out=tmp_path)
