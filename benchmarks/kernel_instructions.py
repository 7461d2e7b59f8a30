"""Machine instructions per element of the Triton kernels, counted in the GPU's own code. Needs Triton >= 3.4, but no GPU.

    python benchmarks/kernel_instructions.py --capability 90

Counted is the straight code by which a lane works on whole programs: what a lane executes once is spread over its elements.
No-ops and the subroutines for rare numbers inside sqrt.rn and div.rn are left out, the instructions that would call them are
not. A multiprocessor starts 128 lane instructions a cycle, of them 64 (compute capability 8.0) or 128 multiply-adds and 64
integer ones. The slowest of the three gives an element's cycles; cycles / (multiprocessors * clock) is a floor for its time.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

OPERATIONS = ("noise", "perturb", "update", "perturb_signs", "update_signs")
SIGN_OPERATIONS = OPERATIONS[3:]
POINTERS = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "int8": "i8", "none": None}
INTEGERS = {"num_full", "tail", "pair_low", "pair_high", "key0", "key1", "step", "num_older"} | {
    "skip", "stop", "block_low", "block_high", "direction", "negative"
}  # fmt: skip
INTEGER = "integer, logic, compare, select"
UNITS = {
    "multiply-add": r"FMUL|FADD|FFMA|IMAD|HFMA2",
    INTEGER: (r"LOP3|IADD3|VIADD|LEA|SHF|SGXT|PRMT|SEL|FSEL|ISETP|FSETP|PLOP3|IMNMX|VIMNMX|FMNMX|MOV|I2FP|FCHK"),
    "special function, conversion": r"MUFU|I2F|F2I|F2F",
    "memory": r"LDG|STG|LDC|ULDC|LDS|STS",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100 and H200 (default: %(default)s)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="(default: all)")
    return parser.parse_args()


def opcodes(operation: str, weights: str, momentum: str, replay: bool, capability: int) -> Counter:
    """How often each opcode occurs in a whole kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ds_zoadamu.kernels import signs_jit, triton_common, triton_jit, triton_signs
    from ds_zoadamu.kernels import triton as host

    signs = operation in SIGN_OPERATIONS
    kernel = getattr(signs_jit if signs else triton_jit, f"{operation}_kernel")
    pointers = dict.fromkeys(("xi1", "xi2"), "fp32") | dict.fromkeys(("out", "weight"), POINTERS[weights])
    pointers |= {"momentum": POINTERS[momentum], "table": "fp32" if signs else "i32" if replay else None}
    constants = {
        "STOCHASTIC": not signs or weights != "fp32", "FLIP": True, "NORMALIZE": True, "WRITE_WEIGHT": True, "REPLAY": replay,
        "ODD": 0, "WORDS": True, "FAST_ROOT": True, "BLOCK": host._BLOCK, "CHUNKS": host._CHUNKS,
        "MASKED": False, "LANES": triton_signs._LANES, "ROWS": 1,
    }  # fmt: skip
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or pointers.get(name, "") is None:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        elif name in pointers:
            signature[name], hints[(i,)] = "*" + pointers[name], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
    options = triton_common.compile_options(divides=operation == "update")
    source = ASTSource(kernel, signature, values, hints)
    cubin = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    main = re.split(r"^\s*\.type\s+\$|^\$", text, flags=re.MULTILINE)[0]
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", main, re.MULTILINE)
    return Counter(op for op in found if op != "NOP")


@functools.cache
def per_element(operation: str, weights: str, momentum: str, num_steps: int, capability: int) -> Counter:
    """Opcode -> instructions per element; the sum of its values is what an element costs. num_steps: 1, or those replayed."""
    from ds_zoadamu.kernels import triton as host

    a_lane = 16 if operation in SIGN_OPERATIONS else 2 * host._CHUNKS
    once = opcodes(operation, weights, momentum, False, capability)
    total = Counter({op: n / a_lane for op, n in once.items()})
    if num_steps > 1:  # the kernel that replays has a loop more
        looped = opcodes(operation, weights, momentum, True, capability)
        for op in looped | once:
            total[op] += (num_steps - 1) * (looped[op] - once[op]) / a_lane
    return total


def by_unit(counts: Counter) -> dict[str, float]:
    rest, units = Counter(counts), {}
    for unit, pattern in UNITS.items():
        units[unit] = sum(rest.pop(op) for op in list(rest) if re.fullmatch(pattern, op))
    return units | {"other": sum(rest.values())}


def cycles(counts: Counter, capability: int) -> float:
    """Cycles of one multiprocessor for one element, at least."""
    units = by_unit(counts)
    multiply_adds = 64 if capability in (75, 80) else 128
    return max(sum(counts.values()) / 128, units["multiply-add"] / multiply_adds, units[INTEGER] / 64)


def main() -> None:
    args = arguments()
    try:
        import triton
    except ImportError as error:
        print(f"{sys.argv[0]}: needs Triton >= 3.4, but no GPU: pip install triton ({error})", file=sys.stderr)
        sys.exit(2)
    cases = [("noise", "fp32", "none", 1)]
    for operation in ("perturb", "update"):
        cases += [(operation, "bf16", storage, 1) for storage in ("none", "int8", "bf16", "fp32")]
        cases += [(operation, "fp16", "int8", 1), (operation, "fp32", "fp32", 1), (operation, "bf16", "none", 44)]
    cases += [(operation, weights, "none", 1) for operation in SIGN_OPERATIONS for weights in ("bf16", "fp16", "fp32")]
    cases = [case for case in cases if case[0] in args.operations]
    print(f"Instructions per element, sm_{args.capability}, Triton {triton.__version__}")
    print(f"{'':14}{'weights':>8}{'momentum':>10}{'steps':>6}{'all':>9}{'cycles':>8}   " + " | ".join([*UNITS, "other"]))
    for case in cases:
        counts = per_element(*case, args.capability)
        units = " | ".join(f"{n:.1f}" for n in by_unit(counts).values())
        lane_cycles = cycles(counts, args.capability)
        print(f"{case[0]:14}{case[1]:>8}{case[2]:>10}{case[3]:6}{sum(counts.values()):9.1f}{lane_cycles:8.2f}   {units}")


if __name__ == "__main__":
    main()
