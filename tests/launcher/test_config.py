"""Configurations: merging, overriding, and errors that name the key, its value and the mend."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from triptych.launcher import config as configuration
from triptych.launcher.config import ConfigError, load, parse_override

BASE = {
    "model": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "attention": {"num_heads": 4}},
    "data": {"sources": [{"path": "a"}], "seq_len": 32},
    "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_overrides_are_yaml_values(file: Path) -> None:
    overrides = ["train.optimizer.lr=3e-4", "data.sources.0.weight=2", "model.pattern=[mamba2, attention]"]
    run = load(file, [*overrides, "train.max_grad_norm=null", "log.tensorboard=false"])
    assert run.train.optimizer.lr == 3e-4
    assert run.data.sources[0].weight == 2.0
    assert run.model.pattern == ["mamba2", "attention"]
    assert run.train.max_grad_norm is None
    assert run.log.tensorboard is False


def test_yaml_text_loads_to_an_equal_configuration(file: Path, tmp_path: Path) -> None:
    run = load(file, ["cluster.env_vars={NCCL_DEBUG_LEVEL: 1}", "train.optimizer.eps=1e-12"])
    assert run.cluster.env_vars == {"NCCL_DEBUG_LEVEL": "1"}
    assert run.model.mamba2.dt_limit[1] == math.inf
    (tmp_path / "again.yaml").write_text(run.to_yaml())
    again = load(tmp_path / "again.yaml")
    assert again == run


def test_a_variant_names_its_base_and_changes_a_few_keys(file: Path) -> None:
    middle = file.with_name("middle.yaml")
    middle.write_text("base: base.yaml\ntrain: {steps: 7}\nmodel: {attention: {num_kv_heads: 2}}\n")
    (file.parent / "sub").mkdir()
    top = file.parent / "sub" / "top.yaml"
    top.write_text("base: ../middle.yaml\nname: top\ndata: {sources: [b, c]}\n")
    run = load(top)
    assert (run.name, run.train.steps, run.train.global_batch_size) == ("top", 7, 2)
    assert (run.model.attention.num_heads, run.model.attention.num_kv_heads) == (4, 2)
    assert [source.path for source in run.data.sources] == ["b", "c"]


def test_packaged_configurations_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = sorted(configuration.PACKAGED.rglob("*.yaml"))
    assert packaged
    for path in packaged:
        name = f"configs/{path.relative_to(configuration.PACKAGED)}"
        assert load(name) == load(path)
        assert load(name.removesuffix(".yaml")) == load(path)


def test_a_run_directory_is_a_configuration(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(load(file).to_yaml())
    assert load(tmp_path / "run") == load(file)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stpes=3"], ["train.stpes is not a known key", "did you mean train.steps?"]),
        (["hidden_size=3"], ["hidden_size is not a known key", "did you mean model.hidden_size?"]),
        (["train.num_layers=3"], ["did you mean model.num_layers?"]),
        (["train.optimizer={lrr: 2}"], ["did you mean train.optimizer.lr?"]),
        (["data.sources.0.wieght=2"], ["data.sources[0].wieght", "did you mean data.sources[0].weight?"]),
        (["log.xyzzy=2"], ["log.xyzzy", "known here are every, tensorboard"]),
        (["train.steps=many"], ["train.steps='many'", "valid integer"]),
        (["train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
        (["model.pattern=3"], ["model.pattern=3", "valid string, or should be a valid list"]),
        (["train.micro_batch_size=3"], ["train.micro_batch_size=3 does not divide", "use one of 1, 2"]),
        (["parallel.cp=2"], ["parallel.cp=2 is reserved"]),
        (["name=a/b"], ["name='a/b'"]),
        (["model.family=speech"], ["model.family='speech': use one of 'lm', 'diffusion', 'vision'"]),
        (["data.kind=videos"], ["data.kind='videos': use one of 'text', 'images'"]),
        (
            ["model.patch_size=2"],
            ["model.patch_size is not a known key; it belongs to another family or kind"],
        ),
        (["model.pattern=[mamba9]"], ["model.pattern: mixer 'mamba9' of item 'mamba9' is unknown"]),
    ],
)
def test_wrong_keys_and_values_are_named(file: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    for word in words:
        assert word in str(caught.value)
    assert str(file) not in str(caught.value), "the key came from the command line, not from the file"


def test_all_wrong_keys_are_told_at_once_with_the_file_they_are_in(file: Path) -> None:
    file.write_text(yaml.safe_dump({**BASE, "trian": {}, "parallel": {"tp": "two"}}))
    with pytest.raises(ConfigError) as caught:
        load(file, ["log.evry=1"])
    lines = str(caught.value).splitlines()
    assert f"{file}: trian is not a known key; did you mean train?" in lines
    assert any(line.startswith(f"{file}: parallel.tp='two'") for line in lines)
    assert "log.evry is not a known key; did you mean log.every?" in lines


def test_checks_of_rooms_stand_a_line_each_and_say_in_which_section_they_are() -> None:
    overrides = ["data.content=images", "data.channels=5", "train.schedule.warmup=500000"]
    with pytest.raises(ConfigError) as caught:
        load("configs/diffusion/dit.yaml", overrides)
    first, second = str(caught.value).splitlines()
    assert first == "data: channels=5: images have 1 (grey) or 3 (colour)"
    assert second.startswith("train.schedule.warmup=500000 and decay=0 are together longer")


def test_a_missing_key_says_what_is_expected(file: Path) -> None:
    file.write_text(yaml.safe_dump({**BASE, "train": {"steps": 3}}))
    with pytest.raises(ConfigError, match=r"train\.global_batch_size is missing; expected int"):
        load(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "is not section.key=value; write for example train.steps=200"),
        ("=3", "is not section.key=value"),
        ("train..steps=3", "is not section.key=value"),
        ("train.steps={", "the value is not YAML"),
        ("train.steps.x=3", "train.steps=3 is a value"),
        ("data.sources.4.path=3", "must be the index of one of 1 items"),
        ("data.sources.x.path=3", "must be the index of one of 1 items"),
    ],
)
def test_malformed_overrides(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(file, [override])


def test_an_override_may_hold_equals_signs() -> None:
    assert parse_override("cluster.env_vars={A: b=c}") == ("cluster.env_vars", {"A": "b=c"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1\nmodel:", "is not YAML: line 2"),
        ("- a\n- b\n", "holds list, not a mapping of sections"),
        ("", "holds NoneType, not a mapping"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "'train' is written twice"),
        ("base: [a.yaml]\n", "must be the path of one configuration file"),
        ("base: nowhere.yaml\n", "no configuration at nowhere.yaml"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load(tmp_path / "bad.yaml")


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml is a cycle"):
        load(tmp_path / "a.yaml")


def test_a_missing_file_names_packaged_ones_that_look_alike() -> None:
    with pytest.raises(
        ValueError, match=r"no configuration at configs/lm/dmo\.yaml; .*configs/lm/demo\.yaml"
    ):
        load("configs/lm/dmo.yaml")
