"""The cache of keys and values: its pages, who shares them, and attention over them.

Names load on first use, so that importing the package stays cheap. `kvcache.hf_cache` needs transformers and is
imported by its own name.
"""

import importlib
from typing import Any

_HOME = {
    "MemoryReport": "flash_attn.kvcache.cache_manager",
    "PagedKVCache": "flash_attn.kvcache.cache_manager",
    "Paged": "flash_attn.kvcache.strategies",
    "RollingWindow": "flash_attn.kvcache.strategies",
    "Static": "flash_attn.kvcache.strategies",
    "batch_invariant": "flash_attn.kvcache.kv_attention",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
