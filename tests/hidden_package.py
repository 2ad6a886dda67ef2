"""Make installed packages look uninstalled, in a process of its own."""

import sys


class _Hidden:
    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


def hide(package: str) -> None:
    assert not [name for name in sys.modules if name.split(".")[0] == package]
    sys.meta_path.insert(0, _Hidden(package))


def forget(*packages: str) -> None:
    """Also what was imported of them."""
    for name in (*packages, *sys.modules):
        if name.split(".")[0] in packages:
            sys.modules[name] = None
