#!/usr/bin/env bash
# Run the tests whose numbers depend on the processor as other processors would run them, and print
# a table: one setting a row. Fails if a test fails in any setting. About half an hour on two cores.
#
#   tests/processors.sh [PYTHON]     PYTHON has the extra "test" (default: python)
#   ONLY="laptop oldest" tests/processors.sh     only these settings
#
# A setting can only take instructions away: on a processor without AVX-512, rows that name it repeat
# what the processor has. ONEDNN_MAX_CPU_ISA is oneDNN's (products of torch; OpenVINO follows it only in
# part, so its own tests are not among these), ATEN_CPU_CAPABILITY is
# torch's own, OPENBLAS_CORETYPE is that of numpy and scipy, FAISS_OPT_LEVEL that of FAISS.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}

products="tests/test_int8.py tests/test_coreset.py tests/test_memory_bank.py"
numbers="$products tests/test_gaussian.py tests/test_anomaly_map.py tests/test_contract.py"
networks="tests/test_backbones.py tests/test_lora.py tests/test_docs.py::test_page[engines.md]"

# name | environment | options and files
settings=(
  "as it is||$numbers"
  "one thread|OMP_NUM_THREADS=1|$numbers"
  "two threads|OMP_NUM_THREADS=2|$products"
  "shuffled 1|OMP_NUM_THREADS=1|--shuffle 1 $numbers"
  "shuffled 2|OMP_NUM_THREADS=1|--shuffle 2 $numbers"
  "oldest|ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default FAISS_OPT_LEVEL=generic OPENBLAS_CORETYPE=Nehalem|$numbers $networks"
  "laptop|ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FAISS_OPT_LEVEL=avx2 OPENBLAS_CORETYPE=Haswell|$numbers $networks"
  "oneDNN AVX2|ONEDNN_MAX_CPU_ISA=AVX2|$products"
  "oneDNN AVX2_VNNI|ONEDNN_MAX_CPU_ISA=AVX2_VNNI|$products"
  "oneDNN AVX512_CORE|ONEDNN_MAX_CPU_ISA=AVX512_CORE|$products"
  "oneDNN AVX512_CORE_VNNI|ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI|$products"
  "oneDNN AVX512_CORE_BF16|ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16|$products"
  "torch default|ATEN_CPU_CAPABILITY=default|$numbers"
  "torch avx2|ATEN_CPU_CAPABILITY=avx2|$products"
  "torch avx512|ATEN_CPU_CAPABILITY=avx512|$products"
  "BLAS Nehalem|OPENBLAS_CORETYPE=Nehalem|$numbers"
  "BLAS Zen|OPENBLAS_CORETYPE=Zen|$products"
  "BLAS SkylakeX|OPENBLAS_CORETYPE=SkylakeX|$products"
  "FAISS generic|FAISS_OPT_LEVEL=generic|$products"
  "FAISS avx2|FAISS_OPT_LEVEL=avx2|$products"
)

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
printf '%-26s %7s %7s %8s %8s\n' setting passed failed skipped seconds
for setting in "${settings[@]}"; do
  IFS='|' read -r name environment tests <<<"$setting"
  case " ${ONLY-$name} " in *" $name "*) ;; *) continue ;; esac
  began=$SECONDS
  # shellcheck disable=SC2086 # both are lists of words
  env $environment "$python" -m pytest -q --no-header -p no:cacheprovider -rfE $tests >"$log" 2>&1 ||
    { failed=1; grep -E '^(FAILED|ERROR)' "$log" || tail -n 20 "$log"; }
  count() { grep -oE "[0-9]+ $1" "$log" | tail -n 1 | grep -oE '[0-9]+' || echo 0; }
  printf '%-26s %7s %7s %8s %8s\n' \
    "$name" "$(count passed)" "$(count '(failed|error)')" "$(count skipped)" $((SECONDS - began))
done
exit $failed
