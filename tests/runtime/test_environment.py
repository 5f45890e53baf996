"""What an installation must have, and what a run writes down about its machine."""

import json
import subprocess
import sys

import pytest

from runtime.environment import check_python, check_torch, describe, package_versions
from runtime.errors import UserError


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (4, 0, 0)])
def test_good_pythons(version):
    check_python(version)


@pytest.mark.parametrize("version", [(3, 10, 12), (2, 7, 18)])
def test_old_pythons(version):
    with pytest.raises(UserError, match=f"python: {'.'.join(map(str, version))} is too old; troodon needs 3.11"):
        check_python(version)


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.11.0", "torchvision": "0.26.0"},
        {"torch": "2.15.0+cu132", "torchvision": "0.29.2+cu132"},
        {"torch": "2.12.0+cpu", "torchvision": "0.27.0+cpu"},
        {"torch": "3.0.0a0+git1234"},
    ],
)
def test_good_torches(versions):
    check_torch(versions)


@pytest.mark.parametrize(
    ("versions", "message", "fix"),
    [
        ({"torch": None}, "torch: not installed", "pip install"),
        ({"torch": "2.10.1"}, "2.10.1 is too old", "pip install --upgrade"),
        ({"torch": "1.13.1+cu117"}, "is too old", "pip install --upgrade"),
        ({"torch": "2.15.0+cpu", "torchvision": "0.29.2"}, "is a CPU build beside torchvision 0.29.2", "same index"),
    ],
)
def test_wrong_torches_come_with_their_fix(versions, message, fix):
    with pytest.raises(UserError) as error:
        check_torch(versions)
    assert message in str(error.value)
    assert fix in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_this_installation_is_good():
    check_python()
    check_torch()


def test_the_description_of_a_run_is_plain_json():
    found = describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert found["processor"]
    assert found["packages"]["numpy"]
    assert found["packages"]["torch"] == package_versions()["torch"]


def test_looking_up_versions_imports_nothing_heavy():
    program = "import sys; from runtime.environment import describe; describe(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
