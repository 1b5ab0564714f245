"""Whole PPO updates by `train_ppo` beside TRL 1.12's, in float64.

TRL's side is in golden/ppo_update.json (benchmarks/golden_ppo.py made it). Both start from the same
weights with the same sampled tokens and visit minibatches in the same order. `train_ppo` runs as it stands, from
scores to the last optimizer step; what TRL does differently is handed to it, through its own arguments as far as they
reach, so this file is also the list of TRL's peculiarities:

1. The score arrives one position behind EOS, where the response has room for it, and the value model is asked about
   that position too (`longer`).
2. Rewards may be whitened, without moving their mean, and the KL penalty may be k3 (`trl_rewards`).
3. The value loss counts half (`vf_coef`), the gradient is not clipped, the value head has no bias.
4. The temperature is .7 + 1e-7.

Each changes the update by 1e-5 or more, except two that are below the 1e-6 to which the sides agree: without `vf_coef`
it moves by 8e-7, because Adam divides a factor out again, and at exactly .7 by 1.4e-7.

The old log-probabilities of TRL are float32, because `generate` of transformers returns float32: k3 and a sum over a
response raise that to 1e-6 in the returns; losses and weights stay below.
"""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from toys import PAD, ToyTokenizer, golden_llama, golden_scorer

from cs336_alignment import ppo
from cs336_alignment.generate import Samples
from cs336_alignment.models import RewardModel, ValueModel
from cs336_alignment.optimize import shuffled_batch
from cs336_alignment.tokens import collate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ppo_update.json").read_text(encoding="utf-8"))
EPOCHS, MINIBATCHES = 4, 4
MAX_GRAD_NORM, BIAS = torch.inf, False  # TRL's: no clipping, and no bias in the value model's head


def longer(mask: Tensor) -> Tensor:
    """TRL's second mask: one position more than the response, where there is room."""
    return mask | torch.cat([mask[:, :1], mask[:, :-1]], dim=1)


def trl_rewards(kl_estimator: str, whiten_rewards: bool, scores, log_probs, ref_log_probs, mask, beta) -> Tensor:
    """TRL's rewards (B, T) from the package's functions."""
    nothing = torch.zeros_like(log_probs)
    score = ppo.shaped_rewards(scores, nothing, nothing, longer(mask), 0.0)
    kl = torch.where(mask, ppo.kl_estimate(log_probs, ref_log_probs, kl_estimator), 0.0)
    rewards = score - beta * kl
    return ppo.whiten(rewards, longer(mask), shift_mean=False) if whiten_rewards else rewards


def sampled(case: dict) -> Samples:
    """TRL's responses. Lengths come from TRL too: a padding token says nothing by itself."""
    prompts, responses = torch.tensor(case["queries"]), torch.tensor(case["responses"])
    mask = torch.arange(responses.shape[1]) <= torch.tensor(case["sequence_lengths"])[:, None]
    log_probs = torch.where(mask, torch.tensor(case["logprobs"], dtype=torch.float64), 0.0)
    return Samples(prompts, prompts != PAD, responses, mask, log_probs, torch.tensor(case["finished"]).bool())


def update(case: dict) -> dict:
    """One iteration of `train_ppo` on a case's samples: losses, advantages and the models it ends with."""
    settings, before, samples, tokenizer = GOLDEN["settings"], GOLDEN["weights_before"], sampled(case), ToyTokenizer()
    policy, ref_model = (golden_llama(before[name]).double() for name in ("policy", "ref_model"))
    value_model = golden_scorer(ValueModel, before["value_model"]).double()
    scorer = golden_scorer(RewardModel, before["reward_model"]).double()
    value_model.head.bias.requires_grad_(BIAS)
    config = ppo.PPOConfig(
        steps=1, batch_size=len(samples.finished), epochs=EPOCHS, minibatches=MINIBATCHES,
        learning_rate=settings["learning_rate"], value_learning_rate=settings["learning_rate"],
        value_warmup=0, warmup=0, decay=0,
        beta=settings["kl_coef"], gamma=settings["gamma"], lam=settings["lam"],
        clip_eps=settings["cliprange"], value_clip_eps=settings["cliprange_value"],
        max_new_tokens=settings["response_length"], temperature=settings["temperature"] + 1e-7,
        missing_eos_penalty=settings["missing_eos_penalty"], seed=settings["seed"],
    )  # fmt: skip
    seen = {"policy_losses": [], "value_losses": []}

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        ids = [tokenizer.encode(p + " " + r, add_special_tokens=False) for p, r in zip(prompts, responses)]
        with torch.no_grad():
            seen["scores"] = scorer(*collate(ids, PAD))
        return seen["scores"]

    def advantages_fn(rewards, values, mask, gamma, lam):
        advantages, seen["returns"] = ppo.gae(rewards, values, longer(mask), gamma, lam)
        seen["advantages"] = ppo.whiten(advantages, mask)  # as train_ppo is about to
        return advantages, seen["returns"]

    def policy_loss(*args):
        loss = ppo.ppo_policy_loss(*args)
        seen["policy_losses"].append(loss.item())
        return loss

    def value_loss(values, old_values, returns, mask, clip_eps):
        loss = ppo.ppo_value_loss(values, old_values, returns, longer(mask), clip_eps)
        seen["value_losses"].append(loss.item())
        return settings["vf_coef"] * loss

    # train_ppo shuffles the prompts; these end up in the order of the samples.
    rows = shuffled_batch(config.batch_size, config.batch_size, 0, config.seed).tolist()
    prompts = [""] * len(rows)
    for row, ids, mask in zip(rows, samples.prompt_ids, samples.prompt_mask):
        prompts[row] = tokenizer.decode(ids[mask])
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ppo, "sample", lambda *_, **__: samples))
        unclipped = partial(ppo.optimizer_step, max_grad_norm=MAX_GRAD_NORM)
        stack.enter_context(mock.patch.object(ppo, "optimizer_step", unclipped))
        ppo.train_ppo(
            policy, tokenizer, prompts, score, config, ref_model=ref_model, value_model=value_model,
            rewards_fn=partial(trl_rewards, case["kl_estimator"], case["whiten_rewards"]),
            advantages_fn=advantages_fn, policy_loss_fn=policy_loss, value_loss_fn=value_loss, progress=False,
        )  # fmt: skip
    seen["scores"] = seen["scores"] - config.missing_eos_penalty * ~samples.finished
    return seen | {"policy": policy, "value_model": value_model}


def farthest(ours, theirs) -> float:
    """The largest difference between two lists or tensors of numbers."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {tuple(ours.shape)} beside {tuple(theirs.shape)}")
    return (ours - theirs).abs().max().item()


def compare(case: dict) -> dict:
    """The largest differences of one case, and how much of a test it was."""
    ours, samples = update(case), sampled(case)
    after = case["weights_after"]
    head = {"score.weight": ours["value_model"].head.weight}
    weights = {
        "policy": dict(ours["policy"].named_parameters()),
        "value_model": dict(ours["value_model"].backbone.named_parameters()) | head,
    }
    before = GOLDEN["weights_before"]
    return {
        "kl_estimator": case["kl_estimator"],
        "whiten_rewards": case["whiten_rewards"],
        "responses": len(case["finished"]),
        "tokens": int(samples.response_mask.sum()),
        "unfinished": int((~samples.finished).sum()),
        "optimizer_steps": len(ours["policy_losses"]),
        "largest_clipped_fraction": max(case["clipped"]),
        "largest_move_of_a_weight": max(farthest(after[m][name], before[m][name]) for m in after for name in after[m]),
        "largest_differences": {
            "policy losses": farthest(ours["policy_losses"], case["policy_losses"]),
            "value losses": farthest(ours["value_losses"], case["value_losses"]),
            "policy weights": max(farthest(weights["policy"][name], x) for name, x in after["policy"].items()),
            "value weights": max(farthest(weights["value_model"][name], x) for name, x in after["value_model"].items()),
        },
        "on_the_way": {name: farthest(ours[name], case[name]) for name in ("scores", "advantages", "returns")},
    }
