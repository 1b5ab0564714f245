"""Sampling: the log-probabilities of a sample are exact, and padding, EOS and neighbours change nothing."""

import pytest
import torch

from cs336_alignment.generate import Samples, draw, generate_text, response_log_probs, sample
from cs336_alignment.models import (
    HFCausalLM,
    Llama,
    ModelConfig,
    RestrictedVocabulary,
    autocast,
)
from cs336_alignment.tokens import sequence_log_probs

VOCABULARY, EOS, PAD = 12, 1, 0
PROMPTS = [[5, 6, 7, 8, 9], [4], [3, 2, 3], [10, 11, 2, 2]]  # ragged
RAGGED = dict(max_new_tokens=14, eos_token_id=EOS)


def llama(seed: int = 0, std: float = 0.3, **changes) -> Llama:
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    return Llama(ModelConfig(**shape, max_position_embeddings=32, initializer_range=std, **changes))


def gpt2(dropout: float = 0.1) -> HFCausalLM:
    """Learned positions: a position counted wrong cannot hide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    drop = dict(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    return HFCausalLM(GPT2LMHeadModel(GPT2Config(**shape, **drop, initializer_range=0.3)).eval())


def wrapped_llama() -> HFCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llama()
    theirs = LlamaForCausalLM(LlamaConfig(**model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())
    return HFCausalLM(theirs)


MODELS = pytest.mark.parametrize("make", [llama, wrapped_llama, gpt2])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(model, samples: Samples, prompts: list[list[int]], temperature: float = 1.0) -> torch.Tensor:
    """The log-probabilities again, written out: each sequence alone, no padding, no cache, no mask."""
    result = torch.zeros(samples.response_ids.shape)
    for i, (prompt, response) in enumerate(zip(prompts, samples.responses(), strict=True)):
        log_probs = (model(torch.tensor([prompt + response]))[0] / temperature).log_softmax(-1)
        for t, token in enumerate(response):
            result[i, t] = log_probs[len(prompt) - 1 + t, token]
    return result


class Countdown(torch.nn.Module):
    """After token k comes k - 1, for certain, down to 0: responses of known length. Counts its calls."""

    vocab_size, hidden_size, max_positions = 100, 1, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def new_cache(self, batch_size, max_length):
        return self

    def batch_select_indices(self, rows):
        pass

    def hidden(self, input_ids, attention_mask=None, position_ids=None, cache=None):
        self.batches.append(len(input_ids))
        return input_ids[..., None].float()

    def head(self, hidden):
        following = (hidden[..., 0].long() - 1).clamp(min=0)
        return torch.nn.functional.one_hot(following, self.vocab_size) * 200.0


# ------------------------------------------------------------------------------------ exact log-probabilities


@MODELS
@pytest.mark.parametrize("pad", [PAD, EOS], ids=["pad", "pad==eos"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_equal_teacher_forced_ones(make, pad, temperature):
    model = make()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=pad, temperature=temperature, generator=generator(3))
    lengths = samples.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 2 and samples.log_probs[samples.response_mask].std() > 0.3
    with torch.no_grad():
        again = response_log_probs(model, samples, temperature)
        alone = one_by_one(model, samples, PROMPTS, temperature)
    assert torch.allclose(samples.log_probs, again, atol=1e-5)
    assert torch.allclose(samples.log_probs, alone, atol=1e-5)


@MODELS
@torch.no_grad()
def test_left_padded_samples_have_the_log_probs_of_right_padded_sequences(make):
    """The sampler pads on the left; training batches are padded on the right and have no attention mask."""
    model = make()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=EOS, generator=generator())
    rows = [prompt + response for prompt, response in zip(PROMPTS, samples.responses(), strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        mask[i, len(prompt) : len(row)] = True
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}
    assert torch.allclose(sequence_log_probs(model, batch), samples.log_probs.sum(1), atol=1e-5)


def test_response_log_probs_have_the_gradient_of_unpadded_sequences():
    model = llama()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=generator())
    weights = torch.randn(samples.log_probs.shape)
    gradients = []
    for log_probs in (response_log_probs(model, samples), one_by_one(model, samples, PROMPTS)):
        gradients.append(torch.autograd.grad((weights * log_probs).sum(), list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_prompts_of_one_length_give_the_same_log_probs_without_a_mask():
    model = llama()
    prompts = [[5, 6, 7], [8, 9, 10]]
    samples = sample(model, prompts, **RAGGED, pad_token_id=PAD, generator=generator())
    assert torch.allclose(samples.log_probs, one_by_one(model, samples, prompts), atol=1e-5)
    assert torch.allclose(samples.log_probs, response_log_probs(model, samples), atol=1e-5)


def test_what_stands_behind_the_response_mask_does_not_matter():
    model = llama()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=generator())
    log_probs = response_log_probs(model, samples)
    assert (log_probs[~samples.response_mask] == 0).all() and (~samples.response_mask).any()
    samples.response_ids[~samples.response_mask] = 7
    assert torch.equal(response_log_probs(model, samples), log_probs)


@torch.no_grad()
def test_minibatches_of_samples_have_the_log_probs_of_the_batch():
    model = llama()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=generator())
    index = torch.tensor([2, 0])
    assert torch.allclose(response_log_probs(model, samples.rows(index)), samples.log_probs[index], atol=1e-5)


def test_a_model_in_train_mode_is_sampled_without_dropout_and_left_in_train_mode():
    model = gpt2(dropout=0.5).train()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=generator())
    assert model.training and model.hf_model.training
    with torch.no_grad():
        assert torch.allclose(samples.log_probs, one_by_one(model.eval(), samples, PROMPTS), atol=1e-5)


# ----------------------------------------------------------------------------- the distribution that is drawn


def test_numbers_spread_evenly_draw_every_token_as_often_as_it_is_probable():
    """draw() turns one number in [0, 1) into a token: a grid of numbers gives the probabilities exactly."""
    n = 100_000
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.5, -3.0, -torch.inf])
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(draw(logits.expand(n, -1), grid), minlength=6)
    assert ((counts / n - logits.softmax(0)).abs() < 2 / n).all()


def test_a_token_of_probability_zero_is_not_drawn_at_either_end():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


@torch.no_grad()
def test_two_tokens_are_sampled_as_often_as_the_model_says():
    model, n = llama(), 4000
    prompt = [5, 6]
    samples = sample(model, [prompt] * n, max_new_tokens=2, eos_token_id=-1, pad_token_id=PAD, generator=generator())
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    ids = torch.cat([torch.tensor(prompt).expand(len(pairs), -1), pairs], dim=1)
    log_probs = model(ids[:, :-1])[:, 1:].log_softmax(-1).gather(2, pairs[..., None]).sum((1, 2))
    counts = torch.bincount(samples.response_ids @ torch.tensor([VOCABULARY, 1]), minlength=VOCABULARY**2)
    expected = n * log_probs.exp()
    likely = expected > 5
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    degrees = int(likely.sum())
    assert degrees > 20
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@torch.no_grad()
def test_the_same_generator_gives_the_same_samples_and_another_gives_others():
    model = llama()
    first, same, other = (
        sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.response_ids, same.response_ids)
    assert torch.equal(first.log_probs, same.log_probs)
    assert first.responses() != other.responses()


class Wander(Countdown):
    """From 50 on, every token up to 99 may follow; below, Countdown."""

    def head(self, hidden):
        anything = torch.arange(self.vocab_size) >= 50
        return torch.where(hidden >= 50, anything * 200.0, super().head(hidden))


def test_what_a_row_says_does_not_depend_on_when_the_others_stop():
    said, batches = [], []
    for neighbours in ([[1], [1], [1]], [[40], [40], [40]], [[2], [30], [3]]):
        model = Wander()
        prompts = [neighbours[0], [50], *neighbours[1:]]
        samples = sample(model, prompts, max_new_tokens=8, eos_token_id=0, pad_token_id=0, generator=generator())
        said.append(samples.responses()[1])
        batches.append(model.batches[-1])
    assert batches == [1, 4, 2]
    assert said[0] == said[1] == said[2] and len(set(said[0])) > 4


def test_sampling_from_a_restricted_vocabulary_says_only_allowed_tokens():
    model = RestrictedVocabulary(llama(), [1, 5, 7])
    samples = sample(model, PROMPTS * 5, max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD, generator=generator())
    assert set(samples.response_ids[samples.response_mask].tolist()) == {1, 5, 7}
    assert torch.allclose(response_log_probs(model, samples), samples.log_probs, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- greedy


@MODELS
@torch.no_grad()
def test_temperature_zero_is_what_transformers_generates_greedily(make):
    model = make()
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, temperature=0.0)
    theirs = model.hf_model if isinstance(model, HFCausalLM) else wrapped_llama().hf_model
    for prompt, response in zip(PROMPTS, samples.responses(), strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert response == expected[0, len(prompt) :].tolist()
    assert torch.allclose(samples.log_probs, one_by_one(model, samples, PROMPTS), atol=1e-5)


# ----------------------------------------------------------------------------------------- EOS, length, masks


@pytest.mark.parametrize("pad", [0, 99], ids=["pad==eos", "pad"])
def test_a_response_ends_with_eos_and_padding_follows(pad):
    samples = sample(Countdown(), [[7, 3], [2], [9, 9, 1]], max_new_tokens=9, eos_token_id=0, pad_token_id=pad)
    assert samples.prompt_ids.tolist() == [[pad, 7, 3], [pad, pad, 2], [9, 9, 1]]
    assert samples.prompt_mask.tolist() == [[False, True, True], [False, False, True], [True, True, True]]
    assert samples.response_ids.tolist() == [[2, 1, 0], [1, 0, pad], [0, pad, pad]]
    assert samples.response_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert samples.finished.tolist() == [True, True, True]
    assert samples.responses() == [[2, 1, 0], [1, 0], [0]]
    assert samples.input_ids[1].tolist() == [pad, pad, 2, 1, 0, pad]
    assert samples.attention_mask[1].tolist() == [False, False, True, True, True, False]


def test_a_response_at_the_length_limit_is_unfinished():
    samples = sample(Countdown(), [[4], [3], [9]], max_new_tokens=3, eos_token_id=0, pad_token_id=0)
    assert samples.responses() == [[3, 2, 1], [2, 1, 0], [8, 7, 6]]
    assert samples.finished.tolist() == [False, True, False]  # EOS as the last token allowed still finishes


def test_sampling_stops_when_all_have_finished_and_finished_rows_are_left_out():
    model = Countdown()
    sample(model, [[2], [2], [3], [6]], max_new_tokens=50, eos_token_id=0, pad_token_id=0)
    assert model.batches == [4, 4, 2, 1, 1, 1]


@torch.no_grad()
def test_a_batch_says_what_each_prompt_says_alone():
    model = llama()
    together = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, temperature=0.0).responses()
    alone = [sample(model, [p], **RAGGED, pad_token_id=PAD, temperature=0.0).responses()[0] for p in PROMPTS]
    assert together == alone


# ------------------------------------------------------------------------------------------------------- text


class Words:
    """Token k is the word "k"; 0 is "<end>", and padding too."""

    eos_token_id = pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()] + ([50] if add_special_tokens else [])

    def decode(self, ids):
        return " ".join("<end>" if i == 0 else str(i) for i in ids)


def test_texts_come_in_the_order_of_the_prompts_and_show_whether_they_ended():
    prompts = ["9 9 9 2", "5", "7 7 1", "3"]
    texts = generate_text(Countdown(), Words(), prompts, max_new_tokens=3, batch_size=3)
    assert texts == ["1 <end>", "4 3 2", "<end>", "2 1 <end>"]


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "no prompts"),
        ([[3], []], {}, "a prompt is empty"),
        ([[3]], {"max_new_tokens": 0}, "at least one token"),
        ([[3]], {"temperature": -1.0}, "temperature"),
        ([[3, VOCABULARY]], {}, "the tokenizer that belongs to the model"),
        ([[3, -1]], {}, "the tokenizer that belongs to the model"),
        ([[3] * 29, [3]], {}, "29 tokens and 4 new ones do not fit the model's 32 positions"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(prompts, changes, message):
    request = dict(max_new_tokens=4, eos_token_id=EOS, pad_token_id=PAD) | changes
    with pytest.raises(ValueError, match=message):
        sample(llama(), prompts, **request)


def test_prompt_and_response_may_fill_all_positions():
    samples = sample(llama(), [[3] * 28], max_new_tokens=4, eos_token_id=-1, pad_token_id=PAD, generator=generator())
    assert samples.response_ids.shape == (1, 4)


def test_a_model_that_has_diverged_is_reported():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        sample(model, PROMPTS, **RAGGED, pad_token_id=PAD)


def test_log_probs_at_temperature_zero_are_refused():
    samples = sample(llama(), PROMPTS, **RAGGED, pad_token_id=PAD)
    with pytest.raises(ValueError, match="above 0"):
        response_log_probs(llama(), samples, temperature=0.0)


# --------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch sees none")
@MODELS
@torch.no_grad()
def test_on_a_gpu_sampled_log_probs_equal_teacher_forced_ones_and_those_of_the_cpu(make):
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default: products of float32 are float32
    model = make().cuda()
    cuda_generator = torch.Generator("cuda").manual_seed(0)
    samples = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=cuda_generator)
    assert torch.allclose(samples.log_probs, response_log_probs(model, samples), atol=1e-4)
    with autocast("cuda"):
        half = sample(model, PROMPTS, **RAGGED, pad_token_id=PAD, generator=cuda_generator)
        again = response_log_probs(model, half)
    assert half.log_probs.dtype == again.dtype == torch.float32
    assert (half.log_probs - again)[half.response_mask].abs().mean() < 0.05
    on_cpu = Samples(*(getattr(samples, name).cpu() for name in samples.__dataclass_fields__))
    assert torch.allclose(on_cpu.log_probs, one_by_one(model.cpu(), on_cpu, PROMPTS), atol=1e-4)
