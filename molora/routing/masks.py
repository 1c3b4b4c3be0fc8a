"""Which tokens of a forward pass are real, and which of them are the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.errors import MoloraError


@dataclass(frozen=True)
class TokenMasks:
    """Masks of one forward pass, true for real tokens.

    Attributes:
        of_input: `[B, S]` of the model's input, the encoder's if it has one; `None` if all tokens are real.
        of_decoder: `[B, S]` of an encoder-decoder's decoder; `None` as above.
        encoder_decoder: Whether the model has both sides.
    """

    of_input: Tensor | None = None
    of_decoder: Tensor | None = None
    encoder_decoder: bool = False

    def of_layer(self, layer: str, shape: torch.Size) -> Tensor | None:
        """Find the mask of one layer's tokens.

        Args:
            layer: Name of the linear; tells an encoder-decoder's two sides apart.
            shape: `[B, S]` or `[T]` of the layer's tokens.

        Returns:
            Boolean mask of that shape, or `None` if every token counts. With a key-value cache the mask is longer than
            the input, and its end is what belongs to it.
        """
        mask = self.of_decoder if self.encoder_decoder and reads_decoder(layer) else self.of_input
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        if len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            return mask[:, mask.shape[1] - shape[1] :].bool()
        return mask.reshape(shape).bool() if mask.numel() == shape.numel() else None


def token_masks(kwargs: dict[str, Any], encoder_decoder: bool) -> TokenMasks:
    """Read the masks from a model's keyword arguments; a decoder without one takes the labelled positions.

    If it has one label a row, it classifies, and its decoder reads the input again, one position later.
    """
    of_input, of_decoder = kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")
    labels = kwargs.get("labels")
    if encoder_decoder and of_decoder is None and labels is not None:
        of_decoder = labels != -100 if labels.ndim > 1 else of_input
    return TokenMasks(of_input, of_decoder, encoder_decoder)


def reads_decoder(layer: str) -> bool:
    """Whether a layer of an encoder-decoder reads the decoder's tokens."""
    # Keys and values of cross-attention stand in the decoder and read the encoder's tokens.
    cross_key_value = re.search(r"(EncDecAttention|encoder_attn|crossattention)\.(.*\.)?(k|v|key|value)", layer)
    return re.search(r"(^|\.)decoder\.", layer) is not None and not cross_key_value


def prompt_of_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The real tokens before the first label.

    Args:
        labels: `[B, S]`, -100 where nothing is to be predicted.
        mask: `[B, S]`, true for real tokens; `None` for all.

    Returns:
        Boolean `[B, S]`. A row that is labelled from its start has its first real token as prompt.
    """
    unlabelled = (labels != -100).cumsum(dim=-1) == 0
    real = torch.ones_like(unlabelled) if mask is None or mask.shape != labels.shape else mask.bool()
    first = real & (real.cumsum(dim=-1) == 1)
    prompt = unlabelled & real
    return torch.where(prompt.any(dim=-1, keepdim=True), prompt, first)


def ids_of_tokens(ids: Tensor, shape: torch.Size) -> Tensor:
    """Ids of a module's tokens.

    Args:
        ids: Integers `[B, S]`.
        shape: `[B, S]` of the module's tokens, or `[T]` where it sees them without their rows.

    Raises:
        MoloraError: If these are other tokens, as in the later steps of a generation.
    """
    if ids.numel() != shape.numel() or (len(shape) > 1 and ids.shape != shape):
        raise MoloraError(
            f"task_ids of tokens have shape {list(ids.shape)} and the tokens of this pass {list(shape)}; give one id "
            "per token, [B, S], or one per row, [B], as generation needs."
        )
    return ids.long().reshape(shape)


def pool_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the marked tokens, `[B, S, d]` to `[B, 1, d]`."""
    if mask is None:
        return x.mean(dim=1, keepdim=True)
    weight = mask.to(x.dtype).unsqueeze(-1)
    # Zeroed rather than multiplied: what padding holds may be infinite.
    kept = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept.sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def pool_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """The last marked token, `[B, S, d]` to `[B, 1, d]`."""
    if mask is None:
        return x[:, -1:]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).max(dim=1).values.clamp(min=0)
    return x.gather(1, last.reshape(-1, 1, 1).expand(-1, 1, x.shape[-1]))
