"""The GPU run, through the interpreter at toy sizes: every stage ends, writes, and says the truth.

What needs a device stays uncovered here: events, graphs, streams, peak memory, launch counts,
nvidia-smi, ncu, compute-sanitizer, and compilation in many processes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton for its interpreter"
)


def _run(root, out, *arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_every_stage(root, tmp_path):
    """The whole way, then what each stage left behind."""
    result = _run(root, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("*.json")}
    stages = {"correctness", "sanitize", "ceilings", "table", "peers", "cuda", "train", "profile"}
    assert set(found) == stages
    for name, stage in found.items():
        assert stage["ended"], name
        assert not stage["failures"] + stage["skipped_for_time"], name
        assert f"== {name}" in (tmp_path / "summary.txt").read_text()
    judged = [r for r in found["correctness"]["records"] if r["kind"] == "operator"]
    assert {r["dtype"] for r in judged} == {"fp32", "fp16"}
    assert all(r["error"] <= r["allowed"] and r["repeats"] for r in judged)
    for record in found["table"]["records"]:
        if record["kind"] == "loss":
            assert record["gradient_error"] < 1e-5
            assert record["deterministic"]
            assert {"forward", "backward", "both", "graph", "wall"} == set(record["times"])
    for record in found["peers"]["records"]:
        assert {"fastcl triton", "eager"} <= set(record["contestants"])
        assert record["best_ratio"] > 0
    kinds = {r["kind"] for r in found["cuda"]["records"]}
    assert kinds == {"first", "ring", "race"}
    assert all("reason" not in r.get("triton", {}) for r in found["cuda"]["records"])
    records = found["train"]["records"]
    assert [r["kind"] for r in records] == ["training", "verdict", "step", "step"]
    assert set(records[0]["seeds"]) == {"0", "1"}
    assert all(set(r["times"]) == {"eager", "compiled", "graph"} for r in records[2:])


def test_tuning_writes_a_table_that_loads(root, tmp_path):
    """Entries with their reasons, in an order in which none hides one that was not timed."""
    result = _run(root, tmp_path, "--stage", "tune")
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "configs.json").read_text())
    shipped = json.loads((root / "kernels/configs.json").read_text())
    assert written["rules"] == shipped["rules"]
    new = [row for row in written["configs"] if row["by"].startswith("measured")]
    assert {row["kernel"] for row in new} == {"sweep", "product"}
    kept = [row for row in written["configs"] if row not in new]
    assert sorted(map(str, kept)) == sorted(map(str, shipped["configs"]))
    for kernel in {row["kernel"] for row in kept}:
        widths = [row["d"] or 10**9 for row in written["configs"] if row["kernel"] == kernel]
        assert widths == sorted(widths)


def test_what_time_does_not_allow_is_said(root, tmp_path):
    result = _run(root, tmp_path, "--stage", "table", "--seconds", "0.001")
    assert result.returncode == 0, result.stdout + result.stderr
    stage = json.loads((tmp_path / "table.json").read_text())
    assert stage["ended"]
    assert len(stage["skipped_for_time"]) >= 2
    assert "no time for" in result.stdout


def test_a_stage_that_hangs_or_dies_costs_itself_only(root, tmp_path, monkeypatch, capsys):
    """Planted in place of the interpreter: one stage never ends, one dies."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import __main__ as script

    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *ceilings*) sleep 60;; *table*) kill -9 $$;; esac\n'
        f'echo "$*" >>{tmp_path}/calls\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(script.sys, "executable", str(python))
    monkeypatch.setattr(script, "_GRACE", 0.5)
    assert script.main(["--out", str(tmp_path), "--seconds", "0.5", "--quick"]) == 1
    assert "failed: ceilings, table\n" in capsys.readouterr().out
    calls = (tmp_path / "calls").read_text().splitlines()
    ran = [line.split()[5] for line in calls]
    assert ran == ["correctness", "sanitize", "peers", "cuda", "train", "profile"]
    assert all("--quick" in line for line in calls)


def test_a_kernel_that_hangs_is_named(root, monkeypatch):
    """Nothing answers at once: the time limit is what is left of a hang without a device."""
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.chdir(root)
    from benchmarks.gpu import cuda

    monkeypatch.setattr(cuda, "_PATIENCE", 0.01)
    records = []
    stage = SimpleNamespace(
        toy=True, device=SimpleNamespace(name="cpu"), chosen=lambda forms, _: forms,
        add=records.append,
    )  # fmt: skip
    assert cuda.first_light(stage, "chunked") == {"enqueue"}
    assert "no answer" in records[0]["failed"]


def test_counters_are_read_from_the_longest_launch(root, monkeypatch):
    """ncu's raw page: names, units, values; a launch that returns at once is not the kernel."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import profile

    page = (
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","a.pct"\n'
        '"","","us","%"\n"0","product","2.1","1"\n"1","product","1,043.2","61.5"\n'
    )
    assert profile.parse(page)["a.pct"] == "61.5 %"
    assert profile.parse("==ERROR== no permission") == {}


def _trained(*scores, held_out=100):
    """A training run of which each seed has one score."""
    seeds = {str(seed): {"scores": {"kNN": score}} for seed, score in enumerate(scores)}
    return {"command": "fastcl train", "held_out": held_out, "seeds": seeds}


def test_scores_are_judged_by_the_spread_of_seeds(root, monkeypatch):
    """Three seeds beside eight: 5.408 is Student's t of 7 degrees of freedom at 0.9995."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu.train import judge

    reference = _trained(*[0.8, 0.9] * 4)
    allowed = 5.408 * (1 / 3 + 1 / 8) ** 0.5 * 0.05 * (8 / 7) ** 0.5
    for sign in (1, -1):
        inside, outside = (0.85 + sign * share * allowed for share in (0.99, 1.01))
        verdict = judge(_trained(inside - 0.01, inside, inside + 0.01), reference)
        assert verdict["metrics"]["kNN"]["allowed"] == pytest.approx(allowed, rel=1e-3)
        assert "failed" not in verdict
        assert "kNN" in judge(_trained(outside, outside, outside), reference)["failed"]
    assert "kNN" in judge(_trained(0.85, float("nan"), 0.85), reference)["failed"]
    # seeds that agree leave one held-out sample
    alike = _trained(0.9, 0.9, 0.9)
    assert "failed" not in judge(_trained(0.8901, 0.8901), alike)
    assert "failed" in judge(_trained(0.8899, 0.8899), alike)
    assert "failed" in judge(alike, None)


def test_the_kept_scores_of_a_cpu_are_complete(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import train

    kept = json.loads((root / "benchmarks/results/epyc-zen4-2cores/train.json").read_text())
    monkeypatch.setattr(train.platform, "python_version", lambda: kept["machine"]["python"])
    assert set(train.references()) == set(train.METHODS)
    for record in train.references().values():
        assert len(record["seeds"]) == 8
        assert all(seed["device"] == {"name": "cpu"} for seed in record["seeds"].values())
    monkeypatch.setattr(train.platform, "python_version", lambda: "3.99.0")
    assert set(train.references()) == {"simclr", "moco"}  # code search reads another library


def test_what_no_kept_score_fits_is_trained_on_this_cpu_too(root, monkeypatch):
    """Code search under another Python; a run that fails costs its own verdict only."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import train

    def run(job, seconds):
        if job.name == "moco bf16-mixed gpu":
            raise RuntimeError("exit code 1")
        scores = [0.8 + 0.01 * seed for seed in job.seeds]
        return _trained(*scores) | {"command": job.name}

    kept = {method: _trained(0.8, 0.81, 0.82) for method in ("simclr", "moco")}
    monkeypatch.setattr(train.Run, "train", run)
    monkeypatch.setattr(train, "references", lambda: kept)
    monkeypatch.setattr(train, "held_out", lambda method: 100)
    monkeypatch.setattr(train, "MODULES", ())
    records = []
    stage = SimpleNamespace(
        toy=False, chosen=list, add=records.append, left=lambda: 1.0, workers=2, skip=None
    )
    train.train(stage)
    verdicts = {r["case"]: r for r in records if r["kind"] == "verdict"}
    assert set(verdicts) == {job.name for job in train.runs(False)} - {"moco bf16-mixed gpu"}
    assert {verdicts[f"clip {p} gpu"]["reference"] for p in ("32-true", "bf16-mixed")} == {
        "clip 32-true cpu"
    }
    assert [r["case"] for r in records if "failed" in r] == ["moco bf16-mixed gpu"]


def test_without_the_packages_that_training_needs_one_sentence_says_so(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu import train

    monkeypatch.setattr(train, "MODULES", ("torch", "absent_one"))
    records = []
    stage = SimpleNamespace(toy=False, chosen=list, add=records.append)
    train.train(stage)
    assert len(records) == 6
    assert not any("failed" in record for record in records)
    (line,) = train.lines(records)
    assert line.endswith("pip install 'fastcl[train]' (missing: absent_one)")


def _races(**cases):
    """What the stage of CUDA kernels writes, reduced to what decides."""
    records = [
        {"kind": "race", "kernel": "k", "declined": False, "ratio": ratio} for ratio in cases["of"]
    ]
    records += [{"kind": "race", "kernel": "k", "declined": True, "ratio": 0.5}, {"kind": "warm"}]
    whole = {"ended": True, "failures": [], "skipped_for_time": [], "records": records}
    return whole | {key: value for key, value in cases.items() if key != "of"}


def test_the_speed_rule(root, monkeypatch):
    """At least 10 % in every case that the kernel took, in a whole run in which nothing failed."""
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu.cuda import verdicts

    assert verdicts(_races(of=[1.1, 3.0])) == {"k": True}
    assert verdicts(_races(of=[1.09, 3.0])) == {"k": False}
    assert verdicts(_races(of=[])) == {}
    for trouble in ({"failures": ["x"]}, {"skipped_for_time": ["x"]}, {"ended": False}):
        assert verdicts(_races(of=[3.0], **trouble)) == {"k": False}


def test_kernels_serve_by_themselves_only_where_a_kept_file_shows_it(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu.cuda import races, verdicts
    from fastcl.ops.cuda import MEASURED

    assert {race.kernel for race in races(False, False)} >= set(MEASURED)
    for kernel, places in MEASURED.items():
        for capability, file in places.items():
            found = json.loads((root / "benchmarks/results" / file).read_text())
            assert tuple(found["device_before"]["capability"]) == capability
            assert verdicts(found)[kernel]
