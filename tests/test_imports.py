"""Imports: no cycles, no module imports more than it may, and one file has the private names of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fwp": ROOT, "fwp_kernels": ROOT / "kernels", "fwp_benchmarks": ROOT / "benchmarks"}
HOME_OF_PRIVATE_NAMES = "fwp._torch_private"


class Import(NamedTuple):
    """One import. module: absolute, a submodule if the name is one. early: it runs when the file is imported."""

    module: str
    early: bool


def sources() -> dict[str, Path]:
    """Every module of the three packages by its dotted name, and its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.Module, is_package: bool, modules: frozenset[str]) -> Iterator[Import]:
    """All imports of a module: in functions, for type checkers and through `import_module` too."""

    def visit(node: ast.AST, early: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            early = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            early = False
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, early) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                longer = f"{source}.{alias.name}"
                yield Import(longer if longer in modules else source, early)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (Import(x.value, early) for x in node.args if isinstance(x, ast.Constant))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, early)

    return visit(tree, True)


def graph(paths: Mapping[str, Path]) -> dict[str, set[Import]]:
    """The imports of each module."""
    modules = frozenset(paths)
    return {
        name: set(imports(name, ast.parse(path.read_text(encoding="utf-8")), path.stem == "__init__", modules))
        for name, path in paths.items()
    }


def cycle(edges: Mapping[str, set[str]]) -> list[str] | None:
    """The modules of one import cycle in order, ending with the first again. None: there is none."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str] | None:
        for target in sorted(edges.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in done and (found := walk([*path, target])):
                return found
        done.add(path[-1])
        return None

    return next((found for name in sorted(edges) if name not in done and (found := walk([name]))), None)


def edges(found: Mapping[str, set[Import]]) -> dict[str, set[str]]:
    return {name: {x.module for x in imported if x.module in found} for name, imported in found.items()}


@pytest.fixture(scope="module")
def ours() -> dict[str, set[Import]]:
    return graph(sources())


# ---- cycles ----


def test_no_two_modules_import_each_other_in_a_cycle(ours: dict[str, set[Import]]) -> None:
    assert {"fwp", "fwp.core", "fwp_kernels.launch", "fwp_benchmarks.papers.zoology"} <= ours.keys()
    found = cycle(edges(ours))
    assert found is None, " → ".join(found or ())


PLANTED = {
    "in a function": "def f():\n    from pack.c import g\n",
    "for type checkers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c\n",
    "by name": "import importlib\n\ndef f():\n    return importlib.import_module('pack.c')\n",
    "in a class": "class A:\n    import pack.c\n",
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_cycle_is_found(tmp_path: Path, how: str) -> None:
    texts = {"a": PLANTED[how], "b": "from .a import f\n", "c": "from pack import b, json\n", "d": "from . import a\n"}
    paths = {}
    for name, text in texts.items():
        paths[f"pack.{name}"] = tmp_path / f"{name}.py"
        paths[f"pack.{name}"].write_text(text, encoding="utf-8")
    assert cycle(edges(graph(paths))) == ["pack.a", "pack.c", "pack.b", "pack.a"]
    paths["pack.c"].write_text("import json\n", encoding="utf-8")
    assert cycle(edges(graph(paths))) is None


# ---- what each part may know ----

HELPERS = {"fwp.errors", "fwp._torch_private", "fwp._version"}
BASE = HELPERS | {"fwp.core", "fwp.feature_maps"}
RULES = {"fwp.rules", "fwp.rules.lowering", "fwp.rules.reference", "fwp.rules.spec"}

# A module, or "name.*" for a package and all below it → the modules that it may import. The first match counts.
MAY_KNOW: dict[str, set[str]] = {
    "fwp._*": set(),
    "fwp.errors": set(),
    "fwp.core": HELPERS,
    "fwp.feature_maps": HELPERS | {"fwp.core"},
    "fwp.states": HELPERS | {"fwp.core"},
    "fwp.rules.*": BASE | RULES,
    "fwp.measure": HELPERS,
    "fwp.observe": HELPERS | {"fwp.core"},
    "fwp.trust": HELPERS | {"fwp.core"},
    "fwp.canary": BASE | {"fwp.measure", "fwp.trust", "fwp.backends.*"},
    "fwp.backends.reference": BASE | RULES,
    "fwp.backends.triton": BASE | {"fwp.trust", "fwp.backends.ops", "fwp_kernels.*"},
    "fwp.backends.native": BASE | {"fwp.backends.ops", "fwp_kernels.native"},
    "fwp.backends.*": BASE,
    "fwp.validate": BASE | RULES,
    "fwp.nn.*": BASE | {"fwp.functional", "fwp.validate", "fwp.rules", "fwp.rules.spec", "fwp.states", "fwp.nn.*"},
    "fwp.config": HELPERS | {"fwp.nn.*"},
    "fwp.models.*": HELPERS | {"fwp.config", "fwp.nn.*", "fwp.models.*", "fwp.rules"},
    "fwp.interop.onnx": HELPERS | {"fwp.core", "fwp.backends.onnx", "fwp.models", "fwp.nn.layer", "fwp.states"},
    "fwp.interop.transformers.*": BASE
    | {
        "fwp.functional",
        "fwp.rules",
        "fwp.validate",
        "fwp.config",
        "fwp.models",
        "fwp.nn.*",
        "fwp.states",
        "fwp.interop.fla",
        "fwp.interop.transformers.*",
    },
    "fwp.cli": {"fwp.*", "fwp_benchmarks.*", "fwp_kernels.native"},
    "fwp.*": {"fwp.*"},
    "fwp_kernels.*": {"fwp_kernels.*"},
    "fwp_benchmarks.*": {"fwp.*", "fwp_kernels.*", "fwp_benchmarks.*"},
}


def fits(name: str, pattern: str) -> bool:
    """Whether a module matches: its name, "name.*" for a package and all below it, "fwp._*" for private files."""
    if pattern.endswith("._*"):
        return name.startswith(pattern[:-1])
    if pattern.endswith(".*"):
        return name == pattern[:-2] or name.startswith(pattern[:-1])
    return name == pattern


def strangers(name: str, imported: set[str]) -> list[str]:
    """The modules that a module imports but may not import."""
    allowed = next(allowed for pattern, allowed in MAY_KNOW.items() if fits(name, pattern))
    return sorted(x for x in imported if not any(fits(x, pattern) for pattern in allowed))


def test_each_part_imports_only_what_it_may_know(ours: dict[str, set[Import]]) -> None:
    found = {name: strange for name, imported in edges(ours).items() if (strange := strangers(name, imported))}
    assert found == {}


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("fwp.core", "fwp.rules"),
        ("fwp.trust", "fwp.backends.chunked"),
        ("fwp.backends.triton", "fwp.backends.chunked"),
        ("fwp.backends.chunked", "fwp.rules.spec"),
        ("fwp.backends.native", "fwp.backends.chunked"),
        ("fwp.nn.new", "fwp.backends.chunked"),
        ("fwp.nn.new", "fwp.rules.lowering"),
        ("fwp_kernels.chunk", "fwp.core"),
        ("fwp.functional", "fwp_benchmarks.speed"),
    ],
)
def test_what_a_part_must_not_know_is_found(name: str, imported: str) -> None:
    assert strangers(name, {imported}) == [imported]


HEAVY = ("triton", "transformers", "matplotlib", "fwp_kernels", "fwp_benchmarks")
# Modules that may load some of them. No module of fwp imports these modules when it is itself imported.
LOADS = {
    "fwp_benchmarks.static": {"triton", "fwp_kernels"},
    "fwp_benchmarks.tune": {"fwp_kernels"},
    "fwp_benchmarks.report": {"matplotlib"},
    "fwp.interop.transformers.*": {"transformers"},
}


def test_nothing_loads_triton_or_transformers_when_imported(ours: dict[str, set[Import]]) -> None:
    found = {}
    for name, imported in ours.items():
        package = name.partition(".")[0]
        tops = {x.module.partition(".")[0] for x in imported if x.early} & set(HEAVY)
        allowed = set().union(*(loads for pattern, loads in LOADS.items() if fits(name, pattern)))
        if package != "fwp_kernels" and (beyond := tops - allowed - {package}):
            found[name] = beyond
    assert found == {}


# ---- private names of torch ----


def private_names(tree: ast.Module) -> Iterator[str]:
    """Every private name of torch that a file imports or uses as an attribute, and every dynamo mark that it sets."""

    def private(name: str) -> bool:
        return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))

    bound = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            bound |= {alias.asname or alias.name for alias in node.names if alias.name[0].islower()}
            yield from (x for alias in node.names if private(x := f"{node.module}.{alias.name}"))
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.partition(".")[0] == "torch"]
            bound |= {alias.asname for alias in ours if alias.asname}
            yield from (alias.name for alias in ours if private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_dynamo"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and private(node.attr):
            whole = ast.unparse(node)
            if whole.partition(".")[0] in bound and "(" not in whole:
                yield whole


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {name: sorted(set(private_names(ast.parse(path.read_text("utf-8"))))) for name, path in sources().items()}
    assert found.pop(HOME_OF_PRIVATE_NAMES)
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils._pytree import tree_map",
        "import torch.utils._pytree as pytree",
        "torch._C._functorch.peek_interpreter_stack()",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "f._dynamo_marked_constant = True",
        "from torch import _dynamo",
    ],
)
def test_a_private_name_of_torch_is_found(line: str) -> None:
    assert list(private_names(ast.parse(line)))
    assert not list(private_names(ast.parse("import torch\ntorch.__version__\nself._C\nx.torch._C")))
