"""The judge inside nbgrader's own commands: `nbgrader autograde` with our nbgrader_config.py, and Formgrader's button.

`JudgedExecute` stands in the place of nbgrader's Execute; nothing else of nbgrader changes. `course.py grade` does the
same with several workers and one writer (grade.py).
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbgrader.preprocessors import Execute
from traitlets import Bool, Float, Unicode

from cs336_alignment.grading.editions import kernel_edition
from cs336_alignment.grading.exercise import exercises, stripped_of
from cs336_alignment.grading.judge import course_secret, judge, preloaded
from cs336_alignment.grading.kernel import FONTS
from cs336_alignment.grading.ordinary import OrdinaryServer
from cs336_alignment.grading.rescue_files import files_beside
from cs336_alignment.grading.sandbox import LIMITS, Limits, Server
from cs336_alignment.paths import course_root

SECRET = ".course/grading-secret"


def server_for(
    assignment: str, limits: Limits = LIMITS, unsafe: bool = False, number: int = 0
) -> Server | OrdinaryServer:
    """A server whose kernels have what an assignment needs and nothing that gives answers. Raises: NoSandbox."""
    folder = Path(tempfile.mkdtemp(prefix="kernel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    kernel_edition(stripped_of(assignment), folder)
    if sys.platform != "linux":
        return OrdinaryServer(folder, limits, unsafe)
    copy_fonts(folder / FONTS.name)
    path = course_root() / "assignments" / assignment / f"{assignment}.ipynb"
    modules = preloaded(nbformat.read(path, as_version=4)) if path.is_file() else []
    return Server(folder, modules, limits, unsafe, number)


def copy_fonts(folder: Path) -> None:
    """What matplotlib knows of this computer's fonts, so that no submission that plots has to look for them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
    found = list(Path(os.environ.get("MPLCONFIGDIR") or cache).glob("fontlist-*.json"))
    if found:
        folder.mkdir()
        for path in found:
            shutil.copy(path, folder)


class JudgedExecute(Execute):
    """Runs a submission in the sandbox, with probes in place of hidden tests, and judges what they bring back.

    Cells are known by their nbgrader id: the id of a cell with points is its exercise's name; cells whose ids start
    with "check-" or "experiment-" are not run. Ids and sources of locked cells are the release's, restored before this
    runs, so what a submission says about its own cells does not count. Tags do not count either.
    A notebook without such exercises is executed as nbgrader always does, without a sandbox.
    """

    secret_file = Unicode(SECRET, help="What seeds the hidden cases; beside the gradebook.").tag(config=True)
    unsafe = Bool(False, help="Run submissions with your rights where there is no bubblewrap.").tag(config=True)
    cell_seconds = Float(Limits.cell_seconds, help="A cell is interrupted after this.").tag(config=True)
    notebook_seconds = Float(Limits.notebook_seconds, help="The time for all cells of a notebook.").tag(config=True)

    servers: dict[tuple, Server] = {}  # of this process: one for an assignment and its limits

    def preprocess(self, nb, resources, km=None):
        identity = resources["nbgrader"]
        try:
            graded = [e for e in exercises(identity["assignment"]) if not e.optional]
        except ValueError:  # an assignment that is not of this kind
            self.log.warning("%s has no exercises of this course: it runs without a sandbox", identity["assignment"])
            return super().preprocess(nb, resources, km)
        database = identity["db_url"].removeprefix("sqlite:///")
        root = Path(database).parent if database != identity["db_url"] else Path.cwd()
        secret = course_secret(root / self.secret_file)
        folder = Path(resources.get("metadata", {}).get("path") or os.devnull)
        judged = judge(nb, graded, identity["student"], secret, self.server(identity["assignment"]),
                       files_beside(folder, None))  # fmt: skip
        for crash in judged.crashes:
            self.log.warning("%s, cell %s: %s", identity["student"], crash["cell"], crash["why"])
        return nb, resources

    def server(self, assignment: str) -> Server:
        """The server for an assignment, which serves all submissions of a batch."""
        key = (assignment, self.cell_seconds, self.notebook_seconds, self.unsafe)
        if key not in self.servers:
            limits = Limits(cell_seconds=self.cell_seconds, notebook_seconds=self.notebook_seconds)
            self.servers[key] = server_for(assignment, limits, self.unsafe)
            atexit.register(self.servers[key].close)
        return self.servers[key]
