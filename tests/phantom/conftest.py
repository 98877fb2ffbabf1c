"""Fixtures: a finding of a chosen category in a breast of a chosen density, and rows of tables."""

import csv
import dataclasses
from pathlib import Path

import pytest

from gbci_fast.phantom.findings import PhantomFinding, draw_findings
from gbci_fast.phantom.placement import Room
from gbci_fast.phantom.population import DENSITIES
from gbci_fast.phantom.study import (
    BreastPlan,
    PhantomImage,
    StudyPlan,
    draw_study,
    make_grid,
    render_image,
    stream,
)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def plan_breast(
    index: int, density: str = "B", findings: tuple[PhantomFinding, ...] = ()
) -> tuple[StudyPlan, BreastPlan]:
    """The left breast of study ``index`` with the given density and findings instead of the drawn ones."""
    plan = dataclasses.replace(draw_study(0, index), breast_density=density)
    breast = plan.breasts[0]
    shapes = {
        view: dataclasses.replace(shape, thickness=DENSITIES[density][2]) for view, shape in breast.shapes.items()
    }
    return plan, dataclasses.replace(breast, shapes=shapes, findings=findings)


def draw_finding(category: str, index: int, malignant: bool = True) -> PhantomFinding:
    """A primary finding without associated ones, for the breast of `plan_breast`."""
    _, breast = plan_breast(index)
    return draw_findings(stream("test", category, index), [(category, malignant)], Room(breast.shapes))[0]


def render_with(
    *findings: PhantomFinding, index: int, density: str = "B", view: str = "CC", size: int = 256, twins: bool = True
) -> PhantomImage:
    return render_image(*plan_breast(index, density, findings), view, make_grid(size), twins)


@pytest.fixture(scope="session")
def tools():
    """The functions of this file: test modules of this suite cannot import one another."""

    class Tools:
        rows = staticmethod(read_rows)
        breast = staticmethod(plan_breast)
        finding = staticmethod(draw_finding)
        render = staticmethod(render_with)

    return Tools
