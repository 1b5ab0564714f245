"""Tables of results over seeds, in Markdown. Notebooks show theirs with `notebook.table`."""

import torch

from cs336_alignment.evaluate import mean_and_error


def over_seeds(values: list[float], form: str = "{:.3f}") -> str:
    """Mean ± standard error over seeds; of one seed its value alone."""
    mean, error = mean_and_error(torch.tensor(values, dtype=torch.float64))
    return f"{form.format(mean)} ± {form.format(error)}" if len(values) > 1 else form.format(mean)


def markdown(columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    """The lines of a table; rows by their names, which stand in a first column without a head."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
