"""What cells of the lectures and assignments use: equations that are checked aloud, and figures with words.

Not for training or losses: a notebook imports those from the modules that it is about.
"""

import io

import torch
from IPython.display import display
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

# Figures bring their own light background, so they read the same on a light and on a dark page. Colours that
# colour-blind readers tell apart (Okabe and Ito), in the order of use; a line style or marker should differ too.
STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 120,
    "figure.facecolor": "#fcfcfa",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "#fcfcfa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.prop_cycle": "cycler('color', ['0072B2', 'D55E00', '009E73', 'CC79A7', 'E69F00', '56B4E9', '000000'])",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def holds(equation: str, left, right, tolerance: float = 1e-6) -> bool:
    """Checks that two sides of an equation agree, and says so: `assert holds("9.4", left, right)`.

    left, right: tensors or numbers of shapes that broadcast; equal infinities agree, NaN agrees with nothing.
    tolerance: for the largest difference, relative to the largest finite absolute value, if that is above 1.
    Raises: AssertionError with the largest difference if they do not agree.
    """
    left, right = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (left, right))
    left, right = torch.broadcast_tensors(left, right)
    difference = torch.where(left == right, 0.0, (left - right).abs())
    finite = torch.cat([left, right]).flatten() if left.dim() else torch.stack([left, right])
    finite = finite[finite.isfinite()].abs()
    scale = max(1.0, finite.max().item()) if len(finite) else 1.0
    largest = difference.max().item() if difference.numel() else float("nan")
    label = f"({equation})" if equation[:1].isdigit() else equation
    if not largest <= tolerance * scale:
        raise AssertionError(f"{label} does not hold: the two sides differ by up to {largest:.3g}")
    print(f"{label} holds; largest difference {largest:.1e}")
    return True


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 3.6, **kwargs):
    """A figure in the course's style and its axes, as `matplotlib.pyplot.subplots` returns them; inches."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(rows, columns, **kwargs)


def show(figure: Figure, alt: str) -> None:
    """Puts a figure into the notebook, with a description for whoever cannot see it.

    alt: what the figure shows, in one to three sentences that make sense alone.
    Raises: ValueError without a description.
    """
    if not alt.strip():
        raise ValueError("a figure needs alternative text: say what one sees in it")
    file = io.BytesIO()
    for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
        legend.set_frame_on(False)  # the style is in force while a figure is made and saved, not between
    with rc_context(STYLE):
        figure.savefig(file, format="png", metadata={"Software": None})
    data = {"image/png": file.getvalue(), "text/plain": alt}
    width = round(figure.get_figwidth() * 100)
    display(data, metadata={"image/png": {"alt": alt, "width": width}}, raw=True)


def table(rows: list[dict], digits: int = 3) -> None:
    """Shows rows, all with the same keys, as a table; numbers rounded to so many digits behind the point."""
    columns = list(rows[0])

    def text(value) -> str:
        if isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, float):
            return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero
        value = str(value).replace("|", "\\|")
        return value if "`" in value else value.replace("<", "&lt;")  # or "<end>" would be a tag, and vanish

    lines = ["| " + " | ".join(map(text, columns)) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(text(row[column]) for column in columns) + " |" for row in rows]
    markdown = "\n".join(lines)
    display({"text/markdown": markdown, "text/plain": markdown.replace("&lt;", "<")}, raw=True)
