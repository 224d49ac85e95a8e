"""The benchmark runs, measures what it says, and times nothing that is wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastcl


@pytest.fixture
def modules(root, monkeypatch):
    """The benchmark's modules, which live in the checkout only."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import cases, contestants, measure

    return cases, contestants, measure


TASKS = [
    *(f"{task}-64x32-fp32" for task in ("ntxent", "dcl", "supcon", "clip", "siglip")),
    "queue-16x256x32-fp32",
]


def _case(cases, name):
    return next(case for case in cases.CASES if case.name == name)


@pytest.mark.skipif(sys.platform != "linux", reason="the clock and memory fields are Linux's")
def test_entry_point(root, tmp_path):
    arguments = ["--case", "ntxent-64x32-fp32", "--rounds", "2", "--threads", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--against", "eager", "--out", tmp_path],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (case,) = results["cases"]
    usable = [n for n, b in fastcl.backends().items() if not b.unavailable and n != "reference"]
    assert list(case["contestants"]) == [*(f"fastcl {n}" for n in usable), "eager"]
    for name, record in case["contestants"].items():
        assert name in result.stdout
        for timed in (record, record["tuned"]):
            assert timed["loss_error"] < 1e-5
            assert timed["gradient_error"] < 1e-4
            assert 0 < timed["p10_ms"] <= timed["median_ms"] <= timed["p90_ms"]
            assert timed["rounds"] == 2
        assert 0 <= record["memory_mb"] < 50
    for picture in ("picture.png", "crossover.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert case["ceiling"]["best"] > 0
    assert case["tuned_ceiling"]["best"] > 0
    assert str(root) not in json.dumps(results)


def test_a_report_without_memory_or_tuned_times(root, tmp_path, modules, capsys):
    """As a GPU run without memory, or another system than Linux, leaves them; and a slow fastcl."""
    from benchmarks import report

    def record(ms):
        figures = {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "rounds": 3}
        return figures | {"loss_error": 0.0, "gradient_error": 0.0}

    case = _case(modules[0], "ntxent-64x32-fp32").describe()
    case["contestants"] = {
        "fastcl triton": record(4.0),
        "eager": record(1.0),
        "x": {"reason": "no"},
    }
    machine = {"processor": "p", "cores": 1, "threads": 0, "torch": "t", "fastcl": "f",
               "date": "d", "load": 0.0}  # fmt: skip
    found = {"machine": machine, "device_before": {"device": "a GPU"}, "records": [case, {}]}
    (tmp_path / "peers.json").write_text(json.dumps(found))
    assert report.main([str(tmp_path)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "ntxent-64x32" in x)
    assert "0.25 eager" in line
    for picture in ("picture.png", "crossover.png"):
        assert (tmp_path / picture).exists()
    assert report.main([str(tmp_path / "nowhere")]) == 2


def test_unknown_case_names_the_known_ones(root):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--case", "nothing-like-it"],
        cwd=root, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "ntxent-8192x128-fp32" in result.stdout


@pytest.mark.parametrize("task", TASKS)
def test_truth_is_the_losses_definition(modules, task):
    """In blocks and not, and against the oracle: the gate's own yardstick."""
    cases, contestants, measure = modules
    case = _case(cases, task)
    blocks, whole = cases.truth(case, block=7), cases.truth(case, block=10**6)
    a, b, *rest = case.inputs()
    leaves = [x.detach().double().requires_grad_() for x in (a, b)]
    rest = [x.double() if x.is_floating_point() else x for x in rest]
    contestant = contestants.fastcl_backends(("reference",))[0]
    step = contestant.builders[case.task](case)
    loss, *gradients = measure.differentiate(step, contestant, [*leaves, *rest])
    for exact in (blocks, whole):
        assert max(exact.errors(loss, gradients)) < 1e-12


@pytest.mark.parametrize("task", TASKS)
def test_every_peer_at_hand_is_admitted(modules, task):
    """Those that are installed and run here compute what the definition says."""
    cases, contestants, measure = modules
    case = _case(cases, task)
    for contestant in contestants.PEERS:
        if case.task in contestant.builders and contestant.name != "torch.compile":
            _, record = measure.admit(
                contestant, case, case.inputs(), cases.truth(case), measure.CPU.memory()
            )
            reason = record.get("reason", "")
            assert not reason.startswith("wrong"), (contestant.name, reason)


def test_what_is_wrong_is_not_timed(modules):
    """Planted: a gradient lost on one side, a loss off by a little, NaN, and an exception."""
    cases, contestants, measure = modules
    case = _case(cases, "ntxent-64x32-fp32")
    eager = contestants.eager_ntxent

    def plant(name, step):
        return contestants.Contestant(name, {"ntxent": lambda case: step})

    def raises(a, b):
        raise RuntimeError("out of luck in /some/folder/file.py\nmore")

    wrong = [
        plant("half a gradient", lambda a, b: eager(a, b.detach() + 0.0 * b)),
        plant("loss", lambda a, b: eager(a, b) + 1e-3),
        plant("nan", lambda a, b: eager(a, b) * float("nan")),
        plant("raises", raises),
    ]
    settings = measure.Settings(rounds=2)
    right = plant("right", eager)
    records = measure.compare(case, [*wrong, right], cases.truth(case), settings)
    assert records["right"]["median_ms"] > 0
    assert "reason" not in records["right"]
    for contestant in wrong:
        assert "median_ms" not in records[contestant.name], contestant.name
        assert records[contestant.name]["reason"]
    assert "/some" not in records["raises"]["reason"]


def test_refusals(modules):
    cases, contestants, _ = modules
    case = _case(cases, "ntxent-32768x128-fp32")
    peers = {c.name: c for c in contestants.PEERS}
    assert "GiB" in peers["eager"].refusal(case, 2**30)
    assert "cubic" in peers["pytorch-metric-learning NTXentLoss"].refusal(case, 2**60)
    assert peers["info-nce-pytorch"].refusal(case, 2**60) == "has no such loss"
    assert replace(peers["eager"], copies=0.0).refusal(case, 0) == ""


def test_slow_contestants_skip_rounds_evenly(modules):
    *_, measure = modules
    order = []

    def run(name, seconds):
        order.append(name)
        return seconds

    runs = {"fast": lambda: run("fast", 0.01), "slow": lambda: run("slow", 0.1)}
    samples = measure.interleave(runs, None, 2.0)
    assert {name: len(taken) for name, taken in samples.items()} == {"fast": 100, "slow": 10}
    turns = [i for i, name in enumerate(order[2:]) if name == "slow"]
    gaps = torch.tensor(turns).diff()
    assert int(gaps.max() - gaps.min()) <= 2


_ASSEMBLY = """
  40: vmovups (%rdx),%ymm2
  44: vbroadcastss (%rax),%ymm3
  48: vfmadd231ps %ymm3,%ymm2,%ymm15
  4c: vfmadd231ps %ymm3,%ymm1,%ymm14
  50: add    $0x1,%rcx
  54: jne    44 <somewhere+0x4>
  58: vfmadd231ps %ymm3,%ymm1,%ymm14
  5c: jne    40 <somewhere>
"""


def test_limits_counts_innermost_loops_only(modules):
    from benchmarks import limits

    (loop,) = limits.find_loops(_ASSEMBLY, least=2)
    assert (loop.multiply, loop.broadcast, loop.load, loop.other) == (2, 1, 0, 2)


def test_limits_sets_targets_beside_the_machine(modules, capsys):
    from benchmarks import limits

    def record(ms):
        return {"median_ms": ms, "tuned": {"median_ms": ms}}

    contestants = {"fastcl cpu": record(200.0), "eager": record(1000.0)}
    rate = {"best": 257.69803776, "median": 200.0}  # 8192 x 8192 x 128 x 3 flop in 100 ms
    case = {"case": "ntxent-8192x128-fp32", "ceiling": rate, "tuned_ceiling": rate}
    results = {"cases": [{**case, "contestants": contestants}]}
    limits.print_targets(results, call=lambda case: 50.0)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("ntxent"))
    # call, least, ours, share; eager's target, highest and reached; no torch.compile; best tuned
    assert line.split()[3:] == [
        "50000",
        "150",
        "200",
        "75",
        "12",
        "6.7",
        "5.00",
        "-",
        "3.5",
        "6.7",
        "5.00",
    ]
