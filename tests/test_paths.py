from pathlib import Path

from cs336_alignment.paths import course_root, demo_folder, shown


def test_each_kind_of_demo_has_a_folder_of_its_own():
    kinds = [
        ("full", 0, None, False), ("full", 1, None, False), ("test", 0, None, False),
        ("full", 0, "models/mine", False), ("full", 0, None, True),
    ]  # fmt: skip
    folders = [demo_folder(*kind) for kind in kinds]
    assert folders[0] == "demo" and len(set(folders)) == len(kinds)


def test_saved_output_names_no_folder_above_the_checkout():
    assert shown(course_root() / "runs" / "demo") == str(Path("runs") / "demo")
    assert shown(Path("/elsewhere/x")) == str(Path("/elsewhere/x"))
    assert shown(Path("here")) == "here"
