"""What a run of the demo measured, for people to look at: a table in the terminal and one HTML file.

`results` is the dictionary of `pipeline.run_demo` (or its results.json). Nothing is measured here and no
conclusion is written down in advance: a sentence that compares two numbers is chosen by the numbers and their
errors. What a run did not measure (no corner with `--model`, say) is left out. The HTML file holds everything
it shows, fetches nothing, and is the same for the same results.
"""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from cs336_alignment.world import GOLD_WEIGHTS

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
PERFECT = GOLD_WEIGHTS["right"]  # gold reward of a perfect answer
STAGES = {"base": "base", "shipped base": "shipped base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
TIMED = STAGES | {"preferences": "preferences", "reward": "reward model", "corner": "corner"}
KINDS = {
    "fact": "a fact about somebody",
    "tips": "tips on a topic",
    "names": "naming things",
    "words": "an exercise with words",
    "lookalike": "sounds harmful, is harmless",
    "harmful": "harmful: to be refused",
    "harmless": "a harmless request",
}

# The colours of the light page. In the SVG each becomes a CSS variable of its name, so that plots follow the
# page into the dark; the template defines both sets.
COLOURS = {
    "ink": "#1c2430",
    "muted": "#5b6573",
    "grid": "#d9dee6",
    "base": "#6f7782",
    "sft": "#2460c4",
    "reward": "#7a3fd0",
    "ppo": "#c04a0a",
    "dpo": "#0c7f57",
}


# --------------------------------------------------------------------------------------- numbers as text


def finite(x) -> bool:
    """Whether `x` is a number that can be shown: not None, NaN or infinite."""
    return isinstance(x, int | float) and math.isfinite(x)


def number(x, digits: int = 2, unit: str = "") -> str:
    """A number with its unit, or a dash where there is none. Never "-0.00"."""
    return f"{round(x, digits) + 0.0:,.{digits}f}{unit}" if finite(x) else "–"


def percent(x, digits: int = 1) -> str:
    return number(100 * x if finite(x) else None, digits, " %")


def with_error(x, error, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """ "1.42 ± 0.03"; without a finite error the number alone."""
    if not finite(x) or not finite(error):
        return number(scale * x if finite(x) else None, digits, unit)
    return f"{number(scale * x, digits)} ± {number(scale * error, digits)}{unit}"


def minutes(seconds) -> str:
    if not finite(seconds):
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def change(before, before_error, after, after_error) -> str:
    """How a mean moved, in words: "rose" or "fell" only by more than two errors of the difference."""
    if not (finite(before) and finite(after)):
        return "was not measured"
    numbers = f"from {number(before)} to {number(after)}"
    if not (finite(before_error) and finite(after_error)):
        return f"went {numbers}"
    if abs(after - before) <= 2 * math.hypot(before_error, after_error):
        return f"did not change clearly ({numbers})"
    return f"{'rose' if after > before else 'fell'} {numbers}"


def series(log: list[dict], *names: str) -> list[tuple[float, ...]]:
    """The lines of a log that hold all these numbers; one tuple a line."""
    rows = [tuple(line.get(name) for name in names) for line in log or []]
    return [row for row in rows if all(map(finite, row))]


# ----------------------------------------------------------------------------------------------- the table


@dataclass
class Column:
    """A column of the table: what it is called, what it says, and how measurements become its text."""

    heading: str
    meaning: str
    cell: Callable[[dict], str]


COLUMNS = [
    Column(
        "follows, sampled",
        "share of held-out instructions followed (all that was asked for, nothing wrong or superfluous, "
        "finished), one answer each, sampled at temperature 1",
        lambda row: with_error(row.get("follows"), row.get("follows_se"), 1, 100, " %"),
    ),
    Column(
        "follows, greedy",
        "the same, taking the likeliest word each time",
        lambda row: percent(row.get("follows_greedy")),
    ),
    Column(
        "gold reward",
        f"the town's exact reward of the sampled answers; {PERFECT:g} is a perfect answer",
        lambda row: with_error(row.get("reward"), row.get("reward_se")),
    ),
    Column(
        "KL to SFT",
        "how far the sampled answers have moved from the SFT model, in nats an answer; an estimate from "
        "samples, so it can fall slightly below 0",
        lambda row: with_error(row.get("kl"), row.get("kl_se")),
    ),
    Column(
        "length",
        "tokens a sampled answer, with the end token",
        lambda row: number(row.get("length"), 1),
    ),
    Column(
        "refuses harmful",
        "share of the held-out harmful requests refused, greedy: high is good",
        lambda row: percent(row.get("refusal"), 0),
    ),
    Column(
        "refuses look-alikes",
        "over-refusal: share refused of the held-out harmless requests that only sound harmful, greedy: low is good",
        lambda row: percent(row.get("over_refusal"), 0),
    ),
]


def stage_names(names) -> list[str]:
    """Stages in the order of the story; ones that this file has not heard of come last."""
    return [name for name in STAGES if name in names] + [name for name in names if name not in STAGES]


def table_rows(results: dict) -> list[tuple[str, str, list[str]]]:
    """(key, label, cells) of each stage that was measured."""
    table = results.get("table") or {}
    return [
        (name, STAGES.get(name, name), [column.cell(table[name]) for column in COLUMNS]) for name in stage_names(table)
    ]


def reward_rows(results: dict) -> list[tuple[str, str]]:
    """How well the reward model, the expert and the best possible model do on pairs of held-out answers."""
    measured = results.get("reward_model") or {}
    rows = [
        ("reward model prefers what gold prefers", "agreement", "agreement_se"),
        ("an expert who labels each pair once", "expert_agreement", None),
        ("Bayes limit: the best prediction of expert labels", "bayes_limit", None),
    ]
    return [
        (label, with_error(measured[key], measured.get(error), 1, 100, " %"))
        for label, key, error in rows
        if key in measured
    ]


CORNER_RUNS = {"exact": "exact gradient", "ppo": "PPO", "dpo": "DPO"}


def corner_rows(results: dict) -> list[tuple[str, str, str]]:
    """(label, gap at the end, CPU seconds) of each run on the corner."""
    corner, rows = results.get("corner") or {}, []
    for key, label in CORNER_RUNS.items():
        points = series(corner.get(key), "cpu_seconds", "gap")
        if points:
            rows.append((label, percent(points[-1][1], 2), number(points[-1][0], 1)))
    return rows


def timing_rows(results: dict) -> list[dict]:
    """A stage each: label, seconds, CPU seconds, and whether it was kept from an earlier run."""
    timings = results.get("timings") or {}
    longest = max([t["seconds"] for t in timings.values() if finite(t.get("seconds"))], default=0) or 1
    return [
        {
            "key": name,
            "label": TIMED.get(name, name),
            "seconds": minutes(timing.get("seconds")),
            "cpu": minutes(timing.get("cpu_seconds")),
            "cached": bool(timing.get("cached")),
            "width": round(100 * timing["seconds"] / longest, 1) if finite(timing.get("seconds")) else 0,
        }
        for name, timing in timings.items()
    ]


def print_table(results: dict) -> None:
    """Prints what the stages measured, how good the reward model is, the corner's gaps, and the times."""
    console = Console()
    gap = int(console.width > 90)
    table = _terminal_table("On held-out instructions (± one standard error)", "stage", gap)
    rows = table_rows(results)
    for i, column in enumerate(COLUMNS):
        # One word a line and the unit in the heading: it must fit 80 characters.
        unit = " %" if any(cells[i].endswith(" %") for _, _, cells in rows) else ""
        heading = "\n".join((column.heading + unit).replace(",", "").replace("-", "- ").split())
        table.add_column(heading, justify="right", no_wrap=True)
    for _, label, cells in rows:
        table.add_row(label, *(cell.removesuffix(" %") for cell in cells))
    console.print(table)

    rows = reward_rows(results)
    if rows:
        pairs = results["reward_model"].get("pairs")
        table = _terminal_table(f"Agreement with gold on {number(pairs, 0)} pairs of held-out answers", "who")
        table.add_column("agrees", justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    rows = corner_rows(results)
    if rows:
        table = _terminal_table("The corner: share of the possible improvement still missing", "run")
        table.add_column("gap", justify="right")
        table.add_column("CPU seconds", justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    table = _terminal_table(f"Time: {minutes(results.get('seconds'))} in all", "stage")
    for heading in ("wall", "CPU"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in timing_rows(results):
        note = "kept from an earlier run" if row["cached"] else ""
        table.add_row(row["label"], row["seconds"], row["cpu"], note)
    console.print(table)


def _terminal_table(title: str, first: str, gap: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column(first)
    return table


# ----------------------------------------------------------------------------------------------- the plots


@dataclass
class Plot:
    """A figure of the report. All but `svg` is plain text, escaped when it is put into the page."""

    title: str
    svg: Markup
    alt: str
    caption: str


# Text stays text, in the page's own font; a fixed salt, or the ids inside would differ from run to run.
PLOT_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cs336_alignment",
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def draw(name: str, x_label: str, y_label: str, paint: Callable, columns: int = 2) -> Markup:
    """An inline SVG of one pair of axes on which `paint(axes)` draws; `name` keeps its ids apart."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        paint(axes)
        # Above the axes: there a legend never covers a point.
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, handlelength=2.2)
        file = io.StringIO()
        # Without metadata: it holds the time of day and addresses.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # not needed inside HTML
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return Markup(svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))


def running_mean(values: list[float], window: int) -> list[float]:
    """Each value averaged with those up to `window // 2` steps before and after it, fewer at the ends."""
    sums, half = [0.0], window // 2
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _training_line(axes, points: list[tuple], colour: str, label: str) -> None:
    """A noisy curve over training steps: each batch faintly, the running mean clearly."""
    window = max(len(points) // 40, 1)
    x, y = zip(*points, strict=True)
    if window > 1:
        axes.plot(x, y, color=COLOURS[colour], alpha=0.25, linewidth=0.8)
        label = f"{label} ({2 * (window // 2) + 1}-step mean)"
    axes.plot(x, running_mean(list(y), window), color=COLOURS[colour], label=label, alpha=0.75, linewidth=1.3)


def loss_plot(name: str, what: str, log: list[dict], unit: str, caption: str) -> Plot | None:
    """Training and held-out loss over steps."""
    train, held_out = series(log, "step", "loss"), series(log, "step", "held_out_loss")
    if not train and not held_out:
        return None
    colour = "sft" if name == "sft" else "base"

    def paint(axes) -> None:
        if train:
            _training_line(axes, train, colour, "training batch")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=COLOURS["ink"], label="held out")

    title = f"{what}: training loss {number(train[0][1])} to {number(train[-1][1])} nats" if train else what
    if held_out:
        (_, first), (_, last) = held_out[0], held_out[-1]
        best_step, best = min(held_out, key=lambda point: point[1])
        title = f"{what}: held-out loss went from {number(first)} to {number(last)} nats a token"
        if number(best) != number(last):
            title += f"; lowest {number(best)} at step {number(best_step, 0)}"
    alt = f"Line chart of loss over {what} steps. {title}."
    return Plot(title, draw(name, "step", f"loss ({unit})", paint), alt, caption)


def reward_plot(results: dict) -> Plot | None:
    """Accuracy of the reward model over training, and the lines it should be read against."""
    log, measured = (results.get("logs") or {}).get("reward"), results.get("reward_model") or {}
    train, held_out = series(log, "step", "accuracy"), series(log, "step", "held_out_accuracy")
    if not train and not held_out:
        return None
    agreement, error, expert, limit = (
        measured.get(key) for key in ("agreement", "agreement_se", "expert_agreement", "bayes_limit")
    )
    # An expert who judges by gold's own weights errs only by noise: then nothing predicts the labels better.
    same = finite(expert) and finite(limit) and abs(expert - limit) < 5e-4

    def paint(axes) -> None:
        if train:
            _training_line(axes, train, "reward", "training batch")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=COLOURS["ink"], label="held-out labels")
        if finite(agreement):
            axes.axhline(agreement, color=COLOURS["reward"], linestyle="--", label="gold pairs")
            if finite(error):
                low, high = agreement - error, agreement + error
                axes.axhspan(low, high, color=COLOURS["reward"], alpha=0.15, linewidth=0)
        if finite(limit):
            label = "expert = Bayes limit" if same else "Bayes limit"
            axes.axhline(limit, color=COLOURS["muted"], linestyle=":", label=label)
        if finite(expert) and not same:
            axes.axhline(expert, color=COLOURS["muted"], linestyle="-.", label="expert")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))

    title = "Reward model: accuracy on pairs of answers"
    if finite(agreement):
        rate = with_error(agreement, error, 1, 100, " %")
        title = f"The reward model agrees with gold on {rate} of held-out pairs"
        if finite(expert):
            title += f"; a single expert label, on {percent(expert)}"
    end = f" On held-out labels it ends at {percent(held_out[-1][1])}." if held_out else ""
    alt = f"Line chart of pair accuracy over training steps.{end} {title}."
    caption = (
        "The curves count how often the model ranks a pair as the expert's label does. The labels are "
        "noisy (one draw a pair); a coin gets 50 %. Held-out labels: comparisons kept out of training, of "
        "the same kind. The lines are measured on other pairs, from held-out prompts, whose two answers "
        "differ in gold: how often the trained model and a single expert label agree with gold, and the "
        "Bayes limit, the best that any model can do in predicting expert labels. "
    )
    caption += "The last two coincide here: this expert errs only by noise." if same else ""
    return Plot(title, draw("reward", "step", "pairs ranked right", paint), alt, caption)


def kl_plot(results: dict, what: str) -> Plot | None:
    """Gold ("reward") or proxy reward against KL to the SFT model, for PPO and DPO as they train."""
    logs = results.get("logs") or {}
    key = f"eval_{what}"
    curves = {}
    for name in ("ppo", "dpo"):
        lines = [line for line in logs.get(name) or [] if finite(line.get("eval_kl")) and finite(line.get(key))]
        if lines:
            curves[name] = lines
    if not curves:
        return None
    words = "Gold reward" if what == "reward" else "Proxy reward"

    def error(line: dict, name: str) -> float:
        """The length of an error bar; none is drawn where the error is missing."""
        return line[f"{name}_se"] if finite(line.get(f"{name}_se")) else 0.0

    def paint(axes) -> None:
        for name, lines in curves.items():
            marker, line_style = ("o", "-") if name == "ppo" else ("s", "--")
            x, y = [line["eval_kl"] for line in lines], [line[key] for line in lines]
            x_errors, y_errors = ([error(line, name) for line in lines] for name in ("eval_kl", key))
            axes.errorbar(
                x, y, xerr=x_errors, yerr=y_errors,
                marker=marker, linestyle=line_style, color=COLOURS[name], elinewidth=0.8, label=STAGES[name],
            )  # fmt: skip
            axes.plot(x[-1], y[-1], marker, color=COLOURS[name], markersize=8)

    sentences, ends = [], []
    for name, lines in curves.items():
        (before, before_error), (after, after_error) = ((lines[i][key], lines[i].get(f"{key}_se")) for i in (0, -1))
        sentences.append(f"with {STAGES[name]} it {change(before, before_error, after, after_error)}")
        ends.append(f"{STAGES[name]} ends at a KL of {number(lines[-1]['eval_kl'])} nats")
    title, far = f"{words}: {', '.join(sentences)}", ", ".join(ends)
    n = _config(results, "curve_prompts")
    caption = (
        "Points are measurements in the course of training, joined in order; the large one is the end. "
        f"{far}. Bars: ± one standard error over the same {f'{n} ' if n else ''}held-out prompts at each "
        "point. "
    )
    if what == "proxy":
        caption += (
            "Proxy: the score that the reward model gives. PPO is trained to raise it; DPO never sees it. "
            "Only differences of it mean anything. Where it rises and gold does not, the reward model is "
            "being gamed."
        )
    else:
        caption += f"Gold: the town's exact reward, which no training run sees; {PERFECT:g} is a perfect answer."
    y_label = "gold reward (exact)" if what == "reward" else "proxy (reward model's score)"
    svg = draw(f"kl-{what}", "KL to the SFT model (nats an answer)", y_label, paint)
    return Plot(title, svg, f"{words} against KL for PPO and DPO. {title}. {far}.", caption)


def corner_plot(results: dict) -> Plot | None:
    """Distance to the exact optimum on the corner over CPU seconds; both axes logarithmic."""
    corner = results.get("corner") or {}
    curves = {name: series(corner.get(name), "cpu_seconds", "gap") for name in CORNER_RUNS}
    curves = {name: [p for p in points if p[0] > 0 and p[1] > 0] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    looks = {"exact": ("-", "ink"), "ppo": ("o-", "ppo"), "dpo": ("--", "dpo")}

    def paint(axes) -> None:
        for name, points in curves.items():
            style, colour = looks[name]
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=COLOURS[colour],
                label=CORNER_RUNS[name],
                markersize=3.5,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        gaps = [gap for points in curves.values() for _, gap in points]
        axes.set_ylim(min(0.5, min(gaps) / 1.3), max(1.3, max(gaps) * 1.1))
        for axis, text in ((axes.xaxis, "{:g}"), (axes.yaxis, "{:g} %")):
            scale = 100 if axis is axes.yaxis else 1
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(
                FuncFormatter(lambda v, _, text=text, scale=scale: text.format(round(scale * v, 6)))
            )

    ends = ", ".join(f"{label} {gap}" for label, gap, _ in corner_rows(results))
    title = f"Share of the possible improvement still missing at the end: {ends}"
    caption = (
        "In this corner of the town the answers are so short that all of them can be listed, so the best "
        "possible policy is known. 100 % is the SFT model, 0 % the optimum of reward minus beta times KL "
        f"(J* = {number(corner.get('J_star'), 3)}, start {number(corner.get('J_ref'), 3)}, beta = "
        f"{number(corner.get('beta'))}). PPO samples answers; the exact gradient is PPO without sampling; "
        "DPO sees comparisons only, of answers drawn from the SFT model and from a flattened version of it. "
        "No error bars: the distance is exact, for one seed. Measuring is part of the seconds."
    )
    svg = draw("corner", "CPU seconds", "gap to the optimum", paint, columns=3)
    return Plot(title, svg, f"Gap to the optimum over CPU seconds, both axes logarithmic. {title}.", caption)


def plots(results: dict) -> list[Plot]:
    """All figures that these results allow."""
    logs = results.get("logs") or {}
    made = [
        loss_plot(
            "base", "Pre-training", results.get("base_log"), "nats a token",
            "The base model, trained here from scratch: next-word loss on the town's documents; the held-out "
            "documents come from another seed.",
        ),
        loss_plot(
            "sft", "SFT", logs.get("sft"), "nats a response token",
            "Held out: demonstrations of instructions that no training set holds. Demonstrators have several "
            "styles and make mistakes, so the loss cannot reach 0.",
        ),
        reward_plot(results),
        kl_plot(results, "reward"),
        kl_plot(results, "proxy"),
        corner_plot(results),
    ]  # fmt: skip
    return [plot for plot in made if plot]


# ------------------------------------------------------------------------------------------------ the page


def _config(results: dict, name: str):
    """A setting of the run, or None where the results do not hold it."""
    return (results.get("config") or {}).get(name, (results.get("settings") or {}).get(name))


def story(results: dict) -> list[str]:
    """What happened, in plain words for a newcomer, with this run's numbers; a paragraph each."""
    table, model = results.get("table") or {}, _config(results, "model")
    rows = {name: table.get(name) or {} for name in STAGES}
    follows = {name: percent(row.get("follows"), 0) for name, row in rows.items()}
    demonstrations, pairs = (
        f"{n:,} " if finite(n) else "" for n in (_config(results, "demonstrations"), results.get("preference_pairs"))
    )
    start = "a small language model that has only read the town's texts (the base model)"
    start = f"the model {model}, as it came (the base model)" if model else start
    first = (
        "This is the story of how a language model learns to be of help. It happens in an invented town: a "
        "program made up its people, their jobs and pets, its lists of tips and its word games. Because "
        "the town is made up, the right answer to every question is known, and no human or other model has "
        f"to judge. The start is {start}: of instructions kept out of all fine-tuning, it follows "
        f"{follows['base']}. Supervised fine-tuning (SFT) shows it {demonstrations}worked examples; then it "
        f"follows {follows['sft']}."
    )
    agreement = (results.get("reward_model") or {}).get("agreement")
    agrees = f": it sides with the truth on {percent(agreement, 0)} of held-out pairs" if finite(agreement) else ""
    second = (
        f"Next an expert compares {pairs}pairs of its answers, and a reward model learns to predict which "
        f"one is better{agrees}. From here two roads lead on. PPO lets the model try answers and "
        "strengthens those that the reward model scores highly; DPO learns from the comparisons directly, "
        "without a reward model. "
    )
    for name in ("ppo", "dpo"):
        if table.get(name):
            before, after = ((row.get("reward"), row.get("reward_se")) for row in (rows["sft"], rows[name]))
            second += f"With {STAGES[name]} the exact reward {change(*before, *after)}, and "
            second += f"{follows[name]} of the held-out instructions are followed. "
    second += f"(The exact, or gold, reward of a perfect answer is {PERFECT:g}. No training run sees it.)"
    return [first, second]


def stage_cards(results: dict) -> list[dict]:
    """A card for each stage: what it does, and its share of followed instructions as a bar."""
    table, measured = results.get("table") or {}, results.get("reward_model") or {}
    what = {
        "base": "the model as it came" if _config(results, "model") else "has only read text",
        "sft": "imitates demonstrations",
        "ppo": "tries answers, keeps what the reward model likes",
        "dpo": "learns from the comparisons directly",
    }
    cards = []
    for name in stage_names([name for name in table if name != "shipped base"]):
        row = table[name]
        cards.append({
            "key": name.replace(" ", "-") if name in STAGES else "other",
            "label": STAGES.get(name, name),
            "what": what.get(name, ""),
            "value": percent(row.get("follows"), 0),
            "width": round(100 * min(max(row["follows"], 0), 1), 1) if finite(row.get("follows")) else 0,
            "says": "of held-out instructions followed",
            "detail": f"gold reward {with_error(row.get('reward'), row.get('reward_se'))}",
        })  # fmt: skip
        if name == "sft" and finite(measured.get("agreement")):
            expert = measured.get("expert_agreement")
            cards.append({
                "key": "reward",
                "label": "reward model",
                "what": "learns from comparisons which answer is better",
                "value": percent(measured["agreement"], 0),
                "width": round(100 * measured["agreement"], 1),
                "says": "agreement with gold on pairs",
                "detail": f"expert {percent(expert, 0)}, a coin 50 %",
            })  # fmt: skip
    return cards


def answer_rows(results: dict) -> list[dict]:
    """The instructions with every stage's answer."""
    rows = []
    for row in results.get("answers") or []:
        answers = row.get("answers") or {}
        rows.append({
            "instruction": row.get("instruction", ""),
            "kind": KINDS.get(row.get("kind"), row.get("kind", "")),
            "answers": [
                {
                    "key": name.replace(" ", "-") if name in STAGES else "other",
                    "label": STAGES.get(name, name),
                    "text": answers[name].get("text", ""),
                    "right": bool(answers[name].get("follows")),
                    "finished": bool(answers[name].get("finished", True)),
                    "gold": number(answers[name].get("gold")),
                }
                for name in stage_names(answers)
            ],
        })  # fmt: skip
    return rows


def notes(results: dict) -> list[str]:
    """What a reader must know to read the table rightly."""
    table, n = results.get("table") or {}, _config(results, "evaluation_prompts")
    prompts = f"{n:,} instructions" if finite(n) else "instructions"
    lines = [
        f"Held out: {prompts} that no demonstration, comparison or PPO prompt holds (questions about other "
        "people, topics and objects; other word exercises). Disputed facts are left out, as no answer to "
        "them is right.",
        "± is one standard error over these instructions. It says nothing about another training run: this "
        f"is one seed ({_config(results, 'seed')}), and another gives other numbers. A difference of less "
        "than two standard errors decides nothing, so the text calls it no clear change.",
    ]
    if "base" in table:
        lines.append(
            "The base model is given the bare instruction, without the chat format that SFT teaches. Its "
            "KL compares it with the SFT model on the same bare text, so that number cannot be compared "
            "with the rows below it."
        )
    extreme = [STAGES.get(name, name) for name, row in table.items() if row.get("follows") in (0, 1)]
    if extreme and finite(n):
        lines.append(
            f"± 0.0 beside a share of 0 or 100 % ({', '.join(extreme)}) only means that all {n:,} agreed: "
            f"the true share can still differ by up to about {percent(3 / n)} (95 % confidence)."
        )
    return lines


def page(results: dict) -> str:
    """The HTML of the report."""
    settings, machine = results.get("settings") or {}, results.get("machine") or {}
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **blocks)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    corner = results.get("corner") or {}
    facts = {
        "date": results.get("date"),
        "seed": settings.get("seed"),
        "profile": settings.get("profile"),
        "started from": settings.get("model") or "the town's own base model",
        "device": machine.get("device"),
        "processor": machine.get("processor"),
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
        "torch": machine.get("torch"),
        "wall time": minutes(results.get("seconds")),
        "peak memory": number(results.get("peak_memory_gb"), 2, " GiB"),
    }
    html = template.render(
        facts={name: value for name, value in facts.items() if value not in (None, "–")},
        small=settings.get("profile") == "test",
        story=story(results),
        cards=stage_cards(results),
        columns=COLUMNS,
        rows=table_rows(results),
        notes=notes(results),
        reward_rows=reward_rows(results),
        reward_pairs=number((results.get("reward_model") or {}).get("pairs"), 0),
        corner_rows=corner_rows(results),
        corner_beta=number(corner.get("beta")),
        answers=answer_rows(results),
        plots=plots(results),
        timings=timing_rows(results),
        seconds=minutes(results.get("seconds")),
        settings=json.dumps(settings | (results.get("config") or {}), indent=1),
    )
    # A number is not torn from its unit or its error at the end of a line.
    return html.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def write_report(results: dict, path: Path) -> Path:
    """Writes the report to `path`, one HTML file that needs nothing else, and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results), encoding="utf-8")
    return path
