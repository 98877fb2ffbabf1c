// GBCI_INLINE before a function that the CPU and CUDA share: inlined, so that a CPU loop over it can vectorize.

#pragma once

#if defined(__CUDACC__)
#define GBCI_INLINE __host__ __device__ __forceinline__
#else
#define GBCI_INLINE inline __attribute__((always_inline))
#endif
