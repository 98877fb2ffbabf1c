// Lanes are the neighboring elements of a strided tensor that one thread holds. Places, loads and stores of lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace gbci {

// Division by a number known only at run time, for numerators below 2^31 (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

inline Divisor divisor(uint32_t d) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) {
    ++shift;
  }
  return {d, static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1), shift};
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& by) {
  return (__umulhi(n, by.multiplier) + n) >> by.shift;
}

enum class Access : uint32_t { kAbsent, kVector, kStrided };  // kVector: all lanes are one aligned access

// A batch of samples with an outer and an inner axis. Lanes are neighbors along the inner axis. Strides are in bytes.
struct Operand {
  char* data;
  uint32_t batch, outer, inner;
  Access access;
};

template <int kLanes>
struct Values {
  float lane[kLanes];
};

template <class T, int kLanes>
struct Stored {
  T lane[kLanes];
};

// Access to all lanes at once needs a built-in vector type; otherwise it compiles to one access per lane.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<4> {
  using Type = uint32_t;
};
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};
template <class T, int kLanes>
using Vector = typename Bits<kLanes * sizeof(T)>::Type;

// Lanes as loaded. If all lanes are one access, they stay packed: unpacking would wait for the load.
template <class T, int kLanes, bool kVector>
using Raw = std::conditional_t<kVector, Vector<T, kLanes>, Stored<T, kLanes>>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// The place of a thread's lanes.
struct Place {
  uint32_t sample, outer, inner;
};

__device__ __forceinline__ char* address(const Operand& operand, const Place& at) {
  return operand.data + static_cast<uint64_t>(at.sample) * operand.batch +
         static_cast<uint64_t>(at.outer) * operand.outer + static_cast<uint64_t>(at.inner) * operand.inner;
}

template <class T, int kLanes, bool kVector>
__device__ __forceinline__ Raw<T, kLanes, kVector> load(const Operand& from, const Place& at) {
  Raw<T, kLanes, kVector> values = {};
  if (from.access == Access::kAbsent) {
    return values;
  }
  const char* data = address(from, at);
  if constexpr (kVector) {
    values = *reinterpret_cast<const Vector<T, kLanes>*>(data);
  } else if (from.access == Access::kVector) {
    const auto bits = *reinterpret_cast<const Vector<T, kLanes>*>(data);
    std::memcpy(&values, &bits, sizeof bits);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      values.lane[i] = *reinterpret_cast<const T*>(data + static_cast<uint64_t>(i) * from.inner);
    }
  }
  return values;
}

template <class T, int kLanes, bool kVector>
__device__ __forceinline__ void store(const Operand& to, const Place& at, const Values<kLanes>& values) {
  if (to.access == Access::kAbsent) {
    return;
  }
  Stored<T, kLanes> stored;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    stored.lane[i] = from_float<T>(values.lane[i]);
  }
  char* data = address(to, at);
  if (kVector || to.access == Access::kVector) {
    Vector<T, kLanes> bits;
    std::memcpy(&bits, &stored, sizeof bits);
    *reinterpret_cast<Vector<T, kLanes>*>(data) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      *reinterpret_cast<T*>(data + static_cast<uint64_t>(i) * to.inner) = stored.lane[i];
    }
  }
}

template <class T, int kLanes, class Loaded>
__device__ __forceinline__ Values<kLanes> convert(const Loaded& raw) {
  Stored<T, kLanes> stored;
  static_assert(sizeof stored == sizeof raw);
  std::memcpy(&stored, &raw, sizeof raw);
  Values<kLanes> values;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    values.lane[i] = to_float(stored.lane[i]);
  }
  return values;
}

}  // namespace gbci
