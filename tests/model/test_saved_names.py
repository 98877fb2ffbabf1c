"""Module names in checkpoints are a file format: they must load although the modules have moved."""

import importlib
import json
import pickle

import pytest

from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS

SAVED = {
    "conditioner": ("gbci_fast.conditioning", ConditionEncoder),
    "few_step": ("gbci_fast.few_step", FewStepLoRA),
}


@pytest.mark.parametrize("component", SAVED)
def test_a_checkpoint_names_its_classes_as_the_first_ones_did(component):
    module, kind = SAVED[component]
    index = json.loads((PACKAGED_WEIGHTS / "model_index.json").read_text())
    assert index[component] == [module, kind.__name__] == [kind.__module__, kind.__name__]
    assert getattr(importlib.import_module(module), kind.__name__) is kind
    assert pickle.loads(pickle.dumps(kind)) is kind
