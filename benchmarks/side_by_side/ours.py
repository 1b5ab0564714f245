"""Our side: the package's own training loops and sampler, called as a user calls them.

Every loop draws its batch once a step; that is where the clock ticks, so the loops are measured as they are.
`variant` is "plain" (the loop with its defaults, as the lectures read it), "fast" (the same loop with the tricks of
`cs336_alignment.speed` as arguments, on a CPU with its `lean_norms` too; PPO also with `decode.for_sampling` and
`trust_sampler`) or "unshared" (fast, but without sharing the prompt of a pair).
"""

import torch
from setting import Clock, Setting, WordTokenizer, autocast, pairs, ragged, score_weights, text, weights

from cs336_alignment import decode, dpo, generate, ppo, reward, sft, speed
from cs336_alignment.models import Llama, ModelConfig, RewardModel, ValueModel
from cs336_alignment.optimize import shuffled_batch

END = f" w{WordTokenizer.eos_token_id}"
NEVER = -1  # an EOS that no model says: every response has full length, the work is the same on both sides


def llama(setting: Setting, seed: int, variant: str = "plain") -> Llama:
    model = Llama(ModelConfig(**setting.shape()))
    state = weights(setting, seed)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    if variant != "plain" and setting.device == "cpu":  # on a GPU torch's own norm is one kernel
        speed.lean_norms(model)
    return model.to(setting.device)


def scorer(kind: type[RewardModel] | type[ValueModel], setting: Setting, seed: int, variant: str):
    model = kind(llama(setting, seed, variant))
    model.head.weight.data.copy_(score_weights(setting, seed))
    return model


def order(count: int, setting: Setting, steps: int) -> list[int]:
    """The order in which the package's loops visit the records: TRL is given them in this order."""
    return torch.cat([shuffled_batch(count, setting.batch_size, step, 0) for step in range(steps)]).tolist()


def constant(config, setting: Setting, steps: int, **more):
    """The loop's configuration with a constant learning rate: what TRL is told too."""
    same = {"steps": steps, "batch_size": setting.batch_size, "learning_rate": setting.learning_rate}
    return config(**same, warmup=0, decay=0, seed=0, **more)


def run_sft(setting: Setting, variant: str, steps: int, clock: Clock) -> list[float]:
    model = llama(setting, 1, variant)
    records = [
        {"prompt": text(p["prompt"]), "response": text(p["chosen"]) + END}
        for p in pairs(setting, steps * setting.batch_size)
    ]
    tricks = {"log_probs_fn": speed.response_only_log_probs} if variant == "fast" else {}
    sft.shuffled_batch = clock.each(shuffled_batch)
    clock.watched = model
    clock.start()
    config = constant(sft.SFTConfig, setting, steps)
    log = sft.train_sft(model, WordTokenizer(), records, config, progress=False, **tricks)
    clock.mark()
    return [line["loss"] for line in log]


def run_ragged(setting: Setting, variant: str, steps: int, clock: Clock) -> list[float]:
    model = llama(setting, 1, variant)
    rows = ragged(setting, steps * setting.batch_size)
    records = [{"prompt": text(r["prompt"]), "response": text(r["chosen"]) + END} for r in rows]
    measured = order(len(rows), setting, steps)[setting.warmup * setting.batch_size :]
    clock.tokens = sum(len(rows[i]["prompt"]) + len(rows[i]["chosen"]) + 1 for i in measured)
    fast = {"log_probs_fn": speed.response_only_log_probs, "part_tokens": setting.part_tokens}
    sft.shuffled_batch = clock.each(shuffled_batch)
    clock.watched = model
    clock.start()
    config = constant(sft.SFTConfig, setting, steps)
    log = sft.train_sft(model, WordTokenizer(), records, config, progress=False, **(fast if variant == "fast" else {}))
    clock.mark()
    return [line["loss"] for line in log]


def preferences(setting: Setting, count: int) -> list[dict]:
    sides = ("chosen", "rejected")
    return [
        {"prompt": text(p["prompt"])} | {side: text(p[side]) + END for side in sides} for p in pairs(setting, count)
    ]


def run_rm(setting: Setting, variant: str, steps: int, clock: Clock) -> list[float]:
    model = scorer(RewardModel, setting, 1, variant)
    tricks = {"fast": speed.shared_prompt_scores, "unshared": speed.last_token_scores, "plain": None}
    reward.shuffled_batch = clock.each(shuffled_batch)
    clock.watched = model
    clock.start()
    log = reward.train_reward_model(
        model,
        WordTokenizer(),
        preferences(setting, steps * setting.batch_size),
        constant(reward.RewardConfig, setting, steps, weight_decay=0.0, center_coef=0.0),
        scores_fn=tricks[variant],
        progress=False,
    )
    clock.mark()
    return [line["loss"] for line in log]


def run_dpo(setting: Setting, variant: str, steps: int, clock: Clock) -> list[float]:
    model, ref_model = (llama(setting, seed, variant) for seed in (1, 2))
    ref_model.eval().requires_grad_(False)
    tricks = {"fast": speed.shared_prompt_log_probs, "unshared": speed.response_only_sequence_log_probs}
    # The reference's log-probabilities are computed once, before the first step: shared out over the steps.
    dpo.reference_log_probs = clock.beforehand(dpo.reference_log_probs, steps)
    dpo.shuffled_batch = clock.each(shuffled_batch)
    clock.watched = model
    clock.start()
    log = dpo.train_dpo(
        model,
        WordTokenizer(),
        preferences(setting, steps * setting.batch_size),
        constant(dpo.DPOConfig, setting, steps, beta=setting.beta),
        ref_model=ref_model,
        progress=False,
        **({"log_probs_fn": tricks[variant]} if variant in tricks else {}),
    )
    clock.mark()
    return [line["loss"] for line in log]


def run_ppo(setting: Setting, variant: str, steps: int, clock: Clock, replay: dict | None = None) -> list[float]:
    """replay: the parity gate's responses, that TRL sampled: two samplers draw different ones from one seed."""
    model, ref_model = (llama(setting, seed, variant) for seed in (1, 2))
    ref_model.eval().requires_grad_(False)
    judge, value_model = scorer(RewardModel, setting, 3, variant), scorer(ValueModel, setting, 4, variant)
    tokenizer = WordTokenizer(eos_token_id=NEVER)
    prompts = [text(p["prompt"]) for p in pairs(setting, steps * setting.batch_size)]
    tricks = {}
    if variant == "fast":
        tricks = {"log_probs_fn": speed.response_only_sample_log_probs, "values_fn": speed.response_only_values}
        tricks |= {"trust_sampler": True, "for_sampling": decode.for_sampling}
    losses = []

    def policy_loss(*args):
        losses.append(ppo.ppo_policy_loss(*args))
        return losses[-1]

    if replay:
        prompts = [text(row) for row in replay["queries"]]
        names = ("queries", "responses", "logprobs")
        ids, responses, log_probs = (torch.tensor(replay[name], device=setting.device) for name in names)
        real, sampled = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(responses, dtype=torch.bool)
        samples = generate.Samples(ids, real, responses, sampled, log_probs, real[:, 0])
        ppo.sample = lambda *args, **kwargs: samples
        ppo.shuffled_batch = clock.each(lambda *args: torch.arange(len(ids)))
        step = ppo.optimizer_step  # our loop clips the gradient's norm, TRL's does not
        ppo.optimizer_step = lambda optimizer, rate: step(optimizer, rate, max_grad_norm=torch.inf)
    else:
        ppo.shuffled_batch = clock.each(shuffled_batch)

    def rewards(prompts: list[str], responses: list[str]) -> torch.Tensor:
        if variant == "plain":
            return reward.score(judge, tokenizer, prompts, responses)
        asked, said = ([tokenizer.encode(x) for x in texts] for texts in (prompts, responses))
        with torch.no_grad():
            return speed.last_token_scores(judge, asked, said, tokenizer.pad_token_id, setting.device)

    clock.watched = model
    clock.start()
    ppo.train_ppo(
        model,
        tokenizer,
        prompts,
        rewards,
        constant(
            ppo.PPOConfig,
            setting,
            steps,
            epochs=setting.ppo_epochs,
            minibatches=1,
            value_learning_rate=setting.learning_rate,
            value_warmup=0,
            beta=setting.kl_coef,
            max_new_tokens=setting.response_tokens,
        ),
        ref_model=ref_model,
        value_model=value_model,
        policy_loss_fn=policy_loss,
        progress=False,
        **tricks,
    )
    clock.mark()
    return [loss.item() for loss in losses]


def run_sampler(setting: Setting, variant: str, steps: int, clock: Clock) -> list[float]:
    model = llama(setting, 1).eval()
    with autocast(setting):
        model = decode.for_sampling(model) if variant == "fast" else model  # once: the weights stay
    generator = torch.Generator(setting.device).manual_seed(0)
    prompts = [p["prompt"] for p in pairs(setting, setting.batch_size)]
    clock.watched = model
    clock.start()
    for _ in range(steps):
        clock.mark()
        with autocast(setting):
            generate.sample(
                model, prompts, max_new_tokens=setting.new_tokens, eos_token_id=NEVER, pad_token_id=0,
                generator=generator,
            )  # fmt: skip
    clock.mark()
    return []
