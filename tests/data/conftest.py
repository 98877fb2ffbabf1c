"""`make_root`: the tables of a VinDr-layout data set."""

import pytest

from gbci_fast.data.vindr import BREAST_TABLE, FINDING_TABLE

BREAST = {
    "study_id": "s1",
    "series_id": "e1",
    "image_id": "i1",
    "laterality": "L",
    "view_position": "CC",
    "height": "100",
    "width": "80",
    "breast_birads": "BI-RADS 2",
    "breast_density": "DENSITY C",
    "split": "training",
}
FINDING = {
    **BREAST,
    "finding_categories": "['Mass']",
    "finding_birads": "BI-RADS 4",
    "xmin": "10",
    "ymin": "20.5",
    "xmax": "30",
    "ymax": "40",
}


def write_table(path, rows, columns):
    def quoted(value):
        return f'"{value}"'

    lines = [",".join(columns), *(",".join(quoted(row[column]) for column in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def make_root(tmp_path):
    """`make_root(breast_rows, finding_rows)` writes the tables; each row is what differs from the sample row."""

    def make(breast=({},), findings=None, columns=()):
        write_table(tmp_path / BREAST_TABLE, [BREAST | row for row in breast], [*BREAST, *columns])
        if findings is not None:
            write_table(tmp_path / FINDING_TABLE, [FINDING | row for row in findings], [*FINDING, *columns])
        return tmp_path

    return make
