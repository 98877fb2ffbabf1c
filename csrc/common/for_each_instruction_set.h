// Includes lanes_clone.h and then the file GBCI_CLONE_FILE, a path from csrc/, once for each instruction set. Both put
// their code into the namespace gbci::GBCI_CLONE: avx512f, avx2 and baseline. A source can include one such file.
//
// A pragma sets the target for this code alone. Under a compiler flag for the whole source, inline functions of other
// headers would also be compiled for that set, and the linker could use those everywhere.

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "host_device.h"
#include "instruction_sets.h"
#include "storage.h"

#if defined(__x86_64__)

#define GBCI_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define GBCI_PUSH_TARGET(set) GBCI_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define GBCI_POP_TARGET GBCI_PRAGMA(clang attribute pop)
#else
#define GBCI_PUSH_TARGET(set) GBCI_PRAGMA(GCC push_options) GBCI_PRAGMA(GCC target(set))
#define GBCI_POP_TARGET GBCI_PRAGMA(GCC pop_options)
#endif

GBCI_PUSH_TARGET("avx512f")
#define GBCI_CLONE avx512f
#define GBCI_VECTOR_BYTES 64
#include "lanes_clone.h"
#include GBCI_CLONE_FILE
#undef GBCI_CLONE
#undef GBCI_VECTOR_BYTES
GBCI_POP_TARGET

GBCI_PUSH_TARGET("avx2,fma")
#define GBCI_CLONE avx2
#define GBCI_VECTOR_BYTES 32
#include "lanes_clone.h"
#include GBCI_CLONE_FILE
#undef GBCI_CLONE
#undef GBCI_VECTOR_BYTES
GBCI_POP_TARGET

#endif

#define GBCI_CLONE baseline
#define GBCI_VECTOR_BYTES 16
#include "lanes_clone.h"
#include GBCI_CLONE_FILE
#undef GBCI_CLONE
#undef GBCI_VECTOR_BYTES

#undef GBCI_CLONE_FILE
