// Sixteen fp32 lanes, and how the stored number formats get in and out of them.
//
// GCC's and Clang's vector extensions do the arithmetic on any processor. AVX-512 gets the
// conversions spelled out: GCC 12 takes them apart lane by lane, ten times slower.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace libortho {

constexpr int64_t kLanes = 16;

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int8_t I8 __attribute__((vector_size(16)));
typedef uint8_t U8 __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(32)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline F splat(float value) { return F{} + value; }

inline float number(float value) { return value; }
inline float number(int8_t value) { return value; }
inline float number(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float number(Half value) { return std::bit_cast<_Float16>(value.bits); }

inline BFloat16 round_bf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // NaN stays NaN
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline void put(float* to, float value) { *to = value; }
inline void put(BFloat16* to, float value) { *to = round_bf16(value); }
inline void put(Half* to, float value) {
  to->bits = std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

// alpha * term, and 0 where alpha is 0 even if the term is not finite: what overflows in the ortho
// stream must not reach the rows of a batch that go without it.
inline F switched(F alpha, F term) {
  return std::bit_cast<F>(std::bit_cast<I>(alpha * term) & (alpha != F{}));
}
inline float switched(float alpha, float term) { return alpha == 0 ? 0 : alpha * term; }

// Sixteen bytes as integers.
inline U integers(const uint8_t* from) {
#ifdef __AVX512F__
  return std::bit_cast<U>(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#else
  return __builtin_convertvector(load<U8>(from), U);
#endif
}

// Sixteen neighbours as fp32.
inline F widen(const float* from) { return load<F>(from); }
inline F widen(const int8_t* from) {
#ifdef __AVX512F__
  return std::bit_cast<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(load<I8>(from), I), F);
#endif
}
inline F widen(const BFloat16* from) {
#ifdef __AVX512F__
  const U bits = std::bit_cast<U>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#else
  const U bits = __builtin_convertvector(load<U16>(from), U);
#endif
  return std::bit_cast<F>(bits << 16);
}
inline F widen(const Half* from) {
#ifdef __AVX512F__
  return std::bit_cast<F>(_mm512_cvtph_ps(load<__m256i>(from)));
#else
  F value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = number(from[lane]);
  return value;
#endif
}

// The first `count` neighbours as fp32, and zeros after them; what lies past them is not read.
template <class T>
inline F widen_first(const T* from, int64_t count) {
  if (count >= kLanes) return widen(from);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<F>(_mm512_maskz_loadu_ps(mask, from));
  } else if constexpr (sizeof(T) == 2) {
    alignas(32) T some[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(some), _mm256_maskz_loadu_epi16(mask, from));
    return widen(some);
  }
#endif
  F value = {};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = number(from[lane]);
  return value;
}

// Sixteen table entries, chosen by the low four bits of each lane.
inline F choose(F table, U index) {
#ifdef __AVX512F__
  return std::bit_cast<F>(
      _mm512_permutexvar_ps(std::bit_cast<__m512i>(index), std::bit_cast<__m512>(table)));
#else
  F value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = table[index[lane] & 15u];
  return value;
#endif
}

#ifdef __AVX512F__
// Sixteen vectors of sixteen words become their own transpose.
inline void transpose(__m512i (&rows)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  }
  // b[4 i + j] holds, in 128-bit lane l, column 4 l + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    rows[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#endif

inline float sum(F value) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(std::bit_cast<__m512>(value));
#else
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
#endif
}

}  // namespace libortho
