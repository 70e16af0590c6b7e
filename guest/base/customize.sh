#!/bin/sh
# Makes a Debian root file system a Kelvin image. Run by mmdebstrap with the root directory as $1.
set -eu
root=$1

# A login shell starts two programs for what it knows already; under emulation they are half of the time until its prompt.
# Every command of E2B's SDKs is a login shell. A user's own ~/.dircolors is read as before.
sed -i 's/"$(id -u)"/"${EUID:-$(id -u)}"/' "$root/etc/profile"
install -d "$root/usr/lib/kelvin"
chroot "$root" dircolors -b >"$root/usr/lib/kelvin/dircolors.sh"
sed -i 's#|| eval "$(dircolors -b)"#|| . /usr/lib/kelvin/dircolors.sh#' "$root/etc/skel/.bashrc"

chroot "$root" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"

# Identity lives in memory, written at activation: no clone ever shares it, and no clone has to write
# its disk for it.
for file in hostname machine-id hosts; do
  rm -f "$root/etc/$file"
  ln -s "/run/kelvin/$file" "$root/etc/$file"
done
# The host answers here, per sandbox; without a network there is no way to it and look-ups fail at once.
rm -f "$root/etc/resolv.conf"
echo 'nameserver 169.254.0.22' >"$root/etc/resolv.conf"
rm -rf "$root/var/lib/dbus/machine-id" "$root/var/lib/systemd/random-seed"

# What only a build leaves behind. Not /tmp: mmdebstrap has its configuration of apt there and empties it last; without that
# its clean-up empties the apt lists of the machine that builds.
rm -rf "$root"/var/log/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/run/*
# The directories stay: scripts of packages that are installed later expect them.
for directory in doc man locale; do
  find "$root/usr/share/$directory" -mindepth 1 ! -type d -delete
done
