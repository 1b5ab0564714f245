"""Files of other people's data, read into the two records this package trains on.

A `Demonstration` is a prompt and a response to imitate; a `Preference` is a prompt with a better and a
worse response. Four layouts are read into them, from a local file or from a `datasets` hub id:

    flan          inputs + targets (or prompt + response, question + answer, ...)     demonstrations
    alpaca        instruction, input, output                                          demonstrations
    oasst         OpenAssistant: trees of messages with ranks, nested or as a table   both
    preference    prompt, chosen, rejected; texts or lists of chat messages           preferences

Files are UTF-8: `.json` (a list of records), `.jsonl`, `.csv`, each also with `.gz`, `.parquet`, and
folders written by `Dataset.save_to_disk`. JSON and CSV are parsed here and not by `datasets`, because an
error should name the record and the field, and an Arrow error names neither. No tensor is made here:
`tokens.tokenize_prompt_and_output` does that from `chat_format(prompt)` and the response.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

# Prompt and response fields met in the wild under FLAN's idea of a record, most specific first.
FLAN_FIELDS = (
    ("inputs", "targets"),
    ("inputs_pretokenized", "targets_pretokenized"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("input", "target"),
)
DEMONSTRATION_FORMATS = {
    "flan": "inputs + targets (or prompt + response, prompt + completion, question + answer)",
    "alpaca": "instruction + output, with or without input",
    "oasst": "message trees (prompt with nested replies) or a table (message_id, parent_id, role, text)",
}
PREFERENCE_FORMATS = {
    "preference": "chosen + rejected, with prompt, or instruction and input, or chat messages",
    "oasst": DEMONSTRATION_FORMATS["oasst"],
}
PROBLEMS_SHOWN = 5  # an error lists this many bad records and counts the rest


class Demonstration(TypedDict):
    prompt: str
    response: str


class Preference(TypedDict):
    prompt: str
    chosen: str
    rejected: str
    p_chosen: NotRequired[float]  # soft label: P(chosen is preferred), in [0, 1]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file. Records and lines count from 1."""

    message: str
    record: int | None = None
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        place = [] if self.record is None else [f"record {self.record:,}"]
        if self.line is not None:
            place.append(f"(line {self.line:,})" if place else f"line {self.line:,}")
        where = " ".join(place)
        if self.field is not None:
            where += f"{', ' if where else ''}field {self.field!r}"
        return f"{where}: {self.message}" if where else self.message


class DataError(ValueError):
    """A file that cannot be used, and why: `source`, and `problems` with record, line and field."""

    def __init__(self, source: str, problems: list[Problem], summary: str = "", advice: str = ""):
        self.source, self.problems = source, problems
        if len(problems) == 1 and not summary:
            text = f"{source}: {problems[0]}"
        else:
            shown = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
            more = len(problems) - PROBLEMS_SHOWN
            text = f"{source}: {summary}\n{shown}" + (f"\n  ... and {more:,} more" if more > 0 else "")
        super().__init__(f"{text}\n{advice}" if advice else text)


class _Bad(Exception):
    """What is wrong with one record; `_convert` adds where it stands."""

    def __init__(self, message: str, field: str | None = None, record: int | None = None):
        super().__init__(message)
        self.message, self.field, self.record = message, field, record


# ---------------------------------------------------------------------------------------------------------
# The two entry points


def load_demonstrations(
    source: str | Path,
    format: str = "auto",
    *,
    bad: Literal["raise", "skip"] = "raise",
    split: str = "train",
    name: str | None = None,
) -> list[Demonstration]:
    """Read prompts with one response each.

    Args:
        source: a local file, or a hub id such as `tatsu-lab/alpaca`.
        format: `flan`, `alpaca`, `oasst`, or `auto` to tell it from the field names.
        bad: `raise` reports the bad records in one error, `skip` leaves them out with a warning.
        split: the split of a hub data set.
        name: the configuration of a hub data set that has several.

    Raises:
        DataError: the file cannot be read, or holds bad records and `bad` is `raise`.
    """
    table = _read(source, split, name)
    format = _detect(table, format, DEMONSTRATION_FORMATS)
    if format == "oasst":
        return _convert(table, _oasst_trees(table), oasst_demonstrations, bad, format)
    row_loader = {"flan": flan_demonstration, "alpaca": alpaca_demonstration}[format]
    return _convert(table, enumerate(table.rows), lambda row: [row_loader(row)], bad, format)


def load_preferences(
    source: str | Path,
    format: str = "auto",
    *,
    bad: Literal["raise", "skip"] = "raise",
    ties: Literal["raise", "drop"] = "raise",
    split: str = "train",
    name: str | None = None,
) -> list[Preference]:
    """Read prompts with a better and a worse response each.

    Args:
        source, bad, split, name: as for `load_demonstrations`.
        format: `preference`, `oasst`, or `auto`.
        ties: a pair whose two texts are equal holds no preference: `raise` reports it as a bad record,
            `drop` leaves such pairs out with a warning and still raises for anything else.

    Raises:
        DataError: the file cannot be read, or holds bad records and `bad` is `raise`.
    """
    table = _read(source, split, name)
    format = _detect(table, format, PREFERENCE_FORMATS)
    if format == "oasst":
        pairs = _convert(table, _oasst_trees(table), oasst_preferences, bad, format, drop_ties=ties == "drop")
    else:
        rows = enumerate(table.rows)
        pairs = _convert(table, rows, lambda row: [preference_pair(row)], bad, format, drop_ties=ties == "drop")
    return pairs


def split_by_prompt(records: list[Any], held_out: float = 0.1, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Deal records into (train, held-out) by a hash of the prompt.

    Equal prompts (up to case and spacing), and the turns of one conversation, land on one side, so no
    held-out prompt was trained on; adding records later moves none of the old ones. `held_out` is the share
    to expect, not the exact one.
    """
    train, held = [], []
    for record in records:
        key = " ".join(_first_turn(record["prompt"]).casefold().split())
        digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
        (held if int.from_bytes(digest[:8], "big") < held_out * 2**64 else train).append(record)
    return train, held


def chat_format(prompt: str, tokenizer: Any = None) -> str:
    """The text a model continues with its response: the prompt inside a chat template.

    With a tokenizer that has a chat template, that template, up to where the assistant begins. Otherwise a
    plain default, which any tokenizer can encode:

    >>> chat_format("Name a colour.")
    '### Instruction:\\nName a colour.\\n\\n### Response:\\n'

    Encode the result without adding special tokens (the template has written them), and let the response end
    with `tokenizer.eos_token`.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"### Instruction:\n{prompt}\n\n### Response:\n"


# ---------------------------------------------------------------------------------------------------------
# One record of each layout


def flan_demonstration(row: dict[str, Any]) -> Demonstration:
    """A FLAN record: a task already written out as text, and its answer.

    >>> flan_demonstration({"inputs": "Is a whale a fish? yes or no", "targets": "no", "task": "animals"})
    {'prompt': 'Is a whale a fish? yes or no', 'response': 'no'}

    Other field names with the same meaning are in `FLAN_FIELDS`.
    """
    complete = [pair for pair in FLAN_FIELDS if pair[0] in row and pair[1] in row]
    partial = [pair for pair in FLAN_FIELDS if pair[0] in row or pair[1] in row]
    prompt, response = (complete or partial or FLAN_FIELDS)[0]
    return {"prompt": _text(row, prompt), "response": _text(row, response)}


def alpaca_demonstration(row: dict[str, Any]) -> Demonstration:
    """An Alpaca record: an instruction, perhaps an input it applies to, and the output.

    >>> alpaca_demonstration({"instruction": "Make it plural.", "input": "a goose", "output": "geese"})
    {'prompt': 'Make it plural.\\n\\na goose', 'response': 'geese'}

    `input` may be absent, empty or null. Dolly's names, `context` and `response`, are read too.
    """
    response = "response" if "response" in row and "output" not in row else "output"
    return {"prompt": _instruction(row), "response": _text(row, response)}


def preference_pair(row: dict[str, Any]) -> Preference:
    """A preference record: a prompt, the better response and the worse one.

    >>> preference_pair({"prompt": "Name a bird.", "chosen": "An owl.", "rejected": "A bat."})
    {'prompt': 'Name a bird.', 'chosen': 'An owl.', 'rejected': 'A bat.'}

    The prompt may also be `question`, or `instruction` with `input`, and every field may be a list of chat
    messages, as in many sets on the hub; what precedes the last message is then the prompt:

    >>> preference_pair({
    ...     "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    ...     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
    ... })
    {'prompt': 'Hi', 'chosen': 'Hello!', 'rejected': 'What?'}

    Dialogue texts ("\\n\\nHuman: ...\\n\\nAssistant: ...", as in hh-rlhf) are read likewise. `p_chosen`, a
    soft label in [0, 1], is passed on.
    """
    before, chosen = _response(row, "chosen")
    before_rejected, rejected = _response(row, "rejected")
    if before != before_rejected:
        raise _Bad("its messages before the last differ from those of 'chosen': a pair shares one prompt", "rejected")
    if before:
        prompt = _conversation(before)
    elif "instruction" in row:
        prompt = _instruction(row)
    elif isinstance(row.get("prompt"), list):
        prompt = _conversation(_messages(row, "prompt"))
    else:
        prompt = _text(row, "question" if "question" in row and "prompt" not in row else "prompt")
    pair: Preference = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if row.get("p_chosen") is not None:
        p = row["p_chosen"]
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise _Bad(f"is {_kind(p)}, not a number between 0 and 1", "p_chosen")
        pair["p_chosen"] = float(p)
    return pair


def oasst_demonstrations(tree: dict[str, Any]) -> Iterator[Demonstration]:
    """The best-ranked path through an OpenAssistant tree, one demonstration for each assistant turn on it.

    A tree is a prompt with nested replies; rank 0 is the best of its siblings:

    >>> tree = {"message_id": "p", "role": "prompter", "text": "Name a bird.", "replies": [
    ...     {"message_id": "a", "role": "assistant", "text": "A bat.", "rank": 1, "replies": []},
    ...     {"message_id": "b", "role": "assistant", "text": "An owl.", "rank": 0, "replies": []}]}
    >>> list(oasst_demonstrations(tree))
    [{'prompt': 'Name a bird.', 'response': 'An owl.'}]

    Of several assistant replies each needs a rank of its own; of several follow-up prompts, which the project
    seldom ranked, the best-ranked or else the first is taken. Deleted messages are left out with what hangs
    on them. The prompt of a later turn is the conversation so far ("user: ...", "assistant: ...").
    """
    turns, message = [], tree
    while True:
        turns.append(_turn(message, "user"))
        answers = _ranked(message, _replies(message))
        if not answers:
            return
        answer = _turn(answers[0], "assistant")
        yield {"prompt": _conversation(turns), "response": answer[1]}
        turns.append(answer)
        follow_ups = _replies(answers[0])
        if not follow_ups:
            return
        message = min(follow_ups, key=lambda m: m["rank"] if isinstance(m.get("rank"), int | float) else 1e9)


def oasst_preferences(tree: dict[str, Any]) -> Iterator[Preference | _Bad]:
    """Every pair of ranked sibling answers in an OpenAssistant tree: K answers give K (K - 1) / 2 pairs.

    >>> tree = {"message_id": "p", "role": "prompter", "text": "Name a bird.", "replies": [
    ...     {"message_id": "a", "role": "assistant", "text": "A bat.", "rank": 1, "replies": []},
    ...     {"message_id": "b", "role": "assistant", "text": "An owl.", "rank": 0, "replies": []}]}
    >>> list(oasst_preferences(tree))
    [{'prompt': 'Name a bird.', 'chosen': 'An owl.', 'rejected': 'A bat.'}]
    """
    waiting = [([], tree)]  # a stack, not recursion: a chain of messages may be longer than Python's stack
    while waiting:
        turns, message = waiting.pop()
        try:
            turns = [*turns, _turn(message, "user")]
            replies = _replies(message)
            answers = [_turn(reply, "assistant")[1] for reply in replies]
            waiting += [
                ([*turns, ("assistant", answer)], follow_up)
                for reply, answer in zip(replies, answers, strict=True)
                for follow_up in _replies(reply)
            ]
            ranked = [_turn(reply, "assistant")[1] for reply in _ranked(message, replies)]
        except _Bad as problem:
            yield problem
            continue
        for better, chosen in enumerate(ranked):
            for rejected in ranked[better + 1 :]:
                yield {"prompt": _conversation(turns), "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------------------------------------------------
# Fields


def _kind(value: Any) -> str:
    """A JSON value in words, short enough for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    return {list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _text(row: dict[str, Any], field: str) -> str:
    """A field that must hold text, without the white space around it."""
    if field not in row:
        found = ", ".join(repr(key) for key in list(row)[:8]) or "none"
        raise _Bad(f"is missing (fields found: {found}); add it, or name the layout with format=", field)
    value = row[field]
    if not isinstance(value, str):
        raise _Bad(f"is {_kind(value)}, not text; write it as a string in quotes", field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Bad(r"holds half of a \u escape pair, which is no character; write both halves", field) from None
    if not value.strip():
        raise _Bad("is empty; write the text or leave the record out", field)
    return value.strip()


def _instruction(row: dict[str, Any]) -> str:
    instruction = _text(row, "instruction")
    field = "context" if "context" in row and "input" not in row else "input"
    if row.get(field) in (None, "") or isinstance(row[field], str) and not row[field].strip():
        return instruction
    return f"{instruction}\n\n{_text(row, field)}"


def _messages(row: dict[str, Any], field: str) -> list[tuple[str, str]]:
    """A list of {"role", "content"} as (role, text) pairs."""
    turns = []
    for number, message in enumerate(row[field], 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _Bad(f"message {number} is {_kind(message)}, not an object with 'role' and 'content'", field)
        if message["role"] not in ("system", "user", "assistant"):
            raise _Bad(
                f"message {number} has {_kind(message['role'])} as its role, not system, user or assistant",
                field,
            )
        try:
            turns.append((message["role"], _text(message, "content")))
        except _Bad as problem:
            raise _Bad(f"'content' of message {number} {problem.message}", field) from None
    return turns


def _response(row: dict[str, Any], field: str) -> tuple[list[tuple[str, str]], str]:
    """The turns before a response (none if the field is plain text) and the response."""
    if isinstance(row.get(field), list):
        turns = _messages(row, field)
    else:
        text = _text(row, field)
        # hh-rlhf: the whole dialogue as one text. Where there is a prompt field it is a quotation.
        if not re.match(r"Human:", text) or "prompt" in row:
            return [], text
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)[1:]
        names = {"Human": "user", "Assistant": "assistant"}
        turns = [(names[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if not turns or turns[-1][0] != "assistant" or not turns[-1][1]:
        raise _Bad("does not end with a message of the assistant that says something", field)
    return turns[:-1], turns[-1][1]


def _conversation(turns: list[tuple[str, str]]) -> str:
    """A prompt as one text: a lone user turn as it stands, several turns with their roles before them."""
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


def _first_turn(prompt: str) -> str:
    """The opening of a conversation that `_conversation` wrote, so that its turns can be kept together."""
    opening, later, _ = prompt.partition("\n\nassistant: ")
    return opening.removeprefix("user: ") if later else prompt


# ---------------------------------------------------------------------------------------------------------
# OpenAssistant's messages


def _name(message: dict[str, Any]) -> str:
    return f"message {message.get('message_id', '(no message_id)')}"


def _turn(message: dict[str, Any], role: Literal["user", "assistant"]) -> tuple[str, str]:
    """(role, text) of a message that must be the given side's."""
    record = message.get("_record")
    names = ("user", "prompter") if role == "user" else ("assistant",)
    if message.get("role") not in names:
        found = _kind(message["role"]) if "role" in message else "missing"
        raise _Bad(f"of {_name(message)} is {found}, where {names[-1]!r} is due; turns alternate", "role", record)
    try:
        return role, _text(message, "text")
    except _Bad as problem:
        raise _Bad(f"of {_name(message)} {problem.message}", "text", record) from None


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise _Bad(f"of {_name(message)} is not a list of messages", "replies", message.get("_record"))
    return [reply for reply in replies if not reply.get("deleted")]


def _ranked(parent: dict[str, Any], replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers from best (rank 0) to worst. One answer needs no rank; of several each needs its own."""
    if len(replies) < 2:
        return replies
    seen: dict[float, dict[str, Any]] = {}
    for reply in replies:
        rank = reply.get("rank")
        if rank is None:
            unranked = sum(other.get("rank") is None for other in replies)
            raise _Bad(
                f"of {_name(reply)} is missing: {unranked} of the {len(replies)} answers to {_name(parent)} "
                "have none; rank all of them or mark the others deleted",
                "rank",
                reply.get("_record"),
            )
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise _Bad(f"of {_name(reply)} is {_kind(rank)}, not a number", "rank", reply.get("_record"))
        if rank in seen:
            raise _Bad(
                f"{rank:g} is given to both {_name(seen[rank])} and {_name(reply)}, answers to "
                f"{_name(parent)}; give each its own, a tie says nothing about which is better",
                "rank",
                reply.get("_record"),
            )
        seen[rank] = reply
    return [seen[rank] for rank in sorted(seen)]


def _oasst_trees(table: "_Table") -> Iterator[tuple[int, dict[str, Any] | _Bad]]:
    """(record, tree) for the nested export, and for the flat table after its messages are joined."""
    nested = any(isinstance(row, dict) and isinstance(row.get("prompt"), dict) for row in table.rows)
    if nested:
        for index, row in enumerate(table.rows):
            if not isinstance(row, dict):
                yield index, row  # `_convert` says what it is instead of an object
            elif not isinstance(row.get("prompt"), dict):
                found = f"is {_kind(row['prompt'])}" if "prompt" in row else "is missing"
                yield index, _Bad(f"{found}; it holds the first message, with its replies", "prompt")
            elif not row["prompt"].get("deleted"):
                yield index, row["prompt"]
        return

    messages: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(table.rows):
        if not isinstance(row, dict):
            yield index, row
        elif not isinstance(row.get("message_id"), str):
            found = f"is {_kind(row['message_id'])}, not text" if "message_id" in row else "is missing"
            yield index, _Bad(found, "message_id")
        elif not isinstance(row.get("parent_id") or "", str):
            yield index, _Bad(f"is {_kind(row['parent_id'])}, not text or null", "parent_id")
        elif row["message_id"] in messages:
            first = messages[row["message_id"]]["_record"] + 1
            yield index, _Bad(f"{row['message_id']} occurs twice, first in record {first:,}", "message_id")
        else:
            messages[row["message_id"]] = {**row, "replies": [], "_record": index}
    yield from _parent_problems(messages)
    for message in messages.values():
        if message.get("parent_id") in messages:
            messages[message["parent_id"]]["replies"].append(message)
    for message in messages.values():
        if not message.get("parent_id") and not message.get("deleted"):
            yield message["_record"], message


def _parent_problems(messages: dict[str, dict[str, Any]]) -> Iterator[tuple[int, _Bad]]:
    """What keeps messages from belonging to a tree: a parent that no record is, or a circle of parents."""
    checked: set[str] = set()
    for at in messages:
        path: list[str] = []
        while at not in checked:
            checked.add(at)
            path.append(at)
            message, parent = messages[at], messages[at].get("parent_id")
            if not parent:
                break
            if parent not in messages:
                text = f"of {_name(message)} is {_kind(parent)}, which is no record's message_id (an orphan)"
                problem = f"{text}; add the parent or leave its replies out"
                yield message["_record"], _Bad(problem, "parent_id")
                break
            if parent in path:
                circle = " -> ".join([*path[path.index(parent) :], parent])
                problem = f"of {_name(message)} closes a circle ({circle}); a first message has no parent"
                yield message["_record"], _Bad(problem, "parent_id")
                break
            at = parent


# ---------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class _Table:
    """What a file holds, before its fields are looked at."""

    source: str
    rows: list[Any]
    line: Callable[[int], int | None] = lambda index: None  # the line on which record `index` (from 0) begins


def _convert(
    table: _Table,
    items: Any,
    loader: Callable[[Any], Any],
    bad: Literal["raise", "skip"],
    format: str,
    drop_ties: bool = False,
) -> list[Any]:
    """Run a loader over the records; gather what is wrong and say it once."""
    if bad not in ("raise", "skip"):
        raise ValueError(f'bad is "raise" or "skip", not {bad!r}')
    good: list[Any] = []
    problems: list[Problem] = []
    ties: list[Problem] = []

    def note(problem: _Bad, index: int, into: list[Problem]) -> None:
        index = index if problem.record is None else problem.record
        into.append(Problem(problem.message, index + 1, table.line(index), problem.field))

    for index, item in items:
        try:
            if isinstance(item, _Bad):
                raise item
            if not isinstance(item, dict):
                raise _Bad(f"is {_kind(item)}, not an object with fields")
            for record in loader(item):
                if isinstance(record, _Bad):
                    note(record, index, problems)
                elif "chosen" in record and record["chosen"] == record["rejected"]:
                    tie = _Bad(
                        "has the same text as 'chosen', so the pair holds no preference; leave it out",
                        "rejected",
                    )
                    note(tie, index, ties)
                else:
                    good.append(record)
        except _Bad as problem:
            note(problem, index, problems)

    if ties and drop_ties:
        pairs = _count(len(ties), "pair")
        numbers = ", ".join(f"{tie.record:,}" for tie in ties[:PROBLEMS_SHOWN]) + (
            ", ..." if len(ties) > PROBLEMS_SHOWN else ""
        )
        warnings.warn(
            f"{table.source}: {pairs} left out, chosen and rejected being equal (record {numbers})",
            stacklevel=3,
        )
    else:
        problems = sorted(problems + ties, key=lambda problem: problem.record or 0)
    if problems:
        total = f"{len(table.rows):,} record" + ("s" if len(table.rows) != 1 else "")
        summary = f"{_count(len(problems), 'problem')} in {total}, read as {format!r}:"
        advice = 'Mend them, or pass bad="skip" to leave the bad records out.'
        error = DataError(table.source, problems, summary, advice)
        if bad == "raise":
            raise error
        warnings.warn(f"left out: {DataError(table.source, problems, summary)}", stacklevel=3)
    if not good:
        why = "every record was left out" if problems or ties else f"no {format} record gives an example"
        raise DataError(table.source, [Problem(f"nothing to train on: {why}")])
    return good


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _detect(table: _Table, format: str, formats: dict[str, str]) -> str:
    """The layout's name: as given, or told from the fields of the first hundred records."""
    if format != "auto":
        if format not in formats:
            raise ValueError(f"format is one of auto, {', '.join(formats)}, not {format!r}")
        return format
    rows = [row for row in table.rows[:100] if isinstance(row, dict)]
    if not rows:
        raise DataError(
            table.source, [Problem(f"is {_kind(table.rows[0])}, not an object with fields", 1, table.line(0))]
        )
    fields = list(dict.fromkeys(field for row in rows for field in row))
    needs = {
        "preference": [("chosen", "rejected")],
        "alpaca": [("instruction", "output"), ("instruction", "response")],
        "flan": list(FLAN_FIELDS),
        "oasst": [("message_id", "parent_id", "role", "text")],
    }
    if any(isinstance(row.get("prompt"), dict) for row in rows):
        return "oasst"
    fitting = [kind for kind, choices in needs.items() if any(set(fields).issuperset(choice) for choice in choices)]
    for kind in fitting:
        if kind in formats:
            return kind
    found = ", ".join(repr(field) for field in fields[:12])
    if fitting:
        here, there = (
            ("demonstrations", "preferences") if "preference" in formats else ("preferences", "demonstrations")
        )
        wanted = "chosen + rejected" if there == "preferences" else "one response a record"
        text = f"these are {here} ({fitting[0]}: {found}), not {there}, which need {wanted}"
        raise DataError(table.source, [Problem(text)])
    first = next(index for index, row in enumerate(table.rows) if isinstance(row, dict))
    problem = Problem(f"cannot tell the format from the fields {found}", first + 1, table.line(first))
    closest = [
        ([field for field in choice if field not in fields], kind)
        for kind, choices in needs.items()
        if kind in formats
        for choice in choices
        if set(choice) & set(fields)
    ]
    if closest:
        lacking, kind = min(closest, key=lambda entry: len(entry[0]))
        text = f"is in no record; the fields {found} come closest to {kind}"
        problem = Problem(text, problem.record, problem.line, lacking[0])
    known = "\n".join(f"  {kind}: {what}" for kind, what in formats.items())
    advice = f"Known formats:\n{known}\nRename the fields, or name the format with format=."
    raise DataError(table.source, [problem], advice=advice)


def _read(source: str | Path, split: str, name: str | None) -> _Table:
    """Parse a local file or folder, or fetch a hub data set."""
    path = Path(source).expanduser()
    label = str(source)
    if path.is_dir():
        return _read_folder(path, label)
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", label) and not re.search(
            r"\.(jsonl?|ndjson|csv|parquet)(\.gz)?$", label
        ):
            return _read_hub(label, split, name)
        raise DataError(label, [Problem(f"no such file (looked in {Path.cwd()}); a hub id has the form owner/name")])
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    if kind == ".parquet":
        return _read_parquet(path, label)
    if kind not in (".json", ".jsonl", ".ndjson", ".csv"):
        raise DataError(label, [Problem("the name should end in .json, .jsonl, .csv (also with .gz) or .parquet")])
    try:
        data = path.read_bytes()
        if suffixes[-1] == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(label, [Problem(f"not a whole gzip file ({error}); fetch it again")]) from None
    except OSError as error:
        raise DataError(label, [Problem(f"cannot be read: {error.strerror or error}")]) from None
    parse = {".json": _parse_json, ".csv": _parse_csv}.get(kind, _parse_lines)
    text = _decode(data, label, parse)
    if not text.strip():
        raise DataError(label, [Problem("the file is empty")])
    table = parse(text, label)
    if not table.rows:
        raise DataError(label, [Problem("the file holds no records")])
    return table


def _decode(data: bytes, label: str, parse: Callable[[str, str], _Table]) -> str:
    """UTF-8 text, with or without a byte order mark; an error names the first byte that is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        guess = "this looks like UTF-16"
    else:
        guess = "perhaps Latin-1 or Windows-1252"
    line = data.count(b"\n", 0, start) + 1
    text = f"byte {start:,} (0x{data[start]:02x}) is not UTF-8 ({guess}); save the file as UTF-8"
    # Bytes that are not UTF-8 become lone surrogates here, so that parsing shows which field they stand in.
    try:
        rows = parse(data.decode("utf-8-sig", "surrogateescape"), label).rows
    except DataError:
        rows = []
    record, field = next(
        ((index, key) for index, row in enumerate(rows, 1) for key, value in _pairs(row) if _undecoded(value)),
        (None, None),
    )
    raise DataError(label, [Problem(text, record, line, field)])


def _pairs(row: Any) -> list[tuple[str | None, Any]]:
    return list(row.items()) if isinstance(row, dict) else [(None, row)]


def _undecoded(value: Any) -> bool:
    return re.search("[\udc80-\udcff]", json.dumps(value, ensure_ascii=False)) is not None


def _parse_json(text: str, label: str) -> _Table:
    """A list of records, taken item by item so that an error knows which one it is in."""
    begin = _skip_space(text, 0)
    if text[begin : begin + 1] == "{":
        return _parse_object(text, label)
    if text[begin : begin + 1] != "[":
        try:
            value, _ = json.JSONDecoder().raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise _broken(error, label, None) from None
        raise DataError(label, [Problem(f"the top level is {_kind(value)}, not a list of records")])
    rows: list[Any] = []
    starts: list[int] = []
    decoder = json.JSONDecoder()
    at = end = _skip_space(text, begin + 1)
    while text[at : at + 1] != "]" or rows and text[end] == ",":  # "]" after a comma is an error, not the end
        starts.append(at)
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(error, label, len(starts), starts[-1]) from None
        except RecursionError:
            problem = Problem("is nested too deeply to be a record", len(starts), _line(text, at))
            raise DataError(label, [problem]) from None
        rows.append(value)
        end = _skip_space(text, end)
        if end == len(text):
            problem = "the file ends after this record, before the list is closed by ']': was it cut short?"
            raise DataError(label, [Problem(problem, len(rows), _line(text, end))])
        if text[end] not in ",]":
            error = json.JSONDecodeError("Expecting ',' or ']' after the record", text, end)
            raise _broken(error, label, len(rows), starts[-1])
        at = end if text[end] == "]" else _skip_space(text, end + 1)
    if text[at + 1 :].strip():
        raise _broken(json.JSONDecodeError("there is more after the end of the list", text, at + 1), label, None)
    return _Table(label, rows, lambda index: _line(text, starts[index]))


def _parse_object(text: str, label: str) -> _Table:
    """JSON whose top level is an object: JSON Lines under another name, or a wrapped list."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, _skip_space(text, 0))
    except json.JSONDecodeError as error:
        raise _broken(error, label, 1) from None
    if text[end:].strip():
        return _parse_lines(text, label)
    lists = [key for key, item in value.items() if isinstance(item, list)]
    hint = f"; the records may be under {lists[0]!r}: save that list alone" if lists else "; put [ ] around it"
    raise DataError(label, [Problem(f"the top level is an object, not a list of records{hint}")])


def _parse_lines(text: str, label: str) -> _Table:
    """JSON Lines. Split at newlines only: `splitlines` would also cut at U+2028 inside a string."""
    if text.lstrip().startswith("["):
        return _parse_json(text, label)
    rows: list[Any] = []
    lines: list[int] = []
    offset = 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            lines.append(number)
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _broken(
                    json.JSONDecodeError(error.msg, text, offset + error.pos), label, len(lines), offset
                ) from None
            except RecursionError:
                raise DataError(label, [Problem("is nested too deeply to be a record", len(lines), number)]) from None
        offset += len(line) + 1
    return _Table(label, rows, lambda index: lines[index])


def _parse_csv(text: str, label: str) -> _Table:
    """A header line and one record a row; every value is text (an empty `input` stays empty)."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Any] = []
    lines: list[int] = []
    try:
        last = reader.line_num
        header = reader.fieldnames
        last = reader.line_num
        for row in reader:
            lines.append(last + 1)
            last = reader.line_num
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None) + len(
                    row.get(None) or []
                )
                text = f"has {found} columns where the header has {len(header or [])}; quote texts with commas"
                raise DataError(label, [Problem(text, len(lines), lines[-1])])
            rows.append(row)
    except csv.Error as error:
        raise DataError(label, [Problem(f"broken CSV: {error}", len(rows) + 1, last + 1)]) from None
    return _Table(label, rows, lambda index: lines[index])


def _read_parquet(path: Path, label: str) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(label, [Problem(f"not a whole parquet file ({str(error).splitlines()[0]})")]) from None
    if not rows:
        raise DataError(label, [Problem("the file holds no records")])
    return _Table(label, rows)


def _read_folder(path: Path, label: str) -> _Table:
    if not (path / "state.json").exists():
        names = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise DataError(label, [Problem(f"a folder that save_to_disk did not write; name one file of it ({names})")])
    import datasets

    return _Table(label, datasets.load_from_disk(str(path)).to_list())


def _read_hub(label: str, split: str, name: str | None) -> _Table:
    import datasets

    try:
        data = datasets.load_dataset(label, name, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds, from no network to no such split
        text = f"no such file here, and as a hub id it could not be loaded: {type(error).__name__}: {error}"
        raise DataError(label, [Problem(text.splitlines()[0])]) from error
    return _Table(f"{label} ({split})", data.to_list())


def _skip_space(text: str, at: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _broken(error: json.JSONDecodeError, label: str, record: int | None, start: int = 0) -> DataError:
    """Say where JSON breaks, and tell a mistake in it from a file that stops short."""
    end = len(error.doc.rstrip())
    strings = re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?', error.doc[start : error.pos])
    field = next((string[1] for string in reversed(list(strings)) if string[2]), None)  # the last key before it
    if error.pos >= end or error.msg.startswith("Unterminated string") and "\n" not in error.doc[error.pos : end]:
        text = f"the file ends here, in the middle of the {'record' if record else 'list'}: was it cut short?"
        return DataError(label, [Problem(text, record, _line(error.doc, end), field)])
    text = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if field is not None:
        text += "; the mistake is in this field or just behind it"
    return DataError(label, [Problem(text, record, field=field)])
