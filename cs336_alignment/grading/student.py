"""What the kernel of a graded notebook calls: runs a student's function on inputs and publishes what it returned."""

import json

from IPython.display import display

from cs336_alignment.grading.probe import decode, encode_results, run_calls

# How a kernel hands over what functions returned.
ANSWERS = "application/vnd.cs336-alignment.answers+json"


def answer(function, cases: str) -> None:
    """cases: JSON, a list of {"calls", "gradients", "after"}. Publishes the encoded results of each case."""
    answers = []
    for case in json.loads(cases):
        calls = [[decode(argument) for argument in call] for call in case["calls"]]
        answers.append(encode_results(run_calls(function, calls, case["gradients"], case["after"])))
    display({ANSWERS: json.dumps(answers), "text/plain": ""}, raw=True)
