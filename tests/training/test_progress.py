"""What a long stage says in a log, where a bar cannot move."""

import pytest

from gbci_fast.training.progress import counting


@pytest.mark.parametrize(("total", "lines"), [(3, [1, 2, 3]), (40, list(range(4, 41, 4))), (0, [])])
def test_a_log_has_up_to_ten_lines(total, lines, capsys):
    with counting("encoding", total) as advance:
        for _ in range(total):
            advance()
    assert capsys.readouterr().out == "".join(f"encoding {line}/{total}\n" for line in lines)
