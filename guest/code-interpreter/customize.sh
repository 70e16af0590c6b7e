#!/bin/sh
# Makes a Kelvin image one that runs cells: after guest/base/customize.sh, with the root directory as $1 and what pip made of
# the file `wheels` as $2.
set -eu
umask 022
root=$1
wheels=$2
here=$(dirname "$0")

for module in code_interpreter contexts kernels languages result_formats; do
  install -D -m 0644 "$here/$module.py" "$root/usr/lib/kelvin/$module.py"
done
install -D -m 0755 "$here/service" "$root/etc/kelvin/services.d/code-interpreter"
install -D -m 0755 "$here/ready" "$root/etc/kelvin/ready"
install -D -m 0755 "$here/restored" "$root/etc/kelvin/restored.d/50-code-interpreter"

# Kernels that Debian does not have. A language is there when Jupyter finds a kernelspec of it; Debian's packages bring theirs.
packages=$root/usr/local/lib/python$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')/dist-packages
install -d "$packages"
cp -R "$wheels"/bash_kernel "$wheels"/bash_kernel-*.dist-info "$wheels"/filetype "$wheels"/filetype-*.dist-info "$packages"
install -D -m 0755 "$wheels/bin/deno" "$root/usr/local/bin/deno"
# Whoever ran pip, with whatever mask.
chown -R 0:0 "$packages" "$root/usr/local/bin/deno"
chmod -R a+rX "$packages"
kernelspec() {
  install -d "$root/usr/share/jupyter/kernels/$1"
  cat >"$root/usr/share/jupyter/kernels/$1/kernel.json"
}
kernelspec bash <<'JSON'
{"argv": ["python3", "-m", "bash_kernel", "-f", "{connection_file}"], "display_name": "Bash", "language": "bash"}
JSON
# JavaScript and TypeScript. As in Node.js: `import "fs"` without a prefix; and texts without colours.
kernelspec deno <<'JSON'
{
  "argv": ["deno", "jupyter", "--kernel", "--conn", "{connection_file}"],
  "display_name": "Deno",
  "language": "typescript",
  "env": {"DENO_COMPAT": "1", "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
}
JSON
