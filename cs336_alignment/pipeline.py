"""The whole story in one go: base model, SFT, reward model, PPO, DPO, and the exact corner.

Each stage is a function from the stages before it to a trained model and its log. A finished stage is kept in the
output folder and never trained again by surprise; a stage that was killed continues from its checkpoint.
`python3 course.py demo` runs this file; `report.py` draws what it measured.
"""

import copy
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cs336_alignment import corner as corner_runs
from cs336_alignment.corner import CornerProblem, FitConfig, corner_ppo_config
from cs336_alignment.dpo import DPOConfig, train_dpo
from cs336_alignment.evaluate import evaluate_policy, mean_and_error, pair_accuracy, refusal_rates
from cs336_alignment.generate import generate_text
from cs336_alignment.models import (
    RewardModel,
    frozen_copy,
    load_model,
    load_progress,
    resolve_device,
    save_progress,
    settings_digest,
)
from cs336_alignment.optimize import scaled_learning_rate
from cs336_alignment.paths import course_root, demo_folder, shown
from cs336_alignment.ppo import PPOConfig, train_ppo
from cs336_alignment.reward import RewardConfig, score, train_reward_model
from cs336_alignment.sft import SFTConfig, train_sft
from cs336_alignment.tokens import pack
from cs336_alignment.world import (
    ANNOTATORS,
    GOLD_WEIGHTS,
    KIND_SHARES,
    MAX_NEW_TOKENS,
    PRETRAINING_SHARES,
    World,
    chat_prompt,
)
from cs336_alignment.world_training import fast_mode, introduce_chat_tokens, load_base, new_model, pretrain
from cs336_alignment.world_training import profile as world_profile

# Held-out instructions on which every stage is measured; disputed facts have no answer to follow.
EVALUATION_SHARES = {kind: share for kind, share in KIND_SHARES.items() if kind != "disputed"}


@dataclass
class DemoConfig:
    """What the demo trains on and with. The sizes are those of the full profile."""

    seed: int = 0
    demonstrations: int = 8000
    preferences: int = 3500  # pairs of SFT answers that the expert compares
    reward_likelihood: float | None = 1.0  # where the reward model's multiple of log pi(y|x) starts; see RewardModel
    ppo_prompts: int = 4000
    evaluation_prompts: int = 512
    curve_prompts: int = 192  # for the points of a training curve
    corner_beta: float = 0.2
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    corner_ppo: PPOConfig = field(default_factory=corner_ppo_config)
    corner_exact: FitConfig = field(default_factory=lambda: FitConfig(steps=100, decay=80))
    corner_dpo: FitConfig = field(default_factory=lambda: FitConfig(steps=110, learning_rate=5e-4, decay=90))
    corner_pairs: int = 16_000


def demo_config(profile_name: str, seed: int) -> DemoConfig:
    """The settings of a profile, with the seed set everywhere."""
    config = DemoConfig(seed=seed)
    if profile_name == "test":
        config = DemoConfig(
            seed=seed,
            demonstrations=400,
            preferences=64,
            ppo_prompts=64,
            evaluation_prompts=48,
            curve_prompts=32,
            sft=SFTConfig(steps=40, batch_size=16, replay_rows=2, decay=20, eval_every=10, save_every=10),
            reward=RewardConfig(steps=10, batch_size=16, decay=5, eval_every=5),
            ppo=PPOConfig(steps=4, batch_size=16, epochs=2, value_warmup=1, decay=2, eval_every=2, save_every=1),
            dpo=DPOConfig(steps=6, batch_size=16, decay=3, eval_every=3),
            corner_ppo=replace(corner_ppo_config(), steps=3, batch_size=36, epochs=1, minibatches=2, eval_every=1),
            corner_exact=FitConfig(steps=3, decay=2),
            corner_dpo=FitConfig(steps=3, decay=2),
            corner_pairs=180,
        )
    if profile_name == "gpu":
        config = DemoConfig(
            seed=seed,
            demonstrations=60_000,
            preferences=20_000,
            ppo_prompts=20_000,
            evaluation_prompts=2048,
            sft=SFTConfig(steps=1500, batch_size=128, replay_rows=32, decay=1000),
            reward=RewardConfig(steps=600, batch_size=128, decay=400),
            ppo=PPOConfig(steps=60, batch_size=256, decay=30),
            dpo=DPOConfig(steps=300, batch_size=128, decay=200),
        )
    for stage in ("sft", "reward", "ppo", "dpo", "corner_ppo"):
        setattr(config, stage, replace(getattr(config, stage), seed=seed))
    return config


def scale_learning_rates(config: DemoConfig, hidden_size: int) -> None:
    """Sets the rates, which were found for the full profile's model, to those for a model of another width."""
    corner = (config.corner_ppo, config.corner_exact, config.corner_dpo)
    for stage in (config.sft, config.reward, config.ppo, config.dpo, *corner):
        stage.learning_rate = scaled_learning_rate(stage.learning_rate, hidden_size)
    config.ppo.value_learning_rate = scaled_learning_rate(config.ppo.value_learning_rate, hidden_size)


class TownTokenizer:
    """A Hugging Face tokenizer that reads and writes the town's text, where <end> is its own EOS token.

    With it `--model` can be any causal language model: prompts, rewards and answers stay the same strings.
    """

    def __init__(self, tokenizer):
        self.inner = tokenizer
        self.eos_token, self.eos_token_id = "<end>", tokenizer.eos_token_id
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        body = text.removesuffix("<end>").strip()
        # A leading space: the response continues a text, and most vocabularies spell " word" as one token.
        ids = self.inner.encode(f" {body}", add_special_tokens=False) if body else []
        return ids + [self.eos_token_id] * text.endswith("<end>")

    def decode(self, ids) -> str:
        ids = [int(i) for i in ids]
        finished = bool(ids) and ids[-1] == self.eos_token_id
        # No tidying up: " ." must not become ".", or the reward sees other words than the model wrote.
        body = self.inner.decode(
            ids[:-1] if finished else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # Only the real EOS ends an answer: a policy that spells "<end>" in letters is not paid for it.
        body = body.replace("<end>", "").strip()
        return f"{body} <end>".lstrip() if finished else body


# ------------------------------------------------------------------------------------------------ the cache


class Cache:
    """Finished stages in a folder: NAME.pt holds weights, log and the settings they were made with."""

    def __init__(self, folder: Path, fresh: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:  # all at once: if this run is interrupted, no later one can build on a mixture of old and new
            for old in folder.glob("*.pt"):
                old.unlink()
        self.timings: dict[str, dict] = {}

    def progress_path(self, name: str, settings: dict) -> Path:
        """Where a stage keeps its checkpoint until it is finished; other settings have another."""
        return self.folder / f"{name}-{settings_digest(settings)}.unfinished.pt"

    def stage(self, name: str, settings: dict, model, make: Callable[[Path], dict]) -> dict:
        """Runs `make(progress_path)`, which trains `model` in place and returns what it logged, or loads an
        earlier result.

        Raises: ValueError if the folder holds this stage made with other settings.
        """
        path = self.folder / f"{name}.pt"
        settings = json.loads(json.dumps(settings))
        kept = load_progress(path)
        if kept is not None:
            if kept["settings"] != settings:
                changed = [k for k in settings | kept["settings"] if settings.get(k) != kept["settings"].get(k)]
                raise ValueError(
                    f"{path} was made with other settings ({', '.join(changed)}). "
                    "Add --fresh to train all stages again, or give another folder with --out"
                )
            if model is not None:
                model.load_state_dict(kept["model"])
            print(f"{name}: kept from {shown(path)}", flush=True)
            self.timings[name] = kept["timing"] | {"cached": True}
            return kept["result"]
        progress = self.progress_path(name, settings)
        print(f"{name}: {'going on from its last checkpoint' if progress.exists() else 'starting'}", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        result = make(progress)
        timing = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        state = {} if model is None else {"model": model.state_dict()}
        save_progress(path, settings=settings, result=result, timing=timing, **state)
        progress.unlink(missing_ok=True)
        self.timings[name] = timing | {"cached": False}
        return result


# ----------------------------------------------------------------------------------------------- the stages


@dataclass
class Town:
    """What all stages share: the world, how text becomes tokens, and where the models live."""

    world: World
    tokenizer: object
    device: torch.device
    max_new_tokens: int

    def answers(
        self, model, prompts: list[str], temperature: float, seed: int = 0, name: str | None = None
    ) -> list[str]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return generate_text(
            model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, temperature=temperature,
            batch_size=256, generator=generator, name=name,
        )  # fmt: skip

    def prompts(self, n: int, seed: int, **kwargs) -> list[str]:
        """`n` chat prompts; see `World.sample_tasks`."""
        return [chat_prompt(task.instruction) for task in self.world.sample_tasks(n, seed, **kwargs)]


def sft_stage(
    town: Town,
    model,
    config: DemoConfig,
    checkpoint: Path | None = None,
    shares: dict[str, float] = PRETRAINING_SHARES,
) -> list[dict]:
    """Fine-tunes the base model in place on demonstrations, with a little pre-training text replayed.

    shares: of the kinds of replayed documents.
    """
    demonstrations = town.world.demonstrations(config.demonstrations, config.seed)
    held_out = town.world.demonstrations(256, config.seed, held_out=True)
    documents = [town.world.tokenizer.decode(d) for d in town.world.documents(200_000, config.seed + 1, shares)]
    replay = pack([town.tokenizer.encode(text) for text in documents], 64)
    return train_sft(
        model, town.tokenizer, demonstrations, config.sft,
        held_out=held_out, replay=replay, checkpoint=checkpoint,
    )  # fmt: skip


def sample_preferences(town: Town, sft, config: DemoConfig, annotator: str | dict = "expert") -> list[dict]:
    """`config.preferences` pairs of different SFT answers to training prompts, compared by an annotator.

    Fewer, if the model gives the same answer twice to more than a third of the prompts.
    """
    prompts = town.prompts(config.preferences * 3 // 2, config.seed + 10)
    first, second = (
        town.answers(sft, prompts, 1.0, seed=config.seed * 2 + i, name=f"{side} answers")
        for i, side in enumerate(["first", "second"])
    )
    pairs = [(p, a, b) for p, a, b in zip(prompts, first, second) if a != b][: config.preferences]
    return town.world.label(annotator, [p for p, _, _ in pairs], [(a, b) for _, a, b in pairs], config.seed)


def gold_agreement(town: Town, reward_model, sft, seed: int, n: int = 1000) -> dict[str, float]:
    """How often a reward model prefers what gold prefers, on pairs of answers to held-out prompts that differ in
    gold; beside it an expert who labels each pair once (the noise in the data) and the Bayes limit: the share of
    expert labels that the best possible model would predict."""
    world = town.world
    prompts = town.prompts(n, seed + 20, held_out=True)
    first, second = (town.answers(sft, prompts, 1.0, seed=seed + 100 + i) for i in range(2))
    gold1, gold2 = world.gold_reward(prompts, first), world.gold_reward(prompts, second)
    kept = (gold1 != gold2).nonzero().flatten().tolist()
    chosen = [first[i] if gold1[i] > gold2[i] else second[i] for i in kept]
    rejected = [second[i] if gold1[i] > gold2[i] else first[i] for i in kept]
    prompts = [prompts[i] for i in kept]
    scores = [score(reward_model, town.tokenizer, prompts, side) for side in (chosen, rejected)]
    expert = [world.preference_prob("expert", p, a, b) for p, a, b in zip(prompts, chosen, rejected)]
    accuracy = pair_accuracy(*scores)
    return {
        "agreement": accuracy,
        "agreement_se": (accuracy * (1 - accuracy) / len(prompts)) ** 0.5,
        "expert_agreement": sum(expert) / len(expert),
        "bayes_limit": sum(max(p, 1 - p) for p in expert) / len(expert),
        "pairs": len(prompts),
    }


def reward_stage(
    town: Town, model: RewardModel, preferences: list[dict], config: DemoConfig, checkpoint: Path | None = None
) -> list[dict]:
    """Trains a reward model in place; the preferences of a tenth of the prompts are kept out and measure it."""
    prompts = list(dict.fromkeys(pair["prompt"] for pair in preferences))
    kept_out = set(prompts[: len(prompts) // 10])
    return train_reward_model(
        model, town.tokenizer, [pair for pair in preferences if pair["prompt"] not in kept_out], config.reward,
        held_out=[pair for pair in preferences if pair["prompt"] in kept_out], checkpoint=checkpoint,
    )  # fmt: skip


def curve(town: Town, sft, reward_model, config: DemoConfig) -> Callable:
    """A function that measures gold reward, proxy reward and KL of a policy on a few held-out prompts."""
    prompts = town.prompts(config.curve_prompts, config.seed + 30, held_out=True, shares=EVALUATION_SHARES)

    def measure(model) -> dict[str, float]:
        result = evaluate_policy(
            model, town.tokenizer, prompts, town.world.gold_reward,
            ref_model=sft, max_new_tokens=town.max_new_tokens, seed=config.seed,
        )  # fmt: skip
        summary = {f"eval_{name}": value for name, value in result.summary().items()}
        proxy, proxy_se = mean_and_error(score(reward_model, town.tokenizer, prompts, result.responses))
        return summary | {"eval_proxy": proxy, "eval_proxy_se": proxy_se}

    return measure


def ppo_stage(town: Town, model, sft, reward_model, config: DemoConfig, checkpoint: Path | None = None) -> list[dict]:
    """PPO of `model`, in place, against the reward model; `sft` is the reference."""

    def reward_fn(prompts: list[str], responses: list[str]) -> Tensor:
        return score(reward_model, town.tokenizer, prompts, responses)

    return train_ppo(
        model, town.tokenizer, town.prompts(config.ppo_prompts, config.seed + 40), reward_fn,
        replace(config.ppo, max_new_tokens=town.max_new_tokens), ref_model=sft,
        evaluate_fn=curve(town, sft, reward_model, config), checkpoint=checkpoint,
    )  # fmt: skip


def dpo_stage(
    town: Town, model, sft, preferences: list[dict], reward_model, config: DemoConfig, checkpoint: Path | None = None
) -> list[dict]:
    """DPO of `model`, in place, on the same preferences; the reward model only watches."""
    return train_dpo(
        model, town.tokenizer, preferences, config.dpo, ref_model=sft,
        evaluate_fn=curve(town, sft, reward_model, config), checkpoint=checkpoint,
    )  # fmt: skip


def corner_stage(town: Town, sft, config: DemoConfig) -> dict:
    """PPO, DPO and the exact gradient on the enumerable corner; the gap of each to the exact optimum."""
    problem = CornerProblem.of(sft, town.world.corner(), config.corner_beta)
    behaviours = [problem.ref_log_probs, corner_runs.tempered(problem.ref_log_probs, 2.0)]
    pairs = corner_runs.sample_pairs(problem, behaviours, config.corner_pairs, config.seed)
    _, exact_log = corner_runs.exact_gradient(sft, problem, config.corner_exact)
    _, dpo_log = corner_runs.dpo(sft, problem, pairs, config.corner_dpo)
    _, ppo_log = corner_runs.ppo(sft, problem, config.corner_ppo)
    return {
        "beta": config.corner_beta,
        "J_ref": problem.value(problem.ref_log_probs).item(),
        "J_star": problem.value(problem.optimum).item(),
        "exact": exact_log,
        "dpo": dpo_log,
        "ppo": [line for line in ppo_log if "gap" in line],
    }


# -------------------------------------------------------------------------------------------- the measuring


def measure(town: Town, model, sft, config: DemoConfig, format_prompt: Callable = chat_prompt) -> dict[str, float]:
    """A row of the table: following, gold reward, KL, length and refusals on held-out prompts."""
    world = town.world
    tasks = world.sample_tasks(config.evaluation_prompts, config.seed + 50, held_out=True, shares=EVALUATION_SHARES)
    prompts = [format_prompt(task.instruction) for task in tasks]
    sampled = evaluate_policy(
        model, town.tokenizer, prompts, world.gold_reward,
        ref_model=sft, max_new_tokens=town.max_new_tokens, seed=config.seed,
    )  # fmt: skip
    row = sampled.summary()
    greedy = town.answers(model, prompts, 0.0)
    for name, responses in (("follows", sampled.responses), ("follows_greedy", greedy)):
        followed = torch.tensor([world.follows(p, r) for p, r in zip(prompts, responses)], dtype=torch.float)
        row[name], row[f"{name}_se"] = mean_and_error(followed)
    harmful, lookalike = (
        [format_prompt(t.instruction) for t in world.tasks.values() if t.kind == kind and world.held_out(t)]
        for kind in ("harmful", "lookalike")
    )
    row |= refusal_rates(model, town.tokenizer, harmful, lookalike, world.refuses, max_new_tokens=town.max_new_tokens)
    return row


def show_answers(town: Town, models: dict[str, object], seed: int, n: int = 6) -> list[dict]:
    """The same held-out instructions, one of each kind, answered greedily by every model."""
    world, rng = town.world, random.Random(seed)
    tasks = world.sample_tasks(400, seed + 60, held_out=True)
    kinds = ["fact", "tips", "names", "words", "lookalike", "harmful"][:n]
    chosen = [rng.choice([task for task in tasks if task.kind == kind]) for kind in kinds]
    rows = []
    for task in chosen:
        row = {"instruction": task.instruction, "kind": task.kind, "answers": {}}
        for name, model in models.items():
            # The base model has never seen the chat template: it gets the bare instruction, as a text to continue.
            prompt = task.instruction if name == "base" else chat_prompt(task.instruction)
            answer = town.answers(model, [prompt], 0.0)[0]
            row["answers"][name] = {
                "text": answer.removesuffix("<end>").strip(),
                "finished": answer.endswith("<end>"),
                "gold": world.utility(prompt, answer),
                "follows": world.follows(prompt, answer),
            }
        rows.append(row)
    return rows


class Story:
    """The models of the demo, each trained when it is first asked for and kept in a folder.

    The demo asks for all of them; a lecture asks for those it talks about and finds them there if the demo has run.
    `base`, `sft`, `reward_model`, `ppo`, `dpo` are frozen models in evaluation mode, `preferences` the labelled pairs,
    `corner` the log of the runs on the corner, `logs[stage]` what a stage logged (once it was asked for), `problem`
    the corner with the SFT model as reference, `town` and `world` what they live in, `config` the settings.

    profile: "full" or "test"; by default full, and test in the fast mode of the lectures.
    model: a folder or hub id of a causal language model to start from instead of the town's base model.
    Raises: ValueError when a stage is asked for that the folder holds with other settings.
    """

    def __init__(
        self,
        profile: str | None = None,
        seed: int = 0,
        device: str = "auto",
        model: str | None = None,
        out: Path | None = None,
        fresh: bool = False,
        from_scratch: bool = False,
    ):
        if model and from_scratch:
            raise ValueError(
                "--from-scratch trains the town's own base model, --model brings another: give one of them"
            )
        profile = profile or ("test" if fast_mode() else "full")
        self.sizes, self.config = world_profile(profile), demo_config(profile, seed)
        self.device, self.model_name, self.seed = resolve_device(device), model, seed
        self.from_scratch = from_scratch or (profile != "full" and not model)  # only the full base model is shipped
        if out is None:
            out = course_root() / "runs" / demo_folder(profile, seed, model, from_scratch)
        self.out, self.cache, self.logs = Path(out), Cache(Path(out), fresh), {}
        self.world = World(self.sizes.world)
        settings = {"profile": profile, "world": self.sizes.key, "model": model, "seed": seed}
        self._settings = settings | {"device": self.device.type}
        self.town, self.base = self._town_and_base()
        scale_learning_rates(self.config, self.base.hidden_size)

    def _town_and_base(self) -> tuple[Town, torch.nn.Module]:
        if self.model_name:
            base, tokenizer = load_model(self.model_name, self.device)
            return Town(self.world, TownTokenizer(tokenizer), self.device, 3 * MAX_NEW_TOKENS), frozen_copy(base)
        if self.from_scratch:
            self._settings["pretraining"] = asdict(self.sizes.pretraining)
            base = new_model(self.sizes, self.device)
            self.logs["base"] = self.cache.stage(
                "base", self._settings, base,
                lambda path: pretrain(base, self.world, self.sizes.pretraining, checkpoint=path),
            )  # fmt: skip
        else:
            base = load_base(self.sizes, device=self.device)
        return Town(self.world, self.world.tokenizer, self.device, MAX_NEW_TOKENS), frozen_copy(base)

    def settings(self, stage: str) -> dict:
        """Those of a stage and of all it builds on, so a cached stage is never built on another."""
        config = self.config
        made = self._settings | {
            "base": self._base_digest, "demonstrations": config.demonstrations, "sft": asdict(config.sft)
        }  # fmt: skip
        if stage == "sft":
            return made
        made |= {"preferences": config.preferences, "annotator": ANNOTATORS["expert"], "gold": GOLD_WEIGHTS}
        if stage == "preferences":
            return made
        made |= {"reward": asdict(config.reward), "reward_likelihood": config.reward_likelihood}
        if stage in ("ppo", "dpo"):
            made |= {stage: asdict(getattr(config, stage)), "curve": config.curve_prompts}
        if stage == "corner":
            made |= {name: value for name, value in asdict(config).items() if name.startswith("corner")}
        return made

    @cached_property
    def _base_digest(self) -> str:
        return weights_digest(self.base)

    def _trained(self, stage: str, model, make: Callable[[Path], list[dict]]):
        """`model` after the stage, frozen."""
        model = model.to(self.device)
        self.logs[stage] = self.cache.stage(stage, self.settings(stage), model, make)
        return frozen_copy(model)

    @cached_property
    def sft(self):
        if self.model_name:
            model = copy.deepcopy(self.base).requires_grad_(True)
        else:
            model = introduce_chat_tokens(self.base, self.world).requires_grad_(True)
        return self._trained("sft", model, lambda path: sft_stage(self.town, model, self.config, path))

    @cached_property
    def preferences(self) -> list[dict]:
        sft = self.sft  # what a stage builds on is made before its clock starts
        return self.cache.stage(
            "preferences", self.settings("preferences"), None, lambda _: sample_preferences(self.town, sft, self.config)
        )

    @cached_property
    def reward_model(self):
        preferences = self.preferences
        model = RewardModel(copy.deepcopy(self.sft).requires_grad_(True), self.config.reward_likelihood)
        return self._trained(
            "reward", model, lambda path: reward_stage(self.town, model, preferences, self.config, path)
        )

    @cached_property
    def ppo(self):
        sft, judge, model = self.sft, self.reward_model, copy.deepcopy(self.sft).requires_grad_(True)
        return self._trained("ppo", model, lambda path: ppo_stage(self.town, model, sft, judge, self.config, path))

    @cached_property
    def dpo(self):
        sft, judge, model = self.sft, self.reward_model, copy.deepcopy(self.sft).requires_grad_(True)
        pairs = self.preferences
        return self._trained(
            "dpo", model, lambda path: dpo_stage(self.town, model, sft, pairs, judge, self.config, path)
        )

    @cached_property
    def corner(self) -> dict | None:
        if self.model_name:  # another tokenizer has another tree of responses
            return None
        sft = self.sft
        return self.cache.stage(
            "corner", self.settings("corner"), None, lambda _: corner_stage(self.town, sft, self.config)
        )

    @cached_property
    def problem(self) -> CornerProblem:
        return CornerProblem.of(self.sft, self.world.corner(), self.config.corner_beta)


def run_demo(
    seed: int = 0,
    device: str = "auto",
    model: str | None = None,
    out: Path | None = None,
    fresh: bool = False,
    from_scratch: bool = False,
    profile: str = "full",
) -> dict:
    """Trains and measures everything, prints the table, writes results.json and report.html to `out`.

    Arguments and errors are those of `Story`.
    """
    from cs336_alignment.report import print_table, write_report

    started = time.perf_counter()
    story = Story(profile, seed, device, model, out, fresh, from_scratch)
    town, config = story.town, story.config
    print(
        f"The town: {len(story.world.known)} known people, {len(story.world.tasks):,} instructions. "
        f"Device: {story.device}.",
        flush=True,
    )
    models = {"base": story.base, "sft": story.sft, "ppo": story.ppo, "dpo": story.dpo}
    corner = story.corner
    table = {}
    for name, policy in tqdm(models.items(), desc="measuring"):
        # The base model has never seen the chat template: it gets the bare instruction, as a text to continue.
        format_prompt = str if name == "base" else chat_prompt
        table[name] = measure(town, policy, story.sft, config, format_prompt)
    results = {
        "settings": story.settings("reward"),
        "config": asdict(config),
        "preference_pairs": len(story.preferences),
        "date": date.today().isoformat(),
        "machine": {
            "device": str(story.device), "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        },
        "table": table,
        "reward_model": gold_agreement(town, story.reward_model, story.sft, seed),
        "answers": show_answers(town, models, seed),
        "logs": {stage: story.logs[stage] for stage in ("sft", "reward", "ppo", "dpo")},
        "corner": corner,
        "timings": story.cache.timings,
        "seconds": time.perf_counter() - started,
        "peak_memory_gb": peak_memory_gb(),
    }  # fmt: skip
    if from_scratch and not model and profile == "full":
        results["base_log"] = story.logs["base"]
        results["table"]["shipped base"] = measure(
            town, load_base(story.sizes, device=story.device), story.sft, config, str
        )
    (story.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)
    print(f"The report: {write_report(results, story.out / 'report.html')}")
    return results


def weights_digest(model) -> str:
    """A hash of a model's weights: what is built on other weights is another stage."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def peak_memory_gb() -> float | None:
    """The largest resident memory of this process so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
