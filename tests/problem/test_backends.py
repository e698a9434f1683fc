"""Which backend runs a call, what refuses it, which plan and which launch configuration it gets."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import flash_attn
from flash_attn import backends, dispatch, launch, reference
from flash_attn.backends import explain, portable, select_backend, use
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import CPU, Hardware
from flash_attn.launch import backward as backward_launch
from flash_attn.launch import forward as forward_launch
from flash_attn.launch.backward import BackwardConfig, dkdv_config, dq_config, joint_config, one_launch_config
from flash_attn.launch.forward import ForwardConfig, forward_config, head_dim_pad
from flash_attn.problem import AttentionProblem

HOPPER = Hardware("cuda", "sm_90", 132, 232448)
TURING = Hardware("cuda", "sm_75", 68, 65536)
CDNA = Hardware("hip", "gfx942", 304, 65536)
RDNA = Hardware("hip", "gfx1100", 96, 65536)
OTHER = Hardware("xpu", "", 1, 0)
GPUS = [HOPPER, Hardware("cuda", "sm_80", 108, 166912), Hardware("cuda", "sm_86", 84, 101376), CDNA, RDNA]
GPUS += [Hardware("cuda", "sm_100", 148, 232448), Hardware("cuda", "sm_120", 170, 101376)]

needs_triton = pytest.mark.skipif(
    explain(AttentionProblem("dense", "float16", 1, 1, 1, 1, 1, 16), HOPPER)["portable"].startswith("Triton is not"),
    reason="Triton is not installed",
)


def problem(dtype="bfloat16", headdim=64, **changes) -> AttentionProblem:
    numbers = dict(batch_size=2, seqlen_q=1024, seqlen_k=1024, nheads=8, nheads_k=2)
    return AttentionProblem("dense", dtype, headdim=headdim, **{**numbers, **changes})


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch):
    monkeypatch.setattr(backends, "_environment", lambda: None)


@pytest.fixture
def plans(monkeypatch):
    fresh = {}
    monkeypatch.setattr(dispatch, "_plans", fresh)
    return fresh


def test_cpu_gets_the_cpu_backend():
    assert select_backend(problem("float32"), CPU).name == ("portable" if interpreting() else "cpu")
    assert select_backend(problem("bfloat16"), CPU).name == "cpu"


def interpreting() -> bool:
    return explain(problem("float32"), CPU)["portable"] == "runs it"


@needs_triton
@pytest.mark.parametrize("hardware", GPUS, ids=lambda hardware: hardware.arch)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gpus_get_the_portable_backend(hardware, dtype):
    assert select_backend(problem(dtype), hardware).name == "portable"


@pytest.mark.parametrize("hardware", [HOPPER, CDNA], ids=lambda hardware: hardware.arch)
def test_float64_on_a_gpu_gets_the_reference(hardware):
    assert select_backend(problem("float64"), hardware).name == "reference"


@pytest.mark.parametrize("name", list(backends.MODULES))
def test_use(name):
    served = [chosen for chosen in (CPU, HOPPER) if backends.load(name).unsupported(problem("float64"), chosen) is None]
    with use(name):
        assert backends.requested_backend() == name
        for hardware in served:
            assert select_backend(problem("float64"), hardware).name == name
    assert backends.requested_backend() is None


def test_use_nests_and_survives_errors():
    with use("cpu"):
        with pytest.raises(KeyError), use("reference"):
            assert backends.requested_backend() == "reference"
            raise KeyError
        assert backends.requested_backend() == "cpu"
        with use(None):
            assert backends.requested_backend() is None


def test_use_of_an_unknown_name():
    with pytest.raises(InvalidArgument, match=r"'cuda'.*portable, cpu, flaggems, reference"), use("cuda"):
        pass


def test_use_goes_before_the_environment(monkeypatch):
    monkeypatch.setattr(backends, "_environment", lambda: "reference")
    assert select_backend(problem("float32"), CPU).name == "reference"
    with use("cpu"):
        assert select_backend(problem("float32"), CPU).name == "cpu"


PROGRAM = """
import torch, flash_attn
from flash_attn import backends, dispatch
x = torch.zeros(1, 4, 1, 8)
flash_attn.flash_attn_func(x, x, x)
print(*{plan.backend.name for plan in dispatch._plans.values()})
"""


def run_with(value):
    environment = {**os.environ, "FLASH_ATTENTION_BACKEND": value}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("value, name", [("reference", "reference"), ("", "cpu")])
def test_environment_variable(value, name):
    result = run_with(value)
    assert result.stdout.split() == [name], result.stderr


@pytest.mark.parametrize(
    "value, words",
    [("cutlass", "there is no backend 'cutlass'"), ("portable", "portable: "), ("flaggems", "flaggems: ")],
)
def test_environment_variable_that_cannot_be_followed(value, words):
    result = run_with(value)
    assert result.returncode != 0 and words in result.stderr


def test_no_silent_fallback():
    """A backend asked for by name runs or says why not, though another could run the problem."""
    for name, hardware, dtype in (
        ("portable", HOPPER, "float64"),
        ("portable", TURING, "float16"),
        ("cpu", HOPPER, "float16"),
    ):
        with use(name), pytest.raises(UnsupportedProblem) as caught:
            select_backend(problem(dtype), hardware)
        assert list(caught.value.reasons) == [name]
        assert f"backend {name!r} cannot run this problem" in str(caught.value)
        assert caught.value.reasons[name] in str(caught.value)


@needs_triton
@pytest.mark.parametrize(
    "dtype, hardware, words",
    [
        ("float64", HOPPER, "float64"),
        ("float16", TURING, "FlashAttention only supports Ampere GPUs or newer, this one is sm_75"),
        ("bfloat16", CPU, "interprete"),
    ],
)
def test_reasons_of_the_portable_backend(dtype, hardware, words):
    assert words in explain(problem(dtype), hardware)["portable"]


@needs_triton
@pytest.mark.parametrize(
    "release, refused", [("3.2.0", True), ("3.4.0", True), ("3.5.1", False), ("3.10.0+git1", False)]
)
def test_old_releases_of_triton_are_refused(monkeypatch, release, refused):
    """An import that fails, or an attribute that is missing, would be all that a user sees."""
    import triton

    monkeypatch.setattr(triton, "__version__", release)
    monkeypatch.setattr(portable, "triton_missing", portable.triton_missing.__wrapped__)
    wanted = (
        f"the kernels need Triton 3.5 or newer, which torch 2.9 and newer bring; this is {release}" if refused else None
    )
    assert portable.no_kernels("float16", HOPPER) == wanted


def test_reason_of_the_cpu_backend():
    for hardware in (HOPPER, CDNA, OTHER):
        assert f"on {hardware.kind}" in explain(problem(), hardware)["cpu"]


@pytest.mark.parametrize("hardware", [HOPPER, CDNA, CPU], ids=lambda hardware: hardware.kind)
def test_flaggems_runs_on_request_only(monkeypatch, hardware):
    """On NVIDIA, AMD and the CPU; it accepts the problem, and refuses nothing."""
    accepting = SimpleNamespace(name="flaggems", forward_only="no gradients", unsupported=lambda *_: None)
    monkeypatch.setattr(
        backends, "load", lambda name, load=backends.load: accepting if name == "flaggems" else load(name)
    )
    backends.choose_backend.cache_clear()
    asked = problem(headdim=52)
    assert select_backend(asked, hardware) is not accepting
    assert explain(asked, hardware)["flaggems"].startswith("could run it, gradients by ")
    with use("flaggems"):
        assert select_backend(asked, hardware) is accepting
    backends.choose_backend.cache_clear()


def test_flaggems_comes_first_on_other_hardware(monkeypatch, caplog):
    accepting = SimpleNamespace(name="flaggems", forward_only="no gradients", unsupported=lambda *_: None)
    monkeypatch.setattr(
        backends, "load", lambda name, load=backends.load: accepting if name == "flaggems" else load(name)
    )
    for cached in (backends.choose_backend, backends.choose_backward_backend, backends._log_routing_once):
        cached.cache_clear()
    asked = problem(headdim=52)
    assert select_backend(asked, OTHER) is accepting
    with caplog.at_level("INFO", logger="flash_attn"):
        gradients = backends.choose_backward_backend(asked, OTHER, None)
    assert gradients.name in ("portable", "reference")
    assert caplog.messages == [f"gradients of backend flaggems are computed by {gradients.name}: no gradients"]
    assert explain(asked, OTHER)["flaggems"] == f"runs it, gradients by {gradients.name}: no gradients"
    for cached in (backends.choose_backend, backends.choose_backward_backend):
        cached.cache_clear()


def test_unsupported_problem_lists_every_reason(monkeypatch):
    refusing = {name: SimpleNamespace(unsupported=lambda *_, name=name: f"{name} says no") for name in backends.MODULES}
    monkeypatch.setattr(backends, "load", refusing.__getitem__)
    asked = problem(headdim=77)
    with pytest.raises(UnsupportedProblem, match="no backend can run this problem") as caught:
        select_backend(asked, CPU)
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, NotImplementedError)
    tried = backends.automatic_order(CPU)
    assert caught.value.reasons == {name: f"{name} says no" for name in tried}
    for name in tried:
        assert f"{name}: {name} says no" in str(caught.value)
    assert "headdim=77" in str(caught.value)


@pytest.mark.parametrize("hardware", [CPU, *GPUS, TURING, OTHER], ids=lambda hardware: hardware.arch or hardware.kind)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_explain_agrees_with_the_choice(hardware, dtype):
    verdicts = explain(problem(dtype), hardware)
    assert list(verdicts) == list(backends.MODULES)
    chosen = [name for name, verdict in verdicts.items() if verdict == "runs it"]
    assert chosen == [select_backend(problem(dtype), hardware).name]
    for name, verdict in verdicts.items():
        refused = backends.load(name).unsupported(problem(dtype), hardware)
        assert verdict == refused if refused else backends.able(verdict)


def test_falling_back_to_plain_pytorch_is_logged(caplog):
    backends.choose_backend.cache_clear()
    with caplog.at_level("WARNING", logger="flash_attn"):
        assert select_backend(problem("float16", headdim=61), TURING).name == "reference"
    assert "plain PyTorch" in caplog.text and "Ampere" in caplog.text


def tensors(seed, layout="contiguous", dtype=torch.float32, seqlen=19, headdim=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, seqlen, 4, headdim, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        x = torch.cat([x, x], -1)[..., :headdim]
    return x.unbind()


def check_against_reference(q, k, v, **words):
    out = flash_attn.flash_attn_func(q, k, v, **words)
    causal, (left, right) = words.get("causal", False), words.get("window_size", (-1, -1))
    window = (None if left < 0 else left, 0 if causal else None if right < 0 else right)
    same = {name: words[name] for name in ("softmax_scale", "softcap", "alibi_slopes") if name in words}
    expected, _ = reference.attention(q, k, v, window=window, **same)
    tolerance = 2e-2 if q.dtype in (torch.float16, torch.bfloat16) else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_calls_that_differ_in_anything_do_not_share_a_plan(plans, backend, seed):
    """Each call follows one that has filled the cache with a near twin."""
    calls = [(dict(layout=layout), {}) for layout in ("contiguous", "transposed", "sliced")]
    calls += [(dict(dtype=dtype), {}) for dtype in (torch.float64, torch.bfloat16, torch.float16)]
    calls += [(dict(seqlen=20), {}), (dict(headdim=24), {})]
    words = [
        dict(softmax_scale=0.5), dict(softmax_scale=-0.5), dict(softmax_scale=0.0), dict(causal=True),
        dict(window_size=(3, 0)), dict(window_size=(3, 1)), dict(window_size=(4, 1)), dict(softcap=2.0), dict(softcap=3.0),
        dict(alibi_slopes=torch.rand(4)), dict(alibi_slopes=torch.rand(2, 4)),
    ]  # fmt: skip
    calls += [({}, each) for each in words]
    with use(backend):
        for number, (tensor_words, call_words) in enumerate(calls):
            check_against_reference(*tensors(seed + number, **tensor_words), **call_words)
        assert len(plans) == len(calls)
        for number, (tensor_words, call_words) in enumerate(calls):
            check_against_reference(*tensors(seed - number, **tensor_words), **call_words)
        assert len(plans) == len(calls), "a repeated call made a new plan"


def test_a_plan_does_not_remember_contents(plans, seed):
    """Slopes, lengths and tensors are read at every call."""
    q, k, v = (x.flatten(0, 1) for x in tensors(seed))
    slopes = torch.zeros(4)
    lengths = torch.tensor([0, 19, 38], dtype=torch.int32)
    words = dict(max_seqlen_q=38, max_seqlen_k=38, alibi_slopes=slopes)
    for cu_seqlens, slope in (([0, 19, 38], 0.0), ([0, 1, 38], 0.5), ([0, 38, 38], 2.0)):
        lengths.copy_(torch.tensor(cu_seqlens))
        slopes.fill_(slope)
        out = flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, **words)
        expected, _ = reference.attention_varlen(q, k, v, lengths, lengths, alibi_slopes=slopes)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert len(plans) == 1


def test_max_seqlen_as_a_tensor_makes_no_new_plan(plans, seed):
    q, k, v = (x.flatten(0, 1) for x in tensors(seed))
    lengths = torch.tensor([0, 19, 38], dtype=torch.int32)
    for longest in (19, torch.tensor(19), torch.tensor(19, dtype=torch.int32)):
        flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, longest, longest)
    assert len(plans) == 1


def test_the_requested_backend_has_its_own_plan(plans, seed):
    q, k, v = tensors(seed)
    for name in ("cpu", "reference", "cpu"):
        with use(name):
            check_against_reference(q, k, v)
    assert [plan.backend.name for plan in plans.values()] == ["cpu", "reference"]


def test_gradients_do_not_share_a_plan(plans, seed):
    for number, words in enumerate((dict(), dict(softmax_scale=0.7), dict(causal=True), dict(softcap=2.0))):
        q, k, v = (x.requires_grad_() for x in tensors(seed + number))
        dout = torch.ones_like(q)
        actual = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v, **words), (q, k, v), dout)
        window = (None, 0) if words.pop("causal", False) else (None, None)
        out, _ = reference.attention(q, k, v, window=window, **words)
        expected = torch.autograd.grad(out, (q, k, v), dout.double())
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_plans_are_bounded(plans, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    for seqlen in range(1, 12):
        x = torch.zeros(1, seqlen, 1, 8)
        flash_attn.flash_attn_func(x, x, x)
        assert len(plans) <= 4


def configurations(asked, hardware, tma):
    """Every configuration of a problem, flattened."""
    dkdv, joint = dkdv_config(asked, hardware, tma), joint_config(asked, hardware)
    found = [forward_config(asked, hardware, tma), dq_config(asked, hardware, tma)]
    found += [dkdv] if isinstance(dkdv, BackwardConfig) else list(dkdv)
    return found if joint is None else [*found, joint]


@pytest.mark.parametrize("hardware", [*GPUS, CPU], ids=lambda hardware: hardware.arch or hardware.kind)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_problem_has_a_launch(hardware, dtype):
    for headdim in range(1, 257):
        for causal in (False, True):
            for tma in (False, True):
                asked = problem(dtype, headdim, window=(None, 0 if causal else None))
                for config in configurations(asked, hardware, tma):
                    check_config(config)
                    assert tma or not config.tma, "a descriptor that cannot be made"


def check_config(config):
    assert isinstance(config, ForwardConfig | BackwardConfig)
    for block in (config.block_m, config.block_n):
        assert block >= 16 and block & (block - 1) == 0
    assert config.num_warps in (1, 2, 4, 8, 16)
    assert 1 <= config.num_stages <= 8


def test_launches_are_pure(monkeypatch):
    """Equal arguments give equal results, whatever came before, and no device is asked."""

    def forbidden(*_):
        raise AssertionError("a launch configuration asked the machine")

    monkeypatch.setattr(torch.cuda, "get_device_properties", forbidden)
    monkeypatch.setattr(torch.cuda, "current_device", forbidden)
    asked = [problem(headdim=d, window=(None, w)) for d in (16, 64, 128, 200) for w in (None, 0)]
    first = [configurations(each, hardware, tma) for each in asked for hardware in GPUS for tma in (False, True)]
    for chosen in (forward_launch._choose, backward_launch._choose, joint_config):
        chosen.cache_clear()
    again = [
        configurations(each, hardware, tma)
        for each in reversed(asked)
        for hardware in reversed(GPUS)
        for tma in (True, False)
    ]
    assert first == again[::-1]
    assert all(hash(config) is not None for configs in first for config in configs)


def test_pinned_configurations():
    pinned = ForwardConfig(16, 32, 1, 1)
    usual = forward_config(problem(), HOPPER, False)
    with launch.pinned(forward=pinned):
        assert forward_config(problem(), HOPPER, False) == pinned
        with launch.pinned(dq=BackwardConfig(32, 32, 2, 1)):
            assert forward_config(problem(), HOPPER, False) == pinned
            assert dq_config(problem(), HOPPER, False) == BackwardConfig(32, 32, 2, 1)
    assert forward_config(problem(), HOPPER, False) == usual


SMALL = dict(batch_size=2, seqlen_q=128, seqlen_k=128, nheads=8, nheads_k=8)


@pytest.mark.parametrize("hardware", GPUS, ids=lambda hardware: hardware.arch)
def test_small_problems_take_one_launch_backward(hardware):
    for headdim in (16, 64):
        assert one_launch_config(problem(headdim=headdim, **SMALL), hardware) is not None
    assert one_launch_config(problem(headdim=160, **SMALL), hardware) is None, "dk and dv have a launch each"
    assert one_launch_config(problem(**SMALL | dict(batch_size=256, seqlen_k=1024)), hardware) is None
    assert one_launch_config(problem(batch_size=1, nheads=1, nheads_k=1, seqlen_q=2048), hardware) is None


def test_the_work_decides_about_one_launch():
    """The limit is excluded, and lengths are already those of a bucket."""
    at_limit = problem(batch_size=1, nheads=8, seqlen_q=1024, seqlen_k=1024, headdim=64)
    assert one_launch_config(at_limit, HOPPER) is None
    assert one_launch_config(at_limit._replace(nheads=7), HOPPER) is not None


def test_pins_decide_about_one_launch():
    small, large, config = problem(**SMALL), problem(batch_size=64), BackwardConfig(64, 64, 8, 1)
    assert one_launch_config(small, HOPPER) == joint_config(small, HOPPER)
    for pins in (dict(one_launch=False), dict(dq=config), dict(dkdv=config)):
        with launch.pinned(**pins):
            assert one_launch_config(small, HOPPER) is None
    with launch.pinned(one_launch=config):
        assert one_launch_config(small, HOPPER) == one_launch_config(large, HOPPER) == config


def test_a_pinned_configuration_has_its_own_plan(plans, seed):
    q, k, v = tensors(seed)
    flash_attn.flash_attn_func(q, k, v)
    with launch.pinned(forward=ForwardConfig(16, 32, 1, 1)):
        flash_attn.flash_attn_func(q, k, v)
    assert len(plans) == 2


def test_head_dim_pad():
    for headdim in range(1, 257):
        pad = head_dim_pad(headdim)
        assert pad >= max(16, headdim) and pad & (pad - 1) == 0
        assert pad == 16 or pad < 2 * headdim
