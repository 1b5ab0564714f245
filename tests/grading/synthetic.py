"""A graded class that never was: gradebook, notebooks and reports of as many students as wanted, in seconds.

Run as a program, `python tests/grading/synthetic.py FOLDER 300` makes one to look at and to time `report` on.
"""

import copy
import json
import random
import shutil
import sys
import time
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import nbformat
from nbgrader.api import (
    Assignment,
    Base,
    Comment,
    Course,
    Grade,
    GradeCell,
    Notebook,
    SolutionCell,
    Student,
    SubmittedAssignment,
    SubmittedNotebook,
)
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from variants import choices, honest, renamed

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.rescue_files import look
from cs336_alignment.paths import course_root

ASSIGNMENT = "a4_dpo"
DUE = datetime(2026, 11, 20, 23, 59, 59)
SENTENCES = (
    "the loss only sees the difference of the two log ratios",
    "both may fall as long as the rejected one falls faster",
    "the mass goes to answers that are in no pair",
    "I would watch the log probability of the chosen answers",
    "a larger beta keeps the policy near the reference",
    "adding the likelihood of the chosen answers works against it",
    "the table has a number for each decision and moves none of the others",
    "a network shares its weights so unseen answers move too",
    "PPO samples from itself and is corrected by the reward",
    "temperature two puts rare answers into the pairs",
    "what no pair contains is not constrained at all",
    "in my run the gap of the network was several times larger",
)
FILLERS = (
    "clearly of course then also mostly perhaps often here now simply really still almost hardly maybe too".split()
)


@cache
def read_notebook(path: Path):
    return nbformat.read(path, as_version=4)


def source_notebook(folder: str, assignment: str = ASSIGNMENT):
    return read_notebook(course_root() / folder / assignment / f"{assignment}.ipynb")


def solutions(assignment: str = ASSIGNMENT) -> dict[str, str]:
    cells = source_notebook("solutions", assignment).cells
    return {
        c.metadata.nbgrader.grade_id: c.source
        for c in cells
        if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("solution")
    }


def answer(rng: random.Random) -> str:
    """A written answer in words of one's own."""
    said = []
    for sentence in rng.sample(SENTENCES, 5):
        words = []
        for word in sentence.split():
            words += [rng.choice(FILLERS)] * (rng.random() < 0.35) + [word] * (rng.random() < 0.9)
        said.append(" ".join(words).capitalize() + ".")
    return " ".join(said) + f" It was {rng.random():.3f} with $\\beta = {rng.random():.2f}$."


def filled(release, code: dict[str, str], answers: dict[str, str]):
    """The release with functions and answers typed in."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name.removeprefix("solution-") in code and name.startswith("solution-"):
            cell.source = code[name.removeprefix("solution-")]
        elif name in answers:
            cell.source = answers[name]
    return notebook


def exercise_report(exercise, rng: random.Random, skill: float) -> dict:
    """What the judge might have found."""
    right = [rng.random() < skill for _ in exercise.cases]
    cases = [
        {"name": c.name, "points": c.points * ok, "of": c.points, "visible": c.visible, "right": ok,
         "why": "" if ok else "the result is not the expected one", "expects": c.expects}
        for c, ok in zip(exercise.cases, right)
    ]  # fmt: skip
    hint = None if all(right) or rng.random() < 0.3 else rng.choice(exercise.mistakes[:4]).hint
    points = float(sum(case["points"] for case in cases))
    return {"points": points, "of": exercise.points, "hint": hint, "problem": None, "cases": cases}


def make_class(root: Path, students: int = 300, seed: int = 0, reports: bool = True) -> Path:
    """Writes a course folder with a graded assignment. The last student submitted nothing; `copycat` has what s003 has,
    `renamer` has s007's code under other names, and `quoter` s011's first answer."""
    rng = random.Random(seed)
    for folder in ("solutions", "assignments"):
        shutil.copytree(course_root() / folder / ASSIGNMENT, root / folder / ASSIGNMENT)
    release, graded = source_notebook("assignments"), [e for e in exercises(ASSIGNMENT) if not e.optional]
    options = choices(ASSIGNMENT, solutions())
    names = [f"s{i:03}" for i in range(students - 4)]
    written = {c.metadata.nbgrader.grade_id: float(c.metadata.nbgrader.points) for c in release.cells
               if c.cell_type == "markdown" and c.metadata.get("nbgrader", {}).get("grade")}  # fmt: skip
    code = {name: honest(options, rng) for name in names}
    answers = {name: {key: answer(rng) for key in written} for name in names}
    for thief, victim in (("copycat", 3), ("renamer", 7), ("quoter", 11)):
        victim = names[victim % len(names)]  # a small class has no s011
        code[thief], answers[thief] = honest(options, rng), {key: answer(rng) for key in written}
        if thief == "copycat":
            code[thief] = dict(code[victim])
        elif thief == "renamer":
            code[thief] = {key: renamed(text, rng) for key, text in code[victim].items()}
        else:
            first = next(iter(written))
            answers[thief][first] = answers[victim][first]
    engine = create_engine(
        f"sqlite:///{root / 'gradebook.db'}"
    )  # Gradebook would start a program for its version table
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Course(id="cs336_alignment"))
        assignment = Assignment(name=ASSIGNMENT, duedate=DUE, course_id="cs336_alignment")
        notebook = Notebook(name=ASSIGNMENT, assignment=assignment)
        cells = {
            e.name: GradeCell(name=e.name, max_score=e.points, cell_type="code", notebook=notebook) for e in graded
        }
        cells |= {
            k: GradeCell(name=k, max_score=of, cell_type="markdown", notebook=notebook) for k, of in written.items()
        }
        cells["check"] = GradeCell(name="check-dpo_loss", max_score=0, cell_type="code", notebook=notebook)
        boxes = {e.name: SolutionCell(name=f"solution-{e.name}", notebook=notebook) for e in graded}
        session.add_all([assignment, notebook, *cells.values(), *boxes.values(), Student(id="zz_absent")])
        for number, name in enumerate(code):
            student = Student(id=name, first_name="Student", last_name=name.upper())
            at = DUE + timedelta(hours=rng.uniform(-72, 12))
            submission = SubmittedAssignment(assignment=assignment, student=student, timestamp=at)
            ours = SubmittedNotebook(notebook=notebook, assignment=submission)
            ours.late_submission_penalty = 2.5 if at > DUE else None
            skill = rng.betavariate(5, 1.5)
            found = {e.name: exercise_report(e, rng, skill) for e in graded}
            marks = [Grade(cell=cells[e.name], notebook=ours, auto_score=found[e.name]["points"],
                           needs_manual_grade=False) for e in graded]  # fmt: skip
            for key in written:
                by_hand = float(rng.randint(0, 5)) if number % 3 else None
                marks.append(
                    Grade(cell=cells[key], notebook=ours, manual_score=by_hand, needs_manual_grade=by_hand is None)
                )
            comment = Comment(cell=boxes["dpo_loss"], notebook=ours, manual_comment="Look at **beta** again.")
            session.add_all([student, submission, ours, *marks, *([comment] if number % 5 == 0 else [])])
            text = nbformat.writes(filled(release, code[name], answers[name]))
            for place in ("submitted", "autograded"):
                folder = root / place / name / ASSIGNMENT
                folder.mkdir(parents=True)
                (folder / f"{ASSIGNMENT}.ipynb").write_text(text, encoding="utf-8")
            if reports:
                report = {
                    "student": name, "assignment": ASSIGNMENT, "file": f"{ASSIGNMENT}.ipynb",
                    "digest": look(root / "submitted" / name / ASSIGNMENT, ASSIGNMENT).digest, "timestamp": None,
                    "graded_at": "2026-11-21T10:00:00+00:00", "seconds": round(rng.uniform(0.4, 3), 2),
                    "findings": ["the points cell of dpo_loss was missing and is back"] if number % 11 == 0 else [],
                    "crashes": [{"cell": "solution-dpo_loss", "why": "the kernel died"}] * (number % 37 == 1),
                    "exercises": found,
                }  # fmt: skip
                path = root / "autograded" / name / ASSIGNMENT / "report.json"
                path.write_text(json.dumps(report), encoding="utf-8")
        session.commit()
    return root


if __name__ == "__main__":
    from cs336_alignment.grading.results import after_grading

    where = Path(sys.argv[1])
    if not (where / "gradebook.db").exists():
        make_class(where, int(sys.argv[2]))
    for run in ("first", "again"):
        wall, cpu = time.perf_counter(), time.process_time()
        after = after_grading(where, ASSIGNMENT)
        print(f"{run}: {time.process_time() - cpu:.1f} CPU s, {time.perf_counter() - wall:.1f} s; {after.report}")
