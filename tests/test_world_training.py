"""Pre-training the town's base model, in miniature: it learns, resumes, and its files say what they fit."""

import json
from dataclasses import replace

import pytest
import torch
from toys import assert_near, weights_of

from cs336_alignment import words, world_training
from cs336_alignment.models import Llama, ModelConfig
from cs336_alignment.world import SMALL, World, WorldConfig
from cs336_alignment.world_training import (
    PretrainingConfig,
    Profile,
    checkpoint_path,
    introduce_chat_tokens,
    load_base,
    load_weights,
    new_model,
    next_token_loss,
    pretrain,
    profile,
    save_weights,
    train,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@pytest.fixture(scope="module")
def tiny(world) -> Profile:
    """Eight steps of a model that is only as large as the vocabulary asks for."""
    shape = ModelConfig(
        len(world.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    settings = PretrainingConfig(steps=8, batch_size=4, row_length=32, warmup=2, decay=3, save_every=2)
    return Profile("tiny", SMALL, shape, settings)


class Killed(Exception):
    pass


@pytest.mark.parametrize("call", [0, 4, 5, 7])
def test_pretraining_killed_in_the_middle_ends_with_the_same_model(tiny, world, tmp_path, monkeypatch, call):
    whole = new_model(tiny, "cpu")
    expected = pretrain(whole, world, tiny.pretraining, stable_path=tmp_path / "whole", progress=False)
    assert expected[-1]["loss"] < expected[0]["loss"]

    calls = 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise Killed
        return next_token_loss(*args)

    run = {"checkpoint": tmp_path / "base.pt", "stable_path": tmp_path / "stable", "progress": False}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(world_training, "next_token_loss", dies)
        pretrain(new_model(tiny, "cpu"), world, tiny.pretraining, **run)
    resumed = new_model(tiny, "cpu")
    assert pretrain(resumed, world, tiny.pretraining, **run) == expected
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert (tmp_path / "stable").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_seed_does_not_continue_this_run(tiny, world, tmp_path):
    run = {"checkpoint": tmp_path / "base.pt", "progress": False}
    pretrain(new_model(tiny, "cpu"), world, replace(tiny.pretraining, steps=2, decay=1), **run)
    with pytest.raises(ValueError, match="other settings"):
        pretrain(new_model(tiny, "cpu"), world, replace(tiny.pretraining, steps=2, decay=1, seed=1), **run)


def test_the_stable_checkpoint_is_the_model_before_the_decay(tiny, world, tmp_path):
    """A run that ends where the decay would begin has the same weights: the rate has been the same so far."""
    path, config = tmp_path / "stable.safetensors", tiny.pretraining
    pretrain(new_model(tiny, "cpu"), world, config, stable_path=path, progress=False)
    stable = load_weights(tiny, path, "cpu")
    short = new_model(tiny, "cpu")
    pretrain(short, world, replace(config, steps=config.steps - config.decay, decay=0), progress=False)
    # The documents of a shorter run are the first ones of the longer; in the file there is bfloat16.
    assert_near(weights_of(stable), weights_of(short).bfloat16(), 0)


def test_each_document_is_seen_once(tiny, world, monkeypatch):
    rows = []
    monkeypatch.setattr(
        world_training,
        "next_token_loss",
        lambda model, text: rows.append(text) or next_token_loss(model, text),
    )
    pretrain(new_model(tiny, "cpu"), world, tiny.pretraining, progress=False)
    seen = torch.cat([text for text in rows if len(text) == tiny.pretraining.batch_size])  # the rest is held out
    assert seen.shape == (8 * 4, 32)
    assert len({tuple(row.tolist()) for row in seen}) == 32
    stream = [token for document in world.documents(32 * 32 + 32, 0) for token in document]
    assert seen.flatten().tolist() == stream[: 32 * 32]


def test_the_loss_is_the_mean_over_all_tokens_but_the_first(tiny):
    model, rows = new_model(tiny, "cpu"), torch.randint(0, 900, (3, 10))
    log_probs = model(rows).log_softmax(-1)
    by_hand = [log_probs[i, t, rows[i, t + 1]] for i in range(3) for t in range(9)]
    assert_near(next_token_loss(model, rows), -torch.stack(by_hand).mean(), 1e-5)


def test_weights_come_back_from_a_file_as_bfloat16_holds_them(tiny, tmp_path):
    model = new_model(tiny, "cpu")
    save_weights(model, tmp_path / "folder" / "w.safetensors")
    back = load_weights(tiny, tmp_path / "folder" / "w.safetensors", "cpu")
    assert_near(weights_of(back), weights_of(model).bfloat16(), 0)
    assert back.lm_head.weight is back.model.embed_tokens.weight  # still tied
    assert next(back.parameters()).dtype == torch.float32


def test_a_new_model_depends_on_the_seed_alone(tiny):
    torch.manual_seed(1)
    first, state = new_model(tiny, "cpu"), torch.get_rng_state()
    torch.rand(7)
    assert torch.equal(weights_of(first), weights_of(new_model(tiny, "cpu")))
    other = replace(tiny, pretraining=replace(tiny.pretraining, seed=1))
    assert not torch.equal(weights_of(first), weights_of(new_model(other, "cpu")))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # and it leaves everybody else's numbers alone


def test_a_checkpoints_name_changes_with_world_model_and_vocabulary(tiny, tmp_path, monkeypatch):
    keys = {
        tiny.key,
        replace(tiny, world=replace(SMALL, known=17)).key,
        replace(tiny, model=replace(tiny.model, hidden_size=32)).key,
        replace(tiny, world=WorldConfig()).key,
    }
    (tmp_path / "vocabulary.txt").write_text("<pad> <end>", encoding="utf-8")
    own = tiny.key
    monkeypatch.setattr(world_training, "ASSETS", tmp_path)
    assert tiny.key != own and len(keys | {tiny.key}) == 5
    assert tiny.key in checkpoint_path(tiny, "stable").name


def test_a_missing_checkpoint_says_which_command_makes_it(tiny):
    with pytest.raises(FileNotFoundError, match="world train"):
        load_base(tiny, device="cpu")
    with pytest.raises(ValueError, match="profile must be"):
        profile("huge")


def test_the_chat_tokens_start_as_their_nearest_relatives(tiny, world):
    base = new_model(tiny, "cpu")
    before, index = weights_of(base), world.tokenizer.index
    weight = introduce_chat_tokens(base, world).model.embed_tokens.weight
    assert torch.equal(weight[index["<user>"]], weight[index["question"]])
    assert torch.equal(weight[index["<assistant>"]], weight[index["answer"]])
    others = [i for word, i in index.items() if word not in ("<user>", "<assistant>")]
    assert torch.equal(weight[others], base.model.embed_tokens.weight[others])
    assert torch.equal(weights_of(base), before)  # a copy was changed


def test_the_command_writes_both_checkpoints_and_a_record(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world_training, "profile", lambda name: tiny)
    settings = replace(tiny.pretraining, steps=100, batch_size=1, row_length=16, decay=3)
    monkeypatch.setattr(tiny, "pretraining", settings)
    base = train("tiny", "cpu", folder=tmp_path, work=tmp_path / "work")
    stable = tmp_path / checkpoint_path(tiny, "stable").name
    assert base == tmp_path / checkpoint_path(tiny).name
    for path in (base, stable):
        assert isinstance(load_weights(tiny, path, "cpu"), Llama)
    assert base.read_bytes() != stable.read_bytes()
    record = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["tokens"] == 100 * 16 and len(record["held_out_loss"]) == 1
    assert f"{record['held_out_loss'][-1]:.3f}" in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())  # the unfinished run is gone


def test_the_gpu_profile_is_a_large_model_of_a_large_town():
    sizes = profile("gpu")
    world = World(sizes.world)
    assert len(world.known) == 3000 and len(world.unknown) == 1000
    assert len(set(world.tokenizer.vocabulary)) == len(world.tokenizer) == sizes.model.vocab_size
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(sizes.model).parameters())
    assert 90e6 < parameters < 110e6
    # the invented people are people like the others: documents name them, and their questions have answers
    person = next(p for p in world.known if p not in words.NAMES)
    task = world.task(f"where does {person} live ?")
    assert world.follows(task.instruction, f"{world.facts[person]['home']} <end>")
    unknown_token = world.tokenizer.index["<unk>"]
    assert not any(unknown_token in document for document in world.documents(20_000, 0))


def test_pretraining_on_other_documents(tiny, world):
    """Mid-training and ablations change the mixture; what is held out to measure them stays the same."""
    logs = {}
    for name, shares in {"standard": None, "copying": {"copying": 1.0}, "chat": {"instruction": 1.0}}.items():
        kwargs = {} if shares is None else {"shares": shares}
        model = new_model(tiny, "cpu")
        settings = replace(tiny.pretraining, steps=30, decay=10)
        logs[name] = pretrain(model, world, settings, progress=False, **kwargs)
    assert logs["standard"][-1]["held_out_loss"] == min(log[-1]["held_out_loss"] for log in logs.values())
