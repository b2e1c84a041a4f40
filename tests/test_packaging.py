"""What a distribution holds, that the links work, and that the command answers before anything heavy is imported."""

import os
import resource
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {"pipelines": "../pipelines", "indexes": "../indexes", "configs": "../configs"}
HEAVY = ("aiohttp", "faiss", "numba", "onnxruntime", "pandas", "pyarrow", "ray", "timm", "torch", "torchvision")
MUST_HOLD = (
    "curation/__init__.py",
    "curation/cli/__init__.py",
    "curation/py.typed",
    "curation/models.lock",
    "curation/pipelines/plan.py",
    "curation/indexes/kmeans.py",
    "curation/configs/demo.yaml",
    "curation/configs/lvd142m.yaml",
    "curation/configs/dinov2/tiny.yaml",
)


def run(*command, cwd=ROOT, **environment):
    # Coverage tools and the like must not follow into the child; the installed copy must be found before the source.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd=ROOT):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of the source distribution as registries do it."""
    pytest.importorskip("hatchling", reason="building needs hatchling: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder / "source", filter="data")
    source = next((folder / "source").iterdir())
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder as site-packages is after ``pip install``."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel), cwd=folder)
    return folder


@pytest.mark.parametrize("name", LINKS)
def test_the_linked_folders_are_relative_links(name):
    assert os.readlink(ROOT / "curation" / name) == LINKS[name]


def test_the_links_are_committed_as_links():
    listed = subprocess.run(
        ["git", "ls-files", "-s", *(f"curation/{name}" for name in LINKS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("this is no git checkout")

    assert sorted(line.split()[0] for line in listed.stdout.splitlines()) == ["120000"] * len(LINKS)


def test_a_wheel_made_of_the_source_distribution_is_one_made_of_the_tree(wheel, tmp_path):
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path))

    def names(path):
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.namelist())

    assert names(next(tmp_path.glob("*.whl"))) == names(wheel)


def test_site_packages_gains_only_curation(site):
    gained = {path.name for path in site.iterdir()} - {"bin"}

    assert {name for name in gained if not name.endswith(".dist-info")} == {"curation"}
    assert len(gained) == 2


def test_the_linked_folders_are_real_folders_when_installed(site):
    for name in MUST_HOLD:
        path = site / name
        assert path.is_file(), name
        assert not any(parent.is_symlink() for parent in (path, *path.parents)), name
    assert not list(site.rglob("tests"))
    assert not list(site.rglob("__pycache__"))


def test_an_installed_copy_runs_from_its_own_folder(site, tmp_path):
    code = (
        "import curation.pipelines.plan, curation.indexes.keys, sys;"
        "print(curation.pipelines.plan.__file__); print(curation.indexes.keys.__file__);"
        "print([name for name in ('pipelines', 'indexes', 'configs') if name in sys.modules])"
    )
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()

    assert lines == [
        str(site / "curation/pipelines/plan.py"),
        str(site / "curation/indexes/keys.py"),
        "[]",
    ]


def test_the_console_script_is_the_command_line(site):
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()

    assert "[console_scripts]\ncurate = curation.cli:entry" in entry_points


def test_the_licence_comes_along(site):
    assert "Apache License" in next(site.glob("*.dist-info/licenses/LICENSE")).read_text()


def test_importing_the_command_line_imports_nothing_heavy():
    code = f"import curation.cli, sys; print([name for name in {HEAVY!r} if name in sys.modules])"

    assert run(sys.executable, "-c", code).strip() == "[]"


def test_help_names_the_commands_and_answers_at_once():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = run(sys.executable, "-m", "curation.cli", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Time on a CPU, so that a busy machine does not fail the test.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    for command in ("run", "status", "config", "train", "demo"):
        assert f"\n    {command} " in text
    assert min(seconds) < 0.5


def test_every_direct_dependency_is_pinned():
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(requirement for extra in extras.values() for requirement in extra)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {line.partition("==")[0]: line.partition("==")[2] for line in lines}

    assert all("==" in line for line in lines)
    for requirement in map(packaging.Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is in pyproject.toml and not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is not allowed by pyproject.toml"
    assert pins["torch"] == "2.13.0"


def test_the_image_leaves_out_what_must_not_be_passed_on():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    commands = "\n".join(line for line in lines if not line.startswith("#"))

    assert "immaculate" not in commands
    assert "USER 10001" in commands
