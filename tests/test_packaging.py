"""The package as users get it: what an import loads, what wheel and sdist contain, which Pythons can read it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "benchmarks")  # each holds a package
PACKAGES = ("kernels/fwp_kernels", "benchmarks/fwp_benchmarks")
built = pytest.mark.xdist_group("built")  # one worker builds wheel and sdist, once


def python(code: str, cwd: Path = ROOT, path: tuple[Path, ...] = (), executable: str = sys.executable) -> str:
    """What the code prints in a new interpreter, with cwd first and `path` next on sys.path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def files(folder: str) -> set[str]:
    """The files of a folder of the checkout, as paths from the root, without caches and reports."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.name != "report.html")
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


# ---- imports ----
def test_import_loads_torch_alone() -> None:
    code = """
import json, sys
import torch
before = set(sys.modules)
import fwp
print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))
"""
    assert json.loads(python(code)) == ["fwp"]


def test_use_loads_nothing_heavy() -> None:
    code = """
import json, sys
import fwp
for use in ('fast_weights', 'testing', 'nn', 'models'):
    getattr(fwp, use)
    print(json.dumps([use, sorted({name.partition('.')[0] for name in sys.modules})]))
"""
    for use, loaded in map(json.loads, python(code).splitlines()):
        heavy = {"triton", "transformers", "matplotlib", "typer", "rich", "pytest", "hypothesis"} & set(loaded)
        assert not heavy, f"fwp.{use} loads {heavy}"
        assert {"torch", "fwp"} <= set(loaded)


def test_every_public_name_loads() -> None:
    python("import fwp\nfor name in fwp.__all__: getattr(fwp, name)\nassert set(fwp.__all__) <= set(dir(fwp))")


def test_top_level_folders_are_no_packages() -> None:
    for folder in (*FOLDERS, "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py makes a package that shadows others"


def test_another_package_called_kernels_wins(tmp_path: Path) -> None:
    other = tmp_path / "kernels" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    assert Path(python("import kernels; print(kernels.__file__)", path=(tmp_path,))) == other


# ---- wheel and sdist ----
@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, the latter built from the former."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@built
def test_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files("fwp") | {name.partition("/")[2] for package in PACKAGES for name in files(package)}
    typed = {name.removesuffix("/py.typed") for name in held if name.endswith("/py.typed")}
    assert typed == {name.partition("/")[0] for name in held}  # type checkers skip a package without the marker


@built
def test_sdist(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    top = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"}
    assert held >= top.union(*(files(folder) for folder in ("fwp", "tests", "notebooks", *FOLDERS)))


def modules(package: str) -> list[str]:
    """The dotted names of a package's modules in the checkout; without Triton none of the kernels'."""
    if "kernels" in package and importlib.util.find_spec("triton") is None:
        return []
    paths = (name.partition("/")[2].removesuffix(".py") for name in files(package) if name.endswith(".py"))
    return sorted(path.removesuffix("/__init__").replace("/", ".") for path in paths)


def imported(folders: dict[str, Path], cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """Imports every module of kernels and benchmarks, and the op, from these folders. Returns the version of fwp.

    folders: package → the folder in which it must be found.
    """
    names = [name for package in PACKAGES for name in modules(package)]
    assert names
    code = f"""
import importlib, os.path, fwp.functional
folders = { ({name: os.path.realpath(folder) for name, folder in folders.items()})!r}
for name in ["fwp.functional", *{names!r}]:
    file = os.path.realpath(importlib.import_module(name).__file__)
    assert file.startswith(folders[name.partition('.')[0]]), file
print(fwp.__version__)
"""
    return python(code, cwd=cwd, path=path)


HERE = {"fwp": ROOT / "fwp", "fwp_kernels": ROOT / "kernels", "fwp_benchmarks": ROOT / "benchmarks"}


@built
def test_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """Outside the checkout every module is found where the wheel was installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(wheel)], check=True)
    version = imported(dict.fromkeys(HERE, tmp_path / "site"), tmp_path, (tmp_path / "site",))
    assert f"-{version}-" in wheel.name


# ---- a checkout ----
def test_bare_checkout() -> None:
    """In the root and with nothing installed, the path that `make test-gpu` sets suffices."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (path,) = re.findall(r"PYTHONPATH=(\S+)", makefile)
    imported(HERE, ROOT, tuple(map(Path, path.split(":"))))


@built
def test_editable_install(tmp_path: Path) -> None:
    """After an editable install the folders that its .pth file names suffice anywhere."""
    pytest.importorskip("hatchling")
    code = f"from hatchling.build import build_editable\nprint(build_editable({str(tmp_path)!r}))"
    wheel = tmp_path / python(code).splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        (pth,) = (name for name in archive.namelist() if name.endswith(".pth"))
        folders = archive.read(pth).decode().split()
        assert not any(name.endswith(".py") for name in archive.namelist())
    imported(HERE, tmp_path, tuple(map(Path, folders)))


# ---- sources ----
@pytest.mark.parametrize("minor", range(10, 14))
def test_other_pythons_can_read_every_source(minor: int) -> None:
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = next(map(str, pyenv.glob(f"*/bin/{name}")), None) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    sources = sorted(name for folder in ("fwp", "tests", *FOLDERS) for name in files(folder) if name.endswith(".py"))
    code = f"""
import ast, sys
assert sys.version_info[:2] == (3, {minor})
for name in {sources!r}:
    ast.parse(open(name, encoding='utf-8').read(), name)
"""
    python(code, executable=found)


def test_no_kernel_is_stray() -> None:
    """Every file of the kernels is imported by a backend, directly or through another of these files."""
    kernels = {path.stem: path for path in (ROOT / "kernels" / "fwp_kernels").glob("*.py") if path.stem != "__init__"}

    def imported(path: Path) -> set[str]:
        text = path.read_text(encoding="utf-8")
        names = {word for node in ast.walk(ast.parse(text)) for word in _names(node)}
        return names & set(kernels)

    reached: set[str] = set()
    todo = set().union(*(imported(path) for path in (ROOT / "fwp" / "backends").glob("*.py")))
    while todo:
        reached |= todo
        todo = set().union(*(imported(kernels[name]) for name in todo)) - reached
    assert reached == set(kernels)


def _names(node: ast.AST) -> set[str]:
    """The modules of fwp_kernels that an import statement names: absolute in a backend, relative among the kernels."""
    if isinstance(node, ast.Import):
        return {alias.name.removeprefix("fwp_kernels.") for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module == "fwp_kernels" or (node.level == 1 and not module):
            return {alias.name for alias in node.names}
        if module.startswith("fwp_kernels.") or node.level == 1:
            return {module.removeprefix("fwp_kernels.")}
    return set()


# ---- what README says ----
def test_readme_shows_the_table_of_rules() -> None:
    from typer.testing import CliRunner

    from fwp.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- rules -->\n(.*?)\n<!-- /rules -->", readme, re.DOTALL)
    assert shown
    assert shown[1] == CliRunner().invoke(app, ["list", "--markdown"]).stdout.strip()


def test_readme_examples_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_claims_in_readme_are_those_of_the_kept_results() -> None:
    from fwp_benchmarks.report import tally
    from fwp_benchmarks.reproduce import FAMILIES

    found = {}
    for scale in ("quick", "reduced"):
        claims = json.loads((ROOT / "benchmarks" / "results" / scale / "claims.json").read_text(encoding="utf-8"))
        assert {claim["scale"] for claim in claims} == {scale}
        found[scale] = tally(claims)
    papers = {family.paper.name: family.paper for family in FAMILIES.values()}
    head = "| paper | listed | quick: held of decided | reduced: held of decided | not attempted |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for paper, (_, _, listed) in found["quick"].items():
        held = [f"{found[scale][paper][0]} of {found[scale][paper][1]}" for scale in ("quick", "reduced")]
        lines.append(f"| {paper} | {listed} | {held[0]} | {held[1]} | {'; '.join(papers[paper].not_attempted)} |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- claims -->")[1].split("<!-- /claims -->")[0].strip()
    assert table == "\n".join(lines)
