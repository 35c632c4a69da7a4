#!/usr/bin/env bash
# What is to be shown on a GPU: benchmarks/gpu.sh WHAT ...
# What came of it on one GPU: docs/results/gpu.md. Times are of an H200 with 16 cores.
#
# On a machine with network, before (a minute), in the environment of this package:
#   prepare KIT IMAGES [GOLDEN]
#       Make the folder KIT, about 35 MB, of what has to travel beside the repository: the program as of the last
#       commit, the images of the studies, wheels for Python 3.12 on x86-64, and the official programs' numbers
#       (tests/parity), if their folder is given.
#   pack IMAGES OUT.zip [COUNT]
#       The images alone, of a folder train/CLASS/IMAGE, test/CLASS/IMAGE such as CIFAR-10: the first COUNT (1500)
#       training images of each class by name, and the test part.
#
# On a machine with a GPU, without network, that has Python 3.12, torch, torchvision, scikit-learn, transformers:
#   correct [FLAGS]
#       6 min. The device computes what a CPU computes: masks, crops, losses, gradients, curves, resumption.
#       OUT/correct.json has the difference for each check. FLAGS: gpu_correct.py.
#   speed [FLAGS]
#       8 min; what would begin later is left out, what has begun goes on, minutes where it is a compilation. Images a
#       second, FLOP/s and memory of a step, against plain forms, in OUT/speed.json, which is written on the way.
#       FLAGS: gpu_speed.py; --sizes, --precisions and --modes share the work out between several calls.
#   study "NAME ..." MINUTES JOBS [FLAGS]
#       MINUTES (8 leave room below 9) and half a minute. Runs of benchmarks/studies/NAME.yaml, JOBS side by side, as
#       far as docs/results/NAME has none, those of the first study first; in float32 as on a CPU, and not compiled,
#       which would take longer than they do. Sixteen side by side keep an H200 busy, each on one core: 56 runs, most
#       of a quarter of the length, took ten minutes. A run that is cut off is lost. OUT/study.tar holds the folders
#       docs/results/NAME afterwards, and every ten seconds before: tar xf study.tar -C docs/results.
#       FLAGS: study.py, such as --teacher FILE.
#
# These three refuse a KIT that is not there; the first two also one that is not of the commit that is checked out here,
# where there is git. A study that was begun goes on with a kit of its commit, by COMMIT.
#
# Variables: COMMIT, of the program that `prepare` packs (HEAD); KIT, the folder of `prepare` (build/gpu); OUT, for
# results (docs/results/gpu); DEVICE (cuda); PYTHON (python3).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) && root=$(dirname "$here")
kit=$(realpath -m "${KIT:-$root/build/gpu}") out=$(realpath -m "${OUT:-$root/docs/results/gpu}")
device=${DEVICE:-cuda} python=${PYTHON:-python3}
# What such machines lack of our dependencies, or have in another version than the studies: the command line, with its
# own, the decoder of JPEGs, networks, and what dense tasks need.
lacking=(cyclopts docstring_parser rich-rst simplejpeg timm segmentation_models_pytorch faster-coco-eval)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)

work=$(mktemp -d) # for what is not kept
trap 'rm -rf "$work"' EXIT

pack() {
  "$python" - "$@" <<'EOF'
import sys, zipfile
from pathlib import Path

images, out, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1500
classes = sorted(folder for folder in (images / "train").iterdir() if folder.is_dir())
chosen = [path for folder in classes for path in sorted(folder.iterdir())[:count]]
with zipfile.ZipFile(out, "w") as archive:  # stored: JPEGs do not shrink
    for path in [*chosen, *sorted((images / "test").glob("*/*"))]:
        archive.write(path, path.relative_to(images))
EOF
}

prepare() {
  commit=$(git -C "$root" rev-parse "${COMMIT:-HEAD}^{commit}")
  kit=$1 && mkdir -p "$(dirname "$kit")" && mkdir "$kit" "$kit/wheels" # a folder that is there is not touched
  pack "$2" "$kit/images.zip"
  [ -z "${3:-}" ] || cp -r --no-preserve=mode "$3" "$kit/golden"
  git -C "$root" archive "$commit" | tar x -C "$work"
  "$python" -m pip install --quiet --no-deps --target "$kit/site" "$work"
  echo -n "$commit" >"$kit/site/commit"
  wanted=$("$python" -c 'import sys; from importlib.metadata import version
for name in sys.argv[1:]: print(f"{name}=={version(name)}")' "${lacking[@]}")
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$kit/wheels" \
    --python-version 3.12 --implementation cp "${platforms[@]}" $wanted
  du -sh "$kit"/*
}

# Make the program as it was packed importable, and what it needs.
begin() {
  if [ ! -f "$kit/site/commit" ]; then
    echo "error: there is no kit; $kit; make one with $0 prepare, or set KIT" >&2 && exit 2
  fi
  commit=$(cat "$kit/site/commit")
  mkdir -p "$out"
  if compgen -G "$kit/wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/wheels" "$kit"/wheels/*.whl
  fi
  export PYTHONPATH=$kit/site:$work/wheels${PYTHONPATH:+:$PYTHONPATH}
  unset PYTHONDONTWRITEBYTECODE # or each of some hundred processes would compile its modules anew
}

# The same, for what is said of the program that is checked out here.
begin_here() {
  begin
  head=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo "$commit")
  if [ "$commit" != "$head" ]; then
    echo "error: the kit is of commit ${commit:0:7}, not of ${head:0:7}; $kit; remove it and make it anew" >&2 && exit 2
  fi
}

correct() {
  begin_here
  if [ -d "$kit/golden" ]; then golden=(--golden "$kit/golden"); else golden=(); fi
  "$python" "$here/gpu_correct.py" --device "$device" --commit "$commit" --out "$out/correct.json" \
    "${golden[@]}" "$@"
}

speed() {
  begin_here
  "$python" "$here/gpu_speed.py" --device "$device" --commit "$commit" --out "$out/speed.json" "$@"
}

study() {
  read -ra names <<<"$1" && minutes=$2 jobs=$3 && shift 3
  begin
  mkdir -p "${names[@]/#/$root/docs/results/}"
  files=("${names[@]/#/$here/studies/}") files=("${files[@]/%/.yaml}")
  ln -s "$kit/site" "$work/site"
  "$python" -m zipfile -e "$kit/images.zip" "$work/images"
  OMP_NUM_THREADS=$(( ($(nproc) + jobs - 1) / jobs ))
  export OMP_NUM_THREADS TORCHDYNAMO_DISABLE=1 NVIDIA_TF32_OVERRIDE=0
  (while sleep 10 && kill -0 $$; do keep || true; done) >/dev/null 2>&1 &
  keeping=$! status=0
  "$python" "$here/study.py" run "${files[@]}" --data "$work/images" --work "$work" --device "$device" \
    --jobs "$jobs" --minutes "$minutes" "$@" || status=$?
  [ $status = 0 ] || find "${names[@]/#/$work/}" -name log.txt -exec tail -n 5 {} + >&2 || true
  kill $keeping && wait $keeping || true
  keep # also of a study that failed: what is done is done
  return $status
}

# Write what the studies have so far, in one go.
keep() {
  part=$out/.study.$BASHPID # before tar, whose own process would have another number
  tar c -C "$root/docs/results" "${names[@]}" >"$part" && mv "$part" "$out/study.tar"
}

what=${1:-}
case $what in
pack | prepare | correct | speed | study) "$@" ;;
*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
