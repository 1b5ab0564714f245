"""Each trick of `speed` beside the plain form that it replaces: the same numbers, and the same gradients."""

import copy

import pytest
import torch
from toys import PAD, ToyTokenizer, assert_near, tiny_llama, weights_of

from cs336_alignment import speed
from cs336_alignment.decode import for_sampling
from cs336_alignment.dpo import DPOConfig, reference_log_probs, train_dpo
from cs336_alignment.generate import response_log_probs, sample
from cs336_alignment.models import (
    HFCausalLM,
    Llama,
    ModelConfig,
    RestrictedVocabulary,
    RewardModel,
    RMSNorm,
    ValueModel,
)
from cs336_alignment.ppo import PPOConfig, response_values, train_ppo
from cs336_alignment.reward import RewardConfig, score_tokens, train_reward_model
from cs336_alignment.sft import SFTConfig, demonstration_log_probs, train_sft
from cs336_alignment.tokens import select_rows, sequence_log_probs, tokenize_prompt_and_output

TOKENIZER = ToyTokenizer()
EVEN = [("w2 w3", "w4 w5 w6", "w7 w8 w9"), ("w8 w9", "w2 w3 w4", "w5 w5 w6")]
RAGGED = [
    ("w2 w3 w4", "w4 w5 w6 <eos>", "w7 <eos>"),
    ("w8", "w11 w2", "w3 w4 w3 w4 w5 <eos>"),
    ("w5 w6 w7 w8 w9", "<eos>", "w2 w3"),
    ("w9 w2", "w4", "w4"),
]
EMPTY = [("w2 w3", "", "w5 w6"), ("w4 w5 w6", "w7 w8", ""), ("w9 w10", "", "")]
CASES = {"even": EVEN, "ragged": RAGGED, "an empty response": EMPTY, "one pair": RAGGED[1:2]}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def deep_llama(dtype=torch.float64, groups: int = 1) -> Llama:
    """Three layers: only the last of them is allowed to look at a part of the positions."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=12, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2 // groups, tie_word_embeddings=True, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return Llama(config).to(dtype)


def pair_batch(pairs) -> dict[str, torch.Tensor]:
    prompts = [p for p, _, _ in pairs]
    return tokenize_prompt_and_output(prompts * 2, [c for _, c, _ in pairs] + [r for _, _, r in pairs], TOKENIZER)


def token_ids(texts: list[str]) -> list[list[int]]:
    return [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]


def value_and_gradient(model, function, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the gradient of a function of it that tells its entries apart."""
    model.zero_grad()
    result = function(model, *args)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    (weights * result).sum().backward()
    parameters = list(model.parameters())
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return result.detach(), gradient.clone()


def assert_same(model, plain, trick, *args, tolerance: float = 1e-10) -> None:
    """Value and gradient, relative to the largest entry."""
    for expected, actual in zip(value_and_gradient(model, plain, *args), value_and_gradient(model, trick, *args)):
        scale = max(expected.abs().max().item(), 1e-30)
        assert_near(actual / scale, expected / scale, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 2])
def test_response_only_and_shared_prompt_equal_the_plain_pass(case, dtype, groups):
    model, batch = deep_llama(dtype, groups), pair_batch(CASES[case])
    for trick in (speed.response_only_log_probs, speed.shared_prompt_token_log_probs):
        assert_same(model, demonstration_log_probs, trick, batch, tolerance=TOLERANCE[dtype])
    for trick in (speed.response_only_sequence_log_probs, speed.shared_prompt_log_probs):
        assert_same(model, sequence_log_probs, trick, batch, tolerance=TOLERANCE[dtype])


def test_the_tricks_work_on_any_model_behind_the_interface():
    transformers = pytest.importorskip("transformers")
    ours = deep_llama()
    wrapped = HFCausalLM(transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_dict())).double())
    wrapped.hf_model.load_state_dict(ours.state_dict())
    for model in (wrapped, RestrictedVocabulary(ours, list(range(12)))):
        for trick in (speed.response_only_log_probs, speed.shared_prompt_token_log_probs):
            # transformers' norms compute in float32 whatever the model's type is
            assert_same(model, demonstration_log_probs, trick, pair_batch(RAGGED), tolerance=1e-5)


def test_columns_behind_the_last_response_may_be_missing():
    batch = select_rows(pair_batch(RAGGED), torch.tensor([0, 3, 4, 7]))
    assert_same(deep_llama(), demonstration_log_probs, speed.shared_prompt_token_log_probs, batch)


def test_the_shared_prompt_costs_its_tokens_once():
    """Of 2 + 3 and 2 + 3 tokens (less the two that predict nothing), 6 are computed and not 8."""
    model, seen = deep_llama(), []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    speed.shared_prompt_log_probs(model, pair_batch(EVEN))
    assert seen == [2 + 2 + 2]


def test_the_last_block_and_the_output_layer_see_response_positions_only():
    model, seen = deep_llama(), []
    for layer in (*(block.mlp for block in model.model.layers), model.lm_head):
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    batch = pair_batch(EVEN)
    speed.response_only_log_probs(model, batch)
    assert seen == [16, 16, 12, 12]  # 4 rows of 4 positions, of which 3 predict a response token


def test_what_one_response_says_does_not_reach_the_other():
    model, batch = deep_llama(), pair_batch(EVEN)
    before = speed.shared_prompt_log_probs(model, batch)
    batch["input_ids"][2:, -1] = 11  # in the rejected responses only
    after = speed.shared_prompt_log_probs(model, batch)
    assert torch.equal(before[:2], after[:2]) and not torch.isclose(before[2:], after[2:]).any()


def test_pairs_whose_prompts_differ_are_refused():
    batch = tokenize_prompt_and_output(["w2 w3", "w2 w4"], ["w5", "w6"], TOKENIZER)
    with pytest.raises(ValueError, match="to one prompt"):
        speed.shared_prompt_log_probs(deep_llama(), batch)


def test_a_sequence_that_is_too_long_is_refused():
    batch = tokenize_prompt_and_output(["w2 " * 20] * 2, ["w5 " * 20, "w6"], TOKENIZER)
    with pytest.raises(ValueError, match="positions"):
        speed.shared_prompt_log_probs(deep_llama(), batch)


@pytest.mark.parametrize("trick", [speed.response_only_log_probs, speed.shared_prompt_token_log_probs])
def test_the_mask_must_be_boolean(trick):
    batch = pair_batch(EVEN)
    batch["response_mask"] = batch["response_mask"].long()
    with pytest.raises(TypeError, match="boolean"):
        trick(deep_llama(), batch)


@pytest.mark.parametrize("likelihood", [None, 0.1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trick", [speed.last_token_scores, speed.shared_prompt_scores])
def test_scores_equal_the_plain_reward_model(case, likelihood, trick):
    model = RewardModel(deep_llama(torch.float32), likelihood)
    torch.nn.init.normal_(model.head.weight)
    prompts, chosen, rejected = (token_ids(texts) for texts in zip(*CASES[case]))
    arguments = (prompts * 2, chosen + rejected, PAD, torch.device("cpu"))
    assert_same(model, score_tokens, trick, *arguments, tolerance=1e-5)


@pytest.mark.parametrize("prompts", [["w2 w3", "w4 w5"], ["w2", "w3 w4 w5 w6"]], ids=["even", "padded on the left"])
def test_log_probs_and_values_of_samples_equal_the_plain_pass(prompts):
    model, value_model = deep_llama(), ValueModel(deep_llama())
    torch.nn.init.normal_(value_model.head.double().weight)
    generator = torch.Generator().manual_seed(1)
    samples = sample(
        model, token_ids(prompts * 3), max_new_tokens=5, eos_token_id=1, pad_token_id=0, generator=generator
    )
    assert not samples.response_mask.all()  # a response has ended early
    assert_same(model, response_log_probs, speed.response_only_sample_log_probs, samples, 0.7)

    def plain_values(value_model, samples):
        return response_values(value_model, samples).masked_fill(~samples.response_mask, 0.0)

    assert_same(value_model, plain_values, speed.response_only_values, samples)
    with pytest.raises(ValueError, match="temperature"):
        speed.response_only_sample_log_probs(model, samples, 0.0)


def test_parts_hold_each_row_once_and_no_more_than_the_tokens():
    lengths = torch.tensor([5, 1, 9, 2, 2, 30, 4])
    mask = torch.arange(30) < lengths[:, None]
    mask[:, 0] = False  # a prompt: what counts is where the last response token stands
    mask[1, 0] = True
    parts = speed.length_sorted_parts(mask, tokens=10)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    for part in parts:
        assert len(part) == 1 or len(part) * int(lengths[part].max()) <= 10
    assert [sorted(lengths[part].tolist()) for part in parts] == [[1, 2, 2], [4, 5], [9], [30]]


def trained(train, model, *args, **tricks) -> torch.Tensor:
    train(model, TOKENIZER, *args, progress=False, **tricks)
    return weights_of(model)


def test_training_with_the_tricks_ends_where_the_plain_loop_ends():
    steps = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    demonstrations = [{"prompt": p, "response": c} for p, c, _ in RAGGED]
    preferences = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in RAGGED]
    plain = trained(train_sft, deep_llama(), demonstrations, SFTConfig(**steps))
    for tricks in ({"log_probs_fn": speed.response_only_log_probs}, {"part_tokens": 6}):
        assert_near(trained(train_sft, deep_llama(), demonstrations, SFTConfig(**steps), **tricks), plain, 1e-8)
    plain = trained(train_dpo, deep_llama(), preferences, DPOConfig(**steps))
    for trick in (speed.response_only_sequence_log_probs, speed.shared_prompt_log_probs):
        fast = trained(train_dpo, deep_llama(), preferences, DPOConfig(**steps), log_probs_fn=trick)
        assert_near(fast, plain, 1e-8)
    config = RewardConfig(**steps, center_coef=0.0)
    plain = trained(train_reward_model, RewardModel(deep_llama(torch.float32)), preferences, config)
    for trick in (speed.last_token_scores, speed.shared_prompt_scores):
        fast = trained(train_reward_model, RewardModel(deep_llama(torch.float32)), preferences, config, scores_fn=trick)
        assert_near(fast, plain, 1e-4)


def test_ppo_with_the_tricks_ends_where_the_plain_loop_ends():
    def length(prompts, responses):
        return torch.tensor([float(len(response.split())) for response in responses])

    prompts = [p for p, _, _ in RAGGED]
    config = PPOConfig(steps=2, batch_size=4, epochs=2, learning_rate=1e-2, value_warmup=0, max_new_tokens=4)
    plain = trained(train_ppo, deep_llama(), prompts, length, config)
    tricks = {"log_probs_fn": speed.response_only_sample_log_probs, "values_fn": speed.response_only_values}
    assert_near(trained(train_ppo, deep_llama(), prompts, length, config, **tricks), plain, 1e-6)
    tricks |= {"trust_sampler": True, "for_sampling": for_sampling}
    trusting = trained(train_ppo, deep_llama(), prompts, length, config, **tricks)
    assert_near(trusting, plain, 1e-4)  # the sampler notes its log-probabilities in float32


def test_the_reference_is_the_same_in_batches_of_pairs():
    model, data = deep_llama(), pair_batch(RAGGED)
    plain = reference_log_probs(model, data)
    for size in (2, 4, 100):
        shared = reference_log_probs(model, data, size, log_probs_fn=speed.shared_prompt_log_probs)
        assert_near(shared, plain, 1e-10)


def test_hidden_at_some_places_is_hidden_there():
    for model in (deep_llama(), tiny_llama(dtype=torch.float64)):
        ids = torch.randint(2, 12, (3, 7))
        at = torch.tensor([20, 0, 5, 5, 13])  # any order, repeats allowed
        assert_near(model.hidden(ids, at=at), model.hidden(ids).flatten(0, 1)[at], 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lean_norms_equal_the_plain_norms(dtype):
    model = deep_llama(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    lean = speed.lean_norms(copy.deepcopy(model))
    batch = pair_batch(RAGGED)
    for expected, actual in zip(
        value_and_gradient(model, demonstration_log_probs, batch),
        value_and_gradient(lean, demonstration_log_probs, batch),
    ):
        scale = expected.abs().max()
        assert_near(actual / scale, expected / scale, TOLERANCE[dtype])
    assert lean.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    norm = speed.lean_norms(RMSNorm(8, 1e-2).double())
    assert torch.autograd.gradcheck(lambda x, w: speed._LeanRMSNorm.apply(x, w, 1e-2), (x, norm.weight))


def test_a_lean_norm_under_autocast_is_the_plain_one():
    norm, x = RMSNorm(8, 1e-5), torch.randn(2, 8, dtype=torch.bfloat16)
    expected = norm(x)
    assert torch.equal(speed.lean_norms(norm)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lean_norm_in_half_precision_is_the_plain_one(dtype):
    """Its own formula would round the norm, the scale and each product to three digits on the way."""
    norm, x = RMSNorm(256, 1e-5).to(dtype), torch.randn(20, 256, dtype=dtype)
    expected = norm(x)
    assert torch.equal(speed.lean_norms(norm)(x), expected)
