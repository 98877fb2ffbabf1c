// The functions of rows.h for one instruction set.
//
// Values are vectors, so that they stay in registers from one equation to the next despite the branches between them.
// Branches depend only on the step, and are always predicted.

namespace gbci::GBCI_CLONE {

// As many vectors at once as there are registers for: a single one would wait for its own additions.
constexpr int kVectors = GBCI_VECTOR_BYTES == 64 ? 4 : 2;

// The values of one quantity in a block of neighboring elements.
template <class Real>
struct Block {
  Lanes<Real> vector[kVectors];
};

// Elements first .. first + count - 1 of a row, and zeros after them. In a whole block, count is known at compile time.
template <bool kWhole, class Real, class Stored>
GBCI_INLINE Block<Real> load(const Stored* row, int64_t first, int64_t count) {
  Stored part[kVectors * kLanes<Real>] = {};
  const Stored* stored = row + first;
  if constexpr (!kWhole) {
    std::memcpy(part, stored, count * sizeof(Stored));
    stored = part;
  }
  Block<Real> block;
  for (int v = 0; v < kVectors; ++v) {
    block.vector[v] = widen(stored + v * kLanes<Real>);
  }
  return block;
}

template <bool kWhole, class Real, class Stored>
GBCI_INLINE void store(const Block<Real>& block, Stored* row, int64_t first, int64_t count) {
  Stored part[kVectors * kLanes<Real>], *stored = kWhole ? row + first : part;
  for (int v = 0; v < kVectors; ++v) {
    narrow(block.vector[v], stored + v * kLanes<Real>);
  }
  if constexpr (!kWhole) {
    std::memcpy(row + first, part, count * sizeof(Stored));
  }
}

template <class Real>
GBCI_INLINE Block<Real> filled(Real value) {
  Block<Real> block;
  for (int v = 0; v < kVectors; ++v) {
    block.vector[v] = value - Lanes<Real>{};  // + would turn -0 into 0
  }
  return block;
}

// The first term of a sum, or the sum's start if the term is absent.
template <class Real>
GBCI_INLINE Block<Real> first_term(const Factor<Real>& factor, const Block<Real>& term, Real start) {
  Block<Real> sum = filled(start);
  if (factor.used) {
    for (int v = 0; v < kVectors; ++v) {
      sum.vector[v] = factor.value * term.vector[v];
    }
  }
  return sum;
}

template <bool kWhole, class Real, class Stored>
GBCI_INLINE Block<Real> first_term(
    const Factor<Real>& factor, const Stored* row, int64_t first, int64_t count, Real start) {
  return factor.used ? first_term(factor, load<kWhole, Real>(row, first, count), start) : filled(start);
}

// One more term of a sum.
template <class Real>
GBCI_INLINE void add(Block<Real>& sum, const Factor<Real>& factor, const Block<Real>& term) {
  if (factor.used) {
    for (int v = 0; v < kVectors; ++v) {
      sum.vector[v] += factor.value * term.vector[v];
    }
  }
}

template <bool kWhole, class Real, class Stored>
GBCI_INLINE void add(
    Block<Real>& sum, const Factor<Real>& factor, const Stored* row, int64_t first, int64_t count) {
  if (factor.used) {
    add(sum, factor, load<kWhole, Real>(row, first, count));
  }
}

template <bool kWhole, class Real, class Model>
GBCI_INLINE Block<Real> guided_output(
    const Model* conditional, const Model* unconditional, Real guidance_scale, int64_t first, int64_t count) {
  const Block<Real> c = load<kWhole, Real>(conditional, first, count);
  const Block<Real> u = load<kWhole, Real>(unconditional, first, count);
  Block<Real> output;
  for (int v = 0; v < kVectors; ++v) {
    output.vector[v] = u.vector[v] + guidance_scale * (c.vector[v] - u.vector[v]);
  }
  return output;
}

// Like torch.clamp, keeps a NaN.
template <class Real>
GBCI_INLINE void clip(Block<Real>& block, Real limit) {
  const Lanes<Real> high = Lanes<Real>{} + limit, low = -high;
  for (int v = 0; v < kVectors; ++v) {
    const Lanes<Real> raised = block.vector[v] < low ? low : block.vector[v];
    block.vector[v] = raised > high ? high : raised;
  }
}

// Like torch.lerp, exact at both ends: known + weight difference, or next - (1 - weight) difference.
template <class Real>
GBCI_INLINE void lerp(Block<Real>& next, const Block<Real>& known, const Block<Real>& weight) {
  for (int v = 0; v < kVectors; ++v) {
    const Lanes<Real> x = next.vector[v], k = known.vector[v], w = weight.vector[v];
    const Lanes<Real> base = w < Real(0.5) ? k : x, factor = w < Real(0.5) ? w : w - 1;
    next.vector[v] = base + (x - k) * factor;
  }
}

// Elements first .. first + count - 1 of the rows.
template <bool kWhole, class State, class Model>
GBCI_INLINE void blend_block(
    const Equations<RealOf<State>>& a, const Rows<State, Model>& rows, RealOf<State> rescale, int64_t first,
    int64_t count) {
  using Real = RealOf<State>;
  const StepCoefficients<Factor<Real>>& c = a.coefficients;
  Block<Real> output = filled(Real(0));
  if (rows.unconditional) {
    output = guided_output<kWhole>(rows.conditional, rows.unconditional, a.guidance_scale, first, count);
    if (a.has_rescale) {
      for (int v = 0; v < kVectors; ++v) {
        output.vector[v] *= rescale;
      }
    }
  } else if (rows.conditional) {
    output = load<kWhole, Real>(rows.conditional, first, count);
  }

  Block<Real> denoised = first_term<kWhole>(c.denoised_from_latents, rows.latents, first, count, a.denoised_start);
  add(denoised, c.denoised_from_output, output);
  if (a.has_clip) {
    clip(denoised, a.clip);
  }

  Block<Real> z = filled(Real(0));
  if (a.has_corrector) {
    z = first_term<kWhole>(c.corrected_from_corrected, rows.corrected_before, first, count, Real(-0.0));
    add<kWhole>(z, c.corrected_from_previous, rows.previous, first, count);
    add<kWhole>(z, c.corrected_from_older, rows.older, first, count);
    add(z, c.corrected_from_denoised, denoised);
  } else if (rows.latents) {
    z = load<kWhole, Real>(rows.latents, first, count);
  }

  Block<Real> next = first_term(c.next_from_corrected, z, a.next_start);
  add(next, c.next_from_output, output);
  add(next, c.next_from_denoised, denoised);
  add<kWhole>(next, c.next_from_previous, rows.previous, first, count);
  add<kWhole>(next, c.next_from_older, rows.older, first, count);
  if (rows.drawn) {
    add<kWhole>(next, c.next_from_noise, rows.drawn, first, count);
  } else {
    add<kWhole>(next, c.next_from_noise, rows.noise, first, count);
  }

  if (rows.weight) {
    Block<Real> known = first_term<kWhole>(c.known_from_latents, rows.known, first, count, a.known_start);
    add<kWhole>(known, c.known_from_noise, rows.known_noise, first, count);
    lerp(next, known, load<kWhole, Real>(rows.weight, first, count));
  }

  if (rows.denoised) {
    store<kWhole>(denoised, rows.denoised, first, count);
  }
  if (rows.corrected) {
    store<kWhole>(z, rows.corrected, first, count);
  }
  store<kWhole>(next, rows.out, first, count);
  if (rows.model_input) {
    for (int v = 0; v < kVectors; ++v) {
      next.vector[v] *= c.input_from_latents.value;
    }
    store<kWhole>(next, rows.model_input, first, count);
  }
}

template <class State, class Model>
void blend(
    const Equations<RealOf<State>>& given, const Rows<State, Model>& given_rows, RealOf<State> rescale,
    int64_t length) {
  const Equations<RealOf<State>> a = given;  // a copy, because a store to a row might alias `given`
  const Rows<State, Model> rows = given_rows;
  constexpr int64_t kBlock = kVectors * kLanes<RealOf<State>>;
  int64_t i = 0;
  for (; i + kBlock <= length; i += kBlock) {
    blend_block<true>(a, rows, rescale, i, kBlock);
  }
  if (i < length) {
    blend_block<false>(a, rows, rescale, i, length - i);
  }
}

// Adds element i of a row to the lane that it belongs to.
GBCI_INLINE void add(ShiftedSums& sums, int64_t i, double x) {
  const int64_t lane = i % ShiftedSums::kLanes;
  const double from_shift = x - sums.shift;
  sums.first[lane] += from_shift;
  sums.second[lane] += from_shift * from_shift;
}

template <class State, class Model>
void first_output(
    const Rows<State, Model>& rows, RealOf<State> guidance_scale, double* conditional, double* guided) {
  using Real = RealOf<State>;
  *conditional = load<false, Real>(rows.conditional, 0, 1).vector[0][0];
  *guided = guided_output<false>(rows.conditional, rows.unconditional, guidance_scale, 0, 1).vector[0][0];
}

template <class State, class Model>
void add_outputs(
    const Rows<State, Model>& rows, RealOf<State> guidance_scale, int64_t length, ShiftedSums& conditional,
    ShiftedSums& guided) {
  using Real = RealOf<State>;
  constexpr int64_t kBlock = kVectors * kLanes<Real>;
  for (int64_t i = 0; i < length; i += kBlock) {
    const int64_t count = std::min(kBlock, length - i);
    const Block<Real> c = load<false, Real>(rows.conditional, i, count);
    const Block<Real> m = guided_output<false>(rows.conditional, rows.unconditional, guidance_scale, i, count);
    Real outputs[2][kBlock];
    std::memcpy(outputs[0], &c, sizeof c);
    std::memcpy(outputs[1], &m, sizeof m);
    for (int64_t j = 0; j < count; ++j) {
      add(conditional, i + j, outputs[0][j]);
      add(guided, i + j, outputs[1][j]);
    }
  }
}

// Copies between four neighboring channels, as in channels-last latents of a model, and four rows. Two channels of
// 16-bit numbers form a word, because every instruction set can shuffle words.
template <bool kLoad, class Stored>
GBCI_INLINE void move_four_channels(Stored* elements, Stored* tile, int64_t positions) {
  int64_t i = 0;
  if constexpr (sizeof(Stored) == 2) {
    constexpr uint32_t kWords = kLanes<uint32_t>;
    constexpr std::make_integer_sequence<uint32_t, kWords> kLane;
    for (; i + kWords <= positions; i += kWords) {
      Stored *memory = elements + 4 * i, *row = tile + i;
      Words first, second;
      if constexpr (kLoad) {
        std::memcpy(&first, memory, sizeof first);
        std::memcpy(&second, memory + 2 * kWords, sizeof second);
        const Words channels01 = every_other<0>(first, second, kLane);
        const Words channels23 = every_other<1>(first, second, kLane);
        store_words(channels01, row);
        store_words(channels01 >> 16, row + kTileWidth);
        store_words(channels23, row + 2 * kTileWidth);
        store_words(channels23 >> 16, row + 3 * kTileWidth);
      } else {
        const Words channels01 = words(row) | words(row + kTileWidth) << 16;
        const Words channels23 = words(row + 2 * kTileWidth) | words(row + 3 * kTileWidth) << 16;
        first = in_turn<false>(channels01, channels23, kLane);
        second = in_turn<true>(channels01, channels23, kLane);
        std::memcpy(memory, &first, sizeof first);
        std::memcpy(memory + 2 * kWords, &second, sizeof second);
      }
    }
  }
  for (; i < positions; ++i) {
    for (int channel = 0; channel < 4; ++channel) {
      Stored &element = elements[4 * i + channel], &in_tile = tile[channel * kTileWidth + i];
      kLoad ? in_tile = element : element = in_tile;
    }
  }
}

template <bool kLoad, class Stored>
GBCI_INLINE void move_tile(Stored* elements, const Strides& strides, Stored* tile) {
  if (strides.channels == 4 && strides.channel == 1 && strides.position == 4) {
    move_four_channels<kLoad>(elements, tile, strides.positions);
    return;
  }
  for (int64_t channel = 0; channel < strides.channels; ++channel) {
    for (int64_t i = 0; i < strides.positions; ++i) {
      Stored& element = elements[channel * strides.channel + i * strides.position];
      Stored& in_tile = tile[channel * kTileWidth + i];
      kLoad ? in_tile = element : element = in_tile;
    }
  }
}

template <class Stored>
void load_tile(const Stored* elements, Strides strides, Stored* tile) {
  move_tile<true>(const_cast<Stored*>(elements), strides, tile);
}

template <class Stored>
void store_tile(Stored* elements, Strides strides, const Stored* tile) {
  move_tile<false>(elements, strides, const_cast<Stored*>(tile));
}

template <class State, class Model>
RowKernels<State, Model> row_kernels() {
  return {blend<State, Model>, first_output<State, Model>, add_outputs<State, Model>};
}

template <class Stored>
TileKernels<Stored> tile_kernels() {
  return {load_tile<Stored>, store_tile<Stored>};
}

}  // namespace gbci::GBCI_CLONE
