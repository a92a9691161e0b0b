#!/bin/sh
# Puts the plugin's wheel beside the engine of PYTHON, patches the engine, and holds both against
# what the labels will say. Run by the Dockerfile, as root, without a network.
#   install.sh PYTHON ENGINE VARIANT ENGINE_VERSION PLUGIN_VERSION SERIES_SHA256
set -eu
python=$1 name=$2 variant=$3 engine=$4 plugin=$5 series=$6

set -- /dist/dflash_plugin-*.whl
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
    echo "dist/: expected one dflash_plugin wheel, found $#: python -m pip wheel --no-deps --wheel-dir dist ." >&2
    exit 1
fi
# Some bases' Python belongs to their distribution; this image is ours to change.
PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install --no-cache-dir --no-deps --no-index "$1"
# The demo pair's draft is 24 MB that nobody serves from an image: what is added stays below 5 MB.
"$python" - <<'PYTHON'
from dflash_plugin import demo

(demo.DRAFT / "model.safetensors").unlink()
PYTHON
if [ "$variant" != stock ]; then
    "$python" -m dflash_plugin.cli patch apply "$variant"
    "$python" -m dflash_plugin.cli patch check
fi

"$python" - "$name" "$variant" "$engine" "$plugin" "$series" <<'PYTHON'
import sys
from importlib import metadata

from dflash_plugin import engines, patchset

name, variant, engine, plugin, series = sys.argv[1:]
wanted = {"engine": engine, "plugin": plugin, "variant": variant, "series": series}
found = engines.find(name)
if found is None:
    sys.exit(f"no {name} in this image")
sha = "" if variant == "stock" else patchset.load(patchset.patches_dir(), name, engine, variant).sha256
got = {
    "engine": found.base_version,
    "plugin": metadata.version("dflash-plugin"),
    "variant": found.variant or "stock",
    "series": sha,
}
if got != wanted:
    sys.exit(f"the image is {got}, its labels would say {wanted}")
PYTHON

# Any user may be given; group 0 is what an unknown one has.
mkdir -p /var/lib/dflash /var/cache/huggingface /var/cache/engine /var/cache/dflash-plugin
chown -R 2000:0 /var/lib/dflash /var/cache/huggingface /var/cache/engine /var/cache/dflash-plugin
chmod -R g=u /var/lib/dflash /var/cache/huggingface /var/cache/engine /var/cache/dflash-plugin
