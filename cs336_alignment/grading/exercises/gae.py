import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import filled, left, ragged, spoiled
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.ppo import gae


def problem(g, rows, longest, gamma=None, lam=None, dtype=torch.float32, empty=False):
    mask = ragged(g, rows, longest, empty)
    gamma = number(g, 0.8, 0.99) if gamma is None else gamma
    lam = number(g, 0.5, 0.95) if lam is None else lam
    rewards = uniform(g, -2, 2, rows, longest, dtype=dtype)
    values = uniform(g, -1, 3, rows, longest, dtype=dtype)
    return *filled(mask, rewards, values), mask, gamma, lam


def garbage(g, *size, **kwargs):
    rewards, values, mask, gamma, lam = problem(g, *size, empty=True, **kwargs)
    return *spoiled(mask, rewards, values), mask, gamma, lam


def real_values(g, *size, **kwargs):
    """A value model says something at every position, padding included."""
    rewards, values, mask, gamma, lam = problem(g, *size, **kwargs)
    return rewards, torch.where(mask, values, uniform(g, 1, 3, *values.shape)), mask, gamma, lam


def no_prefix(g, rows, longest):
    """Padding on the left."""
    rewards, values, mask, gamma, lam = problem(g, rows, longest)
    return rewards.flip(1), values.flip(1), left(mask), gamma, lam


def with_a_gap(g, rows):
    rewards, values, mask, gamma, lam = problem(g, rows, 5)
    mask = torch.ones_like(mask)
    mask[integer(g, 0, rows - 1), integer(g, 1, 3)] = False
    return rewards, values, mask, gamma, lam


def check_prefix(mask):
    """The error that the statement asks for."""
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("not a prefix")


def as_a_sum(rewards, values, mask, gamma, lam):
    """Every TD error, and the powers of gamma lam as a matrix."""
    if not torch.equal(mask, mask.cummin(dim=1).values):
        raise ValueError("holes")
    r, v = (torch.where(mask, x, torch.zeros_like(x)) for x in (rewards, values))
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    deltas = r + gamma * following - v
    t = torch.arange(r.shape[1])
    distance = (t[None, :] - t[:, None]).clamp(min=0)
    powers = torch.where(t[None, :] >= t[:, None], torch.tensor(gamma * lam, dtype=r.dtype) ** distance, 0.0)
    advantages = torch.einsum("bs,ts->bt", deltas, powers)
    return advantages, advantages + v


def row_by_row(rewards, values, mask, gamma, lam):
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i, row in enumerate(mask.tolist()):
        n = sum(row)
        if not all(row[:n]):
            raise ValueError("no prefix")
        advantage = 0.0
        for t in range(n - 1, -1, -1):
            after = values[i, t + 1] if t + 1 < n else 0.0
            advantage = rewards[i, t] + gamma * after - values[i, t] + gamma * lam * advantage
            advantages[i, t], returns[i, t] = advantage, advantage + values[i, t]
    return [advantages, returns]


def lambda_returns(rewards, values, mask, gamma, lam):
    """The same from the returns: R_t = r_t + gamma ((1 - lam) V_{t+1} + lam R_{t+1})."""
    check_prefix(mask)
    r, v = (x.masked_fill(~mask, 0.0).double() for x in (rewards, values))
    columns, after, following = [], torch.zeros(len(r), dtype=torch.float64), torch.zeros(len(r), dtype=torch.float64)
    for t in range(r.shape[1])[::-1]:
        after = r[:, t] + gamma * ((1 - lam) * following + lam * after)
        following = v[:, t]
        columns.insert(0, after)
    returns = torch.stack(columns, 1).masked_fill(~mask, 0.0)
    return returns - v, returns


def wrongly(
    delta=lambda r, v, after, gamma, lam: r + gamma * after - v,
    decay=lambda gamma, lam: gamma * lam,
    returns=lambda advantages, values, rewards, mask, gamma: advantages + values,
    after_all=lambda advantages, returns, mask: (advantages, returns),
    order=-1,
    clean=True,
    check=check_prefix,
    beyond=lambda values: 0.0,
):
    """The right function with one thing changed."""

    def function(rewards, values, mask, gamma, lam):
        check(mask)
        if clean:
            rewards, values = filled(mask, rewards, values)
        advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        columns = rewards.shape[1]
        for t in list(range(columns))[::order]:
            after = values[:, t + 1] if t + 1 < columns else beyond(values)
            error = delta(rewards[:, t], values[:, t], after, gamma, lam)
            advantage = error + decay(gamma, lam) * advantage
            advantages[:, t] = advantage
        result = after_all(advantages, returns(advantages, values, rewards, mask, gamma), mask)
        return tuple(torch.where(mask, x, 0.0) for x in result) if clean else result

    return function


def rewards_to_go(rewards, gamma):
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        columns.insert(0, total)
    return torch.stack(columns, 1)


def bootstrapped(own):
    """After the last token of a row comes the value of the padding behind it, or of the token itself."""

    def function(rewards, values, mask, gamma, lam):
        check_prefix(mask)
        advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        columns = rewards.shape[1]
        for t in reversed(range(columns)):
            after = values[:, t + 1] if t + 1 < columns else torch.zeros_like(values[:, 0])
            if own:
                is_last = mask[:, t] & (~mask[:, t + 1] if t + 1 < columns else True)
                after = torch.where(is_last, values[:, t], after)
            error = rewards[:, t] + gamma * after - values[:, t]
            advantage = torch.where(mask[:, t], error + gamma * lam * advantage, 0.0)
            advantages[:, t] = advantage
        return advantages, torch.where(mask, advantages + values, 0.0)

    return function


def whitened(advantages, mask):
    x = advantages[mask]
    return torch.where(mask, (advantages - x.mean()) / (x.std() + 1e-8), 0.0)


EXERCISE = Exercise(
    name="gae",
    assignment="a3_ppo",
    order=6,
    points=10,
    minutes=25,
    lecture="11_ppo",
    equation="11.6",
    parameters=("rewards", "values", "mask", "gamma", "lam"),
    reference=gae,
    cases=(
        Case(
            "a ragged batch",
            "advantages A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, and returns "
            "A_t + V_t; V = A = 0 after the last response token",
            lambda g: [problem(g, 3, 4, 0.9, 0.8), problem(g, 4, 5)],
            2,
            visible=True,
        ),
        Case(
            "the ends of lambda",
            "lam = 0 gives the TD error delta_t, lam = 1 the discounted rewards to go minus V_t",
            lambda g: [problem(g, 3, 4, 0.9, 0.0), problem(g, 3, 4, 0.9, 1.0), problem(g, 3, 4, 1.0, 1.0)],
            1,
            visible=True,
        ),
        Case(
            "values of the padding",
            "what the value model says behind the last response token never matters, be it a number or NaN; the "
            "result is 0 there, and in a row without response tokens",
            lambda g: [real_values(g, 3, 4), real_values(g, 4, 5), garbage(g, 3, 4)],
            1,
            visible=True,
        ),
        Case(
            "no prefix",
            "ValueError where the response tokens of a row do not stand at its beginning, without gaps",
            lambda g: [no_prefix(g, 3, 4), with_a_gap(g, 3), problem(g, 3, 4)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch, gamma and lambda",
            lambda g: [
                problem(g, integer(g, 2, 6), integer(g, 5, 9)),
                problem(g, 4, 6, 1.0, 0.95),
                problem(g, 3, 5, 0.7, 0.0),
                problem(g, 4, 1),
                real_values(g, 6, 6),
            ],
            2,
        ),
        Case(
            "garbage and empty rows",
            "what stands behind the mask never matters",
            lambda g: [garbage(g, 4, 6), garbage(g, 6, 3), real_values(g, 4, 5, empty=True)],
            1,
        ),
        Case(
            "other masks that are no prefix",
            "ValueError, whichever row it is",
            lambda g: [problem(g, 4, 5, empty=True), with_a_gap(g, 5), no_prefix(g, 5, 3)],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 5, 6, dtype=torch.float64) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "After the last response token you take the value of the padding; the episode is over, so it is 0.",
            bootstrapped(own=False),
            "11.5",
        ),
        Mistake(
            "After the last response token you take that token's own value once more; the episode is over, so it is 0.",
            bootstrapped(own=True),
            "11.5",
        ),
        Mistake("gamma is missing from the TD error.", wrongly(lambda r, v, a, gamma, lam: r + a - v), "11.5"),
        Mistake("The TD error lacks the value of the next state.", wrongly(lambda r, v, a, gamma, lam: r - v), "11.5"),
        Mistake(
            "The TD error lacks the value of the state itself, the baseline.",
            wrongly(lambda r, v, a, gamma, lam: r + gamma * a),
            "11.5",
        ),
        Mistake(
            "lambda has no place in the TD error; it weighs the advantage of the next token.",
            wrongly(lambda r, v, a, gamma, lam: r + gamma * lam * a - v),
            "11.5",
        ),
        Mistake(
            "lambda is missing: this is always the Monte Carlo advantage.", wrongly(decay=lambda gamma, lam: gamma)
        ),
        Mistake("gamma is missing from the decay gamma lam.", wrongly(decay=lambda gamma, lam: lam)),
        Mistake(
            "The TD errors of later tokens are missing: this is lambda = 0.", wrongly(decay=lambda gamma, lam: 0.0)
        ),
        Mistake(
            "The recursion runs forwards: a token must collect what comes after it. Start at the last one.",
            wrongly(order=1),
        ),
        Mistake(
            "These returns are the discounted rewards to go; returns = advantages + values, for every lambda.",
            wrongly(returns=lambda a, v, r, m, gamma: rewards_to_go(r, gamma)),
        ),
        Mistake("The returns are the advantages; add the values.", wrongly(returns=lambda a, v, r, m, gamma: a)),
        Mistake(
            "The returns are advantages + rewards; add the values.", wrongly(returns=lambda a, v, r, m, gamma: a + r)
        ),
        Mistake(
            "The two results are swapped: advantages first, then returns.", wrongly(after_all=lambda a, r, m: (r, a))
        ),
        Mistake(
            "gae does not whiten: that comes later, and returns are made from the plain advantages.",
            wrongly(after_all=lambda a, r, m: (whitened(a, m), r)),
        ),
        Mistake(
            "What stands behind the mask is in the result, or came into it: replace rewards and values there by 0 first.",
            wrongly(clean=False),
        ),
        Mistake(
            "0 times NaN is NaN: multiplying by the mask does not remove what stands behind it. Use torch.where.",
            lambda r, v, m, gamma, lam: wrongly(clean=False)(r * m, v * m, m, gamma, lam),
        ),
        Mistake("A mask that is not a prefix of its row must raise ValueError.", wrongly(check=lambda mask: None)),
    ),
    wrong=(
        wrongly(after_all=lambda a, r, m: (a, r + 0.01 * whitened(a, m))),
        lambda rewards, values, *rest: gae(rewards.float(), values.float(), *rest),
        wrongly(after_all=lambda a, r, m: (a.cumsum(1), r)),
    ),
    unusual=(as_a_sum, row_by_row, lambda_returns),
    stripped=("ppo.gae",),
)
