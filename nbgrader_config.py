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

# The sanitiser: whatever was handed in is read and put on the release's cells. See cs336_alignment/grading/rescue.py.
c.Autograde.pre_convert_hook = "cs336_alignment.grading.nbgrader_hooks.add_right_name"
c.Autograde.exporter_class = "cs336_alignment.grading.nbgrader_hooks.RescueExporter"

# The judge: submissions run in a sandbox and are judged outside it. See cs336_alignment/grading/judge.py.
c.Autograde.autograde_preprocessors = [
    "cs336_alignment.grading.autograde.JudgedExecute",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "cs336_alignment.grading.late.LateDays",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.GenerateFeedback.preprocessors = [
    "cs336_alignment.grading.late.LateDays",  # again: points given by hand count too
    "nbgrader.preprocessors.GetGrades",
    "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
]
c.OverwriteCells.add_missing_cells = True  # a cell that a student deleted comes back, and is graded

# Late days: as it stands, being late costs nothing. See cs336_alignment/grading/late.py.
# c.LateDays.free_days = 5  # for each student over the whole course
# c.LateDays.percent_per_day = 10  # of the score, for each started day after them
# c.LateDays.grace_minutes = 15
