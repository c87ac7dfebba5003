#!/usr/bin/env bash
# Makes what a host of the lab boots from, out of Debian's packages and nothing else:
#
#   image.sh OUT    ->  OUT/vmlinux, OUT/initrd, OUT/root.ext4
#
# Needs no root, no loop device, no chroot: packages are unpacked and not configured (what their
# scripts would have done is below), and the file system is made from a directory.
# The same packages give the same bytes. Programs of ours are not in here: see layer.sh.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
out=$(readlink -f "$1")
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/root
export SOURCE_DATE_EPOCH=1700000000 E2FSPROGS_FAKE_TIME=1700000000

words() { sed 's/#.*//' "$here/$1" | tr -s ' \n' ' '; }

unpack_packages() {
    mmdebstrap --quiet --mode=chrootless --variant=extract \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --include="$(words packages | xargs | tr ' ' ,)" bookworm "$tree" \
        "${LAB_MIRROR:-http://deb.debian.org/debian}"
}

# A kernel has 4000 modules; a host of the lab needs some forty of them.
keep_needed_modules() {
    version=$(basename "$tree"/boot/vmlinuz-* | sed 's/^vmlinuz-//')
    modules=$tree/lib/modules/$version
    index_modules
    local wanted all
    wanted=$(words modules)
    all=$(needed_modules $wanted)
    mkdir "$work/kept"
    (cd "$modules" && for file in $all modules.builtin modules.builtin.modinfo modules.order; do
        mkdir -p "$work/kept/$(dirname "$file")" && mv "$file" "$work/kept/$file"
    done)
    rm -rf "$modules" && mv "$work/kept" "$modules"
    index_modules
}

# With the host's own program, so that none is needed on this machine.
index_modules() {
    "$tree/lib64/ld-linux-x86-64.so.2" --argv0 depmod --library-path "$tree/lib/x86_64-linux-gnu" \
        "$tree/bin/kmod" -b "$tree" "$version"
}

# The files of the named modules and of all that they need, each after what it needs.
needed_modules() {
    for name; do
        local pattern="/${name//[-_]/[-_]}\.ko:"
        grep -m1 -E "$pattern" "$modules/modules.dep" >"$work/line" || {
            echo "the kernel has no module $name" >&2
            exit 1
        }
        tr -d : <"$work/line" | awk '{ for (i = NF; i > 0; i--) print $i }'
    done | awk '!seen[$0]++'
}

drop_what_no_host_needs() {
    rm -rf "$tree"/usr/share/{doc,man,locale,perl,perl5,bash-completion,zsh,python3,lintian,info,bug} \
        "$tree"/usr/lib/{python3*,x86_64-linux-gnu/{perl,perl-base,perl5,gconv}} \
        "$tree"/usr/lib/tmpfiles.d/{[!sv]*,systemd-[!t]*} \
        "$tree"/var/{cache,lib/{apt,dpkg}} "$tree"/boot "$tree"/etc/{rc?.d,cron.*,init.d}
}

# Each program that runs at a boot costs a tenth of a second under emulation, so only the generator
# that reads fstab is left.
drop_generators() {
    find "$tree"/lib/systemd/{system-generators,system-environment-generators} -type f \
        ! -name systemd-fstab-generator -delete
}

# What the packages' scripts would have done.
configure() {
    cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
    cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
    echo 'kvm:x:106:' >>"$tree/etc/group"
    ldconfig -r "$tree"
    ln -sf /proc/self/mounts "$tree/etc/mtab"
    ln -sf busybox "$tree/bin/awk"
    for unit in $(words masked); do
        ln -sf /dev/null "$tree/etc/systemd/system/$unit"
    done
    ln -sf /lib/systemd/system/multi-user.target "$tree/etc/systemd/system/default.target"
    mkdir -p "$tree"/{proc,sys,dev,run,mnt,root,srv,export,var/{log,tmp,lib/nfs/{rpc_pipefs,v4recovery},lib/bellwether}}
    : >"$tree/var/lib/nfs/etab"
    find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

make_root() {
    rm -f "$work/root.ext4"
    mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -m 0 -U 6b5f2c1e-0000-4000-8000-000000000001 \
        -E hash_seed=6b5f2c1e-0000-4000-8000-000000000002,root_owner=0:0 -d "$tree" \
        "$work/root.ext4" "$(($(du -sm "$tree" | cut -f1) * 12 / 10 + 32))M"
}

# The kernel would unpack itself in four seconds of emulation; QEMU starts one that is unpacked.
unpack_kernel() {
    local packed=$tree/boot/vmlinuz-$version at
    for at in $(LC_ALL=C grep -abo $'\xfd7zXZ' "$packed" | cut -d: -f1); do
        tail -c "+$((at + 1))" "$packed" | xz -dc >"$work/vmlinux" 2>/dev/null || true
        if [ "$(head -c 4 "$work/vmlinux")" = $'\x7fELF' ]; then
            return
        fi
    done
    echo "the kernel is not packed with xz any more: adapt unpack_kernel" >&2
    exit 1
}

make_initrd() {
    local initrd=$work/initrd
    mkdir -p "$initrd"/{bin,modules,proc,sys,dev,base,layer,upper,root}
    cp "$tree/bin/busybox" "$initrd/bin/"
    cp "$here/init" "$initrd/init"
    local at=0
    for file in $(needed_modules virtio_pci virtio_blk virtio_console crc32c_generic ext4 overlay); do
        cp "$modules/$file" "$initrd/modules/$(printf %02d $at)-$(basename "$file")"
        at=$((at + 1))
    done
    find "$initrd" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    (cd "$initrd" && find . | sort | busybox cpio -o -H newc -R 0:0 --quiet 2>/dev/null || 
        find . | sort | busybox cpio -o -H newc -R 0:0) >"$work/initrd.cpio"
}

unpack_packages
keep_needed_modules
unpack_kernel
make_initrd
drop_what_no_host_needs
drop_generators
configure
make_root
mv "$work/vmlinux" "$out/vmlinux"
mv "$work/initrd.cpio" "$out/initrd"
mv "$work/root.ext4" "$out/root.ext4"
