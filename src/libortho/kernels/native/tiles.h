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
constexpr int64_t kPanelRows = 256;  // of x, so that sums and x's part of a panel stay in the cache

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

// One row of int8 or fp16 over columns [k0, k1), which are whole tiles; times `scale` if kScaled.
template <bool kScaled, class Q>
inline void widen_row(const Q* from, float scale, int64_t k0, int64_t k1, int64_t step,
                      uint16_t* to) {
  for (int64_t k = k0; k < k1; k += kTileColumns, to += step) {
    _mm_prefetch(reinterpret_cast<const char*>(from + k + kPanelColumns), _MM_HINT_T0);
    F low = widen(from + k), high = widen(from + k + kLanes);
    if (kScaled) {
      low *= scale;
      high *= scale;
    }
    store_pairs(to, (__m512)low, (__m512)high);
  }
}

// Packed codes of one int4 group. A table of the group's sixteen values, already bf16, stands in
// the low and in the high half of each lane; a byte's two codes choose one from each.
inline void widen_row4(const uint8_t* from, float scale, float zero, int64_t k0, int64_t k1,
                       int64_t step, uint16_t* to) {
  const F codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F values = (codes - zero / 16) * scale;
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
  const __m512i high = _mm512_slli_epi32(low, 16);
  _mm_prefetch(reinterpret_cast<const char*>(from + (k0 + kPanelColumns) / 2), _MM_HINT_T0);
  for (int64_t k = k0; k < k1; k += kTileColumns, to += step) {
    const __m512i pairs = _mm512_cvtepu8_epi32(load<__m128i>(from + k / 2));
    const __m512i even = _mm512_permutexvar_epi32(pairs, low);
    const __m512i odd = _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), high);
    _mm512_storeu_si512(to, _mm512_or_si512(even, odd));
  }
}

// The columns after the last whole tile, one by one, and zeros after them.
template <class Q>
inline void widen_tail(const Q* from, int64_t count, uint16_t* to) {
  for (int64_t k = 0; k < kTileColumns; ++k) {
    to[k] = round_bf16(k < count ? number(from[k]) : 0.0f).bits;
  }
}

template <class Q>
inline void widen_plain(const Q* from, int64_t in, int64_t k0, int64_t k1, int64_t step,
                        uint16_t* to) {
  const int64_t whole = std::min(k1, in / kTileColumns * kTileColumns);
  widen_row<false>(from, 1, k0, whole, step, to);
  if (whole < k1) widen_tail(from + whole, in - whole, to + (whole - k0) / kTileColumns * step);
}

// Outputs [n0, n0 + 16) x columns [k0, k1) as tiles, each (16, 32), `step` numbers apart. Rows of
// int8 with one scale keep it for the end. Groups are multiples of 32 columns.
inline void widen_tiles(const Weight& w, int64_t n0, int64_t k0, int64_t k1, int64_t step,
                        uint16_t* panel) {
  const int64_t group = w.group();
  for (int64_t row = 0; row < kTileRows; ++row) {
    const int64_t n = n0 + row;
    uint16_t* to = panel + row * kTileColumns;
    if (n >= w.out) {
      for (int64_t k = k0; k < k1; k += kTileColumns, to += step) {
        std::memset(to, 0, kTileColumns * 2);
      }
    } else if (w.storage == Storage::kFp16) {
      widen_plain(static_cast<const Half*>(w.qdata) + n * w.in, w.in, k0, k1, step, to);
    } else if (w.groups == 1 && w.storage == Storage::kInt8) {
      widen_plain(static_cast<const int8_t*>(w.qdata) + n * w.in, w.in, k0, k1, step, to);
    } else {
      int64_t g = k0 / group;
      for (int64_t k = k0; k < k1; ++g) {
        const int64_t end = std::min(k1, (g + 1) * group), at = n * w.groups + g;
        if (w.storage == Storage::kInt8) {
          widen_row<true>(static_cast<const int8_t*>(w.qdata) + n * w.in, w.scale8[at], k, end,
                          step, to);
        } else {
          widen_row4(static_cast<const uint8_t*>(w.qdata) + n * w.in / 2, number(w.scale4[at]),
                     w.zero[at], k, end, step, to);
        }
        to += (end - k) / kTileColumns * step;
        k = end;
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
void finish(const Weight& w, const Ortho<V>& ortho, const float* inner, const float* sparse,
            const BFloat16* bias, int64_t rows, int64_t n0, const float* sums, BFloat16* y) {
  const int64_t blocks = up(rows, kLanes) / kLanes, outputs = std::min(kTileRows, w.out - n0);
  const bool row_scale = w.storage == Storage::kInt8 && w.groups == 1;
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) float square[kLanes * kLanes];
    for (int64_t n = 0; n < outputs; ++n) {
      const int64_t at = (n * blocks + block) * kLanes;
      F value = load<F>(sums + at);
      if (row_scale) value *= w.scale8[n0 + n];
      if (ortho.kind == OrthoKind::kLowRank) value += low_rank_lanes(ortho, inner, block, n0 + n);
      if (ortho.kind == OrthoKind::kSparse) value += load<F>(sparse + at);
      if (bias != nullptr) value += number(bias[n0 + n]);
      std::memcpy(square + n * kLanes, &value, sizeof(F));
    }
    const int64_t row = block * kLanes;
    store_square<false>(square, std::min(kLanes, rows - row), outputs, w.out,
                        y + row * w.out + n0);
  }
}

// Units [begin, end) of 32 outputs, for a panel of at most kPanelRows rows.
template <class V>
void tile_units(const Weight& w, const Ortho<V>& ortho, const TileBlocks& x, const float* inner,
                const F* alpha, const BFloat16* bias, int64_t rows, int64_t begin, int64_t end,
                BFloat16* y) {
  const int64_t stride = up(rows, kLanes), blocks = stride / kLanes;
  const int64_t at_once = blocks <= 2 ? 1 : kPanelUnits;
  const bool sparse = ortho.kind == OrthoKind::kSparse;
  const int64_t first = begin * kUnit, last = std::min(w.out, end * kUnit);
  const Buffer<float> terms(sparse ? (last - first) * stride : 0);
  if (sparse) ortho_rows(ortho, x, inner, alpha, blocks, first, last, terms.get());
  const Buffer<uint16_t> panel(at_once * kUnit * kPanelColumns);
  const Buffer<float> sums(at_once * kUnit * stride);
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
    for (int64_t n = unit * kUnit; n < std::min(last, (unit + units) * kUnit); n += kTileRows) {
      finish(w, ortho, inner, terms.get() + (sparse ? (n - first) * stride : 0), bias, rows, n,
             sums.get() + (n - unit * kUnit) * stride, y);
    }
  }
}

}  // namespace libortho

#endif
