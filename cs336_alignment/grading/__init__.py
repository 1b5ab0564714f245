"""Exercises: checks that a student runs, and the judge that grades. `from cs336_alignment.grading import check`."""

from cs336_alignment.grading.check import check

__all__ = ["check", "grade"]


def grade(name: str, function) -> float:
    """Points of a function on all cases, for the cells of plain nbgrader; see `plain.grade`."""
    from cs336_alignment.grading.plain import grade as graded  # not there in what students get

    return graded(name, function)
