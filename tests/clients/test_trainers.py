"""Trainers of language models on this package: how they pack batches and what they make of its cross entropy.

verl, OpenRLHF, axolotl and ms-swift, by their own functions; their attention over several processes is in test_rings.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flash_attn
from flash_attn import bert_padding, flash_attn_interface
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from tests.clients.loading import VERL, as_if_on_a_gpu, load, parts_of
from tests.support import tolerance
from tests.support.calls import assert_equal, assert_near
from tests.support.cases import BF16, FP16, FP32, Case
from tests.support.inputs import make_inputs

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")

BATCH, LENGTH, CLASSES = 3, 11, 53
IGNORED = -100


@pytest.fixture(scope="module")
def verl():
    with parts_of("verl", VERL, absent=("tensordict",)):
        padding = load("verl.utils.attention_utils")
        losses, fused = load("verl.utils.torch_functional"), load("verl.utils.experimental.torch_functional")
        yield SimpleNamespace(padding=padding, losses=losses, fused=fused)


@pytest.fixture(scope="module")
def openrlhf():
    with parts_of("openrlhf", ("openrlhf", "openrlhf.models"), absent=("deepspeed",)):
        return load("openrlhf.models.utils")


def padded_batch(seed):
    """(batch, length) of bool, every row with a token and the last one full."""
    torch.manual_seed(seed)
    mask = torch.rand(BATCH, LENGTH) < 0.6
    mask[:, 4] = mask[-1] = True
    return mask


def logits_and_labels(seed, dtype, *shape):
    torch.manual_seed(seed)
    return (3 * torch.randn(*shape, CLASSES)).to(dtype), torch.randint(CLASSES, shape)


def log_probs(logits, labels):
    """In float64."""
    return logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def check_log_probs(actual, logits, labels):
    """Values and the gradient of `logits`, which may be overwritten by it."""
    x = logits.detach().double().requires_grad_()
    truth = log_probs(x, labels)
    weight = torch.randn(truth.shape).double()
    (dx,) = torch.autograd.grad(truth, x, weight)
    (dlogits,) = torch.autograd.grad(actual, logits, weight.to(actual.dtype))
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), truth, rtol=16 * eps, atol=64 * eps)
    torch.testing.assert_close(dlogits.double(), dx, rtol=torch.finfo(logits.dtype).eps, atol=64 * eps)


@pytest.mark.parametrize("kept_for_later", [False, True])
def test_verl_packs_as_its_own_fallbacks_do(verl, kept_for_later, seed):
    own = verl.padding
    names = "index_first_axis", "pad_input", "rearrange", "unpad_input"
    assert own._get_attention_functions() == tuple(getattr(bert_padding, name) for name in names)
    mask = padded_batch(seed)
    unused = torch.rand(BATCH, LENGTH) < 0.3 if kept_for_later else None
    masks = mask.long(), None if unused is None else (unused & ~mask).long()
    hidden = torch.randn(BATCH, LENGTH, 2, 5, requires_grad=True)
    packed, indices, cu_seqlens, longest, used = own.unpad_input(hidden, *masks)
    expected = own._fallback_unpad_input(hidden, *masks)
    assert_equal((packed, indices, cu_seqlens, used), (*expected[:3], expected[4]))
    assert longest == expected[3] and isinstance(longest, int)
    back = own.pad_input(packed, indices, BATCH, LENGTH)
    assert_equal(back, own._fallback_pad_input(expected[0], indices, BATCH, LENGTH))
    flat = own.rearrange(hidden, "b s ... -> (b s) ...")
    twice = torch.cat([indices, indices])
    assert_equal(own.index_first_axis(flat, twice), own._fallback_index_first_axis(flat, twice))
    weight = torch.randn_like(back)
    kept = mask if unused is None else mask | unused
    (dhidden,) = torch.autograd.grad(back, hidden, weight)
    assert_equal(dhidden, weight * kept[..., None, None])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_log_probs_of_verl(verl, dtype, inplace, seed):
    assert verl.losses.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
    assert verl.losses.cross_entropy_loss is cross_entropy_loss
    logits, labels = logits_and_labels(seed, dtype, BATCH, LENGTH)
    logits.requires_grad_()
    check_log_probs(verl.losses.logprobs_from_logits(logits, labels, inplace_backward=inplace), logits, labels)


def test_log_probs_of_verl_over_packed_tokens(verl, seed):
    """Of the answer at the end of each row, whose padding is on the left."""
    mask = torch.arange(LENGTH) >= torch.tensor([[5], [0], [2]])
    answer = 4
    _, ids = logits_and_labels(seed, FP32, BATCH, LENGTH)
    logits = 3 * torch.randn(int(mask.sum()), CLASSES)
    found = verl.losses.log_probs_from_logits_response_rmpad(ids, mask.long(), logits, answer)
    whole = torch.zeros(BATCH, LENGTH, CLASSES)
    whole[mask] = logits
    truth = log_probs(whole[:, -answer - 1 : -1], ids[:, -answer:])
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-5)


def test_the_fused_linear_loss_of_verl(verl, seed):
    """Its forward takes the log probabilities from this package; entropy and gradients are its own."""
    temperature = 0.7
    _, ids = logits_and_labels(seed, FP32, BATCH, LENGTH)
    hidden, weights = (x.requires_grad_() for x in (torch.randn(BATCH, LENGTH, 16), torch.randn(CLASSES, 16)))
    found = verl.fused.FusedLinearForPPOFunction.apply(hidden, weights, ids, temperature, 8)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weights)]
    logits = exact[0] @ exact[1].T / temperature
    truth = log_probs(logits, ids), -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    douts = [torch.randn(BATCH, LENGTH) for _ in range(2)]
    gradients = torch.autograd.grad(found, (hidden, weights), douts)
    expected = torch.autograd.grad(truth, exact, [x.double() for x in douts])
    # a rounded logit moves its probability by as many roundoffs as it is large
    assert_near((*found, *gradients), (*truth, *expected), roundoffs=4 * logits.abs().max().item())


@pytest.mark.parametrize("dtype", [FP32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_openrlhf(openrlhf, dtype, temperature, seed):
    """It divides the logits in place."""
    logits, labels = logits_and_labels(seed, dtype, BATCH, LENGTH)
    logits = logits.requires_grad_() * 1.0
    check_log_probs(openrlhf.log_probs_from_logits(logits, labels, temperature), logits, labels)


@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_that_axolotl_gives_to_llama(items, monkeypatch, seed):
    module = load("transformers.loss.loss_utils")
    plain = module.fixed_cross_entropy
    monkeypatch.setattr(module, "fixed_cross_entropy", plain)  # to be undone
    with parts_of("axolotl", absent=("accelerate", "accelerate.utils")):
        load("axolotl.monkeypatch.llama_attn_hijack_flash").patch_fa_llama_cross_entropy()
    assert module.fixed_cross_entropy is not plain
    logits, labels = logits_and_labels(seed, FP32, BATCH, LENGTH)
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    logits.requires_grad_()
    loss = module.ForCausalLMLoss(logits, labels, CLASSES, num_items_in_batch=items)
    exact = logits.detach().double().requires_grad_()
    rows, targets = exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    truth = F.cross_entropy(rows, targets, reduction="sum") / (items or (targets != IGNORED).sum())
    found, expected = (
        (loss[None], *torch.autograd.grad(loss, logits)),
        (truth[None], *torch.autograd.grad(truth, exact)),
    )
    assert_near(found, expected, roundoffs=16)


def test_the_loss_that_axolotl_gives_to_mistral(monkeypatch, seed):
    module = load("transformers.models.mistral.modeling_mistral")
    monkeypatch.setattr(module, "CrossEntropyLoss", None, raising=False)  # to be undone
    with parts_of("axolotl", absent=("accelerate", "accelerate.utils")):
        load("axolotl.monkeypatch.mistral_attn_hijack_flash").patch_mistral_cross_entropy()
    logits, labels = logits_and_labels(seed, BF16, LENGTH)
    labels[2] = IGNORED
    exact = logits.detach().double().requires_grad_()
    truth = F.cross_entropy(exact, labels)
    (dexact,) = torch.autograd.grad(truth, exact)
    logits.requires_grad_()
    loss = module.CrossEntropyLoss()(logits, labels)
    assert_near(loss[None], truth[None], roundoffs=16)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert dlogits.data_ptr() == logits.data_ptr()
    assert_near(dlogits, dexact, roundoffs=1.0)


def test_the_logits_that_ms_swift_measures(monkeypatch, seed):
    """Its optimizer wraps flash_attn_func where the package defines it."""
    monkeypatch.setattr(flash_attn_interface, "flash_attn_func", flash_attn.flash_attn_func)  # to be undone
    with parts_of("swift", ("swift", "swift.optimizers"), absent=("swift.optimizers.base",)):
        tracker = load("swift.optimizers.muonclip")._MaxLogitsTracker
    tracker.enable_flash_attn()
    assert flash_attn_interface.flash_attn_func is not flash_attn.flash_attn_func
    case = Case("measured", BF16, 40, 4, 2, (33, 33), (33, 33), causal=True)
    inputs = make_inputs(case, "cpu", seed)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = flash_attn_interface.flash_attn_func(q, k, v, causal=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
    expected = tolerance.expected(case, inputs)
    expected.check(out=out.detach(), lse=expected.reference.lse.float(), dq=dq, dk=dk, dv=dv)
    largest = torch.einsum("bihd,bjhd->bhij", q.float(), k.float().repeat_interleave(2, 2)).max() * 40**-0.5
    assert tracker.consume() >= largest.item()


@pytest.mark.parametrize("module", ["qwen2_vl", "glm4v"])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_attention_of_verl(module, window, seed):
    """Told where sequences begin by their positions, with the longest as a tensor; on several processes in test_rings.py."""
    lengths = (9, 1, 24, 13)
    case = Case("verl", BF16, 40, 4, 2, lengths, lengths, "varlen", causal=True, window=(window or -1, window or -1))
    words = dict(sliding_window=window) if module == "qwen2_vl" else {}
    if window and not words:
        pytest.skip("glm4v has no windows")
    inputs = make_inputs(case, "cpu", seed)
    q, k, v = (x.detach()[None].requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with as_if_on_a_gpu(), parts_of("verl", VERL):
        attend = load(f"verl.models.transformers.{module}")._custom_flash_attention_forward
        out = attend(q, k, v, None, q.shape[1], position_ids=positions, **words)
    dq, dk, dv = (x[0] for x in torch.autograd.grad(out, (q, k, v), inputs.dout[None]))
    expected = tolerance.expected(case, inputs)
    expected.check(out=out[0].detach(), lse=expected.reference.lse.float(), dq=dq, dk=dk, dv=dv)
