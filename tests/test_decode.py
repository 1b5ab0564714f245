"""`for_sampling` beside the plain Llama: the same logits, the same samples."""

import os

import pytest
import torch
from toys import EOS, PAD, assert_near, tiny_llama

from cs336_alignment.decode import SamplingLlama, for_sampling
from cs336_alignment.generate import response_log_probs, sample
from cs336_alignment.models import Llama, ModelConfig, RestrictedVocabulary

RAGGED = [[2, 3, 4, 5], [6], [7, 8], [9, 10, 11]]


def llama(kv_heads: int = 2, tied: bool = True, eps: float = 1e-2) -> Llama:
    """float64, with norms that are not one and an eps that cannot be forgotten."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=32, rms_norm_eps=eps,
        initializer_range=0.3,
    )  # fmt: skip
    model = Llama(config).double().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_plain_model(kv_heads, tied):
    model = llama(kv_heads, tied)
    fast, ids = for_sampling(model), torch.randint(0, 12, (3, 7))
    assert_near(fast.head(fast.hidden(ids)), model(ids), 1e-10)


@pytest.mark.parametrize("static", [False, True])
def test_token_by_token_with_padding_on_the_left(static):
    model, ids = llama(), torch.randint(0, 12, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, :1] = False
    expected, fast = model(ids, mask), for_sampling(model, static)
    cache = fast.new_cache(3, 9)
    parts = [fast.hidden(ids[:, :5], mask[:, :5], cache=cache)]
    parts += [fast.hidden(ids[:, t : t + 1], mask[:, : t + 1], cache=cache) for t in range(5, 9)]
    assert_near(fast.head(torch.cat(parts, dim=1))[mask], expected[mask], 1e-10)
    with pytest.raises(ValueError, match="cache"):
        fast.hidden(ids[:, :1], cache=cache)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prompts", [RAGGED, [[2, 3], [4, 5], [6, 7]], [[5]]])
def test_samples_are_the_same_and_so_are_their_log_probabilities(prompts, static):
    model = llama()
    plain, fast = (
        sample(
            m,
            prompts,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=PAD,
            generator=torch.Generator().manual_seed(3),
        )
        for m in (model, for_sampling(model, static))
    )
    assert torch.equal(plain.response_ids, fast.response_ids) and torch.equal(plain.finished, fast.finished)
    assert_near(fast.log_probs, plain.log_probs, 1e-6)
    assert_near(fast.log_probs, response_log_probs(model, fast), 1e-6)
    assert fast.finished.any() or len(prompts) == 1  # rows have been left out on the way


def test_it_holds_the_weights_of_the_moment():
    model, ids = llama(), torch.tensor([[2, 3, 4]])
    fast = for_sampling(model)
    before = fast.head(fast.hidden(ids)).clone()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1.5)
    assert_near(fast.head(fast.hidden(ids)), before, 1e-12)
    again = for_sampling(model)
    assert_near(again.head(again.hidden(ids)), model(ids), 1e-10)


def test_in_float32_to_rounding_and_in_train_mode_as_it_was():
    model = tiny_llama().train()
    fast, ids = for_sampling(model), torch.randint(0, 12, (2, 6))
    assert fast.training and isinstance(fast, SamplingLlama)
    assert_near(fast.head(fast.hidden(ids)), model(ids), 1e-5)


def test_other_models_stay_as_they_are():
    other = RestrictedVocabulary(llama(), [2, 3])
    assert for_sampling(other) is other


def test_too_long_is_refused_as_by_the_plain_model():
    with pytest.raises(ValueError, match="longer than the model's 32 positions"):
        for_sampling(llama()).hidden(torch.zeros(1, 33, dtype=torch.long))


def test_a_static_step_reads_and_writes_the_same_memory_each_time():
    model = llama()
    fast = for_sampling(model, static=True)
    cache = fast.new_cache(2, 6)
    fast.hidden(torch.tensor([[2, 3], [4, 5]]), cache=cache)

    def places():
        fixed = (cache.tokens, cache.positions, cache.slot, cache.visible, cache.output, *cache.layers)
        return [x.data_ptr() for x in fixed]

    before = places()
    for token in (6, 7):
        fast.hidden(torch.full((2, 1), token), cache=cache)
    cache.batch_select_indices(torch.tensor([1]))  # a row that has finished is computed along
    last = fast.hidden(torch.full((1, 1), 8), cache=cache)
    assert places() == before
    expected = model(torch.tensor([[4, 5, 6, 7, 8]]))[:, -1:]
    assert_near(fast.head(last), expected, 1e-10)


@pytest.mark.parametrize("static", [False, True])
def test_made_outside_autocast_it_may_be_used_inside(static):
    model, request = tiny_llama(), dict(max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD)
    fast = for_sampling(model, static)
    with torch.autocast("cpu", torch.bfloat16):
        samples = sample(fast, RAGGED, **request, generator=torch.Generator().manual_seed(3))
        again = response_log_probs(model, samples)
    assert (samples.log_probs - again)[samples.response_mask].abs().max() < 0.1


@pytest.mark.gpu
def test_the_captured_step_gives_the_samples_of_the_static_one():
    model = llama().float().cuda()
    plain, fast = (
        sample(
            m, RAGGED, max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD,
            generator=torch.Generator("cuda").manual_seed(3),
        )
        for m in (model, for_sampling(model))
    )  # fmt: skip
    assert torch.equal(plain.response_ids, fast.response_ids)
    assert_near(fast.log_probs.cpu(), plain.log_probs.cpu(), 1e-4)


@pytest.mark.gpu(cpu_too=True)
@pytest.mark.parametrize("made_inside", [True, False])
def test_the_captured_step_under_autocast_says_what_teacher_forcing_finds(made_inside):
    """bfloat16, as PPO uses it on a GPU. The rehearsal on a CPU takes the static step without its capture."""
    device = os.environ.get("COURSE_GPU_TESTS_ON", "cuda")
    model, request = llama().float().to(device), dict(max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD)
    fast = None if made_inside else for_sampling(model, static=True)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        fast = fast or for_sampling(model, static=True)
        samples = sample(fast, RAGGED, **request, generator=torch.Generator(device).manual_seed(3))
        again = response_log_probs(model, samples)
    difference = (samples.log_probs - again)[samples.response_mask].abs()
    assert difference.mean() < 0.05 and difference.max() < 0.5
