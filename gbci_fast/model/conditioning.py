"""The condition encoder: ViT tokens of the masked image, one token per attribute, report tokens, a pooled vector."""

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from gbci_fast.attributes import (
    BIRADS,
    BREAST_DENSITIES,
    CONDITIONED,
    FINDING_CATEGORIES,
    LATERALITIES,
    MARGINS,
    PATHOLOGIES,
    SHAPES,
    SUBTLETIES,
    VIEW_POSITIONS,
    Attributes,
)
from gbci_fast.errors import GBCIError

# Each attribute has an embedding table; index 0 = unknown. Order and spelling are part of the checkpoint format.
CATEGORICAL = {
    "laterality": LATERALITIES,
    "view_position": VIEW_POSITIONS,
    "breast_density": BREAST_DENSITIES,
    "breast_birads": BIRADS,
    "finding_birads": BIRADS,
    "shape": SHAPES,
    "margin": MARGINS,
    "pathology": PATHOLOGIES,
    "subtlety": SUBTLETIES,
}
NUMERIC = {"age": 100.0, "pixel_spacing": 1.0}  # units (years, mm) that values are divided by before encoding
FIRST_ATTRIBUTES = CONDITIONED[:8]  # of checkpoints whose config names none


@dataclass(frozen=True)
class Conditioning:
    """The UNet's condition for a batch of B.

    Attributes:
        tokens: float [B, N, D], cross-attention context.
        token_mask: bool [B, N]; False marks padding.
        pooled: float [B, P], FiLM vector.
    """

    tokens: Tensor
    token_mask: Tensor
    pooled: Tensor

    @functools.cached_property
    def padded(self) -> bool:
        """Whether any token is padding. The first access waits for the device; the result is cached."""
        return not self.token_mask.all().item()

    def repeat_interleave(self, repeats: int) -> "Conditioning":
        """Every element of the batch `repeats` times in a row."""
        return Conditioning(*(part.repeat_interleave(repeats, 0) for part in self._parts()))

    def select(self, rows: Sequence[int]) -> "Conditioning":
        """The elements of the batch at `rows`, in this order."""
        return Conditioning(*(part[list(rows)] for part in self._parts()))

    def pad(self, multiple: int) -> "Conditioning":
        """The same condition, padded so that the number of tokens is a multiple of `multiple`."""
        more = -self.tokens.shape[1] % multiple
        return Conditioning(F.pad(self.tokens, (0, 0, 0, more)), F.pad(self.token_mask, (0, more)), self.pooled)

    def tensors(self) -> dict[str, Tensor]:
        """The three tensors by name."""
        return dict(zip(("tokens", "token_mask", "pooled"), self._parts(), strict=True))

    def within(self, tensors: Mapping[str, Tensor]) -> "Conditioning":
        """A condition of other `tensors`, with this one's value of `padded`, which saves waiting for the device."""
        other = Conditioning(*(tensors[name] for name in self.tensors()))
        vars(other)["padded"] = self.padded
        return other

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenates batches of the same context length."""
        return Conditioning(*(torch.cat(columns) for columns in zip(*(p._parts() for p in parts), strict=True)))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.token_mask, self.pooled


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Encodes masked image, attributes and report as cross-attention tokens and a FiLM vector.

    Args:
        image_size: side of the model image in pixels; positional embeddings are interpolated for other sizes.
        patch_size: side of a ViT patch.
        width: D, the token width, shared with the UNet's `cross_attention_dim`.
        depth: number of transformer blocks of the ViT.
        report_depth: number of transformer blocks of the built-in report encoder.
        head_dim: width of an attention head.
        pooled_dim: P, the UNet's `projection_class_embeddings_input_dim`.
        vocabulary: hash buckets of the built-in report encoder's words.
        max_report_tokens: longer reports are cut to this length.
        report_width: width of an external text encoder's states, passed as `report_embeds`; None for the built-in one.
        attributes: names out of `CONDITIONED` of the attributes that it knows, one token each, in this order. Other
            attributes have no effect.

    Raises:
        GBCIError: `attributes` is empty, or holds another name or one twice.
    """

    __module__ = "gbci_fast.conditioning"  # the name in checkpoints

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 128,
        depth: int = 4,
        report_depth: int = 2,
        head_dim: int = 32,
        pooled_dim: int = 256,
        vocabulary: int = 2048,
        max_report_tokens: int = 32,
        report_width: int | None = None,
        attributes: Sequence[str] = FIRST_ATTRIBUTES,
    ):
        super().__init__()
        _check_names(attributes)
        self.known = tuple(attributes)
        grid = image_size // patch_size
        self.patch = nn.Conv2d(2, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)
        self.vit = _transformer(width, depth, head_dim)
        self.categorical = nn.ModuleDict(
            {name: nn.Embedding(1 + len(CATEGORICAL[name]), width) for name in attributes if name in CATEGORICAL}
        )
        if "finding_categories" in attributes:
            # Rows: unknown, no finding, then one per category; several categories are summed.
            self.categories = nn.Embedding(2 + len(FINDING_CATEGORIES), width)
        numeric = [name for name in attributes if name in NUMERIC]
        self.numeric = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width)) for name in numeric}
        )
        self.numeric_unknown = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in numeric})
        self.attribute_type = nn.Parameter(torch.randn(len(attributes), width) * 0.02)
        if report_width is None:
            self.words = nn.Embedding(vocabulary, width)
            self.report_position = nn.Parameter(torch.randn(max_report_tokens, width) * 0.02)
            self.report_encoder = _transformer(width, report_depth, head_dim)
        else:
            self.report_projection = nn.Sequential(nn.LayerNorm(report_width), nn.Linear(report_width, width))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Sequential(nn.Linear(3 * width, pooled_dim), nn.SiLU(), nn.Linear(pooled_dim, pooled_dim))
        self.null_token = nn.Parameter(torch.randn(width) * 0.02)
        self.null_pooled = nn.Parameter(torch.zeros(pooled_dim))

    def forward(
        self,
        masked_image: Tensor,
        mask: Tensor,
        attributes: Sequence[Attributes],
        report: Sequence[str | None] | None = None,
        report_embeds: Tensor | None = None,
        report_mask: Tensor | None = None,
    ) -> Conditioning:
        """Encodes a batch.

        Args:
            masked_image: [B, 1, H, W] in [-1, 1], 0 under the mask.
            mask: [B, 1, H, W], 1 = synthesize.
            attributes: B descriptions.
            report: B sentences; None or "" for none.
            report_embeds: [B, M, report_width] of an external text encoder, instead of `report`.
            report_mask: bool [B, M]; False marks padding.

        Raises:
            GBCIError: a report in a form (text or embeddings) that this encoder was not built for, or of a wrong shape.
        """
        image_tokens = self.encode_image(masked_image, mask)
        attribute_tokens = self.encode_attributes(attributes)
        report_tokens, report_mask = self._encode_report(len(attributes), report, report_embeds, report_mask)
        tokens = self.norm(torch.cat([image_tokens, attribute_tokens, report_tokens], 1))
        num_image, num_report = image_tokens.shape[1], report_tokens.shape[1]
        always = report_mask.new_ones(tokens.shape[0], tokens.shape[1] - num_report)
        token_mask = torch.cat([always, report_mask], 1)
        weight = report_mask.to(tokens.dtype)[..., None]
        pooled = torch.cat(
            [
                tokens[:, :num_image].mean(1),
                tokens[:, num_image : tokens.shape[1] - num_report].mean(1),
                (tokens[:, tokens.shape[1] - num_report :] * weight).sum(1) / weight.sum(1).clamp(min=1),
            ],
            1,
        )
        return Conditioning(tokens, token_mask, self.pool(pooled))

    @apply_forward_hook
    def null(self, batch_size: int, num_tokens: int = 1) -> Conditioning:
        """The unconditional condition: one learned token and a FiLM vector.

        The token is repeated `num_tokens` times, which does not change the result of attention.
        """
        tokens = self.null_token.expand(batch_size, num_tokens, -1)
        token_mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=tokens.device)
        return Conditioning(tokens, token_mask, self.null_pooled.expand(batch_size, -1))

    def encode_image(self, masked_image: Tensor, mask: Tensor) -> Tensor:
        """ViT tokens [B, patches, D] of the masked image and its mask."""
        x = self.patch(torch.cat([masked_image, mask.to(masked_image.dtype)], 1))
        position = self.position
        if position.shape[-2:] != x.shape[-2:]:
            position = nn.functional.interpolate(position, x.shape[-2:], mode="bicubic", align_corners=False)
        return self.vit((x + position).flatten(2).transpose(1, 2))

    @property
    def ignores(self) -> tuple[str, ...]:
        """Names of the attributes that have no effect, since this encoder does not know them."""
        return tuple(name for name in CONDITIONED if name not in self.known)

    def without_ignored(self, attributes: Attributes) -> Attributes:
        """The description, with the attributes that have no effect as unknown."""
        return replace(attributes, **dict.fromkeys(self.ignores))

    def encode_attributes(self, attributes: Sequence[Attributes]) -> Tensor:
        """One token per attribute of the config, [B, A, D]."""
        columns = [self._encode_attribute(name, attributes) for name in self.known]
        return torch.stack(columns, 1) + self.attribute_type

    def _encode_attribute(self, name: str, attributes: Sequence[Attributes]) -> Tensor:
        """[B, D]."""
        device = self.null_token.device
        if name == "finding_categories":
            return self._categories_bag(attributes).to(self.categories.weight) @ self.categories.weight
        values = [getattr(a, name) for a in attributes]
        if name in CATEGORICAL:
            index = [0 if value is None else 1 + CATEGORICAL[name].index(value) for value in values]
            return self.categorical[name](torch.tensor(index, device=device))
        known = torch.tensor([value is not None for value in values], device=device)[:, None]
        filled = torch.tensor([0.0 if value is None else float(value) for value in values], device=device)
        encoded = self.numeric[name](_fourier(filled / NUMERIC[name]).to(self.null_token.dtype))
        return torch.where(known, encoded, self.numeric_unknown[name])

    def load_known(self, other: "ConditionEncoder") -> None:
        """Copies the weights of `other`; attributes that `other` does not know keep their weights.

        Raises:
            RuntimeError: the encoders differ in more than in their attributes.
        """
        mine, theirs = self.state_dict(), other.state_dict()
        own = {key: value for key, value in mine.items() if key not in theirs and _is_of_attributes(key)}
        kept = {key: value for key, value in theirs.items() if key in mine or not _is_of_attributes(key)}
        types = mine["attribute_type"].clone()
        for row, name in enumerate(self.known):
            if name in other.known:
                types[row] = theirs["attribute_type"][other.known.index(name)]
        self.load_state_dict({**kept, **own, "attribute_type": types})

    def _categories_bag(self, attributes: Sequence[Attributes]) -> Tensor:
        bag = torch.zeros(len(attributes), self.categories.num_embeddings)
        for row, item in zip(bag, attributes, strict=True):
            if item.finding_categories is None:
                row[0] = 1
            elif not item.finding_categories:
                row[1] = 1
            else:
                row[[2 + FINDING_CATEGORIES.index(name) for name in item.finding_categories]] = 1
        return bag

    def _encode_report(
        self,
        batch_size: int,
        report: Sequence[str | None] | None,
        embeds: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Report tokens [B, M, D] and their mask, bool [B, M]; M = 0 without any report."""
        device, width = self.null_token.device, self.config.width
        if mask is not None and embeds is None:
            raise GBCIError("report_mask was given without report_embeds; expected both or neither")
        if self.config.report_width is not None:
            if any(report or ()):
                raise GBCIError("report was given; this checkpoint has an external text encoder, pass report_embeds=")
            if embeds is None:
                embeds, mask = torch.zeros(batch_size, 0, self.config.report_width), None
            if embeds.ndim != 3 or embeds.shape[-1] != self.config.report_width:
                expected = f"[B, M, {self.config.report_width}]"
                raise GBCIError(f"report_embeds has shape {list(embeds.shape)}; expected {expected}")
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            if mask.shape != embeds.shape[:2]:
                raise GBCIError(f"report_mask has shape {list(mask.shape)}; expected {list(embeds.shape[:2])}")
            return self.report_projection(embeds.to(self.null_token)), mask.to(device)
        if embeds is not None:
            raise GBCIError("report_embeds was given; this checkpoint has the built-in report encoder, pass report=")
        words = [self.tokenize(text) for text in (report or [None] * batch_size)]
        longest = max(map(len, words), default=0)
        if longest == 0:
            return self.null_token.new_zeros(batch_size, 0, width), torch.zeros(
                batch_size, 0, dtype=torch.bool, device=device
            )
        ids = torch.zeros(batch_size, longest, dtype=torch.long)
        mask = torch.zeros(batch_size, longest, dtype=torch.bool)
        for row, row_mask, tokens in zip(ids, mask, words, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            row_mask[: len(tokens)] = True
        ids, mask = ids.to(device), mask.to(device)
        # A sample without a report attends to its first padding token, so that its output is finite; masked below.
        keys = mask.clone()
        keys[:, 0] = True
        encoded = self.report_encoder(self.words(ids) + self.report_position[:longest], src_key_padding_mask=~keys)
        return encoded * mask[..., None], mask

    def tokenize(self, text: str | None) -> list[int]:
        """Word indices of a report: lower-case words and numbers, hashed (CRC-32) into the vocabulary.

        At most `max_report_tokens` are returned.

        Raises:
            GBCIError: `text` is neither text nor None.
        """
        if not isinstance(text, str | None):
            raise GBCIError(f"report holds {text!r}; expected text or None")
        words = re.findall(r"[a-z]+|\d+", (text or "").lower())[: self.config.max_report_tokens]
        return [zlib.crc32(word.encode()) % self.config.vocabulary for word in words]


def _check_names(attributes: object) -> None:
    names = list(attributes) if isinstance(attributes, list | tuple) else []
    if not names or any(name not in CONDITIONED for name in names) or len(set(names)) < len(names):
        expected = f"one or more of {', '.join(CONDITIONED)}, each once"
        raise GBCIError(f"attributes of the conditioner is {attributes!r}; expected {expected}")


def _is_of_attributes(key: str) -> bool:
    return key.startswith(("categorical.", "categories.", "numeric.", "numeric_unknown."))


def _transformer(width: int, depth: int, head_dim: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, width // head_dim, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def _fourier(values: Tensor) -> Tensor:
    """Sines and cosines of values [B] at eight octaves, [B, 16] (Vaswani et al. 2017, section 3.5)."""
    angles = values[:, None] * (math.pi / 4) * 2.0 ** torch.arange(8, device=values.device)
    return torch.cat([angles.sin(), angles.cos()], 1)
