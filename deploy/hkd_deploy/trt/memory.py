"""How much memory a build will want, so that a board of 4 or 8 GB is warned before the kernel kills the build."""

import psutil

MIB = 2**20
# An estimate from how the builder works, not a measurement: CUDA's context and TensorRT's libraries; the weights as the
# parser's copy, the builder's, the engine's and the one being timed; and the workspace that one tactic may take.
BASE_MIB = 800
NUM_WEIGHT_COPIES = 4
SMALL_BOARD_MIB = 17 * 1024  # up to 16 GB, which CPU and GPU share on a Jetson


def estimate_build_mib(onnx_bytes: int, workspace_mib: int) -> int:
    """Estimated peak of a build, MiB: 800 + 4 x the file + the workspace."""
    return BASE_MIB + NUM_WEIGHT_COPIES * -(-onnx_bytes // MIB) + workspace_mib


def memory_warning(onnx_bytes: int, workspace_mib: int) -> str | None:
    """What to say before a build; None on a machine with plenty."""
    memory = psutil.virtual_memory()
    if memory.total > SMALL_BOARD_MIB * MIB:
        return None
    estimate, free = estimate_build_mib(onnx_bytes, workspace_mib), int(memory.available // MIB)
    if free >= estimate:
        return f"the build will want about {estimate} MiB (estimated); {free} MiB are available"
    return (
        f"warning: the build will want about {estimate} MiB (estimated), only {free} MiB are available; close other "
        f"programs, add swap, or take less with --workspace {max(64, workspace_mib // 4)}"
    )
