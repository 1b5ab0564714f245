import torch
from torch import Tensor

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import in_pieces, left_padded, right_padded, with_empty_rows
from cs336_alignment.grading.inputs import integer


def last_response_index(response_mask: Tensor) -> Tensor:
    columns = torch.arange(response_mask.shape[1])
    return torch.where(response_mask, columns, -1).max(dim=1).values


def in_a_loop(mask):
    return torch.tensor([max((i for i, x in enumerate(row) if x), default=-1) for row in mask.tolist()])


def from_the_end(mask):
    index = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return torch.where(mask.any(1), index, torch.full_like(index, -1))


def by_cumulative_sum(mask):
    return mask.cumsum(1).argmax(1).masked_fill(~mask.any(1), -1).int()


def by_nonzero(mask):
    result = torch.full((len(mask),), -1)
    for row, column in mask.nonzero():
        result[row] = column
    return result


def filled(index_of):
    """A wrong answer that still gives empty rows -1."""

    def function(mask):
        index = index_of(mask)
        return torch.where(mask.any(1), index, torch.full_like(index, -1))

    return function


EXERCISE = Exercise(
    name="last_response_index",
    assignment="a2_reward",
    order=4,
    points=6,
    minutes=10,
    lecture="08_reward_models",
    equation="8.9",
    parameters=("response_mask",),
    reference=last_response_index,
    cases=(
        Case(
            "padding on either side",
            "the column of the last True of each row, wherever the padding stands",
            lambda g: [(right_padded(g, 4, 9),), (left_padded(g, 3, 7),)],
            1,
            visible=True,
        ),
        Case(
            "a response in pieces",
            "the last True, also where a conversation of several turns has False between two answers",
            lambda g: [(in_pieces(g, 3, 11),), (in_pieces(g, 4, 13),)],
            1,
            visible=True,
        ),
        Case(
            "rows without a response",
            "-1 for a row without any True, and the other rows right",
            lambda g: [(with_empty_rows(right_padded(g, 4, 8)),), (with_empty_rows(right_padded(g, 3, 6)),)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch, with padding on either side",
            lambda g: [
                (right_padded(g, integer(g, 3, 7), integer(g, 6, 12)),),
                (left_padded(g, integer(g, 2, 5), integer(g, 6, 12)),),
                (right_padded(g, 3, 10),),
            ],
            2,
        ),
        Case(
            "pieces and rows without a response",
            "the column of the last True, and -1 where there is none",
            lambda g: [(with_empty_rows(in_pieces(g, n, 14)),) for n in (3, 6)],
            1,
        ),
    ),
    mistakes=(
        Mistake(
            "You count the response tokens; their number minus 1 is a position only if the response starts in column 0.",
            lambda m: m.sum(1) - 1,
        ),
        Mistake("This is the position of the *first* True.", filled(lambda m: m.int().argmax(1))),
        Mistake("This is the position of the *first* True.", lambda m: m.int().argmax(1)),
        Mistake(
            "This is the last column, which is padding where the padding is on the right.",
            filled(lambda m: torch.full((len(m),), m.shape[1] - 1)),
        ),
        Mistake(
            "This is the last column, which is padding where the padding is on the right.",
            lambda m: torch.full((len(m),), m.shape[1] - 1),
        ),
        Mistake(
            "First True plus number of Trues is right only while no False stands between them.",
            filled(lambda m: m.int().argmax(1) + m.sum(1) - 1),
        ),
        Mistake(
            "You stop at the first False after the response has begun; it may go on after it.",
            filled(lambda m: m.int().argmax(1) + (m | (m.cumsum(1) == 0)).int().cumprod(1).mul(m).sum(1) - 1),
        ),
        Mistake(
            "This counts from the end of the row; subtract it from the last column.",
            filled(lambda m: m.flip(1).int().argmax(1)),
        ),
        Mistake(
            "This counts from the end of the row; subtract it from the last column.",
            lambda m: m.flip(1).int().argmax(1),
        ),
        Mistake("One too far: this is the position after the last True.", filled(lambda m: last_response_index(m) + 1)),
        Mistake("One too far: this is the position after the last True.", lambda m: last_response_index(m) + 1),
        Mistake(
            "One too few: this is the token before the last one of the response, not the end of text itself.",
            filled(lambda m: last_response_index(m) - 1),
        ),
        Mistake(
            "A row without any True gives -1; argmax of zeros says 0, as if the first token were a response.",
            lambda m: (m * torch.arange(1, m.shape[1] + 1)).argmax(1),
        ),
        Mistake(
            "A row without any True gives -1; yours says that its last column is a response.",
            lambda m: m.shape[1] - 1 - m.flip(1).int().argmax(1),
        ),
        Mistake(
            "One position for each row: the result has shape (B,), without a further dimension.",
            lambda m: last_response_index(m)[:, None],
        ),
        Mistake("One position for each row; this is the last one of the whole batch.", lambda m: m.nonzero()[-1, 1]),
        Mistake(
            "Positions are asked for; this is a mask that marks them.",
            lambda m: torch.arange(m.shape[1]) == last_response_index(m)[:, None],
        ),
    ),
    wrong=(
        lambda m: torch.where(m, torch.arange(m.shape[1]), -1).max(0).values,
        filled(lambda m: (~m).sum(1)),
        filled(lambda m: m.sum(1)),
    ),
    unusual=(in_a_loop, from_the_end, by_cumulative_sum, by_nonzero),
    stripped=("models.last_real_position",),
)
