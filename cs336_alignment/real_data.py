"""The three stages on a file of your own: `python3 course.py train sft|reward|dpo --data FILE`.

The same losses and loops as on the embedded world, fed by the loaders of `data`. Without a model of yours a
BPE tokenizer is trained on the text and a small Llama on the file alone, from nothing: enough to see the loss
fall and preferences being learned in minutes on a CPU, not enough to chat with.

    sft      demonstrations -> held-out loss, answers before and after
    reward   preferences    -> held-out pair accuracy, beside a baseline that sees lengths only
    dpo      preferences    -> SFT on the chosen responses first, as the paper does, then the same for DPO

A run has a folder of its own, named after its settings: run again with the same ones and a killed run goes
on, while a finished one is only shown.
"""

import hashlib
import json
import random
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cs336_alignment.bpe import train_bpe
from cs336_alignment.data import (
    DataError,
    Problem,
    chat_format,
    load_demonstrations,
    load_preferences,
    split_by_prompt,
)
from cs336_alignment.distributed import is_first, shard, whole_state
from cs336_alignment.dpo import DPOConfig, implicit_reward, reference_log_probs, train_dpo
from cs336_alignment.generate import generate_text
from cs336_alignment.models import (
    Llama,
    ModelConfig,
    RewardModel,
    load_model,
    resolve_device,
    save_model,
)
from cs336_alignment.optimize import scaled_learning_rate
from cs336_alignment.reward import RewardConfig, score, train_reward_model
from cs336_alignment.sft import SFTConfig, train_sft
from cs336_alignment.tokens import tokenize_prompt_and_output


@dataclass(frozen=True)
class RealConfig:
    """Settings that suit a thousand records and two CPU cores; benchmarks/results has what they give."""

    vocab_size: int = 2048  # of the BPE tokenizer, at most
    hidden_size: int = 128
    layers: int = 2
    max_length: int = 256  # tokens of prompt and response together; longer records are cut
    held_out: float = 0.2  # share of the prompts that nothing is trained on
    max_held_out: int = 1000  # records; more would only cost time
    max_epochs: int = 12  # a small file gets fewer steps than the stage's own number, this many passes at most
    samples: int = 3  # held-out prompts answered before and after
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(steps=400, batch_size=16, learning_rate=2e-3))
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(
            steps=100, batch_size=32, learning_rate=5e-4, weight_decay=0.1, center_coef=0.01
        )
    )
    # The NLL term halves what the chosen responses lose in log-probability beside the rejected ones.
    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(steps=75, batch_size=32, learning_rate=1e-4, beta=0.3, nll_coef=1.0)
    )


# What `_Run.config` sets by itself, whatever the settings say: no reason to call two runs different.
FITTED = ("warmup", "decay", "eval_every", "save_every", "seed")


def train_on_file(
    stage: Literal["sft", "reward", "dpo"],
    data: str,
    format: str = "auto",
    model: str | None = None,
    out: str = "runs/real",
    seed: int = 0,
    device: str = "auto",
    steps: int | None = None,
    *,
    sharded: bool = False,
    bad: Literal["raise", "skip"] = "raise",
    settings: RealConfig | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one stage on a local file or hub id, measure it on held-out prompts, show and save the results.

    Args:
        format: of the data, see `data.load_demonstrations` and `data.load_preferences`.
        model: a folder or hub id to start from instead of a small Llama from scratch. Learning rates then
            shrink as (128 / hidden size)^2, a rule of thumb that suits fine-tuning of larger models.
        out: the run gets the folder out/STAGE-FILE-HASH, with model/, metrics.json and plot.png.
        steps: of the stage itself; DPO's SFT before it keeps its own number.
        sharded: with several processes (see `distributed`), each holds a part of every parameter only.
        bad: what to do with bad records, as in `data`. Pairs of equal texts are left out in any case.

    Returns what is in metrics.json: counts, `before` and `after` (or `accuracy`) with standard errors,
    `baselines`, samples, the log and the folder.

    Raises:
        DataError: the file cannot be used, or is too small to hold anything out.
        ValueError: an unknown stage, model or device.
    """
    if stage not in ("sft", "reward", "dpo"):
        raise ValueError(f"stage is sft, reward or dpo, not {stage!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: train for at least one")
    progress = progress and is_first()
    settings, console = settings or RealConfig(), Console(quiet=not progress)
    where = resolve_device(device)
    started = time.time()

    train, held_out, counts = _load(stage, data, format, bad, seed, steps, settings, console)
    given = {
        name: {key: value[key] for key in value if key not in FITTED} if isinstance(value, dict) else value
        for name, value in asdict(settings).items()
    }
    facts = [stage, train, held_out, str(model), seed, steps, given]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w-]+", "_", re.sub(r"\.(jsonl?|ndjson|csv|parquet|gz)", "", Path(data).name))
    folder = Path(out) / f"{stage}-{stem}-{digest}"
    if (folder / "metrics.json").exists():
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        console.print(f"{folder} holds this run already; delete the folder to train again.", soft_wrap=True)
        _show(metrics, console)
        return metrics

    if model is None:
        texts = [text for record in train for text in record.values() if isinstance(text, str)]
        tokenizer = train_bpe(texts, settings.vocab_size)
        torch.manual_seed(seed)
        shape = ModelConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            max_position_embeddings=2 * settings.max_length,
        )
        policy: nn.Module = Llama(shape).to(where)
    else:
        policy, tokenizer = load_model(model, where)
    # A quarter of the model's positions stays free for an answer to the longest prompt.
    longest = min(settings.max_length, 3 * (policy.max_positions or 4 * settings.max_length) // 4)
    train, cut_train = _format(train, tokenizer, longest)
    held_out, cut_held_out = _format(held_out, tokenizer, longest)
    if not train or not held_out:
        raise DataError(data, [Problem(f"at {longest} tokens no two responses to a prompt differ")])
    counts |= {"train": len(train), "held_out": len(held_out), "cut": cut_train["cut"] + cut_held_out["cut"]}
    counts["equal_once_cut"] = cut_train["equal"] + cut_held_out["equal"]
    console.print(
        f"{data}: {counts['train']:,} records to train on, {counts['held_out']:,} held out, "
        f"{counts['cut']:,} cut to {longest} tokens"
        + (f", {counts['equal_once_cut']:,} pairs equal once cut" if counts["equal_once_cut"] else ""),
        soft_wrap=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(folder, train, held_out, tokenizer, seed, steps, settings, progress)
    policy = shard(policy) if sharded else policy
    measured = {"sft": _sft, "reward": _reward, "dpo": _dpo}[stage](run, policy)
    metrics = {
        "stage": stage,
        "data": Path(data).name,
        "seed": seed,
        "counts": counts,
        **measured,
        "seconds": round(time.time() - started, 1),
        "folder": str(folder),
    }
    if not is_first():
        return metrics
    _plot(metrics, folder / "plot.png")
    # metrics.json is written last and whole: its presence says that the run is finished
    part = folder / "metrics.json.part"
    part.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "metrics.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    _show(metrics, console)
    return metrics


# ---------------------------------------------------------------------------------------------------------
# Records


def _load(
    stage: str,
    data: str,
    format: str,
    bad: str,
    seed: int,
    steps: int | None,
    settings: RealConfig,
    console: Console,
) -> tuple[list[dict], list[dict], dict[str, int]]:
    """(train, held-out, counts); a file too large for the steps is sampled."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if stage == "sft":
            records = load_demonstrations(data, format, bad=bad)
        else:
            records = load_preferences(data, format, bad=bad, ties="drop")
    for warning in caught:
        console.print(str(warning.message), markup=False, soft_wrap=True)
    train, held_out = split_by_prompt(records, settings.held_out, seed)
    if len(train) < 2 or len(held_out) < 2:
        text = f"{len(records)} usable records leave {len(train)} to train on and {len(held_out)} held out; "
        raise DataError(data, [Problem(f"{text}both need two at least: add records with other prompts")])
    counts = {"records": len(records)}
    # What no step would ever see need not be tokenized.
    configs = [settings.reward] if stage == "reward" else [settings.sft, settings.dpo][: 1 + (stage == "dpo")]
    useful = max(max(config.steps, steps or 0) * config.batch_size for config in configs)
    rng = random.Random(seed)
    if len(train) > useful:
        train = rng.sample(train, useful)
    if len(held_out) > settings.max_held_out:
        held_out = rng.sample(held_out, settings.max_held_out)
    return train, held_out, counts


def _format(records: list[dict], tokenizer, longest: int) -> tuple[list[dict], dict[str, int]]:
    """Records as the loops take them: prompts in their chat template, responses with EOS, none too long.

    Of a record that is too long first the prompt is cut, down to half of the room, then the response; a cut
    response gets no EOS, for it does not end there. Pairs that differ only behind the cut are left out.
    """
    frame = _length(chat_format("x", tokenizer), tokenizer)  # what the template itself takes
    formatted, cut, equal = [], 0, 0
    for record in records:
        names = [name for name in ("response", "chosen", "rejected") if name in record]
        new = record | {name: record[name] + tokenizer.eos_token for name in names}
        needed = max(_length(new[name], tokenizer) for name in names)
        room = max(longest - frame - min(needed, longest // 2), 1)
        prompt = _cut(record["prompt"], room, tokenizer)
        new |= {"prompt": chat_format(prompt, tokenizer), "question": prompt}
        room = max(longest - _length(new["prompt"], tokenizer), 1)
        for name in names:
            if _length(new[name], tokenizer) > room:
                new[name] = _cut(record[name], room, tokenizer)
        cut += prompt != record["prompt"] or any(not new[n].endswith(tokenizer.eos_token) for n in names)
        if "chosen" in new and new["chosen"] == new["rejected"]:
            equal += 1
        else:
            formatted.append(new)
    return formatted, {"cut": cut, "equal": equal}


def _length(text: str, tokenizer) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _cut(text: str, room: int, tokenizer) -> str:
    """The longest beginning of `text` that fits `room` tokens, one character at least."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= room:
        return text
    # Decoding may end in half a character, and cutting inside a word may give other tokens: so look again.
    text = text[: len(tokenizer.decode(ids[:room]))]
    while len(text) > 1 and _length(text, tokenizer) > room:
        text = text[:-1]
    return text


# ---------------------------------------------------------------------------------------------------------
# Stages


@dataclass
class _Run:
    folder: Path
    train: list[dict]
    held_out: list[dict]
    tokenizer: Any
    seed: int
    steps: int | None
    settings: RealConfig
    progress: bool

    def config(self, config: Any, steps: int | None, policy: nn.Module) -> Any:
        """A stage's configuration fitted to the size of the file and of the model."""
        if steps is None:
            epoch = max(len(self.train) // config.batch_size, 1)
            steps = min(config.steps, self.settings.max_epochs * epoch)
        rate = scaled_learning_rate(config.learning_rate, policy.hidden_size)
        return replace(
            config,
            steps=steps,
            learning_rate=rate,
            warmup=min(20, max(steps // 10, 1)),
            decay=max(steps // 2, 1),
            eval_every=max(steps // 10, 5),
            save_every=max(steps // 10, 1),
            seed=self.seed,
        )

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.pt"

    def answers(self, policy: nn.Module) -> list[str]:
        """Greedy answers to the first held-out prompts."""
        prompts = [record["prompt"] for record in self.held_out[: self.settings.samples]]
        room = min(48, (policy.max_positions or 192) // 4)
        return generate_text(policy, self.tokenizer, prompts, max_new_tokens=room, temperature=0)


def ratio_and_error(above: Tensor, below: Tensor, groups: list[str]) -> tuple[float, float]:
    """sum(above) / sum(below) and its standard error, (N,), (N,), by linearisation over independent groups.

    Records with one prompt go up and down together, so a group counts as one draw. With below = 1 and every
    record its own group this is a mean and the usual error of it. One group alone: the error is infinite.
    """
    ratio = (above.sum() / below.sum()).item()
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([number[group] for group in groups])
    residuals = torch.zeros(len(number), dtype=torch.float64)
    residuals = residuals.index_add(0, index, above.double() - ratio * below.double())
    if len(number) < 2:
        return ratio, float("inf")
    spread = (residuals**2).sum() * len(number) / (len(number) - 1)
    return ratio, (spread.sqrt() / below.sum()).item()


def _loss(policy: nn.Module, tokenizer, records: list[dict]) -> dict[str, float]:
    """Negative log-probability of a response token in nats, over all tokens of the records."""
    prompts = [record["prompt"] for record in records]
    batch = tokenize_prompt_and_output(prompts, [record["response"] for record in records], tokenizer)
    log_probs = reference_log_probs(policy, batch)
    loss, error = ratio_and_error(-log_probs, batch["response_mask"].sum(1), prompts)
    return {"loss": loss, "error": error}


def _accuracy(chosen: Tensor, rejected: Tensor, prompts: list[str]) -> dict[str, Any]:
    """Share of pairs in which the chosen response has the higher score, a tie counting half.

    To beat chance is to be more than two standard errors above 1/2, where the error is taken to be no smaller
    than a coin's: of three pairs ranked right the own estimate would be 0.
    """
    wins = (chosen > rejected).double() + (chosen == rejected).double() / 2
    accuracy, error = ratio_and_error(wins, torch.ones_like(wins), prompts)
    coin = 0.5 / len(set(prompts)) ** 0.5
    return {"accuracy": accuracy, "error": error, "beats_chance": accuracy - 2 * max(error, coin) > 0.5}


def _length_baseline(train: list[dict], held_out: list[dict], tokenizer) -> dict[str, Any]:
    """What the lengths alone give away: prefer the longer response, or the shorter if train says so."""

    def lengths(records: list[dict], side: str) -> Tensor:
        return torch.tensor([_length(record[side], tokenizer) for record in records])

    prompts = [record["prompt"] for record in train]
    longer = _accuracy(lengths(train, "chosen"), lengths(train, "rejected"), prompts)["accuracy"]
    sign = 1 if longer >= 0.5 else -1
    prompts = [record["prompt"] for record in held_out]
    found = _accuracy(sign * lengths(held_out, "chosen"), sign * lengths(held_out, "rejected"), prompts)
    return {"name": f"prefer the {'longer' if sign > 0 else 'shorter'} response", **found}


def _sft(run: _Run, policy: nn.Module) -> dict[str, Any]:
    some = run.train[: len(run.held_out)]
    measure = {"train": some, "held_out": run.held_out}
    before = {name: _loss(policy, run.tokenizer, records) for name, records in measure.items()}
    answers_before = run.answers(policy)
    config = run.config(run.settings.sft, run.steps, policy)
    log = train_sft(
        policy,
        run.tokenizer,
        run.train,
        config,
        held_out=run.held_out,
        checkpoint=run.checkpoint("sft"),
        progress=run.progress,
    )
    after = {name: _loss(policy, run.tokenizer, records) for name, records in measure.items()}
    save_model(policy, run.tokenizer, run.folder / "model")
    samples = [
        {"question": record["question"], "reference": record["response"], "before": old, "after": new}
        for record, old, new in zip(run.held_out, answers_before, run.answers(policy), strict=False)
    ]
    return {"config": asdict(config), "before": before, "after": after, "samples": samples, "log": log}


def _reward(run: _Run, policy: nn.Module) -> dict[str, Any]:
    model = RewardModel(policy)
    config = run.config(run.settings.reward, run.steps, policy)
    log = train_reward_model(
        model,
        run.tokenizer,
        run.train,
        config,
        held_out=run.held_out,
        checkpoint=run.checkpoint("reward"),
        progress=run.progress,
    )
    prompts = [pair["prompt"] for pair in run.held_out]
    chosen, rejected = (
        score(model, run.tokenizer, prompts, [pair[side] for pair in run.held_out]) for side in ("chosen", "rejected")
    )
    save_model(policy, run.tokenizer, run.folder / "model")
    head = whole_state(model.head)
    if is_first():
        torch.save(head, run.folder / "model" / "reward_head.pt")
    return {
        "config": asdict(config),
        "held_out_pairs": _accuracy(chosen, rejected, prompts),
        "baselines": [_length_baseline(run.train, run.held_out, run.tokenizer)],
        "samples": _scored(run, chosen, rejected),
        "log": log,
    }


def load_reward_model(folder: str | Path, device: str = "auto") -> tuple[RewardModel, Any]:
    """The reward model (and its tokenizer) that `train reward` saved in the `model` folder of its run."""
    backbone, tokenizer = load_model(folder, device)
    model = RewardModel(backbone)
    model.head.load_state_dict(torch.load(Path(folder) / "reward_head.pt", weights_only=True))
    return model.eval(), tokenizer


def _dpo(run: _Run, policy: nn.Module) -> dict[str, Any]:
    def chosen_only(pairs: list[dict]) -> list[dict]:
        return [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]

    # The reference should be likely to say what the pairs hold, so it learns the chosen responses first
    # (Rafailov et al. 2023, section 4).
    sft_config = run.config(run.settings.sft, None, policy)
    sft_log = train_sft(
        policy,
        run.tokenizer,
        chosen_only(run.train),
        sft_config,
        held_out=chosen_only(run.held_out),
        checkpoint=run.checkpoint("sft"),
        progress=run.progress,
    )
    answers_before = run.answers(policy)
    prompts = [pair["prompt"] for pair in run.held_out]
    responses = [pair[side] for side in ("chosen", "rejected") for pair in run.held_out]
    batch = tokenize_prompt_and_output(prompts + prompts, responses, run.tokenizer)
    ref_log_probs = reference_log_probs(policy, batch)
    config = run.config(run.settings.dpo, run.steps, policy)

    def implicit_rewards(policy: nn.Module) -> tuple[Tensor, ...]:
        return implicit_reward(reference_log_probs(policy, batch), ref_log_probs, config.beta).chunk(2)

    def evaluate(policy: nn.Module) -> dict[str, float]:
        chosen, rejected = implicit_rewards(policy)
        return {
            "held_out_accuracy": _accuracy(chosen, rejected, prompts)["accuracy"],
            "held_out_chosen_log_ratio": chosen.mean().item() / config.beta,
            "held_out_rejected_log_ratio": rejected.mean().item() / config.beta,
        }

    log = train_dpo(
        policy,
        run.tokenizer,
        run.train,
        config,
        evaluate_fn=evaluate,
        checkpoint=run.checkpoint("dpo"),
        progress=run.progress,
    )
    chosen, rejected = implicit_rewards(policy)
    save_model(policy, run.tokenizer, run.folder / "model")
    samples = [
        {"question": record["question"], "reference": record["chosen"], "before": old, "after": new}
        for record, old, new in zip(run.held_out, answers_before, run.answers(policy), strict=False)
    ]
    by_sft = _accuracy(*ref_log_probs.chunk(2), prompts)
    return {
        "config": asdict(config),
        "sft_config": asdict(sft_config),
        "held_out_pairs": _accuracy(chosen, rejected, prompts),
        "baselines": [
            {"name": "log-probability of the SFT model", **by_sft},
            _length_baseline(run.train, run.held_out, run.tokenizer),
        ],
        "samples": samples,
        "scored": _scored(run, chosen, rejected),
        "log": log,
        "sft_log": sft_log,
    }


def _scored(run: _Run, chosen: Tensor, rejected: Tensor) -> list[dict[str, Any]]:
    """The held-out pair ranked right with the widest margin, and the one ranked wrong with the widest."""
    margins = chosen - rejected
    picked = dict.fromkeys([int(margins.argmax()), int(margins.argmin())])
    return [{**run.held_out[i], "chosen_score": chosen[i].item(), "rejected_score": rejected[i].item()} for i in picked]


# ---------------------------------------------------------------------------------------------------------
# Showing


def _show(metrics: dict[str, Any], console: Console) -> None:
    for sample in metrics["samples"]:
        console.print(f"\n[bold]{_plain(sample['question'])}[/bold]", soft_wrap=True)
        for name in ("reference", "before", "after"):
            if name in sample:
                console.print(f"  [dim]{name:>9}[/dim]  {_plain(sample[name])}", soft_wrap=True)
        for name in ("chosen", "rejected"):
            if name in sample:
                value = f"{sample[name + '_score']:+.2f}"
                console.print(f"  [dim]{name:>9}[/dim]  {value}  {_plain(sample[name])}", soft_wrap=True)
    counts, folder = metrics["counts"], metrics["folder"]
    title = f"{metrics['stage']} on {metrics['data']}, seed {metrics['seed']}"
    if metrics["stage"] == "sft":
        table = Table("nats a response token", "before", "after", title=title)
        trained = f"{min(counts['train'], counts['held_out']):,} of {counts['train']:,}"
        for name, records in ("train", trained), ("held_out", f"{counts['held_out']:,}"):
            cells = [f"{m[name]['loss']:.2f} ± {m[name]['error']:.2f}" for m in (metrics["before"], metrics["after"])]
            table.add_row(f"{name.replace('_', '-')} ({records} records)", *cells)
    else:
        table = Table(f"{counts['held_out']:,} held-out pairs", "ranked as labelled", "over chance", title=title)
        name = "reward model" if metrics["stage"] == "reward" else "implicit reward of DPO"
        for row in [{"name": name, **metrics["held_out_pairs"]}, *metrics["baselines"]]:
            over = f"{(row['accuracy'] - 0.5) / row['error']:+.1f} s.e." if row["error"] else "-"
            table.add_row(row["name"], f"{row['accuracy']:.3f} ± {row['error']:.3f}", over)
    console.print()
    console.print(table)
    console.print(f"± is one standard error. Model, metrics.json and plot.png are in {folder}", soft_wrap=True)


def _plain(text: str) -> str:
    """One line of text with rich's markup taken literally."""
    text = " ".join(text.split())
    return (text if len(text) <= 160 else text[:157] + "...").replace("[", r"\[")


def _plot(metrics: dict[str, Any], path: Path) -> None:
    """The training curve with the held-out measure on it, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: that would choose a window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    log = metrics["log"]
    if metrics["stage"] == "sft":
        name, train = "loss", _smooth([line["loss"] for line in log])
        axes.set_ylabel("nats a response token")
    else:
        name, train = "accuracy", _smooth([line["accuracy"] for line in log])
        axes.set_ylabel("pairs ranked as labelled")
        axes.axhline(0.5, color="grey", lw=1, ls=":", label="chance")
        for i, row in enumerate(metrics["baselines"]):
            axes.axhline(row["accuracy"], color=f"C{i + 2}", lw=1, ls="--", label=row["name"])
    axes.plot([line["step"] for line in log], train, color="C0", lw=1, label=f"{name} on batches (smoothed)")
    points = [(line["step"], line[f"held_out_{name}"]) for line in log if f"held_out_{name}" in line]
    if name == "accuracy":  # the first batch is all ties, which need not be seen
        axes.set_ylim(min(0.4, *(accuracy for _, accuracy in points)) - 0.02, 1.02)
    axes.plot(*zip(*points, strict=True), "o-", color="C1", ms=4, label=f"held-out {name}")
    axes.set_xlabel("step")
    axes.set_title(f"{metrics['stage']} on {metrics['data']}, seed {metrics['seed']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the start's bias (Kingma & Ba 2015, section 3)."""
    smooth, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**i))
    return smooth
