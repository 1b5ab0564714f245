"""TRL's side: its own trainer objects on transformers' Llama with the same weights. Runs in TRL's environment.

Two variants. "tuned": float32, no autocast, no gradient checkpointing, no logging, no checkpoints, the fused
optimizer: the fastest that we found for the same work. "defaults": TRL as it comes (bfloat16 autocast and gradient
checkpointing, also on a CPU), only with the same batches and learning rate. The PPO of TRL 1.12 takes no notice of
either: its loop makes an Accelerator of its own, without their settings, and is float32 without checkpointing in both.

On a GPU "tuned" computes in bfloat16 autocast, as ours does; PPO is put into it from outside.
"""

import contextlib
import os
import sys
import tempfile

os.environ["TQDM_DISABLE"] = "1"  # before datasets is imported

import transformers
from datasets import Dataset, disable_progress_bars
from plain_hf import llama
from setting import EOS, PAD, Clock, Setting, autocast, pairs, ragged, text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

disable_progress_bars()
transformers.utils.logging.set_verbosity_error()


def tokenizer_for(setting: Setting, pad: int = PAD) -> PreTrainedTokenizerFast:
    """Special tokens need names that no word contains: the tokenizer would find "w1" in "w12"."""
    vocabulary = {f"w{i}": i for i in range(setting.vocab_size + 1)}
    for name, i in (("[PAD]", pad), ("[EOS]", EOS)):
        del vocabulary[f"w{i}"]
        vocabulary[name] = i
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def arguments(setting: Setting, variant: str, folder: str) -> dict:
    """What every trainer is told. The optimizer's constants and the order of the records are the package's."""
    same_work = {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch_size,
        "num_train_epochs": 1,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": setting.device == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if variant == "defaults":
        return same_work
    return same_work | {
        "bf16": setting.device == "cuda",
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "optim": "adamw_torch_fused",
        "average_tokens_across_devices": False,
        "dataloader_pin_memory": setting.device == "cuda",
    }


class StepEnds(TrainerCallback):
    """Tells the clock."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.mark()


def train(trainer, clock: Clock) -> list[float]:
    """Runs the trainer; gives the losses of its steps (for the gate)."""
    losses = []
    if clock.keep_first:
        training_step = trainer.training_step

        def watched(*args, **kwargs):
            loss = training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

        trainer.training_step = watched
        clock.watched = trainer.model
    trainer.add_callback(StepEnds(clock))
    clock.start()
    clock.mark()
    trainer.train()
    return losses


def ordered(setting: Setting, rows: list[int]) -> list[dict]:
    records = pairs(setting, len(rows))
    return [records[i] for i in rows]


def run_sft(setting: Setting, variant: str, rows: list[int], clock: Clock) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    records = [{"prompt": text(p["prompt"]), "completion": " " + text(p["chosen"])} for p in ordered(setting, rows)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            llama(setting, 1),
            SFTConfig(**arguments(setting, variant, folder)),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer_for(setting),
        )
        return train(trainer, clock)


def run_rm(setting: Setting, variant: str, rows: list[int], clock: Clock) -> list[float]:
    from trl import RewardConfig, RewardTrainer

    records = [
        {side: text(p["prompt"]) + " " + text(p[side]) for side in ("chosen", "rejected")}
        for p in ordered(setting, rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            llama(setting, 1, scores=True),
            RewardConfig(**arguments(setting, variant, folder), center_rewards_coefficient=None),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer_for(setting),
        )
        return train(trainer, clock)


def run_dpo(setting: Setting, variant: str, rows: list[int], clock: Clock) -> list[float]:
    from trl import DPOConfig, DPOTrainer

    records = [
        {"prompt": text(p["prompt"]), "chosen": " " + text(p["chosen"]), "rejected": " " + text(p["rejected"])}
        for p in ordered(setting, rows)
    ]
    precompute = variant == "precomputed"
    with tempfile.TemporaryDirectory() as folder:
        steps = len(rows) // setting.batch_size
        DPOTrainer._precompute_ref_logps = clock.beforehand(DPOTrainer._precompute_ref_logps, steps)
        trainer = DPOTrainer(
            llama(setting, 1),
            llama(setting, 2),
            DPOConfig(**arguments(setting, variant, folder), beta=setting.beta, precompute_ref_log_probs=precompute),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer_for(setting),
        )
        return train(trainer, clock)


def run_ragged(setting: Setting, variant: str, rows: list[int], clock: Clock) -> list[float]:
    """SFT on ragged rows: batches padded to their longest row, or ("packed") TRL's packing into rows of the cap.

    The packed rows go one at a time and their gradients are accumulated: TRL would lay those of a batch end to end, and
    without flash attention that one long row costs a dense square of attention scores.
    """
    from trl import SFTConfig, SFTTrainer

    records = ragged(setting, len(rows))
    records = [{"prompt": text(r["prompt"]), "completion": " " + text(r["chosen"])} for r in (records[i] for i in rows)]
    packed = {"packing": True, "max_length": setting.ragged_cap, "per_device_train_batch_size": 1}
    packed["gradient_accumulation_steps"] = setting.packed_rows
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            llama(setting, 1),
            SFTConfig(**(arguments(setting, variant, folder) | (packed if variant == "packed" else {}))),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer_for(setting),
        )
        clock.tokens_so_far = lambda: trainer._total_train_tokens  # real ones: TRL counts them itself
        return train(trainer, clock)


def run_ppo(setting: Setting, variant: str, rows: list[int], clock: Clock) -> list[float]:
    """TRL 1.12's PPO. With the gate, the responses it sampled are given back, for ours to learn from the same."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    records = pairs(setting, len(rows))
    dataset = Dataset.from_dict({"input_ids": [records[i]["prompt"] for i in rows]})
    # Padding is an id that the model has not, so that no response holds it: TRL would take it for the end.
    tokenizer = tokenizer_for(setting, pad=setting.vocab_size)
    seen, policy = {}, llama(setting, 1)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            frame = sys._getframe()
            while not (frame.f_code.co_name == "train" and "query_responses" in frame.f_locals):
                frame = frame.f_back
            local = frame.f_locals
            if not seen:
                seen["queries"], seen["responses"] = local["queries"].tolist(), local["responses"].tolist()
                seen["logprobs"] = local["logprobs"].tolist()
                seen["losses"] = local["pg_loss_stats"].flatten().tolist()

    with tempfile.TemporaryDirectory() as folder:
        told = arguments(setting, variant, folder)
        for name in ("train_sampling_strategy", "average_tokens_across_devices", "lr_scheduler_type"):
            told.pop(name, None)
        trainer = PPOTrainer(
            args=PPOConfig(
                **told,
                lr_scheduler_type="constant",
                num_mini_batches=1,
                total_episodes=len(rows),
                num_ppo_epochs=setting.ppo_epochs,
                response_length=setting.response_tokens,
                num_sample_generations=0,
                local_rollout_forward_batch_size=setting.batch_size,
                kl_coef=setting.kl_coef,
                vf_coef=1.0,
                temperature=1.0,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=llama(setting, 2),
            reward_model=llama(setting, 3, scores=True),
            value_model=llama(setting, 4, scores=True),
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        trainer.add_callback(StepEnds(clock))
        if clock.keep_first:
            clock.watched = policy
            trainer.add_callback(Look())
        clock.start()
        clock.mark()
        with autocast(setting) if variant == "tuned" else contextlib.nullcontext():
            trainer.train()
    clock.replay = {name: seen[name] for name in ("queries", "responses", "logprobs")} if seen else None
    return seen.get("losses", [])
