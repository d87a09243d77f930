#!/usr/bin/env bash
# Train, export and benchmark on real images: training on INRIA and `people`, evaluation on INRIA's test images.
# Takes about 50 minutes on two idle cores. RUNS/report.html contains images of the dataset.
#   bash benchmarks/studies/real_images.sh DATA.yaml [RUNS]
# DATA.yaml: see real_data.yaml. Results: benchmarks/results/real_images.{json,txt}
set -euo pipefail
data=$(realpath "$1")
runs=${2:-runs/real}
cd "$(dirname "$0")/../.."
common=(--data "$data" --imgsz 256 --batch 8 --project "$runs" --device cpu --seed 0 --set cache_mib=3000 --exist-ok)

hkd-train "${common[@]}" --model mini-teacher --epochs 12 --name teacher
hkd-train "${common[@]}" --model mini-student --epochs 6 --name student
hkd-train "${common[@]}" --model mini-student --epochs 6 --name student-hkd \
    --teacher "$runs/teacher/best.pt" --distill hkd
for name in teacher student student-hkd; do
    hkd-export "$runs/$name/best.pt" --output "$runs/$name.onnx"
done
hkd-bench "$runs/teacher.onnx" "$runs/student.onnx" "$runs/student-hkd.onnx" --data "$data" --split test \
    --names "teacher,student baseline,student distilled" \
    --json benchmarks/results/real_images.json --html "$runs/report.html" | tee benchmarks/results/real_images.txt
