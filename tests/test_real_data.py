"""The three stages on files: they learn, say how well, cut what is too long, and survive being killed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cs336_alignment.bpe import train_bpe
from cs336_alignment.data import DataError, load_demonstrations
from cs336_alignment.dpo import DPOConfig
from cs336_alignment.models import load_model
from cs336_alignment.optimize import Run
from cs336_alignment.real_data import (
    RealConfig,
    _accuracy,
    _cut,
    _format,
    _length_baseline,
    load_reward_model,
    ratio_and_error,
    train_on_file,
)
from cs336_alignment.reward import RewardConfig, score
from cs336_alignment.sft import SFTConfig

HERE = Path(__file__).parent / "data"
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (REAL / "preference_pairs.json").exists(),
    reason="reads data sets that are not part of the course from ../shared/data, which is absent",
)

TINY = RealConfig(
    vocab_size=300,
    hidden_size=32,
    layers=1,
    max_length=64,
    held_out=0.3,
    max_epochs=100,
    samples=2,
    sft=SFTConfig(steps=40, batch_size=16, learning_rate=1e-2),
    reward=RewardConfig(steps=20, batch_size=16, learning_rate=3e-3),
    dpo=DPOConfig(steps=20, batch_size=16, learning_rate=1e-3),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Greetings to learn, and friendly ones preferred to rude ones of the same or another length."""
    folder = tmp_path_factory.mktemp("files")
    names = [a + b for a in ("an", "be", "ca", "do", "el", "fa", "gu", "ho") for b in ("na", "ra", "to", "vi", "lo")]
    kind = ["hello", "good day to you ,", "how very nice to see you ,"]
    rude = ["no", "go away now ,", "oh no , not you again ,"]
    demonstrations = [{"instruction": f"greet {name}", "output": f"hello {name} !"} for name in names]
    pairs = [
        {
            "prompt": f"greet {name}",
            "chosen": f"{kind[i % 3]} {name} !",
            "rejected": f"{rude[i // 3 % 3]} {name} !",
        }
        for i, name in enumerate(names)
    ]
    (folder / "demonstrations.json").write_text(json.dumps(demonstrations), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder


def run(stage, files, out, **kwargs):
    name = "demonstrations.json" if stage == "sft" else "pairs.json"
    kwargs = {"settings": TINY, "progress": False, "device": "cpu"} | kwargs
    return train_on_file(stage, str(files / name), out=str(out), **kwargs)


def without_time(metrics):
    return {name: value for name, value in metrics.items() if name not in ("seconds", "folder")}


# --- the stages


def test_sft_lowers_the_loss_on_held_out_prompts(files, tmp_path):
    metrics = run("sft", files, tmp_path)
    for name in "train", "held_out":
        before, after = metrics["before"][name], metrics["after"][name]
        assert before["loss"] == pytest.approx(math.log(len(load_model(metrics["folder"] + "/model")[1])), abs=0.1)
        assert after["loss"] + 2 * after["error"] < before["loss"] - 2
    assert metrics["counts"]["train"] + metrics["counts"]["held_out"] == metrics["counts"]["records"] == 40
    # the last line of the log measures the same held-out records with the same weights
    assert metrics["log"][-1]["held_out_loss"] == pytest.approx(metrics["after"]["held_out"]["loss"], abs=1e-4)
    assert all(sample["before"] != sample["after"] for sample in metrics["samples"])
    assert any(sample["after"].startswith("hello") for sample in metrics["samples"])


def test_a_reward_model_ranks_held_out_pairs_where_lengths_say_nothing(files, tmp_path):
    metrics = run("reward", files, tmp_path)
    found = metrics["held_out_pairs"]
    assert found["beats_chance"] and found["accuracy"] > 0.9
    length = metrics["baselines"][0]
    assert length["name"].startswith("prefer the") and length["accuracy"] < found["accuracy"]
    model, tokenizer = load_reward_model(metrics["folder"] + "/model", "cpu")
    sample = metrics["samples"][0]
    again = score(model, tokenizer, [sample["prompt"]] * 2, [sample["chosen"], sample["rejected"]])
    assert again.tolist() == pytest.approx([sample["chosen_score"], sample["rejected_score"]], abs=1e-5)


def test_dpo_starts_from_sft_on_the_chosen_responses_and_ranks_held_out_pairs(files, tmp_path):
    metrics = run("dpo", files, tmp_path)
    assert metrics["sft_log"][-1]["held_out_loss"] < metrics["sft_log"][0]["held_out_loss"] - 2
    first = metrics["log"][0]
    assert first["chosen_log_prob"] > first["rejected_log_prob"] + 5  # nats
    assert first["loss"] == pytest.approx(math.log(2))  # the policy is the reference at first
    assert metrics["held_out_pairs"]["beats_chance"] and metrics["held_out_pairs"]["accuracy"] > 0.9
    last = metrics["log"][-1]
    assert last["held_out_accuracy"] == pytest.approx(metrics["held_out_pairs"]["accuracy"])
    assert last["held_out_chosen_log_ratio"] > last["held_out_rejected_log_ratio"]
    names = [baseline["name"] for baseline in metrics["baselines"]]
    assert names[0] == "log-probability of the SFT model" and names[1].startswith("prefer the")


def test_a_run_leaves_a_model_a_plot_and_metrics_that_transformers_and_json_read(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = run("sft", files, tmp_path, steps=3)
    folder = Path(metrics["folder"])
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(metrics))
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "checkpoints").exists()
    ours, tokenizer = load_model(folder / "model", "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "model").encode("greet anna")])
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    assert len(metrics["log"]) == 3


def test_training_continues_from_a_given_model(files, tmp_path):
    first = run("sft", files, tmp_path)
    folder = first["folder"] + "/model"
    second = run("sft", files, tmp_path, model=folder, steps=2)
    assert second["before"]["held_out"]["loss"] == pytest.approx(first["after"]["held_out"]["loss"], abs=1e-5)
    assert second["folder"] != first["folder"]


def test_a_model_of_another_library_trains_too(files, tmp_path):
    """GPT-2's classes, a tokenizer without a chat template and with pad = eos."""
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = [record["prompt"] + record["response"] for record in load_demonstrations(files / "demonstrations.json")]
    tokenizer = train_bpe(texts, 300)
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=160)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    metrics = run("reward", files, tmp_path, model=str(tmp_path / "gpt2"))
    assert "### Instruction" in metrics["samples"][0]["prompt"]
    assert metrics["held_out_pairs"]["beats_chance"]


def test_learning_rates_shrink_for_larger_models(files, tmp_path):
    wide = replace(TINY, hidden_size=256)
    metrics = run("sft", files, tmp_path, settings=wide, steps=1)
    assert metrics["config"]["learning_rate"] == pytest.approx(TINY.sft.learning_rate / 4)


# --- killed and resumed, finished and shown


@pytest.mark.parametrize("stage, name, step", [("sft", "SFT", 25), ("reward", "reward model", 11), ("dpo", "DPO", 13)])
def test_a_killed_run_ends_as_an_uninterrupted_one(files, tmp_path, monkeypatch, stage, name, step):
    whole = run(stage, files, tmp_path / "whole")
    record = Run.record

    def killed(self, at, **metrics):
        if self.name == name and at == step:
            raise KeyboardInterrupt
        record(self, at, **metrics)

    monkeypatch.setattr(Run, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        run(stage, files, tmp_path / "killed")
    done = []
    monkeypatch.setattr(Run, "record", lambda self, at, **m: (done.append((self.name, at)), record(self, at, **m)))
    resumed = run(stage, files, tmp_path / "killed")
    assert done[0] == (name, step // len_of_save(stage) * len_of_save(stage))  # not from the beginning
    assert without_time(resumed) == without_time(whole)


def len_of_save(stage):
    return {"sft": 4, "reward": 2, "dpo": 2}[stage]  # a tenth of the stage's steps


def test_a_finished_run_is_shown_and_not_trained_again(files, tmp_path, monkeypatch, capsys):
    first = run("sft", files, tmp_path, steps=2)
    monkeypatch.setattr("cs336_alignment.real_data.train_sft", lambda *a, **k: pytest.fail("trained again"))
    second = run("sft", files, tmp_path, steps=2, progress=True)
    assert second == json.loads(json.dumps(first))
    printed = capsys.readouterr().out
    assert "holds this run already" in printed and "held-out" in printed


def test_other_settings_get_another_folder(files, tmp_path):
    folders = {
        run("sft", files, tmp_path, steps=1)["folder"],
        run("sft", files, tmp_path, steps=2)["folder"],
        run("sft", files, tmp_path, steps=1, seed=1)["folder"],
        run("sft", files, tmp_path, steps=1, settings=replace(TINY, layers=2))["folder"],
    }
    assert len(folders) == 4
    other_decay = replace(TINY, sft=replace(TINY.sft, decay=7))  # which is fitted to the steps in any case
    assert run("sft", files, tmp_path, steps=1, settings=other_decay)["folder"] in folders


def test_the_same_seed_gives_the_same_run(files, tmp_path):
    first, second = (run("sft", files, tmp_path / name, steps=3) for name in ("a", "b"))
    assert without_time(first) == without_time(second)


# --- what is too long


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["alpha beta gamma delta epsilon " * 4], 300)


WORDS = "alpha beta gamma delta epsilon "


@pytest.mark.parametrize(
    "prompt, response",
    [
        (WORDS, "beta"),
        (WORDS * 30, "beta"),
        ("alpha", WORDS * 30),
        (WORDS * 30, WORDS * 30),
        (WORDS * 30, "日本語" * 50),
        ("🎉" * 200, "🎉" * 200),
    ],
)
def test_no_record_is_longer_than_the_limit_and_every_response_keeps_something(tokenizer, prompt, response):
    limit = 24
    (record,), counts = _format([{"prompt": prompt, "response": response}], tokenizer, limit)
    length = len(tokenizer.encode(record["prompt"])) + len(tokenizer.encode(record["response"]))
    assert length <= limit
    assert record["prompt"].startswith("<|user|>") and record["prompt"].endswith("<|assistant|>")
    whole = response + tokenizer.eos_token
    assert record["response"] and whole.startswith(record["response"])
    assert counts["cut"] == (len(tokenizer.encode(prompt)) + len(tokenizer.encode(whole)) + 2 > limit)
    # a response that was cut has no end of text, one that was not has
    assert record["response"].endswith(tokenizer.eos_token) == (record["response"] == whole)
    if len(tokenizer.encode(whole)) <= limit // 2:
        assert record["response"] == whole  # the prompt gives way first


def test_pairs_that_differ_only_behind_the_cut_are_left_out_and_counted(tokenizer):
    pair = {"prompt": "alpha", "chosen": WORDS * 20 + "beta", "rejected": WORDS * 20 + "gamma"}
    other = {"prompt": "alpha", "chosen": "beta", "rejected": "gamma"}
    kept, counts = _format([pair, other], tokenizer, 30)
    assert [record["chosen"] for record in kept] == ["beta<|end|>"]
    assert counts == {"cut": 1, "equal": 1}


def test_cut_gives_the_longest_beginning_that_fits(tokenizer):
    text = WORDS * 5
    for room in range(1, 12):
        cut = _cut(text, room, tokenizer)
        assert text.startswith(cut) and len(tokenizer.encode(cut)) <= room
        assert len(tokenizer.encode(text[: len(cut) + 6])) > room  # the next word would not have fitted
    assert _cut("日本", 1, tokenizer) == "日"  # three bytes do not fit one token, but something must stay


# --- the baseline


def test_the_length_baseline_learns_on_train_which_length_is_preferred(tokenizer):
    def pairs(chosen, rejected, number):
        return [{"prompt": str(i), "chosen": chosen, "rejected": rejected} for i in range(number)]

    longer, shorter = pairs("alpha beta", "alpha", 6), pairs("alpha", "alpha beta", 3)
    found = _length_baseline(longer, longer + shorter, tokenizer)
    assert found["name"] == "prefer the longer response" and found["accuracy"] == pytest.approx(6 / 9)
    found = _length_baseline(shorter, longer + shorter, tokenizer)
    assert found["name"] == "prefer the shorter response" and found["accuracy"] == pytest.approx(3 / 9)
    ties = pairs("alpha", "alpha", 4)
    assert _length_baseline(longer, ties, tokenizer)["accuracy"] == 0.5  # it can only toss a coin


# --- what is wrong with the file or the request


def test_bad_input_names_file_record_and_field(files, tmp_path):
    rows = json.loads((files / "demonstrations.json").read_text(encoding="utf-8"))
    rows[4]["output"] = ""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.json.*\n.*record 5 .*field 'output': is empty"):
        train_on_file("sft", str(path), out=str(tmp_path), settings=TINY, progress=False)
    assert list(tmp_path.iterdir()) == [path]  # and nothing was begun
    metrics = train_on_file(
        "sft", str(path), out=str(tmp_path), settings=TINY, progress=False, steps=1, bad="skip", device="cpu"
    )
    assert metrics["counts"]["records"] == 39


def test_too_few_records(tmp_path):
    with pytest.raises(DataError, match="4 usable records leave"):
        train_on_file("sft", str(HERE / "alpaca.json"), out=str(tmp_path), settings=TINY, progress=False)


def test_unknown_stages_and_steps(files, tmp_path):
    with pytest.raises(ValueError, match="stage is sft, reward or dpo, not 'ppo'"):
        run("ppo", files, tmp_path)
    with pytest.raises(ValueError, match="steps is 0"):
        run("sft", files, tmp_path, steps=0)


# --- standard errors


def test_the_error_of_an_accuracy_is_the_usual_one_when_all_prompts_differ():
    wins = torch.tensor([1.0] * 30 + [0.0] * 10)
    accuracy, error = ratio_and_error(wins, torch.ones(40), [str(i) for i in range(40)])
    assert accuracy == 0.75
    assert error == pytest.approx(wins.std().item() / math.sqrt(40))


def test_repeating_every_pair_of_a_prompt_does_not_shrink_the_error():
    wins = torch.tensor([1.0] * 30 + [0.0] * 10)
    groups = [str(i) for i in range(40)]
    once = ratio_and_error(wins, torch.ones(40), groups)
    assert ratio_and_error(wins.repeat(3), torch.ones(120), groups * 3) == pytest.approx(once)
    assert ratio_and_error(wins[:2], torch.ones(2), ["a", "a"])[1] == math.inf


def test_three_pairs_ranked_right_do_not_beat_chance_yet():
    scores = torch.ones(8)
    assert not _accuracy(scores[:3], -scores[:3], ["a", "b", "c"])["beats_chance"]
    assert not _accuracy(scores, -scores, ["a"] * 8)["beats_chance"]  # eight pairs of one prompt are one draw
    assert _accuracy(scores, -scores, list("abcdefgh"))["beats_chance"]
    assert _accuracy(scores, scores, list("abcdefgh")) == {
        "accuracy": 0.5,
        "error": 0.0,
        "beats_chance": False,
    }


def test_the_error_of_a_token_mean_covers_the_truth():
    """Over many draws of ragged records the estimate scatters as much as its error says."""
    rng = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(400):
        lengths = torch.randint(1, 30, (60,), generator=rng).double()
        sums = lengths * (2 + torch.randn(60, generator=rng, dtype=torch.double))
        estimate, error = ratio_and_error(sums, lengths, [str(i) for i in range(60)])
        estimates.append(estimate)
        errors.append(error)
    scatter = torch.tensor(estimates).std().item()
    assert sum(errors) / 400 == pytest.approx(scatter, rel=0.15)


# --- data sets that others made


@needs_real_data
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_real_files_learn_in_seconds(tmp_path, stage):
    """A fraction of the steps of `course.py train`; benchmarks/real_data.py runs the whole."""
    small = replace(
        RealConfig(),
        vocab_size=1024,
        hidden_size=64,
        layers=1,
        max_held_out=150,
        sft=SFTConfig(steps=40, batch_size=16, learning_rate=3e-3),
        reward=RewardConfig(steps=30, batch_size=32, learning_rate=3e-3),
        dpo=DPOConfig(steps=15, batch_size=32, learning_rate=5e-4, beta=0.3),
    )
    name = "alpaca_style_instructions.json" if stage == "sft" else "preference_pairs.json"
    metrics = train_on_file(stage, str(REAL / name), out=str(tmp_path), settings=small, progress=False, device="cpu")
    if stage == "sft":
        before, after = metrics["before"]["held_out"], metrics["after"]["held_out"]
        assert after["loss"] + 2 * after["error"] < before["loss"] - 1
    else:
        assert metrics["held_out_pairs"]["beats_chance"]
        length = metrics["baselines"][-1]
        assert abs(length["accuracy"] - 0.5) < 3 * length["error"]  # lengths say nothing in this file
