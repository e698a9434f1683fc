"""Every check of a call: upstream's words, the values at fault, and no backend touched."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import flash_attn
from flash_attn import dispatch
from flash_attn.backends.base import ForwardResult
from flash_attn.errors import InvalidArgument
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from flash_attn.problem import describe

B, SQ, SK, H, HK, D = 2, 5, 7, 4, 2, 16
TOTAL_Q, TOTAL_K, PAGES, PAGE = 9, 12, 3, 8


class Recorder:
    """A backend that must not be called."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def unsupported(self, problem, hardware):
        return None

    def forward(self, problem, operands, return_scores):
        self.calls.append("forward")
        return ForwardResult(torch.zeros_like(operands.q), torch.zeros(1))

    def backward(self, problem, operands, dout, out, softmax_lse, gradients):
        self.calls.append("backward")
        return softmax_lse


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    backend = Recorder()
    for choice in ("choose_backend", "choose_backward_backend"):
        monkeypatch.setattr(dispatch, choice, lambda problem, hardware, requested: backend)
    monkeypatch.setattr(dispatch, "_plans", {})
    return backend


class Fault(NamedTuple):
    """One wrong call: what it changes, how its message starts, what else it quotes."""

    name: str
    changes: dict
    words: str
    values: tuple[str, ...] = ()


def half(*shape, dtype=torch.float16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


def every_other(*shape, dtype):
    """A tensor whose last stride is 2."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def check_raises(fault: Fault, call: Callable, recorder: Recorder):
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.startswith(fault.words), message
    for value in fault.values:
        assert value in message, f"{value!r} is not quoted in: {message}"
    assert recorder.calls == []


def ids(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


NUMBERS = [
    Fault("dropout 1", dict(dropout_p=1.0), "p_dropout must be", ("< 1", "1.0")),
    Fault("dropout above 1", dict(dropout_p=1.5), "p_dropout must be", ("1.5",)),
    Fault("dropout negative", dict(dropout_p=-0.1), "p_dropout must be", ("-0.1",)),
    Fault("dropout nan", dict(dropout_p=math.nan), "p_dropout must be", ("nan",)),
    Fault("dropout inf", dict(dropout_p=math.inf), "p_dropout must be", ("inf",)),
    Fault("scale nan", dict(softmax_scale=math.nan), "softmax_scale must be finite", ("nan",)),
    Fault("scale inf", dict(softmax_scale=math.inf), "softmax_scale must be finite", ("inf",)),
    Fault("scale -inf", dict(softmax_scale=-math.inf), "softmax_scale must be finite", ("-inf",)),
    Fault("softcap nan", dict(softcap=math.nan), "softcap must be finite", ("nan",)),
    Fault("softcap inf", dict(softcap=math.inf), "softcap must be finite", ("inf",)),
    Fault("softcap negative", dict(softcap=-1.0), "softcap must be finite and at least 0", ("-1.0",)),
    Fault("window too small", dict(window_size=(-2, 0)), "window_size", ("-2",)),
    Fault("window right too small", dict(window_size=(0, -2)), "window_size", ("-2",)),
    Fault("window fraction", dict(window_size=(1.5, 0)), "window_size", ("1.5",)),
    Fault("window nan", dict(window_size=(math.nan, 0)), "window_size", ("nan",)),
    Fault("window inf", dict(window_size=(0, math.inf)), "window_size", ("inf",)),
    Fault("window None", dict(window_size=(None, 0)), "window_size", ("None",)),
    Fault("window words", dict(window_size=("wide", 0)), "window_size", ("wide",)),
    Fault("window of one", dict(window_size=(3,)), "window_size must be (left, right)", ("(3,)",)),
    Fault("window of three", dict(window_size=(1, 2, 3)), "window_size must be (left, right)", ("(1, 2, 3)",)),
    Fault("window not a pair", dict(window_size=4), "window_size must be (left, right)", ("4",)),
    Fault("window tensor", dict(window_size=torch.tensor([-3, 1])), "window_size", ("-3",)),
    Fault("window tensor fraction", dict(window_size=torch.tensor([0.5, 1.0])), "window_size", ("0.5",)),
]


def slopes_faults(batch_size):
    return [
        Fault("alibi dtype", dict(alibi_slopes=half(H)), "ALiBi slopes must have dtype fp32", ("torch.float16",)),
        Fault(
            "alibi heads", dict(alibi_slopes=torch.zeros(H + 1)), "alibi_slopes must have shape", (f"({H},)", f"({H + 1},)")
        ),
        Fault(
            "alibi batch", dict(alibi_slopes=torch.zeros(batch_size + 1, H)), "alibi_slopes must have shape",
            (str((batch_size, H)), str((batch_size + 1, H))),
        ),
        Fault("alibi rank", dict(alibi_slopes=torch.zeros(1, 1, H)), "alibi_slopes must have shape", (str((1, 1, H)),)),
        Fault(
            "alibi strides", dict(alibi_slopes=every_other(batch_size, H, dtype=torch.float32)),
            "ALiBi slopes tensor must have contiguous last dimension", ("2)",),
        ),
        Fault(
            "alibi device", dict(alibi_slopes=torch.zeros(H, device="meta")), "alibi_slopes must be on",
            ("cpu", "meta"),
        ),
    ]  # fmt: skip


def attend_dense(**changes):
    arguments = dict(q=half(B, SQ, H, D), k=half(B, SK, HK, D), v=half(B, SK, HK, D))
    return flash_attn.flash_attn_func(**{**arguments, **changes})


def keys(*shape, **words):
    """Changes that give k and v one shape."""
    return dict(k=half(*shape, **words), v=half(*shape, **words))


SAME_DTYPE = "must have the same dtype"
DENSE = [
    Fault("q rank", dict(q=half(SQ, H, D)), "q, k and v must have shape", (str((SQ, H, D)), str((B, SK, HK, D)))),
    Fault("k rank", dict(k=half(SK, HK, D)), "q, k and v must have shape", (str((SK, HK, D)),)),
    Fault("v rank", dict(v=half(B, SK, HK * D)), "q, k and v must have shape", (str((B, SK, HK * D)),)),
    Fault("all rank 5", dict(q=half(1, B, SQ, H, D), **keys(1, B, SK, H, D)), "q, k and v must have shape"),
    Fault(
        "integers",
        dict(q=half(B, SQ, H, D, dtype=torch.int32), **keys(B, SK, HK, D, dtype=torch.int32)),
        "FlashAttention only support fp16 and bf16 data type",
        ("torch.int32",),
    ),
    Fault(
        "complex",
        dict(q=half(B, SQ, H, D, dtype=torch.complex64), **keys(B, SK, HK, D, dtype=torch.complex64)),
        "FlashAttention only support fp16 and bf16 data type",
        ("torch.complex64",),
    ),
    Fault(
        "k dtype",
        dict(k=half(B, SK, HK, D, dtype=torch.bfloat16)),
        f"query and key {SAME_DTYPE}",
        ("torch.float16", "torch.bfloat16"),
    ),
    Fault(
        "v dtype",
        dict(v=half(B, SK, HK, D, dtype=torch.float32)),
        f"query and value {SAME_DTYPE}",
        ("torch.float16", "torch.float32"),
    ),
    Fault("k device", dict(k=half(B, SK, HK, D, device="meta")), "q, k and v must be on the same", ("cpu", "meta")),
    Fault("v device", dict(v=half(B, SK, HK, D, device="meta")), "q, k and v must be on the same", ("cpu", "meta")),
    Fault("q device", dict(q=half(B, SQ, H, D, device="meta")), "q, k and v must be on the same", ("cpu", "meta")),
    Fault(
        "head dim 257",
        dict(q=half(B, SQ, H, 257), **keys(B, SK, HK, 257)),
        "FlashAttention forward only supports head dimension at most 256",
        ("257",),
    ),
    Fault(
        "head dim 0",
        dict(q=half(B, SQ, H, 0), **keys(B, SK, HK, 0)),
        "FlashAttention forward only supports head dimension at most 256",
        ("got 0",),
    ),
    Fault("head dims of q and k", keys(B, SK, HK, D // 2), "k and v must have shape", (str(D), str((B, SK, HK, D // 2)))),
    Fault("head dim of v", dict(v=half(B, SK, HK, 2 * D)), "k and v must have shape", (str((B, SK, HK, 2 * D)),)),
    Fault("lengths of k and v", dict(v=half(B, SK + 1, HK, D)), "k and v must have shape", (str((B, SK + 1, HK, D)),)),
    Fault("heads of k and v", dict(v=half(B, SK, H, D)), "k and v must have shape", (str((B, SK, H, D)),)),
    Fault("batch of k", keys(B + 1, SK, HK, D), "k must have shape", (str(B), str((B + 1, SK, HK, D)))),
    Fault(
        "heads do not divide",
        keys(B, SK, 3, D),
        "Number of heads in key/value must divide number of heads in query",
        ("3", str(H)),
    ),
    Fault(
        "more key heads", keys(B, SK, 2 * H, D), "Number of heads in key/value must divide number of heads in query",
        (str(2 * H), str(H)),
    ),
    Fault("no key heads", keys(B, SK, 0, D), "Number of heads in key/value must divide number of heads in query", ("0",)),
    *NUMBERS,
    *slopes_faults(B),
]  # fmt: skip


@pytest.mark.parametrize("fault", DENSE, ids=ids)
def test_dense(fault, recorder):
    check_raises(fault, lambda: attend_dense(**fault.changes), recorder)


@pytest.mark.parametrize("fault", NUMBERS, ids=ids)
def test_packed_operands(fault, recorder):
    qkv, kv = half(B, SQ, 3, H, D), half(B, SK, 2, H, D)
    check_raises(fault, lambda: flash_attn.flash_attn_qkvpacked_func(qkv, **fault.changes), recorder)
    check_raises(fault, lambda: flash_attn.flash_attn_kvpacked_func(half(B, SQ, H, D), kv, **fault.changes), recorder)


def test_the_correct_call_reaches_the_backend(recorder):
    attend_dense()
    attend_varlen()
    attend_paged()
    attend_private()
    assert recorder.calls == ["forward"] * 4


@pytest.mark.parametrize("wrong", ["q", "k", "v"])
def test_operands_with_a_strided_last_dimension(wrong):
    """The public functions copy such operands; whoever calls below them is told."""
    tensors = dict(q=half(B, SQ, H, D), k=half(B, SK, H, D), v=half(B, SK, H, D))
    tensors[wrong] = every_other(*tensors[wrong].shape, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match=r"^Input tensor must have contiguous last dimension.* 2"):
        describe(**tensors, dropout_p=0.0, softmax_scale=1.0, causal=False, window_size_left=-1, window_size_right=-1,
                 softcap=0.0)  # fmt: skip


def varlen_arguments():
    return dict(
        q=half(TOTAL_Q, H, D),
        k=half(TOTAL_K, HK, D),
        v=half(TOTAL_K, HK, D),
        cu_seqlens_q=int32(0, 4, TOTAL_Q),
        cu_seqlens_k=int32(0, 5, TOTAL_K),
        max_seqlen_q=5,
        max_seqlen_k=7,
    )


def attend_varlen(**changes):
    return flash_attn.flash_attn_varlen_func(**{**varlen_arguments(), **changes})


def attend_paged(**changes):
    pages = dict(**keys(PAGES, PAGE, HK, D), block_table=int32([0, 1], [2, 0]))
    return attend_varlen(**{**pages, **changes})


def attend_private(**changes):
    words = dict(dropout_p=0.0, softmax_scale=1.0, causal=False)
    return _flash_attn_varlen_forward(**{**varlen_arguments(), **words, **changes})


def index_faults(name, length):
    wrong = int32(*range(length + 1))
    return [
        Fault(f"{name} dtype", {name: wrong[:length].long()}, f"{name} must have dtype int32", ("torch.int64",)),
        Fault(f"{name} float", {name: wrong[:length].float()}, f"{name} must have dtype int32", ("torch.float32",)),
        Fault(f"{name} rank", {name: wrong[:length][None]}, f"{name} must have shape", (str((1, length)),)),
        Fault(f"{name} strides", {name: int32(*range(2 * length))[::2]}, f"{name} must be contiguous", ("(2,)",)),
        Fault(
            f"{name} device", {name: int32(*range(length), device="meta")}, f"{name} must be on", ("cpu", "meta")
        ),
    ]  # fmt: skip


VARLEN = [
    *index_faults("cu_seqlens_q", 3),
    *index_faults("cu_seqlens_k", 3),
    Fault("no cu_seqlens_q entry", dict(cu_seqlens_q=int32()), "cu_seqlens_q must have shape", ("(0,)",)),
    Fault("scalar cu_seqlens_q", dict(cu_seqlens_q=torch.tensor(3).int()), "cu_seqlens_q must have shape", ("()",)),
    Fault("more cu_seqlens_k", dict(cu_seqlens_k=int32(0, 1, 2, 3)), "cu_seqlens_k must have shape", ("(3,)", "(4,)")),
    Fault("fewer cu_seqlens_k", dict(cu_seqlens_k=int32(0, 12)), "cu_seqlens_k must have shape", ("(3,)", "(2,)")),
    Fault("max_seqlen_q negative", dict(max_seqlen_q=-1), "max_seqlen_q must be", ("-1",)),
    Fault("max_seqlen_k negative", dict(max_seqlen_k=-1), "max_seqlen_k must be", ("-1",)),
    Fault("max_seqlen_q huge", dict(max_seqlen_q=2**31), "max_seqlen_q must be", (str(2**31),)),
    Fault("q rank", dict(q=half(1, TOTAL_Q, H, D)), "q, k and v must have shape", (str((1, TOTAL_Q, H, D)),)),
    Fault("k rank", keys(TOTAL_K, HK * D), "q, k and v must have shape", (str((TOTAL_K, HK * D)),)),
    Fault(
        "pages without a table", keys(PAGES, PAGE, HK, D), "k must have shape (total_k", (str((PAGES, PAGE, HK, D)),)
    ),
    Fault("v tokens", dict(v=half(TOTAL_K + 1, HK, D)), "k and v must have shape", (str((TOTAL_K + 1, HK, D)),)),
    Fault(
        "head dim 300",
        dict(q=half(TOTAL_Q, H, 300), **keys(TOTAL_K, HK, 300)),
        "FlashAttention forward only supports head dimension at most 256",
        ("300",),
    ),
    Fault(
        "heads do not divide",
        keys(TOTAL_K, 3, D),
        "Number of heads in key/value must divide number of heads in query",
        ("3", str(H)),
    ),
    Fault(
        "k dtype",
        dict(k=half(TOTAL_K, HK, D, dtype=torch.bfloat16)),
        f"query and key {SAME_DTYPE}",
        ("torch.float16", "torch.bfloat16"),
    ),
    *NUMBERS,
    *slopes_faults(2),
]


@pytest.mark.parametrize("fault", VARLEN, ids=ids)
def test_varlen(fault, recorder):
    check_raises(fault, lambda: attend_varlen(**fault.changes), recorder)


PAGED = [
    Fault(
        "table dtype", dict(block_table=int32([0, 1], [2, 0]).long()), "block_table must have dtype torch.int32",
        ("torch.int64",),
    ),
    Fault("table rank", dict(block_table=int32(0, 1)), "block_table must have shape", ("2", "(2,)")),
    Fault("table batch", dict(block_table=int32([0], [1], [2])), "block_table must have shape", ("size 2", "(3, 1)")),
    Fault(
        "table strides", dict(block_table=every_other(2, 2, dtype=torch.int32)),
        "block_table must have contiguous last dimension", ("(4, 2)",),
    ),
    Fault(
        "table device", dict(block_table=int32([0, 1], [2, 0], device="meta")), "block_table must be on",
        ("cpu", "meta"),
    ),
    Fault("keys without pages", keys(TOTAL_K, HK, D), "k must have shape (num_blocks", (str((TOTAL_K, HK, D)),)),
    Fault("pages without room", keys(PAGES, 0, HK, D), "k must have shape (num_blocks", (str((PAGES, 0, HK, D)),)),
]  # fmt: skip


@pytest.mark.parametrize("fault", PAGED, ids=ids)
def test_paged(fault, recorder):
    check_raises(fault, lambda: attend_paged(**fault.changes), recorder)


def without_device(faults):
    """Operators on meta tensors run their shape rules alone, so devices are checked below them."""
    return [fault for fault in faults if "device" not in fault.name]


PRIVATE = [
    *without_device(index_faults("seqused_k", 2)),
    *without_device(index_faults("leftpad_k", 2)),
    Fault("seqused_k length", dict(seqused_k=int32(1, 2, 3)), "seqused_k must have shape", ("(2,)", "(3,)")),
    Fault("leftpad_k length", dict(leftpad_k=int32(1)), "leftpad_k must have shape", ("(2,)", "(1,)")),
    Fault("window left", dict(window_size_left=-2), "window_size must be at least -1", ("-2",)),
    Fault("window right", dict(window_size_right=-5), "window_size must be at least -1", ("-5",)),
]


@pytest.mark.parametrize("fault", PRIVATE, ids=ids)
def test_private_operator(fault, recorder):
    check_raises(fault, lambda: attend_private(**fault.changes), recorder)


@pytest.mark.parametrize("name", ["seqused_k", "leftpad_k"])
def test_lengths_on_another_device(name, recorder):
    arguments = {**varlen_arguments(), name: int32(1, 2, device="meta")}
    words = (0.0, 1.0, False, -1, -1, 0.0, None, False)
    q, k, v = (arguments.pop(x) for x in "qkv")
    fault = Fault(name, {}, f"{name} must be on", ("cpu", "meta"))
    check_raises(fault, lambda: dispatch.forward(q, k, v, *words, **arguments), recorder)


def test_cu_seqlens_come_together(recorder):
    q, k = half(TOTAL_Q, H, D), half(TOTAL_K, HK, D)
    with pytest.raises(InvalidArgument, match="cu_seqlens_k must be given with cu_seqlens_q"):
        dispatch.forward(q, k, k, 0.0, 1.0, False, -1, -1, 0.0, None, False, cu_seqlens_q=int32(0, TOTAL_Q))
    assert recorder.calls == []


def gradient_arguments():
    q, k = half(B, SQ, H, D), half(B, SK, HK, D)
    tensors = dict(dout=q, q=q, k=k, v=k, out=q, softmax_lse=torch.zeros(B, H, SQ))
    gradients = dict(dq=half(B, SQ, H, D), dk=half(B, SK, HK, D), dv=half(B, SK, HK, D))
    words = dict(
        dropout_p=0.0, softmax_scale=1.0, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=False, rng_state=None,
    )  # fmt: skip
    return {**tensors, **gradients, **words}


def gradient_faults():
    shape, wrong = {"dk": (B, SK, HK, D), "dv": (B, SK, HK, D)}, torch.bfloat16
    dtypes = ("torch.float16", "torch.bfloat16")
    for name in ("out", "dout"):
        yield Fault(f"{name} dtype", {name: half(B, SQ, H, D, dtype=wrong)}, f"query and {name} {SAME_DTYPE}", dtypes)
    for name, like in (("dq", "q"), ("dk", "q"), ("dv", "q")):
        x = half(*shape.get(name, (B, SQ, H, D)), dtype=wrong)
        yield Fault(f"{name} dtype", {name: x}, f"{name} {SAME_DTYPE} as {like}", dtypes)
    for name in ("out", "dout", "dq", "dk", "dv"):
        correct = shape.get(name, (B, SQ, H, D))
        x = half(*correct[:-1], D + 1)
        yield Fault(f"{name} shape", {name: x}, f"{name} must have shape", (str(correct), str(tuple(x.shape))))
    for name in ("dq", "dk", "dv"):
        x = every_other(*shape.get(name, (B, SQ, H, D)), dtype=torch.float16)
        yield Fault(f"{name} strides", {name: x}, f"{name} must have contiguous last dimension", ("2)",))
    for name, lse in (("shape", torch.zeros(B, SQ, H)), ("rank", torch.zeros(H, B * SQ))):
        words = "softmax_lse must have shape"
        yield Fault(f"lse {name}", dict(softmax_lse=lse), words, (str((B, H, SQ)), str(tuple(lse.shape))))
    yield Fault("lse dtype", dict(softmax_lse=half(B, H, SQ)), "softmax_lse must have dtype fp32", ("torch.float16",))
    for name, state, value in (
        ("missing", None, "None"),
        ("dtype", int32(1, 2), "torch.int32"),
        ("shape", torch.zeros(3, dtype=torch.int64), "(3,)"),
    ):
        words = "dropout_p > 0 needs the rng_state" if state is None else "rng_state must be two int64 numbers"
        yield Fault(f"rng_state {name}", dict(dropout_p=0.1, rng_state=state), words, (value,))
    words = "FlashAttention backward only supports head dimension at most 256"
    q, k = half(B, SQ, H, 264), half(B, SK, HK, 264)
    yield Fault(
        "head dim 264", dict(q=q, dout=q, out=q, dq=q.clone(), k=k, v=k, dk=k.clone(), dv=k.clone()), words, ("264",)
    )
    yield Fault(
        "k dtype", dict(k=half(B, SK, HK, D, dtype=wrong)), f"query and key {SAME_DTYPE}", dtypes
    )  # fmt: skip
    yield Fault("dropout 1", dict(dropout_p=1.0), "p_dropout must be", ("< 1",))


@pytest.mark.parametrize("fault", list(gradient_faults()), ids=ids)
def test_gradients(fault, recorder):
    check_raises(fault, lambda: _flash_attn_backward(**{**gradient_arguments(), **fault.changes}), recorder)


@pytest.mark.parametrize("name", ["dout", "out", "softmax_lse", "dq", "dk", "dv"])
def test_gradients_on_another_device(name, recorder):
    arguments = gradient_arguments()
    arguments[name] = arguments[name].to("meta")
    fault = Fault(name, {}, f"{name} must be on", ("cpu", "meta"))
    check_raises(fault, lambda: dispatch.backward(**arguments), recorder)


def test_rng_state_on_another_device(recorder):
    arguments = {
        **gradient_arguments(),
        "dropout_p": 0.1,
        "rng_state": torch.zeros(2, dtype=torch.int64, device="meta"),
    }
    fault = Fault("rng_state", {}, "rng_state must be on", ("cpu", "meta"))
    check_raises(fault, lambda: dispatch.backward(**arguments), recorder)


def test_gradients_of_a_packed_batch(recorder):
    arguments = {**gradient_arguments(), **{k: v for k, v in varlen_arguments().items() if k not in "qkv"}}
    q, k = half(TOTAL_Q, H, D), half(TOTAL_K, HK, D)
    arguments |= dict(dout=q, q=q, k=k, v=k, out=q, dq=q.clone(), dk=k.clone(), dv=k.clone())
    del arguments["rng_state"]
    fault = Fault("lse", {}, "softmax_lse must have shape", (str((H, TOTAL_Q)), str((B, H, SQ))))
    check_raises(fault, lambda: _flash_attn_varlen_backward(**arguments), recorder)
    arguments["softmax_lse"] = torch.zeros(H, TOTAL_Q)
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"].long()
    fault = Fault("cu_seqlens", {}, "cu_seqlens_q must have dtype int32", ("torch.int64",))
    check_raises(fault, lambda: _flash_attn_varlen_backward(**arguments), recorder)


def test_a_correct_backward_reaches_the_backend(recorder):
    _flash_attn_backward(**gradient_arguments())
    assert recorder.calls == ["backward"]


def described(**changes):
    arguments = dict(
        q=half(3, 100, H, D), k=half(3, 129, HK, D), v=half(3, 129, HK, D), dropout_p=0.0, softmax_scale=1.0, causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0,
    )  # fmt: skip
    return describe(**{**arguments, **changes})


def test_problem_of_a_dense_call():
    problem, seqlen_q, seqlen_k = described(causal=True, softcap=2.0, alibi_slopes=torch.ones(3, H), deterministic=True)
    assert (seqlen_q, seqlen_k) == (100, 129)
    assert (problem.layout, problem.dtype, problem.headdim) == ("dense", "float16", D)
    assert (problem.nheads, problem.nheads_k) == (H, HK)
    assert (problem.batch_size, problem.seqlen_q, problem.seqlen_k) == (4, 128, 256)
    assert problem.window == (None, 0) and problem.causal
    assert problem.softcap and problem.alibi and problem.deterministic and not problem.dropout


def test_problem_holds_no_tensor_and_hashes():
    first, *_ = described(causal=True)
    second, *_ = described(causal=True, q=torch.ones(3, 99, H, D, dtype=torch.float16))
    assert first == second and hash(first) == hash(second)
    assert not any(isinstance(value, torch.Tensor) for value in first)


@pytest.mark.parametrize("shape", [(0, SQ, SK), (B, 0, SK), (B, SQ, 0), (0, 0, 0)])
def test_empty_operands_are_no_error(shape):
    batch_size, seqlen_q, seqlen_k = shape
    problem, *lengths = described(q=half(batch_size, seqlen_q, H, D), **keys(batch_size, seqlen_k, HK, D))
    assert lengths == [seqlen_q, seqlen_k]
    assert (problem.batch_size == 0) == (batch_size == 0)


@pytest.mark.parametrize("headdim", [1, 2, 59, 256])
def test_every_head_dimension_is_served(headdim):
    problem, *_ = described(q=half(B, SQ, H, headdim), **keys(B, SK, HK, headdim))
    assert problem.headdim == headdim
