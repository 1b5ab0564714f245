"""Whole PPO updates by `train_ppo` beside TRL 1.12's: prints the largest differences as JSON.

    python benchmarks/ppo_update.py > benchmarks/results/ppo_update.json

It needs no TRL: golden_ppo.py has stored TRL's side. How the two are brought together, and what is peculiar to TRL,
is in tests/trl_update.py; tests/test_ppo_update.py asserts the result.
"""

import json
import sys
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from trl_update import GOLDEN, compare  # noqa: E402


def compare_all() -> dict:
    """The largest difference of all cases in losses and weights, and each case by itself."""
    cases = [compare(case) for case in GOLDEN["cases"]]
    worst = max(max(case["largest_differences"].values()) for case in cases)
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "against": GOLDEN["made_by"]}
    return facts | {"largest_difference": worst, "cases": cases}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compare_all(), indent=1))
