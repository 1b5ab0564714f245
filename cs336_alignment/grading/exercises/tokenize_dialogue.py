import torch
from torch import Tensor

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._texts import texts, tokenizer
from cs336_alignment.grading.inputs import integer


def tokenize_dialogue(turns: list[tuple[str, str]], tokenizer) -> dict[str, Tensor]:
    ids, island = [], []
    for prompt, response in turns:
        for text, is_response in ((prompt, False), (response, True)):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            ids += tokens
            island += [is_response] * len(tokens)
    return {
        "input_ids": torch.tensor([ids[:-1]]),
        "labels": torch.tensor([ids[1:]]),
        "response_mask": torch.tensor([island[1:]]),
    }


def problem(g, turns):
    return list(zip(*texts(g, turns))), tokenizer(g)


def with_tensors(turns, words):
    parts = [torch.tensor(words.encode(text, add_special_tokens=False)) for turn in turns for text in turn]
    kinds = [torch.full((len(part),), i % 2 == 1) for i, part in enumerate(parts)]
    ids, island = torch.cat(parts)[None], torch.cat(kinds)[None]
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": island[:, 1:]}


def changed(edit):
    """The right answer with its parts edited."""

    def function(turns, words):
        batch = tokenize_dialogue(turns, words)
        return batch | edit(batch["input_ids"], batch["labels"], batch["response_mask"])

    return function


def last_only(ids, labels, mask):
    before = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)  # the last token of each island
    end_of_second_last = before.nonzero()[:-1, 1].max() if before.sum() > 1 else -1
    return {"response_mask": mask & (torch.arange(mask.shape[1]) > end_of_second_last)}


def from_first(ids, labels, mask):
    return {"response_mask": mask.cumsum(1) > 0}


EXERCISE = Exercise(
    name="tokenize_dialogue",
    assignment="a1_sft",
    order=8,
    points=0,
    minutes=15,
    lecture="02_sft_mechanics",
    equation="2.14",
    parameters=("turns", "tokenizer"),
    reference=tokenize_dialogue,
    cases=(
        Case(
            "two turns and three",
            "one row; response_mask has an island for each response, with its <end>",
            lambda g: [problem(g, 2), problem(g, 3)],
            0,
            visible=True,
        ),
        Case(
            "one turn and more",
            "one turn is what tokenize_prompt_and_output makes of one pair",
            lambda g: [problem(g, 1), problem(g, integer(g, 4, 6))],
            0,
            visible=True,
        ),
    ),
    mistakes=(
        Mistake("Only the last response counts; each one has its island in the mask.", changed(last_only)),
        Mistake("The mask covers the later prompts too: only responses are targets.", changed(from_first)),
        Mistake(
            "The mask is not shifted with the labels.",
            lambda turns, words: (
                tokenize_dialogue(turns, words)
                | {
                    "response_mask": tokenize_dialogue([(turns[0][0] + " hat", turns[0][1]), *turns[1:]], words)[
                        "response_mask"
                    ][:, :-1]
                }
            ),
        ),
        Mistake("The labels are not shifted.", changed(lambda ids, labels, mask: {"labels": ids}), "2.2"),
        Mistake("The mask must be boolean.", changed(lambda ids, labels, mask: {"response_mask": mask.long()}), "2.4"),
        Mistake(
            "Each tensor has one row: shape (1, S).",
            lambda turns, words: {name: x[0] for name, x in tokenize_dialogue(turns, words).items()},
        ),
    ),
    unusual=(with_tensors,),
)
