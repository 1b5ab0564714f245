"""Suspicious likeness: honest solutions of the same exercises are not flagged, copies are, renamed ones too."""

import random
import shutil

import pytest
from synthetic import ASSIGNMENT, answer, make_class, solutions, source_notebook
from variants import choices, honest, renamed

from cs336_alignment.grading.alike import (
    ANSWERS,
    STRUCTURE,
    WRITTEN,
    View,
    alike,
    alike_in,
    as_written,
    by_structure,
    fingerprints,
    runs,
    words,
)

GIVEN = {str(i): cell.source for i, cell in enumerate(source_notebook("assignments").cells)}


@pytest.fixture(scope="module")
def options():
    return choices(ASSIGNMENT, solutions())


def people(pairs) -> set[tuple[str, str]]:
    return {tuple(sorted((pair.left, pair.right))) for pair in pairs}


@pytest.mark.parametrize("seed", range(4))
def test_forty_honest_students_are_not_flagged(options, seed):
    rng = random.Random(seed)
    code = {f"s{i}": honest(options, rng) for i in range(40)}
    answers = {f"s{i}": {"w": answer(rng)} for i in range(40)}
    assert alike_in(WRITTEN, code, GIVEN) == alike_in(STRUCTURE, code, GIVEN) == alike_in(ANSWERS, answers, GIVEN) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_is_flagged_and_a_copy_with_other_names_too(options, seed):
    rng = random.Random(seed)
    code = {f"s{i}": honest(options, rng) for i in range(40)}
    code["copy"] = dict(code["s3"])
    code["renamed"] = {name: renamed(text, rng) for name, text in code["s7"].items()}
    assert people(alike_in(WRITTEN, code, GIVEN)) >= {("copy", "s3")}
    assert people(alike_in(STRUCTURE, code, GIVEN)) == {("copy", "s3"), ("renamed", "s7")}


def test_canonical_solutions_are_no_evidence_however_many_share_them(options):
    rng = random.Random(0)
    plain = {name: texts[0] for name, texts in options.items()}
    code = {f"s{i}": dict(plain) if i % 2 else honest(options, rng) for i in range(40)}
    assert not people(alike_in(STRUCTURE, code, GIVEN)) & {("s1", "s3"), ("s5", "s7")}
    assert not people(alike_in(WRITTEN, code, GIVEN)) & {("s1", "s3"), ("s5", "s7")}


def test_a_copied_answer_is_flagged_though_some_words_were_changed():
    rng = random.Random(1)
    answers = {f"s{i}": {"w": answer(rng)} for i in range(40)}
    text = answers["s5"]["w"].split()
    answers["thief"] = {"w": " ".join(word if i % 9 else "indeed" for i, word in enumerate(text))}
    assert people(alike_in(ANSWERS, answers, GIVEN)) == {("s5", "thief")}


def test_what_the_release_holds_counts_for_nothing():
    texts = {"a": {"w": GIVEN["48"]}, "b": {"w": GIVEN["48"]}, "c": {"w": "other words that are nobody else's at all"}}
    assert len(GIVEN["48"].split()) > 20 and alike_in(ANSWERS, texts, GIVEN) == []


def test_a_class_of_one_and_of_none_and_empty_submissions():
    for texts in ({}, {"a": {"f": "x = 1"}}, {"a": {}, "b": {}}, {"a": {"f": ""}, "b": {"f": ""}}):
        assert alike_in(WRITTEN, texts, {}) == []


def test_structure_forgets_names_comments_docstrings_and_strings_but_not_what_is_called():
    first = 'def f(x):\n    """Says."""\n    loss = torch.mean(x * 2)  # why\n    raise ValueError("a")\n'
    second = "def g(alpha):\n    b = torch.mean(alpha * 2)\n    raise ValueError('other')\n"
    third = second.replace("mean", "sum")
    shapes = [[token for token, _ in by_structure(text)] for text in (first, second, third)]
    assert shapes[0] == shapes[1] != shapes[2]
    assert [t for t, _ in as_written(first)] != [t for t, _ in as_written(second)]


@pytest.mark.parametrize(
    "text", ['"""', "'", "x = (", "\x00", "é ü 変数 = 1", "\ud800", "#" * 50_000, '"' * 50_001, "(" * 50_000]
)
def test_any_text_has_tokens(text):
    for view in (WRITTEN, STRUCTURE, ANSWERS):
        assert isinstance(fingerprints(view, text, set()), dict)


def test_lines_of_tokens_are_those_of_the_text():
    assert as_written('a\n"""b\nc"""\n\nd')[-1] == ("d", 4) and ("c", 2) in as_written('a\n"""b\nc"""\n\nd')
    assert words("One two\n\nThree") == [("one", 0), ("two", 0), ("three", 2)]


def test_winnowing_finds_every_run_that_is_as_long_as_its_guarantee():
    view = View("test", words, 4, 3, False)
    shared = "one two three four five six"  # 4 + 3 - 1 words
    left = fingerprints(view, f"alpha beta gamma {shared} delta", set())
    right = fingerprints(view, f"{shared} epsilon zeta eta theta", set())
    assert left.keys() & right.keys()
    assert not left.keys() & fingerprints(view, "nothing of that is in this sentence here", set()).keys()
    released = {value for value, _, _ in runs(view, shared)}
    assert not fingerprints(view, shared, released)


def test_a_course_folder_without_assignments_has_the_packages(tmp_path):
    course = make_class(tmp_path, 44)
    before = alike(course, ASSIGNMENT)
    shutil.rmtree(course / "assignments")
    assert alike(course, ASSIGNMENT) == before


def test_no_more_pairs_are_reported_than_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("cs336_alignment.grading.alike.MOST", 2)
    assert len(alike(make_class(tmp_path, 44), ASSIGNMENT)) == 2  # of three, found by different views


def test_a_whole_class_is_read_and_shown_side_by_side(tmp_path):
    pairs = alike(make_class(tmp_path, 44), ASSIGNMENT)
    found = {tuple(sorted((pair.left, pair.right))): pair for pair in pairs}
    assert len(found) == len(pairs) == 3
    assert found["renamer", "s007"].view == "structure of the code"
    assert found["quoter", "s011"].view == "written answer"
    copy = found["copycat", "s003"]
    assert copy.view.startswith("code as written, ")  # and what else is the same
    assert len(copy.places) > 5 and copy.score > copy.limit
    for place in copy.places:
        assert place.left == place.right and any(mark for _, mark in place.left)
