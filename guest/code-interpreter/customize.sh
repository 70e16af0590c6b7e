#!/bin/sh
# Makes a Kelvin image one that runs cells: after guest/base/customize.sh, with the root directory as $1.
set -eu
root=$1
here=$(dirname "$0")

install -D -m 0755 "$here/code_interpreter.py" "$root/usr/lib/kelvin/code_interpreter.py"
install -D -m 0755 "$here/service" "$root/etc/kelvin/services.d/code-interpreter"
install -D -m 0755 "$here/ready" "$root/etc/kelvin/ready"
install -D -m 0755 "$here/restored" "$root/etc/kelvin/restored.d/50-code-interpreter"
