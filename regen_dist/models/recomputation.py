"""Selective recomputation: a block is computed again in the backward pass, but for its attention, whose outputs are
kept (Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models").

Attention is most of a long row's operations and little of its memory: an output is as large as the block's input. An
operation counts as attention by its name where a kernel is one operation, PyTorch's or FlashAttention's; in attention
that is written out, as the product that follows a softmax.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` would do, but refuses a recomputation with an operation
that the forward pass did not have. ZeRO-3's hooks gather weights ahead within either, as it comes; so outputs are
matched by their order among attention's alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_FUSED = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
    }
)
_SOFTMAX, _PRODUCT = frozenset({"aten::_softmax", "aten::_safe_softmax"}), "aten::bmm"


class _AttentionMode(TorchDispatchMode):
    """Finds the operations that are attention. `outputs` holds what they made, in order."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs = outputs
        self.has_weights = False

    def is_attention(self, operation: Any) -> bool:
        """Say whether an operation's output is attention's; call it with each, in order."""
        name = operation.name().split(".")[0] if hasattr(operation, "name") else ""
        if name in _SOFTMAX:
            self.has_weights = True
        elif name == _PRODUCT and self.has_weights:
            self.has_weights = False
            return True
        return name in _FUSED


class _Keep(_AttentionMode):
    """Keeps attention's outputs, in the forward pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if self.is_attention(function):
            # Aliases, which are no part of the graph: it would keep itself alive.
            self.outputs.append(tree_map_only(Tensor, Tensor.detach, output))
        return output


class _Reuse(_AttentionMode):
    """Returns what was kept, in the recomputation."""

    def __enter__(self) -> Any:
        self.next, self.has_weights = 0, False
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_attention(function):
            return function(*args, **(kwargs or {}))
        kept, self.next = self.outputs[self.next], self.next + 1
        return tree_map_only(Tensor, Tensor.detach, kept)


def attention_kept() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of a block's forward pass and of its recomputation (`context_fn` of
    `torch.utils.checkpoint.checkpoint`)."""
    outputs: list[Any] = []
    return _Keep(outputs), _Reuse(outputs)
