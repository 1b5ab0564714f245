"""What the two processes of test_distributed.py do: `python two_processes.py JOB FOLDER`, once for each rank.

The same functions run in the test's own process, where they are the runs of one process to compare with.
"""

import sys
import time
from pathlib import Path

import torch
from toys import ToyTokenizer, tiny_llama

from cs336_alignment import distributed, speed
from cs336_alignment.dpo import DPOConfig, train_dpo
from cs336_alignment.generate import sample
from cs336_alignment.models import HFCausalLM, RewardModel, save_model
from cs336_alignment.ppo import PPOConfig, train_ppo
from cs336_alignment.reward import RewardConfig, train_reward_model
from cs336_alignment.sft import SFTConfig, sft_loss, train_sft

TOKENIZER = ToyTokenizer()
SHORT = {"steps": 6, "warmup": 1, "decay": 3, "save_every": 2, "eval_every": 2, "batch_size": 6, "learning_rate": 1e-2}


def words(count: int, start: int) -> str:
    return " ".join(f"w{2 + (start + i) % 10}" for i in range(count)) + " <eos>"


# Ragged on purpose: responses of 2 to 14 tokens, so that the processes' slices hold unequal numbers of them.
DEMONSTRATIONS = [{"prompt": f"w{2 + i % 9}", "response": words(1 + (7 * i) % 13, i)} for i in range(15)]
PREFERENCES = [
    {"prompt": d["prompt"], "chosen": d["response"], "rejected": words(1 + (5 * i) % 11, 3 * i + 1)}
    for i, d in enumerate(DEMONSTRATIONS)
]
MANY = 8 * PREFERENCES  # the reference scores them in two batches, one for each process


def policy():
    """Of other random numbers in each process: all must start from those of the first."""
    return tiny_llama(distributed.process_rank(), torch.float64)


def sft(sharded: bool = False, accumulation: int = 1, batch_size: int = 6, **kwargs):
    replay = torch.randint(2, 12, (9, 8), generator=torch.Generator().manual_seed(0))
    config = SFTConfig(**SHORT | {"batch_size": batch_size}, replay_rows=4, accumulation=accumulation)
    model = shard_if(policy(), sharded)
    log = train_sft(
        model, TOKENIZER, DEMONSTRATIONS, config, replay=replay, held_out=DEMONSTRATIONS[:3], progress=False, **kwargs
    )
    return log, model


def reward(sharded: bool = False, **kwargs):
    config = RewardConfig(**SHORT)
    model = shard_if(RewardModel(policy(), likelihood=1.0), sharded)
    log = train_reward_model(
        model, TOKENIZER, PREFERENCES, config, held_out=PREFERENCES[:3], progress=False, **kwargs
    )  # fmt: skip
    return log, model


def dpo(sharded: bool = False, preferences=PREFERENCES, **kwargs):
    config = DPOConfig(**SHORT, nll_coef=0.3, label_smoothing=0.1)
    model = shard_if(policy(), sharded)
    return train_dpo(model, TOKENIZER, preferences, config, progress=False, **kwargs), model


def shard_if(model, sharded: bool):
    """A policy says something first: what was used must still be trained as what was not."""
    model = distributed.shard(model) if sharded else model
    if not isinstance(model, RewardModel):
        sample(model, [[2, 3], [4]], max_new_tokens=4, eos_token_id=1, pad_token_id=0, temperature=0)
    return model


JOBS = {"sft": sft, "reward": reward, "dpo": dpo}


def outcome(run) -> dict:
    """The log and the weights that a run ended with, put together where they were sharded."""
    log, model = run
    state = distributed.whole_state(model)
    held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    return {
        "log": log,
        "held": held,
        "weights": torch.cat([state[name].flatten() for name, _ in model.named_parameters()]),
    }


def refused(function, *args, **kwargs) -> str:
    """What the ValueError says."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def functions() -> dict:
    """What the small functions give in this process."""
    rank = distributed.process_rank()
    batches = torch.arange(7).split(3)
    return {
        "count": distributed.process_count(),
        "first": distributed.is_first(),
        "rows": distributed.my_rows(torch.arange(7)).tolist(),
        "turns": [(batch.tolist(), mine) for batch, mine in distributed.my_turns(batches)],
        "sum": distributed.added_up(torch.tensor([1.0 + rank, 2.0])).tolist(),
        "mean": distributed.averaged({"x": torch.tensor(3.0 + rank), "y": 1.0}, 0.25 if rank == 0 else 0.75),
        "too few rows": refused(distributed.my_rows, torch.arange(1)),
        "uneven parts": refused(distributed.my_rows, torch.arange(8), parts=3),
        "PPO": refused(train_ppo, policy(), TOKENIZER, ["w2"], len, PPOConfig()),
        "sharded scores": refused(reward, sharded=True, scores_fn=speed.last_token_scores),
        "sharded scores of pairs": refused(reward, sharded=True, scores_fn=speed.shared_prompt_scores),
    }


def wrapped():
    """A transformers model with tied embeddings, sharded where there are two processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=12, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(distributed.process_rank())
    model = shard_if(HFCausalLM(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))), True)
    return train_sft(model, TOKENIZER, DEMONSTRATIONS, SFTConfig(**SHORT, replay_rows=0), progress=False), model


def everything(folder: Path) -> None:
    """All loops, each process with the model and each with a part of it; what the first ends with goes to a file."""
    found = {}
    for name, job in JOBS.items():
        for sharded in (False, True):
            found[name, sharded] = outcome(job(sharded))
    found["accumulation"] = outcome(sft(accumulation=3))
    found["uneven"] = outcome(sft(batch_size=5))
    found["reference"] = [outcome(dpo(preferences=MANY)), outcome(dpo(preferences=MANY, ref_model=policy()))]
    for sharded in (False, True):
        found["fast SFT", sharded] = outcome(sft(sharded, log_probs_fn=speed.response_only_log_probs))
        found["fast DPO", sharded] = outcome(dpo(sharded, log_probs_fn=speed.shared_prompt_log_probs))
    found["transformers"] = outcome(run := wrapped())
    save_model(run[1], None, folder / "model")
    found["checkpoint"] = outcome(dpo(checkpoint=folder / "whole.pt"))
    torch.save(functions(), folder / f"functions-{distributed.process_rank()}.pt")
    if distributed.is_first():
        torch.save(found, folder / "found.pt")


def slow_loss(*args):
    """`sft_loss` of a run that is about to be killed."""
    print("a step", flush=True)
    time.sleep(0.2)
    return sft_loss(*args)


def killed(folder: Path) -> None:
    sft(sharded=True, checkpoint=folder / "killed.pt", loss_fn=slow_loss)


def resumed(folder: Path) -> None:
    found = outcome(sft(sharded=True, checkpoint=folder / "killed.pt"))
    if distributed.is_first():
        torch.save(found, folder / "resumed.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.launched("cpu"):
        {"everything": everything, "killed": killed, "resumed": resumed}[sys.argv[1]](Path(sys.argv[2]))
