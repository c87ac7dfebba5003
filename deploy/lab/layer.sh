#!/usr/bin/env bash
# Makes the layer that lies over Debian on a lab host: our packages, as users install them, and the
# lab's own files.
#
#   layer.sh OUT PACKAGES AGENT GUEST    ->  OUT/layer.ext4
#
# PACKAGES: directory with our .deb files; AGENT: the lab's agent; GUEST: the test guest.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
out=$(readlink -f "$1") packages=$(readlink -f "$2") agent=$(readlink -f "$3") guest=$(readlink -f "$4")
work=$(mktemp -d "$out/layer.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/tree
export E2FSPROGS_FAKE_TIME=1700000000

# The packages are unpacked; what their scripts do is left to the host (users, at its boot) or done
# here (enabling units).
unpack_packages() {
    mkdir "$tree"
    for package in "$packages"/*.deb; do
        dpkg-deb -x "$package" "$tree"
    done
    for unit in "$tree"/usr/lib/systemd/system/*.service; do
        for target in $(sed -n 's/^WantedBy=//p' "$unit"); do
            local wants=$tree/etc/systemd/system/$target.wants
            mkdir -p "$wants"
            ln -s "/usr/lib/systemd/system/$(basename "$unit")" "$wants/"
        done
    done
    rm -rf "$tree"/usr/share/{doc,man,bash-completion,zsh,fish}
}

unpack_packages
cp -a "$here/layer/." "$tree"
mkdir -p "$tree/export" "$tree/srv/bellwether"
install -m 755 "$agent" "$tree/usr/lib/lab/agent"
install -D -m 644 "$guest" "$tree/usr/share/lab/guest.elf"
mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -m 0 -U 6b5f2c1e-0000-4000-8000-000000000003 \
    -E hash_seed=6b5f2c1e-0000-4000-8000-000000000004,root_owner=0:0 -d "$tree" \
    "$work/layer.ext4" "$(($(du -sm "$tree" | cut -f1) * 12 / 10 + 8))M" >/dev/null
mv "$work/layer.ext4" "$out/layer.ext4"
