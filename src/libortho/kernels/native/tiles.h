// Many rows of bf16 x on a processor that multiplies bf16, by matrix tiles (AMX) or by vectors: the
// stored weight is widened to bf16 a panel at a time, into a scratch that stays in the cache, and
// multiplied from there. With x rounded to INT8, an INT8 weight needs no widening, and tiles hold
// twice as many columns.
//
// y^T = W x^T: tiles of W are its own rows, so that widening is all the packing it needs.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define LIBORTHO_TILES 1

#include "terms.h"

// Both have `tiles_permitted`, `kSumTiles`, `kRaised`, `lower_sums`, `TileSession`, `multiply` and
// `multiply_band`.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define LIBORTHO_AMX 1
#include "tiles_amx.h"
#else
#include "tiles_avx512.h"
#endif

namespace libortho {

constexpr int64_t kUnit = 2 * kTileRows;  // outputs that one thread takes at a time
constexpr int64_t kPanelBytes = 1024;  // of a row
constexpr int64_t kPanelColumns = kPanelBytes / 2;
constexpr int64_t kPanelUnits = 4;
constexpr int64_t kCachedBytes = 1 << 20;  // of x that the second cache holds beside a panel
constexpr int64_t kPanelRows = 256;  // of x, so that sums and x's part of a panel stay in the cache

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

// INT8 rows as they are: outputs [n0, n0 + 16) x columns [k0, k1), zeros past the last of each.
inline void copy_tiles(const Weight& w, int64_t n0, int64_t k0, int64_t k1, int64_t step,
                       uint8_t* panel) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    uint8_t* to = panel + row * kTileBytes;
    const uint8_t* from = static_cast<const uint8_t*>(w.qdata) + (n0 + row) * w.in;
    for (int64_t k = k0; k < k1; k += kTileBytes, to += step) {
      const int64_t count = n0 + row < w.out ? std::min(kTileBytes, w.in - k) : 0;
      if (count == kTileBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(from + k + kPanelBytes), _MM_HINT_T0);
        _mm512_storeu_si512(to, _mm512_loadu_si512(from + k));
      } else {
        std::memset(to, 0, kTileBytes);
        if (count > 0) std::memcpy(to, from + k, count);
      }
    }
  }
}

// A row of x as INT8 codes, raised by kRaised, and the step between them. A row with infinity or NaN
// has step NaN, so that what is multiplied by it is NaN too. (|x| is compared by its bits, whose order
// is that of the numbers with NaN at the top; compilers may take arithmetic on NaN for nothing.)
inline float round_row(const BFloat16* x, int64_t in, int8_t* codes) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + kLanes <= in; k += kLanes) {
    largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)widen(x + k), magnitude));
  }
  uint32_t reach = _mm512_reduce_max_epu32(largest);
  for (; k < in; ++k) {
    reach = std::max(reach, static_cast<uint32_t>(x[k].bits & 0x7fff) << 16);
  }
  if (reach >= 0x7f800000u) {
    std::memset(codes, 0, in);
    return std::bit_cast<float>(0x7fc00000u);
  }
  const float step = std::max(std::bit_cast<float>(reach), 1.17549435e-38f) / 127;
  const float inverse = 1 / step;
  for (k = 0; k + kLanes <= in; k += kLanes) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(widen(x + k) * inverse));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(kRaised));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), bytes);
  }
  for (; k < in; ++k) {
    codes[k] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(number(x[k]) * inverse)) ^ kRaised);
  }
  return step;
}

// The right factor for tiles: each of its numbers as the sum of two of bf16, in two rows, which is
// exact for fp16 and bf16. Bands of at most 16 rows; a band is (tiles, height, 32).
class RightTiles {
 public:
  template <class V>
  RightTiles(const Ortho<V>& ortho, int64_t in, int64_t padded)
      : rank_(ortho.rank), tiles_(padded / kTileBytes),
        height_(std::min(kTileRows, 2 * rank_)),
        bands_(rank_ == 0 ? 0 : up(2 * rank_, height_) / height_),
        data_(bands_ * tiles_ * height_ * kTileColumns) {
    std::memset(data_.get(), 0, bands_ * tiles_ * height_ * kTileBytes);
    for (int64_t r = 0; r < rank_; ++r) {
      uint16_t* to = data_.get() + 2 * r / height_ * tiles_ * height_ * kTileColumns +
                     2 * r % height_ * kTileColumns;
      for (int64_t k = 0; k < in; k += kLanes) {
        const F value = widen_first(ortho.right + r * in + k, in - k);
        const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)value);
        const F rest = value - (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        uint16_t* at = to + k / kTileColumns * height_ * kTileColumns + k % kTileColumns;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), high);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + kTileColumns),
                            (__m256i)_mm512_cvtneps_pbh((__m512)rest));
      }
    }
  }

  int64_t height() const { return height_; }

  // alpha * right x^T of one block: (rank, 16), within a TileSession of `height()`.
  void inner(const uint8_t* x, F alpha, float* to) const {
    alignas(64) float sums[kTileRows * kLanes];
    const int64_t size = height_ * kTileColumns;
    for (int64_t band = 0; band < bands_; ++band) {
      multiply_band(data_.get() + band * tiles_ * size, height_, tiles_, x, sums);
      const int64_t first = band * height_ / 2;
      for (int64_t r = first; r < std::min(rank_, first + height_ / 2); ++r) {
        const float* both = sums + 2 * (r - first) * kLanes;
        const F total = switched(alpha, load<F>(both) + load<F>(both + kLanes));
        std::memcpy(to + r * kLanes, &total, sizeof total);
      }
    }
  }

 private:
  int64_t rank_, tiles_, height_, bands_;
  Buffer<uint16_t> data_;
};

// Scale, ortho stream and bias of 16 outputs, of which the first is the `of`-th of `terms`; then
// into y.
template <bool kInt8>
void finish(const Weight& w, const Terms& terms, int64_t of, const float* inner, const F* steps,
            const BFloat16* bias, int64_t rows, int64_t n0, const float* sums, BFloat16* y) {
  const int64_t blocks = up(rows, kLanes) / kLanes, outputs = std::min(kTileRows, w.out - n0);
  const bool row_scale = w.storage == Storage::kInt8 && w.groups == 1;
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) float square[kLanes * kLanes];
    for (int64_t n = 0; n < outputs; ++n) {
      const int64_t at = (n * blocks + block) * kLanes;
      F value = load<F>(sums + at);
      if (kInt8) value = __builtin_convertvector(std::bit_cast<I>(value), F) * steps[block];
      if (row_scale) value *= w.scale8[n0 + n];
      if (!terms.none()) value += terms.lanes(of + n, inner, block);
      if (bias != nullptr) value += number(bias[n0 + n]);
      std::memcpy(square + n * kLanes, &value, sizeof(F));
    }
    const int64_t row = block * kLanes;
    store_square<false>(square, std::min(kLanes, rows - row), outputs, w.out,
                        y + row * w.out + n0);
  }
}

// x of a panel of rows, as tiles read it and as the ortho stream does (the same for bf16 tiles).
struct Panel {
  TileBlocks base, ortho;
  const F* steps;  // INT8 tiles: of each row
  int64_t rows;
};

// Units [begin, end) of 32 outputs, for a panel of at most kPanelRows rows.
template <bool kInt8, class V>
void tile_units(const Weight& w, const Ortho<V>& ortho, const Panel& x, const float* inner,
                const F* alpha, const BFloat16* bias, int64_t begin, int64_t end, BFloat16* y) {
  const int64_t stride = up(x.rows, kLanes), blocks = stride / kLanes;
  const int64_t at_once = blocks <= 2 ? 1 : kPanelUnits;
  const int64_t last = std::min(w.out, end * kUnit);
  // Of a sparse stream all outputs at once where x is larger than the cache: x would come from
  // memory again for each few of them.
  const bool whole = ortho.kind == OrthoKind::kSparse && stride * x.ortho.padded > kCachedBytes;
  const int64_t start = begin * kUnit;
  Terms terms(ortho, whole ? last - start : at_once * kUnit, start, last, stride);
  if (whole) terms.fill(ortho, x.ortho, alpha, start, last);
  const Buffer<uint8_t> panel(at_once * kUnit * kPanelBytes);
  const Buffer<float> sums(at_once * kUnit * stride);
  for (int64_t unit = begin; unit < end; unit += at_once) {
    const int64_t units = std::min(at_once, end - unit);
    for (int64_t b0 = 0; b0 < x.base.padded; b0 += kPanelBytes) {
      const int64_t b1 = std::min(x.base.padded, b0 + kPanelBytes), tiles = (b1 - b0) / kTileBytes;
      for (int64_t u = 0; u < units; ++u) {
        uint8_t* some = panel.get() + u * kUnit * kPanelBytes;
        const int64_t n = (unit + u) * kUnit;
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t n0 = n + half * kTileRows;
          if constexpr (kInt8) {
            copy_tiles(w, n0, b0, b1, 2 * kTile, some + half * kTile);
          } else {
            widen_tiles(w, n0, b0 / 2, b1 / 2, kTile,
                        reinterpret_cast<uint16_t*>(some + half * kTile));
          }
        }
        const auto rows_of = [&](int64_t block) {
          return x.base.data + (block * x.base.padded + b0) * kLanes;
        };
        float* to = sums.get() + u * kUnit * stride;
        bool first = b0 == 0;
        if constexpr (kInt8 && kRaised != 0) {
          lower_sums(some, tiles, first, stride, to);
          first = false;
        }
        int64_t block = 0;
        for (; block + 2 <= blocks; block += 2) {
          multiply<kInt8, true>(some, rows_of(block), rows_of(block + 1), tiles, first, stride,
                                to + block * kLanes);
        }
        if (block < blocks) {
          multiply<kInt8, false>(some, rows_of(block), nullptr, tiles, first, stride,
                                 to + block * kLanes);
        }
      }
    }
    const int64_t first = unit * kUnit, after = std::min(last, first + units * kUnit);
    if (!whole) terms.fill(ortho, x.ortho, alpha, first, after);
    for (int64_t n = first; n < after; n += kTileRows) {
      finish<kInt8>(w, terms, n - (whole ? start : first), inner, x.steps, bias, x.rows, n,
                    sums.get() + (n - first) * stride, y);
    }
  }
}

}  // namespace libortho

#endif
