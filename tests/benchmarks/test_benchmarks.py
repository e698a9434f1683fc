"""The benchmarks count, check and report correctly; a tiny run goes the whole way on the CPU."""

import itertools
import json
import math

import pytest
import torch

from benchmarks import decode, host, prefill, report, run, timing, training
from benchmarks.cases import SWEEPS, Case, comparison_groups, plain, sweep_cases, visible_pairs
from benchmarks.prewarm import share_kernels
from benchmarks.providers import PROVIDERS, Provider, canonical_window, installed, launch, make_inputs
from flash_attn import reference

CPU = torch.device("cpu")
WINDOWS = [(-1, -1), (-1, 0), (5, 0), (0, 0), (3, 2), (-1, 4), (100, 100)]


@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (9, 30), (30, 9), (1, 12), (0, 5), (5, 0)])
@pytest.mark.parametrize("window", WINDOWS)
def test_visible_pairs_equal_brute_force(lengths, window):
    bounds = tuple(side if side >= 0 else None for side in window)
    assert visible_pairs(*lengths, *window) == reference.visible(*lengths, bounds).sum().item()


def test_flops_of_a_full_forward_are_those_of_two_products():
    case = plain(64, 4096, False, "forward")
    assert case.flops == case.conventional_flops == 4 * 64 * 4096**2 * case.nheads * case.batch
    assert plain(64, 4096, False, "backward").flops == 2.5 * case.flops


def test_the_convention_counts_half_of_a_causal_square():
    case = plain(128, 1024, True, "forward")
    assert case.flops / case.conventional_flops == pytest.approx(1025 / 1024)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_cases_are_well_formed(sweep):
    cases = sweep_cases(sweep)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert case.nheads % case.nheads_k == 0
        assert case.dropout_p == 0 or case.softcap == 0
        assert not case.baseline or case.baseline in names
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
        if sweep != "tiny" and case.layout != "paged":
            assert case.tokens == (16384, 16384)
        if case.layout == "varlen":
            assert (case.batch, case.seqlen_q) == (len(case.lengths), max(case.lengths))


def test_main_sweep_has_eighteen_cells_each_way():
    assert [len(sweep_cases("main", (direction,))) for direction in ("forward", "backward")] == [18, 18]


def test_window_baseline_sees_as_many_pairs():
    cases = {case.name: case for case in sweep_cases("features")}
    windowed = [case for case in cases.values() if case.window != (-1, -1)]
    assert windowed
    for case in windowed:
        assert case.visible_pairs == pytest.approx(cases[case.baseline].visible_pairs, rel=0.05)


def test_filter_keeps_the_baseline_of_what_it_chooses():
    names = [case.name for case in sweep_cases("features", ("forward",), ("D128", "alibi"))]
    assert names == ["D128-S4k-causal-forward", "D128-S4k-causal-alibi-forward"]


def test_groups_hold_each_case_once_with_its_baseline():
    cases = sweep_cases("features")
    groups = comparison_groups(cases)
    assert sorted(case.name for case in itertools.chain(*groups)) == sorted(case.name for case in cases)
    assert all(len({case.baseline or case.name for case in group}) == 1 for group in groups)


def test_prewarm_shares_kernels_among_lengths_only():
    batches = share_kernels(sweep_cases("main"))
    assert [len(batch) for batch in batches] == [3] * 12
    assert all(len({(case.headdim, case.causal, case.direction) for case in batch}) == 1 for batch in batches)


GQA = {"batch": 2, "nheads": 4, "nheads_k": 2, "dtype": "float32"}
PACKED = GQA | {"layout": "varlen", "lengths": (33, 5, 0, 21), "seqlen_q": 33, "seqlen_k": 33, "batch": 4}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("changes", [GQA, GQA | {"alibi": True, "window": (7, 0)}, GQA | {"sinks": True}, PACKED])
def test_reference_slices_agree_with_the_whole(direction, changes):
    """The slices that a run checks are those of the full computation, heads and packing included."""
    case = plain(16, 40, True, direction, **changes)
    inputs = make_inputs(case, CPU)
    slices = timing.expected_slices(case, inputs)
    whole = whole_result(case, inputs)
    assert len(slices) == 2
    assert timing.relative_error(case, whole, slices) < 1e-6
    spoiled = (whole[0] * 1.05, *whole[1:])
    assert timing.relative_error(case, spoiled, slices) > 0.04


def whole_result(case, inputs):
    words = {"window": canonical_window(case), "softcap": case.softcap, "alibi_slopes": inputs.alibi_slopes}
    words["sinks"] = inputs.sinks
    if case.layout == "varlen":
        out = reference.attention_varlen(*inputs.operands, inputs.cu_seqlens, inputs.cu_seqlens, **words)[0]
    else:
        out = reference.attention(*inputs.operands, **words)[0]
    if case.direction == "forward":
        return (out,)
    return torch.autograd.grad(out, inputs.operands, inputs.dout.double())


def test_paged_keys_are_those_of_the_table():
    """Ours against the slices of the specification; another table gives other results."""
    words = dict(nheads=4, nheads_k=2, dtype="float32", layout="paged", batch=3, seqlen_k=32, page_size=8)
    case = plain(16, 1, False, "forward", **words)
    inputs = make_inputs(case, CPU)
    assert inputs.k.shape == (12, 8, 2, 16) and sorted(inputs.block_table.flatten().tolist()) == list(range(12))
    slices = timing.expected_slices(case, inputs)
    assert timing.relative_error(case, (PROVIDERS["cpu"].forward(case, inputs),), slices) < 1e-5
    other = inputs._replace(block_table=inputs.block_table.flip(0))
    assert timing.relative_error(case, (PROVIDERS["cpu"].forward(case, other),), slices) > 0.1


def test_providers_without_their_package_are_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "flag_gems" else object())
    assert installed(["ours", "flaggems", "fa2", "flaggems_sdpa"]) == ["ours", "fa2"]
    assert installed(["dense", "flaggems"], decode.PROVIDERS) == ["dense"]
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert installed(["ours", "flaggems"]) == ["ours", "flaggems"]


def test_error_table_shows_wrong_results_in_bold():
    case = plain(64, 1024, False, "backward")
    wrong = "wrong result: error 3.10e-01, allowed 1e-02"
    results = [timing.Result(case, "ours", 1.5, error=0.0031), timing.Result(case, "flaggems_sdpa", refused=wrong)]
    assert "| D64 S1k full backward | 3.1e-03 | **3.10e-01** |" in report.error_table(results)
    document = {"sweep": "flaggems", "results": [report.result_to_json(result) for result in results]}
    assert report.error_table(results) in report.kernel_section(document)


def test_nan_never_passes_the_check():
    case = plain(16, 40, True, "forward", **GQA)
    inputs = make_inputs(case, CPU)
    slices = timing.expected_slices(case, inputs)
    (out,) = whole_result(case, inputs)
    out[-1, -1, -1, -1] = float("nan")
    assert not timing.relative_error(case, (out,), slices) < 1.0


def test_a_wrong_provider_is_refused_and_a_failing_one_quoted():
    case = plain(16, 64, False, "forward", **GQA)

    def fail(_case, _inputs):
        raise RuntimeError("no such kernel\nand more")

    wrong = Provider("wrong", "", lambda _c, _d: None, lambda _c, inputs: inputs.q * 2)
    failing = Provider("failing", "", lambda _c, _d: None, fail)
    results = {r.provider: r for r in timing.measure_group([case], [wrong, failing], CPU, 0.01)}
    assert results["wrong"].median_ms is None and results["wrong"].refused.startswith("wrong result")
    assert results["failing"].refused == "RuntimeError: no such kernel"


def test_dropout_is_checked_by_its_bias():
    case = plain(16, 64, False, "forward", **GQA, dropout_p=0.2)
    inputs = make_inputs(case, CPU)
    slices = timing.expected_slices(case, inputs)
    out = reference.attention(*inputs.operands)[0]
    assert timing.relative_error(case, (out,), slices) < 1e-6
    assert timing.relative_error(case, (out / 0.8,), slices) == pytest.approx(0.25)


def test_backward_is_timed_on_a_retained_graph():
    case = plain(16, 64, True, "backward", **GQA)
    call = launch(PROVIDERS["fa2"], case, make_inputs(case, CPU))
    first, second = call(), call()
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def measured(tmp_path):
    """A tiny run's exit code and its result file."""
    words = [
        "--tiny",
        "--device",
        "cpu",
        "--providers",
        "ours",
        "fa2",
        "cudnn",
        "--budget",
        "0.01",
        "--out",
        str(tmp_path),
    ]
    return run.main(words), tmp_path / "tiny.json"


def test_a_tiny_run_measures_what_can_be_measured_here(measured, capsys):
    code, path = measured
    document = json.loads(path.read_text())
    results = report.load_results(document)
    assert code == 0
    assert {r.provider for r in results if r.refused} == {"cudnn", "fa2"}  # no GPU here; FA2 has no softcap
    assert all(r.median_ms > 0 and r.error < 1e-4 for r in results if not r.refused)
    assert len(report.speedups(results, "ours", "fa2", "forward")) == 2
    assert [cost[1] for cost in report.feature_costs(results)] == ["ours", "ours"]
    assert document["machine"]["source"]


def test_report_round_trip(tmp_path):
    case = plain(64, 1024, True, "forward", lengths=(3, 4))
    results = [
        timing.Result(case, "ours", 1.5, (1.25, 1.75), 9, 0.001, None, 1700),
        timing.Result(case, "fa2", refused="not here"),
    ]
    path = tmp_path / "x.json"
    report.save(path, "main", {"device": "none", "source": "0", "date": "2026-01-01"}, results)
    assert report.load_results(json.loads(path.read_text())) == results


def test_document_is_regenerated_between_its_markers_only(measured, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    paths = ["--results", str(tmp_path), "--document", str(document)]
    assert report.main([*paths, "--check"]) == 1
    assert report.main(paths) == 0
    assert report.main([*paths, "--check"]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "D16 S64 causal" in text


def test_committed_document_is_up_to_date():
    assert report.main(["--check"]) == 0


def test_change_table_divides_out_the_drift_of_the_peer():
    case = plain(64, 1024, True, "forward")

    def results(ours, peer):
        return [timing.Result(case, "ours", ours), timing.Result(case, "fa2", peer)]

    table = run.change_table(results(2.0, 4.0), results(2.0, 8.0))
    assert "| 2.000 |" in table.splitlines()[2] and table.splitlines()[-1].endswith("| 2.000 |")


def test_host_time_is_measured_for_every_call(tmp_path):
    words = ["--tiny", "--device", "cpu", "--providers", "ours", "fa2", "cudnn", "--out", str(tmp_path)]
    assert host.main(words) == 0
    document = json.loads((tmp_path / "host.json").read_text())
    assert {(row["provider"], row["what"]) for row in document["host_us"]} == set(
        itertools.product(("ours", "fa2"), ("forward", "forward, gradients wanted", "forward and backward"))
    )
    assert "forward and backward" in report.host_section(document)


def test_a_tiny_decode_run(tmp_path, capsys):
    """Rows, pages and appending agree with the specification; the bytes are those of the keys and values."""
    names = ["dense", "page16", "func", "varlen16", "append", "rotary", "invariant", "math", "cudnn"]
    words = ["--tiny", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path), "--providers", *names]
    assert decode.main(words) == 0
    document = json.loads((tmp_path / "decode.json").read_text())
    refused = {row["provider"] for row in document["results"] if "refused" in row}
    assert refused <= {"cudnn"}
    (case,) = decode.TINY
    assert case.bytes == 2 * 4 * 2 * 64 * 2 * 16
    for row in document["results"]:
        if row["provider"] not in refused:
            assert math.isclose(row["terabytes_per_s"], case.bytes / row["median_us"] * 1e-6, rel_tol=1e-3)
            assert row["error"] < 1e-4 and row["host_us"] > 0
    table = report.decode_section(document)
    assert case.name in table and "page 16" in table


def test_a_peer_that_refuses_is_no_failure(tmp_path, capsys):
    """FlagGems has no attention for a CPU, or is not there at all."""
    assert decode.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--providers", "dense", "flaggems"]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert [row["provider"] for row in rows if "refused" not in row] == ["dense"]


def test_prefill_cases_are_well_formed():
    for cases in (prefill.CASES, prefill.TINY):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert case.causal and case.seqlen_q <= case.seqlen_k and case.nheads % case.nheads_k == 0
            assert all(case.seqlen_k % page == 0 for page in prefill.PAGES.values())
    assert {case.headdim for case in prefill.CASES} == {64, 128, 256}
    assert set(prefill.PAGES) | set(prefill.PEERS) <= set(prefill.PROVIDERS)


def test_a_tiny_prefill_run(tmp_path, capsys):
    """Every layout of the cache agrees with the specification, and only peers refuse; the pairs are the visible ones."""
    words = ["--tiny", "--device", "cpu", "--budget", "0.01", "--filter", "B2", "--out", str(tmp_path)]
    assert prefill.main(words) == 0
    document = json.loads((tmp_path / "prefill.json").read_text())
    results = report.load_results(document)
    assert [case.name for case in prefill.TINY] == list(dict.fromkeys(result.case.name for result in results))
    measured = {(r.case.name, r.provider): r for r in results if not r.refused}
    assert {provider for _case, provider in measured} >= set(prefill.PROVIDERS) - {"cudnn", "flaggems"}
    assert all(r.median_ms > 0 and r.error < 1e-4 for r in measured.values())
    chunk = prefill.TINY[1]
    assert (chunk.seqlen_q, chunk.seqlen_k) == (32, 512)
    assert chunk.flops == 4 * 2 * 4 * 16 * sum(range(481, 513))
    row = next(row for row in document["results"] if row["provider"] == "dense" and row["case"]["name"] == chunk.name)
    assert "tflops" in row and "tflops_conventional" not in row  # half of all pairs would be no count of a chunk's
    section = report.generated_part(tmp_path)
    assert chunk.name in section and section.startswith("## prefill") and "cuDNN needs an NVIDIA GPU" in section


def test_prefill_in_pages_follows_the_table():
    case = prefill.TINY[1]
    inputs = prefill.make_cache(case, CPU)
    slices = timing.expected_slices(case, inputs)
    pages = prefill.paged(inputs, 16)
    assert pages.k.shape == (64, 16, 2, 16) and sorted(pages.block_table.flatten().tolist()) == list(range(64))
    wrong = pages._replace(block_table=pages.block_table.flip(0))
    for attend in (prefill.over_cache, prefill.packed):
        assert timing.relative_error(case, (attend(case, pages),), slices) < 1e-5
        assert timing.relative_error(case, (attend(case, wrong),), slices) > 0.1


def test_the_prefill_section_divides_the_peers_times(tmp_path):
    """The document shows the section once there is a result file, and is made without it before."""
    whole, chunk = prefill.CASES[:2]
    results = [
        timing.Result(whole, "dense", 1.0, (1.0, 1.0), 9, 0.003),
        timing.Result(whole, "cudnn", 1.25, (1.0, 1.5), 9, 0.003),
        timing.Result(chunk, "dense", 0.5, (0.5, 0.5), 9, 0.003),
        timing.Result(chunk, "cudnn", refused="PyTorch's causal mask is top-left aligned"),
    ]
    assert report.generated_part(tmp_path) == "Nothing measured yet."
    about = {"device": "none", "source": "0", "date": "2026-01-01"}
    rows = list(map(report.result_to_json, results))
    report.save_document(tmp_path / "prefill.json", {"kind": "prefill", "machine": about, "results": rows})
    section = report.generated_part(tmp_path)
    assert "| case | flash_attn | cuDNN |" in section
    assert f"| {whole.name} | {whole.flops / 1e9:.0f} (1000) | {whole.flops / 1.25e9:.0f} (1250) |" in section
    assert f"| {chunk.name} | {chunk.flops / 0.5e9:.0f} (500) | - |" in section
    assert "| **geometric mean** | 1.00 | 1.25 |" in section
    assert "- cuDNN, 1 cases: PyTorch's causal mask is top-left aligned" in section


def test_a_wrong_prefill_result_of_ours_fails_the_run(tmp_path, monkeypatch, capsys):
    wrong = prefill.PROVIDERS["dense"]._replace(forward=lambda case, inputs: inputs.q * 1.0)
    monkeypatch.setitem(prefill.PROVIDERS, "dense", wrong)
    words = ["--tiny", "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path), "--providers", "dense"]
    assert prefill.main(words) == 1
    assert "wrong result" in capsys.readouterr().out


def test_a_tiny_training_run(tmp_path, capsys):
    words = ["--tiny", "--steps", "2", "--providers", "ours", "math", "--device", "cpu", "--out", str(tmp_path)]
    assert training.main(words) == 0
    rows = json.loads((tmp_path / "training.json").read_text())["training"]
    assert [row["provider"] for row in rows] == ["ours", "math"]
    assert all(row["median_ms"] > 0.0 for row in rows) and rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)
    assert "ms a step" in report.generated_part(tmp_path)


def test_training_runs_must_agree(monkeypatch):
    monkeypatch.setitem(training.ATTENTIONS, "math", lambda q, k, v: 5.0 * q)
    with pytest.raises(RuntimeError, match="losses of the first batch differ"):
        training.measure(["ours", "math"], training.TINY, torch.device("cpu"), 1)


def test_a_wrong_decode_result_is_refused(monkeypatch):
    wrong = decode.Provider("wrong", lambda case, cache: lambda: cache.q * 1.0)
    monkeypatch.setitem(decode.PROVIDERS, "wrong", wrong)
    (row,) = decode.measure(decode.TINY[0], ["wrong"], torch.device("cpu"), 2)
    assert "wrong result" in row["refused"]
