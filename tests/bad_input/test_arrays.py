"""Arguments of `GBCIPipeline` that cannot be: whatever they are, an image or one sentence."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from gbci_fast.errors import GBCIError
from gbci_fast.training.ldm import build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

SIDE = 32


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    made = build_pipeline(ldm_preset("tiny")[0], build_vae(vae_preset("tiny")[0]).eval(), SIDE)
    made.set_progress_bar_config(disable=True)
    # What is looked at happens before and after the networks.
    made._denoiser = lambda conditioning, constant: lambda latents, t: latents
    made.decode_latents = lambda latents: torch.full((len(latents), 1, SIDE, SIDE), 0.5)
    return made


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({})
)
dtypes = st.sampled_from([np.uint8, np.uint16, np.int16, np.int64, np.float16, np.float32, np.float64, np.bool_])
shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=SIDE)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes))
images = st.one_of(
    arrays,
    arrays.map(lambda array: torch.from_numpy(array) if array.dtype != np.uint16 else array),
    st.lists(arrays, max_size=2),
    st.sampled_from([Image.new(mode, (SIDE, SIDE)) for mode in ("L", "RGB", "1", "F", "CMYK", "P", "I")]),
    hnp.arrays(np.float32, (SIDE, SIDE)),
    scalars,
)
ARGUMENTS = {
    "image": images,
    "mask_image": images,
    "attributes": st.one_of(scalars, st.dictionaries(st.sampled_from(["age", "laterality", "x"]), scalars)),
    "report": st.one_of(scalars, st.lists(scalars, max_size=2)),
    "height": scalars.filter(lambda v: not isinstance(v, int) or not SIDE < v <= 8192),
    "width": scalars.filter(lambda v: not isinstance(v, int) or not SIDE < v <= 8192),
    "strength": scalars,
    "num_inference_steps": scalars.filter(lambda v: not isinstance(v, int) or not 2 < v < 1001),
    "guidance_scale": scalars,
    "eta": scalars,
    "num_images_per_prompt": scalars.filter(lambda v: not isinstance(v, int) or v <= 3),
    "generator": scalars,
    "seed": st.one_of(scalars, st.lists(scalars, max_size=2)),
    "latents": images,
    "report_embeds": images,
    "report_mask": images,
    "output_type": scalars,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_value_of_one_argument(pipe, name):
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ARGUMENTS[name])
    def check(value):
        valid = {
            "image": np.full((SIDE, SIDE), 0.5, np.float32),
            "mask_image": np.eye(SIDE, dtype=bool),
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
        }
        try:
            made = len(pipe(**valid | {name: value}).images)
        except GBCIError as error:
            made, sentence = None, str(error)
        assert made != 0
        assert made or (sentence.isprintable() and 10 < len(sentence) < 1100)

    check()


ONE_LINE = {
    "report mask alone": ({"report_mask": torch.ones(1, 2)}, "report_mask was given without report_embeds"),
    "zero axes": ({"image": np.array(1.0)}, "image has shape []; expected one channel"),
    "text for a number": ({"strength": "much"}, "strength is 'much'; expected a number"),
    "truth for a count": ({"num_inference_steps": True}, "num_inference_steps is True; expected a whole number"),
    "huge": ({"height": 2**40}, "height is 1099511627776; expected a whole number up to 8192, or None"),
    "nan latents": ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents holds NaN or infinity; expected finite"),
    "generator": ({"generator": 7}, "generator is 7; expected a torch.Generator, a list of them, or None"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "said"), ONE_LINE.values(), ids=ONE_LINE)
def test_sentence(pipe, options, said):
    valid = {"image": np.full((SIDE, SIDE), 0.5), "mask_image": np.eye(SIDE, dtype=bool), "num_inference_steps": 1}
    with pytest.raises(GBCIError) as raised:
        pipe(**valid | options)
    assert str(raised.value).startswith(said)
