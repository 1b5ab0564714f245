"""The loaders read what others publish, and say precisely what is wrong with what they cannot use."""

import doctest
import gzip
import json
import warnings
from pathlib import Path

import pytest

import cs336_alignment.data
from cs336_alignment.bpe import ASSISTANT, END, PAD, USER, train_bpe
from cs336_alignment.data import (
    DataError,
    chat_format,
    load_demonstrations,
    load_preferences,
    split_by_prompt,
)

HERE = Path(__file__).parent / "data"
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (REAL / "preference_pairs.json").exists(),
    reason="reads data sets that are not part of the course from ../shared/data, which is absent",
)

EGG = "How do I boil an egg?"
BOILED = "Put it in boiling water for eight minutes."
SOFT_EGG = f"user: {EGG}\n\nassistant: {BOILED}\n\nuser: And a soft one?"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_json(path, rows):
    return write(path, json.dumps(rows, indent=1))


def error_of(load, *args, **kwargs):
    """The one DataError; its text starts with the file."""
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    assert str(caught.value).startswith(str(args[0]))
    return caught.value


def only_problem(load, *args, **kwargs):
    error = error_of(load, *args, **kwargs)
    assert len(error.problems) == 1
    assert str(error.problems[0]) in str(error)
    return error.problems[0]


# --- the four layouts


def test_the_samples_in_the_docstrings_load_as_shown():
    result = doctest.testmod(cs336_alignment.data)
    assert result.attempted >= 8 and result.failed == 0


def test_alpaca_joins_instruction_and_input():
    demonstrations = load_demonstrations(HERE / "alpaca.json")
    assert demonstrations[0] == {"prompt": "Give the plural.\n\ngoose", "response": "geese"}
    assert demonstrations[1]["prompt"] == "Name a primary colour."  # an empty input adds nothing
    assert demonstrations[2] == {"prompt": "Greet me in French.", "response": "Bonjour !"}  # nor does none
    assert len(demonstrations) == 4
    assert demonstrations == load_demonstrations(str(HERE / "alpaca.json"), "alpaca")


def test_flan_reads_inputs_and_targets():
    demonstrations = load_demonstrations(HERE / "flan.jsonl")
    assert len(demonstrations) == 3  # the blank line is no record
    assert demonstrations[1] == {"prompt": "Translate to German: good morning", "response": "guten Morgen"}


@pytest.mark.parametrize("fields", cs336_alignment.data.FLAN_FIELDS)
def test_flan_reads_other_names_for_the_same_two_fields(tmp_path, fields):
    prompt, response = fields
    path = write_json(tmp_path / "x.json", [{prompt: "1 + 1 ?", response: "2"}])
    assert load_demonstrations(path) == [{"prompt": "1 + 1 ?", "response": "2"}]


def test_dolly_reads_as_alpaca(tmp_path):
    row = {"instruction": "Sum it up.", "context": "It rained.", "response": "Rain.", "category": "x"}
    path = write_json(tmp_path / "x.json", [row])
    assert load_demonstrations(path) == [{"prompt": "Sum it up.\n\nIt rained.", "response": "Rain."}]


@pytest.mark.parametrize("name", ["oasst_trees.jsonl", "oasst_table.jsonl"])
def test_oasst_demonstrations_follow_the_best_ranked_path(name):
    assert load_demonstrations(HERE / name) == [
        {"prompt": EGG, "response": BOILED},
        {"prompt": SOFT_EGG, "response": "Five minutes."},
        {"prompt": "Name a river.", "response": "The Rhine."},
    ]


@pytest.mark.parametrize("name", ["oasst_trees.jsonl", "oasst_table.jsonl"])
def test_oasst_preferences_are_all_pairs_of_ranked_siblings(name):
    assert load_preferences(HERE / name) == [
        {"prompt": EGG, "chosen": BOILED, "rejected": "In water."},
        {"prompt": EGG, "chosen": BOILED, "rejected": "Eggs are eggs."},
        {"prompt": EGG, "chosen": "In water.", "rejected": "Eggs are eggs."},
        {"prompt": "Name a river.", "chosen": "The Rhine.", "rejected": "The Alps."},
    ]


def test_oasst_follow_up_prompts_need_no_rank_and_the_first_is_taken(tmp_path):
    rows = [
        message("a", None, "prompter", "Q1"),
        message("b", "a", "assistant", "A1"),
        message("c", "b", "prompter", "Q2"),
        message("d", "b", "prompter", "Q3"),
        message("e", "c", "assistant", "A2"),
        message("f", "d", "assistant", "A3"),
    ]
    path = write_json(tmp_path / "x.json", rows)
    assert [record["response"] for record in load_demonstrations(path)] == ["A1", "A2"]
    rows[3]["rank"] = 0
    write_json(path, rows)
    assert [record["response"] for record in load_demonstrations(path)] == ["A1", "A3"]
    rows[2]["rank"] = 1
    write_json(path, rows)
    assert [record["response"] for record in load_demonstrations(path)] == ["A1", "A3"]


def test_a_long_conversation_does_not_exhaust_pythons_stack(tmp_path):
    rows = [message("0", None, "prompter", "Q")]
    for i in range(1, 3001):
        rows.append(message(str(i), str(i - 1), "assistant" if i % 2 else "prompter", "T"))
    rows += [message("x", "2998", "assistant", "U", 1)]
    rows[2999]["rank"] = 0
    path = write_json(tmp_path / "x.json", rows)
    assert len(load_preferences(path)) == 1


def test_preferences_read_prompt_instruction_or_question():
    assert load_preferences(HERE / "preferences.json") == [
        {"prompt": "Name a bird.", "chosen": "An owl.", "rejected": "A bat."},
        {"prompt": "Give the plural.\n\ngoose", "chosen": "geese", "rejected": "gooses", "p_chosen": 0.9},
        {"prompt": "Is ice frozen water?", "chosen": "Yes, it is.", "rejected": "No idea."},
        {
            "prompt": 'Who asks "Human: or machine?"',
            "chosen": "Human: that is the question.",
            "rejected": "Nobody.",
        },
    ]


def test_preferences_read_chat_messages_and_dialogue_text():
    assert load_preferences(HERE / "preferences_messages.jsonl") == [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": "Name a fish.", "chosen": "A trout.", "rejected": "A whale."},
        {
            "prompt": "user: Hi\n\nassistant: Hello!\n\nuser: Bye",
            "chosen": "Goodbye.",
            "rejected": "Finally.",
        },
    ]


# --- kinds of file


def test_the_same_records_from_every_kind_of_file(tmp_path):
    rows = [
        {"instruction": "Add é, 1", "input": "", "output": '"2",\n5'},
        {"instruction": "B", "output": "4"},
    ]
    rows[1]["input"] = ""
    expected = [{"prompt": "Add é, 1", "response": '"2",\n5'}, {"prompt": "B", "response": "4"}]
    import datasets

    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    table = 'instruction,input,output\r\n"Add é, 1",,"""2"",\n5"\r\nB,,4\r\n'
    files = [
        write_json(tmp_path / "a.json", rows),
        write(tmp_path / "b.jsonl", lines),
        write(tmp_path / "c.jsonl", lines.replace("\n", "\r\n") + "\r\n"),
        write(tmp_path / "d.json", lines),  # JSON Lines under the name of JSON, as `datasets` takes it too
        write(tmp_path / "e.jsonl", json.dumps(rows)),  # and the reverse
        write(tmp_path / "f.json", b"\xef\xbb\xbf" + json.dumps(rows).encode()),  # byte order mark
        write(tmp_path / "g.csv", table),
        write(tmp_path / "h.jsonl.gz", gzip.compress(lines.encode())),
        tmp_path / "i.parquet",
        tmp_path / "j",
    ]
    datasets.Dataset.from_list(rows).to_parquet(files[-2])
    datasets.Dataset.from_list(rows).save_to_disk(files[-1])
    for path in files:
        assert load_demonstrations(path) == expected, path


def test_a_line_separator_inside_a_string_does_not_end_a_json_line(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a\u2028b", "response": "c\x85d"}\n')
    assert load_demonstrations(path) == [{"prompt": "a\u2028b", "response": "c\x85d"}]


def test_a_hub_id_goes_to_datasets(monkeypatch):
    import datasets

    def load_dataset(source, name, split):
        assert (source, name, split) == ("someone/some-set", "main", "test")
        return datasets.Dataset.from_list([{"question": "1 + 1 ?", "answer": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_demonstrations("someone/some-set", split="test", name="main")
    assert loaded == [{"prompt": "1 + 1 ?", "response": "2"}]


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nand a long traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of(load_demonstrations, "someone/some-set")
    assert "ConnectionError: no route to host" in str(error) and "traceback" not in str(error)


# --- bad input: each error names file, record and field


def good_rows():
    return [{"instruction": f"Count to {i}.", "input": "", "output": f"1 to {i}"} for i in range(1, 5)]


def test_a_missing_field(tmp_path):
    rows = good_rows()
    del rows[2]["output"]
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.line, problem.field) == (3, 12, "output")
    assert "missing" in problem.message and "'instruction', 'input'" in problem.message


@pytest.mark.parametrize("value", ["", "  \n\t"])
def test_an_empty_response(tmp_path, value):
    rows = good_rows()
    rows[1]["output"] = value
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "output") and "empty" in problem.message


@pytest.mark.parametrize(
    "value, words",
    [(42, "the number 42"), (None, "null"), (["a"], "a list"), ({"a": 1}, "an object"), (True, "true")],
)
def test_a_wrong_type(tmp_path, value, words):
    rows = good_rows()
    rows[3]["output"] = value
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (4, "output")
    assert f"is {words}, not text" in problem.message


def test_a_wrong_type_of_an_optional_field(tmp_path):
    rows = good_rows()
    rows[0]["input"] = 7
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (1, "input")


def test_a_record_that_is_no_object(tmp_path):
    rows = [*good_rows(), "just text"]
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert problem.record == 5 and "the text 'just text', not an object" in problem.message
    problem = only_problem(load_demonstrations, write_json(tmp_path / "y.json", ["just text"]))
    assert problem.record == 1


def test_broken_json_names_line_column_and_record(tmp_path):
    text = json.dumps(good_rows(), indent=1)
    at = text.index('"1 to 2"')
    path = write(tmp_path / "x.json", text[:at] + "1 to 2" + text[at + 8 :])
    problem = only_problem(load_demonstrations, path)
    assert (problem.record, problem.field) == (2, "output")
    assert "broken JSON at line 10, column 15: Expecting ',' delimiter" in problem.message
    lines = [json.dumps(row) for row in good_rows()]
    lines[1] = "\n" + lines[1][:-2] + lines[1][-1]  # a blank line before it, and its last quote is missing
    problem = only_problem(load_demonstrations, write(tmp_path / "x.jsonl", "\n".join(lines)))
    assert (problem.record, problem.field) == (2, "output")
    assert "broken JSON at line 3, column" in problem.message


@pytest.mark.parametrize("text", ['[{"a": 1},]', '[{"a": 1} {"a": 2}]', '[{"a": 1}] more'])
def test_more_ways_to_break_json(tmp_path, text):
    assert "broken JSON at line 1" in only_problem(load_demonstrations, write(tmp_path / "x.json", text)).message


def test_a_truncated_file_is_told_from_broken_json_wherever_it_is_cut(tmp_path):
    text = json.dumps(good_rows(), indent=1)
    third = text.index("Count to 3")
    fourth = text.index("Count to 4")
    for cut in range(third, len(text) - 1):
        problem = only_problem(load_demonstrations, write(tmp_path / "x.json", text[:cut]))
        assert "cut short" in problem.message, text[:cut]
        assert problem.record in ((3, 4) if cut < fourth else (4,)), text[:cut]
        assert problem.line == text[:cut].rstrip().count("\n") + 1
    inside = text[: text.index("1 to 4") + 3]
    problem = only_problem(load_demonstrations, write(tmp_path / "x.json", inside))
    assert (problem.record, problem.field) == (4, "output")
    lines = "\n".join(json.dumps(row) for row in good_rows())
    problem = only_problem(load_demonstrations, write(tmp_path / "x.jsonl", lines[:-9]))
    assert (problem.record, problem.line, problem.field) == (
        4,
        4,
        "output",
    ) and "cut short" in problem.message


def test_a_truncated_gzip_and_parquet(tmp_path):
    whole = gzip.compress(json.dumps(good_rows()).encode())
    problem = only_problem(load_demonstrations, write(tmp_path / "x.json.gz", whole[:-12]))
    assert "not a whole gzip file" in problem.message
    problem = only_problem(load_demonstrations, write(tmp_path / "x.parquet", b"PAR1 and no more"))
    assert "not a whole parquet file" in problem.message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_wrong_encoding_names_byte_record_and_field(tmp_path, suffix, mark):
    rows = good_rows()
    rows[2]["output"] = "un café"
    if suffix == "json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    elif suffix == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        text = "instruction,input,output\n" + "\n".join(",".join(row.values()) for row in rows)
    path = write(tmp_path / f"x.{suffix}", mark + text.encode("latin-1"))
    problem = only_problem(load_demonstrations, path)
    assert (problem.record, problem.field) == (3, "output")
    offset = len(mark) + text.index("é")
    assert f"byte {offset:,} (0xe9) is not UTF-8" in problem.message
    assert problem.line == text[: text.index("é")].count("\n") + 1


def test_utf_16_is_recognised(tmp_path):
    path = write(tmp_path / "x.json", json.dumps(good_rows()).encode("utf-16"))
    assert "UTF-16" in only_problem(load_demonstrations, path).message


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.json.gz"])
def test_an_empty_file(tmp_path, name, content):
    if name.endswith(".gz") and content:
        content = gzip.compress(content)
    assert "the file is empty" in str(error_of(load_demonstrations, write(tmp_path / name, content)))


def test_nonsense_nested_too_deeply(tmp_path):
    for name, text in ("x.json", "[" * 100_000), ("x.jsonl", '{"a": ' + "[" * 100_000):
        problem = only_problem(load_demonstrations, write(tmp_path / name, text))
        assert problem.record == 1 and "nested too deeply" in problem.message


def test_no_records(tmp_path):
    assert "no records" in str(error_of(load_demonstrations, write(tmp_path / "x.json", "[]")))
    assert "no records" in str(error_of(load_demonstrations, write(tmp_path / "x.csv", "prompt,response\n")))


def test_the_top_level_must_be_a_list(tmp_path):
    error = error_of(load_demonstrations, write_json(tmp_path / "x.json", {"data": good_rows()}))
    assert "an object, not a list" in str(error) and "under 'data'" in str(error)
    error = error_of(load_demonstrations, write(tmp_path / "y.json", '"text"'))
    assert "the text 'text', not a list" in str(error)


def test_half_of_an_escape_pair(tmp_path):
    rows = good_rows()
    rows[1]["output"] = "\ud83d"  # json.dumps writes "\\ud83d", which is valid JSON and no text
    problem = only_problem(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "output") and "half of a" in problem.message


def test_a_csv_row_of_another_width(tmp_path):
    path = write(tmp_path / "x.csv", 'prompt,response\n"a\nb",c\nd,e,f\n')
    problem = only_problem(load_demonstrations, path)
    assert (problem.record, problem.line) == (2, 4) and "3 columns where the header has 2" in problem.message


def test_no_such_file_and_a_strange_suffix(tmp_path):
    assert "no such file" in str(error_of(load_demonstrations, tmp_path / "gone.json"))
    assert "should end in" in str(error_of(load_demonstrations, write(tmp_path / "x.txt", "text")))
    assert "save_to_disk did not write" in str(error_of(load_demonstrations, tmp_path))


def test_a_format_that_cannot_be_told_names_the_fields_and_the_closest(tmp_path):
    path = write_json(tmp_path / "x.json", [{"instruction": "a", "input": "b", "answr": "c"}])
    error = error_of(load_demonstrations, path)
    assert (error.problems[0].record, error.problems[0].field) == (1, "output")
    assert "'instruction', 'input', 'answr' come closest to alpaca" in str(error)
    assert "flan: inputs + targets" in str(error) and "oasst:" in str(error)
    with pytest.raises(ValueError, match="format is one of auto, flan, alpaca, oasst"):
        load_demonstrations(path, "alpacca")
    error = error_of(load_demonstrations, write_json(tmp_path / "y.json", [{"foo": 1}]))
    assert "cannot tell the format from the fields 'foo'" in str(error)


def test_demonstrations_and_preferences_are_told_apart():
    error = error_of(load_preferences, HERE / "alpaca.json")
    assert "these are demonstrations (alpaca" in str(error) and "chosen + rejected" in str(error)
    error = error_of(load_demonstrations, HERE / "preferences_messages.jsonl")
    assert "these are preferences" in str(error)


def test_many_bad_records_are_counted_and_the_first_shown(tmp_path):
    rows = good_rows() * 5
    for row in range(3, 20):
        rows[row] = {**rows[row], "output": ""}
    error = error_of(load_demonstrations, write_json(tmp_path / "x.json", rows))
    assert len(error.problems) == 17
    assert "17 problems in 20 records, read as 'alpaca'" in str(error)
    assert "record 8 (" in str(error) and "record 9 (" not in str(error) and "and 12 more" in str(error)


def test_bad_records_are_skipped_when_asked_with_a_warning(tmp_path):
    rows = good_rows()
    rows[1]["output"] = ""
    path = write_json(tmp_path / "x.json", rows)
    with pytest.warns(UserWarning, match=r"1 problem in 4 records.*\n.*record 2 \(line 7\), field 'output'"):
        assert len(load_demonstrations(path, bad="skip")) == 3
    rows = [{**row, "output": ""} for row in rows]
    with pytest.warns(UserWarning, match="4 problems"):
        assert "every record was left out" in str(error_of(load_demonstrations, write_json(path, rows), bad="skip"))
    with pytest.raises(ValueError, match="bad is"):
        load_demonstrations(HERE / "alpaca.json", bad="ignore")


def test_chosen_equal_to_rejected_is_an_error_or_dropped(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": " b "},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    path = write_json(tmp_path / "x.json", rows)
    problem = only_problem(load_preferences, path)
    assert (problem.record, problem.field) == (1, "rejected") and "no preference" in problem.message
    with pytest.warns(UserWarning, match=r"1 pair left out.*\(record 1\)"):
        assert load_preferences(path, ties="drop") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    rows.append({"prompt": "a", "chosen": "", "rejected": "c"})
    with pytest.warns(UserWarning):  # dropping ties forgives nothing else
        assert only_problem(load_preferences, write_json(path, rows), ties="drop").record == 3


@pytest.mark.parametrize("p", [1.5, -0.1, "high", True])
def test_a_soft_label_that_is_no_probability(tmp_path, p):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": p}
    problem = only_problem(load_preferences, write_json(tmp_path / "x.json", [row]))
    assert (problem.record, problem.field) == (1, "p_chosen")


def test_chat_messages_that_do_not_make_a_pair(tmp_path):
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

    def problem(chosen, rejected):
        row = {"chosen": chosen, "rejected": rejected}
        return only_problem(load_preferences, write_json(tmp_path / "x.json", [row]))

    found = problem([user, reply], [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "x"}])
    assert found.field == "rejected" and "shares one prompt" in found.message
    found = problem([user], [user, reply])
    assert found.field == "chosen" and "does not end with a message of the assistant" in found.message
    found = problem([user, {"role": "assistant", "content": 3}], [user, reply])
    assert found.field == "chosen" and "'content' of message 2 is the number 3" in found.message
    found = problem([user, reply], ["Hi", reply])
    assert found.field == "rejected" and "message 1 is the text 'Hi', not an object" in found.message
    found = problem([{"role": "bot", "content": "Hi"}, reply], [user, reply])
    assert found.field == "chosen" and "'bot' as its role" in found.message
    found = problem([reply], [reply | {"content": "x"}])
    assert found.field == "prompt" and "missing" in found.message


# --- bad OpenAssistant messages


def message(message_id, parent_id, role, text, rank=None):
    return {"message_id": message_id, "parent_id": parent_id, "role": role, "text": text, "rank": rank}


def small_table():
    return [
        message("p", None, "prompter", "Q"),
        message("a", "p", "assistant", "A", 1),
        message("b", "p", "assistant", "B", 0),
    ]


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_an_orphan(tmp_path, load):
    rows = [*small_table(), message("c", "lost", "assistant", "C"), message("d", "c", "prompter", "D")]
    problem = only_problem(load, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (4, "parent_id")
    assert "message c is the text 'lost'" in problem.message and "orphan" in problem.message


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_a_circle_of_messages(tmp_path, load):
    rows = [*small_table(), message("c", "e", "prompter", "C"), message("d", "c", "assistant", "D")]
    rows.append(message("e", "d", "prompter", "E"))
    problem = only_problem(load, write_json(tmp_path / "x.json", rows))
    assert problem.field == "parent_id" and "c -> e -> d -> c" in problem.message
    rows = [*small_table(), message("c", "c", "prompter", "C")]
    assert "c -> c" in only_problem(load, write_json(tmp_path / "x.json", rows)).message


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_ranks_that_do_not_say_which_is_better(tmp_path, load):
    rows = small_table()
    rows[1]["rank"] = 0
    problem = only_problem(load, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (3, "rank")
    assert "0 is given to both message a and message b" in problem.message
    rows[1]["rank"] = None
    problem = only_problem(load, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "rank")
    assert "message a is missing: 1 of the 2 answers to message p" in problem.message
    rows[1]["rank"] = "first"
    problem = only_problem(load, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "rank") and "not a number" in problem.message


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_other_bad_messages(tmp_path, load):
    def problem(change):
        rows = small_table()
        change(rows)
        return only_problem(load, write_json(tmp_path / "x.json", rows))

    found = problem(lambda rows: rows[2].update(text=" "))
    assert (found.record, found.field) == (3, "text") and "message b" in found.message
    found = problem(lambda rows: rows[2].update(role="prompter"))
    assert (found.record, found.field) == (3, "role") and "where 'assistant' is due" in found.message
    found = problem(lambda rows: rows[2].pop("message_id"))
    assert (found.record, found.field) == (3, "message_id") and "missing" in found.message
    found = problem(lambda rows: rows.append(rows[1]))
    assert (found.record, found.field) == (4, "message_id") and "twice, first in record 2" in found.message
    found = problem(lambda rows: rows[2].update(parent_id=["p"]))
    assert (found.record, found.field) == (3, "parent_id") and "a list, not text" in found.message


def test_a_bad_tree(tmp_path):
    rows = [json.loads(line) for line in (HERE / "oasst_trees.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[1]["prompt"]["replies"] = {"message_id": "m8"}
    problem = only_problem(load_preferences, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "replies") and "message m7" in problem.message
    rows[1] = {"message_tree_id": "t2"}
    problem = only_problem(load_preferences, write_json(tmp_path / "x.json", rows))
    assert (problem.record, problem.field) == (2, "prompt") and "missing" in problem.message


def test_skipping_a_bad_message_keeps_the_rest_of_its_tree(tmp_path):
    rows = [json.loads(line) for line in (HERE / "oasst_trees.jsonl").read_text(encoding="utf-8").splitlines()]
    first = rows[0]["prompt"]
    first["replies"][0]["rank"] = 0  # a tie among the first answers
    follow_up = first["replies"][1]["replies"][0]
    follow_up["replies"][0]["rank"] = 0
    follow_up["replies"].append({"message_id": "m11", "role": "assistant", "text": "Three.", "rank": 1})
    with pytest.warns(UserWarning, match="1 problem in 2 records"):
        pairs = load_preferences(write_json(tmp_path / "x.json", rows), bad="skip")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("Five minutes.", "Three."),
        ("The Rhine.", "The Alps."),
    ]


# --- splitting and formatting


def test_the_split_is_deterministic_and_duplicates_never_straddle_it():
    records = [{"prompt": f"prompt {i % 200}", "response": str(i)} for i in range(1000)]
    records += [{"prompt": f"  Prompt\n{i} ", "response": "spaced"} for i in range(200)]
    train, held_out = split_by_prompt(records, 0.3, seed=1)
    assert (train, held_out) == split_by_prompt(records, 0.3, seed=1)
    assert held_out != split_by_prompt(records, 0.3, seed=2)[1]
    assert len(train) + len(held_out) == 1200
    # every prompt occurs six times, so the held-out side holds whole groups of six
    groups = {" ".join(record["prompt"].lower().split()) for record in held_out}
    assert len(held_out) == 6 * len(groups)
    assert 0.2 < len(held_out) / 1200 < 0.4
    assert split_by_prompt(records, 0.0)[1] == [] and split_by_prompt(records, 1.0)[0] == []


def test_adding_records_moves_none_of_the_old_ones():
    records = [{"prompt": f"prompt {i}"} for i in range(300)]
    before = split_by_prompt(records[:200], 0.5)[1]
    assert [r for r in split_by_prompt(records, 0.5)[1] if r in records[:200]] == before


def test_the_turns_of_a_conversation_stay_together():
    for i in range(50):
        opening = f"question {i}"
        turns = [{"prompt": opening}, {"prompt": f"user: {opening}\n\nassistant: yes\n\nuser: why?"}]
        assert 2 in map(len, split_by_prompt(turns, 0.5))


def test_chat_format_has_a_plain_default_and_uses_a_tokenizers_template():
    assert chat_format("Hi") == "### Instruction:\nHi\n\n### Response:\n"

    class Plain:
        chat_template = None

    assert chat_format("Hi", Plain()) == chat_format("Hi")
    tokenizer = train_bpe(["Hi there"])
    assert chat_format("Hi", tokenizer) == f"{USER}Hi{ASSISTANT}"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} [me] {% endif %}"
    )
    assert chat_format("Hi", tokenizer) == "[user] Hi [me] "


# --- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([f"the number {i} and the next number {i + 1}" for i in range(50)], vocab_size=400)


@pytest.mark.parametrize("text", ["the number 7", "  naïve\n\tcafé , it 's", "日本語 🎉", "\x00 !", "(dash)"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_bpe_learns_the_frequent_words_and_is_deterministic(tokenizer):
    assert len(tokenizer.encode("the number")) == 2
    assert len(tokenizer) <= 400
    again = train_bpe([f"the number {i} and the next number {i + 1}" for i in range(50)], vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode("another number") == tokenizer.encode("another number")


def test_the_special_tokens_are_single_ids_and_encoding_adds_none(tokenizer):
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in (PAD, END, USER, ASSISTANT)]
    assert all(len(each) == 1 for each in ids) and len({each[0] for each in ids}) == 4
    assert tokenizer.pad_token_id == ids[0][0] and tokenizer.eos_token_id == ids[1][0]
    assert tokenizer.encode("the") == tokenizer.encode("the", add_special_tokens=False)


def test_a_finished_conversation_is_prompt_response_and_eos(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == chat_format("Hi", tokenizer) + "Hello" + tokenizer.eos_token
    # prompt and response encoded apart join to the encoding of the whole: training sees what sampling sees
    apart = [tokenizer.encode(text) for text in (chat_format("Hi", tokenizer), "Hello" + tokenizer.eos_token)]
    assert apart[0] + apart[1] == tokenizer.encode(whole)


def test_the_tokenizer_loads_with_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("the number 7 é") == tokenizer.encode("the number 7 é")
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id
    assert chat_format("Hi", loaded) == chat_format("Hi", tokenizer)


def test_bpe_refuses_no_text_and_a_tiny_vocabulary():
    with pytest.raises(ValueError, match="no text"):
        train_bpe(["", " "])
    with pytest.raises(ValueError, match="at least 260"):
        train_bpe(["text"], vocab_size=100)


# --- data sets that others made


@needs_real_data
def test_real_alpaca_records():
    demonstrations = load_demonstrations(REAL / "alpaca_style_instructions.json")
    raw = json.loads((REAL / "alpaca_style_instructions.json").read_text(encoding="utf-8"))
    assert len(demonstrations) == len(raw) == 1100
    assert all(d["response"] == row["output"].strip() for d, row in zip(demonstrations, raw, strict=True))
    assert all(d["prompt"].startswith(row["instruction"].strip()) for d, row in zip(demonstrations, raw, strict=True))
    assert all(d["prompt"].endswith(row["input"].strip()) for d, row in zip(demonstrations, raw, strict=True))


@needs_real_data
def test_real_preference_pairs_hold_six_ties():
    raw = json.loads((REAL / "preference_pairs.json").read_text(encoding="utf-8"))
    equal = [i for i, row in enumerate(raw, 1) if row["chosen"].strip() == row["rejected"].strip()]
    error = error_of(load_preferences, REAL / "preference_pairs.json")
    assert [problem.record for problem in error.problems] == equal and len(equal) == 6
    with pytest.warns(UserWarning, match="6 pairs left out"):
        assert len(load_preferences(REAL / "preference_pairs.json", ties="drop")) == len(raw) - 6


@needs_real_data
def test_real_questions_and_answers_read_as_flan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demonstrations = load_demonstrations(REAL / "gsm8k_test.jsonl")
    assert len(demonstrations) == 1319 and all("####" in d["response"] for d in demonstrations)
