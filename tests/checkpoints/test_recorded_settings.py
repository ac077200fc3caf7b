"""Settings out of checkpoints and galleries.

Also covers reid.checkpoints.trained.
"""

import logging

import pytest
import torch
from program import untrained
from refusals import refused

from reid.checkpoints.recorded_settings import settings_of_checkpoint
from reid.commands.search import recorded_settings
from reid.config.load import load_config
from reid.errors import DataError, SettingsError, UnknownKeyError, WorldError


def settings_of(weight, *overrides):
    """Combine the settings as the launcher does."""
    given = [f"TEST.WEIGHT={weight}", *overrides]
    return load_config(None, given, recorded=settings_of_checkpoint(load_config(None, given), {}))


def test_a_checkpoint_is_used_with_the_settings_inside_it(tmp_path):
    weight = untrained(tmp_path / "w.pt", "TEST.NECK_FEAT=before", "SOLVER.MARGIN=None", "WANDB.NOTES=it's: [1] = 'a'")
    cfg = settings_of(weight)
    assert (cfg.MODEL.NAME, cfg.MODEL.STEM_RELU, cfg.TEST.NECK_FEAT) == ("resnet18", True, "before")
    assert tuple(cfg.INPUT.SIZE_TEST) == (32, 16)
    assert cfg.SOLVER.MARGIN is None
    assert cfg.WANDB.NOTES == "it's: [1] = 'a'"
    assert cfg.OUTPUT_DIR == "runs/tiny"
    assert str(weight) == cfg.TEST.WEIGHT


def test_the_command_line_wins(tmp_path):
    assert settings_of(untrained(tmp_path / "w.pt"), "TEST.NECK_FEAT=before").TEST.NECK_FEAT == "before"


def test_how_another_machine_did_it_is_not_taken_over(tmp_path):
    cfg = settings_of(
        untrained(tmp_path / "w.pt", "MODEL.DEVICE=cuda", "SOLVER.PRECISION=fp16", "SOLVER.SHARDING=fsdp")
    )
    assert (cfg.MODEL.DEVICE, cfg.SOLVER.PRECISION, cfg.SOLVER.SHARDING) == ("auto", "fp32", "none")


def test_file_without_settings_uses_defaults_and_reports_it(tmp_path, caplog):
    torch.save({"base.conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "reid"):
        assert settings_of(tmp_path / "w.pth").MODEL.NAME == "resnet50"
    (message,) = caplog.messages
    assert f"TEST.WEIGHT={tmp_path}/w.pth" in message
    assert "defaults" in message


def test_no_weight_no_settings():
    with refused(SettingsError, "TEST.WEIGHT", "got ''"):
        settings_of_checkpoint(load_config(None, []), {})


def test_a_setting_of_a_later_version_is_named_with_its_file(tmp_path):
    weight = untrained(tmp_path / "w.pt", config="MODEL:\n  NAME: resnet18\n  WINGS: 2\n")
    with pytest.raises(UnknownKeyError, match=r"MODEL\.WINGS .*TEST\.WEIGHT=.*w\.pt"):
        settings_of(weight)


def test_settings_that_are_no_yaml_are_rejected(tmp_path):
    weight = untrained(tmp_path / "w.pt", config="MODEL: [")
    with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={weight}", "--config_file"):
        settings_of(weight)


def test_a_gallery_that_is_none_is_rejected(tmp_path):
    with refused(DataError, "--gallery", str(tmp_path), "reid embed"):
        recorded_settings(load_config(None, []), {"gallery": str(tmp_path)})
