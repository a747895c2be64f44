"""A plugin of pytest that hides numba and llvmlite from the process, as where they are not installed."""

import importlib.abc
import importlib.metadata
import sys

HIDDEN = ("numba", "llvmlite")


class Absent(importlib.abc.MetaPathFinder):
    """Finds nothing under the hidden names, before any other finder is asked."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def without(name, find=importlib.metadata.distribution):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)


assert not any(name in sys.modules for name in HIDDEN)
sys.meta_path.insert(0, Absent())
importlib.metadata.distribution = without
