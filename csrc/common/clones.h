// One source for several instruction sets: a file that is included once for each, with the macros of lanes_clone.h, and
// the choice among its clones when the module is loaded.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GBCI_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define GBCI_PUSH_TARGET(set) GBCI_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define GBCI_POP_TARGET GBCI_PRAGMA(clang attribute pop)
#else
#define GBCI_PUSH_TARGET(set) GBCI_PRAGMA(GCC push_options) GBCI_PRAGMA(GCC target(set))
#define GBCI_POP_TARGET GBCI_PRAGMA(GCC pop_options)
#endif

// Of __builtin_convertvector GCC 12 makes half a dozen instructions. The forms with a mask: the plain ones draw a warning
// about its own header.
#define GBCI_AVX512_TO_WORDS(x) (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)(x))
#define GBCI_AVX512_TO_HALFWORDS(x) (Halfwords)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)(x))

namespace gbci {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// Asked here and not by the loader (target_clones), so that it works with every compiler and C library, and under the
// sanitizers.
inline InstructionSet widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

}  // namespace gbci
