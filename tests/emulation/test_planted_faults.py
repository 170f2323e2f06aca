"""Faults planted in the text of the kernels: each must be seen, in every order of threads."""

import ctypes
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulation.build import CSRC, emulation_works, library_of
from emulation.sanitized import run_sanitized

pytestmark = pytest.mark.skipif(not emulation_works(), reason="the emulation needs g++ on x86-64")

T, C, R = 130, 264, 24  # tokens, columns, rank
ENTRIES = {
    "adapter_shrink": "adapter_shrink(x, factor, Factor::kRankFirst, out, t, c, r, 512, 1.0f, none, nullptr)",
    "adapter_expand": "adapter_expand(u, factor, Factor::kRankFirst, wide, t, c, r, 1.0f, none, nullptr)",
    "adapter_factor_gradient": "adapter_factor_gradient(u, x, Factor::kRankFirst, out, t, c, r, 512, 1.0f, none, "
    "nullptr)",
    "adapter_output_gradients": "adapter_output_gradients(x, u, factor, out, more, t, c, r, 512, 1.0f, nullptr)",
}
ARGUMENTS = (
    "const c10::BFloat16* x, const float* u, const c10::BFloat16* factor, float* out, float* more, "
    "c10::BFloat16* wide, int64_t t, int64_t c, int64_t r"
)
FIRST_BARRIER = r"    __syncthreads\(\);\n(?=    (for|const Tiles now))"
SECOND_BARRIER = r"    __syncthreads\(\);  // all threads have read.*\n"
WAIT = r"    wait_copies<\d>\(\);\n"
# Kernel, what is planted, file, pattern, replacement.
FAULTS = [
    ("adapter_shrink", "barrier before the products removed", ".cu", FIRST_BARRIER, ""),
    ("adapter_shrink", "barrier after the products removed", ".cu", SECOND_BARRIER, ""),
    ("adapter_shrink", "wait removed", ".cu", WAIT, ""),
    ("adapter_shrink", "index off by one", ".cu", r"out\[token \* rank \+ i\]", "out[token * rank + i + 1]"),
    ("adapter_shrink", "wrong stride", ".cu", r"out\[token \* rank", "out[token * (rank - 1)"),
    ("adapter_shrink", "operand of the wrong side", "cuda_product.cuh", r"down_first \? first : second", "first"),
    ("adapter_expand", "wait removed", ".cu", WAIT, ""),
    ("adapter_factor_gradient", "barrier before the products removed", ".cu", FIRST_BARRIER, ""),
    ("adapter_output_gradients", "barrier after the products removed", ".cu", SECOND_BARRIER, ""),
    ("adapter_output_gradients", "wrong stride", ".cu", r"\* kWarpColumns \+ i \* 16, k", "* 16 + i * 16, k"),
]
# What only shows in memory beside the results: seen by AddressSanitizer.
MEMORY_FAULTS = [
    ("adapter_shrink", "one row too many written", ".cu", r"token < x\.rows", "token <= x.rows"),
    ("adapter_shrink", "shared memory for one stage", ".cu", r"2 \* ShrinkStage<", "ShrinkStage<"),
]
SOUND = [(kernel, "sound", ".cu", r"\A", "") for kernel in ENTRIES]


def planted(folder: Path, kernel: str, file: str, pattern: str, replacement: str) -> Path:
    """A copy of the kernel's sources with one fault, for bf16 alone, and a C function that runs it."""
    for source in [*CSRC.glob("*.*h"), CSRC / f"{kernel}.cu"]:
        shutil.copy(source, folder)
    faulty = folder / (f"{kernel}.cu" if file == ".cu" else file)
    text, count = re.subn(pattern, replacement, faulty.read_text())
    assert count == 1, f"{pattern} is {count} times in {faulty.name}"
    faulty.write_text(text)
    source = folder / f"{kernel}.cu"
    text = re.sub(r"\ntemplate void [^;]*;", "", source.read_text())
    source.write_text(
        f"{text}\nusing namespace megatron_step;\n"
        f'extern "C" int run({ARGUMENTS}) {{\n'
        f"  const Dropout none(0, 0, 0, 0);\n"
        f"  try {{ {ENTRIES[kernel]}; }} catch (const std::exception&) {{ return 1; }}\n  return 0;\n}}\n"
    )
    return source


def error_of(library: ctypes.CDLL, kernel: str) -> float:
    """The largest difference to the right results as a share of the largest of those; infinite for NaN or a refusal."""
    torch.manual_seed(0)
    x, u = torch.randn(T, C).bfloat16(), torch.randn(T, R).bfloat16().float()
    factor = torch.randn(C, R) if kernel == "adapter_output_gradients" else torch.randn(R, C)
    factor = factor.bfloat16()
    # Room for an index that is off, so that the fault shows in the results and not as a crash.
    out, more, wide = torch.zeros(2 * T, C), torch.zeros(2 * T, C), torch.zeros(2 * T, C).bfloat16()
    tensors = [ctypes.c_void_p(t.data_ptr()) for t in (x, u, factor, out, more, wide)]
    if library.run(*tensors, *(ctypes.c_int64(size) for size in (T, C, R))):
        return float("inf")
    x, factor = x.double(), factor.double()
    results = {
        "adapter_shrink": lambda: [(out, x @ factor.t())],
        "adapter_expand": lambda: [(wide, u.double() @ factor)],
        "adapter_factor_gradient": lambda: [(out, u.double().t() @ x)],
        "adapter_output_gradients": lambda: [
            (out, x[:, :256] @ factor[:256]),
            (out.flatten()[T * R :], x[:, 256:] @ factor[256:]),
            (more, x.t() @ u.double()),
        ],
    }[kernel]()
    errors = [
        ((got.flatten()[: right.numel()].double() - right.flatten()).abs().max() / right.abs().max()).item()
        for got, right in results
    ]
    return float("inf") if any(error != error for error in errors) else max(errors)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The library of every kernel with every fault, by kernel and fault; compiled two at a time."""

    def compiled(case: tuple[str, ...]) -> tuple[tuple[str, str], Path]:
        source = planted(tmp_path_factory.mktemp("planted"), case[0], *case[2:])
        return case[:2], library_of(source, sanitized=case in MEMORY_FAULTS)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compiled, SOUND + FAULTS + MEMORY_FAULTS))


def errors_in_every_order(path: Path, kernel: str) -> list[float]:
    library = ctypes.CDLL(str(path))
    errors = []
    for order in range(3):
        library.set_order(order)
        errors.append(error_of(library, kernel))
    return errors


@pytest.mark.parametrize("kernel", ENTRIES)
def test_without_a_fault_results_are_right_in_every_order(libraries, kernel):
    assert max(errors_in_every_order(libraries[kernel, "sound"], kernel)) < 2**-8  # bf16


@pytest.mark.parametrize(("kernel", "fault"), [case[:2] for case in FAULTS], ids=lambda value: value)
def test_a_planted_fault_is_seen(libraries, kernel, fault):
    assert min(errors_in_every_order(libraries[kernel, fault], kernel)) > 0.1


PROGRAM = """
import ctypes, sys
t, c, r = 70, 264, 24
sizes = [2 * t * c, 4 * t * r, 2 * c * r, 4 * t * r, 0, 0]
run = ctypes.CDLL(sys.argv[1]).run
run(*((ctypes.c_char * size)() for size in sizes), *map(ctypes.c_int64, (t, c, r)))
print("computed")
"""


@pytest.mark.parametrize(("kernel", "fault"), [case[:2] for case in MEMORY_FAULTS], ids=lambda value: value)
def test_a_planted_access_outside_of_memory_is_seen(libraries, kernel, fault):
    done = run_sanitized("-c", PROGRAM, str(libraries[kernel, fault]))
    assert done.returncode != 0, fault
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
