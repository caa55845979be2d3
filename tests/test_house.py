"""The rule of the cut, one idea a file, read from the source: lengths, circles, neighbours, inheritance, headlines."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "pagedkv"
SOFT_LINES, HARD_LINES = 600, 1000
MOST_FILES, MOST_LINES = 247, 65_240
MOST_IN_CONTROL = 27
MOST_LONELY = 27
MOST_DEPTH = 11

# Longer than the soft limit, and why that is still one idea.
LONG = {
    "pagedkv.control.manager": "BlockManager, whole: a third of it is the documentation of its public calls",
    "pagedkv.control.sequences": "the compiled calls on sequences, which share their tables and holes",
    "pagedkv.data.forward_kernels": "one compiled call, and the parts of it",
    "pagedkv.data.cpu_kernels": "one compile unit: the items of a call, and what is put together of their tiles",
    "pagedkv.data.simd_products": "one kind of thing: products that keep their sums in registers",
    "pagedkv.data.gpu_kernels": "one compile unit: Triton inlines what a kernel calls from its own module",
    "pagedkv.hf.runner": "the runner and its three ways to run a model: compiled, ragged and gather",
    "pagedkv.sim.report.charts": "the charts of the report over one canvas",
}

# Imported by only one neighbour of its own package, and why it is a file of its own.
LONELY = {
    "pagedkv.cli.chats": "what chats are, without a terminal: tested without one",
    "pagedkv.cli.serve_replicas": "what a replica is made of, read again in the process of each",
    "pagedkv.cli.top_screen": "needs Textual; the command says so where it is missing",
    "pagedkv.control.call_lock": "what os.fork() makes of a lock, which is a matter of processes and not of books",
    "pagedkv.control.checks": "invariants: read beside the kernels, run only when somebody asks",
    "pagedkv.control.policies": "kernels; the strategies that name them are plain Python",
    "pagedkv.control.sequence_eviction": "order of whole sequences in plain Python; of blocks it is `reclaim`",
    "pagedkv.data.program": "what is computed; in which memory, threads and steps is `forward`'s",
    "pagedkv.engine.beam": "pure rules of the search, tested without an engine",
    "pagedkv.engine.prompt_lookup": "one drafter; others would stand beside it",
    "pagedkv.engine.room": "what is counted of places and blocks; who may have them is the scheduler's",
    "pagedkv.engine.sampler": "the default of a parameter of the engine: another may be given",
    "pagedkv.engine.sampling_kernels": "another compile unit than the sampler",
    "pagedkv.hf.description": "reads a model; the runner only runs what it found",
    "pagedkv.hf.tiers": "what lies beyond a pool; the cache over it only asks before a prompt and tells at its end",
    "pagedkv.replicas.ray_router": "Ray Serve copies it by value, so it holds nothing that is shared",
    "pagedkv.replicas.replica": "what a replica does, without Ray: tested in one process",
    "pagedkv.replicas.totals": "sums of counters and pools; whose they are is the engine's",
    "pagedkv.server.connections": "what happens below HTTP; `run` only puts it there",
    "pagedkv.server.tokenizer_process": "imported by a process that must not have the server's libraries",
    "pagedkv.sim.model_layers": "what one layer keeps; bytes, weights and FLOPs of the whole are `model_shape`",
    "pagedkv.sim.report.facts": "figures of a trace; the charts only draw them",
    "pagedkv.vllm.paging": "the half in a worker, which is tested without vLLM and without the other half",
    "pagedkv.vllm.scheduling": "the half in the scheduler, which knows neither vLLM nor torch",
    "pagedkv.tiers.resp_client": "a protocol, its sockets and its time limits: nothing in it knows of blocks",
}

# Files that a table in their one user names, one by one: a command, a router or a format each.
LISTED = {
    "pagedkv.cli.app": (
        "bench",
        "chat",
        "check_model",
        "demo",
        "generate",
        "plan",
        "replay",
        "serve",
        "tier",
        "top",
        "trace",
        "warmup",
    ),
    "pagedkv.server.app": ("admin", "completions", "messages", "metrics", "ollama", "responses", "tokenize"),
    "pagedkv.sim.reading": ("csv_lengths", "kv_events", "mooncake", "qwen", "tokens", "weka"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


def package_of(module: str) -> str:
    """Return the package under pagedkv that a module belongs to: ``pagedkv.sim`` for its readers, too."""
    return ".".join(module.split(".")[:2])


def imported(node: ast.AST) -> set[str]:
    """Return the modules of this project that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & PATHS.keys()
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return set()
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    modules = names & PATHS.keys()
    return modules | ({node.module} & PATHS.keys() if len(modules) < len(names) else set())


@cache
def names_of(module: str) -> frozenset[str]:
    """Return every module that a module names in an import, in functions and for the type checker too."""
    return frozenset(set().union(*map(imported, ast.walk(tree_of(module)))) - {module})


@cache
def imports_of(module: str) -> frozenset[str]:
    """Return every module that a module imports. What a door shows to the type checker is loaded by who asks for it."""
    if PATHS[module].name != "__init__.py":
        return names_of(module)
    blocks = [node for node in tree_of(module).body if isinstance(node, ast.If)]
    hidden = {child for block in blocks for child in ast.walk(block)}
    nodes = (node for node in ast.walk(tree_of(module)) if node not in hidden)
    return frozenset(set().union(*map(imported, nodes)) - {module})


def arrows(package: str) -> dict[str, set[str]]:
    """Return the imports within one package, its door left out."""
    inside = {module for module in PATHS if package_of(module) == package and module != package}
    return {module: set(imports_of(module) & inside) for module in inside}


PACKAGES = sorted({package_of(module) for module in PATHS if PATHS[module].name != "__init__.py"} & PATHS.keys())
FOLDERS = [package for package in PACKAGES if PATHS[package].name == "__init__.py"]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that are in a circle or behind one: what is left when all others are taken away."""
    left = dict(graph)
    while ready := [module for module, below in left.items() if not below & left.keys()]:
        for module in ready:
            del left[module]
    return sorted(left)


def depth(graph: dict[str, set[str]]) -> int:
    """Return how many modules the longest chain of imports has."""

    @cache
    def below(module: str) -> int:
        return 1 + max((below(other) for other in graph[module]), default=0)

    return max(map(below, graph), default=0)


@pytest.mark.parametrize("module", PATHS)
def test_no_file_is_too_long(module):
    lines = len(PATHS[module].read_text().splitlines())
    assert lines <= HARD_LINES
    assert lines <= SOFT_LINES or LONG.get(module), f"{module} has {lines} lines: more than one idea, or say why"


def test_every_exception_is_still_one():
    lengths = {module: len(path.read_text().splitlines()) for module, path in PATHS.items()}
    assert {module for module in LONG if lengths.get(module, 0) <= SOFT_LINES} == set()
    assert set(LONELY) - set(lonely()) == set()


def test_files_and_lines_have_a_ceiling():
    assert len(PATHS) <= MOST_FILES
    assert sum(len(path.read_text().splitlines()) for path in PATHS.values()) <= MOST_LINES
    assert sum(package_of(module) == "pagedkv.control" for module in PATHS) <= MOST_IN_CONTROL


def test_no_circles():
    assert circle({module: set(imports_of(module)) - {"pagedkv"} for module in PATHS}) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_chains_of_imports_are_short(package):
    assert depth(arrows(package)) <= MOST_DEPTH


@pytest.mark.parametrize("module", PATHS)
def test_nothing_is_imported_from_the_own_package_for_the_type_checker_alone(module):
    if PATHS[module].name == "__init__.py":
        return  # a door that loads lazily shows its names to the type checker
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inner = set().union(*(imported(child) for child in ast.walk(node)))
            assert {other for other in inner if package_of(other) == package_of(module)} == set()


def bases_by_module() -> dict[str, dict[str, set[str]]]:
    """Return the private classes of each module that a class of another module is built upon, by that module."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module in PATHS:
        for node in tree_of(module).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(module)
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in PATHS:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    for home in homes.get(ast.unparse(base), set()) - {module}:
                        if package_of(home) == package_of(module):
                            found[home][ast.unparse(base)].add(f"{module}.{node.name}")
    return found


def test_no_class_is_cut_by_inheritance():
    """A class with a single heir in another file of its package is one class in two files."""
    cut = {
        (base, *heirs)
        for bases in bases_by_module().values()
        for base, heirs in bases.items()
        if len(heirs) == 1 and base not in ABSTRACT
    }
    assert cut == set()


# Bases that a user or another layer builds upon as well.
ABSTRACT = {"BlockManager": "the simulator's cache is a front of its own on the same books"}


def lonely() -> dict[str, str]:
    """Return the modules that only one neighbour of their own package imports, and nobody else, with that neighbour."""
    users: dict[str, set[str]] = defaultdict(set)
    for module in PATHS:
        for other in names_of(module):
            users[other].add(module)
    found = {}
    for module, path in PATHS.items():
        if path.name == "__init__.py" or module == package_of(module) or len(users[module]) != 1:
            continue
        (user,) = users[module]
        is_listed = module.rpartition(".")[2] in LISTED.get(user, ())
        if package_of(user) == package_of(module) and PATHS[user].name != "__init__.py" and not is_listed:
            found[module] = user
    return found


def test_a_file_that_one_neighbour_imports_says_why_it_is_apart():
    found = lonely()
    assert {module: user for module, user in found.items() if module not in LONELY} == {}
    assert len(found) <= MOST_LONELY


@pytest.mark.parametrize("module", PATHS)
def test_every_file_has_a_headline(module):
    headline = (ast.get_docstring(tree_of(module)) or "").split("\n")[0]
    assert 10 < len(headline) <= 120


@pytest.mark.parametrize("module", PATHS)
def test_only_what_is_public_is_listed(module):
    """``__all__`` is for package doors, and for modules that pass on what they import."""
    listed = any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree_of(module).body
    )
    assert not listed or PATHS[module].name == "__init__.py" or module in PASSING_ON


# Modules that pass on names of other modules, or whose names are the public door of a single-file layer.
PASSING_ON = {
    "pagedkv.engine.kv_events": "the server speaks of events with the engine's words",
    "pagedkv.hf.compat": "private names of transformers, taken here and nowhere else",
    "pagedkv.jit": "the one door to compiled code, its cache and its compiles",
    "pagedkv.models": "a public module without a package",
}
