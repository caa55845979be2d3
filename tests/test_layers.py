"""The house rules: who may import whom, and how long a file may be. Imports are read from the source, not run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = sorted((SOURCE / "pagedkv").rglob("*.py"))

# The ground floor that all layers may stand on.
GROUND = {"errors", "validate", "format", "machine", "typing"}
# Each layer and the layers that it may import; every layer may import itself.
MAY_IMPORT = {
    "errors": set(),
    "format": set(),
    "machine": set(),
    "typing": set(),
    "validate": {"errors"},
    "kernel_cache": set(),
    "jit": GROUND | {"kernel_cache"},
    "spec": GROUND,
    "control": GROUND | {"jit", "spec"},
    "data": GROUND | {"jit", "spec"},
    "cache": GROUND | {"spec", "control", "data"},
    "tiers": GROUND | {"jit", "spec", "control", "data", "cache"},
    "vllm": GROUND | {"spec", "tiers"},
    "models": GROUND,
    "fleet": GROUND | {"control"},
    "sim": GROUND | {"spec", "control", "jit", "fleet"},
    "hf": GROUND | {"spec", "control", "data", "cache", "tiers", "models"},
    "engine": GROUND | {"jit", "spec", "control", "data", "cache", "tiers", "hf", "models"},
    "server": GROUND | {"spec", "engine", "fleet"},
    "replicas": GROUND | {"engine", "fleet", "server"},
}
FREE = {"", "cli"}  # the public door and the command line may import anything, lazily

# What must not be imported from outside of the package.
FORBIDDEN = {
    "errors": {"numpy", "numba", "torch", "transformers"},
    "typing": {"numpy", "numba", "torch", "transformers"},
    "format": {"numpy", "numba", "torch", "transformers"},
    "validate": {"numpy", "numba", "torch", "transformers"},
    "spec": {"numpy", "numba", "torch", "transformers"},
    "kernel_cache": {"torch", "transformers"},
    "jit": {"torch", "transformers"},
    "control": {"torch", "transformers"},
    "data": {"transformers"},
    "cache": {"transformers"},
    "tiers": {"transformers"},
    "vllm": {"transformers"},
    "fleet": {"torch", "transformers"},
    "sim": {"torch", "transformers"},
}
# Packages that an import of the door, of the command line or of errors and spec must not pull in.
HEAVY = {"numpy", "numba", "torch", "transformers", "tokenizers", "safetensors"}
# Who may import what is forbidden when it is called, and for the type checker: a plan gives itself as tensors.
LATE = {("pagedkv.control.plan", "torch"), ("pagedkv.typing", "torch"), ("pagedkv.typing", "numpy")}
SHIM = "pagedkv.hf.compat"
MAX_LINES = 1000


@dataclass(frozen=True)
class Import:
    """One imported module, as the source names it."""

    module: str
    line: int
    at_import_time: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def package_of(module: str, is_package: bool) -> str:
    return module if is_package else module.rpartition(".")[0]


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Resolve ``from ..x import y`` as Python does."""
    if not node.level:
        return node.module or ""
    base = package_of(module, is_package)
    for _ in range(node.level - 1):
        base = base.rpartition(".")[0]
    return f"{base}.{node.module}" if node.module else base


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def dynamic_import(node: ast.AST) -> str | None:
    """Return the module of ``import_module("x")`` and ``__import__("x")``."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0]
    if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """List every import of a source, those inside of functions and TYPE_CHECKING blocks included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import_time: bool) -> None:
        def add(name: str) -> None:
            found.append(Import(name, node.lineno, at_import_time))

        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, is_package)
            add(base)
            if base.partition(".")[0] == "pagedkv" or node.level:
                # "from pagedkv import control" and "from . import control" name modules, too.
                for alias in node.names:
                    add(f"{base}.{alias.name}")
        elif name := dynamic_import(node):
            add(name)
        inside = at_import_time and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside and not is_type_checking(node))

    visit(ast.parse(source), True)
    return found


def known_layers() -> set[str]:
    return {*MAY_IMPORT, *FREE}


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """Say what a source imports and must not."""
    layer, said = layer_of(module), []
    for found in imports_of(source, module, is_package):
        top, _, rest = found.module.partition(".")
        where = f"{module}:{found.line}"
        if top == "pagedkv" and layer not in FREE:
            target = rest.partition(".")[0]
            if target in known_layers() - {"", layer} - MAY_IMPORT[layer]:
                said.append(f"{where}: {layer} must not import {target} ({found.module})")
            elif not target and found.module == "pagedkv" and not has_own_layer_names(source, found.line):
                said.append(f"{where}: {layer} must not import the public door")
        if top in FORBIDDEN.get(layer, set()) and ((module, top) not in LATE or found.at_import_time):
            said.append(f"{where}: {layer} must not import {top}")
        if layer in FREE and found.at_import_time and top in HEAVY:
            said.append(f"{where}: {top} must be imported where it is used")
        if top == "transformers" and rest and module != SHIM:
            said.append(f"{where}: {found.module} is private; only {SHIM} imports from inside of transformers")
    return said


def has_own_layer_names(source: str, line: int) -> bool:
    """Whether the import at this line takes submodules or the version from the package, not names of the door."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.lineno == line]
    return bool(nodes) and all(alias.name in {*known_layers(), "__version__"} for alias in nodes[0].names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward(path):
    assert faults(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_belongs_to_a_layer(path):
    assert layer_of(module_name(path)) in known_layers()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_layers_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {layer for layer, below in MAY_IMPORT.items() if layer not in done and below <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pagedkv.control.pool", "import torch"),
        ("pagedkv.control.pool", "def late():\n    import torch.nn as nn"),
        ("pagedkv.control.pool", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("pagedkv.control.pool", "from pagedkv.data.storage import KvStorage"),
        ("pagedkv.control.pool", "from pagedkv import data"),
        ("pagedkv.control.pool", "from ..data import storage"),
        ("pagedkv.control.pool", "from .. import data"),
        ("pagedkv.control.pool", "import importlib\nimportlib.import_module('pagedkv.data.storage')"),
        ("pagedkv.control.pool", "from pagedkv import BlockManager"),
        ("pagedkv.data.storage", "from pagedkv.control.plan import BatchPlan"),
        ("pagedkv.data.storage", "if TYPE_CHECKING:\n    from pagedkv.control.plan import BatchPlan"),
        ("pagedkv.data.storage", "import pagedkv.cache"),
        ("pagedkv.control.plan", "import torch"),
        ("pagedkv.errors", "import pagedkv.spec"),
        ("pagedkv.errors", "import numpy as np"),
        ("pagedkv.spec", "import torch"),
        ("pagedkv.validate", "from pagedkv.spec import KvCacheSpec"),
        ("pagedkv.validate", "import numpy"),
        ("pagedkv.cache", "from pagedkv.hf import PagedCache"),
        ("pagedkv.sim.replayer", "from pagedkv.data import storage"),
        ("pagedkv.tiers.slab", "from pagedkv.engine import LLM"),
        ("pagedkv.control.restore", "from pagedkv.tiers.tier import BlockFormat"),
        ("pagedkv.server.app", "from pagedkv.cache import PagedKvCache"),
        ("pagedkv.hf.cache", "from transformers.cache_utils import CacheLayerMixin"),
        ("pagedkv.hf.cache", "def late():\n    import transformers.masking_utils"),
        ("pagedkv.cli.generate", "from transformers.cache_utils import Cache"),
        ("pagedkv.cli.generate", "import torch"),
        ("pagedkv", "import torch"),
    ],
)
def test_the_rules_see_a_fault(module, line):
    assert len(faults(line, module)) >= 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (
            "pagedkv.control.pool",
            "import numpy as np\nfrom pagedkv.jit import compiled\nfrom pagedkv.control.state import State",
        ),
        ("pagedkv.control.pool", "from . import state\nfrom .state import State\nfrom ..errors import OutOfMemory"),
        ("pagedkv.control.plan", "def torch(self):\n    import torch"),
        ("pagedkv.data.storage", "import torch\nfrom pagedkv.spec import KvCacheSpec"),
        ("pagedkv.cache", "from pagedkv import data, control\nfrom pagedkv.errors import OutOfMemory"),
        ("pagedkv.hf.compat", "from transformers.cache_utils import CacheLayerMixin"),
        ("pagedkv.hf.cache", "from transformers import PretrainedConfig"),
        ("pagedkv.cli.generate", "def run():\n    import torch\n    from pagedkv.hf import PagedCache"),
        ("pagedkv", "if TYPE_CHECKING:\n    from pagedkv.cache import PagedKvCache"),
    ],
)
def test_the_rules_let_good_imports_pass(module, line):
    assert faults(line, module) == []
