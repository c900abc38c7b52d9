#!/bin/sh
# Owns: making .venv with an editable install and the named extras, for the Makefile.
# usage: scripts/venv.sh VENV EXTRAS; must not know what the extras are for.
set -eu
venv=$1
extras=$2
python=${PYTHON:-python3}

need_packages() {
    ! "$python" -c '
import importlib.util, os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not (importlib.util.find_spec("ensurepip") and os.path.exists(header)))'
}

if [ ! -x "$venv/bin/python" ] && need_packages; then
    # Debian keeps ensurepip and Python.h in packages of their own.
    packages="python3-venv python3-dev"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $packages (needed for a virtual environment and C extensions)"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    else
        echo "this Python lacks ensurepip or Python.h; on Debian: sudo apt-get install $packages" >&2
        exit 1
    fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
