"""The module that a checkpoint's model_index.json names as the student's: see `gbci_fast.model.few_step`."""

from diffusers import ModelMixin  # diffusers looks up here how the class is loaded

from gbci_fast.model.few_step import FewStepLoRA

__all__ = ["FewStepLoRA", "ModelMixin"]
