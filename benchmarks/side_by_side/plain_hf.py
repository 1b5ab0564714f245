"""The plain loop that a reader of transformers' documentation would write, and its `generate`: no trainer at all.

Beside TRL, because part of TRL's time is its trainer's and not the model's. Same weights, same batches, same optimizer.
"""

import torch
import torch.nn.functional as F
from setting import EOS, PAD, Clock, Setting, autocast, pairs, score_weights, weights
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


def llama(setting: Setting, seed: int, scores: bool = False) -> torch.nn.Module:
    """transformers' Llama, or its sequence classifier with one score, with our weights."""
    config = LlamaConfig(**setting.shape(), pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    if scores:
        config.num_labels = 1
    model = (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config)
    state = weights(setting, seed)
    if scores:
        state["score.weight"] = score_weights(setting, seed)
    else:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def batches(setting: Setting, steps: int, sides: tuple[str, ...]):
    """(B or 2B, S) token ids for each step."""
    records = pairs(setting, steps * setting.batch_size)
    for step in range(steps):
        part = records[step * setting.batch_size : (step + 1) * setting.batch_size]
        yield torch.tensor([p["prompt"] + p[side] + [EOS] for side in sides for p in part], device=setting.device)


def log_probs(model, ids: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Of the response tokens, (B, T)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    labels = ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return -losses[:, setting.prompt_tokens - 1 :]


def train(model, setting: Setting, steps: int, clock: Clock, sides: tuple[str, ...], loss_fn):
    model.train().to(setting.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    clock.start()
    losses = []
    for ids in batches(setting, steps, sides):
        clock.mark()
        with autocast(setting):
            loss = loss_fn(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    clock.mark()
    return losses


def run_sft(setting: Setting, variant: str, steps: int, clock: Clock):
    def loss(model, ids):
        return -log_probs(model, ids, setting).mean()

    return train(llama(setting, 1), setting, steps, clock, ("chosen",), loss)


def run_rm(setting: Setting, variant: str, steps: int, clock: Clock):
    def loss(model, ids):
        chosen, rejected = model(input_ids=ids, use_cache=False).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return train(llama(setting, 1, scores=True), setting, steps, clock, ("chosen", "rejected"), loss)


def run_dpo(setting: Setting, variant: str, steps: int, clock: Clock):
    ref_model = llama(setting, 2).eval().to(setting.device)

    def loss(model, ids):
        with torch.no_grad():
            ref = log_probs(ref_model, ids, setting).sum(1)
        chosen, rejected = (log_probs(model, ids, setting).sum(1) - ref).chunk(2)
        return -F.logsigmoid(setting.beta * (chosen - rejected)).mean()

    return train(llama(setting, 1), setting, steps, clock, ("chosen", "rejected"), loss)


def run_sampler(setting: Setting, variant: str, steps: int, clock: Clock):
    """`generate` with sampling from the whole distribution; "scores": also the logits that log-probabilities need."""
    model = llama(setting, 1).eval().to(setting.device)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([p["prompt"] for p in pairs(setting, setting.batch_size)], device=setting.device)
    extra = {"output_logits": True, "return_dict_in_generate": True} if variant == "scores" else {}
    torch.manual_seed(0)
    clock.start()
    for _ in range(steps):
        clock.mark()
        with autocast(setting):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=setting.new_tokens, pad_token_id=PAD, **extra,
            )  # fmt: skip
    clock.mark()
    return []
