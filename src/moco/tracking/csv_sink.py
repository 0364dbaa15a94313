"""A run's metrics as a table, for spreadsheets and scripts: metrics.csv in the run's folder, a row for each step."""

from __future__ import annotations

from pathlib import Path

from moco.csv_files import csv_text
from moco.files import write_text
from moco.tracking.metric_log import NAME, metric_history

TABLE = "metrics.csv"


class CsvSink:
    """Writes the whole table anew, which takes milliseconds for thousands of steps. A run that goes on from a state has
    the rows of its last way alone, as reports have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def replay(self, again: bool = False) -> None:
        """Write the table; `again` makes no difference. Raises UserError where it cannot be written."""
        rows: dict[int, dict[str, float]] = {}
        for line in metric_history(self.folder / NAME):
            rows.setdefault(line["step"], {}).update(line["metrics"])
        names = sorted({name for row in rows.values() for name in row})
        table: list[list[object]] = [["step", *names]]
        table += [[step, *(row.get(name) for name in names)] for step, row in rows.items()]
        write_text(self.folder / TABLE, csv_text(table))

    def explain(self, error: BaseException) -> str:
        """Return what went wrong, in one line."""
        return f"{self.folder / TABLE}: {' '.join(str(error).split()) or type(error).__name__}"
