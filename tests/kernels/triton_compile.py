"""Compiles what the Triton operations would launch, for GPUs that need not be there.

Run as `python -m tests.kernels.triton_compile ARCH...` with CUDA capabilities such as 90; prints
one JSON line per distinct kernel: its name, the operation, and the matrix instructions it uses.
A process of its own, because compiled and interpreted kernels exclude each other.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from paceline_kernels import AttentionBatch, triton_ops

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*")
_OPTIONS = ("num_warps", "num_stages")


class _Recorder:
    """Stands for a kernel and notes its launches."""

    def __init__(self, function: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self._function = function
        self._launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        names = self._function.arg_names

        def note(*args: Any, **kwargs: Any) -> None:
            self._launches.append((self._function, dict(zip(names, args, strict=False)) | kwargs))

        return note


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Note launches instead of making them."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    replaced = []
    for module in [m for n, m in sys.modules.items() if n.startswith("paceline_kernels.triton_")]:
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                replaced.append((module, name, value))
    for module, name, value in replaced:
        setattr(module, name, _Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def compile_launch(function: Any, args: dict[str, Any], arch: int) -> Any:
    """Compile as Triton does at a launch: numbers of 16 known as such, ones and None fixed."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = args[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    options = {name: args[name] for name in _OPTIONS if name in args}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _attention(dtype: torch.dtype, lengths: list[int], size: int, **kwargs: Any) -> None:
    cu_q = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    is_tree = kwargs.pop("is_tree", False)
    batch = AttentionBatch(
        cu_q=cu_q,
        kv_lens=torch.tensor([n + 2000 for n in lengths], dtype=torch.int32),
        block_tables=torch.zeros(len(lengths), 256, dtype=torch.int32),
        block_size=16,
        max_q=max(lengths),
        cu_tree=cu_q if is_tree else None,
        tree_parents=torch.full((sum(lengths),), -1).int() if is_tree else None,
    )
    pool = torch.empty(1, 2, 2, 8, 16, size, dtype=dtype)
    q_NHD = torch.empty(sum(lengths), 32, size, dtype=dtype)
    triton_ops.paged_attention(q_NHD, pool[:, 1], batch, 0.1, **kwargs)


def operations() -> Iterator[str]:
    """Launch one operation after the other, each followed by its name."""
    x, added = torch.empty(2, 300, 1024, dtype=torch.bfloat16)
    weight = torch.empty(2048, 1024, dtype=torch.bfloat16)
    for rows in (1, 32, 300):
        triton_ops.linear(x[:rows], weight)
        yield f"linear bf16 {rows}"
    triton_ops.linear(x[:1].float(), weight.float())
    yield "linear f32 1"
    for rows in (1, 300):
        triton_ops.linear_silu_mul(x[:rows], weight)
        yield f"gated bf16 {rows}"
        triton_ops.linear_int8(x[:rows], weight.to(torch.int8), torch.empty(2048))
        yield f"linear int8 {rows}"

    _attention(torch.bfloat16, [1] * 4, 128)
    yield "attention bf16 decode"
    _attention(torch.bfloat16, [300], 128)
    yield "attention bf16 prefill"
    _attention(torch.bfloat16, [9], 80, is_tree=True, window=9)
    yield "attention bf16 tree"
    _attention(torch.bfloat16, [1], 256)
    yield "attention bf16 wide"
    _attention(torch.float32, [1], 128)
    yield "attention f32 decode"

    triton_ops.add_rms_norm(x, added, x[0], 1e-5)
    yield "norm"
    triton_ops.silu_mul(x)
    yield "gate"
    q_NHD, table = x.unflatten(1, (8, 128)), torch.empty(99, 2, 128)
    at, pool = torch.empty(300, dtype=torch.int64), torch.empty(9, 2, 8, 16, 128).bfloat16()
    triton_ops.rotary(q_NHD, q_NHD, table, at)
    yield "rotary"
    triton_ops.write_kv(q_NHD, q_NHD, pool, at)
    yield "write"
    triton_ops.rotary_write_kv(q_NHD, q_NHD, q_NHD, table, at, pool, at)
    yield "rotary and write"


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        with recorded() as launches:
            for operation in operations():
                for function, args in launches:
                    compiled = compile_launch(function, args, arch)
                    line = {
                        "arch": arch,
                        "operation": operation,
                        "kernel": function.__name__,
                        "instructions": sorted(set(_MATRIX.findall(compiled.asm["ptx"]))),
                        "shared_bytes": compiled.metadata.shared,
                    }
                    print(json.dumps(line), flush=True)
                launches.clear()


if __name__ == "__main__":
    main()
