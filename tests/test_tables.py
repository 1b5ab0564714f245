"""Tables over seeds: a mean, its error, and one line a row."""

from cs336_alignment.tables import markdown, over_seeds


def test_several_seeds_have_an_error_and_one_has_none():
    assert over_seeds([1.0, 3.0]) == "2.000 ± 1.000"
    assert over_seeds([0.5, 0.5, 0.5], "{:.0%}") == "50% ± 0%"
    assert over_seeds([1.25], "{:.1f}") == "1.2"


def test_a_table_has_a_line_a_row_and_a_cell_a_column():
    lines = markdown(["a", "b"], {"first": ["1", "2"], "second": ["3", ""]})
    assert lines == ["| | a | b |", "|---|---|---|", "| first | 1 | 2 |", "| second | 3 |  |"]
