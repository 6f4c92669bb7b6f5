"""No secret reaches a file, a page or a printed line (INV-51)."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml

from tether import DPOConfig
from tether.cli.errors import print_error
from tether.cli.output import terminal_output
from tether.config import check_run
from tether.redact import HIDDEN, masked, masked_values
from tether.training.saving.checked_save import without_secrets

SECRETS = ("hunter2", "hf_" + "a1B2" * 6, "sk-" + "z9" * 12)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("https://me:hunter2@host/x", f"https://{HIDDEN}@host/x"),
        ("s3://hunter2@bucket/rows", f"s3://{HIDDEN}@bucket/rows"),
        (f"login {SECRETS[1]}.", f"login {HIDDEN}."),
        (f"Bearer {SECRETS[2]}", f"Bearer {HIDDEN}"),
        ("https://h/x?X-Amz-Signature=hunter2&n=1", f"https://h/x?X-Amz-Signature={HIDDEN}&n=1"),
        ("https://h/x?a=1&access_token=hunter2", f"https://h/x?a=1&access_token={HIDDEN}"),
    ],
)
def test_secrets_are_hidden(said, left):
    assert masked(said) == left


@pytest.mark.parametrize(
    "said", ["max_tokens=3", "me@example.org", "https://host/a@b", "a?tokens", "step 3: loss 0.5", "hf_short"]
)
def test_other_words_are_left(said):
    assert masked(said) == said


def test_a_run_file_is_kept_without_them():
    run = check_run(
        {
            "model": f"https://me:{SECRETS[0]}@host/model",
            "data": {"train": f"s3://key:{SECRETS[0]}@bucket/rows.jsonl"},
            "reference": {"remote": {"url": f"http://u:{SECRETS[0]}@localhost:1/v1"}},
            "train": {"hub_token": SECRETS[1], "push_to_hub": False},
            "output": "out",
        }
    )
    kept = run.dump_yaml()
    assert not any(secret in kept for secret in SECRETS)
    assert yaml.safe_load(kept)["train"]["hub_token"] is None
    assert yaml.safe_load(kept)["data"]["train"] == f"s3://{HIDDEN}@bucket/rows.jsonl"
    assert masked_values(run.to_dict())["output"] == "out"


def test_the_arguments_beside_a_model_are_without_them(tmp_path):
    given = {"reference_store": f"memory://me:{SECRETS[0]}@host/store", "run_name": f"https://me:{SECRETS[0]}@host"}
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, hub_token=SECRETS[1], optim_args="a=1", **given)
    with without_secrets(args):
        torch.save(args, tmp_path / "training_args.bin")
        assert (args.optim_args, args.hub_token) == ("a=1", None)
    content = (tmp_path / "training_args.bin").read_bytes()
    assert b"memory://" in content
    assert not any(secret.encode() in content for secret in SECRETS)
    assert (args.reference_store, args.run_name, args.hub_token) == (*given.values(), SECRETS[1])


def test_lines_and_errors_are_printed_without_them(capfd):
    said = f"cannot read https://me:{SECRETS[0]}@host/x with {SECRETS[1]}"
    with terminal_output(debug=False):
        logging.getLogger("tether").info(said)
        logging.getLogger("transformers").warning(said)
    print_error(said)
    printed = "".join(capfd.readouterr())
    assert printed.count(HIDDEN) == 6
    assert not any(secret in printed for secret in SECRETS)
