"""Golden values: what TRL computes on tiny inputs, written to tests/golden/trl.json for the tests to use.

TRL is not a dependency of the course; this script runs in environments of its own, one for each TRL release.
It fills in the parts that the release it finds can compute and leaves the others in the file as they are:

    uv venv ../trl116 && uv pip install --python ../trl116 torch==2.13.0 trl==1.16.0
    uv venv ../trl112 && uv pip install --python ../trl112 torch==2.13.0 trl==1.12.0
    CUDA_VISIBLE_DEVICES= ../trl116/bin/python benchmarks/golden_trl.py     # SFT, reward model, DPO
    CUDA_VISIBLE_DEVICES= ../trl112/bin/python benchmarks/golden_trl.py     # PPO, which later releases lack

Everything is computed by TRL's own trainer objects on a Llama of about 900 weights. The weights are drawn by
Python's `random`, rounded to hundredths and stored with the results, so that the tests rebuild the very same
model with the course's own `Llama`.
"""

import json
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "trl.json"
PAD, EOS = 0, 1
CONFIG = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Prompts and responses of unequal length: a mistake in padding or averaging shows on ragged rows only.
PAIRS = [
    {"prompt": "w2 w3", "chosen": " w4 w5 w6", "rejected": " w7"},
    {"prompt": "w8 w9 w10 w2", "chosen": " w11", "rejected": " w3 w4 w3 w4 w5"},
    {"prompt": "w5", "chosen": " w6 w7 w8 w9 w10 w11", "rejected": " w6 w7"},
    {"prompt": "w7 w7 w2", "chosen": " w3 w3", "rejected": " w9 w8"},
]
MARGINS = [0.5, 0.0, 1.25, -0.25]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": PAD, "[EOS]": EOS} | {f"w{i}": i for i in range(2, CONFIG["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def make_model(seed: int, scores: bool = False) -> torch.nn.Module:
    """A tiny Llama, with a language-model head or one score; its weights are a function of the seed."""
    config = LlamaConfig(**CONFIG, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    if scores:
        config.num_labels = 1
    model = (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config)
    rng = random.Random(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            center, spread = (0.0, 0.5) if weight.dim() > 1 else (1.0, 0.2)  # norms around one
            values = [round(rng.gauss(center, spread), 2) for _ in range(weight.numel())]
            weight.copy_(torch.tensor(values).view_as(weight))
        # TRL's PPO takes a sampled padding token for the end of a response. So that none is sampled, feature
        # 0 is positive in every embedding, no layer changes it, and the head counts it against padding.
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        if not scores:
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[PAD, 0] = -8.0
    return model


def weights(model: torch.nn.Module, digits: int | None = None) -> dict[str, list]:
    return {name: plain(weight, digits) for name, weight in sorted(model.state_dict().items())}


def plain(x, digits: int | None = None):
    """Tensors as lists; float32 survives exactly in nine significant digits."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.dtype == torch.bool:
            return x.int().tolist()
        return plain(x.tolist(), digits)
    if isinstance(x, list):
        return [plain(value, digits) for value in x]
    if isinstance(x, float):
        return round(x, digits) if digits is not None else float(f"{x:.9g}")
    return x


def watch(name: str, function, *args, **kwargs):
    """Calls the function; returns its result and the local variables that the code called `name` ended with.

    TRL's trainers keep the intermediate values that we want to compare in local variables.
    """
    seen = {}

    def look(frame, event, _):
        if event == "return" and frame.f_code.co_name == name:
            seen.update(frame.f_locals)

    sys.setprofile(look)
    try:
        result = function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return result, seen


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, list]:
    """The loss's gradient with respect to two matrices at both ends of the model."""
    model.zero_grad()
    loss.backward()
    return {
        name: plain(weight.grad)
        for name, weight in model.named_parameters()
        if name in ("lm_head.weight", "score.weight", "model.layers.0.self_attn.q_proj.weight")
    }


def arguments(folder: str) -> dict:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": len(PAIRS),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def only_batch(trainer) -> dict[str, torch.Tensor]:
    """The records in their order, through the trainer's own tokenization and collation."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def sft(folder: str) -> dict:
    from trl import SFTConfig, SFTTrainer

    records = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    model = make_model(seed=1)
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments(folder)),
        train_dataset=Dataset.from_list(records),
        processing_class=make_tokenizer(),
    )
    model.eval()
    batch = only_batch(trainer)
    loss = trainer.compute_loss(model, dict(batch))
    result = {
        "model": weights(model, 2),
        "input_ids": plain(batch["input_ids"]),
        "labels": plain(batch["labels"]),
        "loss": plain(loss),
        "gradient": gradients(model, loss),
    }
    # The same step in two micro-batches, as transformers' training loop asks for it.
    items = (batch["labels"][:, 1:] != -100).sum()
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    result["micro_losses"] = [plain(trainer.compute_loss(model, half, num_items_in_batch=items)) for half in halves]
    return result


def reward_model(folder: str) -> dict:
    from trl import RewardConfig, RewardTrainer

    cases = []
    for margin, center in ((False, None), (True, None), (False, 0.1), (True, 0.1)):
        records = [
            {"chosen": p["prompt"] + p["chosen"], "rejected": p["prompt"] + p["rejected"]}
            | ({"margin": m} if margin else {})
            for p, m in zip(PAIRS, MARGINS, strict=True)
        ]
        model = make_model(seed=2, scores=True)
        config = RewardConfig(**arguments(folder), center_rewards_coefficient=center)
        trainer = RewardTrainer(
            model, config, train_dataset=Dataset.from_list(records), processing_class=make_tokenizer()
        )
        model.eval()
        batch = only_batch(trainer)
        loss, seen = watch("compute_loss", trainer.compute_loss, model, dict(batch))
        cases.append(
            {
                "chosen": plain(seen["rewards_chosen"]),
                "rejected": plain(seen["rewards_rejected"]),
                "margin": MARGINS if margin else None,
                "center_coef": center or 0.0,
                "loss": plain(loss),
            }
        )
    return {
        "model": weights(model, 2),
        "input_ids": plain(batch["input_ids"]),
        "attention_mask": plain(batch["attention_mask"]),
        "cases": cases,
    }


def dpo(folder: str) -> dict:
    from trl import DPOConfig, DPOTrainer

    result = {"cases": []}
    for loss_type, beta, label_smoothing, pairs in (
        ("sigmoid", 0.1, 0.0, PAIRS),
        ("sigmoid", 0.5, 0.0, PAIRS),
        ("sigmoid", 0.5, 0.2, PAIRS),
        ("robust", 0.5, 0.2, PAIRS),
        ("aot", 0.5, 0.2, PAIRS[:1]),
        ("ipo", 0.5, 0.0, PAIRS),
    ):
        model, ref_model = make_model(seed=3), make_model(seed=4)
        config = DPOConfig(**arguments(folder), loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)
        trainer = DPOTrainer(
            model,
            ref_model,
            config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=make_tokenizer(),
        )
        model.eval()
        batch = only_batch(trainer)
        loss, seen = watch("_compute_loss", trainer.compute_loss, model, dict(batch))
        case = {"loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "loss": plain(loss)}
        for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
            case[name] = plain(seen[name])
        if loss_type == "sigmoid":
            case["gradient"] = gradients(model, loss)
        if pairs is PAIRS:
            result |= {
                "model": weights(model, 2),
                "ref_model": weights(ref_model, 2),
                "input_ids": plain(batch["input_ids"]),
                "completion_mask": plain(batch["completion_mask"]),
            }
        result["cases"].append(case)
    return result


def ppo_functions() -> dict:
    """TRL's whitening on ragged rows."""
    from trl.experimental.ppo import ppo_trainer

    rng = random.Random(5)
    x = torch.tensor([[round(rng.gauss(1, 2), 3) for _ in range(6)] for _ in range(4)])
    mask = torch.arange(6) < torch.tensor([[6], [1], [4], [2]])
    return {
        "x": plain(x),
        "mask": plain(mask),
        "whitened": plain(ppo_trainer.masked_whiten(x, mask)),
        "whitened_keeping_the_mean": plain(ppo_trainer.masked_whiten(x, mask, shift_mean=False)),
    }


def ppo_update(folder: str) -> dict:
    """One whole update by PPOTrainer.train: sample, score, shape, GAE, whiten, 4 epochs of 2 minibatches."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, ref_model = make_model(seed=6), make_model(seed=7)
    value_model, scorer = make_model(seed=8, scores=True), make_model(seed=9, scores=True)
    start = {
        "policy": weights(policy, 2),
        "ref_model": weights(ref_model, 2),
        "value_model": weights(value_model, 2),
    }
    start["reward_model"] = weights(scorer, 2)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    rng = random.Random(10)
    prompts = [[rng.randrange(2, 12) for _ in range(1 + i % 4)] for i in range(8)]
    config = PPOConfig(
        # With accumulation TRL would take a step every second minibatch only: all rows are one device batch.
        **(arguments(folder) | {"per_device_train_batch_size": 8}),
        num_mini_batches=2,
        total_episodes=8,
        num_ppo_epochs=4,
        response_length=6,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
        local_rollout_forward_batch_size=8,
        kl_coef=0.2,
        gamma=0.98,
        lam=0.9,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.5,
        learning_rate=2e-3,
        optim="adamw_torch",
        seed=13,
    )
    result, orders = {}, []

    class Look(TrainerCallback):
        """At the end of the update everything is still a local variable of PPOTrainer.train."""

        def on_step_end(self, args, state, control, **kwargs):
            frame = sys._getframe()
            while not (frame.f_code.co_name == "train" and "advantages" in frame.f_locals):
                frame = frame.f_back
            seen = frame.f_locals
            for name in (
                "queries",
                "responses",
                "logprobs",
                "ref_logprobs",
                "values",
                "scores",
                "kl",
                "rewards",
            ):
                result[name] = plain(seen[name])
            for name in ("advantages", "returns", "padding_mask", "padding_mask_p1", "sequence_lengths"):
                result[name] = plain(seen[name])
            result["contain_eos_token"] = plain(seen["contain_eos_token"])
            result["policy_losses"] = plain(seen["pg_loss_stats"][:, :, 0])
            result["value_losses"] = plain(seen["vf_loss_stats"][:, :, 0])
            result["clipped_fraction"] = plain(seen["pg_clipfrac_stats"][:, :, 0])
            result["ratios"] = plain(seen["ratio_stats"][:, :, 0])

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_model,
        reward_model=scorer,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        value_model=value_model,
        eval_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[Look()],
    )
    permutation = np.random.permutation

    def recorded_permutation(size):
        orders.append(permutation(size).tolist())
        return np.array(orders[-1])

    ppo_trainer.np.random.permutation = recorded_permutation
    try:
        trainer.train()
    finally:
        ppo_trainer.np.random.permutation = permutation
    group = trainer.optimizer.param_groups[0]
    return {
        "weights_before": start,
        "settings": {
            "temperature": config.temperature,
            "kl_coef": config.kl_coef,
            "gamma": config.gamma,
            "lam": config.lam,
            "cliprange": config.cliprange,
            "cliprange_value": config.cliprange_value,
            "vf_coef": config.vf_coef,
            "missing_eos_penalty": config.missing_eos_penalty,
            "learning_rate": config.learning_rate,
            "betas": list(group["betas"]),
            "eps": group["eps"],
            "weight_decay": config.weight_decay,
        },
        "orders": orders,
        **result,
        "weights_after": {"policy": weights(policy), "value_model": weights(value_model)},
    }


def main() -> None:
    torch.set_num_threads(1)
    golden = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if trl.__version__ == "1.16.0":
            parts = {"sft": sft(folder), "reward_model": reward_model(folder), "dpo": dpo(folder)}
        elif trl.__version__ == "1.12.0":
            parts = {"whiten": ppo_functions(), "ppo_update": ppo_update(folder)}
        else:
            sys.exit(f"TRL {trl.__version__}: the golden values are those of 1.16.0 and 1.12.0")
    made_by = {
        "command": "python benchmarks/golden_trl.py",
        "trl": trl.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    for name, part in parts.items():
        golden[name] = {"made_by": made_by, **part}
    golden = {"config": CONFIG} | dict(sorted((k, v) for k, v in golden.items() if k != "config"))
    lines = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in golden.items())
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {', '.join(parts)} to {OUTPUT} ({OUTPUT.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
