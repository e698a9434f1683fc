"""Transformer blocks, sequential and parallel: upstream's import path and meaning."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.errors import InvalidArgument
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn


class StochasticDepth(nn.Module):
    """Zeroes whole samples with probability p while training, and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise InvalidArgument(f"the probability of a dropped path must be within 0 and 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, ...)."""
        if self.p == 0.0 or not self.training:
            return x
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * (kept if self.p == 1.0 else kept / (1.0 - self.p))


class Block(nn.Module):
    """Mixer and MLP with residuals.

    prenorm: dropout, add, norm, mixer, dropout, add, norm, MLP. The block takes and returns (hidden_states, residual): its
    additions come first, so that each is fused with the normalisation after it. Otherwise: mixer, dropout, add, norm, MLP,
    dropout, add, norm.

    Args:
        mixer_cls: dim -> module; default MHA with heads of 64.
        mlp_cls: dim -> module; default Mlp with 4 * dim; nn.Identity leaves the second half out.
        norm_cls: dim -> nn.LayerNorm or RMSNorm.
        resid_dropout1, resid_dropout2: dropped elements before the additions.
        drop_path1, drop_path2: dropped samples.
        fused_dropout_add_ln: dropout, addition and norm in one call, added in fp32.
        return_residual: postnorm only: mixer and MLP return (out, their input).
        residual_in_fp32: prenorm only.
        sequence_parallel, mark_shared_params: mark the norms' parameters for utils.distributed.

    Source: flash_attn 2.8.3, flash_attn/modules/block.py.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any = None,
        mlp_cls: Any = None,
        norm_cls: Any = nn.LayerNorm,
        dropout_cls: Any = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise InvalidArgument("residual_in_fp32 is only compatible with prenorm=True, got prenorm False")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = _mixer(mixer_cls, dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = _mlp(mlp_cls, dim)
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            _check_fusible(self.norm1, self.dropout1)
        _mark_norms(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One block.

        Args:
            hidden_states: (batch, seqlen, dim).
            residual: prenorm only: what the block before returned; None for the first block.
            mixer_subset: prenorm with cross-attention only: positions that go on.
            mixer_kwargs: for the mixer.

        Returns:
            prenorm (hidden_states, residual), otherwise hidden_states.
        """
        kwargs = dict(mixer_kwargs or {})
        if mixer_subset is not None:
            kwargs["mixer_subset"] = mixer_subset
        if self.prenorm:
            return self._forward_prenorm(hidden_states, residual, mixer_subset, kwargs)
        if residual is not None:
            raise InvalidArgument("residual needs prenorm=True, got False")
        hidden_states = self._add_after(self.mixer(hidden_states, **kwargs), hidden_states, "1")
        if isinstance(self.mlp, nn.Identity):
            return hidden_states
        return self._add_after(self.mlp(hidden_states), hidden_states, "2")

    def _forward_prenorm(
        self, hidden_states: Tensor, residual: Tensor | None, mixer_subset: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self._add_norm(hidden_states, residual, "1")
        hidden_states = self.mixer(hidden_states, **kwargs)
        if mixer_subset is not None:
            residual = residual[:, mixer_subset]
        if isinstance(self.mlp, nn.Identity):
            return hidden_states, residual
        hidden_states, residual = self._add_norm(hidden_states, residual, "2")
        return self.mlp(hidden_states), residual

    def _add_after(self, out: Any, before: Tensor, which: str) -> Tensor:
        if self.return_residual:
            out, before = out
        return self._add_norm(out, before, which)[0]

    def _add_norm(self, x: Tensor, residual: Tensor | None, which: str) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum) of drop_path(dropout(x)) and the residual."""
        dropout, drop_path, norm = (getattr(self, name + which) for name in ("dropout", "drop_path", "norm"))
        if not self.fused_dropout_add_ln:
            x = drop_path(dropout(x))
            return _norm_of_sum(x if residual is None else x + residual, norm, self.residual_in_fp32)
        rowscale = None
        if drop_path.p > 0.0 and self.training:
            rowscale = drop_path(torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device))
        return layer_norm_fn(
            x,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )


class ParallelBlock(nn.Module):
    """Mixer and MLP side by side on the same sum, as in GPT-J, GPT-NeoX and PaLM: dropout, add, norm, mixer and MLP.

    Args:
        tied_norm: one norm for both branches.

    The other arguments are those of `Block`.

    Source: flash_attn 2.8.3, flash_attn/modules/block.py.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any = None,
        mlp_cls: Any = None,
        norm_cls: Any = nn.LayerNorm,
        dropout_cls: Any = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = _mixer(mixer_cls, dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = _mlp(mlp_cls, dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            _check_fusible(self.norm1, self.dropout1)
            if resid_dropout1 != resid_dropout2:
                raise InvalidArgument(
                    f"fused_dropout_add_ln has one dropout, got resid_dropout1 {resid_dropout1} and resid_dropout2 "
                    f"{resid_dropout2}"
                )
        _mark_norms(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block.

        Args:
            hidden_states1: (batch, seqlen, dim), what the mixer before returned, or the embeddings.
            hidden_states2: what the MLP before returned; None for the first block.
            residual: what the block before returned.

        Returns:
            (hidden_states1, hidden_states2, residual).
        """
        if self.fused_dropout_add_ln:
            normed1, normed2, residual = self._fused(hidden_states1, hidden_states2, residual)
        else:
            x = self.dropout1(hidden_states1)
            if hidden_states2 is not None:
                x = x + self.dropout2(hidden_states2)
            x = x if residual is None else residual + x
            normed1, residual = _norm_of_sum(x, self.norm1, self.residual_in_fp32)
            normed2 = normed1 if self.tied_norm else self.norm2(x.to(self.norm2.weight.dtype))
        return self.mixer(normed1, **(mixer_kwargs or {})), self.mlp(normed2), residual

    def _fused(self, x: Tensor, x1: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weight1, bias1 = (None, None) if self.tied_norm else (self.norm2.weight, self.norm2.bias)
        normed, *other, residual = layer_norm_fn(
            x,
            self.norm1.weight,
            self.norm1.bias,
            residual=residual,
            x1=x1,
            weight1=weight1,
            bias1=bias1,
            eps=self.norm1.eps,
            dropout_p=self.dropout1.p if self.training else 0.0,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(self.norm1, RMSNorm),
        )
        return normed, normed if self.tied_norm else other[0], residual


def _mixer(mixer_cls: Any, dim: int) -> nn.Module:
    return (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)


def _mlp(mlp_cls: Any, dim: int) -> nn.Module:
    return (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)


def _norm_of_sum(x: Tensor, norm: Any, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    return norm(x.to(norm.weight.dtype)), x.float() if residual_in_fp32 else x


def _check_fusible(norm: nn.Module, dropout: nn.Module) -> None:
    if not isinstance(norm, nn.LayerNorm | RMSNorm) or not isinstance(dropout, nn.Dropout):
        raise InvalidArgument(
            "fused_dropout_add_ln needs nn.LayerNorm or RMSNorm, and nn.Dropout, got "
            f"{type(norm).__name__} and {type(dropout).__name__}"
        )


def _mark_norms(block: nn.Module, sequence_parallel: bool, shared: bool) -> None:
    for name in ("norm1", "norm2"):
        norm: nn.Module = getattr(block, name, nn.Identity())
        for parameter in norm.parameters():
            for mark, wanted in (("_sequence_parallel", sequence_parallel), ("_shared_params", shared)):
                if wanted:
                    setattr(parameter, mark, True)
