"""The report says what the results say, holds all it shows, and copes with what a run did not measure."""

import copy
import math
import re
from html.parser import HTMLParser

import pytest

from cs336_alignment.report import change, page, plots, print_table, with_error, write_report


def row(**changes) -> dict:
    values = {
        "reward": 1.0, "reward_se": 0.05, "kl": 0.4, "kl_se": 0.02, "length": 9.5, "finished": 1.0,
        "follows": 0.5, "follows_se": 0.03, "follows_greedy": 0.625, "follows_greedy_se": 0.03,
        "refusal": 0.9, "over_refusal": 0.2,
    }  # fmt: skip
    return values | changes


def measured(step: int, gold: float, kl: float) -> dict:
    return {
        "step": step, "eval_reward": gold, "eval_reward_se": 0.05, "eval_kl": kl, "eval_kl_se": 0.01,
        "eval_proxy": 2 * gold, "eval_proxy_se": 0.1,
    }  # fmt: skip


def answer(text: str, right: bool, gold: float) -> dict:
    return {"text": text, "finished": right, "gold": gold, "follows": right}


@pytest.fixture
def results() -> dict:
    """What `run_demo` returns, with made-up numbers."""
    corner_log = [{"step": i, "gap": gap, "cpu_seconds": i + 0.5} for i, gap in enumerate([1.0, 0.2, 0.0123])]
    return {
        "settings": {"profile": "full", "seed": 7, "model": None, "device": "cpu", "demonstrations": 8000},
        "config": {"seed": 7, "evaluation_prompts": 512, "curve_prompts": 192, "demonstrations": 8000},
        "preference_pairs": 3210,
        "date": "2026-01-02",
        "machine": {"device": "cpu", "processor": "abacus", "cores": 2, "threads": 1, "torch": "2.0"},
        "table": {
            "base": row(follows=0.0, follows_se=0.0, reward=-1.2),
            "sft": row(kl=-1e-9, kl_se=1e-9),
            "ppo": row(reward=1.5, follows=0.75),
            "dpo": row(reward=1.05, follows=0.55),
        },
        "reward_model": {
            "agreement": 0.78, "agreement_se": 0.015, "expert_agreement": 0.88, "bayes_limit": 0.9,
            "pairs": 612,
        },
        "answers": [
            {
                "instruction": "name one tree",
                "kind": "names",
                "answers": {
                    "base": answer("name two trees", False, -1.0),
                    "sft": answer("oak .", True, 2.0),
                    "ppo": answer("oak", True, 1.96),
                    "dpo": answer("elm", True, 1.92),
                },
            }
        ],
        "logs": {
            "sft": [{"step": i, "loss": 3.0 - i, "held_out_loss": 3.5 - i} for i in range(3)],
            "reward": [{"step": i, "accuracy": 0.5 + i / 10, "held_out_accuracy": 0.5} for i in range(3)],
            "ppo": [measured(0, 1.0, 0.0), {"step": 1, "score": 0.3}, measured(2, 1.5, 0.8)],
            "dpo": [measured(0, 1.0, 0.0), measured(2, 1.05, 0.3)],
        },
        "corner": {
            "beta": 0.2, "J_ref": 0.99, "J_star": 1.765,
            "exact": corner_log, "dpo": corner_log, "ppo": corner_log,
        },
        "timings": {
            "sft": {"seconds": 66.0, "cpu_seconds": 120.0, "cached": True},
            "ppo": {"seconds": 30.0, "cpu_seconds": 58.0, "cached": False},
        },
        "seconds": 200.0,
        "peak_memory_gb": 0.9,
    }  # fmt: skip


@pytest.fixture
def plain(results) -> dict:
    """The same without figures (0 seconds have no place on a log axis): they take most of the time."""
    corner = results["corner"]
    short = {name: [corner[name][-1] | {"cpu_seconds": 0.0}] for name in ("exact", "ppo", "dpo")}
    return results | {"logs": {}, "corner": corner | short}


class Page(HTMLParser):
    """The text of a page, the addresses it refers to, its ids, and whether its tags match."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, html: str):
        super().__init__()
        self.text, self.addresses, self.ids, self.tags, self.open = "", [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace("\u00a0", " ")


def printed(results: dict, capsys) -> str:
    print_table(results)
    return capsys.readouterr().out


# Where a number of the results must appear: how to reach it, another value, and what then is to be read.
NUMBERS = [
    (("table", "ppo", "follows"), 0.8123, "81.2 ± 3.0"),
    (("table", "ppo", "follows_se"), 0.0417, "75.0 ± 4.2"),
    (("table", "dpo", "follows_greedy"), 0.4321, "43.2"),
    (("table", "sft", "reward"), 0.87, "0.87 ± 0.05"),
    (("table", "dpo", "reward_se"), 0.33, "1.05 ± 0.33"),
    (("table", "ppo", "kl"), 3.21, "3.21 ± 0.02"),
    (("table", "ppo", "kl_se"), 0.77, "0.40 ± 0.77"),
    (("table", "base", "length"), 27.3, "27.3"),
    (("table", "sft", "refusal"), 0.37, "37"),
    (("table", "sft", "over_refusal"), 0.41, "41"),
    (("reward_model", "agreement"), 0.691, "69.1 ± 1.5 %"),
    (("reward_model", "expert_agreement"), 0.834, "83.4 %"),
    (("reward_model", "bayes_limit"), 0.927, "92.7 %"),
    (("reward_model", "pairs"), 977, "977"),
    (("timings", "ppo", "seconds"), 41.7, "41.7 s"),
    (("corner", "ppo", 0, "gap"), 0.0457, "4.57 %"),
]


@pytest.mark.parametrize("path, value, expected", NUMBERS, ids=[".".join(map(str, n[0])) for n in NUMBERS])
def test_each_number_shown_comes_from_the_results(plain, capsys, path, value, expected):
    before = printed(plain, capsys), Page(page(plain)).text
    assert not any(expected in text for text in before)
    place = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    after = printed(plain, capsys), Page(page(plain)).text
    assert all(expected in text for text in after)


def test_the_terminal_table_fits_eighty_characters(plain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plain["table"]["shipped base"] = row(reward=-1.25)
    text = printed(plain, capsys)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert all(word in text for word in ("base", "shipped", "SFT", "PPO", "DPO", "-1.25 ± 0.05"))


def test_the_page_fetches_nothing(results):
    html = page(results)
    found = Page(html)
    assert "svg" in found.tags
    assert [a for a in found.addresses if not a.startswith(("#", "data:"))] == []
    assert not {"script", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", html)


def test_the_page_is_well_formed_and_its_ids_are_unique(results):
    found = Page(page(results))
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids) > 0
    assert {a.removeprefix("#") for a in found.addresses if a.startswith("#")} <= set(found.ids)


def test_all_text_is_escaped(results):
    evil = "<script>alert('&\"')</script>"
    results["answers"][0]["instruction"] = results["answers"][0]["kind"] = evil
    results["answers"][0]["answers"]["ppo"]["text"] = evil
    results["answers"][0]["answers"][evil] = answer(evil, True, 1.0)
    results["settings"]["model"] = results["machine"]["processor"] = results["date"] = evil
    results["table"][evil] = row()
    results["timings"][evil] = {"seconds": 1.0, "cpu_seconds": 1.0, "cached": False}
    html = page(results)
    assert "<script" not in html
    found = Page(html)
    assert "script" not in found.tags and found.open == []
    assert found.text.count(evil) >= 9


def test_every_figure_has_a_title_units_and_a_description(results):
    made = plots(results)
    assert len(made) == 5
    assert all(plot.title and plot.alt and plot.caption for plot in made)
    html = page(results)
    assert len(re.findall(r'<div role="img" aria-label="[^"]{20,}">', html)) == len(made)
    for label in (
        "step",
        "loss (nats a response token)",
        "KL to the SFT model (nats an answer)",
        "CPU seconds",
    ):
        assert label in html


def test_plots_follow_the_colours_of_the_page(results):
    html = page(results)
    drawn = "".join(plot.svg for plot in plots(results))
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"ink", "muted", "grid", "sft", "reward", "ppo", "dpo"} <= used
    light, dark = html.split("prefers-color-scheme: dark", 1)
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in used)
    assert not re.search(r"(?:fill|stroke): #", drawn)


def test_the_same_results_give_the_same_page(results, tmp_path):
    path = write_report(results, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == page(copy.deepcopy(results))


def test_wrong_and_right_answers_are_marked(plain):
    html = page(plain)
    assert html.count("✓ right") == 3 and html.count("✗ not right") == 1
    assert html.count("cut off at the length limit") == 1
    plain["answers"][0]["answers"]["dpo"]["follows"] = False
    assert page(plain).count("✗ not right") == 2


def test_a_change_is_called_one_only_beyond_two_standard_errors():
    assert change(1.0, 0.03, 1.11, 0.04) == "rose from 1.00 to 1.11"
    assert change(1.0, 0.03, 0.89, 0.04) == "fell from 1.00 to 0.89"
    assert change(1.0, 0.03, 1.09, 0.04) == "did not change clearly (from 1.00 to 1.09)"
    assert change(1.0, 0.03, 1.11, math.inf) == "went from 1.00 to 1.11"
    assert change(1.0, 0.03, math.nan, 0.1) == "was not measured"


def test_titles_and_story_follow_the_numbers(results):
    text = Page(page(results)).text
    assert "With PPO the exact reward rose from 1.00 to 1.50" in text
    assert "With DPO the exact reward did not change clearly (from 1.00 to 1.05)" in text
    assert "Gold reward: with PPO it rose from 1.00 to 1.50, with DPO it did not change clearly" in text
    results["table"]["ppo"]["reward"] = 0.2
    results["logs"]["ppo"][-1]["eval_reward"] = 0.1
    text = Page(page(results)).text
    assert "With PPO the exact reward fell from 1.00 to 0.20" in text
    assert "Gold reward: with PPO it fell from 1.00 to 0.10" in text
    assert "Proxy reward: with PPO it rose from 2.00 to 3.00" in text


def test_numbers_that_are_missing_are_dashes_and_zero_has_no_sign():
    assert with_error(1.234, 0.05) == "1.23 ± 0.05"
    assert with_error(1.234, math.inf) == with_error(1.234, None) == "1.23"
    assert with_error(math.nan, 0.1) == with_error(None, 0.1) == "–"
    assert with_error(-1e-9, 1e-9) == "0.00 ± 0.00"


def test_a_share_of_zero_is_not_said_to_be_exact(plain):
    assert "true share can still differ by up to about 0.6 %" in Page(page(plain)).text
    plain["table"]["base"] = row(follows=0.1)
    assert "true share" not in page(plain)


def without(results: dict, *path) -> dict:
    results = copy.deepcopy(results)
    place = results
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return results


def test_the_gap_on_the_corner_is_that_at_the_end(results, capsys):
    results["corner"]["ppo"] = [{"gap": 1.0, "cpu_seconds": 0.5}, {"gap": 0.0456, "cpu_seconds": 33.3}]
    text = Page(page(results)).text
    assert "at the end: exact gradient 1.23 %, PPO 4.56 %, DPO 1.23 %" in text
    lines = [line.split() for line in printed(results, capsys).splitlines()]
    assert ["PPO", "4.56", "%", "33.3"] in lines


def test_a_run_without_the_corner_has_no_corner_section(results, capsys):
    assert "corner" in printed(results, capsys) and "best possible policy" in page(results)
    results["corner"] = None
    assert "corner" not in printed(results, capsys)
    html = page(results)
    assert "best possible policy" not in html and "corner-" not in html
    assert Page(html).open == [] and len(plots(results)) == 4


@pytest.mark.parametrize(
    "path",
    [
        ("corner",), ("answers",), ("logs",), ("logs", "ppo"), ("logs", "dpo"), ("logs", "sft"),
        ("logs", "reward"),
        ("reward_model",), ("table",), ("table", "base"), ("table", "sft"), ("table", "ppo", "reward_se"),
        ("timings",), ("config",), ("settings",), ("machine",), ("date",), ("seconds",), ("peak_memory_gb",),
    ],
    ids=".".join,
)  # fmt: skip
def test_what_was_not_measured_is_left_out(results, plain, capsys, path):
    results = without(results if path[0] == "logs" else plain, *path)
    printed(results, capsys)
    found = Page(page(results))
    assert found.open == [] and "None" not in found.text and "nan" not in found.text.split()


def nothing_finite(x):
    """The same results with NaN in place of every float."""
    if isinstance(x, dict):
        return {key: nothing_finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [nothing_finite(value) for value in x]
    return math.nan if isinstance(x, float) else x


def test_a_run_that_diverged_still_gets_its_report(results, capsys):
    results = nothing_finite(results)
    assert "–" in printed(results, capsys)
    text = Page(page(results)).text
    assert "With PPO the exact reward was not measured" in text and "nan" not in text.lower().split()


def test_a_cached_stage_is_said_to_be_one(plain, capsys):
    assert printed(plain, capsys).count("kept from an earlier run") == 1
    assert page(plain).count("kept from an earlier run") == 1
    plain["timings"]["sft"]["cached"] = False
    assert "kept from" not in printed(plain, capsys) and "kept from" not in page(plain)


def test_from_scratch_adds_the_shipped_model_and_the_pre_training_curve(plain):
    plain["table"]["shipped base"] = row(reward=-1.25)
    plain["base_log"] = [{"step": i, "loss": 6.0 - i, "held_out_loss": 6.5 - i} for i in range(3)]
    text = Page(page(plain)).text
    assert "shipped base" in text and "-1.25 ± 0.05" in text
    assert "Pre-training: held-out loss went from 6.50 to 4.50 nats a token" in text


def test_another_model_is_named_and_the_test_profile_warned_about(plain):
    assert "not an experiment" not in page(plain)
    plain["settings"] |= {"model": "some/model", "profile": "test"}
    text = Page(page(plain)).text
    assert "the model some/model, as it came" in text and "not an experiment" in text
