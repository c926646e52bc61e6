"""What the machine code of the CUDA kernels contains: the instructions that they were written for, and no others.

ptxas's own numbers are in test_cuda_build.py. Disassembling takes 6 seconds of two cores.
"""

import sys

import pytest
from paths import BENCHMARKS

FOLDER = BENCHMARKS / "gpu"
sys.path.insert(0, str(FOLDER))
import resources_cuda  # noqa: E402
from resources_cuda import Missing  # noqa: E402

try:
    from ffattr._build_info import BUILD
except ImportError:
    BUILD = {}

# As cuobjdump prints it, but short: a loop that ends by a call in a loop whose barrier is tried again behind the
# kernel's end; a group of products that is closed by one into RZ; padding, and a load that never happens.
SASS = """
Fatbin elf code:
================
arch = sm_90a

		Function : _ZN6ffattr4cuda49_GLOBAL__N__0fb75e1b_16_ff_norms_sm90_cu_37def9476directILi1EEEvi
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!PT LDS RZ, [RZ] ;                             /* 0x00000000fffff984 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R17], [R8.64], !P0 ;  /* 0x0000000008117fae */
        /*0030*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/                   LDG.E.64 R4, [R2.64] ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17], R198 ;
        /*0060*/              @!P0 BRA 0x150 ;
        /*0070*/                   WARPGROUP.ARRIVE ;
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24 ;
        /*0090*/                   HGMMA.64x256x16.F32.BF16 R24, R188, gdesc[UR16].tnspB, R24, gsb0 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR16].tnspB, R152, UP1, gsb0 ;
        /*00b0*/               @P0 CALL.REL.NOINC 0xc8 ;
        /*00c0*/                   BRA 0xa0 ;
        /*00c8*/                   NOP ;
        /*00d0*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;
        /*00e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00f0*/                   LDL R3, [R1] ;
        /*00f8*/              @!P0 BRA P1, 0x50 ;
        /*0100*/                   STL.64 [R1+0x8], R4 ;
        /*0110*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0120*/                   UTMALDG.3D.MULTICAST [UR8], [UR24], UR16 ;
        /*0130*/                   UTMALDG.3D [UR16], [UR24] ;
        /*0140*/                   EXIT ;
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17], R7 ;
        /*0160*/              @!P0 BRA 0x150 ;
        /*0170*/                   BRA 0x70 ;
        /*0180*/                   BRA 0x180;
        /*0190*/                   NOP;
		Function : straight
        /*0000*/                   HMMA.16816.F32.BF16 R80, R156.reuse, R184, R80 ;
        /*0010*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
        /*0020*/                   EXIT ;
"""


def test_the_parser():
    kernels = dict(resources_cuda.functions(SASS.splitlines()))
    assert [len(code) for code in kernels.values()] == [28, 3]
    assert [resources_cuda.counted(code).instructions for code in kernels.values()] == [25, 3]
    assert resources_cuda.SOURCE.search(next(iter(kernels)))[1] == "ff_norms_sm90"
    looped, straight = map(resources_cuda.counted, kernels.values())
    assert straight.matrix == {"HMMA.16816": 1}
    assert (straight.loop, straight.loop_matrix) == (0, {})
    assert looped.matrix == {"HGMMA.64x256x16": 2, "HGMMA.64x64x16": 1}
    assert (looped.copies, looped.tma_loads, looped.multicast) == (1, 2, 1)
    assert (looped.loads, looped.stores) == (1, 1)
    assert (looped.local, looped.local_in_loops) == (2, 1)
    assert (looped.loop, looped.loop_matrix, looped.loop_waits) == (15, {"HGMMA.64x256x16": 2}, 1)


def test_loops():
    """The branch back from behind the end closes none, and what it comes from is part of the one it returns to."""
    code = next(resources_cuda.functions(SASS.splitlines()))[1]
    found = [sorted(code[i].address for i in loop) for loop in resources_cuda.loops(code)]
    outer = sorted([*range(0x50, 0x100, 0x10), 0xC8, 0xF8, 0x150, 0x160, 0x170])
    assert sorted(found) == sorted([outer, [0xA0, 0xB0, 0xC0], [0x150, 0x160], [0x180]])


def test_it_says_why_there_is_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ffattr._build_info", None)
    assert resources_cuda.show() == []
    assert capsys.readouterr().out == "No CUDA kernels: the package is not built\n"


@pytest.fixture(scope="module")
def rows():
    """Of ff_norms for all GPUs, and of ig_slope for one: that is compiled from the same vectors everywhere."""
    if not BUILD.get("cuda"):
        pytest.skip(BUILD.get("cuda_reason", "the package was not built with CUDA kernels"))
    try:
        resources_cuda.find_cuobjdump()
    except Missing as missing:
        pytest.skip(str(missing))
    found, missing = resources_cuda.rows(sources=("ff_norms_sm80.cu", "ff_norms_sm90.cu"))
    assert not missing
    if any(record["source"] == "ig_slope.cu" for record in BUILD["kernels"]):
        oldest = resources_cuda.capability(BUILD["architectures"][0])
        more, missing = resources_cuda.rows([oldest], ["ig_slope.cu"])
        assert not missing
        found += more
    return found


def _of(rows, source):
    found = [row for row in rows if row["source"] == source]
    if not found:
        pytest.skip(f"{source} is not in the build")
    return found


def _names(rows):
    return [f"{row['source']}, sm_{row['architecture']}, {row['kernel']}" for row in rows]


def _kinds(row):
    return {shape.split(".")[0] for shape in row["matrix"]}


def test_warp_wide_kernels(rows):
    """Products of tensor cores, and asynchronous copies of 16 bytes."""
    found = _of(rows, "ff_norms_sm80.cu")
    assert {row["architecture"] for row in found} == set(BUILD["architectures"])
    assert not _names(row for row in found if _kinds(row) != {"HMMA"} or not row["copies"])


def test_hopper_kernels(rows):
    """Products of warpgroups, of float8 too, and TMA to both blocks of a cluster."""
    found = _of(rows, "ff_norms_sm90.cu")
    wrong = [
        row
        for row in found
        if _kinds(row) != ({"HGMMA", "QGMMA"} if "Float8" in row["kernel"] else {"HGMMA"})
        or not 0 < row["multicast"] < row["tma_loads"]
    ]
    assert not _names(wrong)


def test_hopper_waits_once_for_a_slab(rows):
    """`o += p @ down` of a slab of neurons is in flight with the next `z`: one wait for all."""
    for row in _of(rows, "ff_norms_sm90.cu"):
        dtype, streams, columns = row["kernel"].removeprefix("direct<").removesuffix(">").split(", ")
        kind, depth = ("QGMMA", 32) if dtype == "Float8" else ("HGMMA", 16)
        shape = f"{kind}.64x{columns}x{depth}"
        assert row["loop_waits"], _names([row])
        slab = 64 if kind == "QGMMA" else 64 // int(streams)
        assert row["loop_matrix"][shape] == row["loop_waits"] * slab // depth, _names([row])


def test_no_local_memory(rows):
    assert not _names(row for row in rows if row["source"].startswith("ff_norms") and row["local"])


def test_slopes_come_in_vectors(rows):
    assert not _names(row for row in _of(rows, "ig_slope.cu") if not (row["loads"] and row["stores"]))
