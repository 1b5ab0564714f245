"""nbgrader's configuration for this course: where things are, and the judge in the place of plain execution."""

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "cs336_alignment"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "assignments"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", ".pytest_cache", "*.json"]

c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("your code here")'}
c.ClearSolutions.text_stub = "*Your answer here.*"
c.IncludeHeaderFooter.header = ""
c.NbGrader.logfile = ""

# The judge: hidden cases run outside the student's kernel. See cs336_alignment/grading/judge.py.
c.Autograde.autograde_preprocessors = [
    "cs336_alignment.grading.judge.JudgedExecute",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.OverwriteCells.add_missing_cells = True  # a cell that a student deleted comes back, and is graded
c.Execute.timeout = 120  # seconds a cell
c.Execute.extra_arguments = ["--log-level=ERROR", "--HistoryManager.hist_file=:memory:"]
