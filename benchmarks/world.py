"""What can be seen in the town: unknown facts, refusals, over-optimization, held-out gains; three seeds.

    python benchmarks/world.py [EXPERIMENT ...] [--seeds 0 1 2] [--runs runs]

Starts from the SFT models that `course.py demo --seed N` left under --runs, or trains them. Every experiment takes
some minutes a seed on one thread and keeps its result under --runs/world, so a run that was stopped goes on from
there. Writes benchmarks/results/world.json and world.md.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import random
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

from cs336_alignment.evaluate import evaluate_policy, mean_and_error, refusal_rates
from cs336_alignment.models import RewardModel, frozen_copy
from cs336_alignment.paths import demo_folder
from cs336_alignment.pipeline import (
    EVALUATION_SHARES,
    Story,
    Town,
    demo_config,
    gold_agreement,
    ppo_stage,
    reward_stage,
    sample_preferences,
    weights_digest,
)
from cs336_alignment.reward import score
from cs336_alignment.sft import train_sft
from cs336_alignment.tables import markdown, over_seeds
from cs336_alignment.tokens import pack
from cs336_alignment.world import KIND_SHARES, MAX_NEW_TOKENS, Task, chat_prompt
from cs336_alignment.world_training import introduce_chat_tokens, load_base, profile

RESULTS = Path(__file__).parent / "results"


def start(seed: int, runs: Path) -> Story:
    """The demo of a seed: its stages as `course.py demo --seed N` left them under `runs`, or trained when asked for.

    Raises: ValueError when a stage is asked for that was kept with other settings or from another base model.
    """
    return Story("full", seed, "cpu", out=runs / demo_folder("full", seed, None, False))


def replay_rows(town: Town, seed: int):
    return pack(town.world.documents(200_000, seed + 1), 64)


def share(flags: list[bool]) -> dict[str, float]:
    """The share of True, and its standard error over prompts."""
    mean = sum(flags) / len(flags)
    return {"mean": mean, "se": (mean * (1 - mean) / len(flags)) ** 0.5, "n": len(flags)}


# ---------------------------------------------------------------------------------------------- unknown facts


def unknown_facts(seed: int, runs: Path) -> dict:
    """Lecture 04: what fine-tuning on facts does to made-up answers. Arms continue from the SFT model, those with
    dots from the arm that learned to abstain. All see the same known facts; all are asked about unknown people whom
    no demonstration names, and about known people of the held-out split."""
    story = start(seed, runs)
    town, world, config, sft = story.town, story.world, story.config, story.sft
    unknown = [p for p in world.unknown if p not in world.held_out_subjects]
    half = set(random.Random(seed).sample(unknown, len(unknown) // 2))
    tasks = list(world.tasks.values())
    first = [t for t in tasks if t.kind == "unknown" and t.subject in half]
    second = [t for t in tasks if t.kind == "unknown" and t.subject in unknown and t.subject not in half]
    known = random.Random(seed).sample([t for t in tasks if t.kind == "fact" and not world.held_out(t)], len(first))
    asked = [t for t in tasks if t.kind == "unknown" and world.held_out(t)]
    recalled = [t for t in tasks if t.kind == "fact" and world.held_out(t)]
    replay = replay_rows(town, seed)

    def measure(model) -> dict:
        answers = town.answers(model, [chat_prompt(t.instruction) for t in asked], 0.0)
        right = town.answers(model, [chat_prompt(t.instruction) for t in recalled], 0.0)
        return {
            "made up": share([world.makes_up(t.instruction, a) for t, a in zip(asked, answers)]),
            "abstains": share([world.follows(t.instruction, a) for t, a in zip(asked, answers)]),
            "known people right": share([world.follows(t.instruction, a) for t, a in zip(recalled, right)]),
        }

    def tuned(model, tasks: list[Task], steps: int, abstain: bool):
        model = copy.deepcopy(model).requires_grad_(True)
        demonstrations = world.demonstrate(tasks, seed, abstain=abstain)
        settings = replace(config.sft, steps=steps, warmup=5, decay=steps // 2, learning_rate=5e-4)
        train_sft(model, town.tokenizer, demonstrations, settings, replay=replay)
        return frozen_copy(model)

    both = known + first
    abstaining = tuned(sft, both, 150, abstain=True)
    return {
        "before": measure(sft),
        "known facts, 150 steps": measure(tuned(sft, known, 150, abstain=True)),
        "known and unknown facts, 150 steps": measure(tuned(sft, both, 150, abstain=False)),
        "known facts and abstention, 150 steps": measure(abstaining),
        "... then facts about other unknown people, 25 steps": measure(tuned(abstaining, second, 25, abstain=False)),
        "... the same, 100 steps": measure(tuned(abstaining, second, 100, abstain=False)),
        "... then known facts alone, 100 steps": measure(tuned(abstaining, known, 100, abstain=True)),
    }


# --------------------------------------------------------------------------------------------------- refusals


def refusals(seed: int, runs: Path) -> dict:
    """Lecture 05: refusing what is harmful against refusing what only looks so, by the number of harmful examples
    and of look-alikes that are answered. 300 SFT steps from the base model."""
    story = start(seed, runs)
    town, world, config, replay = story.town, story.world, story.config, replay_rows(story.town, seed)
    base = introduce_chat_tokens(story.base, world).requires_grad_(True)
    others = {kind: s for kind, s in KIND_SHARES.items() if kind not in ("harmful", "lookalike")}
    groups = [
        [chat_prompt(t.instruction) for t in world.tasks.values() if t.kind == kind and world.held_out(t)]
        for kind in ("harmful", "lookalike")
    ]
    rows = {}
    for harmful in (30, 300):
        for contrast in (0, 30, 300):
            demonstrations = world.demonstrations(2000, seed, shares=others)
            demonstrations += world.demonstrations(harmful, seed, shares={"harmful": 1.0})
            demonstrations += world.demonstrations(contrast, seed, shares={"lookalike": 1.0}) if contrast else []
            model = copy.deepcopy(base)
            train_sft(
                model, town.tokenizer, demonstrations, replace(config.sft, steps=300, decay=200), replay=replay
            )  # fmt: skip
            rates = refusal_rates(model, town.tokenizer, *groups, world.refuses, max_new_tokens=MAX_NEW_TOKENS)
            rows[f"{harmful} harmful, {contrast} look-alikes"] = {
                "refuses harmful": {"mean": rates["refusal"], "n": len(groups[0])},
                "refuses look-alikes": {"mean": rates["over_refusal"], "n": len(groups[1])},
            }
    return rows


# ------------------------------------------------------------------------------------------ over-optimization


def over_optimization(seed: int, runs: Path) -> dict:
    """Lecture 14: PPO with a weak KL penalty against four reward models, from expert or crowd labels, few or many.
    The proxy is in standard deviations of its scores of SFT answers."""
    story = start(seed, runs)
    town, config, sft = story.town, story.config, story.sft
    settings = replace(config, ppo=replace(config.ppo, steps=40, beta=0.05, learning_rate=2e-4, decay=10))
    prompts = town.prompts(256, seed + 70, held_out=True, shares=EVALUATION_SHARES)
    answers = town.answers(sft, prompts, 1.0, seed=seed)
    rows = {}
    for annotator in ("expert", "crowd"):
        preferences = sample_preferences(town, sft, config, annotator)
        for n in (300, 3500):
            reward_model = RewardModel(copy.deepcopy(sft).requires_grad_(True), config.reward_likelihood)
            steps = config.reward.steps if n == 3500 else 60  # a few passes over the few labels, not forty
            labels = replace(config, reward=replace(config.reward, steps=steps, decay=steps // 2))
            reward_stage(town, reward_model, preferences[:n], labels)
            reward_model = frozen_copy(reward_model)
            spread = score(reward_model, town.tokenizer, prompts, answers)
            policy = copy.deepcopy(sft).requires_grad_(True)
            log = ppo_stage(town, policy, sft, reward_model, settings)
            curve = [line for line in log if "eval_proxy" in line]
            start_proxy = curve[0]["eval_proxy"]
            rows[f"{annotator} labels, {n}"] = {
                "agreement with gold": {"mean": gold_agreement(town, reward_model, sft, seed)["agreement"]},
                "proxy gain, sd": {"mean": (curve[-1]["eval_proxy"] - start_proxy) / spread.std().item()},
                "gold gain": {"mean": curve[-1]["eval_reward"] - curve[0]["eval_reward"]},
                "best gold gain on the way": {"mean": max(c["eval_reward"] for c in curve) - curve[0]["eval_reward"]},
                "KL": {"mean": curve[-1]["eval_kl"]},
                "curve": [
                    {
                        "step": c["step"], "kl": c["eval_kl"], "gold": c["eval_reward"], "gold_se": c["eval_reward_se"],
                        "proxy": (c["eval_proxy"] - start_proxy) / spread.std().item(),
                    }
                    for c in curve
                ],
            }  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------------- held-out gains


def gains(seed: int, runs: Path) -> dict:
    """Gold reward of SFT, PPO and DPO with the demo's recipes, on instructions of both splits; and how often the
    demonstrators themselves follow."""
    story = start(seed, runs)
    town, world, config, sft = story.town, story.world, story.config, story.sft
    rows: dict[str, dict] = {}
    measured: dict[tuple, torch.Tensor] = {}
    for name, model in (("SFT", sft), ("PPO", story.ppo), ("DPO", story.dpo)):
        for split in ("trained", "held-out"):
            shares = EVALUATION_SHARES
            prompts = town.prompts(1024, seed + 80, held_out=split == "held-out", shares=shares)
            result = evaluate_policy(
                model, town.tokenizer, prompts, world.gold_reward,
                ref_model=sft, max_new_tokens=MAX_NEW_TOKENS, seed=seed,
            )  # fmt: skip
            measured[name, split] = result.rewards
            mean, error = mean_and_error(result.rewards)
            rows[f"{name}, {split} instructions"] = {
                "gold": {"mean": mean, "se": error},
                "KL": {"mean": result.kl.mean().item()},
                "follows": share([world.follows(p, r) for p, r in zip(prompts, result.responses)]),
            }
            if name != "SFT":
                gain, error = mean_and_error(result.rewards - measured["SFT", split])  # the same prompts
                rows[f"{name}, {split} instructions"]["gain over SFT"] = {"mean": gain, "se": error}
    demonstrations = world.demonstrations(2000, seed, held_out=True, shares=EVALUATION_SHARES)
    follow = [world.follows(d["prompt"], d["response"]) for d in demonstrations]
    rows["the demonstrators, held-out instructions"] = {"follows": share(follow)}
    agreement = gold_agreement(town, story.reward_model, sft, seed)
    plain = RewardModel(copy.deepcopy(sft).requires_grad_(True))  # only the read-out of the last token
    reward_stage(town, plain, story.preferences, config)
    rows["reward model without likelihood"] = {
        "agreement with gold": {"mean": gold_agreement(town, frozen_copy(plain), sft, seed)["agreement"]}
    }
    rows["reward model"] = {
        "agreement with gold": {"mean": agreement["agreement"], "se": agreement["agreement_se"]},
        "of one expert label": {"mean": agreement["expert_agreement"]},
        "Bayes limit": {"mean": agreement["bayes_limit"]},
    }
    recalled = [t for t in world.tasks.values() if t.kind == "fact" and world.held_out(t)]
    answers = town.answers(sft, [chat_prompt(t.instruction) for t in recalled], 0.0)
    rows["SFT, facts about people in no demonstration, greedy"] = {
        "follows": share([world.follows(t.instruction, a) for t, a in zip(recalled, answers)])
    }
    return rows


EXPERIMENTS = {f.__name__: f for f in (gains, unknown_facts, over_optimization, refusals)}


def table(by_seed: dict[int, dict]) -> list[str]:
    """Markdown: mean ± standard error over seeds, and the seeds one by one."""
    rows = next(iter(by_seed.values()))
    columns = list(dict.fromkeys(c for row in rows.values() for c, cell in row.items() if isinstance(cell, dict)))

    def cell(values: list[float]) -> str:
        each = ", ".join(f"{value:.2f}" for value in values)
        return over_seeds(values) + (f" ({each})" if len(values) > 1 else "") if values else ""

    cells = {
        name: [cell([r[name][column]["mean"] for r in by_seed.values() if column in r[name]]) for column in columns]
        for name in rows
    }
    return markdown(columns, cells)


def digest() -> str:
    """What a kept result was made with: the base model's weights, the demo's settings and this file."""
    base = weights_digest(load_base(profile("full"), device="cpu"))
    parts = [base, json.dumps(asdict(demo_config("full", 0))), Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.runs / "world"
    folder.mkdir(parents=True, exist_ok=True)
    key = digest()
    for name in arguments.experiments or EXPERIMENTS:
        for seed in arguments.seeds:
            path = folder / f"{name}-{key}-seed{seed}.json"
            if not path.exists():
                print(f"{name}, seed {seed}", flush=True)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(EXPERIMENTS[name](seed, arguments.runs)), encoding="utf-8")
                part.replace(path)  # whole or not at all

    results: dict[str, dict[int, dict]] = {}
    for name in EXPERIMENTS:
        found = {s: folder / f"{name}-{key}-seed{s}.json" for s in arguments.seeds}
        results[name] = {s: json.loads(p.read_text(encoding="utf-8")) for s, p in found.items() if p.exists()}
    machine = f"{os.cpu_count()} cores ({platform.machine()}), one thread, torch {torch.__version__}"
    record = {
        "date": date.today().isoformat(),
        "machine": machine,
        "world": profile("full").key,
        "experiments": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "world.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# What can be seen in the town",
        "",
        f"{record['date']}, {machine}; world {record['world']}. Made by `python benchmarks/world.py`. "
        "Mean ± standard error over seeds, each seed in brackets.",
    ]
    for name, by_seed in results.items():
        if by_seed:
            text = " ".join(EXPERIMENTS[name].__doc__.split())
            lines += ["", f"## {name.replace('_', ' ')}", "", text, "", f"Seeds {', '.join(map(str, by_seed))}.", ""]
            lines += table(by_seed)
    (RESULTS / "world.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
