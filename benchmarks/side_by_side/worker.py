"""One process, one measurement: `python worker.py JOB.json` prints one line of JSON.

The job: profile, side (ours, trl, trl112, plain_hf, floor), task (sft, rm, dpo, ppo, ragged, sampler), variant;
`batch_size` to override the profile's. With `save` it is a run for the parity gate: the parameters after one step go
to that file.
"""

import dataclasses
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

started = time.process_time(), time.perf_counter()
sys.path.append(str(Path(__file__).resolve().parents[2]))  # the package, where it is not installed

import torch  # noqa: E402
from setting import PROFILES, Clock  # noqa: E402


def main(job: dict) -> dict:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setting, task = PROFILES[job["profile"]], job["task"]
    if task == "ppo":
        setting = dataclasses.replace(setting, warmup=1, steps=setting.ppo_steps)
    if "batch_size" in job:
        setting = dataclasses.replace(setting, batch_size=job["batch_size"])
    if job["side"] in ("trl", "trl112"):
        import trl  # noqa: F401
    side = importlib.import_module("trl_side" if job["side"].startswith("trl") else job["side"])
    imported = {"cpu_s": time.process_time() - started[0], "wall_s": time.perf_counter() - started[1]}
    run, clock = getattr(side, f"run_{task}"), Clock(setting, keep_first="save" in job)
    if job["side"].startswith("trl"):
        losses = run(setting, job["variant"], job["rows"], clock)
    else:
        replay = {"replay": job["replay"]} if "replay" in job else {}
        losses = run(setting, job["variant"], job.get("steps", setting.warmup + setting.steps), clock, **replay)
    if "save" in job:
        torch.save(clock.first, job["save"])
        return {"losses": losses, "replay": clock.replay}
    return clock.result() | {"import": imported, "versions": versions()}


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: sys.modules[name].__version__ for name in ("transformers", "trl") if name in sys.modules}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
