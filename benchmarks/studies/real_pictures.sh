#!/usr/bin/env bash
# The whole way on the real pictures beside the project: train on INRIA + `people`, measure on INRIA's test
# pictures, which neither training nor the choice of the epoch ever saw. About 50 minutes on two idle cores.
# The page (RUNS/report.html) shows the pictures, so it stays out of the project.
#   bash benchmarks/studies/real_pictures.sh [RUNS]      results: benchmarks/results/real_pictures.{json,txt}
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
    --names "teacher,student alone,student distilled" \
    --json benchmarks/results/real_pictures.json --html "$runs/report.html" | tee benchmarks/results/real_pictures.txt
