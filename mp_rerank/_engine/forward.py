"""What takes the place of a base model's ``forward``, so that its parts compute no padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from mp_rerank._engine.packed import Unpacks

__all__ = ["UnpaddedForward"]


class UnpaddedForward:
    """Takes a padded batch, and gives the base model's parts the row of its tokens.

    Args:
        base: the base model.
        unpacks: whether its result is of the row, or else a part of it has seen to that.

    Attributes:
        saved: tokens left out so far.
        padding_idx: where positions are numbered by what is no such token; else ``None``.
    """

    def __init__(self, base: torch.nn.Module, *, unpacks: bool) -> None:
        self._forward = base.forward
        self._unpacks = unpacks
        self._parameters = inspect.signature(base.forward).parameters
        # RoBERTa numbers positions by what is padding to it: a <pad> that a text has in it is not counted.
        embeddings = getattr(base, "embeddings", None)
        self._number = getattr(embeddings, "create_position_ids_from_input_ids", None)
        self.padding_idx: int | None = getattr(embeddings, "padding_idx", None) if self._number else None
        self.saved = 0

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **rest: Any,
    ) -> Any:
        if input_ids is None or rest.get("inputs_embeds") is not None or rest.pop("position_ids", None) is not None:
            raise ValueError("it is called with other things than tokens")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if "use_cache" in self._parameters:  # nobody asks for a further token
            rest["use_cache"] = False
        return self._unpadded(input_ids, attention_mask, token_type_ids, rest)

    def _unpadded(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None, rest: dict[str, Any]) -> Any:
        """What the base model makes of a padded batch, each of shape (pairs, longest): with `_compute`, by a row."""
        raise NotImplementedError

    def _positions(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The padded batch's positions where the base model numbers them itself."""
        return None if self._number is None else self._number(ids, self.padding_idx)

    def _compute(
        self,
        batch: Unpacks,
        ids: torch.Tensor,
        types: torch.Tensor | None,
        positions: torch.Tensor,
        rest: dict[str, Any],
    ) -> Any:
        """What the base model makes of a row, each of shape (tokens,), which is ``batch``'s."""
        if types is not None:
            rest["token_type_ids"] = types[None]
        output = self._forward(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[None], **rest
        )
        if self._unpacks:
            output.last_hidden_state = batch.unpack(output.last_hidden_state)
        return output
