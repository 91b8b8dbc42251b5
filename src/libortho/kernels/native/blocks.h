// Many rows of x: sixteen rows are the lanes of a vector, so that the ortho stream, which touches
// single columns, reads neighbours. Results are therefore transposed, (out, rows), until stored.
#pragma once

#include <algorithm>

#include "operands.h"

namespace libortho {

// x packed as fp32: block b of sixteen rows is (in, 16).
struct FloatBlocks {
  const float* data;
  int64_t in;

  F column(int64_t block, int64_t k) const { return load<F>(data + (block * in + k) * kLanes); }
  void pair(int64_t block, int64_t k, F& first, F& second) const {
    first = column(block, k);
    second = column(block, k + 1);
  }
};

constexpr int64_t kTileBytes = 64;  // of a tile's row
constexpr int64_t kTileRows = 16;
constexpr int64_t kTile = kTileRows * kTileBytes;
constexpr int64_t kTileColumns = kTileBytes / 2;  // of bf16

// x packed in the order that tile products read: block b of sixteen rows is (words, 16 rows), a word
// being four neighbouring bytes of a row: two columns of bf16, or four of INT8. Zeros follow the
// last column up to a multiple of kTileBytes.
struct TileBlocks {
  const uint8_t* data;
  int64_t padded;  // bytes of a row
};

template <class X>
void pack_floats(const X* x, int64_t rows, int64_t in, int64_t block, float* packed) {
  float* to = packed + block * in * kLanes;
  const int64_t count = std::min(kLanes, rows - block * kLanes);
  const X* from = x + block * kLanes * in;
  for (int64_t k = 0; k < in; ++k) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      to[k * kLanes + lane] = lane < count ? number(from[lane * in + k]) : 0.0f;
    }
  }
}

// `count` rows of `bytes` bytes each into one block, see TileBlocks.
inline void pack_tiles(const void* x, int64_t count, int64_t bytes, uint8_t* to) {
  const uint8_t* from = static_cast<const uint8_t*>(x);
  int64_t at = 0;
#ifdef __AVX512F__
  for (; at + 64 <= bytes; at += 64) {
    __m512i words[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      words[lane] = lane < count ? _mm512_loadu_si512(from + lane * bytes + at)
                                 : _mm512_setzero_si512();
    }
    transpose(words);
    for (int64_t i = 0; i < kLanes; ++i) {
      _mm512_storeu_si512(to + (at + 4 * i) * kLanes, words[i]);
    }
  }
#endif
  for (; at < up(bytes, 64); at += 4) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < 4; ++i) {
        const bool inside = lane < count && at + i < bytes;
        to[at * kLanes + 4 * lane + i] = inside ? from[lane * bytes + at + i] : 0;
      }
    }
  }
}

// alpha of each lane of a block; 0 past the last row.
inline F alpha_lanes(Alpha alpha, int64_t rows, int64_t block) {
  F value = {};
  for (int64_t lane = 0; lane < std::min(kLanes, rows - block * kLanes); ++lane) {
    value[lane] = alpha.at(block * kLanes + lane);
  }
  return value;
}

// Sums of R factors' rows times the columns of one block.
template <int64_t R>
inline void right_lanes(const float* right, const FloatBlocks& x, int64_t in, int64_t block, F* result) {
  F acc[R] = {};
  int64_t k = 0;
  for (; k + 2 <= in; k += 2) {
    F first, second;
    x.pair(block, k, first, second);
    for (int64_t r = 0; r < R; ++r) {
      acc[r] += first * right[r * in + k] + second * right[r * in + k + 1];
    }
  }
  for (; k < in; ++k) {
    for (int64_t r = 0; r < R; ++r) acc[r] += x.column(block, k) * right[r * in + k];
  }
  for (int64_t r = 0; r < R; ++r) result[r] = acc[r];
}

// alpha * right x^T of one block: (rank, 16). `right` is (rank, in).
inline void low_rank_block(const float* right, int64_t rank, const FloatBlocks& x, int64_t in,
                           int64_t block, F alpha, float* inner) {
  for (int64_t r = 0; r < rank;) {
    F some[4];
    const float* from = right + r * in;
    const int64_t count = rank - r >= 4 ? 4 : rank - r >= 2 ? 2 : 1;
    if (count == 4) {
      right_lanes<4>(from, x, in, block, some);
    } else if (count == 2) {
      right_lanes<2>(from, x, in, block, some);
    } else {
      right_lanes<1>(from, x, in, block, some);
    }
    for (int64_t i = 0; i < count; ++i, ++r) {
      const F scaled = switched(alpha, some[i]);
      std::memcpy(inner + r * kLanes, &scaled, sizeof scaled);
    }
  }
}

// One output's `left` times `inner` of one block of rows.
inline F low_rank_lanes(const float* left, int64_t rank, const float* inner) {
  F result = {};
  for (int64_t r = 0; r < rank; ++r) result += load<F>(inner + r * kLanes) * left[r];
  return result;
}

// alpha * sparse(x) of output n for B neighbouring blocks of rows.
template <int B, class V>
inline void sparse_lanes(const Ortho<V>& ortho, const FloatBlocks& x, const F* alpha, int64_t block,
                         int64_t n, F* result) {
  F acc[B] = {};
  for (int32_t j = ortho.crow[n]; j < ortho.crow[n + 1]; ++j) {
    const float value = number(ortho.values[j]);
    for (int b = 0; b < B; ++b) acc[b] += x.column(block + b, ortho.col[j]) * value;
  }
  for (int b = 0; b < B; ++b) result[b] = switched(alpha[block + b], acc[b]);
}

constexpr int64_t kBlocksAtOnce = 4;

// alpha * ortho(x) of outputs [begin, end) for all blocks: (outputs, 16 * blocks). The outer loop
// is over a few blocks, whose columns the cache then holds for all outputs.
template <class V>
void ortho_rows(const Ortho<V>& ortho, const FloatBlocks& x, const float* inner, const F* alpha,
                int64_t blocks, int64_t begin, int64_t end, float* to) {
  const Buffer<float> left = widened(ortho.left + begin * ortho.rank, (end - begin) * ortho.rank);
  for (int64_t block = 0; block < blocks; block += kBlocksAtOnce) {
    const int64_t count = std::min(kBlocksAtOnce, blocks - block);
    for (int64_t n = begin; n < end; ++n) {
      F result[kBlocksAtOnce] = {};
      if (ortho.kind == OrthoKind::kLowRank) {
        for (int64_t b = 0; b < count; ++b) {
          result[b] = low_rank_lanes(left.get() + (n - begin) * ortho.rank, ortho.rank,
                                     inner + (block + b) * ortho.rank * kLanes);
        }
      } else {
        switch (count) {
          case 1: sparse_lanes<1>(ortho, x, alpha, block, n, result); break;
          case 2: sparse_lanes<2>(ortho, x, alpha, block, n, result); break;
          case 3: sparse_lanes<3>(ortho, x, alpha, block, n, result); break;
          default: sparse_lanes<4>(ortho, x, alpha, block, n, result);
        }
      }
      float* row = to + ((n - begin) * blocks + block) * kLanes;
      std::memcpy(row, result, count * sizeof(F));
    }
  }
}

// A (16 outputs, 16 rows) square of fp32, transposed into y or added to what stands there.
template <bool kAdd, class Y>
inline void store_square(const float* square, int64_t rows, int64_t outputs, int64_t stride, Y* y) {
#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__)
  if constexpr (std::is_same_v<Y, BFloat16>) {
    __m512i lanes[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) lanes[n] = _mm512_loadu_si512(square + n * kLanes);
    transpose(lanes);
    const __mmask16 mask = (1u << outputs) - 1;
    for (int64_t row = 0; row < rows; ++row) {
      __m512 value = (__m512)lanes[row];
      Y* to = y + row * stride;
      if constexpr (kAdd) {
        const __m256i before = _mm256_maskz_loadu_epi16(mask, to);
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(before), 16);
        value = _mm512_add_ps(value, _mm512_castsi512_ps(bits));
      }
      _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
    return;
  }
#endif
  for (int64_t row = 0; row < rows; ++row) {
    Y* to = y + row * stride;
    for (int64_t n = 0; n < outputs; ++n) {
      put(to + n, square[n * kLanes + row] + (kAdd ? number(to[n]) : 0.0f));
    }
  }
}

// y[:, begin .. end] += alpha * ortho(x).
template <class Y, class V>
void add_ortho(const Ortho<V>& ortho, const FloatBlocks& x, const float* inner, const F* alpha, int64_t rows,
               int64_t out, int64_t begin, int64_t end, Y* y) {
  const int64_t blocks = up(rows, kLanes) / kLanes;
  const Buffer<float> terms((end - begin) * blocks * kLanes);
  ortho_rows(ortho, x, inner, alpha, blocks, begin, end, terms.get());
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t outputs = std::min(kLanes, end - n);
    for (int64_t block = 0; block < blocks; ++block) {
      alignas(64) float square[kLanes * kLanes];
      for (int64_t i = 0; i < outputs; ++i) {
        std::memcpy(square + i * kLanes,
                    terms.get() + ((n - begin + i) * blocks + block) * kLanes, sizeof(F));
      }
      const int64_t row = block * kLanes;
      store_square<true>(square, std::min(kLanes, rows - row), outputs, out, y + row * out + n);
    }
  }
}

}  // namespace libortho
