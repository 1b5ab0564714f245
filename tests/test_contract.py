"""The rules that all loss functions of the package keep, each rule tested on every function.

1. What lies behind a mask never matters: not to a value, not to a gradient, not even if it is inf or NaN.
2. Half precision is computed and returned in float32; float64 stays float64.
3. No function detaches or changes its arguments: what is held fixed is the loop's decision.
4. A mean over nothing is 0 with gradient 0.
5. Gradients are those of the values (finite differences).
"""

import math
from functools import partial

import pytest
import torch
from toys import assert_near

from cs336_alignment.dpo import dpo_gradient_weight, dpo_loss, implicit_reward
from cs336_alignment.exact import kl_divergence, log_partition, objective, optimal_policy
from cs336_alignment.ppo import (
    gae,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
    shaped_rewards,
    whiten,
)
from cs336_alignment.reward import bradley_terry_prob, reward_model_loss
from cs336_alignment.sft import sft_loss
from cs336_alignment.tokens import masked_mean, sequence_log_probs, token_log_probs


def sequence_log_probs_of(mask, x):
    """`sequence_log_probs` as a function of one number a position: a vocabulary of two, logits x and -x."""
    zeros = torch.zeros_like(mask, dtype=torch.long)
    batch = {"input_ids": zeros, "labels": zeros, "response_mask": mask}
    return sequence_log_probs(lambda ids: torch.stack([x, -x], dim=-1), batch)


SCORES = torch.tensor([0.75, -1.25, 0.5, 2.0, -0.5])  # the same numbers in every precision

# name: (number of (B, T) tensors, function of the mask and of them)
MASKED = {
    "masked_mean": (1, lambda mask, x: masked_mean(x, mask)),
    "masked_mean, dim 0": (1, lambda mask, x: masked_mean(x, mask, dim=0)),
    "masked_mean, dim -1": (1, lambda mask, x: masked_mean(x, mask, dim=-1)),
    "sequence_log_probs": (1, sequence_log_probs_of),
    "sft_loss": (1, lambda mask, x: sft_loss(x, mask)),
    "reinforce_loss": (2, lambda mask, x, a: reinforce_loss(x, a, mask)),
    "shaped_rewards": (2, lambda mask, x, ref: shaped_rewards(SCORES.to(x)[: len(x)], x, ref, mask, 0.3)),
    "gae": (2, lambda mask, r, v: torch.stack(gae(r, v, mask, 0.9, 0.8))),
    "whiten": (1, lambda mask, x: whiten(x, mask)),
    "whiten, keeping the mean": (1, lambda mask, x: whiten(x, mask, shift_mean=False)),
    "ppo_policy_loss": (3, lambda mask, x, old, a: ppo_policy_loss(x, old, a, mask, 0.2)),
    "ppo_value_loss": (3, lambda mask, v, old, r: ppo_value_loss(v, old, r, mask, 0.2)),
    "ppo_value_loss, not clipped": (3, lambda mask, v, old, r: ppo_value_loss(v, old, r, mask)),
}
# name: (number of (B,) tensors, function of them)
UNMASKED = {
    "token_log_probs": (3, lambda *x: token_log_probs(torch.stack(x, dim=-1), torch.tensor([0, 2, 1, 1, 0]))),
    "bradley_terry_prob": (2, bradley_terry_prob),
    "reward_model_loss": (2, reward_model_loss),
    "reward_model_loss, margin": (3, lambda c, r, m: reward_model_loss(c, r, m, center_coef=0.1)),
    "kl_estimate k1": (2, lambda x, ref: kl_estimate(x, ref, "k1")),
    "kl_estimate k2": (2, lambda x, ref: kl_estimate(x, ref, "k2")),
    "kl_estimate k3": (2, lambda x, ref: kl_estimate(x, ref, "k3")),
    "implicit_reward": (2, lambda x, ref: implicit_reward(x, ref, 0.1)),
    "dpo_loss": (4, lambda *x: dpo_loss(*x, beta=0.7)),
    "dpo_loss, smoothed": (4, lambda *x: dpo_loss(*x, beta=0.7, label_smoothing=0.1)),
    "dpo_gradient_weight": (4, lambda *x: dpo_gradient_weight(*x, beta=0.7)),
    "log_partition": (2, lambda ref, r: log_partition(ref, r, 0.7)),
    "optimal_policy": (2, lambda ref, r: optimal_policy(ref, r, 0.7)),
    "kl_divergence": (2, kl_divergence),
    "objective": (3, lambda x, ref, r: objective(x, ref, r, 0.7)),
}
masked = pytest.mark.parametrize("name", MASKED)
unmasked = pytest.mark.parametrize("name", UNMASKED)

PREFIX_MASK = torch.arange(6) < torch.tensor([6, 3, 0, 1, 4]).unsqueeze(1)  # ragged, with an empty row
HOLED_MASK = PREFIX_MASK & torch.tensor([True, False, True, True, False, True])  # gae alone does not take this


def masks(name: str) -> list[torch.Tensor]:
    return [PREFIX_MASK] if name == "gae" else [PREFIX_MASK, HOLED_MASK]


def draw(count: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def value_and_gradients(function, inputs):
    """The output, and the gradients of a fixed random mixture of its entries."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=value.dtype)
    gradients = torch.autograd.grad((value * weights).sum(), inputs, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


@masked
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_what_lies_behind_a_mask_changes_neither_value_nor_gradient(name, garbage):
    """`x * mask` would fail here: 0 * NaN is NaN. So would replacing too late: the gradient is NaN then."""
    count, function = MASKED[name]
    for mask in masks(name):
        clean = draw(count, mask.shape)
        dirty = [x.masked_fill(~mask, garbage) for x in clean]
        value, gradients = value_and_gradients(partial(function, mask), clean)
        dirty_value, dirty_gradients = value_and_gradients(partial(function, mask), dirty)
        assert value.isfinite().all() and value.abs().sum() > 0
        assert torch.equal(value, dirty_value)
        for gradient, dirty_gradient in zip(gradients, dirty_gradients, strict=True):
            assert torch.equal(gradient, dirty_gradient)
            assert (dirty_gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", ["shaped_rewards", "gae", "whiten", "whiten, keeping the mean"])
def test_what_comes_out_behind_the_mask_is_0(name):
    count, function = MASKED[name]
    for mask in masks(name):
        output = function(mask, *(x.masked_fill(~mask, math.nan) for x in draw(count, mask.shape)))
        assert (output[..., ~mask] == 0).all()


@masked
def test_an_error_in_front_of_the_mask_stays_visible(name):
    """Masks hide what must not count. A NaN that does count must come out: hiding it would hide a bug."""
    count, function = MASKED[name]
    for i in range(count):
        if (name, i) == ("ppo_value_loss, not clipped", 1):
            continue  # old values are not used without clipping
        inputs = draw(count, PREFIX_MASK.shape)
        inputs[i][1, 1] = math.nan
        assert function(PREFIX_MASK, *inputs).isnan().any()


@masked
def test_over_an_empty_mask_everything_is_0_with_gradient_0(name):
    count, function = MASKED[name]
    for shape in ((2, 3), (2, 0), (0, 3)):
        mask = torch.zeros(shape, dtype=torch.bool)
        inputs = [torch.full(shape, math.nan, requires_grad=True) for _ in range(count)]
        value = function(mask, *inputs)
        assert (value == 0).all()
        used = inputs[:1] if name == "ppo_value_loss, not clipped" else inputs
        for gradient in torch.autograd.grad(value.sum(), used):
            assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["reward_model_loss", "reward_model_loss, margin", "dpo_loss", "dpo_loss, smoothed"])
def test_a_loss_over_no_pairs_is_0_with_gradient_0(name):
    count, function = UNMASKED[name]
    inputs = [torch.zeros(0, requires_grad=True) for _ in range(count)]
    loss = function(*inputs)
    assert loss == 0
    assert all(g.shape == (0,) for g in torch.autograd.grad(loss, inputs))


@masked
def test_masks_must_be_boolean(name):
    """An integer mask would index instead of select, a float one would multiply; both go wrong quietly."""
    count, function = MASKED[name]
    for dtype in (torch.long, torch.float32):
        with pytest.raises(TypeError, match="boolean|Boolean"):
            function(PREFIX_MASK.to(dtype), *draw(count, PREFIX_MASK.shape))


@masked
def test_shapes_must_be_those_of_the_mask(name):
    """Broadcasting (B,) against (B, B) is how many wrong losses come about."""
    count, function = MASKED[name]
    for i in range(count):
        inputs = draw(count, PREFIX_MASK.shape)
        inputs[i] = inputs[i][:, :1]
        with pytest.raises((ValueError, IndexError)):
            function(PREFIX_MASK, *inputs)


@masked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_functions_compute_half_precision_in_float32(name, dtype):
    count, function = MASKED[name]
    half = draw(count, PREFIX_MASK.shape, dtype=dtype)
    output = function(PREFIX_MASK, *half)
    assert output.dtype == torch.float32
    assert torch.equal(output, function(PREFIX_MASK, *(x.float() for x in half)))


@unmasked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_functions_compute_half_precision_in_float32(name, dtype):
    count, function = UNMASKED[name]
    half = draw(count, (5,), dtype=dtype)
    output = function(*half)
    assert output.dtype == torch.float32
    assert torch.equal(output, function(*(x.float() for x in half)))


@masked
def test_masked_functions_keep_float64(name):
    count, function = MASKED[name]
    assert function(PREFIX_MASK, *draw(count, PREFIX_MASK.shape)).dtype == torch.float64


@unmasked
def test_functions_keep_float64(name):
    count, function = UNMASKED[name]
    assert function(*draw(count, (5,))).dtype == torch.float64


def test_a_number_given_as_an_option_keeps_its_float64_digits():
    """0.1 is another number in float32; passed through it, a float64 loss would be right to 9 digits only."""
    x = draw(4, (5,))
    as_tensor = torch.full((5,), 0.1, dtype=torch.float64)
    assert dpo_loss(*x, beta=0.7, label_smoothing=0.1) == dpo_loss(*x, beta=0.7, label_smoothing=as_tensor)
    assert reward_model_loss(*x[:2], margin=0.1) == reward_model_loss(*x[:2], margin=as_tensor)


@masked
def test_gradients_of_masked_functions_agree_with_finite_differences(name):
    """`gradcheck` moves every input a little; so it also shows that nothing on the way is detached."""
    count, function = MASKED[name]
    for mask in masks(name):
        inputs = [x.requires_grad_() for x in draw(count, mask.shape, seed=1)]
        assert torch.autograd.gradcheck(partial(function, mask), inputs)


@unmasked
def test_gradients_of_functions_agree_with_finite_differences(name):
    count, function = UNMASKED[name]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in draw(count, (5,), seed=1)])


@masked
def test_masked_functions_leave_their_arguments_as_they_are(name):
    count, function = MASKED[name]
    inputs, mask = draw(count, PREFIX_MASK.shape), PREFIX_MASK.clone()
    function(mask, *inputs)
    assert torch.equal(mask, PREFIX_MASK)
    assert all(torch.equal(x, y) for x, y in zip(inputs, draw(count, PREFIX_MASK.shape), strict=True))


@unmasked
def test_functions_leave_their_arguments_as_they_are(name):
    count, function = UNMASKED[name]
    inputs = draw(count, (5,))
    function(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, draw(count, (5,)), strict=True))


@pytest.mark.gpu
@masked
def test_masked_functions_give_the_same_on_a_gpu(name):
    count, function = MASKED[name]
    inputs = draw(count, PREFIX_MASK.shape)
    on_gpu = function(PREFIX_MASK.cuda(), *(x.cuda() for x in inputs))
    assert on_gpu.device.type == "cuda"
    assert_near(on_gpu.cpu(), function(PREFIX_MASK, *inputs), 1e-12)
