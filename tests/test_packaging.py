"""The project as it is shipped: version, imports, content of the wheel, and what no file may hold."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "src" / "paqdetr"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Triton comes with builds of torch for CUDA, each of which fits one version of it alone; IPython is there in a notebook.
BUNDLED = {"triton", "IPython"}

# Module name -> name on the package index, where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@cache
def project_files() -> list[Path]:
    """Tracked files, and new ones that are not ignored."""
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout: this is an unpacked archive")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    return [path for name in sorted(set(listed.split("\0")) - {""}) if (path := REPO / name).is_file()]


def imported_after(statement: str) -> set[str]:
    """Top-level names in sys.modules once a new interpreter has executed `statement`."""
    code = f"import sys\n{statement}\nimport json; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def third_party(tree: ast.AST) -> set[str]:
    """Top-level names of the packages from outside that any statement of `tree` imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"paqdetr"}


def distribution(requirement: str) -> str:
    """`pyright[nodejs]>=1.1` -> `pyright`, normalised."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_version_is_the_one_of_the_installed_metadata() -> None:
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "_version.py").read_text())
    assert version
    try:
        installed = importlib.metadata.version("paqdetr")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs paqdetr to be installed (pip install -e .)")
    assert installed == version[1]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import paqdetr; paqdetr.export", {"matplotlib", "jinja2", "accelerate"}),
        (
            "import paqdetr; paqdetr.DataError",
            {"torch", "numpy", "timm", "accelerate", "matplotlib", "pydantic", "supervision"}
            | {"PIL", "typer", "rich", "yaml"},
        ),
        (
            "import paqdetr.paq, paqdetr.ops",
            {"timm", "accelerate", "matplotlib", "pydantic", "supervision", "typer", "rich", "yaml"} | {"numba"},
        ),
        (
            "import paqdetr.cli, paqdetr.serving.server, paqdetr.serving.ray_predict, paqdetr.loading",
            {"torch", "timm", "matplotlib", "pydantic", "supervision", "scipy", "ray", "pyarrow"},
        ),
    ],
)
def test_import_stays_light(statement: str, unwanted: set[str]) -> None:
    loaded = imported_after(statement)
    assert "paqdetr" in loaded
    assert not loaded & unwanted


def test_the_papers_ideas_need_four_libraries_alone() -> None:
    """The import lint forbids what we know of; this one allows what is agreed."""
    paths = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0] == "paq"]
    assert paths
    used = set().union(*(third_party(ast.parse(path.read_text("utf-8"))) for path in paths))
    assert used <= {"torch", "torchvision", "scipy", "numpy"}


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    declared = {distribution(need) for needs in [project["dependencies"], *extras.values()] for need in needs}
    undeclared = {
        f"{path.relative_to(REPO)}: {name}"
        for path in SOURCES
        for name in third_party(ast.parse(path.read_text("utf-8"))) - BUNDLED
        if distribution(DISTRIBUTIONS.get(name, name)) not in declared
    }
    assert not undeclared


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Configs too. The build leaves out what .gitignore names: an unanchored line there costs a folder."""
    pytest.importorskip("hatchling", reason="needs the build back end (pip install -e '.[dev]')")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("paqdetr/")}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "paqdetr = paqdetr.cli:main" in archive.read(entry_points).decode()
    present = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == present
    assert "paqdetr/py.typed" in shipped
    assert any(name.startswith("paqdetr/configs/") and name.endswith(".yaml") for name in shipped)


def test_no_path_of_a_machine_and_no_registry_host() -> None:
    """A file that names one works, or is right, on one machine only."""
    folders = "home|Users|root|work|opt|mnt|media|srv|tmp"
    # After white space or a quote: `../shared/home/x` and `https://host/home/x` are no paths of a machine.
    suspicious = re.compile(
        rf"""(?:^|(?<=[\s"'`(=:,]))/(?:{folders})/\w"""
        r"|[A-Z]:\\Users\\|pypi\.org|pythonhosted\.org|download\.pytorch\.org"
    )
    found = []
    for path in project_files():
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(REPO)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, 1)
            if suspicious.search(line)
        ]
    assert not found


def test_no_large_file() -> None:
    """Weights and data of others are never committed: one mebibyte is plenty for what is ours."""
    sizes = {str(path.relative_to(REPO)): path.stat().st_size for path in project_files()}
    assert not {name: size for name, size in sizes.items() if size > 2**20}


def test_no_import_circles() -> None:
    """Not at the top of modules, not in functions, not for type checkers alone."""
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        found = imports[name] = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(part if part in names else node.module for part in parts)
    graph = {name: (found & names.keys()) - {name} for name, found in imports.items()}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the modules
