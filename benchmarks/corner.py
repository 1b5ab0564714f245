"""How close each method comes to the exact optimum on the enumerable corner; three seeds, some ten minutes.

    python benchmarks/corner.py [--seeds 0 1 2] [--runs runs]

Takes the SFT model that `course.py demo --seed N` left under --runs, or trains it; then, on one thread: PPO, the exact
gradient with a network and with a table, and full-batch DPO from soft and from one-bit labels. Writes
benchmarks/results/corner.json and corner.md.
"""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

import torch

from cs336_alignment import corner as runs
from cs336_alignment.corner import FitConfig, corner_ppo_config
from cs336_alignment.evaluate import mean_and_error
from cs336_alignment.exact import TabularPolicy, corner_node_log_probs
from cs336_alignment.paths import demo_folder
from cs336_alignment.pipeline import Story

RESULTS = Path(__file__).parent / "results"


def run_seed(seed: int, runs_folder: Path) -> dict[str, dict]:
    """Gap and CPU seconds of each method from the SFT model of one seed."""
    story = Story("full", seed, "cpu", out=runs_folder / demo_folder("full", seed, None, False))
    config, sft, problem = story.config, story.sft, story.problem
    with torch.no_grad():
        table = TabularPolicy(corner_node_log_probs(sft, problem.corner))
    tabular = FitConfig(steps=300, learning_rate=0.1, decay=200)
    narrow = runs.sample_pairs(problem, [problem.ref_log_probs], config.corner_pairs, seed)
    wide = [problem.ref_log_probs, runs.tempered(problem.ref_log_probs, 2.0)]
    soft = runs.sample_pairs(problem, wide, config.corner_pairs, seed)
    temperature = 0.3
    logs = {}
    policy, logs["PPO, sampled"] = runs.ppo(sft, problem, corner_ppo_config(seed))
    with torch.no_grad():
        behaviours = [problem.ref_log_probs, runs.corner_log_probs(policy, problem.corner)]
    narrow_bits = runs.sample_pairs(problem, behaviours, config.corner_pairs, seed, temperature=temperature)
    behaviours.append(wide[1])
    bits = runs.sample_pairs(problem, behaviours, config.corner_pairs, seed, temperature=temperature)
    beta = problem.beta / temperature  # the rewards that one-bit labels show are r / temperature
    _, logs["exact gradient, network"] = runs.exact_gradient(sft, problem, config.corner_exact)
    _, logs["exact gradient, table"] = runs.exact_gradient(table, problem, tabular)
    _, logs["DPO, soft labels, pairs from pi_ref and pi_ref at temperature 2"] = runs.dpo(
        sft, problem, soft, config.corner_dpo
    )
    _, logs["DPO, soft labels, pairs from pi_ref alone"] = runs.dpo(sft, problem, narrow, config.corner_dpo)
    _, logs["the same two, table: wide"] = runs.dpo(table, problem, soft, tabular)
    _, logs["the same two, table: pi_ref alone"] = runs.dpo(table, problem, narrow, tabular)
    one_bit = FitConfig(steps=100, learning_rate=3e-4, decay=80)
    _, logs["DPO, one-bit labels T .3, pairs from pi_ref, PPO and pi_ref at temperature 2"] = runs.dpo(
        sft, problem, bits, one_bit, beta
    )
    _, logs["DPO, one-bit labels T .3, pairs from pi_ref and PPO"] = runs.dpo(sft, problem, narrow_bits, one_bit, beta)
    row = {name: {"gap": log[-1]["gap"], "cpu_seconds": log[-1]["cpu_seconds"]} for name, log in logs.items()}
    values = {
        "J_ref": problem.value(problem.ref_log_probs).item(),
        "J_star": problem.value(problem.optimum).item(),
    }
    return {"values": values, "methods": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    seeds = arguments.seeds
    torch.set_num_threads(1)
    results = {seed: run_seed(seed, arguments.runs) for seed in seeds}
    machine = f"{os.cpu_count()} cores ({platform.machine()}), one thread, torch {torch.__version__}"
    record = {"date": date.today().isoformat(), "machine": machine, "beta": 0.2, "seeds": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "corner.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    lines = [
        "# Distance to the exact optimum on the corner",
        "",
        f"{record['date']}, {machine}; seeds {', '.join(map(str, seeds))}; beta {record['beta']}. "
        "Made by `python benchmarks/corner.py`.",
        "",
        "Gap: (J* - J) / (J* - J_ref) of the last step, averaged over nine prompts; ± is the s.e. over seeds. "
        + "; ".join(
            f"seed {seed}: J_ref {r['values']['J_ref']:.3f}, J* {r['values']['J_star']:.3f}"
            for seed, r in results.items()
        )
        + ".",
        "",
        "| method | gap, mean ± s.e. | " + " | ".join(f"seed {seed}" for seed in seeds) + " | CPU seconds, mean |",
        "|---|---" + "|---" * (len(seeds) + 1) + "|",
    ]
    for name in next(iter(results.values()))["methods"]:
        gaps = torch.tensor([r["methods"][name]["gap"] for r in results.values()], dtype=torch.float64)
        seconds = torch.tensor([r["methods"][name]["cpu_seconds"] for r in results.values()])
        mean, error = mean_and_error(gaps)
        cells = " | ".join(f"{gap:.2%}" for gap in gaps.tolist())
        lines.append(f"| {name} | {mean:.2%} ± {error:.2%} | {cells} | {seconds.mean():.1f} |")
    (RESULTS / "corner.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
