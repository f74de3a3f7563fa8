"""One training step beside the bare encoder GEMM, baselines and the peers' trainers."""
