"""`lisatune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import quiet_libraries
from lisatune.errors import UserError


def report(run: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.")]) -> None:
    """Write report.html for a finished run or a comparison.

    It needs the extra 'report': pip install '.\\[report]' in a clone.

    Example:
        lisatune report runs/a
    """
    compared = (run / "comparison.json").is_file()
    if not compared and not (run / "summary.json").is_file():
        raise UserError(
            f"{run}: holds no finished run (no summary.json): give the folder of a finished run or of a comparison"
        )
    quiet_libraries()
    try:
        if compared:
            from lisatune.compare.page import write_comparison as write
        else:
            from lisatune.run.report import write_report as write
    except ImportError as error:
        from lisatune.errors import missing_package

        raise missing_package("matplotlib", "the report", "report") from error
    print(write(run))
