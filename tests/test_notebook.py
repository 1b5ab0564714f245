"""What the cells of a lecture print: equations that hold, figures with words, tables."""

import math

import pytest
import torch

from cs336_alignment import notebook
from cs336_alignment.notebook import holds, new_figure, show, table


@pytest.fixture
def displayed(monkeypatch):
    seen = []
    monkeypatch.setattr(notebook, "display", lambda data, **options: seen.append((data, options)))
    return seen


def test_an_equation_that_holds_says_so(capsys):
    assert holds("9.4", torch.tensor([1.0, 2.0]), [1.0, 2.0 + 1.5e-7]) is True
    assert capsys.readouterr().out.startswith("(9.4) holds; largest difference 1")
    assert holds("limit beta to 0", 3, torch.full((2, 2), 3.0))
    assert capsys.readouterr().out == "limit beta to 0 holds; largest difference 0.0e+00\n"


@pytest.mark.parametrize(
    "left, right",
    [
        (1.0, 1.1),
        (math.nan, 1.0),
        (math.nan, math.nan),
        (math.inf, 1.0),
        (math.inf, -math.inf),
        ([1.0, 2.0], [1.0, 3.0]),
    ],
)
def test_an_equation_that_does_not_hold_is_an_error(left, right):
    with pytest.raises(AssertionError, match=r"\(9.4\) does not hold"):
        holds("9.4", left, right)


def test_nothing_is_no_evidence():
    with pytest.raises(AssertionError):
        holds("9.4", torch.ones(0), torch.ones(0))


def test_equal_infinities_agree_and_do_not_hide_a_difference():
    assert holds("9.4", [math.inf, 1.0], [math.inf, 1.0])
    with pytest.raises(AssertionError):
        holds("9.4", [math.inf, 1.0], [math.inf, 1.1])


def test_the_tolerance_is_relative_to_large_values():
    assert holds("9.4", 1e6, 1e6 + 0.5)
    with pytest.raises(AssertionError):
        holds("9.4", 1e6, 1e6 + 2)
    with pytest.raises(AssertionError):
        holds("9.4", 1e-9, 2e-6)


def test_a_figure_comes_with_its_description(displayed):
    figure, axes = new_figure(1, 2)
    axes[0].plot([1, 2])
    show(figure, "A rising line.")
    data, options = displayed[0]
    assert data["text/plain"] == "A rising line." and data["image/png"].startswith(b"\x89PNG")
    assert options["metadata"]["image/png"]["alt"] == "A rising line."
    with pytest.raises(ValueError, match="alternative text"):
        show(figure, " ")


def test_a_figure_has_the_courses_background_wherever_it_is_drawn():
    figure, _ = new_figure()
    assert figure.get_facecolor()[:3] == pytest.approx((0xFC / 255, 0xFC / 255, 0xFA / 255), abs=1e-6)


def test_a_table_rounds_numbers_and_keeps_pipes(displayed):
    table([{"name": "a|b", "gap": torch.tensor(0.12345), "n": 3}], digits=2)
    assert displayed[0][0]["text/markdown"] == "| name | gap | n |\n|---|---|---|\n| a\\|b | 0.12 | 3 |"


def test_a_tables_head_keeps_pipes_and_a_zero_has_no_minus(displayed):
    table([{"KL(p || q)": -1e-17}], digits=3)
    assert displayed[0][0]["text/markdown"] == "| KL(p \\|\\| q) |\n|---|\n| 0.000 |"


def test_a_table_shows_the_towns_tokens(displayed):
    table([{"answer": "red <end>", "quoted": "`<user>`"}])
    assert displayed[0][0]["text/markdown"].endswith("| red &lt;end> | `<user>` |")
    assert displayed[0][0]["text/plain"].endswith("| red <end> | `<user>` |")
