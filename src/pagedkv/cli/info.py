"""``pagedkv info``: what this machine has for pagedkv, found without loading torch."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import msgspec

from pagedkv import __version__
from pagedkv.cli.terminal import facts_table, output, print_json
from pagedkv.machine import cuda_devices, usable_cores
from pagedkv.models import shipped_model_path

_PACKAGES = ("numpy", "numba", "torch", "transformers", "tokenizers", "safetensors", "triton")
_BACKENDS = {
    "cpu": ("pagedkv.data.cpu", ("torch", "numba")),
    "triton": ("pagedkv.data.gpu", ("torch", "triton")),
    "flashinfer": ("pagedkv.data.gpu_flashinfer", ("torch", "flashinfer")),
    "reference": ("pagedkv.data.reference", ("torch",)),
}
_MISSING = "not installed"


class ModelInfo(msgspec.Struct):
    """A model folder, with the size of all its files in 10⁶ bytes."""

    path: str
    megabytes: float


class Info(msgspec.Struct):
    """What ``pagedkv info --json`` prints.

    A package has no version where it is not installed, and a backend is there where it can run. There is no directory
    of compiled code where kernels cannot be kept.
    """

    pagedkv: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cores: int
    cuda_devices: list[str]
    backends: dict[str, bool]
    shipped_model: ModelInfo | None
    compiled_code: str | None


def gather_info() -> Info:
    """Look around; nothing heavy is imported."""
    devices = cuda_devices()
    return Info(
        pagedkv=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: _installed(name) for name in _PACKAGES},
        cores=usable_cores(),
        cuda_devices=devices,
        backends={name: _can_run(name, devices) for name in _BACKENDS},
        shipped_model=_shipped_model(),
        compiled_code=_compiled_code(),
    )


def print_info(as_json: bool) -> None:
    """Print the table, or the JSON object, to stdout."""
    info = gather_info()
    if as_json:
        print_json(info, indent=2)
    else:
        output().print(facts_table(_lines(info)), soft_wrap=True)


def _lines(info: Info) -> list[tuple[str, str]]:
    model = info.shipped_model
    return [
        ("pagedkv", info.pagedkv),
        ("python", f"{info.python} ({info.platform})"),
        *((name, found or _MISSING) for name, found in info.packages.items()),
        ("cores", str(info.cores)),
        ("device", ", ".join(info.cuda_devices) or "cpu (no CUDA device found)"),
        ("attention backends", ", ".join(f"{name}{'' if ok else ' (no)'}" for name, ok in info.backends.items())),
        ("shipped model", f"{model.path} ({model.megabytes:.1f} MB)" if model else "missing"),
        ("compiled code", info.compiled_code or "not kept: no directory can be written to, see NUMBA_CACHE_DIR"),
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _can_run(backend: str, devices: list[str]) -> bool:
    module, needs = _BACKENDS[backend]
    if module.startswith("pagedkv.data.gpu") and not devices:
        return False
    return all(find_spec(name) for name in (*needs, module))


def _compiled_code() -> str | None:
    # In a process of its own, as Numba takes a moment to import and knows where it would write.
    code = "from pagedkv.jit import cache_directory; print(cache_directory() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def _shipped_model() -> ModelInfo | None:
    folder = shipped_model_path()
    if not (folder / "config.json").is_file():
        return None
    return ModelInfo(str(folder), sum(file.stat().st_size for file in folder.iterdir()) / 1e6)
