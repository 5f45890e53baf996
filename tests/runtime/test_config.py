"""Configs: presets and overrides in, frozen dataclasses out; every mistake is one clear line."""

from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

import pytest
import yaml

from runtime.config import (
    build,
    claim_output,
    claiming,
    config_hash,
    differences,
    load,
    preset_names,
    read_yaml,
    to_dict,
    to_yaml,
)
from runtime.errors import UserError


@dataclass(frozen=True)
class Train:
    steps: int = 100
    lr: float = 1e-3
    precision: Literal["auto", "bfloat16", "float32"] = "auto"


@dataclass(frozen=True)
class Student:
    arch: str
    width: int = 8


@dataclass(frozen=True)
class Config:
    out: str = "runs/x"
    seed: int = 0
    workers: int = 2
    paths: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.3, 1.0)
    train: Train = field(default_factory=Train)
    students: tuple[Student, ...] = ()


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    return text


def test_defaults_file_and_overrides_in_that_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  steps: 7\n  lr: 1e-4\npaths: [a, b]\nstudents:\n- {arch: small}\n")
    assert load(Config, None) == Config()
    config = load(Config, str(path), ["train.steps=9", "paths=[c]", "scale=[0.5, 0.9]", "train.precision=float32"])
    assert config.train == Train(steps=9, lr=1e-4, precision="float32")
    assert config.paths == ("c",)
    assert config.scale == (0.5, 0.9)
    assert config.students == (Student("small"),)


def test_every_preset_is_a_mapping_with_a_comment_at_its_top():
    for name in preset_names():
        assert isinstance(read_yaml(name), dict), name
        assert resources.files("configs").joinpath(f"{name}.yaml").read_text().startswith("# "), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=5", "unknown key trian; did you mean train?"),
        ("train.step=5", "unknown key train.step; did you mean train.steps?"),
        ("steps=5", "unknown key steps; did you mean train.steps?"),
        ("train.steps=many", "train.steps: found 'many'; "),
        ("train.steps=1.5", "train.steps: found 1.5; "),
        ("train.steps=", "train.steps: found None; "),
        ("train.precision=bfloat", "did you mean bfloat16? (expected auto, bfloat16, float32)"),
        ("paths=/my/images", "paths: found '/my/images'; expected a list: paths=[/my/images]"),
        ("scale=[1]", "scale[1]: missing"),
        ("students=[{arch: a, widht: 3}]", "unknown key students[0].widht; did you mean students[0].width?"),
        ("students=[{width: 3}]", "students[0].arch: missing"),
        ("out.deep=3", "out: found {'deep': 3}"),
        ("--steps=3", "expected key=value"),
        ("steps", "expected key=value"),
        ("paths=[a", "is not valid YAML"),
    ],
)
def test_a_wrong_override_names_key_found_and_expected(override, message):
    assert message in refused(load, Config, None, [override])


def test_an_override_below_a_value_is_refused():
    assert "train.steps holds a value" in refused(load, Config, None, ["train.steps=3", "train.steps.more=4"])


def test_wrong_files(tmp_path):
    assert "no file absent.yaml" in refused(read_yaml, "absent.yaml")
    assert "neither a YAML file nor a preset" in refused(read_yaml, "no-such-preset")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train:\n  steps: [1\nlr: 2\n")
    assert "line 3" in refused(read_yaml, str(broken))
    broken.write_text("- a\n- b\n")
    assert "expected a mapping of keys, found list" in refused(read_yaml, str(broken))
    broken.write_text("")
    assert read_yaml(str(broken)) == {}


def test_a_config_survives_its_own_yaml():
    config = Config(paths=("a", "b"), train=Train(lr=1e-6), students=(Student("s"),))
    assert build(Config, yaml.safe_load(to_yaml(config))) == config
    assert list(to_dict(config)) == ["out", "seed", "workers", "paths", "scale", "train", "students"]


def test_the_hash_ignores_what_does_not_change_the_result():
    assert config_hash(Config()) == config_hash(Config(out="elsewhere", workers=9))
    assert config_hash(Config()) != config_hash(Config(seed=1))
    assert config_hash(Config()) != config_hash(Config(train=Train(steps=101)))


def test_differences_name_the_leaves():
    old, new = to_dict(Config()), to_dict(Config(seed=3, train=Train(steps=5)))
    assert differences(old, new) == ["seed: 0 -> 3", "train.steps: 100 -> 5"]
    assert differences(old, old) == []


def test_a_folder_belongs_to_one_config(tmp_path):
    out = tmp_path / "run"
    claim_output(out, Config())
    stored = (out / "config.yaml").read_bytes()
    claim_output(out, Config(out="moved", workers=7))  # goes on: these do not change the result
    text = refused(claim_output, out, Config(train=Train(steps=5), seed=1))
    assert "seed: 0 -> 1; train.steps: 100 -> 5" in text
    assert (out / "config.yaml").read_bytes() == stored


def test_foreign_folders_and_files_are_not_claimed(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(claim_output, tmp_path / "file", Config())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    assert "is not empty" in refused(claim_output, tmp_path / "photos", Config())
    (tmp_path / "empty").mkdir()
    claim_output(tmp_path / "empty", Config())
    assert (tmp_path / "empty" / "config.yaml").is_file()


def test_a_failed_start_leaves_no_folder_but_failed_work_stays(tmp_path):
    def work(out, made):
        with claiming(out, Config()):
            for name in made:
                (out / name).write_text("")
            raise UserError("wrong")

    refused(work, tmp_path / "new", [])
    assert not (tmp_path / "new").exists()
    refused(work, tmp_path / "worked", ["result"])
    assert (tmp_path / "worked" / "result").is_file()
    (tmp_path / "there").mkdir()
    refused(work, tmp_path / "there", [])
    assert (tmp_path / "there").is_dir()
