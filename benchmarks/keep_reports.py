"""Stores evaluation reports beside the benchmarks' rows: summary figures only, nothing about single images.

    python benchmarks/keep_reports.py out/evaluation/distribution.json --output benchmarks/results/evaluation

Lists of images, crops and suspects are left out, because they name files of a data set. Long lists of numbers (of
single splits, lesions or points of a curve) are left out, too; their summaries stay.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.report import read_report
from gbci_fast.jobs.files import atomically

NAMING = ("images", "crops", "suspects", "skipped")
LONGEST = 20  # entries of a list of numbers that is kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="of `gbci-fast evaluate`, JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="takes files of the same names")
    args = parser.parse_args()
    try:
        reports = {path.name: read_report(path) for path in args.reports}
    except GBCIError as error:
        print(error, file=sys.stderr)
        return 1
    for name, report in reports.items():
        text = json.dumps(summary(report), indent=1, allow_nan=False) + "\n"
        atomically(args.output / name, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return 0


def summary(value: Any) -> Any:
    """The report without the lists that `left_out` names, at any depth; numbers are rounded to six digits."""
    if isinstance(value, dict):
        return {name: summary(entry) for name, entry in value.items() if not left_out(name, entry)}
    if isinstance(value, list):
        return [summary(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def left_out(name: str, entry: Any) -> bool:
    """Whether an entry of a report is a list that names files, or a long list of numbers."""
    return isinstance(entry, list) and (name in NAMING or (len(entry) > LONGEST and not isinstance(entry[0], dict)))


if __name__ == "__main__":
    sys.exit(main())
