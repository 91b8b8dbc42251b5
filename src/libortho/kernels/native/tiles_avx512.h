// Products of tiles by AVX-512, where there is no AMX: one instruction multiplies a word of one output
// by the words of sixteen rows of x. The same tiles, read in the same order.
#pragma once

#include <type_traits>

#include "blocks.h"

namespace libortho {

inline bool tiles_permitted() { return true; }

constexpr int64_t kSumTiles = 4;  // that are summed up one after the other where sums must be exact

// Nothing to set up.
class TileSession {
 public:
  explicit TileSession(int64_t = kTileRows) {}
};

// H outputs, whose rows of a tile lie one after the other, by B blocks of x.
template <bool kInt8, int H, int B>
struct Sums {
  std::conditional_t<kInt8, __m512i, __m512> at[H][B] = {};

  void add(const uint8_t* outputs, int64_t step, const uint8_t* const (&x)[B], int64_t tiles) {
    // AVX-512 multiplies unsigned bytes by signed ones: x is raised by 128, and what that adds is
    // taken off again.
    const __m512i raised = _mm512_set1_epi8(-128);
    __m512i excess[H];
    if constexpr (kInt8) {
      for (int h = 0; h < H; ++h) excess[h] = _mm512_setzero_si512();
    }
    for (int64_t tile = 0; tile < tiles; ++tile, outputs += step) {
      if constexpr (kInt8) {
        for (int h = 0; h < H; ++h) {
          const __m512i row = _mm512_loadu_si512(outputs + h * kTileBytes);
          excess[h] = _mm512_dpbusd_epi32(excess[h], raised, row);
        }
      }
      for (int64_t word = 0; word < kTileBytes; word += 4) {
        __m512i columns[B];
        for (int b = 0; b < B; ++b) {
          columns[b] = _mm512_loadu_si512(x[b] + tile * kTile + word * kLanes);
          if constexpr (kInt8) columns[b] = _mm512_xor_si512(columns[b], raised);
        }
        for (int h = 0; h < H; ++h) {
          const __m512i own = _mm512_set1_epi32(load<int32_t>(outputs + h * kTileBytes + word));
          for (int b = 0; b < B; ++b) {
            if constexpr (kInt8) {
              at[h][b] = _mm512_dpbusd_epi32(at[h][b], columns[b], own);
            } else {
              at[h][b] = _mm512_dpbf16_ps(at[h][b], (__m512bh)own, (__m512bh)columns[b]);
            }
          }
        }
      }
    }
    if constexpr (kInt8) {
      for (int h = 0; h < H; ++h) {
        const __m512i all = _mm512_set1_epi32(_mm512_reduce_add_epi32(excess[h]));
        for (int b = 0; b < B; ++b) at[h][b] = _mm512_sub_epi32(at[h][b], all);
      }
    }
  }
};

// sums (32 outputs, padded rows) += panel x^T for one or two blocks of sixteen rows.
template <bool kInt8, bool kTwo>
inline void multiply(const uint8_t* panel, const uint8_t* x0, const uint8_t* x1, int64_t tiles,
                     bool first, int64_t stride, float* sums) {
  constexpr int kOutputs = kTwo ? 8 : 16, kBlocks = kTwo ? 2 : 1;
  const uint8_t* x[kBlocks] = {x0};
  if constexpr (kTwo) x[1] = x1;
  for (int64_t n = 0; n < 2 * kTileRows; n += kOutputs) {
    const uint8_t* outputs = panel + n / kTileRows * kTile + n % kTileRows * kTileBytes;
    float* to = sums + n * stride;
    Sums<kInt8, kOutputs, kBlocks> some;
    some.add(outputs, 2 * kTile, x, tiles);
    for (int h = 0; h < kOutputs; ++h) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = to + h * stride + b * kLanes;
        if constexpr (kInt8) {
          const __m512i before = first ? _mm512_setzero_si512() : _mm512_loadu_si512(at);
          _mm512_storeu_si512(at, _mm512_add_epi32(some.at[h][b], before));
        } else {
          const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
          _mm512_storeu_ps(at, _mm512_add_ps(some.at[h][b], before));
        }
      }
    }
  }
}

// band x^T of one block: (height, 16), for a band of (tiles, height, 32) bf16; `height` is even.
inline void multiply_band(const uint16_t* band, int64_t height, int64_t tiles, const uint8_t* x,
                          float* to) {
  const auto some = [&]<int H>(int64_t from) {
    Sums<false, H, 1> sums;
    const uint8_t* const columns[1] = {x};
    const uint8_t* outputs = reinterpret_cast<const uint8_t*>(band) + from * kTileBytes;
    sums.add(outputs, height * kTileBytes, columns, tiles);
    std::memcpy(to + from * kLanes, sums.at, sizeof sums.at);
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
