"""The C++ code of the noise, in a separate program: published words, equal bits in every clone, largest errors."""

import math
import os
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from torch.utils.cpp_extension import include_paths

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.philox_normal import RTOL, philox_normal

ROOT = Path(__file__).resolve().parents[2]
UNIT = 2.0**-24

# Random123's kat_vectors for philox4x32-10: counter, key, expected.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}

PROGRAM = r"""
#include "common/philox_draw.cpp"

#include <cstdio>
#include <cstdlib>
#include <string>

using namespace gbci;

void draw_one_by_one(uint64_t seed, uint32_t first_block, uint32_t num_groups, uint32_t step, uint32_t stream,
                     float* normals) {
  for (uint32_t i = 0; i < num_groups * kGroupBlocks; ++i, normals += 4) {
    const Normals4 n = philox_normal4(seed, first_block + i, step, stream);
    normals[0] = n.n0, normals[1] = n.n1, normals[2] = n.n2, normals[3] = n.n3;
  }
}

using DrawGroups = decltype(&baseline::draw_groups);

DrawGroups clone(const std::string& name) {
  if (name == "scalar") return draw_one_by_one;
  if (name == "baseline") return baseline::draw_groups;
#if defined(__x86_64__)
  if (name == "avx2" && instruction_set() >= InstructionSet::kAvx2) return avx2::draw_groups;
  if (name == "avx512f" && instruction_set() == InstructionSet::kAvx512) return avx512f::draw_groups;
#endif
  return nullptr;
}

// Largest relative errors of the radius, and of the cosine and the sine, over all their arguments.
void print_errors() {
  double radius = 0, turn = 0;
  for (int32_t k = 1; k <= 1 << 24; ++k) {
    const double exact = std::sqrt(-2 * std::log(k * 0x1p-24)), ours = std::sqrt(minus_two_log(k));
    radius = std::max(radius, exact > 0 ? std::abs(ours / exact - 1) : std::abs(ours));
  }
  for (uint32_t y = 0; y < 1u << 24; ++y) {
    float cosine, sine;
    cos_sin_turn(y << 8, &cosine, &sine);
    // Turned back by whole quarters, where double precision leaves nothing to cancel.
    const int32_t quarter = static_cast<int32_t>(y + (1u << 21)) >> 22;
    const double x = (static_cast<int32_t>(y) - (quarter << 22)) * 0x1p-22 * (std::numbers::pi / 2);
    const double axes[4] = {std::cos(x), -std::sin(x), -std::cos(x), std::sin(x)};
    const double exact[2] = {axes[quarter & 3], axes[(quarter + 3) & 3]}, ours[2] = {cosine, sine};
    for (int i = 0; i < 2; ++i) {
      turn = std::max(turn, exact[i] != 0 ? std::abs(ours[i] / exact[i] - 1) : std::abs(ours[i]));
    }
  }
  std::printf("%.9e %.9e\n", radius, turn);
}

int main(int argc, char** argv) {
  const std::string command = argv[1];
  const auto number = [&](int i) { return std::strtoull(argv[i], nullptr, 0); };
  if (command == "words") {
    uint32_t w[6];
    for (int i = 0; i < 6; ++i) w[i] = static_cast<uint32_t>(std::strtoul(argv[i + 2], nullptr, 16));
    const Words4 x = philox4x32({w[0], w[1], w[2], w[3]}, w[4] | static_cast<uint64_t>(w[5]) << 32);
    std::printf("%08x %08x %08x %08x", x.x0, x.x1, x.x2, x.x3);
  } else if (command == "errors") {
    print_errors();
  } else if (DrawGroups draw = clone(command)) {
    static float normals[16 * 4 * kGroupBlocks];
    draw(number(2), number(3), 16, number(4), number(5), normals);
    std::fwrite(normals, sizeof normals, 1, stdout);
  } else {
    return 3;
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs `PROGRAM`, compiled with the flags of the extension."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler: '{compiler[0]}' was not found")
    flags = runpy.run_path(str(ROOT / "setup.py"))["CXX_FLAGS"]
    folder = tmp_path_factory.mktemp("philox_draw")
    (folder / "main.cpp").write_text(PROGRAM)
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # `make sanitize` sets it
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    command = [*compiler, *flags, *includes, str(folder / "main.cpp"), "-o", str(folder / "main")]
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    return lambda *args: subprocess.run([str(folder / "main"), *map(str, args)], capture_output=True, env=plain)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_published_words(program, counter, key, expected):
    assert program("words", *counter.split(), *key.split()).stdout.decode() == expected


def test_the_op_draws_the_published_words():
    x0, x1, x2, x3 = (int(word, 16) >> 8 for word in KNOWN_ANSWERS["zeros"][2].split())
    expected = []
    for x, y in ((x0, x1), (x2, x3)):
        radius = math.sqrt(-2 * math.log((x + 1) * UNIT))
        expected += [radius * math.cos(2 * math.pi * y * UNIT), radius * math.sin(2 * math.pi * y * UNIT)]
    np.testing.assert_allclose(philox_normal(seed_tensor([0]), (4,))[0].numpy(), expected, rtol=RTOL)


# seed, first block, step, stream: zeros, all bits, both words of the seed, a counter that wraps.
DRAWS = [(0, 0, 0, 0), (2**64 - 1, 0, 2**32 - 1, 2**32 - 1), (0x0123456789ABCDEF, 0, 7, 1), (5, 2**32 - 300, 1, 2)]


@pytest.mark.parametrize("clone", ["baseline", "avx2", "avx512f"])
def test_every_clone_draws_the_bits_of_the_scalar_definition(program, clone):
    for draw in DRAWS:
        done = program(clone, *draw)
        if done.returncode == 3:
            pytest.skip(f"needs a CPU with {clone}")
        assert done.returncode == 0
        assert done.stdout == program("scalar", *draw).stdout
        assert len(done.stdout) == 4 * 4 * 16 * 32
        if draw[1] == 0:
            seed, _, step, stream = draw
            op = philox_normal(seed_tensor([seed]), (2048,), step=step, stream=stream)
            assert op.numpy().tobytes() == done.stdout


def test_the_bound_of_the_error_holds_for_every_argument(program):
    radius, turn = map(float, program("errors").stdout.split())
    assert 0 < radius < 2.63 * UNIT
    assert 0 < turn < 2.43 * UNIT
    roundings = (1 + UNIT) / (1 - UNIT)  # one rounding of the product, one of the reference
    assert (1 + radius) * (1 + turn) * roundings - 1 < RTOL
