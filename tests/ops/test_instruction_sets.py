"""The extension runs on every x86-64: newer instructions are used only after a check of the CPU.

Code that csrc/common/for_each_instruction_set.h compiles for newer CPUs is in a namespace named after the instruction
set. The tests read the disassembly, and run the extension on emulated CPUs.
"""

import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")

EXTENSION = importlib.util.find_spec("gbci_fast._C").origin
CLONE = re.compile(r"^_ZN4gbci[47](avx512f|avx2)")
# Mnemonics of instructions later than SSE2: a leading v is an encoding of AVX or later, a leading k a mask of AVX-512.
# tzcnt is left out: older CPUs execute it as bsf, and GCC emits it where both give the same result.
LATER_THAN_SSE2 = re.compile(
    r"v(?!err|erw)\w+|k\w+"
    r"|(?:addsub|hadd|hsub)p[sd]|lddqu|movs[hl]dup|movddup"  # SSE3
    r"|pshufb|ph(?:add|sub)\w+|pabs[bwd]|psign[bwd]|palignr|pmulhrsw|pmaddubsw"  # SSSE3
    r"|p?blend\w+|pmulld|pmuldq|round[sp][sd]|p(?:min|max)(?:s[bd]|u[wd])|pmov[sz]x\w+|ptest|packusdw"  # SSE4.1
    r"|p(?:ins|ext)r[bdq]|extractps|insertps|dpp[sd]|mpsadbw|phminposuw|movntdqa|pcmpeqq"
    r"|pcmpgtq|pcmp[ei]str\w|crc32\w?|popcnt\w?"  # SSE4.2
    r"|lzcnt\w?|andn|bextr|bls(?:i|r|msk)|bzhi|mulx|pdep|pext|rorx|s[ah][lr]x|movbe\w?"  # BMI and contemporaries
    r"|aes\w+|pclmul\w+|sha(?:1|256)\w+|gf2p8\w+"
)
# Not allowed in the clones either: a contracted a*b+c rounds differently; AVX2 and AVX-512F do not imply the others.
NOWHERE = re.compile(
    r"vfn?m(?:add|sub)\w+|vcvt(?:ph2ps|ps2ph)|andn|bextr|bls(?:i|r|msk)|bzhi|mulx|pdep|pext|rorx|s[ah][lr]x|lzcnt\w?"
)
# The exception, by explicit intrinsics: products of the convolution, whose sums differ between libraries anyway.
MULTIPLY_ADD = re.compile(r"vfmadd\d+ps")
# One function of every file that is compiled for each instruction set.
LOOPS = ("blend", "draw_groups", "multiply_tiles", "row_moments", "slide_sum")
AVX512_OPERAND = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b")

EVERY_OP = """
import hashlib
import torch
from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.blend_step import StepCoefficients, blend_step
from gbci_fast.ops.conv3x3 import conv3x3, conv3x3_ref, conv3x3_weight
from gbci_fast.ops.group_norm_film_silu import group_norm_film_silu
from gbci_fast.ops.mask_to_latent import mask_to_latent
from gbci_fast.ops.philox_normal import philox_normal

seeds = seed_tensor([1, 2**63])
draw = lambda step: philox_normal(seeds, (4, 9, 35), step=step)
mask = (philox_normal(seeds, (1, 72, 280), step=9) > 2).float()
latent_mask, weight, window = mask_to_latent(mask, 8, feather=2, halo=1)
coefficients = StepCoefficients(
    denoised_from_latents=1.1, denoised_from_output=-0.4, next_from_corrected=0.3, next_from_denoised=0.6,
    next_from_noise=0.2, known_from_latents=0.8, known_from_noise=0.5,
)
results = [draw(0), mask, latent_mask, weight, window]
for layout in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        latents, conditional, unconditional, known, known_noise = (
            draw(step).to(dtype).contiguous(memory_format=layout) for step in range(5)
        )
        results.append(
            blend_step(
                latents, conditional, unconditional, coefficients=coefficients, guidance_scale=3.0, clip=1.5,
                guidance_rescale=0.7, seeds=seeds, step=5, known=known, known_noise=known_noise, weight=weight,
            )
        )
        scale, shift = (draw(step)[:, 0, :, 0].to(dtype).contiguous() for step in (5, 6))
        image = conditional.transpose(1, 2).contiguous(memory_format=layout)
        results.append(group_norm_film_silu(image, 3, scale[0], shift[0], scale=scale, shift=shift))
for dtype in (torch.bfloat16, torch.float16):  # each number, and halfway to the next
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(2, 4, 128, 64)
    halfway = (every.float() + every.float().roll(-1, 3)) / 2
    for layout in (torch.contiguous_format, torch.channels_last):
        model_input = torch.empty_like(every, memory_format=layout)
        one = StepCoefficients(
            denoised_from_latents=0, denoised_from_output=1, next_from_corrected=1
        )
        denoised = torch.empty_like(halfway)
        blend_step(
            halfway, every.contiguous(memory_format=layout), coefficients=one, denoised=denoised,
            model_input=model_input,
        )
        results += [denoised.nan_to_num(), model_input.nan_to_num()]
x, filters = draw(10), draw(11)[0, :, :, :27].reshape(12, 9, 3, 3)[:, :4].contiguous()
ours, reference = conv3x3(x, conv3x3_weight(filters), None, 12), conv3x3_ref(x.double(), filters.double())
assert (ours - reference).abs().max() < 1e-6 * reference.abs().max()  # to rounding: with or without multiply-add
digest = hashlib.sha256()
for result in results:
    digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def need(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"needs {tool}")
    return path


def isolated() -> dict[str, str]:
    """The environment without the libraries that `make sanitize` preloads."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """{symbol: its instructions} of the extension."""
    command = [need("objdump"), "--disassemble", "--no-show-raw-insn", "--no-addresses", EXTENSION]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=isolated()).stdout
    functions, instructions = {}, []
    for line in text.splitlines():
        if line.startswith("<"):
            instructions = functions.setdefault(line.removeprefix("<").removesuffix(">:"), [])
        elif line.startswith("\t"):
            instructions.append(line.strip())
    return functions


def mnemonics(instruction: str) -> list[str]:
    """The mnemonic and its prefixes, such as rep and lock; operands begin with a digit or a sign."""
    return list(itertools.takewhile(lambda word: word[0].isalpha(), instruction.split()))


def clone_of(symbol: str) -> str | None:
    match = CLONE.search(symbol)
    return match and match[1]


def test_newer_instructions_are_in_clones_alone(functions):
    wrong = [
        (symbol, instruction)
        for symbol, instructions in functions.items()
        for instruction in instructions
        for word in mnemonics(instruction)
        if (LATER_THAN_SSE2.fullmatch(word) and clone_of(symbol) is None)
        or (NOWHERE.fullmatch(word) and not ("multiply_tiles" in symbol and MULTIPLY_ADD.fullmatch(word)))
    ]
    assert wrong == []


def test_clones_for_avx2_do_without_avx512(functions):
    clones = {symbol: instructions for symbol, instructions in functions.items() if clone_of(symbol) == "avx2"}
    assert [i for instructions in clones.values() for i in instructions if AVX512_OPERAND.search(i)] == []


@pytest.mark.parametrize(("clone", "register"), [("avx2", "%ymm"), ("avx512f", "%zmm")])
def test_there_are_clones_of_either_kind(functions, clone, register):
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a build for the sanitizers is not vectorized")
    wide = [symbol for symbol, instructions in functions.items() if any(register in i for i in instructions)]
    for loop in LOOPS:
        assert [symbol for symbol in wide if clone_of(symbol) == clone and f"{len(loop)}{loop}" in symbol], loop


@pytest.fixture(scope="module")
def native_digest() -> str:
    done = subprocess.run([sys.executable, "-c", EVERY_OP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


@pytest.mark.parametrize(("cpu", "capability"), [("Nehalem", "DEFAULT"), ("Haswell", "AVX2")])
def test_every_op_gives_the_same_bits_on_an_older_cpu(cpu, capability, native_digest):
    emulator = need("qemu-x86_64")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("the sanitizers do not run in the emulator")
    done = subprocess.run([emulator, "-cpu", cpu, sys.executable, "-c", EVERY_OP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability, native_digest]


def test_the_emulator_stops_at_what_its_cpu_does_not_have(tmp_path):
    emulator, compiler = need("qemu-x86_64"), need(shlex.split(os.environ.get("CXX", "c++"))[0])
    program = tmp_path / "main"
    source = 'int main() { asm volatile("vpxor %ymm0, %ymm0, %ymm0"); }'
    command = [compiler, "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True, env=isolated())
    for cpu, returncode in (("Nehalem", -signal.SIGILL), ("Haswell", 0)):
        done = subprocess.run([emulator, "-cpu", cpu, program], capture_output=True, env=isolated())
        assert done.returncode == returncode, cpu
