// GBCI_SIMD_CLONES before a CPU loop: the compiler vectorizes it for several instruction sets, and the loader picks one.
// The baseline stays x86-64, so that one binary runs everywhere. No clone may contract a*b+c (-ffp-contract=off):
// all of them give the same bits.

#pragma once

#include <cstdint>  // on glibc this defines __GLIBC__, whose loader resolves the clones

// Not by Clang, which cannot clone templates: there the baseline serves all.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define GBCI_SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GBCI_SIMD_CLONES
#endif
