#!/bin/sh
# Owns: a launch with a tree by GNU tar into socat, as one would write it in a shell.
# usage: tar_socat.sh HEAD TREE LISTENER; HEAD is a file of all that comes before the archive, and
# LISTENER what socat is to listen at. Must not know: anything of the package.
set -eu
{
    cat "$1"
    tar --format=gnu -C "${2%/*}" -c "${2##*/}"
    printf '\377'
} | socat -u -b 1048576 - "$3"
