// The tensors of blend_step in tiles of a few channels times a run of positions. rows.h computes with a tile's rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "blend_step.h"

namespace gbci {

// The place of a tile in a tensor.
struct Region {
  int64_t sample, channel, channels, position, positions;
};

// A tile of a tensor: the tensor's own memory if the positions are neighbors, otherwise a copy.
template <class Stored>
class Tile {
 public:
  // Moves to a region; `read`: whether its values are needed.
  void open(const View& view, const Region& region, bool read) {
    if (!view.data) {
      return;
    }
    elements_ = static_cast<Stored*>(view.data) + region.sample * view.batch + region.channel * view.channel +
                region.position * view.position;
    strides_ = {view.channel, view.position, region.channels, region.positions};
    if (view.position == 1) {
      first_ = elements_;
      row_stride_ = view.channel;
    } else {
      first_ = copy_;
      row_stride_ = kTileWidth;
      if (read) {
        kernels_.load(elements_, strides_, copy_);
      }
    }
  }

  // Writes the values back to the tensor.
  void close() const {
    if (first_ == copy_) {
      kernels_.store(elements_, strides_, copy_);
    }
  }

  // Null if the tensor is absent.
  Stored* row(int64_t row, int64_t position) { return first_ ? first_ + row * row_stride_ + position : nullptr; }

 private:
  const TileKernels<Stored> kernels_ = tile_kernels<Stored>();
  Stored *elements_ = nullptr, *first_ = nullptr;
  Strides strides_;
  int64_t row_stride_;
  Stored copy_[kTileChannels * kTileWidth];
};

// The tiles of all tensors of a step.
template <class State, class Model>
class Tiles {
 public:
  explicit Tiles(const BlendStep& args) : args_(args) {}

  void open(const Region& region) {
    latents_.open(args_.latents, region, true);
    conditional_.open(args_.conditional, region, true);
    unconditional_.open(args_.unconditional, region, true);
    previous_.open(args_.previous, region, true);
    older_.open(args_.older, region, true);
    corrected_before_.open(args_.corrected_before, region, true);
    noise_.open(args_.noise, region, true);
    known_.open(args_.known, region, true);
    known_noise_.open(args_.known_noise, region, true);
    weight_.open(args_.weight, region, true);
    denoised_.open(args_.denoised, region, false);
    corrected_.open(args_.corrected, region, false);
    model_input_.open(args_.model_input, region, false);
    out_.open(args_.out, region, false);
  }

  // Row number `row` of each tensor's tile, from a position of the region on.
  Rows<State, Model> rows(int64_t row, int64_t position) {
    const auto at = [&](auto& tile) { return tile.row(row, position); };
    return {
        .latents = at(latents_),
        .previous = at(previous_),
        .older = at(older_),
        .corrected_before = at(corrected_before_),
        .noise = at(noise_),
        .known = at(known_),
        .known_noise = at(known_noise_),
        .conditional = at(conditional_),
        .unconditional = at(unconditional_),
        .weight = at(weight_),
        .drawn = nullptr,
        .denoised = at(denoised_),
        .corrected = at(corrected_),
        .out = at(out_),
        .model_input = at(model_input_),
    };
  }

  void close() const {
    denoised_.close();
    corrected_.close();
    model_input_.close();
    out_.close();
  }

 private:
  const BlendStep& args_;
  Tile<State> latents_, previous_, older_, corrected_before_, noise_, known_, known_noise_;
  Tile<State> denoised_, corrected_, out_;
  Tile<Model> conditional_, unconditional_, model_input_;
  Tile<RealOf<State>> weight_;
};

// The tiles of a step in memory order of NCHW, for the prefetchers.
struct Grid {
  explicit Grid(const BlendStep& args) : channels(args.channels), positions(args.positions) {
    for (const View* view : {&args.latents, &args.conditional, &args.unconditional, &args.previous, &args.older,
                             &args.corrected_before, &args.noise, &args.known, &args.known_noise, &args.denoised,
                             &args.corrected, &args.model_input, &args.out}) {
      if (view->data && view->position != 1) {
        group = std::min(channels, kTileChannels);  // one pass over channels-last memory fills that many rows
        width = kTileWidth;
      }
    }
    if (args.weight.data && args.weight.position != 1) {  // shared by the channels
      width = kTileWidth;
    }
    width = std::min(width, positions);
    runs = (positions + width - 1) / width;
    per_sample = (channels + group - 1) / group * runs;
  }

  Region region(int64_t index) const {
    const int64_t channel = index % per_sample / runs * group, position = index % runs * width;
    return {index / per_sample, channel, std::min(group, channels - channel), position,
            std::min(width, positions - position)};
  }

  int64_t channels, positions, group = 1;
  int64_t width = 8 * kTileWidth;  // long if nothing is copied: starting a row costs as much as 100 elements
  int64_t runs, per_sample;
};

}  // namespace gbci
