"""Fillings: the autoencoder's reconstruction is pasted as the pipeline pastes a painting."""

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.painting import PaintSettings, paint, reconstruct


def case():
    rows, columns = np.indices((64, 64))
    lesion = np.hypot(rows - 30, columns - 34) < 9
    return LesionCase(
        root="set",
        image_id="image",
        number=0,
        patient="set/p",
        split="training",
        seed=1,
        image=np.full((64, 64), 20000, np.uint16),
        breast=np.ones((64, 64), bool),
        lesion=lesion,
        mask=np.hypot(rows - 30, columns - 34) < 12,
        attributes=Attributes(),
        report=None,
    )


def test_a_reconstruction_is_pasted_as_a_painting_is(tiny_pipeline, tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(pipe, "decode_latents", lambda latents: torch.ones(len(latents), 1, 64, 64))
    cases = [case()]
    (painted,) = paint(pipe, cases, PaintSettings(steps=1), weights="w", folder=tmp_path / "painted")
    (pasted,) = reconstruct(pipe, cases, 1)
    np.testing.assert_array_equal(pasted, painted)
    np.testing.assert_array_equal(pasted[~cases[0].mask], cases[0].pixels[~cases[0].mask])
    assert len(np.unique(pasted)) == 4  # original, white, and two steps at the mask's edge
