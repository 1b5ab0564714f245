"""Supervised fine-tuning: what the loss averages over, gradient accumulation, and a loop that resumes."""

import pytest
import torch
import torch.nn.functional as F
from toys import GOLDEN, ToyTokenizer, assert_near, golden_llama, tiny_llama, weights_of

from cs336_alignment.sft import SFTConfig, held_out_loss, sft_loss, train_sft
from cs336_alignment.tokens import token_log_probs, tokenize_prompt_and_output

TOKENIZER = ToyTokenizer()
# Responses of 1 to 6 tokens: averaging mistakes show on ragged data only.
DEMONSTRATIONS = [
    {"prompt": "w2 w3", "response": "w4 w5 w6 w7 w8 <eos>"},
    {"prompt": "w9", "response": "<eos>"},
    {"prompt": "w3 w4 w5", "response": "w2 w2 <eos>"},
    {"prompt": "w7", "response": "w7 <eos>"},
    {"prompt": "w8 w9", "response": "w10 w3 w10 w3 <eos>"},
    {"prompt": "w5 w2", "response": "w6 <eos>"},
]


def batch_of(demonstrations, tokenizer=TOKENIZER):
    return tokenize_prompt_and_output(
        [d["prompt"] for d in demonstrations], [d["response"] for d in demonstrations], tokenizer
    )


def loss_of(model, batch):
    return sft_loss(token_log_probs(model(batch["input_ids"]), batch["labels"]), batch["response_mask"])


def config(**changes) -> SFTConfig:
    defaults = {"steps": 4, "batch_size": 6, "learning_rate": 1e-2, "warmup": 1, "decay": 2, "eval_every": 2}
    return SFTConfig(**(defaults | changes))


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_all_response_tokens_of_the_batch():
    log_probs = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -6.0, -9.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    assert sft_loss(log_probs, mask) == 3.0  # (1 + 2 + 6) / 3
    per_sequence = torch.stack([sft_loss(log_probs[i], mask[i]) for i in range(2)])
    assert per_sequence.mean() == 3.75  # (1.5 + 6) / 2: the short response would weigh as much as the long one


def test_its_gradient_is_the_same_for_every_response_token_and_0_elsewhere():
    log_probs = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    (gradient,) = torch.autograd.grad(sft_loss(log_probs, mask), log_probs)
    assert_near(gradient, -mask.float() / 4)


def test_it_is_cross_entropy_that_ignores_the_prompt():
    batch, model = batch_of(DEMONSTRATIONS), tiny_llama(dtype=torch.float64)
    labels = batch["labels"].masked_fill(~batch["response_mask"], -100)
    expected = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert_near(loss_of(model, batch), expected, 1e-12)


def test_a_model_that_knows_nothing_pays_the_log_of_the_vocabulary_size():
    batch = batch_of(DEMONSTRATIONS)
    log_probs = token_log_probs(torch.zeros(*batch["labels"].shape, 12), batch["labels"])
    assert_near(sft_loss(log_probs, batch["response_mask"]), torch.tensor(12.0).log())


def test_the_loss_is_least_where_the_model_is_the_data_distribution():
    """Maximum likelihood: E_p[-log q] = H(p) + KL(p || q). Data of the tokens 0, 0, 1, 2 stand for p."""
    data = torch.tensor([0, 0, 1, 2])
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    everywhere = torch.ones(4, dtype=torch.bool)

    def loss(log_q):
        return sft_loss(token_log_probs(log_q.expand(4, 3), data), everywhere)

    entropy = -(p * p.log()).sum()
    assert_near(loss(p.log()), entropy, 1e-14)
    for seed in range(20):
        log_q = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
        assert_near(loss(log_q), entropy + (p * (p.log() - log_q)).sum(), 1e-12)
        assert loss(log_q) > entropy


def test_the_prompts_own_labels_are_not_learned():
    """Two batches that differ in a label of the prompt only: it is an input to the model, never a target."""
    batch = batch_of(DEMONSTRATIONS[:1])
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][0, 0] = 9
    model = tiny_llama()
    assert loss_of(model, batch) == loss_of(model, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_give_a_finite_loss_and_gradient(dtype):
    logits = torch.zeros(1, 2, 3, dtype=dtype)
    logits[..., 0] = 1e4
    logits.requires_grad_()
    loss = sft_loss(token_log_probs(logits, torch.tensor([[1, 0]])), torch.ones(1, 2, dtype=torch.bool))
    assert loss == logits[0, 0, 0].item() / 2
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


# -------------------------------------------------------------------------------------- gradient accumulation


def test_micro_batches_weighed_by_their_tokens_add_up_to_the_big_batch():
    model = tiny_llama(dtype=torch.float64)
    whole = loss_of(model, batch_of(DEMONSTRATIONS))
    expected = torch.autograd.grad(whole, list(model.parameters()))
    parts = [batch_of(DEMONSTRATIONS[i : i + 2]) for i in (0, 2, 4)]
    tokens = [part["response_mask"].sum() for part in parts]
    accumulated = sum(n / sum(tokens) * loss_of(model, part) for n, part in zip(tokens, parts, strict=True))
    gradient = torch.autograd.grad(accumulated, list(model.parameters()))
    for x, y in zip(gradient, expected, strict=True):
        assert_near(x, y, 1e-7)


def test_micro_batches_weighed_equally_do_not():
    """The mistake that many training loops made: ragged micro-batches have different numbers of tokens."""
    model = tiny_llama(dtype=torch.float64)
    whole = loss_of(model, batch_of(DEMONSTRATIONS))
    equal = sum(loss_of(model, batch_of(DEMONSTRATIONS[i : i + 2])) / 3 for i in (0, 2, 4))
    expected = torch.autograd.grad(whole, model.lm_head.weight)[0]
    gradient = torch.autograd.grad(equal, model.lm_head.weight)[0]
    assert (gradient - expected).norm() / expected.norm() > 0.1


@pytest.mark.parametrize("replay", [None, torch.arange(2, 10).repeat(3, 2)])
def test_training_with_accumulation_ends_with_the_same_weights(replay):
    models = []
    for accumulation in (1, 3, 6):
        model = tiny_llama(dtype=torch.float64)
        log = train_sft(
            model,
            TOKENIZER,
            DEMONSTRATIONS,
            config(accumulation=accumulation, replay_rows=2),
            replay=replay,
            progress=False,
        )
        models.append((weights_of(model), [line["loss"] for line in log]))
    for weights, losses in models[1:]:
        assert_near(weights, models[0][0], 1e-6)
        assert_near(losses, models[0][1], 1e-6)


# --------------------------------------------------------------------------------------------------- the loop


def test_training_lowers_the_loss_and_ends_by_telling_it():
    model = tiny_llama()
    log = train_sft(
        model,
        TOKENIZER,
        DEMONSTRATIONS,
        config(steps=60, eval_every=20),
        held_out=DEMONSTRATIONS,
        progress=False,
    )
    assert [line["step"] for line in log] == list(range(60))
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    assert [line["step"] for line in log if "held_out_loss" in line] == [0, 20, 40, 59]
    assert log[-1]["held_out_loss"] == pytest.approx(held_out_loss(model, TOKENIZER, DEMONSTRATIONS))


def test_the_first_logged_loss_is_that_of_the_model_as_it_came():
    model = tiny_llama()
    expected = loss_of(model, batch_of(DEMONSTRATIONS)).item()
    log = train_sft(model, TOKENIZER, DEMONSTRATIONS, config(steps=1), progress=False)
    assert log[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_padding_with_eos_trains_the_same_model():
    results = []
    for pad_is_eos in (False, True):
        model = tiny_llama(dtype=torch.float64)
        train_sft(model, ToyTokenizer(pad_is_eos), DEMONSTRATIONS, config(), progress=False)
        results.append(weights_of(model))
    assert_near(results[0], results[1], 1e-12)


def test_the_held_out_loss_does_not_depend_on_how_it_is_batched():
    model = tiny_llama(dtype=torch.float64)
    expected = loss_of(model, batch_of(DEMONSTRATIONS)).item()
    for batch_size in (1, 2, 4, 64):
        loss = held_out_loss(model, TOKENIZER, DEMONSTRATIONS, batch_size)
        assert loss == pytest.approx(expected, abs=1e-12)


def test_replay_keeps_what_fine_tuning_would_forget():
    """The text costs more after fine-tuning alone than after fine-tuning with some of it mixed in."""
    text = torch.tensor([[2, 4, 6, 8, 10, 2, 4, 6, 8, 10]]).repeat(4, 1)
    losses = []
    for replay in (None, text):
        model = tiny_llama()
        train_sft(model, TOKENIZER, DEMONSTRATIONS, config(steps=40), replay=replay, progress=False)
        log_probs = token_log_probs(model(text[:, :-1]), text[:, 1:])
        losses.append(-log_probs.mean().item())
    assert losses[1] < 0.5 * losses[0]


def test_a_students_loss_function_drives_the_training():
    calls = []

    def loss_fn(log_probs, response_mask):
        calls.append(response_mask.sum().item())
        return sft_loss(log_probs, response_mask) * 0.0

    model, before = tiny_llama(), weights_of(tiny_llama())
    log = train_sft(model, TOKENIZER, DEMONSTRATIONS, config(steps=2), loss_fn=loss_fn, progress=False)
    assert len(calls) == 2 and log[0]["loss"] == 0
    assert torch.equal(weights_of(model), before)


class Killed(Exception):
    pass


def test_a_run_killed_in_the_middle_ends_with_the_same_model(tmp_path):
    settings = config(steps=7, batch_size=2, save_every=2)
    whole = tiny_llama()
    expected = train_sft(whole, TOKENIZER, DEMONSTRATIONS, settings, progress=False)

    calls = 0

    def dies_in_step_5(log_probs, response_mask):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return sft_loss(log_probs, response_mask)

    run = {"checkpoint": tmp_path / "sft.pt", "progress": False}
    with pytest.raises(Killed):
        train_sft(tiny_llama(), TOKENIZER, DEMONSTRATIONS, settings, loss_fn=dies_in_step_5, **run)
    resumed = tiny_llama(seed=5)  # its weights are overwritten by the checkpoint's
    log = train_sft(resumed, TOKENIZER, DEMONSTRATIONS, settings, **run)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert log == expected

    untouched = tiny_llama(seed=6)  # and a finished run is not trained again
    assert train_sft(untouched, TOKENIZER, DEMONSTRATIONS, settings, **run) == expected
    assert torch.equal(weights_of(untouched), weights_of(whole))


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="no demonstrations"):
        train_sft(tiny_llama(), TOKENIZER, [], config(), progress=False)
    with pytest.raises(ValueError, match="step 0: no demonstration of the batch has a response token"):
        train_sft(tiny_llama(), TOKENIZER, [{"prompt": "w2", "response": ""}], config(), progress=False)


def test_one_empty_response_among_others_counts_nothing():
    with_empty = [*DEMONSTRATIONS[:2], {"prompt": "w4 w5", "response": ""}]
    model = tiny_llama(dtype=torch.float64)
    assert_near(loss_of(model, batch_of(with_empty)), loss_of(model, batch_of(DEMONSTRATIONS[:2])), 1e-12)
    log = train_sft(model, TOKENIZER, with_empty, config(accumulation=3), progress=False)
    assert weights_of(model).isfinite().all() and log[-1]["loss"] < log[0]["loss"]


# -------------------------------------------------------------------------------------------- TRL 1.16 agrees


def golden_batch():
    golden = GOLDEN["sft"]
    ids, labels = torch.tensor(golden["input_ids"]), torch.tensor(golden["labels"])
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": labels[:, 1:] != -100}


def test_trl_reads_the_same_mask_from_prompt_and_completion():
    golden = GOLDEN["sft"]
    prompts = ["w2 w3", "w8 w9 w10 w2", "w5", "w7 w7 w2"]
    outputs = ["w4 w5 w6 <eos>", "w11 <eos>", "w6 w7 w8 w9 w10 w11 <eos>", "w3 w3 <eos>"]
    batch = tokenize_prompt_and_output(prompts, outputs, TOKENIZER)
    assert golden["made_by"]["trl"] == "1.16.0"
    for name, expected in golden_batch().items():
        assert torch.equal(batch[name], expected)


def test_loss_and_gradient_are_trls():
    golden, model, batch = GOLDEN["sft"], golden_llama(GOLDEN["sft"]["model"]), golden_batch()
    loss = loss_of(model, batch)
    assert_near(loss, golden["loss"], 1e-6)
    loss.backward()
    weights = dict(model.named_parameters())
    for name, gradient in golden["gradient"].items():
        assert_near(weights[name].grad, torch.tensor(gradient), 1e-6)


def test_trls_micro_batches_are_weighed_by_their_share_of_the_tokens_too():
    golden, model, batch = GOLDEN["sft"], golden_llama(GOLDEN["sft"]["model"]), golden_batch()
    tokens = batch["response_mask"].sum()
    for rows, expected in zip((slice(0, 2), slice(2, 4)), golden["micro_losses"], strict=True):
        part = {name: x[rows] for name, x in batch.items()}
        assert_near(part["response_mask"].sum() / tokens * loss_of(model, part), expected, 1e-6)
    assert sum(golden["micro_losses"]) == pytest.approx(golden["loss"], abs=1e-6)
