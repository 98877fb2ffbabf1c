"""`gbci-fast doctor`: what runs on this machine, and why the rest does not."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gbci_fast.fast.doctor import Report, Usability

EXAMPLE = """\
example:
  gbci-fast doctor
  gbci-fast doctor --json | jq .runtimes
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell what runs on this machine, and why the rest does not",
        description="Tell which runtimes, operators, tiers and dtypes can be used on this machine, why not the others, "
        "and what the fast path would choose. The exit status is 0 if the eager pipeline works, and 1 otherwise.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the report."""
    from rich.console import Console

    from gbci_fast.fast.doctor import examine

    report = examine()
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        _print(report, Console(soft_wrap=True, markup=False, highlight=False))
    if not report.eager_works:
        sys.exit(1)


def _print(report: "Report", console: "Console") -> None:
    from gbci_fast.fast.tensorrt.flavor import FLAVORS

    cpu, versions = report.cpu, report.versions.items()
    console.print(", ".join(f"{name} {version}" for name, version in versions if version is not None))
    for name in (name for name, version in versions if version is None):
        install = FLAVORS[name].install if name in FLAVORS else f"pip install {name}"
        console.print(f"{name} is not installed: {install}")
    console.print(
        f"CPU: {cpu['machine']}, {cpu['threads']} threads on {cpu['cores']} cores; the extension uses "
        f"{cpu['extension_uses']}; {'bfloat16' if cpu['bfloat16_units'] else 'no fast bfloat16'} units"
    )
    for gpu in report.gpus:
        console.print(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    console.print(f"packaged checkpoint: {'; '.join(report.checkpoint) or 'the eager pipeline samples from it'}")
    console.print("accelerate chooses for it:")
    for line in report.choice:
        console.print(f"  {line}")
    _print_table(
        {"runtime": report.runtimes, "operator": report.ops, "tier, dtype": report.tiers},
        console,
    )


def _print_table(kinds: "dict[str, list[Usability]]", console: "Console") -> None:
    """Prints a row per name and a column per device. Reasons are numbered, and listed once below the table."""
    from rich.table import Table

    notes: dict[str, int] = {}

    def cell(usability: "Usability") -> str:
        numbers = [notes.setdefault(reason, len(notes) + 1) for reason in usability.reasons]
        return "yes" if usability.usable else f"no {numbers}"

    table = Table("", "", "cpu", "cuda")
    for kind, group in kinds.items():
        cells: dict[str, dict[str, str]] = {}
        for one in group:
            cells.setdefault(one.name, {})[one.device] = cell(one)
        for i, (name, row) in enumerate(cells.items()):
            table.add_row("" if i else kind, name, row["cpu"], row["cuda"])
        table.add_section()
    console.print(table)
    for reason, number in notes.items():
        console.print(f"[{number}] {reason}")
