# Sourced by the other scripts: where things are, and how they are built.
# shellcheck shell=bash
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"
export PATH="$PATH:/usr/sbin:/sbin"

# Builds live outside the checkout, so that a fresh clone finds the dependencies built.
VMFS_CACHE=${VMFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmfs}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$VMFS_CACHE/target}
mkdir -p "$VMFS_CACHE"

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Builds the programs in release mode and puts their folder into BIN.
build_release() {
    say "building (the first time takes some minutes)"
    cargo build --quiet --release --locked --bins --workspace || die "the build failed"
    BIN=$CARGO_TARGET_DIR/release
    # Cargo allows no dot in a program's name.
    local name
    for name in mkfs fsck mount; do ln -sf "$name-vmfs" "$BIN/$name.vmfs"; done
}
