"""The Triton form of the vocabulary head without a GPU: its results by interpretation, its machine code by compilation.

The interpreter has to be switched on before triton is imported, so the comparisons run in their own process: this file,
as a script. Interpreted products of bf16 are garbage (a fault of the interpreter), so fp32 and fp16 are compared.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.kernels import SHAPES, gradients


@pytest.mark.slow
def test_interpreted_triton_equals_the_plain_formula():
    pytest.importorskip("triton", reason="triton comes with torch for CUDA on Linux")
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("equal") == 2 * len(SHAPES) + 2


def main():
    from stair.kernels import fused, triton_head, vocabulary_max, vocabulary_max_reference

    fused._form = lambda device, compute: triton_head
    # small blocks: the interpreter is slow, and every loop has to turn more than once
    triton_head.BLOCKS = {"BLOCK_V": 16, "BLOCK_D": 16, "FLATTEN": True}
    triton_head.TILE, triton_head.ROWS, triton_head.LIST = 64, 16, {"BLOCK_V": 32}

    def compare(got, want, tolerance):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        print("equal")

    g = torch.Generator().manual_seed(0)
    for B, T, D, V, keep in SHAPES:
        mask = torch.rand(B, T, generator=g) < keep

        inputs = [torch.randn(*shape, generator=g) for shape in ((B, T, D), (V, D), (V,))]
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            low = [value.to(dtype) for value in inputs]
            # the oracle in fp32 on the same rounded numbers
            want = gradients(vocabulary_max_reference, [value.float() for value in low], mask)
            compare(gradients(vocabulary_max, low, mask), want, tolerance)
    # ties: value, first position, and twice the same
    once = [torch.randn(*shape, generator=g) for shape in ((2, 1, 8), (20, 8), (20,))]
    mask = torch.ones(2, 3, dtype=torch.bool)
    want = gradients(vocabulary_max_reference, once, mask[:, :1])
    got = gradients(vocabulary_max, [once[0].repeat(1, 3, 1), *once[1:]], mask)
    assert (got[1][:, 1:] == 0).all() and want[1].abs().sum() > 0
    compare([got[0], got[1][:, :1], *got[2:]], want, 1e-5)
    # words that can never be active; a number that is none reaches the loss
    out = vocabulary_max(once[0], mask[:, :1], *once[1:], active_ranges=((2, 5), (9, 20)))
    whole = vocabulary_max_reference(once[0], mask[:, :1], *once[1:])
    whole[:, [0, 1, 5, 6, 7, 8]] = 0
    compare([out], [whole], 1e-5)
    for at in (0, 2):
        strange = [value.clone() for value in once]
        strange[at].view(-1)[0] = float("nan")
        assert not vocabulary_max(strange[0], mask[:, :1], *strange[1:])[0, 0].isfinite()


def compiled(kernel, signature, constants, options, tmp_path):
    """PTX of a kernel for sm_90, and what its machine code uses: registers, and memory of a thread that spills fill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # what Triton finds out by itself when the kernel is called: places in memory, and a width that 16 divides
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "D"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton brings no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code["cubin"])
    dump = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return code["ptx"], usage


POINTERS = {
    "bias_ptr": "*fp32", "row_ptr": "*i32", "tiles_ptr": "*i32", "place_ptr": "*i32", "embedding_ptr": "*fp32",
    "position_ptr": "*u8", "grad_ptr": "*fp32", "begin_ptr": "*i64", "end_ptr": "*i64", "column_ptr": "*i32",
    "value_ptr": "*fp32", "active_ptr": "*i32", "out_ptr": "*fp32",
}  # fmt: skip


def signature(kernel, constants, **kinds):
    kinds = {**POINTERS, **dict.fromkeys(constants, "constexpr"), **kinds}
    return {name: kinds.get(name, "i32") for name in kernel.arg_names}


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", [8, 32])
def test_the_forward_kernel_compiles_for_hopper_to_tensor_cores_and_copy_engine_without_spills(half, rows, tmp_path):
    pytest.importorskip("triton", reason="triton comes with torch for CUDA on Linux")
    from stair.kernels import triton_head as head

    constants = {**head.BLOCKS, "ROWS": rows, "SLOTS": head.TILE // rows}
    width = head.BLOCKS["BLOCK_D"]
    tiles = {
        "packed": f"tensordesc<{half}[{head.TILE},{width}]>",
        "weight": f"tensordesc<{half}[{head.BLOCKS['BLOCK_V']},{width}]>",
    }
    kinds = signature(head.project_max, constants, **tiles)
    ptx, usage = compiled(head.project_max, kinds, constants, head.OPTIONS, tmp_path)
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx and "atom." not in ptx
    assert usage["STACK"] == usage["LOCAL"] == 0 < usage["REG"]


@pytest.mark.parametrize(
    ("name", "constants", "options"),
    [
        ("list_by_term", {"BLOCK_B": 8, "BLOCK_V": 32}, {"num_warps": 1}),
        ("list_by_position", {"BLOCK_V": 1024, "BINS": 256}, {"num_warps": 8}),
        ("compressed_rows_product", {"BLOCK_A": 8, "BLOCK_D": 256}, {"num_warps": 1}),
    ],
)
def test_the_backward_kernels_compile_for_hopper_without_spills_and_global_atomics(name, constants, options, tmp_path):
    pytest.importorskip("triton", reason="triton comes with torch for CUDA on Linux")
    from stair.kernels import triton_head as head

    kernel = getattr(head, name)
    ptx, usage = compiled(kernel, signature(kernel, constants, source_ptr="*bf16"), constants, options, tmp_path)
    assert "atom.global" not in ptx
    # triton 3.9 keeps two registers of `list_by_term` on the stack, 3.6 none
    assert usage["STACK"] <= 8 and usage["LOCAL"] == 0 < usage["REG"]


if __name__ == "__main__":
    main()
