"""The compiled row kernels, without a device: what each reads, it has read before it writes.

Several warps read a row's statistics and one writes them. The interpreter runs a program as one
thread, so it cannot show a warp that reads too late; the order of instructions can.
"""

import re

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from stretto.ops.attention import triton as kernels  # noqa: E402

#: All reads, a barrier, then writes.
READ_FIRST = r"l+b[bs]*s"


@triton.jit
def _racy(lse, x, rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, here, at, inside = kernels._places(rows, D, COLUMNS, ROWS)
    old = tl.load(lse + row, here)
    tl.store(lse + row, old + 1.0, here)
    tl.store(x + at, tl.load(x + at, inside) * old[:, None], inside)


def ptx(kernel, width, half):
    """Instructions of a kernel for Hopper; `half`: names of arguments in bfloat16."""
    signature, sizes = {}, {"D": width, "COLUMNS": triton.next_power_of_2(width)}
    sizes["ROWS"] = kernels.TILE // sizes["COLUMNS"]
    for name in kernel.arg_names:
        kind = "*bf16" if name in half else "*fp32"
        signature[name] = "constexpr" if name in sizes else "i32" if name == "rows" else kind
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, k in enumerate(signature.values()) if "*" in k
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def order(text):
    """Global loads (l), stores (s) and barriers (b) as they follow each other."""
    found = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", text)
    return "".join({"ld.global": "l", "st.global": "s", "bar.sync": "b"}[word] for word in found)


@pytest.mark.parametrize("width", [40, 128])
@pytest.mark.parametrize("half", [(), ("part",)])
def test_merge_reads_everything_before_a_barrier_and_writes_after_it(width, half):
    found = order(ptx(kernels._merge, width, half))
    assert re.fullmatch(READ_FIRST, found), found


@pytest.mark.parametrize("name", ["_delta", "_surrogate"])
def test_the_others_write_only_what_they_do_not_read(name):
    found = order(ptx(getattr(kernels, name), 128, ("dout", "out")))
    assert set(found) <= set("lbs")
    assert "l" not in found[found.index("s") :]


def test_a_kernel_that_writes_too_early_is_noticed():
    assert not re.fullmatch(READ_FIRST, order(ptx(_racy, 128, ())))
