#!/usr/bin/env bash
# Train on the INRIA and `people` data sets and measure on the INRIA test images, which are used neither for training nor
# for the selection of the epoch. Takes about 50 minutes on two idle cores. See real_data.yaml for the data.
# The report (RUNS/report.html) contains the images and is not part of the repository.
#   bash benchmarks/studies/real_images.sh [RUNS]      results: benchmarks/results/real_images.{json,txt}
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-runs/real}
bin=.venv/bin
data=benchmarks/studies/real_data.yaml
common=(--data "$data" --imgsz 256 --batch 8 --project "$runs" --device cpu --seed 0 --set cache_mib=3000 --exist-ok)

$bin/hkd-train "${common[@]}" --model mini-teacher --epochs 12 --name teacher
$bin/hkd-train "${common[@]}" --model mini-student --epochs 6 --name student
$bin/hkd-train "${common[@]}" --model mini-student --epochs 6 --name student-hkd \
    --teacher "$runs/teacher/best.pt" --distill hkd
for name in teacher student student-hkd; do
    $bin/hkd-export "$runs/$name/best.pt" --output "$runs/$name.onnx"
done
$bin/hkd-bench "$runs/teacher.onnx" "$runs/student.onnx" "$runs/student-hkd.onnx" --data "$data" --split test \
    --names "teacher,student baseline,student distilled" \
    --json benchmarks/results/real_images.json --html "$runs/report.html" | tee benchmarks/results/real_images.txt
