"""The ordinary kernel: slow, but it says the same as the sandbox."""

import pytest
from submissions import ASSIGNMENT, AUTOMATIC, release, solved

from cs336_alignment.grading.editions import kernel_edition
from cs336_alignment.grading.exercise import exercises, stripped_of
from cs336_alignment.grading.judge import judge
from cs336_alignment.grading.ordinary import OrdinaryServer
from cs336_alignment.grading.sandbox import Died, Limits, NoSandbox

GRADED = [e for e in exercises(ASSIGNMENT) if not e.optional]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edition")
    kernel_edition(stripped_of(ASSIGNMENT), folder)
    return OrdinaryServer(folder, Limits(cell_seconds=30), unsafe=True)


def test_it_wants_to_hear_that_it_is_meant(tmp_path):
    with pytest.raises(NoSandbox, match="--unsafe"):
        OrdinaryServer(tmp_path)


@pytest.mark.parametrize("notebook, points", [(solved(), AUTOMATIC), (release(), 0)], ids=["solved", "empty"])
def test_points_are_the_same(server, notebook, points):
    judged = judge(notebook, GRADED, "ada", "secret", server)
    assert sum(score.points for score in judged.scores.values()) == points and judged.crashes == []


def test_errors_interrupts_and_deaths_are_heard_of(server):
    with server.run({"mine.py": b"X = 3"}) as session:
        outputs, _ = session.step({"code": "import mine\nprint('a')\nmine.X"}, 30)
        assert [o["output_type"] for o in outputs] == ["stream", "execute_result"]
        assert session.step({"code": "1 / 0"}, 30)[0][0]["ename"] == "ZeroDivisionError"
        assert session.step({"code": "import time\ntime.sleep(60)"}, 1)[0][-1]["ename"] == "TimeoutError"
        assert session.step({"probe": "absent", "cases": []}, 30)[0][0]["ename"] == "NameError"
        with pytest.raises(Died, match="the kernel died"):
            session.step({"code": "import os\nos._exit(1)"}, 2)
