// A few rows of bf16 x as 16-bit integers: two bytes for each number, multiplied by the stored codes
// as they are (AVX-512 VNNI). A step of 1/32512 of a row's largest number is far below what bf16 can
// say of the result, and 64 codes take three or four instructions where widening them to fp32 takes
// twelve.
#pragma once

#include "operands.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LIBORTHO_INTEGERS

namespace libortho {

constexpr int64_t kBytes = 64;
constexpr int64_t kPair = 2 * kBytes;  // columns of a vector of packed codes

constexpr int64_t kMostColumns = 1 << 16;

// x = step * (256 * high + low), both signed bytes. In memory, for int8: 64 columns high, the same
// low. For int4, whose bytes hold an even column and the odd one after it: 64 even columns high,
// 64 odd ones high, and the same low.
class IntegerRows {
 public:
  // Whether groups end where vectors do, and no sum leaves 32 bits.
  static bool fit(const Weight& w) {
    if (w.in > kMostColumns) return false;
    if (w.storage == Storage::kInt8) return w.groups == 1 || w.group() % kBytes == 0;
    return w.storage == Storage::kInt4 && (w.group() == kBytes || w.group() % kPair == 0);
  }

  // `x` is (rows, in); nothing is done if not `wanted`.
  IntegerRows(const float* x, int64_t rows, const Weight& w, bool wanted)
      : stride_(wanted ? 2 * up(w.in, kPair) : 0), codes_(rows * stride_),
        steps_(wanted ? rows : 0), sums_(wanted ? rows * w.groups : 0), valid_(wanted) {
    const Buffer<int16_t> whole(stride_ / 2);
    for (int64_t row = 0; row < rows && valid_; ++row) {
      valid_ = round(x + row * w.in, w.in, whole.get(), &steps_[row]);
      std::memset(whole.get() + w.in, 0, (stride_ / 2 - w.in) * sizeof(int16_t));
      for (int64_t g = 0; g < w.groups; ++g) {
        sums_[row * w.groups + g] = total(whole.get() + g * w.group(), w.group());
      }
      int8_t* to = codes_.get() + row * stride_;
      for (int64_t k = 0; k < stride_ / 2; k += kPair) {
        w.storage == Storage::kInt4 ? store4(whole.get() + k, to + 2 * k)
                                    : store8(whole.get() + k, to + 2 * k);
      }
    }
  }

  // False where they are not wanted, or where x has an infinity or a NaN.
  bool valid() const { return valid_; }
  const int8_t* row(int64_t row) const { return codes_.get() + row * stride_; }
  float step(int64_t row) const { return steps_[row]; }
  const float* sums(int64_t row, int64_t groups) const { return sums_.get() + row * groups; }

 private:
  static bool round(const float* x, int64_t in, int16_t* whole, float* step) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + kLanes <= in; k += kLanes) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512(load<__m512i>(x + k), magnitude));
    }
    uint32_t bits = _mm512_reduce_max_epu32(largest);
    for (; k < in; ++k) bits = std::max(bits, std::bit_cast<uint32_t>(x[k]) & 0x7fffffffu);
    const float reach = std::max(std::bit_cast<float>(std::min(bits, 0x7f7fffffu)), 1.17549435e-38f);
    *step = reach / 32512;
    // In two steps: the inverse of a step below the normal numbers would be infinite.
    const float inverse = 32512 / reach;
    for (k = 0; k + kLanes <= in; k += kLanes) {
      const __m512i rounded = _mm512_cvtps_epi32((__m512)(load<F>(x + k) * inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole + k), _mm512_cvtepi32_epi16(rounded));
    }
    for (; k < in; ++k) {
      whole[k] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(x[k] * inverse)));
    }
    return bits < 0x7f800000u;
  }

  // Of `count` numbers, with zeros after them up to a whole vector.
  static float total(const int16_t* whole, int64_t count) {
    __m512i acc = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      acc = _mm512_dpwssd_epi32(acc, load<__m512i>(whole + k), _mm512_set1_epi16(1));
    }
    return static_cast<float>(_mm512_reduce_add_epi32(acc));
  }

  // 32 numbers' high bytes; `low` becomes their low ones.
  static __m256i high_bytes(const int16_t* whole, __m256i* low) {
    const __m512i number = load<__m512i>(whole);
    *low = _mm512_cvtepi16_epi8(number);
    return _mm512_cvtepi16_epi8(_mm512_srai_epi16(
        _mm512_add_epi16(number, _mm512_set1_epi16(128)), 8));
  }

  static void store(int8_t* to, __m256i bytes) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes);
  }

  static void store8(const int16_t* whole, int8_t* to) {
    for (int part = 0; part < 4; ++part) {
      __m256i low;
      const __m256i high = high_bytes(whole + 32 * part, &low);
      int8_t* at = to + part / 2 * kPair + part % 2 * 32;
      store(at, high);
      store(at + kBytes, low);
    }
  }

  static void store4(const int16_t* whole, int8_t* to) {
    alignas(64) int16_t ordered[kPair];
    for (int part = 0; part < 4; ++part) {
      const __m512i number = load<__m512i>(whole + 32 * part);
      store16(ordered + 16 * part, _mm512_cvtepi32_epi16(number));
      store16(ordered + kBytes + 16 * part, _mm512_cvtepi32_epi16(_mm512_srli_epi32(number, 16)));
    }
    for (int part = 0; part < 4; ++part) {
      __m256i low;
      store(to + 32 * part, high_bytes(ordered + 32 * part, &low));
      store(to + kPair + 32 * part, low);
    }
  }

  static void store16(int16_t* to, __m256i numbers) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), numbers);
  }

  int64_t stride_;
  Buffer<int8_t> codes_;
  Buffer<float> steps_, sums_;
  bool valid_;
};

inline F floats(__m512i whole) { return std::bit_cast<F>(_mm512_cvtepi32_ps(whole)); }

// The first `count` bytes at `from`, zeros after them.
inline __m512i bytes(const void* from, int64_t count) {
  if (count >= kBytes) return load<__m512i>(from);
  return _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from);
}

// acc + bytes without a sign . bytes with one, in each of sixteen lanes.
inline __m512i dot_bytes(__m512i acc, __m512i codes, const int8_t* x) {
  return _mm512_dpbusd_epi32(acc, codes, load<__m512i>(x));
}

// base(x) of the R outputs from n on, for M rows, of an int8 weight; as `base_dots`. Several outputs
// at once are several streams of memory: one alone does not fill what the processor can have in
// flight.
template <int R, int M>
inline void integer_dots8(const Weight& w, const IntegerRows& x, int64_t row, int64_t n,
                          F (&total)[R][M], float (&rest)[R][M]) {
  const int64_t group = w.group();
  const int8_t* from = static_cast<const int8_t*>(w.qdata) + n * w.in;
  const int8_t* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = x.row(row + m);
  // The instruction wants one side without a sign: codes plus 128, which `sums` take away again.
  const __m512i flip = _mm512_set1_epi8(-128);
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i high[R][M] = {}, low[R][M] = {};
    for (int64_t k = g * group; k < (g + 1) * group; k += kBytes) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* at = from + r * w.in + k;
        ask_for<512>(at);
        const __m512i codes = _mm512_xor_si512(bytes(at, w.in - k), flip);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          high[r][m] = dot_bytes(high[r][m], codes, rows[m] + 2 * k);
          low[r][m] = dot_bytes(low[r][m], codes, rows[m] + 2 * k + kBytes);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const float scale = w.scale8[(n + r) * w.groups + g];
      for (int m = 0; m < M; ++m) {
        total[r][m] += (floats(high[r][m]) * 256.0f + floats(low[r][m])) * scale;
        rest[r][m] -= 128 * scale * x.sums(row + m, w.groups)[g];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      total[r][m] *= x.step(row + m);
      rest[r][m] *= x.step(row + m);
    }
  }
}

// The same of an int4 weight.
template <int R, int M>
inline void integer_dots4(const Weight& w, const IntegerRows& x, int64_t row, int64_t n,
                          F (&total)[R][M], float (&rest)[R][M]) {
  constexpr int64_t kSome = 64;
  const int64_t group = w.group(), pairs = std::max<int64_t>(1, group / kPair);
  const uint8_t* from = static_cast<const uint8_t*>(w.qdata) + n * w.in / 2;
  const BFloat16* scale = w.scale4 + n * w.groups;
  const int8_t* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = x.row(row + m);
  const __m512i nibble = _mm512_set1_epi8(15);
  // The next outputs' scales and zero points: as much as a group is too short to be read ahead.
  for (int64_t at = 0; at < R * w.groups; at += kBytes) {
    __builtin_prefetch(w.zero + (n + R) * w.groups + at);
    __builtin_prefetch(scale + R * w.groups + at);
    __builtin_prefetch(scale + R * w.groups + at + kBytes / 2);
  }
  for (int64_t first = 0; first < w.groups; first += kSome) {
    const int64_t some = std::min(kSome, w.groups - first);
    alignas(64) float scales[R][kSome + 16];  // one by one costs as much as a group
    for (int r = 0; r < R; ++r) {
      for (int64_t g = 0; g < some; ++g) scales[r][g] = number(scale[r * w.groups + first + g]);
      scales[r][some] = 0;  // beside the last of an odd number of groups of 64
    }
    const int64_t end = (first + some) * group;
    int64_t of = 0, left = pairs;
    for (int64_t k = first * group; k < end; k += kPair) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = from + (r * w.in + k) / 2;
        ask_for<512>(at);
        const __m512i packed = bytes(at, (w.in - k) / 2);
        const __m512i even = _mm512_and_si512(packed, nibble);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        __m512 step = _mm512_set1_ps(scales[r][of]);
        if (group == kBytes) {
          step = _mm512_mask_broadcastss_ps(step, 0xff00, _mm_load_ss(scales[r] + of + 1));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const int8_t* with = rows[m] + 2 * k;
          __m512i acc = dot_bytes(_mm512_setzero_si512(), even, with);
          acc = dot_bytes(acc, odd, with + kBytes);
          acc = _mm512_slli_epi32(acc, 8);
          acc = dot_bytes(acc, even, with + kPair);
          acc = dot_bytes(acc, odd, with + kPair + kBytes);
          total[r][m] += floats(acc) * std::bit_cast<F>(step);
        }
      }
      if (group == kBytes) {
        of += 2;
      } else if (--left == 0) {
        left = pairs;
        ++of;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      const float zeros = zero_part(scale + r * w.groups, w.zero + (n + r) * w.groups,
                                    x.sums(row + m, w.groups), w.groups);
      total[r][m] *= x.step(row + m);
      rest[r][m] -= zeros / 16 * x.step(row + m);
    }
  }
}

}  // namespace libortho

#endif
