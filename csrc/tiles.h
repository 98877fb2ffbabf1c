// Tiles: a few channels times a run of positions of a strided tensor, as rows of unit stride in float32 or float64.

#pragma once

#include <cstdint>

#include "blend_step.h"
#include "half.h"
#include "simd.h"

namespace gbci {

constexpr int64_t kTileWidth = 256;  // positions, a multiple of 64
constexpr int64_t kTileChannels = 4;
constexpr int64_t kTileElements = kTileChannels * kTileWidth;  // rows are kTileWidth apart

// Where in a tensor a tile lies.
struct Region {
  int64_t sample, channel, channels, position, count;
};

GBCI_INLINE float widen(float x) { return x; }
GBCI_INLINE double widen(double x) { return x; }

template <class Narrow>
Narrow narrow(double x);

template <>
GBCI_INLINE float narrow<float>(float x) {
  return x;
}

template <>
GBCI_INLINE double narrow<double>(double x) {
  return x;
}

template <class Element>
Element* element(const View& view, const Region& region, int64_t row) {
  return static_cast<Element*>(view.data) + region.sample * view.batch + (region.channel + row) * view.channel +
         region.position * view.position;
}

template <class Element, class Real>
GBCI_INLINE void load_elements(const View& view, const Region& region, Real* tile) {
  if (region.channels == 4 && view.channel == 1 && view.position == 4) {  // channels-last latents
    const Element* source = element<Element>(view, region, 0);
    for (int64_t i = 0; i < region.count; ++i) {
      tile[i] = widen(source[4 * i]);
      tile[kTileWidth + i] = widen(source[4 * i + 1]);
      tile[2 * kTileWidth + i] = widen(source[4 * i + 2]);
      tile[3 * kTileWidth + i] = widen(source[4 * i + 3]);
    }
    return;
  }
  for (int64_t row = 0; row < region.channels; ++row) {
    const Element* source = element<Element>(view, region, row);
    if (view.position == 1) {
      for (int64_t i = 0; i < region.count; ++i) {
        tile[row * kTileWidth + i] = widen(source[i]);
      }
    } else {
      for (int64_t i = 0; i < region.count; ++i) {
        tile[row * kTileWidth + i] = widen(source[i * view.position]);
      }
    }
  }
}

template <class Element, class Real>
GBCI_INLINE void store_elements(
    const View& view, const Region& region, const Real* tile) {
  if (region.channels == 4 && view.channel == 1 && view.position == 4) {
    Element* target = element<Element>(view, region, 0);
    for (int64_t i = 0; i < region.count; ++i) {
      target[4 * i] = narrow<Element>(tile[i]);
      target[4 * i + 1] = narrow<Element>(tile[kTileWidth + i]);
      target[4 * i + 2] = narrow<Element>(tile[2 * kTileWidth + i]);
      target[4 * i + 3] = narrow<Element>(tile[3 * kTileWidth + i]);
    }
    return;
  }
  for (int64_t row = 0; row < region.channels; ++row) {
    Element* target = element<Element>(view, region, row);
    if (view.position == 1) {
      for (int64_t i = 0; i < region.count; ++i) {
        target[i] = narrow<Element>(tile[row * kTileWidth + i]);
      }
    } else {
      for (int64_t i = 0; i < region.count; ++i) {
        target[i * view.position] = narrow<Element>(tile[row * kTileWidth + i]);
      }
    }
  }
}

GBCI_SIMD_CLONES inline void load_tile(const View& view, const Region& region, float* tile) {
  switch (view.dtype) {
    case torch::headeronly::ScalarType::BFloat16:
      return load_elements<BFloat16>(view, region, tile);
    case torch::headeronly::ScalarType::Half:
      return load_elements<Float16>(view, region, tile);
    default:
      return load_elements<float>(view, region, tile);
  }
}

GBCI_SIMD_CLONES inline void store_tile(const View& view, const Region& region, const float* tile) {
  switch (view.dtype) {
    case torch::headeronly::ScalarType::BFloat16:
      return store_elements<BFloat16>(view, region, tile);
    case torch::headeronly::ScalarType::Half:
      return store_elements<Float16>(view, region, tile);
    default:
      return store_elements<float>(view, region, tile);
  }
}

inline void load_tile(const View& view, const Region& region, double* tile) {
  load_elements<double>(view, region, tile);
}

inline void store_tile(const View& view, const Region& region, const double* tile) {
  store_elements<double>(view, region, tile);
}

}  // namespace gbci
