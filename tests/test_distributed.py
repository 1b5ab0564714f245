"""Two processes give what one gives: the loss curve, the weights, also with sharded parameters and after SIGKILL.

Real processes that talk through gloo on this computer; models are float64, so that "the same" can mean 1e-9.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file
from toys import assert_near, weights_of
from two_processes import DEMONSTRATIONS, JOBS, TOKENIZER, outcome, policy

from cs336_alignment import cli, distributed, speed
from cs336_alignment.models import load_model, load_progress, save_model
from cs336_alignment.optimize import shuffled_batch
from cs336_alignment.real_data import train_on_file
from cs336_alignment.sft import sft_loss
from cs336_alignment.tokens import masked_token_log_probs, select_rows, tokenize_prompt_and_output

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def start(job: str, folder: Path, count: int = 2) -> list[subprocess.Popen]:
    """The processes of a job, with the variables that torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "two_processes.py"), job, str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What they printed. If one fails, all are ended and the test fails with its last lines."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("two_processes")
    finish(start("everything", folder))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return torch.load(folder / "found.pt", weights_only=False)


def assert_same_run(ours: dict, expected: dict, tolerance: float = 1e-9) -> None:
    """Every number of the logs and every weight."""
    assert len(ours["log"]) == len(expected["log"])
    for line, other in zip(ours["log"], expected["log"]):
        assert line.keys() == other.keys()
        for name in line:
            assert math.isclose(line[name], other[name], rel_tol=tolerance, abs_tol=tolerance), (name, line, other)
    assert_near(ours["weights"], expected["weights"], tolerance)


# ------------------------------------------------------------------------------------------------- the curves


@pytest.mark.parametrize("sharded", [False, True], ids=["a model each", "sharded"])
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_give_the_curve_and_the_weights_of_one(found, name, sharded):
    expected, ours = outcome(JOBS[name]()), found[name, sharded]
    assert len(expected["log"]) == 6 and expected["log"][-1]["loss"] < expected["log"][0]["loss"] - 0.1
    # Scores are float32, and a process pads its slice to a width of its own; so are the accuracies of DPO's log.
    assert_same_run(ours, expected, {"sft": 1e-12, "reward": 1e-6, "dpo": 1e-7}[name])
    assert (ours["held"] < 0.6 * expected["held"]) if sharded else (ours["held"] == expected["held"])


def test_micro_batches_in_two_processes_are_micro_batches_in_one(found):
    assert_same_run(found["accumulation"], outcome(two_processes.sft(accumulation=3)), 1e-12)


def test_slices_need_not_be_equal(found):
    """Five rows in two processes: three and two."""
    assert_same_run(found["uneven"], outcome(two_processes.sft(batch_size=5)), 1e-12)


def test_a_reference_model_is_that_of_the_first_process(found):
    """Every model of `two_processes.py` is another one in each process before its loop: the loops make them the same.
    DPO does so before the first step, since the processes share the reference's work."""
    expected = outcome(two_processes.dpo(preferences=two_processes.MANY))
    assert expected["log"][0]["margin"] == pytest.approx(0, abs=1e-12)
    for ours in found["reference"]:
        assert_same_run(ours, expected, 1e-7)


@pytest.mark.parametrize("sharded", [False, True], ids=["a model each", "sharded"])
def test_the_tricks_of_speed_work_in_two_processes(found, sharded):
    fast = two_processes.sft(log_probs_fn=speed.response_only_log_probs)
    assert_same_run(found["fast SFT", sharded], outcome(fast), 1e-12)
    fast = two_processes.dpo(log_probs_fn=speed.shared_prompt_log_probs)
    assert_same_run(found["fast DPO", sharded], outcome(fast), 1e-7)


def test_a_transformers_model_can_be_sharded_and_saved_whole(found, folder, tmp_path):
    """float32, with tied embeddings, which are one tensor again in the file."""
    run = two_processes.wrapped()
    assert_same_run(found["transformers"], outcome(run), 1e-5)
    assert found["transformers"]["held"] < 0.6 * outcome(run)["held"]
    save_model(run[1], None, tmp_path)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path, folder / "model"))
    assert one.keys() == two.keys()
    for name in one:
        assert_near(two[name], one[name], 1e-5)


def test_the_loss_is_the_mean_over_tokens_and_no_mean_of_means(found):
    """On these ragged rows the classic mistake, the mean of the processes' own means, would be another loss."""
    data = tokenize_prompt_and_output(*([d[k] for d in DEMONSTRATIONS] for k in ("prompt", "response")), TOKENIZER)
    batch = select_rows(data, shuffled_batch(len(DEMONSTRATIONS), 6, 0, 0))
    log_probs = masked_token_log_probs(policy()(batch["input_ids"]), batch["labels"], batch["response_mask"])
    halves = [(log_probs[rows], batch["response_mask"][rows]) for rows in torch.arange(6).chunk(2)]
    tokens = [int(mask.sum()) for _, mask in halves]
    assert max(tokens) > 1.2 * min(tokens)
    first = found["sft", False]["log"][0]["loss"]
    assert first == pytest.approx(sft_loss(log_probs, batch["response_mask"]).item(), abs=1e-12)
    assert abs(first - sum(sft_loss(*half).item() for half in halves) / 2) > 1e-2


# ------------------------------------------------------------------------------------------ the small functions


def test_slices_turns_and_sums(folder):
    first, second = (torch.load(folder / f"functions-{rank}.pt", weights_only=False) for rank in (0, 1))
    assert (first["count"], second["count"]) == (2, 2) and (first["first"], second["first"]) == (True, False)
    assert first["rows"] + second["rows"] == list(range(7)) and len(first["rows"]) == 4
    assert first["turns"] == [([0, 1, 2], True), ([6], True)]
    assert second["turns"] == [([3, 4, 5], True), ([6], False)]  # the last is computed along and thrown away
    for found in (first, second):
        assert found["sum"] == [3.0, 4.0]
        assert found["mean"] == {"x": 0.25 * 3 + 0.75 * 4, "y": 1.0}
        assert "cannot be shared by 2 processes" in found["too few rows"]
        assert "in 3 equal parts each" in found["uneven parts"]
        assert "one process" in found["PPO"]
        for name in ("sharded scores", "sharded scores of pairs"):
            assert "leave scores_fn out" in found[name]


def test_alone_every_function_gives_back_what_it_got():
    rows, x, model = torch.arange(3), torch.ones(2), policy()
    assert distributed.process_count() == 1 and distributed.is_first()
    assert distributed.my_rows(rows, parts=2) is rows and distributed.added_up(x) is x
    assert [(batch, mine) for batch, mine in distributed.my_turns([1, 2])] == [(1, True), (2, True)]
    metrics = {"loss": 1.0}
    assert distributed.averaged(metrics, 0.5) is metrics
    assert distributed.shard(model) is model and not distributed.is_sharded(model.parameters())
    state = distributed.whole_state(model)
    assert all(x.data_ptr() == state[name].data_ptr() for name, x in model.state_dict().items())
    with distributed.launched("cpu") as device:
        assert device == "cpu" and not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------ files, SIGKILL


def test_only_the_first_process_writes(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"found.pt", "functions-0.pt", "functions-1.pt", "whole.pt", "model"}
    assert load_progress(folder / "whole.pt")["step"] == 6


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL, which Windows has not")
def test_two_killed_processes_are_taken_up_by_two_others_or_by_one(found, tmp_path):
    """SIGKILL for both in the middle of a sharded run. Two new ones end bit for bit like a run that was left alone;
    one alone can read the checkpoint too."""
    processes = start("killed", tmp_path)
    try:
        heard = [processes[0].stdout.readline().strip() for _ in range(4)]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
    assert heard == ["a step"] * 4
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    path = tmp_path / "killed.pt"
    assert 2 <= load_progress(path)["step"] < 6
    copy = tmp_path / "copy.pt"
    copy.write_bytes(path.read_bytes())

    finish(start("resumed", tmp_path))
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=False)
    assert resumed["log"] == found["sft", True]["log"]
    assert torch.equal(resumed["weights"], found["sft", True]["weights"])
    assert_same_run(outcome(two_processes.sft(checkpoint=copy)), found["sft", True], 1e-12)


# --------------------------------------------------------------------------------------------- the command line


def test_torchrun_trains_on_a_file(tmp_path):
    """The README's command, sharded: the same curve as alone; one folder, whole and readable weights."""
    records = [{"instruction": f"say {i} and {7 * i % 11}", "output": "word " * (1 + i % 9)} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    arguments = ["train", "sft", "--data", str(tmp_path / "data.json"), "--steps", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [*command, "-m", "cs336_alignment", *arguments, "--shard", "--out", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("nats a response token") == 1  # one process shows the table
    (folder,) = (tmp_path / "two").iterdir()
    alone = train_on_file(
        "sft", str(tmp_path / "data.json"), out=str(tmp_path / "one"), steps=3, device="cpu", progress=False
    )
    ours = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert folder.name == Path(alone["folder"]).name
    for line, other in zip(ours["log"], alone["log"], strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    one, two = (load_model(path / "model", "cpu")[0] for path in (Path(alone["folder"]), folder))
    assert_near(weights_of(two), weights_of(one), 1e-4)


def test_other_verbs_refuse_to_run_twice_at_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["demo"]) == cli.USER_ERROR
    assert "only `train` runs in several processes" in capsys.readouterr().err
