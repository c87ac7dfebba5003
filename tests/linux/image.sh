#!/usr/bin/env bash
# Makes a host that boots Linux guests under our VMM, out of Debian's packages and nothing else:
#
#   image.sh OUT VMM CHECK   ->  OUT/vmlinuz, OUT/initrd
#
# The host is a kernel and an initrd for QEMU. In it are our VMM, Debian's kernel once more for the
# guests (as bzImage and, unpacked, as vmlinux), the guests' own initrd, and the jobs to do. Needs no root.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
out=$(readlink -f "$1")
vmm=$(readlink -f "$2")
check=$(readlink -f "$3")
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The kernel that Debian has now, kept until it has a newer one.
fetch_kernel() {
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$package" ] || { echo "apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
    kernel=$out/$package
    if [ ! -d "$kernel" ]; then
        (cd "$work" && apt-get -qq download "$package" 2>apt.log || { cat apt.log >&2; exit 1; })
        dpkg-deb -x "$work/$package"_*.deb "$work/kernel"
        mv "$work/kernel" "$kernel"
    fi
    modules=$(echo "$kernel"/lib/modules/*/kernel)
    vmlinuz=$(echo "$kernel"/boot/vmlinuz-*)
}

# The unpacked kernel inside a bzImage: the setup header says where it is (Linux, boot.rst).
unpack_kernel() {
    local setup payload bytes
    setup=$(od -An -tu1 -j $((0x1f1)) -N 1 "$vmlinuz")
    payload=$(od -An -tu4 -j $((0x248)) -N 4 "$vmlinuz")
    bytes=$(od -An -tu4 -j $((0x24c)) -N 4 "$vmlinuz")
    # The payload's last four bytes are its unpacked size.
    tail -c "+$(((setup + 1) * 512 + payload + 1))" "$vmlinuz" | head -c "$((bytes - 4))" >"$work/payload" || true
    lz4 -qdc "$work/payload" >"$1" || { echo "the kernel is not packed with lz4 any more: adapt unpack_kernel" >&2; exit 1; }
}

# Copies modules in the order in which they are to be loaded.
add_modules() {
    local tree=$1 at=10 name
    shift
    mkdir -p "$tree/modules"
    for name; do
        cp "$(find "$modules" -name "$name.ko" | grep .)" "$tree/modules/$at-$name.ko"
        at=$((at + 1))
    done
}

skeleton() {
    mkdir -p "$1"/{bin,proc,sys,dev,tmp}
    cp "$(command -v busybox)" "$1/bin/busybox"
}

pack() {
    (cd "$1" && find . | busybox cpio -o -H newc -R 0:0 2>/dev/null) >"$2"
}

make_guest() {
    local tree=$work/guest
    skeleton "$tree"
    add_modules "$tree" virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
        virtio_blk virtio-rng failover net_failover virtio_net virtio_console evdev button
    cp "$here/guest-init" "$tree/init"
    cp "$check" "$tree/bin/check"
    pack "$tree" "$1"
}

# A program with the libraries that it needs.
add_program() {
    local tree=$1 program=$2
    cp "$program" "$tree/bin/"
    ldd "$program" | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) { print $i; break } }' |
        while read -r library; do
            mkdir -p "$tree/$(dirname "$library")"
            cp -L "$library" "$tree/$library"
        done
}

make_host() {
    local tree=$work/host
    skeleton "$tree"
    add_modules "$tree" irqbypass kvm kvm-amd llc stp bridge tun
    add_program "$tree" "$vmm"
    strip -S "$tree/bin/$(basename "$vmm")"
    mkdir "$tree/guest"
    cp "$vmlinuz" "$tree/guest/vmlinuz"
    unpack_kernel "$tree/guest/vmlinux"
    make_guest "$tree/guest/initrd"
    cp "$check" "$tree/bin/check"
    cp "$here/host-init" "$tree/init"
    cp "$here/jobs" "$tree/jobs"
    pack "$tree" "$work/initrd"
}

fetch_kernel
make_host
cp "$vmlinuz" "$out/vmlinuz"
mv "$work/initrd" "$out/initrd"
