"""What the loops share: a schedule, the order of batches, an optimizer; and runs that are killed and go on.

Killed really: one run is a process that gets SIGKILL. In the others a function that the loop calls raises.
Either way the resumed run must end with the same weights, bit for bit, and the same log as one left alone.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from toys import ToyTokenizer, assert_near, tiny_llama, weights_of

from cs336_alignment.dpo import DPOConfig, dpo_loss, train_dpo
from cs336_alignment.models import RewardModel, load_progress
from cs336_alignment.optimize import (
    Run,
    make_optimizer,
    optimizer_step,
    shuffled_batch,
    step_generator,
    warmup_stable_decay,
)
from cs336_alignment.ppo import PPOConfig, train_ppo
from cs336_alignment.reward import RewardConfig, reward_model_loss, train_reward_model
from cs336_alignment.sft import SFTConfig, sft_loss, train_sft

TESTS = Path(__file__).resolve().parent
TOKENIZER = ToyTokenizer()

# --------------------------------------------------------------------------------------------------- schedule


def test_the_schedule_by_hand():
    """Up over 4 steps, stable, down over the last 5: never 0 while there is a step to take."""
    factors = [warmup_stable_decay(step, 12, 4, 5) for step in range(12)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_without_warmup_and_decay_the_rate_is_constant():
    assert [warmup_stable_decay(step, 5, 0, 0) for step in range(5)] == [1] * 5


@pytest.mark.parametrize(("warmup", "decay"), [(4, 4), (10, 0), (0, 10), (10, 10), (100, 3), (3, 100)])
def test_the_factor_stays_in_0_1_even_where_warmup_and_decay_overlap(warmup, decay):
    factors = [warmup_stable_decay(step, 6, warmup, decay) for step in range(6)]
    assert all(0 < factor <= 1 for factor in factors)
    turns = [b < a for a, b in zip(factors, factors[1:], strict=False)]
    assert turns == sorted(turns)  # up, then down, and never up again


# ------------------------------------------------------------------------------------------- order of batches


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (7, 7), (100, 1), (5, 3)])
def test_an_epoch_visits_each_record_once(size, batch_size):
    batches = size // batch_size
    for epoch in range(3):
        steps = range(epoch * batches, (epoch + 1) * batches)
        seen = torch.cat([shuffled_batch(size, batch_size, step, seed=0) for step in steps]).tolist()
        assert len(seen) == batches * batch_size
        assert max(Counter(seen).values()) == 1 and set(seen) <= set(range(size))


def test_over_many_epochs_each_record_is_left_out_as_often():
    """13 records, batches of 4: one is left out an epoch, and it is not always the same."""
    seen = Counter(i for step in range(3 * 600) for i in shuffled_batch(13, 4, step, seed=0).tolist())
    for i in range(13):
        assert abs(seen[i] - 600 * 12 / 13) < 4 * (600 * 12 / 169) ** 0.5


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(shuffled_batch(50, 50, step, seed).tolist()) for step in range(3) for seed in range(3)]
    assert len(set(orders)) == 9
    assert torch.equal(shuffled_batch(50, 8, 4, 1), shuffled_batch(50, 8, 4, 1))


def test_fewer_records_than_a_batch_are_one_batch():
    for step in range(3):
        assert sorted(shuffled_batch(3, 8, step, seed=0).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="no records"):
        shuffled_batch(0, 8, 0, seed=0)


def test_each_step_has_random_numbers_of_its_own():
    draws = {torch.rand(1, generator=step_generator(seed, step)).item() for seed in range(20) for step in range(50)}
    assert len(draws) > 990  # float32: a rare coincidence is none of ours
    assert torch.equal(torch.rand(5, generator=step_generator(3, 7)), torch.rand(5, generator=step_generator(3, 7)))


# -------------------------------------------------------------------------------------------------- optimizer


def test_only_matrices_decay():
    """With a gradient of 0, a step multiplies what decays by 1 - rate * decay and leaves the rest."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = make_optimizer(layer, 0.1, weight_decay=0.5)
    (0.0 * sum(p.sum() for p in layer.parameters())).backward()
    optimizer_step(optimizer, 0.1)
    for old, new in zip(before, layer.parameters(), strict=True):
        assert_near(new, old * (1 - 0.1 * 0.5) if old.dim() == 2 else old)


def test_the_gradient_is_clipped_to_norm_1_and_its_norm_reported():
    """Adam forgets a common factor, so the clipped gradient is read from its first moment: 0.1 times it."""
    weight = torch.nn.Parameter(torch.tensor([[0.0, 0.0]]))
    optimizer = make_optimizer(torch.nn.ParameterList([weight]), 0.1)
    (weight * torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimizer_step(optimizer, 0.1) == pytest.approx(5)
    assert_near(optimizer.state[weight]["exp_avg"], [[0.06, 0.08]])
    assert weight.grad is None
    (weight * torch.tensor([[0.3, 0.4]])).sum().backward()
    assert optimizer_step(optimizer, 0.1) == pytest.approx(0.5)  # a small one stays
    assert_near(optimizer.state[weight]["exp_avg"], [[0.9 * 0.06 + 0.03, 0.9 * 0.08 + 0.04]])


def test_the_step_uses_the_learning_rate_it_is_given():
    moves = []
    for rate in (0.1, 0.2, 0.0):
        weight = torch.nn.Parameter(torch.zeros(1, 1))
        optimizer = make_optimizer(torch.nn.ParameterList([weight]), learning_rate=5.0)
        weight.sum().backward()
        optimizer_step(optimizer, rate)
        moves.append(weight.item())
    assert moves == pytest.approx([-0.1, -0.2, 0.0], abs=1e-6)


def test_frozen_weights_are_left_alone():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    count = sum(len(group["params"]) for group in make_optimizer(model, 0.1).param_groups)
    assert count == len(list(model.parameters())) - 1


# ------------------------------------------------------------------------------------------------------ a run


@dataclass
class WalkConfig:
    steps: int = 7
    save_every: int = 3
    pace: float = 1.0


def walk(checkpoint: Path | None, config: WalkConfig, dies_in: int | None = None, where: str = "before"):
    """A walk of Adam: a step depends on the weights, the optimizer's state, and the step's random numbers."""
    torch.manual_seed(0)
    weights = torch.nn.Linear(3, 1)
    optimizer = make_optimizer(weights, 0.1)
    run = Run("walk", config, checkpoint, False, weights=weights, optimizer=optimizer)
    visited = []
    for step in run:
        visited.append(step)
        if step == dies_in and where == "before":
            raise Killed
        loss = weights(torch.rand(4, 3, generator=step_generator(0, step))).square().mean()
        loss.backward()
        optimizer_step(optimizer, 0.1 * config.pace)
        run.record(step, loss=loss)
        if step == dies_in:
            raise Killed
    return weights_of(weights), run.log, visited


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("step", range(7))
def test_wherever_a_run_dies_it_ends_the_same(tmp_path, step, where):
    expected, expected_log, _ = walk(None, WalkConfig())
    with pytest.raises(Killed):
        walk(tmp_path / "walk.pt", WalkConfig(), dies_in=step, where=where)
    weights, log, visited = walk(tmp_path / "walk.pt", WalkConfig())
    assert torch.equal(weights, expected) and log == expected_log
    assert visited == list(range(step // 3 * 3, 7))  # from the last multiple of save_every


def test_a_run_that_dies_again_and_again_ends_the_same(tmp_path):
    expected, expected_log, _ = walk(None, WalkConfig())
    for step in (2, 3, 4, 5, 6):
        with pytest.raises(Killed):
            walk(tmp_path / "walk.pt", WalkConfig(), dies_in=step)
    weights, log, _ = walk(tmp_path / "walk.pt", WalkConfig())
    assert torch.equal(weights, expected) and log == expected_log


def test_a_finished_run_takes_no_more_steps(tmp_path):
    expected, log, visited = walk(tmp_path / "walk.pt", WalkConfig())
    assert visited == list(range(7))
    weights, same_log, visited = walk(tmp_path / "walk.pt", WalkConfig())
    assert visited == [] and torch.equal(weights, expected) and same_log == log
    assert load_progress(tmp_path / "walk.pt")["step"] == 7  # saved at the end, though 7 is no multiple of 3


def test_the_log_holds_a_line_a_step_in_plain_numbers(tmp_path):
    for checkpoint in (None, tmp_path / "walk.pt"):
        log = walk(checkpoint, WalkConfig())[1]
        assert [line["step"] for line in log] == list(range(7))
        assert all(type(line["loss"]) is float for line in log)


def test_a_checkpoint_of_other_settings_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "walk.pt"
    walk(path, WalkConfig())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other settings.*delete it"):
        walk(path, WalkConfig(pace=2.0))
    assert path.read_bytes() == before


def test_a_broken_checkpoint_says_what_to_do(tmp_path):
    path = tmp_path / "walk.pt"
    walk(path, WalkConfig())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="delete it to start that run again"):
        walk(path, WalkConfig())


def test_nothing_but_the_checkpoint_is_left_in_the_folder(tmp_path):
    walk(tmp_path / "walk.pt", WalkConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["walk.pt"]


# ---------------------------------------------------------------------- every loop, killed and taken up again

DEMONSTRATIONS = [{"prompt": f"w{a}", "response": f"w{b} w{a} <eos>"} for a in range(2, 6) for b in (6, 7)]
PREFERENCES = [d | {"chosen": d["response"], "rejected": f"{d['prompt']} <eos>"} for d in DEMONSTRATIONS]
PROMPTS = [f"w{a} w{b}" for a in range(2, 6) for b in (7, 8)] + ["w9"]
SHORT = {"steps": 6, "warmup": 1, "decay": 3, "save_every": 2, "eval_every": 2, "batch_size": 3}


def dies_in(call: int, function):
    """`function`, but for call number `call` (from 0), in which it raises. -1 never does."""
    calls = 0

    def mortal(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise Killed
        return function(*args, **kwargs)

    return mortal


def count_words(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(set(response.split()))) for response in responses])


def measure(model) -> dict:
    return {"first_weight": next(model.parameters()).flatten()[0].item()}


def sft(model, call=-1, seed=0, **kwargs):
    replay = torch.randint(2, 12, (5, 9), generator=torch.Generator().manual_seed(0))
    config = SFTConfig(**SHORT, replay_rows=2, accumulation=2, seed=seed)
    return train_sft(
        model, TOKENIZER, DEMONSTRATIONS, config, replay=replay, held_out=DEMONSTRATIONS[:3],
        loss_fn=dies_in(call, sft_loss), progress=False, **kwargs,
    )  # fmt: skip


def reward(model, call=-1, seed=0, **kwargs):
    return train_reward_model(
        model, TOKENIZER, PREFERENCES, RewardConfig(**SHORT, seed=seed), held_out=PREFERENCES[:3],
        loss_fn=dies_in(call, reward_model_loss), progress=False, **kwargs,
    )  # fmt: skip


def dpo(model, call=-1, seed=0, **kwargs):
    config = DPOConfig(**SHORT, learning_rate=1e-2, nll_coef=0.1, seed=seed)
    return train_dpo(
        model, TOKENIZER, PREFERENCES, config, ref_model=tiny_llama(), loss_fn=dies_in(call, dpo_loss),
        evaluate_fn=measure, progress=False, **kwargs,
    )  # fmt: skip


def dpo_measured(model, call=-1, seed=0, **kwargs):
    """It dies while it is measured: the step is done, and in no checkpoint."""
    config = DPOConfig(**SHORT, learning_rate=1e-2, seed=seed)
    return train_dpo(
        model, TOKENIZER, PREFERENCES, config, ref_model=tiny_llama(), evaluate_fn=dies_in(call, measure),
        progress=False, **kwargs,
    )  # fmt: skip


def ppo(model, call=-1, seed=0, **kwargs):
    config = PPOConfig(**SHORT, epochs=2, value_warmup=1, learning_rate=1e-2, max_new_tokens=4, seed=seed)
    return train_ppo(
        model, TOKENIZER, PROMPTS, dies_in(call, count_words), config, ref_model=tiny_llama(),
        evaluate_fn=measure, progress=False, **kwargs,
    )  # fmt: skip


def ppo_measured(model, call=-1, seed=0, **kwargs):
    config = PPOConfig(**SHORT, epochs=1, value_warmup=0, learning_rate=1e-2, max_new_tokens=4, seed=seed)
    return train_ppo(
        model, TOKENIZER, PROMPTS, count_words, config, ref_model=tiny_llama(),
        evaluate_fn=dies_in(call, measure), progress=False, **kwargs,
    )  # fmt: skip


def policy(seed: int = 0):
    return tiny_llama(seed)


def scorer(seed: int = 0):
    return RewardModel(tiny_llama(seed))


# name: (loop, its model, the calls in which it dies)
LOOPS = {
    "sft": (sft, policy, (0, 3, 6, 11)),  # two micro-batches a step
    "reward": (reward, scorer, (0, 3, 4, 5)),
    "dpo": (dpo, policy, (0, 3, 4, 5)),
    "dpo, measured": (dpo_measured, policy, (0, 1, 3)),
    "ppo": (ppo, policy, (0, 3, 4, 5)),
    "ppo, measured": (ppo_measured, policy, (0, 1, 3)),
}
DEATHS = [(name, call) for name, (_, _, calls) in LOOPS.items() for call in calls]


@pytest.mark.parametrize(("name", "call"), DEATHS)
def test_every_loop_ends_the_same_after_it_was_killed(tmp_path, name, call):
    train, new, _ = LOOPS[name]
    whole = new()
    expected = train(whole)
    assert not torch.equal(weights_of(whole), weights_of(new()))  # it does learn

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        train(new(), call, checkpoint=path)
    # What the resumed model brings is overwritten by the checkpoint; where there is none, it begins anew.
    resumed = new(seed=7) if path.exists() else new()
    torch.manual_seed(123)  # the process that takes over has other random numbers
    assert train(resumed, checkpoint=path) == expected
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_refuses_a_checkpoint_of_another_run(tmp_path, name):
    train, new, _ = LOOPS[name]
    train(new(), checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="other settings"):
        train(new(), seed=1, checkpoint=tmp_path / "run.pt")


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from test_optimize import ppo, policy, count_words
import test_optimize

def telling(prompts, responses):
    print("sampled", flush=True)
    return count_words(prompts, responses)

test_optimize.dies_in = lambda call, function: telling if function is count_words else function
ppo(policy(), checkpoint=sys.argv[1])
print("finished", flush=True)
sys.stdin.readline()  # wait to be killed: an end of its own would prove nothing
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL, which Windows has not")
def test_a_process_that_was_killed_is_taken_up_by_another(tmp_path):
    """SIGKILL in the fourth of six iterations of PPO, wherever it just is; then this process goes on."""
    expected_policy = policy()
    expected = ppo(expected_policy)
    path = tmp_path / "ppo.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))},
    )  # fmt: skip
    try:
        heard = [process.stdout.readline().strip() for _ in range(4)]
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert heard == ["sampled"] * 4, heard
    assert process.returncode == -signal.SIGKILL
    assert 2 <= load_progress(path)["step"] < 6
    resumed = policy(seed=7)
    assert ppo(resumed, checkpoint=path) == expected
    assert torch.equal(weights_of(resumed), weights_of(expected_policy))
