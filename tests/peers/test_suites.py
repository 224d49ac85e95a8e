"""The libraries' own tests, unchanged, with fastcl's losses in place of theirs.

They need the libraries' repositories, because none but solo-learn ships its tests: FASTCL_PEERS is
the folder that holds checkouts named as below. Those of sentence-transformers that call its ranking
losses download models, so test_one_line.py stands for them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = {
    "lightly": (
        "lightly",
        "tests/loss/test_ntx_ent_loss.py tests/loss/test_dcl_loss.py "
        "tests/models/modules/test_memory_bank.py",
    ),
    "pytorch-metric-learning": (
        "pytorch_metric_learning",
        "tests/losses/test_ntxent_loss.py tests/losses/test_contrastive_loss.py "
        "tests/losses/test_triplet_margin_loss.py tests/losses/test_self_supervised_loss.py "
        "tests/losses/test_cross_batch_memory.py tests/losses/test_losses_without_labels.py "
        "tests/losses/test_multiple_losses.py tests/losses/test_tcm_loss.py "
        "tests/reducers/test_setting_reducers.py tests/distances/test_custom_check_shape.py "
        "tests/utils/test_module_with_records_and_reducer.py",
    ),
    "open_clip": (
        "open_clip",
        "tests/test_loss.py tests/test_siglip_chunked_loss.py tests/test_factory_task.py "
        "tests/test_clap_task.py tests/test_eval_task.py tests/test_task_base_unit.py "
        "tests/test_task_specific_unit.py tests/test_task_fsdp_unit.py",
    ),
    "solo-learn": (
        "solo",
        "tests/losses/test_simclr.py tests/losses/test_mocov2plus.py tests/losses/test_mocov3.py "
        "tests/losses/test_nnclr.py",
    ),
}


@pytest.mark.parametrize("name", SUITES)
def test_suite(name, capsys):
    checkout = Path(os.environ["FASTCL_PEERS"], name)
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout}")
    peer, tests = SUITES[name]
    sources = [str(p) for p in (checkout / "src", checkout) if p.is_dir()][:1]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *sources])
    # pytorch-metric-learning's tests want a GPU unless told otherwise, and half precision there: on
    # a CPU its own test_ntxent_loss_with_ref fails in float16, with fastcl and without
    settings = {"PYTHONPATH": path, "TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "fastcl.compat.pytest_plugin", "--fastcl-patch", peer, *tests.split()]
    result = subprocess.run(
        command, cwd=checkout, env={**os.environ, **settings}, capture_output=True, text=True
    )
    with capsys.disabled():
        print(f"\n{name}:", *result.stdout.splitlines()[-2:], sep="\n")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
