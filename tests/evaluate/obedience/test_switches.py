"""A switch tells one attribute differently, in attributes and words, and nothing else."""

from dataclasses import fields, replace

import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.data.lexicon import shape_and_margin
from gbci_fast.evaluate.obedience.switches import CONTROL, NONSENSE, OWN, SWITCHES, TELLINGS
from gbci_fast.evaluate.readers import TASKS
from gbci_fast.model.conditioning import ConditionEncoder

CHANGED = {
    "margin": {"margin", "shape"},
    "shape": {"shape"},
    "BI-RADS": {"finding_birads", "breast_birads"},
    "pathology": {"pathology"},
    "density": {"breast_density"},
    "calcification": {"finding_categories", "margin", "shape"},
    "no finding": {"finding_categories", "finding_birads", "margin", "shape"},
    CONTROL: set(),
}


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_only_the_named_attributes_change(switch, disk_case):
    zero, one = (TELLINGS[name](disk_case(0, True)) for name in switch.tellings)
    different = {
        f.name for f in fields(Attributes) if getattr(zero.attributes, f.name) != getattr(one.attributes, f.name)
    }
    assert different == CHANGED[switch.name]
    assert zero != one


@pytest.mark.parametrize("telling", ["circumscribed", "spiculated", "oval", "irregular"])
def test_words_and_attributes_say_the_same(telling, disk_case):
    told = TELLINGS[telling](disk_case(0, True))
    assert shape_and_margin(told.report) == (told.attributes.shape, told.attributes.margin)
    assert telling in (told.attributes.shape, told.attributes.margin)


def test_real_classes_are_those_of_the_readers():
    switches = {switch.task: switch for switch in SWITCHES if switch.task}
    assert set(switches) <= set(TASKS)
    assert switches["margin"].real(Attributes(margin="spiculated")) is True
    assert switches["margin"].real(Attributes(margin="circumscribed")) is False
    assert switches["margin"].real(Attributes(margin="indistinct")) is None
    density = next(switch for switch in SWITCHES if switch.name == "density")
    assert [density.real(Attributes(breast_density=d)) for d in "ABCD"] == [False, None, None, True]


def test_the_control_adds_one_meaningless_word(disk_case):
    case = disk_case(0, True)
    own, control = TELLINGS[OWN](case), TELLINGS[CONTROL](case)
    assert control.report == f"{own.report}; {NONSENSE}"
    encoder = ConditionEncoder(image_size=32, patch_size=16, width=32, depth=1, report_depth=1, pooled_dim=16)
    known = {i for tell in TELLINGS for i in encoder.tokenize(TELLINGS[tell](case).report) if tell != CONTROL}
    (word,) = encoder.tokenize(NONSENSE)
    assert word not in known


def test_a_lesion_without_a_report_gets_only_the_added_word(disk_case):
    case = replace(disk_case(0, True), report=None)
    assert TELLINGS[CONTROL](case).report == NONSENSE
    assert TELLINGS["BI-RADS 5"](case).report is None
    assert TELLINGS["no finding"](case).report is None
