"""A pipeline with random weights, and four images and masks for it."""

import pytest
import torch


@pytest.fixture
def pipe(tiny_pipeline):
    """A pipeline of random weights for 64 x 64 pixels, 16 x 16 cells."""
    made = tiny_pipeline()
    made.vae.register_to_config(shift_factor=0.2, scaling_factor=1.5)
    return made


@pytest.fixture(scope="session")
def image():
    return torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def mask():
    """Four different rectangles, [4, 1, 64, 64]."""
    masks = torch.zeros(4, 1, 64, 64)
    for i, part in enumerate(masks[:, 0]):
        part[12 + 4 * i : 30 + 5 * i, 10 + 3 * i : 33 + 4 * i] = 1
    return masks


@pytest.fixture(scope="session")
def paint():
    """`paint(pipe, image, mask, **options)`: images of three steps, from seed 0."""

    def call(pipe, image, mask, **options):
        options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt"} | options
        return pipe(image, mask, **options).images

    return call
