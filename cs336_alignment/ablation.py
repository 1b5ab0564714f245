"""What each ingredient of the base model's recipe is worth: `python3 course.py world ablate`.

Every variant leaves one thing out, is pre-trained for a quarter of the full steps, fine-tuned, and measured on
held-out instructions. Finished variants are kept, so a run that was stopped goes on from there.
"""

import copy
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from cs336_alignment.models import frozen_copy, load_progress, resolve_device, save_progress, settings_digest
from cs336_alignment.pipeline import Town, demo_config, sft_stage
from cs336_alignment.tables import markdown, over_seeds
from cs336_alignment.world import MAX_NEW_TOKENS, PRETRAINING_SHARES, World, chat_prompt
from cs336_alignment.world_training import Profile, introduce_chat_tokens, new_model, pretrain, profile


@dataclass(frozen=True)
class Variant:
    without: tuple[str, ...] = ()  # kinds of pre-training documents; the others share their place
    replay: bool = True  # pre-training text in every SFT step
    chat_tokens: bool = True  # <user> and <assistant> start as "question" and "answer"
    layers: int | None = None


VARIANTS = {
    "the recipe": Variant(),
    "no question-answer documents": Variant(without=("question_and_answer",)),
    "no copying exercises": Variant(without=("copying",)),
    "no question sheets": Variant(without=("question_sheet",)),
    "no critiques and judgements": Variant(without=("critique", "judgement")),
    "three layers instead of four": Variant(layers=3),
    "SFT without replay": Variant(replay=False),
    "SFT with random chat tokens": Variant(chat_tokens=False),
}


def run_variant(variant: Variant, sizes: Profile, seed: int, cache: Path) -> dict[str, float]:
    """Pre-trains (or loads what another variant pre-trained), fine-tunes, measures. What is left out of
    pre-training is left out of the replay too."""
    device = resolve_device()
    if variant.layers:
        sizes = replace(sizes, model=replace(sizes.model, num_hidden_layers=variant.layers))
    sizes = replace(sizes, pretraining=replace(sizes.pretraining, seed=seed))
    world, model = World(sizes.world), new_model(sizes, device)
    shares = {kind: share for kind, share in PRETRAINING_SHARES.items() if kind not in variant.without}
    path = cache / f"base-{settings_digest(sizes.key, asdict(sizes.pretraining), shares)}.pt"
    kept = load_progress(path)
    if kept is None:
        held_out_loss = pretrain(model, world, sizes.pretraining, shares=shares)[-1]["held_out_loss"]
        save_progress(path, model=model.state_dict(), held_out_loss=held_out_loss)
    else:
        model.load_state_dict(kept["model"])
        held_out_loss = kept["held_out_loss"]

    config = demo_config(sizes.name, seed)
    if not variant.replay:
        config.sft = replace(config.sft, replay_rows=0)
    town = Town(world, world.tokenizer, device, MAX_NEW_TOKENS)
    sft = introduce_chat_tokens(model, world) if variant.chat_tokens else copy.deepcopy(model)
    sft_stage(town, sft, config, shares=shares)
    return {"held-out loss": held_out_loss} | following(town, frozen_copy(sft), seed)


def following(town: Town, model, seed: int, n: int = 100) -> dict[str, float]:
    """Greedy following on `n` held-out instructions of each kind, and sampled following over all of them."""
    rows, sampled = {}, []
    for kind in ("fact", "tips", "names", "words", "harmful", "lookalike"):
        prompts = [
            chat_prompt(task.instruction)
            for task in town.world.sample_tasks(n, seed + 90, held_out=True, shares={kind: 1.0})
        ]
        greedy = town.answers(model, prompts, 0.0)
        rows[kind] = sum(map(town.world.follows, prompts, greedy)) / n
        sampled += map(town.world.follows, prompts, town.answers(model, prompts, 1.0, seed=seed))
    return {"all": sum(rows.values()) / len(rows), "all, sampled": sum(sampled) / len(sampled)} | rows


def ablate(profile_name: str, seeds: list[int], steps: int | None, work: Path, results: Path) -> str:
    """Runs all variants and writes `results`.json and .md; returns the table."""
    sizes = profile(profile_name)
    steps = steps or sizes.pretraining.steps // 4
    decay = round(sizes.pretraining.decay * steps / sizes.pretraining.steps)
    sizes.pretraining = replace(sizes.pretraining, steps=steps, decay=decay)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict]] = {name: {} for name in VARIANTS}
    for seed in seeds:
        for name, variant in tqdm(VARIANTS.items(), desc=f"ablations, seed {seed}"):
            settings = (
                asdict(variant),
                sizes.key,
                asdict(sizes.pretraining),
                asdict(demo_config(sizes.name, seed).sft),
            )
            path = work / f"result-{settings_digest(*settings, PRETRAINING_SHARES)}.pt"
            kept = load_progress(path)
            if kept is None:
                kept = {"row": run_variant(variant, sizes, seed, work)}
                save_progress(path, **kept)
            found[name][seed] = kept["row"]
            table = write(results, found, sizes, steps)
    return table


def write(results: Path, found: dict[str, dict[int, dict]], sizes: Profile, steps: int) -> str:
    """The table so far, mean ± standard error over seeds; also as files beside `results`."""
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    record = {"date": date.today().isoformat(), "machine": machine, "world": sizes.key, "steps": steps, "runs": found}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    columns = list(next(iter(found["the recipe"].values())))
    lines = [
        "# What each ingredient of the base model is worth",
        "",
        f"{record['date']}, {machine}; world {sizes.key}; {steps} pre-training steps, seeds "
        f"{', '.join(map(str, seeds))}. Made by `python3 course.py world ablate`. Following of held-out instructions, "
        "greedy but for the column that says sampled, 100 of each kind; mean ± standard error over seeds.",
        "",
    ]
    rows = {
        name: [over_seeds([row[column] for row in by_seed.values()], "{:.2f}") for column in columns]
        for name, by_seed in found.items()
        if by_seed
    }
    lines += markdown(columns, rows)
    text = "\n".join(lines) + "\n"
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    return text
