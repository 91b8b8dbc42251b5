// Many rows of bf16 x on a processor with matrix tiles (AMX): the stored weight is widened to bf16
// a panel at a time, into a scratch that stays in the cache, and multiplied from there.
//
// y^T = W x^T: tiles of W are its own rows, so that widening is all the packing it needs.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__linux__)
#define LIBORTHO_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"

namespace libortho {

constexpr int64_t kTileRows = 16, kTileColumns = 32;
constexpr int64_t kTile = kTileRows * kTileColumns;  // bf16 numbers
constexpr int64_t kUnit = 2 * kTileRows;             // outputs that one thread takes at a time
constexpr int64_t kPanelColumns = 512;
constexpr int64_t kPanelUnits = 4;

// The kernel lets a process use tile registers only after it has asked.
inline bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

class TileSession {
 public:
  TileSession() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.column_bytes[tile] = 64;
      config.rows[tile] = kTileRows;
    }
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

inline void store_pairs(uint16_t* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// What one row of W is in columns [k, k + 32), scaled unless the whole row has one scale.
inline void widen_row(const Weight& w, int64_t n, int64_t k, uint16_t* to) {
  const int64_t group = w.group();
  if (w.storage == Storage::kFp16) {
    const Half* from = static_cast<const Half*>(w.qdata) + n * w.in + k;
    store_pairs(to, (__m512)widen(from), (__m512)widen(from + kLanes));
  } else if (w.storage == Storage::kInt8) {
    const int8_t* from = static_cast<const int8_t*>(w.qdata) + n * w.in + k;
    F low = widen(from), high = widen(from + kLanes);
    if (w.groups > 1) {
      low *= w.scale8[n * w.groups + k / group];
      high *= w.scale8[n * w.groups + (k + kLanes) / group];
    }
    store_pairs(to, (__m512)low, (__m512)high);
  }
}

// The sixteen values of an int4 group as bf16, in the low and in the high half of each lane.
struct Int4Table {
  __m512i low, high;

  Int4Table(const Weight& w, int64_t n, int64_t g) {
    const F codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float zero = w.zero[n * w.groups + g] / 16.0f;
    const F values = (codes - zero) * number(w.scale4[n * w.groups + g]);
    low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
    high = _mm512_slli_epi32(low, 16);
  }
};

inline void widen_int4(const Int4Table& table, const uint8_t* from, uint16_t* to) {
  const __m512i codes = _mm512_cvtepu8_epi32(load<__m128i>(from));
  const __m512i even = _mm512_permutexvar_epi32(codes, table.low);
  const __m512i odd = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), table.high);
  _mm512_storeu_si512(to, _mm512_or_si512(even, odd));
}

// Columns that do not fill a tile, one by one; zeros after them.
inline void widen_tail(const Weight& w, int64_t n, int64_t k, uint16_t* to) {
  for (int64_t column = 0; column < kTileColumns; ++column) {
    float value = 0;
    const int64_t at = n * w.in + k + column;
    if (k + column < w.in) {
      if (w.storage == Storage::kFp16) {
        value = number(static_cast<const Half*>(w.qdata)[at]);
      } else {
        value = static_cast<const int8_t*>(w.qdata)[at];
        if (w.groups > 1) value *= w.scale8[n * w.groups + (k + column) / w.group()];
      }
    }
    to[column] = round_bf16(value).bits;
  }
}

// Outputs [n0, n0 + 16) x columns [k0, k1) as tiles, each (16, 32), `step` numbers apart.
inline void widen_tiles(const Weight& w, int64_t n0, int64_t k0, int64_t k1, int64_t step,
                        uint16_t* panel) {
  const int64_t bytes = w.storage == Storage::kFp16 ? 2 : 1;
  for (int64_t row = 0; row < kTileRows; ++row) {
    const int64_t n = n0 + row;
    uint16_t* to = panel + row * kTileColumns;
    if (n >= w.out) {
      for (int64_t k = k0; k < k1; k += kTileColumns, to += step) {
        std::memset(to, 0, kTileColumns * 2);
      }
    } else if (w.storage == Storage::kInt4) {
      const uint8_t* from = static_cast<const uint8_t*>(w.qdata) + n * w.in / 2;
      const int64_t group = w.group();
      for (int64_t k = k0; k < k1;) {
        const int64_t g = k / group, end = std::min(k1, (g + 1) * group);
        const Int4Table table(w, n, g);
        _mm_prefetch(reinterpret_cast<const char*>(from + k1 / 2 + (k - k0) / 2), _MM_HINT_T0);
        for (; k < end; k += kTileColumns, to += step) widen_int4(table, from + k / 2, to);
      }
    } else {
      const char* from = static_cast<const char*>(w.qdata) + n * w.in * bytes;
      for (int64_t k = k0; k < k1; k += kTileColumns, to += step) {
        _mm_prefetch(from + (k1 + k - k0) * bytes, _MM_HINT_T0);
        if (k + kTileColumns <= w.in) {
          widen_row(w, n, k, to);
        } else {
          widen_tail(w, n, k, to);
        }
      }
    }
  }
}

// sums (32 outputs, padded rows) += panel x^T for one or two blocks of sixteen rows.
template <bool kTwo>
inline void multiply(const uint16_t* panel, const BFloat16* x0, const BFloat16* x1, int64_t tiles,
                     bool first, int64_t stride, float* sums) {
  float* below = sums + kTileRows * stride;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, stride * 4);
    _tile_loadd(1, below, stride * 4);
    if (kTwo) {
      _tile_loadd(2, sums + kLanes, stride * 4);
      _tile_loadd(3, below + kLanes, stride * 4);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    _tile_loadd(4, panel + 2 * tile * kTile, 64);
    _tile_loadd(6, x0 + tile * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, panel + (2 * tile + 1) * kTile, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (kTwo) {
      _tile_loadd(7, x1 + tile * kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, below, stride * 4);
  if (kTwo) {
    _tile_stored(2, sums + kLanes, stride * 4);
    _tile_stored(3, below + kLanes, stride * 4);
  }
}

// Scale, ortho stream and bias of 16 outputs; then into y.
template <class V>
void finish(const Weight& w, const Ortho<V>& ortho, const TileBlocks& x, const float* inner,
            const F* alpha, const BFloat16* bias, int64_t rows, int64_t n0, int64_t stride,
            const float* sums, BFloat16* y) {
  const int64_t blocks = stride / kLanes, outputs = std::min(kTileRows, w.out - n0);
  const bool row_scale = w.storage == Storage::kInt8 && w.groups == 1;
  for (int64_t block = 0; block < blocks; block += kBlocksAtOnce) {
    const int64_t count = std::min(kBlocksAtOnce, blocks - block);
    alignas(64) float squares[kBlocksAtOnce][kLanes * kLanes];
    for (int64_t n = 0; n < outputs; ++n) {
      F result[kBlocksAtOnce] = {};
      if (!ortho.none()) {
        switch (count) {
          case 1: ortho_blocks<1>(ortho, x, inner, alpha, block, n0 + n, result); break;
          case 2: ortho_blocks<2>(ortho, x, inner, alpha, block, n0 + n, result); break;
          case 3: ortho_blocks<3>(ortho, x, inner, alpha, block, n0 + n, result); break;
          default: ortho_blocks<4>(ortho, x, inner, alpha, block, n0 + n, result);
        }
      }
      const float scale = row_scale ? w.scale8[n0 + n] : 1.0f;
      const float added = bias == nullptr ? 0.0f : number(bias[n0 + n]);
      for (int64_t b = 0; b < count; ++b) {
        const F base = load<F>(sums + n * stride + (block + b) * kLanes);
        const F value = base * scale + result[b] + added;
        std::memcpy(squares[b] + n * kLanes, &value, sizeof(F));
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      const int64_t row = (block + b) * kLanes;
      store_square<false>(squares[b], std::min(kLanes, rows - row), outputs, w.out,
                          y + row * w.out + n0);
    }
  }
}

// Units [begin, end) of 32 outputs, every row.
template <class V>
void tile_units(const Weight& w, const Ortho<V>& ortho, const TileBlocks& x, const float* inner,
                const F* alpha, const BFloat16* bias, int64_t rows, int64_t begin, int64_t end,
                BFloat16* y) {
  const TileSession session;
  const int64_t stride = up(rows, kLanes), blocks = stride / kLanes;
  const int64_t at_once = blocks <= 2 ? 1 : kPanelUnits;
  Buffer<uint16_t> panel(at_once * kUnit * kPanelColumns);
  Buffer<float> sums(at_once * kUnit * stride);
  for (int64_t unit = begin; unit < end; unit += at_once) {
    const int64_t units = std::min(at_once, end - unit);
    for (int64_t k0 = 0; k0 < x.padded; k0 += kPanelColumns) {
      const int64_t k1 = std::min(x.padded, k0 + kPanelColumns), tiles = (k1 - k0) / kTileColumns;
      for (int64_t u = 0; u < units; ++u) {
        uint16_t* some = panel.get() + u * kUnit * kPanelColumns;
        const int64_t n = (unit + u) * kUnit;
        widen_tiles(w, n, k0, k1, 2 * kTile, some);
        widen_tiles(w, n + kTileRows, k0, k1, 2 * kTile, some + kTile);
        const auto rows_of = [&](int64_t block) {
          return x.data + (block * x.padded + k0) * kLanes;
        };
        int64_t block = 0;
        for (; block + 2 <= blocks; block += 2) {
          multiply<true>(some, rows_of(block), rows_of(block + 1), tiles, k0 == 0, stride,
                         sums.get() + u * kUnit * stride + block * kLanes);
        }
        if (block < blocks) {
          multiply<false>(some, rows_of(block), nullptr, tiles, k0 == 0, stride,
                          sums.get() + u * kUnit * stride + block * kLanes);
        }
      }
    }
    for (int64_t n = 0; n < units * kUnit; n += kTileRows) {
      if (unit * kUnit + n >= w.out) break;
      finish(w, ortho, x, inner, alpha, bias, rows, unit * kUnit + n, stride,
             sums.get() + n * stride, y);
    }
  }
}

}  // namespace libortho

#endif
