// Many rows of bf16 x: the ortho stream of some outputs, added where the base's sums are stored.
#pragma once

#include "blocks.h"

namespace libortho {

// The ortho stream of a few outputs, made ready once for all blocks of x.
class Terms {
 public:
  // For at most `outputs` outputs at a time, beginning at multiples of them from `begin` on.
  template <class V>
  Terms(const Ortho<V>& ortho, int64_t outputs, int64_t begin, int64_t end, int64_t stride)
      : Terms(ortho.kind, ortho.rank, outputs, stride,
              ortho.kind == OrthoKind::kSparse ? most(ortho.crow, outputs, begin, end) : 0) {}

  template <class V>
  void fill(const Ortho<V>& ortho, const TileBlocks& x, const F* alpha, int64_t first,
            int64_t last) {
    if (ortho.kind == OrthoKind::kLowRank) {
      widen_all(ortho.left + first * rank_, (last - first) * rank_, left_.get());
    } else if (ortho.kind == OrthoKind::kSparse) {
      const int32_t* crow = ortho.crow + first;
      const int64_t start = crow[0], count = crow[last - first] - start;
      widen_all(ortho.values + start, count, value_.get());
      for (int64_t j = 0; j < count; ++j) {
        const int32_t col = ortho.col[start + j];
        at_[j] = col / 2 * kTileBytes;
        shift_[j] = col % 2 ? 0 : 16;
      }
      const int64_t blocks = stride_ / kLanes;
      for (int64_t block = 0; block < blocks; block += kSparseBlocks) {
        switch (std::min(kSparseBlocks, blocks - block)) {
          case 1: sparse<1>(crow, last - first, x, alpha, block); break;
          case 2: sparse<2>(crow, last - first, x, alpha, block); break;
          case 3: sparse<3>(crow, last - first, x, alpha, block); break;
          default: sparse<kSparseBlocks>(crow, last - first, x, alpha, block);
        }
      }
    }
  }

  // Of the n-th of those outputs.
  F lanes(int64_t n, const float* inner, int64_t block) const {
    switch (kind_) {
      case OrthoKind::kLowRank:
        return low_rank_lanes(left_.get() + n * rank_, rank_, inner + block * rank_ * kLanes);
      case OrthoKind::kSparse: return load<F>(sums_.get() + n * stride_ + block * kLanes);
      default: return F{};
    }
  }

  bool none() const { return kind_ == OrthoKind::kNone; }

 private:
  static constexpr int64_t kSparseBlocks = 4;

  Terms(OrthoKind kind, int64_t rank, int64_t outputs, int64_t stride, int64_t entries)
      : kind_(kind), rank_(rank), stride_(stride), left_(outputs * rank), value_(entries),
        sums_(kind == OrthoKind::kSparse ? outputs * stride : 0), at_(entries), shift_(entries) {}

  static int64_t most(const int32_t* crow, int64_t outputs, int64_t begin, int64_t end) {
    int64_t largest = 0;
    for (int64_t n = begin; n < end; n += outputs) {
      largest = std::max<int64_t>(largest, crow[std::min(end, n + outputs)] - crow[n]);
    }
    return largest;
  }

  // B blocks at once: an entry is looked at once for all of them.
  template <int B>
  void sparse(const int32_t* crow, int64_t outputs, const TileBlocks& x, const F* alpha,
              int64_t block) const {
    const uint8_t* from = x.data + block * x.padded * kLanes;
    const U upper = U{} + 0xffff0000u;
    for (int64_t n = 0; n < outputs; ++n) {
      F acc[B] = {};
      for (int64_t j = crow[n] - crow[0]; j < crow[n + 1] - crow[0]; ++j) {
        const U shift = U{} + static_cast<uint32_t>(shift_[j]);
        const F value = splat(value_[j]);
        for (int b = 0; b < B; ++b) {
          const U pair = load<U>(from + at_[j] + b * x.padded * kLanes);
          acc[b] += std::bit_cast<F>((pair << shift) & upper) * value;
        }
      }
      float* to = sums_.get() + n * stride_ + block * kLanes;
      for (int b = 0; b < B; ++b) {
        const F scaled = switched(alpha[block + b], acc[b]);
        std::memcpy(to + b * kLanes, &scaled, sizeof scaled);
      }
    }
  }

  OrthoKind kind_;
  int64_t rank_, stride_;
  Buffer<float> left_, value_, sums_;
  Buffer<int32_t> at_, shift_;
};

}  // namespace libortho
