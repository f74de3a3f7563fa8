"""A small step under compute-sanitizer: every kernel of the encoder, the decoder and the update.

compute-sanitizer python -m benchmarks.gpu.checks.small_step
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.shapes import GPU, INTERPRETED
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.step.ours import FLOAT8_VARIANT, Variant, kernel_cases, make_step
from benchmarks.step.work import Inputs, Setup


def main() -> None:
    """Run each kernel case and three kinds of steps once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks.small_step")
    parser.add_argument("--interpret", action="store_true")
    interpreted = parser.parse_args().interpret
    setup = Setup.of("cuda")
    if interpreted:
        setup = Setup(torch.device("cpu"), "triton", torch.float16)
    torch.manual_seed(0)
    start_one_rank(setup.device.type)
    inputs = Inputs((INTERPRETED if interpreted else GPU).sanitised, setup)
    for case in kernel_cases(inputs):
        case.make()()
    variants = [
        Variant("step + clip + auxk on 1/8 rows", clip=True, auxk_rows=1 / 8),
        Variant("step, bfloat16 moments", moments="bfloat16"),
    ]
    if setup.has_float8:
        variants.append(FLOAT8_VARIANT)
    for variant in variants:
        make_step(inputs, variant)()
    setup.synchronize()
    print("small step: done")


if __name__ == "__main__":
    main()
