"""An evaluation as text: one row a backbone, one column a figure."""

from collections.abc import Sequence

from curation.dinov2.evaluate.evaluation import Evaluation, Row


def lines(found: Evaluation) -> list[str]:
    """Return the table, what it was measured on, and what was left out."""
    header = ["", *_columns(found.rows[0])]
    cells = [header, *([row.name, *_columns(row).values()] for row in found.rows)]
    table = _aligned(cells)
    about = f"{found.num_test} images to test on"
    if found.num_classes:
        about = f"{found.num_classes} classes; {found.num_train} images to learn from, {about}; accuracies in %"
    return [about, "", *table, *([""] if found.notes else []), *(f"note: {note}" for note in found.notes)]


def _columns(row: Row) -> dict[str, str]:
    columns = {f"k-NN {k}": f"{100 * accuracy:.1f}" for k, accuracy in row.knn.items()}
    if row.linear:
        head = row.linear[0]
        columns["linear"] = f"{100 * head.test:.1f}"
        columns["its head"] = f"lr {head.learning_rate:g}, {head.blocks} cls{' + patches' if head.pooled else ''}"
    if row.logistic is not None:
        columns["logistic"] = f"{100 * row.logistic.test:.1f}"
    if row.rankme is not None:
        columns["RankMe"] = f"{row.rankme:.1f}"
        columns["α-ReQ"] = "–" if row.alpha_req is None else f"{row.alpha_req:.2f}"
    return columns


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]
