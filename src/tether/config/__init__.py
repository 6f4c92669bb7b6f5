"""The YAML run file: read strictly, checked whole, turned into what the trainer takes."""

from tether.config.build import build, split_batch
from tether.config.fields import trainer_class
from tether.config.read import check_run, load_run_file
from tether.config.run import RunConfig
from tether.config.schema import json_schema

__all__ = [
    "RunConfig",
    "build",
    "check_run",
    "json_schema",
    "load_run_file",
    "split_batch",
    "trainer_class",
]
