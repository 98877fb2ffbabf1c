"""The condition encoder: the inputs that its tokens depend on, and the hashes of words that checkpoints rely on."""

import pytest
import torch

from gbci_fast.attributes import CONDITIONED, FINDING_CATEGORIES, Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.model.conditioning import CATEGORICAL, FIRST_ATTRIBUTES, ConditionEncoder, Conditioning

KNOWN = Attributes(
    laterality="L",
    view_position="CC",
    breast_density="B",
    breast_birads=2,
    finding_categories=("Mass",),
    finding_birads=4,
    age=50.0,
    pixel_spacing=0.4,
    shape="oval",
    margin="circumscribed",
    pathology="benign",
    subtlety=4,
)
OTHER = {
    "laterality": "R",
    "view_position": "MLO",
    "breast_density": "C",
    "breast_birads": 5,
    "finding_birads": 3,
    "finding_categories": ("Asymmetry",),
    "age": 58.0,
    "pixel_spacing": 0.2,
    "shape": "irregular",
    "margin": "spiculated",
    "pathology": "malignant",
    "subtlety": 2,
}
IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return make(CONDITIONED)


def make(attributes, **sizes):
    return ConditionEncoder(
        **{"image_size": 64, "width": 64, "depth": 1, "report_depth": 1, "pooled_dim": 48, **sizes},
        attributes=attributes,
    ).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def encode(encoder, attributes, report=None, size=64, **options):
    image = torch.linspace(-1, 1, size * size).reshape(1, 1, size, size).repeat(len(attributes), 1, 1, 1)
    return encoder(image, torch.zeros_like(image), attributes, report, **options)


def test_shapes_and_token_order(encoder):
    out = encode(encoder, [KNOWN, Attributes()], ["a mass", None])
    assert out.tokens.shape == (2, IMAGE_TOKENS + len(CONDITIONED) + 2, 64)
    assert out.pooled.shape == (2, 48)
    assert out.token_mask.tolist() == [[True] * 30, [True] * 28 + [False] * 2]
    assert out.tokens.isfinite().all()


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("kind", ["other", "unknown"])
def test_each_attribute_moves_its_own_token(encoder, name, kind):
    changed = Attributes(**{**vars(KNOWN), name: OTHER[name] if kind == "other" else None})
    tokens = encoder.encode_attributes([KNOWN, changed])
    differs = (tokens[0] - tokens[1]).abs().amax(-1) > 1e-3
    assert [CONDITIONED[i] for i in differs.nonzero().flatten()] == [name]
    pooled = encode(encoder, [KNOWN, changed]).pooled
    assert (pooled[0] - pooled[1]).abs().max() > 1e-5


def test_every_value_has_its_own_token(encoder):
    for name, values in {**CATEGORICAL, "finding_categories": [(), *((c,) for c in FINDING_CATEGORIES)]}.items():
        described = [Attributes(), *(Attributes(**{name: value}) for value in values)]
        tokens = encoder.encode_attributes(described)[:, CONDITIONED.index(name)]
        distances = torch.cdist(tokens, tokens) + torch.eye(len(tokens)) * 10
        assert distances.min() > 0.1, name


def test_the_config_decides_what_is_known(encoder):
    """The default is what checkpoints of before the entry know."""
    torch.manual_seed(0)
    old = ConditionEncoder(image_size=64, width=64, depth=1, report_depth=1, pooled_dim=48).eval()
    assert tuple(old.config.attributes) == FIRST_ATTRIBUTES
    assert old.ignores == ("shape", "margin", "pathology", "subtlety")
    assert encoder.ignores == ()
    told = Attributes(**{**vars(KNOWN), **{name: OTHER[name] for name in old.ignores}})
    assert encode(old, [KNOWN]).tokens.shape[1] == IMAGE_TOKENS + 8
    assert torch.equal(encode(old, [KNOWN]).tokens, encode(old, [told]).tokens)
    assert old.without_ignored(told) == old.without_ignored(KNOWN) != KNOWN
    assert encoder.without_ignored(told) == told
    few = make(("margin", "finding_categories"))
    assert few.encode_attributes([KNOWN]).shape == (1, 2, 64)
    assert set(few.categorical) == {"margin"}
    without = make(("age",))
    assert not hasattr(without, "categories")
    assert without.encode_attributes([KNOWN]).shape == (1, 1, 64)


@pytest.mark.parametrize("names", [(), ("size",), ("margin", "margin"), "margin", None, (3,), ([],)])
def test_names_that_it_cannot_know(names):
    with pytest.raises(GBCIError, match=r"attributes of the conditioner is .*; expected one or more of laterality,"):
        make(names)


def test_weights_of_known_attributes_are_taken_over():
    torch.manual_seed(1)
    old = make(FIRST_ATTRIBUTES)
    new = make(("margin", *FIRST_ATTRIBUTES[::-1]))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    new.load_known(old)
    tokens, others = new.encode_attributes([KNOWN]), old.encode_attributes([KNOWN])
    assert torch.equal(tokens[:, 1:], others.flip(1))
    assert torch.equal(new.categorical["margin"].weight, before["categorical.margin.weight"])
    assert torch.equal(new.attribute_type[0], before["attribute_type"][0])
    assert torch.equal(new.vit.layers[0].linear1.weight, old.vit.layers[0].linear1.weight)
    narrow = make(("margin",))
    narrow.load_known(old)
    assert torch.equal(narrow.null_token, old.null_token)
    for other in (
        make(FIRST_ATTRIBUTES, depth=2),
        make(FIRST_ATTRIBUTES, width=32),
        make(FIRST_ATTRIBUTES, report_width=8),
    ):
        with pytest.raises(RuntimeError):
            new.load_known(other)


def test_several_categories_add_up(encoder):
    described = [Attributes(finding_categories=names) for names in (("Mass", "Asymmetry"), ("Mass",), ("Asymmetry",))]
    both, mass, asymmetry = encoder.encode_attributes(described)[:, CONDITIONED.index("finding_categories")]
    offset = encoder.attribute_type[CONDITIONED.index("finding_categories")]
    torch.testing.assert_close(both - offset, (mass - offset) + (asymmetry - offset))


def test_mask_and_pixels_move_the_image_tokens(encoder):
    image = torch.zeros(3, 1, 64, 64)
    mask = torch.zeros(3, 1, 64, 64)
    image[1, :, :16, :16] = 0.5
    mask[2, :, :16, :16] = 1
    plain, pixels, masked = encoder(image, mask, [Attributes()] * 3).tokens
    assert (plain - pixels)[:IMAGE_TOKENS].abs().max() > 1e-3
    assert (plain - masked)[:IMAGE_TOKENS].abs().max() > 1e-3
    assert torch.equal(plain[IMAGE_TOKENS:], masked[IMAGE_TOKENS:])


def test_positions_are_interpolated_for_other_sizes(encoder):
    assert encode(encoder, [KNOWN], size=96).tokens.shape[1] == 36 + len(CONDITIONED)


@pytest.mark.parametrize(
    ("text", "hashed"),
    [
        ("Irregular MASS, 12 mm", [278, 870, 1229, 752]),
        ("BI-RADS 4", [550, 57, 824]),
        ("", []),
        (None, []),
        ("...", []),
    ],
)
def test_words_hash_as_checkpoints_expect(encoder, text, hashed):
    assert encoder.tokenize(text) == hashed


def test_long_reports_are_cut(encoder):
    assert len(encoder.tokenize("word " * 100)) == 32


def test_padding_changes_nothing(encoder):
    """A report's tokens and the pooled vector do not depend on the longer reports beside it."""
    alone = encode(encoder, [KNOWN], ["round mass"])
    beside = encode(encoder, [KNOWN] * 3, ["round mass", "one two three four five six", None])
    n = alone.tokens.shape[1]
    torch.testing.assert_close(beside.tokens[:1, :n], alone.tokens, rtol=0, atol=2e-6)
    torch.testing.assert_close(beside.pooled[:1], alone.pooled, rtol=0, atol=2e-6)
    assert not beside.token_mask[0, n:].any()
    silent = encode(encoder, [KNOWN])
    assert not beside.token_mask[2, silent.tokens.shape[1] :].any()
    torch.testing.assert_close(beside.pooled[2:], silent.pooled, rtol=0, atol=2e-6)


def test_word_order_matters(encoder):
    first, second = encode(encoder, [KNOWN] * 2, ["mass not calcification", "calcification not mass"]).pooled
    assert (first - second).abs().max() > 1e-5


def test_unknown_words_are_words_too(encoder):
    """Hashing has no out-of-vocabulary token: an unknown word is encoded like any word. An empty report is separate."""
    words, nothing = encode(encoder, [KNOWN] * 2, ["qwxz", ""]).pooled
    assert (words - nothing).abs().max() > 1e-5


def test_null_is_one_token_repeated(encoder):
    null = encoder.null(3, 5)
    assert null.tokens.shape == (3, 5, 64)
    assert (null.tokens == encoder.null_token).all()
    assert (null.pooled == encoder.null_pooled).all()
    assert null.token_mask.all()


def test_conditioning_repeats_and_joins(encoder):
    both = encode(encoder, [KNOWN, Attributes()])
    repeated = both.repeat_interleave(2)
    assert torch.equal(repeated.tokens, both.tokens[[0, 0, 1, 1]])
    joined = Conditioning.cat([encoder.null(2, both.tokens.shape[1]), both])
    assert torch.equal(joined.pooled[2:], both.pooled)
    assert joined.token_mask.shape == (4, both.tokens.shape[1])


def test_external_states_take_the_place_of_reports():
    torch.manual_seed(0)
    encoder = ConditionEncoder(image_size=64, width=64, depth=1, pooled_dim=48, report_width=20).eval()
    assert not hasattr(encoder, "words")
    states = torch.randn(2, 3, 20)
    out = encode(encoder, [KNOWN] * 2, report_embeds=states)
    assert out.tokens.shape[1] == IMAGE_TOKENS + len(FIRST_ATTRIBUTES) + 3
    assert out.token_mask.all()
    assert (out.pooled[0] - out.pooled[1]).abs().max() > 1e-5
    assert encode(encoder, [KNOWN]).tokens.shape[1] == IMAGE_TOKENS + len(FIRST_ATTRIBUTES)


def test_states_for_the_built_in_encoder_are_refused(encoder):
    with pytest.raises(GBCIError) as raised:
        encode(encoder, [KNOWN], report_embeds=torch.zeros(1, 2, 64))
    assert str(raised.value) == (
        "report_embeds was given; this checkpoint has the built-in report encoder, pass report="
    )
