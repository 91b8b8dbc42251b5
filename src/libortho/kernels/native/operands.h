// The stored weight, the ortho stream and alpha, as the kernels see them.
#pragma once

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "vector.h"

namespace libortho {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that starts on a cache line, as loads of whole tiles and vectors want it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t index) const { return memory_.get()[index]; }

 private:
  std::unique_ptr<T, Free> memory_;
};

// `count` numbers as fp32.
template <class X>
void widen_all(const X* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F lanes = widen(from + i);
    std::memcpy(to + i, &lanes, sizeof lanes);
  }
  for (; i < count; ++i) to[i] = number(from[i]);
}
template <class X>
Buffer<float> widened(const X* from, int64_t count) {
  Buffer<float> wide(count);
  widen_all(from, count, wide.get());
  return wide;
}

enum class Storage { kFp16, kInt8, kInt4 };

// W (out, in), as kernels/reference.py defines its three forms.
struct Weight {
  Storage storage;
  int64_t out, in, groups;
  const void* qdata;
  const float* scale8;      // int8: (out, groups)
  const BFloat16* scale4;   // int4: (out, groups)
  const uint8_t* zero;      // int4: (out, groups), in 16ths of a code

  int64_t group() const { return in / groups; }
};

enum class OrthoKind { kNone, kLowRank, kSparse };

// V is the type of the stored numbers: float, Half or BFloat16.
template <class V>
struct Ortho {
  OrthoKind kind = OrthoKind::kNone;
  int64_t rank = 0;
  const V* left = nullptr;   // (out, rank)
  const V* right = nullptr;  // (rank, in)
  const int32_t* crow = nullptr;
  const int32_t* col = nullptr;
  const V* values = nullptr;

  bool none() const { return kind == OrthoKind::kNone; }
};

// alpha of each flat row of x: its values are shared by equally many consecutive rows.
struct Alpha {
  const float* values = nullptr;
  int64_t share = 1;

  float at(int64_t row) const { return values[row / share]; }
};

// Asks memory for what a reader will want: hardware's own reading ahead stops at each page's end.
template <int64_t Ahead>
inline void ask_for(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + Ahead);
}

// What the zero points of one output take away: sum over groups of scale * zero * sums.
inline float zero_part(const BFloat16* scale, const uint8_t* zero, const float* sums,
                       int64_t groups) {
  F acc = {};
  float rest = 0;
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    acc += __builtin_convertvector(std::bit_cast<I>(integers(zero + g)), F) * widen(scale + g) *
           load<F>(sums + g);
  }
  for (; g < groups; ++g) rest += number(scale[g]) * zero[g] * sums[g];
  return sum(acc) + rest;
}

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace libortho
