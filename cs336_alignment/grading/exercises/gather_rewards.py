import torch
from torch import Tensor

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import (
    garbage_beside,
    in_pieces,
    left_padded,
    right_padded,
    with_empty_rows,
)
from cs336_alignment.grading.exercises.last_response_index import last_response_index
from cs336_alignment.grading.inputs import integer, uniform


def gather_rewards(values: Tensor, response_mask: Tensor) -> Tensor:
    last = last_response_index(response_mask)
    picked = values.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(last >= 0, picked, torch.zeros_like(picked))


def problem(g, mask, dtype=torch.float32):
    """Values of either sign, so that 0 is far from all of them."""
    values = uniform(g, 0.5, 3, *mask.shape, dtype=dtype)
    return values * (1 - 2 * torch.randint(0, 2, mask.shape, generator=g)), mask


def dirty(g, mask, dtype=torch.float32):
    """Some rows without a response, and nothing but garbage where no reward is read."""
    values, mask = problem(g, with_empty_rows(mask), dtype)
    return garbage_beside(mask, values), mask


def with_where(values, mask):
    one = torch.arange(mask.shape[1]) == last_response_index(mask)[:, None]
    return torch.where(one, values, torch.zeros((), dtype=values.dtype)).sum(1)


def row_by_row(values, mask):
    found = []
    for row, marks in zip(values, mask):
        found.append(row[marks][-1] if marks.any() else torch.tensor(0.0, dtype=values.dtype))
    return torch.stack(found)


def filled_in(values, mask):
    rewards = torch.zeros(len(mask), dtype=values.dtype)
    rows = mask.any(1).nonzero()[:, 0]
    rewards[rows] = values[rows, last_response_index(mask)[rows]]
    return rewards


def wrongly(index):
    """Reads at another column, and still gives empty rows 0."""

    def function(values, mask):
        picked = values.gather(1, index(mask).clamp(0, mask.shape[1] - 1)[:, None])[:, 0]
        return torch.where(mask.any(1), picked, 0.0)

    return function


EXERCISE = Exercise(
    name="gather_rewards",
    assignment="a2_reward",
    order=5,
    points=5,
    minutes=10,
    lecture="08_reward_models",
    equation="8.9",
    parameters=("values", "response_mask"),
    reference=gather_rewards,
    cases=(
        Case(
            "padding on either side",
            "for each row the value at the position of its last response token",
            lambda g: [problem(g, right_padded(g, 4, 9)), problem(g, left_padded(g, 3, 7))],
            1,
            visible=True,
        ),
        Case(
            "garbage beside it",
            "values at all other positions never matter, not even NaN, and a row without a response token has reward "
            "0: select or use torch.where, since 0 * NaN is NaN",
            lambda g: [dirty(g, right_padded(g, 4, 9)), dirty(g, right_padded(g, 3, 7))],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch, with padding on either side and responses in pieces",
            lambda g: [
                problem(g, right_padded(g, integer(g, 3, 6), integer(g, 6, 12))),
                problem(g, left_padded(g, 4, 8)),
                problem(g, in_pieces(g, 4, 12)),
                dirty(g, in_pieces(g, 5, 12)),
            ],
            2,
        ),
        Case(
            "gradient in double precision",
            "differentiable by the values: only the one that is read has a gradient, and none is NaN",
            lambda g: [dirty(g, right_padded(g, n, 8), torch.float64) for n in (3, 5)],
            1,
            gradients=(0,),
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "A row without a response token has reward 0; the index -1 reads its last column.",
            lambda v, m: v[torch.arange(len(m)), last_response_index(m)],
        ),
        Mistake(
            "A row without a response token has reward 0: you read its first column, or multiply what stands there by 0 (0 * NaN is NaN).",
            lambda v, m: v[torch.arange(len(m)), last_response_index(m).clamp(min=0)],
        ),
        Mistake(
            "You read the last column, which is padding where the padding is on the right.",
            lambda v, m: v[:, -1],
        ),
        Mistake(
            "You read the last column, which is padding where the padding is on the right.",
            wrongly(lambda m: torch.full((len(m),), m.shape[1] - 1)),
        ),
        Mistake(
            "You count the response tokens; their number minus 1 is a position only if the response starts in column 0.",
            wrongly(lambda m: m.sum(1) - 1),
        ),
        Mistake("You read the first response token; it has not seen the answer.", wrongly(lambda m: m.int().argmax(1))),
        Mistake(
            "One too few: you read the token before the last one of the response.",
            wrongly(lambda m: last_response_index(m) - 1),
        ),
        Mistake("One too far: you read the token after the response.", wrongly(lambda m: last_response_index(m) + 1)),
        Mistake(
            "You average over the response; the reward is read at its last token alone.",
            lambda v, m: torch.where(m, v, 0.0).sum(1) / m.sum(1).clamp(min=1),
        ),
        Mistake(
            "You sum over the response; the reward is read at its last token alone.",
            lambda v, m: torch.where(m, v, 0.0).sum(1),
        ),
        Mistake(
            "You take the largest value of the response; the reward is read at its last token alone.",
            lambda v, m: torch.where(m.any(1), torch.where(m, v, -torch.inf).max(1).values, 0.0),
        ),
        Mistake(
            "0 * NaN is NaN: multiplying by a mask does not remove garbage. Index, or use torch.where.",
            lambda v, m: (v * (torch.arange(m.shape[1]) == last_response_index(m)[:, None])).sum(1),
        ),
        Mistake(
            "You read every row at the positions of all rows: index with the row numbers too, or use gather.",
            lambda v, m: v[:, last_response_index(m)],
        ),
        Mistake(
            "One reward for each row: the result has shape (B,), without a further dimension.",
            lambda v, m: gather_rewards(v, m)[:, None],
        ),
    ),
    wrong=(
        lambda v, m: gather_rewards(v, m).detach(),
        wrongly(lambda m: m.int().argmax(1) + m.sum(1) - 1),
    ),
    unusual=(with_where, row_by_row, filled_in),
    stripped=("models.last_real_position",),
)
