"""The verbs: `python -m cs336_alignment VERB ...`, which is what `course.py VERB ...` runs.

A verb parses its options, imports what it needs only then (torch takes a second, transformers three) and
calls one function of the package. Nothing is computed here.
"""

import gc
import os
import subprocess
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cs336_alignment.paths import PACKAGE, course_root, shown

USER_ERROR = 2  # exit code for something the user can put right

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The course's verbs. `--debug` anywhere shows the whole traceback of an error.",
)
world_app = typer.Typer(no_args_is_help=True, help="Look at the embedded world, or retrain its base model.")
app.add_typer(world_app, name="world")


class Profile(StrEnum):
    full = "full"
    test = "test"
    gpu = "gpu"


class Stage(StrEnum):
    sft = "sft"
    reward = "reward"
    dpo = "dpo"


class Format(StrEnum):
    auto = "auto"
    alpaca = "alpaca"
    flan = "flan"
    oasst = "oasst"
    preference = "preference"


def use_threads(threads: int | None) -> None:
    """Limit torch to so many threads; None leaves torch's own choice (one for each core)."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


Seed = Annotated[int, typer.Option(help="Seed of everything random: one seed, one result.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads for torch; default: one for each core.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="PATH_OR_HUB_ID", help="A causal language model instead of the built-in one."),
]


@app.command()
def demo(
    seed: Seed = 0,
    device: Device = "auto",
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; default: runs/demo... in the checkout.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train every stage again, whatever is cached in --out.")
    ] = False,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Also train the base model and compare it with the shipped one."),
    ] = False,
    profile: Annotated[Profile, typer.Option(help="test: small and quick. gpu: a model and a town that need one.")] = (
        Profile.full
    ),
    threads: Threads = None,
) -> None:
    """The whole story: base, SFT, reward model, PPO and DPO, with a table and an HTML report at the end."""
    from cs336_alignment.pipeline import run_demo

    use_threads(threads)
    run_demo(
        seed=seed,
        device=device,
        model=model,
        out=out,
        fresh=fresh,
        from_scratch=from_scratch,
        profile=profile.value,
    )


def pytest_command(extra: list[str], full: bool, cores: int) -> list[str]:
    """The command of `test`: two workers (one on a single core), all of tests/ unless a path is given."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs"]
    if not any(word.startswith("-n") or word == "--pdb" for word in extra):
        command += ["-n", str(max(1, min(2, cores)))]
    if full:
        command.append("--full")
    return command + extra


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="Run the slow tests too.")] = False,
) -> None:
    """Run the tests; what follows is handed to pytest (`test -k dpo`, `test tests/test_ppo.py`)."""
    root = course_root()
    if not (root / "tests").is_dir():
        raise FileNotFoundError(f"there is no folder of tests in {root}: they come with the checkout of the course")
    # One thread for each worker: two workers with two threads each are slower on two cores, not faster.
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
    command = pytest_command(context.args, full, os.cpu_count() or 1)
    raise typer.Exit(subprocess.call(command, cwd=root, env=environment))


def lab_command(root: Path, extra: list[str], as_root: bool) -> tuple[list[str], str]:
    """The command that opens JupyterLab, and a line saying on what: the first lecture, or what there is."""
    start = root / "lectures" / "00_start_here.ipynb"
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    if start.exists():
        message = "JupyterLab opens lectures/00_start_here.ipynb"
        command.append(f"--LabApp.default_url=/lab/tree/{start.relative_to(root).as_posix()}")
    elif any((root / "lectures").glob("*.ipynb")):
        message = "lectures/00_start_here.ipynb is not here: JupyterLab opens the folder of lectures"
        command.append("--LabApp.default_url=/lab/tree/lectures")
    else:
        message = "there are no lectures in this checkout yet: JupyterLab opens its folder"
    if as_root:  # Jupyter refuses to run as root unless told that this is meant
        message += "\nrunning as root: anyone who can reach this JupyterLab can do anything on this computer"
        command.append("--allow-root")
    return command + extra, message


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab; what follows is handed to it (`lab --no-browser`). Ctrl-C twice ends it."""
    root = course_root()
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    command, message = lab_command(root, context.args, as_root)
    typer.echo(message)
    raise typer.Exit(run_until_it_ends(command, root))


def run_until_it_ends(command: list[str], folder: Path) -> int:
    """Run a program that answers Ctrl-C itself (the terminal sends it to both): wait for its own end."""
    process = subprocess.Popen(command, cwd=folder)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


class BenchProfile(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


@app.command()
def bench(
    profile: Annotated[BenchProfile, typer.Option(help="gpu: a larger model, on a CUDA GPU.")] = BenchProfile.cpu,
    only: Annotated[
        str | None, typer.Option(help="Some of sft,rm,dpo,ppo,ragged,sampler,floor; default: all.", metavar="TASKS")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each pair is measured, twice a round.")] = 3,
    others: Annotated[
        int | None, typer.Option(min=0, help="Rounds in which the other variants run too; default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the tables go, without suffix.")] = None,
) -> None:
    """The package beside TRL: the same numbers first, then time and memory (an hour; wants a machine at rest)."""
    root = course_root()
    script = root / "benchmarks" / "side_by_side" / "run.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script} is not here: the benchmarks come with the checkout of the course")
    command = [sys.executable, "-u", str(script), "--profile", profile.value, "--rounds", str(rounds)]
    for name, value in (("--only", only), ("--others", others), ("--out", out)):
        command += [] if value is None else [name, str(value)]
    raise typer.Exit(run_until_it_ends(command, root))


@app.command()
def book(
    out: Annotated[Path | None, typer.Option(help="Where the pages go; default: runs/book in the checkout.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the first page in a browser.")] = False,
) -> None:
    """Make the lectures, glossary, bibliography and reference into pages that need no network."""
    from cs336_alignment.book import build_book

    typer.echo(f"The book: {build_book(out=out, show=show)}")


@app.command()
def train(
    stage: Annotated[Stage, typer.Argument(help="What to train.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="The file of demonstrations or preference pairs.")],
    format: Annotated[Format, typer.Option(help="Its format; auto looks at the first record.")] = Format.auto,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; default: runs/STAGE in the checkout.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: a few minutes' worth.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: each process holds a part of every parameter only.")
    ] = False,
) -> None:
    """Train on a file of your own: Alpaca, FLAN, OpenAssistant or preference pairs. Also under torchrun."""
    from cs336_alignment.distributed import launched
    from cs336_alignment.real_data import train_on_file

    use_threads(threads)
    with launched(device) as own_device:
        train_on_file(
            stage=stage.value,
            data=str(data),
            format=format.value,
            model=model,
            out=str(out or course_root() / "runs" / stage.value),
            seed=seed,
            device=own_device,
            steps=steps,
            sharded=shard,
        )


@world_app.command("show")
def world_show() -> None:
    """Describe the embedded world: its people, facts, topics, splits and documents."""
    from cs336_alignment import world

    world.describe()


@world_app.command("train")
def world_train() -> None:
    """Retrain the base model that the course ships."""
    from cs336_alignment import world_training

    world_training.train(work=course_root() / "runs")


@app.command()
def lectures(
    names: Annotated[list[str] | None, typer.Argument(metavar="[LECTURE]...", help="Such as 09; default: all.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Only those whose outputs came from older code.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Say which would run, and run none.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="On the tiny town, to see that all runs; writes no outputs.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 1,
) -> None:
    """Run the lectures' notebooks from fresh kernels and keep their outputs."""
    from cs336_alignment import lectures as runs

    paths = runs.lecture_paths(names or [])
    if stale:
        paths = runs.stale(paths)
    if list_only:
        typer.echo("\n".join(path.stem for path in paths) or "none")
        return
    if runs.run_lectures(paths, fast, jobs):
        raise typer.Exit(1)


@app.command()
def check(
    assignment: Annotated[str, typer.Argument(help="Such as a4_dpo.")],
    notebook: Annotated[
        Path | None, typer.Argument(help="Your notebook; default: the one in assignments/.", show_default=False)
    ] = None,
) -> None:
    """Run the visible checks on your notebook."""
    from cs336_alignment.grading.shell import check_notebook

    if assignment.endswith(".ipynb"):
        notebook, assignment = Path(assignment), Path(assignment).stem
    if check_notebook(assignment, notebook):
        raise typer.Exit(1)


@app.command()
def grade(
    assignment: Annotated[str, typer.Argument(help="Such as a4_dpo.")],
    student: Annotated[list[str] | None, typer.Option(help="Only this one, again; can be given several times.")] = None,
    exercise: Annotated[list[str] | None, typer.Option(help="Only this exercise, again; the rest stays.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="How many at a time; default: one for each core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Grade again what is graded already.")] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run submissions with your rights where there is no bubblewrap.")
    ] = False,
    course: Annotated[
        Path | None, typer.Option(help="The folder with submitted/ and gradebook.db; default: the checkout.")
    ] = None,
    cell_seconds: Annotated[float, typer.Option(min=1, help="A cell is interrupted after this.")] = 60,
    notebook_seconds: Annotated[float, typer.Option(min=1, help="The time for all cells of a notebook.")] = 300,
) -> None:
    """Grade what is in submitted/ and not graded yet. Stopped at any moment, the same command goes on."""
    gc.disable()  # what is imported stays: looking for garbage meanwhile takes time and finds none
    try:
        from cs336_alignment.grading.grade import grade_assignment, summary
        from cs336_alignment.grading.results import after_grading
        from cs336_alignment.grading.sandbox import Limits
    except ImportError:
        raise typer.BadParameter("this is the students' edition: grading needs the instructors'") from None
    finally:
        gc.enable()

    limits = Limits(cell_seconds=cell_seconds, notebook_seconds=notebook_seconds)
    root = (course or course_root()).resolve()
    batch = grade_assignment(root, assignment, student or (), exercise or (), jobs, force, unsafe, limits)
    typer.echo(summary(batch))
    show_what_follows(after_grading(root, assignment))
    if batch.failed:
        raise typer.Exit(1)


@app.command()
def collect(
    assignment: Annotated[str, typer.Argument(help="Such as a4_dpo.")],
    export: Annotated[Path, typer.Argument(help="A folder or zip: Canvas, Moodle, Blackboard, Gradescope or plain.")],
    students: Annotated[
        Path | None, typer.Option(help="A csv file with a column student and any of name, email, canvas_id, moodle_id.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    zone: Annotated[
        str | None, typer.Option(help="Of Blackboard's times: Europe/Berlin; default: this computer's.")
    ] = None,
    course: Annotated[
        Path | None, typer.Option(help="The folder with submitted/ and gradebook.db; default: the checkout.")
    ] = None,
) -> None:
    """Put submissions as a learning system exports them where they are graded: submitted/STUDENT/ASSIGNMENT/."""
    try:
        from cs336_alignment.grading.collect import collect as collect_submissions
        from cs336_alignment.grading.collect import show
        from cs336_alignment.grading.gradebook import enrol
    except ImportError:
        raise typer.BadParameter("this is the students' edition: grading needs the instructors'") from None

    root = (course or course_root()).resolve()
    result = collect_submissions(export, assignment, root, students, dry_run, zone)
    show(result, dry_run)
    if result.students and not dry_run:
        try:
            enrol(root, result.students)  # so that who handed in nothing is in the lists too
        except ValueError as error:
            typer.echo(f"The files are in place, but the class list is not in the gradebook: {error}", err=True)
            raise typer.Exit(1) from None
        typer.echo(f"The gradebook has the {len(result.students)} students of the class list.")
    if not result.complete:
        raise typer.Exit(1)


@app.command()
def report(
    assignment: Annotated[str, typer.Argument(help="Such as a4_dpo.")],
    course: Annotated[
        Path | None, typer.Option(help="The folder with submitted/ and gradebook.db; default: the checkout.")
    ] = None,
) -> None:
    """Make the list of grades, the feedback pages and the report on the class anew, after grading by hand too."""
    try:
        from cs336_alignment.grading.results import after_grading
    except ImportError:
        raise typer.BadParameter("this is the students' edition: grading needs the instructors'") from None

    show_what_follows(after_grading((course or course_root()).resolve(), assignment))


def show_what_follows(after) -> None:
    """Says where the list of grades and the pages are. after: `results.After`."""
    typer.echo(f"grades    {shown(after.grades)}")
    typer.echo(f"feedback  {shown(after.report.with_name('feedback'))}: {len(after.pages)} pages")
    typer.echo(f"report    {shown(after.report)}")
    for note in after.notes:
        typer.echo(note)
    if after.waiting:
        typer.echo(f"written answers that wait for a person: {after.waiting}; say `report` when they are read")
    if after.alike:
        typer.echo(f"suspiciously alike pairs to look at, at the end of the report: {after.alike}")


@app.command()
def release(
    out: Annotated[Path | None, typer.Option(help="The zip for students; default: runs/release/....zip")] = None,
    closed: Annotated[
        bool, typer.Option("--closed", help="Without the reference: package stripped, lectures as HTML.")
    ] = False,
) -> None:
    """Make the releases in assignments/ from solutions/, and the zip for students."""
    try:
        from cs336_alignment.grading.release import student_zip, write_releases
    except ImportError:
        raise typer.BadParameter("this is the students' edition: releases are made from the instructors'") from None

    for path in write_releases():
        typer.echo(f"wrote {shown(path)}")
    out = out or course_root() / "runs" / "release" / ("students-closed.zip" if closed else "students.zip")
    typer.echo(f"wrote {shown(out)}: {student_zip(out, closed)} files")


@world_app.command("ablate")
def world_ablate(
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Pre-training steps; by default a quarter of the full ones.")
    ] = None,
    profile: Annotated[Profile, typer.Option(help="test is small and quick.")] = Profile.full,
    out: Annotated[Path | None, typer.Option(help="Where the table goes, without suffix.")] = None,
) -> None:
    """Leave out one ingredient of the base model after the other, and see what it was worth (hours)."""
    from cs336_alignment.ablation import ablate

    results = out or course_root() / "benchmarks" / "results" / "ablation"
    typer.echo(ablate(profile.value, list(range(seeds)), steps, course_root() / "runs" / "ablation", results))


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package (and so has a message written for its user)."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents


def explain(error: Exception) -> str:
    """One readable line (or what the message itself has)."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; its exit code. 2: the user can put it right (one line); 130: Ctrl-C. A bug raises."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show must not end a batch
    # What checks notebooks would import this for one kind of web address, none of which is in a notebook: 1.5 seconds.
    sys.modules.setdefault("rfc3987_syntax", None)
    debug = "--debug" in arguments and arguments[0] != "test"  # pytest has a --debug of its own
    if debug:
        arguments.remove("--debug")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments[:1] != ["train"]:
        typer.echo("error: under torchrun only `train` runs in several processes; start this one alone", err=True)
        return USER_ERROR
    try:
        code = app(arguments, prog_name="course.py", standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            how = "the same command without --force" if "--force" in arguments else "the same command"
            typer.echo(f"\nstopped; what was finished is kept, {how} goes on from there", err=True)
        return code
    except typer.Abort:  # Ctrl-C or the end of input at a question
        typer.echo("\nstopped", err=True)
        return 130
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # usage errors: typer prints them itself
            error.show()
            return error.exit_code
        if debug or not (isinstance(error, OSError) or (isinstance(error, ValueError) and is_ours(error))):
            raise
        typer.echo(f"error: {explain(error)}", err=True)
        typer.echo("(--debug shows where it was raised)", err=True)
        return USER_ERROR
