"""A record holds environment variables and torch switches that change what runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpc_core.record.record import Circumstances, record_from_json, record_to_json
from hpc_core.record.settings import is_setting, settings, variables
from tests.strategies import a_record, around

CHANGING_WORK = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUDA_LAUNCH_BLOCKING": "1",
    "OMP_NUM_THREADS": "4",
    "MKL_NUM_THREADS": "4",
    "BNB_TRITON_KERNELS": "0",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
}
MACHINE_ONLY = {
    "TORCHINDUCTOR_CACHE_DIR": "/somewhere",
    "TORCH_HOME": "/somewhere",
    "TRITON_CACHE_DIR": "/somewhere",
    "CUDA_VISIBLE_DEVICES": "0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "PYTORCH_VERSION": "2.11",
    "HF_TOKEN": "secret",
    "VLLM_API_KEY": "secret",
    "PYTORCH_TUNABLEOP_FILENAME": "/somewhere",
}


@pytest.mark.parametrize("name", CHANGING_WORK)
def test_a_variable_that_changes_the_work_is_recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A variable that is set is recorded with its value; one that is not set is not recorded."""
    monkeypatch.delenv(name, raising=False)
    assert name not in settings()
    monkeypatch.setenv(name, CHANGING_WORK[name])
    assert settings()[name] == CHANGING_WORK[name]
    assert variables(settings())[name] == CHANGING_WORK[name]


@pytest.mark.parametrize("name", MACHINE_ONLY)
def test_a_variable_of_the_machine_is_not_recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders, versions, devices and secrets are not recorded, because they change no work."""
    monkeypatch.setenv(name, MACHINE_ONLY[name])
    assert name not in settings()


PRINT_SWITCHES = """
import torch
from hpc_core.record.settings import settings
before = [name for name in settings() if name.startswith("torch.")]
{switch}
print(before, sorted(name for name in settings() if name.startswith("torch.")))
"""


@pytest.mark.parametrize(
    ("switch", "names"),
    [
        (
            "torch.set_float32_matmul_precision('high'); torch.backends.cudnn.benchmark = True; "
            "torch.use_deterministic_algorithms(True)",
            [
                "torch.backends.cuda.matmul.fp32_precision",
                "torch.backends.cudnn.benchmark",
                "torch.backends.mkldnn.matmul.fp32_precision",
                "torch.deterministic_algorithms",
                "torch.float32_matmul_precision",
            ],
        ),
        (
            "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.cuda.enable_flash_sdp(False)",
            ["torch.backends.cuda.flash_sdp", "torch.backends.cuda.matmul.fp32_precision"],
        ),
    ],
)
def test_a_switch_of_torch_is_recorded_unless_default(switch: str, names: list[str]) -> None:
    """A torch switch is recorded if it is not the default, under TF32's old and new names."""
    script = PRINT_SWITCHES.format(switch=switch)
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"[] {names}"


def test_names_of_settings_are_not_names_of_packages() -> None:
    """A setting and a package can be told apart by name."""
    assert is_setting("OMP_NUM_THREADS")
    assert is_setting("torch.backends.cudnn.benchmark")
    assert not is_setting("torch")
    assert not is_setting("liger-kernel")


def test_settings_survive_json() -> None:
    """Settings survive JSON; in an older record they are None, which is not the same as empty."""
    record = a_record(circumstances=around(settings={"OMP_NUM_THREADS": "4"}))
    assert record_from_json(record_to_json(record)) == record
    old = record_from_json(record_to_json(a_record()))
    assert isinstance(old.circumstances, Circumstances)
    assert old.circumstances.settings is None
