"""A GPU computes what the CPU computes: log-probabilities, gradients, samples, and a step of every trainer.

Two precisions: float32, which must agree to rounding, and bfloat16 products with float32 weights, which is what the
loops use on a GPU. All tests are skipped where there is no GPU. COURSE_GPU_TESTS_ON=cpu puts the CPU in the GPU's
place and the large models at a hundredth of their size: that shows that every line runs, and nothing about a GPU.
Nobody has run these tests on a GPU yet; the tolerances are estimates.
"""

import contextlib
import copy
import math
import os
from functools import partial

import pytest
import torch
from toys import EOS, PAD, ToyTokenizer

from cs336_alignment import dpo, ppo, reward, sft, speed, world_training
from cs336_alignment.decode import for_sampling
from cs336_alignment.generate import Samples, response_log_probs, sample
from cs336_alignment.models import (
    HFCausalLM,
    Llama,
    ModelConfig,
    RewardModel,
    ValueModel,
    count_parameters,
    load_model,
    save_model,
)
from cs336_alignment.tokens import masked_token_log_probs, sequence_log_probs, tokenize_prompt_and_output
from cs336_alignment.world import World

DEVICE = os.environ.get("COURSE_GPU_TESTS_ON", "cuda")
pytestmark = pytest.mark.gpu(cpu_too=True)

TOKENIZER = ToyTokenizer()
DEMONSTRATIONS = [
    {"prompt": f"w{2 + i} w{9 - i}", "response": " ".join(f"w{2 + (i * j) % 10}" for j in range(1 + 3 * i)) + " <eos>"}
    for i in range(6)
]
PREFERENCES = [
    {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
    for a, b in zip(DEMONSTRATIONS, DEMONSTRATIONS[1:] + DEMONSTRATIONS[:1])
]
PROMPTS = [[5, 6, 7], [4], [3, 2], [10, 11, 2, 2]]
MODULES = (sft, reward, dpo, ppo, speed, world_training)  # that choose a precision by the device
SHORT = {"steps": 2, "batch_size": 6, "warmup": 0, "decay": 0, "learning_rate": 1e-3}


def llama() -> Llama:
    torch.manual_seed(0)
    shape = dict(vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return Llama(ModelConfig(**shape, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1))


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request, monkeypatch) -> str:
    """The precision of all that runs on DEVICE; what runs on the CPU to compare with is always plain float32.

    The loops choose bfloat16 by themselves on a GPU. Here it is set from outside, so that float32 can be had too.
    """
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default: products of float32 are float32
    for module in MODULES:
        monkeypatch.setattr(module, "autocast", lambda device: on_device(request.param))
    return request.param


def on_device(precision: str) -> contextlib.AbstractContextManager:
    if precision == "bfloat16":
        return torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def plain_float32():
    """For the side that is compared with: no loop computes in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "autocast", lambda device: contextlib.nullcontext())
        yield


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().flatten().double().cpu() for x in tensors])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# -------------------------------------------------------------------------------- log-probabilities and gradients


def sft_objective(model, device) -> torch.Tensor:
    data = tokenize_prompt_and_output(*([d[k] for d in DEMONSTRATIONS] for k in ("prompt", "response")), TOKENIZER)
    batch = {name: x.to(device) for name, x in data.items()}
    log_probs = masked_token_log_probs(model(batch["input_ids"]), batch["labels"], batch["response_mask"])
    return sft.sft_loss(log_probs, batch["response_mask"])


def dpo_objective(model, device) -> torch.Tensor:
    prompts = [pair["prompt"] for pair in PREFERENCES] * 2
    responses = [pair[side] for side in ("chosen", "rejected") for pair in PREFERENCES]
    data = tokenize_prompt_and_output(prompts, responses, TOKENIZER)
    log_probs = sequence_log_probs(model, {name: x.to(device) for name, x in data.items()})
    return dpo.dpo_loss(*log_probs.chunk(2), *(log_probs.detach() - 1).chunk(2), beta=0.1)


def fixed_samples(device) -> Samples:
    """What a model said on the CPU, moved to the device: the two have no random numbers in common."""
    with torch.autocast("cpu", enabled=False):
        samples = sample(
            llama(), PROMPTS, max_new_tokens=7, eos_token_id=EOS, pad_token_id=PAD,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return Samples(*(getattr(samples, name).to(device) for name in samples.__dataclass_fields__))


def ppo_objective(model, device) -> torch.Tensor:
    samples = fixed_samples(device)
    advantages = torch.linspace(-1, 1, samples.response_mask.numel(), device=device).view_as(samples.log_probs)
    log_probs = response_log_probs(model, samples)
    return ppo.ppo_policy_loss(log_probs, samples.log_probs, advantages, samples.response_mask, 0.2)


def value_objective(model, device) -> torch.Tensor:
    samples = fixed_samples(device)
    values = ppo.response_values(model, samples)
    return ppo.ppo_value_loss(values, torch.zeros_like(values), samples.log_probs, samples.response_mask)


def reward_objective(model, device) -> torch.Tensor:
    mask = torch.arange(8) < torch.tensor([[8], [3], [5], [1]])
    ids = (2 + torch.arange(32).view(4, 8) % 9).masked_fill(~mask, PAD)
    chosen, rejected = model(ids.to(device), mask.to(device)).chunk(2)
    return reward.reward_model_loss(chosen, rejected, center_coef=0.1)


def with_a_head(kind):
    model = kind(llama())
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


OBJECTIVES = {
    "SFT": (llama, sft_objective),
    "DPO": (llama, dpo_objective),
    "PPO": (llama, ppo_objective),
    "values": (partial(with_a_head, ValueModel), value_objective),
    "reward": (partial(with_a_head, RewardModel), reward_objective),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_cpu(name, precision):
    """float32: to rounding. bfloat16: losses to a few percent, and the gradient points the same way."""
    make, objective = OBJECTIVES[name]
    expected_model = make()
    expected = objective(expected_model, "cpu")
    expected.backward()
    model = copy.deepcopy(expected_model).to(DEVICE)
    model.zero_grad()
    with on_device(precision):
        loss = objective(model, DEVICE)
    loss.backward()
    assert loss.device.type == torch.device(DEVICE).type and loss.dtype == torch.float32
    got = dict(model.named_parameters())
    both = [(p.grad, got[n].grad) for n, p in expected_model.named_parameters() if p.grad is not None]
    theirs, ours = (flat(side) for side in zip(*both))
    exact = precision == "float32"
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5 if exact else 0.05, abs_tol=1e-5 if exact else 0.05)
    assert cosine(ours, theirs) > (1 - 1e-6 if exact else 0.99)
    assert (ours - theirs).norm() < (1e-4 if exact else 0.15) * theirs.norm()


# -------------------------------------------------------------------------------------------------- the sampler


@torch.no_grad()
@pytest.mark.parametrize("laid_out", [False, True], ids=["plain", "for_sampling"])
def test_a_sample_has_the_log_probs_that_teacher_forcing_gives(precision, laid_out):
    """On the device itself, at both precisions; and greedy float32 responses are the CPU's, token for token."""
    model, request = llama(), dict(max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD)
    greedy = sample(model, PROMPTS, **request, temperature=0)
    model.to(DEVICE)
    with on_device(precision):
        sampler = for_sampling(model) if laid_out else model
        samples = sample(sampler, PROMPTS, **request, generator=torch.Generator(DEVICE).manual_seed(0))
        again = response_log_probs(model, samples)
        greedy_there = sample(sampler, PROMPTS, **request, temperature=0)
    assert samples.response_ids.device.type == torch.device(DEVICE).type
    assert samples.log_probs.dtype == again.dtype == torch.float32
    difference = (samples.log_probs - again)[samples.response_mask].abs()
    assert difference.max() < 1e-4 if precision == "float32" else difference.mean() < 0.05
    if precision == "float32":
        assert greedy_there.responses() == greedy.responses()


# ---------------------------------------------------------------------------------------- a step of every trainer


def words_used(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(set(response.split()))) for response in responses])


def run_ppo(model, progress: bool, **kwargs):
    config = ppo.PPOConfig(**SHORT | {"steps": 1, "batch_size": 4}, epochs=1, value_warmup=0, max_new_tokens=7)
    prompts = [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS]
    samples = fixed_samples(next(model.parameters()).device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "sample", lambda *_, **__: samples)
        return ppo.train_ppo(model, TOKENIZER, prompts, words_used, config, progress=progress, **kwargs)


TRAINERS = {
    "SFT": (
        llama,
        lambda model, **k: sft.train_sft(model, TOKENIZER, DEMONSTRATIONS, sft.SFTConfig(**SHORT, replay_rows=0), **k),
    ),
    "reward": (
        lambda: RewardModel(llama(), likelihood=1.0),
        lambda model, **k: reward.train_reward_model(model, TOKENIZER, PREFERENCES, reward.RewardConfig(**SHORT), **k),
    ),
    "DPO": (llama, lambda model, **k: dpo.train_dpo(model, TOKENIZER, PREFERENCES, dpo.DPOConfig(**SHORT), **k)),
    "PPO": (llama, run_ppo),
}


TRICKS = {
    "SFT": [{"log_probs_fn": speed.response_only_log_probs}, {"part_tokens": 20}],
    "reward": [{"scores_fn": speed.last_token_scores}, {"scores_fn": speed.shared_prompt_scores}],
    "DPO": [{"log_probs_fn": speed.response_only_sequence_log_probs}, {"log_probs_fn": speed.shared_prompt_log_probs}],
    "PPO": [{"log_probs_fn": speed.response_only_sample_log_probs, "values_fn": speed.response_only_values}],
}
FORMS = [(name, tricks) for name in TRAINERS for tricks in [{}, *TRICKS[name]]]


def named(form) -> str | None:
    name, tricks = form
    return " ".join([name, *(getattr(x, "__name__", "parts") for x in tricks.values())])


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_a_step_of_every_trainer_is_the_cpus(form, precision):
    """The plain loop on the CPU; on the device the plain one and those with the tricks of `speed` (with lean norms).

    The logs, and the direction in which the weights moved. (Adam's first steps are signs: an entry whose gradient
    is nearly 0 may go either way, so entry by entry the weights need not agree.)"""
    name, tricks = form
    make, train = TRAINERS[name]
    start = make()
    expected_model, model = copy.deepcopy(start), copy.deepcopy(start).to(DEVICE)
    with plain_float32():
        expected = train(expected_model, progress=False)
    log = train(speed.lean_norms(model) if tricks else model, progress=False, **tricks)
    exact = precision == "float32"
    for line, other in zip(log, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"accuracy", "clip_fraction"}:  # they jump where two numbers are nearly equal
            tolerance = 1e-3 if exact else 0.1
            assert math.isclose(line[key], other[key], rel_tol=tolerance, abs_tol=tolerance), (key, line, other)
    before, there, here = (flat(m.parameters()) for m in (start, model, expected_model))
    assert (there - before).norm() > 0
    assert cosine(there - before, here - before) > (0.99 if exact else 0.8)


def test_ppo_with_a_trusted_captured_sampler_takes_a_step(precision):
    """The whole fast loop, with its own samples: the ratios of the first pass are one to rounding, so nothing clips."""
    model, prompts = llama().to(DEVICE), [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS]
    config = ppo.PPOConfig(
        **SHORT | {"batch_size": 4}, epochs=1, minibatches=1, value_warmup=0, max_new_tokens=7, whiten_advantages=False
    )
    before = flat(model.parameters())
    tricks = TRICKS["PPO"][0] | {"trust_sampler": True, "for_sampling": for_sampling}
    log = ppo.train_ppo(model, TOKENIZER, prompts, words_used, config, progress=False, **tricks)
    assert all(math.isfinite(x) for line in log for x in line.values()) and log[0]["clip_fraction"] == 0
    assert (flat(model.parameters()) - before).norm() > 0


def test_what_a_gpu_saved_a_cpu_reads(tmp_path, precision):
    """A checkpoint and a model's folder: written on the device, read on the CPU, the same weights."""
    model, path = llama().to(DEVICE), tmp_path / "run.pt"
    config = sft.SFTConfig(**SHORT, replay_rows=0)
    log = sft.train_sft(model, TOKENIZER, DEMONSTRATIONS, config, checkpoint=path, progress=False)
    there = flat(model.parameters())
    resumed = llama()
    assert sft.train_sft(resumed, TOKENIZER, DEMONSTRATIONS, config, checkpoint=path, progress=False) == log
    assert torch.equal(flat(resumed.parameters()), there)
    save_model(model, None, tmp_path / "model")
    read = Llama(model.config)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model" / "model.safetensors")
    read.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    assert torch.equal(flat(read.parameters()), there)


# ------------------------------------------------------------------------------------------------- at full size


def qwen2() -> HFCausalLM:
    """Qwen2's architecture with random bfloat16 weights: 494 million of them, the shape that is sold as 0.5 B."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    large = dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    small = dict(
        vocab_size=2000, hidden_size=112, intermediate_size=608, num_hidden_layers=3,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    config = Qwen2Config(**(small if DEVICE == "cpu" else large), max_position_embeddings=512, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    return HFCausalLM(model)


def long_records(count: int, words: int) -> list[dict]:
    """Records of some `words` tokens, ragged, of 100 words."""

    def text(seed: int, length: int) -> str:
        return " ".join(f"w{2 + (seed * 7 + j * j) % 100}" for j in range(length))

    return [
        {"prompt": text(i, words // 2), "response": text(i + 1, words // 2 - 5 * (i % 4)) + " <eos>"}
        | {"chosen": text(i + 2, words // 2) + " <eos>", "rejected": text(i + 3, words // 3) + " <eos>"}
        for i in range(count)
    ]


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE != "cpu" else 0.0


def test_half_a_billion_weights_in_bfloat16_take_steps_of_sft_and_dpo():
    """Eight steps of each, 16 rows of 128 tokens: SFT's loss falls, DPO's starts at log 2 and falls.

    Memory, estimated: weights, gradients and Adam's two moments in bfloat16, 4 x 2 bytes x 494 million = 3.7 GiB;
    activations, (16 x 896 + 3 x 4864) numbers of 2 bytes a token and layer, x 24 layers x 2,048 tokens = 2.6 GiB; the
    logits of 2,048 tokens x 151,936 words, 0.6 GiB in bfloat16, twice with their gradient, and 1.2 GiB for each of
    some three float32 copies on the way through log-softmax, of the responses' half: 3 GiB. Together 9 to 10 GiB at
    the peak; the test allows 16. With float32 weights, which long training needs (a bfloat16 weight has three digits,
    so small updates round to nothing), the first term is 7.4 GiB.
    """
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    model, records = qwen2(), long_records(16, 128)
    shape = {"steps": 8, "batch_size": 16, "warmup": 1, "decay": 0}
    if DEVICE != "cpu":
        assert count_parameters(model) == 494_032_768
    log = sft.train_sft(
        model, TOKENIZER, records, sft.SFTConfig(**shape, learning_rate=5e-4, replay_rows=0), progress=False
    )
    losses = [line["loss"] for line in log]
    assert losses[0] == pytest.approx(math.log(model.vocab_size), rel=0.1)  # it knows nothing yet
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5
    config = dpo.DPOConfig(**shape | {"batch_size": 8}, learning_rate=1e-4, beta=0.1)
    log = dpo.train_dpo(model, TOKENIZER, records[:8], config, progress=False)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert log[-1]["loss"] < log[0]["loss"] - 0.05 and log[-1]["margin"] > log[0]["margin"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    samples = sample(model, [[5, 6], [7]], max_new_tokens=4, eos_token_id=EOS, pad_token_id=PAD)
    assert samples.log_probs.isfinite().all()
    assert peak_gib() < 16


def test_the_gpu_profile_takes_steps_of_pretraining(precision):
    """A model of 100 million weights on documents of the large town: its loss falls from that of a uniform guess."""
    sizes = world_training.profile("test" if DEVICE == "cpu" else "gpu")
    model = world_training.new_model(sizes, DEVICE)
    config = world_training.PretrainingConfig(
        steps=20, batch_size=8, row_length=64, warmup=2, decay=5, learning_rate=sizes.pretraining.learning_rate
    )
    log = world_training.pretrain(model, World(sizes.world), config, progress=False)
    assert log[0]["loss"] == pytest.approx(math.log(sizes.model.vocab_size), rel=0.1)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5 and math.isfinite(log[-1]["held_out_loss"])


def test_a_folder_is_read_onto_the_device(tmp_path):
    """`load_model` with a device and a dtype, as `train --model FOLDER --device cuda` does."""
    world = World(world_training.profile("test").world)
    sizes = world_training.profile("test")
    save_model(world_training.new_model(sizes, DEVICE), world.tokenizer, tmp_path)
    model, _ = load_model(tmp_path, DEVICE, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {torch.device(DEVICE).type}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
