"""The results as Markdown: one table of the trainers, one of ragged lengths and sampling, what was compared and how."""

from statistics import median

BARS = {"sft": 1.2, "rm": 1.15, "dpo": 1.45, "ppo": 1.2, "ragged": 2.0, "sampler32": 1.2, "sampler1": 1.6}
NAMES = {
    "sft": "SFT",
    "rm": "Reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "ragged": "SFT, ragged lengths",
    "sampler32": "Sampling, batch 32",
    "sampler1": "Sampling, batch 1",
}
ROWS = {  # (side, variant) -> what the table calls it
    ("trl", "tuned"): "TRL, tuned",
    ("trl112", "tuned"): "TRL 1.12, tuned",
    ("trl", "precomputed"): "TRL, tuned, reference computed beforehand",
    ("trl", "defaults"): "TRL at its defaults (bfloat16 autocast, gradient checkpointing)",
    ("trl112", "defaults"): "TRL 1.12 at its defaults (its PPO takes no notice of bf16 and gradient checkpointing)",
    ("trl", "packed"): "TRL, tuned, packing, row by row",
    ("plain_hf", "plain"): "plain loop, transformers' model",
    ("plain_hf", "scores"): "transformers' `generate` with the logits kept",
    ("ours", "plain"): "ours, as the lectures read it",
    ("ours", "unshared"): "ours, fast, prompt not shared",
    ("ours", "fast"): "**ours, fast**",
    ("floor", "fast"): "(the matrix products of ours, fast, alone)",
}
SPECIAL = {
    ("ragged", "trl", "tuned"): "TRL, tuned, its default batching",
    ("sampler32", "plain_hf", "plain"): "transformers' `generate`",
    ("sampler1", "plain_hf", "plain"): "transformers' `generate`",
    ("dpo", "ours", "fast"): "**ours, fast, prompt shared**",
    ("rm", "ours", "fast"): "**ours, fast, prompt shared**",
}
ORDER = list(ROWS)


def spread(values: list[float], digits: int = 0) -> str:
    """Median (least to most)."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def runs_of(task: dict) -> dict[tuple[str, str], list[dict]]:
    """(side, variant) -> its runs, in the table's order."""
    found = {}
    for number, done in enumerate(task["rounds"]):
        for run in done:
            found.setdefault((run["side"], run["variant"]), []).append(run | {"round": number})
    return {key: found[key] for key in ORDER if key in found}


def opponent(name: str, runs: dict) -> tuple[str, str] | None:
    """What a task is set against: TRL tuned, or for sampling transformers' `generate`; None if that did not run."""
    wanted = (("plain_hf", "plain"),) if name.startswith("sampler") else (("trl", "tuned"), ("trl112", "tuned"))
    return next((key for key in wanted if key in runs), None)


def ratios(name: str, task: dict, key: tuple[str, str], runs: dict) -> list[float]:
    """How many times as fast as the opponent (CPU time; wall time on a GPU), pair by pair; empty without one.

    Pairs are neighbours in A B, B A; a variant that ran once a round is set against the mean of that round's two runs
    of the opponent.
    """
    against = opponent(name, runs)
    if against is None or key == against:
        return []
    found = []
    for number in range(len(task["rounds"])):
        theirs = [run["ms"] for run in runs[against] if run["round"] == number]
        mine = [run["ms"] for run in runs[key] if run["round"] == number]
        if len(mine) == len(theirs):
            found += [a / b for a, b in zip(theirs, mine)]
        elif mine:
            found.append(sum(theirs) / len(theirs) / mine[0])
    return found


def task_rows(name: str, task: dict) -> list[str]:
    lines, runs = [], runs_of(task)
    for key, found in runs.items():
        label = SPECIAL.get((name, *key), ROWS[key])
        ratio = ratios(name, task, key, runs)
        cells = [
            NAMES[name],
            label,
            spread([r["cpu_ms"] for r in found]),
            spread([r["wall_ms"] for r in found]),
            spread(ratio, 2) if ratio and name != "ragged" else "",
            f"{median(r['peak_mb'] for r in found):,.0f}",
            f"{median(r['training_mb'] for r in found):,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tokens_a_second(run: dict) -> float:
    """By CPU time, or by the wall with a GPU."""
    return run["tokens_per_cpu_s"] if "tokens_per_cpu_s" in run else run["tokens_per_wall_s"]


def ragged_rows(task: dict, time: str) -> list[str]:
    runs = runs_of(task)
    rate = {key: [tokens_a_second(r) for r in found] for key, found in runs.items()}
    base = rate.get(("trl", "tuned"))
    lines = [
        f"| ragged lengths | real tokens a second of {time} time | times TRL's default batching | peak MB |",
        "|---|---|---|---|",
    ]
    for key, values in rate.items():
        label = SPECIAL.get(("ragged", *key), ROWS[key])
        times = f"{median(values) / median(base):.2f}" if base and key != ("trl", "tuned") else ""
        memory = f"{median(r['peak_mb'] for r in runs[key]):,.0f}"
        lines.append(f"| {label} | {spread(values)} | {times} | {memory} |")
    return lines


def floor_share(task: dict) -> list[float]:
    """Of each run of ours fast, the part of its CPU time that its matrix products alone would take."""
    runs = runs_of(task)
    floors = runs.get(("floor", "fast"), [])
    by_round = {run["round"]: run["ms"] for run in floors}
    return [by_round[r["round"]] / r["ms"] for r in runs[("ours", "fast")] if r["round"] in by_round]


def verdicts(tasks: dict, time: str) -> list[str]:
    """Bar by bar: met or missed, with the figure. Where TRL did not run, nothing is set against it."""
    lines = ["| bar | wanted | measured | |", "|---|---|---|---|"]

    def line(what: str, wanted: float, found: float, text: str = "") -> None:
        lines.append(
            f"| {what} | {wanted:g} | {text or f'{found:.2f}'} | {'met' if found >= wanted else '**missed**'} |"
        )

    for name in ("sft", "rm", "dpo", "ppo"):
        if "rounds" not in tasks.get(name, {}):
            continue
        runs = runs_of(tasks[name])
        found = ratios(name, tasks[name], ("ours", "fast"), runs)
        if found:
            line(f"{NAMES[name]}: {time} time, TRL tuned / ours fast", BARS[name], median(found))
        if name == "dpo" and ("ours", "unshared") in runs and found:
            unshared = median(ratios(name, tasks[name], ("ours", "unshared"), runs))
            line("DPO, prompt not shared", 1.25, unshared)
        if found:
            theirs = opponent(name, runs)
            memory = [median(r["peak_mb"] for r in runs[k]) for k in (theirs, ("ours", "fast"))]
            line(f"{NAMES[name]}: peak memory, TRL's / ours", 1.0, memory[0] / memory[1])
            memory = [median(r["training_mb"] for r in runs[k]) for k in (theirs, ("ours", "fast"))]
            line(f"{NAMES[name]}: memory of training alone, TRL's / ours", 1.0, memory[0] / memory[1])
        if share := floor_share(tasks[name]):
            line(f"{NAMES[name]}: share of the matmul floor", 0.7, median(share))
    if "rounds" in tasks.get("ragged", {}):
        rate = {k: median(map(tokens_a_second, v)) for k, v in runs_of(tasks["ragged"]).items()}
        if ("trl", "tuned") in rate:
            line(
                "ragged: tokens a second, ours / TRL's default batching",
                2.0,
                rate["ours", "fast"] / rate["trl", "tuned"],
            )
        if ("trl", "packed") in rate:
            times = rate["ours", "fast"] / rate["trl", "packed"]
            lines.append(f"| ragged: tokens a second, ours / TRL's packing | reported | {times:.2f} | |")
    for name in ("sampler32", "sampler1"):
        if "rounds" in tasks.get(name, {}):
            found = ratios(name, tasks[name], ("ours", "fast"), runs_of(tasks[name]))
            line(f"{NAMES[name]}: {time} time, `generate` / ours", BARS[name], median(found))
    return lines


def gates(tasks: dict) -> list[str]:
    lines = [
        "| parity gate | largest difference of a loss | difference of the movements, relative "
        "| largest difference of a parameter | |",
        "|---|---|---|---|---|",
    ]
    for name, task in tasks.items():
        for variant, gate in task.get("gate", {}).items():
            lines.append(
                f"| {NAMES[name]}, ours {variant} | {gate['largest_loss_difference']:.1e} "
                f"| {gate['movement_difference']:.1e} | {gate['largest_parameter_difference']:.1e} "
                f"| {'passed' if gate['passed'] else '**failed**: not timed'} |"
            )
    return lines


def whole_update(found: dict) -> str:
    """A sentence on benchmarks/ppo_update.py's comparison."""
    kinds = ", ".join(
        f"{case['kl_estimator']} with {'whitened' if case['whiten_rewards'] else 'plain'} rewards "
        f"{max(case['largest_differences'].values()):.1e}"
        for case in found["cases"]
    )
    case, against = found["cases"][0], found["against"]["trl"]
    return (
        f"A whole PPO update by `train_ppo` ({case['responses']} ragged responses, {case['unfinished']} without EOS, "
        f"{case['optimizer_steps']} optimizer steps in four epochs, float64) beside TRL {against}, whose side is kept "
        f"with the tests: losses and weights differ by {found['largest_difference']:.1e} at most ({kinds})."
    )


def parameters(setting: dict) -> int:
    """Of the model, the embedding counted once."""
    d, wide = setting["hidden_size"], setting["intermediate_size"]
    layer = 4 * d * d + 3 * d * wide + 2 * d
    return setting["vocab_size"] * d + setting["num_hidden_layers"] * layer + d


def markdown(results: dict) -> str:
    tasks, machine, setting = results["tasks"], results["machine"], results["setting"]
    on_cpu = setting["device"] == "cpu"
    time, precision = ("CPU", "One thread, float32") if on_cpu else ("wall", "One GPU, bfloat16 autocast")
    timed = {name: task for name, task in tasks.items() if "rounds" in task}
    runs = [run for task in timed.values() for done in task["rounds"] for run in done]
    versions = {name: value for run in runs for name, value in run["versions"].items() if name != "trl"}
    dates = sorted({task["date"] for task in timed.values()})
    imports = {}
    for run in runs:
        imports.setdefault(run["side"], []).append(run["import"]["cpu_s"])
    busy_tasks = [n for n, t in timed.items() if max(t["load"]) > machine["cores"]]
    loads = ", ".join(f"{NAMES[n]} {t['load'][0]:.1f} and {t['load'][1]:.1f}" for n, t in timed.items())
    busy = (
        f"\n**The machine was busy with other work during {' and '.join(NAMES[n] for n in busy_tasks)}: wall times "
        "there are too long, CPU times some 10 to 20 %; the ratios were taken in pairs for that reason.**\n"
        if busy_tasks
        else ""
    )
    head = f"| | | CPU ms a step | wall ms a step | times as fast ({time}) | peak MB | of it training MB |"
    parts = [
        "# Side by side with TRL",
        f"{dates[0] if dates else ''}; made by `python3 course.py bench`. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}; " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + "; TRL 1.16.0 for SFT, "
        f"reward model and DPO, 1.12.0 for PPO. {precision}, a Llama of "
        f"{setting['num_hidden_layers']} layers, width {setting['hidden_size']}, {setting['vocab_size']} tokens "
        f"({parameters(setting) / 1e6:.1f} M parameters), {setting['prompt_tokens']} + {setting['response_tokens']} "
        f"tokens, batch {setting['batch_size']}. Median (least to most) over processes. Code measured: "
        + ", ".join(f"{NAMES[name]} {task.get('code', 'not noted')}" for name, task in timed.items())
        + f". The machine's load when a task began and ended, of which the measurement is 1: {loads}."
        + busy,
        "\n".join([head, "|---" * 7 + "|"] + [r for n, t in timed.items() if n != "ragged" for r in task_rows(n, t)]),
    ]
    if "ragged" in timed:
        parts.append(
            f"Lengths are log-normal (median {setting['ragged_median']}, sigma {setting['ragged_sigma']}, cap "
            f"{setting['ragged_cap']}), batch {setting['batch_size']}:\n\n"
            + "\n".join(ragged_rows(timed["ragged"], time))
        )
    parts += ["\n".join(verdicts(tasks, time)), "\n".join(gates(tasks))]
    if "ppo_update" in results:
        parts.append(whole_update(results["ppo_update"]))
    parts.append(
        "Import, CPU seconds (median): "
        + ", ".join(
            f"{side.replace('_', ' ')} {median(values):.1f}" for side, values in imports.items() if side != "floor"
        )
        + "."
    )
    parts.append(
        "How to read it. *TRL tuned* is "
        + ("float32 without autocast, " if on_cpu else "bfloat16 autocast as ours, without ")
        + "gradient checkpointing, logging and checkpoints, "
        "with the fused optimizer. At its defaults TRL 1.16 computes in bfloat16, for which some processors have "
        "instructions: less exact, not the same work. The PPO of TRL 1.12 makes an Accelerator of its own, which does "
        "not read these settings: at its defaults it is float32 too, without gradient checkpointing. *As the lectures "
        "read it* is our loop with its defaults; *fast* is the same loop with tricks of `cs336_alignment.speed` as "
        "arguments, on a CPU with its `lean_norms` in every model; *prompt not shared* likewise. PPO's *fast* also "
        "samples with `decode.for_sampling` and takes the sampler's own log-probabilities (`trust_sampler`), as TRL "
        "does. The reference pass of DPO is part of "
        "a step on every line (ours and *beforehand*: its one pass, shared out over the steps of one epoch). The times "
        f"as fast are ratios of {time} time, neighbouring processes in A B, B A; lines that ran once a round are set "
        "against that round's mean. The matmul floor: every linear and output-layer product of one of our fast steps, "
        "with its shapes, forward and backward, run alone; attention's own products, inside a fused kernel, are not "
        "counted. Peak MB is "
        + ("the process with its libraries" if on_cpu else "what torch allocated on the GPU")
        + ", training MB what came on top after everything was built. *Packing, row by row*: rows of "
        f"{setting['ragged_cap']} tokens, {setting['packed_rows']} of them accumulated to a step; laid end to end, as "
        "TRL does with a batch of them, they are one long row, and without flash attention its dense scores made a "
        "step on a CPU four times as long. No gate watches sampling, PPO's value model, TRL's defaults and packing, "
        "and the plain loop. "
        "TRL 1.16 scores only response tokens with a fused output layer on a GPU; on a CPU it scores every position."
    )
    return "\n\n".join(parts) + "\n"
