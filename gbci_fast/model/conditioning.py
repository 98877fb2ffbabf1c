"""The condition encoder: ViT tokens of the masked image, one token per attribute, report tokens, a pooled vector."""

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from gbci_fast.attributes import (
    BIRADS,
    BREAST_DENSITIES,
    FINDING_CATEGORIES,
    LATERALITIES,
    VIEW_POSITIONS,
    Attributes,
)
from gbci_fast.errors import GBCIError

# One embedding table each; index 0 means unknown. Order and spelling are part of the checkpoint format.
CATEGORICAL = {
    "laterality": LATERALITIES,
    "view_position": VIEW_POSITIONS,
    "breast_density": BREAST_DENSITIES,
    "breast_birads": BIRADS,
    "finding_birads": BIRADS,
}
NUMERIC = {"age": 100.0, "pixel_spacing": 1.0}  # the value at which the encoding's base frequency sees one unit
NUM_ATTRIBUTE_TOKENS = len(CATEGORICAL) + 1 + len(NUMERIC)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is conditioned on, for a batch of B.

    Attributes:
        tokens: [B, N, D] cross-attention context.
        token_mask: bool [B, N]; False marks report padding.
        pooled: [B, P] FiLM vector.
    """

    tokens: Tensor
    token_mask: Tensor
    pooled: Tensor

    @functools.cached_property
    def padded(self) -> bool:
        """Whether any token is padding. The first call waits for the device."""
        return not self.token_mask.all().item()

    def repeat_interleave(self, repeats: int) -> "Conditioning":
        """Every element of the batch `repeats` times in a row."""
        return Conditioning(*(part.repeat_interleave(repeats, 0) for part in self._parts()))

    def select(self, rows: Sequence[int]) -> "Conditioning":
        """These elements of the batch, in this order."""
        return Conditioning(*(part[list(rows)] for part in self._parts()))

    def pad(self, multiple: int) -> "Conditioning":
        """The same condition with tokens of padding, up to the next multiple of `multiple`."""
        more = -self.tokens.shape[1] % multiple
        return Conditioning(F.pad(self.tokens, (0, 0, 0, more)), F.pad(self.token_mask, (0, more)), self.pooled)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of its fields."""
        return dict(zip(("tokens", "token_mask", "pooled"), self._parts(), strict=True))

    def within(self, tensors: Mapping[str, Tensor]) -> "Conditioning":
        """A condition of other `tensors`, by name. It has the `padded` of this one, so that nothing waits for it."""
        other = Conditioning(*(tensors[name] for name in self.tensors()))
        vars(other)["padded"] = self.padded
        return other

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """All batches as one; they have the same context length."""
        return Conditioning(*(torch.cat(columns) for columns in zip(*(p._parts() for p in parts), strict=True)))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.token_mask, self.pooled


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Masked image, attributes and report to cross-attention tokens and a FiLM vector.

    Args:
        image_size: side of the model image in pixels (positions are interpolated for other sizes).
        patch_size: side of a ViT patch.
        width: D, the token width, shared with the UNet's `cross_attention_dim`.
        depth: transformer blocks of the ViT.
        report_depth: transformer blocks of the built-in report encoder.
        head_dim: width of an attention head.
        pooled_dim: P, the UNet's `projection_class_embeddings_input_dim`.
        vocabulary: hash buckets of the built-in report encoder's words.
        max_report_tokens: longer reports are cut here.
        report_width: width of an external text encoder's states, passed as `report_embeds`; None for the built-in one.
    """

    __module__ = "gbci_fast.conditioning"  # what checkpoints name

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
    ):
        super().__init__()
        grid = image_size // patch_size
        self.patch = nn.Conv2d(2, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)
        self.vit = _transformer(width, depth, head_dim)
        self.categorical = nn.ModuleDict(
            {name: nn.Embedding(1 + len(values), width) for name, values in CATEGORICAL.items()}
        )
        # Rows: unknown, no finding, then one per category; several categories are summed.
        self.categories = nn.Embedding(2 + len(FINDING_CATEGORIES), width)
        self.numeric = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width)) for name in NUMERIC}
        )
        self.numeric_unknown = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in NUMERIC})
        self.attribute_type = nn.Parameter(torch.randn(NUM_ATTRIBUTE_TOKENS, width) * 0.02)
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
            masked_image: [B, 1, H, W] in [-1, 1], 0 where the mask is.
            mask: [B, 1, H, W], 1 = synthesize.
            attributes: B descriptions.
            report: B sentences; None or "" for none.
            report_embeds: [B, M, report_width] of an external text encoder, instead of `report`.
            report_mask: bool [B, M]; False marks padding.

        Raises:
            GBCIError: a report in the form that this conditioner was not built for, or of the wrong shape.
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
        """The unconditional context: one learned token, repeated to `num_tokens` (the same function), and its FiLM."""
        tokens = self.null_token.expand(batch_size, num_tokens, -1)
        token_mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=tokens.device)
        return Conditioning(tokens, token_mask, self.null_pooled.expand(batch_size, -1))

    def encode_image(self, masked_image: Tensor, mask: Tensor) -> Tensor:
        """ViT tokens [B, patches, D] of the masked image and the mask itself."""
        x = self.patch(torch.cat([masked_image, mask.to(masked_image.dtype)], 1))
        position = self.position
        if position.shape[-2:] != x.shape[-2:]:
            position = nn.functional.interpolate(position, x.shape[-2:], mode="bicubic", align_corners=False)
        return self.vit((x + position).flatten(2).transpose(1, 2))

    def encode_attributes(self, attributes: Sequence[Attributes]) -> Tensor:
        """One token per attribute, [B, 8, D]."""
        device = self.null_token.device
        columns = []
        for name, values in CATEGORICAL.items():
            index = [0 if getattr(a, name) is None else 1 + values.index(getattr(a, name)) for a in attributes]
            columns.append(self.categorical[name](torch.tensor(index, device=device)))
        columns.append(self._categories_bag(attributes).to(self.categories.weight) @ self.categories.weight)
        for name, unit in NUMERIC.items():
            values = [getattr(a, name) for a in attributes]
            known = torch.tensor([value is not None for value in values], device=device)[:, None]
            filled = torch.tensor([0.0 if value is None else float(value) for value in values], device=device)
            encoded = self.numeric[name](_fourier(filled / unit).to(self.null_token.dtype))
            columns.append(torch.where(known, encoded, self.numeric_unknown[name]))
        return torch.stack(columns, 1) + self.attribute_type

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
        """Report tokens [B, M, D] and their mask; M is 0 when nobody has a report."""
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
        # A sample without a report attends to its first padding slot: defined, finite, and masked out afterwards.
        keys = mask.clone()
        keys[:, 0] = True
        encoded = self.report_encoder(self.words(ids) + self.report_position[:longest], src_key_padding_mask=~keys)
        return encoded * mask[..., None], mask

    def tokenize(self, text: str | None) -> list[int]:
        """Lower-case words and numbers, hashed (CRC-32) into the vocabulary; at most `max_report_tokens`."""
        if not isinstance(text, str | None):
            raise GBCIError(f"report holds {text!r}; expected text or None")
        words = re.findall(r"[a-z]+|\d+", (text or "").lower())[: self.config.max_report_tokens]
        return [zlib.crc32(word.encode()) % self.config.vocabulary for word in words]


def _transformer(width: int, depth: int, head_dim: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, width // head_dim, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def _fourier(values: Tensor) -> Tensor:
    """Sines and cosines of values [B] at eight octaves, [B, 16] (Vaswani et al. 2017, section 3.5)."""
    angles = values[:, None] * (math.pi / 4) * 2.0 ** torch.arange(8, device=values.device)
    return torch.cat([angles.sin(), angles.cos()], 1)
