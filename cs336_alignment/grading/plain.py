"""Points under plain nbgrader, without the judge: the reference is then in the same kernel as the student's code.

Weak, since whoever wants to cheat can; but an honest notebook gets the same points. nbgrader gives 0 for a cell that
writes to stderr and full marks for one whose last value is no number, so neither happens here.
"""

import contextlib
import io

from cs336_alignment.grading.exercise import exercise as find
from cs336_alignment.grading.probe import decode_results, encode_results
from cs336_alignment.grading.score import case_seeds, score


def grade(name: str, function) -> float:
    """Points of a function on all cases, with a report on stdout. Raises: ValueError for a name of no exercise."""
    exercise = find(name)
    seeds = case_seeds(exercise, "", "")
    with contextlib.redirect_stderr(io.StringIO()):
        results = (exercise.results(function, case, case.calls(seeds[case.name])) for case in exercise.cases)
        # By way of JSON, as a kernel's answers travel: the comparison meets the same types.
        result = score(exercise, [decode_results(encode_results(found)) for found in results], seeds)
    print(result)
    return result.points
