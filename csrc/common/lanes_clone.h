// Vectors of one instruction set, in the compilers' vector extension, and the types of storage that they are loaded from.
// Included once for each set, inside a GBCI_PUSH_TARGET of that set and with these macros defined.
//   GBCI_CLONE         namespace of the clone
//   GBCI_VECTOR_BYTES  width of a vector
//   GBCI_TO_WORDS(x), GBCI_TO_HALFWORDS(x)  where there is a better way than __builtin_convertvector: the vector x of
//                      16-bit numbers as 32-bit ones, and back, less their upper bits

#if !defined(GBCI_TO_WORDS)
#define GBCI_TO_WORDS(x) __builtin_convertvector(x, Words)
#define GBCI_TO_HALFWORDS(x) __builtin_convertvector(x, Halfwords)
#endif

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
  return GBCI_TO_WORDS(halfwords);
}

GBCI_INLINE Lanes<float> widen(const BFloat16* stored) { return bits_of<Lanes<float>>(words(stored) << 16); }

GBCI_INLINE Lanes<float> widen(const Float16* stored) {
  const Words bits = words(stored), magnitude = (bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
  // Rebias the exponent; of infinities and NaNs a second time; a subnormal by subtracting the 2^-14 that it is taken with.
  const Words normal = magnitude + (112u << 23), special = normal + (112u << 23);
  const Words subnormal = bits_of<Words>(
      bits_of<Lanes<float>>(magnitude + (113u << 23)) - bits_of<Lanes<float>>(Words{} + (113u << 23)));
  const Words widened = exponent == 0 ? subnormal : exponent == 0x0F800000 ? special : normal;
  return bits_of<Lanes<float>>(widened | (bits & 0x8000) << 16);
}

GBCI_INLINE void narrow(const Lanes<float>& lanes, float* stored) { std::memcpy(stored, &lanes, sizeof lanes); }

GBCI_INLINE void narrow(const Lanes<double>& lanes, double* stored) { std::memcpy(stored, &lanes, sizeof lanes); }

GBCI_INLINE void store_words(const Words& words, void* stored) {
  const Halfwords halfwords = GBCI_TO_HALFWORDS(words);
  std::memcpy(stored, &halfwords, sizeof halfwords);
}

// To nearest, ties to even.
GBCI_INLINE void narrow(const Lanes<float>& lanes, BFloat16* stored) {
  const Words bits = bits_of<Words>(lanes), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  store_words(lanes != lanes ? Words{} + 0x7FC0 : rounded, stored);
}

GBCI_INLINE void narrow(const Lanes<float>& lanes, Float16* stored) {
  const Words bits = bits_of<Words>(lanes), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14, adding 1/2 lets the adder round to the last place of a subnormal, 2^-24.
  const Words half = bits_of<Words>(Lanes<float>{} + 0.5f);
  const Words subnormal = bits_of<Words>(bits_of<Lanes<float>>(magnitude) + 0.5f) - half;
  const Words normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const Words finite = magnitude < 113u << 23 ? subnormal : normal;  // 65520 and more round up to infinity
  const Words special = magnitude > 0x7F800000 ? Words{} + 0x7E00 : Words{} + 0x7C00;
  store_words((magnitude < 143u << 23 ? finite : special) | (bits >> 16 & 0x8000), stored);
}

}  // namespace gbci::GBCI_CLONE
