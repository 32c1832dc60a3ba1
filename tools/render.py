"""Numbers and tables as the tools print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB": binary units, three significant digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def count_text(count: float) -> str:
    """1234567 -> "1.23 M": decimal units, three significant digits."""
    value = float(count)
    for unit in ("", "K", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} P"


def table_of(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None
) -> Table:
    """A rich table; every column but the first is aligned to the right."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table
