// The loops of mask_to_latent for one instruction set. The compiler vectorizes them by itself.

namespace gbci::GBCI_CLONE {

// seen[x] |= whether row[x] is masked
template <class Pixel>
void see(const Pixel* row, int64_t stride, int64_t num_pixels, uint8_t* seen) {
  if (stride == 1) {
    for (int64_t x = 0; x < num_pixels; ++x) {
      seen[x] |= is_masked(row[x]);
    }
  } else {
    for (int64_t x = 0; x < num_pixels; ++x) {
      seen[x] |= is_masked(row[x * stride]);
    }
  }
}

// out[x] = max or sum of values[x .. x + count - 1], in this order
void slide_max(const float* values, int64_t count, int64_t width, float* out) {
  std::copy_n(values, width, out);
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t x = 0; x < width; ++x) {
      out[x] = std::max(out[x], values[x + i]);
    }
  }
}

void slide_sum(const float* values, int64_t count, int64_t width, float* out) {
  std::copy_n(values, width, out);
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t x = 0; x < width; ++x) {
      out[x] += values[x + i];
    }
  }
}

void take_max(const float* values, int64_t width, float* out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] = std::max(out[x], values[x]);
  }
}

void add(const float* values, int64_t width, float* out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] += values[x];
  }
}

void divide(float divisor, int64_t width, float* out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] /= divisor;
  }
}

constexpr Loops kLoops = {see<uint8_t>, see<float>, slide_max, slide_sum, take_max, add, divide};

}  // namespace gbci::GBCI_CLONE
