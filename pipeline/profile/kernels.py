"""Which int8 kernels onnxruntime takes on a CPU (onnxruntime/core/mlas/lib/platform.cpp). Pure."""

from __future__ import annotations

from collections.abc import Collection

# (needed features, family), the first that fits; /proc/cpuinfo's names
X86 = (
    ({"amx_int8", "avx512_vnni"}, "AMX tiles (U8S8), VNNI for the rest; exact"),
    ({"avx512_vnni"}, "AVX-512 VNNI; exact"),
    ({"avx_vnni"}, "AVX-VNNI; exact"),
    ({"avx512bw", "avx512vl"}, "AVX-512 VPMADDUBSW; 8-bit weights saturate"),
    ({"avx2"}, "AVX2 VPMADDUBSW; 8-bit weights saturate"),
)
ARM = (
    ({"i8mm", "asimddp"}, "i8mm (UMMLA, SMMLA); exact"),
    ({"asimddp"}, "dotprod (UDOT, SDOT); exact"),
    ({"asimd"}, "NEON without dotprod; exact, slower"),
)


def int8_kernels(arch: str, features: Collection[str]) -> str:
    """The family, and whether its products are exact."""
    arm = arch in ("aarch64", "arm64")
    for needed, family in ARM if arm else X86:
        if needed <= set(features):
            return family
    return "generic"
