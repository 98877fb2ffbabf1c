"""Tables read by place: the rows of one pass over the file, whatever the line ends, and refusals."""

import pytest

from gbci_fast.data.tables import BLOCK, Table, read_table
from gbci_fast.errors import GBCIError

ROWS = 3 * BLOCK + 5


def content(end):
    """Rows with quoted line ends, letters of several bytes, blanks, and spaces to strip."""
    lines = [f'{i}, x{i} ,"a ""{i}"", ü{end}second line"' for i in range(ROWS)]
    lines.insert(BLOCK, "")
    lines.insert(7, " , , ")
    return end.join(["name,left,right", *lines])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("mark", "last"), [("", ""), ("\ufeff", ""), ("", "\n\n")])
def test_rows_by_place_are_those_of_the_pass(tmp_path, end, mark, last):
    path = tmp_path / "table.csv"
    path.write_bytes((mark + content(end) + last.replace("\n", end)).encode())
    table = Table(path, ("name",))
    assert table.columns == ["name", "left", "right"]
    rows = list(table.scan())
    assert len(table) == len(rows) == ROWS
    for place in (0, ROWS - 1, BLOCK, BLOCK - 1, 2 * BLOCK + 3, 7):
        assert table[place] == rows[place][1]
        assert table[place] == {
            "name": f"{place}",
            "left": f"x{place}",
            "right": f'a "{place}", ü{end}second line',
        }
    assert [row for _, row in read_table(path, ("name",))] == [row for _, row in rows]


def test_a_line_is_counted_where_its_row_ends(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    assert [where.rpartition(", ")[2] for where, _ in read_table(tmp_path / "t.csv", ())] == ["line 3", "line 5"]


def test_rows_that_change_later_are_noticed(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("n\n" + "".join(f"{i:04d}\n" for i in range(ROWS)))
    table = Table(path, ())
    list(table.scan())
    with path.open("r+b") as file:
        file.seek(2 + 5 * BLOCK)
        file.write(b"9999")
    assert table[0] == {"n": "0000"}
    with pytest.raises(GBCIError, match=r"table\.csv has changed since it was checked; run the command again"):
        table[BLOCK]
    assert table[2 * BLOCK] == {"n": f"{2 * BLOCK:04d}"}


def test_a_new_file_under_the_name_does_not_matter(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("n\n1\n2\n")
    table = Table(path, ())
    list(table.scan())
    path.rename(tmp_path / "old.csv")
    path.write_text("n\n7\n")
    assert [table[0], table[1]] == [{"n": "1"}, {"n": "2"}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"n,m\n1,2\n3\n", "line 3 has 1 fields; expected 2"),
        (b"n\n1\n\xff\n", "cannot be read as a table: 'utf-8' codec"),
        (b'n\n1\n"2\n', "cannot be read as a table: unexpected end of data"),
        (b"n,n\n", "has more than one column n; expected one of each"),
        (b"", "has no column n; expected at least n"),
    ],
)
def test_what_is_no_table(tmp_path, text, sentence):
    (tmp_path / "bad.csv").write_bytes(text)
    with pytest.raises(GBCIError, match=rf"bad\.csv,? {sentence}"):
        list(read_table(tmp_path / "bad.csv", ("n",)))
