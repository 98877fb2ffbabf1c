"""Type errors of each room against the stored budget; `make lint`.

The checker is basedpyright, in pyright's basic mode, as `[tool.pyright]` of pyproject.toml configures it. A room with
more errors than tests/type_errors.txt allows ends the run with exit status 1 and with the room's errors.

    python tests/check_types.py [--lower]

    --lower     write the counts of rooms that now have fewer errors into tests/type_errors.txt
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("type_errors.txt")


def room_of(path: Path) -> str:
    """`gbci_fast/fast`, `kernels/ops`, `training`; `gbci_fast` for the modules beside the rooms."""
    folders = path.parent.parts
    return "/".join(folders[:2])


def read_budget() -> Counter[str]:
    """Allowed errors by room. A room without a line is allowed none."""
    return Counter({room: int(count) for room, count in map(str.split, BUDGET.read_text().splitlines())})


def write_budget(counts: Counter[str]) -> None:
    BUDGET.write_text("".join(f"{room} {count}\n" for room, count in sorted(counts.items()) if count))


def check(*options: str) -> list[dict]:
    """The checker's diagnostics, by default of what pyproject.toml includes.

    Raises:
        SystemExit: the checker did not run to its end.
    """
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{done.stdout}{done.stderr}check_types: basedpyright ended with status {done.returncode}")
    return json.loads(done.stdout)["generalDiagnostics"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares each room's type errors with tests/type_errors.txt.")
    parser.add_argument("--lower", action="store_true", help="write the counts that fell into the budget")
    lower = parser.parse_args().lower

    errors = [(Path(d["file"]).relative_to(ROOT), d) for d in check() if d["severity"] == "error"]
    counts, budget = Counter(room_of(path) for path, _ in errors), read_budget()
    risen = {room for room in counts if counts[room] > budget[room]}
    for path, error in errors:
        if room_of(path) in risen:
            message = error["message"].replace("\n", "\n    ")
            print(f"{path}:{error['range']['start']['line'] + 1}: {message} ({error.get('rule', 'syntax')})")
    for room in sorted(risen):
        print(f"{room}: {counts[room]} type errors; tests/type_errors.txt allows {budget[room]}")
    fallen = {room for room in budget if counts[room] < budget[room]}
    for room in sorted(fallen):
        print(f"{room}: {counts[room]} type errors instead of {budget[room]}")
    if fallen and lower:
        write_budget(Counter({room: min(counts[room], budget[room]) for room in budget}))
    elif fallen:
        print("lower the budget: .venv/bin/python tests/check_types.py --lower")
    if not risen:
        print(f"{sum(counts.values())} type errors, none beyond the budget")
    return int(bool(risen))


if __name__ == "__main__":
    sys.exit(main())
