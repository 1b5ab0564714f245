import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._texts import text, texts, tokenizer
from cs336_alignment.grading.inputs import integer
from cs336_alignment.tokens import tokenize_prompt_and_output


def problem(g, pairs, pad="<pad>"):
    return *texts(g, pairs), tokenizer(g, pad)


def straddling(g, pairs=3):
    """Some prompts end in "ice" where the output begins with "cream", which together are one token."""
    prompts, outputs, words = problem(g, pairs)
    prompts[1], outputs[1] = f"{prompts[1]} ice", f"cream {outputs[1]}"
    return prompts, outputs, words


def empty_output(g, pairs=3):
    prompts, outputs, words = problem(g, pairs)
    outputs[1] = ""
    return prompts, outputs, words


def empty_prompt(g):
    prompts, outputs, words = problem(g, 3)
    prompts[integer(g, 0, 2)] = ["", " "][integer(g, 0, 1)]
    return prompts, outputs, words


def unequal(g):
    prompts, outputs, words = problem(g, 3)
    return prompts, outputs[:2], words


def fitting(prompts, outputs, words):
    """The errors that the statement asks for."""
    if len(prompts) != len(outputs) or not prompts or words.pad_token_id is None:
        raise ValueError("unequal lists, no pairs or no pad token")
    if any(not words.encode(prompt, add_special_tokens=False) for prompt in prompts):
        raise ValueError("an empty prompt")


def with_pad_sequence(prompts, outputs, words):
    """Rows and masks as tensors, padded by torch; slices are copied."""
    fitting(prompts, outputs, words)
    x = [torch.tensor(words.encode(p, add_special_tokens=False)) for p in prompts]
    y = [torch.tensor(words.encode(o, add_special_tokens=False), dtype=torch.long) for o in outputs]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.cat(pair) for pair in zip(x, y)], batch_first=True, padding_value=words.pad_token_id
    )
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.cat([torch.zeros(len(a)), torch.ones(len(b))]) for a, b in zip(x, y)], batch_first=True
    )
    return {
        "response_mask": mask[:, 1:].bool(),
        "labels": ids[:, 1:].clone(),
        "input_ids": ids[:, :-1].clone(),
        "lengths": mask.sum(1),
    }


def with_lists(prompts, outputs, words):
    fitting(prompts, outputs, words)
    rows = []
    for prompt, output in zip(prompts, outputs):
        x, y = words.encode(prompt, add_special_tokens=False), words.encode(output, add_special_tokens=False)
        rows.append((x + y, [False] * (len(x) - 1) + [True] * len(y)))
    longest = max(len(ids) for ids, _ in rows)
    full = [ids + [words.pad_token_id] * (longest - len(ids)) for ids, _ in rows]
    masks = [mask + [False] * (longest - 1 - len(mask)) for _, mask in rows]
    return {
        "input_ids": torch.tensor([ids[:-1] for ids in full]),
        "labels": torch.tensor([ids[1:] for ids in full]),
        "response_mask": torch.tensor(masks),
    }


def position_by_position(prompts, outputs, words):
    fitting(prompts, outputs, words)
    starts = [len(words.encode(p, add_special_tokens=False)) for p in prompts]
    ends = [n + len(words.encode(o, add_special_tokens=False)) for n, o in zip(starts, outputs)]
    size = max(ends) - 1
    ids = torch.full((len(prompts), size + 1), words.pad_token_id)
    mask = torch.zeros(len(prompts), size, dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs)):
        joined = words.encode(prompt, add_special_tokens=False) + words.encode(output, add_special_tokens=False)
        for t, token in enumerate(joined):
            ids[row, t] = token
            if t >= starts[row]:
                mask[row, t - 1] = True
    return {"input_ids": ids[:, :size], "labels": ids[:, 1:], "response_mask": mask}


def wrongly(edit=lambda batch, lengths, words: batch, encode=None, check=fitting, pad=None, side="right", raw=False):
    """The right function with one thing changed. edit gets the batch and what it was made from: with raw, "ids" and
    "is_output" before the shift; lengths are (prompt, whole) of each row."""
    encode = encode or (lambda words, p, o: [words.encode(x, add_special_tokens=False) for x in (p, o)])

    def function(prompts, outputs, words):
        check(prompts, outputs, words)
        parts = [encode(words, p, o) for p, o in zip(prompts, outputs)]
        lengths = [(len(x), len(x) + len(y)) for x, y in parts]
        longest = max(whole for _, whole in lengths)
        fill = words.pad_token_id if pad is None else pad(words)
        ids = torch.full((len(parts), longest), fill)
        is_output = torch.zeros(len(parts), longest, dtype=torch.bool)
        for row, ((x, y), (start, end)) in enumerate(zip(parts, lengths)):
            shift = longest - end if side == "left" else 0
            ids[row, shift : shift + end] = torch.tensor(x + y, dtype=torch.long)
            is_output[row, shift + start : shift + end] = True
        if raw:
            return edit(ids, is_output, lengths, words)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, 1:]}
        return batch | edit(batch, lengths, words)

    return function


def joined(words, prompt, output):
    """Encoded together, and cut where the prompt alone would end."""
    ids = words.encode(f"{prompt} {output}", add_special_tokens=False)
    border = len(words.encode(prompt, add_special_tokens=False))
    return ids[:border], ids[border:]


def glued(words, prompt, output):
    """As `joined`, without a space between."""
    ids = words.encode(prompt + output, add_special_tokens=False)
    border = len(words.encode(prompt, add_special_tokens=False))
    return ids[:border], ids[border:]


def joined_special(words, prompt, output):
    """As `joined`, with the tokenizer's special tokens."""
    ids, border = words.encode(f"{prompt} {output}"), len(words.encode(prompt))
    return ids[:border], ids[border:]


def special(words, prompt, output):
    return words.encode(prompt), words.encode(output)


def special_once(words, prompt, output):
    return words.encode(prompt), words.encode(output, add_special_tokens=False)


def ended(words, prompt, output):
    x, y = (words.encode(part, add_special_tokens=False) for part in (prompt, output))
    return x, y + [words.eos_token_id]


def every_real_token(batch, lengths, words):
    real = [[t < whole - 1 for t in range(batch["labels"].shape[1])] for _, whole in lengths]
    return {"response_mask": torch.tensor(real)}


def and_padding(batch, lengths, words):
    rows = [[t >= start - 1 for t in range(batch["labels"].shape[1])] for start, _ in lengths]
    return {"response_mask": torch.tensor(rows)}


def all_but_the_last(batch, lengths, words):
    rows = [[start - 1 <= t < whole - 2 for t in range(batch["labels"].shape[1])] for start, whole in lengths]
    return {"response_mask": torch.tensor(rows)}


def shifted_alone(ids, is_output, lengths, words):
    """Each row shifted before it is padded: the last token of every row is missing from the inputs."""
    inputs = ids.clone()
    for row, (_, whole) in enumerate(lengths):
        inputs[row, whole - 1] = words.pad_token_id
    return {"input_ids": inputs[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, 1:]}


def unshifted(ids, is_output, lengths, words):
    return {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "response_mask": is_output[:, :-1]}


def input_mask(ids, is_output, lengths, words):
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, :-1]}


def whole_width(ids, is_output, lengths, words):
    """Not shortened: a last column without a label."""
    extra = torch.full((len(ids), 1), words.pad_token_id)
    return {
        "input_ids": ids,
        "labels": torch.cat([ids[:, 1:], extra], 1),
        "response_mask": torch.cat([is_output[:, 1:], extra < 0], 1),
    }


def without(**ignored):
    """`fitting` with one of its errors left out."""

    def check(prompts, outputs, words):
        if "pairs" not in ignored and (len(prompts) != len(outputs) or not prompts):
            raise ValueError("pairs")
        if "pad" not in ignored and words.pad_token_id is None:
            raise ValueError("pad")
        if "prompt" not in ignored and any(not p.split() for p in prompts):
            raise ValueError("prompt")

    return check


def pad_or_end(words):
    return words.eos_token_id if words.pad_token_id is None else words.pad_token_id


EXERCISE = Exercise(
    name="tokenize_prompt_and_output",
    assignment="a1_sft",
    order=2,
    points=10,
    minutes=25,
    lecture="02_sft_mechanics",
    equation="2.2",
    parameters=("prompts", "outputs", "tokenizer"),
    reference=tokenize_prompt_and_output,
    cases=(
        Case(
            "a ragged batch",
            "prompt and output joined, padded on the right, then shifted: labels[:, t] is the token after "
            "input_ids[:, t], and response_mask is True where that label belongs to the output",
            lambda g: [problem(g, 3), problem(g, 4)],
            2,
            visible=True,
        ),
        Case(
            "padding that looks like the end",
            "where the pad token is the end token, the mask still covers the output's own <end>, and no padding",
            lambda g: [problem(g, 3, "<end>"), problem(g, 4, "<end>")],
            1,
            visible=True,
        ),
        Case(
            "tokens that would straddle the border",
            "prompt and output encoded apart: the border is always where the mask says",
            lambda g: [straddling(g), straddling(g, 4)],
            1,
            visible=True,
        ),
        Case(
            "bad input",
            "ValueError without a pad token, for an empty prompt, and for lists of different lengths",
            lambda g: [problem(g, 3, None), empty_prompt(g), unequal(g), problem(g, 2)],
            1,
            visible=True,
        ),
        Case(
            "other batches",
            "right for any texts and vocabulary, and for pairs whose tokens would straddle the border",
            lambda g: [problem(g, integer(g, 2, 6)), problem(g, 5, "<end>"), problem(g, 8), straddling(g, 5)],
            3,
        ),
        Case(
            "an empty output",
            "a row without output tokens has a mask of False alone",
            lambda g: [empty_output(g), empty_output(g, 4)],
            1,
        ),
        Case(
            "more bad input",
            "ValueError without a pad token, for an empty prompt, and for lists of different lengths or without pairs",
            lambda g: [
                problem(g, 2),
                problem(g, 2, None),
                empty_prompt(g),
                unequal(g),
                ([], [], tokenizer(g)),
                ([text(g, 2, 3)], [""], tokenizer(g, None)),
            ],
            1,
        ),
    ),
    mistakes=(
        Mistake(
            "The mask is not shifted with the labels: it stands one position too far right, so the first output "
            "token is left out.",
            wrongly(input_mask, raw=True),
        ),
        Mistake("The labels are not shifted: they equal the inputs.", wrongly(unshifted, raw=True)),
        Mistake("The mask covers the prompt too.", wrongly(every_real_token), "2.4"),
        Mistake("The mask covers the padding behind the output too.", wrongly(and_padding), "2.4"),
        Mistake(
            "The mask comes from comparing ids with the pad id: where pad and <end> are the same token, the output's "
            "own <end> falls out. Make the mask from lengths.",
            equation="2.4",
            function=wrongly(lambda b, n, w: {"response_mask": b["response_mask"] & (b["labels"] != w.pad_token_id)}),
        ),
        Mistake("The mask leaves the last output token out: <end> must be learned.", wrongly(all_but_the_last), "2.1"),
        Mistake(
            "The mask is inverted.",
            wrongly(lambda b, n, w: {"response_mask": ~b["response_mask"]}),
            "2.4",
        ),
        Mistake(
            "The mask must be boolean: integers would select rows by number when used as an index.",
            equation="2.4",
            function=wrongly(lambda b, n, w: {"response_mask": b["response_mask"].long()}),
        ),
        Mistake(
            "The tokenizer adds special tokens of its own: pass add_special_tokens=False both times.",
            wrongly(encode=special),
        ),
        Mistake(
            "The tokenizer adds a special token to the prompt: pass add_special_tokens=False both times.",
            wrongly(encode=special_once),
        ),
        Mistake(
            "An end token is added behind each output; the caller has written it already.", wrongly(encode=ended), "2.1"
        ),
        Mistake(
            "Prompt and output are encoded together: a token may straddle the border. Encode them apart and join ids.",
            wrongly(encode=joined),
        ),
        Mistake(
            "Prompt and output are encoded together, and the tokenizer adds special tokens. Encode them apart, with "
            "add_special_tokens=False both times, and join ids.",
            wrongly(encode=joined_special),
        ),
        Mistake(
            "The texts are glued together without a space before they are encoded. Encode them apart and join ids.",
            wrongly(encode=glued),
        ),
        Mistake("The padding is on the left; it belongs on the right.", wrongly(side="left")),
        Mistake("The padding is 0; use tokenizer.pad_token_id.", wrongly(pad=lambda words: 0)),
        Mistake(
            "Each row is shifted before it is padded: input_ids loses the last token of every row. Pad first, then "
            "cut a column.",
            wrongly(shifted_alone, raw=True),
        ),
        Mistake("S is the longest length less one: cut the last column of the inputs.", wrongly(whole_width, raw=True)),
        Mistake(
            "Labels outside the mask are token ids too (the prompt's and the padding's), not -100: the mask says "
            "what counts.",
            equation="2.4",
            function=wrongly(lambda b, n, w: {"labels": torch.where(b["response_mask"], b["labels"], -100)}),
        ),
        Mistake(
            "Without a pad token this must raise ValueError: the caller has to choose one.",
            wrongly(check=without(pad=True), pad=pad_or_end),
        ),
        Mistake(
            "An empty prompt must raise ValueError: nothing stands before the first output token.",
            wrongly(check=without(prompt=True)),
        ),
        Mistake(
            "Lists of different lengths must raise ValueError: zip silently drops what is left over.",
            wrongly(check=without(pairs=True)),
        ),
    ),
    wrong=(
        wrongly(lambda b, n, w: {k: x[:, :-1] for k, x in b.items()}),
        wrongly(encode=lambda w, p, o: [list(dict.fromkeys(w.encode(x, add_special_tokens=False))) for x in (p, o)]),
        wrongly(lambda b, n, w: {"response_mask": b["response_mask"] & (b["labels"] != w.eos_token_id)}),
    ),
    unusual=(with_pad_sequence, with_lists, position_by_position),
    stripped=("tokens.tokenize_prompt_and_output", "tokens.collate"),
)
