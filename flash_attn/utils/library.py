"""Operators for torch.compile: upstream's import path and meaning."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def triton_op(
    name: str,
    fn: Callable[..., Any] | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    allow_decomposition: bool = True,
) -> Any:
    """torch.library.triton_op that honours a schema, which PyTorch's own ignores.

    Args:
        name: "namespace::name".
        fn: the operator; without it the result is a decorator.
        mutates_args: names of the arguments that it writes, or "unknown".
        schema: its signature in PyTorch's notation, such as "(Tensor x) -> Tensor"; default read from the annotations.
        allow_decomposition: the compiler may look inside. With a schema, or False, the operator is opaque to it.

    Returns:
        a CustomOpDef.

    Source: flash_attn 2.8.3, flash_attn/utils/library.py.
    """

    def define(fn: Callable[..., Any]) -> Any:
        if schema is None and allow_decomposition:
            return torch.library.triton_op(name, fn, mutates_args=mutates_args)
        operator = torch.library.custom_op(name, fn, mutates_args=mutates_args, schema=schema)
        operator.register_fake(fn)
        return operator

    return define if fn is None else define(fn)
