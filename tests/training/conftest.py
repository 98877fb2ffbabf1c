"""A small phantom data set, and its images in a 64 x 64 model space."""

import pytest

from gbci_fast.phantom import generate_phantom
from gbci_fast.training.data import load_images


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("training") / "phantom"
    generate_phantom(root, studies=3, seed=0, size=128)
    return root


@pytest.fixture(scope="session")
def images(phantom_root):
    return load_images([phantom_root], size=64)
