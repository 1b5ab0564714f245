import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, uniform


def leave_one_out_advantages(rewards):
    k = rewards.shape[1]
    if k < 2:
        raise ValueError(f"no other answer to compare with: {k} answers to each prompt")
    return (rewards - rewards.mean(1, keepdim=True)) * k / (k - 1)


def groups(g, prompts, answers, dtype=torch.float32):
    """Rewards of (prompts, answers); the prompts differ in difficulty, and there are ties."""
    rewards = uniform(g, -2, 2, prompts, answers, dtype=torch.float64) + uniform(
        g, -3, 3, prompts, 1, dtype=torch.float64
    )
    rewards[0, :2] = rewards[0, 0]
    return (rewards.to(dtype),)


def alike(g, prompts, answers):
    """All answers to the first prompt are worth the same."""
    (rewards,) = groups(g, prompts, answers)
    rewards[0] = integer(g, -3, 3) / 2
    return (rewards,)


def fitting(rewards):
    """The error that the statement asks for."""
    if rewards.shape[1] < 2:
        raise ValueError("groups of one")


def one_by_one(rewards):
    fitting(rewards)
    rows = []
    for row in rewards:
        rows.append(torch.stack([x - torch.cat([row[:i], row[i + 1 :]]).mean() for i, x in enumerate(row)]))
    return torch.stack(rows)


def by_matrix(rewards):
    fitting(rewards)
    k = rewards.shape[1]
    others = (1 - torch.eye(k, dtype=rewards.dtype)) / (k - 1)
    return rewards - rewards @ others


def from_sums(rewards):
    if rewards.size(1) == 1:
        raise ValueError("one answer")
    x = rewards.double()
    return x - (x.sum(dim=1, keepdim=True) - x) / (x.size(1) - 1)


def wrongly(function, check=fitting):
    return lambda rewards: (check(rewards), function(rewards, rewards.shape[1]))[1]


EXERCISE = Exercise(
    name="leave_one_out_advantages",
    assignment="a3_ppo",
    order=2,
    points=5,
    minutes=10,
    lecture="10_policy_gradients",
    equation="10.11",
    parameters=("rewards",),
    reference=leave_one_out_advantages,
    cases=(
        Case(
            "a few prompts",
            "each reward minus the mean of the OTHER rewards of the same prompt (row)",
            lambda g: [groups(g, 3, 4), groups(g, 2, 3)],
            1,
            visible=True,
        ),
        Case(
            "answers all alike",
            "0 where all answers to a prompt are worth the same",
            lambda g: [alike(g, 2, 3), alike(g, 3, 2)],
            0.5,
            visible=True,
        ),
        Case(
            "groups of one",
            "ValueError where a prompt has one answer only: there is no other",
            lambda g: [groups(g, 3, 1), groups(g, 3, 2)],
            0.5,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any number of prompts and answers",
            lambda g: [groups(g, integer(g, 2, 6), 2), groups(g, 1, integer(g, 3, 9)), groups(g, 4, 7), alike(g, 3, 5)],
            2,
        ),
        Case(
            "double precision, and groups of one",
            "float64 stays float64; ValueError for one answer",
            lambda g: [groups(g, 8, 5, torch.float64), groups(g, 6, 3, torch.float64), groups(g, 1, 1)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The mean contains the answer's own reward, which shrinks the gradient: leave it out.",
            wrongly(lambda x, k: x - x.mean(1, keepdim=True)),
            "10.10",
        ),
        Mistake(
            "The factor is upside down: r - b = K / (K - 1) (r - mean).",
            wrongly(lambda x, k: (x - x.mean(1, keepdim=True)) * (k - 1) / k),
        ),
        Mistake(
            "The sum of the others is divided by K; there are K - 1 of them.",
            wrongly(lambda x, k: x - (x.sum(1, keepdim=True) - x) / k),
        ),
        Mistake(
            "Subtract the mean of the others, not their sum.",
            wrongly(lambda x, k: x - (x.sum(1, keepdim=True) - x)),
        ),
        Mistake(
            "The own reward is still in the sum that you divide by K - 1.",
            wrongly(lambda x, k: x - x.sum(1, keepdim=True) / (k - 1)),
        ),
        Mistake(
            "This is the baseline; subtract it from the reward.",
            wrongly(lambda x, k: (x.sum(1, keepdim=True) - x) / (k - 1)),
        ),
        Mistake(
            "The sign is wrong: an answer better than the others has a positive advantage.",
            wrongly(lambda x, k: -(x - x.mean(1, keepdim=True)) * k / (k - 1)),
        ),
        Mistake(
            "You compare with answers to other prompts: the mean runs over the same row.",
            wrongly(lambda x, k: x - (x.sum() - x) / (x.numel() - 1)),
        ),
        Mistake(
            "The mean runs over the prompts; it belongs over the answers of a prompt, dimension 1.",
            wrongly(lambda x, k: x - (x.sum(0, keepdim=True) - x) / max(1, len(x) - 1)),
        ),
        Mistake(
            "You divide by the standard deviation of the group, as GRPO does; the leave-one-out advantage does not.",
            wrongly(lambda x, k: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)),
        ),
        Mistake(
            "One advantage for each answer: do not average over them.", wrongly(lambda x, k: x.mean(1) * k / (k - 1))
        ),
        Mistake(
            "With one answer to a prompt this must raise ValueError.",
            wrongly(lambda x, k: (x - x.mean(1, keepdim=True)) * k / max(1, k - 1), check=lambda x: None),
        ),
    ),
    wrong=(
        wrongly(lambda x, k: x - x.median(1, keepdim=True).values),
        lambda rewards: leave_one_out_advantages(rewards.float()),
    ),
    unusual=(one_by_one, by_matrix, from_sums),
)
