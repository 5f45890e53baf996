"""The wheel: builds from a clean copy, installs into an empty folder, and works from there, data files included."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files that git knows or would add: what a fresh clone holds."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: no list of source files")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """The Python of an environment into which the clone is installed as `make` does; it borrows our packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--editable", source], check=True, capture_output=True)
    return python


def run_installed(installed: Path, elsewhere: Path, *command: str) -> str:
    """Run with the installed rooms first on the path, in a folder that has nothing to do with the clone."""
    return run(sys.executable, *command, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(installed)})


def run(*command: str, cwd: Path, env: dict[str, str]) -> str:
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_wheel_holds_every_room_and_no_test(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert {"runtime", "imaging", "curation", "pretrain", "distill", "evaluation", "tools", "configs"} <= rooms
    for file in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        assert file.relative_to(ROOT).as_posix() in names
    weights = "curation/copydetect/weights/"
    assert {weights + name for name in ("model.safetensors", "card.json", "README.md")} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    metadata = [name for name in names if ".dist-info/licenses/" in name]
    assert {Path(name).name for name in metadata} >= {"LICENSE", "ATTRIBUTION.csv", "LICENSES.txt"}


def test_the_installed_command_line_works_from_another_folder(installed, tmp_path):
    assert "usage: troodon" in run_installed(installed, tmp_path, "-m", "tools.cli", "--help")
    where = run_installed(installed, tmp_path, "-c", "import tools.cli; print(tools.cli.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    script = installed / "bin" / "troodon"
    assert "usage: troodon" in run_installed(installed, tmp_path, str(script), "--help")
    assert list(tmp_path.iterdir()) == []


def test_presets_images_and_the_reports_template_are_found(installed, tmp_path):
    check_data_files(run_installed(installed, tmp_path, "-c", DATA_FILES), installed)


def test_an_editable_install_finds_its_data_files_from_another_folder(editable, source, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    check_data_files(run(str(editable), "-c", DATA_FILES, cwd=tmp_path, env=env), source)
    assert "usage: troodon" in run(str(editable.with_name("troodon")), "--help", cwd=tmp_path, env=env)


DATA_FILES = (
    "from importlib import resources; from runtime.config import preset_names; from runtime.files import locate\n"
    "print(preset_names())\n"
    "print(len(list(locate('embedded:eval').rglob('*.jpg'))), locate('embedded:pool/quick-0000.tar').is_file())\n"
    "print(resources.files('tools').joinpath('report.html').is_file(), locate('embedded:pool'))"
)


def check_data_files(said: str, where: Path) -> None:
    presets, images, template = said.splitlines()
    assert "quickstart" in presets
    assert "tiny" in presets
    assert images == "220 True"
    assert template.startswith("True ")
    assert Path(template.removeprefix("True ")).is_relative_to(where)
