"""One file an exercise; see `grading/exercise.py`. Students do not get this folder."""
