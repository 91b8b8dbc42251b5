// Products of tiles by AVX-512, where there is no AMX: one instruction multiplies a word of one output
// by the words of sixteen rows of x. The same tiles, read in the same order.
#pragma once

#include <type_traits>

#include "blocks.h"

namespace libortho {

inline bool tiles_permitted() { return true; }

constexpr int64_t kSumTiles = 4;  // that are summed up one after the other where sums must be exact

// AVX-512 multiplies unsigned bytes by signed ones: INT8 of x comes raised by 128 (its highest bit is
// the other one), and what that adds to a sum is taken off again.
constexpr int8_t kRaised = -128;

// Nothing to set up.
class TileSession {
 public:
  explicit TileSession(int64_t = kTileRows) {}
};

// Each lane's sum += the products of its word of x, and of one of a weight's row. Spelled out: GCC 12
// copies and stores the sums around its own form of it.
inline void add_products(__m512& sum, __m512i x, __m512i weight) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
}
inline void add_products(__m512i& sum, __m512i x, __m512i weight) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
}

// The sums of H outputs, whose rows of a tile lie one after the other, by B blocks of x: (H, B, 16). Not
// inlined, so that they stay in registers.
template <bool kInt8, int H, int B>
__attribute__((noinline)) void multiply_rows(const uint8_t* outputs, int64_t step,
                                             const uint8_t* x0, const uint8_t* x1, int64_t tiles,
                                             float* to) {
  std::conditional_t<kInt8, __m512i, __m512> first[H] = {}, second[H] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint8_t* own = outputs + tile * step;
    for (int64_t word = 0; word < kTileBytes; word += 4) {
      const int64_t at = tile * kTile + word * kLanes;
      const __m512i left = _mm512_loadu_si512(x0 + at);
      const __m512i right = B == 2 ? _mm512_loadu_si512(x1 + at) : left;
#pragma GCC unroll 16
      for (int h = 0; h < H; ++h) {
        const __m512i weight = _mm512_set1_epi32(load<int32_t>(own + h * kTileBytes + word));
        add_products(first[h], left, weight);
        if constexpr (B == 2) add_products(second[h], right, weight);
      }
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < H; ++h) {
    _mm512_storeu_si512(to + h * B * kLanes, (__m512i)first[h]);
    if constexpr (B == 2) {
      _mm512_storeu_si512(to + (2 * h + 1) * kLanes, (__m512i)second[h]);
    }
  }
}

// Sums of 32 outputs that are to become a panel's, less what kRaised will add to them.
inline void lower_sums(const uint8_t* panel, int64_t tiles, bool first, int64_t stride,
                       float* sums) {
  for (int64_t n = 0; n < 2 * kTileRows; ++n) {
    const uint8_t* own = panel + n / kTileRows * kTile + n % kTileRows * kTileBytes;
    __m512i excess = _mm512_setzero_si512();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const __m512i row = _mm512_loadu_si512(own + 2 * tile * kTile);
      add_products(excess, _mm512_set1_epi8(kRaised), row);
    }
    const int32_t all = _mm512_reduce_add_epi32(excess);
    for (int64_t i = 0; i < stride; i += kLanes) {
      const I value = (first ? I{} : load<I>(sums + n * stride + i)) - all;
      std::memcpy(sums + n * stride + i, &value, sizeof value);
    }
  }
}

// sums (32 outputs, padded rows) += panel x^T for one or two blocks of sixteen rows.
template <bool kInt8, bool kTwo>
inline void multiply(const uint8_t* panel, const uint8_t* x0, const uint8_t* x1, int64_t tiles,
                     bool first, int64_t stride, float* sums) {
  constexpr int kOutputs = kTwo ? 8 : 16, kBlocks = kTwo ? 2 : 1;
  alignas(64) float some[kOutputs * kBlocks * kLanes];
  for (int64_t n = 0; n < 2 * kTileRows; n += kOutputs) {
    const uint8_t* outputs = panel + n / kTileRows * kTile + n % kTileRows * kTileBytes;
    multiply_rows<kInt8, kOutputs, kBlocks>(outputs, 2 * kTile, x0, x1, tiles, some);
    for (int64_t h = 0; h < kOutputs; ++h) {
      float* to = sums + (n + h) * stride;
      for (int64_t i = 0; i < kBlocks * kLanes; i += kLanes) {
        const float* from = some + h * kBlocks * kLanes + i;
        if constexpr (kInt8) {
          const I value = load<I>(from) + (first ? I{} : load<I>(to + i));
          std::memcpy(to + i, &value, sizeof value);
        } else {
          const F value = load<F>(from) + (first ? F{} : load<F>(to + i));
          std::memcpy(to + i, &value, sizeof value);
        }
      }
    }
  }
}

// band x^T of one block: (height, 16), for a band of (tiles, height, 32) bf16; `height` is even.
inline void multiply_band(const uint16_t* band, int64_t height, int64_t tiles, const uint8_t* x,
                          float* to) {
  const auto some = [&]<int H>(int64_t from) {
    const uint8_t* outputs = reinterpret_cast<const uint8_t*>(band) + from * kTileBytes;
    multiply_rows<false, H, 1>(outputs, height * kTileBytes, x, nullptr, tiles, to + from * kLanes);
  };
  int64_t at = 0;
  for (; at + 8 <= height; at += 8) some.template operator()<8>(at);
  if (at + 4 <= height) {
    some.template operator()<4>(at);
    at += 4;
  }
  if (at < height) some.template operator()<2>(at);
}

}  // namespace libortho
