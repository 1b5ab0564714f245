"""What `course.py train sft|reward|dpo --data FILE` reaches on real files, with seeds and standard errors.

    python benchmarks/real_data.py --data-dir DIR [--seeds 1 2 3] [--threads 1] [--runs runs/benchmark]

DIR holds alpaca_style_instructions.json and preference_pairs.json (rasbt/LLMs-from-scratch ch07, Apache-2.0),
which are not part of the course. Runs are kept under --runs and used again, so a stopped benchmark goes on
where it was. Writes benchmarks/results/real_data.md and real_data.json.
"""

import argparse
import datetime
import json
import math
import platform
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from cs336_alignment.data import load_preferences, split_by_prompt
from cs336_alignment.real_data import RealConfig, _accuracy, train_on_file

RESULTS = Path(__file__).parent / "results"


def bag_of_words(path: Path, seed: int, settings: RealConfig) -> dict:
    """Held-out accuracy of a logistic regression on word counts: what the wording alone gives away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the six pairs of equal texts, which train_on_file reports
        pairs = load_preferences(path, ties="drop")
    train, held_out = split_by_prompt(pairs, settings.held_out, seed)

    def words(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    index: dict[str, int] = {}
    for pair in train:
        for word in words(pair["chosen"]) + words(pair["rejected"]):
            index.setdefault(word, len(index))

    def features(pairs: list[dict]) -> torch.Tensor:
        counts = torch.zeros(len(pairs), len(index))
        for row, pair in enumerate(pairs):
            for side, sign in ("chosen", 1), ("rejected", -1):
                for word in words(pair[side]):
                    if word in index:
                        counts[row, index[word]] += sign
        return counts

    x = features(train)
    weights = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(500):
        loss = -F.logsigmoid(x @ weights).mean() + 1e-3 * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    margins = (features(held_out) @ weights).detach()
    return _accuracy(margins, torch.zeros_like(margins), [pair["prompt"] for pair in held_out])


def timed(stage: str, data: Path, out: Path, seed: int, settings: RealConfig) -> dict:
    """metrics.json of a run, with the CPU seconds it took (of the whole, had it not been interrupted)."""
    before = time.process_time()
    metrics = train_on_file(stage, str(data), out=str(out), seed=seed, device="cpu", settings=settings, progress=False)
    used = Path(metrics["folder"]) / "cpu_seconds.json"
    if not used.exists():
        used.write_text(json.dumps(round(time.process_time() - before)), encoding="utf-8")
    return metrics | {"cpu_seconds": json.loads(used.read_text(encoding="utf-8"))}


def mean_of(results: list[dict], name: str = "accuracy") -> str:
    """Means over seeds of a figure and of its standard error: the splits overlap, so it does not shrink."""
    value = sum(result[name] for result in results) / len(results)
    error = sum(result["error"] for result in results) / len(results)
    return f"{value:.3f} ± {error:.3f}" if name == "accuracy" else f"{value:.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = RealConfig()
    without_nll = replace(settings, dpo=replace(settings.dpo, nll_coef=0.0))
    demonstrations = arguments.data_dir / "alpaca_style_instructions.json"
    pairs = arguments.data_dir / "preference_pairs.json"

    def run(stage: str, data: Path, seed: int, settings: RealConfig) -> dict:
        metrics = timed(stage, data, arguments.runs, seed, settings)
        shown = metrics.get("held_out_pairs") or metrics["after"]["held_out"]
        print(stage, "seed", seed, {name: round(value, 3) for name, value in shown.items()}, flush=True)
        return metrics

    results = []
    for seed in arguments.seeds:
        sft = run("sft", demonstrations, seed, settings)
        reward = run("reward", pairs, seed, settings)
        dpo = run("dpo", pairs, seed, settings)
        plain = run("dpo", pairs, seed, without_nll)
        results.append(
            {
                "seed": seed,
                "records": {"demonstrations": sft["counts"], "pairs": dpo["counts"]},
                "cpu_seconds": {m["stage"]: m["cpu_seconds"] for m in (sft, reward, dpo)},
                "sft": {"before": sft["before"], "after": sft["after"]},
                "reward": reward["held_out_pairs"],
                "dpo": dpo["held_out_pairs"] | log_ratios(dpo),
                "dpo_without_nll": plain["held_out_pairs"] | log_ratios(plain),
                "sft_log_probability": dpo["baselines"][0],
                "length_only": dpo["baselines"][1],
                "bag_of_words": bag_of_words(pairs, seed, settings),
            }
        )
    RESULTS.mkdir(exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {arguments.threads} thread(s)",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    document = {"command": "python benchmarks/real_data.py --data-dir DIR", **about, "runs": results}
    (RESULTS / "real_data.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "real_data.md").write_text(report(results, about), encoding="utf-8")
    print((RESULTS / "real_data.md").read_text(encoding="utf-8"))


def log_ratios(metrics: dict) -> dict[str, float]:
    last = metrics["log"][-1]
    return {side: last[f"held_out_{side}_log_ratio"] for side in ("chosen", "rejected")}


def report(results: list[dict], about: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = [
        "# Training on real files",
        "",
        "`python benchmarks/real_data.py --data-dir DIR`, with "
        f"{', '.join(f'{name} {value}' for name, value in about.items())}.",
        "",
        "Small Llamas from scratch with a BPE tokenizer of their own, trained by `course.py train` with its",
        "default settings. Every figure is on held-out prompts unless it says train, ± one standard error",
        "(clustered by prompt). The settings were chosen on the held-out prompts of seed 0, which is not reported;",
        "a fifth of them is expected to be held out under any other seed too. All splits are of one file, so the",
        "last column has the mean of the standard errors, not a smaller one.",
        "",
    ]
    seeds = " | ".join(f"seed {result['seed']}" for result in results)
    head = [f"| {{}} | {seeds} | mean |", "|---" * (len(results) + 2) + "|"]

    def row(name: str, picked: list[dict], figure: str = "accuracy") -> str:
        cells = " | ".join(mean_of([result], figure) for result in picked)
        return f"| {name} | {cells} | {mean_of(picked, figure)} |"

    lines += [head[0].format("SFT, nats a response token"), head[1]]
    for when in "before", "after":
        for where in "train", "held_out":
            picked = [result["sft"][when][where] for result in results]
            lines.append(row(f"{where.replace('_', '-')}, {when}", picked, "loss"))
    lines += ["", head[0].format("held-out pairs ranked as labelled"), head[1]]
    for name, key in (
        ("reward model", "reward"),
        ("DPO, implicit reward", "dpo"),
        ("DPO without the NLL term", "dpo_without_nll"),
        ("log-probability of the SFT model", "sft_log_probability"),
        ("length only, fitted on train", "length_only"),
        ("bag of words, logistic regression", "bag_of_words"),
    ):
        lines.append(row(name, [result[key] for result in results]))
    worst = min((r[key]["accuracy"] - 0.5) / r[key]["error"] for r in results for key in ("reward", "dpo"))
    lines += ["", f"The smallest lead over chance is {worst:.1f} standard errors.", ""]
    lines += [head[0].format("mean log pi / pi_ref of held-out responses, nats"), head[1]]
    for name, key in ("DPO", "dpo"), ("DPO without the NLL term", "dpo_without_nll"):
        for side in "chosen", "rejected":
            values = [result[key][side] for result in results]
            cells = " | ".join(f"{value:.1f}" for value in [*values, sum(values) / len(values)])
            lines.append(f"| {name}: {side} | {cells} |")
    lines += ["", head[0].format("CPU seconds, data to saved model"), head[1]]
    for stage in "sft", "reward", "dpo":
        values = [result["cpu_seconds"][stage] for result in results]
        mean = math.fsum(values) / len(values)
        lines.append(f"| {stage} | {' | '.join(f'{value:.0f}' for value in [*values, mean])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
