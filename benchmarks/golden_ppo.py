"""Golden values of whole PPO updates: what TRL 1.12's PPOTrainer does, written to tests/golden/ppo_update.json.

Runs in an environment of its own, like golden_trl.py, whose tiny models it uses (TRL 1.12 is the last with PPO):

    uv venv ../trl112 && uv pip install --python ../trl112 torch==2.13.0 trl==1.12.0
    CUDA_VISIBLE_DEVICES= ../trl112/bin/python benchmarks/golden_ppo.py

Each case is one update of 32 sampled responses: four epochs of four minibatches, ragged, with EOS and padding, a
penalty for a missing EOS, value clipping. The cases differ in the KL estimator and in whitening the rewards. What is
the course's choice where TRL leaves one: the order of the minibatches and Adam's second beta. The models are float64.
Two things in transformers are float32 all the same. RMSNorm is replaced here by torch's own; the scores from which
`generate` takes the old log-probabilities are left alone, so these have float32's digits.
`ppo_update.py` makes the same updates with `train_ppo` and compares; tests/test_ppo_update.py asserts the result.
"""

import json
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from golden_trl import EOS, arguments, make_model, make_tokenizer, plain, weights
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "ppo_update.json"
ROWS, EPOCHS, MINIBATCHES = 32, 4, 4  # TRL wants eight rows in a minibatch where it whitens rewards
SETTINGS = {
    "kl_coef": 0.2,
    "gamma": 0.98,
    "lam": 0.9,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.5,
    "missing_eos_penalty": 1.0,
    "response_length": 6,
    "temperature": 0.7,
    "learning_rate": 2e-3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "seed": 13,
}
KINDS = [(kind, whitened) for kind in ("k1", "k3") for whitened in (False, True)]


def norm_in_float64(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the type of its input."""
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def course_order(seed: int, epoch: int) -> torch.Tensor:
    """The order in which `train_ppo` visits the rows in an epoch of its first iteration."""
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def exact(x) -> list:
    """Twelve significant digits of a tensor, as lists."""
    if isinstance(x, torch.Tensor):
        return exact(x.tolist())
    return [exact(value) for value in x] if isinstance(x, list) else float(f"{x:.12g}")


def update(folder: str, kl_estimator: str, whiten_rewards: bool) -> dict:
    """One update by PPOTrainer.train."""
    policy, ref_model = make_model(seed=6).double(), make_model(seed=7).double()
    value_model, scorer = make_model(seed=8, scores=True).double(), make_model(seed=9, scores=True).double()
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    rng = random.Random(10)
    prompts = [[rng.randrange(2, 12) for _ in range(1 + i % 5)] for i in range(ROWS)]
    config = PPOConfig(
        **(arguments(folder) | {"per_device_train_batch_size": ROWS}),
        **SETTINGS,
        kl_estimator=kl_estimator,
        whiten_rewards=whiten_rewards,
        total_episodes=ROWS,
        num_ppo_epochs=EPOCHS,
        num_mini_batches=MINIBATCHES,
        stop_token="eos",
        num_sample_generations=0,
        local_rollout_forward_batch_size=ROWS,
        optim="adamw_torch",
    )
    result, epochs = {}, iter(range(EPOCHS))

    class Look(TrainerCallback):
        """At the end of the update everything is still a local variable of PPOTrainer.train."""

        def on_step_end(self, args, state, control, **kwargs):
            frame = sys._getframe()
            while not (frame.f_code.co_name == "train" and "advantages" in frame.f_locals):
                frame = frame.f_back
            seen = frame.f_locals
            for name in ("queries", "responses", "sequence_lengths"):
                result[name] = seen[name].tolist()
            for name in ("logprobs", "scores", "advantages", "returns"):
                result[name] = exact(seen[name])
            result["finished"] = seen["contain_eos_token"].int().tolist()
            result["policy_losses"] = plain(seen["pg_loss_stats"][:, :, 0].flatten())
            result["value_losses"] = plain(seen["vf_loss_stats"][:, :, 0].flatten())
            result["clipped"] = plain(seen["pg_clipfrac_stats"][:, :, 0].flatten())
            result["values_clipped"] = plain(seen["vf_clipfrac_stats"][:, :, 0].flatten())

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
    permutation = ppo_trainer.np.random.permutation
    ppo_trainer.np.random.permutation = lambda size: course_order(config.seed, next(epochs)).numpy()
    try:
        trainer.train()
    finally:
        ppo_trainer.np.random.permutation = permutation
    assert next(epochs, None) is None and next(policy.parameters()).dtype == torch.float64
    lengths = torch.tensor(result["sequence_lengths"])
    assert lengths.unique().numel() > 3 and not all(result["finished"]), "ragged rows, one of them without EOS"
    assert EOS in torch.tensor(result["responses"])
    return {
        "kl_estimator": kl_estimator,
        "whiten_rewards": whiten_rewards,
        **result,
        "weights_after": {
            "policy": {name: exact(x) for name, x in sorted(policy.state_dict().items())},
            "value_model": {name: exact(x) for name, x in sorted(value_model.state_dict().items())},
        },
    }


def main() -> None:
    if trl.__version__ != "1.12.0":
        sys.exit(f"TRL {trl.__version__}: the golden values are those of 1.12.0")
    torch.set_num_threads(1)
    LlamaRMSNorm.forward = norm_in_float64
    before = {
        "policy": weights(make_model(seed=6), 2),
        "ref_model": weights(make_model(seed=7), 2),
        "value_model": weights(make_model(seed=8, scores=True), 2),
        "reward_model": weights(make_model(seed=9, scores=True), 2),
    }
    made_by = {
        "command": "python benchmarks/golden_ppo.py",
        "trl": trl.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    with tempfile.TemporaryDirectory() as folder:
        cases = [update(folder, *kind) for kind in KINDS]
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"made_by": made_by, "settings": SETTINGS, "weights_before": before})
    OUTPUT.write_text(f'{head[:-1]},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"wrote {len(cases)} cases to {OUTPUT.name} ({OUTPUT.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
