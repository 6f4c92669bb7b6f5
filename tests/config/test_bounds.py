"""No number that a configuration declares is taken below zero, unless it has a meaning there."""

from __future__ import annotations

import dataclasses

import pytest

import tether.training
from tether.config.fields import problem_with
from tether.errors import ConfigError
from tether.training import DPOConfig, PreferenceConfig
from tether.training.declaration import Text

CONFIGS = [one for one in vars(tether.training).values() if isinstance(one, type) and issubclass(one, PreferenceConfig)]
# A lead, exponents: any number. `ld_alpha` and `loss_weights` are checked with the losses they go with, the limits of
# `dataset_check` with their names.
ANY_NUMBER = {
    "simpo_gamma",
    "alpha",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "loss_weights",
    "dataset_check",
    "pad_to_multiple_of",  # of TRL, without effect
    "reward_weights",
    "reward_clip_range",
    "entropy_coef",  # below 0 it is a penalty; so its bounds
    "entropy_coef_min",
    "entropy_coef_max",
}


def numbers(config):
    """Names of the numeric fields that Tether declares."""
    declared = [one for one in dataclasses.fields(config) if isinstance(one.metadata.get("help"), Text)]
    return {one.name for one in declared if "int" in str(one.type) or "float" in str(one.type)}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_number_below_zero_is_refused(config):
    found = numbers(config)
    assert "dataset_num_proc" in found
    taken = {name for name in found if config.__dataclass_fields__[name].metadata["help"].problem(-1) is None}
    assert taken <= ANY_NUMBER


def test_the_run_file_says_what_is_allowed():
    assert problem_with("dataset_num_proc", -1, DPOConfig) is not None
    assert problem_with("dataset_num_proc", 2, DPOConfig) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ld_alpha", -1.0),
        ("dataset_check", {"identical": -1}),
        ("loss_weights", [-1.0]),
        ("dataset_num_proc", 0),
        ("dataset_num_proc", -1),
    ],
)
def test_what_losses_check_is_refused_too(field, value, tmp_path):
    with pytest.raises(ConfigError, match=field.removeprefix("dataset_") if field == "dataset_check" else field):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **{field: value})
