// Vectors of one instruction set, in the compilers' vector extension, and their loads from and stores to storage types.
// for_each_instruction_set.h includes this once for each set, with GBCI_CLONE, the set's namespace, and
// GBCI_VECTOR_BYTES, the width of its vectors, defined.

namespace gbci::GBCI_CLONE {

template <class T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(GBCI_VECTOR_BYTES)));
};

template <class T>
using Lanes = typename LanesOf<T>::Type;
typedef uint16_t Halfwords __attribute__((vector_size(GBCI_VECTOR_BYTES / 2)));
using Words = Lanes<uint32_t>;

template <class Real>
constexpr int64_t kLanes = GBCI_VECTOR_BYTES / sizeof(Real);

// Operations that the vector extension compiles badly or lacks:
//   to_words, to_halfwords  a vector of 16-bit numbers as 32-bit ones, and back, less their upper bits
//   multiply_low            the 64-bit products of the lower halves of 64-bit lanes
//   multiply_add            a b + c, rounded once if the set has FMA
#if GBCI_VECTOR_BYTES == 64
// These are intrinsics with a mask: the plain ones cause a warning in GCC 12's own header, and GCC compiles
// __builtin_convertvector to half a dozen instructions.
GBCI_INLINE Words to_words(const Halfwords& x) { return (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x); }
GBCI_INLINE Halfwords to_halfwords(const Words& x) {
  return (Halfwords)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x);
}
GBCI_INLINE Lanes<uint64_t> multiply_low(const Lanes<uint64_t>& a, const Lanes<uint64_t>& b) {
  return (Lanes<uint64_t>)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}
GBCI_INLINE Lanes<float> multiply_add(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return (Lanes<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#else
GBCI_INLINE Words to_words(const Halfwords& x) { return __builtin_convertvector(x, Words); }
GBCI_INLINE Halfwords to_halfwords(const Words& x) { return __builtin_convertvector(x, Halfwords); }
#if GBCI_VECTOR_BYTES == 32
GBCI_INLINE Lanes<uint64_t> multiply_low(const Lanes<uint64_t>& a, const Lanes<uint64_t>& b) {
  return (Lanes<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
GBCI_INLINE Lanes<float> multiply_add(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return (Lanes<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
GBCI_INLINE Lanes<uint64_t> multiply_low(const Lanes<uint64_t>& a, const Lanes<uint64_t>& b) {
#if defined(__x86_64__)
  return (Lanes<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}
GBCI_INLINE Lanes<float> multiply_add(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return a * b + c;
}
#endif
#endif

// Elements 0, 2, 4, ... of two vectors, or 1, 3, 5, ...
template <uint32_t kFirst, class Vector, uint32_t... kLane>
GBCI_INLINE Vector every_other(const Vector& a, const Vector& b, std::integer_sequence<uint32_t, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + kFirst)...);
}

// Interleaves the lower halves of two vectors, or the upper halves.
template <bool kUpper, class Vector, uint32_t... kLane>
GBCI_INLINE Vector in_turn(const Vector& a, const Vector& b, std::integer_sequence<uint32_t, kLane...>) {
  constexpr uint32_t kCount = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kCount + kUpper * kCount / 2)...);
}

template <class To, class From>
GBCI_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

GBCI_INLINE Lanes<float> widen(const float* stored) {
  Lanes<float> lanes;
  std::memcpy(&lanes, stored, sizeof lanes);
  return lanes;
}

GBCI_INLINE Lanes<double> widen(const double* stored) {
  Lanes<double> lanes;
  std::memcpy(&lanes, stored, sizeof lanes);
  return lanes;
}

GBCI_INLINE Words words(const void* stored) {
  Halfwords halfwords;
  std::memcpy(&halfwords, stored, sizeof halfwords);
  return to_words(halfwords);
}

GBCI_INLINE Lanes<float> widen(const BFloat16* stored) { return bits_of<Lanes<float>>(words(stored) << 16); }

GBCI_INLINE Lanes<float> widen(const Half* stored) {
  const Words bits = words(stored), magnitude = (bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
  // Rebias the exponent, twice for infinities and NaNs. A subnormal is read with an added 2^-14, which is subtracted.
  const Words normal = magnitude + (112u << 23), special = normal + (112u << 23);
  const Words subnormal = bits_of<Words>(
      bits_of<Lanes<float>>(magnitude + (113u << 23)) - bits_of<Lanes<float>>(Words{} + (113u << 23)));
  const Words widened = exponent == 0 ? subnormal : exponent == 0x0F800000 ? special : normal;
  return bits_of<Lanes<float>>(widened | (bits & 0x8000) << 16);
}

GBCI_INLINE void narrow(const Lanes<float>& lanes, float* stored) { std::memcpy(stored, &lanes, sizeof lanes); }

GBCI_INLINE void narrow(const Lanes<double>& lanes, double* stored) { std::memcpy(stored, &lanes, sizeof lanes); }

GBCI_INLINE void store_words(const Words& words, void* stored) {
  const Halfwords halfwords = to_halfwords(words);
  std::memcpy(stored, &halfwords, sizeof halfwords);
}

// Rounds to nearest, ties to even.
GBCI_INLINE void narrow(const Lanes<float>& lanes, BFloat16* stored) {
  const Words bits = bits_of<Words>(lanes), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  store_words(lanes != lanes ? Words{} + 0x7FC0 : rounded, stored);
}

GBCI_INLINE void narrow(const Lanes<float>& lanes, Half* stored) {
  const Words bits = bits_of<Words>(lanes), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14, adding 1/2 makes the addition round to the last place of a subnormal, 2^-24.
  const Words half = bits_of<Words>(Lanes<float>{} + 0.5f);
  const Words subnormal = bits_of<Words>(bits_of<Lanes<float>>(magnitude) + 0.5f) - half;
  const Words normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const Words finite = magnitude < 113u << 23 ? subnormal : normal;  // 65520 and more round up to infinity
  const Words special = magnitude > 0x7F800000 ? Words{} + 0x7E00 : Words{} + 0x7C00;
  store_words((magnitude < 143u << 23 ? finite : special) | (bits >> 16 & 0x8000), stored);
}

}  // namespace gbci::GBCI_CLONE
