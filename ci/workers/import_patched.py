"""Import modules of an engine from other files, and say which repairs took place.

Run in the engine's environment, this checkout importable. Standard input and the last line
of the output are JSON: ``{"files": {module: path}, "modules": [module], "shims": [name]}`` and
``{"errors": {module: text}, "applied": [name]}``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules named in the files given."""

    def __init__(self, files):
        self.files = files

    def find_spec(self, fullname, path, target=None):
        if fullname in self.files:
            return importlib.util.spec_from_file_location(fullname, self.files[fullname])
        return None


def main():
    asked = json.load(sys.stdin)
    sys.meta_path.insert(0, Finder(asked["files"]))
    errors = {}
    for name in asked["modules"]:
        try:
            importlib.import_module(name)
        except Exception as err:
            errors[name] = f"{type(err).__name__}: {err}"
    applied = []
    if asked["shims"]:
        from dflash_plugin import shims

        for name in asked["shims"]:
            shim = shims.load(name)
            if shims.applied(shim, sys.modules.get(shim.module)):
                applied.append(name)
    print(json.dumps({"errors": errors, "applied": applied}))


main()
