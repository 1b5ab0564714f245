"""What the demo reaches and costs: three seeds of the whole story on the town, some five minutes each.

    python benchmarks/demo.py [--seeds 0 1 2] [--runs runs] [--threads N]

Finished stages are kept under --runs, in the folders that `course.py demo --seed N` uses. Writes
benchmarks/results/demo.json and demo.md.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch

from cs336_alignment.pipeline import run_demo
from cs336_alignment.tables import markdown, over_seeds

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "follows": "follows, sampled",
    "follows_greedy": "follows, greedy",
    "reward": "gold reward",
    "kl": "KL to SFT, nats",
    "length": "length, words",
    "refusal": "refuses harmful",
    "over_refusal": "refuses look-alikes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {
        seed: run_demo(seed=seed, out=arguments.runs / (f"demo-seed{seed}" if seed else "demo"))
        for seed in arguments.seeds
    }
    runs = list(results.values())
    kept = ("settings", "date", "machine", "table", "reward_model", "timings")
    record = {seed: {k: run[k] for k in kept} for seed, run in results.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    machine = runs[0]["machine"]
    lines = [
        "# The demo, over seeds",
        "",
        f"{date.today().isoformat()}; {machine['cores']} cores ({machine['processor']}), "
        f"{machine['threads']} thread(s), "
        f"torch {machine['torch']}; seeds {', '.join(map(str, results))}. Made by `python benchmarks/demo.py`.",
        "",
        f"{runs[0]['config']['evaluation_prompts']} held-out instructions a seed; mean ± standard error over seeds.",
        "",
    ]
    table = {
        stage: [over_seeds([run["table"][stage][column] for run in runs]) for column in COLUMNS]
        for stage in runs[0]["table"]
    }
    lines += markdown(list(COLUMNS.values()), table)
    lines += ["", "Gold reward above SFT, paired by seed, and its own standard error over prompts in each seed:", ""]
    for stage in ("ppo", "dpo"):
        gains = [run["table"][stage]["reward"] - run["table"]["sft"]["reward"] for run in runs]
        errors = [
            (run["table"][stage]["reward_se"] ** 2 + run["table"]["sft"]["reward_se"] ** 2) ** 0.5 for run in runs
        ]
        each = ", ".join(f"{gain:+.2f} ± {error:.2f}" for gain, error in zip(gains, errors))
        lines.append(f"- {stage.upper()}: {over_seeds(gains)} ({each})")
    agreement = over_seeds([run["reward_model"]["agreement"] for run in runs])
    limit = over_seeds([run["reward_model"]["bayes_limit"] for run in runs])
    lines += ["", f"Reward model: agreement with gold {agreement}; Bayes limit of the expert's labels {limit}.", ""]
    lines += ["| stage | CPU seconds | wall seconds |", "|---|---|---|"]
    for stage in runs[0]["timings"]:
        cpu = over_seeds([run["timings"][stage]["cpu_seconds"] for run in runs], "{:.1f}")
        wall = over_seeds([run["timings"][stage]["seconds"] for run in runs], "{:.1f}")
        lines.append(f"| {stage} | {cpu} | {wall} |")
    (RESULTS / "demo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
