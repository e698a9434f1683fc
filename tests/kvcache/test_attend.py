"""attend: every sequence sees its own keys at their own places, whatever its pages went through."""

import pytest
import torch

from flash_attn import reference
from flash_attn.errors import InvalidArgument, OutOfPages, UnsupportedProblem
from flash_attn.kvcache import Paged, PagedKVCache, RollingWindow, Static
from tests.support.tolerance import assert_close

LAYERS, NHEADS, NHEADS_K, HEADDIM, PAGE, POSITIONS = 2, 4, 2, 16, 4, 64


class Transcript:
    """A cache, and beside it every sequence's keys and values as lists of tokens."""

    def __init__(self, seed: int, strategy: Paged = Paged(), device="cpu", **options) -> None:  # noqa: B008 - frozen
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.cache = PagedKVCache(
            LAYERS, 64, PAGE, NHEADS_K, HEADDIM, torch.float32, device, strategy=strategy, share_prefixes=False
        )
        self.options = options
        angles = torch.arange(POSITIONS)[:, None] * 100.0 ** -torch.linspace(0, 1, HEADDIM // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.texts: dict[int, list[torch.Tensor]] = {}  # (2, LAYERS, heads, headdim) a token

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def add(self) -> int:
        sequence = self.cache.add()
        self.texts[sequence] = []
        return sequence

    def fork(self, parent: int) -> int:
        child = self.cache.fork(parent)
        self.texts[child] = self.texts[parent][:]
        return child

    def truncate(self, sequence: int, length: int) -> None:
        self.cache.truncate(sequence, length)
        del self.texts[sequence][length:]

    def step(self, sequences: list[int], new: list[int], packed: bool, kept: dict | None = None) -> None:
        """One step of random tokens, checked against the reference; kept: which places each sequence still has."""
        rotary = dict(rotary_cos=self.cos, rotary_sin=self.sin)
        tensors = {
            name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in (self.options | rotary).items()
        }
        total = sum(new)
        kv = self.random(2, LAYERS, total, NHEADS_K, HEADDIM)
        for sequence, tokens in zip(sequences, kv.split(new, dim=2), strict=True):
            self.texts[sequence] += tokens.unbind(2)
        shape = (total,) if packed else (len(new), new[0])
        with self.cache.step(sequences, new):
            for layer in range(LAYERS):
                q = self.random(total, NHEADS, HEADDIM)
                heads = (x.view(*shape, -1, HEADDIM).to(self.device) for x in (q, kv[0, layer], kv[1, layer]))
                out, lse = (
                    x.cpu()
                    for x in self.cache.attend(
                        layer, *heads, **tensors, rotary_interleaved=False, return_softmax_lse=True
                    )
                )
                assert out.shape[:-2] == shape
                lse = lse.split(new, dim=1) if packed else lse.unbind(0)
                parts = zip(sequences, q.split(new), out.view(total, NHEADS, HEADDIM).split(new), lse, strict=True)
                for sequence, q_s, out_s, lse_s in parts:
                    places = None if kept is None else kept[sequence]
                    truth, matched = (
                        self.expected(layer, sequence, q_s, places, dtype) for dtype in (torch.float64, None)
                    )
                    assert_close(out_s, truth[0], matched[0], "out")
                    assert_close(lse_s, truth[1], None, "lse")

    def expected(self, layer: int, sequence: int, q: torch.Tensor, places: list[int] | None, dtype):
        """out and lse of one sequence from its transcript, in float64 or float32."""
        dtype = dtype or torch.float32
        text = self.texts[sequence]
        places = torch.arange(len(text)) if places is None else torch.tensor(places)
        k, v = torch.stack(text)[places, :, layer].to(dtype).unbind(1)
        q = self.rotated(q.to(dtype), torch.arange(len(text) - len(q), len(text)))
        left, _ = self.options.get("window_size", (-1, -1))
        options = {name: x for name, x in self.options.items() if name in ("softcap", "alibi_slopes", "softmax_scale")}
        options["sinks"] = self.options.get("s_aux")
        out, lse = reference.attention(
            q[None], self.rotated(k, places)[None], v[None], window=(None if left < 0 else left, 0), **options
        )
        return out[0], lse[0]

    def rotated(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[places][:, None].to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


OPTIONS = {
    "causal": dict(),
    "window": dict(window_size=(5, 0)),
    "softcap": dict(softcap=3.0, softmax_scale=0.7),
    "sinks": dict(s_aux=torch.tensor([0.5, -1.0, 3.0, 1.5], dtype=torch.bfloat16)),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0])),
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attend_sees_each_sequences_own_keys(options, packed, where, seed):
    t = Transcript(seed, device=where, **options)
    a, b = t.add(), t.add()
    t.step([a, b], [7, 7], packed)
    t.step([b], [1], packed)
    c = t.fork(b)
    t.step([c, a, b], [1, 1, 1], packed)
    t.truncate(b, 3)
    t.step([b, c], [6, 6], packed)
    t.cache.free(a)
    d = t.add()
    t.step([d], [9], packed)
    t.step([d, b, c], [2, 2, 2], packed)


def test_attend_takes_prompts_and_single_tokens_in_one_step(seed):
    t = Transcript(seed)
    a, b, c = t.add(), t.add(), t.add()
    t.step([a, b], [5, 1], packed=True)
    t.step([c, a, b], [11, 1, 3], packed=True)
    t.step([a, b, c], [1, 1, 1], packed=False)


def test_static_pages_stay_in_place_and_are_enough(seed):
    t = Transcript(seed, Static(30))
    a, b = t.add(), t.add()
    assert t.cache.num_available == 64 - 2 * 8
    t.step([a, b], [10, 10], packed=False)
    before = t.cache.pages(a).tolist()
    t.truncate(a, 2)
    for _ in range(7):
        t.step([a, b], [2, 2], packed=False)
    assert t.cache.pages(a).tolist() == before and t.cache.num_available == 64 - 2 * 8
    with pytest.raises(InvalidArgument, match="sequences of 30 tokens, the step needs 31"):
        t.cache.begin_step([a], [15])


def test_static_refuses_a_sequence_that_it_has_no_room_for():
    cache = PagedKVCache(1, 7, 4, 1, 1, strategy=Static(16))
    first = cache.add()
    with pytest.raises(OutOfPages, match="4 pages are needed, 3 of 7 are free"):
        cache.add()
    assert cache.sequences == (first,) and cache.num_available == 3


def kept_places(length: int, new: int, window: int, sinks: int) -> list[int]:
    """Places whose keys a step sees: sinks and window in whole pages, and the new tokens."""
    sinks = -(-sinks // PAGE) * PAGE
    begin = max(sinks, max(length - window + 1, 0) // PAGE * PAGE)
    return [*range(min(sinks, length + new)), *range(begin, length + new)]


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("window, sinks", [(6, 0), (6, 4), (5, 3), (1, 0), (9, 8)])
@pytest.mark.parametrize("where", DEVICES)
def test_rolling_window_keeps_sinks_and_the_last_tokens_at_their_places(where, window, sinks, packed, seed):
    t = Transcript(seed, RollingWindow(window, sinks), where)
    a, b = t.add(), t.add()
    lengths = {a: 0, b: 0}
    for new, together in ((9, [a]), (3, [a, b]), *[(1, [a, b])] * 8, (7, [b, a]), *[(1, [a, b])] * 5):
        kept = {s: kept_places(lengths[s], new, window, sinks) for s in together}
        t.step(together, [new] * len(together), packed, kept)
        for sequence in together:
            lengths[sequence] += new
            assert t.cache.length(sequence) == lengths[sequence]
            assert len(t.cache.pages(sequence)) == -(-len(kept[sequence]) // PAGE)
            assert set(range(lengths[sequence] - window, lengths[sequence])) <= {*kept[sequence], *range(-window, 0)}


def test_rolling_window_holds_a_bounded_number_of_pages(seed):
    cache = PagedKVCache(1, 4, PAGE, 1, 1, torch.float32, strategy=RollingWindow(window=6, sinks=2))
    sequence = cache.add()
    for _ in range(100):
        with cache.step([sequence], [1]):
            cache.append(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert cache.length(sequence) == 100 and len(cache.pages(sequence)) <= 4


def test_rolling_window_without_sinks_is_exact_with_window_size(seed):
    t = Transcript(seed, RollingWindow(window=6), window_size=(5, 0))
    a = t.add()
    for new in (10, 1, 1, 4, 1, 1, 1, 1, 1):
        t.step([a], [new], packed=False)  # the reference sees all tokens through the same window


def test_truncate_refuses_to_go_back_behind_dropped_tokens():
    cache = PagedKVCache(1, 8, PAGE, 1, 1, torch.float32, strategy=RollingWindow(window=6, sinks=4))
    sequence = cache.add()
    for new in (17, 1):
        with cache.step([sequence], [new]):
            cache.append(0, torch.ones(1, new, 1, 1), torch.ones(1, new, 1, 1))
    with pytest.raises(InvalidArgument, match="16 tokens would have to see token 11, and tokens 4 to 11 are dropped"):
        cache.truncate(sequence, 16)
    cache.truncate(sequence, 17)
    cache.truncate(sequence, 4)
    assert (cache.length(sequence), len(cache.pages(sequence))) == (4, 1)


@pytest.mark.parametrize("options", [dict(window_size=(3, 0)), dict(alibi_slopes=torch.ones(NHEADS))], ids=str)
def test_distances_are_refused_where_sinks_lie_beside_the_window(options, seed):
    t = Transcript(seed, RollingWindow(6, 4), **options)
    a = t.add()
    with pytest.raises(UnsupportedProblem, match=r"sinks=4.*keeps sinks apart"):
        t.step([a], [3], packed=False)
    assert t.cache.length(a) == 0  # the step did not happen


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(window=4, sinks=-1), "sinks must be at least 0, got -1"),
    ],
)
def test_windows_that_make_no_sense_are_refused(arguments, match):
    with pytest.raises(InvalidArgument, match=match):
        RollingWindow(**arguments)


def test_pages_to_copy_are_as_few_as_can_be():
    """Of all who hold a page and write in one step, one keeps it; a fork that is not written takes nothing."""
    cache = PagedKVCache(1, 4, PAGE, 1, 1, torch.float32)
    a = cache.add()
    with cache.step([a], [6]):
        pass
    b, c = cache.fork(a), cache.fork(a)
    assert cache.memory_report()[:4] == (2, 2, 0, 2)
    with cache.step([c, a, b], [1, 1, 1]):  # two free pages suffice for three writers
        pass
    assert cache.memory_report()[:4] == (4, 1, 0, 0)
    cache.fork(b)
    assert cache.memory_report()[:4] == (4, 2, 0, 0)


def test_pressure_hook_makes_room_or_out_of_pages_is_raised():
    calls = []

    def preempt(missing, stay):
        calls.append((missing, sorted(stay)))
        if idle:
            cache.free(idle.pop())

    cache = PagedKVCache(1, 4, PAGE, 1, 1, torch.float32, on_pressure=preempt)
    idle = [cache.add(), cache.add()]
    for sequence in idle:
        with cache.step([sequence], [PAGE]):
            cache.append(0, torch.ones(1, PAGE, 1, 1), torch.ones(1, PAGE, 1, 1))
    new = cache.add()
    with cache.step([new], [4 * PAGE]):
        pass
    assert calls == [(2, [new]), (1, [new])] and cache.sequences == (new,)
    with pytest.raises(OutOfPages, match=r"1 pages are needed, 0 of 4 are free .*1 sequences hold the rest"):
        cache.begin_step([new], [1])
    assert cache.length(new) == 4 * PAGE


def test_a_step_that_fails_leaves_lengths_and_pages_as_they_were(seed):
    t = Transcript(seed)
    a = t.add()
    t.step([a], [3], packed=False)
    with pytest.raises(ZeroDivisionError), t.cache.step([a], [9]):
        raise ZeroDivisionError
    assert t.cache.length(a) == 3 and t.cache.memory_report().pages_in_use == 1
    t.step([a], [2], packed=False)


def test_a_copy_that_fails_leaves_every_page_with_its_holders(seed, monkeypatch):
    t = Transcript(seed)
    a = t.add()
    t.step([a], [6], packed=False)
    b, c = t.fork(a), t.fork(a)
    with monkeypatch.context() as patch:
        patch.setattr(t.cache, "_transfer", lambda reservation: 1 / 0)
        with pytest.raises(ZeroDivisionError), t.cache.step([b, a], [3, 3]):
            pass
    assert t.cache.pages(a).tolist() == t.cache.pages(b).tolist() == t.cache.pages(c).tolist()
    assert t.cache.memory_report()[:4] == (2, 2, 0, 62)
    t.step([c, b, a], [2, 2, 2], packed=False)


def open_cache():
    cache = PagedKVCache(2, 8, PAGE, 1, 2, torch.float32)
    a, b = cache.add(), cache.add()
    return cache, a, b


def test_operations_during_a_step_are_refused():
    cache, a, b = open_cache()
    cache.begin_step([a], [1])
    for operation in (cache.add, lambda: cache.fork(b), lambda: cache.begin_step([b], [1])):
        with pytest.raises(InvalidArgument, match=rf"while a step of sequences \[{a}\] is open"):
            operation()
    for operation in (lambda: cache.free(a), lambda: cache.truncate(a, 0)):
        with pytest.raises(InvalidArgument, match=f"sequence {a}: it is part of the step"):
            operation()
    cache.end_step()
    with pytest.raises(InvalidArgument, match="no step is open"):
        cache.end_step()
    with pytest.raises(InvalidArgument, match="no step is open"):
        cache.append(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    with pytest.raises(InvalidArgument, match="no step is open"):
        _ = cache.block_table


@pytest.mark.parametrize(
    "sequences, new, match",
    [
        ([], [], "at least one sequence"),
        ([0, 0], [1, 1], "each once"),
        ([0], [1, 2], "2 entries for 1 sequences"),
        ([0, 7], [1, 1], "sequence 7 is unknown or freed; there are 2"),
        ([0, 1], [1, 0], r"at least 1 token, got \[1, 0\]"),
        ([0], [[]], r"at least 1 token, got \[0\]"),
    ],
)
def test_steps_that_make_no_sense_are_refused(sequences, new, match):
    cache, _, _ = open_cache()
    with pytest.raises(InvalidArgument, match=match):
        cache.begin_step(sequences, new)


def test_tensors_that_do_not_fit_the_step_are_refused():
    cache, a, b = open_cache()
    ones = torch.ones
    cache.begin_step([a, b], [2, 3])
    with pytest.raises(InvalidArgument, match=r"append \[2, 3\] tokens need packed tensors"):
        cache.append(0, ones(2, 2, 1, 2), ones(2, 2, 1, 2))
    with pytest.raises(InvalidArgument, match=r"must begin with \(5,\).*\(4, 1, 2\)"):
        cache.append(0, ones(4, 1, 2), ones(4, 1, 2))
    with pytest.raises(InvalidArgument, match=r"v must have shape \(5, 1, 2\), got \(5, 1, 3\)"):
        cache.append(0, ones(5, 1, 2), ones(5, 1, 3))
    with pytest.raises(InvalidArgument, match=r"k must be torch.float32 on cpu.*torch.float64"):
        cache.append(0, ones(5, 1, 2).double(), ones(5, 1, 2))
    with pytest.raises(InvalidArgument, match="layer must be between 0 and 1, got 2"):
        cache.append(2, ones(5, 1, 2), ones(5, 1, 2))
    with pytest.raises(InvalidArgument, match="given together"):
        cache.attend(0, ones(5, 1, 2), ones(5, 1, 2), ones(5, 1, 2), rotary_cos=ones(9, 1))
    with pytest.raises(InvalidArgument, match="2 positions, the step reaches position 2"):
        cos = ones(2, 1)
        cache.attend(0, ones(5, 1, 2), ones(5, 1, 2), ones(5, 1, 2), rotary_cos=cos, rotary_sin=cos)
    with pytest.raises(UnsupportedProblem, match="q must be causal or in a window"):
        cos = ones(9, 1)
        cache.attend(0, ones(5, 1, 2), ones(5, 1, 2), ones(5, 1, 2), rotary_cos=cos, rotary_sin=cos, causal=False)
    with pytest.raises(UnsupportedProblem, match="without splits, got num_splits = 2"):
        cache.attend(0, ones(5, 1, 2), ones(5, 1, 2), ones(5, 1, 2), num_splits=2)


@pytest.mark.parametrize(
    "sizes, match",
    [
        ((1, 8, 0, 1, 1), "page_size must be at least 1, got 0"),
        ((1, 0, 8, 1, 1), "num_pages must be at least 1, got 0"),
        ((0, 8, 8, 1, 1), "num_layers, nheads_k and headdim must be at least 1, got 0"),
        ((1, 2**20, 2**12, 1, 1), r"below 2\^31, got 1048576 \* 4096"),
    ],
)
def test_caches_that_make_no_sense_are_refused(sizes, match):
    with pytest.raises(InvalidArgument, match=match):
        PagedKVCache(*sizes)


def test_memory_report_adds_up():
    cache = PagedKVCache(3, 8, PAGE, 2, 16, torch.float16)
    sequence = cache.add()
    with cache.step([sequence], [5]):
        pass
    cache.fork(sequence)
    report = cache.memory_report()
    assert report == (2, 2, 0, 6, 3 * 2 * PAGE * 2 * 16 * 2, 10, 2)
    assert report.bytes_in_use == 2 * report.page_bytes
    assert report.bytes_allocated == 2 * cache.k.numel() * 2
    assert str(report).startswith("2 sequences, 10 tokens in 2 pages (2 shared); 0 pages cached, 6 free")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_a_step_never_waits_for_the_device(packed):
    cache = PagedKVCache(2, 64, 16, 2, 64, torch.float16, "cuda")
    sequences = [cache.add(), cache.add()]
    sequences.append(cache.fork(sequences[0]))

    def step() -> None:
        shape = (6,) if packed else (3, 2)
        q, k, v = (torch.zeros(*shape, heads, 64, dtype=torch.float16, device="cuda") for heads in (4, 2, 2))
        with cache.step(sequences, [2] * 3):
            for layer in range(2):
                cache.attend(layer, q, k, v)

    step()  # compiles the kernels
    sequences.append(cache.fork(sequences[1]))
    cache.free(sequences.pop(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_rotary_tables_need_to_reach_the_last_token_not_the_end_of_its_page(packed, seed):
    t = Transcript(seed)
    t.cos, t.sin = t.cos[:9], t.sin[:9]
    a = t.add()
    t.step([a], [7], packed)
    t.step([a], [2], packed)
    with pytest.raises(InvalidArgument, match="9 positions, the step reaches position 9"):
        t.step([a], [1], packed)


def test_names_of_the_package_load_on_first_use():
    import flash_attn.kvcache as package

    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = package.absent
