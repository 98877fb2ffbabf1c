// The instruction sets that loops on the CPU are compiled for, and which of them this machine has. A file of such loops
// is named <name>_clone.h; for_each_instruction_set.h includes it once for each set.

#pragma once

namespace gbci {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };  // kAvx2: with FMA, as in every processor that has AVX2

// The widest set that this machine has. Chosen here instead of by the loader (target_clones), so that the choice works
// with every compiler and C library, and under the sanitizers.
inline InstructionSet instruction_set() {
  static const InstructionSet widest = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
      return InstructionSet::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return InstructionSet::kAvx2;
    }
#endif
    return InstructionSet::kBaseline;
  }();
  return widest;
}

}  // namespace gbci

// An expression in the namespace of the widest set: GBCI_WIDEST(loops<float>()) is avx2::loops<float>() if that set is
// AVX2.
#if defined(__x86_64__)
#define GBCI_WIDEST(...)                                                              \
  (::gbci::instruction_set() == ::gbci::InstructionSet::kAvx512 ? avx512f::__VA_ARGS__ \
   : ::gbci::instruction_set() == ::gbci::InstructionSet::kAvx2 ? avx2::__VA_ARGS__    \
                                                                 : baseline::__VA_ARGS__)
#else
#define GBCI_WIDEST(...) baseline::__VA_ARGS__
#endif
