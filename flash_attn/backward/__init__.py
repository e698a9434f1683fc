"""The backward pass: autograd classes, the formulas in plain PyTorch, and the entry points asked for by name.

Names load on first use, so that importing the package stays cheap.
"""

import importlib
from typing import Any

_HOME = {
    "FlashAttnFunction": "flash_attn.backward.autograd_functions",
    "FlashAttnVarlenFunction": "flash_attn.backward.autograd_functions",
    "flash_attn_func_with_grad": "flash_attn.backward.autograd_functions",
    "flaggems_flash_attn_backward": "flash_attn.backward.flaggems_backward",
    "flaggems_flash_attn_varlen_backward": "flash_attn.backward.flaggems_backward",
    "pytorch_flash_attention_backward": "flash_attn.backward.reference_impl",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
