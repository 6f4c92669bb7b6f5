"""What the tests of quantised models need of packages that are not everywhere."""

from importlib.util import find_spec

import pytest

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
KINDS = [
    pytest.param("4bit", marks=needs_bitsandbytes),
    pytest.param("8bit", marks=needs_bitsandbytes),
    pytest.param("int8", marks=needs_torchao),
]
