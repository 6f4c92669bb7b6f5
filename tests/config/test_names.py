"""What `tether.config` gives when it is first asked for is not hidden by a module of the same name."""

from __future__ import annotations

import pkgutil

import tether
import tether.config


def test_no_module_hides_what_the_package_gives():
    for package in (tether, tether.config):
        modules = {one.name for one in pkgutil.iter_modules(package.__path__)}
        assert not modules & {*package.__all__}
        assert modules  # there is something to hide behind
