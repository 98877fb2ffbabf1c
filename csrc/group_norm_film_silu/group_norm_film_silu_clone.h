// The loops of group_norm_film_silu for one instruction set.

namespace gbci::GBCI_CLONE {

// Sums at once: a single one would wait for its own additions. A row has 64 sums at any width of a vector, so that
// every instruction set adds in the same order.
constexpr int64_t kSums = 64, kRowVectors = kSums / kLanes<float>;
constexpr int kColumnSums = 4;

// `count` elements, at most as many as there are lanes, and zeros after them.
template <class Stored>
GBCI_INLINE Lanes<float> load_part(const Stored* stored, int64_t count) {
  Stored part[kLanes<float>] = {};
  std::memcpy(part, stored, count * sizeof(Stored));
  return widen(part);
}

template <class Stored>
GBCI_INLINE void store_part(const Lanes<float>& lanes, Stored* stored, int64_t count) {
  Stored part[kLanes<float>];
  narrow(lanes, part);
  std::memcpy(stored, part, count * sizeof(Stored));
}

// Σ (x - shift) or Σ (x - shift)² of a row.
template <bool kSquared, class Stored>
GBCI_INLINE float row_sum(const Stored* row, int64_t count, float shift) {
  Lanes<float> vectors[kRowVectors] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t v = 0; v < kRowVectors; ++v) {
      const Lanes<float> x = widen(row + i + v * kLanes<float>) - shift;
      vectors[v] += kSquared ? x * x : x;
    }
  }
  float sums[kSums];
  std::memcpy(sums, vectors, sizeof sums);
  for (; i < count; ++i) {
    const float x = static_cast<float>(row[i]) - shift;
    sums[i % kSums] += kSquared ? x * x : x;
  }
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) {
      sums[j] += sums[j + width];
    }
  }
  return sums[0];
}

// Mean and Σ (x - mean)² of a row.
template <class Stored>
void row_moments(const Stored* row, int64_t count, Moments* moments) {
  const float mean = row_sum<false>(row, count, 0) / count;
  *moments = {mean, row_sum<true>(row, count, mean)};
}

// Σ (x - shift) or Σ (x - shift)² of as many neighboring channels as there are lanes, or of the last `count`.
template <bool kSquared, bool kWhole, class Stored>
GBCI_INLINE Lanes<float> column_sum(
    const Stored* column, int64_t positions, int64_t channels, int64_t count, const Lanes<float>& shift) {
  Lanes<float> sums[kColumnSums] = {};
  for (int64_t p = 0; p < positions; p += kColumnSums) {
    for (int64_t i = 0; i < kColumnSums; ++i) {
      if (p + i < positions) {
        const Stored* stored = column + (p + i) * channels;
        const Lanes<float> x = (kWhole ? widen(stored) : load_part(stored, count)) - shift;
        sums[i] += kSquared ? x * x : x;
      }
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <bool kWhole, class Stored>
GBCI_INLINE void column_moments(
    const Stored* column, int64_t positions, int64_t channels, int64_t count, Moments* moments) {
  const Lanes<float> mean = column_sum<false, kWhole>(column, positions, channels, count, Lanes<float>{}) /
                            static_cast<float>(positions);
  const Lanes<float> squares = column_sum<true, kWhole>(column, positions, channels, count, mean);
  for (int64_t lane = 0; lane < count; ++lane) {
    moments[lane] = {mean[lane], squares[lane]};
  }
}

// The same for every channel of neighboring positions, where channels are neighbors.
template <class Stored>
void columns_moments(const Stored* elements, int64_t positions, int64_t channels, Moments* moments) {
  int64_t c = 0;
  for (; c + kLanes<float> <= channels; c += kLanes<float>) {
    column_moments<true>(elements + c, positions, channels, kLanes<float>, moments + c);
  }
  if (c < channels) {
    column_moments<false>(elements + c, positions, channels, channels - c, moments + c);
  }
}

// e^x for x within ±87: 2^n e^r with r within ± log(2) / 2, by the Taylor series of e^r. The error is at most 2 units
// in the last place, or 2^-14 for 16-bit numbers.
template <class Stored>
GBCI_INLINE Lanes<float> exponential(const Lanes<float>& x) {
  const Lanes<float> magic = Lanes<float>{} + 0x1.8p23f;  // rounds to an integer, in the lower bits
  const Lanes<float> shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
  const Lanes<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // log(2) in two parts, one of few bits
  Lanes<float> series = Lanes<float>{} + 1.0f / 24;
  if constexpr (sizeof(Stored) == 4) {
    series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
  }
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1;
  series = series * r + 1;
  const Words power = (bits_of<Words>(shifted) + 127) << 23;
  return series * bits_of<Lanes<float>>(power);
}

template <class Stored>
GBCI_INLINE Lanes<float> silu(const Lanes<float>& x) {
  const Lanes<float> bound = Lanes<float>{} + 87.0f;
  const Lanes<float> low = x < -bound ? -bound : x;
  return x / (1 + exponential<Stored>(-(low > bound ? bound : low)));
}

template <bool kSilu, class Stored>
GBCI_INLINE Lanes<float> normalized(
    const Lanes<float>& x, const Lanes<float>& mean, const Lanes<float>& factor, const Lanes<float>& term) {
  const Lanes<float> y = (x - mean) * factor + term;
  return kSilu ? silu<Stored>(y) : y;
}

template <bool kSilu, class Stored>
void apply_row(const Stored* row, int64_t count, Affine affine, Stored* out) {
  const Lanes<float> mean = affine.mean - Lanes<float>{}, factor = affine.factor - Lanes<float>{};
  const Lanes<float> term = affine.term - Lanes<float>{};
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    narrow(normalized<kSilu, Stored>(widen(row + i), mean, factor, term), out + i);
  }
  if (i < count) {
    const int64_t part = count - i;
    store_part(normalized<kSilu, Stored>(load_part(row + i, part), mean, factor, term), out + i, part);
  }
}

template <bool kSilu, class Stored>
void apply_columns(
    const Stored* elements, int64_t positions, int64_t channels, const float* means, const float* factors,
    const float* terms, Stored* out) {
  for (int64_t p = 0; p < positions; ++p, elements += channels, out += channels) {
    int64_t c = 0;
#pragma GCC unroll 4
    for (; c + kLanes<float> <= channels; c += kLanes<float>) {
      narrow(normalized<kSilu, Stored>(widen(elements + c), widen(means + c), widen(factors + c), widen(terms + c)),
             out + c);
    }
    if (c < channels) {
      const int64_t part = channels - c;
      const Lanes<float> mean = load_part(means + c, part), factor = load_part(factors + c, part);
      const Lanes<float> term = load_part(terms + c, part);
      store_part(normalized<kSilu, Stored>(load_part(elements + c, part), mean, factor, term), out + c, part);
    }
  }
}

template <class Stored>
constexpr Loops<Stored> loops() {
  return {row_moments<Stored>, columns_moments<Stored>, {apply_row<false, Stored>, apply_row<true, Stored>},
          {apply_columns<false, Stored>, apply_columns<true, Stored>}};
}

}  // namespace gbci::GBCI_CLONE
