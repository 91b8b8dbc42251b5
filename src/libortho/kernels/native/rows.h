// A few rows of x (decoding): one pass over the stored weight, which memory bandwidth bounds.
#pragma once

#include <algorithm>

#include "integers.h"
#include "operands.h"

namespace libortho {

constexpr int64_t kRowsAtOnce = 4;

// x as the inner loops want it.
struct FewRows {
  template <class X>
  FewRows(const X* x, int64_t rows, const Weight& weight)
      : rows(rows), in(weight.in), plain(widened(x, rows * in)),
#ifdef LIBORTHO_INTEGERS
        integers(plain.get(), rows, weight,
                 std::is_same_v<X, BFloat16> && IntegerRows::fit(weight)),
#endif
        apart(weight.storage == Storage::kInt4 && !whole()),
        split(apart ? rows * in : 0), sums(apart ? rows * weight.groups : 0) {
    if (!apart) return;
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = plain.get() + row * in;
      float* to = split.get() + row * in;
      for (int64_t block = 0; block < in; block += 2 * kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          to[block + lane] = from[block + 2 * lane];
          to[block + kLanes + lane] = from[block + 2 * lane + 1];
        }
      }
      const int64_t group = weight.group();
      for (int64_t g = 0; g < weight.groups; ++g) {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < group; ++k) total += from[g * group + k];
        sums[row * weight.groups + g] = total / 16;
      }
    }
  }

  // Whether the base's products go through `integers`.
  bool whole() const {
#ifdef LIBORTHO_INTEGERS
    return integers.valid();
#else
    return false;
#endif
  }

  int64_t rows, in;
  Buffer<float> plain;
#ifdef LIBORTHO_INTEGERS
  IntegerRows integers;
#endif
  bool apart;
  // int4 in fp32: the columns of each block of 32, even ones first, since a byte holds an even
  // column and the odd one after it; and the sum of each group over 16, for the zero points.
  Buffer<float> split, sums;
};

// acc[m] += w . x[m] over `count` columns in whole vectors; what is left goes into rest[m].
template <int M, class Q>
inline void dot(const Q* w, const float* x, int64_t stride, int64_t count, F* acc, float* rest) {
  constexpr int kChains = M == 1 ? 4 : 2;
  F part[kChains][M] = {};
  int64_t k = 0;
  for (; k + kChains * kLanes <= count; k += kChains * kLanes) {
    ask_for<2048>(w + k);
    for (int chain = 0; chain < kChains; ++chain) {
      const F weight = widen(w + k + chain * kLanes);
      for (int m = 0; m < M; ++m) {
        part[chain][m] += weight * load<F>(x + m * stride + k + chain * kLanes);
      }
    }
  }
  for (; k + kLanes <= count; k += kLanes) {
    const F weight = widen(w + k);
    for (int m = 0; m < M; ++m) part[0][m] += weight * load<F>(x + m * stride + k);
  }
  for (int m = 0; m < M; ++m) {
    for (int chain = 0; chain < kChains; ++chain) acc[m] += part[chain][m];
  }
  for (; k < count; ++k) {
    for (int m = 0; m < M; ++m) rest[m] += number(w[k]) * x[m * stride + k];
  }
}

// acc[m] += scale * (codes . x[m]) over one group of packed codes 0..15; `count` columns, a
// multiple of 32, and x split into even and odd.
template <int M>
inline void dot4(const uint8_t* w, const float* x, int64_t stride, int64_t count, float scale,
                 F* acc) {
  const F table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F even[M] = {}, odd[M] = {};
  for (int64_t k = 0; k < count; k += 2 * kLanes) {
    const U codes = integers(w + k / 2);
    const F low = choose(table, codes), high = choose(table, codes >> 4);
    for (int m = 0; m < M; ++m) {
      even[m] += low * load<F>(x + m * stride + k);
      odd[m] += high * load<F>(x + m * stride + k + kLanes);
    }
  }
  for (int m = 0; m < M; ++m) acc[m] += (even[m] + odd[m]) * scale;
}

// alpha * values[j] * x[col[j]] of `count` entries, whatever rows they belong to: rows alone are too
// short to fill vectors.
template <class V>
inline void products(const int32_t* col, const V* values, int64_t count, const float* x,
                     float alpha, float* to) {
  int64_t j = 0;
#ifdef __AVX512F__
  for (; j + kLanes <= count; j += kLanes) {
    ask_for<512>(col + j);
    ask_for<256>(values + j);
    const __m512 taken = _mm512_i32gather_ps(_mm512_loadu_si512(col + j), x, 4);
    const F product = widen(values + j) * alpha * std::bit_cast<F>(taken);
    std::memcpy(to + j, &product, sizeof product);
  }
#endif
  for (; j < count; ++j) to[j] = number(values[j]) * alpha * x[col[j]];
}

// int4: groups of `count` columns, which is Group unless that is 0.
template <int M, int Group>
inline void groups4(const Weight& w, const float* x, int64_t n, int64_t count, F* total) {
  constexpr int64_t kSome = 64;
  const int64_t size = Group == 0 ? count : Group;
  const uint8_t* from = static_cast<const uint8_t*>(w.qdata) + n * w.in / 2;
  for (int64_t first = 0; first < w.groups; first += kSome) {
    const int64_t some = std::min(kSome, w.groups - first);
    alignas(64) float scales[kSome];  // widened together: one by one costs as much as a group
    for (int64_t g = 0; g < some; ++g) scales[g] = number(w.scale4[n * w.groups + first + g]);
    for (int64_t g = 0; g < some; ++g) {
      const int64_t at = (first + g) * size;
      ask_for<2048>(from + at / 2);
      dot4<M>(from + at / 2, x + at, w.in, size, scales[g], total);
    }
  }
}

// base(x) of output n for M rows: the sum of `total`'s lanes, and `rest`.
template <int M>
inline void base_dots(const Weight& w, const FewRows& x, int64_t row, int64_t n, F* total,
                      float* rest) {
  const int64_t group = w.group();
  const float* from = x.plain.get() + row * x.in;
  if (w.storage == Storage::kFp16) {
    dot<M>(static_cast<const Half*>(w.qdata) + n * w.in, from, x.in, w.in, total, rest);
  } else if (w.storage == Storage::kInt8) {
    const int8_t* codes = static_cast<const int8_t*>(w.qdata) + n * w.in;
    for (int64_t g = 0; g < w.groups; ++g) {
      F acc[M] = {};
      float left[M] = {};
      dot<M>(codes + g * group, from + g * group, x.in, group, acc, left);
      const float scale = w.scale8[n * w.groups + g];
      for (int m = 0; m < M; ++m) {
        total[m] += acc[m] * scale;
        rest[m] += left[m] * scale;
      }
    }
  } else {
    from = x.split.get() + row * x.in;
    switch (group) {
      case 64: groups4<M, 64>(w, from, n, group, total); break;
      case 128: groups4<M, 128>(w, from, n, group, total); break;
      default: groups4<M, 0>(w, from, n, group, total);
    }
    const int64_t at = n * w.groups;
    for (int m = 0; m < M; ++m) {
      rest[m] -= zero_part(w.scale4 + at, w.zero + at, x.sums.get() + (row + m) * w.groups,
                           w.groups);
    }
  }
}

// The same of the R outputs from n on.
template <int R, int M>
inline void base_dots(const Weight& w, const FewRows& x, int64_t row, int64_t n,
                      F (&total)[R][M], float (&rest)[R][M]) {
#ifdef LIBORTHO_INTEGERS
  if (x.whole()) {
    w.storage == Storage::kInt8 ? integer_dots8<R, M>(w, x.integers, row, n, total, rest)
                                : integer_dots4<R, M>(w, x.integers, row, n, total, rest);
    return;
  }
#endif
  for (int r = 0; r < R; ++r) base_dots<M>(w, x, row, n + r, total[r], rest[r]);
}

// What the outputs of a call share of the ortho stream.
struct Added {
  const float* inner;     // low rank: alpha * right x^T, (rows, rank), each row up to whole vectors
  const float* products;  // sparse: of the entries from `first` on, (rows, stride)
  int64_t first, stride;
};

// y[row .. row + M][n .. n + R] = base + alpha * ortho, in fp32.
template <int R, int M, class V>
inline void outputs(const Weight& w, const Ortho<V>& ortho, const FewRows& x, const Added& added,
                    int64_t row, int64_t n, float* y) {
  F total[R][M] = {};
  float rest[R][M] = {};
  base_dots<R, M>(w, x, row, n, total, rest);
  if (ortho.kind == OrthoKind::kSparse) {
    for (int r = 0; r < R; ++r) {
      const int64_t start = ortho.crow[n + r], count = ortho.crow[n + r + 1] - start;
      for (int64_t j = 0; j < count; j += kLanes) {
        for (int m = 0; m < M; ++m) {
          total[r][m] += widen_first(
              added.products + (row + m) * added.stride + start - added.first + j, count - j);
        }
      }
    }
  } else if (ortho.kind == OrthoKind::kLowRank) {
    for (int r = 0; r < R; ++r) {
      const V* left = ortho.left + (n + r) * ortho.rank;
      for (int64_t i = 0; i < ortho.rank; i += kLanes) {
        const F some = widen_first(left + i, ortho.rank - i);
        for (int m = 0; m < M; ++m) {
          total[r][m] += some * load<F>(added.inner + (row + m) * up(ortho.rank, kLanes) + i);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) y[(row + m) * w.out + n + r] = sum(total[r][m]) + rest[r][m];
  }
}

// alpha * x right^T, see Added: so little that a second thread would cost more than it brings.
template <class V>
Buffer<float> low_rank_inner(const Ortho<V>& ortho, const FewRows& x, Alpha alpha) {
  const int64_t stride = up(ortho.rank, kLanes);
  Buffer<float> inner(x.rows * stride);
  std::memset(inner.get(), 0, x.rows * stride * sizeof(float));
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t r = 0; r < ortho.rank; ++r) {
      F acc = {};
      float rest = 0;
      dot<1>(ortho.right + r * x.in, x.plain.get() + row * x.in, x.in, x.in, &acc, &rest);
      inner[row * stride + r] = switched(alpha.at(row), sum(acc) + rest);
    }
  }
  return inner;
}

// R outputs of every row.
template <int R, class V>
inline void all_rows(const Weight& w, const Ortho<V>& ortho, const FewRows& x, const Added& added,
                     int64_t n, float* y) {
  for (int64_t row = 0; row < x.rows; row += kRowsAtOnce) {
    switch (std::min(kRowsAtOnce, x.rows - row)) {
      case 1: outputs<R, 1>(w, ortho, x, added, row, n, y); break;
      case 2: outputs<R, 2>(w, ortho, x, added, row, n, y); break;
      case 3: outputs<R, 3>(w, ortho, x, added, row, n, y); break;
      default: outputs<R, 4>(w, ortho, x, added, row, n, y);
    }
  }
}

// Outputs [begin, end) of every row; as many at once as registers hold the sums of.
template <class V>
void some_outputs(const Weight& w, const Ortho<V>& ortho, const FewRows& x, const Added& added,
                  int64_t begin, int64_t end, float* y) {
  int64_t n = begin;
  if (x.rows == 1) {
    for (; n + 8 <= end; n += 8) outputs<8, 1>(w, ortho, x, added, 0, n, y);
  }
  if (x.rows == 2) {
    for (; n + 4 <= end; n += 4) outputs<4, 2>(w, ortho, x, added, 0, n, y);
  }
  for (; n + 2 <= end; n += 2) all_rows<2>(w, ortho, x, added, n, y);
  for (; n < end; ++n) all_rows<1>(w, ortho, x, added, n, y);
}

constexpr int64_t kOutputsAtOnce = 64;  // so that their products stay in the first cache

// The same; of a sparse stream the products first, a few outputs at a time.
template <class V>
void few_rows(const Weight& w, const Ortho<V>& ortho, const FewRows& x, const float* inner,
              Alpha alpha, int64_t begin, int64_t end, float* y) {
  if (ortho.kind != OrthoKind::kSparse) {
    some_outputs(w, ortho, x, {inner, nullptr, 0, 0}, begin, end, y);
    return;
  }
  int64_t most = 0;
  for (int64_t n = begin; n < end; n += kOutputsAtOnce) {
    const int64_t last = std::min(end, n + kOutputsAtOnce);
    most = std::max<int64_t>(most, ortho.crow[last] - ortho.crow[n]);
  }
  const Buffer<float> some(x.rows * most);
  for (int64_t n = begin; n < end; n += kOutputsAtOnce) {
    const int64_t last = std::min(end, n + kOutputsAtOnce), first = ortho.crow[n];
    for (int64_t row = 0; row < x.rows; ++row) {
      products(ortho.col + first, ortho.values + first, ortho.crow[last] - first,
               x.plain.get() + row * x.in, alpha.at(row), some.get() + row * most);
    }
    some_outputs(w, ortho, x, {nullptr, some.get(), first, most}, n, last, y);
  }
}

}  // namespace libortho
