// Products of tiles by AMX: the tile registers hold sums of 32 outputs by 32 rows of x.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"

namespace libortho {

// The kernel lets a process use tile registers only after it has asked.
inline bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

constexpr int64_t kSumTiles = 32;  // that are summed up one after the other where sums must be exact

constexpr int8_t kRaised = 0;  // INT8 of x is signed
inline void lower_sums(const uint8_t*, int64_t, bool, int64_t, float*) {}  // nothing to take off

class TileSession {
 public:
  // `first_rows` of tiles 0 to 5, which are of 16 otherwise.
  explicit TileSession(int64_t first_rows = kTileRows) {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.column_bytes[tile] = 64;
      config.rows[tile] = tile < 6 ? first_rows : kTileRows;
    }
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// sums (32 outputs, padded rows) += panel x^T for one or two blocks of sixteen rows.
template <bool kInt8, bool kTwo>
inline void multiply(const uint8_t* panel, const uint8_t* x0, const uint8_t* x1, int64_t tiles,
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
    _tile_loadd(5, panel + (2 * tile + 1) * kTile, 64);
    _tile_loadd(6, x0 + tile * kTile, 64);
    if (kTwo) _tile_loadd(7, x1 + tile * kTile, 64);
    if constexpr (kInt8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
      if (kTwo) {
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (kTwo) {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, below, stride * 4);
  if (kTwo) {
    _tile_stored(2, sums + kLanes, stride * 4);
    _tile_stored(3, below + kLanes, stride * 4);
  }
}

// band x^T of one block: (height, 16), for a band of (tiles, height, 32) bf16, within a TileSession of
// `height`. Four sums at once: one waits for its own last product.
inline void multiply_band(const uint16_t* band, int64_t height, int64_t tiles, const uint8_t* x,
                          float* to) {
  alignas(64) float sums[4][kTileRows * kLanes];
  const int64_t size = height * kTileColumns;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t t = 0;
  for (; t + 4 <= tiles; t += 4) {
    _tile_loadd(4, band + t * size, kTileBytes);
    _tile_loadd(6, x + t * kTile, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, band + (t + 1) * size, kTileBytes);
    _tile_loadd(7, x + (t + 1) * kTile, kTileBytes);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(4, band + (t + 2) * size, kTileBytes);
    _tile_loadd(6, x + (t + 2) * kTile, kTileBytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, band + (t + 3) * size, kTileBytes);
    _tile_loadd(7, x + (t + 3) * kTile, kTileBytes);
    _tile_dpbf16ps(3, 5, 7);
  }
  for (; t < tiles; ++t) {
    _tile_loadd(4, band + t * size, kTileBytes);
    _tile_loadd(6, x + t * kTile, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums[0], kTileBytes);
  _tile_stored(1, sums[1], kTileBytes);
  _tile_stored(2, sums[2], kTileBytes);
  _tile_stored(3, sums[3], kTileBytes);
  for (int64_t i = 0; i < height * kLanes; ++i) {
    to[i] = sums[0][i] + sums[1][i] + sums[2][i] + sums[3][i];
  }
}

}  // namespace libortho
