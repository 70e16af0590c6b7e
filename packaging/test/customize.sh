#!/bin/sh
# Makes a Debian root file system a machine that tries the package when it has booted. Run by mmdebstrap with the root
# directory as $1.
set -eu
root=$1
here=$(dirname "$0")

# The machine boots from a virtio disk and needs nothing else of its initial RAM disk: a small one is read quickly.
echo 'MODULES=list' >"$root/etc/initramfs-tools/conf.d/kelvin-test"
printf '%s\n' virtio_pci virtio_blk ext4 >>"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k all

# Its files come from the host by 9p. The unit is there before the package is: it is not counted as a leftover.
install -m 0644 "$here/kelvin-test.service" "$root/etc/systemd/system/kelvin-test.service"
ln -s ../kelvin-test.service "$root/etc/systemd/system/multi-user.target.wants/kelvin-test.service"

# A known machine: a first boot would enable every unit there is.
echo '6b656c76696e40008000000000000016' >"$root/etc/machine-id"
echo kelvin-test >"$root/etc/hostname"
# What wakes up by itself would share the one processor with the test.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
  fstrim.timer motd-news.timer getty@tty1.service serial-getty@ttyS0.service systemd-tmpfiles-clean.timer; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/usr/share/doc/*/changelog* "$root"/usr/share/locale/*
