"""Names and signatures that other packages call by position, by keyword or introspect: frozen, argument for argument.

Source: flash_attn 2.8.3, flash_attn/flash_attn_interface.py; FlashAttnQKVPackedFunc and its like take `is_grad_enabled`
last. API.md 1.2 and 1.3.
"""

import importlib
import inspect

import pytest
import torch

import flash_attn
from flash_attn import backward, bert_padding, flash_attn_interface
from flash_attn.backward import autograd_functions

EMPTY = inspect.Parameter.empty
OPTIONS = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
CACHE_OPTIONS = [
    ("k", None),
    ("v", None),
    ("rotary_cos", None),
    ("rotary_sin", None),
    ("cache_seqlens", None),
    ("cache_batch_idx", None),
    ("cache_leftpad", None),
    ("block_table", None),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("rotary_interleaved", True),
    ("alibi_slopes", None),
    ("num_splits", 0),
    ("return_softmax_lse", False),
]
PACKED_LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
PUBLIC = {
    "flash_attn_func": ("q k v", OPTIONS),
    "flash_attn_qkvpacked_func": ("qkv", OPTIONS),
    "flash_attn_kvpacked_func": ("q kv", OPTIONS),
    "flash_attn_varlen_func": (f"q k v {PACKED_LENGTHS}", [*OPTIONS, ("block_table", None)]),
    "flash_attn_varlen_qkvpacked_func": ("qkv cu_seqlens max_seqlen", OPTIONS),
    "flash_attn_varlen_kvpacked_func": (f"q kv {PACKED_LENGTHS}", OPTIONS),
    "flash_attn_with_kvcache": ("q k_cache v_cache", CACHE_OPTIONS),
}
EXTRA = {  # ours, keyword-only, so that upstream's positions stay upstream's; transformers looks for s_aux by name
    name: [("s_aux", None), ("learnable_sink", None)]
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
}
NUMBERS = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
GRADIENTS = "dout q k v out softmax_lse dq dk dv"
OPERATORS = {
    "_flash_attn_forward": (f"q k v {NUMBERS} return_softmax", []),
    "_flash_attn_varlen_forward": (
        f"q k v {PACKED_LENGTHS} dropout_p softmax_scale causal",
        [
            ("window_size_left", -1),
            ("window_size_right", -1),
            ("softcap", 0.0),
            ("alibi_slopes", None),
            ("return_softmax", False),
            ("block_table", None),
            ("leftpad_k", None),
            ("seqused_k", None),
            ("zero_tensors", False),
        ],
    ),
    "_flash_attn_backward": (f"{GRADIENTS} {NUMBERS} deterministic", [("rng_state", None)]),
    "_flash_attn_varlen_backward": (
        f"{GRADIENTS} {PACKED_LENGTHS} {NUMBERS} deterministic",
        [("rng_state", None), ("zero_tensors", False)],
    ),
}
CLASS_NUMBERS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_softmax"
CLASSES = {
    "FlashAttnFunc": f"q k v {CLASS_NUMBERS}",
    "FlashAttnQKVPackedFunc": f"qkv {CLASS_NUMBERS}",
    "FlashAttnKVPackedFunc": f"q kv {CLASS_NUMBERS}",
    "FlashAttnVarlenFunc": f"q k v {PACKED_LENGTHS} {CLASS_NUMBERS} block_table",
    "FlashAttnVarlenQKVPackedFunc": f"qkv cu_seqlens max_seqlen {CLASS_NUMBERS}",
    "FlashAttnVarlenKVPackedFunc": f"q kv {PACKED_LENGTHS} {CLASS_NUMBERS}",
}
SIDES = [("window_size_left", -1), ("window_size_right", -1), ("alibi_slopes", None), ("return_softmax_lse", False)]
OTHER_NAMES = [
    "USE_TRITON_ROCM",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_gpu",
    "maybe_contiguous",
    "round_multiple",
]
BERT_PADDING = {
    "IndexFirstAxis": None,
    "IndexFirstAxisResidual": None,
    "IndexPutFirstAxis": None,
    "index_first_axis": None,
    "index_first_axis_residual": None,
    "index_put_first_axis": None,
    "pad_input": "hidden_states indices batch seqlen",
    "unpad_input": "hidden_states attention_mask unused_mask",
    "unpad_input_for_concatenated_sequences": "hidden_states attention_mask_in_length",
}


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def required(names):
    return [(name, EMPTY) for name in names.split()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name):
    names, options = PUBLIC[name]
    function = getattr(flash_attn, name)
    assert function is getattr(flash_attn_interface, name)
    assert name in flash_attn.__all__
    extra = EXTRA.get(name, [])
    assert parameters(function) == required(names) + options + extra
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    upstreams = len(kinds) - len(extra)
    assert set(kinds[:upstreams]) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert kinds[upstreams:] == [inspect.Parameter.KEYWORD_ONLY] * len(extra)


def plain_function(operator):
    """As ring-flash-attention finds a function to introspect (ring_flash_attn/utils.py)."""
    return operator if inspect.isfunction(operator) else operator._init_fn


@pytest.mark.parametrize("name", OPERATORS)
def test_private_operators(name):
    names, options = OPERATORS[name]
    spec = inspect.getfullargspec(plain_function(getattr(flash_attn_interface, name)))
    assert spec.args == names.split() + [option for option, _ in options]
    assert list(spec.defaults or ()) == [default for _, default in options]
    assert spec.varargs is spec.varkw is None and not spec.kwonlyargs
    assert "window_size" not in spec.args


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operators(name):
    """torch.ops.flash_attn.<name> has the arguments of the function and mutates the gradients alone."""
    names, options = OPERATORS[name]
    packet = getattr(torch.ops.flash_attn, name)
    assert getattr(flash_attn_interface, f"_wrapped{name}") is packet
    schema = packet.default._schema
    assert [argument.name for argument in schema.arguments] == names.split() + [option for option, _ in options]
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == (["dq", "dk", "dv"] if "backward" in name else [])
    assert len(schema.returns) == (1 if "backward" in name else 4)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_called_by_keyword(name):
    """Clients build a dictionary from the names and call with it."""
    names, _ = OPERATORS[name]
    q = torch.randn(5, 2, 8) if "varlen" in name else torch.randn(1, 5, 2, 8)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    lse = torch.zeros(2, 5) if "varlen" in name else torch.zeros(1, 2, 5)
    values = dict(zip(PACKED_LENGTHS.split(), (cu, cu, 5, 5), strict=True))
    values |= dict.fromkeys(["dout", "q", "k", "v", "out"], q) | {x: torch.empty_like(q) for x in ("dq", "dk", "dv")}
    values |= dict(zip(NUMBERS.split(), (0.0, 1.0, True, -1, -1, 0.0, None), strict=True))
    values |= dict(softmax_lse=lse, return_softmax=False, deterministic=False)
    arguments = {x: values[x] for x in names.split()}
    by_name, by_position = (
        getattr(flash_attn_interface, name)(**arguments),
        getattr(flash_attn_interface, name)(*arguments.values()),
    )
    for a, b in zip(by_name, by_position, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_autograd_classes(name):
    function = getattr(flash_attn_interface, name)
    assert issubclass(function, torch.autograd.Function)
    found = list(inspect.signature(function.forward).parameters)
    assert found == ["ctx", *CLASSES[name].split(), "is_grad_enabled"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_of_the_interface(name):
    assert hasattr(flash_attn_interface, name)


def test_small_helpers():
    assert parameters(flash_attn_interface._get_block_size_n) == required("device head_dim is_dropout is_causal")
    assert parameters(flash_attn_interface.round_multiple) == required("x m")
    assert parameters(flash_attn_interface.maybe_contiguous) == required("x")
    assert [flash_attn_interface.round_multiple(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert flash_attn_interface.maybe_contiguous(None) is None
    x = torch.zeros(2, 3)
    assert flash_attn_interface.maybe_contiguous(x) is x
    assert flash_attn_interface.maybe_contiguous(x.T).stride(-1) == 1


def test_block_size_covers_any_row_of_the_scores():
    assert flash_attn_interface._get_block_size_n(torch.device("cpu"), 64, True, False) >= 2**20


@pytest.mark.parametrize("name", BERT_PADDING)
def test_bert_padding(name):
    found = getattr(bert_padding, name)
    if BERT_PADDING[name] is not None:
        assert list(inspect.signature(found).parameters) == BERT_PADDING[name].split()


def test_names_of_the_backward_package():
    """REQUIREMENTS 2.2 and 3."""
    assert backward.FlashAttnFunction is autograd_functions.FlashAttnFunction
    dense, varlen = backward.FlashAttnFunction.forward, backward.FlashAttnVarlenFunction.forward
    options = [("causal", False), ("softmax_scale", None), *SIDES]
    assert parameters(dense) == required("ctx q k v") + options
    assert parameters(varlen) == required(f"ctx q k v {PACKED_LENGTHS}") + options
    names = [name for name, _ in parameters(backward.flash_attn_func_with_grad)]
    assert names[:5] == ["q", "k", "v", "causal", "softmax_scale"]


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.flash_attn_interface", "flash_attn.backward"])
def test_every_name_in_all_exists(module):
    module = importlib.import_module(module)
    assert all(getattr(module, name) is not None for name in module.__all__)
