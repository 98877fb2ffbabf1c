"""What an editor or a type checker sees of the public names, in code that uses the package."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = """\
from diffusers import UNet2DConditionModel
from PIL import Image

from gbci_fast import Attributes, ConditionEncoder, GBCIError, GBCIPipeline, accelerate

pipe = GBCIPipeline.from_pretrained()
fast = accelerate(pipe, tier="exact")
image = Image.new("L", (224, 224))

reveal_type(pipe)
reveal_type(fast)
reveal_type(Attributes())
reveal_type(ConditionEncoder())
reveal_type(GBCIError(""))


def unet_alone(unet: UNet2DConditionModel) -> None:
    reveal_type(accelerate(unet))


pipe(image, image, seed=1)
fast(image, image, seed=1)
pipe(image, image, sed=1)
fast(imag=image, mask_image=image)
accelerate(pipe, teir="exact")
accelerate("pipe")
"""
WRONG = ("sed=1", "imag=image", 'teir="exact"', 'accelerate("pipe")')


@pytest.fixture(scope="module")
def diagnostics(tmp_path_factory) -> list[dict]:
    """What the checker says of the snippet, which lies outside the repository as a user's code does."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "snippet.py").write_text(SNIPPET)
    config = {
        "include": ["snippet.py"],
        "extraPaths": [str(ROOT)],
        "stubPath": str(ROOT / "tests" / "typings"),
        "typeCheckingMode": "basic",
        "reportPrivateImportUsage": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    check = runpy.run_path(str(ROOT / "tests" / "check_types.py"))["check"]
    return check("--project", str(folder), "--pythonpath", sys.executable)


def test_public_names_have_their_types(diagnostics):
    revealed = [each["message"] for each in diagnostics if each["severity"] == "information"]
    assert revealed == [
        'Type of "pipe" is "GBCIPipeline"',
        'Type of "fast" is "FastPipeline"',
        'Type of "Attributes()" is "Attributes"',
        'Type of "ConditionEncoder()" is "ConditionEncoder"',
        'Type of "GBCIError("")" is "GBCIError"',
        'Type of "accelerate(unet)" is "FastUNet"',
    ]


def test_calls_are_errors_where_an_argument_is_wrong_and_nowhere_else(diagnostics):
    lines = SNIPPET.splitlines()
    wrong = [lines[each["range"]["start"]["line"]] for each in diagnostics if each["severity"] == "error"]
    expected = [line for line in lines if any(text in line for text in WRONG)]
    assert list(dict.fromkeys(wrong)) == expected
