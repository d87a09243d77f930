"""Text tables of all commands. The optional package `tabulate` is imported on use."""

from collections.abc import Sequence

from hkd_det.errors import import_package


def format_table(
    rows: Sequence[Sequence[str]],
    headers: Sequence[str] = (),
    style: str = "plain",
    left_columns: int = 1,
    align: Sequence[str] | None = None,
) -> str:
    """Format rows as a table with aligned columns.

    Args:
        rows: Cells of each row, as text. All rows have the same length.
        headers: Titles of the columns.
        style: Table format of the package tabulate: `plain` for the terminal, `github` for Markdown.
        left_columns: Number of columns that are aligned to the left; the others are aligned to the right.
        align: `left` or `right` for each column, instead of `left_columns`.

    Returns:
        The table, without trailing spaces and line break.

    Raises:
        UnavailableError: The package tabulate is not installed.
    """
    tabulate = import_package("tabulate").tabulate
    if style == "plain" and headers:  # as a row: tabulate widens the columns below a header
        rows, headers = [headers, *rows], ()
    num_columns = max((len(row) for row in (headers, *rows)), default=0)
    align = align or tuple("left" if column < left_columns else "right" for column in range(num_columns))
    table = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align if rows else None)
    return "\n".join(line.rstrip() for line in table.splitlines())
