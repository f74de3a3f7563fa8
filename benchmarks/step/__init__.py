"""One training step compared with the bare encoder GEMM, baselines and the peers' trainers."""
