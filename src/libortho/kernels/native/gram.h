// M += R^T R for rows R in bf16, by tiles: the second moments that a split is found in. Every product
// is exact, and sums are in fp32.
#pragma once

#include "tiles.h"

#ifdef LIBORTHO_TILES

namespace libortho {

constexpr int64_t kGramDepth = 32;  // tiles of 32 rows between two visits of a square of M
constexpr int64_t kGramStrips = 8;  // of 32 columns that the second cache is to hold

// R in strips of 32 columns, as the left factor R^T of a tile product and as its right factor R. A
// word of the right one holds a column's numbers of two neighbouring rows; sixteen by sixteen words
// and their transpose are the two tiles. Zeros follow the last row and the last column.
class GramStrips {
 public:
  GramStrips(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), strips_(up(columns, kUnit) / kUnit),
        depth_(up(rows, kTileColumns) / kTileColumns),
        left_(strips_ * depth_ * 2 * kTile), right_(strips_ * depth_ * 2 * kTile) {}

  int64_t strips() const { return strips_; }
  int64_t depth() const { return depth_; }

  // Tiles from the `tile`-th on, in the order that `multiply` reads them.
  const uint8_t* left(int64_t strip, int64_t tile) const {
    return left_.get() + (strip * depth_ + tile) * 2 * kTile;
  }
  const uint8_t* right(int64_t strip, int64_t half, int64_t tile) const {
    return right_.get() + ((strip * 2 + half) * depth_ + tile) * kTile;
  }

  void pack(const BFloat16* from, int64_t strip) const {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = strip * kUnit + half * kTileRows;
      const int64_t count = std::clamp<int64_t>(columns_ - column, 0, kLanes);
      const __mmask16 mask = (1u << count) - 1;
      const auto numbers = [&](int64_t row) {
        if (row >= rows_) return _mm512_setzero_si512();
        const BFloat16* at = from + row * columns_ + column;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
      };
      for (int64_t tile = 0; tile < depth_; ++tile) {
        __m512i words[kLanes];
        for (int64_t pair = 0; pair < kLanes; ++pair) {
          const int64_t row = tile * kTileColumns + 2 * pair;
          words[pair] =
              _mm512_or_si512(numbers(row), _mm512_slli_epi32(numbers(row + 1), 16));
        }
        store(words, right_.get() + ((strip * 2 + half) * depth_ + tile) * kTile);
        transpose(words);
        store(words, left_.get() + ((strip * depth_ + tile) * 2 + half) * kTile);
      }
    }
  }

 private:
  static void store(const __m512i (&words)[kLanes], uint8_t* to) {
    for (int64_t i = 0; i < kLanes; ++i) _mm512_store_si512(to + i * kTileBytes, words[i]);
  }

  int64_t rows_, columns_, strips_, depth_;
  Buffer<uint8_t> left_, right_;
};

// The square of M at two strips += the product of `tiles` tiles, within a TileSession.
inline void add_square(const GramStrips& x, int64_t row_strip, int64_t column_strip, int64_t tile,
                       int64_t tiles, int64_t width, float* matrix) {
  const int64_t row = row_strip * kUnit, column = column_strip * kUnit, last = tile + tiles;
  float* to = matrix + row * width + column;
  const bool whole = std::max(row, column) + kUnit <= width;
  const auto add = [&](int64_t count, bool first, int64_t stride, float* sums) {
    multiply<false, true>(x.left(row_strip, tile), x.right(column_strip, 0, tile),
                          x.right(column_strip, 1, tile), count, first, stride, sums);
    tile += count;
  };
  if (whole && tiles <= kSumTiles) {
    add(tiles, false, width, to);
    return;
  }
  alignas(64) float square[kUnit * kUnit];
  for (bool first = true; tile < last; first = false) {
    add(std::min(kSumTiles, last - tile), first, kUnit, square);
  }
  for (int64_t i = 0; i < std::min(kUnit, width - row); ++i) {
    for (int64_t j = 0; j < std::min(kUnit, width - column); ++j) {
      to[i * width + j] += square[i * kUnit + j];
    }
  }
}

// Rows of squares [begin, end) and their counterparts from the end, as far as the diagonal: together
// about as much work as any other such share. Some strips at a time, which the second cache holds
// for all rows.
inline void add_gram_rows(const GramStrips& x, int64_t begin, int64_t end, int64_t width,
                          float* matrix) {
  for (int64_t tile = 0; tile < x.depth(); tile += kGramDepth) {
    const int64_t tiles = std::min(kGramDepth, x.depth() - tile);
    for (int64_t first = 0; first < x.strips(); first += kGramStrips) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t other = x.strips() - 1 - pair;
        for (int64_t row : {pair, other}) {
          const int64_t last = std::min(row, first + kGramStrips - 1);
          for (int64_t column = first; column <= last; ++column) {
            add_square(x, row, column, tile, tiles, width, matrix);
          }
          if (pair == other) break;
        }
      }
    }
  }
}

}  // namespace libortho

#endif
