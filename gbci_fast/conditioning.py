"""The module that a checkpoint's model_index.json names as the conditioner's: see `gbci_fast.model.conditioning`."""

from diffusers import ModelMixin  # diffusers looks up here how the class is loaded

from gbci_fast.model.conditioning import ConditionEncoder

__all__ = ["ConditionEncoder", "ModelMixin"]
