"""Prompts and responses as tensors, logits as log-probabilities: positions, masks and the shift by one."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from toys import EOS, PAD, ToyTokenizer, assert_near, tiny_llama

from cs336_alignment.tokens import (
    collate,
    masked_mean,
    masked_token_log_probs,
    pack,
    select_rows,
    sequence_log_probs,
    token_log_probs,
    tokenize_prompt_and_output,
)

PROMPTS = ["w2 w3", "w4", "w5 w6 w7"]
OUTPUTS = ["w8 w9 <eos>", "w10 <eos>", "w2"]


# ------------------------------------------------------------------------------------- tokenization and masks


def test_a_batch_worked_out_by_hand():
    """Three joined sequences of 5, 3 and 4 tokens. S is 4: the last token of a row predicts nothing."""
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    assert batch["input_ids"].tolist() == [[2, 3, 8, 9], [4, 10, 1, 0], [5, 6, 7, 2]]
    assert batch["labels"].tolist() == [[3, 8, 9, 1], [10, 1, 0, 0], [6, 7, 2, 0]]
    assert batch["response_mask"].int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert batch["response_mask"].dtype == torch.bool and batch["labels"].dtype == torch.int64


def test_labels_are_the_inputs_shifted_by_one():
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_mask_keeps_exactly_the_output_tokens(pad_is_eos):
    """Decoding what the mask keeps gives the outputs back, the EOS that the caller wrote included."""
    tokenizer = ToyTokenizer(pad_is_eos)
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer)
    kept = [tokenizer.decode(ids[mask]) for ids, mask in zip(batch["labels"], batch["response_mask"], strict=True)]
    assert kept == OUTPUTS


def test_a_padding_id_equal_to_eos_changes_no_mask():
    """A mask made of `labels != pad` would drop the real EOS here, and no model would learn to stop."""
    apart = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    same = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer(pad_is_eos=True))
    assert torch.equal(apart["response_mask"], same["response_mask"])
    mask = same["response_mask"]
    assert torch.equal(apart["labels"][mask], same["labels"][mask])
    assert (same["labels"][mask] == EOS).sum() == 2  # one for each output that ends
    assert (same["labels"] == EOS).sum() > 2  # and padding that looks the same


def test_eos_is_not_added():
    batch = tokenize_prompt_and_output(["w2"], ["w3"], ToyTokenizer())
    assert batch["input_ids"].tolist() == [[2]] and batch["labels"].tolist() == [[3]]


def test_no_special_tokens_are_added():
    """The toy tokenizer puts its token 11 in front unless told not to, as Hugging Face's put their BOS."""
    assert ToyTokenizer().encode("w2") == [11, 2]
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    assert not (batch["labels"] == 11).any() and not (batch["input_ids"] == 11).any()


def test_prompt_and_output_are_encoded_apart():
    """Encoded as one text, "t" + "he" would become one token, partly prompt and partly output."""

    class MergingTokenizer:
        pad_token_id = 0

        def encode(self, text, add_special_tokens=False):
            return [7] if text == "the" else [ord(character) for character in text]

    batch = tokenize_prompt_and_output(["t"], ["he"], MergingTokenizer())
    assert batch["input_ids"].tolist() == [[ord("t"), ord("h")]]
    assert batch["labels"].tolist() == [[ord("h"), ord("e")]]


def test_a_hugging_face_tokenizer_works_as_it_is():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 12)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    with pytest.raises(ValueError, match="pad_token"):
        tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer)
    toy = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer(pad_is_eos=True))
    assert all(torch.equal(batch[name], toy[name]) for name in toy)


def test_an_empty_output_has_an_empty_mask():
    batch = tokenize_prompt_and_output(["w2 w3", "w4"], ["", "w5 <eos>"], ToyTokenizer())
    assert batch["response_mask"].int().tolist() == [[0, 0], [1, 1]]
    nothing = tokenize_prompt_and_output(["w2"], [""], ToyTokenizer())
    assert all(x.shape == (1, 0) for x in nothing.values())


@pytest.mark.parametrize(
    "prompts, outputs, message",
    [
        (["w2", "w3"], ["w4"], "pairs"),
        ([], [], "at least one"),
        (["w2", ""], ["w3", "w4"], "prompt 1 .*no tokens"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(prompts, outputs, message):
    with pytest.raises(ValueError, match=message):
        tokenize_prompt_and_output(prompts, outputs, ToyTokenizer())


def test_a_tokenizer_without_padding_is_refused_even_where_none_is_needed():
    tokenizer = ToyTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token"):
        tokenize_prompt_and_output(["w2"], ["w3"], tokenizer)


def test_padding_stands_on_the_side_that_is_asked_for():
    rows = [[PAD, 5], [6], [7, 8, PAD]]  # the padding id also occurs as a token: the mask counts, not the id
    right, right_mask = collate(rows, PAD)
    left, left_mask = collate(rows, PAD, side="left")
    assert right.tolist() == [[0, 5, 0], [6, 0, 0], [7, 8, 0]]
    assert right_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert left.tolist() == [[0, 0, 5], [0, 0, 6], [7, 8, 0]]
    assert left_mask.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="side"):
        collate(rows, PAD, side="centre")


def test_selecting_rows_drops_the_columns_that_only_others_need():
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    short = select_rows(batch, torch.tensor([1]))
    assert short["labels"].tolist() == [[10, 1]] and short["response_mask"].all()
    both = select_rows(batch, torch.tensor([2, 0]))
    assert both["labels"].tolist() == [[6, 7, 2, 0], [3, 8, 9, 1]]


def test_packing_joins_documents_and_drops_the_incomplete_row():
    assert pack([[1, 2, 3], [4], [5, 6, 7]], 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="do not fill"):
        pack([[1, 2], [3]], 4)


# ------------------------------------------------------------------------------------------------ masked mean


def test_a_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert masked_mean(x, mask) == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.0, 0.0]  # the empty row is 0, not NaN
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 0.0]


def test_a_masked_mean_over_everything_is_the_mean():
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_near(masked_mean(x, torch.ones(3, 4, dtype=torch.bool)), x.mean(), 1e-15)


# ------------------------------------------------------------------------------------------ log-probabilities


def test_token_log_probs_are_the_log_of_the_softmax():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.randint(5, (2, 3))
    expected = logits.softmax(-1).log()
    for b, t in itertools.product(range(2), range(3)):
        assert token_log_probs(logits, labels)[b, t].item() == pytest.approx(expected[b, t, labels[b, t]].item())


def test_the_probabilities_of_all_labels_sum_to_1():
    logits = torch.randn(4, 6, dtype=torch.float64)
    total = sum(token_log_probs(logits, torch.full((4,), label)).exp() for label in range(6))
    assert_near(total, torch.ones(4, dtype=torch.float64), 1e-14)


def test_token_log_probs_does_not_shift():
    """Position t of the logits is read for label t. Shifting twice would predict the next but one."""
    logits = torch.full((1, 3, 4), -20.0)
    labels = torch.tensor([[2, 0, 3]])
    logits[0, range(3), labels[0]] = 20.0
    assert (token_log_probs(logits, labels) > -1e-6).all()
    assert (token_log_probs(logits[:, :-1], labels[:, 1:]) < -39).all()


def test_adding_a_number_to_all_logits_changes_no_probability():
    logits, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])
    shifted = token_log_probs(logits + 123.0, labels)
    assert_near(shifted, token_log_probs(logits, labels), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_ten_thousand_give_finite_log_probs(dtype):
    """The log of a softmax is -inf as soon as the probability underflows, and so is its gradient NaN."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, 0.0]]).to(dtype).requires_grad_()
    values = token_log_probs(logits, torch.tensor([2, 0]))
    assert_near(values[0], 2 * logits[0, 2].float(), 0)
    assert values[1].item() == pytest.approx(-0.6931472)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert gradient.tolist() == [[-1, 0, 1], [0.5, -0.5, 0]]
    assert logits.float().softmax(-1).log()[0, 2].isinf()  # the naive form


def test_the_gradient_of_a_log_prob_is_one_hot_minus_softmax():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_log_probs(logits, torch.tensor(3)), logits)
    expected = torch.nn.functional.one_hot(torch.tensor(3), 5) - logits.softmax(-1)
    assert_near(gradient, expected, 1e-14)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_label_outside_the_vocabulary_is_refused(label):
    """-100 is a convention of other libraries; here a mask says what counts, and -1 is not the last one."""
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        token_log_probs(torch.randn(2, 5), torch.tensor([0, label]))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 3)])
def test_labels_must_have_a_place_for_every_distribution(shape):
    with pytest.raises(ValueError, match="labels"):
        token_log_probs(torch.randn(2, 3, 5), torch.zeros(shape, dtype=torch.long))


# ----------------------------------------------------------------------------- log-probabilities of responses


def fixed_model(logits):
    """A "model" that answers every batch with the same logits."""
    return lambda input_ids: logits


def test_a_response_has_the_product_of_its_tokens_probabilities():
    """p = 1/2 and 1/4 in the first row; the prompt's token, and the second row's padding, count nothing."""
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5], [0.25, 0.75]], [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]])
    batch = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "labels": torch.tensor([[0, 1, 0], [1, 0, 0]]),
        "response_mask": torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(),
    }
    result = sequence_log_probs(fixed_model(probs.log()), batch)
    assert_near(result.exp(), torch.tensor([0.5 * 0.25, 0.8]))


def test_the_log_prob_of_a_response_is_a_sum_and_not_a_mean():
    """Twice as long, twice the log-probability; an average would hide from DPO how much has moved."""
    for length in (1, 2, 4):
        batch = {
            "input_ids": torch.zeros(1, length, dtype=torch.long),
            "labels": torch.zeros(1, length, dtype=torch.long),
            "response_mask": torch.ones(1, length, dtype=torch.bool),
        }
        uniform = fixed_model(torch.zeros(1, length, 8))
        assert sequence_log_probs(uniform, batch).item() == pytest.approx(-length * 2.0794415)


def test_the_probabilities_of_all_responses_sum_to_1():
    """Every response of at most three tokens, ended by EOS or by the limit, under a real network."""
    model = tiny_llama(dtype=torch.float64, vocabulary=5)
    words = [0, 2, 3, 4]  # everything but EOS
    texts = [[*r, EOS] for n in range(3) for r in itertools.product(words, repeat=n)]
    texts += [list(r) for r in itertools.product(words, repeat=3)]
    tokenizer = ToyTokenizer()
    outputs = [tokenizer.decode(text) for text in texts]
    batch = tokenize_prompt_and_output(["w2 w4"] * len(texts), outputs, tokenizer)
    total = sequence_log_probs(model, batch).exp().sum()
    assert len(texts) == 1 + 4 + 16 + 64
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_neighbours_and_padding_change_no_probability(pad_is_eos):
    model, tokenizer = tiny_llama(dtype=torch.float64), ToyTokenizer(pad_is_eos)
    together = sequence_log_probs(model, tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer))
    for i in range(len(PROMPTS)):
        alone = sequence_log_probs(model, tokenize_prompt_and_output([PROMPTS[i]], [OUTPUTS[i]], tokenizer))
        assert together[i].item() == pytest.approx(alone.item(), abs=1e-12)


def test_hugging_face_outputs_and_attention_masks_pass_through():
    seen = {}

    def model(input_ids, attention_mask):
        seen["attention_mask"] = attention_mask
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    batch = tokenize_prompt_and_output(["w2"], ["w3"], ToyTokenizer()) | {"attention_mask": torch.ones(1, 1)}
    assert sequence_log_probs(model, batch).item() == pytest.approx(-1.3862944)
    assert seen["attention_mask"] is batch["attention_mask"]


def test_a_response_without_tokens_has_log_prob_0():
    batch = tokenize_prompt_and_output(["w2 w3", "w4"], ["", "w5 <eos>"], ToyTokenizer())
    result = sequence_log_probs(tiny_llama(), batch)
    assert result[0] == 0 and result[1] < 0


def test_the_gradient_of_prompt_and_padding_logits_is_0():
    logits = torch.randn(3, 4, 12, requires_grad=True)
    batch = tokenize_prompt_and_output(PROMPTS, OUTPUTS, ToyTokenizer())
    (gradient,) = torch.autograd.grad(sequence_log_probs(fixed_model(logits), batch).sum(), logits)
    touched = (gradient != 0).any(dim=-1)
    assert torch.equal(touched, batch["response_mask"])


def test_logits_behind_the_mask_never_reach_the_gradient():
    """A NaN in a logit that nobody asked about: zeroing its log-probability later would be too late."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, True, True], [False, True, False]])
    labels = torch.ones(2, 3, dtype=torch.long)
    clean = logits.clone().requires_grad_(True)
    logits[~mask] = torch.nan
    labels[~mask] = -100
    logits.requires_grad_(True)
    for x in (clean, logits):
        masked_token_log_probs(x, labels, mask).sum().backward()
    assert torch.equal(logits.grad, clean.grad) and logits.grad.isfinite().all()
    assert (masked_token_log_probs(logits, labels, mask)[~mask] == 0).all()


def test_logits_may_be_given_where_the_mask_is_true_only():
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(masked_token_log_probs(logits[mask], labels, mask), masked_token_log_probs(logits, labels, mask))
