"""How setup.py decides what to build, and how csrc/build_cuda.py compiles: with an nvcc that only pretends."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

pytest.importorskip("setuptools")

KNOWN = ("75", "80", "86", "90", "100", "120")


def _setup():
    """setup.py as a module: nothing is built, because it does not run as __main__."""
    module = ModuleType("setup")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), module.__file__, "exec"), module.__dict__)
    return module


setup = _setup()
build_cuda = setup.build_cuda


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CPU", "CUDA", "SANITIZE"):
        monkeypatch.delenv(f"FFATTR_{name}", raising=False)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


class Nvcc:
    """A toolkit in a folder: nvcc is a wrapper that lies elsewhere, as some systems have it, and compiles nothing."""

    def __init__(self, folder, monkeypatch):
        self.toolkit = folder / "cuda"
        self.calls = folder / "calls"
        self.log = folder / "log"
        self.path = folder / "bin" / "nvcc"
        self.monkeypatch = monkeypatch
        for path in (self.toolkit / "lib64", self.toolkit / "bin", self.path.parent):
            path.mkdir(parents=True)
        (self.toolkit / "lib64" / "libcudart_static.a").touch()
        self.log.touch()
        self.write()
        monkeypatch.setenv("PATH", f"{self.path.parent}{os.pathsep}{os.environ['PATH']}")

    def write(self, version="13.0", while_compiling="true", status=0):
        self.path.write_text(
            f"""#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_100\\n' ;;
  --dryrun*) echo "#\\$ TOP={self.toolkit}/bin/.." >&2 ;;
  *)
    echo "$*" >> {self.calls}
    while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
    {while_compiling}
    cat {self.log} >&2
    exit {status}
    ;;
esac
"""
        )
        self.path.chmod(0o755)

    @property
    def compiled(self):
        """Names of the files that were compiled since the last time this was asked."""
        calls = self.calls.read_text().split() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return sorted(Path(word).name for word in calls if word.endswith(".cu"))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    return Nvcc(tmp_path, monkeypatch)


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


# ---- what is built


@pytest.mark.parametrize("name", ["FFATTR_CPU", "FFATTR_CUDA"])
def test_settings(name, monkeypatch):
    assert setup.setting(name) == "auto"
    for value, expected in (("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        monkeypatch.setenv(name, value)
        assert setup.setting(name) == expected
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name}='yes': expected auto, 0 or 1"):
        setup.setting(name)


def test_a_compiler_that_works_is_used():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert setup.decide() == (True, f"C++ compiler {shutil.which('c++')}")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "exit code 1: no message"),
        ("echo 'x.cpp:1: error: concepts: No such file' >&2; exit 2", "exit code 2: x"),
    ],
    ids=["broken", "too old"],
)
def test_a_compiler_that_does_not_work_is_none(script, said, monkeypatch, tmp_path):
    """Plain PyTorch then, as without one, in one line that says what is wrong with it."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    build, reason = setup.decide()
    assert not build
    assert reason.startswith(f"{compiler} compiles no C++20 ({said}")
    monkeypatch.setenv("FFATTR_CPU", "1")
    with pytest.raises(SystemExit, match=r"FFATTR_CPU=1, but .* compiles no C"):
        setup.decide()


def test_sanitizers(monkeypatch):
    assert setup.sanitize_flags() == []
    monkeypatch.setenv("FFATTR_SANITIZE", "address,undefined")
    flags = setup.sanitize_flags()
    assert flags[0] == "-fsanitize=address,undefined"
    assert "-fno-sanitize-recover=all" in flags, "a mistake of the second kind would be a line in a log"
    monkeypatch.setenv("FFATTR_SANITIZE", "address,thread")
    with pytest.raises(SystemExit, match="'thread' is not one of address, undefined"):
        setup.sanitize_flags()


def test_cuda_by_itself_needs_nvcc_and_a_torch_with_cuda(nvcc):
    toolkit, reason = setup.decide_cuda(True, "2.13.0+cu130", "13.0")
    assert toolkit.nvcc == str(nvcc.path)
    assert reason == f"nvcc 13.0 at {nvcc.path}"
    toolkit, reason = setup.decide_cuda(True, "2.13.0+cpu", None)
    assert toolkit is None
    assert "torch 2.13.0+cpu is built without CUDA" in reason
    assert "FFATTR_CUDA=1" in reason


@pytest.mark.usefixtures("no_nvcc")
def test_cuda_by_itself_without_nvcc(tmp_path):
    toolkit, reason = setup.decide_cuda(True, "2.13.0+cu130", "13.0")
    assert toolkit is None
    assert reason == f"there is no {tmp_path}/bin/nvcc (CUDA_HOME is set)"


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_cuda_that_is_asked_for_needs_nvcc_alone(torch_cuda, nvcc, monkeypatch):
    monkeypatch.setenv("FFATTR_CUDA", "1")
    assert setup.decide_cuda(True, "2.13.0", torch_cuda)[0].version == "13.0"
    nvcc.write(version="11.8")
    with pytest.raises(SystemExit, match=r"is 11\.8, and C\+\+20 needs 12\.0"):
        setup.decide_cuda(True, "2.13.0", torch_cuda)


@pytest.mark.usefixtures("no_nvcc")
def test_cuda_that_is_asked_for_without_nvcc(monkeypatch):
    monkeypatch.setenv("FFATTR_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FFATTR_CUDA=1, but there is no .*install the CUDA toolkit or set CUDA_HOME"):
        setup.decide_cuda(True, "2.13.0", "13.0")


@pytest.mark.usefixtures("nvcc")
def test_no_cuda_without_the_extension(monkeypatch):
    toolkit, reason = setup.decide_cuda(False, "2.13.0", "13.0")
    assert toolkit is None
    assert "is not built" in reason
    monkeypatch.setenv("FFATTR_CUDA", "1")
    with pytest.raises(SystemExit, match="leave FFATTR_CPU unset"):
        setup.decide_cuda(False, "2.13.0", "13.0")


@pytest.mark.usefixtures("nvcc")
def test_no_cuda_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setenv("FFATTR_CUDA", "0")
    assert setup.decide_cuda(True, "2.13.0", "13.0") == (None, "FFATTR_CUDA=0")


# ---- the toolkit


def test_the_toolkit_is_where_nvcc_says(nvcc):
    toolkit = build_cuda.find_toolkit()
    assert toolkit.folder == nvcc.toolkit
    assert toolkit.libraries == nvcc.toolkit / "lib64"
    assert toolkit.architectures == {"80", "90", "100"}


def test_cuda_home_comes_first(nvcc, tmp_path, monkeypatch):
    shutil.copy(nvcc.path, nvcc.toolkit / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.toolkit))
    assert build_cuda.find_toolkit().nvcc == str(nvcc.toolkit / "bin" / "nvcc")


def test_libraries_of_a_target(nvcc):
    target = nvcc.toolkit / "targets" / "x86_64-linux" / "lib"
    target.mkdir(parents=True)
    (nvcc.toolkit / "lib64" / "libcudart_static.a").rename(target / "libcudart_static.a")
    assert build_cuda.find_toolkit().libraries == target


def test_toolkits_that_cannot_be_used(nvcc):
    (nvcc.toolkit / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(build_cuda.NoToolkit, match=r"has no libcudart_static\.a"):
        build_cuda.find_toolkit()
    nvcc.path.write_text("#!/bin/sh\necho broken wrapper\nexit 3\n")
    with pytest.raises(build_cuda.NoToolkit, match="--version failed: broken wrapper"):
        build_cuda.find_toolkit()


# ---- architectures


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["80", "90a", "100"]),
        (" ; ", ["80", "90a", "100"]),
        ("8.0;9.0a 10.0+PTX", ["80", "90a", "100"]),
        ("10.0 8.6", ["86", "100"]),
        ("9.0", ["90a"]),
        ("9.0;9.0a;9.0+PTX", ["90a"]),
        ("12.0f;12.0", ["120", "120f"]),
    ],
)
def test_architectures(asked, expected):
    assert build_cuda.pick_architectures(asked, KNOWN) == (expected, [])


def test_an_old_nvcc_leaves_out_new_defaults():
    picked, remarks = build_cuda.pick_architectures(None, ("80", "90"))
    assert picked == ["80", "90a"]
    assert remarks == ["no CUDA kernels for sm_100: this nvcc does not know it"]


def test_old_gpus_are_left_out():
    picked, remarks = build_cuda.pick_architectures("7.5 8.0", KNOWN)
    assert picked == ["80"]
    assert remarks == ["no CUDA kernels for sm_75: they need sm_80 or newer"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("Hopper", "'Hopper' is not an architecture; expected numbers, not names"),
        ("8.0;90a", "'90a' is not an architecture"),
        ("8.0,9.0", "'8.0,9.0' is not an architecture"),
        ("8.0;13.0", "this nvcc does not know sm_130; it knows 75, 80, 86"),
        ("7.0", "need sm_80 or newer"),
    ],
)
def test_architectures_that_cannot_be(asked, message):
    with pytest.raises(SystemExit, match=message):
        build_cuda.pick_architectures(asked, KNOWN)


@pytest.mark.parametrize(
    ("architectures", "codes", "codes_sm90"),
    [
        (["80", "90a", "100"], ["80 sm_80", "90a sm_90a", "100 [compute_100,sm_100]"], ["90a sm_90a"]),
        (["80", "90a"], ["80 [compute_80,sm_80]", "90a sm_90a"], ["90a sm_90a"]),
        (["90a"], ["90a sm_90a", "90 compute_90"], ["90a sm_90a"]),
        (["80"], ["80 [compute_80,sm_80]"], []),
    ],
)
def test_what_each_file_is_compiled_for(architectures, codes, codes_sm90):
    for name, expected in (("ff_norms.cu", codes), ("ff_norms_sm90.cu", codes_sm90)):
        flags = build_cuda.code_flags(Path(name), architectures)
        assert set(flags[::2]) <= {"-gencode"}
        pairs = [code.split() for code in expected]
        assert flags[1::2] == [f"arch=compute_{virtual},code={code}" for virtual, code in pairs]


# ---- compiling


@pytest.fixture
def tree(tmp_path):
    """Sources for two files, one of them for sm_90a alone, and a header."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("tile.cu", "tile_sm90.cu", "tile.cuh"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    return tmp_path


@pytest.fixture
def make(tree, nvcc):
    """Compiles what is not current; returns the objects."""

    def make(architectures=("80", "90a"), torch_version="2.13.0"):
        toolkit, csrc = build_cuda.find_toolkit(), tree / "csrc"
        objects = build_cuda.objects(toolkit, csrc, tree / "objects", architectures, "/torch/include", torch_version)
        build_cuda.make_all(objects, [csrc / "cuda" / "tile.cuh"])
        return objects

    return make


def _save(path):
    os.utime(path, (time.time(), time.time()))


def test_the_command(make, nvcc, tree):
    first, second = make()
    assert first.path == tree / "objects" / "cuda" / "tile.o"
    assert first.command[:5] == [str(nvcc.path), "-c", str(tree / "csrc/cuda/tile.cu"), "-o", str(first.path)]
    assert first.command[first.command.index("-isystem") + 1] == "/torch/include"
    assert {"-std=c++20", "-DTORCH_STABLE_ONLY"} <= set(first.command)
    assert first.command[-4:] == build_cuda.code_flags(first.source, ["80", "90a"])
    assert second.command[-1] == "arch=compute_90a,code=sm_90a"
    assert not any("FFATTR_NO_SM90" in word or "-ccbin" in word for word in first.command)
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]


def test_both_compilers_use_the_same_stable_abi():
    macros = [[flag for flag in flags if "TORCH" in flag] for flags in (setup.COMPILE_FLAGS, build_cuda.COMPILE_FLAGS)]
    assert macros[0] == macros[1]


def test_without_sm90_its_files_are_left_out(make, nvcc):
    (only,) = make(["80"])
    assert "-DFFATTR_NO_SM90" in only.command
    assert nvcc.compiled == ["tile.cu"]


def test_the_host_compiler_is_that_of_the_extension(make, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "nvcc"))  # something that runs
    assert make()[0].command.count("-ccbin") == 1


def test_nothing_is_compiled_twice(make, nvcc, capsys):
    make()
    nvcc.calls.unlink()
    make()
    assert nvcc.compiled == []
    assert "0 of 2 CUDA files to compile" in capsys.readouterr().out


def test_what_changed_is_compiled_again(make, nvcc, tree):
    objects = make()
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]
    _save(tree / "csrc" / "cuda" / "tile.cu")
    make()
    assert nvcc.compiled == ["tile.cu"]
    _save(tree / "csrc" / "cuda" / "tile.cuh")
    make()
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]
    make(["80", "90a", "100"])  # another command for one of them
    assert nvcc.compiled == ["tile.cu"]
    make(["80", "90a", "100"], torch_version="2.14.0")  # other headers in the same place
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]
    objects[0].log.unlink()  # the record is made of it
    make(["80", "90a", "100"], torch_version="2.14.0")
    assert nvcc.compiled == ["tile.cu"]


def test_a_source_saved_while_it_is_compiled_counts_as_changed(make, nvcc, tree):
    nvcc.write(while_compiling=f"sleep 0.1; touch {tree}/csrc/cuda/tile.cu")
    make()
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]
    nvcc.write()
    make()
    assert nvcc.compiled == ["tile.cu"]


def test_failures_show_the_command_and_what_nvcc_said(make, nvcc):
    nvcc.log.write_text("tile.cu(3): error: identifier is undefined\n")
    nvcc.write(status=1)
    with pytest.raises(SystemExit, match="nvcc failed on tile") as raised:
        make()
    assert f"{nvcc.path} -c " in str(raised.value)
    assert "error: identifier is undefined" in str(raised.value)
    nvcc.write()
    assert nvcc.compiled
    make()
    assert nvcc.compiled == ["tile.cu", "tile_sm90.cu"]  # a failure leaves nothing that counts as made


def test_warnings_of_the_compiler_are_shown(make, nvcc, capsys):
    nvcc.log.write_text(f"{LOG}tile.cu(3): warning: variable is unused\n")
    make()
    shown = capsys.readouterr().out
    assert "tile.cu(3): warning: variable is unused" in shown
    assert "(C7511)" in shown
    assert "registers, used" not in shown
    assert "stack frame" not in shown


def test_jobs(monkeypatch):
    assert 1 <= build_cuda.job_count() <= (os.cpu_count() or 1)
    monkeypatch.setattr(build_cuda, "MEMORY_PER_JOB", 1 << 60)
    assert build_cuda.job_count() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build_cuda.job_count() == 7


# ---- what ptxas reports

# Of nvcc 13.0: a kernel that uses shared memory, one that calls a function, one that spills, one of wgmma.
LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b5scaleIfLi64EEEvPT_PKS3_' for 'sm_80'
ptxas info    : Function properties for _ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b5scaleIfLi64EEEvPT_PKS3_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 256 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 2.105 ms
ptxas info    : Compiling entry function '_ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b7callingEPfi' for 'sm_80'
ptxas info    : Function properties for _ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b7callingEPfi
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 256 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 19.913 ms
ptxas info    : Function properties for _ZN34_INTERNAL_327206cb_4_s_cu_bcc7031b6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b4lastEPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b8spillingEPfPKfi' for 'sm_80'
ptxas info    : Function properties for _ZN6ffattr4cuda36_GLOBAL__N__327206cb_4_s_cu_bcc7031b8spillingEPfPKfi
    584 bytes stack frame, 720 bytes spill stores, 924 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 584 bytes cumulative stack size, 372 bytes cmem[0]
ptxas info    : Compile time = 37.857 ms
ptxas info    : (C7519) warpgroup.arrive is injected in around line 48 by compiler to allow use of registers in GMMA in function '_ZN6ffattr4cuda6serialILi3EEEvPfmm'
ptxas info    : (C7519) warpgroup.arrive is injected in around line 59 by compiler to allow use of registers in GMMA in function '_ZN6ffattr4cuda6serialILi3EEEvPfmm'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function '_ZN6ffattr4cuda6serialILi3EEEvPfmm'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6ffattr4cuda7callingILi4EEEvPfmm' for 'sm_90a'
ptxas info    : Function properties for _ZN6ffattr4cuda7callingILi4EEEvPfmm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 5.682 ms
ptxas info    : Compiling entry function '_ZN6ffattr4cuda6serialILi3EEEvPfmm' for 'sm_90a'
ptxas info    : Function properties for _ZN6ffattr4cuda6serialILi3EEEvPfmm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 3.785 ms
"""  # noqa: E501
NUMBERS = ("registers", "stack", "spill_stores", "spill_loads", "shared", "barriers")


def test_the_report():
    records = build_cuda.read_report(LOG, "tile.cu")
    assert {record["source"] for record in records} == {"tile.cu"}
    assert [record["architecture"] for record in records] == ["80", "80", "80", "90a", "90a"]
    assert [tuple(record[name] for name in NUMBERS) for record in records] == [
        (12, 0, 0, 0, 256, 1),
        (40, 256, 0, 0, 0, 0),
        (32, 584, 720, 924, 0, 1),
        (30, 0, 0, 0, 0, 0),
        (30, 0, 0, 0, 0, 0),
    ]
    assert [len(record["warnings"]) for record in records] == [0, 0, 0, 0, 2]
    assert "wgmma.mma_async instructions are serialized" in records[-1]["warnings"][1]


def test_a_function_that_is_called_counts_with_its_caller():
    before, after = LOG.split("barriers, 256 bytes cumulative", 1)
    after = after.replace("0 bytes stack frame, 0 bytes spill stores", "0 bytes stack frame, 8 bytes spill stores", 1)
    records = build_cuda.read_report(f"{before}barriers, 256 bytes cumulative{after}", "tile.cu")
    assert records[1]["spill_stores"] == 8


def test_reports_of_other_releases():
    log = """
ptxas info    : Compiling entry function 'tile' for 'sm_80'
ptxas info    : Function properties for tile
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, 4096 bytes smem, 380 bytes cmem[0]
ptxas warning : Value of threads per SM for entry tile is out of range. .minnctapersm will be ignored
"""
    (record,) = build_cuda.read_report(log, "tile.cu")
    assert tuple(record[name] for name in NUMBERS) == (24, 0, 0, 0, 4096, None)
    assert record["warnings"] == [log.splitlines()[-1]]


def test_a_log_without_kernels():
    assert build_cuda.read_report("ptxas info    : 0 bytes gmem\n", "tile.cu") == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no demangler")
def test_names_are_short(tmp_path):
    names = {record["kernel"] for record in build_cuda.read_report(LOG, "tile.cu")}
    readable = build_cuda.demangled(sorted(names), tmp_path)
    assert sorted(readable.values()) == ["calling", "calling<4>", "scale<float, 64>", "serial<3>", "spilling"]


def test_names_without_a_demangler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_cuda.demangled(["_Z1kv"], tmp_path) == {"_Z1kv": "_Z1kv"}


def test_the_record_is_of_every_object(make, nvcc):
    nvcc.log.write_text(LOG)
    objects = make()
    records = build_cuda.kernels(make(), nvcc.toolkit)  # the second time nothing is compiled
    assert len(records) == 5 * len(objects)
    assert records == build_cuda.kernels(objects[::-1], nvcc.toolkit)
    assert [record["source"] for record in records] == ["tile.cu"] * 5 + ["tile_sm90.cu"] * 5


# ---- what is handed on


def test_an_sdist_has_every_source(tmp_path):
    """What setuptools finds out by itself: the repository has no list of files."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    environment = {**os.environ, "FFATTR_CUDA": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = set((tmp_path / "ffattr.egg-info" / "SOURCES.txt").read_text().split("\n"))
    wanted = {path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")}
    assert {str(path.relative_to(ROOT)) for path in wanted} <= listed
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= listed
