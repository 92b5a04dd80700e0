#!/usr/bin/env bash
# Builds the TensorRT engine of this bundle on this device: bash build_engine.sh
#
# An engine runs only with the TensorRT and on the GPU that built it, so it is built here. This
# script builds for: @WHAT@
#
# Environment: TRTEXEC           trtexec to use; default: the PATH, /usr/src/tensorrt/bin/trtexec
#              WORKSPACE_MIB     memory the builder may try; default 2048
#              TENSORRT_VERSION  e.g. 10.3, where it cannot be read from the system
#              L4T_VERSION       e.g. 36.4, where it cannot be read from the system
# Exit code:   0 built, 3 no trtexec, 4 another TensorRT, 5 another JetPack, 6 damaged bundle,
#              7 the build failed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly TARGET='@TARGET@'
readonly ONNX='@ONNX@'
readonly ONNX_SHA256='@ONNX_SHA256@'
readonly ENGINE='@ENGINE@'
# major.minor, or major for all of them
readonly TENSORRT_ACCEPTED='@TENSORRT@'
# Jetson Linux majors; empty: not a Jetson
readonly L4T_ACCEPTED='@L4T@'
readonly WORKSPACE_MIB="${WORKSPACE_MIB:-2048}"
readonly TEGRA_RELEASE="${TEGRA_RELEASE:-/etc/nv_tegra_release}"
SHAPES=(@SHAPES@)
FLAGS=(@FLAGS@)
# Whether others are right too, and are tried when these fail.
readonly HAS_FALLBACK='@HAS_FALLBACK@'
FALLBACK_FLAGS=(@FALLBACK_FLAGS@)

fail() {
  local code="$1"
  shift
  printf 'build_engine.sh: %s\n' "$@" >&2
  exit "$code"
}

find_trtexec() {
  local path
  if [[ -n "${TRTEXEC:-}" ]]; then
    [[ -x "$TRTEXEC" ]] || fail 3 "TRTEXEC=$TRTEXEC is no program"
    printf '%s\n' "$TRTEXEC"
    return
  fi
  for path in "$(command -v trtexec || true)" /usr/src/tensorrt/bin/trtexec; do
    if [[ -n "$path" && -x "$path" ]]; then
      printf '%s\n' "$path"
      return
    fi
  done
  fail 3 'trtexec is neither on the PATH nor in /usr/src/tensorrt/bin:' \
    'install it (sudo apt install libnvinfer-bin), or set TRTEXEC=/path/to/trtexec.' \
    'Do not pip install tensorrt on a Jetson: those wheels are not for its GPU.'
}

package_version() {
  # 1:10.3.0.30-1+cuda12.5 -> 10.3.0.30
  local version
  version="$(dpkg-query -W -f='${Version}' "$1" 2>/dev/null || true)"
  version="${version#*:}"
  printf '%s\n' "${version%%-*}"
}

banner_version() {
  # [TensorRT v8502] -> 8.5, [TensorRT v100300] -> 10.3
  local banner number
  banner="$("$1" --help 2>&1 || true)"
  if [[ "$banner" =~ TensorRT\ v([0-9]{4,6}) ]]; then
    number="${BASH_REMATCH[1]}"
    if ((number >= 10000)); then
      printf '%d.%d\n' $((number / 10000)) $((number / 100 % 100))
    else
      printf '%d.%d\n' $((number / 1000)) $((number / 100 % 10))
    fi
  fi
}

major_minor() {
  if [[ "$1" =~ ^([0-9]+\.[0-9]+) ]]; then printf '%s\n' "${BASH_REMATCH[1]}"; fi
}

tensorrt_version() {
  local package banner
  if [[ -n "${TENSORRT_VERSION:-}" ]]; then
    major_minor "$TENSORRT_VERSION"
    return
  fi
  package="$(major_minor "$(package_version libnvinfer-bin)")"
  banner="$(banner_version "$1")"
  if [[ -n "$package" && -n "$banner" && "$package" != "$banner" ]]; then
    fail 4 "the package libnvinfer-bin is TensorRT $package, but $1 is TensorRT $banner:" \
      'set TRTEXEC to the one of the package, or TENSORRT_VERSION to the one that you mean.'
  fi
  printf '%s\n' "${banner:-$package}"
}

check_tensorrt() {
  local version="$1" accepted
  if [[ -z "$version" ]]; then
    fail 4 'cannot tell the version of TensorRT, neither from libnvinfer-bin nor from trtexec:' \
      'find it out and set it, as in TENSORRT_VERSION=10.3 bash build_engine.sh'
  fi
  for accepted in $TENSORRT_ACCEPTED; do
    [[ "$version" == "$accepted" || "$version" == "$accepted".* ]] && return
  done
  fail 4 "this bundle is for TensorRT $TENSORRT_ACCEPTED ($TARGET), here is TensorRT $version:" \
    'write a bundle for this device: retinaray bundle ... --target ...'
}

l4t_version() {
  local line=''
  if [[ -n "${L4T_VERSION:-}" ]]; then
    printf '%s\n' "$L4T_VERSION"
  elif [[ -r "$TEGRA_RELEASE" ]]; then
    # R36 (release), REVISION: 4.3, ...
    read -r line <"$TEGRA_RELEASE" || true
    if [[ "$line" =~ R([0-9]+)\ .*REVISION:\ ([0-9.]+) ]]; then
      printf '%s.%s\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    fi
  else
    package_version nvidia-l4t-core
  fi
}

check_l4t() {
  local version major
  version="$(l4t_version)"
  if [[ -z "$L4T_ACCEPTED" ]]; then
    [[ -z "$version" ]] && return
    fail 5 "this bundle is for $TARGET, and this is a Jetson (L4T $version):" \
      'write one for it: retinaray bundle ... --target with its JetPack.'
  fi
  if [[ -z "$version" ]]; then
    fail 5 "this bundle is for $TARGET (L4T $L4T_ACCEPTED), and this is no Jetson, or a container" \
      "without $TEGRA_RELEASE: mount it, or set L4T_VERSION as in L4T_VERSION=36.4"
  fi
  for major in $L4T_ACCEPTED; do
    [[ "${version%%.*}" == "$major" ]] && return
  done
  fail 5 "this bundle is for $TARGET (L4T $L4T_ACCEPTED), here is L4T $version:" \
    'write a bundle for this device: retinaray bundle ... --target ...'
}

check_onnx() {
  local actual
  [[ -f "$ONNX" ]] || fail 6 "$ONNX is missing: copy the bundle again"
  actual="$(sha256sum "$ONNX")"
  [[ "${actual%% *}" == "$ONNX_SHA256" ]] ||
    fail 6 "$ONNX has another SHA-256 than when it was written: copy the bundle again"
}

build() {
  # Of the arguments the first is trtexec, the others are the options that settle the types.
  local trtexec="$1"
  shift
  local command=("$trtexec" --onnx="$ONNX" ${SHAPES[@]+"${SHAPES[@]}"} "$@"
    --memPoolSize=workspace:"$WORKSPACE_MIB" --timingCacheFile=timing.cache
    --saveEngine="$ENGINE.partial")
  rm -f "$ENGINE.partial"
  printf '%q ' "${command[@]}"
  printf '\n'
  "${command[@]}" 2>&1 | tee build_engine.log || return 1
  [[ -s "$ENGINE.partial" ]]
}

main() {
  local trtexec version started="$SECONDS"
  trtexec="$(find_trtexec)"
  version="$(tensorrt_version "$trtexec")"
  check_tensorrt "$version"
  check_l4t
  check_onnx
  printf 'TensorRT %s, target %s: building %s; this takes minutes\n' "$version" "$TARGET" "$ENGINE"
  if ! build "$trtexec" ${FLAGS[@]+"${FLAGS[@]}"}; then
    [[ "$HAS_FALLBACK" == yes ]] || fail 7 'trtexec failed: see build_engine.log'
    printf '\nNOTE: the strongly typed build failed (build_engine_strong.log).\n'
    printf 'Building with weak typing instead: the types of the layers are then TensorRT'"'"'s\n'
    printf 'choice, so run selftest.py before you trust the engine.\n\n'
    mv build_engine.log build_engine_strong.log
    build "$trtexec" ${FALLBACK_FLAGS[@]+"${FALLBACK_FLAGS[@]}"} ||
      fail 7 'trtexec failed twice: see build_engine_strong.log and build_engine.log'
  fi
  mv "$ENGINE.partial" "$ENGINE"
  printf '\n%s built in %d s. Next: python3 selftest.py\n' "$ENGINE" $((SECONDS - started))
}

main "$@"
