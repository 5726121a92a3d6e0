"""`make bench-kernels`: on a CUDA device the kernels beside their baselines, elsewhere the chunked forms on a CPU."""

import sys

import torch

from hqlt_kernels import bench_cpu, bench_gpu

if __name__ == "__main__":
    if torch.cuda.is_available():
        sys.exit(bench_gpu.main())
    bench_cpu.main()
