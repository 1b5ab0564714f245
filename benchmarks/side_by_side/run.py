"""The package beside TRL: `python3 course.py bench`. Nothing here is a dependency of the course.

For each task: the parity gate (gate.py), then rounds of A B, B A (A: TRL, tuned; B: ours, with the tricks), each
measurement in a process of its own (worker.py), one thread, then the other variants once a round. Ratios are taken
pair by pair on CPU time: other work on the machine slows both of a pair. Sampling has no gate, and gate.py says what
else is not watched. Writes JSON and Markdown (table.py).
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))

import environments  # noqa: E402
import gate  # noqa: E402
import ours  # noqa: E402
import table  # noqa: E402
from setting import PROFILES, Setting  # noqa: E402

TASKS = ("sft", "rm", "dpo", "ppo", "ragged", "sampler", "floor")
# task -> the other variants, (side, variant); the first two are always TRL tuned and ours fast
OTHERS = {
    "sft": [("ours", "plain"), ("plain_hf", "plain"), ("trl", "defaults"), ("floor", "fast")],
    "rm": [("ours", "plain"), ("ours", "unshared"), ("plain_hf", "plain"), ("trl", "defaults")],
    "dpo": [
        ("ours", "plain"), ("ours", "unshared"), ("plain_hf", "plain"), ("trl", "precomputed"), ("trl", "defaults"),
        ("floor", "fast"),
    ],
    "ppo": [("ours", "plain"), ("trl112", "defaults")],
    "ragged": [("ours", "plain"), ("trl", "packed")],
    "sampler": [("ours", "plain"), ("plain_hf", "scores")],
}  # fmt: skip


class Bench:
    """What one call of the command needs everywhere: profile, environments, where to put things."""

    def __init__(self, profile: str, rounds: int, others: int, work: Path):
        self.profile, self.rounds, self.others, self.work = profile, rounds, others, work
        self.setting: Setting = PROFILES[profile]
        self.pythons: dict[str, Path | None] = {}

    def python(self, side: str) -> Path | None:
        if side not in environments.RELEASES:
            return Path(sys.executable)
        if side not in self.pythons:
            self.pythons[side] = environments.make(side, self.work / "envs")
        return self.pythons[side]

    def measure(self, side: str, task: str, variant: str, **more) -> dict:
        """One process. Raises: RuntimeError with the end of its output if it fails."""
        job = {"profile": self.profile, "side": side, "task": task, "variant": variant} | more
        if side in environments.RELEASES:
            setting = self.setting
            steps = 1 + setting.ppo_steps if task == "ppo" else setting.warmup + setting.steps
            steps = more.get("steps", steps)
            job["rows"] = ours.order(steps * setting.batch_size, setting, steps)
        file = self.work / "job.json"
        file.write_text(json.dumps(job))
        environment = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if self.setting.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:  # one GPU: TRL would spread its batch over all that it sees
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = [str(self.python(side)), str(HERE / "worker.py"), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{side} {task} {variant} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1]) | {"side": side, "variant": variant}
        if "cpu_ms" in result:
            result["ms"] = result["cpu_ms" if self.setting.device == "cpu" else "wall_ms"]  # what ratios are taken of
            print(f"  {side:9}{task:8}{variant:12}{result['cpu_ms']:9.0f} ms CPU {result['wall_ms']:9.0f} ms wall")
        return result


def opponent(task: str) -> tuple[str, str]:
    if task == "sampler":
        return "plain_hf", "plain"
    return "trl112" if task == "ppo" else "trl", "tuned"


def parity(bench: Bench, task: str) -> dict:
    """The gate for each of our variants; the files it compares are left in the work folder."""
    side, variant = opponent(task)
    steps = 1 if task == "ppo" else 2
    files = {name: bench.work / f"gate-{task}-{name}.pt" for name in ("trl", "plain", "unshared", "fast")}
    theirs = bench.measure(side, task, variant, steps=steps, save=str(files["trl"]))
    replay = {"replay": theirs["replay"]} if theirs["replay"] else {}
    found = {}
    for name in ("plain", "unshared", "fast") if task in ("rm", "dpo") else ("plain", "fast"):
        mine = bench.measure("ours", task, name, steps=steps, save=str(files[name]), **replay)
        found[name] = gate.compare(mine, theirs, files[name], files["trl"], bench.setting)
    return found


def rounds(bench: Bench, task: str, floor: bool, **more) -> list[list[dict]]:
    """A B, B A so often as there are rounds; in the first of them (`--others` says how many) then each other once."""
    a, b = opponent(task), ("ours", "fast")
    others = [o for o in OTHERS[task] if (floor or o[0] != "floor") and bench.python(o[0])]
    order = [a, b, b, a] if bench.python(a[0]) else [b, b]
    return [
        [bench.measure(side, task, variant, **more) for side, variant in order + others * (number < bench.others)]
        for number in range(bench.rounds)
    ]


def machine() -> dict:
    """What it ran on, without its name."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {"system": platform.system(), "cpu": model, "cores": os.cpu_count(), "machine": platform.machine()}


def code_hash() -> str:
    """Of what was measured: the package's modules and the two sides of the comparison."""
    files = [*(ROOT / "cs336_alignment").glob("*.py"), HERE / "ours.py", HERE / "trl_side.py", HERE / "setting.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:10]


def load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu")
    parser.add_argument("--only", default=",".join(TASKS), help="some of " + ",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--others", type=int, help="rounds in which the other variants run too; default: all")
    parser.add_argument("--out", type=Path, help="results, without suffix; default: benchmarks/results/side_by_side")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if wrong := set(only) - set(TASKS):
        parser.error(f"--only takes some of {','.join(TASKS)}, not {', '.join(sorted(wrong))}")
    if arguments.profile == "gpu":
        import torch

        if not torch.cuda.is_available():
            parser.error("--profile gpu needs a CUDA GPU, and torch sees none")
    work = ROOT / "runs" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    name = "side_by_side" if arguments.profile == "cpu" else "side_by_side_gpu"
    out = arguments.out or ROOT / "benchmarks" / "results" / name
    if load() > 0.5:
        print(f"warning: the machine is busy (load {load():.1f}); wall times will be too long, ratios less exact")
    others = arguments.rounds if arguments.others is None else arguments.others
    bench = Bench(arguments.profile, arguments.rounds, others, work)
    kept = out.with_suffix(".json")
    results = json.loads(kept.read_text()) if kept.exists() and arguments.only != ",".join(TASKS) else {"tasks": {}}
    results |= {"profile": bench.profile, "setting": asdict(bench.setting), "machine": machine()}

    def keep() -> None:
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for task in [t for t in TASKS if t in only and t != "floor"]:
        print(task)
        before, found = load(), {}
        if task != "sampler" and bench.python(opponent(task)[0]):
            found["gate"] = parity(bench, task)
            if not all(g["passed"] for g in found["gate"].values()):
                print(f"  the parity gate failed, so {task} is not timed: {json.dumps(found['gate'])}")
                results["tasks"][task] = found
                keep()
                continue
        batches = {"sampler32": 32, "sampler1": 1} if task == "sampler" else {task: None}
        for name, size in batches.items():
            more = {"batch_size": size} if size else {}
            runs = rounds(bench, task, "floor" in only, **more)
            done = {"date": date.today().isoformat(), "code": code_hash(), "load": [before, load()], "rounds": runs}
            results["tasks"][name] = found | done
        keep()
    if "ppo" in only:
        print("ppo: a whole update")
        command = [sys.executable, str(ROOT / "benchmarks" / "ppo_update.py")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results["ppo_update"] = json.loads(done.stdout)
        keep()
    text = table.markdown(results)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
