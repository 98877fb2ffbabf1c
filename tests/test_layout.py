"""One room per trade: every room imports rooms before it, none after it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"kernels/ops": "gbci_fast.ops", "training": "gbci_fast.training"}
ROOMS = [
    "errors",
    "choices",
    "options",
    "attributes",
    "jobs",
    "dicom",
    "data",
    "phantom",
    "lesion",
    "model",
    "ops",
    "fast",
    "evaluate",
    "training",
    "generate",
    "cli",
]
FORMAT = {"conditioning", "few_step"}  # modules that checkpoints name, beside the rooms


def modules():
    """(dotted name, path) of every module of the package."""
    for path in sorted((ROOT / "gbci_fast").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for folder, package in MAPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]), path


def imported(path):
    """Dotted names below gbci_fast that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "gbci_fast":
            yield from (f"gbci_fast.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def room_of(name):
    """The room of a dotted name; None outside of the package, and for its public names and version."""
    top, *below = name.split(".")
    return below[0] if top == "gbci_fast" and below and below[0] in ROOMS else None


def test_no_import_runs_up():
    up = []
    for name, path in modules():
        room = room_of(name)
        if room is None:
            assert name == "gbci_fast.__init__" or name.split(".")[1] in FORMAT, f"{name} is in no room"
            continue
        up += [
            f"{name} imports {other}"
            for other in imported(path)
            if (there := room_of(other)) is not None and ROOMS.index(there) > ROOMS.index(room)
        ]
    assert up == []


def test_no_file_is_longer_than_500_lines():
    files = [
        path
        for folder in ("gbci_fast", "kernels", "training", "benchmarks", "tests", "csrc")
        for path in (ROOT / folder).rglob("*")
    ]
    code = [path for path in files if path.suffix in (".py", ".cpp", ".h", ".cu")]
    assert len(code) > 300
    assert [path for path in code if len(path.read_text().splitlines()) > 500] == []
